"""Lightning indexer: scores of compressed entries and the choice of the best ones."""

from ds4.kernels.indexer.ref import index_query, index_score, index_topk

__all__ = ["index_query", "index_score", "index_topk"]

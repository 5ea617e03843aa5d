"""Writing the cache: KV rows into the ring, compressor state, pooled entries, indexer keys."""

from ds4.kernels.kv_publish.ref import finish_entry, pool_csa, pool_hca

__all__ = ["finish_entry", "pool_csa", "pool_hca"]

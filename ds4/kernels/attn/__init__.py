"""Attention over window rows and compressed rows, with a sink per head."""

from ds4.kernels.attn.ref import attend, attn_decode, attn_prefill, query

__all__ = ["attend", "attn_decode", "attn_prefill", "query"]

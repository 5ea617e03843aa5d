"""The dimensions of the real model, for arithmetic."""

from __future__ import annotations

from ds4.config import ModelConfig

FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=(0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(2, 43))),
    compress_rope_theta=160000,
    rope_theta=10000,
    rope_factor=16,
    rope_original_max_position=65536,
    rope_beta_fast=32,
    rope_beta_slow=1,
    max_position_embeddings=1048576,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=6,
    routed_scaling_factor=1.5,
    num_hash_layers=3,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    n_mtp_layers=1,
    bos_token_id=0,
    eos_token_id=1,
)

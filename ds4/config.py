"""ModelConfig: every dimension of a DeepSeek-V4 checkpoint in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["swa", "csa", "hca"]


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants; field names are those of the official ``config.json`` (spec model.md 1.1)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]  # exactly num_hidden_layers entries, each 0, 4 or another window length
    compress_rope_theta: float
    rope_theta: float
    rope_factor: float
    rope_original_max_position: int  # 0 switches YaRN off
    rope_beta_fast: float
    rope_beta_slow: float
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    num_hash_layers: int
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    n_mtp_layers: int  # mtp.* stages actually present in the checkpoint
    bos_token_id: int
    eos_token_id: int
    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int | None = None

    def layer_kind(self, layer: int) -> LayerKind:
        """``swa`` (ratio 0), ``csa`` (ratio 4: overlapping compressor and indexer) or ``hca`` (any other ratio)."""
        ratio = self.compress_ratios[layer]
        return "swa" if ratio == 0 else "csa" if ratio == 4 else "hca"

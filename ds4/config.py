"""ModelConfig: every dimension of a DeepSeek-V4 checkpoint in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ds4.config_keys import gguf_fields, json_fields, shown
from ds4.errors import Ds4Error

LayerKind = Literal["swa", "csa", "hca"]

# Largest value that is still believable, per field; anything above is a damaged or hostile file.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "num_hidden_layers": 4096,
    "num_attention_heads": 4096,
    "head_dim": 1 << 16,
    "qk_rope_head_dim": 1 << 16,
    "q_lora_rank": 1 << 18,
    "o_groups": 4096,
    "o_lora_rank": 1 << 18,
    "sliding_window": 1 << 20,
    "max_position_embeddings": 1 << 31,
    "index_n_heads": 4096,
    "index_head_dim": 1 << 16,
    "index_topk": 1 << 20,
    "moe_intermediate_size": 1 << 18,
    "n_routed_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
    "hc_mult": 64,
    "hc_sinkhorn_iters": 10_000,
}


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

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, source: str, n_mtp_layers: int | None = None) -> ModelConfig:
        """The configuration of an official ``config.json``, already parsed.

        config        the JSON object; every field below must be present, nothing is guessed
        source        what to call the file in messages
        n_mtp_layers  draft stages counted in the checkpoint; without it ``num_nextn_predict_layers`` is believed
        Error:   Ds4Error naming the field and the source, for a missing field, a wrong type or an inconsistency.
        Source:  spec model.md 1.1 and 1.4.
        """
        values = json_fields(config, source)
        if n_mtp_layers is not None:
            values["n_mtp_layers"] = n_mtp_layers
        return _trimmed(cls(**values), source)

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, source: str, n_mtp_layers: int | None = None, n_nextn_blocks: int = 0
    ) -> ModelConfig:
        """The configuration in the key/value section of a ``deepseek4`` GGUF file.

        metadata        full key -> Python value (int, float, bool, str or list)
        source          what to call the file in messages
        n_mtp_layers    draft stages counted in the file; without it 0, since ``nextn_predict_layers`` may be a leftover
        n_nextn_blocks  how many of the last ``block_count`` blocks are llama.cpp draft blocks, not trunk layers
        Error:   Ds4Error naming the key and the source.
        Source:  spec weights.md 3.1.
        """
        values = gguf_fields(metadata, source, n_nextn_blocks)
        return _trimmed(cls(n_mtp_layers=n_mtp_layers or 0, **values), source)

    def validate(self, source: str) -> None:
        """Check every constraint of spec model.md 1.4; raises Ds4Error naming the field and ``source``."""

        def check(ok: bool, field: str, problem: str) -> None:
            if not ok:
                raise Ds4Error(f"{source}: {field} = {shown(getattr(self, field))} {problem}")

        _check_types(self, source)
        for name, most in _LIMITS.items():
            check(getattr(self, name) >= 1, name, "must be at least 1")
            check(getattr(self, name) <= most, name, f"is above {most}, the most that makes sense")
        for name in ("rope_original_max_position", "n_mtp_layers", "num_hash_layers", "bos_token_id", "eos_token_id"):
            check(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("compress_rope_theta", "rope_theta"):
            check(getattr(self, name) > 1, name, "must be above 1")
        check(self.rope_factor >= 1, "rope_factor", "must be at least 1")
        for name in ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_beta_slow"):
            check(getattr(self, name) > 0, name, "must be positive")
        check(self.rope_beta_fast >= self.rope_beta_slow, "rope_beta_fast", "must not be below rope_beta_slow")
        check(self.rope_original_max_position <= 1 << 31, "rope_original_max_position", "is above 2147483648")
        check(self.n_mtp_layers <= 64, "n_mtp_layers", "is above 64, the most that makes sense")
        layers = self.num_hidden_layers
        count = len(self.compress_ratios)
        check(count >= layers, "compress_ratios", f"has {count} entries for {layers} layers; each layer needs one")
        check(
            all(0 <= r <= 1 << 20 for r in self.compress_ratios), "compress_ratios", "has an entry outside 0..1048576"
        )
        check(1 not in self.compress_ratios, "compress_ratios", "has an entry 1, which compresses nothing")
        check(self.num_hash_layers <= layers, "num_hash_layers", f"is above num_hidden_layers = {layers}")
        experts = self.n_routed_experts
        check(self.num_experts_per_tok <= experts, "num_experts_per_tok", f"is above n_routed_experts = {experts}")
        check(self.num_attention_heads % self.o_groups == 0, "o_groups", "must divide num_attention_heads")
        rope = self.qk_rope_head_dim
        check(rope % 2 == 0, "qk_rope_head_dim", "must be even")
        check(rope < self.head_dim, "qk_rope_head_dim", f"must be below head_dim = {self.head_dim}")
        check((self.head_dim - rope) % 64 == 0, "head_dim", f"minus qk_rope_head_dim = {rope} must be a multiple of 64")
        index = self.index_head_dim
        check(index & (index - 1) == 0 and index % 32 == 0, "index_head_dim", "must be a power of two and at least 32")
        check(index > rope, "index_head_dim", f"must be above qk_rope_head_dim = {rope}")
        for name in ("bos_token_id", "eos_token_id", "dspark_noise_token_id"):
            check(
                (getattr(self, name) or 0) in range(self.vocab_size),
                name,
                f"is not below vocab_size = {self.vocab_size}",
            )
        for name in ("dspark_block_size", "dspark_markov_rank"):
            check(getattr(self, name) is None or 1 <= getattr(self, name) <= 1 << 16, name, "must lie in 1..65536")
        ids = self.dspark_target_layer_ids
        check(all(i in range(layers) for i in ids), "dspark_target_layer_ids", f"names a layer outside 0..{layers - 1}")


_TYPES = {field.name: str(field.type) for field in fields(ModelConfig)}


def _trimmed(config: ModelConfig, source: str) -> ModelConfig:
    """The validated config, with the compress_ratios entries of draft blocks dropped."""
    config.validate(source)
    return replace(config, compress_ratios=config.compress_ratios[: config.num_hidden_layers])


def _check_types(config: ModelConfig, source: str) -> None:
    for name, kind in _TYPES.items():
        value = getattr(config, name)
        if kind.startswith("tuple"):
            ok = isinstance(value, tuple) and all(type(v) is int for v in value)
        elif kind == "float":
            ok = type(value) in (int, float) and abs(value) <= 1e30  # false for not-a-number
        else:
            ok = type(value) is int or (value is None and kind.endswith("None"))
        if not ok:
            wanted = {"float": "a finite number", "int": "an integer", "int | None": "an integer"}.get(kind, "integers")
            raise Ds4Error(f"{source}: {name} must be {wanted}, not {shown(value)}")

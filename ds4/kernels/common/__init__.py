"""Pieces that several operations share: RMS norm, RoPE, Hadamard rotation."""

from ds4.kernels.common.ref import apply_rope, hadamard, rms_norm, rope_angles, rope_frequencies

__all__ = ["apply_rope", "hadamard", "rms_norm", "rope_angles", "rope_frequencies"]

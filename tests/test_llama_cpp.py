"""llama.cpp loads the bundled model and what is converted from it, and agrees, where its Python binding is installed.

It is no dependency.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ds4.cli import main
from ds4.demo import bundled_model_path
from ds4.engine import LLM

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: no peer to compare with")


def agrees(llm: LLM) -> None:
    """The logits of a prompt, in llama.cpp and here."""
    assert llm.tokenizer is not None
    ids = llm.encode_prompt("Tell me a short story about a robot learning to paint.")
    peer = llama_cpp.Llama(str(llm.path), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    peer.eval(ids)
    theirs = torch.from_numpy(np.array(peer.scores[: len(ids)], dtype=np.float32))
    ours = llm.logits(ids)
    relative = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    # llama.cpp rounds activations to 8 bits in front of every quantised matrix and keeps its cache in F16.
    assert relative.median() < 5e-2
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.9


def test_bundled_model_in_llama_cpp() -> None:
    agrees(LLM(ctx=512))


@pytest.mark.parametrize(
    ("experts", "dense"), [("mxfp4", "q8_0"), ("q8_0", "bf16"), ("bf16", "f16"), ("nvfp4", "keep")]
)
def test_converted_models_in_llama_cpp(tmp_path: Path, experts: str, dense: str) -> None:
    """From GGUF to GGUF and, through safetensors, back; NVFP4 as it is in the bundled file, without multipliers."""

    def convert(source: Path, out: str, *options: str) -> Path:
        assert CliRunner().invoke(main, ["convert", str(source), str(tmp_path / out), *options]).exit_code == 0
        return tmp_path / out

    converted = convert(bundled_model_path(), "converted.gguf", "--experts", experts, "--dense", dense)
    agrees(LLM(converted, ctx=512))
    if experts == "bf16":
        agrees(LLM(convert(convert(converted, "folder"), "back.gguf"), ctx=512))

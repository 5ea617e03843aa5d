"""llama.cpp loads the bundled model and agrees with it, where its Python binding is installed (it is no dependency)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds4.engine import LLM

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: no peer to compare with")


def test_bundled_model_in_llama_cpp() -> None:
    llm = LLM(ctx=512)
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

"""Which draft head a checkpoint has."""

from __future__ import annotations

from typing import Protocol

from ds4.model.params import Params
from ds4.model.steps import Decoder
from ds4.model.transformer import Transformer
from ds4.mtp.drafter import Drafter
from ds4.mtp.dspark import DSpark, DSparkDrafter
from ds4.mtp.dspark_kernels import KernelDSparkDrafter
from ds4.mtp.mtp_block import MTPBlock, MTPDrafter
from ds4.mtp.mtp_kernels import KernelMTPDrafter


class MakeDrafter(Protocol):
    """A draft head, loaded: makes a drafter for each new session."""

    def __call__(self, decoder: Decoder | None = None) -> Drafter:
        """``decoder``: the session's, where its steps go through kernels, so that drafts do too."""


def draft_head(trunk: Transformer, params: Params) -> MakeDrafter | None:
    """The checkpoint's draft head; None where there is none.

    params  the trunk's own, in which a head from a side file has been put (ds4.weights.draft.attach_draft)
    Error:  Ds4Error for a missing tensor or a wrong shape.
    """
    config = trunk.config
    if not config.n_mtp_layers:
        return None
    if config.dspark_block_size is not None:
        dspark = DSpark(config, params, trunk)
        return lambda decoder=None: DSparkDrafter(dspark) if decoder is None else KernelDSparkDrafter(dspark, decoder)
    block = MTPBlock(config, params, trunk)
    return lambda decoder=None: MTPDrafter(block) if decoder is None else KernelMTPDrafter(block, decoder)

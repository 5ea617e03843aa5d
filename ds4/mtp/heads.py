"""Which draft head a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ds4.model.params import Params
from ds4.model.transformer import Transformer
from ds4.mtp.drafter import Drafter
from ds4.mtp.dspark import DSpark, DSparkDrafter
from ds4.mtp.mtp_block import MTPBlock, MTPDrafter


def draft_head(trunk: Transformer, params: Params) -> Callable[[], Drafter] | None:
    """The checkpoint's draft head, loaded: makes a drafter for each new session. None where there is no head.

    params  the trunk's own, in which a head from a side file has been put (ds4.weights.draft.attach_draft)
    Error:  Ds4Error for a missing tensor or a wrong shape.
    """
    config = trunk.config
    if not config.n_mtp_layers:
        return None
    if config.dspark_block_size is not None:
        return partial(DSparkDrafter, DSpark(config, params, trunk))
    return partial(MTPDrafter, MTPBlock(config, params, trunk))

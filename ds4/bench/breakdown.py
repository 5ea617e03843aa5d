"""Where the time of a plain decode step goes: in the parts of the torch network on the CPU, in operations on a GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds4.bench.prompts import Prompt
from ds4.profiling.host import part_times

if TYPE_CHECKING:
    from ds4.engine import LLM

WARM_UP = 2


def host_breakdown(llm: LLM, position: int, steps: int) -> dict[str, Any]:
    """Means over ``steps`` steps of one token behind ``position`` random ones, by the host's clock.

    returns  how, position, step_us, idle_percent (None: the CPU does nothing else), parts (name, us, percent of the
             step, percent_of_copy: None, parts are not told apart in bytes)
    """
    ids = Prompt(llm, "random", position + WARM_UP + steps).body
    session = llm.session(len(ids))
    session.drafter = None
    session.prefill(ids[:position])
    for token in ids[position : position + WARM_UP]:
        session.decode([token])
    with part_times(llm.model) as spent:
        began = time.perf_counter()
        for token in ids[position + WARM_UP :]:
            session.decode([token])
        whole = time.perf_counter() - began
    times = {**spent, "rest": max(0.0, whole - sum(spent.values()))}
    parts = [
        {"name": name, "us": seconds / steps * 1e6, "percent": 100 * seconds / whole, "percent_of_copy": None}
        for name, seconds in times.items()
    ]
    about = {"how": "timers on the host", "position": position, "step_us": whole / steps * 1e6}
    return {**about, "idle_percent": None, "parts": parts}


def device_breakdown(found: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a ``profile_record`` (ds4.profiling.measure): operations timed alone, and the step uninterrupted.

    idle_percent: of the uninterrupted step launched from the host, what exceeds the sum of its operations.
    """
    step = found["step"]
    names = ("us", "percent", "percent_of_copy")
    parts = [{"name": row["operation"], **{name: row[name] for name in names}} for row in found["operations"]]
    idle = max(0.0, 100 * (1 - step["parts_us"] / step["eager_us"]))
    about = {"how": "events on the device", "position": found["position"], "step_us": step["eager_us"]}
    return {**about, "idle_percent": idle, "parts": parts}

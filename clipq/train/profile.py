"""torch's profiler over chosen steps of a run."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from clipq.dist.env import DistEnv

log = logging.getLogger(__name__)


def profiler(steps: tuple[int, int] | None, *, after: int, folder: Path, env: DistEnv) -> AbstractContextManager[Any]:
    """Records steps [first, last]; the trace opens in Perfetto or TensorBoard.

    Args:
        after: the step that the run goes on after.
        folder: the run folder.
    """
    if steps is None:
        return nullcontext()
    if after >= steps[0]:
        log.info("log.profile=%s: no profile, the run goes on after step %d", list(steps), after)
        return nullcontext()
    before = steps[0] - after - 1
    warmup = min(1, before)  # the profiler's own start-up then falls outside of what is recorded
    activities = [torch.profiler.ProfilerActivity.CPU]
    if env.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def save(recorded: Any) -> None:
        path = folder / "profile" / f"rank_{env.rank}_steps_{steps[0]}_{steps[1]}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
        log.info("wrote the profile %s", path)

    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(
            skip_first=before - warmup, wait=0, warmup=warmup, active=steps[1] - steps[0] + 1, repeat=1
        ),
        on_trace_ready=save,
    )

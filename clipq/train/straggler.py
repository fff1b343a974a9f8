"""Which rank the others wait for, as far as its data are the cause.

Of a slow device or host nothing is seen here: in a collective all ranks are as slow as the slowest, and to tell them
apart would take an event around each.
"""

from __future__ import annotations

import logging
import socket
import statistics

import torch
import torch.distributed as dist

from clipq.dist.env import DistEnv
from clipq.dist.gather import gather_objects
from clipq.log.writers import Row

log = logging.getLogger(__name__)

SHARE, LOGS = 0.2, 3
"""Share of the time that a rank waits for data beyond the median of ranks, and in how many logged steps in a row: then
it is told."""


class Stragglers:
    """The rank that waits longest for its data, over the logged steps."""

    def __init__(self) -> None:
        self._rank, self._times = -1, 0

    def look(self, env: DistEnv, data_wait: float) -> Row:
        """Compares ranks, and warns of one that is slower again and again. Collective.

        Args:
            data_wait: share of the time since the last logged step that this rank waited for data.

        Returns:
            slowest_rank and slowest_data_wait, for the metrics; nothing for a single process.
        """
        if not env.is_distributed:
            return {}
        own = torch.tensor([data_wait], device=env.device)
        parts = [torch.empty_like(own) for _ in range(env.world_size)]
        dist.all_gather(parts, own)
        waits: list[float] = torch.cat(parts).tolist()
        slowest = max(range(len(waits)), key=waits.__getitem__)
        if self.persistent(waits, slowest):
            host = gather_objects(socket.gethostname())[slowest]
            others = statistics.median_low(waits)
            log.warning(
                "all ranks wait for rank %d (host %s): it waits for its data %.0f %% of the time, others %.0f %%",
                *(slowest, host, 100 * waits[slowest], 100 * others),
            )
        return {"slowest_rank": slowest, "slowest_data_wait": waits[slowest]}

    def persistent(self, waits: list[float], slowest: int) -> bool:
        """Whether it is time to tell of the slowest rank: once for each time that it stays so. Equal on all ranks."""
        if waits[slowest] - statistics.median_low(waits) < SHARE:
            slowest = -1
        self._times = self._times + 1 if slowest == self._rank else 1
        self._rank = slowest
        return slowest >= 0 and self._times == LOGS

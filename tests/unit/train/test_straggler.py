from __future__ import annotations

import logging

import pytest

from clipq.dist.env import distributed
from clipq.train.straggler import LOGS, Stragglers
from tests.helpers import run_distributed


def test_a_rank_is_told_once_when_it_stays_slow() -> None:
    stragglers = Stragglers()
    slow = [0.0, 0.1, 0.6, 0.1]
    assert [stragglers.persistent(slow, 2) for _ in range(LOGS + 2)] == [False] * (LOGS - 1) + [True, False, False]
    assert not stragglers.persistent([0.5, 0.6, 0.6, 0.5], 1), "all of them are slow"
    assert [stragglers.persistent(slow, 2) for _ in range(LOGS)] == [False] * (LOGS - 1) + [True]


def test_ranks_that_take_turns_are_not_told() -> None:
    stragglers = Stragglers()
    assert not any(stragglers.persistent([0.9 * (n % 2), 0.9 * (1 - n % 2)], 1 - n % 2) for n in range(10))


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _look() -> None:
    told = _Lines()
    logging.getLogger("clipq").addHandler(told)
    with distributed("cpu", timeout_minutes=1) as env:
        stragglers = Stragglers()
        for _ in range(LOGS):
            row = stragglers.look(env, 0.5 * env.rank)
            assert row == {"slowest_rank": 1, "slowest_data_wait": 0.5}
    (line,) = told.lines
    assert line.startswith("all ranks wait for rank 1 (host ")
    assert line.endswith("it waits for its data 50 % of the time, others 0 %")


@pytest.mark.slow
def test_two_ranks() -> None:
    run_distributed(_look, 2)

from __future__ import annotations

from typing import Any

from clipq.dist.watchdog import FREE, SHOWN, Place, Progress, describe


def beats(*places: tuple[int, Place], count: int = 1) -> list[list[Any]]:
    return [[count, f"node{r // 2}", step, place, 605.0] for r, (step, place) in enumerate(places)]


STEP = (121, Place.STEP)


def test_a_rank_that_is_behind() -> None:
    places = (STEP, STEP, STEP, (121, Place.DATA))
    said = describe(beats(*places), beats(*places, count=2))
    assert said == "rank 3 (host node1) waits for the data of step 121 since 605 s, and others wait for it"


def test_a_rank_that_is_silent() -> None:
    """It is to blame, wherever it was when it was last heard of: others may be a step behind."""
    first, second = beats(STEP, (120, Place.STEP)), beats(STEP, (120, Place.STEP), count=2)
    second[0] = first[0]
    assert describe(first, second) == "rank 0 (host node0) is silent, the last it said: it is in step 121"


def test_no_rank_is_to_blame() -> None:
    assert describe(beats(STEP, STEP), beats(STEP, STEP, count=2)) == "all 2 ranks are at the same place"


def test_a_message_names_few_ranks() -> None:
    said = describe(beats(*[STEP] * 20), beats(*[STEP] * 20))
    assert said.count("is silent") == SHOWN
    assert said.endswith(f"; and {20 - SHOWN} more")


def test_steps_since_a_pause() -> None:
    progress = Progress()
    for step in range(1, FREE + 2):
        progress.enter(step, Place.DATA)
        progress.enter(step, Place.STEP)
        assert progress.now.steps == step
    progress.enter(9, Place.PAUSE)
    assert progress.now.steps == 0

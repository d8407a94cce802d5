"""The soak in small: a linker for seconds, and what counts as growth. `make torture` runs half an hour."""

from __future__ import annotations

import os

import pytest

from tests.soak.linker import soak_linker
from tests.soak.watching import Watch


def test_a_linker_in_threads_answers_from_its_state_while_the_knowledge_base_is_edited():
    result = soak_linker(0.05, clients=4, reopen=1)
    assert result["wrong"] == []
    assert min(result[name] for name in ("answers", "edits", "states")) > 0


@pytest.mark.parametrize(
    ("mb", "files", "grown"),
    [
        ([300, *[500] * 29], [4, *[6] * 29], 0),  # only while it starts
        ([500 + 20 * (minute % 2) for minute in range(30)], [6 + 2 * (minute % 2) for minute in range(30)], 0),
        ([500 + 2 * minute for minute in range(30)], [6] * 30, 1),
        ([500] * 30, [6 + minute for minute in range(30)], 1),
    ],
)
def test_growth_after_a_sixth_of_the_time_is_seen(mb, files, grown):
    watch = Watch(os.getpid())
    watch.look()
    assert min(watch.samples[0][name] for name in ("mb", "files", "threads")) > 0
    watch.samples = [{"mb": a, "files": b} for a, b in zip(mb, files, strict=True)]
    assert len(watch.growth()) == grown

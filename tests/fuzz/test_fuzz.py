"""A few inputs of every target, always the same ones, and all inputs that once failed. `make torture` tries many more."""

from __future__ import annotations

import pytest

from tests.fuzz.engine import CORPUS, fuzz, load_failing, save_failing
from tests.fuzz.targets import TARGETS

FAILED = sorted(CORPUS.rglob("*.txt"))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_any_input_gives_a_result_or_a_typed_error(name):
    target = TARGETS[name]
    outcome = fuzz(target, 8 * target.share if target.share > 2 else 2 * target.share)
    if outcome.error is not None:
        path = save_failing(target, outcome.failing)
        raise AssertionError(f"{path} has the smallest input that failed.") from outcome.error


@pytest.mark.parametrize("path", FAILED, ids=[f"{path.parent.name}-{path.stem}" for path in FAILED])
@pytest.mark.filterwarnings("ignore")
def test_an_input_that_once_failed_does_not_fail_again(path):
    TARGETS[path.parent.name].run(load_failing(path))

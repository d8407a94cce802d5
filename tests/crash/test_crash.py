"""A few kills of every command. `make torture` does twenty of each, at random moments."""

from __future__ import annotations

import pytest

from tests.crash.jobs import JOBS
from tests.crash.killing import Moment, prepare, run_job, survives

#: Shares of the operations on files before which each command is killed. Adapting and suites train as `train` does.
SHARES = {
    "train": (0.35, 0.8),
    "kb build": (0.6, 0.9),  # the second time when all shards are done
    "kb index": (0.7,),
    "kb add, kb remove": (0.5,),
    "candidates": (0.5,),
    "link --input": (0.6,),
    "data build": (0.5,),
}


#: Shares of the operations before which the disk becomes full. Checkpoints are written by native code.
FULL = {"train": 0.5, "kb build": 0.6, "data build": 0.5}


@pytest.mark.parametrize("name", SHARES)
def test_a_killed_command_goes_on_and_leaves_what_it_would_have_left(name, tmp_path):
    # Paths are part of some results, so all runs are in the same folder.
    folder = tmp_path / "job"
    prepare(name, folder)
    course = run_job(name, folder)
    shares = [("operation", share) for share in SHARES[name]] + ([("full", FULL[name])] if name in FULL else [])
    for number, (kind, share) in enumerate(shares):
        folder.rename(tmp_path / f"run{number}")
        moment = Moment(kind, max(1, round(share * course.operations)))
        assert survives(name, folder, course, [moment]) == 1


def test_every_command_that_goes_on_is_killed_in_torture():
    assert set(SHARES) == set(JOBS) - {"adapt", "bench"}

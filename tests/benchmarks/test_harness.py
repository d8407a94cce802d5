"""Tests of the shared measurements, with known data and brute force."""

from __future__ import annotations

import random
import subprocess
import time

import pytest
import torch

from benchmarks import harness


def test_exponents_of_known_growth():
    sizes = [10, 20, 50, 110]
    assert harness.exponent(sizes, [3 * size for size in sizes]) == pytest.approx(1)
    assert harness.exponent(sizes, [0.5 * size**2 for size in sizes]) == pytest.approx(2)
    assert harness.exponent(sizes, [7.0] * 4) == pytest.approx(0)


def test_exponent_is_the_least_squares_slope():
    torch.manual_seed(0)
    x, y = torch.rand(6, dtype=torch.float64) * 100 + 1, torch.rand(6, dtype=torch.float64) + 0.5
    design = torch.stack([x.log(), torch.ones(6)], 1)
    slope = torch.linalg.lstsq(design, y.log()[:, None]).solution[0].item()
    assert harness.exponent(x.tolist(), y.tolist()) == pytest.approx(slope)


def test_recall_is_the_share_of_retrieved_rows():
    generator = random.Random(0)
    retrieved = [generator.sample(range(30), 12) for _ in range(7)]
    exact = [generator.sample(range(30), 5) for _ in range(7)]
    expected = sum(len(set(f) & set(e)) for f, e in zip(retrieved, exact, strict=True)) / (7 * 5)
    assert harness.recall(torch.tensor(retrieved), torch.tensor(exact)) == pytest.approx(expected)
    assert harness.recall(torch.tensor(exact), torch.tensor(exact)) == 1


def test_repeats_are_interleaved_after_one_warm_up():
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = harness.interleaved(cases, 3)
    assert calls == list("abababab")
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
    assert harness.summary([3.0, 1.0, 2.0, 9.0, 2.5]) == {"median_s": 2.5, "min_s": 1.0, "max_s": 9.0}


def test_interleaved_times_the_calls():
    seconds = harness.interleaved({"sleep": lambda: time.sleep(0.02)}, 2)["sleep"]
    assert all(taken >= 0.02 for taken in seconds)


def allocate(megabytes: int) -> dict[str, int]:
    """Allocates and frees memory. Called in a child process."""
    with harness.memory() as used:
        block = torch.ones(megabytes * 2**18)
        del block
    return used


def test_peak_memory_of_a_child_is_measured():
    used = harness.in_child("tests.benchmarks.test_harness:allocate", {"megabytes": 200})
    assert used["peak_bytes"] == pytest.approx(200 * 2**20, rel=0.05)


def test_the_error_of_a_failed_child_has_its_output(monkeypatch):
    ended = subprocess.CompletedProcess([], -9, "", "Killed")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ended)
    with pytest.raises(RuntimeError, match=r"a:b ended with -9: Killed"):
        harness.in_child("a:b", {})

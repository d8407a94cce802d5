"""Tests of the benchmark beside other packages. A stand-in for one of them scores every entity with NumPy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import peers, summary
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from tests.modeling.test_bi_encoder import BERT
from tests.toy import toy_entities, toy_mentions, write_toy_dataset

STAND_IN = """
import numpy as np

def maxsim_scores_variable(query, entities):
    return np.array([np.max(entity @ query.T, axis=0).sum() for entity in entities])
"""


@pytest.fixture
def options(tmp_path) -> list[str]:
    """Arguments with a small encoder and data set."""
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "encoder")
    tokenizer = train_wordpiece(texts_of(toy_entities(40), toy_mentions()), vocab_size=BERT["vocab_size"])
    tokenizer.save_pretrained(tmp_path / "encoder")
    data = write_toy_dataset(tmp_path / "data", toy_entities(40))
    given = {"dataset": data, "encoder": tmp_path / "encoder", "scratch": tmp_path / "scratch", "output": tmp_path}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*words, "--sizes", "50", "--single-sizes", "50", "--mentions", "5", "--brute-mentions", "5"]


def python_with(folder: Path, code: str) -> Path:
    """Returns a Python that has the code as the package maxsim-cpu."""
    (folder / "maxsim_cpu-7.dist-info").mkdir(parents=True)
    (folder / "maxsim_cpu-7.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: maxsim-cpu\nVersion: 7\n"
    )
    (folder / "maxsim_cpu.py").write_text(code)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(folder))} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return python


def test_brute_force_over_the_written_vectors_agrees_with_our_exact_ranking(options, tmp_path, monkeypatch):
    python = python_with(tmp_path / "packages", STAND_IN)
    monkeypatch.setattr(peers, "environment", lambda name, scratch: python)
    systems = "exact,codes,faiss-flat,faiss IndexFlatIP,maxsim-cpu"
    result = peers.run(peers.arguments().parse_args([*options, "--systems", systems]))
    assert result["versions"] == {"maxsim-cpu": "maxsim-cpu 7"}
    assert result["left_out"] == []
    found = {(row["vectors"], row["system"]): row for row in result["rows"]}
    assert set(found) == {
        *((form, system) for form in ("tokens", "single") for system in ("exact", "codes", "faiss-flat")),
        ("tokens", "maxsim-cpu"),
        ("single", "faiss IndexFlatIP"),
    }
    for row in found.values():
        assert row["recall"] == {"1": 1.0, "10": 1.0, "64": 1.0}
        assert 0 < row["cpu_p50_s"] <= row["cpu_p95_s"]
        assert row["mentions"] == 5
    assert not list((tmp_path / "scratch").glob("peer-vectors-*"))
    _, columns, lines, caption = summary.report_peers(result)
    assert {len(line) for line in lines} == {len(columns)}
    assert "maxsim-cpu 7" in caption
    peers.harness.write(tmp_path, "peers", result)
    summary.plot_peers(tmp_path)
    assert (tmp_path / "peers.png").stat().st_size > 5_000


@pytest.mark.parametrize("code", ["raise ImportError('needs a newer processor')", STAND_IN.replace("np.array", "no")])
def test_a_package_that_cannot_run_is_left_out_with_its_reason(options, tmp_path, monkeypatch, code):
    """The first fails when it is imported, the second when it is asked."""
    python = python_with(tmp_path / "packages", code)
    monkeypatch.setattr(peers, "environment", lambda name, scratch: python)
    result = peers.run(peers.arguments().parse_args([*options, "--systems", "exact,maxsim-cpu"]))
    assert [row["system"] for row in result["rows"]] == ["exact", "exact"]
    (reason,) = result["left_out"]
    assert "maxsim-cpu" in reason
    assert "needs a newer processor" in reason or "name 'no' is not defined" in reason


def test_a_package_that_cannot_be_installed_is_left_out_with_its_reason(tmp_path, monkeypatch):
    ended = SimpleNamespace(returncode=1, stderr="notice\nERROR: No matching distribution\n\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *args, **options: ended)
    with pytest.raises(peers.PeerError, match="No matching distribution"):
        peers.environment("maxsim-cpu", tmp_path)


def test_an_environment_is_made_once_for_the_same_requirements(tmp_path, monkeypatch):
    ran = []

    def run(command, **options):
        ran.append(command)
        Path(tmp_path / "environments" / "pylate").mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(peers.subprocess, "run", run)
    assert peers.environment("pylate", tmp_path) == peers.environment("pylate", tmp_path)
    assert len(ran) == 2
    monkeypatch.setattr(peers, "REQUIREMENTS", tmp_path)
    (tmp_path / "pylate.txt").write_text("pylate==0\n")
    peers.environment("pylate", tmp_path)
    assert len(ran) == 4


def test_recall_and_times_are_of_the_mentions_after_the_warm_up(monkeypatch):
    exact = torch.arange(40).view(10, 4)
    asked = []

    def half(mention: int) -> peers.Answer:
        """Finds two of the four best of every mention, and takes a second a mention number."""
        asked.append(mention)
        return peers.Answer([*exact[mention, :2].tolist(), 99], float(mention), 2.0 * mention)

    def broken(mention: int) -> peers.Answer:
        raise peers.PeerError("it broke")

    contestants = [
        peers.Contestant("some", {"effort": 3}, half, {"build_cpu_s": 1.0, "index_bytes": 5}),
        peers.Contestant("maxsim-cpu", {}, half, {"build_cpu_s": 1.0, "index_bytes": 5}),
        peers.Contestant("other", {}, broken, {}),
    ]
    rows, failed = peers.race(contestants, exact, brute_mentions=4)
    assert failed == ["other: it broke"]
    assert [row["recall"] for row in rows] == [{"1": 1.0, "10": 0.5, "64": 0.5}] * 2
    assert [row["mentions"] for row in rows] == [10, 4]
    assert rows[0]["p50_s"] == np.percentile(np.arange(10), 50)
    assert rows[1]["cpu_p95_s"] == np.percentile(2 * np.arange(4), 95)
    assert asked.count(0) == 4  # two systems, once each to warm up

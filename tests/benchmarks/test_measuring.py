"""Tests of the benchmarks of ranking and latency, and of the summary, on a small source."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks import harness, latency, ranking, sources, summary
from hf_mel.kb.indexes import certified, open_index
from tests.benchmarks.test_sources import SIZES
from tests.kb.test_certified import kb_of_vectors


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> sources.Generated:
    return sources.Generated(tmp_path_factory.mktemp("bench"), 300, steps=3, sizes=SIZES)


def test_the_library_agrees_with_the_direct_form(generated):
    comparison = ranking.compare_with_direct(
        generated, generated.knowledge_base(1000, dtype="float32"), "cpu", [6, 1000]
    )
    assert comparison["mentions"] == 6
    for form in ranking.FORMS:
        assert comparison[form]["same_gold_rank"] == 1
        assert comparison[form]["same_first"] == 1
        assert comparison[form]["largest_score_difference"] < 1e-4


def test_a_difference_from_the_direct_form_is_reported(generated, monkeypatch):
    shift = torch.linspace(0, 1e3, 1000)  # makes the last entities best at any unit scores
    score = ranking.DirectMimic.score
    monkeypatch.setattr(ranking.DirectMimic, "score", lambda self, m, e: score(self, m, e) + shift)
    comparison = ranking.compare_with_direct(
        generated, generated.knowledge_base(1000, dtype="float32"), "cpu", [6, 1000]
    )
    assert comparison["whole"]["same_first"] < 1
    assert comparison["whole"]["largest_score_difference"] > 1


def test_pairs_scored_in_full_are_counted(generated):
    encoded, _, golds = generated.mentions(5)
    counter = ranking.PairCounter(generated.model)
    result = ranking.rank_mentions(counter, encoded, generated.knowledge_base(1000), golds, prune=True)
    assert torch.equal(
        result.best_rank,
        ranking.rank_mentions(generated.model, encoded, generated.knowledge_base(1000), golds, prune=False).best_rank,
    )
    assert 0 < counter.pairs <= 5 * 1000 + 5 * 20 + 5 * 5  # at most all pairs, the first k and the golds


def test_the_exact_ranking_has_a_recall_of_one(generated):
    kb = generated.knowledge_base(1000)
    rows, left_out = latency.measure(generated, kb, ["exact"], mentions=6, exact_mentions=4, first_stage=100, rounds=3)
    assert left_out == []
    assert rows[0]["recall"] == {"1": 1.0, "10": 1.0, "64": 1.0}
    assert rows[0]["mentions"] == 4
    assert 0 < rows[0]["p50_s"] <= rows[0]["p95_s"]


def test_an_index_that_retrieves_half_has_a_recall_of_one_half(generated, monkeypatch):
    """The index retrieves every second of the best 64 entities."""
    kb = generated.knowledge_base(1000)
    encoded, _, _ = generated.mentions(4)
    exact = open_index(kb, "exact", generated.model)
    best = exact.find(encoded, 64).top_rows

    class Half:
        def find(self, mention, k):
            result = exact.find(mention, k)
            result.top_rows[:, 1::2] = -1
            return result

    monkeypatch.setattr(latency, "build_once", lambda *args: 3.0)
    monkeypatch.setattr(
        latency,
        "open_index",
        lambda kb, kind, *args, **kw: Half() if kind == "half" else open_index(kb, kind, *args, **kw),
    )
    rows, _ = latency.measure(generated, kb, ["half"], mentions=4, exact_mentions=4, first_stage=9, rounds=2)
    assert rows[0]["recall"] == {"1": 1.0, "10": 0.5, "64": 0.5}
    assert rows[0]["build_s"] == 3.0
    assert len(best) == 4


def test_codes_of_a_model_without_bounds_are_left_out(generated, monkeypatch):
    monkeypatch.setattr(generated.model, "bounds_scores", False, raising=False)
    kb = generated.knowledge_base(1000)
    rows, left_out = latency.measure(
        generated, kb, ["exact", "codes"], mentions=2, exact_mentions=2, first_stage=9, rounds=1
    )
    assert [row["index"] for row in rows] == ["exact"]
    assert left_out == ["codes: the model has no bounds of its scores"]


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_entities_that_each_step_leaves_are_counted(spread, tmp_path, monkeypatch):
    """All of them where all scores are equal. Otherwise the best alone, and those whose bounds are above the best."""
    for name, value in {"_LEAST_ENTITIES": 0, "_LEAST_PER_RESULT": 0, "_FIRST_SCORED": 2, "_BATCH": 3}.items():
        monkeypatch.setattr(certified, name, value)
    vectors = np.ones((150, 3)) + spread * np.random.default_rng(0).standard_normal((150, 3))
    model, kb = kb_of_vectors(vectors, tmp_path)
    mentions = {"text": torch.tensor([[1.0, 0.0, 0.0]]), "vision": torch.zeros(1, 1)}
    index = certified.CertifiedIndex(kb, model)
    left = latency.left_by_steps(index, mentions, 1)
    assert left["codes"]["p50"] <= left["heads"]["p50"]
    assert left["scored"]["p50"] == left["scored"]["p95"]
    if spread:
        bounds = index._quick_bounds(index._queries(mentions), None, 0, None)[0]
        open_at_best = int((bounds >= float(vectors[:, 0].max())).sum())
        assert 2 <= left["scored"]["p50"] * 150 <= 2 + open_at_best < 150
        assert left["heads"]["p50"] * 150 <= open_at_best
    else:
        assert left["heads"]["p50"] == 1  # the codes of all are read
        assert left["scored"]["p50"] == 1


def record(rows: list[dict]) -> dict:
    machine = {"cpu": "a CPU", "cores": 2, "threads": 2, "load_at_start": 0.1, "gemm_gflops": 200.0, "software": {}}
    return {"source": "a source", "rows": rows, "repeats": 5, "machine": machine, "device": "cpu"}


def test_tables_and_plot(tmp_path):
    direct = {"block": [20, 6000], "dtype": "float32", "pairs_per_second": 10_000.0}
    direct |= {"block_peak_bytes": 6_400_000_000, "cached_bytes_per_entity": 103_552}
    floor = {"operations_per_pair": 300_000, "exponentials_per_pair": 1600, "products_pairs_per_second": 666_667.0}
    floor |= {"products_and_exponentials_pairs_per_second": 400_000.0}
    same = {"same_gold_rank": 1.0}
    rows = [
        {
            "entities": size,
            "form": form,
            "times_direct": 50.5,
            "pairs_per_second": 505_000.0,
            "of_products_floor": 0.7575,
            "pairs_in_full": 0.125,
            "share_of_direct_memory": 0.05,
            "peak_bytes": 400_000_000,
            "direct_peak_bytes": 7_435_520_000,
            "stored_bytes_per_entity": 9700.0,
        }
        for size in (10_000, 50_000)
        for form in ranking.FORMS
    ]
    result = record(rows) | {"mentions": 32, "hits@1": {"10000": 0.8}, "direct": direct, "floor": floor}
    result["agreement_with_direct"] = {"whole": same, "pruned": same, "stored_as": "bfloat16"}
    harness.write(tmp_path, "ranking", result)
    training = record([]) | {"model": "a model", "batch_size": 128, "dtype": "float32", "share_of_plain_loop": 0.93}
    training |= {"mentions_per_second": 18.6, "plain_mentions_per_second": 20.0, "share_of_pair_scoring": 0.021}
    harness.write(tmp_path, "training", training)

    exact = {"entities": 2_000_000, "index": "exact", "p50_s": 1.0, "p95_s": 2.0, "build_s": 0.0, "index_bytes": 0}
    exact |= {"recall": {"1": 1.0}}
    left = {"heads": {"p50": 0.0125, "p95": 0.25}, "scored": {"p50": 0.000064, "p95": 0.00032}}
    codes = exact | {"index": "codes", "p50_s": 0.05, "index_bytes": 10_000_000, "left": left}
    latency_result = record([exact, codes]) | {"mentions": 9, "top_k": 1, "candidates": 256, "left_out": []}
    harness.write(tmp_path, "latency", latency_result)

    text = summary.markdown(tmp_path)
    assert "| codes | 20.0× | 50.0 ms | 2000.0 ms | 1.000 | 0 s | 0.0 | 1.2% (25%) |  | 0.0064% (0.032%) |" in text
    assert "| 10,000 | pruned | 50.5 | 505,000 | 0.76 | 12.5% | 0.050 | 0.40 GB | 9.7 |" in text
    assert "| 0.93 | 18.6 | 20.0 | 2% |" in text
    assert text.index("**Ranking") < text.index("**Training")
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") in (10, 5, 12)
    summary.plot(tmp_path, tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "ranking.json").read_text())["rows"] == rows


def test_tables_go_between_the_markers(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    for _ in range(2):
        summary.replace_block(page, "| new |\n\n")
        assert page.read_text() == f"before\n{summary.BEGIN}\n| new |\n{summary.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs"):
        summary.replace_block(page, "x")
    assert page.read_text() == "nothing"


def test_a_short_and_a_full_run(tmp_path):
    """Each benchmark parses the arguments that `make bench` gives it."""
    parser = harness.parser("")
    for option in ("--full", "--only", "--model", "--dataset"):
        parser.add_argument(option, **({"action": "store_true"} if option == "--full" else {}))
    given = ["--model", "runs/x", "--dataset", "data/x", "--repeats", "7"]
    for options in (given, [*given, "--full"]):
        names = []
        for name, (module, *words) in all_benchmarks.commands(parser.parse_args(options)):
            benchmark = importlib.import_module(module)
            assert benchmark.arguments().parse_args(words).repeats == 7
            names.append(name)
        assert names[:8] == list(all_benchmarks.SHORT)
        assert len(names) == (13 if "--full" in options else 11)
    with pytest.raises(SystemExit, match="Unknown benchmark: speed"):
        all_benchmarks.commands(parser.parse_args(["--only", "speed"]))

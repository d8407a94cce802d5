"""Tests of tables and files of results."""

import io
import json

import pytest
from rich.console import Console

from hf_mel.evaluation.tables import comparison_table, results_table, write_records, write_results

METRICS = {"hits@1": 0.5, "hits@10": 1.0, "mrr": 0.61234, "mr": 2.5, "num_ranked": 4, "num_mentions": 5, "num_nil": 1}
EMPTY = {name: float("nan") for name in ("hits@1", "hits@10", "mrr", "mr")} | {"num_ranked": 0}
RESULTS = {
    "num_mentions": 5,
    "kb_size": 18880,
    "ties": "realistic",
    "units": None,
    "metrics": METRICS,
    "strata": {"stratum": {"image": {**METRICS, "hits@1": 0.25}, "text": EMPTY}},
}


def printed(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().split("\n")


def lines(table):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed(table)]


def test_fractions_are_printed_as_percentages_and_ranks_are_not():
    rows = lines(results_table(RESULTS))
    assert ["all", "4", "50.0", "100.0", "61.2", "2.5"] in rows
    assert ["stratum: image", "4", "25.0", "100.0", "61.2", "2.5"] in rows
    assert ["stratum: text", "0", "–", "–", "–", "–"] in rows


def test_a_table_from_results_json_is_the_same(tmp_path):
    write_results(RESULTS, tmp_path / "results.json")
    loaded = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert lines(results_table(loaded)) == lines(results_table(RESULTS))


def test_the_title_gives_kb_size_ties_and_units():
    title = " ".join(" ".join(printed(results_table({**RESULTS, "units": ["text", "vision"]}))[:3]).split())
    assert all(part in title for part in ("5 mentions", "18,880 entities", "realistic", "text + vision"))


def test_a_comparison_has_a_row_per_name():
    rows = lines(comparison_table({"both": METRICS, "text": {**METRICS, "mrr": 0.3}}))
    assert ["both", "50.0", "100.0", "61.2", "2.5"] in rows
    assert ["text", "50.0", "100.0", "30.0", "2.5"] in rows


def test_nan_is_written_as_null(tmp_path):
    write_results({"a": [float("nan"), 1.5], "b": {"c": float("nan")}}, tmp_path / "deep" / "results.json")
    assert json.loads((tmp_path / "deep" / "results.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


def test_records_are_written_as_json_lines(tmp_path):
    write_records(iter([{"name": "Añó\u2028"}, {"score": 1.0}]), tmp_path / "p.jsonl")
    text = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == [{"name": "Añó\u2028"}, {"score": 1.0}]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.jsonl"
    write_records([{"old": True}], path)

    def records():
        yield {"new": True}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_records(records(), path)
    with pytest.raises(ValueError, match="Out of range"):
        write_results({"x": float("inf")}, path)
    assert json.loads(path.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_group_cannot_control_the_terminal():
    shown = "\n".join(printed(results_table({**RESULTS, "strata": {"topic": {"a\x1b[2J\nb": METRICS}}})))
    assert "\x1b" not in shown
    assert r"topic: a\x1b[2J b" in shown

"""Tables of results: what they show, what they refuse, and their forms."""

from __future__ import annotations

import csv
import io
import re
import statistics

import pytest

from hf_mel.bench.comparability import check_comparable, protocol_of
from hf_mel.bench.suite_results import NOT_RUN, over_seeds, tables_of
from hf_mel.bench.suite_tables import (
    all_tables,
    budget_line,
    cost_table,
    csv_text,
    duration,
    latex,
    latex_text,
    markdown,
    metrics_table,
    plot,
    strata_table,
    table_markdown,
)
from hf_mel.errors import ComparisonError, DataFormatError


def protocol(**changes):
    whole = {"protocol": "full", "kb_size": 100, "data": "a" * 64, "split": "test", "config": "mentions"}
    return {**whole, "num_mentions": 50, "ties": "realistic", "candidates": None, **changes}


LISTS = {"source": "name", "k": 8, "sha256": "b"}


def row(name, hits=(0.5, 0.6), data="toy", **changes):
    metrics = {"hits@1": over_seeds(hits), "mrr": over_seeds([value + 0.1 for value in hits]), "num_ranked": 50}
    group = {"hits@1": over_seeds(hits), "num_ranked": 20}
    filled = {
        "name": name,
        "system": name,
        "data": data,
        "train_fraction": 1.0,
        "sweep": None,
        "note": "",
        "seeds": list(range(len(hits))),
        "protocol": protocol(),
        "metrics": metrics,
        "strata": {"gold in training": {"seen": group, "unseen": {**group, "num_ranked": 30}}},
        "cost": {"parameters": 22_700_000, "steps": 300, "train_seconds": 754, "peak_bytes": 1.2e9, "resumed": True},
        "versions": {"torch": "2.1"},
        "code": [{"commit": "0123456789abcdef", "changed": False}],
        "machine": {"processor": "a CPU", "cores": 2, "threads": 1},
        "commands": ["hf-mel train x"],
        "empty": [],
    }
    return {**filled, **changes}


def results(*rows, **changes):
    content = {"suite": "mine", "title": "Mine", "description": "All.", "command": "hf-mel bench mine"}
    content |= {"budget": {"max_steps": 300, "minutes": None}, "prepared": [], "rows": list(rows), "tests": []}
    return {**content, **changes}


def empty(name, reason="It failed."):
    fields = {"protocol": None, "metrics": {}, "strata": {}, "cost": {}, "seeds": [], "versions": None, "code": []}
    return row(name, **fields, machine=None, empty=[{"seed": 0, "reason": reason}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": {"source": "name", "k": 8, "sha256": "b"}}, "candidate lists: None and source name k 8"),
        ({"kb_size": 99}, "size of the knowledge base: 100 and 99"),
        ({"data": "b" * 64}, "data: aaaaaaaaaaaa and bbbbbbbbbbbb"),
        ({"split": "validation"}, "split: test and validation"),
        ({"ties": "optimistic"}, "treatment of ties: realistic and optimistic"),
        ({"protocol": "candidates (end to end)"}, "protocol: full and candidates"),
    ],
)
def test_rows_of_different_protocols_never_share_a_table(tmp_path, changes, message):
    rows = [row("A"), row("B", protocol=protocol(**changes))]
    for table in (metrics_table, strata_table):
        with pytest.raises(ComparisonError, match=rf"'A \(toy\)' and 'B \(toy\)' cannot .*{message}"):
            table(rows)
    tables = tables_of(rows)
    assert [[entry["name"] for entry in table] for table in tables] == [["A"], ["B"]]
    text = markdown(results(*rows))
    assert text.count("| system | seeds |") == 2
    plot(results(*rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_lists_from_other_runs_are_other_protocols():
    lists = {"source": "retriever", "k": 8, "sha256": "c"}
    one, other = protocol(candidates=lists), protocol(candidates={**lists, "sha256": "d"})
    check_comparable({"A": one, "B": one})
    with pytest.raises(ComparisonError, match="sha256 c and source retriever k 8 sha256 d"):
        check_comparable({"A": one, "B": other})


def test_the_protocol_of_an_evaluation():
    content = {
        "protocol": "full",
        "kb_size": 3,
        "num_mentions": 2,
        "ties": "realistic",
        "data": {"dataset": "x", "sha256": None, "split": "test", "config": "documents"},
        "candidates": {"k": 2, "source": "prior", "sha256": "e", "recall": {}},
    }
    assert protocol_of(content) == {
        "protocol": "full",
        "kb_size": 3,
        "data": "x",
        "split": "test",
        "config": "documents",
        "num_mentions": 2,
        "ties": "realistic",
        "candidates": {"source": "prior", "k": 2, "sha256": "e"},
    }
    with pytest.raises(DataFormatError, match="'kb_size' is missing"):
        protocol_of({key: value for key, value in content.items() if key != "kb_size"})


def test_means_and_deviations_over_seeds():
    values = [0.61, 0.58, 0.66]
    assert over_seeds(values) == {
        "mean": pytest.approx(sum(values) / 3),
        "std": pytest.approx((sum((v - sum(values) / 3) ** 2 for v in values) / 2) ** 0.5),
        "values": values,
    }
    assert over_seeds([0.5])["std"] is None
    assert over_seeds([]) == {"mean": None, "std": None, "values": []}
    table = table_markdown(metrics_table([row("A", values), row("B", [0.5])]))
    assert f"| A | 3 | **{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}** |" in table
    assert "| B | 1 | 50.0 | 60.0 |" in table


def test_empty_cells_say_why_and_stand_in_the_table():
    table = table_markdown(metrics_table([row("A"), empty("B", "ScoreError: nan\nMore.")]))
    assert "| B | 0 | – | – |" in table
    assert "B (seed 0) is empty: ScoreError: nan More." in table
    part = row("C", empty=[{"seed": 2, "reason": "No."}, {"seed": 3, "reason": "No."}])
    assert "C (seeds 2, 3) is empty: No." in table_markdown(metrics_table([part]))
    assert "nothing has been run yet" in markdown(results(empty("B")))


def test_tests_stand_beside_their_rows():
    tests = [
        {"data": "toy", "row": "B", "against": "A", "metric": metric, "comparisons": 1, "difference": 0.021}
        | {"low": -0.01, "high": 0.05, "p_bootstrap_corrected": 0.2, "p_t_corrected": 0.0001}
        for metric in ("hits@1", "mrr")
    ]
    table = metrics_table([row("A"), row("B")], tests)
    assert table.header[-2:] == ["H@1 − A", "MRR − A"]
    assert table.rows[0][-2:] == ["", ""]
    assert table.rows[1][-1] == "+2.1 [-1.0, +5.0], p 0.200, < 0.001"
    assert "corrected for 1 comparison by Holm" in " ".join(table.notes)


def test_strata_and_costs():
    table = strata_table([row("A")])
    assert table.header == ["system", "gold: seen (20)", "gold: unseen (30)"]
    assert table.rows == [["A", "55.0 ± 7.1", "55.0 ± 7.1"]]
    assert strata_table([row("A", strata={})]) is None
    cost = cost_table([row("A")])
    assert cost.rows[0] == ["A", "22.7 M", "–", "300", "12.6 min*", "–", "–", "–", "1.2 GB"]
    assert "a CPU, 1 of 2 cores" in cost.notes[-1]


def test_latex_is_escaped():
    assert latex_text(r"a_b & 5 % ± \x") == r"a\_b \& 5 \% $\pm$ \textbackslash{}x"
    text = latex(results(row("A_1 & more"), row("B")))
    assert r"A\_1 \& more & 2 & \textbf{55.0 $\pm$ 7.1}" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", line)) in (3, 2, 8) for line in lines)


def test_csv_has_every_figure():
    lines = list(csv.DictReader(io.StringIO(csv_text(results(row("A"), empty("B", 'a "reason"'))))))
    chosen = [line for line in lines if line["row"] == "A" and line["metric"] == "hits@1" and not line["stratum"]]
    assert [(line["mean"], line["seeds"], line["protocol"], line["kb_size"]) for line in chosen] == [
        ("0.55", "2", "full", "100")
    ]
    assert {line["group"] for line in lines if line["stratum"] == "gold in training"} == {"seen", "unseen"}
    assert [line["empty"] for line in lines if line["row"] == "B"] == ['seed 0: a "reason"']


def test_sweeps_and_fractions_are_lines(tmp_path):
    rows = [row(f"A {f}", system="A", train_fraction=f) for f in (0.1, 1.0)]
    rows += [row(f"B {v}", data="other", sweep={"field": "training.learning_rate", "value": v}) for v in (1e-4, 1e-3)]
    plot(results(*rows), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("<svg") == 1
    plot(results(empty("B")), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_page_says_where_the_figures_come_from():
    page = markdown(results(row("A")))
    assert "hf-mel bench mine" in page
    assert "Budget of a run: 300 steps." in page
    assert "Commit 0123456789ab. torch 2.1." in page
    assert [
        heading for heading, _ in all_tables(results(row("A"), row("B", protocol=protocol(candidates=LISTS))))
    ] == [
        "toy: all entities",
        "toy: candidates of name",
    ]
    assert budget_line({"max_steps": None, "minutes": 15}) == "15 minutes of training (processor time on a CPU)"
    assert budget_line({"max_steps": None, "minutes": None}) == "that of its recipe"
    assert [duration(seconds) for seconds in (4, 600, 7200)] == ["4 s", "10.0 min", "2.0 h"]


def test_rows_of_which_nothing_was_run_are_named_below():
    rows = [row("A", [0.5]), empty("B", NOT_RUN)]
    tables = [metrics_table(rows, []), cost_table(rows)]
    assert [[line[0] for line in table.rows] for table in tables] == [["A"], ["A"]]
    assert tables[0].notes[-1] == "Not run yet: B."
    failed = empty("B")
    assert [line[0] for line in metrics_table([rows[0], failed], []).rows] == ["A", "B"]

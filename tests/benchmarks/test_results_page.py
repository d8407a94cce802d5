"""docs/results.md is what its template and the files of results give, and tables are made of files without mixing protocols."""

from __future__ import annotations

import json

import pytest

from benchmarks.results_page import PAGE, RESULTS, page, suite_text, table_text
from hf_mel.errors import ComparisonError
from tests.bench.test_suite_tables import results, row


def test_the_page_is_what_the_files_give():
    assert PAGE.read_text(encoding="utf-8") == page(), "Run python -m benchmarks.results_page."


def test_the_template_holds_no_table():
    assert not [
        line for line in (RESULTS / "page.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")
    ]


def test_typed_figures_say_where_they_come_from():
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "columns" in content and any("values" in line for line in content["rows"]):
            assert content["source"]["commands"], path
            assert content["source"]["seeds"], path


def write(folder, name: str, hits: float, **changes) -> str:
    content = {"protocol": "full", "kb_size": 9, "num_mentions": 4, "ties": "realistic", "data": {"sha256": "s"}}
    content |= {"metrics": {"hits@1": hits, "mr": 3}, "strata": {"gold in training": {"seen": {"hits@1": hits / 2}}}}
    (folder / name).write_text(json.dumps(content | changes))
    return name


COLUMNS = [
    {"head": "H@1", "path": ["metrics", "hits@1"], "scale": 100, "best": "max"},
    {"head": "MR", "path": ["metrics", "mr"], "decimals": 2},
    {"head": "seen", "path": ["strata", "gold in training", "seen", "hits@1"], "scale": 100},
    {"head": "none", "path": ["strata", "x", "y"]},
]


def test_a_row_is_the_mean_over_its_files(tmp_path):
    files = [write(tmp_path, f"{k}.json", hits) for k, hits in enumerate((0.5, 0.6))]
    rows = [
        {"label": "A", "files": files},
        {"label": "B", "files": [write(tmp_path, "b.json", 0.555)]},
        {"label": "**more**"},
    ]
    assert table_text({"head": "model", "columns": COLUMNS, "rows": rows}, tmp_path).splitlines() == [
        "| model | H@1 | MR | seen | none |",
        "|---|---|---|---|---|",
        "| A | 55.0 | 3.00 | 27.5 | |",
        "| B | **55.5** | 3.00 | 27.8 | |",
        "| **more** | | | | |",
    ]


def test_files_of_different_protocols_share_no_table(tmp_path):
    files = [write(tmp_path, "a.json", 0.5), write(tmp_path, "b.json", 0.6, kb_size=8)]
    table = {"columns": COLUMNS, "rows": [{"label": name, "files": [name]} for name in files]}
    with pytest.raises(ComparisonError, match="size of the knowledge base: 9 and 8"):
        table_text(table, tmp_path)
    assert "| b.json | **60.0** |" in table_text({**table, "mixed": "Both are said in the text."}, tmp_path)


def test_typed_values_need_a_source_and_one_for_each_column(tmp_path):
    table = {"columns": COLUMNS[:2], "rows": [{"label": "A", "values": [1234.5, None], "bold": [0]}]}
    with pytest.raises(ValueError, match="typed values need a source"):
        table_text(table, tmp_path)
    table["source"] = {"commands": ["x"], "seeds": [0]}
    assert table_text(table, tmp_path).splitlines()[2] == "| A | **1,234.5** | |"
    table["rows"][0]["values"] = [1]
    with pytest.raises(ValueError, match="'A' has 1 values for 2 columns"):
        table_text(table, tmp_path)


def test_suites_are_tables_of_the_page(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(results(row("A"), row("B"))))
    (tmp_path / "page.md").write_text("# Results\n\n<!-- suite: mine metrics -->\n\nWords.\n\n<!-- table: none -->\n")
    with pytest.raises(ValueError, match=r"none.json: the table cannot be made"):
        page(tmp_path)
    (tmp_path / "page.md").write_text("# Results\n\n<!-- suite: mine metrics -->\n\nWords.\n")
    text = page(tmp_path)
    assert "| A | 2 | **55.0 ± 7.1** |" in text
    assert text.endswith("Words.\n")
    assert "stratum" not in text
    assert suite_text(results(row("A"))).count("| system |") == 3

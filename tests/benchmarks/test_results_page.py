"""docs/results.md is what its template and the files of results give, and tables are made of files without mixing protocols."""

from __future__ import annotations

import json

import pytest

from benchmarks.results_page import PAGE, QUOTING, RESULTS, gains_text, page, quoted, suite_text, table_text
from hf_mel.errors import ComparisonError
from tests.bench.test_suite_tables import LISTS, protocol, results, row


def test_the_page_is_what_the_files_give():
    assert PAGE.read_text(encoding="utf-8") == page(), "Run python -m benchmarks.results_page."


@pytest.mark.parametrize("path", QUOTING, ids=lambda path: path.name)
def test_quotes_are_what_the_files_give(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- h@1 flags: " in text
    assert "<!-- h@1 wikimel-text: " in text
    assert text == quoted(text), "Run python -m benchmarks.results_page."


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


NOT_RUN = {"protocol": None, "metrics": {}, "seeds": [], "strata": {}}


@pytest.mark.parametrize(
    ("rows", "figures"),
    [
        ("A", "55.0"),
        ("A; C", "20.0 to 55.0"),
        ("A … C", "20.0 to 91.0"),
        ("B … C; A", "20.0 to 91.0"),
        ("A; D", "55.0"),
        ("A; A", "55.0"),
        ("D", "–"),
    ],
)
def test_a_quote_is_the_range_of_its_rows(tmp_path, rows, figures):
    written = results(row("A"), row("B", [0.91]), row("C", [0.2]), row("D", **NOT_RUN))
    (tmp_path / "mine.json").write_text(json.dumps(written))
    start = f"| x | <!-- h@1 mine: {rows} -->"
    text = f"{start}old<!-- end --> y\n{start}<!-- end -->"
    assert quoted(text, tmp_path) == f"{start}{figures}<!-- end --> y\n{start}{figures}<!-- end -->"


def test_a_quote_names_rows_of_one_protocol_that_exist(tmp_path):
    written = results(row("A"), row("B", protocol=protocol(protocol="candidates", candidates=LISTS)))
    (tmp_path / "mine.json").write_text(json.dumps(written))
    for rows, error, message in (
        ("A; B", ComparisonError, "Rows of different|protocol"),
        ("C", ValueError, "mine has no row 'C'"),
        ("A … C", ValueError, "mine has no row 'C'"),
        ("B … A", ValueError, "'B' comes after 'A'"),
    ):
        with pytest.raises(error, match=message):
            quoted(f"<!-- h@1 mine: {rows} -->1<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match="names no suite"):
        quoted("<!-- h@1 other: A -->1<!-- end -->", tmp_path)


def test_published_gains_stand_beside_those_of_a_suite(tmp_path):
    written = results(row("A"), row("B", [0.91]), row("C", [0.54, 0.56]), row("D", **NOT_RUN))
    test = {"metric": "hits@1", "data": "toy", "difference": 0.36, "low": 0.2, "high": 0.5}
    written["tests"] = [
        {**test, "metric": "mrr", "row": "B", "against": "A", "low": -1},
        {**test, "row": "B", "against": "A"},
    ]
    written["suite"] = "mine"
    claims = [
        {
            "claim": f"{first} over {second}",
            "where": "Table 1",
            "published": published,
            "rows": {"mine": [first, second]},
        }
        for first, second, published in (
            ("B", "A", [80.25, 70]),
            ("A", "B", [80, 70]),
            ("A", "C", "more"),
            ("B", "C", [70, 80]),
            ("A", "D", [80, 70]),
        )
    ]
    text = gains_text(
        written, [*claims, {"claim": "x", "where": "", "published": "", "rows": {"another": ["E", "F"]}}]
    )
    # Of independent shares of 50 mentions: 1.96 √((.2475 + .2475) / 50) = .1950, and 1.96 √((.0819 + .2475) / 50) = .1591.
    assert text.splitlines()[2:] == [
        "| B over A | Table 1 | +10.2 | +36.0 | +20.0 to +50.0 | yes |",
        "| A over B | Table 1 | +10.0 | -36.0 | -50.0 to -20.0 | reversed |",
        "| A over C | Table 1 | more | +0.0 | -19.5 to +19.5 | open |",
        "| B over C | Table 1 | -10.0 | +36.0 | +20.1 to +51.9 | yes |",
        "| A over D | Table 1 | +10.0 | – | – | not run |",
    ]


def test_a_claim_about_rows_of_different_protocols_is_refused():
    written = results(row("A"), row("B", protocol=protocol(protocol="candidates", candidates=LISTS)))
    written["suite"] = "mine"
    claim = {"claim": "A over B", "where": "", "published": [1, 0], "rows": {"mine": ["A", "B"]}}
    with pytest.raises(ComparisonError):
        gains_text(written, [claim])

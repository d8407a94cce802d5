"""Writes docs/results.md from its template and the files of results, and the figures that other pages quote.

python -m benchmarks.results_page            # writes docs/results.md, and the quotes in README.md and docs/methods/index.md
python -m benchmarks.results_page --check    # fails if a page is not what the files give

`results/page.md` is the page with a comment in place of each table. `<!-- table: NAME -->` is `results/NAME.json`, and
`<!-- suite: NAME -->` the tables of a suite that `hf-mel bench` wrote to `results/NAME.json`; `<!-- suite: NAME metrics -->`,
`strata` or `cost` is one kind of them. `<!-- gains: NAME -->` says which published differences, those of
`results/published-gains.json`, that suite has seen.

A quote in another page is `<!-- h@1 NAME: ROW; FIRST … LAST -->3.9 to 50.4<!-- end -->`: the lowest and the highest H@1 of these rows of
the suite `results/NAME.json`, and of all from FIRST to LAST. Rows that have not been run count for nothing.

The file of a table has "columns" and "rows". Its figures are measured in one of two ways:

- A row has "files": one or more results of `hf-mel evaluate --output`, below `results/`, such as one for each seed. A column
  has "path", the keys that lead to the figure in such a file, and optionally "scale", by which it is multiplied. The table shows
  the mean over the files. All files of a table must have one protocol, unless it says "mixed": why they may stand together.
- A row has "values". The figures are typed there, so the file says in "source" where they come from: the command, the commit
  and the seeds; and "transcribed" if the files that gave them are lost and the page was copied.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from hf_mel.bench.comparability import check_comparable, protocol_of
from hf_mel.bench.suite_results import tables_of
from hf_mel.bench.suite_tables import cost_table, metrics_table, strata_table, table_markdown
from hf_mel.evaluation.tables import display_value
from hf_mel.files import write_text

#: Folder of the results, the template in it, and the page.
RESULTS = ROOT / "results"
TEMPLATE = RESULTS / "page.md"
PAGE = ROOT / "docs" / "results.md"

#: Pages with quotes.
QUOTING = (ROOT / "README.md", ROOT / "docs" / "methods" / "index.md")
#: The file of published differences.
GAINS = "published-gains.json"

_PLACEHOLDER = re.compile(r"^<!-- (table|suite|gains): (\S+)(?: (\S+))? -->$", re.MULTILINE)
_QUOTE = re.compile(r"(<!-- h@1 (\S+): (.+?) -->).*?(<!-- end -->)")
_HEADER = "<!-- Written by `python -m benchmarks.results_page` from results/page.md and the files in results/. Change those. -->\n\n"


def page(folder: Path = RESULTS) -> str:
    """Returns the text of the page.

    Args:
        folder (`Path`): The folder of the template and the results.

    Raises:
        ValueError: A file is missing, or not of the form that the module describes; names it.
    """

    def insert(match: re.Match[str]) -> str:
        kind, name, part = match.groups()
        path = folder / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if kind == "gains":
                return gains_text(content, _load(folder, GAINS)["claims"])
            return suite_text(content, part) if kind == "suite" else table_text(content, folder)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: the table cannot be made ({type(error).__name__}: {error}).") from error

    template = (folder / "page.md").read_text(encoding="utf-8")
    return _HEADER + _PLACEHOLDER.sub(insert, template)


def suite_text(results: Mapping[str, Any], part: str | None = None) -> str:
    """Returns the tables of a suite: "metrics", "strata", "cost", or all."""
    makers: dict[str, Callable[..., Any]] = {"metrics": metrics_table, "strata": strata_table, "cost": cost_table}
    tables = []
    for rows in tables_of(results["rows"]):
        tests = [test for test in results["tests"] if test["data"] == rows[0]["data"]]
        for name, make in makers.items():
            if part in (None, name):
                tables.append(make(rows, tests) if name == "metrics" else make(rows))
    return "\n".join(table_markdown(table) for table in tables if table is not None).strip()


def quoted(text: str, folder: Path = RESULTS) -> str:
    """Returns the text of a page with the figures of its quotes.

    Raises:
        ValueError: A quote names a suite or a row that does not exist.
        ComparisonError: A quote joins rows of different protocols.
    """

    def figure(match: re.Match[str]) -> str:
        start, name, rows, end = match.groups()
        if not (folder / f"{name}.json").exists():
            raise ValueError(f"The quote {start} names no suite in {folder}.")
        content = _load(folder, f"{name}.json")
        run = [row for part in rows.split(";") for row in _suite_rows(content, part) if row["metrics"]]
        check_comparable({row["name"]: row["protocol"] for row in run})
        shown = sorted(row["metrics"]["hits@1"]["mean"] for row in run)
        ends = [display_value("hits@1", value) for value in (*shown[:1], *shown[-1:])]
        return f"{start}{' to '.join(dict.fromkeys(ends)) or '–'}{end}"

    return _QUOTE.sub(figure, text)


def gains_text(results: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of published differences beside those of a suite.

    Args:
        results (`Mapping`): Results of a suite.
        claims (sequence of `Mapping`): "claim" ("A over B"), "published" (both figures, or a text), "where", and "rows", the
            names of both rows by suite.

    Raises:
        ComparisonError: A claim joins rows of different protocols.
    """
    claims = [claim for claim in claims if results["suite"] in claim["rows"]]
    lines = [_line(["published", "where", "there", "here", "95 % interval", "seen here"]), "|---" * 6 + "|"]
    for claim in claims:
        (first,), (second,) = (_suite_rows(results, name) for name in claim["rows"][results["suite"]])
        published = claim["published"]
        there = published if isinstance(published, str) else f"{published[0] - published[1]:+.1f}"
        line = [claim["claim"], claim["where"], there]
        if not (first["metrics"] and second["metrics"]):
            lines.append(_line([*line, "–", "–", "not run"]))
            continue
        check_comparable({row["name"]: row["protocol"] for row in (first, second)})
        difference, low, high = (100 * value for value in _difference(results["tests"], first, second))
        verdict = "yes" if low > 0 else "reversed" if high < 0 else "open"
        lines.append(_line([*line, f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}", verdict]))
    return "\n".join(lines)


def _difference(
    tests: Sequence[Mapping[str, Any]], first: Mapping[str, Any], second: Mapping[str, Any]
) -> tuple[float, float, float]:
    """Returns the difference of the H@1 of two rows, and its 95 % interval over mentions.

    The interval is that of the suite's paired test, or else that of two independent shares, which is wider.
    """
    for test in tests:
        if test["metric"] == "hits@1" and test["data"] == first["data"]:
            pair = test["row"], test["against"]
            if pair == (first["name"], second["name"]):
                return test["difference"], test["low"], test["high"]
            if pair == (second["name"], first["name"]):
                return -test["difference"], -test["high"], -test["low"]
    shares = [row["metrics"]["hits@1"]["mean"] for row in (first, second)]
    variance = sum(share * (1 - share) for share in shares) / first["metrics"]["num_ranked"]
    difference, half = shares[0] - shares[1], 1.96 * math.sqrt(variance)
    return difference, difference - half, difference + half


def _suite_rows(results: Mapping[str, Any], words: str) -> list[Mapping[str, Any]]:
    """Returns the row of a suite with a name, or all rows from one to another: "FIRST … LAST"."""
    names = [row["name"] for row in results["rows"]]
    ends = [name.strip() for name in words.split("…")]
    for name in ends:
        if name not in names:
            raise ValueError(f"The suite {results['suite']} has no row {name!r}.")
    first, last = names.index(ends[0]), names.index(ends[-1])
    if first > last:
        raise ValueError(f"In the suite {results['suite']}, {ends[0]!r} comes after {ends[-1]!r}.")
    return list(results["rows"][first : last + 1])


def table_text(table: Mapping[str, Any], folder: Path = RESULTS) -> str:
    """Returns one table as Markdown."""
    columns = table["columns"]
    if any("values" in row for row in table["rows"]) and not table.get("source"):
        raise ValueError("typed values need a source")
    if not table.get("mixed"):
        check_comparable(
            {file: protocol_of(_load(folder, file)) for row in table["rows"] for file in row.get("files", ())}
        )
    values = [row_values(row, columns, folder) for row in table["rows"]]
    bold = {(number, column) for number, row in enumerate(table["rows"]) for column in row.get("bold", ())}
    for number, column in enumerate(columns):
        if best := column.get("best"):
            shown = [_number(row[number], column) if isinstance(row[number], int | float) else None for row in values]
            known = [row[number] for row in values if isinstance(row[number], int | float)]
            top = _number((max if best == "max" else min)(known), column)
            bold |= {(line, number) for line, text in enumerate(shown) if text == top}
    lines = [
        _line([table.get("head", ""), *(column["head"] for column in columns)]),
        "|---" * (len(columns) + 1) + "|",
    ]
    for number, (row, of_row) in enumerate(zip(table["rows"], values, strict=True)):
        cells = [_shown(value, column) for value, column in zip(of_row, columns, strict=True)]
        lines.append(
            _line([row["label"], *(f"**{text}**" if (number, k) in bold else text for k, text in enumerate(cells))])
        )
    return "\n".join(lines)


def row_values(row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], folder: Path) -> list[Any]:
    """Returns the figures of a row: typed ones, or the means over its files."""
    if "values" in row:
        if len(row["values"]) != len(columns):
            raise ValueError(f"the row {row['label']!r} has {len(row['values'])} values for {len(columns)} columns")
        return list(row["values"])
    if not row.get("files"):
        return [None] * len(columns)  # a row that is a heading
    contents = [_load(folder, file) for file in row["files"]]
    return [_figure(contents, row.get("path", []), column) for column in columns]


def _figure(contents: Sequence[Any], prefix: Sequence[str], column: Mapping[str, Any]) -> float | None:
    """Returns the mean over files of the figure to which a path leads; `None` if a file lacks it."""
    figures = []
    for content in contents:
        value = content
        for key in [*prefix, *column["path"]]:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            return None
        figures.append(float(value) * column.get("scale", 1))
    return statistics.fmean(figures)


def _load(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def _number(value: float, column: Mapping[str, Any]) -> str:
    return f"{value:,.{column.get('decimals', 1)}f}"


def _shown(value: Any, column: Mapping[str, Any]) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, str) else _number(value, column)


def _line(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the page differs")
    args = parser.parse_args()
    texts = {PAGE: page(), **{path: quoted(path.read_text(encoding="utf-8")) for path in QUOTING}}
    changed = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    if args.check:
        if changed:
            names = ", ".join(str(path.relative_to(ROOT)) for path in changed)
            sys.exit(f"{names}: not what {RESULTS} gives. Run python -m benchmarks.results_page.")
        return
    for path in changed:
        write_text(path, [texts[path]])
    print(f"Written: {', '.join(map(str, changed)) or 'nothing, all pages are up to date'}")


if __name__ == "__main__":
    main()

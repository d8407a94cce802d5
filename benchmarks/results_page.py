"""Writes docs/results.md from its template and the files of results.

python -m benchmarks.results_page            # writes docs/results.md
python -m benchmarks.results_page --check    # fails if the page is not what the files give

`results/page.md` is the page with a comment in place of each table. `<!-- table: NAME -->` is `results/NAME.json`, and
`<!-- suite: NAME -->` the tables of a suite that `hf-mel bench` wrote to `results/NAME.json`; `<!-- suite: NAME metrics -->`,
`strata` or `cost` is one kind of them.

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
from hf_mel.files import write_text

#: Folder of the results, the template in it, and the page.
RESULTS = ROOT / "results"
TEMPLATE = RESULTS / "page.md"
PAGE = ROOT / "docs" / "results.md"

_PLACEHOLDER = re.compile(r"^<!-- (table|suite): (\S+)(?: (\S+))? -->$", re.MULTILINE)
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
    text = page()
    if args.check:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not what {RESULTS} gives. Run python -m benchmarks.results_page.")
        return
    write_text(PAGE, [text])
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()

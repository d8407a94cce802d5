"""Tables of a suite's results as Markdown, LaTeX and CSV, and a plot."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mel.bench.comparability import check_comparable, protocol_line
from hf_mel.bench.suite_results import NOT_RUN, tables_of
from hf_mel.errors import MissingExtraError
from hf_mel.evaluation.settings import KS
from hf_mel.evaluation.tables import display_name, display_value, write_results
from hf_mel.files import replace_file, write_text

#: Metrics of the main table, as far as a row has them.
_COLUMNS = (*(f"hits@{k}" for k in KS), "mrr", "mr")
#: Metrics of which less is better.
_LESS_IS_BETTER = ("mr",)
#: Stratification → heading of its groups in tables.
_STRATA = {
    "gold in training": "gold",
    "name of mention": "name",
    "mentions in context": "mentions in context",
    "image of mention": "image",
}

_CSV_COLUMNS = (
    *("suite", "data", "data_sha256", "protocol", "candidates", "kb_size", "row", "system", "train_fraction"),
    *("sweep_field", "sweep_value", "stratum", "group", "metric", "mean", "std", "seeds", "mentions", "empty"),
)


@dataclass
class FigureTable:
    """One table: a caption, a header, rows of text, and notes below.

    Args:
        caption (`str`): What the table shows.
        header (`list` of `str`): Headings.
        rows (`list`): One list of `str` for each row.
        notes (`list` of `str`): Sentences below the table.
        best (`set`): (row, column) of entries to print in bold.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    best: set[tuple[int, int]] = field(default_factory=set)


def metrics_table(rows: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]] = ()) -> FigureTable:
    """Returns the main table of rows of one protocol: H@k, MRR and MR, and the tests against one of them.

    Raises:
        ComparisonError: The rows have different protocols.
    """
    filled, waiting = _checked(rows), [row["name"] for row in rows if _is_waiting(row)]
    rows = _begun(rows)
    columns = [name for name in _COLUMNS if any(name in row["metrics"] for row in filled)]
    tests = [test for test in tests if any(_is_of(test, row) for row in filled)]
    against = tests[0]["against"] if tests else None
    header = ["system", "seeds", *map(display_name, columns)]
    header += [f"{display_name(metric)} − {against}" for metric in ("hits@1", "mrr") if tests]
    lines = []
    for row in rows:
        values = [shown(name, row["metrics"].get(name)) for name in columns]
        line = [row["name"], str(len(row["seeds"])), *values]
        if tests:
            line += [_test(tests, row, metric) for metric in ("hits@1", "mrr")]
        lines.append(line)
    table = FigureTable(_caption(rows), header, lines, notes=_empty_notes(rows))
    table.best = _best(rows, columns, first_column=2)
    if filled and waiting:
        table.notes.append(f"Not run yet: {'; '.join(waiting)}.")
    if tests:
        table.notes.insert(
            0,
            f"Differences from {against}: points, the 95 % interval of a paired bootstrap over mentions, and p of the paired "
            f"bootstrap and of the paired t-test, each corrected for {tests[0]['comparisons']} "
            f"comparison{'s' if tests[0]['comparisons'] > 1 else ''} by Holm. Over several seeds, a mention counts with its mean.",
        )
    if any(row["metrics"].get(name, {}).get("std") is not None for row in filled for name in columns):
        table.notes.insert(0, "Mean ± sample standard deviation over seeds.")
    return table


def strata_table(rows: Sequence[Mapping[str, Any]], metric: str = "hits@1") -> FigureTable | None:
    """Returns a table with a metric by stratum, or `None` if no row has strata. Arguments and errors: [`metrics_table`]."""
    filled = _checked(rows)
    groups = list(
        dict.fromkeys((name, group) for row in filled for name in row["strata"] for group in row["strata"][name])
    )
    if not groups:
        return None
    sizes = {
        key: next(row["strata"][key[0]][key[1]]["num_ranked"] for row in filled if _has(row, key)) for key in groups
    }
    groups = [key for key in groups if sizes[key]]
    header = ["system", *(f"{_STRATA.get(name, name)}: {group} ({sizes[name, group]:,})" for name, group in groups)]
    lines = [
        [
            row["name"],
            *(shown(metric, row["strata"].get(name, {}).get(group, {}).get(metric)) for name, group in groups),
        ]
        for row in _begun(rows)
    ]
    return FigureTable(
        f"{display_name(metric)} by stratum, with the number of mentions. {_caption(rows)}", header, lines
    )


def cost_table(rows: Sequence[Mapping[str, Any]]) -> FigureTable:
    """Returns a table of what each row took: parameters, steps, time, speed and memory."""
    header = [
        "system",
        "parameters",
        "training mentions",
        "steps",
        "training",
        "CPU",
        "evaluation",
        "mentions/s",
        "peak memory",
    ]
    lines = []
    for row in _begun(rows):
        cost = row["cost"]
        lines.append(
            [
                row["name"],
                _number(cost.get("parameters"), lambda value: f"{value / 1e6:,.1f} M"),
                _number(cost.get("train_mentions"), lambda value: f"{value:,.0f}"),
                _number(cost.get("steps"), lambda value: f"{value:,.0f}"),
                _number(cost.get("train_seconds"), duration) + ("*" if cost.get("resumed") else ""),
                _number(cost.get("train_cpu_seconds"), duration),
                _number(cost.get("evaluate_seconds"), duration),
                _number(cost.get("mentions_per_second"), lambda value: f"{value:,.0f}"),
                _number(cost.get("peak_bytes"), lambda value: f"{value / 1e9:.1f} GB"),
            ]
        )
    notes = [
        "Training and evaluation: wall-clock time of the whole command, mean over seeds. CPU: processor time of the training "
        "command on all cores. Mentions a second: the whole evaluation, with encoding the entities."
    ]
    if any(row["cost"].get("resumed") for row in rows):
        notes.append("* Resumed: the time is that of its last part.")
    machines = {_machine(row) for row in rows if row.get("machine")}
    if machines:
        notes.append(f"Machine: {'; '.join(sorted(machines))}.")
    return FigureTable("What the runs took", header, lines, notes)


def all_tables(results: Mapping[str, Any]) -> list[tuple[str, list[FigureTable]]]:
    """Returns the tables of a suite: (heading, tables), one entry for each data set and protocol."""
    entries = []
    for rows in tables_of(results["rows"]):
        tests = [test for test in results.get("tests", []) if test["data"] == rows[0]["data"]]
        tables: list[FigureTable | None] = [metrics_table(rows, tests), strata_table(rows), cost_table(rows)]
        lists = next((row["protocol"]["candidates"] for row in rows if row["protocol"] is not None), None)
        ranked = "all entities" if lists is None else f"candidates of {lists['source'] or 'a file'}"
        entries.append((f"{rows[0]['data']}: {ranked}", [table for table in tables if table is not None]))
    return entries


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the results of a suite as a Markdown page."""
    parts = [f"# {results['title'] or results['suite']}\n"]
    if results["description"]:
        parts.append(f"{results['description'].strip()}\n")
    parts.append(f"```sh\n{results['command']}\n```\n")
    parts.append(f"Budget of a run: {budget_line(results['budget'])}.\n")
    for prepared in results["prepared"]:
        spent = (prepared["spent"] or {}).get("seconds")
        seed = "" if prepared["seed"] is None else f" (seed {prepared['seed']})"
        told = duration(spent) if spent else prepared["reason"] or prepared["state"]
        parts.append(
            f"Prepared without this budget: {prepared['name']}{seed}, recipe `{prepared['recipe']}`: {told}.\n"
        )
    for heading, tables in all_tables(results):
        parts.append(f"## {heading}\n")
        parts += [table_markdown(table) for table in tables]
    parts.append(f"{versions_line(results)}\n")
    return "\n".join(parts)


def table_markdown(table: FigureTable) -> str:
    """Returns a table as Markdown, with its caption above and its notes below."""
    lines = [f"{table.caption}.\n", _line(table.header), _line(["---", *["---:"] * (len(table.header) - 1)])]
    for number, row in enumerate(table.rows):
        lines.append(
            _line([f"**{text}**" if (number, column) in table.best else text for column, text in enumerate(row)])
        )
    return "\n".join([*lines, "", *(f"{note}\n" for note in table.notes)])


def latex(results: Mapping[str, Any]) -> str:
    """Returns the tables of a suite as LaTeX, for the package `booktabs`."""
    parts = [f"% {results['command']}", f"% {versions_line(results)}", "% needs \\usepackage{booktabs}", ""]
    for _, tables in all_tables(results):
        for table in tables:
            parts += [
                r"\begin{table}",
                r"\centering",
                r"\begin{tabular}{l" + "r" * (len(table.header) - 1) + "}",
                r"\toprule",
                " & ".join(map(latex_text, table.header)) + r" \\",
                r"\midrule",
            ]
            for number, row in enumerate(table.rows):
                cells = [
                    rf"\textbf{{{latex_text(text)}}}" if (number, column) in table.best else latex_text(text)
                    for column, text in enumerate(row)
                ]
                parts.append(" & ".join(cells) + r" \\")
            notes = " ".join([f"{table.caption}.", *table.notes])
            parts += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{latex_text(notes)}}}", r"\end{table}", ""]
    return "\n".join(parts)


def csv_text(results: Mapping[str, Any]) -> str:
    """Returns all figures of a suite as CSV: one line for each row, stratum and metric."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in results["rows"]:
        protocol, sweep = row["protocol"] or {}, row["sweep"] or {}
        lists = protocol.get("candidates") or {}
        head = [results["suite"], row["data"], protocol.get("data"), protocol.get("protocol")]
        head += [lists.get("source"), protocol.get("kb_size"), row["name"], row["system"], row["train_fraction"]]
        head += [sweep.get("field"), sweep.get("value")]
        empty = " ".join(f"seed {item['seed']}: {item['reason']}" for item in row["empty"])
        if not row["metrics"]:
            writer.writerow([*head, *[None] * 7, empty])
        groups = [("", "", row["metrics"])]
        groups += [(name, group, metrics) for name, of in row["strata"].items() for group, metrics in of.items()]
        for name, group, metrics in groups:
            for metric, value in metrics.items():
                if isinstance(value, Mapping):
                    count = metrics.get("num_ranked")
                    figures = [value["mean"], value["std"], len(value["values"]), count]
                    writer.writerow([*head, name, group, metric, *figures, empty])
    return output.getvalue()


def plot(results: Mapping[str, Any], path: str | os.PathLike[str], metric: str = "hits@1") -> None:
    """Plots a metric of every row: bars with the standard deviation, or lines over the values of a sweep or of fractions.

    Args:
        results (`Mapping`): Results of a suite.
        path (`str` or `os.PathLike`): The image file. Its suffix sets the format.
        metric (`str`): The metric.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "The plot needs matplotlib, which is not installed.", remedy='Run pip install "hf_mel[bench]".'
        ) from None
    tables = [[row for row in rows if row["metrics"]] for rows in tables_of(results["rows"])]
    tables = [rows for rows in tables if rows]
    if not tables:
        return
    heights = [max(2.5, 0.35 * len(rows) + 1) for rows in tables]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, rows in zip(axes, tables, strict=True):
        _checked(rows)
        points = [(row, row["metrics"][metric]) for row in rows if metric in row["metrics"]]
        lines = _lines_of(points)
        if lines is not None:
            for system, series in lines.items():
                positions, heights_of, errors = zip(*sorted(series), strict=True)
                axis.errorbar(positions, heights_of, yerr=errors, fmt="o-", capsize=3, label=system)
            sweep = rows[0]["sweep"]
            axis.set(
                xlabel="share of the training mentions" if sweep is None else sweep["field"],
                ylabel=display_name(metric),
            )
            if sweep is not None and min(min(x for x, *_ in series) for series in lines.values()) > 0:
                axis.set_xscale("log")
            axis.legend(fontsize=7)
        else:
            names = [row["name"] for row, _ in points]
            means = [100 * value["mean"] for _, value in points]
            spread = [100 * (value["std"] or 0) for _, value in points]
            axis.barh(names, means, xerr=spread, color="C0", ecolor="0.3", capsize=3)
            axis.invert_yaxis()
            axis.set(xlabel=f"{display_name(metric)}, %")
        protocol = rows[0]["protocol"]
        lists = protocol["candidates"]
        against = (
            f"{protocol['kb_size']:,} entities" if lists is None else f"candidates of {lists['source'] or 'a file'}"
        )
        axis.set_title(f"{rows[0]['data']}, {protocol['split']}: {against}", fontsize=9)
        axis.grid(alpha=0.3)
    with replace_file(Path(path)) as temporary:
        figure.savefig(temporary, dpi=120, format=Path(path).suffix.lstrip(".") or "png")


def write_suite(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the results of a suite as JSON, Markdown, LaTeX, CSV and a plot, and returns the files.

    Args:
        results (`Mapping`): Results of a suite.
        folder (`Path`): The folder.

    Raises:
        MelError: A file cannot be written.
        MissingExtraError: matplotlib is not installed; the other files are written then.
    """
    paths = {suffix: folder / f"{results['suite']}.{suffix}" for suffix in ("json", "md", "tex", "csv", "png")}
    write_results(results, paths["json"])
    write_text(paths["md"], [markdown(results)])
    write_text(paths["tex"], [latex(results)])
    write_text(paths["csv"], [csv_text(results)])
    plot(results, paths["png"])
    return [path for path in paths.values() if path.exists()]


def shown(metric: str, value: Any) -> str:
    """Returns a figure over seeds as text: "90.3 ± 0.2", "90.3", or "–" without one."""
    if not isinstance(value, Mapping) or value["mean"] is None:
        return "–"
    text = display_value(metric, value["mean"])
    return text if value["std"] is None else f"{text} ± {display_value(metric, value['std'])}"


def duration(seconds: float) -> str:
    """Returns a time as text: "45 s", "12.3 min", "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def budget_line(budget: Mapping[str, Any]) -> str:
    """Returns a budget as text."""
    parts = []
    if budget["max_steps"] is not None:
        parts.append(f"{budget['max_steps']:,} steps")
    if budget["minutes"] is not None:
        parts.append(f"{budget['minutes']:g} minutes of training (processor time on a CPU)")
    return " or ".join(parts) + (", whichever ends first" if len(parts) > 1 else "") if parts else "that of its recipe"


def versions_line(results: Mapping[str, Any]) -> str:
    """Returns the commits and package versions of all rows as a sentence."""
    commits = {
        f"{code['commit'][:12]}{' with changes' if code['changed'] else ''}"
        for row in results["rows"]
        for code in row["code"]
        if code and code["commit"]
    }
    versions = {
        ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in results["rows"]
        if row["versions"]
    }
    parts = [f"Commit {', '.join(sorted(commits))}." if commits else "", *(f"{line}." for line in sorted(versions))]
    return " ".join(part for part in parts if part)


def latex_text(text: str) -> str:
    """Returns text with the special characters of LaTeX escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"} | {"−": "$-$", "–": "--", "×": r"$\times$"}
    return "".join(special.get(character, character) for character in text)


def _checked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows with results, after a check that they may stand in one table."""
    filled = [row for row in rows if row["protocol"] is not None]
    check_comparable({f"{row['name']} ({row['data']})": row["protocol"] for row in filled})
    return filled


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    filled = [row for row in rows if row["protocol"] is not None]
    if not filled:
        return f"{rows[0]['data']}: nothing has been run yet"
    protocol = filled[0]["protocol"]
    return f"{rows[0]['data']}, {protocol_line(protocol)}; data sha256 {str(protocol['data'])[:12]}"


def _is_waiting(row: Mapping[str, Any]) -> bool:
    """Returns whether nothing of a row has begun."""
    return bool(row["empty"]) and not row["seeds"] and all(item["reason"] == NOT_RUN for item in row["empty"])


def _begun(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Returns the rows without those of which nothing has begun, unless that are all."""
    return [row for row in rows if not _is_waiting(row)] or rows


def _empty_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for item in row["empty"]:
            reasons.setdefault(item["reason"], []).append(str(item["seed"]))
        for reason, seeds in reasons.items():
            word = "seed" if len(seeds) == 1 else "seeds"
            notes.append(f"{row['name']} ({word} {', '.join(seeds)}) is empty: {_one_line(reason)}")
        if row["note"]:
            notes.append(f"{row['name']}: {row['note']}")
    return notes


def _best(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], first_column: int) -> set[tuple[int, int]]:
    best = set()
    for column, name in enumerate(columns, first_column):
        means = {
            number: row["metrics"][name]["mean"]
            for number, row in enumerate(rows)
            if row["metrics"].get(name, {}).get("mean") is not None
        }
        if len(means) > 1:
            choose: Callable[..., float] = min if name in _LESS_IS_BETTER else max
            top = display_value(name, choose(means.values()))
            best |= {(number, column) for number, mean in means.items() if display_value(name, mean) == top}
    return best


def _is_of(test: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    return (test["data"], test["row"]) == (row["data"], row["name"])


def _test(tests: Sequence[Mapping[str, Any]], row: Mapping[str, Any], metric: str) -> str:
    chosen = [test for test in tests if _is_of(test, row) and test["metric"] == metric]
    return difference_text(chosen[0]) if chosen else ""


def difference_text(test: Mapping[str, Any]) -> str:
    """Returns a test as text: the difference, its interval and both corrected p."""
    return (
        f"{100 * test['difference']:+.1f} [{100 * test['low']:+.1f}, {100 * test['high']:+.1f}], "
        f"p {_p(test['p_bootstrap_corrected'])}, {_p(test['p_t_corrected'])}"
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _lines_of(points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, list[tuple]] | None:
    """Returns (x, mean, deviation) of every system, if the rows are a sweep over numbers or over training fractions."""
    fractions = {row["train_fraction"] for row, _ in points}
    sweeps = [row["sweep"] for row, _ in points]
    if (
        all(sweep is not None and isinstance(sweep["value"], int | float) for sweep in sweeps)
        and len({sweep["field"] for sweep in sweeps}) == 1
    ):
        position = [float(sweep["value"]) for sweep in sweeps]
    elif len(fractions) > 1 and not any(sweeps):
        position = [row["train_fraction"] for row, _ in points]
    else:
        return None
    lines: dict[str, list[tuple]] = {}
    for x, (row, value) in zip(position, points, strict=True):
        lines.setdefault(row["system"], []).append((x, 100 * value["mean"], 100 * (value["std"] or 0)))
    return lines


def _has(row: Mapping[str, Any], key: tuple[str, str]) -> bool:
    return key[1] in row["strata"].get(key[0], {})


def _machine(row: Mapping[str, Any]) -> str:
    machine = row["machine"]
    device = row["cost"].get("device")
    gpu = f", {device}" if device and device != "cpu" else ""
    return f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores{gpu}"


def _number(value: float | None, text: Callable[[Any], str]) -> str:
    return "–" if value is None else text(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"

"""Results as a table to read and as files to keep."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from hf_mel.files import write_text

# Where a metric has a name of its own in print. A position is not a percentage.
_NAMES = {
    "mrr": "MRR",
    "mr": "MR",
    "accuracy": "acc.",
    "in_kb_accuracy": "in-KB acc.",
    "micro_f1": "F1",
    "nil_precision": "NIL P",
    "nil_recall": "NIL R",
}
_POSITIONS = {"mr"}
_DECISIONS = {"accuracy", "in_kb_accuracy", "micro_f1", "nil_precision", "nil_recall"}


def results_table(results: Mapping[str, Any], title: str | None = None) -> Table:
    """A `rich` table of one evaluation: a row for all mentions and one for every group, fractions as percentages.

    Args:
        results (`Mapping`): [`~hf_mel.evaluation.full_evaluator.FullResult.to_dict`], or the same read from results.json.
        title (`str`, *optional*): Default: number of mentions and of entities, and the treatment of ties.
    """
    overall = results["metrics"]
    units = f", units {' + '.join(results['units'])}" if results.get("units") else ""
    against = f"{results['kb_size']:,} entities"
    if lists := results.get("candidates"):
        against = f"up to {lists['k']} candidates each, end to end"
    title = title or f"{results['num_mentions']:,} mentions against {against} (ties {results['ties']}{units})"
    table = Table("mentions", title=title)
    table.add_column("in KB", justify="right")
    decides = "nil_threshold" in results  # among candidates every mention is linked, and F1 is a column
    columns = [name for name in _columns(overall) if not (decides and name in _DECISIONS)]
    for name in columns:
        table.add_column(display_name(name), justify="right")
    decisions = [
        f"{display_name(name)} {display_value(name, overall[name])}"
        for name in overall
        if decides and name in _DECISIONS
    ]
    if decisions:  # as columns they would squeeze the ranks out of a terminal of 80 characters
        table.caption = f"All mentions, NIL below {results['nil_threshold']:.4g}: {', '.join(decisions)}"

    def add(label: str, metrics: Mapping[str, Any]) -> None:
        table.add_row(label, f"{metrics['num_ranked']:,}", *(display_value(name, metrics[name]) for name in columns))

    add("[b]all[/b]", overall)
    for divided_by, groups in results["strata"].items():
        table.add_section()
        for group, metrics in groups.items():
            add(f"{divided_by}: {group}", metrics)
    return table


def orders_table(results: Mapping[str, Any]) -> Table:
    """A `rich` table of the candidate protocol: the order in which the candidates came beside the reranker's, end to
    end and with the gold added.

    Args:
        results (`Mapping`): [`~hf_mel.evaluation.candidate_evaluator.CandidateResult.to_dict`], or the same from results.json.
    """
    rows = {
        f"{order}, {label}": metrics["metrics"]
        for label, of_protocol in (("end to end", results), ("gold added", results["gold_added"]))
        for order, metrics in of_protocol["orders"].items()
    }
    lists = results["candidates"]
    recall = {int(name.partition("@")[2]): value for name, value in lists["recall"].items()}
    table = comparison_table(rows, title=f"Candidates by {lists.get('source', 'an unknown source')}")
    table.caption = "Recall of the candidates: " + ", ".join(
        f"{100 * value:.1f} at {k}" for k, value in sorted(recall.items())
    )
    if weighting := results.get("candidate_weight"):
        table.caption += (
            f"\nreranker + candidates: {weighting['reranker']} + {weighting['weight']:g} * {weighting['source']} score / "
            f"{weighting['scale']:.4g}"
        )
    return table


def comparison_table(rows: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """A `rich` table with one line of metrics per name, for instance one per model, fractions as percentages.

    Args:
        rows (`Mapping[str, Mapping]`): Metrics by name; all with the keys of the first.
        title (`str`, *optional*): Title of the table.
    """
    table = Table("", title=title)
    columns = _columns(next(iter(rows.values()), {}))
    for name in columns:
        table.add_column(display_name(name), justify="right")
    for label, metrics in rows.items():
        table.add_row(label, *(display_value(name, metrics[name]) for name in columns))
    return table


def _columns(metrics: Iterable[str]) -> list[str]:
    return [name for name in metrics if name.startswith("hits@") or name in _NAMES]


def display_name(metric: str) -> str:
    """The heading of a metric: "hits@1" → "H@1", "mrr" → "MRR"."""
    return metric.replace("hits@", "H@") if metric.startswith("hits@") else _NAMES.get(metric, metric)


def display_value(metric: str, value: float | None) -> str:
    """A metric's value as text: fractions as percentages, "–" where there was nothing to average."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.1f}" if metric in _POSITIONS else f"{100 * value:.1f}"


def write_results(results: Mapping[str, Any] | Sequence[Any], path: str | os.PathLike[str]) -> None:
    """Writes JSON, whole or not at all; nan, which JSON does not know, becomes null.

    Args:
        results (`Mapping` or sequence): [`~hf_mel.evaluation.full_evaluator.FullResult.to_dict`], or anything JSON can hold.
        path (`str` or `os.PathLike`): The file; its folder is made if need be.

    Raises:
        [`~hf_mel.errors.MelError`]: the file cannot be written.
    """
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, [text + "\n"])


def write_records(records: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes JSON lines, one per record, whole or not at all. Args and errors as in [`write_results`]."""
    write_text(path, (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

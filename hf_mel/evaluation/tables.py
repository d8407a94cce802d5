"""Tables and files of results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from hf_mel.files import write_text
from hf_mel.terminal import safe_text

#: Metric → heading. The headings of "hits@k" are "H@k".
_HEADINGS = {
    "mrr": "MRR",
    "mr": "MR",
    "accuracy": "acc.",
    "in_kb_accuracy": "in-KB acc.",
    "micro_f1": "F1",
    "nil_precision": "NIL P",
    "nil_recall": "NIL R",
}
#: Metrics that are ranks. All others are fractions, printed as percentages.
_POSITIONS = {"mr"}
#: Metrics of the decision between an entity and NIL.
_DECISIONS = {"accuracy", "in_kb_accuracy", "micro_f1", "nil_precision", "nil_recall"}


def results_table(results: Mapping[str, Any], title: str | None = None) -> Table:
    """Returns a `rich` table of one evaluation with a row for all mentions and a row for every group.

    Args:
        results (`Mapping`): Output of [`~hf_mel.evaluation.full_evaluator.FullResult.to_dict`] or
            [`~hf_mel.evaluation.candidate_evaluator.CandidateResult.to_dict`], or the content of results.json.
        title (`str`, *optional*): Default: the number of mentions and of entities, and the treatment of ties.
    """
    overall = results["metrics"]
    units = f", units {' + '.join(results['units'])}" if results.get("units") else ""
    names = f", names × {results['name_weight']:g}" if results.get("name_weight") else ""
    against = f"{results['kb_size']:,} entities"
    if lists := results.get("candidates"):
        against = f"up to {lists['k']} candidates each, end to end"
    title = title or f"{results['num_mentions']:,} mentions against {against} (ties {results['ties']}{units}{names})"
    table = Table("mentions", title=Text(title))
    table.add_column("in KB", justify="right")
    # The candidate protocol links every mention, so its only decision metric is F1, which becomes a column. The full
    # protocol has five, which would squeeze the other columns in a terminal of 80 characters. They go into the caption.
    decisions_in_caption = "nil_threshold" in results
    columns = [name for name in _shown_metrics(overall) if not (decisions_in_caption and name in _DECISIONS)]
    for name in columns:
        table.add_column(display_name(name), justify="right")
    decisions = [
        f"{display_name(name)} {display_value(name, overall[name])}"
        for name in overall
        if decisions_in_caption and name in _DECISIONS
    ]
    if decisions:
        table.caption = f"All mentions, NIL below {results['nil_threshold']:.4g}: {', '.join(decisions)}"

    def add_row(label: Text, metrics: Mapping[str, Any]) -> None:
        table.add_row(label, f"{metrics['num_ranked']:,}", *(display_value(name, metrics[name]) for name in columns))

    add_row(Text("all", "bold"), overall)
    for stratification, groups in results["strata"].items():
        table.add_section()
        for group, metrics in groups.items():
            add_row(Text(safe_text(f"{stratification}: {group}")), metrics)  # a name in brackets is not markup
    return table


def decision_lines(results: Mapping[str, Any]) -> list[str]:
    """Returns sentences about NIL and about the links at a stated precision, as far as results.json has them."""
    lines = []
    for group, name in (
        ("annotated", "NIL mentions"),
        ("left out", "mentions whose gold is left out (simulated NIL)"),
    ):
        if detection := results.get("nil_detection", {}).get(group):
            shares = {"precision": detection.get("precision"), "recall": detection.get("recall")}
            told = "".join(
                f", {share} {100 * value:.1f}"
                for share, value in shares.items()
                if value is not None and value == value
            )
            lines.append(f"{detection['num']:,} {name}: AUC of the best score {detection['auc']:.3f}{told}.")
    if links := results.get("at_precision"):
        reached = "" if links["precision"] is None else f", {100 * links['precision']:.1f} % of them right"
        lines.append(
            f"At the stated precision {100 * links['stated']:g} %: {links['links']:,} links{reached}; {links['nil']:,} NIL; "
            f"{links['review']:,} for review."
        )
    return lines


def orders_table(results: Mapping[str, Any]) -> Table:
    """Returns a `rich` table that compares the orders of the candidates: the reranker's and those of the sources.

    Every order has a row for the end-to-end protocol and a row for the protocol with the gold added.

    Args:
        results (`Mapping`): Output of [`~hf_mel.evaluation.candidate_evaluator.CandidateResult.to_dict`], or the content
            of results.json.
    """
    rows = {
        f"{order}, {label}": metrics["metrics"]
        for label, protocol in (("end to end", results), ("gold added", results["gold_added"]))
        for order, metrics in protocol["orders"].items()
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
    """Returns a `rich` table with one row of metrics per name, for instance per model.

    Args:
        rows (`Mapping[str, Mapping]`): Name → metrics, all with the keys of the first.
        title (`str`, *optional*): Title of the table.
    """
    table = Table("", title=None if title is None else Text(safe_text(title)))
    columns = _shown_metrics(next(iter(rows.values()), {}))
    for name in columns:
        table.add_column(display_name(name), justify="right")
    for label, metrics in rows.items():
        table.add_row(Text(safe_text(label)), *(display_value(name, metrics[name]) for name in columns))
    return table


def _shown_metrics(metrics: Iterable[str]) -> list[str]:
    return [name for name in metrics if name.startswith("hits@") or name in _HEADINGS]


def display_name(metric: str) -> str:
    """Returns the heading of a metric: "H@1" for "hits@1", "MRR" for "mrr"."""
    return metric.replace("hits@", "H@") if metric.startswith("hits@") else _HEADINGS.get(metric, metric)


def display_value(metric: str, value: float | None) -> str:
    """Returns the value of a metric as text: fractions as percentages, `None` and nan as "–"."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.1f}" if metric in _POSITIONS else f"{100 * value:.1f}"


def write_results(results: Mapping[str, Any] | Sequence[Any], path: str | os.PathLike[str]) -> None:
    """Writes results as JSON, atomically. nan, which JSON cannot express, becomes null.

    Args:
        results (`Mapping` or sequence): Output of [`~hf_mel.evaluation.full_evaluator.FullResult.to_dict`], or any other
            JSON data.
        path (`str` or `os.PathLike`): The file. Missing folders are created.

    Raises:
        [`~hf_mel.errors.MelError`]: The file cannot be written.
    """
    text = json.dumps(_nan_to_none(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, [text + "\n"])


def write_records(records: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes records as JSON lines, atomically. Arguments and errors are those of [`write_results`]."""
    write_text(
        path, (json.dumps(_nan_to_none(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    )


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

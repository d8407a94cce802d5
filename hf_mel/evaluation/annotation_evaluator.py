"""Evaluates annotated texts end to end: which mentions are found, and which entities they are linked to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
from tqdm.auto import tqdm

from hf_mel.detection.spans import MentionDetector
from hf_mel.errors import DataFormatError
from hf_mel.linking.annotating import annotate_batches
from hf_mel.linking.linker import EntityLinker
from hf_mel.schema import NIL
from hf_mel.spaces.mel_annotation.mel_annotation import annotation_metrics

#: Group of figures → what it says, in the order of tables.
GROUPS = {"detection": "found", "linking": "linked", "in_kb": "in KB", "nil": "NIL"}


def evaluate_annotations(
    linker: EntityLinker,
    mentions: datasets.Dataset,
    detector: MentionDetector | None = None,
    *,
    gold_spans: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Annotates the texts of a data set and compares the mentions with its own.

    A text is one `context_id`, or one text without it. A gold that the knowledge base does not hold counts as NIL. Visual
    mentions, and those without a position in their text, are left out and counted. The metric is
    `spaces/mel_annotation`, whose card defines every figure.

    Args:
        linker ([`~hf_mel.EntityLinker`]): The linker.
        mentions (`datasets.Dataset`): M mentions with golds.
        detector ([`~hf_mel.detection.spans.MentionDetector`], *optional*): As in [`~hf_mel.EntityLinker.annotate`].
        gold_spans (`bool`): Whether the gold spans are linked, and no mention is searched.
        batch_size, progress: As in [`~hf_mel.EntityLinker.annotate`].

    Returns:
        `dict`: The output of the metric, "num_mentions", "num_left_out" and "kb_size".

    Raises:
        DataFormatError: No mention has a position in its text.
    """
    texts, golds, left_out = _texts_and_golds(linker, mentions)
    if gold_spans:
        texts = [{**text, "spans": [gold[:2] for gold in of_text]} for text, of_text in zip(texts, golds, strict=True)]
    predictions: list[Any] = [()] * len(texts)
    with tqdm(total=len(texts), desc="Annotating", unit="text", delay=1, disable=not progress) as bar:
        # Gold spans may overlap; a detector's are resolved as in annotate.
        batches = annotate_batches(
            linker, texts, detector or linker.gazetteer, overlapping=gold_spans, top_k=1, batch_size=batch_size
        )
        for batch, annotated in batches:
            for k, result in zip(batch, annotated, strict=True):
                predictions[k] = [(mention.start, mention.end, mention.entity_id) for mention in result]
            bar.update(len(batch))
    return {
        **annotation_metrics(golds, predictions),
        "num_mentions": sum(map(len, golds)),
        "num_left_out": left_out,
        "kb_size": len(linker.kb),
    }


def _texts_and_golds(
    linker: EntityLinker, mentions: datasets.Dataset
) -> tuple[list[dict[str, Any]], list[list[tuple[int, int, str]]], int]:
    """Returns the texts with their images, the gold mentions of each, and the number of mentions that were left out."""
    if isinstance(mentions.features.get("image"), datasets.Image):
        mentions = mentions.cast_column("image", datasets.Image(decode=False))
    columns = [
        name for name in ("context_id", "text", "start", "end", "entity_id", "image") if name in mentions.features
    ]
    texts: dict[tuple[str, str], dict[str, Any]] = {}
    golds: dict[tuple[str, str], dict[tuple[int, int, str], None]] = {}
    counts: Counter[str] = Counter()
    for row in mentions.select_columns(columns):
        if row["start"] < 0:
            counts["left out"] += 1
            continue
        key = (row.get("context_id") or "", row["text"])
        texts.setdefault(key, {"text": row["text"], "image": row.get("image")})
        gold = row["entity_id"] if row["entity_id"] in linker.kb else NIL
        golds.setdefault(key, {})[row["start"], row["end"], gold] = None
    if not texts:
        raise DataFormatError(
            "No mention has a position in its text.", remedy="Give a data set whose mentions have start and end."
        )
    return list(texts.values()), [list(golds[key]) for key in texts], counts["left out"]


def annotation_rows(results: dict[str, Any]) -> Sequence[tuple[str, ...]]:
    """Returns the rows of a table: what is counted, how spans match, golds, and micro and macro P, R and F1 in percent.

    "found" counts the spans, "linked" spans with their entity or NIL, "in KB" and "NIL" the two kinds apart.
    """
    rows = []
    for match in ("strong", "weak"):
        for group, label in GROUPS.items():
            figures = results[match][group]
            if group == "nil" and not figures["num_gold"] and not figures["num_predicted"]:
                continue  # the model has no threshold, and the data set no NIL
            names = [f"{kind}_{name}" for kind in ("micro", "macro") for name in ("precision", "recall", "f1")]
            rows.append((label, match, f"{figures['num_gold']:,}", *(f"{100 * figures[name]:.1f}" for name in names)))
    return rows

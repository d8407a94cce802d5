"""Metrics of annotated texts: precision, recall and F1 of mentions and their entities, as GERBIL counts them.

The card beside this file defines every number. The functions need no package; `MelAnnotation` wraps them as an `evaluate`
module. hf_mel imports them from here, because `evaluate.load` needs a file that does not depend on hf_mel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

#: The id for "not in the knowledge base".
NIL = "NIL"

#: Whether two spans match: equal ones, or ones that share a character.
MATCHES: dict[str, Callable[[Any, Any], bool]] = {
    "strong": lambda gold, span: gold[:2] == span[:2],
    "weak": lambda gold, span: gold[0] < span[1] and span[0] < gold[1],
}

#: A mention: start, end, and the id of its entity; "NIL"; or `None` for a mention that was not linked.
Mention = tuple[int, int, str | None]

_DESCRIPTION = """\
Micro and macro precision, recall and F1 of the mentions that a system finds in texts, and of the entities that it links \
them to. Spans match if they are equal (strong) or overlap (weak). Entities of the knowledge base and NIL are also \
counted apart.
"""

_INPUTS = """
One row per text:
    predictions (`list` of `dict`): the mentions of the system, each with `start`, `end` (characters, end exclusive) and
        `entity_id`: an id, "NIL", or `None` if it was not linked.
    references (`list` of `dict`): the gold mentions, in the same form.

Returns:
    `dict`: "strong" and "weak", each a dict of "detection", "linking", "in_kb" and "nil", each a dict of
    "micro_precision", "micro_recall", "micro_f1", "macro_precision", "macro_recall", "macro_f1" (fractions in [0, 1]),
    "num_gold", "num_predicted", "num_correct"; and "num_texts".

Examples:
    >>> metric = evaluate.load("spaces/mel_annotation")
    >>> gold = [{"start": 0, "end": 5, "entity_id": "Q117"}, {"start": 10, "end": 15, "entity_id": "NIL"}]
    >>> found = [{"start": 0, "end": 5, "entity_id": "Q117"}]
    >>> metric.compute(predictions=[found], references=[gold])["strong"]["linking"]["micro_recall"]
    0.5
"""


def count_matches(
    golds: Sequence[Mention], predictions: Sequence[Mention], match: str, same_entity: bool
) -> tuple[list[Mention], list[Mention], list[Mention]]:
    """Matches the gold mentions of a text with those of a system.

    In the order of the text, each gold takes the first prediction that matches it and that no gold before has taken.

    Args:
        golds, predictions (sequences of (start, end, entity id)): Mentions of one text.
        match (`str`): "strong" or "weak".
        same_entity (`bool`): Whether a match also needs equal entity ids.

    Returns:
        Golds that have a match, golds that have none, and predictions that were not taken.
    """
    free = sorted(predictions, key=lambda mention: mention[:2])
    matched, missed = [], []
    for gold in sorted(golds, key=lambda mention: mention[:2]):
        for number, prediction in enumerate(free):
            if MATCHES[match](gold, prediction) and (not same_entity or gold[2] == prediction[2]):
                matched.append(gold)
                del free[number]
                break
        else:
            missed.append(gold)
    return matched, missed, free


def annotation_metrics(golds: Sequence[Sequence[Mention]], predictions: Sequence[Sequence[Mention]]) -> dict[str, Any]:
    """Returns precision, recall and F1 of annotated texts.

    Args:
        golds, predictions (T sequences of (start, end, entity id)): Mentions of each of T texts. Equal ones count once.

    Returns:
        `dict`: See the card: "strong" and "weak" → "detection", "linking", "in_kb", "nil" → the figures; "num_texts".

    Raises:
        `ValueError`: The numbers of texts differ, a span is empty, or a gold has no entity id.
    """
    if len(golds) != len(predictions):
        raise ValueError(f"There are golds of {len(golds)} texts, and predictions of {len(predictions)}.")
    for row, mentions in enumerate(zip(golds, predictions, strict=True)):
        for start, end, _ in (*mentions[0], *mentions[1]):
            if not 0 <= start < end:
                raise ValueError(f"Row {row}: start={start}, end={end} is no span. The end is exclusive.")
        if any(entity_id is None for _, _, entity_id in mentions[0]):
            raise ValueError(
                f"Row {row}: a gold has no entity_id. Write {NIL!r} if the knowledge base lacks its entity."
            )
    results: dict[str, Any] = {"num_texts": len(golds)}
    for match in MATCHES:
        counts: dict[str, list[tuple[int, int, int]]] = {"detection": [], "linking": [], "in_kb": [], "nil": []}
        for gold, predicted in zip(golds, predictions, strict=True):
            gold_set = list(dict.fromkeys(gold))
            linked = [mention for mention in dict.fromkeys(predicted) if mention[2] is not None]
            spans: list[list[Mention]] = [[(start, end, None) for start, end, _ in part] for part in (gold, predicted)]
            groups: dict[str, list[list[Mention]]] = {
                "detection": [list(dict.fromkeys(part)) for part in spans],
                "linking": [gold_set, linked],
                "in_kb": [[m for m in part if m[2] != NIL] for part in (gold_set, linked)],
                "nil": [[m for m in part if m[2] == NIL] for part in (gold_set, linked)],
            }
            for name, (expected, found) in groups.items():
                matched, _, _ = count_matches(expected, found, match, same_entity=name != "detection")
                counts[name].append((len(matched), len(expected), len(found)))
        results[match] = {name: _figures(of_texts) for name, of_texts in counts.items()}
    return results


def _figures(counts: list[tuple[int, int, int]]) -> dict[str, float]:
    """Returns the figures of (correct, gold, predicted) mentions of each text."""
    correct, gold, predicted = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    micro = precision_recall_f1(correct, gold, predicted)
    per_text = [precision_recall_f1(*of_text) for of_text in counts]
    macro = [sum(column) / len(counts) for column in zip(*per_text, strict=True)] if counts else micro
    names = ("precision", "recall", "f1")
    return {
        **{f"micro_{name}": value for name, value in zip(names, micro, strict=True)},
        **{f"macro_{name}": value for name, value in zip(names, macro, strict=True)},
        "num_gold": gold,
        "num_predicted": predicted,
        "num_correct": correct,
    }


def precision_recall_f1(correct: int, gold: int, predicted: int) -> tuple[float, float, float]:
    """Returns precision, recall and F1. Nothing predicted where nothing is gold is right: all three are 1."""
    if gold == predicted == 0:
        return 1.0, 1.0, 1.0
    precision, recall = (correct / total if total else 0.0 for total in (predicted, gold))
    return precision, recall, 2 * correct / (gold + predicted)


_MENTIONS = [
    {"start": datasets.Value("int64"), "end": datasets.Value("int64"), "entity_id": datasets.Value("string")},
]


class MelAnnotation(evaluate.Metric):
    """[`annotation_metrics`] as an `evaluate` module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": _MENTIONS, "references": _MENTIONS}),
        )

    def _compute(self, *, predictions, references):
        return annotation_metrics(_tuples(references), _tuples(predictions))


def _tuples(texts: Sequence[Sequence[dict[str, Any]]]) -> list[list[Mention]]:
    return [[(m["start"], m["end"], m["entity_id"]) for m in mentions] for mentions in texts]

"""Grouping of mentions into the examples of a reranker: single mentions, contexts or documents; and parts of a split."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import datasets

from hf_mel.errors import DataFormatError
from hf_mel.schema import Row

#: Values of `example_unit` of a [`~hf_mel.protocols.Reranker`].
EXAMPLE_UNITS = ("mention", "context", "document")
#: Ways to choose a part of the mentions of a split.
PART_ORDERS = ("first", "random")
_GROUP_COLUMNS = ("context_id", "document_id")


def example_groups(
    mentions: datasets.Dataset | Sequence[Row], unit: str, max_mentions: int | None = None
) -> list[list[int]]:
    """Groups mentions into examples.

    Args:
        mentions (`datasets.Dataset` or sequence of rows): M mentions.
        unit (`str`): The unit of an example: a "mention"; all mentions of a "context" (one `context_id`); or all
            mentions of a "document" (one `document_id`, or one `context_id` for mentions without a document).
        max_mentions (`int`, *optional*): Limit on the mentions of an example.

    Returns:
        `list[list[int]]`: The row numbers of each example. Examples are in the order of their first mention.

    Raises:
        DataFormatError: An example exceeds the limit; names it.
        ValueError: The unit is unknown.
    """
    if unit not in EXAMPLE_UNITS:
        raise ValueError(f"example_unit={unit!r} is not one of {', '.join(EXAMPLE_UNITS)}.")
    count = len(mentions)
    if unit == "mention":
        return [[number] for number in range(count)]
    if isinstance(mentions, datasets.Dataset):
        columns = {name: mentions[name] for name in _GROUP_COLUMNS if name in mentions.column_names}
        contexts = list(columns["context_id"])
        documents = list(columns.get("document_id", [None] * count))
    else:
        contexts = [row["context_id"] for row in mentions]
        documents = [row.get("document_id") for row in mentions]
    groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for number, (context, document) in enumerate(zip(contexts, documents, strict=True)):
        is_document = unit == "document" and document is not None
        groups[is_document, document if is_document else context].append(number)
    for (is_document, name), group in groups.items():
        if max_mentions is not None and len(group) > max_mentions:
            kind = "document" if is_document else "context"
            raise DataFormatError(
                f"The {kind} {name!r} has {len(group)} mentions; the model takes {max_mentions} together.",
                row=name,
                remedy=f"Divide it, and give every part another {kind}_id.",
            )
    return list(groups.values())


def part_of_mentions(
    mentions: datasets.Dataset, fraction: float, order: str = "random", seed: int = 0
) -> datasets.Dataset:
    """Returns a part of M mentions, in their order.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        fraction (`float`): The share of the mentions, above 0 and at most 1.
        order (`str`): "first" takes the first round(fraction * M) mentions, at least one. "random" draws documents, or
            contexts without them, until at least so many mentions are chosen. With the same seed, a smaller part lies in
            a larger one.
        seed (`int`): Seed of the draw.

    Raises:
        ValueError: The fraction or the order is not one of these.
    """
    if not 0 < fraction <= 1 or order not in PART_ORDERS:
        raise ValueError(f"{fraction!r} is no fraction of mentions, or {order!r} none of {', '.join(PART_ORDERS)}.")
    if fraction == 1:
        return mentions
    count = max(1, round(fraction * len(mentions)))
    if order == "first":
        return mentions.select(range(min(count, len(mentions))))
    return sample_examples(mentions, "document", count, seed)


def sample_examples(mentions: datasets.Dataset, unit: str, count: int, seed: int) -> datasets.Dataset:
    """Samples whole examples until at least `count` mentions are chosen, and keeps the order of the mentions.

    Args:
        mentions, unit: As in [`example_groups`].
        count (`int`): Number of mentions.
        seed (`int`): Seed of the draw.
    """
    groups = example_groups(mentions, unit)
    random.Random(seed).shuffle(groups)
    chosen: list[int] = []
    for group in groups:
        if len(chosen) >= count:
            break
        chosen += group
    return mentions.select(sorted(chosen))

"""Grouping of mentions into the examples of a reranker: single mentions, contexts or documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import datasets

from hf_mel.errors import DataFormatError
from hf_mel.schema import Row

#: Values of `example_unit` of a [`~hf_mel.protocols.Reranker`].
EXAMPLE_UNITS = ("mention", "context", "document")
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

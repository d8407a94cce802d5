"""hf_mel.data.examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import datasets

from hf_mel.errors import DataFormatError
from hf_mel.schema import Row

#: What a reranker may call one example (see [`~hf_mel.protocols.Reranker`]).
EXAMPLE_UNITS = ("mention", "context", "document")


_GROUP_COLUMNS = ("context_id", "document_id")


def example_groups(mentions: datasets.Dataset | Sequence[Row], unit: str, most: int | None = None) -> list[list[int]]:
    """The mentions of each example, as numbers, in the order of the first.

    Args:
        mentions (`datasets.Dataset` or sequence of rows): M mentions.
        unit (`str`): What one example is: a "mention", all mentions of a "context" (one `context_id`), or of a
            "document": one `document_id`, or where there is none, one `context_id`.
        most (`int`, *optional*): Mentions that an example may have.

    Raises:
        DataFormatError: an example has more; names it.
        `ValueError`: no such unit.
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
        of_document = unit == "document" and document is not None
        groups[of_document, document if of_document else context].append(number)
    for (of_document, name), group in groups.items():
        if most is not None and len(group) > most:
            what = "document" if of_document else "context"
            raise DataFormatError(
                f"the {what} {name!r} has {len(group)} mentions; the model takes {most} together.",
                row=name,
                remedy=f"Divide it: give its parts a {what}_id each.",
            )
    return list(groups.values())

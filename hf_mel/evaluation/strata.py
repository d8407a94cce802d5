"""Strata: groups of mentions that an evaluation reports separately."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import datasets

from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL

#: One group name per mention, `None` for a mention without a group.
Labels = list[str | None]

#: Column → group of the mentions with an empty value. In other columns they have no group.
_GROUP_OF_EMPTY = {"modality": "text"}


def strata_of(
    mentions: datasets.Dataset,
    columns: Sequence[str] | None = None,
    train_golds: Collection[str] | None = None,
) -> dict[str, Labels]:
    """Returns the groups of M mentions for every stratification.

    - One for each of `columns`: the group is the value of the column. A mention with an empty value has no group, but
      with an empty "modality" its group is "text".
    - "mentions in context": "multiple" if another mention has the same `context_id`, otherwise "single".
    - "gold in training", given `train_golds`: "seen" or "unseen". A mention whose gold is NIL has no group.

    Args:
        mentions (`datasets.Dataset`): M rows of the schema.
        columns (sequence of `str`, *optional*): Columns to group by. Default: "modality" and "stratum", as far as the
            data set has them.
        train_golds (collection of `str`, *optional*): Entity ids of the golds of the training split.

    Returns:
        `dict[str, list]`: Name of the stratification → M group names.

    Raises:
        [`~hf_mel.errors.DataFormatError`]: The mentions lack one of `columns`.
    """
    if columns is None:
        columns = [column for column in ("modality", "stratum") if column in mentions.column_names]
    missing = [column for column in columns if column not in mentions.column_names]
    if missing:
        raise DataFormatError(
            f"The mentions have no column {', '.join(missing)} to group by.",
            remedy=f"Choose among {', '.join(mentions.column_names)}.",
        )
    strata: dict[str, Labels] = {
        column: [_GROUP_OF_EMPTY.get(column) if value in (None, "") else str(value) for value in mentions[column]]
        for column in columns
    }
    contexts = Counter(mentions["context_id"])
    strata["mentions in context"] = [
        "single" if contexts[context] == 1 else "multiple" for context in mentions["context_id"]
    ]
    if train_golds is not None:
        seen = frozenset(train_golds)
        strata["gold in training"] = [
            None if gold == NIL else "seen" if gold in seen else "unseen" for gold in mentions["entity_id"]
        ]
    return strata

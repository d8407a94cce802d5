"""Strata: the groups of mentions that an evaluation reports apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import datasets

from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL

#: One group name per mention, `None` for a mention that is in none.
Labels = list[str | None]

#: The group of a mention with an empty value, by column; elsewhere it is in none.
_DEFAULTS = {"modality": "text"}


def strata_of(
    mentions: datasets.Dataset,
    columns: Sequence[str] | None = None,
    train_golds: Collection[str] | None = None,
) -> dict[str, Labels]:
    """The groups of each of M mentions, by the name of what divides them.

    - every name in `columns`: the value of that column, in no group where it is empty; a mention without a "modality" is a
      textual one;
    - "mentions in context": "single", or "multiple" where another of these mentions has the same `context_id`;
    - "gold in training", given `train_golds`: "seen" or "unseen"; a mention whose gold is NIL is in no group.

    Args:
        mentions (`datasets.Dataset`): M rows of the schema.
        columns (sequence of `str`, *optional*): Columns to divide by. Default: "modality" and "stratum", if the data set has
            them.
        train_golds (collection of `str`, *optional*): The entity ids that occur as golds in training.

    Returns:
        `dict[str, list]`: M group names each.

    Raises:
        [`~hf_mel.errors.DataFormatError`]: the mentions lack one of `columns`.
    """
    if columns is None:
        columns = [column for column in ("modality", "stratum") if column in mentions.column_names]
    missing = [column for column in columns if column not in mentions.column_names]
    if missing:
        raise DataFormatError(
            f"The mentions have no column {', '.join(missing)} to divide them by.",
            remedy=f"They have {', '.join(mentions.column_names)}.",
        )
    strata: dict[str, Labels] = {
        column: [_DEFAULTS.get(column) if value in (None, "") else str(value) for value in mentions[column]]
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

"""Strata: groups of mentions that an evaluation reports separately."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hf_mel.errors import DataFormatError
from hf_mel.names import namesakes_of, words_of
from hf_mel.schema import NIL

#: One group name per mention, `None` for a mention without a group.
Labels = list[str | None]

#: Column → group of the mentions with an empty value. In other columns they have no group.
_GROUP_OF_EMPTY = {"modality": "text"}


def strata_of(
    mentions: datasets.Dataset,
    columns: Sequence[str] | None = None,
    train_golds: Collection[str] | None = None,
    entity_names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Labels]:
    """Returns the groups of M mentions for every stratification.

    - One for each of `columns`: the group is the value of the column. A mention with an empty value has no group, but
      with an empty "modality" its group is "text".
    - "mentions in context": "multiple" if another mention has the same `context_id`, otherwise "single".
    - "name of mention", given `entity_names`: "ambiguous" if the knowledge base has a namesake of the mention that is not
      its gold, otherwise "unambiguous". A namesake is an entity with a name or alias that has all words of the surface
      form, regardless of case, accents and order ([`~hf_mel.names.namesakes_of`]). A mention
      whose gold is NIL, or whose surface form has no word, as a visual mention, has no group.
    - "image of mention": "with" or "without", if there are mentions of both kinds.
    - "gold in training", given `train_golds`: "seen" or "unseen". A mention whose gold is NIL has no group.

    Args:
        mentions (`datasets.Dataset`): M rows of the schema.
        columns (sequence of `str`, *optional*): Columns to group by. Default: "modality" and "stratum", as far as the
            data set has them.
        train_golds (collection of `str`, *optional*): Entity ids of the golds of the training split.
        entity_names (`Mapping[str, Sequence[str]]`, *optional*): Entity id → name and aliases, for all entities of the
            knowledge base ([`names_by_id`]).

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
    if entity_names is not None and "mention" in mentions.column_names:
        surfaces = [surface or "" for surface in mentions["mention"]]
        namesakes = namesakes_of(surfaces, entity_names)
        strata["name of mention"] = [
            None
            if gold == NIL or not words_of(surface)
            else "ambiguous"
            if namesakes[surface] - {gold}
            else "unambiguous"
            for surface, gold in zip(surfaces, mentions["entity_id"], strict=True)
        ]
    if "image" in mentions.column_names:
        pictured = has_image(mentions)
        if any(pictured) and not all(pictured):
            strata["image of mention"] = ["with" if is_pictured else "without" for is_pictured in pictured]
    if train_golds is not None:
        seen = frozenset(train_golds)
        strata["gold in training"] = [
            None if gold == NIL else "seen" if gold in seen else "unseen" for gold in mentions["entity_id"]
        ]
    return strata


def has_image(mentions: datasets.Dataset) -> list[bool]:
    """Returns for each of M mentions whether it has an image, without decoding any."""
    pictured: list[bool] = []
    for batch in mentions.select_columns(["image"]).with_format("arrow").iter(1000):
        column = batch["image"].combine_chunks()
        present = pc.is_valid(column)
        if pa.types.is_struct(column.type):
            parts = [pc.is_valid(pc.struct_field(column, name)) for name in ("bytes", "path")]
            present = pc.and_(present, pc.or_(*parts))
        pictured += present.to_pylist()
    return pictured


def names_by_id(entities: datasets.Dataset) -> dict[str, list[str]] | None:
    """Returns entity id → name and aliases of N entity rows; `None` if the rows have no names.

    Args:
        entities (`datasets.Dataset`): Rows with `entity_id`, and optionally `name` and `aliases`.
    """
    if "name" not in entities.column_names:
        return None
    has_aliases = "aliases" in entities.column_names
    aliases_of = entities["aliases"] if has_aliases else [()] * len(entities)
    return {
        entity_id: [name or "", *(alias for alias in aliases or () if alias)]
        for entity_id, name, aliases in zip(entities["entity_id"], entities["name"], aliases_of, strict=True)
    }

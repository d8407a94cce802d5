"""Warnings about truncated texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import datasets

from hf_mel.protocols import LimitsTexts, length_options

logger = logging.getLogger(__name__)

#: A kind of row, which is the name of an argument of the processor.
RowKind: TypeAlias = Literal["mentions", "entities", "posts", "pairs"]

#: Rows of a data set that are read at a time.
_BATCH_SIZE = 1000


class LeftOutTexts:
    """Counts the rows whose texts a processor truncates, and warns once for every kind of row.

    It counts nothing if the processor is no [`~hf_mel.protocols.LimitsTexts`].

    Args:
        processor ([`~hf_mel.protocols.MelProcessor`]): The processor.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self._counts: dict[RowKind, tuple[int, int]] = {}
        self._warned: set[RowKind] = set()

    def add(self, kind: RowKind, rows: Sequence[Any]) -> None:
        """Counts rows. Does nothing once [`LeftOutTexts.warn`] has been called for this kind."""
        if kind in self._warned or not isinstance(self.processor, LimitsTexts):
            return
        left_out = self.processor.num_left_out(**{kind: rows})
        shortened, total = self._counts.get(kind, (0, 0))
        self._counts[kind] = shortened + sum(number > 0 for number in left_out), total + len(left_out)

    def add_dataset(self, kind: RowKind, rows: datasets.Dataset) -> None:
        """Counts the rows of a data set. Images are not read."""
        rows = _without_images(rows)
        for batch in _batches(len(rows)):
            self.add(kind, rows.select(batch).to_list())

    def add_gold_pairs(self, mentions: datasets.Dataset, entities: datasets.Dataset) -> None:
        """Counts the pairs of each of M mentions with its gold, which is one of N entities. Images are not read."""
        mentions, entities = _without_images(mentions), _without_images(entities)
        row_of = {entity_id: row for row, entity_id in enumerate(entities["entity_id"])}
        for batch in _batches(len(mentions)):
            rows = mentions.select(batch).to_list()
            golds = entities.select([row_of[row["entity_id"]] for row in rows]).to_list()
            self.add("pairs", [(row, [gold]) for row, gold in zip(rows, golds, strict=True)])

    def warn(self, kind: RowKind) -> None:
        """Logs how many of the counted rows have more text than the processor reads, at the first call for this kind."""
        shortened, total = self._counts.get(kind, (0, 0))
        if shortened and kind not in self._warned:
            options = length_options(self.processor)
            logger.warning(
                "%s of %s %s have more text than %s reads (%s), and the rest is left out. To read more, train with a "
                "larger %s.",
                f"{shortened:,}",
                f"{total:,}",
                "pairs of a mention and an entity" if kind == "pairs" else kind,
                type(self.processor).__name__,
                ", ".join(f"{name}={getattr(self.processor, name, None)}" for name in options),
                " or ".join(f"processor.options.{name}" for name in options),
            )
        self._warned.add(kind)


def _without_images(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.select_columns(
        [
            name
            for name, feature in rows.features.items()
            if not isinstance(getattr(feature, "feature", feature), datasets.Image)
        ]
    )


def _batches(count: int) -> Iterator[range]:
    for first in range(0, count, _BATCH_SIZE):
        yield range(first, min(first + _BATCH_SIZE, count))

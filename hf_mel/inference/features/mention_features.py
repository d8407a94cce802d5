"""Caches frozen-encoder outputs of mentions, so that each mention is encoded once instead of once per epoch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.errors import ScoreError
from hf_mel.inference.execution import evaluation_mode, to_model
from hf_mel.inference.features.row_features import RowFeatures, with_column
from hf_mel.protocols import FrozenMentions, MelProcessor
from hf_mel.schema import Row

logger = logging.getLogger(__name__)

#: Memory limit of the cache in bytes. Beyond it, mentions are encoded again whenever a batch holds them.
_MAX_BYTES = 8 << 30


class MentionFeatures(RowFeatures):
    """Frozen-encoder outputs of mentions, cached on the CPU in half precision and without padding.

    Args:
        model ([`~hf_mel.protocols.FrozenMentions`]): Computes the features.
        processor ([`~hf_mel.protocols.MelProcessor`]): Turns rows, or their features, into the model's tensors.
    """

    def __init__(self, model: Any, processor: MelProcessor):
        super().__init__(model, processor)
        self._cache: dict[tuple, dict[str, torch.Tensor]] = {}
        self._bytes, self._too_large = 0, False

    @classmethod
    def for_model(cls, model: Any, processor: MelProcessor) -> MentionFeatures | None:
        """Returns the features of a model that computes them, otherwise `None`."""
        return cls(model, processor) if isinstance(model, FrozenMentions) else None

    def precompute(self, rows: datasets.Dataset, *, batch_size: int = 64, progress: bool = False) -> None:
        """Computes the features of M mentions that are not cached yet, in batches of similar text length.

        Raises:
            [`~hf_mel.errors.ScoreError`]: A feature is nan or infinite; names the mention.
        """
        lazy, texts = LazyRows(rows), list(rows["text"])
        # Longest first, so that a cache that will not fit in memory shows early.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number] or ""), reverse=True)
        with (
            evaluation_mode(self.model),
            tqdm(total=len(order), desc="Reading mentions", unit="row", delay=1, disable=not progress) as bar,
        ):
            for first in range(0, len(order), batch_size):
                if self._too_large:
                    return
                batch = lazy.__getitems__(order[first : first + batch_size])
                self._compute([row for row in batch if _mention_key(row) not in self._cache])
                bar.update(len(batch))

    def attach(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the rows, each with its `features`, or unchanged if all features did not fit in memory.

        Raises:
            `KeyError`: A row's features were not precomputed.
        """
        if self._too_large:
            return list(rows)
        return [with_column(row, "features", self._cache[_mention_key(row)]) for row in rows]

    def _compute(self, batch: Sequence[Row]) -> None:
        if not batch:
            return
        with torch.no_grad():
            features = self.model.mention_features(**to_model(self.model, self.processor(mentions=batch)))
        for name in (name for name in features if not name.endswith("_mask")):
            states, mask = features[name].to("cpu", torch.float16), features[f"{name}_mask"].cpu()
            for row, row_states, row_mask in zip(batch, states, mask, strict=True):
                kept = row_states[row_mask]
                if not kept.isfinite().all():
                    raise ScoreError(
                        f"The {name} features of the mention are nan or infinite.",
                        row=row["mention_id"],
                        remedy="Check the model's weights and this mention.",
                    )
                self._cache.setdefault(_mention_key(row), {})[name] = kept
                self._bytes += kept.numel() * kept.element_size()
        if self._bytes > _MAX_BYTES:
            logger.warning(
                "The features of all mentions do not fit in %d GB; mentions are encoded again in every epoch.",
                _MAX_BYTES >> 30,
            )
            self._cache, self._too_large = {}, True


def _mention_key(row: Row) -> tuple:
    """Returns the cache key of a mention: everything the model reads, because two splits may use the same id."""
    image = row.undecoded("image") if isinstance(row, LazyRow) and "image" in row else None
    image_hash = None if image is None else hash(image.get("bytes") or image.get("path"))
    return row["mention_id"], row["text"], row["mention"], row.get("start"), row.get("end"), image_hash

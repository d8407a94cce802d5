"""What a model reads of mentions, kept where training leaves it as it is: each mention is read once, not every epoch."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.errors import ScoreError
from hf_mel.inference.inputs import model_inputs
from hf_mel.protocols import MelProcessor
from hf_mel.schema import Row

logger = logging.getLogger(__name__)

#: Memory of a process for the features of all mentions; beyond it they are read anew whenever they are met.
_MOST_BYTES = 8 << 30


class MentionFeatures:
    """The features of mentions, in half precision on the CPU, without their padding.

    Args:
        model ([`~hf_mel.protocols.Retriever`]): Offers `mention_features`.
        processor ([`~hf_mel.protocols.MelProcessor`]): Turns rows, or their features, into its tensors.
    """

    def __init__(self, model: Any, processor: MelProcessor):
        self.model, self.processor = model, processor
        self._of: dict[tuple, dict[str, torch.Tensor]] = {}
        self._bytes, self._given_up = 0, False

    @classmethod
    def of(cls, model: Any, processor: MelProcessor) -> MentionFeatures | None:
        """For a model that offers them; otherwise `None`."""
        return cls(model, processor) if callable(getattr(model, "mention_features", None)) else None

    def add(self, rows: datasets.Dataset, *, batch_size: int = 64, progress: bool = False) -> None:
        """Reads those of M mentions that were not read before, about equally long ones together.

        Raises:
            [`~hf_mel.errors.ScoreError`]: a feature is nan or infinite; names the mention.
        """
        lazy, texts = LazyRows(rows), list(rows["text"])
        # The longest first: they tell soonest that memory will not do.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number] or ""), reverse=True)
        training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=len(order), desc="Reading mentions", unit="row", delay=1, disable=not progress) as bar:
                for first in range(0, len(order), batch_size):
                    if self._given_up:
                        return
                    batch = lazy.__getitems__(order[first : first + batch_size])
                    self._read([row for row in batch if self._key(row) not in self._of])
                    bar.update(len(batch))
        finally:
            self.model.train(training)

    def _read(self, batch: Sequence[Row]) -> None:
        if not batch:
            return
        with torch.no_grad():
            found = self.model.mention_features(**model_inputs(self.model, self.processor(mentions=batch)))
        for name in (name for name in found if not name.endswith("_mask")):
            states, mask = found[name].to("cpu", torch.float16), found[f"{name}_mask"].cpu()
            for row, its_states, there in zip(batch, states, mask, strict=True):
                kept = its_states[there]
                if not kept.isfinite().all():
                    raise ScoreError(
                        f"the {name} features of the mention are nan or infinite.",
                        row=row["mention_id"],
                        remedy="Look at the weights of the model, and at this mention.",
                    )
                self._of.setdefault(self._key(row), {})[name] = kept
                self._bytes += kept.numel() * kept.element_size()
        if self._bytes > _MOST_BYTES:
            logger.warning(
                "The features of all mentions do not fit %d GB; they are read in every epoch.", _MOST_BYTES >> 30
            )
            self._of, self._given_up = {}, True

    def on(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each with its `features`; as they are, where there was no memory for all of them.

        Raises:
            `KeyError`: one was not read before.
        """
        if self._given_up:
            return list(rows)
        # A ChainMap, because copying a row would decode its image.
        return [ChainMap({"features": self._of[self._key(row)]}, row) for row in rows]  # type: ignore[arg-type]

    @staticmethod
    def _key(row: Row) -> tuple:
        """What is read of a mention, for splits may use an id twice."""
        image = row.undecoded("image") if isinstance(row, LazyRow) and "image" in row else None
        seen = None if image is None else hash(image.get("bytes") or image.get("path"))
        return row["mention_id"], row["text"], row["mention"], seen

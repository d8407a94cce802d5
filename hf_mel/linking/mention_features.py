"""What a model reads of mentions, kept where training leaves it as it is: each mention is read once, not every epoch."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.collator import LazyRows, model_inputs
from hf_mel.schema import MelProcessor, Row


class MentionFeatures:
    """The features of mentions, in half precision on the CPU, without their padding.

    Args:
        model ([`~hf_mel.schema.Retriever`]): Offers `mention_features`.
        processor ([`~hf_mel.schema.MelProcessor`]): Turns rows, or their features, into its tensors.
    """

    def __init__(self, model: Any, processor: MelProcessor):
        self.model, self.processor = model, processor
        self._of: dict[tuple, dict[str, torch.Tensor]] = {}

    @classmethod
    def of(cls, model: Any, processor: MelProcessor) -> MentionFeatures | None:
        """For a model that offers them; otherwise `None`."""
        return cls(model, processor) if callable(getattr(model, "mention_features", None)) else None

    def add(self, rows: datasets.Dataset, *, batch_size: int = 64, progress: bool = False) -> None:
        """Reads those of M mentions that were not read before, about equally long ones together."""
        lazy, texts = LazyRows(rows), list(rows["text"])
        keys = list(zip(rows["mention_id"], texts, rows["mention"], strict=True))
        new = [number for number, key in enumerate(keys) if key not in self._of]
        order = sorted(new, key=lambda number: len(texts[number] or ""))
        training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=len(order), desc="Reading mentions", unit="row", delay=1, disable=not progress) as bar:
                for first in range(0, len(order), batch_size):
                    batch = lazy.__getitems__(order[first : first + batch_size])
                    inputs = model_inputs(self.model, self.processor(mentions=batch))
                    with torch.no_grad():
                        found = self.model.mention_features(**inputs)
                    for name, states in found.items():
                        if name.endswith("_mask"):
                            continue
                        states, mask = states.to("cpu", torch.float16), found[f"{name}_mask"].cpu()
                        for place, row in enumerate(batch):
                            self._of.setdefault(self._key(row), {})[name] = states[place, mask[place]]
                    bar.update(len(batch))
        finally:
            self.model.train(training)

    def on(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each with its `features`.

        Raises:
            `KeyError`: one was not read before.
        """
        # A ChainMap, because copying a row would decode its image.
        return [ChainMap({"features": self._of[self._key(row)]}, row) for row in rows]  # type: ignore[arg-type]

    @staticmethod
    def _key(row: Row) -> tuple:
        """Splits may use an id twice."""
        return row["mention_id"], row["text"], row["mention"]

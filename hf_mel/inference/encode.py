"""hf_mel.inference.encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.inference.encodings import num_rows
from hf_mel.inference.features.mention_features import MentionFeatures
from hf_mel.inference.features.post_prototypes import Prototypes
from hf_mel.inference.inputs import model_inputs
from hf_mel.protocols import MelProcessor


def encode_batches(
    model: Any,
    processor: MelProcessor,
    rows: datasets.Dataset,
    kind: Literal["mentions", "entities"],
    *,
    prototypes: Prototypes | None = None,
    features: MentionFeatures | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Encodes the rows of a data set batch by batch; images are decoded one batch at a time, and only if looked at.

    Args:
        model ([`~hf_mel.protocols.Retriever`]): Its mode (dropout on or off) is the caller's business.
        processor ([`~hf_mel.protocols.MelProcessor`]): Called as `processor(mentions=rows)` or `processor(entities=rows)`.
        rows (`datasets.Dataset`): N rows of the schema. A transform that is set on them is respected.
        kind (`str`): "mentions" or "entities".
        prototypes ([`~hf_mel.inference.features.post_prototypes.Prototypes`], *optional*): Those of entities, for a model that knows them
            by posts. Default, for such a model: every entity is the only post about itself.
        features ([`~hf_mel.inference.features.mention_features.MentionFeatures`], *optional*): Those of mentions, which were read before.
        batch_size (`int`): Rows per batch.
        progress (`bool`): Whether to show a progress bar.

    Yields:
        `dict[str, torch.Tensor]`: encodings of up to `batch_size` rows, on the CPU, floating point as float32.

    Raises:
        [`~hf_mel.errors.ImageError`]: an image is damaged; names its mention or entity.
    """
    encode: Callable = model.encode_mentions if kind == "mentions" else model.encode_entities
    if kind == "entities" and prototypes is None:
        prototypes = Prototypes.of(model, processor)
    with tqdm(total=len(rows), desc=f"Encoding {kind}", unit="row", delay=1, disable=not progress) as bar:
        for first in range(0, len(rows), batch_size):
            batch = _rows(rows, kind, range(first, min(first + batch_size, len(rows))))
            if kind == "entities" and prototypes is not None:
                batch = prototypes.on(batch)
            if kind == "mentions" and features is not None:
                batch = features.on(batch)
            tensors = processor(mentions=batch) if kind == "mentions" else processor(entities=batch)
            inputs = model_inputs(model, tensors)
            # Entered per batch: a generator that stays inside would switch the mode for its caller too.
            with torch.inference_mode():
                encoded = {name: _stored(tensor) for name, tensor in encode(**inputs).items()}
            yield encoded
            bar.update(len(batch))


def encode_rows(
    model: Any,
    processor: MelProcessor,
    rows: datasets.Dataset,
    kind: Literal["mentions", "entities"],
    *,
    prototypes: Prototypes | None = None,
    features: MentionFeatures | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """[`encode_batches`] in memory: tensors with first axis N, filled as the batches come so that no second copy exists.

    Raises:
        `ValueError`: no rows, or batches whose encodings differ in names or in a shape after the first axis.
    """
    if not len(rows):
        raise ValueError(f"There are no {kind} to encode.")
    encodings: dict[str, torch.Tensor] = {}
    first = 0
    for part in encode_batches(
        model,
        processor,
        rows,
        kind,
        prototypes=prototypes,
        features=features,
        batch_size=batch_size,
        progress=progress,
    ):
        if not encodings:
            encodings = {name: tensor.new_empty((len(rows), *tensor.shape[1:])) for name, tensor in part.items()}
        layouts = [{name: tuple(t.shape[1:]) for name, t in some.items()} for some in (encodings, part)]
        if layouts[0] != layouts[1]:
            raise ValueError(f"The encodings of {kind} change shape between batches: {layouts[0]}, then {layouts[1]}.")
        last = first + num_rows(part)
        for name, tensor in part.items():
            encodings[name][first:last] = tensor
        first = last
    return encodings


def _rows(rows: datasets.Dataset, kind: str, numbers: range) -> list[Any]:
    if rows.format["type"] is not None:
        columns = rows[numbers]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = LazyRows(rows).__getitems__(list(numbers))
    if kind == "mentions":
        return batch
    # An entity is known by its first image: the others need not be decoded.
    return [row.with_image("images", 0) if row.undecoded("images") else row for row in batch]


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None)

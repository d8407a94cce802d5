"""Encodings: named tensors that share their first axis, made by a retriever once per mention or entity.

A model returns them as a `ModelOutput`, a knowledge base as a plain dict; everything here takes either and gives
plain dicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.collator import LazyRows, model_inputs
from hf_mel.linking.mention_features import MentionFeatures
from hf_mel.linking.prototypes import Prototypes
from hf_mel.schema import Encodings, MelProcessor


def num_rows(encodings: Encodings) -> int:
    """Length of the first axis that all tensors share.

    Raises:
        `ValueError`: no tensor, or first axes that differ.
    """
    lengths = {name: len(tensor) for name, tensor in encodings.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Encodings need tensors with one common first axis, not lengths {lengths}.")
    return next(iter(lengths.values()))


def slice_encodings(encodings: Encodings, index: slice | torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
    """The rows `index` of every tensor: views for a slice, copies for a list or tensor of row numbers."""
    if not isinstance(index, slice | torch.Tensor):
        index = torch.as_tensor(index, dtype=torch.long)
    return {name: tensor[index] for name, tensor in encodings.items()}


def as_float(encodings: Encodings) -> dict[str, torch.Tensor]:
    """Half precision as float32, the rest as it is."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in encodings.items()}


def concat_encodings(parts: Iterable[Encodings]) -> dict[str, torch.Tensor]:
    """The rows of all parts in one.

    Raises:
        `ValueError`: no part, or parts that differ in names or in a shape after the first axis.
    """
    parts = list(parts)
    layouts = [{name: tuple(tensor.shape[1:]) for name, tensor in part.items()} for part in parts]
    if not parts:
        raise ValueError("There are no encodings to join.")
    for layout in layouts:
        if layout != layouts[0]:
            raise ValueError(f"Encodings of different shapes cannot be joined: {layouts[0]} and {layout}.")
    return {name: torch.cat([part[name] for part in parts]) for name in layouts[0]}


def to_device(encodings: Encodings, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Every tensor on `device`; those that are there already are not copied."""
    return {name: tensor.to(device) for name, tensor in encodings.items()}


def row_bytes(encodings: Encodings) -> int:
    """Bytes that one row takes over all tensors."""
    return (
        sum(tensor.element_size() * tensor[0].numel() for tensor in encodings.values()) if num_rows(encodings) else 0
    )


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
        model ([`~hf_mel.schema.Retriever`]): Its mode (dropout on or off) is the caller's business.
        processor ([`~hf_mel.schema.MelProcessor`]): Called as `processor(mentions=rows)` or `processor(entities=rows)`.
        rows (`datasets.Dataset`): N rows of the schema. A transform that is set on them is respected.
        kind (`str`): "mentions" or "entities".
        prototypes ([`~hf_mel.linking.prototypes.Prototypes`], *optional*): Those of entities, for a model that knows them
            by posts. Default, for such a model: every entity is the only post about itself.
        features ([`~hf_mel.linking.mention_features.MentionFeatures`], *optional*): Those of mentions, which were read before.
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
    return [row.with_image("images", 0) if row.stored("images") else row for row in batch]


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None)


def model_fingerprint(model: Any) -> str:
    """sha256 over names, types, shapes and values of all weights: the same for the same weights wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Encoding the rows of a data set with a retriever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.inference.encodings import num_rows
from hf_mel.inference.inputs import ModelInputs


def encode_batches(
    inputs: ModelInputs,
    rows: datasets.Dataset,
    kind: Literal["mentions", "entities"],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Encodes the rows of a data set batch by batch. Images are decoded one batch at a time, and only if they are used.

    At the end, a warning says how many rows have more text than the processor reads.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever and its processor. The caller sets the model's
            mode (see [`~hf_mel.inference.execution.evaluation_mode`]).
        rows (`datasets.Dataset`): N rows of the schema. A transform that is set on them is respected.
        kind (`str`): "mentions" or "entities".
        batch_size (`int`): Rows per batch.
        progress (`bool`): Whether to show a progress bar.

    Yields:
        `dict[str, torch.Tensor]`: Encodings of up to `batch_size` rows, on the CPU; floating-point ones as float32.

    Raises:
        [`~hf_mel.errors.ImageError`]: An image is damaged; names its mention or entity.
    """
    model = inputs.model
    prepare, encode = (
        (inputs.mentions, model.encode_mentions) if kind == "mentions" else (inputs.entities, model.encode_entities)
    )
    with tqdm(total=len(rows), desc=f"Encoding {kind}", unit="row", delay=1, disable=not progress) as bar:
        for first in range(0, len(rows), batch_size):
            batch = _read_rows(rows, kind, range(first, min(first + batch_size, len(rows))))
            inputs.left_out.add(kind, batch)
            tensors = prepare(batch)
            # Entered per batch: a generator that stays inside would switch the mode for its caller too.
            with torch.inference_mode():
                encodings = {
                    name: tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None)
                    for name, tensor in encode(**tensors).items()
                }
            yield encodings
            bar.update(len(batch))
    inputs.left_out.warn(kind)
    if kind == "entities" and inputs.prototypes is not None:
        inputs.prototypes.left_out.warn("posts")


def encode_rows(
    inputs: ModelInputs,
    rows: datasets.Dataset,
    kind: Literal["mentions", "entities"],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Encodes the rows of a data set into memory: tensors with first axis N, allocated once and filled batch by batch.

    Args and errors as in [`encode_batches`].

    Raises:
        `ValueError`: There are no rows, or the encodings of two batches differ in names or in a shape after the first
            axis.
    """
    if not len(rows):
        raise ValueError(f"There are no {kind} to encode.")
    encodings: dict[str, torch.Tensor] = {}
    first = 0
    for part in encode_batches(inputs, rows, kind, batch_size=batch_size, progress=progress):
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


def _read_rows(rows: datasets.Dataset, kind: str, numbers: range) -> list[Any]:
    if rows.format["type"] is not None:
        columns = rows[numbers]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = LazyRows(rows).__getitems__(list(numbers))
    if kind == "mentions":
        return batch
    # Encodings of an entity show its first image only, so the others are not decoded.
    return [row.with_image("images", 0) if row.undecoded("images") else row for row in batch]

"""Encoding the rows of a data set with a retriever.

Rows are encoded in *windows* of a few batches. In a window, rows of similar length share a batch, because a text is padded to
the longest one beside it, and rows with equal inputs are encoded once. A second thread reads, decodes and tokenises the next
batch while the model computes. The windows, and so the roundings, depend on the rows and the batch size alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.errors import KnowledgeBaseError
from hf_mel.inference.encodings import concat_encodings, num_rows, row_bytes, row_lengths, slice_encodings
from hf_mel.inference.execution import to_model
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.prefetch import computed_ahead
from hf_mel.schema import DESCRIBING_COLUMNS

#: Batches of a window.
_WINDOW_BATCHES = 8
#: Rows of a window are put in the order of their tokens while their inputs have fewer bytes: those of images have more.
_HELD_BYTES = 32 << 20
#: Columns whose lengths tell roughly how long the text is that a processor makes of a row. They order rows before the tokens.
_TEXT_COLUMNS = {"mentions": ("text",), "entities": ("name", *DESCRIBING_COLUMNS)}


def window_rows(batch_size: int) -> int:
    """Returns the rows of a window. A part of the rows that starts with a window has the encodings that it has in the whole."""
    return _WINDOW_BATCHES * batch_size


def encode_batches(
    inputs: ModelInputs,
    rows: datasets.Dataset,
    kind: Literal["mentions", "entities"],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Encodes the rows of a data set. Images are decoded one batch at a time, and only if they are used.

    At the end, a warning says how many rows have more text than the processor reads.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever and its processor, which a second thread calls. The
            caller sets the model's mode (see [`~hf_mel.inference.execution.evaluation_mode`]).
        rows (`datasets.Dataset`): N rows of the schema. A transform that is set on them is respected.
        kind (`str`): "mentions" or "entities".
        batch_size (`int`): Rows per forward pass, at most.
        progress (`bool`): Whether to show a progress bar.

    Yields:
        `dict[str, torch.Tensor]`: Encodings of the next `batch_size` rows, in their order, on the CPU; floating-point ones
        as float32.

    Raises:
        [`~hf_mel.errors.ImageError`]: An image is damaged; names its mention or entity.
        [`~hf_mel.errors.KnowledgeBaseError`]: The model returned another number of encodings than it was given rows, or
            encodings change shape between the batches of a window.
    """
    model = inputs.model
    encode = model.encode_mentions if kind == "mentions" else model.encode_entities
    prepared = _prepared_batches(inputs, rows, kind, batch_size)
    if inputs.prototypes is None and inputs.image_features is None:  # they would be computed with the model, too
        prepared = computed_ahead(prepared)
    encodings: dict[str, torch.Tensor] = {}
    with (
        closing(prepared),  # type: ignore[type-var]
        tqdm(total=len(rows), desc=f"Encoding {kind}", unit="row", delay=1, disable=not progress) as bar,
    ):
        for batch in prepared:
            window = batch.window
            if batch.copies is None:
                # Entered per batch: a generator that stays inside would switch the mode for its caller too.
                with torch.inference_mode():
                    part = {
                        name: tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None)
                        for name, tensor in encode(**batch.tensors).items()
                    }
                encodings = encodings or {name: t.new_empty((len(window), *t.shape[1:])) for name, t in part.items()}
                _put(part, encodings, [row - window.start for row in batch.rows], kind)
                bar.update(len(batch.rows))
                continue
            to, source = ([row - window.start for row in some] for some in (batch.rows, batch.copies))
            for tensor in encodings.values():
                tensor[to] = tensor[source]
            bar.update(len(batch.rows))
            for first in range(0, len(window), batch_size):
                yield slice_encodings(encodings, slice(first, first + batch_size))
            encodings = {}
    inputs.left_out.warn(kind)
    if kind == "entities" and inputs.prototypes is not None:
        inputs.prototypes.left_out.warn("posts")


class _PreparedBatch(NamedTuple):
    """Rows for the model, or those at the end of a window that need no model.

    Args:
        window: The numbers of the rows of the window.
        rows: The numbers of the rows of the batch.
        tensors: Their inputs, on the model's device.
        copies: At the end of the window: for each row, the number of the one that has the same inputs.
    """

    window: range
    rows: list[int]
    tensors: Mapping[str, torch.Tensor]
    copies: list[int] | None = None


def _prepared_batches(
    inputs: ModelInputs, rows: datasets.Dataset, kind: Literal["mentions", "entities"], batch_size: int
) -> Iterator[_PreparedBatch]:
    """Yields the batches of all windows, and the end of each window."""
    for window, chunks in _windows(rows, kind, batch_size):
        row_of: dict[bytes, int] = {}
        copies: dict[int, int] = {}
        held: list[tuple[list[int], Mapping[str, torch.Tensor]]] = []
        for chunk in chunks:
            batch = _read_rows(rows, kind, chunk)
            inputs.left_out.add(kind, batch)
            prepared = inputs.mention_rows(batch) if kind == "mentions" else inputs.entity_rows(batch)
            tensors: Mapping[str, torch.Tensor] = inputs.processor(**{kind: prepared})
            sources = [row_of.setdefault(key, row) for row, key in zip(chunk, _row_digests(tensors), strict=True)]
            copies |= {row: source for row, source in zip(chunk, sources, strict=True) if row != source}
            new = [place for place, (row, source) in enumerate(zip(chunk, sources, strict=True)) if row == source]
            if len(new) < len(chunk):
                tensors = slice_encodings(tensors, new)
            held.append(([chunk[place] for place in new], tensors))
            if sum(row_bytes(of_rows) * len(numbers) for numbers, of_rows in held) >= _HELD_BYTES:
                yield from _by_length(inputs.model, window, held, batch_size)
                held = []
        yield from _by_length(inputs.model, window, held, batch_size)
        yield _PreparedBatch(window, list(copies), {}, list(copies.values()))


def _windows(rows: datasets.Dataset, kind: str, batch_size: int) -> Iterator[tuple[range, list[list[int]]]]:
    """Yields the windows, and the numbers of their rows in the order of the lengths of their columns, a batch at a time."""
    columns = [name for name in _TEXT_COLUMNS[kind] if name in rows.column_names]
    texts = rows.with_format("arrow").select_columns(columns)
    for first in range(0, len(rows), window_rows(batch_size)):
        window = range(first, min(first + window_rows(batch_size), len(rows)))
        lengths: np.ndarray = np.zeros(len(window), dtype=np.int64)
        for values in texts[window.start : window.stop].to_pydict().values():
            lengths += [len(value) if isinstance(value, str) else sum(map(len, value or ())) for value in values]
        order = (window.start + np.argsort(lengths, kind="stable")).tolist()
        yield window, [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _by_length(
    model: Any, window: range, held: Sequence[tuple[list[int], Mapping[str, torch.Tensor]]], batch_size: int
) -> Iterator[_PreparedBatch]:
    """Yields prepared rows in batches, those with short texts first."""
    layouts = [[(name, tensor.shape[1:]) for name, tensor in tensors.items()] for _, tensors in held]
    if all(layout == layouts[0] for layout in layouts[1:]):
        rows = [row for numbers, _ in held for row in numbers]
        tensors = concat_encodings(of_rows for _, of_rows in held) if held else {}
        order = np.argsort(row_lengths(tensors), kind="stable").tolist() if rows else []
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            inputs = to_model(model, slice_encodings(tensors, places))
            yield _PreparedBatch(window, [rows[place] for place in places], inputs)
    else:  # each was padded to its own longest text
        for numbers, of_rows in held:
            if numbers:
                yield _PreparedBatch(window, numbers, to_model(model, of_rows))


def _row_digests(tensors: Mapping[str, torch.Tensor]) -> Iterable[bytes]:
    """Returns a digest of the inputs of each row."""
    digests = [hashlib.blake2b(digest_size=16) for _ in range(num_rows(tensors))]
    for name, tensor in sorted(tensors.items()):
        head = f"{name} {tensor.dtype} {tuple(tensor.shape[1:])}".encode()
        content = tensor.contiguous().flatten().view(torch.uint8).numpy()
        for digest, of_row in zip(digests, np.split(content, len(digests)), strict=True):
            digest.update(head)
            digest.update(of_row.data)
    return [digest.digest() for digest in digests]


def _put(
    part: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor], places: Sequence[int], kind: str
) -> None:
    """Copies the encodings of a batch to their places among those of the window."""
    if num_rows(part) != len(places):
        raise KnowledgeBaseError(
            f"The model returned {num_rows(part)} encodings of {len(places)} {kind}.",
            remedy=f"Return one row for each of the {kind} from encode_{kind}.",
        )
    layouts = [{name: tuple(tensor.shape[1:]) for name, tensor in some.items()} for some in (whole, part)]
    if layouts[0] != layouts[1]:
        raise KnowledgeBaseError(
            f"The encodings of {kind} change shape between batches: {layouts[0]}, then {layouts[1]}.",
            remedy="Let the processor pad every batch to the same length (padding='max_length').",
        )
    for name, tensor in part.items():
        whole[name][places] = tensor


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


def _read_rows(rows: datasets.Dataset, kind: str, numbers: list[int]) -> list[Any]:
    if rows.format["type"] is not None:
        columns = rows[numbers]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = LazyRows(rows).__getitems__(numbers)
    if kind == "mentions":
        return batch
    # Encodings of an entity show its first image only, so the others are not decoded.
    return [row.with_image("images", 0) if row.undecoded("images") else row for row in batch]

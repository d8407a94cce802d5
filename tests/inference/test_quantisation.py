"""Tests of encodings in few bits: the error of rounding, and independence of how rows are grouped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_mel.inference.quantisation import (
    dequantise,
    dequantised,
    is_quantised,
    layout_of,
    quantise,
    quantised,
    stored_layout,
)

GENERATOR = torch.Generator().manual_seed(0)
LARGEST = {"int8": 127, "int4": 7}
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


def steps(vectors: torch.Tensor, form: str) -> torch.Tensor:
    """The largest step that a scale in bfloat16, rounded up, can be, in float64."""
    return vectors.double().abs().amax(-1) / LARGEST[form] * (1 + 2**-7)


@pytest.mark.parametrize("form", LARGEST)
@settings(max_examples=60, deadline=None)
@given(vectors=arrays.arrays("float32", st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FINITE))
def test_no_number_is_off_by_more_than_half_a_step(form, vectors):
    vectors = torch.from_numpy(vectors)
    integers, scales = quantise(vectors, form)
    restored = dequantise(integers, scales, vectors.shape[-1])
    assert restored.shape == vectors.shape
    assert (scales.double() <= steps(vectors, form) + 2.0**-133).all()
    # Numbers below the smallest normal one of float32 lose digits.
    slack = 1e-5 * vectors.double().abs().amax(-1, keepdim=True) + 2.0**-126
    assert ((restored.double() - vectors.double()).abs() <= scales.double()[..., None] / 2 + slack).all()
    assert (restored[vectors.abs().amax(-1) == 0] == 0).all()


@pytest.mark.parametrize("form", LARGEST)
@pytest.mark.parametrize("width", [1, 5, 6])
def test_integers_are_those_of_plain_python(form, width):
    vectors = normal(3, 4, width)
    integers, scales = quantise(vectors, form)
    assert integers.dtype == (torch.int8 if form == "int8" else torch.uint8)
    assert integers.shape == (3, 4, width if form == "int8" else (width + 1) // 2)
    restored = dequantise(integers, scales, width)
    for index in [(0, 0), (1, 3), (2, 2)]:
        scale = float(scales[index])
        expected = [scale * round(number / scale) for number in vectors[index].tolist()]
        torch.testing.assert_close(restored[index], torch.tensor(expected), rtol=1e-6, atol=0)


def encodings(count: int) -> dict[str, torch.Tensor]:
    return {
        "tokens": normal(count, 6, 5) * normal(count, 6, 1).exp(),
        "whole": normal(count, 8),
        "number": normal(count),
        "mask": normal(count, 6) > 0,
        "ids": torch.arange(count, dtype=torch.int8),
    }


@pytest.mark.parametrize("dtype", LARGEST)
def test_rows_are_coded_alike_in_any_group_and_order(dtype):
    rows = encodings(12)
    layout = layout_of(rows, dtype)
    stored = quantised(rows, layout)
    restored = dequantised(stored, layout)
    assert is_quantised(layout)
    assert not is_quantised({"ids": {"dtype": "int8", "shape": []}})
    for chosen in (torch.arange(4), torch.tensor([7]), torch.randperm(12, generator=GENERATOR)):
        part = quantised({name: tensor[chosen] for name, tensor in rows.items()}, layout)
        for name, tensor in part.items():
            assert torch.equal(tensor, stored[name][chosen])
        for name, tensor in dequantised(part, layout).items():
            assert torch.equal(tensor, restored[name][chosen])


@pytest.mark.parametrize("dtype", LARGEST)
def test_layouts_say_what_is_stored(dtype):
    rows = encodings(2)
    layout = layout_of(rows, dtype)
    stored = quantised(rows, layout)
    expected = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape[1:])} for name, t in stored.items()
    }
    assert stored_layout(layout) == expected
    assert {name: tuple(tensor.shape[1:]) for name, tensor in dequantised(stored, layout).items()} == {
        name: tuple(tensor.shape[1:]) for name, tensor in rows.items()
    }
    for name in ("number", "mask", "ids"):
        assert torch.equal(stored[name], rows[name])


@pytest.mark.parametrize("form", LARGEST)
def test_half_precision_and_empty_rows_are_coded(form):
    vectors = normal(3, 4)
    for dtype in (torch.float16, torch.bfloat16):
        integers, scales = quantise(vectors.to(dtype), form)
        expected = quantise(vectors.to(dtype).float(), form)
        assert torch.equal(integers, expected[0])
        assert torch.equal(scales, expected[1])
    integers, scales = quantise(torch.zeros(0, 3, 4), form)
    assert dequantise(integers, scales, 4).shape == (0, 3, 4)

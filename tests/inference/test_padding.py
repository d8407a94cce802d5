"""Tests of vectors without padding, against lists of the vectors of each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.inference import padding

LENGTH = 11
LAYOUT = {
    "tokens": {"dtype": "float32", "shape": [LENGTH, 3], "mask": "mask"},
    "others": {"dtype": "float32", "shape": [LENGTH, 2, 2], "mask": "mask"},
    "mask": {"dtype": "bool", "shape": [LENGTH]},
    "whole": {"dtype": "float32", "shape": [4]},
}
MASKS = {"tokens": "mask", "others": "mask"}
#: Texts of any length, none and all included, and masks with holes.
ROWS = st.one_of(
    st.integers(0, LENGTH).map(lambda length: [True] * length + [False] * (LENGTH - length)),
    st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
)


def encodings(masks: list[list[bool]]) -> dict[str, torch.Tensor]:
    generator, count = torch.Generator().manual_seed(0), len(masks)
    sizes = {"tokens": (count, LENGTH, 3), "others": (count, LENGTH, 2, 2), "whole": (count, 4)}
    normal = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {**normal, "mask": torch.tensor(masks)}


@settings(max_examples=100, deadline=None)
@given(masks=st.lists(ROWS, min_size=1, max_size=6), data=st.data())
def test_rows_in_any_order_have_their_vectors_and_zeros(masks, data):
    rows = encodings(masks)
    packed = padding.without_padding(rows, MASKS)
    assert len(packed["tokens"]) == len(packed["others"]) == sum(map(sum, masks))
    file = packed | padding.first_vectors(packed, LAYOUT)
    layout = padding.packed_layout(LAYOUT)
    assert {name: list(tensor.shape[1:]) for name, tensor in file.items()} == {
        n: s["shape"] for n, s in layout.items()
    }
    assert {name: f"torch.{spec['dtype']}" for name, spec in layout.items()} == {
        n: str(t.dtype) for n, t in file.items()
    }
    assert padding.num_vectors(file, LAYOUT) == {"mask": sum(map(sum, masks))}

    chosen = data.draw(st.lists(st.integers(0, len(masks) - 1), max_size=6))
    index = torch.tensor(chosen, dtype=torch.long)
    numbers = padding.vectors_of_rows(file, index, LAYOUT)["mask"]
    part = {name: file[name][torch.from_numpy(numbers) if name in MASKS else index] for name in rows}
    restored = padding.with_padding(part, LAYOUT)
    assert torch.equal(restored["mask"], rows["mask"][index])
    assert torch.equal(restored["whole"], rows["whole"][index])
    for name in MASKS:
        assert restored[name].shape == rows[name][index].shape
        for at, row in enumerate(chosen):
            for position, kept in enumerate(masks[row]):
                expected = rows[name][row, position] if kept else torch.zeros_like(rows[name][row, position])
                assert torch.equal(restored[name][at, position], expected)


@pytest.mark.parametrize("change", [1, -1, 2**62, -(2**62)])
def test_numbers_beyond_the_file_are_refused(change):
    packed = padding.without_padding(encodings([[True] * LENGTH] * 2), MASKS)
    file = packed | padding.first_vectors(packed, LAYOUT)
    row = 1 if change > 0 else 0
    file["mask.first"][row] += change
    with pytest.raises(ValueError, match="does not fit"):
        padding.vectors_of_rows(file, slice(0, 2), LAYOUT)
    with pytest.raises(ValueError, match="does not fit"):
        padding.vectors_of_rows(file, torch.tensor([row]), LAYOUT)


def test_masks_of_a_layout_are_masks():
    assert padding.is_sound(LAYOUT)
    assert padding.is_sound({"whole": LAYOUT["whole"]})
    for name, change in [
        ("tokens", {"mask": "none"}),
        ("tokens", {"mask": 3}),
        ("tokens", {"mask": "others"}),
        ("tokens", {"mask": "whole"}),
        ("tokens", {"shape": [LENGTH]}),
        ("tokens", {"shape": [LENGTH - 1, 3]}),
        ("mask", {"dtype": "uint8"}),
        ("mask", {"shape": [LENGTH, 1]}),
        ("mask", {"mask": "mask"}),
    ]:
        assert not padding.is_sound({**LAYOUT, name: LAYOUT[name] | change})


def test_row_numbers_of_a_file_need_no_order():
    masks = [[True] * k + [False] * (LENGTH - k) for k in (2, 0, 5)]
    packed = padding.without_padding(encodings(masks), MASKS)
    file = packed | padding.first_vectors(packed, LAYOUT)
    assert file["mask.first"].tolist() == [0, 2, 2]
    numbers = padding.vectors_of_rows(file, torch.tensor([2, 1, 0, 2]), LAYOUT)["mask"]
    np.testing.assert_array_equal(numbers, [2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6])

"""Changed pictures: of the same size, of the same colours, never the same twice, and the same for the same seed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mel.training.augmentation import augmented_image, photographed_image


def halves(width: int, height: int) -> Image.Image:
    """A picture whose left half is red and whose right half is blue."""
    image = Image.new("RGB", (width, height), (200, 0, 0))
    image.paste((0, 0, 200), (width // 2, 0, width, height))
    return image


@example(width=1, height=12, seed=2)
@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_every_size_stays_and_a_plain_picture_stays_plain(width, height, seed):
    image = Image.new("RGB", (width, height), (120, 120, 120))
    changed = augmented_image(image, random.Random(seed))
    assert changed.size == (width, height)
    pixels = np.asarray(changed)
    assert pixels.min() == pixels.max()  # no border of another colour
    assert 90 <= pixels.max() <= 150


def test_pictures_are_mirrored_moved_and_lit_and_the_draws_decide():
    image = halves(48, 36)
    changed = [np.asarray(augmented_image(image, random.Random(seed))).astype(int) for seed in range(60)]
    again = np.asarray(augmented_image(image, random.Random(7))).astype(int)
    assert np.array_equal(changed[7], again)
    assert len({picture.tobytes() for picture in changed}) == 60
    reds_on_the_left = [picture[18, 4, 0] > picture[18, 4, 2] for picture in changed]
    assert 15 < sum(reds_on_the_left) < 45
    # What it shows is still there: half of the area is red, half blue, give or take what moved out of the frame.
    for picture in changed:
        assert 0.2 < (picture[..., 0] > picture[..., 2]).mean() < 0.8
    brightness = [picture.sum() for picture in changed]
    assert max(brightness) / min(brightness) > 1.2


@pytest.mark.parametrize("seed", range(3))
def test_the_picture_given_is_not_changed(seed):
    image = halves(20, 10)
    before = image.tobytes()
    augmented_image(image, random.Random(seed))
    assert image.tobytes() == before


@example(width=1, height=12, seed=2)
@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_a_photographed_picture_keeps_its_size_and_a_plain_one_stays_plain(width, height, seed):
    image = Image.new("RGB", (width, height), (120, 120, 120))
    changed = np.asarray(photographed_image(image, random.Random(seed)))
    assert changed.shape == (height, width, 3)
    assert changed.min() == changed.max()


def test_photographed_pictures_show_a_part_and_are_coarser():
    """Stripes of one pixel lose their contrast, and a corner of another colour is often left out."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (48, 24, 3)))

    def contrast(change) -> float:
        return float(np.mean([np.asarray(change(stripes, random.Random(seed))).std() for seed in range(40)]))

    assert contrast(photographed_image) < 0.6 * contrast(augmented_image)
    corner = Image.new("RGB", (48, 48), (200, 0, 0))
    corner.paste((0, 0, 200), (0, 0, 6, 6))

    def is_seen(change, seed: int) -> bool:
        picture = np.asarray(change(corner, random.Random(seed))).astype(int)
        return bool((picture[..., 2] > picture[..., 0]).any())

    assert sum(is_seen(photographed_image, seed) for seed in range(60)) < 30

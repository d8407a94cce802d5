"""Random changes of pictures that leave what they show: views of the same thing from elsewhere, in another light."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

# Numbers that one picture takes from the source of draws.
_DRAWS = 8


def skip_image(draw: random.Random, strong: bool = False) -> None:
    """Takes as many numbers as [`augmented_image`] does, or [`photographed_image`], for a picture of another process."""
    for _ in range(1 if strong else _DRAWS):
        draw.random()


def photographed_image(image: Image.Image, draw: random.Random) -> Image.Image:
    """Returns an RGB image as if it were part of a photo of what it shows, for a picture that stands for such a photo.

    A part of 40 to 100 % of its area is kept, which is shown at 40 to 100 % of its resolution, and blurred in half of the
    draws. Light, contrast and colour change by up to 40 %. [`augmented_image`] then mirrors, turns and moves it.

    Args:
        image (`Image.Image`): An RGB image.
        draw (`random.Random`): Source of all draws.
    """
    draw = random.Random(draw.random())  # one number of the caller's, as `skip_image` takes
    width, height = image.size
    share = draw.uniform(0.4, 1.0) ** 0.5
    kept = max(1, round(share * width)), max(1, round(share * height))
    left, top = draw.randint(0, width - kept[0]), draw.randint(0, height - kept[1])
    scale = draw.uniform(0.4, 1.0)
    small = max(1, round(scale * width)), max(1, round(scale * height))
    image = image.resize(small, Image.Resampling.BILINEAR, box=(left, top, left + kept[0], top + kept[1]))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    if draw.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0, 0.02) * max(width, height)))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(draw.uniform(0.6, 1.4))
    return augmented_image(image, draw)


def augmented_image(image: Image.Image, draw: random.Random) -> Image.Image:
    """Returns an RGB image as if it had been taken from another place, in another light.

    It may be mirrored, and it is turned by up to 9°, zoomed by up to 25 %, moved by up to an eighth of its size and made
    brighter, darker or paler by up to 20 %. Where the frame is left, its mirror image goes on.

    Args:
        image (`Image.Image`): An RGB image.
        draw (`random.Random`): Source of all draws.
    """
    if draw.random() < 0.5:
        image = ImageOps.mirror(image)
    width, height = image.size
    # Pixels of the edge around the picture, so that a transform finds colours there.
    border = max(1, math.ceil(0.4 * max(width, height)))
    zoom, angle = draw.uniform(0.75, 1.25), math.radians(draw.uniform(-9, 9))
    across, down = draw.uniform(-0.125, 0.125) * width, draw.uniform(-0.125, 0.125) * height
    cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
    x, y = border + width / 2 + across, border + height / 2 + down
    coefficients = (
        cosine, -sine, x - cosine * width / 2 + sine * height / 2,
        sine, cosine, y - sine * width / 2 - cosine * height / 2,
    )  # fmt: skip
    image = _with_border(image, border).transform(
        (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(draw.uniform(0.8, 1.2))
    return image


def _with_border(image: Image.Image, border: int) -> Image.Image:
    """Returns the image with `border` pixels of its mirror image on every side, mirrored again where it is narrower."""
    return Image.fromarray(np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), mode="symmetric"))

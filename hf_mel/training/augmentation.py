"""Random changes of pictures that leave what they show: views of the same thing from elsewhere, in another light."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Numbers that one picture takes from the source of draws.
_DRAWS = 8


def skip_image(draw: random.Random) -> None:
    """Takes as many numbers as [`augmented_image`] does, for a picture that another process changes."""
    for _ in range(_DRAWS):
        draw.random()


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

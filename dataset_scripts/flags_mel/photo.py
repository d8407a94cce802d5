"""Draws photograph-like pictures of flags: waving cloth at an angle, whole or in part, in varying light before a scene.

numpy computes a chunk of pictures together. No operation mixes pictures, so a picture depends on its [`Shot`] only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image

from .flags import CLOTH_SIZE, CROPS, cloth

#: Size (width, height) of a photograph in pixels.
PHOTO_SIZE = (96, 72)

#: Number of pictures to compute together. Their arrays fit into the processor's cache.
_CHUNK = 16
#: A scene is this many pixels larger than the frame, whose position in it is random.
_MARGIN = 24


@dataclass(frozen=True)
class Shot:
    """Everything that a photograph depends on.

    Args:
        seed (`int`): Seed of the angle, the wind, the light and the scene.
        flag (`str`, *optional*): Wikidata id of the flag. Without a flag, the photograph shows the scene alone.
        crop (`str`): A key of [`CROPS`].
        mirrored (`bool`): The flag is seen from behind.
        calm (`bool`): The flag hangs still before a white wall, as in a catalogue.
    """

    seed: int
    flag: str | None = None
    crop: str = "full"
    mirrored: bool = False
    calm: bool = False


def _noise_field(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Returns smooth noise in [0, 1] of shape `[height, width]`: random values every `cell` pixels, interpolated."""
    grid = rng.random((height // cell + 2, width // cell + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _sky(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    top, bottom = rng.uniform((70, 120, 180), (120, 160, 225)), rng.uniform((180, 200, 220), (225, 230, 240))
    ramp = np.linspace(0, 1, height)[:, None, None]
    clouds = np.clip(_noise_field(rng, height, width, 18) * 1.6 - 0.75, 0, 1)[..., None]
    return (top * (1 - ramp) + bottom * ramp) * (1 - clouds) + 238 * clouds


def _crowd(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws rows of people in a stand, darker towards the back."""
    step = 6
    picture = np.full((height, width, 3), rng.uniform(45, 75, 3))
    for row, y in enumerate(range(0, height, step)):
        light = 0.55 + 0.45 * y / height
        for x in range(-(row % 2) * step // 2, width, step):
            grey, shirt = rng.uniform(60, 200), rng.uniform(40, 220, 3)
            left = max(x + int(rng.integers(0, 2)), 0)
            picture[y + 2 : y + step, left : x + step] = (0.6 * grey + 0.4 * shirt) * light
            picture[y : y + 3, left + 1 : left + 4] = rng.uniform((110, 80, 62), (205, 165, 140)) * light
    return picture


def _pitch(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws a stand above a mown pitch."""
    picture = _crowd(rng, height, width)
    horizon = int(height * rng.uniform(0.4, 0.55))
    stripes = (np.arange(width) // 14 % 2)[None, :, None]
    grass = (
        np.array([70, 120, 62])
        + stripes * np.array([14, 18, 10])
        + _noise_field(rng, height, width, 3)[..., None] * 14
    )
    picture[horizon:] = grass[horizon:]
    picture[horizon - 4 : horizon] = rng.uniform(150, 225, 3)
    return picture


def _facade(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    wall = rng.uniform((150, 135, 115), (205, 190, 170))
    picture = wall + _noise_field(rng, height, width, 5)[..., None] * 20 - 10
    stepx, stepy = int(rng.integers(15, 21)), int(rng.integers(20, 27))
    glass = rng.uniform((50, 60, 70), (95, 105, 120))
    for x in range(5, width, stepx):
        for y in range(6, height, stepy):
            picture[y - 1 : y + stepy // 2 + 2, x - 1 : x + stepx // 2 + 1] = wall * 1.12
            picture[y : y + stepy // 2, x : x + stepx // 2] = glass
    return picture


def _hills(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = _sky(rng, height, width)
    for level, shade in ((0.5, (120, 140, 140)), (0.64, (95, 115, 80)), (0.8, (80, 92, 55))):
        ridge = height * (level + 0.16 * (_noise_field(rng, 4, width, 26)[0] - 0.5))
        below = np.arange(height)[:, None] > ridge[None, :]
        picture[below] = np.array(shade) + rng.uniform(-10, 10)
    return picture + _noise_field(rng, height, width, 2)[..., None] * 12 - 6


def _sea(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = _sky(rng, height, width)
    horizon = int(height * rng.uniform(0.45, 0.6))
    ripple = _noise_field(rng, height, width, 3)[..., None] * 40
    picture[horizon:] = (np.array([50, 95, 120]) + ripple)[horizon:]
    return picture


def _night(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws a street at night with lamps out of focus."""
    picture = (
        np.full((height, width, 3), rng.uniform(18, 50, 3)) + _noise_field(rng, height, width, 20)[..., None] * 40
    )
    y, x = np.mgrid[:height, :width]
    for _ in range(26):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(2, 6)
        inside = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2)[..., None]
        picture = picture + inside * rng.uniform((70, 50, 20), (130, 110, 80))
    return picture


_SCENES: tuple[Callable[[np.random.Generator, int, int], np.ndarray], ...] = (
    *(_sky, _sky, _sky, _hills, _hills, _sea, _sea),
    *(_facade, _facade, _facade, _crowd, _crowd, _crowd, _pitch, _pitch, _pitch, _night, _night),
)


@cache
def _scenes() -> np.ndarray:
    """Draws all scenes, and a white wall as the last one: `float32` of shape `[scenes, height, width, 3]`."""
    width, height = PHOTO_SIZE[0] + _MARGIN, PHOTO_SIZE[1] + _MARGIN
    rng = np.random.default_rng(20)
    scenes = [scene(rng, height, width) for scene in _SCENES]
    scenes.append(np.full((height, width, 3), 246.0))
    return np.clip(np.stack(scenes), 0, 255).astype(np.float32)


@cache
def _grain() -> np.ndarray:
    """Draws sensor noise that is larger than a frame: `float32` of shape `[height, width, 3]`."""
    rng = np.random.default_rng(21)
    return rng.standard_normal((PHOTO_SIZE[1] + 64, PHOTO_SIZE[0] + 64, 3), dtype=np.float32)


@cache
def _cloth(qid: str) -> np.ndarray:
    return cloth(qid).reshape(-1, 3).astype(np.float32)


#: Crop → numbers of the corners outside the frame, the axis along which they are outside, and whether they are beyond
#: its far end.
_HIDDEN_CORNERS = {
    "fly": ([0, 3], 0, False),
    "hoist": ([1, 2], 0, True),
    "upper": ([2, 3], 1, True),
    "lower": ([0, 1], 1, False),
}


def _corners(crops: Sequence[str], draws: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Returns the corners of the visible part in pixels, clockwise from the upper left: `[pictures, 4, 2]`.

    Args:
        crops (sequence of `str`): Crop of each picture.
        draws (`[pictures, 13 or more]`): Uniform random numbers in [0, 1).
        calm (`[pictures]`, bool): Whether a flag hangs still.
    """
    width, height = PHOTO_SIZE
    w = width * (0.62 + 0.24 * draws[:, 0])
    h = w * (0.56 + 0.16 * draws[:, 1])
    x, y = (width - w) * (0.15 + 0.7 * draws[:, 2]), (height - h) * (0.15 + 0.7 * draws[:, 3])
    box = np.stack([x, y, x + w, y + h], axis=1)
    for i, crop in enumerate(crops):
        if crop in _HIDDEN_CORNERS:
            _, axis, far = _HIDDEN_CORNERS[crop]
            size, inside = PHOTO_SIZE[axis], 0.55 + 0.25 * draws[i, 2]
            box[i, [axis, axis + 2]] = (size * (1 - inside), size + 3) if far else (-3, size * inside)

    cut = np.array([crop in _HIDDEN_CORNERS for crop in crops])
    strength = np.where(calm, 0.15, np.where(cut, 0.5, 1.0))[:, None, None]
    corners = box[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    corners += strength * 9 * (draws[:, 4:12].reshape(-1, 4, 2) - 0.5)
    offset = corners - corners.mean(axis=1, keepdims=True)
    corners += strength * 0.36 * (draws[:, 12, None, None] - 0.5) * offset[..., ::-1] * (-1, 1)  # a small rotation
    for i, crop in enumerate(crops):
        if crop in _HIDDEN_CORNERS:
            # Outside the frame at any angle and farther than a wave moves the edge, but no more than that.
            hidden, axis, far = _HIDDEN_CORNERS[crop]
            low, high = (PHOTO_SIZE[axis] + 2, PHOTO_SIZE[axis] + 4) if far else (-4, -2)
            corners[i, hidden, axis] = np.clip(corners[i, hidden, axis], low, high)
    return corners


def _to_unit_square(corners: np.ndarray) -> np.ndarray:
    """Returns the projective maps from the corners to the unit square: `[pictures, 3, 3]`.

    The map from the square to a quadrilateral has a closed form (Heckbert 1989, section 2.2.3). Its adjugate is its
    inverse up to scale.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corners[:, i].T for i in range(4))
    sx, sy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    dx1, dx2, dy1, dy2 = x1 - x2, x3 - x2, y1 - y2, y3 - y2
    det = dx1 * dy2 - dx2 * dy1
    g, h = (sx * dy2 - dx2 * sy) / det, (dx1 * sy - sx * dy1) / det
    a, b, c = x1 - x0 + g * x1, x3 - x0 + h * x3, x0
    d, e, f = y1 - y0 + g * y1, y3 - y0 + h * y3, y0
    inverse = [
        *(e - f * h, c * h - b, b * f - c * e),
        *(f * g - d, a - c * g, c * d - a * f),
        *(d * h - e * g, b * g - a * h, a * e - b * d),
    ]
    return np.stack(inverse, axis=1).reshape(-1, 3, 3)


def _per_picture(draws: np.ndarray, column: int, low: float, high: float, axes: int = 2) -> np.ndarray:
    """Scales a column of `draws` to [low, high), and appends `axes` axes of size 1: `[pictures, 1, …]`."""
    return (low + (high - low) * draws[:, column]).reshape(-1, *[1] * axes)


def _add_flags(shots: Sequence[Shot], draws: np.ndarray, calm: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """Draws the flag of each shot before its scene: `float32` of shape `[pictures, height, width, 3]`."""
    width, height = PHOTO_SIZE
    corners = _corners([shot.crop for shot in shots], draws, calm)
    matrix = _to_unit_square(corners.astype(np.float64)).astype(np.float32)[..., None, None]
    y, x = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    depth = matrix[:, 2, 0] * x + matrix[:, 2, 1] * y + matrix[:, 2, 2]
    s = (matrix[:, 0, 0] * x + matrix[:, 0, 1] * y + matrix[:, 0, 2]) / depth
    t = (matrix[:, 1, 0] * x + matrix[:, 1, 1] * y + matrix[:, 1, 2]) / depth

    # Waves run along the flag and grow with the distance from the side at which the flag is held. This side and the pole
    # are random, because they must not reveal which side of the cloth is visible.
    cut = np.array([shot.crop in _HIDDEN_CORNERS for shot in shots])[:, None, None]
    calmness = np.where(calm, np.float32(0.3), np.float32(1))[:, None, None]
    from_held = np.where(draws[:, 30, None, None] < 0.5, s, 1 - s)
    turns = _per_picture(draws, 31, 0.7, 1.9) * s + _per_picture(draws, 32, -0.15, 0.15) * t
    phase = 2 * np.pi * (turns + _per_picture(draws, 33, 0, 1))
    loose = np.where(cut, np.float32(0.6), np.clip(0.3 + from_held, 0, 1.2)) * calmness
    t = t + _per_picture(draws, 34, 0.01, 0.055) * loose * np.sin(phase)
    folds = np.cos(phase + _per_picture(draws, 36, -0.6, 0.6))
    shade = 1 + _per_picture(draws, 35, 0.06, 0.26) * loose * folds

    # The share of a pixel that the cloth covers follows from the distance to the edge.
    spans = np.abs(corners[:, 2] - corners[:, 0]).astype(np.float32)[..., None, None]
    edge = np.minimum(np.minimum(s, 1 - s) * spans[:, 0], np.minimum(t, 1 - t) * spans[:, 1])
    cover = np.clip(edge + 0.5, 0, 1)

    crops = np.array([CROPS[shot.crop] for shot in shots], np.float32)[..., None, None]
    u = crops[:, 0] + (crops[:, 1] - crops[:, 0]) * np.clip(s, 0, 1)
    v = crops[:, 2] + (crops[:, 3] - crops[:, 2]) * np.clip(t, 0, 1)
    columns, rows = CLOTH_SIZE
    index = np.minimum((v * rows).astype(np.int32), rows - 1) * columns
    index += np.minimum((u * columns).astype(np.int32), columns - 1)
    fabric = np.stack([_cloth(shot.flag)[index[i]] for i, shot in enumerate(shots) if shot.flag]) * shade[..., None]

    beside = from_held * spans[:, 0]
    pole = (
        (beside > -3.2) & (beside < 0) & (t > -0.12) & ~cut & ~calm[:, None, None] & (draws[:, 37, None, None] < 0.5)
    )
    scene = np.where(pole[..., None], (135 + 20 * (beside + 3.2))[..., None], scene)
    picture = scene + cover[..., None] * (fabric - scene)
    behind = np.array([shot.mirrored for shot in shots])
    picture[behind] = picture[behind, :, ::-1]
    return picture


def _photograph(shots: Sequence[Shot]) -> np.ndarray:
    """Draws photographs: `uint8` of shape `[pictures, height, width, 3]`."""
    width, height = PHOTO_SIZE
    draws = np.stack([np.random.default_rng(shot.seed).random(38) for shot in shots]).astype(np.float32)
    calm = np.array([shot.calm for shot in shots])
    scenes, grain = _scenes(), _grain()
    picture: np.ndarray = np.empty((len(shots), height, width, 3), np.float32)
    for i in range(len(shots)):
        scene = len(_SCENES) if calm[i] else int(draws[i, 16] * len(_SCENES))
        top, left = (draws[i, 17:19] * _MARGIN).astype(int)
        part = scenes[scene, top : top + height, left : left + width]
        picture[i] = part[:, ::-1] if draws[i, 19] < 0.5 else part
    with_flag = [i for i, shot in enumerate(shots) if shot.flag is not None]
    if with_flag:
        picture[with_flag] = _add_flags(
            [shots[i] for i in with_flag], draws[with_flag], calm[with_flag], picture[with_flag]
        )

    # Blur of the lens; then exposure, colour of the light, a gradient across the frame and haze; then sensor noise.
    still = calm[:, None, None, None]
    soften = np.where(still, np.float32(0.07), _per_picture(draws, 20, 0.05, 0.3, axes=3))
    for axis in (1, 2):
        beside = np.roll(picture, 1, axis) + np.roll(picture, -1, axis)
        picture = (1 - 2 * soften) * picture + soften * beside
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, None, :, None]
    light = 1 + _per_picture(draws, 21, -0.4, 0.4, axes=3) * across
    light = light * _per_picture(draws, 25, 0.72, 1.12, axes=3) * (0.92 + 0.16 * draws[:, 22:25])[:, None, None, :]
    haze = _per_picture(draws, 26, 0, 0.18, axes=3)
    picture = np.where(still, picture, picture * light * (1 - haze) + haze * 190)
    for i in range(len(shots)):
        top, left = (draws[i, 27:29] * 64).astype(int)
        picture[i] += grain[top : top + height, left : left + width] * (0 if calm[i] else 2 + 8 * draws[i, 29])
    return np.clip(picture, 0, 255).astype(np.uint8)


def photographs(shots: Sequence[Shot]) -> Iterator[bytes]:
    """Yields a JPEG file for each shot, in order."""
    for start in range(0, len(shots), _CHUNK):
        for picture in _photograph(shots[start : start + _CHUNK]):
            file = BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=85)
            yield file.getvalue()

"""Draws flags from bands, crosses, discs, triangles, stars and crescents.

A flag is drawn once, as a map of shades. The shades are then coloured in two ways: with their official colours for the
knowledge base, and with a few basic colours for photographs, because a camera and the weather change shades. Two flags
with the same basic colours everywhere look alike in a photograph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, hypot, pi, sin

import numpy as np
from PIL import Image, ImageDraw

#: Name of a shade → its RGB, and its basic colour in a photograph.
_SHADES: dict[str, tuple[tuple[int, int, int], str]] = {
    "white": ((255, 255, 255), "white"),
    "black": ((0, 0, 0), "black"),
    "red": ((206, 17, 38), "red"),
    "scarlet": ((232, 41, 47), "red"),
    "crimson": ((178, 18, 45), "red"),
    "maroon": ((138, 21, 56), "maroon"),
    "carmine": ((158, 42, 56), "maroon"),
    "orange": ((255, 121, 0), "orange"),
    "saffron": ((255, 153, 51), "orange"),
    "copper": ((190, 105, 50), "orange"),
    "yellow": ((252, 209, 22), "yellow"),
    "gold": ((255, 190, 10), "yellow"),
    "lemon": ((255, 233, 40), "yellow"),
    "green": ((0, 122, 61), "green"),
    "forest": ((0, 98, 51), "green"),
    "leaf": ((52, 158, 70), "green"),
    "sky": ((108, 180, 232), "sky"),
    "aqua": ((0, 172, 199), "sky"),
    "azure": ((45, 145, 220), "sky"),
    "cyan": ((0, 161, 222), "blue"),  # of Luxembourg; in a photograph it equals the Dutch blue
    "blue": ((0, 56, 168), "blue"),
    "royal": ((16, 78, 196), "blue"),
    "navy": ((0, 32, 91), "blue"),
    "brown": ((122, 74, 40), "brown"),
    "grey": ((150, 155, 160), "grey"),
    "purple": ((110, 45, 130), "blue"),
}
_INDEX = {name: i for i, name in enumerate(_SHADES)}

#: The basic colours of photographs, as RGB.
BASIC_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 238),
    "black": (30, 29, 32),
    "red": (204, 28, 40),
    "maroon": (120, 20, 48),
    "orange": (244, 124, 28),
    "yellow": (250, 206, 36),
    "green": (16, 126, 66),
    "sky": (96, 178, 230),
    "blue": (24, 58, 160),
    "brown": (118, 74, 44),
    "grey": (150, 152, 156),
}
_BASIC_INDEX = {name: i for i, name in enumerate(BASIC_COLOURS)}

_OFFICIAL_PALETTE = [value for rgb, _ in _SHADES.values() for value in rgb]
_PHOTO_PALETTE = [value for _, basic in _SHADES.values() for value in BASIC_COLOURS[basic]]
_TO_BASIC = np.array([_BASIC_INDEX[basic] for _, basic in _SHADES.values()], dtype=np.uint8)

Point = tuple[float, float]


class Canvas:
    """A drawing of height 1 and width `ratio`, as a map of shades. x grows towards the fly, y downwards.

    Args:
        ratio (`float`): Width over height.
        height (`int`): Height in pixels.

    Attributes:
        image (`PIL.Image.Image`): The index of the shade of each pixel (mode L).
    """

    def __init__(self, ratio: float, height: int):
        self.ratio, self.scale = ratio, height
        self.image = Image.new("L", (round(ratio * height), height))
        self._draw = ImageDraw.Draw(self.image)

    def _box(self, x: float, y: float, radius: float) -> list[float]:
        return [value * self.scale for value in (x - radius, y - radius, x + radius, y + radius)]

    def polygon(self, points: Sequence[Point], colour: str) -> None:
        """Fills a polygon."""
        self._draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=_INDEX[colour])

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        """Fills the rectangle from (x0, y0) to (x1, y1)."""
        scaled = [round(value * self.scale) for value in (x0, y0, x1, y1)]
        self._draw.rectangle((scaled[0], scaled[1], scaled[2] - 1, scaled[3] - 1), fill=_INDEX[colour])

    def disc(self, x: float, y: float, radius: float, colour: str) -> None:
        """Fills a circle."""
        self._draw.ellipse(self._box(x, y, radius), fill=_INDEX[colour])

    def ring(self, x: float, y: float, radius: float, width: float, colour: str) -> None:
        """Draws a circle as a line of `width`, inside `radius`."""
        self._draw.ellipse(self._box(x, y, radius), outline=_INDEX[colour], width=max(1, round(width * self.scale)))

    def line(self, start: Point, end: Point, width: float, colour: str) -> None:
        """Draws a straight band of `width` with square ends."""
        (x0, y0), (x1, y1) = start, end
        length = hypot(x1 - x0, y1 - y0)
        dx, dy = (y1 - y0) / length * width / 2, (x0 - x1) / length * width / 2
        self.polygon([(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)], colour)

    def star(self, x: float, y: float, radius: float, colour: str, points: int = 5, turn: float = 0.0, inner=0.382):
        """Fills a star. `turn`: degrees clockwise from one ray upwards. `inner`: inner radius over outer radius."""
        outline = []
        for i in range(2 * points):
            angle = pi * i / points + turn * pi / 180
            reach = radius * (inner if i % 2 else 1)
            outline.append((x + reach * sin(angle), y - reach * cos(angle)))
        self.polygon(outline, colour)

    def crescent(self, x: float, y: float, radius: float, shift: Point, inner: float, colour: str) -> None:
        """Fills a disc except for a disc of radius `inner`, whose centre is moved by `shift`."""
        mask = Image.new("1", self.image.size)
        pen = ImageDraw.Draw(mask)
        pen.ellipse(self._box(x, y, radius), fill=1)
        pen.ellipse(self._box(x + shift[0], y + shift[1], inner), fill=0)
        self.image.paste(_INDEX[colour], mask=mask)

    def half_disc(self, x: float, y: float, radius: float, start: float, colour: str) -> None:
        """Fills the half of a disc that begins `start` degrees clockwise from the right."""
        self._draw.pieslice(self._box(x, y, radius), start, start + 180, fill=_INDEX[colour])


#: A part of a flag: a function that draws it on a canvas.
Part = Callable[[Canvas], None]


def _bounds(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [sum(weights[:i]) / total for i in range(len(weights) + 1)]


def horizontal(colours: str, weights: Sequence[float] | None = None) -> Part:
    """Returns horizontal bands, from top to bottom."""
    names = colours.split()
    bounds = _bounds(weights or [1] * len(names))

    def draw(c: Canvas) -> None:
        for i, name in enumerate(names):
            c.rect(0, bounds[i], c.ratio, bounds[i + 1], name)

    return draw


def vertical(colours: str, weights: Sequence[float] | None = None) -> Part:
    """Returns vertical bands, from the hoist to the fly."""
    names = colours.split()
    bounds = _bounds(weights or [1] * len(names))

    def draw(c: Canvas) -> None:
        for i, name in enumerate(names):
            c.rect(bounds[i] * c.ratio, 0, bounds[i + 1] * c.ratio, 1, name)

    return draw


def cross(colour: str, x0: float, x1: float, y0: float, y1: float) -> Part:
    """Returns a cross over the whole flag, from x0 to x1 in widths and from y0 to y1 in heights."""

    def draw(c: Canvas) -> None:
        c.rect(x0 * c.ratio, 0, x1 * c.ratio, 1, colour)
        c.rect(0, y0, c.ratio, y1, colour)

    return draw


def nordic(colour: str, units: tuple[float, float], xs: Point, ys: Point) -> Part:
    """Returns a Nordic cross in the units of the construction sheet, in which the flag has the size `units`."""
    return cross(colour, xs[0] / units[0], xs[1] / units[0], ys[0] / units[1], ys[1] / units[1])


def hoist(colour: str, apex: float) -> Part:
    """Returns a triangle on the hoist with its apex at x = `apex`, in heights."""
    return lambda c: c.polygon([(0, 0), (apex, 0.5), (0, 1)], colour)


def disc(x: float, y: float, radius: float, colour: str) -> Part:
    """Returns [`Canvas.disc`] as a part."""
    return lambda c: c.disc(x, y, radius, colour)


def star(
    x: float, y: float, radius: float, colour: str, points: int = 5, turn: float = 0.0, inner: float = 0.382
) -> Part:
    """Returns [`Canvas.star`] as a part."""
    return lambda c: c.star(x, y, radius, colour, points, turn, inner)


def stars(places: Sequence[tuple[float, float, float]], colour: str) -> Part:
    """Returns upright stars at (x, y, radius)."""

    def draw(c: Canvas) -> None:
        for x, y, radius in places:
            c.star(x, y, radius, colour)

    return draw


def crescent(x: float, y: float, radius: float, shift: Point, inner: float, colour: str) -> Part:
    """Returns [`Canvas.crescent`] as a part."""
    return lambda c: c.crescent(x, y, radius, shift, inner, colour)


def half_disc(x: float, y: float, radius: float, start: float, colour: str) -> Part:
    """Returns [`Canvas.half_disc`] as a part."""
    return lambda c: c.half_disc(x, y, radius, start, colour)


def rect(x0: float, y0: float, x1: float, y1: float, colour: str) -> Part:
    """Returns [`Canvas.rect`] as a part."""
    return lambda c: c.rect(x0, y0, x1, y1, colour)


def polygon(colour: str, *points: Point) -> Part:
    """Returns [`Canvas.polygon`] as a part."""
    return lambda c: c.polygon(points, colour)


def star_ring(x: float, y: float, radius: float, count: int, size: float, colour: str, turn: float = 0.0) -> Part:
    """Returns `count` upright stars of radius `size` on a circle."""
    angles = [2 * pi * i / count + turn * pi / 180 for i in range(count)]
    return stars([(x + radius * sin(a), y - radius * cos(a), size) for a in angles], colour)


def serrated(field: str, base: float, tip: float, points: int) -> Part:
    """Returns a white hoist with `points` teeth from x = `base` to x = `tip`, on a `field`."""

    def draw(c: Canvas) -> None:
        outline: list[Point] = [(0, 0)]
        for i in range(points):
            outline += [(base, i / points), (tip, (i + 0.5) / points)]
        outline += [(base, 1), (0, 1)]
        c.rect(0, 0, c.ratio, 1, field)
        c.polygon(outline, "white")

    return draw


def band(rising: bool, width: float, colour: str) -> Part:
    """Returns a diagonal band: to the upper fly if `rising`, else to the lower fly."""
    start, end = (2, -1) if rising else (-1, 2)  # beyond the corners, so that the ends are hidden
    return lambda c: c.line((-c.ratio, start), (2 * c.ratio, end), width, colour)


def saltire(width: float, colour: str) -> Part:
    """Returns both diagonal bands."""

    def draw(c: Canvas) -> None:
        band(True, width, colour)(c)
        band(False, width, colour)(c)

    return draw


def pentagram(x: float, y: float, radius: float, width: float, colour: str) -> Part:
    """Returns a five-pointed star of lines."""

    def draw(c: Canvas) -> None:
        tips = [(x + radius * sin(4 * pi * i / 5), y - radius * cos(4 * pi * i / 5)) for i in range(5)]
        for start, end in zip(tips, [*tips[1:], tips[0]], strict=True):
            c.line(start, end, width, colour)

    return draw


def paint(shades: Image.Image, basic: bool = False) -> Image.Image:
    """Colours a map of shades with the official colours, or with the basic colours of photographs."""
    picture = shades.copy()
    picture.putpalette(_PHOTO_PALETTE if basic else _OFFICIAL_PALETTE)
    return picture.convert("RGB")


def basic_colours(shades: np.ndarray) -> np.ndarray:
    """Returns the index of the basic colour of each point of a map of shades: `uint8`, same shape."""
    return _TO_BASIC[shades]

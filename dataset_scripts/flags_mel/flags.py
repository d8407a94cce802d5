"""The flags of FlagsMEL, drawn from geometry.

If the state flag differs from the civil flag by a coat of arms only, the civil flag is drawn (Ecuador, Peru, Costa Rica,
Haiti, the Dominican Republic, Bolivia). Emblems that geometry cannot draw are simplified.
"""

from __future__ import annotations

from functools import cache
from math import atan2, cos, degrees, pi, sin

import numpy as np
from PIL import Image

from .drawing import (
    Canvas,
    Part,
    band,
    crescent,
    cross,
    disc,
    half_disc,
    hoist,
    horizontal,
    nordic,
    paint,
    pentagram,
    polygon,
    rect,
    saltire,
    serrated,
    star,
    star_ring,
    stars,
    vertical,
)

#: Height of a clean flag in pixels. It is drawn three times as high and then averaged.
FLAG_HEIGHT = 120
_OVERSAMPLING = 3

#: Size (width, height) of the flag in a photograph. Every flag is stretched to 3:2.
CLOTH_SIZE = (120, 80)

#: The visible part of a flag in a photograph, in widths and heights of the flag: (left, right, top, bottom). The rest is
#: outside the frame.
CROPS: dict[str, tuple[float, float, float, float]] = {
    "full": (0.0, 1.0, 0.0, 1.0),
    "hoist": (0.0, 0.45, 0.0, 1.0),
    "fly": (0.55, 1.0, 0.0, 1.0),
    "upper": (0.0, 1.0, 0.0, 0.5),
    "lower": (0.0, 1.0, 0.5, 1.0),
}

# Flags that need more than the parts in `drawing`.


def _switzerland(c: Canvas) -> None:
    c.rect(13 / 32, 6 / 32, 19 / 32, 26 / 32, "white")
    c.rect(6 / 32, 13 / 32, 26 / 32, 19 / 32, "white")


def _greece(c: Canvas) -> None:
    for i in range(9):
        c.rect(0, i / 9, c.ratio, (i + 1) / 9, "white" if i % 2 else "royal")
    c.rect(0, 0, 5 / 9, 5 / 9, "royal")
    c.rect(2 / 9, 0, 3 / 9, 5 / 9, "white")
    c.rect(0, 2 / 9, 5 / 9, 3 / 9, "white")


def _north_macedonia(c: Canvas) -> None:
    x, y, w = c.ratio / 2, 0.5, c.ratio
    for base in (
        [(0, 0.4), (0, 0.6)],
        [(w, 0.4), (w, 0.6)],
        [(x - 0.1, 0), (x + 0.1, 0)],
        [(x - 0.1, 1), (x + 0.1, 1)],
        [(0, 0), (0.3, 0)],
        [(w, 0), (w - 0.3, 0)],
        [(0, 1), (0.3, 1)],
        [(w, 1), (w - 0.3, 1)],
    ):
        c.polygon([(x, y), *base], "lemon")
    c.disc(x, y, 0.18, "red")
    c.disc(x, y, 0.145, "lemon")


def _georgia(c: Canvas) -> None:
    for x in (0.32, 1.18):
        for y in (0.21, 0.79):
            c.rect(x - 0.09, y - 0.03, x + 0.09, y + 0.03, "red")
            c.rect(x - 0.03, y - 0.09, x + 0.03, y + 0.09, "red")


def _south_korea(c: Canvas) -> None:
    x, y, radius, slope = 0.75, 0.5, 0.25, 33.69
    c.disc(x, y, radius, "royal")
    c.half_disc(x, y, radius, 180 + slope, "red")
    dx, dy = radius / 2 * cos(slope * pi / 180), radius / 2 * sin(slope * pi / 180)
    c.disc(x - dx, y - dy, radius / 2, "red")
    c.disc(x + dx, y + dy, radius / 2, "royal")
    # Three bars at each corner, across the diagonal. 0 is a broken bar.
    for sx, sy, bars in ((-1, -1, (1, 1, 1)), (1, -1, (0, 1, 0)), (-1, 1, (1, 0, 1)), (1, 1, (0, 0, 0))):
        ux, uy = sx * 0.832, sy * 0.555  # outwards
        for i, whole in enumerate(bars):
            reach = 0.36 + 0.065 * i
            mx, my = x + ux * reach, y + uy * reach
            ends = ((-0.125, 0.125),) if whole else ((-0.125, -0.012), (0.012, 0.125))
            for a, b in ends:
                c.line((mx - uy * a, my + ux * a), (mx - uy * b, my + ux * b), 0.042, "black")


def _china(c: Canvas) -> None:
    c.star(0.25, 0.25, 0.15, "lemon")
    for x, y in ((10, 2), (12, 4), (12, 7), (10, 9)):
        turn = degrees(atan2(5 - x, y - 5))
        c.star(x / 20, y / 20, 0.05, "lemon", turn=turn)


def _india(c: Canvas) -> None:
    c.ring(0.75, 0.5, 0.15, 0.022, "navy")
    for i in range(12):
        a = pi * i / 12
        c.line((0.75 - 0.14 * cos(a), 0.5 - 0.14 * sin(a)), (0.75 + 0.14 * cos(a), 0.5 + 0.14 * sin(a)), 0.008, "navy")
    c.disc(0.75, 0.5, 0.028, "navy")


def _philippines(c: Canvas) -> None:
    c.polygon([(0, 0), (0.866, 0.5), (0, 1)], "white")
    c.star(0.29, 0.5, 0.19, "yellow", points=8, inner=0.5)
    c.disc(0.29, 0.5, 0.1, "yellow")
    for x, y, turn in ((0.075, 0.13, 150), (0.075, 0.87, 30), (0.745, 0.5, 90)):
        c.star(x, y, 0.055, "yellow", turn=turn)


def _dr_congo(c: Canvas) -> None:
    w = c.ratio
    c.polygon([(0, 1), (0, 0.66), (0.88, 0), (w, 0), (w, 0.34), (w - 0.88, 1)], "yellow")
    c.polygon([(0, 1), (0, 0.72), (0.96, 0), (w, 0), (w, 0.28), (w - 0.96, 1)], "red")
    c.star(0.235, 0.235, 0.2, "yellow")


def _south_sudan(c: Canvas) -> None:
    c.polygon([(0, 0), (0.866, 0.5), (0, 1)], "royal")
    c.star(0.29, 0.5, 0.2, "yellow", turn=-18)


def _togo(c: Canvas) -> None:
    c.rect(0, 0, 0.6, 0.6, "red")
    c.star(0.3, 0.31, 0.2, "white")


def _ethiopia(c: Canvas) -> None:
    x, y = c.ratio / 2, 0.5
    c.disc(x, y, 0.3, "royal")
    pentagram(x, y, 0.21, 0.028, "lemon")(c)
    for i in range(5):
        a = 2 * pi * (i + 0.5) / 5
        c.line((x + 0.1 * sin(a), y - 0.1 * cos(a)), (x + 0.22 * sin(a), y - 0.22 * cos(a)), 0.022, "lemon")


def _seychelles(c: Canvas) -> None:
    w = c.ratio
    c.rect(0, 0, w, 1, "green")
    c.polygon([(0, 1), (0, 0), (w / 3, 0)], "blue")
    c.polygon([(0, 1), (w / 3, 0), (2 * w / 3, 0)], "yellow")
    c.polygon([(0, 1), (2 * w / 3, 0), (w, 0), (w, 1 / 3)], "red")
    c.polygon([(0, 1), (w, 1 / 3), (w, 2 / 3)], "white")


def _south_africa(c: Canvas) -> None:
    w = c.ratio
    c.rect(0, 0, w, 0.5, "scarlet")
    c.rect(0, 0.5, w, 1, "navy")
    # The Y from back to front: white edge, green, and at the hoist yellow around black.
    for half, name in ((1 / 6, "white"), (0.1, "green")):
        c.rect(0.6, 0.5 - half, w, 0.5 + half, name)
        c.line((-0.375, -0.25), (0.75, 0.5), 2 * half, name)
        c.line((-0.375, 1.25), (0.75, 0.5), 2 * half, name)
        c.disc(0.75, 0.5, half, name)
    c.rect(0.75, 0.4, w, 0.6, "green")
    c.polygon([(0, 0.12), (0.57, 0.5), (0, 0.88)], "green")
    c.polygon([(0, 0.13), (0.555, 0.5), (0, 0.87)], "gold")
    c.polygon([(0, 0.21), (0.435, 0.5), (0, 0.79)], "black")


def _rwanda(c: Canvas) -> None:
    c.star(1.24, 0.25, 0.18, "yellow", points=24, inner=0.6)
    c.disc(1.24, 0.25, 0.09, "yellow")


def _panama(c: Canvas) -> None:
    c.rect(0, 0, 1.5, 1, "white")
    c.rect(0.75, 0, 1.5, 0.5, "red")
    c.rect(0, 0.5, 0.75, 1, "royal")
    c.star(0.375, 0.25, 0.15, "royal")
    c.star(1.125, 0.75, 0.15, "red")


def _guyana(c: Canvas) -> None:
    w = c.ratio
    c.polygon([(0, 0), (w, 0.5), (0, 1)], "white")
    c.polygon([(0, 0.045), (w - 0.12, 0.5), (0, 0.955)], "yellow")
    c.polygon([(0, 0), (w / 2, 0.5), (0, 1)], "black")
    c.polygon([(0, 0.06), (w / 2 - 0.1, 0.5), (0, 0.94)], "red")


def _dominica(c: Canvas) -> None:
    for i, name in enumerate(("yellow", "black", "white")):
        c.rect(0.85 + 0.1 * i, 0, 0.95 + 0.1 * i, 1, name)
    for i, name in enumerate(("yellow", "black", "white")):
        c.rect(0, 0.35 + 0.1 * i, 2, 0.45 + 0.1 * i, name)
    for i, name in enumerate(("yellow", "black", "white")):  # the vertical bar covers the horizontal one
        c.rect(0.85 + 0.1 * i, 0, 0.95 + 0.1 * i, 0.35, name)
    c.disc(1, 0.5, 0.28, "red")
    star_ring(1, 0.5, 0.225, 10, 0.045, "leaf")(c)
    c.disc(1, 0.42, 0.045, "green")
    c.polygon([(0.96, 0.42), (1.04, 0.42), (1.07, 0.6), (0.93, 0.6)], "purple")
    c.polygon([(0.95, 0.47), (0.9, 0.62), (0.96, 0.6)], "green")
    c.polygon([(1.05, 0.47), (1.1, 0.62), (1.04, 0.6)], "green")


def _georgia_state(c: Canvas) -> None:
    c.rect(0, 0, 2 / 3, 2 / 3, "navy")
    star_ring(1 / 3, 1 / 3, 0.25, 13, 0.042, "white")(c)
    c.rect(0.25, 0.4, 0.42, 0.44, "gold")
    for x in (0.265, 0.325, 0.385):
        c.rect(x, 0.27, x + 0.022, 0.42, "gold")
    c.polygon([(0.24, 0.27), (0.336, 0.19), (0.43, 0.27)], "gold")


def _new_mexico(c: Canvas) -> None:
    x, y = 0.75, 0.5
    for offset, reach in ((-0.075, 0.3), (-0.025, 0.36), (0.025, 0.36), (0.075, 0.3)):
        c.rect(x + offset - 0.014, y - reach, x + offset + 0.014, y + reach, "crimson")
        c.rect(x - reach, y + offset - 0.014, x + reach, y + offset + 0.014, "crimson")
    c.disc(x, y, 0.125, "crimson")
    c.disc(x, y, 0.095, "lemon")


def _colorado(c: Canvas) -> None:
    x, y = 0.625, 0.5
    c.disc(x, y, 1 / 3, "crimson")
    c.polygon([(x, y), (x + 0.34, y - 1 / 6), (x + 0.34, y + 1 / 6)], "white")
    c.disc(x, y, 1 / 6, "gold")


def _arizona(c: Canvas) -> None:
    x, y = 0.75, 0.5
    for i in range(13):
        a, b = pi * i / 13, pi * (i + 1) / 13
        points = [(x, y), (x - 2 * cos(a), y - 2 * sin(a)), (x - 2 * cos(b), y - 2 * sin(b))]
        c.polygon(points, "yellow" if i % 2 else "red")
    c.rect(0, 0.5, 1.5, 1, "navy")
    c.star(x, y, 0.25, "copper")


def _north_carolina(c: Canvas) -> None:
    c.rect(0, 0, 0.5, 1, "navy")
    c.star(0.25, 0.5, 0.11, "white")
    for x in (0.075, 0.125):  # N
        c.rect(x, 0.43, x + 0.018, 0.57, "gold")
    c.polygon([(0.075, 0.43), (0.095, 0.43), (0.143, 0.57), (0.123, 0.57)], "gold")
    c.disc(0.4, 0.5, 0.07, "gold")  # C
    c.disc(0.4, 0.5, 0.048, "navy")
    c.rect(0.43, 0.465, 0.48, 0.535, "navy")
    for y, sign in ((0.22, 1), (0.78, -1)):
        c.polygon(
            [
                (0.08, y),
                (0.25, y - 0.07 * sign),
                (0.42, y),
                (0.42, y + 0.06 * sign),
                (0.25, y),
                (0.08, y + 0.06 * sign),
            ],
            "gold",
        )


def _south_carolina(c: Canvas) -> None:
    x = 0.75
    c.polygon([(x - 0.03, 0.86), (x + 0.03, 0.86), (x + 0.022, 0.45), (x - 0.022, 0.45)], "white")
    for i in range(9):
        a = (-120 + 30 * i) * pi / 180
        tip = (x + 0.27 * sin(a), 0.42 - 0.24 * cos(a) + 0.08 * abs(sin(a)))
        side = (x + 0.17 * sin(a + 0.24), 0.4 - 0.2 * cos(a + 0.24))
        other = (x + 0.17 * sin(a - 0.24), 0.4 - 0.2 * cos(a - 0.24))
        c.polygon([(x, 0.44), side, tip, other], "white")
    c.polygon([(x - 0.1, 0.88), (x + 0.1, 0.88), (x + 0.03, 0.83), (x - 0.03, 0.83)], "white")
    c.crescent(0.24, 0.22, 0.13, (0.045, -0.06), 0.115, "white")


def _united_states(c: Canvas) -> None:
    for i in range(13):
        c.rect(0, i / 13, c.ratio, (i + 1) / 13, "white" if i % 2 else "crimson")
    c.rect(0, 0, 0.76, 7 / 13, "navy")
    for row in range(9):
        for column in range(6 - row % 2):
            c.star(0.063 * (1 + row % 2 + 2 * column), 7 / 130 * (1 + row), 0.031, "white")


def _liberia(c: Canvas) -> None:
    for i in range(11):
        c.rect(0, i / 11, c.ratio, (i + 1) / 11, "white" if i % 2 else "crimson")
    c.rect(0, 0, 5 / 11, 5 / 11, "navy")
    c.star(2.5 / 11, 2.6 / 11, 0.16, "white")


def _papua_new_guinea(c: Canvas) -> None:
    w = c.ratio
    c.polygon([(0, 0), (w, 0), (w, 1)], "red")
    c.polygon([(0, 0), (w, 1), (0, 1)], "black")
    for x, y, r in ((0.36, 0.6, 0.06), (0.36, 0.9, 0.06), (0.2, 0.72, 0.06), (0.5, 0.73, 0.06), (0.42, 0.79, 0.03)):
        c.star(x, y, r, "white")
    # The bird of paradise: body, head, tail plumes, wings.
    c.polygon([(0.84, 0.3), (0.94, 0.16), (1.02, 0.12), (1.0, 0.2), (0.94, 0.34), (0.88, 0.4)], "yellow")
    c.polygon(
        [(0.92, 0.3), (1.08, 0.2), (1.24, 0.22), (1.12, 0.27), (1.22, 0.34), (1.08, 0.33), (1.12, 0.44), (1.0, 0.37)],
        "yellow",
    )
    c.polygon([(0.9, 0.28), (0.76, 0.2), (0.64, 0.13), (0.7, 0.25), (0.78, 0.34), (0.88, 0.38)], "yellow")
    c.polygon([(0.88, 0.36), (0.98, 0.5), (1.08, 0.56), (1.0, 0.42)], "yellow")


def _american_samoa(c: Canvas) -> None:
    c.polygon([(2, 0), (0, 0.5), (2, 1)], "red")
    c.polygon([(2, 0.06), (0.24, 0.5), (2, 0.94)], "white")
    c.polygon(
        [
            (1.12, 0.52),
            (1.34, 0.44),
            (1.92, 0.3),
            (1.8, 0.4),
            (1.88, 0.44),
            (1.76, 0.48),
            (1.84, 0.53),
            (1.7, 0.56),
            (1.78, 0.63),
            (1.6, 0.63),
            (1.5, 0.7),
            (1.42, 0.6),
            (1.24, 0.57),
        ],
        "brown",
    )
    c.polygon([(1.06, 0.5), (1.14, 0.44), (1.24, 0.47), (1.2, 0.55), (1.1, 0.56)], "white")
    c.polygon([(1.05, 0.52), (1.1, 0.5), (1.1, 0.55)], "yellow")
    c.polygon([(1.36, 0.68), (1.62, 0.74), (1.6, 0.78), (1.34, 0.72)], "yellow")


def _marshall_islands(c: Canvas) -> None:
    w = c.ratio
    c.polygon([(0, 0.98), (w, 0.03), (w, 0.24)], "orange")
    c.polygon([(0, 0.98), (w, 0.24), (w, 0.45)], "white")
    c.star(0.42, 0.36, 0.24, "white", points=24, inner=0.55)
    for turn in (0, 90, 180, 270):
        a = turn * pi / 180
        c.line((0.42, 0.36), (0.42 + 0.3 * sin(a), 0.36 - 0.3 * cos(a)), 0.035, "white")


def _dominican_republic(c: Canvas) -> None:
    c.rect(0, 0, 0.75, 0.5, "navy")
    c.rect(0.75, 0.5, 1.5, 1, "navy")
    c.rect(0.75, 0, 1.5, 0.5, "red")
    c.rect(0, 0.5, 0.75, 1, "red")
    c.rect(0.65, 0, 0.85, 1, "white")
    c.rect(0, 0.4, 1.5, 0.6, "white")


def _equatorial_guinea(c: Canvas) -> None:
    c.polygon([(0, 0), (0.36, 0.5), (0, 1)], "royal")
    c.polygon([(0.69, 0.42), (0.81, 0.42), (0.81, 0.53), (0.75, 0.58), (0.69, 0.53)], "grey")
    c.rect(0.745, 0.48, 0.757, 0.55, "brown")
    c.disc(0.75, 0.47, 0.03, "green")


def _micronesia(c: Canvas) -> None:
    for x, y, turn in ((0.95, 0.18, 0), (0.95, 0.82, 180), (0.55, 0.5, -90), (1.35, 0.5, 90)):
        c.star(x, y, 0.1, "white", turn=turn)


def _flag(ratio: float, *parts: Part) -> tuple[float, tuple[Part, ...]]:
    return ratio, parts


_EQUILATERAL = 3**0.5 / 2  # apex of an equilateral triangle on the hoist

#: Wikidata id → width over height, and the parts from back to front.
FLAGS: dict[str, tuple[float, tuple[Part, ...]]] = {
    # Europe
    "Q142": _flag(1.5, vertical("blue white red")),
    "Q183": _flag(5 / 3, horizontal("black red yellow")),
    "Q38": _flag(1.5, vertical("green white red")),
    "Q27": _flag(2, vertical("leaf white saffron")),
    "Q31": _flag(15 / 13, vertical("black yellow red")),
    "Q55": _flag(1.5, horizontal("crimson white blue")),
    "Q32": _flag(5 / 3, horizontal("scarlet white cyan")),
    "Q40": _flag(1.5, horizontal("red white red")),
    "Q39": _flag(1, horizontal("scarlet"), _switzerland),
    "Q35": _flag(37 / 28, horizontal("red"), nordic("white", (37, 28), (12, 16), (12, 16))),
    "Q34": _flag(1.6, horizontal("blue"), nordic("yellow", (16, 10), (5, 7), (4, 6))),
    "Q20": _flag(
        22 / 16,
        horizontal("crimson"),
        nordic("white", (22, 16), (6, 10), (6, 10)),
        nordic("navy", (22, 16), (7, 9), (7, 9)),
    ),
    "Q33": _flag(18 / 11, horizontal("white"), nordic("navy", (18, 11), (5, 8), (4, 7))),
    "Q189": _flag(
        25 / 18,
        horizontal("blue"),
        nordic("white", (25, 18), (7, 11), (7, 11)),
        nordic("red", (25, 18), (8, 10), (8, 10)),
    ),
    "Q4628": _flag(
        22 / 16,
        horizontal("white"),
        nordic("royal", (22, 16), (6, 10), (6, 10)),
        nordic("scarlet", (22, 16), (7, 9), (7, 9)),
    ),
    "Q5689": _flag(
        26 / 17,
        horizontal("royal"),
        nordic("yellow", (26, 17), (8, 13), (6, 11)),
        nordic("red", (26, 17), (9.5, 11.5), (7.5, 9.5)),
    ),
    "Q36": _flag(1.6, horizontal("white red")),
    "Q213": _flag(1.5, horizontal("white red"), hoist("blue", 0.75)),
    "Q28": _flag(2, horizontal("red white forest")),
    "Q218": _flag(1.5, vertical("navy yellow red")),
    "Q219": _flag(5 / 3, horizontal("white green red")),
    "Q212": _flag(1.5, horizontal("royal yellow")),
    "Q159": _flag(1.5, horizontal("white blue red")),
    "Q191": _flag(11 / 7, horizontal("royal black white")),
    "Q211": _flag(2, horizontal("carmine white carmine", [2, 1, 2])),
    "Q37": _flag(5 / 3, horizontal("yellow green red")),
    "Q41": _flag(1.5, _greece),
    "Q235": _flag(5 / 4, horizontal("red white")),
    "Q233": _flag(
        1.5, vertical("white red"), rect(0.08, 0.12, 0.28, 0.17, "grey"), rect(0.155, 0.045, 0.205, 0.245, "grey")
    ),
    "Q21": _flag(5 / 3, horizontal("white"), cross("red", 0.44, 0.56, 0.4, 0.6)),
    "Q22": _flag(
        5 / 3,
        horizontal("blue"),
        saltire(0.2, "white"),
    ),
    "Q221": _flag(2, horizontal("red"), _north_macedonia),
    # Asia
    "Q399": _flag(2, horizontal("red blue orange")),
    "Q230": _flag(1.5, horizontal("white"), cross("red", 0.4333, 0.5667, 0.4, 0.6), _georgia),
    "Q43": _flag(
        1.5,
        horizontal("red"),
        crescent(0.5, 0.5, 0.25, (0.0625, 0), 0.2, "white"),
        star(0.82, 0.5, 0.125, "white", turn=-90),
    ),
    "Q227": _flag(
        2,
        horizontal("azure scarlet green"),
        crescent(0.97, 0.5, 0.15, (0.035, 0), 0.125, "white"),
        star(1.13, 0.5, 0.085, "white", points=8, inner=0.55),
    ),
    "Q17": _flag(1.5, horizontal("white"), disc(0.75, 0.5, 0.3, "crimson")),
    "Q148": _flag(1.5, horizontal("scarlet"), _china),
    "Q884": _flag(1.5, horizontal("white"), _south_korea),
    "Q423": _flag(
        2,
        horizontal("blue white red white blue", [6, 1.5, 21, 1.5, 6]),
        disc(0.7, 0.5, 0.222, "white"),
        star(0.7, 0.5, 0.21, "red"),
    ),
    "Q252": _flag(1.5, horizontal("scarlet white")),
    "Q869": _flag(1.5, horizontal("crimson white navy white crimson", [1, 1, 2, 1, 1])),
    "Q881": _flag(1.5, horizontal("scarlet"), star(0.75, 0.52, 0.31, "lemon")),
    "Q819": _flag(1.5, horizontal("red navy red", [1, 2, 1]), disc(0.75, 0.5, 0.2, "white")),
    "Q836": _flag(1.5, horizontal("yellow leaf scarlet"), star(0.75, 0.54, 0.42, "white")),
    "Q902": _flag(5 / 3, horizontal("forest"), disc(0.75, 0.5, 1 / 3, "scarlet")),
    "Q668": _flag(1.5, horizontal("saffron white green"), _india),
    "Q843": _flag(
        1.5,
        vertical("white forest", [1, 3]),
        crescent(0.9375, 0.5, 0.3, (0.07, -0.06), 0.265, "white"),
        star(1.07, 0.37, 0.1, "white", turn=49),
    ),
    "Q826": _flag(
        1.5,
        horizontal("red"),
        rect(0.25, 0.25, 1.25, 0.75, "forest"),
        crescent(0.77, 0.5, 0.167, (0.065, 0), 0.15, "white"),
    ),
    "Q928": _flag(2, horizontal("blue red"), _philippines),
    "Q334": _flag(
        1.5,
        horizontal("scarlet white"),
        crescent(0.27, 0.25, 0.18, (0.075, 0), 0.165, "white"),
        star_ring(0.42, 0.26, 0.085, 5, 0.036, "white"),
    ),
    "Q574": _flag(
        2,
        horizontal("red"),
        hoist("yellow", 1.0),
        hoist("black", 2 / 3),
        star(0.235, 0.5, 0.165, "white", turn=-22),
    ),
    "Q805": _flag(1.5, horizontal("red white black")),
    "Q878": _flag(2, horizontal("green white black"), rect(0, 0, 0.5, 1, "red")),
    "Q846": _flag(28 / 11, serrated("maroon", 0.72, 0.98, 9)),
    "Q398": _flag(5 / 3, serrated("red", 0.42, 0.7, 5)),
    "Q817": _flag(2, horizontal("green white red"), polygon("black", (0, 0), (0.5, 1 / 3), (0.5, 2 / 3), (0, 1))),
    "Q810": _flag(
        2, horizontal("black white green"), hoist("red", 1.0), star(0.333, 0.5, 0.075, "white", points=7, inner=0.6)
    ),
    # Africa
    "Q1033": _flag(2, vertical("green white green")),
    "Q1032": _flag(7 / 6, horizontal("orange white green"), disc(7 / 12, 0.5, 0.14, "orange")),
    "Q912": _flag(1.5, vertical("leaf yellow red")),
    "Q1006": _flag(1.5, vertical("red yellow green")),
    "Q1007": _flag(2, horizontal("yellow green"), rect(0, 0, 2 / 3, 1, "red"), star(1 / 3, 0.5, 0.2, "black")),
    "Q983": _flag(1.5, horizontal("leaf white scarlet"), _equatorial_guinea),
    "Q1041": _flag(1.5, vertical("green yellow scarlet"), star(0.75, 0.51, 0.17, "green")),
    "Q1009": _flag(1.5, vertical("green red yellow"), star(0.75, 0.51, 0.17, "yellow")),
    "Q657": _flag(1.5, vertical("navy gold crimson")),
    "Q1008": _flag(1.5, vertical("orange white green")),
    "Q1000": _flag(4 / 3, horizontal("leaf yellow royal")),
    "Q974": _flag(4 / 3, horizontal("azure"), _dr_congo),
    "Q971": _flag(
        1.5,
        polygon("green", (0, 0), (1.5, 0), (0, 1)),
        polygon("red", (1.5, 0), (1.5, 1), (0, 1)),
        polygon("lemon", (0, 1), (1, 0), (1.5, 0), (0.5, 1)),
    ),
    "Q1049": _flag(2, horizontal("red white black"), hoist("green", 2 / 3)),
    "Q958": _flag(2, horizontal("black white red white green", [6, 1, 6, 1, 6]), _south_sudan),
    "Q962": _flag(1.5, horizontal("yellow red"), rect(0, 0, 0.6, 1, "green")),
    "Q965": _flag(1.5, horizontal("red green"), star(0.75, 0.5, 0.2, "yellow")),
    "Q945": _flag(1.618, horizontal("green yellow green yellow green"), _togo),
    "Q117": _flag(1.5, horizontal("red yellow green"), star(0.75, 0.5, 0.18, "black")),
    "Q1044": _flag(1.5, horizontal("leaf white royal")),
    "Q1005": _flag(1.5, horizontal("red white blue white green", [6, 1, 4, 1, 6])),
    "Q1019": _flag(1.5, horizontal("scarlet green"), rect(0, 0, 0.5, 1, "white")),
    "Q924": _flag(
        1.5,
        polygon("leaf", (0, 0), (1.5, 0), (0, 1)),
        polygon("azure", (1.5, 0), (1.5, 1), (0, 1)),
        band(True, 0.44, "yellow"),
        band(True, 0.32, "black"),
    ),
    "Q1045": _flag(1.5, horizontal("azure"), star(0.75, 0.52, 0.27, "white")),
    "Q115": _flag(2, horizontal("leaf lemon scarlet"), _ethiopia),
    "Q963": _flag(1.5, horizontal("sky white black white sky", [9, 1, 4, 1, 9])),
    "Q1016": _flag(
        2,
        horizontal("red black green", [1, 2, 1]),
        crescent(0.97, 0.5, 0.125, (0.035, 0), 0.105, "white"),
        star(1.1, 0.5, 0.065, "white", turn=-90),
    ),
    "Q262": _flag(
        1.5,
        vertical("forest white"),
        crescent(0.75, 0.5, 0.25, (0.05, 0), 0.2, "red"),
        star(0.8, 0.5, 0.11, "red", turn=-90),
    ),
    "Q948": _flag(
        1.5,
        horizontal("scarlet"),
        disc(0.75, 0.5, 0.25, "white"),
        crescent(0.75, 0.5, 0.19, (0.045, 0), 0.15, "scarlet"),
        star(0.79, 0.5, 0.1, "scarlet", turn=-90),
    ),
    "Q1028": _flag(1.5, horizontal("crimson"), pentagram(0.75, 0.51, 0.26, 0.045, "forest")),
    "Q1025": _flag(
        1.5,
        horizontal("scarlet green scarlet", [3, 14, 3]),
        crescent(0.75, 0.42, 0.29, (0, -0.085), 0.29, "yellow"),
        star(0.75, 0.36, 0.1, "yellow"),
    ),
    "Q977": _flag(1.5, horizontal("sky leaf"), hoist("white", _EQUILATERAL), star(0.28, 0.5, 0.135, "scarlet")),
    "Q929": _flag(
        1.5,
        horizontal("blue white leaf yellow"),
        rect(0.64, 0, 0.86, 1, "red"),
        star(0.2, 0.125, 0.1, "yellow"),
    ),
    "Q1039": _flag(
        2,
        horizontal("leaf yellow leaf", [2, 3, 2]),
        hoist("red", 0.5),
        star(1.0, 0.51, 0.14, "black"),
        star(1.5, 0.51, 0.14, "black"),
    ),
    "Q1011": _flag(
        1.7,
        horizontal("blue white red white blue", [6, 1, 1, 1, 3]),
        star_ring(0.6375, 0.625, 0.25, 10, 0.055, "yellow", turn=18),
    ),
    "Q970": _flag(
        5 / 3,
        horizontal("lemon white red royal"),
        hoist("leaf", _EQUILATERAL),
        crescent(0.24, 0.5, 0.19, (0.08, 0), 0.175, "white"),
        stars([(0.34, 0.38, 0.04), (0.34, 0.46, 0.04), (0.34, 0.54, 0.04), (0.34, 0.62, 0.04)], "white"),
    ),
    "Q1042": _flag(2, _seychelles),
    "Q258": _flag(1.5, _south_africa),
    "Q1014": _flag(1.9, _liberia),
    "Q1037": _flag(1.5, horizontal("azure yellow green", [2, 1, 1]), _rwanda),
    "Q1027": _flag(1.5, horizontal("red blue yellow green")),
    # The Americas
    "Q739": _flag(1.5, horizontal("yellow blue red", [2, 1, 1])),
    "Q736": _flag(1.5, horizontal("lemon royal scarlet", [2, 1, 1])),
    "Q750": _flag(1.5, horizontal("red lemon green")),
    "Q419": _flag(1.5, vertical("red white red")),
    "Q298": _flag(1.5, horizontal("white red"), rect(0, 0, 0.5, 0.5, "blue"), star(0.25, 0.25, 0.125, "white")),
    "Q730": _flag(
        1.5, horizontal("green white crimson white green", [2, 1, 4, 1, 2]), star(0.75, 0.51, 0.18, "yellow")
    ),
    "Q734": _flag(5 / 3, horizontal("green"), _guyana),
    "Q241": _flag(
        2, horizontal("navy white navy white navy"), hoist("red", _EQUILATERAL), star(0.29, 0.5, 0.165, "white")
    ),
    "Q1183": _flag(
        1.5, horizontal("red white red white red"), hoist("blue", _EQUILATERAL), star(0.29, 0.5, 0.17, "white")
    ),
    "Q804": _flag(1.5, _panama),
    "Q783": _flag(
        2,
        horizontal("aqua white aqua"),
        stars(
            [(1, 0.5, 0.065), (0.8, 0.42, 0.065), (1.2, 0.42, 0.065), (0.8, 0.58, 0.065), (1.2, 0.58, 0.065)], "aqua"
        ),
    ),
    "Q800": _flag(5 / 3, horizontal("blue white red white blue", [1, 1, 2, 1, 1])),
    "Q778": _flag(2, horizontal("aqua yellow aqua"), hoist("black", _EQUILATERAL)),
    "Q784": _flag(2, horizontal("green"), _dominica),
    "Q786": _flag(1.5, _dominican_republic),
    "Q754": _flag(5 / 3, horizontal("red"), band(False, 0.32, "white"), band(False, 0.21, "black")),
    "Q760": _flag(
        2,
        horizontal("sky"),
        polygon("white", (0.67, 0.86), (1, 0.1), (1.33, 0.86)),
        polygon("black", (0.72, 0.86), (1, 0.22), (1.28, 0.86)),
        polygon("yellow", (0.67, 0.86), (1, 0.5), (1.33, 0.86)),
    ),
    "Q757": _flag(
        1.5,
        vertical("blue yellow green", [1, 2, 1]),
        *[
            polygon("green", (x, y - 0.17), (x + 0.1, y), (x, y + 0.17), (x - 0.1, y))
            for x, y in ((0.635, 0.36), (0.865, 0.36), (0.75, 0.7))
        ],
    ),
    "Q790": _flag(5 / 3, horizontal("blue red")),
    "Q766": _flag(
        2,
        horizontal("green"),
        polygon("black", (0, 0), (1, 0.5), (0, 1)),
        polygon("black", (2, 0), (1, 0.5), (2, 1)),
        saltire(0.19, "yellow"),
    ),
    "Q223": _flag(
        1.5,
        horizontal("white red"),
        half_disc(7 / 12, 0.5, 1 / 3, 180, "red"),
        half_disc(7 / 12, 0.5, 1 / 3, 0, "white"),
    ),
    "Q30": _flag(1.9, _united_states),
    "Q1428": _flag(1.6, horizontal("crimson white crimson"), _georgia_state),
    "Q1439": _flag(1.5, horizontal("white crimson"), rect(0, 0, 0.5, 1, "navy"), star(0.25, 0.5, 0.19, "white")),
    "Q1522": _flag(1.5, horizontal("lemon"), _new_mexico),
    "Q1261": _flag(1.5, horizontal("navy white navy"), _colorado),
    "Q173": _flag(1.5, horizontal("white"), saltire(0.2, "crimson")),
    "Q816": _flag(1.5, _arizona),
    "Q1454": _flag(1.5, horizontal("crimson white"), _north_carolina),
    "Q1456": _flag(1.5, horizontal("navy"), _south_carolina),
    # Oceania
    "Q691": _flag(4 / 3, _papua_new_guinea),
    "Q683": _flag(
        2,
        horizontal("red"),
        rect(0, 0, 1, 0.5, "blue"),
        stars(
            [(0.5, 0.1, 0.06), (0.5, 0.4, 0.065), (0.34, 0.21, 0.06), (0.66, 0.18, 0.06), (0.58, 0.27, 0.04)], "white"
        ),
    ),
    "Q16641": _flag(2, horizontal("navy"), _american_samoa),
    "Q695": _flag(1.6, horizontal("azure"), disc(0.7, 0.5, 0.3, "lemon")),
    "Q702": _flag(1.9, horizontal("sky"), _micronesia),
    "Q678": _flag(
        2,
        horizontal("red"),
        rect(0, 0, 5 / 6, 0.5, "white"),
        rect(0.345, 0.08, 0.485, 0.42, "red"),
        rect(0.245, 0.18, 0.585, 0.32, "red"),
    ),
    "Q709": _flag(1.9, horizontal("blue"), _marshall_islands),
    "Q685": _flag(
        2,
        polygon("royal", (0, 0), (2, 0), (0, 1)),
        polygon("forest", (2, 0), (2, 1), (0, 1)),
        band(True, 0.06, "yellow"),
        stars(
            [(0.2, 0.13, 0.07), (0.62, 0.13, 0.07), (0.41, 0.27, 0.07), (0.2, 0.42, 0.07), (0.62, 0.42, 0.07)], "white"
        ),
    ),
    "Q697": _flag(
        2, horizontal("navy yellow navy", [11, 2, 11]), star(0.5, 0.72, 0.155, "white", points=12, inner=0.6)
    ),
}


@cache
def shade_map(qid: str) -> Image.Image:
    """Draws a flag as a map of shades (see [`Canvas`]). The result is cached."""
    ratio, parts = FLAGS[qid]
    canvas = Canvas(ratio, FLAG_HEIGHT * _OVERSAMPLING)
    for part in parts:
        part(canvas)
    return canvas.image


def clean_flag(qid: str) -> Image.Image:
    """Draws a flag in its official colours and proportions, `FLAG_HEIGHT` pixels high."""
    return paint(shade_map(qid)).reduce(_OVERSAMPLING)


def cloth(qid: str) -> np.ndarray:
    """Draws a flag in basic colours, stretched to `CLOTH_SIZE`: `uint8` of shape `[height, width, 3]`."""
    return np.asarray(paint(shade_map(qid), basic=True).resize(CLOTH_SIZE, Image.Resampling.BOX))

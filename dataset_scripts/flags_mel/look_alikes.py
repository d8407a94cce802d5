"""Sets of flags that a photograph does not distinguish."""

from __future__ import annotations

from functools import cache

import numpy as np

from .drawing import basic_colours
from .flags import CLOTH_SIZE, CROPS, FLAGS, shade_map

#: Whole flags that a photograph does not distinguish, if it may show either side of the cloth.
LOOK_ALIKES: tuple[frozenset[str], ...] = (
    frozenset({"Q657", "Q218"}),  # Chad, Romania
    frozenset({"Q252", "Q235"}),  # Indonesia, Monaco
    frozenset({"Q27", "Q1008"}),  # Ireland, Ivory Coast
    frozenset({"Q55", "Q32"}),  # Netherlands, Luxembourg
    frozenset({"Q1006", "Q912"}),  # Guinea, Mali
    frozenset({"Q739", "Q736"}),  # Colombia, Ecuador's civil flag
)

#: Two views that differ on less than `_SAME` of their area are indistinguishable (rounding at the edges of bands). Two
#: views that differ on `_DIFFERENT` or more are clearly distinct. In between is, for example, the tip of a star that the
#: frame cuts off.
_SAME, _DIFFERENT = 0.004, 0.02
#: A view with one colour on more than this share of its area could belong to nearly any flag.
_PLAIN = 0.85


def basic_map(qid: str) -> np.ndarray:
    """Returns the index of the basic colour at each point of the cloth: `uint8` of shape `[height, width]`."""
    width, height = CLOTH_SIZE
    shades = np.asarray(shade_map(qid))
    rows = ((np.arange(height) + 0.5) * shades.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * shades.shape[1] / width).astype(int)
    return basic_colours(shades[np.ix_(rows, columns)])


@cache
def _views(crop: str) -> np.ndarray:
    """Returns a crop of every flag, in the order of [`FLAGS`]. The outer edge of hoist and fly is on the left."""
    left, right, top, bottom = CROPS[crop]
    width, height = CLOTH_SIZE
    rows, columns = (
        slice(round(top * height), round(bottom * height)),
        slice(round(left * width), round(right * width)),
    )
    views = np.stack([basic_map(qid)[rows, columns] for qid in FLAGS])
    return views[:, :, ::-1] if crop == "fly" else views


def _pairwise_differences(views: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the share of the area on which two views differ, for all pairs: `[views, others]`."""
    return np.stack([(view != others).mean(axis=(1, 2)) for view in views])


@cache
def _least_differences(crop: str) -> np.ndarray:
    """Returns the least difference of any two flags: `[flags, flags]`.

    The minimum is over the sides of the cloth, and over the crops that a photograph does not distinguish.
    """
    views = _views(crop)
    if crop in ("hoist", "fly"):  # seen from behind, a fly looks like a hoist
        return np.minimum(_pairwise_differences(views, _views("hoist")), _pairwise_differences(views, _views("fly")))
    return np.minimum(_pairwise_differences(views, views), _pairwise_differences(views, views[:, :, ::-1]))


def difference(qid: str, other: str) -> float:
    """Returns the share of the area on which two whole flags differ in basic colours, for the side that agrees more."""
    order = list(FLAGS)
    return float(_least_differences("full")[order.index(qid), order.index(other)])


def picture_set(qid: str, crop: str, doubtful: bool = True) -> frozenset[str]:
    """Returns the flags that a photograph of this crop can show, including the one that is photographed.

    A crop that has (nearly) one colour gives the empty set, so no photograph shows it.

    Args:
        qid (`str`): Wikidata id of the photographed flag.
        crop (`str`): A key of [`CROPS`].
        doubtful (`bool`): Include flags that only a small detail rules out.
    """
    order = list(FLAGS)
    row = order.index(qid)
    view = _views(crop)[row]
    if np.bincount(view.ravel()).max() > _PLAIN * view.size:
        return frozenset()
    threshold = _DIFFERENT if doubtful else _SAME
    return frozenset(order[i] for i in np.flatnonzero(_least_differences(crop)[row] < threshold))

"""Links at a stated precision: how sure a link must be to be made, instead of being left to a reviewer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Chance that the mentions of the calibration were luckier than others, so that the stated precision does not hold.
CHANCE = 0.1
# Starts of the sequences of tests. One start at the surest links would end at one wrong link among few.
_STARTS = 4
# Points of a curve. More make no threshold better: each is a share of the mentions.
_POINTS = 50


def link_confidence(best: Any, second: Any, nil_is_learned: bool = False) -> Any:
    """Returns how sure a link to the best entity is: its lead over the second one.

    For a retriever that learns NIL ([`~hf_mel.protocols.learns_nil`]), NIL is a rival, too: its score is 0.

    Args:
        best, second (`float` or `np.ndarray` `[M]`): Scores of the two best entities. With a single entity, `second` is
            -inf.
        nil_is_learned (`bool`): Whether the retriever learns NIL.
    """
    return best - np.maximum(second, 0.0) if nil_is_learned else best - second


@dataclass(frozen=True)
class RiskCoverage:
    """The risk–coverage curve of the links of a validation split, from the surest links to all.

    Args:
        confidences (`list[float]`): Falling thresholds T: links that are at least as sure are made.
        links (`list[int]`): Number of links that are made at each.
        wrong (`list[int]`): Number of those that are wrong.
        mentions (`int`): Number of mentions M of the split, also those that are NIL.
    """

    confidences: list[float]
    links: list[int]
    wrong: list[int]
    mentions: int

    @classmethod
    def of(cls, confidences: Any, correct: Any, linked: Any = None) -> RiskCoverage:
        """Returns the curve of M mentions.

        Args:
            confidences (array-like of `float` `[M]`): How sure each link is ([`link_confidence`]).
            correct (array-like of `bool` `[M]`): Whether the best entity is the gold.
            linked (array-like of `bool` `[M]`, *optional*): False for a mention that is predicted NIL. Default: all are
                linked.

        Raises:
            `ValueError`: The lengths differ, or a confidence is nan.
        """
        values, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=bool)
        made = np.ones_like(right) if linked is None else np.asarray(linked, dtype=bool)
        if not values.shape == right.shape == made.shape:
            raise ValueError(f"A curve needs arrays of one length, not {values.shape}, {right.shape}, {made.shape}.")
        if np.isnan(values).any():
            raise ValueError("A confidence is nan.")
        values, wrong = values[made], ~right[made]
        order = np.argsort(-values, kind="stable")
        values, counts = values[order], np.cumsum(wrong[order])
        # A threshold cannot separate equal values, so a point ends where the value changes.
        ends = np.flatnonzero(np.append(values[1:] < values[:-1], len(values) > 0))
        wanted = np.ceil(np.arange(1, _POINTS + 1) * len(values) / _POINTS) - 1
        points = np.unique(ends[np.searchsorted(ends, wanted)]) if len(ends) else ends
        return cls(
            [float(value) for value in values[points]],
            [int(point) + 1 for point in points],
            [int(count) for count in counts[points]],
            len(right),
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RiskCoverage:
        """Returns a curve from its fields, as a model's configuration holds them."""
        return cls(
            [float(value) for value in content["confidences"]],
            [int(value) for value in content["links"]],
            [int(value) for value in content["wrong"]],
            int(content["mentions"]),
        )

    def threshold(self, precision: float, chance: float = CHANCE) -> float:
        """Returns the confidence from which on links are made, so that their precision is at least `precision`.

        This is "learn then test" (Angelopoulos et al., 2021) with a fixed sequence of tests from four starts: the surest
        links, and those at a quarter, half and three quarters of the curve. From each start on, thresholds are tested until
        the first fails. A threshold passes if so few wrong links, or fewer, had a probability of at most `chance` / 4 at a
        precision just below the stated one (an exact binomial test). The lowest that passes is taken. If the mentions of the
        split and those to link are drawn alike, and one by one, the precision of the links is then at least `precision`,
        except with a probability of `chance` over the draw of the split.

        Args:
            precision (`float`): The stated precision, above 0 and below 1.
            chance (`float`): Probability that the guarantee does not hold.

        Returns:
            `float`: the threshold; infinite if the split shows it for no threshold.

        Raises:
            `ValueError`: `precision` or `chance` is not between 0 and 1.
        """
        if not 0 < precision < 1 or not 0 < chance < 1:
            raise ValueError(f"precision={precision} and chance={chance} must be above 0 and below 1.")
        points = [
            point
            for point in zip(self.confidences, self.links, self.wrong, strict=True)
            if precision ** point[1] <= chance / _STARTS  # fewer links show nothing, even if none is wrong
        ]
        passed = math.inf
        for start in {len(points) * number // _STARTS for number in range(_STARTS)}:
            for confidence, links, wrong in points[start:]:
                if _binomial_cdf(wrong, links, 1 - precision) > chance / _STARTS:
                    break
                passed = min(passed, confidence)
        return passed

    def coverage(self, precision: float) -> float:
        """Returns the share of the split's mentions that [`RiskCoverage.threshold`] links."""
        threshold = self.threshold(precision)
        links = [
            links for confidence, links in zip(self.confidences, self.links, strict=True) if confidence >= threshold
        ]
        return max(links, default=0) / self.mentions if self.mentions else 0.0


def _binomial_cdf(count: int, trials: int, probability: float) -> float:
    """Returns the probability of at most `count` successes in `trials`."""
    log_odds = math.log(probability) - math.log1p(-probability)
    log_terms = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_odds
        for k in range(count + 1)
    ]
    largest = max(log_terms)
    total = largest + math.log(math.fsum(math.exp(term - largest) for term in log_terms))
    return min(1.0, math.exp(total + trials * math.log1p(-probability)))

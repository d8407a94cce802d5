"""Tests of the difference of two systems on the same mentions, and their correction for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_mel.errors import ComparisonError, MissingExtraError

#: Number of resamples of a bootstrap.
RESAMPLES = 9999


@dataclass
class Difference:
    """The difference of two systems in a metric over the same mentions.

    Args:
        difference (`float`): Mean of the first minus mean of the second.
        low, high (`float`): Ends of the 95 % interval of the paired bootstrap (percentiles).
        p_bootstrap (`float`): Two-sided p of the paired bootstrap.
        p_t (`float`): Two-sided p of the paired t-test; 1 if no mention differs.
        num_mentions (`int`): Number of mentions.
        num_better, num_worse (`int`): Number of mentions on which the first is better, and worse.
        p_bootstrap_corrected, p_t_corrected (`float`, *optional*): The same, corrected for the number of comparisons.
    """

    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_t: float
    num_mentions: int
    num_better: int
    num_worse: int
    p_bootstrap_corrected: float | None = None
    p_t_corrected: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary."""
        return asdict(self)


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Tests whether two systems differ, by what every mention contributes to a metric.

    The bootstrap draws M mentions with replacement. Its p is the share of resamples whose mean difference is at least as
    far from the observed one as this is from 0, where the observed one counts as a resample.

    Args:
        first, second (`np.ndarray` `[M]`): What each mention contributes, for both systems. Over several seeds, the mean.
        resamples (`int`): Number of resamples.
        seed (`int`): Seed of the resamples.

    Raises:
        MissingExtraError: SciPy is not installed.
        ComparisonError: There are fewer than two mentions, or the systems have other numbers of them.
    """
    stats = _scipy_stats()
    if len(first) != len(second) or len(first) < 2:
        raise ComparisonError(f"{len(first)} and {len(second)} mentions cannot be paired and tested.")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    mean = float(differences.mean())
    changed = differences != 0
    counts = {
        "num_mentions": len(differences),
        "num_better": int((differences > 0).sum()),
        "num_worse": int((differences < 0).sum()),
    }
    if not changed.any():
        return Difference(mean, 0.0, 0.0, 1.0, 1.0, **counts)
    means = _bootstrap_means(differences, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    # A tolerance, because the same mean may be summed in another order.
    farther = np.abs(means - mean) >= abs(mean) - 1e-12
    is_constant = np.ptp(differences) == 0  # every mention differs by the same amount
    p_t = 0.0 if is_constant else float(stats.ttest_rel(first, second).pvalue)
    return Difference(mean, float(low), float(high), float((1 + farther.sum()) / (1 + resamples)), p_t, **counts)


def corrected(differences: Sequence[Difference], method: str = "holm") -> list[Difference]:
    """Returns the tests of one family with p values that are corrected for their number.

    Args:
        differences (sequence of [`Difference`]): The tests.
        method (`str`): The correction, by its name in statsmodels. "holm" bounds the chance of a single false finding.

    Raises:
        MissingExtraError: statsmodels is not installed.
    """
    if not differences:
        return []
    multipletests = _multipletests()
    columns = [
        multipletests([getattr(item, name) for item in differences], method=method)[1]
        for name in ("p_bootstrap", "p_t")
    ]
    return [
        Difference(**{**item.to_dict(), "p_bootstrap_corrected": float(bootstrap), "p_t_corrected": float(t)})
        for item, bootstrap, t in zip(differences, *columns, strict=True)
    ]


def _bootstrap_means(differences: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Returns the means of resamples, [R].

    Mentions with the same difference are alike, so a resample is a draw from the multinomial distribution over the
    differences. Hits have two or three of them, which makes this much cheaper than drawing mentions.
    """
    values, counts = np.unique(differences, return_counts=True)
    generator, shares = np.random.default_rng(seed), counts / len(differences)
    parts = [min(256, resamples - first) for first in range(0, resamples, 256)]
    drawn = [generator.multinomial(len(differences), shares, size=size) @ values for size in parts]
    return np.concatenate(drawn) / len(differences)


def check_packages() -> None:
    """Raises a [`~hf_mel.errors.MissingExtraError`] if a package for tests is not installed."""
    _scipy_stats(), _multipletests()


def _multipletests() -> Any:
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise _missing("statsmodels") from error
    return multipletests


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise _missing("SciPy") from error
    return stats


def _missing(package: str) -> MissingExtraError:
    return MissingExtraError(
        f"Tests of significance need {package}, which is not installed.", remedy='Run pip install "hf_mel[bench]".'
    )

"""NIL: from which score on the best entity is believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_mel.inference.ranking import RankingResult


@dataclass
class NilThreshold:
    """A threshold and what it reached where it was chosen.

    Args:
        threshold (`float`): A mention is NIL if its best score is below this.
        accuracy (`float`): Share of right decisions (the right entity, or NIL rightly) with it, in [0, 1].
        simulated (`bool`): Whether the NIL cases were made by leaving the golds out.
    """

    threshold: float
    accuracy: float
    simulated: bool


def calibrate_nil_threshold(top_scores, correct, gold_is_nil, other_scores=None) -> NilThreshold:
    """The threshold with the highest share of right decisions on M mentions of a validation set.

    With the threshold t, a mention whose best score is at least t is linked, which is right if its best entity is the
    gold; below t it is NIL, which is right if its gold is NIL. Where several thresholds do equally well, the lowest
    one is taken (fewest NIL). A threshold between two scores lies in their middle.

    A validation set without NIL mentions gives no evidence of what a wrong link scores. Then every mention stands
    twice, with equal weight: as it is, and as the NIL mention it would be if its gold were not in the knowledge base,
    whose best score is that of its best other entity.

    Args:
        top_scores (array-like of `float` `[M]`): Score of each mention's best entity.
        correct (array-like of `bool` `[M]`): Whether that entity is the gold.
        gold_is_nil (array-like of `bool` `[M]`): Whether the gold is NIL.
        other_scores (array-like of `float` `[M]`, *optional*): Score of the best entity that is not the gold
            ([`best_other_scores`]). Needed, and used, where no gold is NIL.

    Returns:
        [`NilThreshold`].

    Raises:
        `ValueError`: no mentions, lengths that differ, scores that are not finite, or no NIL and no `other_scores`.
    """
    scores = np.asarray(top_scores, dtype=np.float64)
    nil = np.asarray(gold_is_nil, dtype=bool)
    right = np.asarray(correct, dtype=bool) & ~nil
    if not len(scores) or not scores.shape == nil.shape == right.shape:
        raise ValueError(f"Calibration needs columns of one length above 0, not {scores.shape}, {nil.shape}.")
    simulated = not nil.any()
    if simulated:
        if other_scores is None:
            raise ValueError("No gold is NIL: calibration needs other_scores to simulate mentions that are.")
        scores = np.concatenate([scores, np.asarray(other_scores, dtype=np.float64)])
        nil = np.concatenate([nil, np.ones_like(nil)])
        right = np.concatenate([right, np.zeros_like(right)])
    if not scores.shape == nil.shape or not np.isfinite(scores).all():
        raise ValueError("Calibration needs finite scores, one per mention.")

    order = np.argsort(scores, kind="stable")
    scores, nil, right = scores[order], nil[order], right[order]
    # Threshold number i makes NIL of the i lowest mentions.
    correct_counts = np.concatenate([[0], np.cumsum(nil)]) + right.sum() - np.concatenate([[0], np.cumsum(right)])
    possible = np.concatenate([[True], scores[1:] > scores[:-1], [True]])  # equal scores fall on the same side
    best = int(np.flatnonzero(possible & (correct_counts == correct_counts[possible].max()))[0])
    if best == 0:
        threshold = scores[0]
    elif best == len(scores):
        threshold = np.nextafter(scores[-1], np.inf)
    else:
        middle = (scores[best - 1] + scores[best]) / 2
        threshold = middle if middle > scores[best - 1] else scores[best]  # nothing lies between adjacent numbers
    return NilThreshold(float(threshold), float(correct_counts[best] / len(scores)), simulated)


def best_other_scores(ranking: RankingResult, gold_rows) -> np.ndarray:
    """Score of each mention's best entity that is not its gold, [M].

    Args:
        ranking ([`~hf_mel.inference.ranking.RankingResult`]): At least the two best of every mention.
        gold_rows (integers `[M]`): Entity row of each gold, -1 for none.

    Raises:
        `ValueError`: fewer than two entities were kept.
    """
    scores, rows = ranking.top_scores.double().numpy(), ranking.top_rows.numpy()
    if rows.shape[1] < 2:
        raise ValueError("The two best entities of every mention are needed: a larger top_k or knowledge base.")
    other = rows != np.asarray(gold_rows)[:, None]
    return scores[np.arange(len(rows)), other.argmax(1)]

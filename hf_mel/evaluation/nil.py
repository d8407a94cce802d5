"""Calibrates the NIL threshold: the best score below which a mention is linked to no entity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hf_mel.inference.ranking import RankingResult

#: The measure that a threshold maximises: the share of right decisions, or the F1 of NIL.
Objective = Literal["accuracy", "f1"]


@dataclass
class NilThreshold:
    """A calibrated threshold.

    Args:
        threshold (`float`): A mention is NIL if its best score is below this.
        accuracy (`float`): Accuracy of the threshold on the mentions it was chosen on, in [0, 1]. A mention counts as
            correct if it is linked to its gold, or if it is NIL and its gold is NIL.
        simulated (`bool`): Whether the NIL mentions were simulated by leaving out the golds.
        objective (`str`): The measure that the threshold maximises, "accuracy" or "f1".
    """

    threshold: float
    accuracy: float
    simulated: bool
    objective: Objective = "accuracy"


def calibrate_nil_threshold(
    top_scores, correct, gold_is_nil, other_scores=None, objective: Objective = "accuracy"
) -> NilThreshold:
    """Returns the best threshold on M mentions of a validation set.

    A mention with a best score of at least the threshold is linked, which is correct if the best entity is the gold.
    Other mentions are NIL, which is correct if the gold is NIL. Among equally good thresholds the lowest is
    returned, because it makes the fewest mentions NIL. A threshold between two scores is their mean.

    Accuracy says little about NIL where few mentions are: a NIL that is missed costs as much as a link that is
    lost. F1 of NIL weighs its precision against its recall.

    A validation set without NIL mentions does not show how wrong links score. NIL mentions are then simulated: every
    mention is counted once more, with equal weight, as if its gold were not in the knowledge base. Its best score is
    then the score of its best other entity.

    Args:
        top_scores (array-like of `float` `[M]`): Score of the best entity.
        correct (array-like of `bool` `[M]`): Whether the best entity is the gold.
        gold_is_nil (array-like of `bool` `[M]`): Whether the gold is NIL.
        other_scores (array-like of `float` `[M]`, *optional*): Score of the best entity other than the gold
            ([`best_other_scores`]). Required if no gold is NIL, and ignored otherwise.
        objective (`str`): "accuracy" maximises the share of right decisions, "f1" the F1 of NIL.

    Returns:
        [`NilThreshold`].

    Raises:
        `ValueError`: `top_scores` is empty, the lengths differ, a score is not finite, no gold is NIL and
            `other_scores` is missing, or the objective is unknown.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} is not one of 'accuracy', 'f1'.")
    scores = np.asarray(top_scores, dtype=np.float64)
    nil = np.asarray(gold_is_nil, dtype=bool)
    linked_correctly = np.asarray(correct, dtype=bool) & ~nil
    if not len(scores) or not scores.shape == nil.shape == linked_correctly.shape:
        raise ValueError(f"Calibration needs arrays of one length above 0, not {scores.shape}, {nil.shape}.")
    simulated = not nil.any()
    if simulated:
        if other_scores is None:
            raise ValueError("No gold is NIL. Calibration needs other_scores to simulate NIL mentions.")
        scores = np.concatenate([scores, np.asarray(other_scores, dtype=np.float64)])
        nil = np.concatenate([nil, np.ones_like(nil)])
        linked_correctly = np.concatenate([linked_correctly, np.zeros_like(linked_correctly)])
    if not scores.shape == nil.shape or not np.isfinite(scores).all():
        raise ValueError("Calibration needs finite scores, one per mention.")

    order = np.argsort(scores, kind="stable")
    scores, nil, linked_correctly = scores[order], nil[order], linked_correctly[order]
    # With threshold i, the i mentions with the lowest scores are NIL.
    nil_correct = np.concatenate([[0], np.cumsum(nil)])
    num_correct = nil_correct + linked_correctly.sum() - np.concatenate([[0], np.cumsum(linked_correctly)])
    value = num_correct
    if objective == "f1":
        value = 2 * nil_correct / (np.arange(len(scores) + 1) + nil.sum())
    possible = np.concatenate([[True], scores[1:] > scores[:-1], [True]])  # no threshold separates equal scores
    best = int(np.flatnonzero(possible & (value == value[possible].max()))[0])
    if best == 0:
        threshold = scores[0]
    elif best == len(scores):
        threshold = np.nextafter(scores[-1], np.inf)
    else:
        middle = (scores[best - 1] + scores[best]) / 2
        # The mean of two adjacent floating-point numbers may round down to the lower one.
        threshold = middle if middle > scores[best - 1] else scores[best]
    return NilThreshold(float(threshold), float(num_correct[best] / len(scores)), simulated, objective)


def best_other_scores(ranking: RankingResult, gold_rows) -> np.ndarray:
    """Returns the scores [M] of the best entity other than the gold.

    Args:
        ranking ([`~hf_mel.inference.ranking.RankingResult`]): A ranking with at least two entities per mention.
        gold_rows (array-like of `int` `[M]`): Row of the gold among the entities, -1 for NIL.

    Raises:
        `ValueError`: The ranking has one entity per mention.
    """
    scores, rows = ranking.top_scores.double().numpy(), ranking.top_rows.numpy()
    if rows.shape[1] < 2:
        raise ValueError(
            "Calibration needs the two best entities of every mention. Use a larger top_k or knowledge base."
        )
    is_other = rows != np.asarray(gold_rows)[:, None]
    return scores[np.arange(len(rows)), is_other.argmax(1)]


def nil_detection(nil_scores, known_scores, threshold: float | None = None) -> dict[str, float]:
    """Returns how well the best score tells NIL mentions from others.

    Args:
        nil_scores (array-like of `float` `[A]`): Best scores of the NIL mentions.
        known_scores (array-like of `float` `[B]`): Best scores of the other mentions.
        threshold (`float`, *optional*): A mention is predicted NIL if its best score is below this.

    Returns:
        `dict`: "num" (A), "auc" (probability that the score of a NIL mention is lower than that of another, where an equal
        one counts half), and with a threshold "precision" (nan if no mention is predicted NIL) and "recall".
    """
    nil, known = np.asarray(nil_scores, dtype=np.float64), np.sort(np.asarray(known_scores, dtype=np.float64))
    higher = len(known) - np.searchsorted(known, nil, side="right")
    equal = np.searchsorted(known, nil, side="right") - np.searchsorted(known, nil, side="left")
    result = {"num": len(nil), "auc": float((higher + equal / 2).mean() / len(known))}
    if threshold is not None:
        hits, wrong = int((nil < threshold).sum()), int((known < threshold).sum())
        result |= {"precision": hits / (hits + wrong) if hits + wrong else float("nan"), "recall": hits / len(nil)}
    return result

"""Ranking metrics for entity linking: H@k, MRR, MR with a stated treatment of ties, and NIL-aware accuracy.

The card beside this file defines every number. The functions need only numpy; `MelRanking` wraps them as an `evaluate`
module. hf_mel's own evaluators import them from here, because `evaluate.load` needs a file that does not depend on hf_mel.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

#: The id for "not in the knowledge base", as a reference or as the first prediction of a list.
NIL = "NIL"

#: Policies for the rank of a gold whose score others share.
TIES = ("realistic", "optimistic", "pessimistic")

_DESCRIPTION = """\
Ranking quality of entity linking: H@k, MRR and MR of the gold entity's rank. By default ties count as the mean of the \
best and the worst position, so that a constant scorer gets no credit. With NIL, also accuracy, micro-F1, in-KB accuracy, \
NIL precision and NIL recall.
"""

_INPUTS = """
Configuration "ids" (the default), one row per mention:
    predictions (`list` of `list` of `str`): ranked entity ids, best first, without repetition. A list that is empty or
        starts with "NIL" predicts NIL.
    references (`list` of `str`): gold entity ids, or "NIL".
    scores (`list` of `list` of `float`, *optional*): the scores of `predictions`, never increasing; equal scores are
        ties. Without scores there are no ties.
    tie_tolerance (`float`, defaults to 1e-6): two scores are equal if they differ by at most this value times
        max(1, |score of the gold|).
Configuration "ranks", one row per mention whose gold is in the knowledge base:
    ranks (`list` of `int`): position of the gold, 1 is best; `None` if it was not retrieved. With ties, the best
        position it can take, or the mean of its positions (`float`).
    worst_ranks (`list` of `int`, *optional*): with ties, the worst position it can take.
Both:
    ks (`list` of `int`, defaults to [1, 3, 5, 10, 20]): the k of H@k.
    ties (`str`, defaults to "realistic"): "realistic", "optimistic" or "pessimistic".
    kb_size (`int`, *optional*): number of entities that were ranked, which MR uses as the rank of a missed gold.

Returns:
    `dict`: fractions in [0, 1] (MR is a position); nan for an average over no mentions. "hits@k" for every k, "mrr",
    "mr", "num_ranked", "num_missed"; configuration "ids" adds "accuracy", "in_kb_accuracy", "micro_precision",
    "micro_recall", "micro_f1", "nil_precision", "nil_recall", "num_mentions", "num_nil".

Examples:
    >>> metric = evaluate.load("spaces/mel_ranking")
    >>> metric.compute(predictions=[["Q1", "Q2"], ["Q3", "Q1"]], references=["Q2", "Q3"], ks=[1, 2])["hits@1"]
    0.5
    >>> metric = evaluate.load("spaces/mel_ranking", "ranks")
    >>> metric.compute(ranks=[1, 4, None], ks=[1, 5])["hits@5"]
    0.6666666666666666
"""


def resolve_ranks(best, worst=None, ties: str = "realistic") -> np.ndarray:
    """Returns the rank of every gold from the best and the worst position that its ties allow.

    Args:
        best (array-like `[M]`): 1 + number of entities with a better score; `None` or nan for a missed gold.
        worst (array-like `[M]`, *optional*): `best` + number of other entities with the same score. Default: `best`.
        ties (`str`): "realistic" is the mean of both, "optimistic" is `best`, "pessimistic" is `worst`.

    Returns:
        `np.ndarray` `[M]` of `float64`, nan for a missed gold.

    Raises:
        `ValueError`: `ties` is unknown, the lengths differ, a rank is below 1, or a worst rank is before the best one.
    """
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, not {ties!r}.")
    best = np.asarray(best, dtype=np.float64)
    worst = best if worst is None else np.asarray(worst, dtype=np.float64)
    if best.ndim != 1 or best.shape != worst.shape:
        raise ValueError(
            f"The ranks must be two lists of the same length, not arrays of shapes {best.shape} and {worst.shape}."
        )
    wrong = ~((best >= 1) & (worst >= best) & np.isfinite(worst)) & ~(np.isnan(best) & np.isnan(worst))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"Row {row}: best rank {best[row]:g} and worst rank {worst[row]:g} are not valid. Ranks start at 1, the worst "
            "rank is not before the best one, and both are None for a gold that was not retrieved."
        )
    return {"realistic": (best + worst) / 2, "optimistic": best, "pessimistic": worst}[ties]


def ranking_metrics(
    best,
    worst=None,
    ks: Sequence[int] = (1, 3, 5, 10, 20),
    ties: str = "realistic",
    kb_size: int | None = None,
) -> dict[str, float]:
    """Returns H@k, MRR and MR over mentions whose gold is in the knowledge base.

    With r the rank from [`resolve_ranks`], H@k is the share of r <= k, MRR the mean of 1/r, and MR the mean of r. A
    missed gold counts as a miss for every k and as 1/r = 0. In MR it has the rank `kb_size`; without `kb_size` it is
    left out.

    Args:
        best (array-like `[M]`): See [`resolve_ranks`].
        worst (array-like `[M]`, *optional*): See [`resolve_ranks`].
        ks (sequence of `int`): The values of k in H@k, at least 1.
        ties (`str`): See [`resolve_ranks`].
        kb_size (`int`, *optional*): Number of entities that were ranked.

    Returns:
        `dict`: "hits@k" for every k, "mrr", "mr", "num_ranked" (M), "num_missed"; the averages are nan if M is 0.

    Raises:
        `ValueError`: as [`resolve_ranks`]; also if a k is below 1 or a rank is above `kb_size`.
    """
    ranks = resolve_ranks(best, worst, ties)
    if not all(k >= 1 and k % 1 == 0 for k in ks):
        raise ValueError(f"ks must be whole numbers of at least 1, not {list(ks)}.")
    missed = np.isnan(ranks)
    if kb_size is not None and not (np.nan_to_num(ranks) <= kb_size).all():
        raise ValueError(f"Rank {np.nanmax(ranks):g} is beyond the {kb_size} entities of the knowledge base.")
    hits = {f"hits@{int(k)}": _mean(ranks <= k) for k in ks}  # nan <= k is False, which counts as a miss
    counted = ranks[~missed] if kb_size is None else np.where(missed, kb_size, ranks)
    return {
        **hits,
        "mrr": _mean(np.where(missed, 0.0, 1.0 / ranks)),
        "mr": _mean(counted),
        "num_ranked": len(ranks),
        "num_missed": int(missed.sum()),
    }


def nil_metrics(gold_is_nil, predicted_nil, link_is_correct) -> dict[str, float]:
    """Returns accuracy, micro-F1 and NIL precision and recall of one decision per mention, an entity or NIL.

    Args:
        gold_is_nil (array-like of `bool` `[M]`): Whether the mention's entity is missing in the knowledge base.
        predicted_nil (array-like of `bool` `[M]`): Whether the system predicted NIL.
        link_is_correct (array-like of `bool` `[M]`): Whether the system's best entity is the gold. Ignored if the gold
            or the prediction is NIL.

    Returns:
        `dict`: "accuracy" (correct entities and correct NILs over all mentions), "in_kb_accuracy" (correct entities over
        mentions whose gold is in the knowledge base, the same as "micro_recall"), "micro_precision" (correct entities
        over predicted entities), "micro_recall", "micro_f1", "nil_precision", "nil_recall", "num_mentions",
        "num_nil"; nan for an empty denominator.

    Raises:
        `ValueError`: the lengths differ.
    """
    gold_is_nil, predicted_nil, link_is_correct = (
        np.asarray(column, dtype=bool) for column in (gold_is_nil, predicted_nil, link_is_correct)
    )
    if not gold_is_nil.shape == predicted_nil.shape == link_is_correct.shape:
        shapes = gold_is_nil.shape, predicted_nil.shape, link_is_correct.shape
        raise ValueError(f"The three columns must have the same length, not the shapes {shapes}.")
    linked = link_is_correct & ~gold_is_nil & ~predicted_nil
    correct_nil = gold_is_nil & predicted_nil
    precision, recall = _mean(linked[~predicted_nil]), _mean(linked[~gold_is_nil])
    return {
        "accuracy": _mean(linked | correct_nil),
        "in_kb_accuracy": recall,
        "micro_precision": precision,
        "micro_recall": recall,
        "micro_f1": _ratio(2 * int(linked.sum()), int((~predicted_nil).sum()) + int((~gold_is_nil).sum())),
        "nil_precision": _mean(correct_nil[predicted_nil]),
        "nil_recall": _mean(correct_nil[gold_is_nil]),
        "num_mentions": len(gold_is_nil),
        "num_nil": int(gold_is_nil.sum()),
    }


def ranks_from_ids(
    predictions: Sequence[Sequence[str]],
    references: Sequence[str],
    scores: Sequence[Sequence[float]] | None = None,
    tie_tolerance: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best and the worst position of every gold in its ranked list; nan for golds not in the list.

    Args:
        predictions (`[M]` lists of `str`): Ranked ids, best first.
        references (`[M]` `str`): Gold ids.
        scores (`[M]` lists of `float`, *optional*): Scores of `predictions`. `None` and an empty list mean no ties.
        tie_tolerance (`float`): A score s equals the gold's score t if |s - t| <= `tie_tolerance` * max(1, |t|).

    Returns:
        Two `np.ndarray` `[M]` of `float64`.

    Raises:
        `ValueError`: an id occurs twice in a list, the numbers of ids and scores differ, a score is not finite, or
            scores increase along a list.
    """
    best, worst = np.full(len(references), np.nan), np.full(len(references), np.nan)
    for row, (ids, gold) in enumerate(zip(predictions, references, strict=True)):
        if len(set(ids)) != len(ids):
            raise ValueError(f"Row {row}: an id occurs twice in the ranked list {_preview(ids)}.")
        values = np.asarray([] if scores is None else scores[row], dtype=np.float64)
        if len(values):
            _check_scores(row, ids, values, tie_tolerance)
        if gold not in ids:
            continue
        position = list(ids).index(gold)
        if len(values):
            margin = tie_tolerance * max(1.0, abs(values[position]))
            best[row] = 1 + (values > values[position] + margin).sum()
            worst[row] = (values >= values[position] - margin).sum()
        else:
            best[row] = worst[row] = 1 + position
    return best, worst


def _check_scores(row: int, ids: Sequence[str], values: np.ndarray, tolerance: float) -> None:
    if len(values) != len(ids):
        raise ValueError(f"Row {row}: the list has {len(ids)} ids but {len(values)} scores.")
    if not np.isfinite(values).all():
        raise ValueError(f"Row {row}: the scores {_preview(values.tolist())} are not all finite numbers.")
    if (np.diff(values) > tolerance * np.maximum(1.0, np.abs(values[1:]))).any():
        raise ValueError(f"Row {row}: the scores {_preview(values.tolist())} increase. Put the best entity first.")


def _preview(values: Sequence) -> str:
    """The first five values."""
    return str(list(values[:5]))[:-1] + (", …]" if len(values) > 5 else "]")


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


_COLUMNS = {"ids": ("predictions", "references", "scores"), "ranks": ("ranks", "worst_ranks")}
_FEATURES = {
    "predictions": datasets.Sequence(datasets.Value("string")),
    "references": datasets.Value("string"),
    "scores": datasets.Sequence(datasets.Value("float64")),
    "ranks": datasets.Value("float64"),
    "worst_ranks": datasets.Value("float64"),
}


class MelRanking(evaluate.Metric):
    """The functions of this file as an `evaluate` module with the configurations "ids" and "ranks"."""

    config_name: str

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name == "default":
            self.config_name = "ids"
        if self.config_name not in _COLUMNS:
            raise ValueError(f"The configurations of mel_ranking are ids and ranks, not {self.config_name!r}.")
        # Optional columns must be features, or `add_batch` would not collect them. `_fill` supplies missing ones.
        columns = {name: _FEATURES[name] for name in _COLUMNS[self.config_name]}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(columns),
        )

    def _fill(self, batch: dict) -> dict:
        """Adds the optional column that the caller omitted: no scores, or worst ranks equal to the best."""
        for name, columns in _COLUMNS.items():
            for column in columns:
                if name != self.config_name and batch.get(column) is not None:
                    raise ValueError(
                        f"The column {column} belongs to the configuration {name!r}. Use evaluate.load(path, {name!r})."
                    )
        if self.config_name == "ranks":
            if batch.get("worst_ranks") is None:
                batch["worst_ranks"] = batch.get("ranks")
        elif batch.get("scores") is None and batch.get("predictions") is not None:
            batch["scores"] = [[] for _ in batch["predictions"]]
        return batch

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Returns the metrics of all rows: those added before and those given here."""
        filled = self._fill({"predictions": predictions, "references": references, **kwargs})
        return evaluate.Metric.compute(self, **filled)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds rows; `compute` returns their metrics."""
        filled = self._fill({"predictions": predictions, "references": references, **kwargs})
        return evaluate.Metric.add_batch(self, **filled)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one row."""
        names = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in names.items() if name in self._feature_names()})

    def _compute(
        self,
        *,
        predictions=None,
        references=None,
        scores=None,
        ranks=None,
        worst_ranks=None,
        ks=(1, 3, 5, 10, 20),
        ties="realistic",
        kb_size=None,
        tie_tolerance=1e-6,
    ):
        if self.config_name == "ranks":
            return ranking_metrics(ranks, worst_ranks, ks, ties, kb_size)
        gold_is_nil = np.asarray([gold == NIL for gold in references], dtype=bool)
        predicted_nil = np.asarray([len(ids) == 0 or ids[0] == NIL for ids in predictions], dtype=bool)
        best, worst = ranks_from_ids(predictions, references, scores, tie_tolerance)
        correct = resolve_ranks(best, worst, ties) <= 1
        in_kb = ~gold_is_nil
        return {
            **ranking_metrics(best[in_kb], worst[in_kb], ks, ties, kb_size),
            **nil_metrics(gold_is_nil, predicted_nil, correct),
        }

"""Results of linking a mention: candidates with their scores, and the decision between the best one and NIL."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_mel.inference.ranking import TIE_TOLERANCE
from hf_mel.schema import threshold_in_json

if TYPE_CHECKING:
    from hf_mel.linking.traces import LinkTrace


@dataclass
class Candidate:
    """An entity that a mention may refer to.

    Args:
        rank (`int`): 1 + number of candidates with a higher score. Equal scores have equal ranks.
        entity_id, name, description, attributes (`str`): Columns of the entity.
        score (`float`): Score of the model, higher is better. With a name weight w, plus w · `name_score`.
        unit_scores (`dict[str, float]`): Scores of the model's interaction units. Their mean, which the model may weigh,
            less the NIL score of a model that learns one, is the score of the model. Units that read what the mention
            lacks, such as its image, are left out. Empty
            for a model with a single unit.
        reranker_score (`float`, *optional*): Score of the reranker, by which the first `rerank_k` candidates are sorted.
            `None` for later candidates, and without a reranker.
        name_score (`float`, *optional*): Similarity of the mention and the best name or alias, in [0, 1]
            ([`~hf_mel.candidates.name_index.NameIndex.scores`]). `None` without a name weight.
    """

    rank: int
    entity_id: str
    name: str
    description: str
    attributes: str
    score: float
    unit_scores: dict[str, float]
    reranker_score: float | None = None
    name_score: float | None = None


@dataclass
class LinkResult:
    """The result of linking one mention.

    Args:
        mention (`str`): Surface form of the mention.
        start, end (`int`): Characters of the mention in the text, end exclusive; -1 if it was given with -1.
        entity_id (`str`, *optional*): Id of the best candidate, or "NIL"; `None` if the link is left to a reviewer.
        is_nil (`bool`): Whether the best score of the retriever is below `nil_threshold`.
        nil_threshold (`float`, *optional*): The threshold. `None` if there is none, so that no mention is NIL.
        num_tied (`int`): Number of entities of the knowledge base that have the best score, usually 1. Of several, the
            first of the knowledge base is taken. An index counts only the entities that it returns.
        candidates (`list[Candidate]`): The best `top_k` entities, best first. A mention that is NIL has them too.
        warnings (`list[str]`): Sentences for the user, for instance that an image was not used.
        needs_review (`bool`): Whether the link is not made, because it is less sure than the stated precision asks.
        confidence (`float`, *optional*): How sure the link is ([`~hf_mel.inference.selective.link_confidence`]). `None`
            without a stated precision.
        certified (`bool`): Whether it is proven that no entity that was left out of the retriever's ranking belongs among the
            candidates: all were scored, or have a bound below them. `False` for an index that may miss entities.
        bound (`float`, *optional*): The highest score that an entity which was not scored could have. `None` if all were
            scored, and if the answer is not certified.
        trace ([`~hf_mel.linking.traces.LinkTrace`], *optional*): What relinking compares with; not part of the JSON.
    """

    mention: str
    start: int
    end: int
    entity_id: str | None
    is_nil: bool
    nil_threshold: float | None
    candidates: list[Candidate]
    warnings: list[str] = field(default_factory=list)
    num_tied: int = 1
    needs_review: bool = False
    confidence: float | None = None
    certified: bool = False
    bound: float | None = None
    trace: LinkTrace | None = field(default=None, repr=False, compare=False)

    @property
    def best(self) -> Candidate:
        """The best candidate, also if the mention is NIL."""
        return self.candidates[0]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain data for JSON. An infinite threshold, which JSON lacks, becomes the nearest float."""
        content = asdict(replace(self, trace=None)) | {"nil_threshold": threshold_in_json(self.nil_threshold)}
        del content["trace"]
        return content


@dataclass
class RankedMention:
    """A mention and the entities ranked for it, best first.

    Args:
        row (`dict`): The mention as a row of the schema.
        entity_rows (`list[int]`): Rows of the entities in the knowledge base.
        scores (`list[float]`): Scores of the retriever.
        best_score (`float`): Best score of the retriever, which decides about NIL.
        reranker_scores (`list[float | None]`): Scores of the reranker, `None` for entities that it did not score.
        name_scores (`list[float | None]`): Name scores, `None` without a name weight.
        num_tied (`int`): Number of entities with the best score of the retriever, or of the reranker.
        confidence (`float`): How sure the link to the retriever's best entity is.
        bound (`float`): No other entity has a higher score of the retriever; -inf if all were scored, inf if nothing is known.
    """

    row: dict[str, Any]
    entity_rows: list[int]
    scores: list[float]
    best_score: float
    reranker_scores: list[float | None]
    name_scores: list[float | None]
    num_tied: int = 1
    confidence: float = 0.0
    bound: float = -math.inf

    def rerank(self, reranker_scores: list[float]) -> None:
        """Sorts the first entities by the reranker's scores of them, and leaves the others in place."""
        order = sorted(range(len(reranker_scores)), key=lambda c: -reranker_scores[c])
        self.reranker_scores = [*(reranker_scores[c] for c in order), *self.reranker_scores[len(order) :]]
        for name in ("entity_rows", "scores", "name_scores"):
            values = getattr(self, name)
            setattr(self, name, [values[c] for c in order] + values[len(order) :])
        self.num_tied = sum(scores_equal(score, max(reranker_scores)) for score in reranker_scores)

    def ranks(self) -> list[int]:
        """Returns 1 + the number of better entities for each entity. Reranked entities come before the others."""
        ranks: list[int] = []
        keys = [
            (ranked is not None, score if ranked is None else ranked)
            for score, ranked in zip(self.scores, self.reranker_scores, strict=True)
        ]
        for place, (is_reranked, score) in enumerate(keys):
            group, first_score = keys[ranks[-1] - 1] if ranks else (None, 0.0)
            ranks.append(ranks[-1] if group is is_reranked and scores_equal(score, first_score) else place + 1)
        return ranks


def scores_equal(score: float, other: float) -> bool:
    """Whether two scores differ by no more than rounding, as in [`~hf_mel.inference.ranking.rank`]."""
    return abs(score - other) <= TIE_TOLERANCE * max(1.0, abs(other))

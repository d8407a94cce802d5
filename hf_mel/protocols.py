"""hf_mel.protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from hf_mel.schema import Row

#: Named tensors that share their first axis: what a model keeps of M mentions or N entities.
Encodings = Mapping[str, Any]


@runtime_checkable
class MelProcessor(Protocol):
    """Turns rows into tensors; the only place that knows a method's templates, lengths and image handling."""

    def __call__(
        self,
        mentions: Sequence[Row] | None = None,
        entities: Sequence[Row] | None = None,
        pairs: Sequence[tuple[Row, Sequence[Row]]] | None = None,
        **kwargs: Any,
    ) -> Mapping[str, Any]:
        """Tensors of M mention rows, N entity rows, or M mentions with C candidates each.

        Args:
            mentions: M rows → tensors named `mention_*`, first axis M.
            entities: N rows → tensors named `entity_*`, first axis N. The image of an entity is
                `row["images"][0]`; whoever wants another one puts it first. A processor that reads more of them says
                how many in an attribute `max_entity_images` (`None`: all).
            pairs: M times (mention row, its C candidate rows) → tensors named `pair_*`, first axes M, C.
        """
        ...


@runtime_checkable
class Retriever(Protocol):
    """A model that encodes mentions and entities apart and scores every pair from the encodings (late interaction).

    `forward(**mention_tensors, **entity_tensors, labels=None)` returns an output with `loss` (given `labels`),
    `scores` [M, N] and `unit_scores` (a dict of [M, N], one per interaction unit). `labels` [M] holds the column of
    each mention's gold; several mentions may share one column, so the same entity twice is never a negative.

    Optional: `attention(**mention_tensors, **entity_tensors)`, where the model looks: any of `words` [M, N, L] (shares
    of the L tokens of a mention), `mention_patches` [M, h, w] and `entity_patches` [N, h, w]; the processor's
    `text_spans(mentions)` says where each of the L tokens stands in the text.

    Optional, for a model that knows an entity by posts (IMN):

    - `encode_posts(**post_inputs)`: of P posts, the features [P, d] of each modality by its name, and under
      `<modality>_present` [P] (bool) which of the posts have it. Training leaves the weights they come from as they are.
    - `num_prototypes` (`int`): k, the most prototypes of an entity in one modality.

    Its processor turns `posts=rows` into tensors named `post_*`, and the entity rows it gets carry `prototypes`: modality →
    float tensor [k', d], vectors of length 1, the most representative first; k' is at most k, and may be 0.
    [`hf_mel.inference.features.post_prototypes.Prototypes`] chooses them.

    Optional, for a model whose training leaves what reads a mention as it is: `mention_features(**mention_inputs)`, of M
    mentions tensors [M, S, d] by name, and under `<name>_mask` [M, S] (bool) what of them is no padding. Its processor takes
    rows that carry them as `features` (name → [s, d], S differs from row to row), and then gives these and reads nothing
    else of the row.

    Optional, for a ranking that leaves out pairs which cannot matter: `quick_scores(mentions, entities)` [M, N], the part
    of the score that costs little, and `remaining_scores(mentions, entities, floor)` [M, N], what is to be added: exact
    wherever that is at least `floor` [M, N], and -inf where it is surely below. Both take half precision as it is stored.

    Optional, for an index whose candidates are then scored exactly: `query_vectors(mentions)` [M, D] and
    `index_vectors(entities)` [N, D], both from encodings, both float32, whose inner products are the scores or near
    them.
    """

    def encode_mentions(self, **mention_inputs: Any) -> Encodings:
        """What scoring needs of M mentions: tensors with first axis M."""
        ...

    def encode_entities(self, **entity_inputs: Any) -> Encodings:
        """What scoring needs of N entities, computed once each: tensors with first axis N. A KB index stores these."""
        ...

    def score(self, mentions: Encodings, entities: Encodings) -> Any:
        """Scores [M, N] of every pair, higher is better. Both arguments may be plain dicts of tensors."""
        ...

    def unit_scores(self, mentions: Encodings, entities: Encodings) -> dict[str, Any]:
        """The parts the score is made of, by name, each [M, N]; `score` is their mean. Empty for a single-part model."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """A model that reads a mention and its candidates together (cross-encoder, document model).

    Its processor turns `pairs` (M mentions with up to C candidates each) into tensors with first axes M, C, and always
    gives two more: `pair_mask` [M, C] (bool, False where a mention has no C-th candidate) and `pair_context` [M]
    (int64, equal for the mentions of one context, or document). Rows whose images were encoded beforehand carry `image_features`
    (a tensor [d], or `None`; [k, d] for an entity with k images, where the processor reads several) beside their image;
    the processor then gives these and no pixels.

    The rows of candidates carry `prior`, p(e|m), where their lists have one (0 for a candidate that the table of priors
    does not know, and for a gold that was added); a processor that reads it takes a row without as one of prior 0.

    More members are optional:

    - `max_mentions` (`int` or `None`): how many mentions an example may have; more are an error before the work.
    - `encode_images(pixel_values)`: [I, channels, height, width] → [I, d], and `image_features_are_fixed` (`bool`,
      whether training leaves them as they are): whoever scores encodes each image once with it, and sets
      `image_features` on the rows. The processor's `images(list of PIL images)` makes the pixel values.
    - `rank_jointly(scores, features, mask, contexts)`: [M, C], [M, C, d], [M, C], [M] → [M, C], the scores of all
      mentions of each context ranked together, after those of `forward`.
    """

    #: What one example is: `"mention"`, `"context"` (all mentions of one text) or `"document"` (all mentions of one
    #: `document_id`, or where the data have none, of one context). Training batches hold mentions,
    #: `mentions_per_example` of one context (a lone one twice), or whole documents.
    example_unit: str
    #: Whether the score of a pair depends on that pair alone, so that pairs may be scored in any grouping.
    pairs_are_independent: bool

    def forward(self, **pair_inputs: Any) -> Any:
        """Scores of `pair_*` tensors with first axes M, C.

        Returns an output with `scores` [M, C] (-inf where `pair_mask` is False), `features` [M, C, d] if the model has
        `rank_jointly`, and `loss` given `labels` [M] (the column of each mention's gold; -100 if it has none).
        """
        ...

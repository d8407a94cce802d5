"""The contract between the library and a method: what models and processors must offer, and what they may offer.

[`Retriever`], [`Reranker`] and [`MelProcessor`] are required. Every other protocol is an optional ability, which the
library finds with `isinstance`. A method needs no import of hf_mel to fulfil a protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from hf_mel.schema import Row

#: Named tensors that share their first axis: the encodings of M mentions or N entities.
Encodings = Mapping[str, Any]


@runtime_checkable
class MelProcessor(Protocol):
    """Turns rows into tensors. The only part of a method that knows its templates, lengths and image handling."""

    def __call__(
        self,
        mentions: Sequence[Row] | None = None,
        entities: Sequence[Row] | None = None,
        pairs: Sequence[tuple[Row, Sequence[Row]]] | None = None,
        **kwargs: Any,
    ) -> Mapping[str, Any]:
        """Returns the tensors of M mention rows, of N entity rows, or of M mentions with C candidates each.

        Args:
            mentions: M rows; gives tensors named `mention_*` with first axis M.
            entities: N rows; gives tensors named `entity_*` with first axis N. The image of an entity is
                `row["images"][0]`; a caller that wants another image puts it first. A processor that reads several
                images sets `max_entity_images` (see [`images_per_entity`]).
            pairs: M tuples of a mention row and its C candidate rows; gives tensors named `pair_*` with first axes M, C.
        """
        ...


def images_per_entity(processor: Any) -> int | None:
    """Returns how many images of an entity a processor reads: its `max_entity_images`, by default 1; `None` is all."""
    return getattr(processor, "max_entity_images", 1)


def post_columns(processor: Any) -> tuple[str, ...]:
    """Returns the columns of an entity that make the text of the post about itself, for [`KnowsPosts`].

    These are the processor's `entity_columns`, by default name, description and attributes.
    """
    return tuple(getattr(processor, "entity_columns", ("name", "description", "attributes")))


@runtime_checkable
class OpensImages(Protocol):
    """A processor that makes pixel values of images apart from rows, for [`EncodesImages`]."""

    def images(self, images: Sequence[Any]) -> Any:
        """Returns pixel values [I, channels, height, width] of I PIL images, or a mapping that has `pixel_values`."""
        ...


@runtime_checkable
class LocatesTokens(Protocol):
    """A processor that locates its tokens in the text of a mention, for [`Explains`]."""

    def text_spans(self, mentions: Sequence[Row]) -> list[list[tuple[int, int] | None]]:
        """Returns, for each of M mentions, the (start, end) characters of its L tokens; `None` for a special token."""
        ...


@runtime_checkable
class LimitsTexts(Protocol):
    """A processor that reads a limited number of tokens of a text, and tells how many it leaves out.

    Optional attribute: `length_options` (see [`length_options`]).
    """

    def num_left_out(
        self,
        mentions: Sequence[Row] | None = None,
        entities: Sequence[Row] | None = None,
        pairs: Sequence[tuple[Row, Sequence[Row]]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Returns the number of tokens that are left out, for each of M mentions, N entities or all candidates of
        `pairs`. The arguments are those of [`MelProcessor`], of which one is given.
        """
        ...


def length_options(processor: Any) -> tuple[str, ...]:
    """Returns the names of the options that limit a processor's texts: its `length_options`, by default `max_length`."""
    return tuple(getattr(processor, "length_options", ("max_length",)))


@runtime_checkable
class Retriever(Protocol):
    """A model that encodes mentions and entities separately, and scores any pair from their encodings.

    `forward(**mention_tensors, **entity_tensors, labels=None)` returns an output with `loss` (given `labels`),
    `scores` [M, N] and `unit_scores` (a dict of [M, N], one per interaction unit). `labels` [M] holds the column of
    each mention's gold. Several mentions may share a column, so the same entity is never a negative of itself.

    Optional abilities: [`TwoStepScores`], [`TellsWhatToRead`], [`IndexVectors`], [`BoundsScores`], [`Explains`], [`KnowsPosts`], [`FrozenMentions`]. Optional
    attributes: `learns_nil` (see [`learns_nil`]), `entity_token_masks` (see [`entity_token_masks`]) and
    `takes_half_precision` (see [`takes_half_precision`]).
    """

    def encode_mentions(self, **mention_inputs: Any) -> Encodings:
        """Returns the encodings of M mentions: tensors with first axis M."""
        ...

    def encode_entities(self, **entity_inputs: Any) -> Encodings:
        """Returns the encodings of N entities: tensors with first axis N. A knowledge base stores these."""
        ...

    def score(self, mentions: Encodings, entities: Encodings) -> Any:
        """Returns the scores [M, N] of all pairs, higher is better. Both arguments may be plain dicts of tensors."""
        ...

    def unit_scores(self, mentions: Encodings, entities: Encodings) -> dict[str, Any]:
        """Returns the scores [M, N] of every interaction unit by name. Empty if there is one.

        The row of a mention that lacks what a unit reads (its image) may be nan. `score` is the mean of the others, which
        a retriever may weigh, less the NIL score of one that learns it.
        """
        ...


@runtime_checkable
class WrapsTextEncoders(Protocol):
    """The class of a retriever that makes one of a plain text encoder, without training.

    The class of its processor has `from_text_encoder(tokenizer)`.
    """

    def from_text_encoder(self, encoder: Any, pooling: str = "mean") -> Any:
        """Returns a retriever.

        Args:
            encoder (`PreTrainedModel`): A BERT-like text encoder.
            pooling (`str`): "mean" or "cls": the state of a text is the mean of its tokens', or that of its first token.
        """
        ...


def learns_nil(model: Any) -> bool:
    """Returns whether a retriever learns from NIL mentions, which have the label -1 (its attribute of this name).

    Its scores are then above a score of NIL that it has learned for the mention, so their sign means something. The NIL
    score is the same for all entities of a mention, and changes no rank.
    """
    return bool(getattr(model, "learns_nil", False))


def leaves_out_missing_images(model: Any) -> bool | None:
    """Returns whether a missing image has no share in the model's scores (its attribute of this name).

    If `True`, the scores of a mention without an image are those of its text, and no entity gains by having no image. If
    `False`, the scores include those of a blank picture. `None`: the model does not say.
    """
    return getattr(model, "leaves_out_missing_images", None)


def entity_token_masks(model: Any) -> Mapping[str, str]:
    """Returns which encodings of entities have padding that no score reads (the model's attribute of this name).

    It maps the name of an encoding (float [N, L, d]) to that of its mask (bool [N, L], False for padding). A knowledge base
    in few bits leaves that padding out, and gives zeros in its place. Default: none.
    """
    return getattr(model, "entity_token_masks", {})


def takes_half_precision(model: Any) -> bool:
    """Returns whether the `score` of a retriever takes entities in half precision, as a knowledge base stores them (its
    attribute of this name). The scores are float32 all the same. Otherwise ranking converts them before.
    """
    return bool(getattr(model, "takes_half_precision", False))


@runtime_checkable
class TwoStepScores(Protocol):
    """A retriever whose score is a cheap part plus an expensive part, so that ranking can skip most expensive ones.

    Both methods take half precision as it is stored in a knowledge base.
    """

    def quick_scores(self, mentions: Encodings, entities: Encodings) -> Any:
        """Returns the cheap part [M, N] of the scores."""
        ...

    def remaining_scores(self, mentions: Encodings, entities: Encodings, floor: Any) -> Any:
        """Returns the expensive part [M, N]: exact wherever it is at least `floor` [M, N], -inf where it is below."""
        ...


@runtime_checkable
class TellsWhatToRead(Protocol):
    """A retriever of [`TwoStepScores`] that tells from a part of the entities' encodings which of them the second step needs.

    Ranking then reads the others only of these entities, where reading takes time.
    """

    @property
    def pair_bound_encodings(self) -> Sequence[str]:
        """Names of the encodings of entities that `quick_scores` and `may_reach` need; none if all are needed."""
        ...

    def may_reach(self, mentions: Encodings, entities: Encodings, floor: Any) -> Any:
        """Returns a mask [M, N] of pairs: False where `remaining_scores` is surely below `floor` [M, N]."""
        ...


@runtime_checkable
class IndexVectors(Protocol):
    """A retriever with one vector per mention and entity, so that an index can find candidates to score exactly."""

    def query_vectors(self, mentions: Encodings) -> Any:
        """Returns vectors [M, D] (float32) of encoded mentions."""
        ...

    def index_vectors(self, entities: Encodings) -> Any:
        """Returns vectors [N, D] (float32) of encoded entities. Inner products with queries approximate the scores."""
        ...


@runtime_checkable
class BoundsScores(Protocol):
    """A retriever whose scores inner products bound from above, so that a ranking proves what it need not score.

    With q, w and c of a mention, and x and b of an entity, score ≤ ⟨q, x⟩ + ⟨w, b⟩ + c for every pair. Where the score is
    an inner product itself, b is empty and both sides are equal. Check with [`bounds_scores`]. Rounding of float32 sums need not be in the bound.
    """

    def bound_queries(self, mentions: Encodings) -> Any:
        """Returns q [M, D], w [M, R] and c [M] of encoded mentions (float32)."""
        ...

    def bound_vectors(self, entities: Encodings) -> Any:
        """Returns x [N, D] and b [N, R] of encoded entities (float32), which may be in half precision as stored."""
        ...


def bounds_scores(model: Any) -> bool:
    """Returns whether the model is [`BoundsScores`]; its attribute `bounds_scores = False` turns the ability off."""
    return isinstance(model, BoundsScores) and bool(getattr(model, "bounds_scores", True))


@runtime_checkable
class BoundsByProducts(Protocol):
    """A retriever of [`BoundsScores`] whose scores also depend on products in another way than a sum, with a closer bound.

    Each entity has a few vectors with names, and numbers. A mention has K vectors for each of these names, and a state. From
    their inner products, which are known up to a radius, the model bounds what is too much in the bound of [`BoundsScores`].
    Check with [`bounds_by_products`].
    """

    def product_queries(self, mentions: Encodings) -> Any:
        """Returns name → vectors [M, K, D], and states [M, S], of encoded mentions (float32)."""
        ...

    def product_vectors(self, entities: Encodings) -> Any:
        """Returns name → vectors [N, D], and numbers [N, R], of encoded entities (float32), which may be in half precision."""
        ...

    def product_bounds(self, state: Any, products: Mapping[str, tuple[Any, Any]], numbers: Any) -> Any:
        """Returns numbers f [n] that are at most 0 (float32), on the CPU. score ≤ ⟨q, x⟩ + ⟨w, b⟩ + c + f for n entities.

        `state` [S] is that of one mention, and `numbers` [R, n] are those of the entities. `products` has inner products
        [K, n] under each name, and radii [K, n]: no true product is further from the given one. Rounding of float32 is in f.
        """
        ...


def bounds_by_products(model: Any) -> bool:
    """Returns whether the model is [`BoundsByProducts`]; its attribute `bounds_by_products = False` turns the ability off."""
    return (
        bounds_scores(model)
        and isinstance(model, BoundsByProducts)
        and bool(getattr(model, "bounds_by_products", True))
    )


@runtime_checkable
class BoundsPairs(Protocol):
    """A retriever that bounds a score from above by a part of the entity's encodings, so that few entities are read whole."""

    @property
    def pair_bound_encodings(self) -> Sequence[str]:
        """Names of the encodings of entities that the bounds need; none if these bounds are of no use."""
        ...

    def pair_bounds(self, mentions: Encodings, entities: Encodings) -> Any:
        """Returns bounds [M, N] of the scores from those encodings, which may be in half precision as stored.

        A score in float32 may be above its bound by rounding: by 1e-5 of the largest bound.
        """
        ...


@runtime_checkable
class Explains(Protocol):
    """A retriever that shows its attention."""

    def attention(self, **inputs: Any) -> Mapping[str, Any]:
        """Returns the attention of M mentions to N entities.

        Args:
            inputs: Tensors of mentions and entities, as in `forward`.

        Returns:
            Any of `words` [M, N, L] (shares of the L tokens of a mention, which [`LocatesTokens`] locates),
            `mention_patches` [M, h, w] and `entity_patches` [N, h, w].
        """
        ...


@runtime_checkable
class KnowsPosts(Protocol):
    """A retriever that represents an entity by posts about it (IMN). Check with [`knows_posts`].

    Its processor turns `posts=rows` into tensors named `post_*`. The entity rows the processor gets carry `prototypes`:
    modality → float tensor [k', d] of vectors of length 1, the most representative first, with 0 ≤ k' ≤ k.
    [`~hf_mel.inference.features.post_prototypes.PostPrototypes`] selects them.
    """

    @property
    def num_prototypes(self) -> int:
        """The maximal number k of prototypes per entity and modality; 0 turns the ability off."""
        ...

    def encode_posts(self, **post_inputs: Any) -> Mapping[str, Any]:
        """Returns features [P, d] of P posts by modality, and `<modality>_present` [P] (bool): the posts that have it.

        Training must not change the weights these features depend on.
        """
        ...


def knows_posts(model: Any) -> bool:
    """Returns whether the model represents entities by posts ([`KnowsPosts`] with `num_prototypes` above 0)."""
    return isinstance(model, KnowsPosts) and bool(model.num_prototypes)


@runtime_checkable
class FrozenMentions(Protocol):
    """A retriever whose mention encoder is frozen, so that its outputs can be cached during training.

    Its processor takes rows that carry the cached outputs as `features` (name → [s, d], where s differs between rows)
    and turns them into tensors without reading anything else of the row.
    """

    def mention_features(self, **mention_inputs: Any) -> Mapping[str, Any]:
        """Returns encoder outputs [M, S, d] of M mentions by name, and `<name>_mask` [M, S] (bool), False for padding."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """A model that reads a mention and its candidates together (cross-encoder, document model).

    Its processor turns `pairs` (M mentions with up to C candidates each) into tensors with first axes M, C, and always
    gives two more: `pair_mask` [M, C] (bool, False where a mention has no C-th candidate) and `pair_context` [M]
    (int64, equal for the mentions of one context or document).

    Rows of candidates carry `prior`, p(e|m), if their lists have priors. It is 0 for a candidate that the table of
    priors does not hold, and for a gold that was added. A processor that reads `prior` treats a row without it as 0.
    They carry `list_score` if their lists have scores: the score of the retriever less the best of the mention's list, so
    at most 0. An entity that the list does not hold has the lowest score of the list.

    A model that needs `list_score` says so ([`reads_list_scores`]).

    Optional abilities: [`EncodesImages`], [`FitsFeatures`], [`RanksJointly`]. Optional attributes: `max_mentions` (`int` or `None`, the
    maximal number of mentions per example; see [`max_mentions`]) and `mentions_per_example` (`int`, see `example_unit`).
    """

    #: What one example is: `"mention"`, `"context"` (all mentions of one text) or `"document"` (all mentions of one
    #: `document_id`, or of one context if the data has no documents). Training batches hold mentions,
    #: `mentions_per_example` mentions of one context (a single mention is repeated), or whole documents.
    example_unit: str
    #: Whether the score of a pair depends on that pair alone, so that pairs can be batched in any way.
    pairs_are_independent: bool

    def forward(self, **pair_inputs: Any) -> Any:
        """Scores `pair_*` tensors with first axes M, C.

        Returns:
            An output with `scores` [M, C] (-inf where `pair_mask` is False), `features` [M, C, d] for [`RanksJointly`],
            and, given `labels` [M] (the column of each mention's gold; -100 if it has none), `loss`.
        """
        ...


def max_mentions(model: Any) -> int | None:
    """Returns how many mentions an example of a reranker may have (`max_mentions`); `None` if there is no limit."""
    return getattr(model, "max_mentions", None)


def reads_list_scores(model: Any) -> bool:
    """Returns whether a reranker needs the `list_score` of every candidate (its attribute of this name)."""
    return bool(getattr(model, "reads_list_scores", False))


@runtime_checkable
class EncodesImages(Protocol):
    """A reranker that encodes images apart from texts, so that each distinct image is encoded once.

    Its processor is [`OpensImages`]. Rows then carry `image_features` beside their image (a tensor [d], or `None`;
    [k, d] for an entity with k images if the processor reads several), and the processor gives these and no pixels.

    A model whose image encoder is frozen sets `image_features_are_fixed` (see [`image_features_are_fixed`]).
    """

    def encode_images(self, pixel_values: Any) -> Any:
        """Returns the features [I, d] of pixel values [I, channels, height, width]."""
        ...


def image_features_are_fixed(model: Any) -> bool:
    """Returns whether training leaves the model's image features unchanged (its attribute of this name)."""
    return bool(getattr(model, "image_features_are_fixed", False))


@runtime_checkable
class FitsFeatures(Protocol):
    """A reranker that is fitted without gradients. Training calls `fit` once, on the features of all pairs."""

    def pair_features(self, **pair_inputs: Any) -> Any:
        """Returns the features [M, C, d] of `pair_*` tensors with first axes M, C."""
        ...

    def fit(self, features: Any, labels: Any, seed: int = 0) -> None:
        """Fits the model on features [P, d] of P pairs and their labels [P] (bool, True for a mention and its gold).

        Raises:
            ImportError: A package that fits it is not installed; the message names it.
        """
        ...


@runtime_checkable
class RanksJointly(Protocol):
    """A reranker that ranks all mentions of a context together. Check with [`ranks_jointly`]."""

    def rank_jointly(self, scores: Any, features: Any, mask: Any, contexts: Any) -> Any:
        """Returns scores [M, C] of mentions that are ranked together with the other mentions of their context.

        If it has a fifth parameter `entities`, it also gets numbers [M, C], equal for equal entities.

        Args:
            scores (`[M, C]`), features (`[M, C, d]`): Outputs of `forward`.
            mask (`[M, C]`): True for a candidate.
            contexts (`[M]`): Equal for the mentions of one context.
        """
        ...


def ranks_jointly(model: Any) -> bool:
    """Returns whether the model is [`RanksJointly`]; `rank_jointly = None` turns the ability off."""
    return isinstance(model, RanksJointly) and model.rank_jointly is not None


def ranks_jointly_by_default(model: Any) -> bool:
    """Returns whether a model that ranks jointly does so unless asked (its attribute of this name, by default `True`)."""
    return ranks_jointly(model) and bool(getattr(model, "ranks_jointly_by_default", True))

"""Collators that turn rows into training batches: mentions with in-batch negatives, pairs, and pre-training posts."""

from __future__ import annotations

import random
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from hf_mel.data.examples import example_groups
from hf_mel.data.lazy_rows import LazyRow, LazyRows, with_scores
from hf_mel.errors import UnknownEntityError
from hf_mel.inference.entity_sources import part_of
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import images_per_entity, learns_nil
from hf_mel.schema import NIL, Row
from hf_mel.training.augmentation import augmented_image, photographed_image, skip_image
from hf_mel.training.sampling import surface_key
from hf_mel.training.shared_batches import SHARED_SIZES, part_rows

#: Key of a batch under which [`NamesRows`] names its rows. The trainer takes it out.
BATCH_IDS = "batch_ids"

_GOLD_REMEDY = (
    "Train on mentions whose entity is in the knowledge base. NIL mentions are for evaluation, and for a retriever that "
    "learns NIL."
)


class RetrieverCollator:
    """Turns mention rows into the batch of a [`~hf_mel.protocols.Retriever`] with in-batch negatives.

    A batch contains every entity once. Mentions of the same entity share its column, so an entity is never a negative of
    its own mentions. A NIL mention has no column: all entities are its negatives.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): The retriever and its processor. Features that are precomputed
            are used. For a retriever that represents entities by posts, a batch leaves out the posts whose text is the
            text of one of its mentions.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        random_image (`bool`, *optional*, defaults to `True`): Whether to use a random image of an entity instead of the
            first, which evaluation uses. The choice depends on the seed, the entity and the mentions of the batch, so it
            changes between epochs, and a resumed run makes the same choice.
        seed (`int`, *optional*, defaults to 0): Seed of this choice.
        negatives (`Mapping[str, Sequence[str]]`, *optional*): Further entity ids by mention id, which are columns of
            every batch with the mention. A missing mention has none.
        random_negatives (`int`, *optional*, defaults to 0): Number of further entities of every batch, drawn from the
            whole knowledge base. The draw depends on the seed and the mentions of the batch, as that of the images does.
        augment_images (`bool` or `str`, *optional*, defaults to `False`): Whether the images of mentions are changed at
            random ([`~hf_mel.training.augmentation.augmented_image`]); `"strong"` for images that are entities' own
            ([`~hf_mel.training.augmentation.photographed_image`]).
        simulated_nil (`float`, *optional*, defaults to 0.0): Share of the golds of a batch that are left out of it, so that
            their mentions are NIL there. For a model that learns NIL, on data with few or no NIL mentions.
        log_prior (`Mapping[str, float]`, *optional*): Logarithm of how often each entity is a gold, by entity id. The batch
            has it as `entity_log_prior` [U], for a model that corrects for it.

    Attributes:
        part (`tuple[int, int]`): The number of this process and of all processes that share a batch. The trainer sets it.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        entities: datasets.Dataset,
        *,
        random_image: bool = True,
        seed: int = 0,
        negatives: Mapping[str, Sequence[str]] | None = None,
        random_negatives: int = 0,
        augment_images: bool | str = False,
        simulated_nil: float = 0.0,
        log_prior: Mapping[str, float] | None = None,
    ):
        self.inputs, self.random_image, self.seed, self.augment_images = inputs, random_image, seed, augment_images
        self.negatives, self.random_negatives, self.log_prior = negatives or {}, random_negatives, log_prior
        self.simulated_nil, self.part = simulated_nil, (0, 1)
        self.entities = LazyRows(entities)
        self._ids: list[str] = list(entities["entity_id"])
        self._row_of = {entity_id: row for row, entity_id in enumerate(self._ids)}

    def __call__(self, mentions: Sequence[Row]) -> dict[str, Any]:
        """Returns the batch of M mentions, whose golds and negatives are U distinct entities.

        Returns:
            `dict` of the processor's `mention_*` tensors (first axis M) and `entity_*` tensors (first axis U), and
            `labels` [M], the column of each mention's gold, or -1 for NIL. If processes share the batch, the tensors of the
            processor have the rows of this process only, and `shared_sizes` is [M, U].

        Raises:
            UnknownEntityError: a gold is not in the knowledge base, or is NIL and the model does not learn NIL.
        """
        columns: dict[str, int] = {}
        nil_is_learned = learns_nil(self.inputs.model)
        for mention in mentions:
            gold = mention["entity_id"]
            if gold == NIL and nil_is_learned:
                continue
            if gold not in self._row_of:
                raise UnknownEntityError(
                    f"The gold {gold!r} is not in the knowledge base.",
                    row=mention.get("mention_id"),
                    remedy=_GOLD_REMEDY,
                )
            columns.setdefault(gold, len(columns))
        mention_ids = " ".join(str(mention.get("mention_id")) for mention in mentions)
        left_out = self._draw_left_out(columns, mention_ids)
        columns = {
            entity_id: number for number, entity_id in enumerate(each for each in columns if each not in left_out)
        }
        for mention in mentions:
            for entity_id in self.negatives.get(mention["mention_id"], ()):
                if entity_id not in left_out:
                    columns.setdefault(entity_id, len(columns))
        for entity_id in self._draw_entities({**columns, **left_out}, mention_ids):
            columns[entity_id] = len(columns)
        chosen = part_rows([self._row_of[entity_id] for entity_id in columns], self.part)
        entities: Sequence[Row] = self.entities.__getitems__(list(chosen))
        if self.random_image and self.inputs.prototypes is None:
            entities = [self._with_random_image(entity, mention_ids) for entity in entities]  # type: ignore[arg-type]
        entities = self.inputs.entity_rows(entities, without=[mention["text"] for mention in mentions])
        processor, rows = self.inputs.processor, self.inputs.mention_rows(part_rows(mentions, self.part))
        if self.augment_images:
            rows = self._with_changed_images(rows, mentions, mention_ids)
        batch = {**processor(mentions=rows), **processor(entities=entities)}
        if self.log_prior is not None:
            batch["entity_log_prior"] = torch.tensor([self.log_prior[entity_id] for entity_id in columns])
        if self.part[1] > 1:
            batch[SHARED_SIZES] = torch.tensor([len(mentions), len(columns)])
        return {**batch, "labels": torch.tensor([columns.get(mention["entity_id"], -1) for mention in mentions])}

    def _with_changed_images(self, rows: Sequence[Row], mentions: Sequence[Row], mention_ids: str) -> list[Row]:
        """Changes the images of this process's rows as if it changed those of all mentions of the batch."""
        draw, strong = random.Random(f"{self.seed} images {mention_ids}"), self.augment_images == "strong"
        change = photographed_image if strong else augmented_image
        for mention in mentions[: part_of(len(mentions), *self.part).start]:
            read = mention.undecoded if isinstance(mention, LazyRow) else mention.__getitem__
            if read("image") is not None:
                skip_image(draw, strong)
        return [
            row if row["image"] is None else ChainMap({"image": change(row["image"], draw)}, row)  # type: ignore[arg-type]
            for row in rows
        ]

    def _draw_left_out(self, golds: Collection[str], mention_ids: str) -> dict[str, None]:
        """Draws the golds whose mentions are NIL in this batch, but never all, so that a batch has entities."""
        if not self.simulated_nil:
            return {}
        draw = random.Random(f"{self.seed} NIL {mention_ids}")
        return dict.fromkeys([gold for gold in golds if draw.random() < self.simulated_nil][: len(golds) - 1])

    def _draw_entities(self, taken: Collection[str], mention_ids: str) -> list[str]:
        """Draws `random_negatives` entities that are not taken, or all if they are fewer. No batch is without entities."""
        count = min(self.random_negatives or int(not taken), len(self._ids) - len(taken))
        draw = random.Random(f"{self.seed} {mention_ids}")
        # So many that enough are left, and no more, so that a knowledge base of millions is not gone through.
        drawn = draw.sample(range(len(self._ids)), min(count + len(taken), len(self._ids))) if count else []
        return [self._ids[row] for row in drawn if self._ids[row] not in taken][:count]

    def _with_random_image(self, entity: LazyRow, mention_ids: str) -> LazyRow:
        count = len(entity.undecoded("images") or ())
        if count < 2:
            return entity
        draw = random.Random(f"{self.seed} {entity['entity_id']} {mention_ids}")
        return entity.with_image("images", draw.randrange(count))


class NamesRows:
    """A collator that also names the rows of its batches, under [`BATCH_IDS`].

    Args:
        collator: Turns rows, or lists of rows, into a batch.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Returns the batch of the collator, and the ids of its mentions or posts."""
        examples = (row if isinstance(row, list) else [row] for row in rows)
        return {**self.collator(rows), BATCH_IDS: [row["mention_id"] for example in examples for row in example]}


class Examples(Dataset):
    """Mentions grouped into training examples, for a `DataLoader` with a [`PairCollator`]. An item is a list of rows.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        unit (`str`): Unit of an example: a "mention", or all mentions of a "context" or a "document"
            ([`~hf_mel.data.examples.example_groups`]).
        max_mentions (`int`, *optional*): Maximum number of mentions in an example.

    Raises:
        DataFormatError: an example has more than `max_mentions` mentions.
    """

    def __init__(self, mentions: datasets.Dataset, unit: str, max_mentions: int | None = None):
        self.rows = LazyRows(mentions)
        self._groups = example_groups(mentions, unit, max_mentions)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> list[LazyRow]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[LazyRow]]:
        """Returns the examples of one batch, in the order of `indices`."""
        rows = iter(self.rows.__getitems__([row for index in indices for row in self._groups[index]]))
        return [[next(rows) for _ in self._groups[index]] for index in indices]


class PairCollator:
    """Turns training examples into the batch of a [`~hf_mel.protocols.Reranker`].

    A mention comes with its gold and `num_negatives` other entities. Negatives are drawn from the mention's candidates,
    and from the whole knowledge base if these are too few; without `fill_short_lists`, the list is then shorter, as in
    evaluation. No gold of an example is a negative in it, and no negative occurs in it twice. The gold's position is random, so only `labels` reveals it. With `context_golds`, the golds of
    the other mentions of its context are further negatives of a mention.

    In a "document", candidates of one mention are evidence for the others. Each mention has a separate list, as in
    evaluation, so the gold of one mention can be a negative of another. With as many negatives as the lists have other
    candidates, training sees whole lists.

    All draws depend only on seed, epoch and ids. They change between epochs, and they are the same in a resumed run and
    on any number of processes.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): The reranker and its processor. Precomputed image features are
            used.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        candidates (`Mapping[str, Sequence[str]]`): Entity ids by mention id. A missing mention has no candidates.
        priors (`Mapping[str, Mapping[str, float]]`, *optional*): p(e|m) by mention id and entity id. If given, every
            candidate row, gold or negative, has a `prior`, which is 0 for a pair without one.
        list_scores (`Mapping[str, Mapping[str, float]]`, *optional*): Scores of the candidates by mention id and entity id,
            at most 0 ([`~hf_mel.candidates.lists.CandidateLists.relative_scores`]). If given, every candidate row has a
            `list_score`; an entity that is not in the list of its mention has the lowest.
        num_negatives (`int`, *optional*, defaults to 1): Negatives of each mention. A tiny knowledge base gives fewer.
        hard_negatives (`int`, *optional*, defaults to 0): How many of the negatives are the first of the other candidates.
            The rest is drawn.
        context_golds (`Mapping[str, Sequence[str]]`, *optional*): Golds by context id. If given, those of the other
            mentions of its context are negatives of a mention, beside the `num_negatives`.
        negatives_from (`int`, *optional*): Draw negatives from this many of the other candidates, counted from the start
            of the list. `None`: all other candidates.
        fill_short_lists (`bool`, *optional*, defaults to `True`): Whether random entities are negatives of a mention with
            fewer than `num_negatives` other candidates. A mention whose only candidate is its gold has no negative without.
        unit (`str`, *optional*, defaults to `"mention"`): The model's `example_unit`. From a "context",
            `mentions_per_example` mentions are drawn, with repetition if it has fewer. A "document" gives all mentions.
        mentions_per_example (`int`, *optional*, defaults to 1): Number of mentions to draw from a "context".
        random_image (`bool`, *optional*, defaults to `True`): Whether to use a random image of an entity. A processor
            that reads several images (`max_entity_images`) gets all of them.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.

    Attributes:
        epoch (`int`): The epoch. The trainer sets it.
        part (`tuple[int, int]`): The number of this process and of all processes that share a batch. The trainer sets it.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        entities: datasets.Dataset,
        candidates: Mapping[str, Sequence[str]],
        *,
        priors: Mapping[str, Mapping[str, float]] | None = None,
        list_scores: Mapping[str, Mapping[str, float]] | None = None,
        num_negatives: int = 1,
        hard_negatives: int = 0,
        negatives_from: int | None = None,
        context_golds: Mapping[str, Sequence[str]] | None = None,
        fill_short_lists: bool = True,
        unit: str = "mention",
        mentions_per_example: int = 1,
        random_image: bool = True,
        seed: int = 0,
    ):
        if num_negatives < 1:
            raise ValueError(f"num_negatives={num_negatives} must be at least 1.")
        self.inputs, self.candidates, self.priors, self.list_scores = inputs, candidates, priors, list_scores
        self.num_negatives, self.hard_negatives, self.negatives_from = num_negatives, hard_negatives, negatives_from
        self.context_golds, self.fill_short_lists = context_golds or {}, fill_short_lists
        self.unit, self.mentions_per_example = unit, mentions_per_example
        self.random_image, self.seed, self.epoch, self.part = random_image, seed, 0, (0, 1)
        self.entities = LazyRows(entities)
        self._ids: list[str] = list(entities["entity_id"])
        self._row_of = {entity_id: row for row, entity_id in enumerate(self._ids)}

    def __call__(self, examples: Sequence[Sequence[Row]]) -> dict[str, Any]:
        """Returns the batch of M mentions.

        Args:
            examples (sequence of sequences of rows): The mentions of each example.

        Returns:
            `dict` of the processor's `pair_*` tensors (first axes M and C = 1 + negatives), with the mentions of one
            example side by side, and `labels` [M], the column of each mention's gold. If processes share the batch, M are
            the mentions of this process's examples, and `shared_sizes` says how many count, and how many there are in all.

        Raises:
            UnknownEntityError: a gold or a candidate is not in the knowledge base; names the mention.
        """
        mentions: list[Row] = []
        lists: list[list[int]] = []
        labels: list[int] = []
        draws: list[random.Random] = []
        for example in part_rows(examples, self.part):
            draw = random.Random(f"{self.seed} {self.epoch} {example[0]['mention_id']}")
            drawn_mentions = self._draw_mentions(example, draw)
            excluded = {self._find_row(mention["entity_id"], mention, "gold") for mention in drawn_mentions}
            for mention in drawn_mentions:
                gold = self._row_of[mention["entity_id"]]
                if self.unit == "document":
                    excluded = {gold}
                # Golds of other mentions are no other mention's drawn negatives, as eq. 11 of MMEL asks.
                others = self._golds_of_context(mention) - {gold}
                drawn = self._draw_negatives(mention, excluded | others, draw)
                excluded |= set(drawn)
                negatives = [*sorted(others), *drawn]
                position = draw.randint(0, len(negatives))
                mentions.append(mention)
                lists.append([*negatives[:position], gold, *negatives[position:]])
                labels.append(position)
                draws.append(draw)
        distinct = list(dict.fromkeys(row for rows in lists for row in rows))
        entity_of = dict(zip(distinct, self.entities.__getitems__(distinct), strict=True))
        entities: list[Row] = [
            _with_drawn_image(entity_of[row], self.inputs.processor, draw, self.random_image)
            for rows, draw in zip(lists, draws, strict=True)
            for row in rows
        ]
        mentions, entities = self.inputs.mention_rows(mentions), self.inputs.entity_rows(entities)
        numbers = [
            (mention["mention_id"], self._ids[row])
            for mention, rows in zip(mentions, lists, strict=True)
            for row in rows
        ]
        if self.priors is not None or self.list_scores is not None:
            entities = [
                with_scores(entity, self._prior(*number), self._list_score(*number))
                for entity, number in zip(entities, numbers, strict=True)
            ]
        remaining = iter(entities)
        pairs = [(mention, [next(remaining) for _ in rows]) for mention, rows in zip(mentions, lists, strict=True)]
        batch = {**self.inputs.processor(pairs=pairs), "labels": torch.tensor(labels)}
        if self.part[1] > 1:
            # A process without an example of its own takes one that does not count.
            counted = len(mentions) if len(part_of(len(examples), *self.part)) else 0
            batch[SHARED_SIZES] = torch.tensor([counted, sum(map(self._num_mentions, examples))])
        return batch

    def _num_mentions(self, example: Sequence[Row]) -> int:
        return self.mentions_per_example if self.unit == "context" else len(example)

    def _prior(self, mention_id: str, entity_id: str) -> float | None:
        return None if self.priors is None else self.priors.get(mention_id, {}).get(entity_id, 0.0)

    def _list_score(self, mention_id: str, entity_id: str) -> float | None:
        if self.list_scores is None:
            return None
        scores = self.list_scores.get(mention_id, {})
        return scores[entity_id] if entity_id in scores else min(scores.values(), default=0.0)

    def _golds_of_context(self, mention: Row) -> set[int]:
        """Returns the rows of the golds of a mention's context, which are its negatives but for its gold."""
        return {self._row_of[entity_id] for entity_id in self.context_golds.get(mention["context_id"], ())}

    def _draw_mentions(self, example: Sequence[Row], draw: random.Random) -> list[Row]:
        if self.unit != "context":
            return list(example)
        count = self.mentions_per_example
        if len(example) >= count:
            return draw.sample(list(example), count)
        return [example[k % len(example)] for k in range(count)]

    def _find_row(self, entity_id: str, mention: Row, role: str) -> int:
        """Returns the row of an entity, which is the "gold" or a "candidate" of a mention."""
        if entity_id not in self._row_of:
            raise UnknownEntityError(
                f"The {role} {entity_id!r} is not in the knowledge base.",
                row=mention.get("mention_id"),
                remedy=_GOLD_REMEDY if role == "gold" else "Make the candidates from this knowledge base.",
            )
        return self._row_of[entity_id]

    def _draw_negatives(self, mention: Row, excluded: set[int], draw: random.Random) -> list[int]:
        """Draws the rows of a mention's negatives, from its candidates first."""
        ids = self.candidates.get(mention["mention_id"], ())
        rows = dict.fromkeys(self._find_row(entity_id, mention, "candidate") for entity_id in ids)
        eligible = [row for row in rows if row not in excluded][: self.negatives_from]
        negatives = eligible[: min(self.hard_negatives, self.num_negatives)]
        eligible = eligible[len(negatives) :]
        negatives += draw.sample(eligible, min(self.num_negatives - len(negatives), len(eligible)))
        if not self.fill_short_lists:
            return negatives
        num_missing = min(self.num_negatives, len(self._ids) - len(excluded)) - len(negatives)
        while num_missing > 0:
            row = draw.randrange(len(self._ids))
            if row not in excluded and row not in negatives:
                negatives.append(row)
                num_missing -= 1
        return negatives


class PretrainingCollator:
    """Turns posts into a pre-training batch.

    With probability 1/2, the partner of a post is the post itself. Otherwise it is a post of the batch about another
    entity, or the post itself if the batch has none. With `same_surface`, partners whose mention ends in the same word are
    preferred, as entities with similar names in a knowledge base (IMN, section 3.2). All draws depend only on seed, epoch
    and ids.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): The pre-training model and its processor, which accepts `posts`,
            `entities` and `partners`. Precomputed image features are used.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        random_image (`bool`, *optional*, defaults to `True`): Whether to use a random image of an entity. A processor
            that reads several images (`max_entity_images`) gets all of them.
        same_surface (`bool`, *optional*, defaults to `False`): Whether to prefer partners with the same last word.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.

    Attributes:
        epoch (`int`): The epoch. The trainer sets it.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        entities: datasets.Dataset,
        *,
        random_image: bool = True,
        same_surface: bool = False,
        seed: int = 0,
    ):
        self.inputs, self.random_image = inputs, random_image
        self.same_surface, self.seed, self.epoch = same_surface, seed, 0
        self.entities = LazyRows(entities)
        self._row_of = {entity_id: row for row, entity_id in enumerate(entities["entity_id"])}

    def __call__(self, posts: Sequence[Row]) -> dict[str, Any]:
        """Returns the processor's tensors of P posts, their entities and their partners.

        Raises:
            UnknownEntityError: the entity of a post is not in the knowledge base; names the post.
        """
        entity_ids = [post["entity_id"] for post in posts]
        for post, entity_id in zip(posts, entity_ids, strict=True):
            if entity_id not in self._row_of:
                raise UnknownEntityError(
                    f"The entity {entity_id!r} of a post is not in the knowledge base.",
                    row=post.get("mention_id"),
                    remedy="Pre-train on posts about entities of the knowledge base.",
                )
        entities: list[Row] = []
        partners: list[int] = []
        rows = self.entities.__getitems__([self._row_of[entity_id] for entity_id in entity_ids])
        surfaces = [surface_key(post["mention"]) for post in posts] if self.same_surface else []
        for number, (post, entity_id, entity) in enumerate(zip(posts, entity_ids, rows, strict=True)):
            draw = random.Random(f"{self.seed} {self.epoch} {post['mention_id']}")
            others = [k for k, other in enumerate(entity_ids) if other != entity_id] if draw.random() < 0.5 else []
            if self.same_surface:
                others = [k for k in others if surfaces[k] == surfaces[number]] or others
            partners.append(draw.choice(others) if others else number)
            entities.append(_with_drawn_image(entity, self.inputs.processor, draw, self.random_image))
        batch = {"posts": self.inputs.mention_rows(posts), "entities": self.inputs.entity_rows(entities)}
        return dict(self.inputs.processor(**batch, partners=partners))


def _with_drawn_image(entity: LazyRow, processor: Any, draw: random.Random, random_image: bool) -> LazyRow:
    """Reduces an entity with several images to one, random or first, unless the processor reads several."""
    images = entity.undecoded("images") or ()
    if len(images) < 2 or images_per_entity(processor) != 1:
        return entity
    return entity.with_image("images", draw.randrange(len(images)) if random_image else 0)

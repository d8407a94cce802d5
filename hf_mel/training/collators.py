"""Training batches for retrievers: mentions, the entities they mean, and who means whom."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from hf_mel.data.examples import example_groups
from hf_mel.data.lazy_rows import LazyRow, LazyRows, with_prior
from hf_mel.errors import UnknownEntityError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import images_per_entity
from hf_mel.schema import Row


class RetrieverCollator:
    """Turns mention rows into the batch of a [`~hf_mel.protocols.Retriever`] with in-batch negatives.

    Every entity stands in the batch once: mentions of one entity share its column, so that it is never their negative.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A reranker and its processor. Precomputed image features are
            used.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        random_image (`bool`, *optional*, defaults to `True`): Whether an entity shows a random one of its images
            instead of the first, which is the one evaluation uses. The choice is a function of the seed, the entity
            and the mentions it meets, so it changes from epoch to epoch and comes out the same in a resumed run.
        seed (`int`, *optional*, defaults to 0): Seed of that choice.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        entities: datasets.Dataset,
        *,
        random_image: bool = True,
        seed: int = 0,
    ):
        self.inputs, self.random_image, self.seed = inputs, random_image, seed
        self.entities = LazyRows(entities)
        self._row_of = {entity_id: row for row, entity_id in enumerate(entities["entity_id"])}

    def __call__(self, mentions: Sequence[Row]) -> dict[str, Any]:
        """The batch of M mentions, whose golds are U entities.

        Returns:
            `dict` of the processor's `mention_*` tensors (first axis M) and `entity_*` tensors (first axis U), and
            `labels` [M]: the column of each mention's gold.

        Raises:
            UnknownEntityError: a gold is not in the knowledge base, or is NIL.
        """
        columns: dict[str, int] = {}
        for mention in mentions:
            gold = mention["entity_id"]
            if gold not in self._row_of:
                raise UnknownEntityError(
                    f"the gold {gold!r} is not in the knowledge base.",
                    row=mention.get("mention_id"),
                    remedy="Train on mentions whose entity is in it; NIL mentions are for evaluation.",
                )
            columns.setdefault(gold, len(columns))
        entities: Sequence[Row] = self.entities.__getitems__([self._row_of[gold] for gold in columns])
        if self.random_image and self.inputs.prototypes is None:
            met = " ".join(str(mention.get("mention_id")) for mention in mentions)
            entities = [self._with_random_image(entity, met) for entity in entities]  # type: ignore[arg-type]
        entities = self.inputs.entity_rows(entities, without=[mention["text"] for mention in mentions])
        processor = self.inputs.processor
        batch = {**processor(mentions=self.inputs.mention_rows(mentions)), **processor(entities=entities)}
        return {**batch, "labels": torch.tensor([columns[mention["entity_id"]] for mention in mentions])}

    def _with_random_image(self, entity: LazyRow, met: str) -> LazyRow:
        count = len(entity.undecoded("images") or ())
        if count < 2:
            return entity
        return entity.with_image("images", random.Random(f"{self.seed} {entity['entity_id']} {met}").randrange(count))


class Examples(Dataset):
    """Mentions by training example: item i is the list of its rows, for a `DataLoader` with a [`PairCollator`].

    Args:
        mentions (`datasets.Dataset`): M mentions.
        unit (`str`): What one example is: a "mention", or all mentions of a "context" or a "document", as
            [`~hf_mel.data.examples.example_groups`] has it.
        most (`int`, *optional*): Mentions that an example may have.

    Raises:
        DataFormatError: an example has more.
    """

    def __init__(self, mentions: datasets.Dataset, unit: str, most: int | None = None):
        self.rows = LazyRows(mentions)
        self._groups = example_groups(mentions, unit, most)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> list[LazyRow]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[list[LazyRow]]:
        """The examples of one batch, in the order asked for."""
        rows = iter(self.rows.__getitems__([row for index in indices for row in self._groups[index]]))
        return [[next(rows) for _ in self._groups[index]] for index in indices]


class PairCollator:
    """Turns training examples into the batch of a [`~hf_mel.protocols.Reranker`].

    Every mention stands beside its gold and `num_negatives` others: drawn from its candidates, and from the whole
    knowledge base where these are too few. No gold of the example is a negative in it, and no negative occurs in it
    twice. Where the gold stands is drawn too, so that only `labels` tell.

    In a "document", whose mentions are linked by what their candidates have in common, each mention has a list of its
    own as in evaluation: what one mention means may be a negative of another. With as many negatives as the lists have
    other candidates, they are whole.

    All draws are a function of seed, epoch and ids, so they change from epoch to epoch and come out the same in a
    resumed run, on any number of processes.

    Args:
        processor ([`~hf_mel.protocols.MelProcessor`]): Turns pairs into tensors.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        candidates (`Mapping[str, Sequence[str]]`): Entity ids by mention id; a mention that is not there has none.
        priors (`Mapping[str, Mapping[str, float]]`, *optional*): p(e|m) by mention id and entity id: every candidate row,
            gold or negative, then carries its `prior`, 0 where there is none.
        num_negatives (`int`, *optional*, defaults to 1): Negatives of each mention; fewer in a tiny knowledge base.
        negatives_from (`int`, *optional*): Draw negatives from the first so many of the other candidates, which are the
            hardest where a list has the best first. `None`: from all of them.
        unit (`str`, *optional*, defaults to `"mention"`): The model's `example_unit`. Of a "context",
            `mentions_per_example` mentions are drawn, a lone mention over and over; of a "document" come all.
        mentions_per_example (`int`, *optional*, defaults to 1): See above.
        random_image (`bool`, *optional*, defaults to `True`): Whether an entity shows a random one of its images. A
            processor that reads several (`max_entity_images`) gets them all.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.

    Attributes:
        epoch (`int`): The epoch, which whoever trains sets.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        entities: datasets.Dataset,
        candidates: Mapping[str, Sequence[str]],
        *,
        priors: Mapping[str, Mapping[str, float]] | None = None,
        num_negatives: int = 1,
        negatives_from: int | None = None,
        unit: str = "mention",
        mentions_per_example: int = 1,
        random_image: bool = True,
        seed: int = 0,
    ):
        if num_negatives < 1:
            raise ValueError(f"num_negatives={num_negatives} must be at least 1.")
        self.inputs, self.candidates, self.num_negatives = inputs, candidates, num_negatives
        self.priors = priors
        self.negatives_from = negatives_from
        self.unit, self.mentions_per_example = unit, mentions_per_example
        self.random_image, self.seed, self.epoch = random_image, seed, 0
        self.entities = LazyRows(entities)
        self._ids: list[str] = list(entities["entity_id"])
        self._row_of = {entity_id: row for row, entity_id in enumerate(self._ids)}

    def __call__(self, examples: Sequence[Sequence[Row]]) -> dict[str, Any]:
        """The batch of M mentions.

        Args:
            examples: the mention rows of each example.

        Returns:
            `dict` of the processor's `pair_*` tensors (first axes M and C = 1 + negatives), the mentions of one example
            side by side, and `labels` [M]: the column of each mention's gold.

        Raises:
            UnknownEntityError: a gold or a candidate is not in the knowledge base; names the mention.
        """
        mentions: list[Row] = []
        lists: list[list[int]] = []
        labels: list[int] = []
        draws: list[random.Random] = []
        for example in examples:
            draw = random.Random(f"{self.seed} {self.epoch} {example[0]['mention_id']}")
            chosen = self._chosen(example, draw)
            taken = {self._row(mention["entity_id"], mention, "gold") for mention in chosen}
            for mention in chosen:
                if self.unit == "document":
                    taken = {self._row_of[mention["entity_id"]]}
                negatives = self._negatives(mention, taken, draw)
                taken |= set(negatives)
                place = draw.randint(0, len(negatives))
                mentions.append(mention)
                lists.append([*negatives[:place], self._row_of[mention["entity_id"]], *negatives[place:]])
                labels.append(place)
                draws.append(draw)
        wanted = list(dict.fromkeys(row for rows in lists for row in rows))
        stored = dict(zip(wanted, self.entities.__getitems__(wanted), strict=True))
        entities: list[Row] = [
            self._shown(stored[row], draw) for rows, draw in zip(lists, draws, strict=True) for row in rows
        ]
        mentions, entities = self.inputs.mention_rows(mentions), self.inputs.entity_rows(entities)
        if self.priors is not None:
            listed = ((mention, row) for mention, rows in zip(mentions, lists, strict=True) for row in rows)
            entities = [
                with_prior(entity, self.priors.get(mention["mention_id"], {}).get(self._ids[row], 0.0))
                for entity, (mention, row) in zip(entities, listed, strict=True)
            ]
        rest = iter(entities)
        pairs = [(mention, [next(rest) for _ in rows]) for mention, rows in zip(mentions, lists, strict=True)]
        return {**self.inputs.processor(pairs=pairs), "labels": torch.tensor(labels)}

    def _chosen(self, example: Sequence[Row], draw: random.Random) -> list[Row]:
        if self.unit != "context":
            return list(example)
        count = self.mentions_per_example
        if len(example) >= count:
            return draw.sample(list(example), count)
        return [example[k % len(example)] for k in range(count)]

    def _row(self, entity_id: str, mention: Row, what: str) -> int:
        if entity_id not in self._row_of:
            raise UnknownEntityError(
                f"the {what} {entity_id!r} is not in the knowledge base.",
                row=mention.get("mention_id"),
                remedy="Train on mentions whose entity is in it; NIL mentions are for evaluation."
                if what == "gold"
                else "Make the candidates from this knowledge base.",
            )
        return self._row_of[entity_id]

    def _negatives(self, mention: Row, taken: set[int], draw: random.Random) -> list[int]:
        listed = self.candidates.get(mention["mention_id"], ())
        free = [
            row for row in dict.fromkeys(self._row(each, mention, "candidate") for each in listed) if row not in taken
        ][: self.negatives_from]
        negatives = draw.sample(free, min(self.num_negatives, len(free)))
        missing = min(self.num_negatives, len(self._ids) - len(taken)) - len(negatives)
        while missing > 0:
            row = draw.randrange(len(self._ids))
            if row not in taken and row not in negatives:
                negatives.append(row)
                missing -= 1
        return negatives

    def _shown(self, entity: LazyRow, draw: random.Random) -> LazyRow:
        images = entity.undecoded("images") or ()
        if len(images) < 2 or images_per_entity(self.inputs.processor) != 1:
            return entity
        return entity.with_image("images", draw.randrange(len(images)) if self.random_image else 0)

"""Training batches for retrievers: mentions, the entities they mean, and who means whom."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from hf_mel.data.images import open_image
from hf_mel.errors import UnknownEntityError
from hf_mel.schema import MelProcessor, Row


class LazyRow(Mapping[str, Any]):
    """A row of a data set whose images are decoded when they are looked at, so that a text model never pays for them.

    Args:
        values: the row with its images as `datasets` stores them.
        features: the columns of the data set.
    """

    def __init__(self, values: dict[str, Any], features: datasets.Features):
        self._values, self._features = values, features

    def __getitem__(self, column: str) -> Any:
        value, feature = self._values[column], self._features[column]
        if isinstance(feature, datasets.Image):
            return self._decode(value)
        if isinstance(getattr(feature, "feature", None), datasets.Image):
            return [self._decode(image) for image in value or ()]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def with_image(self, column: str, index: int) -> LazyRow:
        """The same row with only one image, number `index`, in the list `column`."""
        return LazyRow({**self._values, column: [self._values[column][index]]}, self._features)

    def first_images(self, column: str, count: int | None) -> LazyRow:
        """The same row with the first `count` images of the list `column`; `None` keeps all."""
        return LazyRow({**self._values, column: (self._values[column] or [])[:count]}, self._features)

    def stored(self, column: str) -> Any:
        """The value of a column with its images undecoded."""
        return self._values[column]

    def _decode(self, image: dict[str, Any] | None) -> Any:
        if image is None:
            return None
        key = next((name for name in ("mention_id", "post_id", "entity_id") if name in self._values), None)
        return open_image(image, row=self._values[key] if key else None)


class LazyRows(Dataset):
    """Rows of a data set as [`LazyRow`]s, for a `DataLoader`.

    Args:
        dataset (`datasets.Dataset`): M rows.
    """

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset
        self._stored = dataset.with_format("arrow")  # plain formatting would decode every image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> LazyRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[LazyRow]:
        """The rows of one batch, in the order asked for."""
        return [LazyRow(values, self.dataset.features) for values in self._stored[indices].to_pylist()]


def images_per_entity(processor: Any) -> int | None:
    """How many images of an entity the processor reads, `None` for all: its `max_entity_images`, else one."""
    return getattr(processor, "max_entity_images", 1)


class RetrieverCollator:
    """Turns mention rows into the batch of a [`~hf_mel.schema.Retriever`] with in-batch negatives.

    Every entity stands in the batch once: mentions of one entity share its column, so that it is never their negative.

    Args:
        processor ([`~hf_mel.schema.MelProcessor`]): Turns rows into tensors.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        random_image (`bool`, *optional*, defaults to `True`): Whether an entity shows a random one of its images
            instead of the first, which is the one evaluation uses. The choice is a function of the seed, the entity
            and the mentions it meets, so it changes from epoch to epoch and comes out the same in a resumed run.
        with_features (`Callable`, *optional*): Rows of mentions → the rows with `features`; for a model that reads a
            mention the same way throughout training.
        with_prototypes (`Callable`, *optional*): Rows of entities, texts → the rows with `prototypes`, none of which is a
            post of one of these texts; for a model that knows entities by posts.
        seed (`int`, *optional*, defaults to 0): Seed of that choice.
    """

    def __init__(
        self,
        processor: MelProcessor,
        entities: datasets.Dataset,
        *,
        random_image: bool = True,
        with_features: Callable[[Sequence[Row]], Sequence[Row]] | None = None,
        with_prototypes: Callable[[Sequence[Row], Collection[str]], Sequence[Row]] | None = None,
        seed: int = 0,
    ):
        self.processor, self.random_image, self.seed = processor, random_image, seed
        self.with_features, self.with_prototypes = with_features, with_prototypes
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
        if self.with_prototypes is not None:
            entities = self.with_prototypes(entities, [mention["text"] for mention in mentions])
        elif self.random_image:
            met = " ".join(str(mention.get("mention_id")) for mention in mentions)
            entities = [self._with_random_image(entity, met) for entity in entities]  # type: ignore[arg-type]
        read = mentions if self.with_features is None else self.with_features(mentions)
        batch = {**self.processor(mentions=read), **self.processor(entities=entities)}
        return {**batch, "labels": torch.tensor([columns[mention["entity_id"]] for mention in mentions])}

    def _with_random_image(self, entity: LazyRow, met: str) -> LazyRow:
        count = len(entity.stored("images") or ())
        if count < 2:
            return entity
        return entity.with_image("images", random.Random(f"{self.seed} {entity['entity_id']} {met}").randrange(count))


def model_inputs(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a processor gave, on the model's device, and floating-point tensors in its type."""
    device, dtype = getattr(model, "device", "cpu"), getattr(model, "dtype", torch.float32)
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()}

"""Knowledge prototypes: an entity as the features of its most representative posts (IMN, section 3.3)."""

from __future__ import annotations

import hashlib
import os
from collections import ChainMap, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.posts import SOURCE, entity_as_post, posts_of
from hf_mel.errors import DataFormatError, RecipeError, UnknownSplitError
from hf_mel.inference.features.pagerank import SELECTIONS, check_features, random_posts, select_posts
from hf_mel.inference.inputs import model_inputs
from hf_mel.protocols import MelProcessor
from hf_mel.row_files import ROW_SUFFIXES
from hf_mel.schema import Row

#: Posts whose features are in memory together while prototypes are chosen and kept.
_CHUNK_POSTS = 8192
#: What the name of a modality is followed by, in what a model says of posts that lack it.
_PRESENT = "_present"


@dataclass
class _Chosen:
    """The best posts of one entity in one modality.

    Args:
        posts (`list[int]`): Their numbers, the best first.
        vectors (`torch.Tensor` `[len(posts), d]`): Their features, each of length 1.
        own (`torch.Tensor` `[0 or 1, d]`): Those of the entity as a post about itself, if that has this modality.
    """

    posts: list[int]
    vectors: torch.Tensor
    own: torch.Tensor


class Prototypes:
    """The prototypes of entities, for a model that knows them by posts ([`~hf_mel.protocols.Retriever`]).

    For every modality of `model.encode_posts`, an entity's prototypes are the features, of length 1, of the k posts with
    the highest PageRank among its posts that have the modality (`k`: `model.num_prototypes`); all of them if there are
    fewer, none if no post has it. An entity without posts is a post about itself: its name, description and attributes,
    and its first image.

    Two fields of the model's configuration, where it has them, say otherwise:

    - `prototype_selection`: "random" chooses k posts at random, the same for one entity in every run (Figure 4).
    - `entity_prototype`: the entity as a post about itself is always the first prototype, before k - 1 others. Not in
      the paper, whose entities are accounts; it is for posts that do not say the name, such as captions.

    Args:
        model ([`~hf_mel.protocols.Retriever`]): Offers `encode_posts` and `num_prototypes`. Its features are those of the
            weights it has when posts are encoded.
        processor ([`~hf_mel.protocols.MelProcessor`]): Takes `posts`.
        posts (`datasets.Dataset`, *optional*): P rows of [`~hf_mel.schema.post_features`]; those about entities that
            nobody asks for are not encoded.
        batch_size (`int`): Posts per forward pass.

    Raises:
        RecipeError: the configuration asks for a selection there is not.
    """

    def __init__(
        self, model: Any, processor: MelProcessor, posts: datasets.Dataset | None = None, *, batch_size: int = 64
    ):
        config = getattr(model, "config", None)
        self.model, self.processor, self.posts, self.batch_size = model, processor, posts, batch_size
        self.k: int = model.num_prototypes
        self.selection: str = getattr(config, "prototype_selection", None) or SELECTIONS[0]
        self.with_entity: bool = bool(getattr(config, "entity_prototype", None))
        if self.selection not in SELECTIONS:
            raise RecipeError(f"prototype_selection={self.selection!r} is not one of {', '.join(SELECTIONS)}.")
        self._posts_of: dict[str, list[int]] = defaultdict(list)
        if posts is not None:
            self._lazy = LazyRows(posts)
            for number, owner in enumerate(posts["entity_id"]):
                self._posts_of[owner].append(number)
        self._kept: dict[str, dict[str, _Chosen]] = {}

    @classmethod
    def of(
        cls, model: Any, processor: MelProcessor, posts: datasets.Dataset | None = None, *, batch_size: int = 64
    ) -> Prototypes | None:
        """For a model that knows entities by posts; otherwise `None`."""
        return cls(model, processor, posts, batch_size=batch_size) if knows_posts(model) else None

    @classmethod
    def from_data(
        cls,
        source: str | os.PathLike[str] | None,
        model: Any,
        processor: MelProcessor,
        posts: str | datasets.Dataset | None = "auto",
        *,
        revision: str | None = None,
        config: str = "mentions",
        train_split: str = "train",
    ) -> Prototypes | None:
        """[`Prototypes.of`] with the posts of a data set.

        Args:
            source (`str` or `os.PathLike`, *optional*): Where the entities come from: a data set, or a file, which has no
                posts; `None` if it has no name.
            model, processor: As in [`Prototypes`].
            posts (`str` or `datasets.Dataset`, *optional*): Posts, or which of the data set's: "auto" is the posts it
                ships, else the captions of its training split; "none"; or a split, whose captions are the posts
                ([`~hf_mel.data.posts.posts_of`]).
            revision, config, train_split: Of the data set and its mentions.

        Raises:
            UnknownSplitError: no such split.
        """
        if not knows_posts(model):
            return None
        if isinstance(posts, str):
            named = source is not None and not os.fspath(source).lower().endswith(ROW_SUFFIXES)
            if not named and posts not in ("auto", "none"):
                raise UnknownSplitError(
                    f"there is no split {posts!r} of posts: the entities do not come from a data set.",
                    file=source,
                    remedy="Leave posts out, or give a data set.",
                )
            options = {"revision": revision, "config": config, "train_split": train_split}
            posts = posts_of(source, posts, **options) if named else None  # type: ignore[arg-type]
        return cls.of(model, processor, posts)

    def add(self, entities: datasets.Dataset, *, progress: bool = False) -> None:
        """Chooses the prototypes of entities, one more than k, and keeps them in memory for [`Prototypes.on`]."""
        ids = list(entities["entity_id"])
        wanted = [row for row, entity_id in enumerate(ids) if entity_id not in self._kept]
        lazy = LazyRows(entities)
        total = sum(1 + len(self._posts_of.get(ids[row], ())) for row in wanted)
        with tqdm(total=total, desc="Encoding posts", unit="post", delay=1, disable=not progress) as bar:
            for chunk in self._chunks(wanted, ids):
                self._kept |= self._choose(lazy.__getitems__(chunk), spare=True, bar=bar)

    def on(self, entities: Sequence[Row], without: Collection[str] = ()) -> list[Row]:
        """The rows, each with `prototypes`: modality → tensor [k', d], k' at most k, the best first.

        Args:
            entities (sequence of rows): Those that were not added are encoded now, and not kept.
            without (collection of `str`): Texts whose posts are left out, that of a post or of the mention it was made
                of. Training gives the texts of the batch: at test time, too, no prototype is the very text to be
                linked. One left out leaves k in place; an entity without any other post is a post about itself.
        """
        new = {row["entity_id"]: row for row in entities if row["entity_id"] not in self._kept}
        chosen = self._choose(list(new.values()), spare=bool(without)) if new else {}
        hidden = {_digest(text) for text in without}
        # A ChainMap, because copying a row would decode its images.
        return [
            ChainMap({"prototypes": self._shown(chosen.get(i) or self._kept[i], hidden)}, row)  # type: ignore[arg-type]
            for i, row in ((row["entity_id"], row) for row in entities)
        ]

    def overlap(self, mentions: datasets.Dataset) -> int:
        """How many of the mentions are linked with their own text at hand: it is that of a post about their gold."""
        if self.posts is None:
            return 0
        known: dict[str, set[int]] = {}
        count = 0
        for text, gold in zip(mentions["text"], mentions["entity_id"], strict=True):
            if gold not in known:
                known[gold] = set(self._digests[self._posts_of.get(gold, [])].ravel().tolist())
            count += _digest(text) in known[gold]
        return count

    def support(self, entities: datasets.Dataset) -> datasets.Dataset:
        """The posts that are a prototype of one of the entities, in any modality: the support set (section 3.4.3).

        The entities have to be added before.
        """
        numbers: set[int] = set()
        for entity_id in entities["entity_id"]:
            for chosen in self._kept[entity_id].values():
                numbers.update(chosen.posts[: self._room])
        if not numbers or self.posts is None:
            raise DataFormatError(
                "no entity has posts to learn from.", remedy="Give a data set with posts or training mentions."
            )
        return self.posts.select(sorted(numbers))

    @property
    def _room(self) -> int:
        """How many prototypes are posts."""
        return self.k - self.with_entity

    @cached_property
    def _digests(self) -> np.ndarray:
        """Of the texts that each post may be left out by, [P, 1 or 2]."""
        assert self.posts is not None
        columns = [self.posts[column] for column in ("text", SOURCE) if column in self.posts.column_names]
        return np.array([[_digest(text) for text in column] for column in columns], dtype=np.uint64).T

    def _chunks(self, rows: list[int], ids: Sequence[str]) -> Iterator[list[int]]:
        """Rows of entities that have about `_CHUNK_POSTS` posts together."""
        chunk: list[int] = []
        count = 0
        for row in rows:
            chunk.append(row)
            count += 1 + len(self._posts_of.get(ids[row], ()))
            if count >= _CHUNK_POSTS:
                yield chunk
                chunk, count = [], 0
        if chunk:
            yield chunk

    def _shown(self, chosen: dict[str, _Chosen], hidden: set[int]) -> dict[str, torch.Tensor]:
        places = {
            modality: [
                place
                for place, post in enumerate(best.posts)
                if not hidden or hidden.isdisjoint(self._digests[post].tolist())
            ][: self._room]
            for modality, best in chosen.items()
        }
        itself = self.with_entity or not any(places.values())
        return {
            modality: torch.cat([best.own, best.vectors[places[modality]]])
            if itself
            else best.vectors[places[modality]]
            for modality, best in chosen.items()
        }

    def _choose(self, entities: list[Any], *, spare: bool, bar: Any = None) -> dict[str, dict[str, _Chosen]]:
        """The posts of each entity, by id and modality: those shown, or with `spare` one more."""
        ids = [entity["entity_id"] for entity in entities]
        numbers: list[int] = []
        groups: list[list[int]] = []  # places in `numbers`
        for entity_id in ids:
            found = self._posts_of.get(entity_id, [])
            groups.append(list(range(len(numbers), len(numbers) + len(found))))
            numbers += found
        rows: list[Row] = [*(self._lazy.__getitems__(numbers) if numbers else ()), *map(entity_as_post, entities)]
        names, count = [str(row["post_id"]) for row in rows], self._room + spare
        result: dict[str, dict[str, _Chosen]] = {entity_id: {} for entity_id in ids}
        for modality, (features, present) in self._features(rows, bar).items():
            features = features.masked_fill(~present[:, None], 0)
            check_features(features, names)
            there = present.tolist()
            seen = [[place for place in group if there[place]] for group in groups]
            if self.selection == "random":
                # One order for all modalities, so that they show the same posts where these have them all.
                orders = [random_posts(i, group, len(group)) for i, group in zip(ids, groups, strict=True)]
                best = [[place for place in order if there[place]][:count] for order in orders]
            else:
                best = select_posts(features, seen, count) if count else [[] for _ in seen]
            unit = torch.nn.functional.normalize(features, dim=-1)
            for k, (entity_id, chosen) in enumerate(zip(ids, best, strict=True)):
                own = len(numbers) + k
                result[entity_id][modality] = _Chosen(
                    [numbers[place] for place in chosen], unit[chosen], unit[[own] if there[own] else []]
                )
        return result

    def _features(self, posts: list[Row], bar: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Features [P, d] of posts by modality, and which of them have it [P]; about equally long ones are one batch."""
        order = sorted(range(len(posts)), key=lambda number: len(posts[number]["text"] or ""))
        features: dict[str, torch.Tensor] = {}
        training = getattr(self.model, "training", False)
        if training:
            self.model.eval()
        try:
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                tensors = self.processor(posts=[posts[number] for number in batch])  # type: ignore[call-arg]
                inputs = model_inputs(self.model, tensors)
                with torch.no_grad():
                    found = self.model.encode_posts(**inputs)
                for name, tensor in found.items():
                    tensor = tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None)
                    if name not in features:
                        features[name] = tensor.new_zeros((len(posts), *tensor.shape[1:]))
                    features[name][batch] = tensor
                if bar is not None:
                    bar.update(len(batch))
        finally:
            if training:
                self.model.train()
        everywhere = torch.ones(len(posts), dtype=torch.bool)
        return {
            name: (tensor, features.get(f"{name}{_PRESENT}", everywhere))
            for name, tensor in features.items()
            if not name.endswith(_PRESENT)
        }


def knows_posts(model: Any) -> bool:
    """Whether the model knows its entities by posts (see [`~hf_mel.protocols.Retriever`])."""
    return callable(getattr(model, "encode_posts", None)) and bool(getattr(model, "num_prototypes", 0))


def _digest(text: str) -> int:
    """A number of 64 bits that stands for a text; the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")

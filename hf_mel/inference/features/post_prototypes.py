"""Knowledge prototypes: an entity as the features of its most representative posts (IMN, section 3.3)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.posts import SOURCE_TEXT, entity_as_post
from hf_mel.errors import DataFormatError, RecipeError
from hf_mel.inference.execution import evaluation_mode, to_model
from hf_mel.inference.features.pagerank import SELECTIONS, check_features, random_posts, select_posts
from hf_mel.inference.features.row_features import RowFeatures, with_column
from hf_mel.inference.left_out import LeftOutTexts
from hf_mel.protocols import MelProcessor, knows_posts, post_columns
from hf_mel.schema import Row

#: Posts whose features are in memory at a time while prototypes are precomputed.
_CHUNK_POSTS = 8192
#: Suffix of the boolean mask that says which posts have a modality.
_PRESENT = "_present"


@dataclass
class _SelectedPosts:
    """The best posts of one entity in one modality.

    Args:
        posts (`list[int]`): Row numbers of the posts, the best first.
        vectors (`torch.Tensor` `[len(posts), d]`): Their features, each of length 1.
        entity_vector (`torch.Tensor` `[0 or 1, d]`): Features of the entity as a post about itself, if it has this
            modality.
    """

    posts: list[int]
    vectors: torch.Tensor
    entity_vector: torch.Tensor


class PostPrototypes(RowFeatures):
    """The prototypes of entities, for a model that represents entities by posts ([`~hf_mel.protocols.KnowsPosts`]).

    In every modality of `model.encode_posts`, the prototypes of an entity are the features, of length 1, of the k posts
    with the highest PageRank among its posts that have the modality (k is `model.num_prototypes`). An entity with fewer
    posts has fewer prototypes. An entity without posts is a post about itself, made of its name and other columns
    ([`~hf_mel.protocols.post_columns`]) and its first image.

    Two optional fields of the model's configuration change the selection:

    - `prototype_selection`: "random" selects k posts at random, the same for one entity in every run (Figure 4).
    - `entity_prototype`: the entity as a post about itself is always the first prototype, before k - 1 posts. The paper
      does not have this; its entities are accounts. It is meant for posts that do not mention the name, such as captions.

    Args:
        model ([`~hf_mel.protocols.KnowsPosts`]): Encodes posts, with the weights it has at that moment.
        processor ([`~hf_mel.protocols.MelProcessor`]): Takes `posts`.
        posts (`datasets.Dataset`, *optional*): P rows of [`~hf_mel.schema.post_features`]. Only posts about entities
            that are precomputed or attached are encoded.
        batch_size (`int`): Posts per forward pass.

    Raises:
        RecipeError: The configuration names an unknown selection.
    """

    def __init__(
        self, model: Any, processor: MelProcessor, posts: datasets.Dataset | None = None, *, batch_size: int = 64
    ):
        super().__init__(model, processor)
        config = getattr(model, "config", None)
        self.posts, self.batch_size = posts, batch_size
        self.num_prototypes: int = model.num_prototypes
        self.entity_columns = post_columns(processor)
        self.left_out = LeftOutTexts(processor)
        self.selection: str = getattr(config, "prototype_selection", None) or SELECTIONS[0]
        self.with_entity: bool = bool(getattr(config, "entity_prototype", None))
        if self.selection not in SELECTIONS:
            raise RecipeError(f"prototype_selection={self.selection!r} is not one of {', '.join(SELECTIONS)}.")
        self._posts_by_entity: dict[str, list[int]] = defaultdict(list)
        if posts is not None:
            self._lazy_posts = LazyRows(posts)
        if posts is not None and self._num_post_prototypes:
            for number, entity_id in enumerate(posts["entity_id"]):
                self._posts_by_entity[entity_id].append(number)
        self._cache: dict[str, dict[str, _SelectedPosts]] = {}

    @classmethod
    def for_model(
        cls, model: Any, processor: MelProcessor, posts: datasets.Dataset | None = None, *, batch_size: int = 64
    ) -> PostPrototypes | None:
        """Returns the prototypes of a model that represents entities by posts, otherwise `None`."""
        return cls(model, processor, posts, batch_size=batch_size) if knows_posts(model) else None

    def precompute(self, entities: datasets.Dataset, *, progress: bool = False) -> None:
        """Selects and caches the prototypes of entities, with one spare in case `attach` leaves one out."""
        ids = list(entities["entity_id"])
        missing = [row for row, entity_id in enumerate(ids) if entity_id not in self._cache]
        lazy = LazyRows(entities)
        total = sum(1 + len(self._posts_by_entity.get(ids[row], ())) for row in missing)
        with tqdm(total=total, desc="Encoding posts", unit="post", delay=1, disable=not progress) as bar:
            for chunk in self._chunks(missing, ids):
                self._cache |= self._select(lazy.__getitems__(chunk), spare=True, bar=bar)
        self.left_out.warn("posts")

    def attach(self, entities: Sequence[Row], without: Collection[str] = ()) -> list[Row]:
        """Returns the rows, each with `prototypes`: modality → tensor [k', d] with k' at most k, the best first.

        Args:
            entities (sequence of rows): Entities that were not precomputed are computed now, and not cached.
            without (collection of `str`): Texts whose posts are left out: the text of a post, or of the mention whose
                caption it is. Training gives the texts of the batch, because at test time, too, no prototype is the
                text to be linked. If one post is left out, k remain; an entity without other posts is a post about
                itself.
        """
        missing = {row["entity_id"]: row for row in entities if row["entity_id"] not in self._cache}
        computed = self._select(list(missing.values()), spare=bool(without)) if missing else {}
        hidden = {_digest(text) for text in without}
        return [
            with_column(
                row, "prototypes", self._shown(computed.get(row["entity_id"]) or self._cache[row["entity_id"]], hidden)
            )
            for row in entities
        ]

    def num_leaked(self, mentions: datasets.Dataset) -> int:
        """Returns the number of mentions whose text is also a post about their gold entity (leakage)."""
        if self.posts is None:
            return 0
        digests_by_gold: dict[str, set[int]] = {}
        count = 0
        for text, gold in zip(mentions["text"], mentions["entity_id"], strict=True):
            if gold not in digests_by_gold:
                posts = self._posts_by_entity.get(gold, [])
                digests_by_gold[gold] = set(self._digests[posts].ravel().tolist())
            count += _digest(text) in digests_by_gold[gold]
        return count

    def support_set(self, entities: datasets.Dataset) -> datasets.Dataset:
        """Returns the posts that are a prototype of one of the entities, in any modality (section 3.4.3).

        The entities must be precomputed.

        Raises:
            [`~hf_mel.errors.DataFormatError`]: No entity has posts.
        """
        numbers: set[int] = set()
        for entity_id in entities["entity_id"]:
            for selected in self._cache[entity_id].values():
                numbers.update(selected.posts[: self._num_post_prototypes])
        if not numbers or self.posts is None:
            raise DataFormatError(
                "No entity has posts to learn from.",
                remedy="Give a data set with posts or training mentions.",
            )
        return self.posts.select(sorted(numbers))

    @property
    def _num_post_prototypes(self) -> int:
        """The maximal number of prototypes that are posts."""
        return self.num_prototypes - self.with_entity

    @cached_property
    def _digests(self) -> np.ndarray:
        """Digests of the texts of each post, [P, 1 or 2]: the text of the post and, for a caption, the text of its mention."""
        assert self.posts is not None
        columns = [self.posts[column] for column in ("text", SOURCE_TEXT) if column in self.posts.column_names]
        return np.array([[_digest(text) for text in column] for column in columns], dtype=np.uint64).T

    def _chunks(self, rows: list[int], ids: Sequence[str]) -> Iterator[list[int]]:
        """Yields rows of entities with about `_CHUNK_POSTS` posts together."""
        chunk: list[int] = []
        count = 0
        for row in rows:
            chunk.append(row)
            count += 1 + len(self._posts_by_entity.get(ids[row], ()))
            if count >= _CHUNK_POSTS:
                yield chunk
                chunk, count = [], 0
        if chunk:
            yield chunk

    def _shown(self, selected: dict[str, _SelectedPosts], hidden: set[int]) -> dict[str, torch.Tensor]:
        """Returns the prototypes of one entity by modality, without posts whose digest is hidden."""
        places = {
            modality: [
                place
                for place, post in enumerate(best.posts)
                if not hidden or hidden.isdisjoint(self._digests[post].tolist())
            ][: self._num_post_prototypes]
            for modality, best in selected.items()
        }
        show_entity = self.with_entity or not any(places.values())
        return {
            modality: torch.cat([best.entity_vector, best.vectors[places[modality]]])
            if show_entity
            else best.vectors[places[modality]]
            for modality, best in selected.items()
        }

    def _select(self, entities: list[Any], *, spare: bool, bar: Any = None) -> dict[str, dict[str, _SelectedPosts]]:
        """Selects the posts of each entity, by id and modality: as many as are shown, and with `spare` one more."""
        ids = [entity["entity_id"] for entity in entities]
        numbers: list[int] = []
        groups: list[list[int]] = []  # places in `numbers`
        for entity_id in ids:
            posts = self._posts_by_entity.get(entity_id, [])
            groups.append(list(range(len(numbers), len(numbers) + len(posts))))
            numbers += posts
        rows: list[Row] = [
            *(self._lazy_posts.__getitems__(numbers) if numbers else ()),
            *(entity_as_post(entity, self.entity_columns) for entity in entities),
        ]
        names, count = [str(row["post_id"]) for row in rows], self._num_post_prototypes + spare
        result: dict[str, dict[str, _SelectedPosts]] = {entity_id: {} for entity_id in ids}
        for modality, (features, mask) in self._features(rows, bar).items():
            features = features.masked_fill(~mask[:, None], 0)
            check_features(features, names)
            present = mask.tolist()
            present_groups = [[place for place in group if present[place]] for group in groups]
            if self.selection == "random":
                # One order for all modalities, so that posts that have all modalities are shown in all of them.
                orders = [random_posts(i, group, len(group)) for i, group in zip(ids, groups, strict=True)]
                best = [[place for place in order if present[place]][:count] for order in orders]
            else:
                best = select_posts(features, present_groups, count) if count else [[] for _ in present_groups]
            unit = torch.nn.functional.normalize(features, dim=-1)
            for k, (entity_id, places) in enumerate(zip(ids, best, strict=True)):
                entity_place = len(numbers) + k
                result[entity_id][modality] = _SelectedPosts(
                    [numbers[place] for place in places],
                    unit[places],
                    unit[[entity_place] if present[entity_place] else []],
                )
        return result

    def _features(self, posts: list[Row], bar: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns the features [P, d] of posts by modality, and which of them have the modality [P].

        Batches hold posts of similar text length.
        """
        order = sorted(range(len(posts)), key=lambda number: len(posts[number]["text"] or ""))
        features: dict[str, torch.Tensor] = {}
        with evaluation_mode(self.model):
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                rows = [posts[number] for number in batch]
                self.left_out.add("posts", rows)
                inputs = to_model(self.model, self.processor(posts=rows))
                with torch.no_grad():
                    encoded = self.model.encode_posts(**inputs)
                for name, tensor in encoded.items():
                    tensor = tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None)
                    if name not in features:
                        features[name] = tensor.new_zeros((len(posts), *tensor.shape[1:]))
                    features[name][batch] = tensor
                if bar is not None:
                    bar.update(len(batch))
        all_present = torch.ones(len(posts), dtype=torch.bool)
        return {
            name: (tensor, features.get(f"{name}{_PRESENT}", all_present))
            for name, tensor in features.items()
            if not name.endswith(_PRESENT)
        }


def _digest(text: str) -> int:
    """Returns a 64-bit digest of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")

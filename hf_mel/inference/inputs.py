"""A model, its processor, and the features computed before the processor needs them."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Sequence
from typing import Any

import datasets
import torch

from hf_mel.data.lazy_rows import with_rgb_images
from hf_mel.data.posts import posts_of
from hf_mel.errors import UnknownSplitError
from hf_mel.inference.execution import to_model
from hf_mel.inference.features.image_features import ImageFeatures
from hf_mel.inference.features.mention_features import MentionFeatures
from hf_mel.inference.features.post_prototypes import PostPrototypes
from hf_mel.inference.left_out import LeftOutTexts
from hf_mel.protocols import image_features_are_fixed, knows_posts
from hf_mel.row_files import ROW_SUFFIXES
from hf_mel.schema import Row


class ModelInputs:
    """Turns rows into the input of a model.

    ```python
    >>> inputs = ModelInputs(*load_retriever("runs/mimic_wikimel"))  # doctest: +SKIP
    >>> encodings = inputs.model.encode_mentions(**inputs.mentions(rows))  # doctest: +SKIP
    ```

    Args:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]): The model.
        processor ([`~hf_mel.protocols.MelProcessor`]): Its processor.
        posts (`datasets.Dataset`, *optional*): Posts about the entities, for a model that represents entities by posts.
            Without them, every entity is the only post about itself.

    Attributes:
        prototypes ([`~hf_mel.inference.features.post_prototypes.PostPrototypes`], *optional*): Set for a model that
            represents entities by posts.
        mention_features ([`~hf_mel.inference.features.mention_features.MentionFeatures`], *optional*),
        image_features ([`~hf_mel.inference.features.image_features.ImageFeatures`], *optional*): Set by
            [`ModelInputs.precompute`] for a model with a frozen mention or image encoder.
        left_out ([`~hf_mel.inference.left_out.LeftOutTexts`]): Counts the texts that are too long for the processor.
    """

    def __init__(self, model: Any, processor: Any, posts: datasets.Dataset | None = None):
        self.model, self.processor = model, processor
        self.prototypes = PostPrototypes.for_model(model, processor, posts)
        self.mention_features: MentionFeatures | None = None
        self.image_features: ImageFeatures | None = None
        self.left_out = LeftOutTexts(processor)

    @classmethod
    def from_data(
        cls,
        source: str | os.PathLike[str] | None,
        model: Any,
        processor: Any,
        posts: str | datasets.Dataset | None = "auto",
        *,
        revision: str | None = None,
        config: str = "mentions",
        train_split: str = "train",
    ) -> ModelInputs:
        """Returns the inputs of a model with the posts of a data set, if the model represents entities by posts.

        Args:
            source (`str` or `os.PathLike`, *optional*): The source of the entities: a data set, or a file, which has no
                posts; `None` if it has no name.
            model, processor: As in [`ModelInputs`].
            posts (`str` or `datasets.Dataset`, *optional*): The posts; or "auto" for the posts the data set ships, or
                else the captions of its training split; or "none"; or the split whose captions are the posts
                ([`~hf_mel.data.posts.posts_of`]).
            revision, config, train_split: Of the data set and its mentions.

        Raises:
            UnknownSplitError: The data set has no such split.
        """
        if not knows_posts(model):
            return cls(model, processor)
        if isinstance(posts, str):
            is_dataset = source is not None and not os.fspath(source).lower().endswith(ROW_SUFFIXES)
            if not is_dataset and posts not in ("auto", "none"):
                raise UnknownSplitError(
                    f"The entities do not come from a data set, so they have no split {posts!r} of posts.",
                    file=source,
                    remedy="Leave posts out, or give a data set.",
                )
            options = {"revision": revision, "config": config, "train_split": train_split}
            posts = posts_of(source, posts, **options) if is_dataset else None  # type: ignore[arg-type]
        return cls(model, processor, posts)

    def precompute(
        self,
        *,
        entities: datasets.Dataset | None = None,
        mentions: datasets.Dataset | None = None,
        progress: bool = False,
    ) -> None:
        """Computes and caches the features that training leaves unchanged.

        These are prototypes of entities, outputs of a frozen mention encoder, and outputs of a frozen image encoder.
        Afterwards every batch that shows a mention needs it to be precomputed if the mention encoder is frozen.

        Args:
            entities (`datasets.Dataset`, *optional*): N entities.
            mentions (`datasets.Dataset`, *optional*): M mentions or posts.
            progress (`bool`): Whether to show progress bars.

        Raises:
            [`~hf_mel.errors.ScoreError`]: A feature is nan or infinite; names the mention or post.
            [`~hf_mel.errors.ImageError`]: An image is damaged.
        """
        if self.image_features is None and image_features_are_fixed(self.model):
            self.image_features = ImageFeatures.for_model(self.model, self.processor)
        if entities is not None:
            if self.image_features is not None:
                self.image_features.precompute(entities, progress=progress)
            if self.prototypes is not None:
                self.prototypes.precompute(entities, progress=progress)
        if mentions is not None:
            if self.mention_features is None:
                self.mention_features = MentionFeatures.for_model(self.model, self.processor)
            if self.image_features is not None:
                self.image_features.precompute(mentions, progress=progress)
            if self.mention_features is not None:
                self.mention_features.precompute(mentions, progress=progress)

    def without_mention_features(self) -> ModelInputs:
        """Returns the same inputs without cached mention features, which are half precision."""
        inputs = copy.copy(self)
        inputs.mention_features = None
        return inputs

    def mention_rows(self, mentions: Sequence[Row]) -> list[Row]:
        """Returns mention rows with RGB images and their cached features attached, for the processor.

        Raises:
            `KeyError`: Mention features are cached, but not those of one of these mentions.
        """
        mentions = [with_rgb_images(mention) for mention in mentions]
        if self.mention_features is not None:
            mentions = self.mention_features.attach(mentions)
        if self.image_features is not None:
            mentions = self.image_features.attach(mentions)
        return list(mentions)

    def entity_rows(self, entities: Sequence[Row], without: Collection[str] = ()) -> list[Row]:
        """Returns entity rows with RGB images and their prototypes or cached image features attached, for the processor.

        Args:
            entities (sequence of rows): N entities.
            without (collection of `str`): Texts whose posts are left out of the prototypes, see
                [`~hf_mel.inference.features.post_prototypes.PostPrototypes.attach`].
        """
        entities = [with_rgb_images(entity) for entity in entities]
        if self.prototypes is not None:
            entities = self.prototypes.attach(entities, without)
        if self.image_features is not None:
            entities = self.image_features.attach(entities)
        return list(entities)

    def mentions(self, mentions: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Returns the tensors of M mention rows, on the model's device in its dtype."""
        return to_model(self.model, self.processor(mentions=self.mention_rows(mentions)))

    def entities(self, entities: Sequence[Row], without: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Returns the tensors of N entity rows, on the model's device in its dtype. `without`: see `entity_rows`."""
        return to_model(self.model, self.processor(entities=self.entity_rows(entities, without)))

    def pairs(self, pairs: Sequence[tuple[Row, Sequence[Row]]]) -> dict[str, torch.Tensor]:
        """Returns the tensors of M mentions with their candidates, on the model's device in its dtype.

        The rows are taken as they are: attaching features per pair would repeat the work for every candidate. Use
        `mention_rows` and `entity_rows` before.
        """
        return to_model(self.model, self.processor(pairs=pairs))

"""Toy retriever that represents entities by prototypes of their posts, small enough to check by hand."""

from __future__ import annotations

import datasets
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.feature_extraction_utils import BatchFeature

from hf_mel.schema import post_features
from tests.toy import ToyConfig, ToyEncodings, ToyOutput, ToyProcessor, ToyRetriever, _image


class ToyPostsConfig(ToyConfig):
    model_type = "toy_posts_retriever"

    num_prototypes: int = 3
    prototype_selection: str = "pagerank"
    entity_prototype: bool = False


class ToyPostsRetriever(ToyRetriever):
    """Compares a mention with the mean text and the mean colour of an entity's prototypes."""

    config: ToyPostsConfig
    config_class = ToyPostsConfig

    def __init__(self, config):
        super().__init__(config)
        self.characters.requires_grad_(False)
        #: Number of posts encoded so far.
        self.posts_seen = 0

    @property
    def num_prototypes(self):
        return self.config.num_prototypes

    def encode_posts(self, post_input_ids, post_attention_mask, post_colours, post_has_image):
        self.posts_seen += len(post_input_ids)
        return {
            "text": self._text(post_input_ids, post_attention_mask),
            "text_present": post_attention_mask.any(1),
            "image": post_colours,
            "image_present": post_has_image,
        }

    def encode_entities(self, entity_text, entity_text_mask, entity_image, entity_image_mask):
        means = [
            (vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            for vectors, mask in ((entity_text, entity_text_mask), (entity_image, entity_image_mask))
        ]
        return ToyEncodings(text=means[0], vision=self.entity_vision(means[1]))

    def forward(self, labels=None, **inputs):
        mentions = self.encode_mentions(**{k: v for k, v in inputs.items() if k.startswith("mention_")})
        entities = self.encode_entities(**{k: v for k, v in inputs.items() if k.startswith("entity_")})
        scores = self.score(mentions, entities)
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return ToyOutput(loss=loss, scores=scores)


class ToyPostsProcessor(ToyProcessor):
    attributes = []

    def __init__(self, text_width: int = 48, vocab_size: int = 97, num_prototypes: int = 3):
        super().__init__(text_width, vocab_size)
        self.num_prototypes = num_prototypes

    def __call__(self, mentions=None, entities=None, pairs=None, posts=None, **kwargs):
        batch = dict(super().__call__(mentions=mentions))
        if posts is not None:
            images = [row["image"] for row in posts]
            tensors = self._encode([row["text"] for row in posts], images)
            batch |= {f"post_{name}": tensor for name, tensor in tensors.items()}
            batch["post_has_image"] = torch.tensor([image is not None for image in images])
        if entities is not None:
            for modality in ("text", "image"):
                prototypes = [row["prototypes"][modality] for row in entities]
                vectors = torch.zeros(len(prototypes), self.num_prototypes, prototypes[0].shape[1])
                mask = torch.zeros(len(prototypes), self.num_prototypes, dtype=torch.bool)
                for k, vector in enumerate(prototypes):
                    vectors[k, : len(vector)], mask[k, : len(vector)] = vector, True
                batch |= {f"entity_{modality}": vectors, f"entity_{modality}_mask": mask}
        return BatchFeature(batch)


def register() -> None:
    AutoConfig.register(ToyPostsConfig.model_type, ToyPostsConfig, exist_ok=True)
    AutoModel.register(ToyPostsConfig, ToyPostsRetriever, exist_ok=True)
    AutoProcessor.register(ToyPostsConfig, ToyPostsProcessor, exist_ok=True)


def toy_posts_model(seed: int = 0, **config) -> ToyPostsRetriever:
    """Returns an untrained model that depends only on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyPostsRetriever(ToyPostsConfig(**config)).eval()


def toy_posts(entities: int = 12) -> datasets.Dataset:
    """Returns i mod 6 posts about entity Qi, so that some entities have none. Every third post has no image."""
    rows = []
    for i in range(1, entities + 1):
        for j in range(i % 6):
            number = len(rows)
            text = f"{'abcdefghij'[(i * j) % 10] * (j + 1)} is news of {chr(97 + i)}{j}"
            rows.append(
                {
                    "post_id": f"p{number}",
                    "entity_id": f"Q{i}",
                    "text": text,
                    "image": None if number % 3 == 2 else _image(number),
                }
            )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_list([rows[k] for k in order], features=post_features())

"""Toy retriever, reranker and processors, small enough to check by hand, for tests of code that uses only the Protocols.

`ToyRetriever` has two units, `text` (bag of hashed characters) and `vision` (mean colour), each a bilinear score;
`ToyProcessor` turns schema rows into its tensors. `ToyReranker` and `ToyPairProcessor` do the same for pairs. All of them
save, load and train like the shipped methods. The Auto classes know them only after a test calls [`register`].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import ModelOutput

from hf_mel.schema import NIL, entity_features, mention_features


class ToyConfig(PreTrainedConfig):
    model_type = "toy_retriever"

    vocab_size: int = 97
    dim: int = 16


@dataclass
class ToyEncodings(ModelOutput):
    """`text` [N, dim] and `vision` [N, dim]."""

    text: torch.FloatTensor | None = None
    vision: torch.FloatTensor | None = None


@dataclass
class ToyOutput(ModelOutput):
    """`loss` [], `scores` [M, N], `unit_scores` {name: [M, N]}."""

    loss: torch.FloatTensor | None = None
    scores: torch.FloatTensor | None = None
    unit_scores: dict[str, torch.FloatTensor] | None = None


class ToyRetriever(PreTrainedModel):
    config: ToyConfig
    config_class = ToyConfig
    main_input_name = "mention_input_ids"
    accepts_loss_kwargs = False

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.characters = nn.Embedding(config.vocab_size, config.dim)
        self.mention_text = nn.Linear(config.dim, config.dim)
        self.mention_vision = nn.Linear(3, config.dim)
        self.entity_vision = nn.Linear(3, config.dim)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def _text(self, input_ids, attention_mask):
        mask = attention_mask[..., None].to(self.characters.weight.dtype)
        return (self.characters(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)

    def encode_mentions(self, mention_input_ids, mention_attention_mask, mention_colours, **_):
        text = self.mention_text(self._text(mention_input_ids, mention_attention_mask))
        return ToyEncodings(text=text, vision=self.mention_vision(mention_colours))

    def encode_entities(self, entity_input_ids, entity_attention_mask, entity_colours, **_):
        text = self._text(entity_input_ids, entity_attention_mask)
        return ToyEncodings(text=text, vision=self.entity_vision(entity_colours))

    def unit_scores(self, mentions, entities):
        return {unit: mentions[unit] @ entities[unit].T for unit in ("text", "vision")}

    def score(self, mentions, entities):
        units = self.unit_scores(mentions, entities)
        return (units["text"] + units["vision"]) / 2

    def query_vectors(self, mentions):
        return torch.cat([mentions["text"], mentions["vision"]], 1) / 2

    def index_vectors(self, entities):
        return torch.cat([entities["text"], entities["vision"]], 1)

    def forward(self, labels=None, **inputs):
        mentions = self.encode_mentions(**{k: v for k, v in inputs.items() if k.startswith("mention_")})
        entities = self.encode_entities(**{k: v for k, v in inputs.items() if k.startswith("entity_")})
        units = self.unit_scores(mentions, entities)
        scores = (units["text"] + units["vision"]) / 2
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return ToyOutput(loss=loss, scores=scores, unit_scores=units)


class ToyTokenRetriever(ToyRetriever):
    """The toy retriever, whose entities also have vectors of tokens [N, L, 5] with a mask: of some none, of some all L."""

    entity_token_masks = {"tokens": "mask"}

    def encode_entities(self, **inputs):
        encoded = super().encode_entities(**inputs)
        ids = inputs["entity_input_ids"]
        length = ids.shape[1]
        lengths = torch.tensor([0, length, 1, 7, length - 3])[ids.sum(1) % 5]
        tokens = encoded.text[:, None, :5] * torch.arange(1, length + 1)[:, None]
        return {"tokens": tokens, "mask": torch.arange(length) < lengths[:, None], **encoded}


class ToyProcessor(ProcessorMixin):
    """Characters of "mention text" or "name attributes", padded to `text_width`; the mean colour of the image."""

    attributes = []

    def __init__(self, text_width: int = 48, vocab_size: int = 97):
        super().__init__()
        self.text_width, self.vocab_size = text_width, vocab_size

    def _encode(self, texts, images):
        ids = np.zeros((len(texts), self.text_width), dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            for position, character in enumerate(text[: self.text_width]):
                row[position] = 1 + ord(character) % (self.vocab_size - 1)
        colours = np.zeros((len(texts), 3), dtype=np.float32)
        for row, image in zip(colours, images, strict=True):
            if image is not None:
                row[:] = np.asarray(image.convert("RGB"), dtype=np.float32).mean((0, 1)) / 255
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy((ids > 0).astype(np.int64)),
            "colours": torch.from_numpy(colours),
        }

    def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
        batch = {}
        if mentions is not None:
            texts = [f"{row['mention']} {row['text']}" for row in mentions]
            tensors = self._encode(texts, [row["image"] for row in mentions])
            batch |= {f"mention_{name}": tensor for name, tensor in tensors.items()}
        if entities is not None:
            texts = [f"{row['name']} {row['attributes']}" for row in entities]
            images = [row["images"][0] if row["images"] else None for row in entities]
            batch |= {f"entity_{name}": tensor for name, tensor in self._encode(texts, images).items()}
        return BatchFeature(batch)


class ToyRerankerConfig(PreTrainedConfig):
    model_type = "toy_reranker"

    vocab_size: int = 97
    dim: int = 8
    unit: str = "mention"
    independent: bool = True


@dataclass
class ToyRerankerOutput(ModelOutput):
    """`loss` [], `scores` [M, C], `features` [M, C, dim]."""

    loss: torch.FloatTensor | None = None
    scores: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None


class ToyReranker(PreTrainedModel):
    """Scores the mean character of mention and entity together, and the distance of their images' colours.

    With `independent=False`, the mean score of the mention's candidates and half the mean of its context are subtracted
    from every score. Joint ranking adds to each score the best dot product of its features with those of a candidate of
    another mention in the same context.
    """

    config: ToyRerankerConfig
    config_class = ToyRerankerConfig
    main_input_name = "pair_input_ids"
    accepts_loss_kwargs = False
    mentions_per_example = 2
    image_features_are_fixed = True

    def __init__(self, config: ToyRerankerConfig):
        super().__init__(config)
        self.characters = nn.Embedding(config.vocab_size, config.dim)
        self.hidden = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, 1)
        self.vision = nn.Linear(3, 2, bias=False)
        self.post_init()

    @property
    def example_unit(self):
        return self.config.unit

    @property
    def pairs_are_independent(self):
        return self.config.independent

    def _init_weights(self, module):
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def encode_images(self, pixel_values):
        return pixel_values.mean((2, 3))

    def forward(self, pair_input_ids, pair_attention_mask, pair_mask, pair_context, labels=None, **images):
        mask = pair_attention_mask[..., None].to(self.characters.weight.dtype)
        text = (self.characters(pair_input_ids) * mask).sum(2) / mask.sum(2).clamp(min=1)
        features = torch.tanh(self.hidden(text))
        if "pair_pixel_values" in images:
            pixels = images["pair_pixel_values"]
            colours = self.encode_images(pixels.flatten(0, 2)).view(*pixels.shape[:3], 3)
        else:
            colours = images["pair_image_features"]
        scores = self.out(features)[..., 0] - self.vision(colours[:, :, 0] - colours[:, :, 1]).square().sum(-1)
        if not self.config.independent:
            unpadded = scores.masked_fill(~pair_mask, 0)
            means = unpadded.sum(1) / pair_mask.sum(1)
            same = (pair_context[:, None] == pair_context[None]).to(scores.dtype)
            scores = scores - means[:, None] - (same @ means / same.sum(1))[:, None] / 2
        scores = scores.masked_fill(~pair_mask, -torch.inf)
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return ToyRerankerOutput(loss=loss, scores=scores, features=features)

    def rank_jointly(self, scores, features, mask, contexts):
        result = scores.clone()
        for i in range(len(scores)):
            others = (contexts == contexts[i]) & (torch.arange(len(scores), device=scores.device) != i)
            if others.any():
                result[i] = scores[i] + (features[i] @ features[others][mask[others]].T).max(1).values
        return result


class ToyPairProcessor(ProcessorMixin):
    """Characters of "mention text name attributes", padded to the longest pair; one pixel of mean colour per image."""

    attributes = []

    def __init__(self, max_length: int = 60, vocab_size: int = 97):
        super().__init__()
        self.max_length, self.vocab_size = max_length, vocab_size

    def images(self, images):
        colours = [np.asarray(image.convert("RGB"), dtype=np.float32).mean((0, 1)) / 255 for image in images]
        return torch.from_numpy(np.stack(colours))[:, :, None, None]

    def _colour(self, row, column):
        if "image_features" in row:
            vector = row["image_features"]
            return torch.zeros(3) if vector is None else vector
        image = row[column]
        if column == "images":
            image = image[0] if image else None
        return torch.zeros(3) if image is None else self.images([image])[0, :, 0, 0]

    def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
        assert pairs is not None
        texts = [
            [f"{m['mention']} {m['text']} {e['name']} {e['attributes']}"[: self.max_length] for e in listed]
            for m, listed in pairs
        ]
        count, width = len(pairs), max(len(listed) for _, listed in pairs)
        ids = torch.zeros(count, width, max(len(text) for row in texts for text in row), dtype=torch.long)
        colours, mask = torch.zeros(count, width, 2, 3), torch.zeros(count, width, dtype=torch.bool)
        for i, (mention, listed) in enumerate(pairs):
            for j, entity in enumerate(listed):
                codes = [1 + ord(character) % (self.vocab_size - 1) for character in texts[i][j]]
                ids[i, j, : len(codes)] = torch.tensor(codes)
                colours[i, j, 0], colours[i, j, 1] = self._colour(mention, "image"), self._colour(entity, "images")
                mask[i, j] = True
        contexts = {}
        numbers = [contexts.setdefault(mention["context_id"], len(contexts)) for mention, _ in pairs]
        has_features = "image_features" in pairs[0][0]
        images = {"pair_image_features": colours} if has_features else {"pair_pixel_values": colours[..., None, None]}
        return BatchFeature(
            {"pair_input_ids": ids, "pair_attention_mask": (ids > 0).long(), "pair_mask": mask}
            | {"pair_context": torch.tensor(numbers)}
            | images
        )


def register() -> None:
    """Makes the toy methods loadable with `AutoConfig`, `AutoModel` and `AutoProcessor` in this process."""
    for config, model, processor in (
        (ToyConfig, ToyRetriever, ToyProcessor),
        (ToyRerankerConfig, ToyReranker, ToyPairProcessor),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)


def toy_model(seed: int = 0, **config) -> ToyRetriever:
    """Returns an untrained retriever that depends only on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyRetriever(ToyConfig(**config)).eval()


def toy_reranker(seed: int = 0, **config) -> ToyReranker:
    """Returns an untrained reranker that depends only on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyReranker(ToyRerankerConfig(**config)).eval()


def toy_entities(count: int = 12, images: bool = True) -> datasets.Dataset:
    """Returns `count` entities Q1, Q2, … with distinct names. All but every fifth have an image of one colour."""
    rows = [
        {
            "entity_id": f"Q{i + 1}",
            "name": f"Entity {chr(97 + i % 26) * (1 + i // 26)}",
            "description": "",
            "attributes": f"Number: {i}.",
            "aliases": [],
            "images": [_image(i)] if images and i % 5 else [],
        }
        for i in range(count)
    ]
    return datasets.Dataset.from_list(rows, features=entity_features())


def toy_mentions(count: int = 20, entities: int = 12, nil_every: int = 0) -> datasets.Dataset:
    """Returns `count` mentions of Q1…Q`entities`, two per context. Every `nil_every`-th gold is NIL."""
    rows = []
    for i in range(count):
        nil, gold = nil_every and i % nil_every == nil_every - 1, i * 7 % entities
        mention = f"Entity {chr(97 + gold % 26)}"
        rows.append(
            {
                "mention_id": f"m{i}",
                "context_id": f"c{i // 2 if i % 4 < 2 else i + count}",
                "text": f"Here {mention} met somebody, {i} times.",
                "mention": mention,
                "start": 5,
                "end": 5 + len(mention),
                "mention_type": "",
                "topic": "",
                "image": _image(gold) if i % 3 else None,
                "entity_id": NIL if nil else f"Q{gold + 1}",
                "candidates": [],
                "stratum": ("text", "image", "both")[i % 3],
            }
        )
    return datasets.Dataset.from_list(rows, features=mention_features(stratum=datasets.Value("string")))


def write_toy_dataset(folder: Path, entities: datasets.Dataset | None = None, **splits: datasets.Dataset) -> Path:
    """Writes a data folder like those of `hf-mel data build`, and returns it.

    Args:
        folder: The folder to write to.
        entities: The entities of the knowledge base. Default: [`toy_entities`].
        splits: Mentions by split. Default: train, validation and test from [`toy_mentions`].
    """
    if not splits:
        mentions = toy_mentions(60, nil_every=6)
        names = ("train", "validation", "test")
        splits = {name: mentions.select(range(20 * i, 20 * i + 20)) for i, name in enumerate(names)}
    lines = ["---", "configs:", "- config_name: mentions", "  default: true", "  data_files:"]
    lines += [f"  - {{split: {name}, path: mentions/{name}.parquet}}" for name in splits]
    lines += ["- config_name: entities", "  data_files:", "  - {split: kb, path: entities/kb.parquet}", "---", ""]
    for name, rows in {**{f"mentions/{name}": rows for name, rows in splits.items()}, "entities/kb": entities}.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        (toy_entities() if rows is None else rows).to_parquet(path)
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _image(i: int):
    from PIL import Image

    return Image.new("RGB", (4, 4), (i * 37 % 256, i * 91 % 256, i * 53 % 256))

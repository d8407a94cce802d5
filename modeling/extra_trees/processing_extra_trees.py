"""Processor of ET: features of pairs that need no encoder, and the texts and images for those that do."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    ProcessorMixin,
)

#: Features of a pair, in order. Those of `number_columns` follow.
FEATURES = (
    "prior",
    "name_is_equal",
    "name_has_all_words",
    "name_similarity",
    "word_cosine",
    "entity_words_in_context",
    "mention_has_image",
    "entity_has_image",
)


class ExtraTreesProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of an [`ExtraTreesModel`].

    ```python
    >>> processor(pairs=[(mention_row, candidate_rows)])["pair_features"]  # [1, C, f] # doctest: +SKIP
    ```

    Args:
        image_processor: Image processor. Its configuration determines size, cropping and normalisation.
        tokenizer: Fast tokenizer of the text encoder.
        max_length (`int`, *optional*, defaults to 64): Maximum number of tokens of a text.
        use_text (`bool`, *optional*, defaults to `True`): Whether to prepare texts.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images.
        fact_columns (`list[str]`, *optional*): Columns of an entity that are its text, in addition to its name. A row may lack
            them.
        number_columns (`list[str]`, *optional*): Columns of an entity with counts, whose log(1 + count) are features, for
            instance the followers of an account. A missing count is 0.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=64,
        use_text=True,
        use_images=True,
        fact_columns=("description", "attributes"),
        number_columns=(),
    ):
        if max_length < 4:
            raise ValueError(f"max_length={max_length} is too short for two texts. Give at least 4.")
        super().__init__(image_processor, tokenizer)
        self.max_length, self.use_text, self.use_images = max_length, use_text, use_images
        self.fact_columns, self.number_columns = list(fact_columns), list(number_columns)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> ExtraTreesProcessor:
        """Builds a processor for a model of [`ExtraTreesModel.from_backbones`], from the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError(
                "from_backbones needs the tokenizer of a text encoder. Give the encoder's Hub id or folder."
            )
        return cls.from_parts(AutoTokenizer.from_pretrained(text), vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> ExtraTreesProcessor:
        """Builds a processor from a tokenizer.

        Args:
            tokenizer: Fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor. With `None` the processor prepares no images.
            options: Options of the processor.
        """
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            settings = {"size": {"height": 224, "width": 224}, "do_center_crop": False} | dict(vision or {})
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Any = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
    ) -> BatchFeature:
        """Prepares M pairs of a mention and its candidates.

        Args:
            pairs (`list[tuple[dict, list[dict]]]`): M mention rows, each with the rows of its candidates. If images were
                encoded before, all rows have `image_features`, a tensor [d] or `None`.
            mentions, entities: Not supported by a reranker.

        Returns:
            `BatchFeature`: The arguments of [`ExtraTreesModel.pair_features`].

        Raises:
            ValueError: `pairs` is missing, or a count is negative or no number.
        """
        if mentions is not None or entities is not None or pairs is None:
            raise ValueError("ET reads a mention and its candidates together. Give pairs=.")
        rows = [mention for mention, _ in pairs]
        lists = [list(candidates) for _, candidates in pairs]
        shape = (len(rows), max([1, *map(len, lists)]))
        mask = torch.zeros(shape, dtype=torch.bool)
        for m, candidates in enumerate(lists):
            mask[m, : len(candidates)] = True
        contexts: dict[Any, int] = {}
        context = [contexts.setdefault(row.get("context_id", ("row", m)), len(contexts)) for m, row in enumerate(rows)]
        features = torch.zeros(*shape, len(FEATURES) + len(self.number_columns))
        flat = []
        for mention, candidates in zip(rows, lists, strict=True):
            mention_has_image = self._has_image(mention, "image")
            flat += [self._features(mention, row, mention_has_image) for row in candidates]
        if flat:
            features[mask] = torch.tensor(flat)
        batch = {
            "pair_features": features,
            "pair_mask": mask,
            "pair_context": torch.tensor(context, dtype=torch.int64),
        }
        scores = [row.get("list_score") for candidates in lists for row in candidates]
        if None not in scores:
            batch["pair_list_score"] = torch.zeros(shape)
            batch["pair_list_score"][mask] = torch.tensor(scores, dtype=torch.float32)
        if self.use_text:
            batch |= self._text_tensors(rows, lists, mask)
        if self.use_images:
            batch |= self._image_tensors(rows, lists, shape)
        return BatchFeature(batch)

    # Copied from modeling/mmel/processing_mmel.py
    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Returns the pixel values [I, 3, H, W] of I PIL images."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def _features(self, mention: Mapping[str, Any], entity: Mapping[str, Any], mention_has_image: bool) -> list[float]:
        """Returns the features of a pair, in the order of `FEATURES` and `number_columns`."""
        surface = mention.get("mention") or ""
        names = [name for name in (entity.get("name"), *(entity.get("aliases") or ())) if name]
        words = _words_of(surface)
        text, facts = _counts(mention.get("text") or ""), _counts(self._facts(entity))
        shared = sum(1 for word in facts if word in text)
        counts = []
        for column in self.number_columns:
            count = float(entity.get(column) or 0)
            if not 0 <= count < math.inf:
                raise ValueError(f"The entity {entity.get('entity_id')!r} has {column}={count}, which is no count.")
            counts.append(math.log1p(count))
        return [
            float(entity.get("prior") or 0.0),
            float(any(_folded(name) == _folded(surface) for name in names)),
            float(any(words and words <= _words_of(name) for name in names)),
            max((_similarity(_folded(surface), _folded(name)) for name in names), default=0.0),
            _cosine(text, facts),
            shared / len(facts) if facts else 0.0,
            float(mention_has_image),
            float(self._has_image(entity, "images")),
            *counts,
        ]

    def _has_image(self, row: Mapping[str, Any], column: str) -> bool:
        """Returns whether a row has an image that is read."""
        if not self.use_images:
            return False
        if "image_features" in row:
            return row["image_features"] is not None
        image = row.get(column)
        return bool(image) if column == "images" else image is not None

    def _facts(self, row: Mapping[str, Any]) -> str:
        """Returns the text of an entity without its name."""
        values = [row.get(column) or "" for column in self.fact_columns]
        return " ".join(value if isinstance(value, str) else ", ".join(filter(None, value)) for value in values)

    def _text_pairs(self, rows, lists) -> list[tuple[str, str]]:
        """Returns mention and text of each mention, then name and facts of each candidate."""
        pairs = [(str(row.get("mention") or ""), str(row.get("text") or "")) for row in rows]
        return pairs + [(str(row.get("name") or ""), self._facts(row)) for candidates in lists for row in candidates]

    def _text_tensors(self, rows, lists, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the distinct texts and their numbers."""
        texts = self._text_pairs(rows, lists)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        encoded = self.tokenizer(
            [first for first, _ in numbers],
            [second for _, second in numbers],
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )
        entity_text = torch.zeros(mask.shape, dtype=torch.int64)
        entity_text[mask] = torch.tensor([numbers[text] for text in texts[len(rows) :]], dtype=torch.int64)
        return {
            "pair_text_ids": encoded["input_ids"],
            "pair_text_mask": encoded["attention_mask"],
            "pair_mention_text": torch.tensor([numbers[text] for text in texts[: len(rows)]], dtype=torch.int64),
            "pair_entity_text": entity_text,
        }

    def num_left_out(self, mentions=None, entities=None, pairs=()) -> list[int]:
        """Returns how many tokens of each pair are left out: of each mention's candidates."""
        rows, lists = [mention for mention, _ in pairs], [list(candidates) for _, candidates in pairs]
        texts = self._text_pairs(rows, lists)
        if not self.use_text:
            return [0] * (len(texts) - len(rows))
        encoded = self.tokenizer([a for a, _ in texts], [b for _, b in texts], verbose=False)["input_ids"]
        cut = [max(len(ids) - self.max_length, 0) for ids in encoded]
        candidates = iter(cut[len(rows) :])
        return [mention + next(candidates) for mention, row in zip(cut, lists, strict=False) for _ in row]

    def _image_tensors(self, rows, lists, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns the images of mentions and candidates, each distinct image once, and their numbers."""
        mention_image, entity_image = torch.full((shape[0],), -1), torch.full(shape, -1)
        shown: list[tuple[torch.Tensor, Any, Mapping[str, Any]]] = [
            (mention_image, m, row) for m, row in enumerate(rows)
        ]
        shown += [(entity_image, (m, c), row) for m, listed in enumerate(lists) for c, row in enumerate(listed)]
        encoded = {"image_features" in row for _, _, row in shown}
        if encoded == {True, False}:
            raise ValueError(
                "Some rows have image_features and others do not. Encode the images of all rows or of none."
            )
        numbers: dict[Any, int] = {}
        values: list[Any] = []
        for target, place, row in shown:
            if encoded == {True}:
                value = row["image_features"]
                key: Any = id(value)
            else:
                value = row.get("image") if target is mention_image else next(iter(row.get("images") or ()), None)
                value = None if value is None else value.convert("RGB")
                key = None if value is None else (value.size, value.tobytes())
            if value is None:
                continue
            if key not in numbers:
                numbers[key] = len(values)
                values.append(value)
            target[place] = numbers[key]
        batch = {"pair_mention_image": mention_image, "pair_entity_image": entity_image}
        if values and encoded == {True}:
            batch["pair_image_features"] = torch.stack(values)
        elif values:
            batch["pair_pixel_values"] = self.images(values)
        return batch


@functools.lru_cache(maxsize=2**14)
def _counts(text: str) -> Counter[str]:
    """Returns how often each word occurs in a text, regardless of case."""
    return Counter(re.findall(r"\w+", text.casefold()))


def _cosine(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Returns the cosine of two counts of words; 0 if one has no words."""
    product = sum(count * second.get(word, 0) for word, count in first.items())
    norms = math.sqrt(sum(n * n for n in first.values())) * math.sqrt(sum(n * n for n in second.values()))
    return product / norms if norms else 0.0


@functools.lru_cache(maxsize=2**16)
def _folded(name: str) -> str:
    """Returns a name without case, accents and repeated spaces."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())


@functools.lru_cache(maxsize=2**16)
def _similarity(first: str, second: str) -> float:
    """Returns 1 less the edit distance of two strings divided by the longer length; 1 for two empty strings."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return 1 - row[-1] / max(len(first), len(second), 1)


# Copied from modeling/mmel/processing_mmel.py
@functools.lru_cache(maxsize=2**16)
def _words_of(name: str | None) -> frozenset[str]:
    """Returns the words of a name, regardless of case and accents."""
    letters = unicodedata.normalize("NFKD", (name or "").casefold())
    return frozenset(re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c))))


__all__ = ["FEATURES", "ExtraTreesProcessor"]

"""Processor of MM-nel: turns rows into words around mentions, words of entities, priors and images."""

from __future__ import annotations

import math
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    ProcessorMixin,
)

from .glove_mm_nel import glove_tokenizer

_MODALITIES = ("text", "image")


#: Ids of the words of texts that were read lately, by tokenizer and text, because entities are candidates again and again.
_READ: WeakKeyDictionary[Any, dict[str, Sequence[int]]] = WeakKeyDictionary()
_MOST_READ = 2**15


class MmNelProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of an [`MmNelModel`].

    ```python
    >>> mention = {"mention": "Wayne", "text": "Wayne meets Gordon.", "start": 0, "end": 5, "document_id": "1"}
    >>> picture = {"modality": "image", "image": image, "document_id": "1"}  # doctest: +SKIP
    >>> entity = {"entity_id": "Q1", "name": "Bruce Wayne", "attributes": "", "images": [image], "prior": 0.3}
    >>> processor(pairs=[(mention, [entity]), (picture, [entity])])  # doctest: +SKIP
    ```

    Words without a vector are left out, as in the models that the paper follows.

    Args:
        image_processor: Image processor. Its configuration determines size, cropping and normalisation.
        tokenizer: Fast tokenizer whose ids are the rows of the model's table of word vectors.
        context_words (`int`, *optional*, defaults to 100): Number of context words, half of them on each side of the
            mention.
        entity_words (`int`, *optional*, defaults to 64): Number of words of an entity's `fact_columns`. Its name is
            not limited.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images.
        fact_columns (`list[str]`, *optional*): Columns of an entity that are read in addition to its name, in order;
            [`MmNelProcessor.from_parts`] adds "aliases".
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        context_words=100,
        entity_words=64,
        use_images=True,
        fact_columns=("description", "attributes"),
    ):
        for name, value in (("context_words", context_words), ("entity_words", entity_words)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative.")
        super().__init__(image_processor, tokenizer)
        self.context_words, self.entity_words, self.use_images = context_words, entity_words, use_images
        self.fact_columns = list(fact_columns)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> MmNelProcessor:
        """Builds a processor for a model of [`MmNelModel.from_backbones`], from the same arguments.

        Args:
            text (`str`): Path of a file of word vectors in GloVe's format, or Hub id or folder of a transformers
                model.
            vision (`str`, *optional*): Hub id or folder of an image encoder. Without it, `use_images=True` prepares
                the images of 64 × 64 pixels that the default configuration expects; the default is to prepare none.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError(
                "from_backbones needs word vectors. Give a file in GloVe's format or a transformers model."
            )
        tokenizer = glove_tokenizer(text) if Path(text).is_file() else AutoTokenizer.from_pretrained(text)
        return cls.from_parts(tokenizer, vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> MmNelProcessor:
        """Builds a processor from a tokenizer.

        Args:
            tokenizer: Fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor (for instance `{"size": {"height": 128, "width": 128}}`). With `None` the processor prepares
                no images.
            options: Options of the processor.
        """
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            # Images are stretched to a square, because cropping would remove parts of them.
            settings = {"size": {"height": 64, "width": 64}, "do_center_crop": False} | dict(vision or {})
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        options.setdefault("fact_columns", ["aliases", "description", "attributes"])
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Any = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
    ) -> BatchFeature:
        """Prepares M pairs of a mention and its candidates.

        Args:
            pairs (`list[tuple[dict, list[dict]]]`): M mention rows, each with the rows of its candidates. A textual
                mention has `text`, `mention`, `start` and `end`; a visual mention has `modality` "image" and `image`.
                Both have `document_id` or, in its absence, `context_id`; a mention with neither is a document by
                itself. A candidate has `entity_id`, `name`, `description`, `attributes`, `images` (the first is used)
                and `prior`, p(e|m), which defaults to 0. If images were encoded before, all rows have
                `image_features`, a tensor [d] or `None`.
            mentions, entities: Not supported by a reranker.

        Returns:
            `BatchFeature` of tensors. C is the largest number of candidates of a mention, E the number of distinct
            entities and I the number of distinct images in the batch:

            - `pair_mask` [M, C]: False for padding;
            - `pair_context` [M]: number of the mention's document;
            - `pair_visual` [M]: True for visual mentions;
            - `pair_prior` [M, C];
            - `pair_entity` [M, C]: number among the E entities, -1 for padding;
            - `pair_word_ids` [M, L]: words to the left of the mention, words of the mention and words to its right,
              padded with -1;
            - `pair_span` [M, 2]: start and end of the mention in them;
            - `pair_name_ids`, `pair_fact_ids` [E, ·]: words of the name, and of description and attributes, padded
              with -1;
            - `pair_mention_image` [M] and `pair_entity_image` [M, C], if images are prepared: number among the I
              images, -1 for a missing image. Only visual mentions and their candidates have images;
            - `pair_pixel_values` [I, 3, H, W] or `pair_image_features` [I, d], if the batch has images.

        Raises:
            ValueError: `pairs` is missing, a row has an unknown modality or a prior that is no probability, or only
                some rows have `image_features`.
        """
        if mentions is not None or entities is not None or pairs is None:
            raise ValueError("MM-nel reads a document's mentions and their candidates together. Give pairs=.")
        rows = [mention for mention, _ in pairs]
        lists = [list(candidates) for _, candidates in pairs]
        shape = (len(rows), max([1, *map(len, lists)]))
        mask = torch.zeros(shape, dtype=torch.bool)
        prior = torch.zeros(shape)
        entity = torch.full(shape, -1)
        entity_rows: dict[Any, Mapping[str, Any]] = {}
        entity_numbers: dict[Any, int] = {}
        for m, candidates in enumerate(lists):
            numbers = []
            for row in candidates:
                key = row.get("entity_id") or (row.get("name"), self._facts(row))
                numbers.append(entity_numbers.setdefault(key, len(entity_numbers)))
                entity_rows.setdefault(key, row)
            entity[m, : len(candidates)] = torch.tensor(numbers, dtype=torch.int64)
            prior[m, : len(candidates)] = torch.tensor([self._prior(row, rows[m]) for row in candidates])
            mask[m, : len(candidates)] = True
        visual = [self._modality(row) == "image" for row in rows]
        documents: dict[Any, int] = {}
        context = [documents.setdefault(self._document(row, m), len(documents)) for m, row in enumerate(rows)]
        words, spans = self._context_words(rows, visual)
        names = self._word_ids([str(row.get("name") or "") for row in entity_rows.values()])
        facts = self._word_ids([self._facts(row) for row in entity_rows.values()])
        batch = {
            "pair_mask": mask,
            "pair_context": torch.tensor(context, dtype=torch.int64),
            "pair_visual": torch.tensor(visual, dtype=torch.bool),
            "pair_prior": prior,
            "pair_entity": entity,
            "pair_word_ids": _padded(words),
            "pair_span": torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
            "pair_name_ids": _padded(names),
            "pair_fact_ids": _padded([ids[: self.entity_words] for ids in facts]),
        }
        if self.use_images:
            batch |= self._image_tensors(rows, lists, visual, shape)
        return BatchFeature(batch)

    # Copied from modeling/mmel/processing_mmel.py
    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Returns the pixel values [I, 3, H, W] of I PIL images."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def _facts(self, row: Mapping[str, Any]) -> str:
        """Returns the texts of an entity in addition to its name."""
        values = [row.get(column) or "" for column in self.fact_columns]
        return " ".join(value if isinstance(value, str) else ", ".join(filter(None, value)) for value in values)

    @staticmethod
    def _document(row: Mapping[str, Any], place: int) -> Any:
        """Returns a key that the mentions of a document share. `place` is the row's number in the batch."""
        for column in ("document_id", "context_id"):
            if row.get(column) not in (None, ""):
                return column, row[column]
        return ("row", place)

    @staticmethod
    def _modality(row: Mapping[str, Any]) -> str:
        modality = row.get("modality") or "text"
        if modality not in _MODALITIES:
            raise ValueError(
                f"The mention {row.get('mention_id')!r} has modality={modality!r}. Give one of "
                f"{', '.join(map(repr, _MODALITIES))}."
            )
        return modality

    @staticmethod
    def _prior(row: Mapping[str, Any], mention: Mapping[str, Any]) -> float:
        prior = row.get("prior")
        value = 0.0 if prior is None else float(prior)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"The candidate {row.get('entity_id')!r} of the mention {mention.get('mention_id')!r} has "
                f"prior={value}, which is not a probability."
            )
        return value

    def _context_words(self, rows, visual: list[bool]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Returns the words of each mention and of its context, and the span of the mention in them."""
        textual = [row for row, is_visual in zip(rows, visual, strict=True) if not is_visual]
        texts = list(dict.fromkeys(str(row["text"] or "") for row in textual))  # mentions of a document share its text
        encoded = dict(zip(texts, self._words_with_offsets(texts), strict=True))
        surfaces = list(dict.fromkeys(str(row.get("mention") or "") for row in textual))
        surface_ids = dict(zip(surfaces, self._word_ids(surfaces), strict=True))
        half = self.context_words // 2
        words: list[list[int]] = []
        spans: list[tuple[int, int]] = []
        for row, is_visual in zip(rows, visual, strict=True):
            if is_visual:
                words.append([])
                spans.append((0, 0))
                continue
            text, surface = str(row["text"] or ""), str(row.get("mention") or "")
            start, end = _mention_span(row, text)
            ids, starts, ends = encoded[text]
            if start == end:  # the mention is not in the text, so the beginning of the text is its context
                mention_ids, first, last = surface_ids[surface], 0, 0
            else:
                first, last = bisect_right(ends, start), bisect_left(starts, end)
                mention_ids = ids[first:last]
            left = ids[max(0, first - half) : first]
            right = ids[last : last + (self.context_words if start == end else half)]
            words.append([*left, *mention_ids, *right])
            spans.append((len(left), len(left) + len(mention_ids)))
        return words, spans

    #: Options that limit the words of a text.
    length_options = ("context_words", "entity_words")

    def num_left_out(self, mentions=None, entities=None, pairs=()) -> list[int]:
        """Returns how many words of each pair are left out: of each mention's candidates."""
        rows = [mention for mention, _ in pairs]
        visual = [self._modality(row) == "image" for row in rows]
        contexts = self._word_ids(["" if v else str(row["text"] or "") for row, v in zip(rows, visual, strict=True)])
        windows, _ = self._context_words(rows, visual)
        facts = iter(self._word_ids([self._facts(row) for _, candidates in pairs for row in candidates]))
        return [
            max(len(context) - len(window), 0) + max(len(next(facts)) - self.entity_words, 0)
            for context, window, (_, candidates) in zip(contexts, windows, pairs, strict=True)
            for _ in candidates
        ]

    def _words_with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[int], list[int]]]:
        """Returns the words of each text that have a vector: their ids, and where they start and end in the text."""
        if not texts:
            return []
        unknown = self.tokenizer.unk_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        result = []
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            words = [(i, start, end) for i, (start, end) in zip(ids, offsets, strict=True) if i != unknown]
            result.append(tuple([word[k] for word in words] for k in range(3)))
        return result  # type: ignore[return-value]

    def _word_ids(self, texts: list[str]) -> list[Sequence[int]]:
        """Returns the ids of the words of each text that have a vector. Texts that were read lately are not read again."""
        known = _READ.setdefault(self.tokenizer, {})
        if len(known) > _MOST_READ:
            known.clear()
        if unread := [text for text in dict.fromkeys(texts) if text not in known]:
            unknown = self.tokenizer.unk_token_id
            unused = {"return_attention_mask": False, "return_token_type_ids": False}  # which take as long as the ids
            encoded = self.tokenizer(unread, add_special_tokens=False, verbose=False, **unused)["input_ids"]
            for text, ids in zip(unread, encoded, strict=True):
                known[text] = array("i", [i for i in ids if i != unknown])
        return [known[text] for text in texts]

    def _image_tensors(self, rows, lists, visual: list[bool], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Returns the images of visual mentions and their candidates, each distinct image once, and their numbers."""
        shown: list[tuple[int, int | None, Mapping[str, Any]]] = [
            (m, None, row) for m, row in enumerate(rows) if visual[m]
        ]
        shown += [(m, c, row) for m, candidates in enumerate(lists) if visual[m] for c, row in enumerate(candidates)]
        encoded = {"image_features" in row for _, _, row in shown}
        if encoded == {True, False}:
            raise ValueError(
                "Some rows have image_features and others do not. Encode the images of all rows or of none."
            )
        mention_image, entity_image = torch.full((shape[0],), -1), torch.full(shape, -1)
        numbers: dict[Any, int] = {}
        values: list[Any] = []
        for m, c, row in shown:
            if encoded == {True}:
                value = row["image_features"]
                key: Any = id(value)
            else:
                value = row.get("image") if c is None else next(iter(row.get("images") or ()), None)
                value = None if value is None else value.convert("RGB")
                key = None if value is None else (value.size, value.tobytes())
            if value is None:
                continue
            if key not in numbers:
                numbers[key] = len(values)
                values.append(value)
            (mention_image if c is None else entity_image)[m if c is None else (m, c)] = numbers[key]
        batch = {"pair_mention_image": mention_image, "pair_entity_image": entity_image}
        if values and encoded == {True}:
            batch["pair_image_features"] = torch.stack(values)
        elif values:
            batch["pair_pixel_values"] = self.images(values)
        return batch


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns R lists of numbers as a tensor [R, longest], padded with -1."""
    out = torch.full((len(rows), max([1, *map(len, rows)])), -1)
    is_number = torch.arange(out.shape[1]) < torch.tensor(list(map(len, rows)))[:, None]
    out[is_number] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
    return out


# Copied from modeling/mimic/processing_mimic.py
def _mention_span(row: Mapping[str, Any], text: str) -> tuple[int, int]:
    """Returns where the mention stands in the text: at `start` and `end`, or else where it occurs first; (0, 0) if not."""
    start, end, name = row.get("start"), row.get("end"), row.get("mention") or ""
    if start is not None and end is not None and 0 <= start < end <= len(text):
        return start, end
    first = re.search(re.escape(name), text, re.IGNORECASE) if name.strip() else None
    return first.span() if first else (0, 0)


__all__ = ["MmNelProcessor"]

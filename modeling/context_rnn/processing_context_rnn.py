"""Processor of ARNN, IMN's "BERT" and Att: words left of, in and right of a mention, words of entities, and images."""

from __future__ import annotations

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

from .glove_context_rnn import glove_tokenizer

#: Ids of the words of texts that were read lately, by tokenizer and text, because entities are candidates again and again.
_READ: WeakKeyDictionary[Any, dict[str, Sequence[int]]] = WeakKeyDictionary()
_MOST_READ = 2**15


class ContextRnnProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of a [`ContextRnnModel`].

    ```python
    >>> mention = {"mention": "Wayne", "text": "Wayne meets Gordon.", "start": 0, "end": 5, "image": None}
    >>> entity = {"entity_id": "Q1", "name": "Bruce Wayne", "attributes": "", "images": []}
    >>> processor(pairs=[(mention, [entity])])  # doctest: +SKIP
    ```

    Words without a vector, and unknown tokens, are left out.

    Args:
        image_processor: Image processor. Its configuration determines size, cropping and normalisation.
        tokenizer: Fast tokenizer. For word vectors, its ids are the rows of the model's table.
        context_words (`int`, *optional*, defaults to 100): Number of words around the mention, half of them on each side,
            and the largest number of words of a mention.
        entity_words (`int`, *optional*, defaults to 64): Number of words of an entity's `fact_columns`; with
            `special_tokens`, of its name, too.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images.
        special_tokens (`bool`, *optional*, defaults to `False`): Whether texts stand between the tokenizer's first and last
            special token, as a model with a text encoder reads them.
        fact_columns (`list[str]`, *optional*): Columns of an entity that are read in addition to its name, in order.
    """

    #: Options that limit the words of a text.
    length_options = ("context_words", "entity_words")

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        context_words=100,
        entity_words=64,
        use_images=True,
        special_tokens=False,
        fact_columns=("aliases", "description", "attributes"),
    ):
        for name, value in (("context_words", context_words), ("entity_words", entity_words)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        super().__init__(image_processor, tokenizer)
        self.context_words, self.entity_words, self.use_images = context_words, entity_words, use_images
        self.special_tokens, self.fact_columns = special_tokens, list(fact_columns)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> ContextRnnProcessor:
        """Builds a processor for a model of [`ContextRnnModel.from_backbones`], from the same arguments.

        Args:
            text (`str`): Path of a file of word vectors in GloVe's format, or Hub id or folder of a transformers
                model.
            vision (`str`, *optional*): Hub id or folder of an image encoder.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError("from_backbones needs word vectors or a text encoder. Give its file, Hub id or folder.")
        tokenizer = glove_tokenizer(text) if Path(text).is_file() else AutoTokenizer.from_pretrained(text)
        return cls.from_parts(tokenizer, vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> ContextRnnProcessor:
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
            pairs (`list[tuple[dict, list[dict]]]`): M mention rows (`mention`, `text`, `start`, `end`, `context_id`,
                `image`), each with the rows of its candidates (`entity_id`, `name`, `aliases`, `description`,
                `attributes`, `images`, of which the first is used). If images were encoded before, all rows have
                `image_features`, a tensor [d] or `None`.
            mentions, entities: Not supported by a reranker.

        Returns:
            `BatchFeature` of tensors. C is the largest number of candidates of a mention, E the number of distinct
            entities and I the number of distinct images in the batch:

            - `pair_mask` [M, C]: False for padding;
            - `pair_context` [M]: number of the mention's document or context;
            - `pair_entity` [M, C]: number among the E entities, -1 for padding;
            - `pair_word_ids` [M, L]: words of the text, padded with -1;
            - `pair_part` [M, L]: 1 left of the mention, 2 in it, 3 right of it, 0 for padding and special tokens;
            - `pair_entity_ids` [E, ·] with `special_tokens`, otherwise `pair_name_ids` and `pair_fact_ids` [E, ·]:
              words of the entities, padded with -1;
            - `pair_mention_image` [M] and `pair_entity_image` [M, C], if images are prepared: number among the I
              images, -1 for a missing image;
            - `pair_pixel_values` [I, 3, H, W] or `pair_image_features` [I, d], if the batch has images.

        Raises:
            ValueError: `pairs` is missing, or only some rows have `image_features`.
        """
        if mentions is not None or entities is not None or pairs is None:
            raise ValueError("This model reads a mention together with its candidates. Give pairs=.")
        rows = [mention for mention, _ in pairs]
        lists = [list(candidates) for _, candidates in pairs]
        shape = (len(rows), max([1, *map(len, lists)]))
        mask, entity = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
        entity_rows: dict[Any, Mapping[str, Any]] = {}
        numbers: dict[Any, int] = {}
        for m, candidates in enumerate(lists):
            for c, row in enumerate(candidates):
                key = row.get("entity_id") or (row.get("name"), self._facts(row))
                entity[m, c] = numbers.setdefault(key, len(numbers))
                entity_rows.setdefault(key, row)
            mask[m, : len(candidates)] = True
        documents: dict[Any, int] = {}
        context = [documents.setdefault(self._document(row, m), len(documents)) for m, row in enumerate(rows)]
        words, parts = [], []
        for ids, (start, end) in zip(*self._context_words(rows, [False] * len(rows)), strict=True):
            stop = min(end, start + self.context_words)  # a long mention is cut
            part = [1] * start + [2] * (stop - start) + [3] * (len(ids) - end)
            words.append(self._with_special(ids[:stop] + ids[end:]))
            parts.append([0, *part, 0] if self.special_tokens else part)
        part_numbers = _padded(parts).clamp(min=0)
        batch = {
            "pair_mask": mask,
            "pair_context": torch.tensor(context, dtype=torch.int64),
            "pair_entity": entity,
            "pair_word_ids": _padded(words),
            "pair_part": part_numbers,
        }
        names = self._word_ids([str(row.get("name") or "") for row in entity_rows.values()])
        facts = self._word_ids([self._facts(row) for row in entity_rows.values()])
        if self.special_tokens:
            texts = [[*name, *fact][: self.entity_words] for name, fact in zip(names, facts, strict=True)]
            batch["pair_entity_ids"] = _padded([self._with_special(ids) for ids in texts])
        else:
            batch["pair_name_ids"] = _padded(names)
            batch["pair_fact_ids"] = _padded([ids[: self.entity_words] for ids in facts])
        if self.use_images:
            batch |= self._image_tensors(rows, lists, [True] * len(rows), shape)
        return BatchFeature(batch)

    def _with_special(self, ids: list[int]) -> list[int]:
        """Returns the words, with `special_tokens` between the first and the last special token."""
        return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id] if self.special_tokens else ids

    def num_left_out(self, mentions=None, entities=None, pairs=()) -> list[int]:
        """Returns how many words of each pair are left out: of each mention's candidates."""
        rows = [mention for mention, _ in pairs]
        contexts = self._word_ids([str(row["text"] or "") for row in rows])
        windows, spans = self._context_words(rows, [False] * len(rows))
        counts = []
        for context, window, (start, end), (_, candidates) in zip(contexts, windows, spans, pairs, strict=True):
            cut = max(end - start - self.context_words, 0)
            names = self._word_ids([str(row.get("name") or "") for row in candidates])
            facts = self._word_ids([self._facts(row) for row in candidates])
            for name, fact in zip(names, facts, strict=True):
                read = len(fact) + (len(name) if self.special_tokens else 0)
                counts.append(max(len(context) - len(window), 0) + cut + max(read - self.entity_words, 0))
        return counts

    # Copied from modeling/mmel/processing_mmel.py
    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Returns the pixel values [I, 3, H, W] of I PIL images."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    # Copied from modeling/mm_nel/processing_mm_nel.py
    def _facts(self, row: Mapping[str, Any]) -> str:
        """Returns the texts of an entity in addition to its name."""
        values = [row.get(column) or "" for column in self.fact_columns]
        return " ".join(value if isinstance(value, str) else ", ".join(filter(None, value)) for value in values)

    # Copied from modeling/mm_nel/processing_mm_nel.py
    @staticmethod
    def _document(row: Mapping[str, Any], place: int) -> Any:
        """Returns a key that the mentions of a document share. `place` is the row's number in the batch."""
        for column in ("document_id", "context_id"):
            if row.get(column) not in (None, ""):
                return column, row[column]
        return ("row", place)

    # Copied from modeling/mm_nel/processing_mm_nel.py
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

    # Copied from modeling/mm_nel/processing_mm_nel.py
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

    # Copied from modeling/mm_nel/processing_mm_nel.py
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

    # Copied from modeling/mm_nel/processing_mm_nel.py
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


# Copied from modeling/mm_nel/processing_mm_nel.py
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


__all__ = ["ContextRnnProcessor"]

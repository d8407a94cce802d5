"""Processor of GENRE and "Autoregressive": marks the mention in its context, and makes the tokens of names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from string import Formatter
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BatchFeature, ProcessorMixin


class AutoregressiveProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of an [`AutoregressiveModel`].

    ```python
    >>> processor(pairs=[(mention_row, candidate_rows)])  # doctest: +SKIP
    ```

    A context that is too long is a window around the mention. A mention that is not in its text is put in front of it.

    Args:
        tokenizer: Fast tokenizer.
        max_length (`int`, *optional*, defaults to 128): Maximum number of tokens of a context, special tokens included.
        max_name_length (`int`, *optional*, defaults to 32): Maximum number of tokens of a name, special tokens included.
        mention_marks (`list[str]`, *optional*): The marks before and after the mention; by default GENRE's, which are plain
            text. `None` marks nothing.
        name_template (`str`, *optional*, defaults to `"{name}"`): The text to generate, with columns of the entity. Give
            `"{name} ({description})"` for a knowledge base in which several entities share a name.
        start_token (`str`, *optional*): Token that is put before a name and its special tokens, which starts the decoder of
            BART and T5. `None`: a name starts with the tokenizer's first special token.
    """

    def __init__(
        self,
        tokenizer=None,
        max_length=128,
        max_name_length=32,
        mention_marks=("[START_ENT]", "[END_ENT]"),
        name_template="{name}",
        start_token=None,
    ):
        super().__init__(tokenizer)
        for name, value in (("max_length", max_length), ("max_name_length", max_name_length)):
            if value < 4:
                raise ValueError(f"{name}={value} must be at least 4.")
        if tokenizer is not None and not tokenizer("")["input_ids"]:
            raise ValueError(
                "The tokenizer adds no special tokens, but a name needs one that ends it. Use another tokenizer."
            )
        self.max_length, self.max_name_length = max_length, max_name_length
        self.mention_marks = None if mention_marks is None else list(mention_marks)
        self.name_template, self.start_token = name_template, start_token

    #: Options that limit the tokens of a text.
    length_options = ("max_length", "max_name_length")

    @classmethod
    def from_backbones(cls, text: str | None = None, **options) -> AutoregressiveProcessor:
        """Builds a processor for a model of [`AutoregressiveModel.from_backbones`], from the same arguments.

        Args:
            text (`str`): Hub id or folder of a sequence-to-sequence model or of an encoder.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError("from_backbones needs the tokenizer of a pretrained model. Give its Hub id or folder.")
        tokenizer = AutoTokenizer.from_pretrained(text)
        start = getattr(AutoConfig.from_pretrained(text), "decoder_start_token_id", None)
        if start is not None:
            options.setdefault("start_token", tokenizer.convert_ids_to_tokens(start))
        return cls.from_parts(tokenizer, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: Any = None, **options) -> AutoregressiveProcessor:
        """Builds a processor from a tokenizer.

        Args:
            tokenizer: Fast tokenizer.
            vision: Must be `None`, because the methods see no images.
            options: Options of the processor.
        """
        if vision is not None:
            raise ValueError("This method sees no images. Remove the image processor.")
        return cls(tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Any = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
    ) -> BatchFeature:
        """Prepares M pairs of a mention and its candidates.

        Args:
            pairs (`list[tuple[dict, list[dict]]]`): M mention rows, each with the rows of its candidates.
            mentions, entities: Not supported by a reranker.

        Returns:
            `BatchFeature`: The arguments of [`AutoregressiveModel.forward`].

        Raises:
            ValueError: `pairs` is missing, or an entity lacks a column of `name_template`.
        """
        if mentions is not None or entities is not None or pairs is None:
            raise ValueError("This method reads a mention and its candidates together. Give pairs=.")
        rows = [mention for mention, _ in pairs]
        lists = [list(candidates) for _, candidates in pairs]
        entity = torch.full((len(rows), max([1, *map(len, lists)])), -1)
        names: dict[str, int] = {}
        for m, candidates in enumerate(lists):
            for c, row in enumerate(candidates):
                entity[m, c] = names.setdefault(self._name(row), len(names))
        contexts: dict[Any, int] = {}
        context = [contexts.setdefault(row.get("context_id", ("row", m)), len(contexts)) for m, row in enumerate(rows)]
        texts, ends = self._contexts(rows)
        pad = self.tokenizer.pad_token_id or 0
        input_ids = _padded(texts)
        return BatchFeature(
            {
                "pair_input_ids": input_ids.masked_fill(input_ids < 0, pad),
                "pair_attention_mask": (input_ids >= 0).long(),
                "pair_ends": torch.tensor(ends, dtype=torch.int64).reshape(-1, 2),
                "pair_mask": entity >= 0,
                "pair_entity": entity,
                "pair_name_ids": _padded(self.name_tokens(list(names)) or [[]]),
                "pair_context": torch.tensor(context, dtype=torch.int64),
            }
        )

    def entity_names(self, entities: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Returns the tokens of the names of entities, for a [`NameTrie`], from the start token to the end token."""
        return self.name_tokens([self._name(row) for row in entities])

    def name_tokens(self, names: list[str]) -> list[list[int]]:
        """Returns the tokens of names, from the start token to the end token."""
        if not names:
            return []
        encoded = self.tokenizer(names, truncation=True, max_length=self.max_name_length, verbose=False)["input_ids"]
        if self.start_token is None:
            return encoded
        start = self.tokenizer.convert_tokens_to_ids(self.start_token)
        return [[start, *ids] for ids in encoded]

    def _name(self, row: Mapping[str, Any]) -> str:
        """Returns the text that is generated for an entity."""
        columns = [column for _, column, _, _ in Formatter().parse(self.name_template) if column]
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(
                f"name_template={self.name_template!r} needs the column {missing[0]!r}, but the row has {', '.join(row)}."
            )
        return self.name_template.format(**{column: row[column] or "" for column in columns})

    def _marked(self, rows) -> list[tuple[str, tuple[int, int]]]:
        """Returns the text of each mention and the span of the mention with its marks."""
        out = []
        for row in rows:
            text = str(row.get("text") or "")
            span = _mention_span(row, text)
            if span[0] == span[1]:
                surface = str(row.get("mention") or "")
                text, span = f"{surface} {text}", (0, len(surface))
            out.append(_with_marks(text, span, self.mention_marks))
        return out

    def _contexts(self, rows) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Returns the tokens of each context, and the positions of the first and last token of the mention."""
        if not rows:
            return [], []
        marked = self._marked(rows)
        encoded = self.tokenizer(
            [text for text, _ in marked], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        special = self.tokenizer("")["input_ids"]  # T5 has an end alone
        before, after = special[:-1], special[-1:]
        room = self.max_length - len(special)
        texts, ends = [], []
        for ids, offsets, (_, (start, stop)) in zip(
            encoded["input_ids"], encoded["offset_mapping"], marked, strict=True
        ):
            inside = [k for k, (left, right) in enumerate(offsets) if left < stop and right > start]
            first, last = (inside[0], inside[-1]) if inside else (0, 0)
            last = min(last, first + room - 1)
            begin = max(min(first - (room - (last - first + 1)) // 2, len(ids) - room), 0)
            texts.append([*before, *ids[begin : begin + room], *after])
            ends.append((len(before) + first - begin, len(before) + last - begin))
        return texts, ends

    def num_left_out(self, mentions=None, entities=None, pairs=()) -> list[int]:
        """Returns how many tokens of each pair are left out: of each mention's candidates."""
        rows = [mention for mention, _ in pairs]
        names = [self._name(row) for _, candidates in pairs for row in candidates]
        if not names:
            return []
        special = len(self.tokenizer("")["input_ids"])
        contexts = self.tokenizer([text for text, _ in self._marked(rows)], add_special_tokens=False, verbose=False)
        lengths = iter(self.tokenizer(names, verbose=False)["input_ids"])
        return [
            max(len(context) + special - self.max_length, 0) + max(len(next(lengths)) - self.max_name_length, 0)
            for context, (_, candidates) in zip(contexts["input_ids"], pairs, strict=True)
            for _ in candidates
        ]


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


# Copied from modeling/mimic/processing_mimic.py
def _with_marks(text: str, span: tuple[int, int], marks: Sequence[str] | None) -> tuple[str, tuple[int, int]]:
    """Puts marks around the mention at `span`, and returns the text and the span of the mention with its marks."""
    start, end = span
    if not marks or start == end:
        return text, span
    marked = f"{marks[0]} {text[start:end]} {marks[1]}"
    return f"{text[:start]}{marked}{text[end:]}", (start, start + len(marked))


__all__ = ["AutoregressiveProcessor"]

"""Processor of the cross-encoder: makes "[CLS] mention in context [SEP] entity [SEP]" of every pair, by templates."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import ChainMap
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

#: Columns that the row of an entity may lack.
_OPTIONAL_COLUMNS = ("aliases", "description", "attributes")


class _Text(NamedTuple):
    """Tokens of one text with their characters, and the characters of its window and of the mention in it; (0, 0) for none."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    window: tuple[int, int] = (0, 0)
    mention: tuple[int, int] = (0, 0)

    def cut(self, length: int) -> list[int]:
        """Returns at most `length` tokens: without those of the window farthest from the mention, then without the last."""
        special = [False] * len(self.ids)
        return [self.ids[k] for k in _kept_tokens(self.offsets, special, length, self.window, self.mention)]


class CrossEncoderProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of a [`CrossEncoderModel`].

    ```python
    >>> processor(pairs=[(mention_row, candidate_rows)])  # doctest: +SKIP
    ```

    A sequence that is too long is cut on both sides: each text may use half of the tokens, and those that the other does
    not use. A window keeps the tokens around the mention, any other text its beginning.

    Args:
        tokenizer: A fast tokenizer with a first and a separating token.
        max_length (`int`, *optional*, defaults to 256): Maximum number of tokens of a sequence: 128 + 128 in BLINK.
            Sequences are padded to the longest of the batch.
        mention_template (`str`, *optional*): Text of a mention. Fields in braces are columns of its row; `{window}` is its
            text with the mention between the first two `markers`.
        entity_template (`str`, *optional*): Text of an entity. Fields in braces are columns of its row, of which it may lack
            `aliases`, `description` and `attributes`.
        markers (`list[str]`, *optional*): Marks before and after the mention, and perhaps others that the templates contain.
            Those that the vocabulary has, such as BERT's unused tokens, are read as one token, others as text. A mention that
            does not stand in its text is put in front of it, marked, unless the template has `{mention}`. `None` marks nothing;
            [`CrossEncoderProcessor.from_parts`] sets "«" and "»".
        name_match (`bool`, *optional*, defaults to `False`): Whether to prepare `pair_name_match`, 1 if the entity's name or an
            alias has all words of the mention. A model with `name_weight` needs it.
    """

    def __init__(
        self,
        tokenizer=None,
        max_length=256,
        mention_template="{mention} | {window}",
        entity_template="{name} | {aliases} | {description} | {attributes}",
        markers=None,
        name_match=False,
    ):
        super().__init__(tokenizer)
        if markers is not None and len(markers) < 2:
            raise ValueError(f"markers={markers!r} needs a marker before and one after the mention.")
        if max_length < 8:
            raise ValueError(f"max_length={max_length} is too short for two texts. Give at least 8.")
        limit = getattr(tokenizer, "model_max_length", max_length)
        if max_length > limit:
            raise ValueError(f"max_length={max_length} exceeds the {limit} positions of the text encoder.")
        self.max_length = max_length
        self.mention_template = mention_template
        self.entity_template = entity_template
        self.markers = None if markers is None else list(markers)
        self.name_match = name_match
        if self.markers and tokenizer is not None:
            vocabulary = tokenizer.get_vocab()
            tokenizer.add_tokens([marker for marker in self.markers if marker in vocabulary])  # keeps them whole

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> CrossEncoderProcessor:
        """Builds the processor of a model of [`CrossEncoderModel.from_backbones`], from the same arguments.

        Args:
            text (`str`): Hub id or folder of the encoder.
            vision: Not supported.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError("The tokenizer is missing. Pass the Hub id or folder of a text encoder as text=.")
        return cls.from_parts(AutoTokenizer.from_pretrained(text), vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: Any = None, **options) -> CrossEncoderProcessor:
        """Builds a processor around a tokenizer.

        Args:
            tokenizer: A fast tokenizer.
            vision: Not supported.
            options: Options of the processor.

        Raises:
            `ValueError`: `vision` is given.
        """
        if vision is not None:
            raise ValueError("A cross-encoder reads text only. Remove the image encoder.")
        options.setdefault("markers", ["«", "»"])
        return cls(tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Any = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
    ) -> BatchFeature:
        """Prepares pairs of a mention and its candidates.

        Args:
            pairs (`list[tuple[dict, list[dict]]]`): M mention rows (`mention`, `text`, `start`, `end`), each with the rows of
                its candidates (the columns of the template, and `list_score` if the model reads it).
            mentions, entities: Not supported by a reranker.

        Returns:
            `BatchFeature` of the arguments of [`CrossEncoderModel.forward`].

        Raises:
            ValueError: `pairs` is not given, or a row lacks a column that its template needs.
        """
        if pairs is None or mentions is not None or entities is not None:
            raise ValueError("A cross-encoder reads a mention and its candidates together. Give pairs=.")
        columns = max([1, *(len(candidates) for _, candidates in pairs)])
        mask = torch.zeros(len(pairs), columns, dtype=torch.bool)
        for row, (_, candidates) in enumerate(pairs):
            mask[row, : len(candidates)] = True
        contexts: dict[Any, int] = {}
        keys = [mention.get("context_id", ("row", row)) for row, (mention, _) in enumerate(pairs)]
        for key in keys:
            contexts.setdefault(key, len(contexts))
        batch = {"pair_mask": mask, "pair_context": torch.tensor([contexts[key] for key in keys], dtype=torch.long)}
        batch |= given_tensors(pairs, mask, self.name_match)
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        sequences = []
        for first, second in self._texts(pairs):
            lengths = self._allot_tokens(len(first.ids), len(second.ids))
            parts = [cls, *first.cut(lengths[0]), sep], [*second.cut(lengths[1]), sep]
            sequences.append(([*parts[0], *parts[1]], len(parts[0])))
        shape = (*mask.shape, max([1, *(len(ids) for ids, _ in sequences)]))
        padding = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        tensors = {name: torch.full(shape, value) for name, value in padding.items()}
        for (row, column), (ids, split) in zip(mask.nonzero().tolist(), sequences, strict=True):
            tensors["input_ids"][row, column, : len(ids)] = torch.tensor(ids)
            tensors["attention_mask"][row, column, : len(ids)] = 1
            tensors["token_type_ids"][row, column, split : len(ids)] = 1
        return BatchFeature(batch | {f"pair_{name}": tensor for name, tensor in tensors.items()})

    def num_left_out(self, mentions=None, entities=None, pairs=()) -> list[int]:
        """Returns how many tokens of each pair are left out, because of `max_length`: of each mention's candidates."""
        lengths = [(len(first.ids), len(second.ids)) for first, second in self._texts(pairs)]
        return [a + b - sum(self._allot_tokens(a, b)) for a, b in lengths]

    def _allot_tokens(self, first: int, second: int) -> tuple[int, int]:
        """Returns how many tokens of two texts fit: half for each, and those that the other does not use."""
        total = self.max_length - 3
        if first + second <= total:
            return first, second
        share = min(first, max(total // 2, total - second))
        return share, total - share

    def _texts(self, pairs) -> list[tuple[_Text, _Text]]:
        """Returns the two texts of each pair of a mention and a candidate."""
        filled = [self._mention_text(mention) for mention, _ in pairs]
        tokens = zip(*self._tokenize([text for text, *_ in filled]), filled, strict=True)
        first = [_Text(ids, offsets, window, mention) for ids, offsets, (_, window, mention) in tokens]
        empty = dict.fromkeys(_OPTIONAL_COLUMNS, "")
        rows = [ChainMap(row, empty) for _, candidates in pairs for row in candidates]  # type: ignore[arg-type]
        texts = self._tokenize([self._fill_template(self.entity_template, row) for row in rows])
        second = iter([_Text(ids, offsets) for ids, offsets in zip(*texts, strict=True)])
        return [(text, next(second)) for text, (_, listed) in zip(first, pairs, strict=True) for _ in listed]

    # Copied from modeling/pfmel/processing_pfmel.py
    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Returns the tokens of each text and their offsets."""
        if not texts:
            return [], []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _mention_text(self, row: Mapping[str, Any]) -> tuple[str, tuple[int, int], tuple[int, int]]:
        """Fills the mention template, and returns it with the characters of its window and of the mention in that."""
        template, name = self.mention_template, row.get("mention") or ""
        if "{window}" not in template:
            return self._fill_template(template, row), (0, 0), (0, 0)
        before, after = (self._fill_template(part, row) for part in template.split("{window}", 1))
        text = row.get("text") or ""
        span, marks = _mention_span(row, text), None if self.markers is None else self.markers[:2]
        if marks and span[0] == span[1] and name.strip() and "{mention}" not in template:
            text, span = f"{name} {text}", (0, len(name))
        marked, (start, end) = _with_marks(text, span, marks)
        first = len(before)
        return before + marked + after, (first, first + len(marked)), (first + start, first + end)

    # Copied from modeling/mimic/processing_mimic.py
    @staticmethod
    def _fill_template(template: str, row: Mapping[str, Any]) -> str:
        """Fills the fields of a template with the columns of a row: `None` as an empty string, a list with commas."""
        columns = [name for _, name, _, _ in Formatter().parse(template) if name]
        try:
            values = {name: row[name] for name in columns}
        except KeyError as error:
            raise ValueError(
                f"The template {template!r} needs the column {error}, but the row has {', '.join(row)}."
            ) from None
        for name, value in values.items():
            values[name] = "" if value is None else value
            if isinstance(value, list | tuple):
                values[name] = ", ".join(str(item) for item in value if item)
        return template.format_map(values)


# Copied from modeling/mmel/processing_mmel.py
def given_tensors(pairs, mask: torch.Tensor, name_match: bool) -> dict[str, torch.Tensor]:
    """Returns what a pair has before it is read, each [M, C].

    Args:
        pairs (`list[tuple[dict, list[dict]]]`): M mention rows, each with the rows of its candidates.
        mask (`torch.Tensor` [M, C]): The candidates.
        name_match (`bool`): Whether to make `pair_name_match`, 1 if a name has all words of the mention. A mention without
            a word matches nothing.

    Returns:
        `dict`: `pair_name_match` if asked, and `pair_list_score` if all candidates have a `list_score`.
    """
    values: dict[str, list[float]] = {}
    if name_match:
        values["pair_name_match"] = [
            float(any(words and words <= _words_of(name) for name in (row.get("name"), *(row.get("aliases") or ()))))
            for mention, candidates in pairs
            for words in (_words_of(mention.get("mention")),)
            for row in candidates
        ]
    scores = [row.get("list_score") for _, candidates in pairs for row in candidates]
    if None not in scores:
        values["pair_list_score"] = scores
    tensors = {}
    for name, numbers in values.items():
        tensors[name] = torch.zeros(mask.shape)
        tensors[name][mask] = torch.tensor(numbers, dtype=torch.float32)
    return tensors


# Copied from modeling/mmel/processing_mmel.py
@functools.lru_cache(maxsize=2**16)
def _words_of(name: str | None) -> frozenset[str]:
    """Returns the words of a name, regardless of case and accents."""
    letters = unicodedata.normalize("NFKD", (name or "").casefold())
    return frozenset(re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c))))


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


# Copied from modeling/mimic/processing_mimic.py
def _kept_tokens(offsets, special, limit: int, window: tuple[int, int], mention: tuple[int, int]) -> list[int]:
    """Numbers of the tokens of a text that are kept, at most `limit`.

    Tokens in the window that are farthest from the mention are left out first, then the last ones. Special tokens stay.

    Args:
        offsets, special: First and last character of each token, and whether it is a special token.
        limit: Number of tokens.
        window, mention: Characters of the window and of the mention, end exclusive.
    """
    surplus = len(offsets) - limit
    if surplus <= 0:
        return list(range(len(offsets)))
    body = [k for k, is_special in enumerate(special) if not is_special]
    inside, named = (
        [k for k in body if offsets[k][0] < end and offsets[k][1] > start] for start, end in (window, mention)
    )
    start, stop = (inside.index(named[0]), inside.index(named[-1]) + 1) if inside and named else (0, 0)
    width = max(len(inside) - surplus, 0)
    first = _window_start(len(inside), start, stop, width)
    left_out = {*inside[:first], *inside[first + width :]}
    body = [k for k in body if k not in left_out]
    left_out.update(body[len(body) - surplus + len(left_out) :])
    return [k for k in range(len(offsets)) if k not in left_out]


# Copied from modeling/mmel/processing_mmel.py
def _window_start(length: int, start: int, stop: int, size: int) -> int:
    """Returns the start of a window of `size` of `length` tokens, with `start` to `stop` in its middle if possible."""
    first = start - (size - (stop - start)) // 2
    return max(0, min(first, length - size, start))


__all__ = ["CrossEncoderProcessor"]

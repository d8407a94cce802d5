"""Processor of NCEL and DGCN: turns rows into words around mentions, words of entities, and numbers that describe pairs."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .glove_candidate_graph import glove_tokenizer

#: Numbers that describe a pair, in order.
FEATURES = (
    "log_num_candidates",
    "prior",
    "highest_prior",
    "similarity",
    "equal",
    "mention_in_name",
    "name_in_mention",
    "name_starts_with_mention",
    "mention_starts_with_name",
    "name_ends_with_mention",
    "mention_ends_with_name",
)


#: Ids of the words of texts that were read lately, by tokenizer and text, because entities are candidates again and again.
_READ: WeakKeyDictionary[Any, dict[str, Sequence[int]]] = WeakKeyDictionary()
_MOST_READ = 2**15


class CandidateGraphProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of a [`CandidateGraphModel`].

    ```python
    >>> processor(pairs=[(mention_row, candidate_rows), …])  # doctest: +SKIP
    ```

    Words without a vector are left out.

    Args:
        tokenizer: Fast tokenizer whose ids are the rows of the model's table of word vectors.
        context_words (`int`, *optional*, defaults to 20): Number of context words, half of them on each side of the
            mention.
        entity_words (`int`, *optional*, defaults to 64): Number of words of an entity's `fact_columns`. Its name is
            not limited.
        fact_columns (`list[str]`, *optional*): Columns of an entity that are read in addition to its name, in order.
    """

    def __init__(
        self,
        tokenizer=None,
        context_words=20,
        entity_words=64,
        fact_columns=("aliases", "description", "attributes"),
    ):
        for name, value in (("context_words", context_words), ("entity_words", entity_words)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative.")
        super().__init__(tokenizer)
        self.context_words, self.entity_words = context_words, entity_words
        self.fact_columns = list(fact_columns)

    @classmethod
    def from_backbones(cls, text: str | None = None, **options) -> CandidateGraphProcessor:
        """Builds a processor for a model of [`CandidateGraphModel.from_backbones`], from the same arguments.

        Args:
            text (`str`): Path of a file of word vectors in GloVe's format, or Hub id or folder of a transformers
                model.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError(
                "from_backbones needs word vectors. Give a file in GloVe's format or a transformers model."
            )
        tokenizer = glove_tokenizer(text) if Path(text).is_file() else AutoTokenizer.from_pretrained(text)
        return cls.from_parts(tokenizer, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: Any = None, **options) -> CandidateGraphProcessor:
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
            pairs (`list[tuple[dict, list[dict]]]`): M mention rows, each with the rows of its candidates. Mentions of a
                document share `document_id` or, in its absence, `context_id`; a mention with neither is a document by
                itself. A candidate has `entity_id`, `name`, the columns of `fact_columns` and `prior`, p(e|m), which
                defaults to 0.
            mentions, entities: Not supported by a reranker.

        Returns:
            `BatchFeature`: The arguments of [`CandidateGraphModel.forward`].

        Raises:
            ValueError: `pairs` is missing, or a prior is no probability.
        """
        if mentions is not None or entities is not None or pairs is None:
            raise ValueError("This method reads a document's mentions and their candidates together. Give pairs=.")
        rows = [mention for mention, _ in pairs]
        lists = [list(candidates) for _, candidates in pairs]
        shape = (len(rows), max([1, *map(len, lists)]))
        mask = torch.zeros(shape, dtype=torch.bool)
        entity = torch.full(shape, -1)
        entity_rows: dict[Any, Mapping[str, Any]] = {}
        entity_numbers: dict[Any, int] = {}
        described: list[list[float]] = []  # of all pairs, because a tensor of each takes long
        for m, candidates in enumerate(lists):
            priors = [self._prior(row, rows[m]) for row in candidates]
            surface = _folded(str(rows[m].get("mention") or ""))
            numbers = []
            for prior, row in zip(priors, candidates, strict=True):
                key = row.get("entity_id") or (row.get("name"), self._facts(row))
                numbers.append(entity_numbers.setdefault(key, len(entity_numbers)))
                entity_rows.setdefault(key, row)
                shared = [math.log1p(len(candidates)), prior, max(priors)]
                described.append([*shared, *_name_features(surface, _folded(row.get("name") or ""))])
            entity[m, : len(candidates)] = torch.tensor(numbers, dtype=torch.int64)
            mask[m, : len(candidates)] = True
        features = torch.zeros(*shape, len(FEATURES))
        features[mask] = torch.tensor(described).reshape(-1, len(FEATURES))
        documents: dict[Any, int] = {}
        context = [documents.setdefault(self._document(row, m), len(documents)) for m, row in enumerate(rows)]
        words, spans = self._context_words(rows, [False] * len(rows))
        names = self._word_ids([str(row.get("name") or "") for row in entity_rows.values()])
        facts = self._word_ids([self._facts(row) for row in entity_rows.values()])
        return BatchFeature(
            {
                "pair_features": features,
                "pair_mask": mask,
                "pair_context": torch.tensor(context, dtype=torch.int64),
                "pair_entity": entity,
                "pair_word_ids": _padded(words),
                "pair_span": torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
                "pair_name_ids": _padded(names or [[]]),
                "pair_fact_ids": _padded([ids[: self.entity_words] for ids in facts] or [[]]),
            }
        )

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


def _name_features(surface: str, name: str) -> list[float]:
    """Returns the features of a folded surface form and a folded name, from "similarity" on; zeros if one is empty."""
    if not surface or not name:
        return [0.0] * 8
    return [
        _similarity(surface, name),
        *map(
            float,
            (
                surface == name,
                surface in name,
                name in surface,
                name.startswith(surface),
                surface.startswith(name),
                name.endswith(surface),
                surface.endswith(name),
            ),
        ),
    ]


# Copied from modeling/extra_trees/processing_extra_trees.py
@functools.lru_cache(maxsize=2**16)
def _folded(name: str) -> str:
    """Returns a name without case, accents and repeated spaces."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())


# Copied from modeling/extra_trees/processing_extra_trees.py
@functools.lru_cache(maxsize=2**16)
def _similarity(first: str, second: str) -> float:
    """Returns 1 less the edit distance of two strings divided by the longer length; 1 for two empty strings."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return 1 - row[-1] / max(len(first), len(second), 1)


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


__all__ = ["FEATURES", "CandidateGraphProcessor"]

"""A detector without a model: finds the names of a knowledge base in texts."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, Protocol

import ahocorasick
import numpy as np

from hf_mel.detection.folded_words import FoldedWords, folded_words
from hf_mel.detection.spans import MentionSpan, resolve_overlaps
from hf_mel.errors import DataFormatError
from hf_mel.schema import Row

#: Between words, and at both ends of names and texts. It is white space, so that no word has it.
_GAP = "\x1f"
#: All-capital words of up to so many letters are names only in capitals: "US", "WHO", but not "us", "Who".
_ACRONYM_LETTERS = 3
#: Floors of which the best on validation is taken.
_FLOORS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
#: The floor without validation mentions.
_DEFAULT_FLOOR = 0.1
_MIN_LETTERS = 2


class NamedEntities(Protocol):
    """A knowledge base, as far as [`Gazetteer.from_kb`] reads it."""

    def names(self) -> Iterable[list[str]]:
        """Returns the name and the aliases of each entity."""
        ...


class Gazetteer:
    """Finds names in texts. It needs no model and no training.

    ```python
    >>> gazetteer = Gazetteer(["Ghana", "Republic of Ghana", "US"])
    >>> gazetteer(["The Republic of Ghana wrote to us, and GHANA's team won."])
    [[MentionSpan(start=4, end=21, label='', score=None), MentionSpan(start=39, end=44, label='', score=None)]]
    ```

    - Case and accents do not count ([`~hf_mel.names.fold_name`]), nor do kinds of quotes, dashes and white space. Spans
      are always those of the text as it was given.
    - A name is found at word boundaries only. In scripts without spaces every letter is a word. A Korean name starts
      where a word starts.
    - The last capitalised word of a name must have a capital in the text, too: "Turkey" is not found in "a turkey". An
      all-capital word of up to 3 letters must be in capitals: "WHO" is not found in "Who". A name without capitals, as in
      scripts that have none, is found in any case.
    - Names with fewer than 2 letters, or without a letter, are not found. A qualifier in brackets at the end of a name
      ("Fred (footballer)") can be absent.
    - Overlaps are resolved by [`~hf_mel.detection.spans.resolve_overlaps`], so that the longest name is found.

    With `training`, it also finds the surface forms of training mentions, and learns which names are common words: the
    link probability of a name (Mihalcea and Csomai 2007, "keyphraseness") is the share of its occurrences in the training
    texts that are mentions. Names below a floor are not found. Since training texts do not mark every mention, the share
    is smoothed: (links + p) / (occurrences + 1), where p is the share of links among all occurrences of names. A name that
    does not occur in training is kept.

    Args:
        names (iterable of `str`): The names.
        training (sequence of rows, *optional*): Training mentions, with `text`, `mention`, `start` and `end`.
        validation (sequence of rows, *optional*): Validation mentions. The floor is the one with the best F1 of exact spans
            on their texts, the lowest of equally good ones. Without them, it is 0.1.
        ignore_case (`bool`): Whether case never counts, for texts without capitals.

    Raises:
        DataFormatError: There are no names, or the training mentions have no positions.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        training: Sequence[Row] | None = None,
        validation: Sequence[Row] | None = None,
        ignore_case: bool = False,
    ):
        if validation is not None and training is None:
            raise ValueError("validation= needs training=, from which the link probabilities are learned.")
        self.ignore_case = ignore_case
        self.floor: float | None = None
        self._rules: list[tuple[int, frozenset[tuple[int, str]]]] = []  # number of words, and case rules, of each name
        self._probabilities: np.ndarray | None = None
        self._digest = hashlib.sha256()
        rules_of: dict[str, set[tuple[int, str]]] = defaultdict(set)
        num_words: dict[str, int] = {}
        texts = {} if training is None else _spans_by_text(training)
        surfaces = (text[start:end] for text, spans in texts.items() for start, end in spans)
        for name in (*names, *surfaces):
            self._digest.update(name.encode("utf-8", "surrogatepass") + b"\n")
            for form in _forms(name):
                words = folded_words(form)
                if sum(map(str.isalnum, form)) < _MIN_LETTERS or not any(map(str.isalpha, form)):
                    continue
                key = _joined(words.words)
                num_words[key] = len(words.words)
                rules_of[key].add((0, "") if ignore_case else _case_rule(form, words))
        if not rules_of:
            raise DataFormatError(
                "The gazetteer has no names.", remedy="Give entities with names of at least 2 letters."
            )
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        shared: dict[Any, Any] = {}  # names with equal rules share them
        for number, (key, rules) in enumerate(rules_of.items()):
            self._automaton.add_word(key, number)
            rule = (num_words[key], frozenset(rules))
            self._rules.append(shared.setdefault(rule, rule))
        self._automaton.make_automaton()
        if training is not None:
            self._learn(texts, None if validation is None else _spans_by_text(validation))

    @classmethod
    def from_kb(cls, kb: NamedEntities, **options: Any) -> Gazetteer:
        """Builds the gazetteer of the names and aliases of a knowledge base.

        Args:
            kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
            options: Arguments of [`Gazetteer`].
        """
        return cls(chain.from_iterable(kb.names()), **options)

    def __len__(self) -> int:
        """The number of different folded names."""
        return len(self._rules)

    def describe(self) -> dict[str, Any]:
        """Returns what the spans depend on."""
        return {
            "detector": "gazetteer",
            "names": self._digest.hexdigest(),
            "floor": self.floor,
            "ignore_case": self.ignore_case,
        }

    def __call__(self, texts: Sequence[str]) -> list[list[MentionSpan]]:
        """Returns the names in each of T texts, with their link probability as score if it was learned."""
        return [resolve_overlaps(spans) for spans in self.with_overlaps(texts)]

    def with_overlaps(self, texts: Sequence[str]) -> list[list[MentionSpan]]:
        """Returns all names in each of T texts, also those inside a longer one."""
        return [self._spans(self._matches(text), self.floor) for text in texts]

    def _spans(self, matches: Iterable[tuple[int, int, int]], floor: float | None) -> list[MentionSpan]:
        spans = []
        for start, end, number in matches:
            score = None if self._probabilities is None else float(self._probabilities[number])
            if floor is None or score is None or score >= floor:
                spans.append(MentionSpan(start, end, "", score))
        return spans

    def _matches(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yields start, end and number of all names in a text that satisfy the rules of case, also overlapping ones."""
        words = folded_words(text)
        ends = list(accumulate(len(word) + 1 for word in words.words))  # position of the gap after each word
        for position, number in self._automaton.iter(_joined(words.words)):
            length, rules = self._rules[number]
            last = bisect_right(ends, position - 1)
            first = last - length + 1
            if first in words.continues:
                continue
            if any(_fits(text, words, first + place, kind) for place, kind in rules):
                yield words.starts[first], words.ends[last], number

    def _learn(
        self, training: Mapping[str, set[tuple[int, int]]], validation: Mapping[str, set[tuple[int, int]]] | None
    ) -> None:
        """Learns the link probability of each name, and the floor."""
        occurrences, links = np.zeros(len(self)), np.zeros(len(self))
        for text, golds in training.items():
            for start, end, number in self._matches(text):
                occurrences[number] += 1
                links[number] += (start, end) in golds
        mean = links.sum() / max(1.0, occurrences.sum())
        self._probabilities = np.where(occurrences > 0, (links + mean) / (occurrences + 1), 1.0)
        self._digest.update(self._probabilities.tobytes())
        self.floor = _DEFAULT_FLOOR
        if validation is not None:
            matches = {text: list(self._matches(text)) for text in validation}
            self.floor = max(_FLOORS, key=lambda floor: self._f1(matches, validation, floor))

    def _f1(self, matches: Mapping[str, list], golds: Mapping[str, set[tuple[int, int]]], floor: float) -> float:
        counts: Counter[str] = Counter()
        for text, gold_spans in golds.items():
            spans = {(span.start, span.end) for span in resolve_overlaps(self._spans(matches[text], floor))}
            counts.update(correct=len(spans & gold_spans), total=len(spans) + len(gold_spans))
        return 2 * counts["correct"] / max(1, counts["total"])


def _spans_by_text(mentions: Sequence[Row]) -> dict[str, set[tuple[int, int]]]:
    """Returns the spans of the mentions of each text. Mentions without a position are left out."""
    spans: dict[str, set[tuple[int, int]]] = defaultdict(set)
    columns = ("text", "start", "end")
    if hasattr(mentions, "select_columns"):
        mentions = mentions.select_columns(list(columns))  # a data set would decode images
    for row in mentions:
        text, start, end = (row[column] for column in columns)
        if start >= 0:
            spans[text].add((start, end))
    if not spans:
        raise DataFormatError(
            "No training mention has a position in its text.", remedy="Give mentions with start and end."
        )
    return spans


def _forms(name: str) -> Iterator[str]:
    """Yields a name, and the name without a qualifier in brackets at its end."""
    yield name
    if name.endswith(")") and " (" in name:
        yield name[: name.rindex(" (")]


def _joined(words: Sequence[str]) -> str:
    return f"{_GAP}{_GAP.join(words)}{_GAP}"


def _case_rule(name: str, words: FoldedWords) -> tuple[int, str]:
    """Returns the number of the last word with a capital, and what it needs in a text; "" if no word has a capital."""
    for number in reversed(range(len(words.words))):
        word = name[words.starts[number] : words.ends[number]]
        if word == word.lower():
            continue
        if word.isupper() and 2 <= len(word) <= _ACRONYM_LETTERS:
            return number, "all"
        return number, "first" if word[0].isupper() or word[0].istitle() else "any"
    return 0, ""


def _fits(text: str, words: FoldedWords, number: int, kind: str) -> bool:
    """Whether a word of a text has the capitals that a case rule needs."""
    if not kind:
        return True
    word = text[words.starts[number] : words.ends[number]]
    if kind == "all":
        return word.isupper()
    return word[0].isupper() or word[0].istitle() if kind == "first" else word != word.lower()

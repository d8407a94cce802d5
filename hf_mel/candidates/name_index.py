"""The name channel: an inverted index of the words of all names, which finds the entities that a surface form may name.

The entities of a knowledge base are read once. A look-up reads the entities of the rarest word, not all entities.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rapidfuzz import fuzz, process

from hf_mel.errors import RecipeError
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.names import words_of

#: Name score of an entity with a name that has all words of the surface form, and others.
NAMESAKE_SCORE = 0.75
#: A surface form without namesakes is compared with names that have at least this share of its words, by weight.
_LEAST_SHARE = 0.5
#: Similarity from which an unknown word may be a known one in another spelling, and number of such words.
_LEAST_SIMILARITY, _MAX_SIMILAR = 0.75, 16


class NameIndex:
    """The words of the names of N entities.

    Args:
        names (iterable of sequences of `str` `[N]`): Name and aliases of each entity. Empty names are ignored.
    """

    def __init__(self, names: Iterable[Sequence[str]]):
        self._number_by_word: dict[str, int] = {}
        words, lengths, entities = array("i"), array("i"), array("q")
        self.num_entities = 0
        for names_of_entity in names:
            for words_of_name in {words_of(name) for name in names_of_entity if name}:
                words.extend(self._number_by_word.setdefault(w, len(self._number_by_word)) for w in words_of_name)
                lengths.append(len(words_of_name))
                entities.append(self.num_entities)
            self.num_entities += 1
        # Names are numbered in the order of their entities.
        self._entity_of_name = np.frombuffer(entities, dtype=np.int64)
        self._length_of_name = np.frombuffer(lengths, dtype=np.int32)
        flat_words = np.frombuffer(words, dtype=np.int32)
        names_of_words = np.repeat(np.arange(len(lengths), dtype=np.int32), self._length_of_name)
        order = np.argsort(flat_words, kind="stable")
        self._names = names_of_words[order]  # names of word w: those from starts[w] up to starts[w + 1], ascending
        counts = np.bincount(flat_words, minlength=len(self._number_by_word))
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._words = list(self._number_by_word)

    def __len__(self) -> int:
        return self.num_entities

    def namesakes(self, surface: str) -> np.ndarray:
        """Returns the rows of the namesakes of a surface form, ascending ([`~hf_mel.names.has_all_words`])."""
        return np.unique(self._entity_of_name[self._names_with_all(words_of(surface))])

    def scores(self, surfaces: Sequence[str]) -> SparseScores:
        """Returns the name scores of M surface forms and the N entities, in (0, 1]; all others are 0.

        The score of an entity is that of its best name or alias:

        - 1 for a name that has the words of the surface form and no others;
        - [`NAMESAKE_SCORE`] for a name that has all of them and others;
        - if no entity of the knowledge base has either, [`NAMESAKE_SCORE`] times the share of the words of the surface
          form that the name has, if it is at least a half. Words weigh log(number of names / names that have the word), as
          in BM25. A word that no name has counts as the most similar words that names have, times the similarity
          (1 - edit distance by insertion and deletion / length of both).

        Case, accents, and the order and number of the words do not count.
        """
        of_surface = {surface: self._scores_of(words_of(surface)) for surface in set(surfaces)}
        return SparseScores.of_mentions([of_surface[surface] for surface in surfaces])

    def _scores_of(self, words: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of the entities with a score above 0, ascending, and their scores."""
        names = self._names_with_all(words)
        if len(names):
            values = np.where(self._length_of_name[names] == len(words), 1.0, NAMESAKE_SCORE)
        else:
            names, values = self._names_with_some(words)
        entities, starts = np.unique(self._entity_of_name[names], return_index=True)
        best = np.maximum.reduceat(values, starts) if len(starts) else values
        return entities, best.astype(np.float32)

    def _names_with(self, word: int) -> np.ndarray:
        return self._names[self._starts[word] : self._starts[word + 1]]

    def _names_with_all(self, words: frozenset[str]) -> np.ndarray:
        """Returns the numbers of the names that have all words, ascending; none without words."""
        numbers = [self._number_by_word.get(word) for word in words]
        if not numbers or None in numbers:
            return self._names[:0]
        rarest, *others = sorted((self._names_with(number) for number in numbers if number is not None), key=len)
        for names in others:
            places = np.minimum(np.searchsorted(names, rarest), len(names) - 1)
            rarest = rarest[names[places] == rarest]
        return rarest

    def _names_with_some(self, words: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of the names that have at least half of the words by weight, ascending, and their scores."""
        alternatives = [self._alternatives(word) for word in sorted(words)]
        weighted = sorted(((self._weight(similar), similar) for similar in alternatives), key=lambda pair: -pair[0])
        total = sum(weight for weight, _ in weighted)
        if not total:
            return self._names[:0], np.empty(0)
        names: np.ndarray = self._names[:0]
        shares: np.ndarray = np.empty(0)
        rest = total
        for weight, similar in weighted:
            with_word, similarities = self._names_with_similar(similar)
            if rest < _LEAST_SHARE * total:  # names without a word so far cannot reach half any more
                is_old = np.isin(with_word, names, assume_unique=True)
                with_word, similarities = with_word[is_old], similarities[is_old]
            names, place = np.unique(np.concatenate([names, with_word]), return_inverse=True)
            shares = np.bincount(place, np.concatenate([shares, weight / total * similarities]), len(names))
            rest -= weight
        is_kept = shares >= _LEAST_SHARE
        return names[is_kept], NAMESAKE_SCORE * shares[is_kept]

    def _names_with_similar(self, similar: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of the names with one of these words, ascending, and the best similarity of each."""
        parts = [self._names_with(word) for word, _ in similar]
        if not parts:
            return self._names[:0], np.empty(0)
        similarities = np.repeat([similarity for _, similarity in similar], list(map(len, parts)))
        joined = np.concatenate(parts)
        order = np.lexsort((-similarities, joined))
        names, firsts = np.unique(joined[order], return_index=True)
        return names, similarities[order][firsts]

    def _weight(self, similar: Sequence[tuple[int, float]]) -> float:
        """Returns the weight of a word that these are the alternatives of; that of a rare word if there are none."""
        count = min((len(self._names_with(word)) for word, _ in similar), default=1)
        return float(np.log((1 + len(self._entity_of_name)) / count))

    def _alternatives(self, word: str) -> list[tuple[int, float]]:
        """Returns the numbers of the known words that a word may be, and their similarity; itself, if it is known."""
        if word in self._number_by_word:
            return [(self._number_by_word[word], 1.0)]
        similar = process.extract(
            word,
            self._words,
            scorer=fuzz.ratio,
            processor=None,
            limit=_MAX_SIMILAR,
            score_cutoff=100 * _LEAST_SIMILARITY,
        )
        return [(number, similarity / 100) for _, similarity, number in similar]


def name_weight_of(model: Any, weight: float | None = None) -> float:
    """Returns the weight of the names: the given one, or else that of the model's configuration, or else 0.

    Raises:
        [`~hf_mel.errors.RecipeError`]: The weight is no number of at least 0.
    """
    if weight is None:
        weight = getattr(getattr(model, "config", None), "name_weight", None) or 0.0
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise RecipeError(f"The name weight is {weight!r}.", remedy="Give a number of at least 0; 0 leaves names out.")
    return float(weight)

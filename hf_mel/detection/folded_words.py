"""The words of a text, folded so that spellings of a name become equal, with their places in the text as it is."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from hf_mel.names import fold_name

# Scripts that are written without spaces between words: a name can start and end at any letter.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Myanmar, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
# Korean is written with spaces, but particles follow a name without one: a name can end at any letter.
_HANGUL = "\uac00-\ud7af"
_PUNCTUATION = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "“": '"', "”": '"'} | dict.fromkeys("‐‑‒–—−", "-"))
_ASCII_WORD = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")


@dataclass(frozen=True)
class FoldedWords:
    """The W words of a text. A punctuation mark is a word, and so is each letter of a script without spaces.

    Args:
        words (`list[str]`): Folded words ([`~hf_mel.names.fold_name`]). Quotes and dashes are plain ones.
        starts, ends (`list[int]`): Characters of each word in the text, end exclusive. Accents belong to their letters.
            Characters without a width, such as marks of the direction of writing, belong to no word at its edges.
        continues (`set[int]`): Numbers of the Korean letters that follow another one without a space.
    """

    words: list[str]
    starts: list[int]
    ends: list[int]
    continues: frozenset[int] = frozenset()


def folded_words(text: str) -> FoldedWords:
    """Returns the words of a text, or of a name."""
    if text.isascii():
        matches = [(match.group(), *match.span()) for match in _ASCII_WORD.finditer(text.lower())]
        words, starts, ends = (list(column) for column in zip(*matches, strict=True)) if matches else ([], [], [])
        return FoldedWords(words, starts, ends)
    # The letters with their accents: where they start and end, and what they fold to.
    if _marks_pattern().search(text):
        clusters = [match.span() for match in _cluster_pattern().finditer(text)]
        folded = [_fold_cluster(text[start:end]) for start, end in clusters]
        bounds = np.array(clusters)
    else:
        folded = [_fold_cluster(letter) for letter in text]
        bounds = np.arange(len(text))[:, None] + [0, 1]
    places = np.repeat(bounds, [len(part) for part in folded], axis=0)  # of each character of the folded text
    first, last = places[:, 0].tolist(), places[:, 1].tolist()
    words, starts, ends, continues = [], [], [], set()
    for match in _word_pattern().finditer("".join(folded)):
        start, end = match.span()
        if match.lastgroup == "hangul" and starts and ends[-1] == first[start] and _is_hangul(words[-1]):
            continues.add(len(words))
        words.append(match.group())
        starts.append(first[start])
        ends.append(last[end - 1])
    return FoldedWords(words, starts, ends, frozenset(continues))


def _is_hangul(word: str) -> bool:
    return "\uac00" <= word[0] <= "\ud7af"


@lru_cache(maxsize=1 << 16)
def _fold_cluster(cluster: str) -> str:
    """Folds a letter with its accents. Characters without a width are dropped."""
    visible = "".join(character for character in cluster if unicodedata.category(character) != "Cf")
    return fold_name(visible).translate(_PUNCTUATION)


@cache
def _marks() -> str:
    """Returns the characters that belong to the letter before them, for a class of a regular expression."""
    is_mark = [unicodedata.category(chr(code))[0] == "M" for code in range(sys.maxunicode + 1)]
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in _runs(is_mark)) + "\u1160-\u11ff\u200d"


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """Yields the first and last position of each run of `True`."""
    changes = np.flatnonzero(np.diff(np.array([False, *flags, False], dtype=np.int8)))
    for first, stop in changes.reshape(-1, 2).tolist():
        yield first, stop - 1


@cache
def _marks_pattern() -> re.Pattern[str]:
    return re.compile(f"[{_marks()}]")


@cache
def _cluster_pattern() -> re.Pattern[str]:
    return re.compile(f".[{_marks()}]*", re.DOTALL)


@cache
def _word_pattern() -> re.Pattern[str]:
    letter = rf"(?![{_UNSPACED}{_HANGUL}_])\w"
    return re.compile(
        rf"(?P<hangul>[{_HANGUL}])|[{_UNSPACED}][{_marks()}]*|(?:{letter}[{_marks()}]*)+|[^\s]", re.DOTALL
    )

"""Comparing names regardless of case and accents."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

#: A word of a name: a run of letters and digits.
WORD = re.compile(r"\w+")
#: Letters of the Latin script that Unicode does not decompose, in lower case.
_PLAIN_LETTERS = str.maketrans(
    {"ı": "i", "ł": "l", "ø": "o", "đ": "d", "ð": "d", "ħ": "h", "ŧ": "t", "þ": "th", "æ": "ae", "œ": "oe"}
)


def fold_name(name: str) -> str:
    """Folds a name, so that names that differ in case and accents only become equal.

    "GHANA" becomes "ghana", "Łódź" "lodz", "Straße" "strasse" and "DİYARBAKIR" "diyarbakir". Ligatures and full-width
    letters become plain ones. Marks of other scripts than Latin and Greek are kept, because they are not accents: vowels of
    Devanagari, or the marks that tell Japanese が from か and Cyrillic й from и.

    Args:
        name (`str`): A name or surface form.

    Returns:
        `str`: The folded name in normalization form C.
    """
    if name.isascii():
        return name.lower()
    # Folding case can compose letters again, so they are decomposed before and after.
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())
    kept: list[str] = []
    drops_marks = False
    for character in decomposed:
        if not unicodedata.combining(character):
            drops_marks = _has_accents(character)
        elif drops_marks:
            continue
        kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept)).translate(_PLAIN_LETTERS)


@cache
def _has_accents(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(("LATIN ", "GREEK "))

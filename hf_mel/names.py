"""Names of entities and surface forms of mentions: folding, words, namesakes."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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


def words_of(name: str) -> frozenset[str]:
    """Returns the words of a name or surface form, folded by [`fold_name`].

    A word is a run of letters and digits: "Jean-Luc O'Neill" has four.
    """
    return frozenset(WORD.findall(fold_name(name)))


def has_all_words(surface: str, names: Iterable[str]) -> bool:
    """Returns whether one of an entity's names has all words of a surface form: whether the entity is its namesake.

    Case, accents, and the order and number of the words do not count. A surface form without a word has no namesakes.

    Args:
        surface (`str`): Surface form of a mention.
        names (iterable of `str`): Name and aliases of an entity.
    """
    words = words_of(surface)
    return bool(words) and any(words <= words_of(name) for name in names)


def namesakes_of(surfaces: Iterable[str], names: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """Returns the namesakes of surface forms: the entities for which [`has_all_words`] holds.

    Args:
        surfaces (iterable of `str`): Surface forms of mentions.
        names (`Mapping[str, Sequence[str]]`): Entity id → its name and aliases, for all entities of the knowledge base.

    Returns:
        `dict[str, set[str]]`: Surface form → ids of its namesakes, for each distinct surface form.
    """
    words_by_surface = {surface: words_of(surface) for surface in surfaces}
    needed = frozenset().union(*words_by_surface.values())
    # Only names with a word of a surface form are kept, by that word.
    names_by_word: dict[str, list[tuple[str, frozenset[str]]]] = defaultdict(list)
    for entity_id, names_of_entity in names.items():
        for name in names_of_entity:
            words = words_of(name) & needed
            for word in words:
                names_by_word[word].append((entity_id, words))
    namesakes: dict[str, set[str]] = {}
    for surface, words in words_by_surface.items():
        rarest = min((names_by_word[word] for word in words), key=len, default=[])
        namesakes[surface] = {entity_id for entity_id, words_of_name in rarest if words <= words_of_name}
    return namesakes


@cache
def _has_accents(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(("LATIN ", "GREEK "))

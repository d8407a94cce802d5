"""Namesakes of a mention: the entities whose name could be meant by its surface form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from hf_mel.candidates.folding import WORD, fold_name


def words_of(name: str) -> frozenset[str]:
    """Returns the words of a name or surface form, folded by [`~hf_mel.candidates.folding.fold_name`].

    A word is a run of letters and digits: "Jean-Luc O'Neill" has four.
    """
    return frozenset(WORD.findall(fold_name(name)))


def namesakes_of(surfaces: Iterable[str], names: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """Returns the namesakes of surface forms: the entities with a name or alias that has all words of the surface form.

    The order and the number of the words do not count. A surface form without a word has no namesakes.

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

"""A trie of names, which says which tokens may follow a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class NameTrie:
    """The names that may be generated, as a tree of tokens.

    Names with the same tokens share a leaf.

    Args:
        names (iterable of sequences of `int`): The tokens of each name, from the start token to the end token.
    """

    def __init__(self, names: Iterable[Sequence[int]]):
        self._root: dict[int, dict] = {}
        self.names_of: dict[tuple[int, ...], list[int]] = {}  # numbers of the names by their tokens
        for number, name in enumerate(names):
            node = self._root
            for token in name:
                node = node.setdefault(int(token), {})
            self.names_of.setdefault(tuple(map(int, name)), []).append(number)

    def next_tokens(self, prefix: Sequence[int]) -> list[int]:
        """Returns the tokens that continue a prefix to a name, in ascending order; none if no name continues it."""
        node = self._root
        for token in prefix:
            if int(token) not in node:
                return []
            node = node[int(token)]
        return sorted(node)


__all__ = ["NameTrie"]

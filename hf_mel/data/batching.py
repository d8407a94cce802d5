"""The order of mentions in an epoch: which ones meet in a batch decides which negatives they see."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

from torch.utils.data import Sampler


class GroupingSampler(Sampler[int]):
    """All indices once per epoch, in small groups of one key: with in-batch negatives, a group's are hard for it.

    The order is a function of keys, seed and epoch alone, so every process of a distributed run and a resumed run
    compute the same one.

    Args:
        keys (sequence of hashables [M]): Indices of equal keys are put side by side.
        group_size (`int`): How many at most; the rest of a larger class form further groups elsewhere in the epoch.
            1 is a plain shuffle.
        seed (`int`): Seed of the order.
    """

    def __init__(self, keys: Sequence[Hashable], group_size: int = 1, seed: int = 0):
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1.")
        self.keys, self.group_size, self.seed, self.epoch = keys, group_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        order = random.Random(f"{self.seed} {self.epoch}")
        indices = list(range(len(self.keys)))
        order.shuffle(indices)
        if self.group_size == 1:
            return iter(indices)
        classes: dict[Hashable, list[int]] = defaultdict(list)
        for index in indices:
            classes[self.keys[index]].append(index)
        size = self.group_size
        groups = [members[i : i + size] for members in classes.values() for i in range(0, len(members), size)]
        order.shuffle(groups)
        return iter([index for group in groups for index in group])


def surface_key(mention: str) -> str:
    """The last word of a surface form, case folded: "Tom Hiddleston" and "HIDDLESTON" are hard negatives for another."""
    words = mention.casefold().split()
    return words[-1] if words else ""

"""Which mentions meet in a batch: the order of an epoch decides which negatives they see, examples which stay whole."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

import datasets
from torch.utils.data import Sampler

#: Which mentions stand side by side in an epoch (see [`grouping_sampler`]).
BATCH_GROUPINGS = ("none", "surface", "namesakes")


class GroupingSampler(Sampler[int]):
    """All indices once per epoch, in small groups of one key: with in-batch negatives, a group's are hard for it.

    The order is a function of the arguments and the epoch alone, so every process of a distributed run and a resumed run
    compute the same one.

    Args:
        keys (sequence of hashables [M]): Indices of equal keys are put side by side.
        group_size (`int`): How many at most; the rest of a larger class form further groups elsewhere in the epoch.
            1 is a plain shuffle.
        seed (`int`): Seed of the order.
        apart (sequence of hashables [M], *optional*): Indices of equal labels never come into one group.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        group_size: int = 1,
        seed: int = 0,
        apart: Sequence[Hashable] | None = None,
    ):
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1.")
        if apart is not None and len(apart) != len(keys):
            raise ValueError(f"apart has {len(apart)} labels for {len(keys)} keys.")
        self.keys, self.group_size, self.seed, self.epoch, self.apart = keys, group_size, seed, 0, apart

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
        met: Counter[Hashable] = Counter()
        for index in indices:
            key = self.keys[index]
            if self.apart is not None:  # the n-th of every label of a key make a class
                label = (key, self.apart[index])
                met[label] += 1
                key = (key, met[label])
            classes[key].append(index)
        size = self.group_size
        groups = [members[i : i + size] for members in classes.values() for i in range(0, len(members), size)]
        order.shuffle(groups)
        return iter([index for group in groups for index in group])


def surface_key(mention: str) -> str:
    """The last word of a surface form, case folded: "Tom Hiddleston" and "HIDDLESTON" are hard negatives for another."""
    words = mention.casefold().split()
    return words[-1] if words else ""


def grouping_sampler(mentions: datasets.Dataset, grouping: str, group_size: int, seed: int) -> GroupingSampler:
    """The order of M mentions, by one of [`BATCH_GROUPINGS`].

    "surface" puts those of one [`surface_key`] side by side, "namesakes" too, but of an entity one at a time: mentions of
    the same gold are no negatives of each other, and may be what it is known by.

    Raises:
        `ValueError`: no such grouping.
    """
    if grouping not in BATCH_GROUPINGS:
        raise ValueError(f"grouping={grouping!r} is not one of {', '.join(BATCH_GROUPINGS)}.")
    if grouping == "none":
        return GroupingSampler(range(len(mentions)), seed=seed)
    keys = [surface_key(mention) for mention in mentions["mention"]]
    return GroupingSampler(keys, group_size, seed, list(mentions["entity_id"]) if grouping == "namesakes" else None)

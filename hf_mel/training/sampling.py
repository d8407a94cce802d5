"""Samplers that decide which mentions share a batch, and therefore which in-batch negatives they see."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

import datasets
from torch.utils.data import Sampler

#: Groupings of [`grouping_sampler`].
BATCH_GROUPINGS = ("none", "surface", "namesakes")


class GroupingSampler(Sampler[int]):
    """Sampler that yields every index once per epoch, in small groups with equal keys.

    With in-batch negatives, the members of a group are hard negatives of each other. The order depends only on the
    arguments and the epoch, so all processes of a distributed run, and a resumed run, compute the same order.

    Args:
        keys (sequence of hashables [M]): Key of each index.
        group_size (`int`): Maximum size of a group. Further indices with the same key form other groups, which are
            placed elsewhere in the epoch. 1 is a plain shuffle.
        seed (`int`): Seed of the order.
        labels_to_separate (sequence of hashables [M], *optional*): Label of each index. Indices with equal labels are
            never in the same group.

    Raises:
        `ValueError`: `group_size` is less than 1, or the numbers of labels and keys differ.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        group_size: int = 1,
        seed: int = 0,
        labels_to_separate: Sequence[Hashable] | None = None,
    ):
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1.")
        if labels_to_separate is not None and len(labels_to_separate) != len(keys):
            raise ValueError(f"labels_to_separate has {len(labels_to_separate)} labels for {len(keys)} keys.")
        self.keys, self.group_size, self.seed, self.epoch = keys, group_size, seed, 0
        self.labels_to_separate = labels_to_separate

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        indices = list(range(len(self.keys)))
        draw.shuffle(indices)
        if self.group_size == 1:
            return iter(indices)
        classes: dict[Hashable, list[int]] = defaultdict(list)
        label_counts: Counter[Hashable] = Counter()
        for index in indices:
            key = self.keys[index]
            if self.labels_to_separate is not None:
                # Within a key, the n-th indices of all labels form a class, so a class has no label twice.
                label = (key, self.labels_to_separate[index])
                label_counts[label] += 1
                key = (key, label_counts[label])
            classes[key].append(index)
        size = self.group_size
        groups = [members[i : i + size] for members in classes.values() for i in range(0, len(members), size)]
        draw.shuffle(groups)
        return iter([index for group in groups for index in group])


class EasyShareSampler(GroupingSampler):
    """Sampler that yields every hard index once per epoch, and a share of the easy ones, drawn anew in every epoch.

    The order depends only on the arguments and the epoch.

    Args:
        is_easy (sequence of `bool` [M]): Whether each index is easy.
        share (`float`): Share of the easy indices in an epoch, from 0 to 1.
        seed (`int`): Seed of the order.
    """

    def __init__(self, is_easy: Sequence[bool], share: float, seed: int = 0):
        super().__init__(range(len(is_easy)), seed=seed)
        self._hard = [index for index, easy in enumerate(is_easy) if not easy]
        self._easy = [index for index, easy in enumerate(is_easy) if easy]
        self._num_easy = round(share * len(self._easy))
        if not len(self):
            self._num_easy = min(1, len(self._easy))  # an epoch without a batch would end training

    def __len__(self) -> int:
        return len(self._hard) + self._num_easy

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        indices = self._hard + draw.sample(self._easy, self._num_easy)
        draw.shuffle(indices)
        return iter(indices)


def surface_key(mention: str) -> str:
    """Returns the last word of a surface form, case folded. "Tom Hiddleston" and "HIDDLESTON" share a key."""
    words = mention.casefold().split()
    return words[-1] if words else ""


def grouping_sampler(mentions: datasets.Dataset, grouping: str, group_size: int, seed: int) -> GroupingSampler:
    """Returns the sampler of M mentions for one of [`BATCH_GROUPINGS`].

    Args:
        mentions (`datasets.Dataset`): M mentions.
        grouping (`str`): "none" shuffles. "surface" groups mentions with the same [`surface_key`]. "namesakes" does too,
            with at most one mention of an entity per group: mentions of the same gold are no negatives of each other,
            and each may be a post that represents this entity.
        group_size (`int`): Maximum size of a group.
        seed (`int`): Seed of the order.

    Raises:
        `ValueError`: the grouping is unknown.
    """
    if grouping not in BATCH_GROUPINGS:
        raise ValueError(f"grouping={grouping!r} is not one of {', '.join(BATCH_GROUPINGS)}.")
    if grouping == "none":
        return GroupingSampler(range(len(mentions)), seed=seed)
    keys = [surface_key(mention) for mention in mentions["mention"]]
    return GroupingSampler(keys, group_size, seed, list(mentions["entity_id"]) if grouping == "namesakes" else None)

"""Defaults and choices of an evaluation. The command line imports them without importing torch."""

from __future__ import annotations

from typing import Literal

#: The default values of k for which H@k is reported.
KS = (1, 3, 5, 10, 20)
#: The default number of candidates per mention.
NUM_CANDIDATES = 100
#: Rank of a gold among entities with the same score: the mean, the best or the worst possible position.
Ties = Literal["realistic", "optimistic", "pessimistic"]

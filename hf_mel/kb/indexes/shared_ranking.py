"""Exact ranking by several processes, on one host or on several: each reads and scores its part of a knowledge base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from hf_mel.inference.entity_sources import ChosenEntities, EntityPart, part_of_process
from hf_mel.inference.ranking import RankingResult, rank, score_of_units, unlimited_group
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.indexes.base import ExactIndex
from hf_mel.protocols import Encodings

if TYPE_CHECKING:
    from hf_mel.kb.knowledge_base import KnowledgeBase


class SharedExactIndex(ExactIndex):
    """Scores every entity, as [`ExactIndex`] does. The first process asks (`find`), and the others answer ([`serve`]).

    Encodings are mapped into memory, so that a process holds those of its part alone.

    Args:
        kb, model: As in [`~hf_mel.kb.indexes.base.Index`]; the same in all processes.
        processes (`accelerate.PartialState`): The processes.
    """

    def __init__(self, kb: KnowledgeBase, model: Any, processes: PartialState):
        super().__init__(kb, model)
        self.processes, self._is_open = processes, True
        # The first process may take any time between two questions, and the others wait for it.
        self._group = unlimited_group()

    def _rank(
        self,
        mentions: Encodings,
        top_k: int,
        units: Sequence[str] | None,
        added: SparseScores | None,
        rows: np.ndarray | None,
        places: np.ndarray | None = None,
    ) -> RankingResult:
        """Scores all entities in all processes. The first process alone calls this.

        Raises:
            Exception: The error of a process that has one; all processes raise it, and the others no longer answer.
        """
        on_cpu = {name: tensor.cpu() for name, tensor in mentions.items()}
        request = (on_cpu, top_k, units, added, rows, places)
        self._broadcast(request)
        return self._rank_part(*request)

    def serve(self) -> None:
        """Answers the first process until it is done. The other processes call this."""
        try:
            while (request := self._broadcast(None)) is not None:
                self._rank_part(*request)
        finally:
            dist.destroy_process_group(self._group)

    def close(self) -> None:
        """Ends [`serve`] in the other processes. The first process calls this."""
        if self._is_open:
            self._is_open = False
            self._broadcast(None)
        dist.destroy_process_group(self._group)

    def _broadcast(self, request: tuple | None) -> Any:
        """Returns the request of the first process in all processes."""
        requests = [request]
        dist.broadcast_object_list(requests, 0, self._group)
        return requests[0]

    def _rank_part(
        self,
        mentions: Encodings,
        top_k: int,
        units: Sequence[str] | None,
        added: SparseScores | None,
        rows: np.ndarray | None,
        places: np.ndarray | None,
    ) -> RankingResult:
        """Ranks the part of this process, and returns the ranking of all entities."""
        score = None if units is None else score_of_units(self.model, units)
        entities = self.kb if rows is None else ChosenEntities(self.kb, rows)
        added = added if added is None or rows is None else added.among(rows)
        part = EntityPart(entities, part_of_process(len(entities), self.processes))
        is_open, self._is_open = self._is_open, False  # after an error, no process listens
        with torch.inference_mode():
            ranked = rank(
                self.model,
                mentions,
                part,
                gold_rows=places,
                top_k=top_k,
                score=score,
                added=added,
                processes=self.processes,
            )
        self._is_open = is_open
        return ranked if rows is None else replace(ranked, top_rows=torch.from_numpy(rows)[ranked.top_rows])

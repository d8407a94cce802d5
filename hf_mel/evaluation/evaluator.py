"""The settings that both evaluators share, and the parts of their results that do not depend on the protocol."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import datasets
import numpy as np
import torch

from hf_mel.errors import KnowledgeBaseError
from hf_mel.evaluation.settings import KS, Ties
from hf_mel.evaluation.strata import Labels, names_by_id, strata_of
from hf_mel.inference.entity_sources import EntitySource
from hf_mel.inference.execution import model_device
from hf_mel.inference.fingerprint import describe_model
from hf_mel.inference.ranking import TIE_TOLERANCE
from hf_mel.kb.knowledge_base import KnowledgeBase

# The metrics are defined in a Space because `evaluate.load` needs a file that imports nothing of this package.
from hf_mel.spaces.mel_ranking.mel_ranking import ranking_metrics


@dataclass(kw_only=True, eq=False, repr=False)
class Evaluator:
    """Settings shared by [`~hf_mel.evaluation.FullEvaluator`] and [`~hf_mel.evaluation.CandidateEvaluator`].

    Args:
        entities (`datasets.Dataset`): N entity rows of the schema. [`~hf_mel.evaluation.FullEvaluator`] also takes encoded
            entities: a knowledge base or another [`~hf_mel.inference.entity_sources.EntitySource`].
        ks (sequence of `int`): Values of k for H@k.
        ties (`str`): Rank of a gold among entities with the same score: "realistic" (mean of the best and the worst
            possible position), "optimistic" (best) or "pessimistic" (worst).
        tie_tolerance (`float`): A score equals the gold's score if they differ by at most
            `tie_tolerance` * max(1, |gold score|).
        strata (sequence of `str`, *optional*): Columns of the mentions to report by. Default: "modality" and "stratum", as
            far as the mentions have them. See [`~hf_mel.evaluation.strata.strata_of`].
        train_golds (collection of `str`, *optional*): Golds of the training split, to report seen and unseen golds
            separately.
        entity_names (`Mapping[str, Sequence[str]]`, *optional*): Entity id → name and aliases, to report mentions with an
            ambiguous name separately. Default: the names of `entities`, unless these are encodings without names.
        data_version (`Mapping`, *optional*): Identification of the data. It is stored in the `setting` of the result.
        batch_size (`int`): Rows encoded or pairs scored at a time.
        progress (`bool`): Whether to show progress bars.

    Raises:
        [`~hf_mel.errors.KnowledgeBaseError`]: There are no entities.
        `ValueError`: One of `ks` is below 1, or `ties` is unknown.
    """

    entities: datasets.Dataset | EntitySource = field(kw_only=False)
    ks: Sequence[int] = KS
    ties: Ties = "realistic"
    tie_tolerance: float = TIE_TOLERANCE
    strata: Sequence[str] | None = None
    train_golds: Collection[str] | None = None
    entity_names: Mapping[str, Sequence[str]] | None = None
    data_version: Mapping[str, Any] | None = None
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self):
        if not len(self.entities):
            raise KnowledgeBaseError("The knowledge base has no entities.", remedy="Give at least one entity.")
        ranking_metrics([], ks=self.ks, ties=self.ties)  # raises for invalid ks and ties

    def _entity_ids(self) -> Sequence[str]:
        if isinstance(self.entities, datasets.Dataset):
            return list(self.entities["entity_id"])
        return self.entities.entity_ids

    def _labels(self, mentions: datasets.Dataset) -> dict[str, Labels]:
        return strata_of(mentions, self.strata, self.train_golds, self._entity_names())

    def _entity_names(self) -> Mapping[str, Sequence[str]] | None:
        if self.entity_names is not None:
            return self.entity_names
        if isinstance(self.entities, datasets.Dataset):
            return names_by_id(self.entities)
        if isinstance(self.entities, KnowledgeBase):
            return dict(zip(self.entities.entity_ids, self.entities.names(), strict=True))
        return None

    def _setting(
        self, protocol: str, model: Any, *, num_mentions: int, num_nil: int, start: float, **protocol_settings: Any
    ) -> dict[str, Any]:
        """Returns the part of results.json that says how the metrics were obtained.

        Args:
            protocol (`str`): Name of the protocol.
            model: The evaluated model, or `None`.
            num_mentions, num_nil (`int`): Number of mentions, and of those whose gold is NIL.
            start (`float`): `time.perf_counter()` at the start of the evaluation.
            protocol_settings: Entries that only this protocol has.
        """
        seconds = time.perf_counter() - start
        return {
            "protocol": protocol,
            **protocol_settings,
            "kb_size": len(self.entities),
            "num_mentions": num_mentions,
            "num_nil": num_nil,
            "ks": [int(k) for k in self.ks],
            "ties": self.ties,
            "tie_tolerance": self.tie_tolerance,
            "data": None if self.data_version is None else dict(self.data_version),
            "model": None
            if model is None
            else {key: value for key, value in describe_model(model).items() if key != "config"},
            "wall_time_seconds": round(seconds, 3),
            "batch_size": self.batch_size,
            "device": "cpu" if model is None else device_name(model),
            "software": software_versions(),
        }


def metrics_and_strata(
    labels: Mapping[str, Labels], num_mentions: int, metrics_of: Callable[[np.ndarray], dict[str, float]]
) -> dict[str, Any]:
    """Returns {"metrics": metrics of all mentions, "strata": {stratification: {group: metrics of the group}}}.

    Args:
        labels (`Mapping`): Output of [`~hf_mel.evaluation.strata.strata_of`] for M mentions.
        num_mentions (`int`): M.
        metrics_of (`Callable`): Computes the metrics of the mentions that a mask `[M]` selects.
    """
    return {
        "metrics": metrics_of(np.ones(num_mentions, dtype=bool)),
        "strata": {
            stratification: {
                group: metrics_of(np.asarray([label == group for label in column]))
                for group in sorted({label for label in column if label is not None})
            }
            for stratification, column in labels.items()
        },
    }


def device_name(model: Any) -> str:
    """Returns the name of the GPU that a model is on, or the type of its device, such as "cpu"."""
    device = model_device(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def software_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that influence results."""
    versions = {"python": platform.python_version()}
    for package in ("hf_mel", "torch", "transformers", "datasets", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return versions

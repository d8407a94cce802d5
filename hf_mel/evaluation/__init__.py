"""Evaluation: ranking metrics overall and by stratum, and calibration of the NIL threshold."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator as CandidateEvaluator
    from hf_mel.evaluation.candidate_evaluator import CandidateResult as CandidateResult
    from hf_mel.evaluation.full_evaluator import FullEvaluator as FullEvaluator
    from hf_mel.evaluation.full_evaluator import FullResult as FullResult
    from hf_mel.evaluation.nil import NilThreshold as NilThreshold
    from hf_mel.evaluation.nil import calibrate_nil_threshold as calibrate_nil_threshold
    from hf_mel.evaluation.strata import strata_of as strata_of
    from hf_mel.evaluation.tables import comparison_table as comparison_table
    from hf_mel.evaluation.tables import orders_table as orders_table
    from hf_mel.evaluation.tables import results_table as results_table
    from hf_mel.evaluation.tables import write_records as write_records
    from hf_mel.evaluation.tables import write_results as write_results

#: Public name → its module, imported on first use of the name, because some modules import torch.
_EXPORTS = {
    "CandidateEvaluator": "candidate_evaluator",
    "CandidateResult": "candidate_evaluator",
    "FullEvaluator": "full_evaluator",
    "FullResult": "full_evaluator",
    "NilThreshold": "nil",
    "calibrate_nil_threshold": "nil",
    "comparison_table": "tables",
    "orders_table": "tables",
    "results_table": "tables",
    "strata_of": "strata",
    "write_records": "tables",
    "write_results": "tables",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

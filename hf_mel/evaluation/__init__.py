"""Evaluation: ranking metrics overall and by stratum, and calibration of the NIL threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator as CandidateEvaluator
    from hf_mel.evaluation.candidate_evaluator import CandidateResult as CandidateResult
    from hf_mel.evaluation.full_evaluator import FullEvaluator as FullEvaluator
    from hf_mel.evaluation.full_evaluator import FullResult as FullResult
    from hf_mel.evaluation.nil import NilThreshold as NilThreshold
    from hf_mel.evaluation.nil import calibrate_nil_threshold as calibrate_nil_threshold
    from hf_mel.evaluation.order_evaluator import OrderEvaluator as OrderEvaluator
    from hf_mel.evaluation.strata import strata_of as strata_of
    from hf_mel.evaluation.tables import comparison_table as comparison_table
    from hf_mel.evaluation.tables import orders_table as orders_table
    from hf_mel.evaluation.tables import results_table as results_table
    from hf_mel.evaluation.tables import write_records as write_records
    from hf_mel.evaluation.tables import write_results as write_results

#: Public name → its module, imported on first use of the name, because some modules import torch.
_EXPORTS = {
    "CandidateEvaluator": "hf_mel.evaluation.candidate_evaluator",
    "CandidateResult": "hf_mel.evaluation.candidate_evaluator",
    "FullEvaluator": "hf_mel.evaluation.full_evaluator",
    "FullResult": "hf_mel.evaluation.full_evaluator",
    "NilThreshold": "hf_mel.evaluation.nil",
    "OrderEvaluator": "hf_mel.evaluation.order_evaluator",
    "calibrate_nil_threshold": "hf_mel.evaluation.nil",
    "comparison_table": "hf_mel.evaluation.tables",
    "orders_table": "hf_mel.evaluation.tables",
    "results_table": "hf_mel.evaluation.tables",
    "strata_of": "hf_mel.evaluation.strata",
    "write_records": "hf_mel.evaluation.tables",
    "write_results": "hf_mel.evaluation.tables",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)

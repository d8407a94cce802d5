"""Tests of the settings that both evaluators share."""

from typing import get_args

import pytest

from hf_mel.errors import KnowledgeBaseError, RecipeError
from hf_mel.evaluation import CandidateEvaluator, FullEvaluator
from hf_mel.evaluation.settings import Ties
from hf_mel.spaces.mel_ranking.mel_ranking import TIES
from tests.toy import toy_entities


def test_the_choices_of_ties_are_those_of_the_metric():
    assert get_args(Ties) == TIES


@pytest.mark.parametrize("evaluator", [FullEvaluator, CandidateEvaluator])
def test_invalid_settings_are_an_error_before_any_run(evaluator):
    with pytest.raises(ValueError, match="ties must be one of"):
        evaluator(toy_entities(2), ties="random")
    with pytest.raises(ValueError, match="0"):
        evaluator(toy_entities(2), ks=(0,))
    with pytest.raises(KnowledgeBaseError, match="no entities"):
        evaluator(toy_entities(2).select([]))
    with pytest.raises(TypeError, match="read as rows"):
        CandidateEvaluator(["Q1"])
    with pytest.raises(RecipeError, match="Give 0 or more"):
        CandidateEvaluator(toy_entities(2), candidate_weight=-1.0)

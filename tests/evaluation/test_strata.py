"""Tests of the groups of mentions."""

import datasets
import pytest

from hf_mel.errors import DataFormatError
from hf_mel.evaluation.strata import strata_of
from hf_mel.schema import NIL


def mentions(**columns):
    defaults = {"context_id": ["c1", "c2", "c1", "c3"], "entity_id": ["Q1", "Q2", NIL, "Q3"]}
    return datasets.Dataset.from_dict({**defaults, **columns})


def test_groups_by_column_context_and_gold():
    rows = mentions(stratum=["text", "image", "", None], topic=["a", "a", "b", "b"])
    strata = strata_of(rows, train_golds={"Q1", "Q3"})
    assert strata == {
        "stratum": ["text", "image", None, None],
        "mentions in context": ["multiple", "single", "multiple", "single"],
        "gold in training": ["seen", "unseen", None, "seen"],
    }
    assert strata_of(rows, ["topic"]).keys() == {"topic", "mentions in context"}


def test_a_data_set_without_strata_is_grouped_by_context_and_gold():
    assert strata_of(mentions()).keys() == {"mentions in context"}
    assert strata_of(mentions(), train_golds=())["gold in training"] == ["unseen", "unseen", None, "unseen"]


def test_an_unknown_column_is_an_error():
    with pytest.raises(DataFormatError, match=r"no column genre .*context_id, entity_id"):
        strata_of(mentions(), ["genre"])

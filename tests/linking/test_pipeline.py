"""Tests that the transformers pipeline returns the results of the linker."""

from __future__ import annotations

import pytest
from transformers import pipeline

import hf_mel  # noqa: F401 (registers the task)
from hf_mel.errors import KnowledgeBaseError
from hf_mel.hub.saving import save_model_repository
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model

TASK = "multimodal-entity-linking"


@pytest.fixture
def folders(tmp_path):
    register()
    save_model_repository(toy_model(), ToyProcessor(), tmp_path / "model")
    KnowledgeBase.build(toy_entities(), toy_model(), ToyProcessor(), output=tmp_path / "kb", progress=False)
    return str(tmp_path / "model"), str(tmp_path / "kb")


def test_the_pipeline_returns_the_results_of_the_linker(folders):
    model, kb = folders
    linked = pipeline(TASK, model=model, kb=kb, device="cpu", top_k=3)
    expected = EntityLinker(toy_model(), ToyProcessor(), kb)
    mentions = [dict(row) for row in toy_mentions(5)]
    assert linked(mentions) == [result.to_dict() for result in expected(mentions, top_k=3)]
    assert linked(mentions[0], top_k=2) == expected(mentions[0], top_k=2).to_dict()
    single = {"text": "Here Entity b met somebody.", "mention": "Entity b"}
    assert linked(**single) == expected(**single, top_k=3).to_dict()


def test_the_pipeline_takes_a_threshold_and_a_knowledge_base_object(folders):
    model, kb = folders
    linked = pipeline(TASK, model=model, kb=KnowledgeBase.from_pretrained(kb), nil_threshold=1e9, device="cpu")
    assert linked(text="Entity b.", mention="Entity b")["entity_id"] == "NIL"


def test_a_missing_knowledge_base_is_an_error(folders):
    with pytest.raises(KnowledgeBaseError, match="No knowledge base was given"):
        pipeline(TASK, model=folders[0], device="cpu")

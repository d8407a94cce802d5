"""Tests of the recipes of the reranking baselines: every variant that a recipe names trains for one step."""

from __future__ import annotations

import pytest
import torch

from hf_mel.candidates.make import make_candidates
from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator
from hf_mel.inference.checkpoints import load_reranker
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.training.assemble import build_model
from hf_mel.training.run import run_recipe
from tests.recipes.test_rerankers import encoders, load, step  # noqa: F401 (a fixture)
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model, write_toy_dataset
from tests.toy_documents import toy_documents

VARIANTS = [
    *((name, "", {"graph": "static"}) for name in ("ncel_wikimel", "ncel-text_wikimel")),
    *((name, "", {"graph": "dynamic", "loss": "margin"}) for name in ("dgcn_aida", "dgcn-text_wikimel")),
    *((name, "", {"name_decoder": "pretrained"}) for name in ("genre_wikimel", "genre-text_wikimel")),
    ("autoregressive-text_wikimel", "", {"name_decoder": "lstm", "correction": True}),
    ("autoregressive-text_wikimel", "model.config.correction=false", {"correction": False}),
    ("ncel-text_wikimel", "model.config.graph=none", {"graph": "none"}),
]


def pairs():
    entities = [dict(row) | {"prior": 0.1, "list_score": -1.0} for row in toy_entities(6)]
    return [(dict(row), entities) for row in toy_documents(6) if row["modality"] == "text"]


@pytest.mark.parametrize(("name", "overrides", "expected"), VARIANTS)
def test_a_variant_trains(name, overrides, expected, encoders):  # noqa: F811
    recipe = load(name, overrides, encoders)
    model, processor = build_model(recipe)
    assert {field: getattr(model.config, field) for field in expected} == expected
    batch = dict(processor(pairs=pairs()))
    step(model, batch | {"labels": torch.arange(len(batch["pair_mask"])) % 6})


@pytest.mark.parametrize("name", ["et_tweets", "et_flags", "et-text_wikimel"])
def test_a_forest_is_fitted_on_the_features_of_its_recipe(name, encoders):  # noqa: F811
    model, processor = build_model(load(name, "", encoders))
    model.config.min_samples_leaf = 1  # there are few pairs
    batch = dict(processor(pairs=pairs()))
    mask = batch["pair_mask"]
    features = model.pair_features(**batch)[mask]
    labels = torch.arange(mask.shape[1]).expand_as(mask)[mask] == 0
    model.fit(features, labels)
    out = model(**batch)
    assert out.scores[:, 0].min() > 0.5  # the first candidate is the gold of every mention
    assert (hasattr(model, "vision_model"), model.config.list_scores) == (
        name != "et-text_wikimel",
        name != "et_tweets",
    )


@pytest.mark.parametrize(
    "name", [f"{row}-text_wikimel" for row in ("et", "dgcn", "ncel", "autoregressive", "genre", "mulrel", "ganea")]
)
def test_trains_evaluates_and_links(name, encoders, tmp_path):  # noqa: F811
    register()
    data = write_toy_dataset(tmp_path / "data", entities=toy_entities(12))
    recipe = load(name, "", encoders)
    recipe.data.dataset, recipe.candidates.source, recipe.candidates.retriever = str(data), "name+prior", None
    recipe.candidates.k = 4
    if "list_scores" in recipe.model.config:
        recipe.model.config["list_scores"] = False
    quick = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    recipe.training.update(quick | {"bf16": False, "num_negatives": 3})
    run = run_recipe(recipe, tmp_path / "run")
    assert (run / "results.json").exists()
    assert (run / "README.md").exists()

    model, processor = load_reranker(run)
    mentions, entities = toy_mentions(8), toy_entities(12)
    lists = make_candidates("name+prior", mentions, entities, training=mentions, k=4)
    results = [
        CandidateEvaluator(entities, batch_size=size, progress=False)(ModelInputs(model, processor), mentions, lists)
        for size in (64, 1)
    ]
    assert results[0].metrics == results[1].metrics
    assert 0 < results[0].metrics["mrr"] <= 1
    kb = KnowledgeBase.build(entities, toy_model(), ToyProcessor(), progress=False)
    linker = EntityLinker(toy_model(), ToyProcessor(), kb, reranker=model, reranker_processor=processor)
    linked = linker([dict(row) for row in mentions], top_k=3)
    assert all(len(result.candidates) == 3 for result in linked)

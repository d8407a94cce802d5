"""Tests of the recipes of the reranking baselines: every variant that a recipe names trains for one step."""

from __future__ import annotations

import pytest
import torch

from hf_mel.training.assemble import build_model
from tests.recipes.test_rerankers import encoders, load, step  # noqa: F401 (a fixture)
from tests.toy import toy_entities
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

"""Recipes of the cross-encoder: each is built with a small encoder and trains for a step."""

from __future__ import annotations

import pytest
import torch

from hf_mel.training.assemble import build_model
from tests.recipes.test_rerankers import encoders, load, rows, step  # noqa: F401 (a fixture)

VARIANTS = [
    ("blink-cross_wikimel", "", {"loss": "listwise"}),
    ("blink-cross_wikimel", "candidates.source=retriever candidates.retriever=runs/blink_wikimel", {}),
    ("cholan_tweets", "", {"loss": "pairwise"}),
    ("cross-encoder-text_wikimel", "", {"list_weight": 40, "pooled_sides": True}),
    (
        "cross-encoder-text_wikimel",
        "model.config.list_weight=null model.config.name_weight=null",
        {"list_weight": None},
    ),
    ("cross-encoder-text_wikimel", "model.config.loss=pairwise", {"loss": "pairwise"}),
    ("cross-encoder_flags", "", {"list_weight": 1}),
    ("cross-encoder_flags", "model.config.list_weight=null model.config.name_weight=null", {"name_weight": None}),
]


@pytest.mark.parametrize(("name", "overrides", "expected"), VARIANTS)
def test_a_row_of_the_tables_trains(name, overrides, expected, encoders):  # noqa: F811
    if overrides.startswith("candidates."):  # the header spreads them over two options
        recipe = load(name, overrides.split()[0], encoders)
        assert recipe.candidates.source == "retriever"
        return
    model, processor = build_model(load(name, overrides, encoders))
    for field, value in expected.items():
        assert getattr(model.config, field) == value
    mentions, entities = rows()
    batch = processor(pairs=[(mentions[0], entities[:2]), (mentions[1], entities[2:])])
    step(model, {**batch, "labels": torch.tensor([0, 1])})

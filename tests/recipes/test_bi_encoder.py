"""Recipes of the bi-encoder: each is built with small encoders, trains for a step, ranks, and is saved and loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BridgeTowerConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    LxmertConfig,
    ResNetConfig,
    ViltConfig,
    ViTConfig,
)

from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.inputs import ModelInputs
from hf_mel.training.assemble import build_model
from hf_mel.training.recipe import Recipe, shipped_recipes
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from tests.modeling.test_bi_encoder import BRIDGE, LXMERT, VILT
from tests.recipes.test_rerankers import RECIPES
from tests.toy import toy_entities, toy_mentions

SIZES = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 24}
#: What takes the place of a pretrained encoder, by the first of these parts that its name has.
SMALL = {
    "clip": lambda: AutoModel.from_config(
        CLIPConfig(
            text_config={**SIZES, "vocab_size": 200, "num_hidden_layers": 1, "eos_token_id": 3},
            vision_config={**SIZES, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    ),
    "bert-base": lambda: BertModel(BertConfig(vocab_size=200, num_hidden_layers=7, **SIZES)),
    "roberta": lambda: BertModel(BertConfig(vocab_size=200, num_hidden_layers=1, **SIZES)),
    "minilm": lambda: BertModel(BertConfig(vocab_size=200, num_hidden_layers=1, **SIZES)),
    "vit-base": lambda: AutoModel.from_config(ViTConfig(image_size=16, patch_size=8, num_hidden_layers=1, **SIZES)),
    "resnet": lambda: AutoModel.from_config(
        ResNetConfig(embedding_size=8, hidden_sizes=[12], depths=[1], layer_type="basic")
    ),
    "vilt": lambda: AutoModel.from_config(ViltConfig(**VILT)),
    "lxmert": lambda: AutoModel.from_config(LxmertConfig(**LXMERT)),
    "bridgetower": lambda: AutoModel.from_config(BridgeTowerConfig(**BRIDGE)),
}
NAMES = [name for name in shipped_recipes() if Recipe.load(name).model.type == "bi_encoder"]
VARIANTS = [
    *((name, ()) for name in NAMES),
    ("clip_wikimel", ("model.config.cross_modal=true",)),
    (
        "meter_wikimel",
        ("model.text=BridgeTower/bridgetower-base", "model.vision=null", "model.config={pooling: pooler}"),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


def small_encoder(reference: str, folder) -> str:
    """Saves a small encoder in place of a pretrained one, and returns its folder."""
    kind = next(kind for kind in SMALL if kind in reference.lower())
    if not (folder / kind).exists():
        torch.manual_seed(0)
        SMALL[kind]().save_pretrained(folder / kind)
        train_wordpiece(texts_of(toy_mentions(), toy_entities()), 200).save_pretrained(folder / kind)
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(folder / kind)
    return str(folder / kind)


def step(model, batch) -> None:
    """Trains for one step of the same length for every parameter, and asserts that the loss falls."""
    model.train()
    torch.manual_seed(0)
    before = model(**batch).loss
    before.backward()
    torch.manual_seed(0)  # the same dropout
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / (1e-12 + parameter.grad.norm())
        assert model(**batch).loss < before


def shrink(recipe: Recipe, original: Recipe, folder) -> None:
    """Gives a recipe small encoders of the families of `original`, and a small fusion."""
    for side in ("text", "vision"):
        if getattr(recipe.model, side):
            setattr(recipe.model, side, small_encoder(getattr(original.model, side), folder))
    for field, size in (("fusion_heads", 2), ("fusion_size", 16)):
        if field in recipe.model.config or (field == "fusion_heads" and recipe.model.config.get("fusion")):
            recipe.model.config[field] = size


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_a_row_of_the_tables_trains_and_ranks(name, overrides, folder):
    header = (RECIPES / f"{name}.yaml").read_text().partition("\nname:")[0]
    assert all(override in header for override in overrides)
    recipe = Recipe.load(name, overrides)
    shrink(recipe, recipe, folder)
    mentions, entities = toy_mentions(4, entities=6), toy_entities(6)
    model, processor = build_model(recipe, texts_of(mentions, entities))
    batch = processor(mentions=list(mentions), entities=list(entities))
    sees = model.config.vision_config is not None or model.config.joint_config is not None
    assert any("pixel" in key for key in batch) == sees
    assert ("text" in name.partition("_")[0] or name.split("_")[0] in ("bert", "roberta", "blink")) == (not sees)
    step(model, {**batch, "labels": torch.tensor([0, 1, 2, 3])})
    result = FullEvaluator(entities, progress=False)(ModelInputs(model.eval(), processor), mentions)
    assert result.metrics["mr"] >= 1

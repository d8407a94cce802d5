"""Tests of the recipes of MMEL and PFMEL: every row of the papers' tables trains for one step with small encoders.

A row is a recipe, or a recipe with overrides that its header names.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForNextSentencePrediction,
    BertModel,
    CLIPImageProcessorPil,
    ResNetConfig,
)

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.dataset_scripts.tweets_mel.tweets_mel import TweetsMel
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.pretraining import PretrainingTrainer, pretraining_model
from hf_mel.training.recipe import Recipe
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from tests.toy import toy_entities, toy_mentions

RECIPES = Path(__file__).parents[2] / "recipes"
MMEL = {
    "": {},
    "model.config.num_image_tokens=1": {"config.num_image_tokens": 1},
    "model.config.fusion=m_encoder": {"config.fusion": "m_encoder"},
    "model.config.joint_image=false": {"config.joint_image": False, "config.joint_text": True},
    "model.config.joint_text=false": {"config.joint_text": False, "config.joint_image": True},
    "model.config.joint_text=false model.config.joint_image=false": {
        "config.joint_text": False,
        "config.joint_image": False,
    },
    "model.config.pairwise_loss_weight=0": {"config.pairwise_loss_weight": 0},
    "model.vision=null": {"config.vision_config": None},
    "model.config.similarity_weight=0.25": {"config.similarity_weight": 0.25},
}
TASKS = {
    "": (["mixed", "text", "multimodal"], True),  # PFMEL
    "processor.options.pretraining_tasks=[mixed] processor.options.swap_roles=false": (["mixed"], False),
    "processor.options.pretraining_tasks=[mixed,text] processor.options.swap_roles=false": (["mixed", "text"], False),
    "processor.options.swap_roles=false": (["mixed", "text", "multimodal"], False),
    "processor.options.pretraining_tasks=[mixed,text]": (["mixed", "text"], True),
}
ATTRIBUTES = "processor.options.entity_template='{attributes}.'"
VARIANTS = [
    *(("mmel_wikimel", overrides, expected) for overrides, expected in MMEL.items()),
    *(("mmel_flags", overrides, expected) for overrides, expected in MMEL.items()),
    ("mmel_wikimel", "", {"processor.entity_template": "attributes"}),
    (
        "mmel_wikimel",
        "processor.options.entity_template=all",
        {"processor.entity_template": "all"},
    ),
    ("mmel_wikimel", "processor.options.context_template=context", {"processor.context_template": "context"}),
    ("mmel_flags", "processor.options.entity_template=attributes", {"processor.entity_template": "attributes"}),
    ("mmel-text_wikimel", "", {"config.vision_config": None}),
    ("mmel-text_wikimel", "model.config.joint_text=false", {"config.joint_text": False}),
    ("mmel-text_wikimel", "model.config.pairwise_loss_weight=0", {"config.pairwise_loss_weight": 0}),
    (
        "mmel-text_wikimel",
        "processor.options.entity_template=attributes",
        {"processor.entity_template": "attributes"},
    ),
    *(("pfmel-fmel_tweets", o, {"processor.use_images": not o}) for o in ("", "model.vision=null")),
    *(("pfmel-fmel_flags", o, {"processor.use_images": not o}) for o in ("", "model.vision=null")),
    ("pfmel-fmel_flags", ATTRIBUTES, {"processor.entity_template": "{attributes}."}),
    ("pfmel-fmel_flags", "processor.options.max_entity_images=1", {"processor.max_entity_images": 1}),
    ("pfmel-text_wikimel", "", {"processor.use_images": False}),
    ("mmel-text-list_wikimel", "model.config.joint_ranking=false", {"config.joint_ranking": False}),
    *(
        (f"{method}-text-list_wikimel", overrides, expected)
        for method in ("mmel", "pfmel")
        for overrides, expected in (
            ("", {"config.list_weight": 40, "config.name_weight": 5, "processor.name_match": True}),
            ("model.config.name_weight=null", {"config.name_weight": None}),
            ("model.config.pooled_sides=false", {"config.pooled_sides": False}),
            ("model.config.list_loss_weight=0", {"config.list_loss_weight": 0}),
            ("candidates.train_file=runs/mimic-text-folds_wikimel/train.parquet", {}),
        )
    ),
    ("pfmel-text_wikimel", ATTRIBUTES, {"processor.entity_template": "{attributes}."}),
]
PRETRAININGS = [
    (recipe, overrides, expected)
    for recipe in ("pfmel-pretraining_tweets", "pfmel-pretraining_flags")
    for overrides, expected in TASKS.items()
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    """Saves a BERT with next-sentence head and tokenizer, and a ResNet with image processor."""
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def save_encoders(folder: Path) -> dict[str, str]:
    """Saves the small encoders to a folder, and returns where they are."""
    tokenizer = train_wordpiece(texts_of(toy_mentions(), toy_entities()), 200)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForNextSentencePrediction(BertConfig(vocab_size=len(tokenizer), **sizes))
    bert.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    resnet = AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    resnet.save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(folder / "vision")
    return {"text": str(folder / "text"), "vision": str(folder / "vision")}


def load(name: str, overrides: str, encoders: dict[str, str], **model: str) -> Recipe:
    """Loads a recipe with small encoders, and asserts that its header names the overrides."""
    header = (RECIPES / f"{name}.yaml").read_text().partition("\nname:")[0]
    assert overrides in header
    recipe = Recipe.load(name, _split(overrides))
    for side in ("text", "vision"):
        if getattr(recipe.model, side):
            setattr(recipe.model, side, encoders[side])
    for field, value in model.items():
        setattr(recipe.model, field, value)
    return recipe


def _split(overrides: str) -> list[str]:
    # Like a shell, but it keeps quotes, which belong to the YAML value.
    return [overrides] if "'" in overrides else shlex.split(overrides)


def rows() -> tuple[list[dict], list[dict]]:
    """Returns two mentions of one context, and entities that are accounts too, with two images, one and none."""
    pictures = [Image.fromarray(np.full((9, 7, 3), 40 * k, dtype=np.uint8)) for k in range(4)]
    mentions = [dict(row) | {"image": pictures[k]} for k, row in enumerate(toy_mentions(2))]
    entities = []
    for k, row in enumerate(toy_entities(4)):
        account = {"screen_name": f"@user{k}", "location": "Here", "recent_posts": ["one", "two"]}
        entities.append(dict(row) | account | {"images": pictures[: (2, 1, 0, 1)[k]], "list_score": -0.01 * k})
    return mentions, entities


def step(model, batch) -> None:
    """Trains for one step and asserts that the loss falls."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(0)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    torch.manual_seed(0)  # the same dropout
    with torch.no_grad():
        after = model(**batch).loss
    assert before.isfinite()
    assert after < before


@pytest.mark.parametrize(("name", "overrides", "expected"), VARIANTS)
def test_a_row_of_the_tables_trains(name, overrides, expected, encoders):
    model, processor = build_model(load(name, overrides, encoders))
    for field, value in expected.items():
        owner, _, attribute = field.partition(".")
        assert getattr(model.config if owner == "config" else processor, attribute) == value
    mentions, entities = rows()
    batch = processor(pairs=[(mentions[0], entities[:2]), (mentions[1], entities[2:])])
    assert any("pixel" in key for key in batch) == (model.config.vision_config is not None)
    step(model, {**batch, "labels": torch.tensor([0, 1])})


@pytest.mark.parametrize(("name", "overrides", "expected"), PRETRAININGS)
def test_a_pretraining_of_the_ablations_trains(name, overrides, expected, encoders, tmp_path):
    model, processor = pretraining_model(load(name, overrides, encoders))
    tasks, swapped = expected
    mentions, entities = rows()
    batch = dict(processor(posts=mentions, entities=entities[:2], partners=[1, 1]))
    # Two posts, each of one form per text task and two for mixed-modal; twice with the roles swapped.
    assert len(batch["labels"]) == 2 * (len(tasks) + 1) * (1 + swapped)
    assert set(model(**batch).task_losses) == set(tasks)
    step(model, batch)


@pytest.mark.parametrize("has_head", [True, False])
def test_pretraining_gives_a_new_head_the_learning_rate_of_new_parts(has_head, encoders, tmp_path):
    if not has_head:
        BertModel.from_pretrained(encoders["text"]).save_pretrained(tmp_path / "text")
        AutoTokenizer.from_pretrained(encoders["text"]).save_pretrained(tmp_path / "text")
        encoders = encoders | {"text": str(tmp_path / "text")}
    model, processor = pretraining_model(load("pfmel-pretraining_flags", "", encoders))
    arguments = MelTrainingArguments(
        tmp_path, learning_rate=1e-4, head_learning_rate=1e-2, eval_strategy="no", load_best_model_at_end=False
    )
    trainer = PretrainingTrainer(model, arguments, entities=toy_entities(), processing_class=processor)
    groups = trainer.create_optimizer().param_groups
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rate_of[id(model.nsp_head.weight)] == (1e-4 if has_head else 1e-2)
    assert rate_of[id(model.image_projection.weight)] == 1e-2
    assert rate_of[id(model.text_model.embeddings.word_embeddings.weight)] == 1e-4


@pytest.mark.parametrize("data", ["tweets", "flags"])
def test_fine_tuning_continues_from_the_pretraining(data, encoders, tmp_path):
    first, processor = pretraining_model(load(f"pfmel-pretraining_{data}", "", encoders))
    linking, _ = build_model(load(f"pfmel-pretraining_{data}", "", encoders))
    linking.load_state_dict(first.state_dict(), strict=False)
    linking.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = build_model(load(f"pfmel_{data}", "", encoders, from_pretrained=str(tmp_path)))
    for key, value in first.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    mentions, entities = rows()
    step(model, {**processor(pairs=[(mentions[0], entities)]), "labels": torch.tensor([0])})


@pytest.mark.parametrize("row", ["07", "05"])
def test_smaller_training_sets_are_configurations_of_the_data(row, encoders):
    """PFMEL07 and PFMEL05 (Table 6) differ only in the data."""
    recipe = load("pfmel_tweets", f"data.config=pfmel_train{row}", encoders)
    assert recipe.data.config in {config.name for config in TweetsMel.BUILDER_CONFIGS}
    whole = load("pfmel_tweets", "", encoders).to_dict()
    different = recipe.to_dict()
    assert different["data"].pop("config") != whole["data"].pop("config") == "pfmel"
    assert different == whole

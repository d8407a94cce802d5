"""Recipes of IMN. Every row of IMN's Tables 3 and 4 and of its Figure 4 is a recipe, or a recipe with overrides from its
header. Each is built with small encoders and trained for one step."""

from __future__ import annotations

import itertools

import pytest

from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.training.assemble import build_model
from hf_mel.training.collators import RetrieverCollator
from hf_mel.training.pretraining import PretrainingCollator, as_posts, pretraining_model
from hf_mel.training.recipe import Recipe, shipped_recipes
from hf_mel.training.run import run_recipe
from tests.data.test_posts import write
from tests.recipes.test_rerankers import encoders, load  # noqa: F401 (a fixture)
from tests.toy import toy_entities, toy_mentions
from tests.toy_posts import toy_posts

SPACES = {"[2,3]": [2, 3], "[3]": [3], "[]": []}
VARIANTS = [
    *((name, "", {}) for name in ("imn-pretraining_flags", "imn-text_wikimel", "imn_tweets", "imn_weibo")),
    ("imn-posts_flags", "", {"encoder_init": "paired", "entity_prototype": True}),
    ("imn-posts_flags", "model.config.co_attention=false", {"co_attention": False}),
    (
        "imn-posts_flags",
        "model.config.num_prototypes=4 processor.options.num_prototypes=4 model.config.prototype_selection=random",
        {"num_prototypes": 4, "prototype_selection": "random"},
    ),
    ("imn-posts_flags", "model.config.encoder_init=default", {"encoder_init": "default"}),
    ("imn-posts_flags", "model.config.entity_prototype=false", {"entity_prototype": False}),
    (
        "imn-posts_flags",
        "model.config.mention_modalities=[text,image,joint] model.config.entity_modalities=[text,image,joint] "
        "model.config.aux_dim=384",
        {"aux_dim": 384},
    ),
    *(
        (name, f"model.config.spaces={text}", {"spaces": value})
        for name in ("imn-text_wikimel", "imn_tweets")
        for text, value in SPACES.items()
    ),
    *(
        (name, "model.config.prototype_selection=random", {"prototype_selection": "random"})
        for name in ("imn-pretraining_flags", "imn_tweets")
    ),
    (
        "imn_tweets",
        "model.config.mention_modalities=[text] model.config.entity_modalities=[text]",
        {"mention_modalities": ["text"], "entity_modalities": ["text"]},
    ),
    ("imn-pretraining_flags", "model.config.entity_prototype=true", {"entity_prototype": True}),
    ("imn-text_wikimel", "model.config.entity_prototype=false", {"entity_prototype": False}),
    ("imn-text_wikimel", "training.mined_negatives=2", {"num_prototypes": 1}),
    (
        "imn-pretraining_flags",
        "model.config.num_prototypes=5 processor.options.num_prototypes=5",
        {"num_prototypes": 5},
    ),
]


@pytest.mark.parametrize(("name", "overrides", "expected"), VARIANTS)
def test_a_row_of_the_tables_trains(name, overrides, expected, encoders):  # noqa: F811
    recipe = load(name, overrides, encoders)
    recipe.task = "linking"
    model, processor = build_model(recipe)
    assert {field: getattr(model.config, field) for field in expected} == expected
    assert processor.num_prototypes == model.num_prototypes
    inputs = ModelInputs(model, processor, toy_posts())
    collator = RetrieverCollator(inputs, toy_entities())
    batch = collator([dict(row) for row in toy_mentions(4)])
    loss = model.train()(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["imn-pretraining_flags", "imn_tweets"])
@pytest.mark.parametrize(
    ("overrides", "guided"),
    [("", True), ("processor.options.knowledge_guided=false training.batch_grouping=none", False)],
)
def test_pretraining_with_and_without_knowledge_guidance(name, overrides, guided, encoders):  # noqa: F811
    recipe = load(name, overrides, encoders)
    recipe.task = "pretraining"
    model, processor = pretraining_model(recipe)
    assert processor.knowledge_guided is guided
    assert (recipe.training["batch_grouping"] == "surface") is guided
    collator = PretrainingCollator(ModelInputs(None, processor), toy_entities())
    posts = as_posts(toy_mentions(6))
    loss = model.train()(**collator([dict(row) for row in posts])).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (
            ("imn-pretraining_flags", "imn-knowledge_flags", "imn-stages_flags"),
            ["pretraining", "knowledge", "linking"],
        ),
        (("imn-posts_flags", "imn_flags"), ["knowledge", "linking"]),
    ],
)
def test_each_stage_continues_the_previous_one(names, tasks):
    stages = [Recipe.load(name) for name in names]
    assert [stage.task for stage in stages] == tasks
    for before, after in itertools.pairwise(stages):
        assert after.model.from_pretrained == f"runs/{before.name}"
    assert {stage.name for stage in stages} <= set(shipped_recipes())


@pytest.mark.parametrize("text_only", [False, True])
def test_three_stages_train_evaluate_and_link(encoders, tmp_path, text_only):  # noqa: F811
    data = str(write(tmp_path / "data", toy_posts()))
    quick = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    runs = []
    for name in ("imn-pretraining_flags", "imn-knowledge_flags", "imn-stages_flags"):
        recipe = load(name, "", encoders)
        recipe.data.dataset = data
        recipe.training.update(quick)
        if runs:
            recipe.model.from_pretrained = str(runs[-1])
        elif text_only:
            recipe.model.vision = None
            recipe.model.config |= {"mention_modalities": ["text", "joint"], "entity_modalities": ["text", "joint"]}
        runs.append(run_recipe(recipe, tmp_path / name))
    model, processor = load_retriever(runs[-1])
    assert model.config.mention_modalities == (["text", "joint"] if text_only else ["text", "image", "joint"])
    test = load_mentions(data, "test")
    inputs = ModelInputs.from_data(data, model, processor)
    evaluated = FullEvaluator(load_entities(data), progress=False)(inputs, test)
    assert 0 < evaluated.metrics["mrr"] <= 1
    kb = KnowledgeBase.build(data, model, processor, progress=False)
    linked = EntityLinker(model, processor, kb, nil_threshold=None)([dict(row) for row in test])
    ranked = [result.candidates[0].entity_id for result in linked]
    assert ranked == [kb.entity_ids[row] for row in evaluated.ranking.top_rows[:, 0].tolist()]

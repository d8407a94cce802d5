"""Pre-training: the pairs of posts, the files of a run, and linking that continues from it."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoModel, AutoProcessor

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.data.lazy_rows import LazyRows
from hf_mel.errors import DataFormatError, RecipeError, UnknownEntityError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.schema import NIL, NO_SPAN
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.pretraining import (
    PretrainingCollator,
    PretrainingTrainer,
    as_posts,
    pretraining_model,
    with_found_mentions,
)
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.run_folder import RunFolder
from hf_mel.training.sampling import BATCH_GROUPINGS, grouping_sampler
from tests.toy import toy_entities, toy_mentions
from tests.training.toy_run import add_posts, recipe_dict, write_dataset

UNSAVED = {"save_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}


class Recorder:
    """A processor that returns its arguments."""

    def __call__(self, **arguments):
        return arguments


def rows(count=12, entities=12):
    return LazyRows(as_posts(toy_mentions(count, entities)))


def test_every_post_comes_with_its_own_entity_and_a_partner_about_another():
    collator, posts = PretrainingCollator(ModelInputs(None, Recorder()), toy_entities(4)), rows(40, 4)
    kinds = Counter()
    for epoch in range(20):
        collator.epoch = epoch
        batch = collator([posts[k] for k in range(40)])
        for place, (post, entity, partner) in enumerate(zip(*batch.values(), strict=True)):
            assert entity["entity_id"] == post["entity_id"]
            kinds[partner == place] += 1
            assert partner == place or batch["posts"][partner]["entity_id"] != post["entity_id"]
    assert 0.4 < kinds[True] / kinds.total() < 0.6


def test_draws_depend_on_the_epoch_and_are_reproducible():
    collator, posts = PretrainingCollator(ModelInputs(None, Recorder()), toy_entities()), rows(20)
    drawn = []
    for epoch in (0, 1, 0):
        collator.epoch = epoch
        drawn.append(collator(posts.__getitems__(list(range(20))))["partners"])
    assert drawn[0] == drawn[2] != drawn[1]


def test_posts_of_a_single_entity_are_their_own_partners():
    collator, posts = PretrainingCollator(ModelInputs(None, Recorder()), toy_entities()), rows(10, 1)
    assert collator([posts[k] for k in range(10)])["partners"] == list(range(10))


def test_partners_share_the_surface_if_possible():
    """A partner has the same last word if the batch has one about another entity, and any last word otherwise."""
    mentions = toy_mentions(24, 8).map(
        lambda row, k: {"mention": f"The {('Swift', 'swift', 'Jones')[k % 3]}"}, with_indices=True
    )
    mentions = mentions.map(lambda row: {"mention": "Alone"} if row["mention_id"] == "m5" else {})
    posts = LazyRows(as_posts(mentions)).__getitems__(list(range(24)))
    seen: dict[bool, set] = {True: set(), False: set()}
    for guided, pairs in seen.items():
        collator = PretrainingCollator(ModelInputs(None, Recorder()), toy_entities(), same_surface=guided)
        for collator.epoch in range(12):
            for place, partner in enumerate(collator(posts)["partners"]):
                if partner != place:
                    assert posts[partner]["entity_id"] != posts[place]["entity_id"]
                    pairs.add((posts[place]["mention"].lower(), posts[partner]["mention"].lower()))
    shared = {(surface, surface) for surface in ("the swift", "the jones")}
    assert {pair for pair in seen[True] if pair[0] != "alone"} == shared
    assert {surface for first, surface in seen[True] if first == "alone"} == {"the swift", "the jones"}
    assert ("the swift", "the jones") in seen[False]


@pytest.mark.parametrize("grouping", BATCH_GROUPINGS)
def test_the_order_of_posts_is_that_of_the_grouping(grouping, tmp_path):
    posts = as_posts(toy_mentions(12))
    trainer = PretrainingTrainer(
        torch.nn.Linear(1, 1),
        MelTrainingArguments(tmp_path, batch_grouping=grouping, group_size=3, seed=5, eval_strategy="no", **UNSAVED),
        posts,
        entities=toy_entities(),
        processing_class=Recorder(),
    )
    sampler = trainer._get_train_sampler()
    assert list(sampler) == list(grouping_sampler(posts, grouping, 3, 5))
    assert trainer.collator.same_surface is (grouping != "none")


def test_features_are_attached_to_posts_and_entities():
    inputs = ModelInputs(None, Recorder())
    inputs.image_features = SimpleNamespace(attach=lambda some: [{"seen": row["entity_id"]} for row in some])
    collator = PretrainingCollator(inputs, toy_entities())
    batch = collator([rows()[0]])
    assert batch["posts"] == batch["entities"] == [{"seen": "Q1"}]


def test_a_post_about_an_unknown_entity_raises():
    with pytest.raises(UnknownEntityError, match="not in the knowledge base"):
        PretrainingCollator(ModelInputs(None, Recorder()), toy_entities(3))(rows().__getitems__(list(range(12))))


def test_mentions_and_posts_become_rows_of_the_same_form():
    mentions = toy_mentions(12, nil_every=3)
    kept = as_posts(mentions)
    assert len(kept) == 8
    assert NIL not in kept["entity_id"]
    posts = mentions.select_columns(["mention_id", "entity_id", "text", "image"]).rename_column(
        "mention_id", "post_id"
    )
    renamed = as_posts(posts)
    assert {"mention_id", "mention", "text", "image", "entity_id"} <= set(renamed.column_names)
    with pytest.raises(DataFormatError, match="no posts"):
        as_posts(mentions.select([]))


def test_names_in_posts_are_their_mentions_by_hand():
    names = [
        ("Q1", "Ghana", ["Republic of Ghana"]),
        ("Q2", "Accra", []),
        ("Q3", "Ada Falk", []),
        ("Q4", "Ada Falk", []),
    ]
    entities = datasets.Dataset.from_list(
        [{"entity_id": entity_id, "name": name, "aliases": aliases} for entity_id, name, aliases in names]
    )
    cases = [  # entity, text → entity, mention
        ("Q1", "The Republic of Ghana, or GHANA.", "Q1", "Republic of Ghana"),
        ("Q2", "The Republic of Ghana has Accra.", "Q2", "Accra"),  # its own entity, though shorter
        ("Q3", "The Republic of Ghana has one.", "Q3", "Republic of Ghana"),  # another's
        ("Q2", "Nothing here.", "Q2", ""),
        (NIL, "In Accra, the Republic of Ghana", "Q1", "Republic of Ghana"),  # the longest
        (NIL, "Ada Falk was in Ghana.", "Q1", "Ghana"),  # two entities have the longer name
        (NIL, "Ada Falk was there.", NIL, "Ada Falk"),
        (NIL, "", NIL, ""),
    ]
    posts = datasets.Dataset.from_list(
        [{"post_id": f"p{k}", "entity_id": case[0], "text": case[1], "image": None} for k, case in enumerate(cases)]
    )
    rows = with_found_mentions(posts, entities)
    assert [(row["entity_id"], row["mention"]) for row in rows] == [case[2:] for case in cases]
    for row in rows:
        assert row["text"][row["start"] : row["end"]] == row["mention"] if row["mention"] else row["start"] == NO_SPAN
    kept = as_posts(rows)
    assert kept["mention_id"][:] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert kept["mention"][0] == "Republic of Ghana"


def pfmel_recipe(dataset, **training):
    content = recipe_dict(dataset, **training)
    text = content["model"]["config"]["text_config"] | {"num_hidden_layers": 1, "max_position_embeddings": 66}
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    content["model"] = {"type": "pfmel", "config": {"text_config": text, "vision_config": vision}}
    content["processor"]["options"] = {"max_length": 64}
    return content | {"task": "pretraining"}


def test_posts_are_trained_on_with_the_names_in_them(tmp_path, caplog):
    dataset = write_dataset(tmp_path / "data")
    posts = add_posts(dataset)
    content = pfmel_recipe(dataset, num_train_epochs=1)
    content["data"] |= {"posts_split": "kb", "find_mentions": True}
    with caplog.at_level("INFO", logger="hf_mel.training.pretraining"):
        folder = run_recipe(Recipe.from_dict(content), tmp_path / "run")
    data = json.loads((folder / "results.json").read_text())["data"]
    assert (data["train_split"], data["train_posts"]) == ("kb", len(posts))
    assert f"of {len(posts)} posts" in caplog.text


@pytest.mark.parametrize("trained", [False, True], ids=["fixed images", "trained images"])
def test_linking_continues_from_a_pretraining_run(tmp_path, trained):
    content = pfmel_recipe(write_dataset(tmp_path / "data", nil_every=5), learning_rate=5e-3, num_train_epochs=3)
    content["model"]["config"]["train_vision"] = trained
    recipe = Recipe.from_dict(content)
    folder = run_recipe(recipe, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    assert results["task"] == "pretraining"
    assert not (folder / "checkpoints").exists()
    card = (folder / "README.md").read_text()
    assert f"is {results['validation']['loss']:.4g}." in card
    assert f"posts for training (`train`) | {results['data']['train_posts']} |" in card
    log = json.loads((folder / "training_log.json").read_text())
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert results["validation"]["loss"] == pytest.approx(min(losses), rel=1e-5)  # the best is kept

    start, _ = pretraining_model(
        Recipe.from_dict(content | {"model": {"from_pretrained": str(folder)}} | {"processor": None})
    )
    linking, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(linking).__name__ == "PfmelModel"
    for name, value in linking.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], value, msg=name)
    assert AutoProcessor.from_pretrained(folder).max_length == 64
    linked = content | {"task": "linking", "model": {"from_pretrained": str(folder)}, "processor": None}
    linked |= {"candidates": {"source": "name", "k": 4}, "training": content["training"] | {"num_train_epochs": 1}}
    linked = run_recipe(Recipe.from_dict(linked), tmp_path / "linked")
    assert "mrr" in (linked / "results.json").read_text()
    tuned = AutoModel.from_pretrained(linked)
    assert (
        torch.equal(
            tuned.vision_model.state_dict()["embedder.embedder.convolution.weight"],
            linking.vision_model.state_dict()["embedder.embedder.convolution.weight"],
        )
        != trained
    )
    assert not torch.equal(tuned.image_projection.weight, linking.image_projection.weight)
    assert run_recipe(recipe, tmp_path / "run", resume=True) == folder
    with pytest.raises(RecipeError, match="finished"):
        run_recipe(recipe, tmp_path / "run")


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "data")
    recipe = Recipe.from_dict(pfmel_recipe(dataset))
    whole = run_recipe(recipe, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", stop)
        with pytest.raises(Stop):
            run_recipe(recipe, tmp_path / "cut")
    checkpoints = sorted((tmp_path / "cut/checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (checkpoints[-1] / "trainer_state.json").unlink()  # as if the last one had been interrupted
    resumed = run_recipe(recipe, tmp_path / "cut", resume=True)
    one, other = (AutoModel.from_pretrained(folder).state_dict() for folder in (whole, resumed))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name)


def test_a_method_without_pretraining_raises(tmp_path):
    content = recipe_dict(write_dataset(tmp_path / "data")) | {"task": "pretraining"}
    with pytest.raises(RecipeError, match="'mimic' has no pre-training"):
        run_recipe(Recipe.from_dict(content), tmp_path / "run")
    with pytest.raises(RecipeError, match="'pretrainin'"):
        Recipe.from_dict(content | {"task": "pretrainin"})
    with pytest.raises(RecipeError, match="posts_split"):
        Recipe.from_dict(content | {"task": "linking", "data": {"dataset": "x", "posts_split": "kb"}})

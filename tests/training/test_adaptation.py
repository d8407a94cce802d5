"""Adapting a model to a knowledge base: what is trained on, what is left out, what is reported, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel
from typer.testing import CliRunner

from hf_mel.cli import app
from hf_mel.errors import DataFormatError, KnowledgeBaseError, RecipeError, UnknownModelError
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.evaluation.name_weight import NameWeight
from hf_mel.hub.saving import change_config, save_model_repository
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.schema import NIL, post_features
from hf_mel.training import adaptation
from hf_mel.training.adaptation import (
    MadeData,
    adaptation_recipe,
    open_knowledge,
)
from hf_mel.training.assemble import build_model
from hf_mel.training.recipe import AdaptationRecipe, Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.tokenizer import train_wordpiece
from tests.toy import ToyPairProcessor, ToyProcessor, register, toy_entities, toy_model, toy_reranker
from tests.training.test_made_mentions import entities_of
from tests.training.toy_run import recipe_dict, write_dataset

FORENAMES, SURNAMES = ("Ada", "Bo", "Cy", "Dee", "Eva"), ("Orme", "Lund", "Falk", "Ito")
TOWNS = ("Lisbon", "Bergen", "Porto", "Ghent", "Kyoto")


def people() -> datasets.Dataset:
    """Twenty people of four surnames, each with a town and a year."""
    return entities_of(
        *(
            {"name": f"{first} {last}", "attributes": f"Born: {1700 + 10 * i + j}, {TOWNS[(i + j) % 5]}."}
            for i, first in enumerate(FORENAMES)
            for j, last in enumerate(SURNAMES)
        )
    )


def write_people(path: Path) -> Path:
    path.write_text(
        "\n".join(
            json.dumps({"id": row["entity_id"], "name": row["name"], "attributes": row["attributes"]})
            for row in people()
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A text encoder with random weights."""
    folder = tmp_path_factory.mktemp("encoders") / "encoder"
    tokenizer = train_wordpiece([" ".join((*FORENAMES, *SURNAMES, *TOWNS)), "0 1 2 3 4 5 6 7 8 9 born"], 300)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, **sizes), add_pooling_layer=False).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


QUICK = (
    "training.bf16=false",
    "training.disable_tqdm=true",
    "training.use_cpu=true",
    "training.per_device_train_batch_size=16",
)
#: Trains on made mentions, though nothing shows whether that helps.
UNCHECKED = (*QUICK, "adaptation.train=true")
#: Chooses the weight of the names for a trained model, too.
NAMED = (*QUICK, "adaptation.names=true")


def adapt(*arguments: object, sets: tuple[str, ...] = QUICK):
    options = [part for each in sets for part in ("--set", each)]
    return CliRunner().invoke(app, ["adapt", *map(str, arguments), *options])


def made(entities: datasets.Dataset, with_nil: bool = False, seed: int = 0, **setting) -> MadeData:
    return MadeData(entities, None, AdaptationRecipe(**{"train": True, **setting}), seed, with_nil)


def test_left_out_entities_are_not_trained_on_and_their_mentions_are_nil():
    data = made(people(), with_nil=True, nil=0.2, per_entity=3, validation=10)
    assert data.counts["left_out_entities"] == 4
    outside = set(people()["entity_id"]) - set(data.entities["entity_id"])
    assert len(outside) == 4
    for mentions in (data.train, data.validation):
        golds = Counter(mentions["entity_id"])
        assert not outside & set(golds)
        assert golds[NIL] > 0
        of_nil = {
            mention_id.split("-")[-2]
            for mention_id, gold in zip(mentions["mention_id"], mentions["entity_id"], strict=True)
            if gold == NIL
        }
        assert of_nil <= outside
    assert made(people(), nil=0.2).counts["train_nil"] == 0  # the model does not learn NIL
    assert made(people(), nil=0).counts["left_out_entities"] == 0


def test_beyond_the_limit_whole_groups_of_look_alikes_are_trained_on():
    data = made(people(), nil=0, limit=5, per_entity=4)
    trained = {row["entity_id"]: row["name"].split()[-1] for row in people()}
    golds = {trained[gold] for gold in data.train["entity_id"]}
    assert len(golds) == 1  # one surname has all five
    assert data.counts["trained_entities"] == 5
    assert len(data.train) <= 5
    assert data.counts["train_mentions"] == len(data.train)


def test_validation_has_other_mentions_and_ranks_part_of_a_large_knowledge_base():
    data = made(people(), nil=0.1, validation=8, ranked=6)
    assert len(data.ranked) == 6
    assert {gold for gold in data.validation["entity_id"] if gold != NIL} <= set(data.ranked["entity_id"])
    assert not set(data.validation["mention_id"]) & set(data.train["mention_id"])
    assert len(data.validation) <= 8
    assert made(people(), nil=0.1).train.to_list() == made(people(), nil=0.1).train.to_list()
    assert made(people(), nil=0.1).train.to_list() != made(people(), nil=0.1, seed=1).train.to_list()


def posts_about(*counts: int) -> datasets.Dataset:
    """So many posts about the entities Q1, Q2, …"""
    rows = [(number, k) for number, count in enumerate(counts, 1) for k in range(count)]
    return datasets.Dataset.from_list(
        [{"post_id": f"p{n}-{k}", "entity_id": f"Q{n}", "text": f"post {k} of {n}", "image": None} for n, k in rows],
        features=post_features(),
    )


def test_posts_are_mentions_of_entities_that_are_not_left_out():
    posts = posts_about(*[1] * 20)
    always = AdaptationRecipe(nil=0.2, posts=2, per_entity=1, train=True)
    data = MadeData(people(), posts, always, 0, False)
    texts = Counter(text for text in data.train["text"] if text.startswith("post"))
    assert len(texts) == 16
    assert set(texts.values()) == {2}
    assert data.counts["train_posts"] == 32
    few = MadeData(people(), posts, AdaptationRecipe(nil=0, posts=1, limit=5, train=True), 0, False)
    assert few.counts["train_posts"] == 5


def test_without_training_there_are_no_mentions_for_it_and_no_entity_is_left_out():
    data = MadeData(people(), posts_about(*[10] * 20), AdaptationRecipe(), 0, True)
    assert len(data.train) == 0
    assert len(data.entities) == 20
    assert len(data.validation) > 0
    assert NIL not in data.validation["entity_id"]
    assert data.counts["train_mentions"] == data.counts["trained_entities"] == data.counts["left_out_entities"] == 0


def test_a_model_that_has_a_weight_of_the_names_keeps_it_and_its_thresholds(tmp_path):
    dataset = write_dataset(tmp_path / "toy")
    start = run_recipe(Recipe.from_dict(recipe_dict(dataset, num_train_epochs=1)), tmp_path / "start")
    change_config(start, nil_threshold=1.25, name_weight=0.5)
    done = adapt(start, "--dataset", dataset, "--output", tmp_path / "run", sets=NAMED)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Nothing changed" in done.output
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["nil_threshold"], config["name_weight"]) == (1.25, 0.5)
    assert config["link_calibration"] == json.loads((start / "config.json").read_text())["link_calibration"]


def test_a_trained_model_is_not_changed_unless_asked_to(tmp_path):
    register()
    save_model_repository(toy_model(), ToyProcessor(), tmp_path / "model")
    recipe = adaptation_recipe(
        str(tmp_path / "model"), str(write_people(tmp_path / "p.jsonl")), name="x", overrides=QUICK
    )
    with pytest.raises(RecipeError, match=r"Nothing would change.*--save-name-weight"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_finds_made_mentions_without_names_stays_as_it_is(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "toy")
    start = run_recipe(Recipe.from_dict(recipe_dict(dataset, num_train_epochs=1)), tmp_path / "start")
    change_config(start, nil_threshold=1.25)
    monkeypatch.setattr(adaptation, "choose_name_weight", lambda *args, **options: NameWeight(0.0, {"0": 1.0}))
    done = adapt(start, "--dataset", dataset, "--output", tmp_path / "run", sets=NAMED)
    assert done.exit_code == 0, (done.output, done.exception)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["nil_threshold"] == 1.25
    assert not config.get("name_weight")


def test_an_encoder_gets_the_weight_of_the_names_that_made_mentions_choose(encoder, tmp_path):
    file, run = write_people(tmp_path / "people.jsonl"), tmp_path / "run"
    done = adapt(encoder, "--entities", file, "--output", run)
    assert done.exit_code == 0, (done.output, done.exception)
    printed = " ".join(done.output.split())
    recipe = Recipe.load(run / "recipe.yaml")
    entities, _, _ = open_knowledge(recipe)
    data = MadeData(entities, None, AdaptationRecipe(), 0, False)
    start, processor = build_model(recipe)
    model, _ = load_retriever(run)
    for name, value in start.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    def mrr(weight: float) -> float:
        evaluator = FullEvaluator(data.ranked, name_weight=weight)
        return evaluator(ModelInputs(start, processor), data.validation).metrics["mrr"]

    chosen = json.loads((run / "results.json").read_text())["adaptation"]["names"]
    assert model.config.name_weight == chosen["weight"] > 0  # an encoder with random weights needs the names
    assert mrr(chosen["weight"]) == pytest.approx(max(chosen["chosen_by_mrr"].values()), abs=1e-6)
    assert mrr(0) == pytest.approx(chosen["chosen_by_mrr"]["0"], abs=1e-6)
    assert f"Weight of the names, chosen on made mentions: {chosen['weight']:g}" in printed
    assert "Training in" not in printed  # nothing trains
    assert not (run / "training.png").exists()
    kb = KnowledgeBase.build(file, model, processor, output=tmp_path / "kb")
    assert EntityLinker(model, processor, kb).name_weight == chosen["weight"]

    resumed = adapt(encoder, "--entities", file, "--output", run, "--resume")
    assert resumed.exit_code == 0, (resumed.output, resumed.exception)


def test_an_encoder_learns_its_knowledge_base_and_links(encoder, tmp_path):
    file, run = write_people(tmp_path / "people.jsonl"), tmp_path / "runs" / "my people"
    sets = (
        *UNCHECKED,
        "training.num_train_epochs=6",
        "training.learning_rate=3e-3",
        "training.head_learning_rate=3e-3",
    )
    done = adapt(encoder, "--entities", file, "--output", run, sets=(*sets, "adaptation.per_entity=12"))
    assert done.exit_code == 0, (done.output, done.exception)
    printed = " ".join(done.output.split())
    results = json.loads((run / "results.json").read_text())
    assert f"Trained on {results['data']['train_mentions']:,} mentions, made of 19 of 19 entities." in printed
    assert "Left out 1 entity, so that" in printed
    assert f"hf-mel kb build {run} --entities {file}" in printed
    log = json.loads((run / "training_log.json").read_text())
    assert log[0]["step"] == 0
    assert max(entry["eval_hits@1"] for entry in log if "eval_hits@1" in entry) > log[0]["eval_hits@1"] + 0.1
    recipe = Recipe.load(run / "recipe.yaml")
    assert (recipe.task, recipe.name, recipe.data.dataset) == ("adaptation", "my-people", str(file))

    model, processor = load_retriever(run)
    assert model.config.nil_threshold is None  # made mentions calibrate nothing
    assert model.config.link_calibration is None
    kb = KnowledgeBase.build(file, model, processor, output=tmp_path / "kb")
    assert EntityLinker(model, processor, kb)(text="Ada Lund, 1701", mention="Ada Lund").best.name == "Ada Lund"

    again = adapt(
        run, "--kb", tmp_path / "kb", "--output", tmp_path / "again", sets=(*UNCHECKED, "training.max_steps=1")
    )
    assert again.exit_code == 0, (again.output, again.exception)
    continued = Recipe.load(tmp_path / "again" / "recipe.yaml")
    assert continued.model.from_pretrained == str(run)
    assert continued.training["learning_rate"] == 3e-3  # of the model's own recipe


def test_the_best_checkpoint_is_recorded_with_its_metrics_on_the_ranked_entities(encoder, tmp_path):
    file = write_people(tmp_path / "people.jsonl")
    recipe = adaptation_recipe(str(encoder), str(file), name="x", overrides=[*UNCHECKED, "training.max_steps=2"])
    run = run_recipe(recipe, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    entities, posts, _ = open_knowledge(recipe)
    data = MadeData(entities, posts, AdaptationRecipe(train=True), 0, False)
    inputs = ModelInputs(*load_retriever(run))
    assert posts is None
    metrics = FullEvaluator(data.ranked, name_weight=inputs.model.config.name_weight or 0)(
        inputs, data.validation
    ).metrics
    assert metrics["mrr"] == pytest.approx(results["validation"]["metrics"]["mrr"], abs=1e-6)
    card = (run / "README.md").read_text()
    assert "people.jsonl" in card
    assert "made" in card


def test_columns_of_a_museums_table_are_read_and_kept_in_the_recipe(encoder, tmp_path):
    table = tmp_path / "artists.csv"
    rows = "\n".join(
        f'{k};"{last}, {first}";born 19{k}0;x'
        for k, (first, last) in enumerate(zip(FORENAMES, SURNAMES, strict=False))
    )
    table.write_text(f"no;artist;dates;url\n{rows}\n", encoding="utf-8")
    columns = ("--column", "id=no", "--column", "name=artist", "--column", "description=dates")
    options = (*columns, "--ignore-other-columns", "--inverted-names")
    done = adapt(
        encoder, "--entities", table, *options, "--output", tmp_path / "run", sets=(*UNCHECKED, "training.max_steps=1")
    )
    assert done.exit_code == 0, (done.output, done.exception)
    recipe = Recipe.load(tmp_path / "run" / "recipe.yaml")
    entities, _, _ = open_knowledge(recipe)
    assert entities[0]["name"] == "Orme, Ada"
    assert entities[0]["aliases"] == ["Ada Orme"]
    assert entities[0]["description"] == "born 1900"


def test_a_recipe_trains_from_a_data_set_without_its_mentions(tmp_path):
    dataset = write_dataset(tmp_path / "toy")
    shutil.rmtree(tmp_path / "toy" / "mentions")
    content = recipe_dict(dataset, augment_images="strong", num_train_epochs=1)
    readme = (dataset / "README.md").read_text()
    (dataset / "README.md").write_text(
        readme[: readme.index("- config_name: mentions")] + readme[readme.index("- config_name: entities") :]
    )
    recipe = Recipe.from_dict(
        {**content, "task": "adaptation", "adaptation": {"per_entity": 2, "validation": 8, "train": True}}
    )
    run = run_recipe(recipe, tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    assert results["data"]["train_mentions"] > 12
    assert results["data"]["entities"] == 12
    AutoModel.from_pretrained(run)
    AutoProcessor.from_pretrained(run)


def test_a_knowledge_base_gives_the_rows_it_was_built_from(tmp_path):
    register()
    model, processor = toy_model(), ToyProcessor()
    kb = KnowledgeBase.build(toy_entities(7), model, processor, output=tmp_path / "kb")
    kb.remove(["Q3"])
    rows = KnowledgeBase(tmp_path / "kb").as_dataset()
    expected = toy_entities(7).filter(lambda row: row["entity_id"] != "Q3")
    assert rows.features == expected.features
    for row, wanted in zip(rows, expected, strict=True):
        images, wanted_images = row.pop("images"), wanted.pop("images")
        assert row == wanted
        assert [image.tobytes() for image in images] == [image.tobytes() for image in wanted_images]


def test_a_model_that_reads_images_is_told_that_there_are_none(tmp_path, caplog):
    dataset = write_dataset(tmp_path / "toy")
    toy_entities(12, images=False).to_parquet(dataset / "entities/kb.parquet")
    content = recipe_dict(dataset, max_steps=1)
    run_recipe(Recipe.from_dict({**content, "task": "adaptation", "adaptation": {"validation": 4}}), tmp_path / "run")
    assert "The model reads images, but no entity has one" in caplog.text


def test_names_alone_are_learned_with_a_warning(encoder, tmp_path, caplog):
    file = tmp_path / "names.csv"
    file.write_text("id,name\n" + "\n".join(f"{k},{name} Orme" for k, name in enumerate(FORENAMES)) + "\n")
    recipe = adaptation_recipe(str(encoder), str(file), name="x", overrides=[*UNCHECKED, "training.max_steps=1"])
    run_recipe(recipe, tmp_path / "run")
    assert "the model learns names alone" in caplog.text


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("1,Ada,\n", KnowledgeBaseError, "single entity"),
        ("1,Ada,\n2,Ada,\n3,Ada,\n", KnowledgeBaseError, "Nothing tells the entities apart"),
        ("1,Ada,x\n1,Bo,y\n", DataFormatError, "also that of line 2"),
        ("1,,x\n2,Bo,y\n", DataFormatError, "name"),
    ],
)
def test_entities_from_which_nothing_is_learned_are_refused_and_nothing_is_written(
    encoder, tmp_path, rows, error, message
):
    file = tmp_path / "mine.csv"
    file.write_text(f"id,name,description\n{rows}", encoding="utf-8")
    with pytest.raises(error, match=message):
        run_recipe(adaptation_recipe(str(encoder), str(file), name="x", overrides=QUICK), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_namesakes_that_descriptions_tell_apart_are_learned(encoder, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(
        "id,name,description\n" + "\n".join(f"{k},Ada Orme,{town} 17{k}0" for k, town in enumerate(TOWNS)) + "\n"
    )
    recipe = adaptation_recipe(str(encoder), str(file), name="x", overrides=[*UNCHECKED, "training.max_steps=1"])
    results = json.loads((run_recipe(recipe, tmp_path / "run") / "results.json").read_text())
    assert results["data"]["trained_entities"] == 5


def test_a_reranker_is_refused(tmp_path):
    register()
    save_model_repository(toy_reranker(), ToyPairProcessor(), tmp_path / "reranker")
    recipe = adaptation_recipe(
        str(tmp_path / "reranker"), str(write_people(tmp_path / "p.jsonl")), name="x", overrides=NAMED
    )
    with pytest.raises(RecipeError, match="only a retriever adapts"):
        run_recipe(recipe, tmp_path / "run")


def test_a_model_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UnknownModelError, match="nowhere"):
        adaptation_recipe(str(tmp_path / "nowhere"), "mine.jsonl", name="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give one of"),
        (("--entities", "a.csv", "--kb", "kb"), "Give one of"),
        (("--dataset", "d", "--column", "name=artist"), "Give a file of --entities"),
    ],
)
def test_the_source_is_given_once(tmp_path, arguments, message):
    done = adapt("model", *arguments, "--output", tmp_path / "run", sets=())
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptation": {"per_entity": 0}}, "must be at least 1"),
        ({"adaptation": {"nil": 0.9}}, "between 0 and 0.5"),
        ({"adaptation": {"train": "sometimes"}}, "is not true or false"),
        ({"adaptation": {"nils": 0.1}}, "unknown key 'adaptation.nils'"),
        ({"adaptation": {"nil": "much"}}, "is not a whole number or a number"),
        ({"task": "linking"}, "does not apply to the task 'linking'"),
        (
            {"data": {"dataset": "d", "columns": {"sources": {}}}, "task": "linking", "adaptation": None},
            "data.columns does not apply",
        ),
    ],
)
def test_recipes_are_checked(change, message):
    content = {
        "name": "x",
        "task": "adaptation",
        "model": {"from_pretrained": "m"},
        "data": {"dataset": "d"},
        "adaptation": {},
    }
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**content, **change})


def test_columns_need_a_file(tmp_path):
    dataset = write_dataset(tmp_path / "toy")
    content = recipe_dict(dataset)
    content["data"]["columns"] = {"inverted_names": True}
    with pytest.raises(RecipeError, match=r"data\.dataset is not a file"):
        open_knowledge(Recipe.from_dict({**content, "task": "adaptation"}))


def test_adaptation_recipes_survive_their_own_yaml():
    for name in ("adapt-encoder", "adapt-model", "adapt_wikimel", "adapt_flags"):
        recipe = Recipe.load(name)
        assert recipe.task == "adaptation"
        assert dataclasses.replace(recipe, source=None) == dataclasses.replace(
            Recipe.from_dict(recipe.to_dict()), source=None
        )

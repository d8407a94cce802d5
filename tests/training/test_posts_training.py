"""Training, evaluating and linking with a retriever that represents entities by posts."""

from __future__ import annotations

import json

import pytest
import torch

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.posts import captions_as_posts
from hf_mel.errors import RecipeError, ScoreError, UnknownSplitError
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.features import mention_features as module
from hf_mel.inference.features.mention_features import MentionFeatures
from hf_mel.inference.features.post_prototypes import PostPrototypes
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.collators import RetrieverCollator
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.trainer import MelTrainer
from tests.data.test_posts import write
from tests.toy import ToyEncodings, ToyProcessor, toy_entities, toy_mentions, toy_model, write_toy_dataset
from tests.toy_posts import ToyPostsProcessor, ToyPostsRetriever, register, toy_posts, toy_posts_model
from tests.training.toy_run import recipe_dict, write_dataset

ENTITIES = toy_entities(12)


@pytest.mark.parametrize("batch", [[0], [0, 1, 2, 3], [4, 28, 16, 5], list(range(10))])
def test_a_batch_leaves_out_the_captions_of_its_mentions(batch):
    """The caption may be a post of the mention's gold, or of another entity with the same text."""
    mentions = toy_mentions(40)
    shared = mentions[0]["text"]
    mentions = mentions.map(lambda row: {"text": shared} if row["mention_id"] in ("m1", "m28") else {})
    model, seen = toy_posts_model(), []

    class Recording(ToyPostsProcessor):
        def __call__(self, **rows):
            seen.extend(rows.get("entities") or ())
            return super().__call__(**rows)

    posts = captions_as_posts(mentions)
    inputs = ModelInputs(model, Recording(), posts)
    inputs.precompute(entities=ENTITIES)
    collator = RetrieverCollator(inputs, ENTITIES)
    tensors = collator(LazyRows(mentions).__getitems__(batch))
    texts = {mentions[i]["text"] for i in batch}
    assert len(seen) == len(tensors["entity_text"]) == len({mentions[i]["entity_id"] for i in batch})
    hidden = [post for post in posts if post["source_text"] in texts]
    with torch.no_grad():
        vectors = model.encode_posts(
            **{k: v for k, v in ToyPostsProcessor()(posts=hidden).items() if k.startswith("post_")}
        )["text"]
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    for row in seen:
        assert len(row["prototypes"]["text"])
        assert not torch.isclose(row["prototypes"]["text"][:, None], vectors, atol=1e-6).all(2).any(), row["entity_id"]


def test_without_prototypes_the_entity_rows_are_unchanged():
    collator = RetrieverCollator(ModelInputs(None, ToyProcessor()), ENTITIES)
    mentions = LazyRows(toy_mentions(4)).__getitems__([0, 1])
    assert set(collator(mentions)) == {*ToyProcessor()(mentions=mentions, entities=list(ENTITIES)), "labels"}


def trained(tmp_path, model, inputs=None, processor=None):
    trainer = MelTrainer(
        model,
        MelTrainingArguments(
            output_dir=str(tmp_path / "checkpoints"),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            disable_tqdm=True,
            log_level="error",
            check_memory=False,  # the prediction reads rows, too, which tests count
        ),
        train_dataset=toy_mentions(16),
        eval_dataset=toy_mentions(12),
        entities=ENTITIES,
        processing_class=processor or ToyPostsProcessor(),
        inputs=inputs,
    )
    trainer.train()
    return trainer


def test_posts_are_encoded_once_per_training(tmp_path):
    model = toy_posts_model()
    before = model.mention_text.weight.clone()
    trainer = trained(tmp_path, model, ModelInputs(model, ToyPostsProcessor(), toy_posts()))
    assert model.posts_seen == len(toy_posts()) + len(ENTITIES)
    assert not torch.equal(model.mention_text.weight, before)
    expected = FullEvaluator(ENTITIES, progress=False)(
        ModelInputs(model, ToyPostsProcessor(), toy_posts()), toy_mentions(12)
    )
    assert trainer.evaluate()["eval_mrr"] == pytest.approx(expected.metrics["mrr"])


def test_without_posts_entities_represent_themselves(tmp_path):
    trainer = trained(tmp_path, toy_posts_model())
    assert trainer.inputs.prototypes.posts is None
    assert trainer.evaluate()["eval_mrr"] > 0


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_knowledge_base_and_the_evaluation_rank_alike(tmp_path, batch_size):
    """The knowledge base uses the data set's posts by default and has the same encodings as the model."""
    model, processor = toy_posts_model(), ToyPostsProcessor()
    folder = write(tmp_path / "data", toy_posts())
    kb = KnowledgeBase.build(str(folder), model, processor, batch_size=batch_size, progress=False)
    inputs = ModelInputs(model, processor, toy_posts())
    evaluated = FullEvaluator(toy_entities(), top_k=12, progress=False)(inputs, toy_mentions(20))
    by_kb = FullEvaluator(kb, top_k=12, progress=False)(ModelInputs(model, processor), toy_mentions(20))
    assert torch.equal(by_kb.ranking.best_rank, evaluated.ranking.best_rank)
    assert torch.equal(by_kb.ranking.top_rows, evaluated.ranking.top_rows)
    assert by_kb.strata["name of mention"] == evaluated.strata["name of mention"]
    entities = inputs.entity_rows(list(toy_entities()))
    with torch.no_grad():
        plain = model.encode_entities(**processor(entities=entities))
    torch.testing.assert_close(kb.encodings(range(12))["text"], plain["text"])
    linked = EntityLinker(model, processor, kb)([dict(row) for row in toy_mentions(20)])
    assert [result.entity_id for result in linked] == [
        f"Q{rows[0] + 1}" for rows in evaluated.ranking.top_rows.tolist()
    ]


def test_a_knowledge_base_with_captions_as_posts_and_without_posts(tmp_path):
    model, processor = toy_posts_model(), ToyPostsProcessor()
    folder = str(write_toy_dataset(tmp_path / "data"))
    built = {
        posts: KnowledgeBase.build(folder, model, processor, posts=posts, progress=False).encodings(range(12))["text"]
        for posts in ("auto", "train", "test", "none")
    }
    without_posts = encode_rows(ModelInputs(model, processor), toy_entities(), "entities")["text"]
    assert torch.equal(built["auto"], built["train"])
    torch.testing.assert_close(built["none"], without_posts)
    for posts in ("train", "test"):
        assert (built[posts] - without_posts).abs().max() > 0.01
    assert (built["train"] - built["test"]).abs().max() > 0.01
    with pytest.raises(UnknownSplitError, match="'nowhere'"):
        KnowledgeBase.build(folder, model, processor, posts="nowhere", progress=False)


def test_entities_of_a_file_represent_themselves(tmp_path):
    model, processor = toy_posts_model(), ToyPostsProcessor()
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"id": f"Q{k}", "name": f"Entity {k}"}) for k in range(3)))
    kb = KnowledgeBase.build(str(file), model, processor, progress=False)
    single = PostPrototypes(model, processor).attach(
        [{"entity_id": "Q2", "name": "Entity 2", "description": "", "attributes": "", "images": []}]
    )
    with torch.no_grad():
        expected = model.encode_entities(**processor(entities=single))["text"]
    torch.testing.assert_close(kb.encodings([2])["text"], expected)
    more = tmp_path / "more.csv"
    more.write_text("id,name\nQ9,Somebody\n")
    assert kb.add(str(more), model, processor, progress=False) == 1
    assert len(EntityLinker(model, processor, kb)(text="Entity 2 won.", mention="Entity 2").candidates) == 4
    with pytest.raises(UnknownSplitError, match="do not come from a data set"):
        KnowledgeBase.build(str(file), model, processor, posts="train", progress=False)


def test_texts_that_are_posts_are_counted(tmp_path):
    mentions = toy_mentions(20, nil_every=5)
    prototypes = PostPrototypes(toy_posts_model(), ToyPostsProcessor(), captions_as_posts(mentions))
    assert prototypes.num_leaked(mentions) == 16
    assert prototypes.num_leaked(mentions.map(lambda row: {"text": row["text"] + " Again."})) == 0
    wrong = mentions.map(lambda row: {"entity_id": "Q99"})
    assert prototypes.num_leaked(wrong) == 0
    assert PostPrototypes(toy_posts_model(), ToyPostsProcessor()).num_leaked(mentions) == 0


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Saves an untrained model and returns its folder."""
    register()
    monkeypatch.chdir(tmp_path)
    toy_posts_model().save_pretrained("start")
    ToyPostsProcessor().save_pretrained("start")
    return "start"


def recipe(start, dataset, name, **more) -> Recipe:
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    model = {"from_pretrained": start, "config": more.pop("config", {})}
    data = {"dataset": str(dataset)}
    return Recipe.from_dict({"name": name, "model": model, "data": data, "training": training, **more})


def test_the_linking_stage_continues_from_the_knowledge_stage(start, tmp_path):
    """The knowledge stage trains on prototype posts as mentions without a surface. The linking stage continues from it."""
    dataset = write(tmp_path / "data", toy_posts())
    knowledge = run_recipe(
        recipe(start, dataset, "knowledge", task="knowledge", config={"prototype_selection": "random"})
    )
    results = json.loads((knowledge / "results.json").read_text())
    model = toy_posts_model()
    model.config.prototype_selection = "random"
    prototypes = PostPrototypes(model, ToyPostsProcessor(), toy_posts())
    prototypes.precompute(toy_entities())
    assert results["data"]["train_split"] == "posts"
    assert results["data"]["train_mentions"] == len(prototypes.support_set(toy_entities()))
    assert json.loads((knowledge / "config.json").read_text())["prototype_selection"] == "random"

    task = run_recipe(recipe(str(knowledge), dataset, "task"))
    results = json.loads((task / "results.json").read_text())
    assert results["data"]["train_mentions"] == 20
    example = (
        (task / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("hf-mel/task", str(task))
    )
    exec(example, {})  # with transformers alone
    # The setting of the first stage is kept, because encoding entities with the model of the second stage needs it.
    assert json.loads((task / "config.json").read_text())["prototype_selection"] == "random"


def test_the_knowledge_task_needs_a_model_with_posts(tmp_path):
    dataset = write_dataset(tmp_path / "data")
    mimic = recipe_dict(dataset)
    with pytest.raises(RecipeError, match="MimicModel does not represent entities by posts"):
        run_recipe(Recipe.from_dict({**mimic, "task": "knowledge"}), tmp_path / "run")


def test_other_models_ignore_posts(tmp_path):
    folder = write(tmp_path / "data", toy_posts())
    model, processor = toy_model(), ToyProcessor()
    kb = KnowledgeBase.build(str(folder), model, processor, posts="nowhere", progress=False)
    torch.testing.assert_close(
        kb.encodings(range(12))["text"], encode_rows(ModelInputs(model, processor), toy_entities(), "entities")["text"]
    )


class Reading(ToyPostsRetriever):
    """Has a frozen mention encoder and counts the mentions it encodes."""

    read = 0

    def mention_features(self, mention_input_ids, mention_attention_mask, **_):
        self.read += len(mention_input_ids)
        return {"text": self.characters(mention_input_ids), "text_mask": mention_attention_mask.bool()}

    def encode_mentions(self, mention_features_text=None, mention_features_text_mask=None, **inputs):
        if mention_features_text is None:
            features = self.mention_features(**inputs)
            mention_features_text, mention_features_text_mask = features["text"], features["text_mask"]
        mask = mention_features_text_mask[..., None]
        mean = (mention_features_text * mask).sum(1) / mask.sum(1).clamp(min=1)
        return ToyEncodings(text=self.mention_text(mean), vision=torch.zeros(len(mean), 16))


class ReadingProcessor(ToyPostsProcessor):
    def __call__(self, mentions=None, **rows):
        if mentions and "features" in mentions[0]:
            states = [row["features"]["text"].float() for row in mentions]
            mask = [torch.ones(len(each), dtype=torch.bool) for each in states]
            padded = {"": states, "_mask": mask}
            batch = {f"mention_features_text{k}": torch.nn.utils.rnn.pad_sequence(v, True) for k, v in padded.items()}
            return {**batch, **super().__call__(**rows)}
        return super().__call__(mentions=mentions, **rows)


def test_a_mention_is_encoded_once_per_training(tmp_path, monkeypatch):
    """The weights equal those of encoding it in every epoch, up to half precision."""
    results = []
    for keeps in (True, False):
        torch.manual_seed(0)
        model = Reading(toy_posts_model().config)
        if not keeps:
            monkeypatch.setattr(MentionFeatures, "for_model", classmethod(lambda cls, model, processor: None))
        trainer = trained(tmp_path / str(keeps), model, processor=ReadingProcessor())
        during = model.read
        metrics = [trainer.evaluate()["eval_mrr"] for _ in range(3)]
        results.append(
            (
                model.mention_text.weight.detach().clone(),
                metrics,
                trainer.evaluate_detailed(toy_mentions(12)).metrics["mrr"],
            )
        )
        assert during == (16 if keeps else 32 + 24)
        assert model.read - during == (0 if keeps else 36) + 12  # what is measured in the end is read anew
        assert metrics == pytest.approx([results[-1][2]] * 3)
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-3, rtol=1e-2)


def test_other_texts_images_and_places_have_separate_features(monkeypatch):
    model, processor = Reading(toy_posts_model().config), ReadingProcessor()
    features = MentionFeatures(model, processor)
    mentions = toy_mentions(6)
    features.precompute(mentions)
    features.precompute(mentions)
    assert model.read == 6
    others = mentions.map(lambda row: {"text": f"now {row['text']}"})
    features.precompute(others)
    assert model.read == 12
    image = mentions[0]["image"]
    same = mentions.map(lambda row: {"image": image}, features=mentions.features)
    features.precompute(same.select([1, 2]))
    assert model.read == 14
    elsewhere = mentions.map(lambda row: {"start": row["start"] + 1, "end": row["end"] + 1})
    features.precompute(elsewhere)
    assert model.read == 20
    with torch.no_grad():
        expected = model.encode_mentions(**processor(mentions=list(others)))["text"]
        vectors = model.encode_mentions(**processor(mentions=features.attach(LazyRows(others).__getitems__([0, 4]))))[
            "text"
        ]
    torch.testing.assert_close(vectors, expected[[0, 4]], atol=1e-3, rtol=1e-3)
    with pytest.raises(KeyError):
        features.attach(LazyRows(toy_mentions(9)).__getitems__([8]))


def test_features_that_exceed_the_cache_are_computed_again(monkeypatch, caplog):
    monkeypatch.setattr(module, "_MAX_BYTES", 1000)
    model = Reading(toy_posts_model().config)
    features = MentionFeatures(model, ReadingProcessor())
    features.precompute(toy_mentions(30), batch_size=4)
    assert model.read == 4
    assert "do not fit" in caplog.text
    rows = LazyRows(toy_mentions(3)).__getitems__([0, 1, 2])
    assert features.attach(rows) == rows


def test_features_that_are_not_finite_name_the_mention():
    class Broken(Reading):
        def mention_features(self, **inputs):
            features = super().mention_features(**inputs)
            features["text"][1] = torch.nan
            return features

    with pytest.raises(ScoreError, match="m4"):
        MentionFeatures(Broken(toy_posts_model().config), ReadingProcessor()).precompute(
            toy_mentions(5).select([4, 4])
        )

"""Tests of ET: the forest against scikit-learn and by hand, features against plain computations, and fitting in a run."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.ensemble import ExtraTreesClassifier

from hf_mel.candidates.lists import CandidateLists
from hf_mel.errors import MissingExtraError, RecipeError
from hf_mel.modeling.extra_trees import ExtraTreesConfig, ExtraTreesModel, ExtraTreesProcessor
from hf_mel.modeling.extra_trees.modeling_extra_trees import Forest, _rounded_down
from hf_mel.modeling.extra_trees.processing_extra_trees import FEATURES
from hf_mel.protocols import FitsFeatures, Reranker
from hf_mel.training import base_trainer
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.trainer import MelTrainer
from tests.modeling.test_pfmel_processing import make_tokenizer
from tests.toy import toy_entities, toy_mentions

BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [6], "depths": [1], "layer_type": "basic"}


def plain_processor(**options):
    return ExtraTreesProcessor.from_parts(make_tokenizer(), use_text=False, **options)


def sample(pairs=400, features=5, seed=0):
    """Returns features with many equal values, and labels that depend on two of them."""
    draw = np.random.default_rng(seed)
    x = np.round(draw.normal(size=(pairs, features)), 1).astype(np.float32)
    noise = draw.normal(size=pairs) * 0.3
    return torch.from_numpy(x), torch.from_numpy(x[:, 0] + x[:, 1] ** 2 + noise > 1)


@pytest.mark.parametrize(
    "fields",
    [{}, {"n_estimators": 7, "max_depth": 3}, {"n_estimators": 9, "min_samples_leaf": 5, "max_features": None}],
    ids=str,
)
def test_the_forest_equals_that_of_scikit_learn(fields):
    x, labels = sample()
    model = ExtraTreesModel(ExtraTreesConfig(**fields))
    model.fit(x, labels, seed=3)
    options = {"n_estimators": 100} | fields
    expected = ExtraTreesClassifier(random_state=3, **options).fit(x.numpy(), labels.numpy())
    for seed in (1, 2):
        rows, _ = sample(seed=seed)
        torch.testing.assert_close(  # up to two rounding errors of float32
            model.forest(rows),
            torch.from_numpy(expected.predict_proba(rows.numpy())[:, 1]).float(),
            atol=2.5e-7,
            rtol=0,
        )
    assert model.config.num_nodes == sum(tree.tree_.node_count for tree in expected.estimators_)
    assert model.config.num_features == 5


def test_a_tree_of_depth_two_by_hand():
    forest = Forest(1, 5)
    # 0: x0 <= 1 ? 1 : 4;  1: x1 <= -2 ? 2 : 3
    for name, values in {
        "left": [1, 2, -1, -1, -1],
        "right": [4, 3, -1, -1, -1],
        "feature": [0, 1, 0, 0, 0],
        "threshold": [1.0, -2.0, 0.0, 0.0, 0.0],
        "value": [0.0, 0.0, 0.25, 0.5, 1.0],
    }.items():
        getattr(forest, name).copy_(torch.tensor(values))
    rows = torch.tensor([[1.0, -2.0], [1.0, -1.9], [1.1, -5.0]])
    assert forest(rows).tolist() == [0.25, 0.5, 1.0]
    forest.right[1] = 1  # a cycle
    with pytest.raises(ValueError, match="damaged"):
        forest(rows)


def test_rounded_thresholds_compare_as_before():
    draw = np.random.default_rng(0)
    thresholds = torch.from_numpy(draw.normal(size=2000))
    values = torch.cat([thresholds.float(), thresholds.float().nextafter(torch.tensor(9.0))])
    both = thresholds.repeat(2)
    assert torch.equal(values.double() <= both, values <= _rounded_down(both))


def test_an_unfitted_forest_does_not_decide():
    batch = plain_processor()(pairs=[(dict(toy_mentions(1)[0]), [dict(r) for r in toy_entities(3)])])
    out = ExtraTreesModel(ExtraTreesConfig())(**batch, labels=torch.tensor([1]))
    assert out.scores.tolist() == [[0.5] * 3]
    assert out.loss.item() == pytest.approx(math.log(2))


def test_features_of_a_pair():
    mention = {"mention": "José  Ruiz", "text": "José Ruiz met a king, a king.", "image": None}
    entity = {"name": "Jose Ruíz", "aliases": ["Pepe Ruiz Soto"], "attributes": "king of men", "prior": 0.25}
    entity |= {"description": "", "images": [], "followers": 9}
    other = {"name": "Ana", "aliases": [], "description": None, "attributes": "", "followers": None}
    processor = plain_processor(number_columns=["followers"])
    batch = processor(pairs=[(mention, [entity, other])])
    # Words: josé ruiz met a king a king (a and king twice) against king of men.
    cosine = 2 / (math.sqrt(1 + 1 + 1 + 4 + 4) * math.sqrt(3))
    first = [0.25, 1.0, 1.0, 1.0, cosine, 1 / 3, 0.0, 0.0, math.log(10)]
    torch.testing.assert_close(batch["pair_features"][0, 0], torch.tensor(first))
    second = dict(zip(FEATURES, batch["pair_features"][0, 1].tolist(), strict=False))
    assert second["name_similarity"] == pytest.approx(1 - edits("jose ruiz", "ana") / 9)
    assert [second[name] for name in ("prior", "name_is_equal", "name_has_all_words", "word_cosine")] == [0.0] * 4
    with pytest.raises(ValueError, match="followers=-1"):
        processor(pairs=[(mention, [entity | {"followers": -1}])])


def edits(a: str, b: str) -> int:
    """Returns the edit distance by plain recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def with_encoders(**fields):
    torch.manual_seed(0)
    model = ExtraTreesModel(ExtraTreesConfig(text_config=BERT, vision_config=RESNET, **fields)).eval()
    vision = {"size": {"height": 16, "width": 16}}
    return model, ExtraTreesProcessor.from_parts(make_tokenizer(), vision, max_length=20)


def test_cosines_of_the_encoders_equal_those_of_single_rows():
    model, processor = with_encoders()
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (9, 7, 3), dtype=np.uint8)) for _ in range(3)]
    mentions = [
        dict(row) | {"image": picture} for row, picture in zip(toy_mentions(2), [pictures[0], None], strict=True)
    ]
    entities = [dict(row) for row in toy_entities(4)]
    for row, images in zip(entities, ([pictures[1]], [], [pictures[2], pictures[0]], [pictures[0]]), strict=True):
        row["images"] = images
    pairs = [(mentions[0], entities[:3]), (mentions[1], [entities[3]])]
    features = model.pair_features(**processor(pairs=pairs))
    assert features.shape == (2, 3, len(FEATURES) + 2)

    def text(*parts):
        ids = processor.tokenizer(*parts, truncation=True, max_length=20)["input_ids"]
        return model.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).detach().numpy()

    def image(picture):
        return model.encode_images(processor.images([picture]))[0].numpy()

    def cosine(a, b):
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    for m, (mention, listed) in enumerate(pairs):
        for c, entity in enumerate(listed):
            facts = f"{entity['description']} {entity['attributes']}"
            words = cosine(text(mention["mention"], mention["text"]), text(entity["name"], facts))
            assert features[m, c, -2].item() == pytest.approx(words, abs=1e-5)
            seen = mention["image"] is not None and entity["images"]
            expected = cosine(image(mention["image"]), image(entity["images"][0])) if seen else 0.0
            assert features[m, c, -1].item() == pytest.approx(expected, abs=1e-5)
    assert not features[1, 1:].any()


def lists(mentions) -> CandidateLists:
    golds = [int(gold[1:]) - 1 for gold in mentions["entity_id"]]
    candidates = [[f"Q{1 + (gold + c) % 12}" for c in range(4)][::-1] for gold in golds]
    return CandidateLists(list(mentions["mention_id"]), candidates, {}, {"source": "made up"})


def make_trainer(tmp_path, model, mentions, **arguments) -> MelTrainer:
    options = {"num_train_epochs": 2, "num_negatives": 2, "disable_tqdm": True, "log_level": "error"} | arguments
    return MelTrainer(
        model,
        MelTrainingArguments(output_dir=str(tmp_path / "checkpoints"), **options),
        train_dataset=mentions,
        eval_dataset=mentions,
        entities=toy_entities(12),
        processing_class=plain_processor(),
        train_candidates=lists(mentions),
        eval_candidates=lists(mentions),
    )


def test_training_fits_once_on_all_pairs(tmp_path, monkeypatch):
    model, calls = ExtraTreesModel(ExtraTreesConfig(n_estimators=5)), []
    fit = ExtraTreesModel.fit
    monkeypatch.setattr(
        ExtraTreesModel,
        "fit",
        lambda self, x, y, seed: (calls.append((x.clone(), y.clone(), seed)), fit(self, x, y, seed)),
    )
    trainer = make_trainer(tmp_path, model, toy_mentions(16), seed=4)
    assert isinstance(model, Reranker)
    assert isinstance(model, FitsFeatures)
    result = trainer.train()
    ((features, labels, seed),) = calls
    assert seed == 4
    assert features.shape == (2 * 16 * 3, len(FEATURES))
    assert labels.sum() == 2 * 16
    # A mention of these data is the name of its gold.
    equal = features[:, FEATURES.index("name_is_equal")].bool()
    assert torch.equal(equal, labels)
    assert not torch.equal(features[:48], features[48:])  # the second epoch draws other negatives
    assert result.metrics["eval_hits@1"] == 1
    assert not any(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": 11}, 11),  # an epoch has 8 batches, and steps go on after one
        ({"max_minutes": 0.45, "num_train_epochs": 9}, 5),  # 27 seconds, of 6 each
        ({"max_minutes": 100, "num_train_epochs": 1}, 8),
    ],
)
def test_fitting_reads_no_more_than_the_budget_allows(tmp_path, monkeypatch, limits, batches):
    model, seconds, pairs = ExtraTreesModel(ExtraTreesConfig(n_estimators=2)), itertools.count(0, 6), []
    monkeypatch.setattr(base_trainer.time, "process_time", lambda: next(seconds))
    monkeypatch.setattr(ExtraTreesModel, "fit", lambda self, x, y, seed: pairs.append(len(x)))
    trainer = make_trainer(tmp_path, model, toy_mentions(16), per_device_train_batch_size=2, **limits)
    trainer.eval_dataset = None  # the forest is not fitted
    trainer.train()
    assert pairs == [batches * 2 * 3]
    assert trainer.state.epoch == batches / 8


def test_fitting_without_a_batch_is_refused(tmp_path):
    limits = {"max_steps": 3, "per_device_train_batch_size": 32, "dataloader_drop_last": True}
    trainer = make_trainer(tmp_path, ExtraTreesModel(ExtraTreesConfig()), toy_mentions(4), **limits)
    with pytest.raises(RecipeError, match="no batch"):
        trainer.train()


def test_fitting_without_scikit_learn_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    trainer = make_trainer(tmp_path, ExtraTreesModel(ExtraTreesConfig()), toy_mentions(4))
    with pytest.raises(MissingExtraError, match=r"hf_mel\[trees\]"):
        trainer.train()


def test_pairs_of_one_kind_are_refused(tmp_path, monkeypatch):
    model = ExtraTreesModel(ExtraTreesConfig())
    with pytest.raises(ValueError, match="another entity"):
        model.fit(torch.zeros(2, 3), torch.tensor([True, True]))
    monkeypatch.setattr(MelTrainingArguments, "world_size", 2)
    with pytest.raises(RecipeError, match="one process"):
        make_trainer(tmp_path, model, toy_mentions(4)).train()


def test_a_fitted_forest_refuses_other_features():
    model = ExtraTreesModel(ExtraTreesConfig(n_estimators=3))
    model.fit(*sample())
    with pytest.raises(ValueError, match="fitted on 5 features"):
        model(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"n_estimators": 0}, "n_estimators=0"), ({"max_depth": 0}, "max_depth=0"), ({"max_features": "x"}, "'sqrt'")],
    ids=str,
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ExtraTreesConfig(**fields)


def test_missing_inputs_are_refused():
    pairs = [(dict(toy_mentions(1)[0]), [dict(r) | {"list_score": -1.0} for r in toy_entities(2)])]
    plain = plain_processor()(pairs=pairs)
    model, processor = with_encoders()
    with pytest.raises(ValueError, match="use_text=True"):
        model(**plain)
    processor.use_images = False
    without_images = processor(pairs=pairs)
    with pytest.raises(ValueError, match="use_images=True"):
        model(**without_images)
    ranked = ExtraTreesModel(ExtraTreesConfig(list_scores=True))
    assert ranked.reads_list_scores
    assert ranked.pair_features(**plain)[0, :, -1].tolist() == [-1.0, -1.0]
    del plain["pair_list_score"]
    with pytest.raises(ValueError, match="score of the list"):
        ranked(**plain)
    with pytest.raises(ValueError, match="Give pairs="):
        processor(mentions=[])


def test_the_configuration_is_plain_json(tmp_path):
    model = ExtraTreesModel(ExtraTreesConfig(n_estimators=3))
    model.fit(*sample())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_nodes"] == model.config.num_nodes > 3
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".pkl", ".bin", ".joblib")] == []
    torch.testing.assert_close(
        ExtraTreesModel.from_pretrained(tmp_path).forest.state_dict(), model.forest.state_dict(), atol=0, rtol=0
    )

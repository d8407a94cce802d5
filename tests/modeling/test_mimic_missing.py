"""Tests of MIMIC with missing images and texts: what is absent has no share in a score."""

from __future__ import annotations

import pytest
import torch

from hf_mel.errors import ScoreError
from hf_mel.inference.entity_sources import EncodedEntities
from hf_mel.inference.ranking import rank, score_of_units
from hf_mel.modeling.mimic import MimicModel
from hf_mel.training.recipe import Recipe
from tests.modeling.test_mimic import CNN, batch_for, build

FORMS = {
    "whole": {"mask_padding": True},
    "without local half": {"text_local": False},
    "CNN": {"vision_config": CNN, "mask_padding": True},
}


def absent(**fields) -> MimicModel:
    return build(missing_images="absent", **fields)


def sides(model: MimicModel, mention_images, mention_texts, entity_images):
    """Encodings of mentions and entities with these masks."""
    batch = batch_for(model, mentions=len(mention_images), entities=len(entity_images))
    batch |= {"mention_image_mask": torch.tensor(mention_images), "mention_text_mask": torch.tensor(mention_texts)}
    batch |= {"entity_image_mask": torch.tensor(entity_images)}
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
    return mentions, entities


IMAGES, TEXTS = [True, False, True, False], [True, True, False, False]
ENTITY_IMAGES = [True, False, True, False, True]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_score_is_the_mean_of_the_units_that_the_mention_has(form):
    model = absent(**FORMS[form])
    mentions, entities = sides(model, IMAGES, TEXTS, ENTITY_IMAGES)
    text, vision, fused = (unit(mentions, entities) for unit in (model.tglu, model.vdlu, model.cmfu))
    expected = torch.stack([(text[0] + vision[0] + fused[0]) / 3, text[1], vision[2], torch.zeros(5)])
    torch.testing.assert_close(model.score(mentions, entities), expected)
    units = model.unit_scores(mentions, entities)
    lacking = {unit: scores.isnan().all(1).tolist() for unit, scores in units.items()}
    assert lacking == {
        "text": [False, False, True, True],
        "vision": [False, True, False, True],
        "cross_modal": [False, True, True, True],
    }
    assert all(scores.isnan().any(1).tolist() == lacking[unit] for unit, scores in units.items())


@torch.no_grad()
def test_an_image_of_an_entity_changes_no_score_of_a_mention_without_one():
    model = absent()
    batch = batch_for(model, mentions=2, entities=3)
    for name in ("entity_input_ids", "entity_attention_mask"):
        batch[name][1] = batch[name][0]  # twins, of which the second has no image
    masks = {"mention_image_mask": torch.tensor([True, False]), "mention_text_mask": torch.tensor([True, True])}
    scores = model(**batch, **masks, entity_image_mask=torch.tensor([True, False, True])).scores
    assert scores[1, 0] == pytest.approx(scores[1, 1].item(), rel=1e-6)
    assert scores[0, 0] != pytest.approx(scores[0, 1].item(), rel=1e-3)


@torch.no_grad()
def test_pixels_of_a_missing_image_change_nothing():
    model = absent()
    batch = batch_for(model, mentions=2, entities=3)
    masks = {
        "mention_image_mask": torch.tensor([True, False]),
        "mention_text_mask": torch.tensor([True, True]),
        "entity_image_mask": torch.tensor([True, False, True]),
    }
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["mention_pixel_values"][1] += 1
    other["entity_pixel_values"][1] += 1
    torch.testing.assert_close(model(**other, **masks).scores, model(**batch, **masks).scores)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_two_steps_rank_a_mixed_batch_as_the_plain_scores_do(form):
    model = absent(**FORMS[form])
    draw = torch.Generator().manual_seed(1)
    mention_images, mention_texts, entity_images = (
        (torch.rand(count, generator=draw) < 0.6).tolist() for count in (12, 12, 40)
    )
    mentions, entities = sides(model, mention_images, mention_texts, entity_images)
    ids = [str(k) for k in range(40)]
    golds = torch.randint(40, (12,), generator=draw)
    plain, pruned = (
        rank(
            model,
            dict(mentions),
            EncodedEntities(ids, dict(entities)),
            gold_rows=golds,
            top_k=5,
            prune=prune,
            byte_budget=20_000,
        )
        for prune in (False, True)
    )
    torch.testing.assert_close(plain.top_scores, pruned.top_scores)
    both = torch.stack([plain.best_rank, plain.worst_rank]), torch.stack([pruned.best_rank, pruned.worst_rank])
    assert torch.equal(*both)
    singles = torch.cat([model.score({k: v[i : i + 1] for k, v in mentions.items()}, entities) for i in range(12)])
    torch.testing.assert_close(singles, model.score(mentions, entities))


@torch.no_grad()
def test_first_stage_vectors_leave_out_what_the_mention_lacks():
    model = absent(units=["cross_modal", "text"], text_local=False)
    mentions, entities = sides(model, IMAGES, TEXTS, ENTITY_IMAGES)
    products = model.query_vectors(mentions) @ model.index_vectors(entities).T
    torch.testing.assert_close(products, model.score(mentions, entities))


@torch.no_grad()
def test_chosen_units_are_averaged_over_those_that_the_mention_has():
    model = absent()
    mentions, entities = sides(model, IMAGES, TEXTS, ENTITY_IMAGES)
    scores = score_of_units(model, ["text", "vision"])(mentions, entities)
    text, vision = model.tglu(mentions, entities), model.vdlu(mentions, entities)
    expected = torch.stack([(text[0] + vision[0]) / 2, text[1], vision[2], torch.zeros(5)])
    torch.testing.assert_close(scores, expected)


@torch.no_grad()
def test_broken_weights_are_an_error_and_no_missing_modality():
    model = absent()
    mentions, entities = sides(model, [True, False], [True, True], ENTITY_IMAGES)
    ids = [str(k) for k in range(5)]
    for unit, broken in (("text", "text_global"), ("vision", "vision_query")):
        with pytest.raises(ScoreError, match="is nan"):
            rank(
                model,
                dict(mentions) | {broken: torch.full_like(mentions[broken], torch.nan)},
                EncodedEntities(ids, dict(entities)),
                score=score_of_units(model, [unit]),
            )


def test_the_loss_of_a_unit_is_over_the_mentions_that_have_it():
    model = absent()
    batch, labels = batch_for(model, mentions=3, entities=3), torch.tensor([2, 0, 1])
    masks = {
        "mention_image_mask": torch.tensor([True, False, True]),
        "mention_text_mask": torch.tensor([True, True, True]),
        "entity_image_mask": torch.tensor([True, True, False]),
    }
    output = model(**batch, **masks, labels=labels)
    rows = [torch.arange(3), torch.arange(3), torch.tensor([0, 2]), torch.tensor([0, 2])]
    terms = [output.scores, *(output.unit_scores[unit] for unit in ("text", "vision", "cross_modal"))]
    expected = sum(
        -(term[row].log_softmax(1)[range(len(row)), labels[row]]).mean() for term, row in zip(terms, rows, strict=True)
    )
    torch.testing.assert_close(output.loss, expected)
    none = masks | {"mention_image_mask": torch.zeros(3, dtype=torch.bool)}
    loss = model(**batch, **none, labels=labels).loss
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_image_dropout_drops_images_in_training_only_and_teaches_the_learned_features():
    model = absent(image_dropout=0.5)
    batch = batch_for(model, mentions=2, entities=3)
    masks = {
        name: torch.ones(count, dtype=torch.bool)
        for name, count in (("mention_image_mask", 2), ("mention_text_mask", 2), ("entity_image_mask", 3))
    }
    first, second = (model(**batch, **masks).scores for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    model.train()
    entity_inputs = {name: tensor for name, tensor in (batch | masks).items() if name.startswith("entity")}
    missing = entity_inputs | {"entity_image_mask": torch.zeros(3, dtype=torch.bool)}
    replaced = model.encode_entities(**missing).vision_key
    drawn = [(model.encode_entities(**entity_inputs).vision_key == replaced).all(1) for _ in range(40)]
    assert 0.3 < torch.stack(drawn).float().mean().item() < 0.7
    model(**batch, **masks, labels=torch.tensor([0, 1])).loss.backward()
    assert model.missing_image.patch.grad.abs().sum() > 0
    assert model.missing_image.whole.grad.abs().sum() > 0


def test_save_and_load_keep_the_learned_features(tmp_path):
    model = absent()
    with torch.no_grad():
        model.missing_image.whole.copy_(torch.arange(12.0))
    model.save_pretrained(tmp_path)
    loaded = MimicModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.missing_image.whole, torch.arange(12.0))
    assert loaded.config.missing_images == "absent"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"missing_images": "ones"}, "missing_images"),
        ({"image_dropout": 0.1}, "missing_images='absent'"),
        ({"image_dropout": 1, "missing_images": "absent"}, "below 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        build(**fields)


def test_a_model_that_leaves_images_out_asks_for_the_masks():
    model = absent()
    with pytest.raises(ValueError, match="modality_masks=True"):
        model(**batch_for(model))


def test_the_published_form_has_no_new_weights_and_ignores_the_masks():
    model = build()
    assert not any("missing_image" in name for name in model.state_dict())
    batch = batch_for(model, mentions=2, entities=3)
    masks = {
        "mention_image_mask": torch.zeros(2, dtype=torch.bool),
        "entity_image_mask": torch.zeros(3, dtype=torch.bool),
    }
    torch.testing.assert_close(model(**batch, **masks).scores, model(**batch).scores)
    assert model.leaves_out_missing_images is False
    assert absent().leaves_out_missing_images is True


def test_recipes_of_the_paper_keep_the_published_form_and_ours_does_not():
    for name in ("mimic_wikimel", "mimic_wikidiverse", "mimic_richpediamel"):
        assert Recipe.load(name).model.config["missing_images"] == "zeros"
    assert Recipe.load("mimic_flags").model.config["missing_images"] == "absent"

"""Tests of MIMIC's model: factorised scores against the paper's equations, losses, variants and saving."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, CLIPModel, ViTConfig

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.inference.quantisation import dequantised, layout_of, quantised
from hf_mel.modeling.mimic import MimicConfig, MimicModel, dual_bounds_mimic, modeling_mimic, scoring_mimic
from hf_mel.protocols import (
    BoundsPairs,
    Retriever,
    TellsWhatToRead,
    bounds_by_products,
    bounds_scores,
    entity_token_masks,
)
from tests.modeling import direct_mimic, published_mimic

BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 20,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CNN = {
    "model_type": "convnext",
    "hidden_sizes": [8, 20],
    "depths": [1, 1],
    "num_stages": 2,
    "patch_size": 4,
    "image_size": 16,
}
DIMS = {"text_dim": 12, "vision_dim": 12, "fusion_dim": 16, "text_pooling": "cls"}


def build(seed=0, **fields) -> MimicModel:
    torch.manual_seed(seed)
    config = {"text_config": dict(BERT), "vision_config": dict(VIT)} | DIMS | fields
    model = MimicModel(MimicConfig(**config)).eval()
    with torch.no_grad():  # the initial ones and zeros of norms would hide a weight that is not applied
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch_for(model: MimicModel, **sizes) -> dict[str, torch.Tensor]:
    batch = published_mimic.inputs(**sizes)
    if model.config.vision_config is None:
        batch = {k: v for k, v in batch.items() if "pixel" not in k}
    if model.config.text_config is None:
        batch = {k: v for k, v in batch.items() if "pixel" in k}
    return batch


def features(model: MimicModel, batch: dict[str, torch.Tensor], side: str) -> list[dict]:
    """Returns the inputs of the units, one dict per item. `make golden` checks the encoders."""
    count = len(next(v for k, v in batch.items() if k.startswith(side)))
    text = image = None
    with torch.no_grad():
        if hasattr(model, "text_model"):
            text = model._text_features(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"])
        if hasattr(model, "vision_model"):
            image = model._image_features(batch[f"{side}_pixel_values"])
    norm = model.text_local_norm if hasattr(model, "text_local_norm") else torch.nn.Identity()
    rows = []
    for i in range(count):
        row = {}
        if text:
            mask = batch[f"{side}_attention_mask"][i]
            row["text"] = {"global": text[0][i], "local": norm(text[1][i]).detach(), "mask": mask}
        if image:
            row["image"] = {"global": None if image[0] is None else image[0][i], "local": image[1][i]}
        rows.append(row)
    return rows


VARIANTS = {
    "published": {},
    "mask_padding": {"mask_padding": True},
    "vector gate": {"gate": "vector"},
    "raw query (eq. 14 as printed)": {"query_norm": False},
    "cosine": {"global_norm": "l2"},
    "less of the local half": {"global_norm": "l2", "local_scale": 0.25},
    "global text only": {"text_local": False},
    "text unit": {"units": ["text"], "vision_config": None},
    "vision unit": {"units": ["vision"], "text_config": None},
    "fusion unit": {"units": ["cross_modal"]},
    "no fusion": {"units": ["text", "vision"]},
    "feature map": {"vision_config": dict(CNN)},
    "aligned": {"global_norm": "l2", "local_init": "aligned", "mask_padding": True, "text_pooling": "mean"},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_scores_equal_the_equations_of_the_paper(fields):
    model = build(**fields)
    batch = batch_for(model)
    with torch.no_grad():
        out = model(**batch)
    weights = {k: v.detach() for k, v in model.state_dict().items()}
    config = model.config
    expected = direct_mimic.all_scores(
        weights,
        features(model, batch, "mention"),
        features(model, batch, "entity"),
        config.units,
        direct_mimic.Switches(
            config.mask_padding,
            config.query_norm,
            config.text_local,
            config.local_scale if config.global_norm == "l2" else None,
        ),
    )
    assert set(out.unit_scores) == set(config.units)
    for unit in config.units:
        torch.testing.assert_close(out.unit_scores[unit], expected[unit], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.scores, expected["score"], atol=2e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_printed_equations():
    model = build(mask_padding=True).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_for(model).items()}
    model(**batch).scores.square().sum().backward()
    units = [n for n, _ in model.named_parameters() if n.split(".")[0] in ("tglu", "vdlu", "cmfu")]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if n in units}

    weights = {n: p.detach().clone().requires_grad_(n in units) for n, p in model.named_parameters()}
    rows = [features(model, batch, side) for side in ("mention", "entity")]
    switches = direct_mimic.Switches(mask_padding=True)
    direct_mimic.all_scores(weights, *rows, model.config.units, switches)["score"].square().sum().backward()
    for name in units:
        torch.testing.assert_close(gradients[name], weights[name].grad, atol=1e-8, rtol=1e-6, msg=name)


def test_blocks_do_not_change_scores(monkeypatch):
    model = build(mask_padding=True)
    batch = batch_for(model, mentions=11, entities=9)
    with torch.no_grad():
        expected = model(**batch).scores
        for elements, mentions in ((1, 8), (150, 1), (900, 3), (5000, 8)):
            monkeypatch.setattr(scoring_mimic, "_BLOCK_ELEMENTS", {"cpu": elements})
            monkeypatch.setattr(scoring_mimic, "_BLOCK_MENTIONS", mentions)
            torch.testing.assert_close(model(**batch).scores, expected)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("without", ["query", "fused"])
def test_inner_products_of_first_stage_vectors_equal_the_score(name, without):
    """This holds if no unit lets mention and entity interact."""
    model = build(**VARIANTS[name])
    batch = batch_for(model, mentions=4, entities=6)
    with torch.no_grad():
        if hasattr(model, "tglu") and model.config.text_local:
            model.tglu.fc_key.weight.zero_()  # uniform attention
        if hasattr(model, "vdlu") and without == "fused":  # the fused image of eq. 12 is then a constant
            model.vdlu.entity_to_mention.fc.weight.zero_()
            model.vdlu.mention_to_entity.fc.weight.zero_()
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        if hasattr(model, "vdlu") and without == "query":
            mentions["vision_query"].zero_()
            entities["vision_query"].zero_()
        products = model.query_vectors(mentions) @ model.index_vectors(entities).T
        torch.testing.assert_close(products, model.score(mentions, entities), atol=1e-5, rtol=1e-5)
        halves = {k: v.half() if v.is_floating_point() else v for k, v in entities.items()}
        assert model.index_vectors(halves).dtype == model.query_vectors(mentions).dtype == torch.float32


@pytest.mark.parametrize("masked", [False, True])
def test_extreme_texts_get_the_scores_of_float64(masked):
    """Covers keys whose powers overflow, and texts without tokens."""
    model = build(mask_padding=masked, units=["text"], vision_config=None)
    batch = batch_for(model, mentions=6, entities=7)
    if masked:
        batch["mention_attention_mask"][2] = batch["entity_attention_mask"][3] = 0
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        mentions.text_keys[1] *= 3000
        scores = model.score(mentions, entities)
        exact = model.double().score(
            *(
                {k: v.double() if v.is_floating_point() else v for k, v in side.items()}
                for side in (mentions, entities)
            )
        )
        logits = entities["text_queries"].double() @ mentions["text_keys"][1].double().T
    assert logits.max() > 12**0.5 * np.log(np.finfo(np.float32).max)
    torch.testing.assert_close(scores, exact.float(), atol=1e-4, rtol=1e-4)


def texts(model, count, side, generator, spread=1.0, aligned=0.0):
    """Returns encodings like those of a trained model: token vectors near one direction, in texts of many lengths."""
    dim, length = model.config.text_dim, 7
    common = torch.randn(dim, generator=generator)
    tokens = {
        name: aligned * common + spread * torch.randn(count, length, dim, generator=generator) for name in ("a", "b")
    }
    encodings = {"text_global": torch.nn.functional.normalize(torch.randn(count, 24, generator=generator), dim=-1)}
    if side == "mention":
        encodings |= {"text_keys": tokens["a"], "text_values": tokens["b"]}
    else:
        query = torch.randn(count, dim, generator=generator)
        encodings |= {"text_query_global": query, "text_queries": tokens["a"]}
    if model.config.mask_padding:
        encodings["text_mask"] = torch.rand(count, length, generator=generator) < torch.rand(
            count, 1, generator=generator
        )
    return encodings


TEXTS = {"random": (1.0, 0.0), "narrow": (0.1, 1.0), "one direction": (1e-4, 1.0), "sharp": (8.0, 2.0)}


@pytest.mark.parametrize("fields", [{}, {"mask_padding": True}, {"mask_padding": True, "global_norm": "l2"}], ids=str)
@pytest.mark.parametrize("shape", TEXTS)
def test_the_second_step_scores_all_pairs_that_reach_the_floor(fields, shape, monkeypatch):
    model = build(units=["text"], vision_config=None, **fields)
    generator = torch.Generator().manual_seed(1)
    spread, aligned = TEXTS[shape]
    mentions = texts(model, 9, "mention", generator, spread, aligned)
    entities = texts(model, 200, "entity", generator, spread, aligned)
    entities["text_query_global"][:9] = mentions["text_values"].mean(1) * 5  # scores near the upper bounds
    with torch.no_grad():
        scores = model.score(mentions, entities)
        quick = model.quick_scores(mentions, entities)
    rest = scores - quick
    torch.testing.assert_close(model.remaining_scores(mentions, entities, torch.full_like(rest, -torch.inf)), rest)
    monkeypatch.setattr(scoring_mimic, "_DENSE", 1.0)
    shares = []
    for quantile in (0.5, 0.9, 0.99):
        floor = rest.quantile(quantile, dim=1, keepdim=True).expand_as(rest)
        scores = model.remaining_scores(mentions, entities, floor)
        scored = scores > -torch.inf
        torch.testing.assert_close(scores[scored], rest[scored], atol=2e-5, rtol=2e-5)
        assert (rest[~scored] < floor[~scored]).all()
        shares.append(scored.float().mean().item())
    assert shares[2] < 1
    over = model.remaining_scores(mentions, entities, (rest.amax(1, keepdim=True) + 0.01).expand_as(rest))
    if shape == "one direction":  # only the second bound excludes all pairs
        assert (over == -torch.inf).any(1).all()
        assert (over == -torch.inf).all(1).any()
    if shape in ("narrow", "one direction"):  # the second bound excludes pairs
        assert shares[2] < 0.2
    halves = {k: v.half() if v.is_floating_point() else v for k, v in entities.items()}
    with torch.no_grad():
        expected = model.score(mentions, halves) - model.quick_scores(mentions, halves)
    scores = model.remaining_scores(mentions, halves, expected)  # the floor is the score itself
    torch.testing.assert_close(scores, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fields", [{}, {"mask_padding": True}], ids=str)
@pytest.mark.parametrize("shape", TEXTS)
@pytest.mark.parametrize("dense", [0.0, 0.4, 1.0])
def test_pairs_that_cannot_reach_the_floor_are_told_without_the_tokens(fields, shape, dense, monkeypatch):
    monkeypatch.setattr(scoring_mimic, "_DENSE", dense)
    model = build(units=["text"], vision_config=None, **fields)
    mentions, entities = texts_near_the_bound(model, shape)
    read = {name: entities[name] for name in model.pair_bound_encodings}
    rest = model.score(mentions, entities).detach() - model.quick_scores(mentions, read)
    left_out = []
    for quantile in (0.0, 0.5, 0.99, 1.0):
        floor = rest.quantile(quantile, dim=1, keepdim=True).expand_as(rest)
        may_reach = model.may_reach(mentions, read, floor)
        assert may_reach[rest >= floor + 1e-4].all()
        left_out.append((~may_reach).float().mean().item())
        scores = model.remaining_scores(mentions, entities, floor)
        again = model.remaining_scores(mentions, entities, floor.masked_fill(~may_reach, torch.inf))
        assert torch.equal(scores[may_reach], again[may_reach])  # the same to the last bit
        tokens = torch.where(may_reach.any(0)[:, None, None], entities["text_queries"], 0)
        unread = model.remaining_scores(mentions, {**entities, "text_queries": tokens}, floor)
        assert torch.equal(scores[may_reach], unread[may_reach])
    assert isinstance(model, TellsWhatToRead)
    assert left_out == sorted(left_out)
    if dense == 1.0 and shape in ("narrow", "one direction"):
        assert left_out[2] > 0.8
    everything = torch.full_like(rest, torch.inf)
    assert not model.may_reach(mentions, read, everything).any()
    assert model.may_reach(mentions, read, -everything).all()


def test_a_mention_without_text_needs_no_tokens():
    model = build(missing_images="absent", mask_padding=True)
    batch = batch_for(model, mentions=4, entities=7)
    batch |= {"mention_image_mask": torch.arange(4) != 1, "entity_image_mask": torch.arange(7) != 2}
    batch |= {"mention_text_mask": torch.arange(4) != 3}
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
    read = {name: entities[name] for name in model.pair_bound_encodings}
    floor = torch.full((4, 7), 1e-6)
    may_reach = model.may_reach(mentions, read, floor)
    assert not may_reach[3].any()
    assert may_reach[:3].any()
    assert model.may_reach(mentions, read, -floor)[3].all()
    assert (model.remaining_scores(mentions, entities, floor)[3] == 0).all()


def bounds(model, mentions, entities):
    """Upper bounds [M, N] of the scores, in float64."""
    vectors, weights, constants = (part.double() for part in model.bound_queries(mentions))
    coordinates, extras = (part.double() for part in model.bound_vectors(entities))
    return vectors @ coordinates.T + weights @ extras.T + constants[:, None]


@pytest.mark.parametrize(
    "fields",
    [
        {"units": ["text"], "vision_config": None},
        {"units": ["text"], "vision_config": None, "mask_padding": True, "global_norm": "l2", "nil_score": True},
        {"units": ["text"], "vision_config": None, "text_local": False},
        {"units": ["cross_modal"]},
        {"units": ["text", "cross_modal"], "unit_weights": [3, 1]},
        {},
        {"units": ["vision"], "text_config": None, "query_norm": False},
        {
            "units": ["text", "cross_modal"],
            "unit_weights": [3, 1],
            "loss_unit_weights": [1, 9],
            "text_local": False,
            "mask_padding": True,
            "nil_score": True,
        },
    ],
    ids=str,
)
def test_no_score_is_above_its_bound(fields):
    model = build(**fields)
    assert bounds_scores(model)
    batch = batch_for(model, mentions=5, entities=9)
    if model.config.nil_score:
        model.nil.vector.data.normal_()
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        scores = model.score(mentions, entities).double()
        highest = bounds(model, mentions, entities)
    rounding = 1e-5 * scores.abs().max()
    assert (highest >= scores - rounding).all()
    # Without the local half and images, the score is an inner product.
    if "vision" not in model.config.units and ("text" not in model.config.units or not model.config.text_local):
        torch.testing.assert_close(highest, scores, atol=float(10 * rounding), rtol=1e-4)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in entities.items()}
    assert {part.dtype for part in model.bound_vectors(halves)} == {torch.float32}


def texts_near_the_bound(model, shape):
    """Returns encodings of 9 mentions and 200 entities; the first entities are along what their mention multiplies them by."""
    generator = torch.Generator().manual_seed(1)
    mentions = texts(model, 9, "mention", generator, *TEXTS[shape])
    entities = texts(model, 200, "entity", generator, *TEXTS[shape])
    context = model.tglu.layer_norm(mentions["text_values"].mean(1)) - model.tglu.layer_norm.bias
    entities["text_query_global"][:9] = context / model.tglu.layer_norm.weight**2 * 5
    return mentions, entities


@pytest.mark.parametrize("shape", TEXTS)
def test_scores_reach_the_bound_of_the_local_half_but_never_exceed_it(shape):
    model = build(units=["text"], vision_config=None)
    mentions, entities = texts_near_the_bound(model, shape)
    with torch.no_grad():
        scores, highest = model.score(mentions, entities).double(), bounds(model, mentions, entities)
    assert (scores <= highest + 1e-5 * highest.abs()).all()
    if shape == "one direction":
        gaps = (highest - scores).diagonal() / highest.diagonal().abs()
        assert gaps.min() < 0.01


LOCAL = [
    "published",
    "mask_padding",
    "raw query (eq. 14 as printed)",
    "less of the local half",
    "text unit",
    "no fusion",
]


@pytest.mark.parametrize("fields", [VARIANTS[name] for name in LOCAL], ids=LOCAL)
@pytest.mark.parametrize("more", [{}, {"nil_score": True, "missing_images": "absent"}], ids=["plain", "absent"])
def test_bounds_of_pairs_hold_for_every_unit_without_the_tokens(fields, more):
    if more and "vision_config" in fields:
        more = {"nil_score": True}
    model = build(**fields, **more)
    batch = batch_for(model, mentions=5, entities=9)
    if model.config.missing_images == "absent":
        batch |= {"mention_image_mask": torch.arange(5) != 1, "entity_image_mask": torch.arange(9) != 2}
        batch |= {"mention_text_mask": torch.arange(5) != 3}
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        scores = model.score(mentions, entities)
        read = {name: entities[name] for name in model.pair_bound_encodings}
        assert not {"text_queries", "text_mask"} & set(read)
        highest = model.pair_bounds(mentions, read)
    assert isinstance(model, BoundsPairs)
    assert (highest >= scores - 1e-5 * highest.abs().max()).all()
    for m in range(5):
        one = {name: tensor[m : m + 1] for name, tensor in mentions.items()}
        torch.testing.assert_close(model.pair_bounds(one, read)[0], highest[m], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", TEXTS)
@pytest.mark.parametrize("fields", [{}, {"mask_padding": True}], ids=str)
def test_bounds_of_pairs_are_reached_but_never_exceeded(shape, fields):
    model = build(units=["text"], vision_config=None, **fields)
    mentions, entities = texts_near_the_bound(model, shape)
    with torch.no_grad():
        scores, highest = model.score(mentions, entities), model.pair_bounds(mentions, entities)
        loose = bounds(model, mentions, entities)
    rounding = 1e-5 * highest.abs().max()
    assert (highest >= scores - rounding).all()
    assert (highest.double() <= loose + rounding).all()  # no looser than that of the codes
    if shape == "one direction":
        # An entity whose tokens are all masked scores less.
        assert (highest - scores).diagonal().median() < 0.01 * highest.abs().max()
        # The bound is zero for about half of the pairs, those whose local score is below zero.
        assert (highest - scores).quantile(0.3) < 0.01 * (loose - scores).median()


def test_bounds_of_pairs_hold_where_the_nil_score_leaves_nothing_but_rounding():
    model = build(units=["text"], vision_config=None, nil_score=True)
    generator = torch.Generator().manual_seed(0)
    mentions, entities = texts_near_the_bound(model, "narrow")
    mentions["text_global"] = torch.randn(mentions["text_global"].shape, generator=generator)
    # Equal entities whose local half and its bound are 0, so that all that is left of bound and score is rounding.
    entities["text_query_global"] = torch.zeros_like(entities["text_query_global"])
    entities["text_global"] = 1e3 * torch.randn(entities["text_global"][:1].shape, generator=generator).expand_as(
        entities["text_global"]
    )
    with torch.no_grad():
        model.nil.vector.copy_(
            torch.cat([entities["text_global"][0], torch.zeros_like(entities["text_query_global"][0])])
        )
        scores = model.score(mentions, entities)
        assert scores.abs().max() < 1e-3 * (mentions["text_global"] @ entities["text_global"].T).abs().max()
        entity = {name: tensor[:1] for name, tensor in entities.items()}
        for m in range(len(scores)):
            mention = {name: tensor[m : m + 1] for name, tensor in mentions.items()}
            assert model.pair_bounds(mention, entity) >= scores[m].max()


def test_bounds_of_pairs_are_of_no_use_without_tokens():
    assert build(text_local=False).pair_bound_encodings == []
    assert build(units=["cross_modal"]).pair_bound_encodings == []


def encoded_images(model, generator, scale=1.0):
    """Returns encodings of 6 mentions and 40 entities with images, whose vectors have `scale`, some of them along one another."""
    dim = model.config.vision_dim
    names = ("vision_query", "vision_pooled", "vision_key")
    mentions, entities = (
        {name: scale * torch.randn(count, dim, generator=generator) for name in names} for count in (6, 40)
    )
    for row in range(6):  # what eq. 14 multiplies is nearly the same on both sides
        entities["vision_key"][row] = mentions["vision_query"][row] * 3
        entities["vision_query"][row + 6] = mentions["vision_key"][row] * 3
    entities["vision_key"][12:14] = entities["vision_pooled"][12:14] = 0
    entities["vision_query"][14:16] = 1.0  # centred, it is zero
    return mentions, entities


def images_only(query_norm, generator):
    """Returns a model of the vision unit alone, whose LayerNorms and gates are far from their initial values."""
    model = build(units=["vision"], text_config=None, query_norm=query_norm)
    with torch.no_grad():
        for parameter in model.vdlu.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


@pytest.mark.parametrize("query_norm", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.05, 1.0])
@pytest.mark.parametrize("unknown", ["all", "the first"])
def test_no_score_of_images_is_above_the_bound_that_its_products_give(query_norm, scale, radius, unknown):
    """The first product of "patches" and "asking" is in 1/σ₁ alone, so that u and the gate move and nothing else does."""
    generator = torch.Generator().manual_seed(0)
    model = images_only(query_norm, generator)
    mentions, entities = encoded_images(model, generator, scale)
    assert bounds_by_products(model)
    with torch.no_grad():
        doubles = [{name: tensor.double() for name, tensor in side.items()} for side in (mentions, entities)]
        exact = copy.deepcopy(model).double().vdlu(*doubles)
        caps = bounds(model, mentions, entities)
        queries, states = model.product_queries(mentions)
        vectors, numbers = model.product_vectors(entities)
        for m, state in enumerate(states):
            products = {}
            for name, of_entities in vectors.items():
                true = queries[name][m] @ of_entities.T
                radii = radius * queries[name][m].norm(dim=1, keepdim=True) * of_entities.norm(dim=1)
                if unknown == "the first":
                    radii[(0 if name == "key" else 1) :] = 0
                # The known product is anywhere within the radius, its ends included.
                moves = (2 * torch.rand(true.shape, generator=generator) - 1).mul(3).clamp(-1, 1)
                products[name] = true + radii * moves, radii * (1 + 1e-6)
            closer = model.product_bounds(state, products, numbers.T)
            assert (closer <= 0).all()
            highest = caps[m] + closer
            size = caps[m].abs().max()
            assert (highest >= exact[m] - 1e-6 * size).all()
            if not radius and scale == 1.0:  # the products give the score
                torch.testing.assert_close(highest, exact[m], atol=float(1e-3 * size), rtol=0)


@pytest.mark.parametrize("factor", [1, 1e3, 1e4])
def test_a_gate_whose_parts_cancel_is_in_the_bound(factor):
    """The argument of the gate is a difference of large numbers, so that its rounding is as large as it is."""
    generator = torch.Generator().manual_seed(0)
    model = images_only(True, generator)
    mentions, entities = encoded_images(model, generator)
    dual_gate = model.vdlu.mention_to_entity
    with torch.no_grad():
        for part in (dual_gate.fc_gate, dual_gate.fc, dual_gate.add_layer_norm):
            part.bias.zero_()
        dual_gate.fc_gate.weight.mul_(factor)
        direction = dual_bounds_mimic.Gate(dual_gate).gate
        direction = direction - direction.mean()
        sums = (mentions["vision_query"][0] + entities["vision_pooled"]) @ direction
        entities["vision_pooled"] -= sums[:, None] * direction / direction.square().sum()
        entities["vision_key"] *= 0.01
        doubles = [{name: tensor.double() for name, tensor in side.items()} for side in (mentions, entities)]
        exact = copy.deepcopy(model).double().vdlu(*doubles)[0]
        caps = bounds(model, mentions, entities)[0]
        queries, states = model.product_queries(mentions)
        vectors, numbers = model.product_vectors(entities)
        for radius in (0, 1e-3):
            products = {}
            for name, of_entities in vectors.items():
                true = queries[name][0] @ of_entities.T
                sizes = queries[name][0].norm(dim=1, keepdim=True) * of_entities.norm(dim=1)
                products[name] = true, sizes * radius
            highest = caps + model.product_bounds(states[0], products, numbers.T)
            assert (highest >= exact - 1e-6 * caps.abs().max()).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_no_score_of_images_is_above_its_cap_where_the_sides_cancel(scale):
    """Of y in eq. 13 nothing but rounding is left, which the second LayerNorm enlarges."""
    generator = torch.Generator().manual_seed(0)
    model = images_only(True, generator)
    mentions, entities = encoded_images(model, generator, scale)
    with torch.no_grad():
        for part in (model.vdlu.mention_to_entity.fc, model.vdlu.mention_to_entity.add_layer_norm):
            part.bias.zero_()
        entities["vision_key"].zero_()
        noise = torch.randn(entities["vision_pooled"].shape, generator=generator)
        entities["vision_pooled"] = -mentions["vision_query"][:1] + 1e-4 * scale * noise
        scores, highest = model.score(mentions, entities).double(), bounds(model, mentions, entities)
    assert (scores <= highest + 1e-6 * highest.abs().max()).all()


def test_the_bound_by_the_span_holds_for_a_small_difference_of_large_values():
    generator = torch.Generator().manual_seed(0)
    model = build(units=["text"], vision_config=None)
    mentions = texts(model, 3, "mention", generator)
    entities = texts(model, 50, "entity", generator)
    large = 1e7 * torch.randn(3, model.config.text_dim, generator=generator)
    small = 10 * torch.randn(3, model.config.text_dim, generator=generator)
    mentions["text_values"] = torch.stack([large, -large + small], 1)
    mentions["text_keys"] = mentions["text_keys"][:, :2]
    mentions["text_keys"] = mentions["text_keys"] * 0  # uniform attention
    sides = [{name: tensor.double() for name, tensor in side.items()} for side in (mentions, entities)]
    with torch.no_grad():
        context = mentions["text_values"].mean(1) - mentions["text_values"].mean((1, 2), keepdim=True)[:, 0]
        entities["text_query_global"][:3] = context / context.norm(dim=1, keepdim=True)
        sides[1]["text_query_global"] = entities["text_query_global"].double()
        exact = copy.deepcopy(model).double().score(*sides)
        highest = model.pair_bounds(mentions, {name: entities[name] for name in model.pair_bound_encodings})
    assert (highest.double() >= exact - 1e-6 * exact.abs().max()).all()


def test_the_bound_by_products_closes_in_as_the_radius_falls():
    generator = torch.Generator().manual_seed(0)
    model = images_only(True, generator)
    mentions, entities = encoded_images(model, generator)
    queries, states = model.product_queries(mentions)
    vectors, numbers = model.product_vectors(entities)
    gaps = []
    for radius in (1.0, 0.1, 0.01, 0.001):
        products = {}
        for name, of_entities in vectors.items():
            true = queries[name][0] @ of_entities.T
            products[name] = true, radius * queries[name][0].norm(dim=1, keepdim=True) * of_entities.norm(dim=1)
        gaps.append(float(model.product_bounds(states[0], products, numbers.T).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[3] < gaps[0] - 1


def test_a_model_without_the_vision_unit_has_no_products():
    assert not bounds_by_products(build(units=["text", "cross_modal"]))
    assert bounds_by_products(build())


@pytest.mark.parametrize("name", ["published", "vision unit", "fusion unit", "global text only", "aligned"])
@pytest.mark.parametrize("pairs", [2**16, 12])
def test_the_two_steps_sum_to_the_score(name, pairs, monkeypatch):
    monkeypatch.setattr(modeling_mimic, "_BLOCK_PAIRS", pairs)
    model = build(**VARIANTS[name])
    batch = batch_for(model, mentions=4, entities=7)
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        quick = model.quick_scores(mentions, entities)
        rest = model.remaining_scores(mentions, entities, torch.full_like(quick, -torch.inf))
        torch.testing.assert_close(quick + rest, model.score(mentions, entities), atol=1e-5, rtol=1e-5)
        none = model.remaining_scores(mentions, entities, torch.full_like(quick, torch.inf))
    assert (none == (-torch.inf if name in ("published", "aligned") else 0)).all()


def test_batches_chunks_and_order_do_not_change_scores():
    """Scores are the same one by one and in chunks, and permuted entities get permuted columns."""
    model = build()
    batch = batch_for(model, mentions=5, entities=8)
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        scores = model.score(mentions, entities)
        singles = [
            model.encode_entities(**{k: v[i : i + 1] for k, v in batch.items() if k.startswith("entity")})
            for i in range(8)
        ]
        one_by_one = torch.cat([model.score(mentions, single) for single in singles], 1)
        order = torch.randperm(8)
        permuted = model.score(mentions, {k: v[order] for k, v in entities.items()})
        chunked = torch.cat(
            [model.score(mentions, {k: v[i : i + 3] for k, v in entities.items()}) for i in (0, 3, 6)], 1
        )
    torch.testing.assert_close(one_by_one, scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted, scores[:, order])
    torch.testing.assert_close(chunked, scores)
    assert all(len(v) == 8 for v in entities.values())
    assert all(len(v) == 5 for v in mentions.values())


def test_padding_changes_scores_only_in_the_published_form_without_masks():
    for masked in (True, False):
        model = build(mask_padding=masked, units=["text"], vision_config=None)
        batch = batch_for(model)
        longer = {k: torch.nn.functional.pad(v, (0, 6)) for k, v in batch.items()}
        with torch.no_grad():
            difference = (model(**batch).scores - model(**longer).scores).abs().max()
            encoded = model.encode_mentions(**{k: v for k, v in longer.items() if k.startswith("mention")})
        assert (difference < 1e-5) == masked
        assert encoded.text_keys.shape[1] == longer["mention_input_ids"].shape[1]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=6, max_size=6), pruned=st.booleans())
def test_scores_do_not_read_the_padding_that_few_bits_leave_out(dtype, lengths, pruned):
    model = build(mask_padding=True)
    batch = batch_for(model, entities=6)
    width = batch["entity_input_ids"].shape[1]
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = dict(model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")}))
        entities["text_mask"] = torch.arange(width) < torch.tensor(lengths)[:, None]
        masks = entity_token_masks(model)
        assert masks == {"text_queries": "text_mask"}
        scores = []
        for given_masks in ({}, masks):
            layout = layout_of(entities, dtype, given_masks)
            stored = quantised(entities, layout)
            assert len(stored["text_queries"]) == (sum(min(n, width) for n in lengths) if given_masks else 6)
            restored = dequantised(stored, layout)
            if pruned:
                quick = model.quick_scores(mentions, restored)
                scores.append(quick + model.remaining_scores(mentions, restored, quick.mean().expand_as(quick)))
            else:
                scores.append(model.score(mentions, restored))
    assert torch.equal(*scores)


def test_padding_counts_without_a_mask():
    """The published network reads padding, so that none may be left out."""
    assert entity_token_masks(build()) == {}
    assert entity_token_masks(build(mask_padding=True, text_local=False)) == {}
    assert entity_token_masks(build(mask_padding=True, units=["vision"])) == {}


def test_encodings_contain_projections_but_no_token_states():
    model = build()
    batch = batch_for(model)
    encoded = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
    widths = {name: tensor.shape[-1] for name, tensor in encoded.items()}
    assert widths["text_queries"] == model.config.text_dim
    assert [name for name, tensor in encoded.items() if tensor.dim() == 3] == ["text_queries"]


@pytest.mark.parametrize("unit_losses", [None, ["text"], []], ids=str)
def test_the_loss_equals_equation_22(unit_losses):
    model = build(unit_losses=unit_losses, temperature=0.5)
    batch = batch_for(model, mentions=5, entities=4)
    labels = torch.tensor([2, 0, 2, 3, 1])  # mentions 0 and 2 share a gold, which is a negative for neither
    out = model(**batch, labels=labels)
    terms = [out.scores] + [out.unit_scores[u] for u in (model.config.units if unit_losses is None else unit_losses)]
    expected = 0.0
    for term in terms:
        scores = term.detach().double().numpy() / 0.5
        for row, gold in enumerate(labels.tolist()):
            expected += -(scores[row, gold] - np.log(np.exp(scores[row]).sum())) / len(labels)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("nil", [False, True])
def test_priors_are_added_inside_the_losses_alone(nil):
    model = build(nil_score=nil, temperature=0.5)
    batch = batch_for(model, mentions=3, entities=4)
    labels, prior = [2, 0, 3], [0.5, -1.0, 2.0, 0.0]
    out = model(**batch, labels=torch.tensor(labels), entity_log_prior=torch.tensor(prior))
    torch.testing.assert_close(out.scores, model(**batch).scores)
    expected = 0.0
    for number, term in enumerate([out.scores, *out.unit_scores.values()]):
        for scores, gold in zip(term.tolist(), labels, strict=True):
            logits = [score / 0.5 + added for score, added in zip(scores, prior, strict=True)]
            rivals = [*logits, 0.0] if nil and number == 0 else logits  # NIL has no prior
            expected += (np.log(np.exp(rivals).sum()) - logits[gold]) / 3
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("absent", [False, True])
@torch.no_grad()
def test_weights_of_the_units_weigh_the_mean_of_the_units_that_a_mention_has(absent):
    options = {"missing_images": "absent"} if absent else {}
    model = build(unit_weights=[0.5, 2, 1.5], mask_padding=True, **options)
    batch = batch_for(model, mentions=3, entities=4)
    if absent:
        batch["mention_image_mask"] = torch.tensor([True, False, True])
        batch["mention_text_mask"] = torch.tensor([True, True, False])
        batch["entity_image_mask"] = torch.tensor([True, False, True, True])
    mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
    entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
    text, vision, fused = (
        model._all_unit_scores(mentions, entities)[unit] for unit in ("text", "vision", "cross_modal")
    )
    expected = (0.5 * text + 2 * vision + 1.5 * fused) / 4
    if absent:
        expected[1], expected[2] = text[1], vision[2]
    for scores in (model.score(mentions, entities), model(**batch).scores):
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    quick = model.quick_scores(mentions, entities)
    rest = model.remaining_scores(mentions, entities, torch.full_like(quick, -torch.inf))
    torch.testing.assert_close(quick + rest, expected, atol=1e-4, rtol=1e-4)
    # The first stage weighs them, too: with one weight near all, its vectors are those of that unit.
    alone = build(unit_weights=[1e-9, 1e-9, 1], mask_padding=True, **options)
    products = alone.query_vectors(mentions) @ alone.index_vectors(entities).T
    torch.testing.assert_close(products[0], fused[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_weights_of_the_loss_leave_the_order_to_the_other_weights():
    options = {"mask_padding": True, "nil_score": True}
    linking, learning = [0.5, 2, 1.5], [3, 1, 0.5]
    both = build(unit_weights=linking, loss_unit_weights=learning, **options)
    alone = {name: build(unit_weights=weights, **options) for name, weights in (("l", linking), ("t", learning))}
    for model in alone.values():
        model.load_state_dict(both.state_dict())
    batch = batch_for(both, mentions=3, entities=4) | {"labels": torch.tensor([1, -1, 0])}
    outputs = {name: model(**batch) for name, model in alone.items()}
    torch.testing.assert_close(both(**batch).loss, outputs["t"].loss)
    assert not torch.isclose(outputs["l"].loss, outputs["t"].loss)
    # NIL is read as in training, so that scores have one more summand for each mention than without weights of the loss.
    units = outputs["l"].unit_scores
    means = {
        name: sum(weight * units[unit] for weight, unit in zip(weights, units, strict=True)) / sum(weights)
        for name, weights in (("l", linking), ("t", learning))
    }
    expected = means["l"] - (means["t"] - outputs["t"].scores)
    torch.testing.assert_close(both(**batch).scores, expected, atol=1e-4, rtol=1e-4)


def test_cosines_beside_other_units_are_warned_of(caplog):
    fields = {"text_config": dict(BERT), "vision_config": dict(VIT), "global_norm": "l2"}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        MimicConfig(**fields)
        assert caplog.text.count("count for little in the mean") == 1
        MimicConfig(**fields, unit_weights=[9, 1, 1])
        MimicConfig(**fields, units=["text"])
        assert caplog.text.count("count for little in the mean") == 1
    finally:
        logger.removeHandler(caplog.handler)


NIL_FORMS = {
    "published": {},
    "text unit": {"units": ["text"], "vision_config": None},
    "global text only": {"text_local": False, "mask_padding": True},
    "units in another order": {"units": ["cross_modal", "vision"], "mask_padding": True},
    "missing images": {"missing_images": "absent", "mask_padding": True},
}


def nil_inputs(fields, **sizes):
    """A model with a NIL score, its inputs, the encodings of both sides, and the NIL score by hand."""
    model = build(nil_score=True, temperature=2.0, **fields)
    model.nil.vector.data.mul_(10)
    batch = batch_for(model, **sizes)
    if model.config.missing_images == "absent":
        batch["mention_image_mask"] = torch.arange(sizes["mentions"]) % 2 == 0
        batch["mention_text_mask"] = torch.ones(sizes["mentions"], dtype=torch.bool)
        batch["entity_image_mask"] = torch.ones(sizes["entities"], dtype=torch.bool)
    mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
    entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
    vectors = model.query_vectors(mentions).tolist()
    learned, bias = model.nil.vector.tolist(), model.nil.bias.item()
    nil = [bias + sum(x * y for x, y in zip(vector, learned, strict=True)) for vector in vectors]
    return model, batch, mentions, entities, torch.tensor(nil)[:, None]


@pytest.mark.parametrize("fields", NIL_FORMS.values(), ids=NIL_FORMS.keys())
@torch.no_grad()
def test_scores_are_above_the_nil_score_of_the_mention(fields):
    model, batch, mentions, entities, nil = nil_inputs(fields, mentions=4, entities=6)
    units = torch.stack(list(model.unit_scores(mentions, entities).values()))
    expected = units.nanmean(0) - nil
    assert nil.std() > 0.1
    for scores in (model.score(mentions, entities), model(**batch).scores):
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    quick = model.quick_scores(mentions, entities)
    rest = model.remaining_scores(mentions, entities, torch.full_like(quick, -torch.inf))
    torch.testing.assert_close(quick + rest, expected, atol=1e-4, rtol=1e-4)
    # One NIL score for all entities of a mention: the order is that of a model without it.
    without = build(temperature=2.0, **fields)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("nil.")})
    plain = without.score(mentions, entities)
    assert torch.equal(plain.argsort(1), model.score(mentions, entities).argsort(1))
    torch.testing.assert_close(without.query_vectors(mentions), model.query_vectors(mentions))


@pytest.mark.parametrize("fields", NIL_FORMS.values(), ids=NIL_FORMS.keys())
def test_the_loss_has_a_column_for_nil_and_the_units_leave_nil_mentions_out(fields):
    model, batch, _, _, _ = nil_inputs(fields, mentions=5, entities=4)
    labels = [2, -1, 2, 3, -1]
    out = model(**batch, labels=torch.tensor(labels))

    def cross_entropy(scores, column):
        return np.log(np.exp(np.array(scores) / 2).sum()) - scores[column] / 2

    overall = [[*scores, 0.0] for scores in out.scores.tolist()]  # the last column is NIL
    expected = np.mean([cross_entropy(scores, label) for scores, label in zip(overall, labels, strict=True)])
    for unit in out.unit_scores.values():
        pairs = zip(unit.tolist(), labels, strict=True)
        losses = [cross_entropy(scores, label) for scores, label in pairs if label >= 0 and not np.isnan(scores[0])]
        expected += np.mean(losses)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_model_learns_nil_from_a_batch_of_nil_mentions_alone():
    model, batch, _, _, _ = nil_inputs({"mask_padding": True}, mentions=4, entities=3)
    labels = torch.full((4,), -1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    assert (model(**batch).scores < 0).all()


def test_a_model_without_a_nil_score_has_no_weights_of_it_and_no_label_for_it():
    model = build()
    assert not model.learns_nil
    assert not any("nil" in name for name in model.state_dict())
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model(**batch_for(model), labels=torch.tensor([0, -1, 1, 0]))
    start = MimicModel(MimicConfig(text_config=dict(BERT), vision_config=dict(VIT), nil_score=True, **DIMS))
    assert start.learns_nil
    assert not any(parameter.any() for parameter in start.nil.parameters())  # training starts without a preference


@pytest.mark.parametrize("name", ["published", "text unit", "vision unit", "aligned", "feature map", "NIL"])
def test_every_parameter_has_a_gradient(name):
    """A parameter without a gradient would break distributed training."""
    model = build(**({"nil_score": True} if name == "NIL" else VARIANTS[name])).train()
    model(**batch_for(model), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", [*VARIANTS, "NIL"])
def test_save_and_load(name, tmp_path):
    model = build(**({"nil_score": True} if name == "NIL" else VARIANTS[name]))
    batch = batch_for(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, MimicModel)
    assert isinstance(loaded, Retriever)
    assert not any(info.values())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).scores, model(**batch).scores, atol=1e-5, rtol=1e-5)


def test_missing_weights_are_initialised(tmp_path):
    model = build(local_init="aligned", global_norm="l2", units=["text"], vision_config=None)
    partial = {k: v for k, v in model.state_dict().items() if not k.startswith("tglu")}
    model.save_pretrained(tmp_path, state_dict=partial)
    loaded = AutoModel.from_pretrained(tmp_path)
    query, key = loaded.tglu.fc_query.weight, loaded.tglu.fc_key.weight
    torch.testing.assert_close(query, key)
    torch.testing.assert_close(query @ query.T, torch.eye(12), atol=1e-5, rtol=0)
    assert loaded.tglu.fc_query.bias.abs().max() == 0
    torch.testing.assert_close(loaded.tglu.layer_norm.weight, torch.ones(12))


def test_the_aligned_start_scores_like_a_cosine():
    """Before training, the local score is near one for identical texts, and lower for different texts."""
    torch.manual_seed(0)
    fields = {"global_norm": "l2", "local_init": "aligned", "mask_padding": True, "text_pooling": "mean"}
    model = MimicModel(MimicConfig(text_config=dict(BERT), units=["text"], text_dim=24, **fields)).eval()
    ids = torch.randint(2, 59, (12, 10))
    batch = {f"{side}_input_ids": ids for side in ("mention", "entity")}
    with torch.no_grad():
        out = model(**batch)
    assert (out.scores.argmax(1) == torch.arange(12)).all()
    local = 2 * out.scores.diagonal() - 1  # the global half is 1, the cosine of a text with itself
    assert 0.8 < local.mean() <= 1.01


def test_remote_code_loads_without_the_package(tmp_path):
    for cls, auto in ((MimicConfig, "AutoConfig"), (MimicModel, "AutoModel")):
        cls.register_for_auto_class(auto)
    model = build()
    model.save_pretrained(tmp_path)
    torch.save(model(**batch_for(model)).scores.detach(), tmp_path / "scores.pt")
    program = f"""
import sys
sys.modules["hf_mel"] = None  # any import of it fails
import torch
from transformers import AutoModel
batch = torch.load({str(tmp_path / "batch.pt")!r})
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    difference = (model(**batch).scores - torch.load({str(tmp_path / "scores.pt")!r})).abs().max()
assert difference < 1e-5, difference
assert type(model).__module__.startswith("transformers_modules"), type(model)
print("loaded")
"""
    torch.save(batch_for(model), tmp_path / "batch.pt")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "loaded", run.stderr


def test_a_pooler_that_was_never_trained_is_not_read(tmp_path):
    dims = {"text_dim": 12, "vision_dim": 12, "fusion_dim": 12}
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**sizes, intermediate_size=8))
    bert.save_pretrained(tmp_path)
    assert MimicModel.from_backbones(text=str(tmp_path), **dims).config.text_pooling == "mean"
    asked = MimicModel.from_backbones(text=str(tmp_path), text_pooling="pooler", **dims)
    assert asked.config.text_pooling == "pooler"
    bert.pooler.dense.bias.data[0] = 0.1
    bert.save_pretrained(tmp_path)
    assert MimicModel.from_backbones(text=str(tmp_path), **dims).config.text_pooling == "pooler"


def test_from_backbones_copies_the_pretrained_weights(tmp_path):
    torch.manual_seed(0)
    bert = AutoModel.from_config(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    vit = AutoModel.from_config(ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}))
    clip = CLIPModel(published_mimic.clip_config())
    for name, part in (("bert", bert), ("vit", vit), ("clip", clip)):
        part.save_pretrained(tmp_path / name)
    both = MimicModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "vit"), **DIMS)
    assert both.config.units == ["text", "vision", "cross_modal"]
    assert both.config.projection_dim is None
    assert str(tmp_path) not in both.config.to_json_string()
    for ours, theirs in ((both.text_model, bert), (both.vision_model, vit)):
        expected = theirs.state_dict()
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(value, expected[key], msg=key)
    text_only = MimicModel.from_backbones(text=str(tmp_path / "bert"), **DIMS)
    assert text_only.config.units == ["text"]
    assert text_only.config.missing_images == "zeros"
    assert (both.config.missing_images, both.config.image_dropout) == ("absent", 0.1)
    published = {"missing_images": "zeros", **DIMS}
    as_published = MimicModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "vit"), **published)
    assert (as_published.config.missing_images, as_published.config.image_dropout) == ("zeros", 0.0)
    assert text_only.config.vision_config is None
    dual = MimicModel.from_backbones(text=str(tmp_path / "clip"), text_dim=12, vision_dim=12, fusion_dim=12)
    assert dual.config.projection_dim == 24
    for name in MimicModel.backbone_names:
        for key, value in getattr(dual, name).state_dict().items():
            torch.testing.assert_close(value, getattr(clip, name).state_dict()[key], msg=f"{name}.{key}")


def test_the_default_configuration_is_that_of_the_published_network():
    config = MimicConfig()
    assert (config.text_config.hidden_size, config.vision_config.hidden_size, config.projection_dim) == (512, 768, 512)
    assert config.vision_config.image_size // config.vision_config.patch_size == 7
    assert (config.text_dim, config.vision_dim, config.fusion_dim) == (96, 96, 96)
    assert config.units == config.unit_losses == ["text", "vision", "cross_modal"]


def test_the_configuration_survives_saving(tmp_path):
    config = MimicConfig(text_config=dict(BERT), units=["text"], temperature=0.05, nil_threshold=0)
    config.save_pretrained(tmp_path)
    loaded, saved = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    assert {k: v for k, v in loaded.items() if k != "_name_or_path"} == {
        k: v for k, v in saved.items() if k != "_name_or_path"
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"units": ["vision"], "vision_config": None}, ["vision_config", "'vision'"]),
        ({"units": ["txet"]}, ["txet", "'text'"]),
        ({"units": []}, ["units"]),
        ({"units": ["text"], "unit_losses": ["vision"]}, ["unit_losses"]),
        ({"gate": "matrix"}, ["gate", "'vector'"]),
        ({"temperature": 0}, ["temperature"]),
        ({"local_scale": 0.5}, ["local_scale", "'l2'"]),
        ({"unit_weights": [1, 2]}, ["unit_weights", "cross_modal"]),
        ({"unit_weights": [1, 2, 0]}, ["unit_weights", "positive"]),
        ({"loss_unit_weights": [1, 2]}, ["loss_unit_weights", "cross_modal"]),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MimicConfig(**({"text_config": dict(BERT), "vision_config": dict(VIT)} | fields))
    assert all(word in str(error.value) for word in words)


def test_the_error_names_missing_inputs():
    model = build()
    batch = batch_for(model)
    del batch["entity_pixel_values"]
    with pytest.raises(ValueError, match="entity_pixel_values"):
        model(**batch)


def test_half_precision_encodings_are_scored_in_float32():
    model = build()
    batch = batch_for(model, mentions=5, entities=8)
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        halves = {k: v.half() if v.is_floating_point() else v for k, v in entities.items()}
        scores = model.score(mentions, halves)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model.score(mentions, entities).detach(), atol=0.05, rtol=0.01)


def test_scores_under_autocast_stay_float32():
    model = build(mask_padding=True)
    batch = batch_for(model, mentions=5, entities=8)
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        with torch.autocast("cpu", torch.bfloat16):
            under = model.score(mentions, entities)
            assert model(**batch).scores.dtype == torch.float32
    torch.testing.assert_close(under, model.score(mentions, entities).detach())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_backbones(tmp_path, implementation):
    build().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.text_model.config._attn_implementation == implementation


@pytest.mark.parametrize("fields", [{}, {"mask_padding": True}, {"vision_config": dict(CNN)}], ids=str)
def test_the_returned_attention_is_that_of_the_units(fields):
    """Eq. 9–10 and 15–16 with the returned attention give h_t and h_o."""
    model = build(**fields)
    batch = batch_for(model)
    attention = model.attention(**batch)
    weights = {k: v.detach() for k, v in model.state_dict().items()}
    mentions, entities = features(model, batch, "mention"), features(model, batch, "entity")
    for m, mention in enumerate(mentions):
        values = torch.stack([direct_mimic.linear(x, weights, "tglu.fc_value") for x in mention["text"]["local"]])
        for n, entity in enumerate(entities):
            context = direct_mimic.layer_norm(attention["words"][m, n] @ values, weights, "tglu.layer_norm")
            local = direct_mimic.linear(entity["text"]["global"], weights, "tglu.fc_global") @ context
            score = (mention["text"]["global"] @ entity["text"]["global"] + local) / 2
            expected = direct_mimic.text_score(
                weights, mention["text"], entity["text"], direct_mimic.Switches(mask_padding=model.config.mask_padding)
            )
            torch.testing.assert_close(score, expected, atol=2e-5, rtol=1e-5)
    for side, rows in (("mention", mentions), ("entity", entities)):
        for shares, row in zip(attention[f"{side}_patches"], rows, strict=True):
            text = direct_mimic.linear(row["text"]["global"], weights, "cmfu.fc_text")
            logits = torch.stack(
                [text @ direct_mimic.linear(x, weights, "cmfu.fc_image") for x in row["image"]["local"]]
            )
            expected = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
            assert shares.shape == (2, 2) or "convnext" in str(fields)
            np.testing.assert_allclose(shares.flatten(), expected[-shares.numel() :], rtol=1e-4)


def test_a_text_model_returns_attention_to_words_only():
    model = build(units=["text"], vision_config=None)
    assert set(model.attention(**batch_for(model))) == {"words"}

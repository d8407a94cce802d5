"""Tests of MMEL's model: equations, losses and collaborative ranking against plain computations; variants; saving."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModel, BertConfig, CLIPModel, ViTConfig

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.hub.saving import save_model_repository
from hf_mel.modeling.mmel import MmelConfig, MmelModel, MmelProcessor, modeling_mmel
from hf_mel.protocols import Reranker
from tests.modeling import direct_mmel, published_mimic
from tests.modeling.test_mimic import BERT, CNN, VIT
from tests.modeling.test_mmel_processing import WORDS, make_tokenizer

CLIP_VISION = {"model_type": "clip_vision_model"} | published_mimic.clip_config().vision_config.to_dict()
SMALL = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 14, "num_image_tokens": 3, "dropout": 0.0}
VARIANTS = {
    "MMEL": {},
    "MMEL-onlytext": {"vision_config": None},
    "MMEL-k1": {"num_image_tokens": 1},
    "MMEL-M-Encoder": {"fusion": "m_encoder"},
    "- JL_t": {"joint_text": False},
    "- JL_v": {"joint_image": False},
    "- JL": {"joint_text": False, "joint_image": False},
    "- PT&CR": {"pairwise_loss_weight": 0},
    "one block": {"num_image_blocks": 1},
    "CLIP": {"vision_config": dict(CLIP_VISION), "projection_dim": 7},
    "feature map, learning": {"vision_config": dict(CNN), "freeze_vision": False},
}
TEXT_ONLY = {"vision_config": None}


def build(seed=0, **fields) -> MmelModel:
    torch.manual_seed(seed)
    model = MmelModel(MmelConfig(**({"text_config": dict(BERT), "vision_config": dict(VIT)} | SMALL | fields))).eval()
    with torch.no_grad():  # the initial ones and zeros of norms would hide a weight that is not applied
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch_for(model: MmelModel, mentions=4, candidates=3, length=14, seed=1) -> dict[str, torch.Tensor]:
    """Returns random inputs. Mentions 0 and 1 share a context, mention 1 lacks a candidate, some images are missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (mentions, candidates)
    context = torch.randint(3, 6, (*shape, 1), generator=generator)
    total = context + torch.randint(2, length - 5, (*shape, 1), generator=generator)
    position = torch.arange(length)
    mask = torch.ones(shape, dtype=torch.bool)
    if mentions > 1 and candidates > 1:
        mask[1, -1] = False
    batch = {
        "pair_input_ids": torch.randint(2, 59, (*shape, length), generator=generator),
        "pair_attention_mask": (position < total).long(),
        "pair_context_mask": position < context,
        "pair_entity_mask": (position >= context) & (position < total),
        "pair_mask": mask,
        "pair_context": torch.tensor([0, 0, 1, 1, 2, 3, 3, 3])[:mentions],
    }
    if model.config.vision_config is not None:
        batch |= {
            "pair_mention_pixel_values": torch.randn(mentions, 3, 16, 16, generator=generator),
            "pair_entity_pixel_values": torch.randn(*shape, 3, 16, 16, generator=generator),
            "pair_mention_image_mask": torch.arange(mentions) != 2,
            "pair_entity_image_mask": torch.rand(shape, generator=generator) < 0.7,
        }
    return batch


def in_double(model, batch):
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def weights_of(model):
    return {k: v.detach().double().numpy() for k, v in model.state_dict().items()}


def expected_pairs(model, batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns m [M, C] and h^e [M, C, d], computed pair by pair. Only the two encoders are those of the model."""
    w, config = weights_of(model), model.config
    m, c, _ = batch["pair_input_ids"].shape
    matching, features = np.zeros((m, c)), np.zeros((m, c, config.hidden_size))
    for i in range(m):
        for j in range(c):
            if not batch["pair_mask"][i, j]:
                continue
            ids = batch["pair_input_ids"][i, j]
            parts = [batch[f"pair_{side}_mask"][i, j] for side in ("context", "entity")]
            with torch.no_grad():
                if config.joint_text:
                    sequence = ids[parts[0] | parts[1]].unsqueeze(0)  # without padding
                    states = model.text_model(input_ids=sequence).last_hidden_state[0].numpy()
                    words = [states[: parts[0].sum()], states[parts[0].sum() :]]
                else:
                    words = [model.text_model(ids[p].unsqueeze(0)).last_hidden_state[0].numpy() for p in parts]
                images = [None, None]
                if config.vision_config is not None:
                    for s, (name, index) in enumerate((("mention", (i,)), ("entity", (i, j)))):
                        if batch[f"pair_{name}_image_mask"][index]:
                            pixels = batch[f"pair_{name}_pixel_values"][index]
                            images[s] = model.encode_images(pixels.unsqueeze(0))[0].numpy()
            matching[i, j], features[i, j] = direct_mmel.pair(*words, *images, w, config)
    return matching, features


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_pair_equals_the_equations_of_the_paper(fields):
    model = build(**fields)
    model, batch = in_double(model, batch_for(model))
    with torch.no_grad():
        out = model(**batch)
    matching, features = expected_pairs(model, batch)
    mask = batch["pair_mask"].numpy()
    np.testing.assert_allclose(out.scores.sigmoid().numpy()[mask], matching[mask], rtol=1e-8)
    np.testing.assert_allclose(out.features.numpy(), features, atol=1e-9)
    assert (out.scores.numpy()[~mask] == -np.inf).all()


@pytest.mark.parametrize("name", ["MMEL", "MMEL-onlytext", "- PT&CR"])
@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [2, -100, 0, 1], [0, 0, -100, -100]], ids=str)
def test_the_loss_equals_equations_10_and_11(name, labels):
    model = build(**VARIANTS[name], margin=0.4)
    model, batch = in_double(model, batch_for(model))
    with torch.no_grad():
        out = model(**batch, labels=torch.tensor(labels))
    matching, features = expected_pairs(model, batch)
    positive, negative, mentions = [], [], []
    for i, gold in enumerate(labels):
        if gold < 0:
            continue
        others = [j for j in range(3) if j != gold and batch["pair_mask"][i, j]]
        positive.append(-np.log(matching[i, gold]))
        negative.extend(-np.log(1 - matching[i, j]) for j in others)
        mentions.append(
            {
                "context": int(batch["pair_context"][i]),
                "positive": features[i, gold],
                "negatives": [features[i, j] for j in others],
            }
        )
    expected = np.mean(positive) + np.mean(negative)
    if model.config.pairwise_loss_weight:
        w = weights_of(model)
        expected += 0.5 * direct_mmel.pairwise_loss(mentions, lambda a, b: direct_mmel.similarity(a, b, w), 0.4)
    assert out.loss.item() == pytest.approx(expected, rel=1e-8)


def test_two_copies_of_a_mention_differ_by_dropout():
    """In training the copies of §3.4 have different features, so the pairwise loss has a gradient."""
    model = build(**TEXT_ONLY, dropout=0.2).train()
    batch = {k: torch.cat([v[:1], v[:1]]) for k, v in batch_for(model).items()}
    torch.manual_seed(0)
    out = model(**batch, labels=torch.tensor([1, 1]))
    assert not torch.allclose(out.features[0, 1], out.features[1, 1])
    out.loss.backward()
    assert model.similarity.fc_second.weight.grad.abs().sum() > 0


def test_gradients_equal_finite_differences():
    model = build()
    model, batch = in_double(model, batch_for(model))
    labels = torch.tensor([0, 1, 2, 0])
    model(**batch, labels=labels).loss.backward()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            losses = []
            for sign in (1e-6, -1e-6):
                parameter.add_(direction, alpha=sign)
                losses.append(model(**batch, labels=labels).loss.item())
                parameter.sub_(direction, alpha=sign)
        expected = (losses[0] - losses[1]) / 2e-6
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=2e-3, abs=2e-7), name


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_grouping_and_order_do_not_change_scores(name):
    """Scores and features stay the same with more padding, one pair at a time, and with permuted candidates."""
    model = build(**VARIANTS[name])
    model, batch = in_double(model, batch_for(model))
    tokens = [k for k in batch if batch[k].dim() == 3]
    grid = [k for k in batch if batch[k].dim() >= 2 and not k.startswith("pair_mention")]
    with torch.no_grad():
        out = model(**batch)
        longer = batch | {k: torch.nn.functional.pad(batch[k], (0, 5)) for k in tokens}
        longer["pair_input_ids"][..., -5:] = 7
        wider = batch | {k: torch.cat([batch[k], batch[k][:, :2]], 1) for k in grid}
        wider["pair_mask"][:, 3:] = False
        order = torch.tensor([2, 0, 1])
        permuted = model(**batch | {k: batch[k][:, order] for k in grid})
        alone = [
            model(**{k: v[i : i + 1, j : j + 1] if k in grid else v[i : i + 1] for k, v in batch.items()})
            for i in range(4)
            for j in range(3)
        ]
        for padded in (model(**longer), model(**wider)):
            torch.testing.assert_close(padded.scores[:, :3], out.scores)
            torch.testing.assert_close(padded.features[:, :3], out.features)
    torch.testing.assert_close(permuted.scores, out.scores[:, order])
    torch.testing.assert_close(torch.cat([x.scores for x in alone]).view(4, 3), out.scores)
    torch.testing.assert_close(torch.cat([x.features for x in alone]).view(4, 3, -1), out.features)


def test_a_masked_candidate_has_no_gradient():
    model = build(freeze_vision=False)
    model, batch = in_double(model, batch_for(model))
    batch["pair_entity_image_mask"][:] = True
    pixels = batch["pair_entity_pixel_values"].requires_grad_()
    model(**batch, labels=torch.tensor([0, 0, 1, 2])).loss.backward()
    has_gradient = pixels.grad.abs().sum((2, 3, 4)) > 0
    assert torch.equal(has_gradient, batch["pair_mask"])


def test_a_missing_image_has_no_influence():
    """The pixels in its place do not matter, and without images on both sides only the words count."""
    model = build()
    model, batch = in_double(model, batch_for(model))
    with torch.no_grad():
        out = model(**batch)
        altered = dict(batch)
        for side in ("mention", "entity"):
            present = batch[f"pair_{side}_image_mask"]
            pixels = batch[f"pair_{side}_pixel_values"].clone()
            pixels[~present] = 9.0
            altered[f"pair_{side}_pixel_values"] = pixels
        torch.testing.assert_close(model(**altered).scores, out.scores)
        neither = {k: v for k, v in batch.items() if "pixel" not in k}
        neither |= {k: torch.zeros_like(v) for k, v in batch.items() if "image_mask" in k}
        assert model(**neither).scores.isfinite().equal(batch["pair_mask"])
        changed = {k: v + 1 if "pixel" in k else v for k, v in batch.items()}
        assert not torch.allclose(model(**changed).features, out.features)


@pytest.mark.parametrize("fields", [{}, {"fusion": "m_encoder"}, {"joint_image": False, "freeze_vision": False}])
@torch.no_grad()
def test_no_image_counts_for_a_mention_without_one(fields):
    model, masked = build(missing_images="absent", **fields), build(**fields)
    batch = batch_for(model, mentions=3, candidates=4)
    batch["pair_mention_image_mask"] = torch.tensor([True, False, True])
    batch["pair_entity_image_mask"] = torch.tensor([[True, False, True, False]]).expand(3, 4)
    no_images = {name: torch.zeros_like(mask) for name, mask in batch.items() if name.endswith("image_mask")}
    out, text_only = model(**batch), masked(**batch | no_images)
    torch.testing.assert_close(out.scores[1], text_only.scores[1])
    torch.testing.assert_close(out.features[1], text_only.features[1])
    torch.testing.assert_close(out.scores[[0, 2]], masked(**batch).scores[[0, 2]])
    assert not torch.allclose(masked(**batch).scores[1, 0], out.scores[1, 0])
    assert (model.leaves_out_missing_images, masked.leaves_out_missing_images) == (True, None)
    assert build(vision_config=None).leaves_out_missing_images is True


def test_image_dropout_hides_images_of_candidates_in_training_only():
    model = build(missing_images="absent", image_dropout=0.5, pairwise_loss_weight=0)
    batch = batch_for(model, mentions=1, candidates=1)
    batch["pair_mention_image_mask"][:] = batch["pair_entity_image_mask"][:] = True
    shown = model(**batch).scores.item()
    hidden = model(**batch | {"pair_entity_image_mask": torch.zeros(1, 1, dtype=torch.bool)}).scores.item()
    torch.manual_seed(0)
    model.train()
    model.text_model.eval()
    drawn = [model(**batch).scores.item() for _ in range(40)]
    assert {score == pytest.approx(hidden, abs=1e-5) for score in drawn} == {True, False}
    assert all(score == pytest.approx(shown, abs=1e-5) or score == pytest.approx(hidden, abs=1e-5) for score in drawn)


def test_features_and_their_images_give_the_same_scores():
    model = build()
    batch = batch_for(model)
    with torch.no_grad():
        out = model(**batch)
        encoded = {k: v for k, v in batch.items() if "pixel" not in k}
        encoded["pair_mention_image_features"] = model.encode_images(batch["pair_mention_pixel_values"])
        flat = model.encode_images(batch["pair_entity_pixel_values"].flatten(0, 1))
        encoded["pair_entity_image_features"] = flat.view(4, 3, -1)
        torch.testing.assert_close(model(**encoded).scores, out.scores)


def test_a_frozen_image_encoder_does_not_change():
    model = build().train()
    assert model.image_features_are_fixed
    assert not model.vision_model.training
    model(**batch_for(model), labels=torch.tensor([0, 0, 0, 0])).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.vision_model.parameters())
    assert not build(freeze_vision=False).image_features_are_fixed


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_gradient(name):
    """Distributed training fails if a parameter has none."""
    model = build(**VARIANTS[name]).train()
    batch = batch_for(model)
    if model.config.vision_config is not None:
        batch["pair_mention_image_mask"][:] = True
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in model.named_parameters() if p.grad is None and n in trained] == []


def test_text_only_has_no_image_parameters():
    model = build(**TEXT_ONLY)
    assert not [n for n, _ in model.named_parameters() if "image" in n or "vision" in n or "gate" in n]
    with pytest.raises(ValueError, match="vision_config"):
        model.encode_images(torch.zeros(1, 3, 16, 16))


def test_no_candidates_and_one_candidate():
    model = build(**TEXT_ONLY)
    batch = batch_for(model, mentions=2, candidates=1)
    empty = batch | {"pair_mask": torch.zeros(2, 1, dtype=torch.bool)}
    with torch.no_grad():
        assert model(**batch).scores.isfinite().all()
        out = model(**empty)
        assert (out.scores == -torch.inf).all()
        ranked = model.rank_jointly(out.scores, out.features, empty["pair_mask"], empty["pair_context"])
        assert (ranked == -torch.inf).all()
    assert model(**empty, labels=torch.tensor([-100, -100])).loss.item() == 0


def test_bad_inputs_are_refused():
    model = build()
    batch = batch_for(model)
    with pytest.raises(ValueError, match="without a candidate"):
        model(**batch, labels=torch.tensor([0, 2, 0, 0]))
    with pytest.raises(ValueError, match="without a candidate"):
        model(**batch, labels=torch.tensor([0, 3, 0, 0]))
    with pytest.raises(ValueError, match="pair_context"):
        model(**{k: v for k, v in batch.items() if k != "pair_context"}, labels=torch.tensor([0, 0, 0, 0]))
    with pytest.raises(ValueError, match="pair_mention_pixel_values"):
        model(**{k: v for k, v in batch.items() if "mention" not in k})


# ---- collaborative ranking


def contexts_for(seed, sizes, ragged=True, dim=6, scale=3.0):
    """Returns scores, features, mask and contexts of contexts with `sizes` mentions, in shuffled rows."""
    generator = np.random.default_rng(seed)
    width = 4
    contexts = np.repeat(np.arange(len(sizes)), sizes)
    generator.shuffle(contexts)
    mask = np.ones((len(contexts), width), dtype=bool)
    if ragged:
        mask = np.arange(width) < generator.integers(1, width + 1, size=(len(contexts), 1))
        mask = generator.permuted(mask, axis=1)
    scores = np.where(mask, generator.normal(size=mask.shape) * scale, -np.inf)
    features = np.where(mask[..., None], generator.normal(size=(*mask.shape, dim)) * 2, 0)
    return [torch.from_numpy(x) for x in (scores, features, mask, contexts)]


def ranker(constant=False, seed=0) -> MmelModel:
    model = build(seed, **TEXT_ONLY, **{"hidden_size": 6}).double()
    with torch.no_grad():
        model.similarity.fc_out.weight.mul_(0 if constant else 6)
    return model


def by_loops(model, scores, features, mask, contexts, rank):
    w = weights_of(model)
    expected = np.full(scores.shape, -np.inf)
    for context in contexts.unique():
        rows = [r for r in (contexts == context).nonzero()[:, 0].tolist() if mask[r].any()]
        columns = [mask[r].nonzero()[:, 0].tolist() for r in rows]
        mentions = [
            [(direct_mmel.sigmoid(scores[r, c].item()), features[r, c].numpy()) for c in cs]
            for r, cs in zip(rows, columns, strict=True)
        ]
        if len(rows) > 1:
            ranked = rank(mentions, lambda a, b: direct_mmel.similarity(a, b, w))
        else:
            ranked = [[m for m, _ in mention] for mention in mentions]
        for r, cs, values in zip(rows, columns, ranked, strict=True):
            half = np.array(values) / (2 if len(rows) > 1 else 1)
            expected[r, cs] = np.log(half / (1 - half))
    return expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 300, 2**22])
def test_ranking_jointly_equals_section_3_5_in_loops(seed, budget, monkeypatch):
    monkeypatch.setattr(modeling_mmel, "_BLOCK_ELEMENTS", {"cpu": budget})
    model = ranker()
    inputs = contexts_for(seed, [1, 2, 3, 5, 2, 1, 4])
    ranked = model.rank_jointly(*inputs)
    np.testing.assert_allclose(ranked.numpy(), by_loops(model, *inputs, direct_mmel.rank_by_greedy), rtol=1e-12)


@pytest.mark.parametrize("weight", [0, 0.25, 3])
def test_the_similarity_weight_is_the_weight_of_s_in_the_averages(weight):
    """The test above covers 1, the paper's value. With 0 no order changes."""
    model, inputs = ranker(), contexts_for(1, [1, 2, 3, 4])
    printed = model.rank_jointly(*inputs)
    model.config.similarity_weight = weight
    weighted = model.rank_jointly(*inputs)
    greedy = functools.partial(direct_mmel.rank_by_greedy, weight=weight)
    np.testing.assert_allclose(weighted.numpy(), by_loops(model, *inputs, greedy), rtol=1e-12)
    assert not torch.allclose(weighted, printed)
    if weight == 0:
        assert torch.equal(weighted.argsort(dim=1, stable=True), inputs[0].argsort(dim=1, stable=True))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_exact_for_two_mentions_and_for_a_constant_similarity(seed):
    pairs, triples = contexts_for(seed, [2] * 6), contexts_for(seed, [3, 4, 3])
    for model, inputs in ((ranker(), pairs), (ranker(constant=True), triples)):
        exact = by_loops(model, *inputs, direct_mmel.rank_by_enumeration)
        np.testing.assert_allclose(model.rank_jointly(*inputs).numpy(), exact, rtol=1e-12)


def test_greedy_is_not_exact_for_three_mentions():
    """Pruning can drop a combination that the third mention would have raised."""
    model = ranker()
    inputs = contexts_for(0, [3] * 30, scale=1.0)
    exact = by_loops(model, *inputs, direct_mmel.rank_by_enumeration)
    greedy = model.rank_jointly(*inputs).numpy()
    differs = ~np.isclose(greedy, exact).all(1)
    assert 0 < differs.sum() < len(differs)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from([0.0, 1.0, 12.0]),
)
def test_a_constant_similarity_never_reverses_an_order(seed, sizes, scale):
    scores, features, mask, contexts = contexts_for(seed, sizes, scale=scale)
    scores = scores.round(decimals=1)  # ties too
    ranked = ranker(constant=True).rank_jointly(scores, features, mask, contexts)
    for before, after, keep in zip(scores, ranked, mask, strict=True):
        better = before[keep].unsqueeze(1) > before[keep].unsqueeze(0)
        assert (after[keep].unsqueeze(1) >= after[keep].unsqueeze(0))[better].all()


def test_a_learned_similarity_can_reverse_an_order():
    """A candidate with a lower score wins if it is similar to the candidate of the other mention."""
    model = ranker()
    w = weights_of(model)
    for seed in range(50):
        scores, features, mask, contexts = contexts_for(seed, [2], ragged=False, scale=0.3)
        ranked = model.rank_jointly(scores, features, mask, contexts)
        if not torch.equal(ranked.argmax(1), scores.argmax(1)):
            break
    else:
        pytest.fail("The order never changed.")
    assert {
        round(direct_mmel.similarity(features[0, a].numpy(), features[1, b].numpy(), w), 3)
        for a in (0, 1)
        for b in (0, 1)
    } != {0}


def test_other_contexts_do_not_matter_and_a_single_mention_keeps_its_scores():
    model = ranker()
    scores, features, mask, contexts = contexts_for(5, [1, 3, 1, 2])
    ranked = model.rank_jointly(scores, features, mask, contexts)
    for context in contexts.unique():
        rows = contexts == context
        alone = model.rank_jointly(scores[rows], features[rows], mask[rows], contexts[rows])
        torch.testing.assert_close(alone, ranked[rows])
        if rows.sum() == 1:
            assert torch.equal(ranked[rows], scores[rows])


def test_extreme_scores_stay_finite_and_in_order():
    model = ranker()
    scores = torch.tensor([[800.0, 30.0, 20.0, -31.0, -30.0, -800.0]] * 3)
    features = torch.randn(3, 1, 6).expand(3, 6, 6)  # equal features, so that only scores differ
    mask = torch.ones(3, 6, dtype=torch.bool)
    for contexts in (torch.arange(3), torch.zeros(3, dtype=torch.long)):
        ranked = model.rank_jointly(scores, features, mask, contexts)
        assert ranked.isfinite().all()
        assert ranked.dtype == torch.float32
        order = ranked[:, [1, 2, 4, 3, 5]]
        assert (order[:, :-1] > order[:, 1:]).all() if contexts[1] else (order[:, :-1] >= order[:, 1:]).all()


def test_certain_scores_and_a_certain_similarity_stay_finite():
    """m and S round to 1, and a probability of 1 has infinite odds."""
    model = ranker()
    with torch.no_grad():
        model.similarity.fc_out.bias.fill_(1000.0)
    scores = torch.tensor([[800.0, 0.0]] * 3)
    ranked = model.rank_jointly(scores, torch.zeros(3, 2, 6), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3))
    assert ranked.isfinite().all()
    assert (ranked[:, 0] > ranked[:, 1]).all()


def test_ranking_jointly_ignores_the_order_of_rows_and_columns():
    model = ranker()
    scores, features, mask, contexts = contexts_for(6, [1, 3, 2])
    ranked = model.rank_jointly(scores, features, mask, contexts)
    rows, columns = torch.randperm(len(scores)), torch.randperm(4)
    permuted = model.rank_jointly(
        scores[rows][:, columns], features[rows][:, columns], mask[rows][:, columns], contexts[rows] + 7
    )
    torch.testing.assert_close(permuted, ranked[rows][:, columns])
    padded = [torch.nn.functional.pad(x, (0, 3), value=v) for x, v in ((scores, -torch.inf), (mask, False))]
    wide = torch.nn.functional.pad(features, (0, 0, 0, 3))
    torch.testing.assert_close(model.rank_jointly(padded[0], wide, padded[1], contexts)[:, :4], ranked)


def test_many_mentions_and_mentions_without_candidates():
    model = ranker()
    scores, features, mask, contexts = contexts_for(7, [40, 2], ragged=False)
    mask[3] = False
    ranked = model.rank_jointly(scores, features, mask, contexts)
    assert (ranked[3] == -torch.inf).all()
    assert ranked[mask].isfinite().all()


def test_without_pairwise_training_scores_stay_the_same():
    model = build(**TEXT_ONLY, pairwise_loss_weight=0)
    scores, features, mask, contexts = contexts_for(8, [3, 2])
    ranked = model.rank_jointly(scores, features, mask, contexts)
    assert torch.equal(ranked, scores)


def test_ranking_uses_the_trained_similarity():
    model = build(**TEXT_ONLY)
    batch = batch_for(model)
    out = model(**batch, labels=torch.tensor([0, 0, 1, 2]))
    out.loss.backward()
    before = model.rank_jointly(out.scores.detach(), out.features.detach(), batch["pair_mask"], batch["pair_context"])
    with torch.no_grad():
        for parameter in model.similarity.parameters():
            assert parameter.grad.abs().sum() > 0
            parameter.sub_(parameter.grad * 50)
    after = model.rank_jointly(out.scores.detach(), out.features.detach(), batch["pair_mask"], batch["pair_context"])
    assert not torch.allclose(before, after)


# ---- Hub and training


@pytest.mark.parametrize("name", VARIANTS)
def test_save_and_load(name, tmp_path):
    model = build(**VARIANTS[name])
    batch = batch_for(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, MmelModel)
    assert isinstance(loaded, Reranker)
    assert not any(info.values())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen
    with torch.no_grad():
        before, after = model(**batch), loaded.eval()(**batch)
        torch.testing.assert_close(after.scores, before.scores, atol=1e-5, rtol=1e-5)
        joint = [
            m.rank_jointly(o.scores, o.features, batch["pair_mask"], batch["pair_context"])
            for m, o in ((model, before), (loaded, after))
        ]
    torch.testing.assert_close(*joint, atol=1e-5, rtol=1e-5)


def test_missing_weights_are_initialised(tmp_path):
    model = build(**TEXT_ONLY)
    partial = {k: v for k, v in model.state_dict().items() if not k.startswith(("similarity", "fusion"))}
    model.save_pretrained(tmp_path, state_dict=partial)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.fusion.text.norm1.weight, torch.ones(12))
    assert 0 < loaded.similarity.fc_first.weight.abs().max() <= 12**-0.5


ROWS = """
[
    (
        {"mention": "Chaplin", "text": "Chaplin and Anderson", "start": 0, "end": 7, "context_id": "a", "image": picture},
        [
            {"name": "Charlie Chaplin", "description": "", "attributes": "actor", "images": [picture]},
            {"name": "Chaplin", "description": "british", "attributes": "actor", "images": []},
        ],
    ),
    (
        {"mention": "Anderson", "text": "Chaplin and Anderson", "start": 12, "end": 20, "context_id": "a", "image": None},
        [{"name": "Anderson", "description": "", "attributes": "actor", "images": [picture]}],
    ),
]
"""


def test_remote_code_loads_without_the_package(tmp_path):
    """Model and processor of a repository rank plain rows without hf_mel installed."""
    processor = MmelProcessor.from_parts(make_tokenizer(), {"size": {"height": 16, "width": 16}}, max_length=30)
    model = build(text_config=dict(BERT, vocab_size=len(WORDS)))
    save_model_repository(model, processor, tmp_path)
    batch = processor(pairs=eval(ROWS, {"picture": Image.new("RGB", (9, 7), (200, 30, 30))}))
    with torch.no_grad():
        out = model(**batch)
    torch.save((out.scores, model.rank_jointly(**ranked(out, batch))), tmp_path / "scores.pt")
    program = f"""
import sys
sys.modules["hf_mel"] = None  # makes every import of it fail
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
picture = Image.new("RGB", (9, 7), (200, 30, 30))
batch = processor(pairs={ROWS.strip()})
with torch.no_grad():
    out = model(**batch)
    joint = model.rank_jointly(out.scores, out.features, batch["pair_mask"], batch["pair_context"])
for value, expected in zip((out.scores, joint), torch.load({str(tmp_path / "scores.pt")!r})):
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
for part in (model, processor):
    assert type(part).__module__.startswith("transformers_modules"), type(part)
print("loaded")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "loaded", run.stderr


def ranked(out, batch):
    return {
        "scores": out.scores,
        "features": out.features,
        "mask": batch["pair_mask"],
        "contexts": batch["pair_context"],
    }


def test_from_backbones_copies_the_pretrained_weights(tmp_path):
    torch.manual_seed(0)
    bert = AutoModel.from_config(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    vit = AutoModel.from_config(ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}))
    clip = CLIPModel(published_mimic.clip_config())
    for name, part in (("bert", bert), ("vit", vit), ("clip", clip)):
        part.save_pretrained(tmp_path / name)
    both = MmelModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "vit"), **SMALL)
    clipped = MmelModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "clip"), **SMALL)
    text = MmelModel.from_backbones(text=str(tmp_path / "bert"), **SMALL)
    assert str(tmp_path) not in both.config.to_json_string()
    assert (both.config.projection_dim, clipped.config.projection_dim, text.config.vision_config) == (None, 24, None)
    for copy, original in (
        (both.text_model, bert),
        (both.vision_model, vit),
        (clipped.vision_model, clip.vision_model),
        (clipped.visual_projection, clip.visual_projection),
        (text.text_model, bert),
    ):
        for key, value in copy.state_dict().items():
            torch.testing.assert_close(value, original.state_dict()[key], msg=key)
    fresh = MmelModel.from_backbones(vision=str(tmp_path / "vit"), text_config=dict(BERT), **SMALL)
    assert fresh.text_model.config.vocab_size == BERT["vocab_size"]
    torch.testing.assert_close(fresh.vision_model.state_dict(), both.vision_model.state_dict())
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = clip.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(clipped.eval().encode_images(pixels), expected)
    with pytest.raises(ValueError, match="text encoder"):
        MmelModel.from_backbones(vision=str(tmp_path / "vit"))


def test_the_default_configuration_is_that_of_the_paper():
    config = MmelConfig()
    assert (config.text_config.hidden_size, config.vision_config.hidden_size, config.projection_dim) == (768, 768, 512)
    assert (config.hidden_size, config.num_image_tokens, config.num_image_blocks, config.dropout) == (512, 4, 2, 0.2)


def test_the_configuration_survives_saving(tmp_path):
    config = MmelConfig(text_config=dict(BERT), pairwise_loss_weight=0, margin=1, joint_text=False)
    config.save_pretrained(tmp_path)
    loaded, saved = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    assert {k: v for k, v in loaded.items() if k != "_name_or_path"} == {
        k: v for k, v in saved.items() if k != "_name_or_path"
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_config": None}, ["text_config"]),
        ({"fusion": "sum"}, ["fusion", "'m_encoder'"]),
        ({"vision_config": None, "fusion": "m_encoder"}, ["fusion", "vision_config"]),
        ({"vision_config": None, "joint_image": False}, ["joint_image", "vision_config"]),
        ({"num_image_tokens": 0}, ["num_image_tokens"]),
        ({"hidden_size": 10, "num_attention_heads": 4}, ["10", "4"]),
        ({"dropout": 1}, ["dropout"]),
        ({"pairwise_loss_weight": -1}, ["pairwise_loss_weight"]),
        ({"similarity_weight": -0.5}, ["similarity_weight"]),
        ({"missing_images": "zeros"}, ["missing_images", "'absent'"]),
        ({"image_dropout": 0.1}, ["missing_images='absent'"]),
        ({"image_dropout": 1, "missing_images": "absent"}, ["image_dropout"]),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MmelConfig(**({"text_config": dict(BERT), "vision_config": dict(VIT)} | SMALL | fields))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["MMEL", "MMEL-onlytext", "MMEL-M-Encoder"])
def test_half_precision_runs_and_scores_stay_float32(name):
    model = build(**VARIANTS[name])
    batch = batch_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, labels=torch.tensor([0, 0, 1, 2]))
        ranked = model.rank_jointly(
            out.scores.detach(), out.features.detach(), batch["pair_mask"], batch["pair_context"]
        )
    out.loss.backward()
    assert out.scores.dtype == out.features.dtype == torch.float32
    with torch.no_grad():
        full = model(**batch)
        expected = model.rank_jointly(full.scores, full.features, batch["pair_mask"], batch["pair_context"])
    keep = batch["pair_mask"]
    torch.testing.assert_close(out.scores[keep], full.scores[keep], atol=0.1, rtol=0.1)
    torch.testing.assert_close(ranked[keep], expected[keep], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_backbones(tmp_path, implementation):
    build().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.text_model.config._attn_implementation == implementation

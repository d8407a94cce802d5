"""MM-nel's model: each equation against NumPy loops, belief propagation against enumeration, transport against POT."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import numpy as np
import ot
import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, ResNetConfig, ViTConfig

import hf_mel.auto  # noqa: F401
from hf_mel.modeling.mm_nel import MmNelConfig, MmNelModel, modeling_mm_nel
from hf_mel.modeling.mm_nel.modeling_mm_nel import max_product, pot_plan, sinkhorn, transport_cost, transport_plan
from hf_mel.protocols import Reranker
from tests.modeling import direct_mm_nel as direct

SMALL = {
    "vocab_size": 30,
    "word_dim": 6,
    "hidden_size": 8,
    "attention_words": 4,
    "relation_window": 4,
    "score_hidden_size": 5,
    "image_size": 16,
    "num_image_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "gamma": 0.5,
    "beta": 0.2,
}


def build(seed=0, **fields):
    torch.manual_seed(seed)
    model = MmNelModel(MmNelConfig(**SMALL | fields)).double().eval()
    with torch.no_grad():  # what starts as ones, zeros or the identity would hide a forgotten part
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


def knowledge(count=14, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {
            "name": draw.integers(0, 30, draw.integers(1, 4)).tolist(),
            "facts": draw.integers(0, 30, draw.integers(0, 6)).tolist(),
            "image": draw.normal(size=(3, 16, 16)) if k % 5 != 3 else None,
        }
        for k in range(count)
    ]


ENTITIES = knowledge()


def documents(kinds=("tttvv", "tv", "tt", "v", "t"), candidates=9, seed=0):
    """Documents of textual ("t") and visual ("v") mentions."""
    draw = np.random.default_rng(seed)
    out = []
    for kind in kinds:
        document = []
        for letter in kind:
            chosen = draw.permutation(len(ENTITIES))[: draw.integers(2, candidates + 1)]
            mention = {
                "candidates": [
                    {"entity": int(e), "prior": float(draw.choice([0, 0, 0.1, draw.random()]))} for e in chosen
                ],
                "gold": int(draw.integers(len(chosen))),
            }
            if letter == "t":
                for side, most in (("left", 6), ("own", 3), ("right", 6)):
                    mention[side] = draw.integers(0, 30, draw.integers(0, most)).tolist()
            else:
                mention["image"] = draw.normal(size=(3, 16, 16))
            document.append(mention)
        out.append(document)
    return out


def tensors(docs, columns=0, extra=0, order=None):
    """What a processor would give, by loops."""
    rows = [(number, mention) for number, document in enumerate(docs) for mention in document]
    if order is not None:
        rows = [rows[k] for k in order]
    c = max([columns, 1, *(len(mention["candidates"]) for _, mention in rows)])
    m = len(rows)
    length = extra + max([1, *(sum(len(r.get(s, [])) for s in ("left", "own", "right")) for _, r in rows)])
    batch = {
        "pair_mask": torch.zeros(m, c, dtype=torch.bool),
        "pair_context": torch.tensor([number for number, _ in rows]),
        "pair_visual": torch.tensor(["own" not in mention for _, mention in rows]),
        "pair_prior": torch.zeros(m, c, dtype=torch.float64),
        "pair_entity": torch.full((m, c), -1),
        "pair_word_ids": torch.full((m, length), -1),
        "pair_span": torch.zeros(m, 2, dtype=torch.long),
        "pair_name_ids": torch.full((len(ENTITIES), 5), -1),
        "pair_fact_ids": torch.full((len(ENTITIES), 6), -1),
        "pair_mention_image": torch.full((m,), -1),
        "pair_entity_image": torch.full((m, c), -1),
    }
    labels = torch.full((m,), -100)
    images, place = [], {}
    for e, entity in enumerate(ENTITIES):
        batch["pair_name_ids"][e, : len(entity["name"])] = torch.tensor(entity["name"])
        batch["pair_fact_ids"][e, : len(entity["facts"])] = torch.tensor(entity["facts"], dtype=torch.long)
        if entity["image"] is not None:
            place[e] = len(images)
            images.append(entity["image"])
    for k, (_, mention) in enumerate(rows):
        for j, candidate in enumerate(mention["candidates"]):
            batch["pair_mask"][k, j] = True
            batch["pair_prior"][k, j] = candidate["prior"]
            batch["pair_entity"][k, j] = candidate["entity"]
            if "own" not in mention:
                batch["pair_entity_image"][k, j] = place.get(candidate["entity"], -1)
        if mention["gold"] is not None:
            labels[k] = mention["gold"]
        if "own" in mention:
            words = [*mention["left"], *mention["own"], *mention["right"]]
            batch["pair_word_ids"][k, : len(words)] = torch.tensor(words, dtype=torch.long)
            start = len(mention["left"])
            batch["pair_span"][k] = torch.tensor([start, start + len(mention["own"])])
        elif mention["image"] is not None:
            batch["pair_mention_image"][k] = len(images)
            images.append(mention["image"])
    batch["pair_pixel_values"] = torch.from_numpy(np.stack(images))
    return batch, labels


def check(model, docs, keep_gold=False):
    """Scores, losses and plans of the model are those of the loops."""
    model.config.transport_tolerance = 1e-9
    batch, labels = tensors(docs)
    out = model(**batch, labels=labels)
    found = [direct.link(model, document, ENTITIES, keep_gold) for document in docs]
    written = [row for each in found for row in each["scores"]]
    for k, row in enumerate(written):
        np.testing.assert_allclose(out.scores[k, : len(row)].detach().numpy(), row, atol=1e-6)
        assert torch.isneginf(out.scores[k, len(row) :]).all()
    losses = {name: [x for each in found for x in each[name]] for name in ("ranking", "triplet")}
    for name, values in losses.items():
        assert out.losses[name].item() == pytest.approx(np.mean(values) if values else 0, abs=1e-6)
    expected = sum(np.mean(values) for values in losses.values() if values)
    costs = [each["cost"] for each in found if each["cost"] is not None]
    if model.config.joint == "transport":
        assert out.losses["transport"].item() == pytest.approx(np.mean(costs) if costs else 0, abs=1e-6)
        expected += np.mean(costs) if costs else 0
        plan, first = torch.zeros(len(labels), len(labels), dtype=torch.float64), 0
        for document, each in zip(docs, found, strict=True):
            if each["plan"] is not None:
                rows = torch.tensor([first + k for k in each["textual"]]).unsqueeze(1)
                plan[rows, torch.tensor([first + k for k in each["visual"]])] = torch.from_numpy(each["plan"])
            first += len(document)
        torch.testing.assert_close(out.plan, plan, atol=1e-7, rtol=0)
        assert out.plan.sum().item() == pytest.approx(len(costs))
    else:
        assert out.plan is None
        assert "transport" not in out.losses
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)  # eq. 11
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"joint": "none"},
        {"num_relations": 0, "mention_in_context": True},
        {"prior_candidates": 2, "context_candidates": 2, "num_candidates": 5, "lbp_damping": 1.0},
        {"gw_weight": 0, "transport_matches": 2, "lbp_iterations": 1},
        {"gw_weight": 1, "transport_matches": None, "correction_weight": 2.0, "num_relations": 1},
        {"transport_weight": 1, "transport_backend": "pot", "context_candidates": 0},
    ],
    ids=str,
)
def test_the_whole_model_is_the_loops(fields):
    found = check(build(**fields), documents(seed=3))
    assert sum(len(each["ranking"]) for each in found) > 3
    assert sum(len(each["triplet"]) for each in found) > 1


def test_in_training_the_gold_is_kept():
    model = build(prior_candidates=1, context_candidates=1, dropout=0, image_dropout=0).train()
    docs = documents(("tttt", "tt"), seed=5)
    golds = {m["gold"] for d in docs for m in d}
    found = check(model, docs, keep_gold=True)
    assert sum(len(each["ranking"]) for each in found) == 6
    assert sum(len(each["ranking"]) for each in check(model.eval(), docs)) < 6
    assert len(golds) > 1


def test_relations_are_normalised_over_mentions():
    model, n = build(), 5
    mentions = torch.randn(2, n, 8, dtype=torch.float64)
    there = torch.tensor([[True] * 5, [True, True, True, False, False]])
    alpha = model.relations.weights(mentions, there)
    for g, count in enumerate((5, 3)):
        written = direct.alpha(direct.weights(model), mentions[g, :count].numpy())
        np.testing.assert_allclose(alpha[g, :, :count, :count].permute(1, 2, 0).detach(), written, atol=1e-12)
        assert torch.allclose(alpha[g, :, :count].sum(-1), torch.ones((), dtype=torch.float64))
        assert not alpha[g, :, count:].any()
        assert not alpha[g, :, :, count:].any()


def brute_max_marginals(local, pair):
    """By enumeration: for each mention and candidate, the best total with it (eq. 1)."""
    n = len(local)
    best = [np.full(len(each), -np.inf) for each in local]
    for choice in itertools.product(*(range(len(each)) for each in local)):
        total = sum(local[i][a] for i, a in enumerate(choice))
        total += sum(pair[i][j][a][b] for i, a in enumerate(choice) for j, b in enumerate(choice) if i < j)
        for i in range(n):
            best[i][choice[i]] = max(best[i][choice[i]], total)
    return best


@pytest.mark.parametrize("edges", [[(0, 1)], [(0, 1), (1, 2), (1, 3)], [(0, 1), (1, 2), (2, 3)]], ids=str)
def test_belief_propagation_is_exact_on_trees(edges):
    draw = np.random.default_rng(1)
    n, width = max(j for _, j in edges) + 1, 4
    sizes = [4, 2, 3, 4][:n]
    local = np.zeros((1, n, width))
    mask = np.zeros((1, n, width), bool)
    pairs = np.zeros((1, n, n, width, width))
    for i, size in enumerate(sizes):
        local[0, i, :size], mask[0, i, :size] = draw.normal(size=size) * 3, True
    for i, j in edges:
        pairs[0, i, j] = draw.normal(size=(width, width)) * 3
        pairs[0, j, i] = pairs[0, i, j].T
    found = max_product(*(torch.from_numpy(x) for x in (local, pairs, mask)), 10, 1.0)[0].numpy()
    exact = brute_max_marginals([local[0, i, :s] for i, s in enumerate(sizes)], pairs[0])
    for i, size in enumerate(sizes):
        expected = exact[i] - exact[i].max()
        np.testing.assert_allclose(found[i, :size] - found[i, :size].max(), expected, atol=1e-9)
        assert not found[i, size:].any()


def test_documents_together_are_each_alone():
    """Padding, order of mentions, blocks of belief propagation: nothing of it changes a score or a gradient."""
    model, docs = build(), documents(seed=7)
    batch, labels = tensors(docs)
    whole = model(**batch).scores.detach()
    first = 0
    for document in docs:
        scores = model(**tensors([document])[0]).scores.detach()
        torch.testing.assert_close(whole[first : first + len(document), : scores.shape[1]], scores)
        first += len(document)
    padded = model(**tensors(docs, columns=12, extra=5)[0]).scores.detach()
    torch.testing.assert_close(padded[:, : whole.shape[1]], whole)
    order = np.random.default_rng(0).permutation(len(labels))
    mixed = model(**tensors(docs, order=order)[0]).scores.detach()
    torch.testing.assert_close(mixed, whole[order])


@pytest.mark.parametrize("budget", [1, 300, 2000])
def test_blocks_do_not_change_scores(monkeypatch, budget):
    model, (batch, labels) = build(joint="none"), tensors(documents(("ttt", "t", "tttt", "tt", "tt"), seed=2))
    grads, scores = [], []
    for size in (2**22, budget):
        monkeypatch.setattr(modeling_mm_nel, "_BLOCK_ELEMENTS", {"cpu": size})
        model.zero_grad()
        out = model(**batch, labels=labels)
        out.loss.backward()
        scores.append(out.scores.detach())
        grads.append(model.relations.mention.grad.clone())
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


def test_permuted_candidates_have_permuted_scores():
    model, docs = build(), documents(seed=11)
    turned = [[{**m, "candidates": m["candidates"][::-1]} for m in document] for document in docs]
    scores, backwards = (model(**tensors(each)[0]).scores.detach() for each in (docs, turned))
    for k, mention in enumerate(m for document in docs for m in document):
        size = len(mention["candidates"])
        torch.testing.assert_close(scores[k, :size].flip(0), backwards[k, :size])


def test_masked_cells_count_for_nothing():
    model, (batch, labels) = build(), tensors(documents(seed=1), columns=11)
    rubbish = {name: value.clone() for name, value in batch.items()}
    rubbish["pair_prior"][~batch["pair_mask"]] = float("nan")
    rubbish["pair_entity"][~batch["pair_mask"]] = 2
    rubbish["pair_entity_image"][~batch["pair_mask"]] = 1
    found = []
    for each in (batch, rubbish):
        model.zero_grad()
        out = model(**each, labels=labels)
        out.loss.backward()
        found.append((out.scores.detach(), out.loss.detach(), model.local.score.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_unusual_documents():
    """A mention without context, without candidates, without prior, with equal candidates, an image that is missing."""
    docs = documents(("ttv", "vv", "tv"), seed=4)
    docs[0][0].update(left=[], own=[], right=[])
    docs[0][1]["candidates"] = [{"entity": 3, "prior": 0.0}] * 3
    docs[1][0]["image"] = None
    docs[2][0].update(candidates=[], gold=None)
    model = build()
    check(model, docs)
    batch, labels = tensors(docs)
    del batch["pair_prior"]
    out = model(**batch)
    assert out.scores[batch["pair_mask"]].isfinite().all()
    assert out.loss is None
    equal = out.scores[1, :3]
    torch.testing.assert_close(equal, equal[:1].expand(3))
    batch["pair_mask"][:] = False
    out = model(**batch, labels=torch.full_like(labels, -100))
    out.loss.backward()
    assert out.loss.item() == 0
    assert torch.isneginf(out.scores).all()


def test_one_kind_of_mention_is_naive():
    for kinds in (("ttt", "t"), ("vv", "v")):
        batch, _ = tensors(documents(kinds, seed=6))
        torch.testing.assert_close(build()(**batch).scores, build(joint="none")(**batch).scores)


def test_cut_candidates_rank_after_the_others():
    model, (batch, _) = build(prior_candidates=2, context_candidates=1), tensors(documents(("t",) * 4, seed=8))
    scores = model(**batch).scores
    for k in range(4):
        size = int(batch["pair_mask"][k].sum())
        order = scores[k, :size].argsort(descending=True)
        priors = batch["pair_prior"][k, order[3:]]
        assert (priors.diff() <= 0).all()
        if size > 3:
            assert batch["pair_prior"][k, order[:3]].max() == batch["pair_prior"][k].max()
            drops = scores[k, order[2]] - scores[k, order[3:]]
            torch.testing.assert_close(drops, torch.arange(1, size - 2, dtype=drops.dtype))


# ---- transport


def problem(sizes=((4, 3), (2, 5), (1, 1), (3, 1)), seed=0):
    """Costs and distributions of documents, padded, as `transport_plan` takes them."""
    draw = np.random.default_rng(seed)
    n, m = (max(each) for each in zip(*sizes, strict=True))
    out = [np.zeros((len(sizes), *shape)) for shape in ((n, m), (n, n), (m, m), (n,), (m,))]
    for g, (a, b) in enumerate(sizes):
        x, y = draw.normal(size=(a, 5)), draw.normal(size=(b, 5))
        cross, within, other = direct.costs(list(x), list(y))
        out[0][g, :a, :b], out[1][g, :a, :a], out[2][g, :b, :b] = cross, within, other
        out[3][g, :a], out[4][g, :b] = 1 / a, 1 / b
        out[0][g, a:] = out[0][g, :, b:] = 7.0  # padding must not matter
    return [torch.from_numpy(each) for each in out]


def logs(p):
    return torch.where(p > 0, p, 1.0).log().masked_fill(p <= 0, -1e9)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.02])
def test_sinkhorn_is_that_of_pot(beta):
    cross, _, _, p, q = problem()
    plan, _, off = sinkhorn(cross, logs(p), logs(q), beta, 20000, 1e-11)
    assert (off <= 1e-11).all()
    for g in range(len(p)):
        a, b = int((p[g] > 0).sum()), int((q[g] > 0).sum())
        expected = ot.bregman.sinkhorn_log(
            p[g, :a].numpy(), q[g, :b].numpy(), cross[g, :a, :b].numpy(), beta, numItermax=20000, stopThr=1e-12
        )
        np.testing.assert_allclose(plan[g, :a, :b], expected, atol=1e-9)
        np.testing.assert_allclose(plan[g, :a, :b], direct.scaling(cross[g, :a, :b].numpy(), beta), atol=1e-9)
        assert plan[g].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("gw_weight", [0.0, 0.5, 1.0])
def test_the_plan_is_that_of_pot(gw_weight):
    arguments = (*problem(), 0.1, gw_weight, 300, 5000, 1e-10)
    plan, residual = transport_plan(*arguments)
    assert (residual <= 1e-10).all()
    theirs, residual = pot_plan(*arguments)
    assert (residual <= 1e-9).all()
    torch.testing.assert_close(plan, theirs, atol=1e-8, rtol=0)


def test_the_cost_is_the_sum_over_four_indices():
    cross, within, other, p, q = problem()
    plan, _ = transport_plan(cross, within, other, p, q, 0.1, 0.3, 300, 5000, 1e-10)
    cost = transport_cost(cross, within, other, plan, p, q, 0.3)
    for g in range(len(p)):
        a, b = int((p[g] > 0).sum()), int((q[g] > 0).sum())
        t = plan[g, :a, :b].numpy()
        quadruple = (t * direct.pair_cost(within[g, :a, :a].numpy(), other[g, :b, :b].numpy(), t)).sum()
        expected = 0.7 * (t * cross[g, :a, :b].numpy()).sum() + 0.3 * quadruple
        assert cost[g].item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("what", ["plan", "cost"])
def test_gradients_through_transport_are_finite_differences(what):
    torch.manual_seed(3)
    x, y = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    p, q = (torch.tensor(mass, dtype=torch.float64) for mass in ([[1 / 3] * 3, [0.5, 0.5, 0]], [[0.5, 0.5]] * 2))
    readout = torch.randn(2, 3, 2, dtype=torch.float64)
    x.requires_grad_()
    y.requires_grad_()

    def value(x, y):
        u, v = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)
        costs = 1 - u @ v.mT, 1 - u @ u.mT, 1 - v @ v.mT
        plan, _ = transport_plan(*costs, p, q, 0.5, 0.5, 100, 500, 1e-11)
        return (plan * readout).sum() if what == "plan" else transport_cost(*costs, plan, p, q, 0.5).sum()

    assert torch.autograd.gradcheck(value, (x, y), eps=1e-5, atol=1e-6)


def test_converged_documents_do_not_wait_for_others():
    """A document that needs many iterations leaves the plan of the others as it is, to the last digit."""
    cross, within, other, p, q = problem(((4, 3), (4, 3)))
    cross[1] *= 20
    together, _ = transport_plan(cross, within, other, p, q, 0.1, 0.2, 20, 3000, 1e-8)
    alone, _ = transport_plan(cross[:1], within[:1], other[:1], p[:1], q[:1], 0.1, 0.2, 20, 3000, 1e-8)
    torch.testing.assert_close(together[:1], alone, atol=1e-15, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "pot"])
@pytest.mark.parametrize("limit", [{"sinkhorn_iterations": 1, "gw_iterations": 3}, {"gw_iterations": 1}], ids=str)
def test_a_plan_that_does_not_converge_is_not_used(backend, limit):
    batch, labels = tensors(documents(("tttvv", "vt"), seed=9))
    model = build(transport_backend=backend, beta=0.02, **limit)
    with pytest.warns(RuntimeWarning, match=r"residual up to \d") as caught:
        out = model(**batch, labels=labels)
    assert "2 of 2" in str(caught[0].message) or "1 of 2" in str(caught[0].message)
    naive = build(joint="none")(**batch).scores
    torch.testing.assert_close(out.scores[:5], naive[:5])
    assert not out.plan[:5].any()


def test_with_nan_features_there_is_no_plan():
    model, (batch, _) = build(), tensors(documents(("ttv", "tv"), seed=9))
    del batch["pair_pixel_values"]
    features = torch.randn(30, 8, dtype=torch.float64)
    features[batch["pair_mention_image"][2]] = float("nan")
    with pytest.warns(RuntimeWarning, match="1 of 2 documents"):
        out = model(**batch, pair_image_features=features)
    assert not out.plan[:3].any()
    assert out.plan[3, 4] == 1
    assert out.scores[2][batch["pair_mask"][2]].isnan().all()
    assert not out.scores[[0, 1, 3, 4]].isnan().any()


def test_pot_is_only_needed_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    batch, _ = tensors(documents(("tv",)))
    build()(**batch)
    with pytest.raises(ImportError, match="pip install"):
        build(transport_backend="pot")(**batch)


def test_transport_adds_what_the_other_modality_knows():
    """A visual mention that cannot tell its candidates apart follows the textual one it is matched with."""
    docs = documents(("tv",), seed=12)
    text, image = docs[0]
    shared = [c for c in text["candidates"] if ENTITIES[c["entity"]]["image"] is not None][:3]
    text["candidates"] = shared
    image["candidates"] = shared[::-1]
    batch, _ = tensors(docs)
    del batch["pair_pixel_values"]
    features = torch.ones(30, 8, dtype=torch.float64)
    scores = build()(**batch, pair_image_features=features).scores
    assert (scores[1, :3].argsort() == scores[0, :3].flip(0).argsort()).all()


# ---- images


def test_pixels_are_their_features():
    model, (batch, _) = build(), tensors(documents(seed=3))
    with torch.no_grad():
        scores = model(**batch).scores
        pixels = batch.pop("pair_pixel_values")
        features = model.encode_images(pixels)
        torch.testing.assert_close(model(**batch, pair_image_features=features).scores, scores)
    assert features.shape == (len(pixels), 8)
    w = direct.weights(model)
    for k in (0, 5):
        np.testing.assert_allclose(features[k], direct.image_vector(w, model.config, pixels[k].numpy()), atol=1e-10)


VISIONS = {
    "resnet": ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"),
    "vit": ViTConfig(
        hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    ),
    "clip": CLIPVisionConfig(
        hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    ),
}


@pytest.mark.parametrize(("name", "learns"), [("resnet", True), ("resnet", False), ("vit", True), ("clip", False)])
def test_any_image_encoder(name, learns, tmp_path):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(VISIONS[name])
    encoder.save_pretrained(tmp_path / "vision")
    table(tmp_path / "words.txt")
    fields = {f: SMALL[f] for f in ("hidden_size", "num_image_layers", "num_attention_heads", "intermediate_size")}
    model = MmNelModel.from_backbones(
        text=str(tmp_path / "words.txt"), vision=str(tmp_path / "vision"), train_vision=learns, **fields
    ).train()
    assert str(tmp_path) not in model.config.to_json_string()
    own = model.vision_model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in encoder.state_dict().items() if key in own)
    images = torch.randn(2, 3, 32, 32)
    model.encode_images(images).sum().backward()
    assert any(p.grad is not None for p in model.vision_model.parameters()) == learns
    assert all(p.grad is not None for p in model.image_encoder.parameters())
    assert not model.image_features_are_fixed
    with torch.no_grad():  # two patches of the last row change places, so another piece is another embedding
        moved = images.clone()
        moved[..., 24:, :8], moved[..., 24:, 8:16] = images[..., 24:, 8:16], images[..., 24:, :8]
        model.eval()
        assert not torch.allclose(model.encode_images(images), model.encode_images(moved), atol=1e-6)


# ---- words


def table(file, words=("a", "b", "c", "d"), dim=6):
    rows = torch.arange(len(words) * dim).view(-1, dim) / 10
    file.write_text("".join(f"{word} {' '.join(map(str, row.tolist()))}\n" for word, row in zip(words, rows)))  # noqa: B905
    return rows


def test_word_vectors_of_a_file(tmp_path):
    rows = table(tmp_path / "words.txt")
    model = MmNelModel.from_backbones(text=str(tmp_path / "words.txt"), image_size=None)
    assert (model.config.vocab_size, model.config.word_dim) == (6, 6)
    torch.testing.assert_close(model.word_embeddings.weight, torch.cat([torch.zeros(2, 6), rows]))
    assert not model.word_embeddings.weight.requires_grad
    assert torch.equal(model.entity_vectors.name_map.weight, torch.eye(6))
    learning = MmNelModel.from_backbones(text=str(tmp_path / "words.txt"), image_size=None, train_words=True)
    assert learning.word_embeddings.weight.requires_grad


def test_word_vectors_of_a_transformers_model(tmp_path):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=20, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    bert.save_pretrained(tmp_path)
    model = MmNelModel.from_backbones(text=str(tmp_path), image_size=None)
    assert torch.equal(model.word_embeddings.weight, bert.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="word vectors"):
        MmNelModel.from_backbones()


# ---- the model as one of the library's


@pytest.mark.parametrize("fields", [{}, {"image_size": None}, {"num_relations": 0}], ids=str)
def test_save_and_load(tmp_path, fields):
    model = build(**fields)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, MmNelModel)
    assert isinstance(loaded, Reranker)
    assert (loaded.example_unit, loaded.pairs_are_independent) == ("document", False)
    assert not hasattr(loaded, "rank_jointly")
    assert not any(info.values())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert not loaded.word_embeddings.weight.requires_grad
    batch, _ = tensors(documents(("tt", "t") if fields.get("image_size", 1) is None else ("ttv", "v")))
    torch.testing.assert_close(loaded(**batch).scores, model(**batch).scores)


def test_remote_code_loads_without_the_package(tmp_path):
    for cls, auto in ((MmNelConfig, "AutoConfig"), (MmNelModel, "AutoModel")):
        cls.register_for_auto_class(auto)
    model, (batch, _) = build(), tensors(documents())
    model.save_pretrained(tmp_path)
    torch.save((batch, model(**batch).scores.detach()), tmp_path / "batch.pt")
    program = f"""
import sys
sys.modules["hf_mel"] = sys.modules["ot"] = None  # any import of them fails
import torch
from transformers import AutoModel
batch, scores = torch.load({str(tmp_path / "batch.pt")!r})
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(**batch).scores, scores, atol=1e-5, rtol=1e-5)
assert type(model).__module__.startswith("transformers_modules"), type(model)
print("loaded")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "loaded", run.stderr


def test_everything_learns():
    model, (batch, labels) = build(train_words=True).train(), tensors(documents(("tttvv", "ttvv", "tv"), seed=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch, labels=labels).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_it_learns_what_it_is_shown():
    torch.manual_seed(0)
    model = build(dropout=0, image_dropout=0, num_image_layers=1, joint="none").train()
    batch, labels = tensors(documents(("ttv", "tvv"), candidates=5, seed=2))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(25):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_autocast_gives_scores_to_rank_by():
    model, (batch, labels) = build().float(), tensors(documents())
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    exact = model(**batch).scores
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, labels=labels)
    assert out.scores.dtype == out.loss.dtype == torch.float32
    real = batch["pair_mask"] & ~batch["pair_visual"].unsqueeze(1)
    assert out.scores[real].isfinite().all()
    naive = build(joint="none").float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(naive(**batch).scores[real], naive(**batch).scores[real])
    assert exact.dtype == torch.float32


# ---- what does not work says so


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"joint": "maybe"}, ["joint='maybe'", "'transport'"]),
        ({"transport_backend": "gpu"}, ["transport_backend", "'pot'"]),
        ({"image_size": 20}, ["image_size=20", "multiple of 8"]),
        ({"hidden_size": 10, "num_attention_heads": 3}, ["hidden_size=10", "num_attention_heads=3"]),
        ({"beta": 0}, ["beta=0"]),
        ({"lbp_damping": 0.0}, ["lbp_damping=0.0"]),
        ({"gw_weight": 1.5}, ["gw_weight=1.5"]),
        ({"prior_candidates": 0, "context_candidates": 0}, ["both 0"]),
        ({"num_relations": -1}, ["num_relations=-1"]),
        ({"transport_matches": 0}, ["transport_matches=0"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"train_vision": True}, ["vision_config"]),
    ],
    ids=str,
)
def test_impossible_configurations_say_why(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MmNelConfig(**fields)
    assert all(word in str(error.value) for word in words)


def test_the_default_configuration_is_the_papers():
    config = MmNelConfig()
    assert (config.hidden_size, config.gamma, config.dropout, config.relation_window) == (300, 0.01, 0.3, 6)
    assert (config.num_candidates, config.prior_candidates, config.context_candidates) == (30, 4, 3)
    assert (config.num_image_layers, config.joint) == (6, "transport")
    with torch.device("meta"):
        model = MmNelModel(config)
    assert tuple(model.image_encoder.position.weight.shape) == (64, 300)


def test_bad_input_says_why():
    batch, labels = tensors(documents(("tv",)))
    with pytest.raises(ValueError, match="sees no images"):
        build(image_size=None)(**batch)
    with pytest.raises(ValueError, match="sees no images"):
        build(image_size=None).encode_images(batch["pair_pixel_values"])
    with pytest.raises(ValueError, match="image_size=32"):
        build(image_size=32)(**batch)
    with pytest.raises(ValueError, match="pair_pixel_values"):
        build()(**{k: v for k, v in batch.items() if k != "pair_pixel_values"})
    with pytest.raises(ValueError, match="use_images=True"):
        build()(**{k: v for k, v in batch.items() if "image" not in k})
    labels[0] = 20
    with pytest.raises(ValueError, match="column without a candidate"):
        build()(**batch, labels=labels)

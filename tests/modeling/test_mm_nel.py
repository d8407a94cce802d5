"""Tests of MM-nel's model: equations against NumPy loops, belief propagation against enumeration, transport against POT."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings

import numpy as np
import ot
import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, ResNetConfig, ViTConfig

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.mm_nel import MmNelConfig, MmNelModel, modeling_mm_nel
from hf_mel.modeling.mm_nel.transport_mm_nel import LOG_ZERO, max_product, sinkhorn, transport_cost, transport_plan
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
    with torch.no_grad():  # initial ones, zeros or identities would hide a part that is not applied
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


def make_entities(count=14, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {
            "name": draw.integers(0, 30, draw.integers(1, 4)).tolist(),
            "facts": draw.integers(0, 30, draw.integers(0, 6)).tolist(),
            "image": draw.normal(size=(3, 16, 16)) if k % 5 != 3 else None,
        }
        for k in range(count)
    ]


ENTITIES = make_entities()


def documents(kinds=("tttvv", "tv", "tt", "v", "t"), candidates=9, seed=0):
    """Returns random documents of textual ("t") and visual ("v") mentions."""
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
                for part, limit in (("left", 6), ("inside", 3), ("right", 6)):
                    mention[part] = draw.integers(0, 30, draw.integers(0, limit)).tolist()
            else:
                mention["image"] = draw.normal(size=(3, 16, 16))
            document.append(mention)
        out.append(document)
    return out


def tensors(docs, columns=0, extra=0, order=None):
    """Returns the inputs that a processor would make of documents, and labels."""
    rows = [(number, mention) for number, document in enumerate(docs) for mention in document]
    if order is not None:
        rows = [rows[k] for k in order]
    c = max([columns, 1, *(len(mention["candidates"]) for _, mention in rows)])
    m = len(rows)
    length = extra + max([1, *(sum(len(r.get(s, [])) for s in ("left", "inside", "right")) for _, r in rows)])
    batch = {
        "pair_mask": torch.zeros(m, c, dtype=torch.bool),
        "pair_context": torch.tensor([number for number, _ in rows]),
        "pair_visual": torch.tensor(["inside" not in mention for _, mention in rows]),
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
    images, numbers = [], {}
    for e, entity in enumerate(ENTITIES):
        batch["pair_name_ids"][e, : len(entity["name"])] = torch.tensor(entity["name"])
        batch["pair_fact_ids"][e, : len(entity["facts"])] = torch.tensor(entity["facts"], dtype=torch.long)
        if entity["image"] is not None:
            numbers[e] = len(images)
            images.append(entity["image"])
    for k, (_, mention) in enumerate(rows):
        for j, candidate in enumerate(mention["candidates"]):
            batch["pair_mask"][k, j] = True
            batch["pair_prior"][k, j] = candidate["prior"]
            batch["pair_entity"][k, j] = candidate["entity"]
            if "inside" not in mention:
                batch["pair_entity_image"][k, j] = numbers.get(candidate["entity"], -1)
        if mention["gold"] is not None:
            labels[k] = mention["gold"]
        if "inside" in mention:
            words = [*mention["left"], *mention["inside"], *mention["right"]]
            batch["pair_word_ids"][k, : len(words)] = torch.tensor(words, dtype=torch.long)
            start = len(mention["left"])
            batch["pair_span"][k] = torch.tensor([start, start + len(mention["inside"])])
        elif mention["image"] is not None:
            batch["pair_mention_image"][k] = len(images)
            images.append(mention["image"])
    batch["pair_pixel_values"] = torch.from_numpy(np.stack(images))
    return batch, labels


def check(model, docs, keep_gold=False):
    """Compares scores, losses and plans of the model with those of the loops, and returns the latter."""
    model.config.transport_tolerance = 1e-9
    batch, labels = tensors(docs)
    out = model(**batch, labels=labels)
    linked = [direct.link(model, document, ENTITIES, keep_gold) for document in docs]
    rows = [row for document in linked for row in document["scores"]]
    for k, row in enumerate(rows):
        np.testing.assert_allclose(out.scores[k, : len(row)].detach().numpy(), row, atol=1e-6)
        assert torch.isneginf(out.scores[k, len(row) :]).all()
    losses = {name: [x for document in linked for x in document[name]] for name in ("ranking", "triplet")}
    for name, values in losses.items():
        assert out.losses[name].item() == pytest.approx(np.mean(values) if values else 0, abs=1e-6)
    expected = sum(np.mean(values) for values in losses.values() if values)
    costs = [document["cost"] for document in linked if document["cost"] is not None]
    if model.config.joint == "transport":
        assert out.losses["transport"].item() == pytest.approx(np.mean(costs) if costs else 0, abs=1e-6)
        expected += np.mean(costs) if costs else 0
        plan, first = torch.zeros(len(labels), len(labels), dtype=torch.float64), 0
        for document in linked:
            if document["plan"] is not None:
                rows = torch.tensor([first + k for k in document["textual"]]).unsqueeze(1)
                columns = torch.tensor([first + k for k in document["visual"]])
                plan[rows, columns] = torch.from_numpy(document["plan"])
            first += len(document["scores"])
        torch.testing.assert_close(out.plan, plan, atol=1e-7, rtol=0)
        assert out.plan.sum().item() == pytest.approx(len(costs))
    else:
        assert out.plan is None
        assert "transport" not in out.losses
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)  # eq. 11
    return linked


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"joint": "none"},
        {"num_relations": 0, "mention_in_context": True},
        {"prior_candidates": 2, "context_candidates": 2, "num_candidates": 5, "lbp_damping": 1.0},
        {"gw_weight": 0, "transport_matches": 2, "lbp_iterations": 1},
        {"gw_weight": 1, "transport_matches": None, "correction_weight": 2.0, "num_relations": 1},
        {"transport_weight": 1, "context_candidates": 0},
        {"agreement_weight": 0.5, "image_correction_weight": 0.2, "triplet_reduction": "sum"},
        {"agreement_weight": 1, "gw_weight": 0, "image_correction_weight": 0, "context_candidates": 0},
        {"joint": "none", "num_relations": 1, "uniform_relations": True, "score_max_norm": 1},
    ],
    ids=str,
)
def test_the_whole_model_equals_loops(fields):
    linked = check(build(**fields), documents(seed=3))
    assert sum(len(document["ranking"]) for document in linked) > 3
    assert sum(len(document["triplet"]) for document in linked) > 1


def test_the_whole_model_equals_loops_with_the_solver_of_pot(monkeypatch):
    monkeypatch.setattr(modeling_mm_nel, "transport_plan", pot_plan)
    linked = check(build(context_candidates=0), documents(seed=3))
    assert sum(len(document["ranking"]) for document in linked) > 3
    assert sum(len(document["triplet"]) for document in linked) > 1


def test_training_keeps_the_gold_among_the_candidates():
    model = build(prior_candidates=1, context_candidates=1, dropout=0, image_dropout=0).train()
    docs = documents(("tttt", "tt"), seed=5)
    golds = {m["gold"] for d in docs for m in d}
    linked = check(model, docs, keep_gold=True)
    assert sum(len(document["ranking"]) for document in linked) == 6
    assert sum(len(document["ranking"]) for document in check(model.eval(), docs)) < 6
    assert len(golds) > 1


def test_relations_are_normalised_over_mentions():
    model, n = build(), 5
    mentions = torch.randn(2, n, 8, dtype=torch.float64)
    present = torch.tensor([[True] * 5, [True, True, True, False, False]])
    alpha = model.relations.weights(mentions, present)
    for g, count in enumerate((5, 3)):
        expected = direct.alpha(direct.weights(model), mentions[g, :count].numpy())
        np.testing.assert_allclose(alpha[g, :, :count, :count].permute(1, 2, 0).detach(), expected, atol=1e-12)
        assert torch.allclose(alpha[g, :, :count].sum(-1), torch.ones((), dtype=torch.float64))
        assert not alpha[g, :, count:].any()
        assert not alpha[g, :, :, count:].any()


def brute_max_marginals(local, pair):
    """Returns for each candidate the best total of eq. 1 that includes it, by enumeration."""
    n = len(local)
    best = [np.full(len(row), -np.inf) for row in local]
    for choice in itertools.product(*(range(len(row)) for row in local)):
        total = sum(local[i][a] for i, a in enumerate(choice))
        total += sum(pair[i][j][a][b] for i, a in enumerate(choice) for j, b in enumerate(choice) if i < j)
        for i in range(n):
            best[i][choice[i]] = max(best[i][choice[i]], total)
    return best


def test_uniform_relations_of_two_mentions_are_exact():
    """Two mentions with two candidates: belief propagation equals all four assignments of Ganea and Hofmann's score."""
    model = build(num_relations=1, uniform_relations=True, lbp_damping=1.0)
    draw = torch.Generator().manual_seed(0)
    entities = torch.randn(1, 2, 2, 6, generator=draw, dtype=torch.float64)
    psi = torch.randn(1, 2, 2, generator=draw, dtype=torch.float64)
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    pairs = model.relations(entities, torch.zeros(1, 2, 8, dtype=torch.float64), mask[..., 0])
    marginals = max_product(psi, pairs, mask, 10, 1.0)[0].detach().numpy()
    relation = model.relations.entity[0].detach().numpy()
    best = np.full((2, 2), -np.inf)
    for a, b in itertools.product(range(2), repeat=2):
        coherence = 2 / (2 - 1) * sum(entities[0, 0, a].numpy() * relation * entities[0, 1, b].numpy())
        total = psi[0, 0, a].item() + psi[0, 1, b].item() + coherence
        best[0, a], best[1, b] = max(best[0, a], total), max(best[1, b], total)
    np.testing.assert_allclose(marginals[:, 0] - marginals[:, 1], best[:, 0] - best[:, 1], atol=1e-9)


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
    log_marginals = max_product(*(torch.from_numpy(x) for x in (local, pairs, mask)), 10, 1.0)[0].numpy()
    exact = brute_max_marginals([local[0, i, :s] for i, s in enumerate(sizes)], pairs[0])
    for i, size in enumerate(sizes):
        expected = exact[i] - exact[i].max()
        np.testing.assert_allclose(log_marginals[i, :size] - log_marginals[i, :size].max(), expected, atol=1e-9)
        assert not log_marginals[i, size:].any()


def test_the_rest_of_the_batch_does_not_change_scores():
    """Other documents, padding and the order of mentions have no influence."""
    model, docs = build(), documents(seed=7)
    batch, labels = tensors(docs)
    expected = model(**batch).scores.detach()
    first = 0
    for document in docs:
        scores = model(**tensors([document])[0]).scores.detach()
        torch.testing.assert_close(expected[first : first + len(document), : scores.shape[1]], scores)
        first += len(document)
    padded = model(**tensors(docs, columns=12, extra=5)[0]).scores.detach()
    torch.testing.assert_close(padded[:, : expected.shape[1]], expected)
    order = np.random.default_rng(0).permutation(len(labels))
    mixed = model(**tensors(docs, order=order)[0]).scores.detach()
    torch.testing.assert_close(mixed, expected[order])


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


def test_permuted_candidates_get_permuted_scores():
    model, docs = build(), documents(seed=11)
    turned = [[{**m, "candidates": m["candidates"][::-1]} for m in document] for document in docs]
    scores, backwards = (model(**tensors(variant)[0]).scores.detach() for variant in (docs, turned))
    for k, mention in enumerate(m for document in docs for m in document):
        size = len(mention["candidates"])
        torch.testing.assert_close(scores[k, :size].flip(0), backwards[k, :size])


def test_masked_cells_have_no_influence():
    model, (batch, labels) = build(), tensors(documents(seed=1), columns=11)
    garbage = {name: value.clone() for name, value in batch.items()}
    garbage["pair_prior"][~batch["pair_mask"]] = float("nan")
    garbage["pair_entity"][~batch["pair_mask"]] = 2
    garbage["pair_entity_image"][~batch["pair_mask"]] = 1
    results = []
    for inputs in (batch, garbage):
        model.zero_grad()
        out = model(**inputs, labels=labels)
        out.loss.backward()
        results.append((out.scores.detach(), out.loss.detach(), model.local.score.grad.clone()))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_unusual_documents_equal_loops():
    """Documents with a mention without context, without candidates, with equal candidates or without an image."""
    docs = documents(("ttv", "vv", "tv"), seed=4)
    docs[0][0].update(left=[], inside=[], right=[])
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


def test_documents_of_one_modality_equal_the_naive_model():
    for kinds in (("ttt", "t"), ("vv", "v")):
        batch, _ = tensors(documents(kinds, seed=6))
        torch.testing.assert_close(build()(**batch).scores, build(joint="none")(**batch).scores)


def test_cut_candidates_rank_below_the_others():
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
    """Returns padded costs and marginals of documents, in the order of the arguments of `transport_plan`."""
    draw = np.random.default_rng(seed)
    n, m = (max(counts) for counts in zip(*sizes, strict=True))
    out = [np.zeros((len(sizes), *shape)) for shape in ((n, m), (n, n), (m, m), (n,), (m,))]
    for g, (a, b) in enumerate(sizes):
        x, y = draw.normal(size=(a, 5)), draw.normal(size=(b, 5))
        cross, within, other = direct.costs(list(x), list(y))
        out[0][g, :a, :b], out[1][g, :a, :a], out[2][g, :b, :b] = cross, within, other
        out[3][g, :a], out[4][g, :b] = 1 / a, 1 / b
        out[0][g, a:] = out[0][g, :, b:] = 7.0  # padding must not matter
    return [torch.from_numpy(array) for array in out]


def pot_plan(
    cross, within, within_other, p, q, beta, gw_weight, gw_iterations, sinkhorn_iterations, tolerance
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solves the problem of `transport_plan` with the POT library, one document after the other, without gradients."""
    plan, residual = torch.zeros_like(cross), torch.zeros_like(p[:, 0])
    for k in range(len(cross)):
        i, j = p[k] > 0, q[k] > 0
        c, c1, c2 = cross[k][i][:, j], within[k][i][:, i], within_other[k][j][:, j]
        c, c1, c2, a, b = (x.detach().cpu().double().numpy() for x in (c, c1, c2, p[k][i], q[k][j]))
        options = {"symmetric": True, "numItermax": sinkhorn_iterations, "stopThr": tolerance / 10, "warn": False}
        problem = (c, c1, c2, a, b, "square_loss", beta)
        solve = ot.gromov.entropic_fused_gromov_wasserstein
        solution = solve(*problem, alpha=gw_weight, max_iter=gw_iterations, tol=tolerance, **options)
        # POT does not always report its error, so one more step measures it.
        again = solve(*problem, alpha=gw_weight, max_iter=1, G0=solution, **options)
        plan[k][i.unsqueeze(1) & j] = torch.from_numpy(solution).to(plan).flatten()
        margins = abs(solution.sum(1) - a).sum(), abs(solution.sum(0) - b).sum()
        residual[k] = float(np.max([*margins, abs(again - solution).sum()]))  # nan if any of them is
    return plan, residual


def logs(p):
    return torch.where(p > 0, p, 1.0).log().masked_fill(p <= 0, LOG_ZERO)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.02])
def test_sinkhorn_equals_pot(beta):
    cross, _, _, p, q = problem()
    plan, _, error = sinkhorn(cross, logs(p), logs(q), beta, 20000, 1e-11)
    assert (error <= 1e-11).all()
    for g in range(len(p)):
        a, b = int((p[g] > 0).sum()), int((q[g] > 0).sum())
        expected = ot.bregman.sinkhorn_log(
            p[g, :a].numpy(), q[g, :b].numpy(), cross[g, :a, :b].numpy(), beta, numItermax=20000, stopThr=1e-12
        )
        np.testing.assert_allclose(plan[g, :a, :b], expected, atol=1e-9)
        np.testing.assert_allclose(plan[g, :a, :b], direct.scaling(cross[g, :a, :b].numpy(), beta), atol=1e-9)
        assert plan[g].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("gw_weight", [0.0, 0.5, 1.0])
def test_the_plan_equals_that_of_pot(gw_weight):
    arguments = (*problem(), 0.1, gw_weight, 300, 5000, 1e-10)
    plan, residual = transport_plan(*arguments)
    assert (residual <= 1e-10).all()
    expected, residual = pot_plan(*arguments)
    assert (residual <= 1e-9).all()
    torch.testing.assert_close(plan, expected, atol=1e-8, rtol=0)


def test_the_cost_equals_a_sum_over_four_indices():
    cross, within, other, p, q = problem()
    plan, _ = transport_plan(cross, within, other, p, q, 0.1, 0.3, 300, 5000, 1e-10)
    cost = transport_cost(cross, within, other, plan, p, q, 0.3)
    for g in range(len(p)):
        a, b = int((p[g] > 0).sum()), int((q[g] > 0).sum())
        t = plan[g, :a, :b].numpy()
        quadruple = (t * direct.pair_cost(within[g, :a, :a].numpy(), other[g, :b, :b].numpy(), t)).sum()
        expected = 0.7 * (t * cross[g, :a, :b].numpy()).sum() + 0.3 * quadruple
        assert cost[g].item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("output", ["plan", "cost"])
def test_gradients_through_transport_equal_finite_differences(output):
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
        return (plan * readout).sum() if output == "plan" else transport_cost(*costs, plan, p, q, 0.5).sum()

    assert torch.autograd.gradcheck(value, (x, y), eps=1e-5, atol=1e-6)


def test_a_slow_document_does_not_change_the_plans_of_others():
    """The plan of a converged document stays the same to the last digit."""
    cross, within, other, p, q = problem(((4, 3), (4, 3)))
    cross[1] *= 20
    together, _ = transport_plan(cross, within, other, p, q, 0.1, 0.2, 20, 3000, 1e-8)
    alone, _ = transport_plan(cross[:1], within[:1], other[:1], p[:1], q[:1], 0.1, 0.2, 20, 3000, 1e-8)
    torch.testing.assert_close(together[:1], alone, atol=1e-15, rtol=0)


@pytest.mark.parametrize("limit", [{"sinkhorn_iterations": 1, "gw_iterations": 3}, {"gw_iterations": 1}], ids=str)
def test_a_plan_that_does_not_converge_is_not_used(limit):
    batch, labels = tensors(documents(("tttvv", "vt"), seed=9))
    model = build(beta=0.02, **limit)
    with pytest.warns(RuntimeWarning, match=r"residual up to \d") as caught:
        out = model(**batch, labels=labels)
    assert "2 of 2" in str(caught[0].message) or "1 of 2" in str(caught[0].message)
    naive = build(joint="none")(**batch).scores
    torch.testing.assert_close(out.scores[:5], naive[:5])
    assert not out.plan[:5].any()


def test_nan_features_give_no_plan():
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


@pytest.mark.parametrize("backend", ["torch", "pot"])
def test_a_configuration_with_the_former_pot_backend_loads(tmp_path, backend):
    model = build()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert "transport_backend" not in saved
    file.write_text(json.dumps(saved | {"transport_backend": backend}))
    if backend == "pot":
        with pytest.warns(FutureWarning, match="Remove the field"):
            loaded = AutoModel.from_pretrained(tmp_path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            loaded = AutoModel.from_pretrained(tmp_path)
    batch, _ = tensors(documents(("tv",)))
    torch.testing.assert_close(loaded(**batch).scores, model(**batch).scores)
    assert "transport_backend" not in loaded.config.to_dict()


def test_transport_adds_the_scores_of_the_other_modality():
    """A visual mention with equal scores takes over the order of its textual match."""
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


def test_pixels_and_their_features_give_the_same_scores():
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
def test_every_kind_of_image_encoder(name, learns, tmp_path):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(VISIONS[name])
    encoder.save_pretrained(tmp_path / "vision")
    write_word_vectors(tmp_path / "words.txt")
    fields = {f: SMALL[f] for f in ("hidden_size", "num_image_layers", "num_attention_heads", "intermediate_size")}
    model = MmNelModel.from_backbones(
        text=str(tmp_path / "words.txt"), vision=str(tmp_path / "vision"), train_vision=learns, **fields
    ).train()
    assert str(tmp_path) not in model.config.to_json_string()
    copied = model.vision_model.state_dict()
    assert all(torch.equal(value, copied[key]) for key, value in encoder.state_dict().items() if key in copied)
    images = torch.randn(2, 3, 32, 32)
    model.encode_images(images).sum().backward()
    assert any(p.grad is not None for p in model.vision_model.parameters()) == learns
    assert all(p.grad is not None for p in model.image_encoder.parameters())
    assert not getattr(model, "image_features_are_fixed", False)
    with torch.no_grad():  # swap two patches of the last row: pieces have positions
        moved = images.clone()
        moved[..., 24:, :8], moved[..., 24:, 8:16] = images[..., 24:, 8:16], images[..., 24:, :8]
        model.eval()
        assert not torch.allclose(model.encode_images(images), model.encode_images(moved), atol=1e-6)


# ---- words


def write_word_vectors(file, words=("a", "b", "c", "d"), dim=6):
    rows = torch.arange(len(words) * dim).view(-1, dim) / 10
    file.write_text("".join(f"{word} {' '.join(map(str, row.tolist()))}\n" for word, row in zip(words, rows)))  # noqa: B905
    return rows


def test_word_vectors_from_a_file(tmp_path):
    rows = write_word_vectors(tmp_path / "words.txt")
    model = MmNelModel.from_backbones(text=str(tmp_path / "words.txt"), image_size=None)
    assert (model.config.vocab_size, model.config.word_dim) == (6, 6)
    torch.testing.assert_close(model.word_embeddings.weight, torch.cat([torch.zeros(2, 6), rows]))
    assert not model.word_embeddings.weight.requires_grad
    assert torch.equal(model.entity_vectors.name_map.weight, torch.eye(6))
    learning = MmNelModel.from_backbones(text=str(tmp_path / "words.txt"), image_size=None, train_words=True)
    assert learning.word_embeddings.weight.requires_grad


def test_word_vectors_from_a_transformers_model(tmp_path):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=20, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    bert.save_pretrained(tmp_path)
    model = MmNelModel.from_backbones(text=str(tmp_path), image_size=None)
    assert torch.equal(model.word_embeddings.weight, bert.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="word vectors"):
        MmNelModel.from_backbones()


# ---- Hub and training


@pytest.mark.parametrize(
    "fields", [{}, {"image_size": None}, {"num_relations": 0}, {"uniform_relations": True}], ids=str
)
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
sys.modules["hf_mel"] = sys.modules["ot"] = None  # makes every import of them fail
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


def test_local_attention_starts_at_its_scale(tmp_path):
    model = MmNelModel(MmNelConfig(**SMALL, local_scale=20))
    with torch.no_grad():
        model.local.score[0] = 3
    model.save_pretrained(tmp_path)
    for each in (model, MmNelModel.from_pretrained(tmp_path)):
        assert each.local.attention.tolist() == [20.0] * 6
        assert each.local.score.tolist() == [3.0, *[20.0] * 5]


def test_every_parameter_has_a_gradient():
    model, (batch, labels) = build(train_words=True).train(), tensors(documents(("tttvv", "ttvv", "tv"), seed=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch, labels=labels).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_training_lowers_the_loss():
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


def test_scores_under_autocast_are_finite_and_float32():
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


# ---- errors


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"joint": "maybe"}, ["joint='maybe'", "'transport'"]),
        ({"triplet_reduction": "max"}, ["triplet_reduction='max'", "'sum'"]),
        ({"agreement_weight": 1.5}, ["agreement_weight=1.5"]),
        ({"image_correction_weight": -1}, ["image_correction_weight=-1"]),
        ({"local_scale": 0}, ["local_scale=0"]),
        ({"score_max_norm": 0}, ["score_max_norm=0"]),
        ({"uniform_relations": True, "num_relations": 0}, ["num_relations=1"]),
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
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MmNelConfig(**fields)
    assert all(word in str(error.value) for word in words)


def test_the_default_configuration_is_that_of_the_paper():
    config = MmNelConfig()
    assert (config.hidden_size, config.gamma, config.dropout, config.relation_window) == (300, 0.01, 0.3, 6)
    assert (config.num_candidates, config.prior_candidates, config.context_candidates) == (30, 4, 3)
    assert (config.num_image_layers, config.joint) == (6, "transport")
    with torch.device("meta"):
        model = MmNelModel(config)
    assert tuple(model.image_encoder.position.weight.shape) == (64, 300)


def test_bad_inputs_are_refused():
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

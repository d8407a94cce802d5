"""Tests of NCEL and DGCN: the whole model against NumPy loops over one document, mention and candidate at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_mel.modeling.candidate_graph import (
    CandidateGraphConfig,
    CandidateGraphModel,
    CandidateGraphProcessor,
    modeling_candidate_graph,
)
from hf_mel.modeling.candidate_graph.processing_candidate_graph import FEATURES
from hf_mel.protocols import Reranker
from tests.modeling.test_pfmel_processing import make_tokenizer

NCEL = {"vocab_size": 30, "word_dim": 4, "mlp_sizes": [6], "threshold": 0.2, "rho": 0.5, "window": 1}
DGCN = NCEL | {
    "graph": "dynamic",
    "graph_size": 5,
    "num_graph_layers": 5,
    "share_layers": True,
    "window": None,
    "mlp_scale": 1,
    "similarity_hidden_size": 3,
    "loss": "margin",
    "margin": 0.5,
}
NUM_ENTITIES = 8


def build(fields, seed=0):
    torch.manual_seed(seed)
    model = CandidateGraphModel(CandidateGraphConfig(**fields)).double().eval()
    with torch.no_grad():  # initial ones, zeros or identities would hide a part that is not applied
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
        for layer in model.layers:  # or else ReLU would make all nodes of width 1 zero
            layer.linear.bias.add_(1.0)
    return model


def documents(sizes=(4, 1, 3, 2), seed=0):
    """Returns documents of mentions, which have candidates with features, a gold, and words left, inside and right."""
    draw = np.random.default_rng(seed)
    out = []
    for size in sizes:
        document = []
        for k in range(size):
            chosen = draw.permutation(NUM_ENTITIES)[: draw.integers(1, 5)]
            mention = {
                name: draw.integers(0, 30, draw.integers(0, 4)).tolist() for name in ("left", "inside", "right")
            }
            mention["candidates"] = [(int(e), draw.normal(size=len(FEATURES))) for e in chosen]
            mention["gold"] = int(draw.integers(len(chosen))) if k != 1 else None
            document.append(mention)
        out.append(document)
    return out


def entities(seed=5):
    draw = np.random.default_rng(seed)
    return [
        {"name": draw.integers(0, 30, 2).tolist(), "facts": draw.integers(0, 30, draw.integers(0, 4)).tolist()}
        for _ in range(NUM_ENTITIES)
    ]


def padded(rows):
    out = torch.full((len(rows), max([1, *map(len, rows)])), -1)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return out


def tensors(docs, columns=0, mixed=False):
    """Returns the inputs that a processor would make of documents, and labels."""
    rows = [(d, mention) for d, document in enumerate(docs) for mention in document]
    if mixed:  # documents in turn, each in its order
        rows = sorted(rows, key=lambda row: docs[row[0]].index(row[1]))
    shape = (len(rows), max(columns, *(len(mention["candidates"]) for _, mention in rows)))
    listed = entities()
    batch = {
        "pair_features": torch.full((*shape, len(FEATURES)), torch.nan, dtype=torch.float64),
        "pair_mask": torch.zeros(shape, dtype=torch.bool),
        "pair_context": torch.tensor([d for d, _ in rows]),
        "pair_entity": torch.full(shape, -1),
        "pair_word_ids": padded([m["left"] + m["inside"] + m["right"] for _, m in rows]),
        "pair_span": torch.tensor([[len(m["left"]), len(m["left"] + m["inside"])] for _, m in rows]),
        "pair_name_ids": padded([entity["name"] for entity in listed]),
        "pair_fact_ids": padded([entity["facts"] for entity in listed]),
    }
    for row, (_, mention) in enumerate(rows):
        for c, (entity, features) in enumerate(mention["candidates"]):
            batch["pair_mask"][row, c], batch["pair_entity"][row, c] = True, entity
            batch["pair_features"][row, c] = torch.from_numpy(features)
    golds = [-100 if mention["gold"] is None else mention["gold"] for _, mention in rows]
    return batch, torch.tensor(golds)


def unit(x):
    norm = math.sqrt(sum(v * v for v in x))
    return x / max(norm, 1e-6)


def softmax(x):
    exp = [math.exp(v - max(x)) for v in x]
    return [v / sum(exp) for v in exp]


def link(model, document):
    """Returns the scores of one document by loops, {(mention, candidate): score}."""
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    config, table, listed = model.config, w["word_embeddings.weight"], entities()
    zero = np.zeros(config.word_dim)

    def mean(ids):
        return sum((table[i] for i in ids), zero) / max(len(ids), 1)

    def layer(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def attended(e, ids):
        if not ids:
            return zero
        weights = softmax([e @ (w["attention.weight"] * table[i]) for i in ids])
        return sum(a * table[i] for a, i in zip(weights, ids, strict=True))

    window = len(document) if config.window is None else config.window
    nodes, fixed = {}, {}
    for m, mention in enumerate(document):
        others = [mean(o["inside"]) for k, o in enumerate(document) if k != m and abs(k - m) <= window]
        around = sum(others, zero) / max(len(others), 1)
        for c, (number, features) in enumerate(mention["candidates"]):
            name, facts = mean(listed[number]["name"]), mean(listed[number]["facts"])
            e = unit(layer("entity_vectors.name_map", name) + w["entity_vectors.fact_map.weight"] @ facts)
            fixed[m, c] = unit(name + facts)
            vectors = [attended(e, mention["left"]), attended(e, mention["right"]), mean(mention["inside"]), around]
            x = np.concatenate([features, [e @ unit(v) for v in vectors], e, *vectors])
            for k in range(len(config.mlp_sizes)):
                x = np.maximum(0, layer(f"mlp.{k}", x))
            nodes[m, c] = config.mlp_scale * layer(f"mlp.{len(config.mlp_sizes)}", x)

    def edge(i, j):
        """Returns the weight of the edge of different mentions before it is normalised."""
        if config.graph == "static":
            cosine = fixed[i] @ fixed[j]
            return config.rho * cosine if cosine >= config.threshold else 0.0
        learned, entity = nodes[i] @ w["edges.bilinear"] @ nodes[j], fixed[i] @ (w["edges.entity"] * fixed[j])
        merged = layer("edges.fc2", np.tanh(layer("edges.fc1", np.array([learned, entity]))))[0]
        return 1 / (1 + math.exp(-merged))

    kept = dict(nodes)
    for k in range(config.num_graph_layers):
        weights = {}
        for i in nodes:
            weights[i, i] = 1.0
            for m in range(len(document)):
                if config.graph == "none" or m == i[0] or abs(m - i[0]) > window:
                    continue
                row = {j: edge(i, j) for j in nodes if j[0] == m}
                if config.graph == "dynamic":
                    best = max(row, key=row.get)
                    row = {best: row[best]}
                weights |= {(i, j): value for j, value in row.items()}
        degree = {i: sum(value for (a, _), value in weights.items() if a == i) for i in nodes}
        name, updated = f"layers.{0 if config.share_layers else k}", {}
        for i in nodes:
            total = np.zeros(config.graph_size)
            for (a, j), value in weights.items():
                if a == i:
                    dynamic = config.graph == "dynamic"
                    total = total + value / (math.sqrt(degree[i] * degree[j]) if dynamic else degree[i]) * nodes[j]
            x = layer(f"{name}.linear", total)
            if config.graph_size > 1:
                x = (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w[f"{name}.norm.weight"] + w[f"{name}.norm.bias"]
            updated[i] = np.maximum(0, x)
        nodes = updated
        if k % 2:
            nodes = {i: nodes[i] + kept[i] for i in nodes}
            kept = dict(nodes)
    return {i: float((layer("head", x) if config.graph_size > 1 else x)[0]) for i, x in nodes.items()}


@pytest.mark.parametrize(
    "fields",
    [
        NCEL,
        DGCN,
        NCEL | {"graph": "none"},
        DGCN | {"window": 2, "num_graph_layers": 2},
        NCEL | {"num_graph_layers": 0},
    ],
    ids=["ncel", "dgcn", "none", "window", "mlp"],
)
def test_the_whole_model_equals_loops(fields):
    model, docs = build(fields), documents()
    batch, labels = tensors(docs)
    out = model(**batch, labels=labels)
    losses, row = [], 0
    for document in docs:
        expected = link(model, document)
        for m, mention in enumerate(document):
            scores = [expected[m, c] for c in range(len(mention["candidates"]))]
            np.testing.assert_allclose(out.scores[row, : len(scores)].detach(), scores, atol=1e-9)
            assert torch.isneginf(out.scores[row, len(scores) :]).all()
            gold = mention["gold"]
            if gold is not None and model.config.loss == "softmax":
                losses.append(-math.log(softmax(scores)[gold]))
            elif gold is not None:
                hinges = [max(0.0, model.config.margin - scores[gold] + s) for c, s in enumerate(scores) if c != gold]
                losses.append(sum(hinges) / max(len(hinges), 1))
            row += 1
    assert out.loss.item() == pytest.approx(np.mean(losses), abs=1e-9)


@pytest.mark.parametrize("fields", [NCEL, DGCN], ids=["ncel", "dgcn"])
def test_padding_blocks_and_other_documents_change_nothing(fields, monkeypatch):
    model, docs = build(fields), documents()
    expected = model(**tensors(docs)[0]).scores.detach()
    padded_scores = model(**tensors(docs, columns=7)[0]).scores.detach()
    torch.testing.assert_close(padded_scores[:, : expected.shape[1]], expected)
    monkeypatch.setattr(modeling_candidate_graph, "_BLOCK_ELEMENTS", {"cpu": 1})
    torch.testing.assert_close(model(**tensors(docs)[0]).scores.detach(), expected)
    mixed, _ = tensors(docs, mixed=True)
    order = mixed["pair_context"].argsort(stable=True)
    torch.testing.assert_close(model(**mixed).scores.detach()[order], expected)


@pytest.mark.parametrize("fields", [NCEL, DGCN], ids=["ncel", "dgcn"])
def test_a_document_of_one_mention_has_no_graph(fields):
    fields = fields | {"threshold": 0}
    model = build(fields)
    without = CandidateGraphModel(CandidateGraphConfig(**fields | {"graph": "none"})).double().eval()
    report = without.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    single, _ = tensors(documents((1, 1, 1)))
    several, _ = tensors(documents((3,)))
    torch.testing.assert_close(without(**single).scores, model(**single).scores)
    assert not torch.allclose(without(**several).scores, model(**several).scores)


def test_mentions_outside_the_window_do_not_matter():
    model, (document,) = build(NCEL), documents((5,))
    changed = [*document[:3], document[4], document[3]]
    first, second = (model(**tensors([each], columns=5)[0]).scores[:2].detach() for each in (document, changed))
    # Two layers reach two mentions away, and the neighbour of the first is the second.
    torch.testing.assert_close(first[:1], second[:1])


@pytest.mark.parametrize("fields", [NCEL, DGCN | {"train_words": True}], ids=["ncel", "dgcn"])
def test_every_trained_parameter_has_a_gradient(fields):
    model = build(fields, seed=3).train()
    batch, labels = tensors(documents((4, 4, 3), seed=2))
    model(**batch, labels=labels).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.abs().sum() > 0] == []
    assert ("word_embeddings.weight" in trained) == model.config.train_words


@pytest.mark.parametrize("fields", [NCEL, DGCN], ids=["ncel", "dgcn"])
def test_training_lowers_the_loss(fields):
    torch.manual_seed(0)
    model = (
        CandidateGraphModel(CandidateGraphConfig(**fields | {"dropout": 0, "mlp_sizes": [32], "num_graph_layers": 2}))
        .double()
        .train()
    )
    batch, labels = tensors(documents((3, 3), seed=2))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_labels_and_mentions_without_gold():
    model = build(NCEL).train()
    batch, labels = tensors(documents())
    loss = model(**batch, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss.item() == 0
    labels[0] = 30
    with pytest.raises(ValueError, match="column without a candidate"):
        model(**batch, labels=labels)
    assert isinstance(model, Reranker)
    assert (model.example_unit, model.pairs_are_independent) == ("document", False)


def test_the_processor_describes_pairs():
    processor = CandidateGraphProcessor.from_parts(make_tokenizer(), context_words=4)
    mention = {"text": "the Ann Lee met", "mention": "Ann", "start": 4, "end": 7, "context_id": "c"}
    candidates = [
        {"entity_id": "Q1", "name": "ANN lee", "prior": 0.2},
        {"entity_id": "Q2", "name": "Bo", "prior": 0.5},
    ]
    batch = processor(pairs=[(mention, candidates), ({**mention, "context_id": "d", "mention": ""}, [candidates[0]])])
    count = math.log(3)
    # "ann" against "ann lee": four insertions in seven letters.
    assert batch["pair_features"][0, 0].tolist() == pytest.approx([count, 0.2, 0.5, 3 / 7, 0, 1, 0, 1, 0, 0, 0])
    assert batch["pair_features"][0, 1].tolist() == pytest.approx([count, 0.5, 0.5, 0, *[0] * 7])
    assert batch["pair_features"][1, 0].tolist() == pytest.approx([math.log(2), 0.2, 0.2, *[0] * 8])
    assert batch["pair_entity"].tolist() == [[0, 1], [0, -1]]
    assert batch["pair_context"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="not a probability"):
        processor(pairs=[(mention, [{"name": "x", "prior": -1}])])
    with pytest.raises(ValueError, match="sees no images"):
        CandidateGraphProcessor.from_parts(make_tokenizer(), vision={})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"graph": "star"}, "graph='star'"),
        ({"loss": "x"}, "'margin'"),
        ({"window": 0}, "window=0"),
        ({"mlp_sizes": [0]}, "mlp_sizes"),
        ({"dropout": 1}, "dropout=1"),
        ({"rho": -1}, "rho=-1"),
        ({"mlp_scale": 0}, "mlp_scale=0"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        CandidateGraphConfig(**fields)

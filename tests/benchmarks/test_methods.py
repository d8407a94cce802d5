"""Tests of the benchmark of training every method, on tiny encoders."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForNextSentencePrediction

from benchmarks import harness, methods, summary
from benchmarks.building import generated_entities
from hf_mel.auto import _METHODS
from hf_mel.training.recipe import Recipe
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Tower(nn.Module):
    """A reranker in outline: an encoder, which has an encoder of its own, and a head."""

    backbone_names = ("encoder", "encoder.inner", "absent")

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(), nn.Linear(3, 1)
        self.encoder.add_module("inner", nn.Linear(3, 3))
        self.encoded = 0
        self.encoder.inner.register_forward_hook(self._count)

    def _count(self, *_):
        self.encoded += 1

    def forward(self, x):
        return self.head(self.encoder(x).tanh() + self.encoder(2 * x)).square().sum()


def test_every_method_has_a_row():
    assert len(set(methods.RECIPES)) == len(methods.RECIPES)
    assert {Recipe.load(name).model.type for name in methods.RECIPES} == _METHODS.keys()


def test_scoring_has_the_gradients_of_a_whole_pass_without_encoding():
    model, x = Tower(), torch.randn(5, 3)

    def run():
        model.zero_grad()
        model(x).backward()

    score = methods.scoring(model, run)
    whole = [parameter.grad.clone() for parameter in model.head.parameters()]
    assert model.encoded == 2
    for _ in range(2):
        score()
        assert model.encoded == 2
        for parameter, expected in zip(model.head.parameters(), whole, strict=True):
            torch.testing.assert_close(parameter.grad, expected)
        assert all(parameter.grad is None for parameter in model.encoder.parameters())
    run()
    assert model.encoded == 4  # nothing is left replaced


def test_scoring_of_a_retriever_begins_with_its_encodings(monkeypatch):
    model, processor, calls = toy_model().train(), ToyProcessor(), []
    for name in ("encode_mentions", "encode_entities"):

        def counted(self, *args, plain=getattr(type(model), name), name=name, **kwargs):
            calls.append(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(type(model), name, counted)
    batch = processor(mentions=list(toy_mentions(4)), entities=list(toy_entities(12)))
    losses = []

    def run():
        losses.append(model(**batch, labels=torch.arange(4)).loss)

    score = methods.scoring(model, run)
    score()
    assert calls == ["encode_mentions", "encode_entities"]
    assert losses[0] == losses[1]


def test_mentions_stand_in_their_texts_and_share_contexts():
    entities = methods.accounts(generated_entities(5))
    mentions = methods.mentions_of(entities, 12, 3)
    for number, row in enumerate(mentions):
        assert row["text"][row["start"] : row["end"]] == row["mention"] == entities[number % 5]["name"]
        assert row["context_id"] == f"c{number // 3}"
        assert row["document_id"] == f"d{number // 3}"
    lists = methods.drawn_candidates(mentions, entities, 4)
    for gold, ids in zip(mentions["entity_id"], lists.entity_ids, strict=True):
        assert gold in ids
        assert len(set(ids)) == len(ids) == 4


@pytest.mark.parametrize(
    ("name", "kind", "pairs"),
    [
        ("bert_wikimel", "retriever", None),
        ("arnn_wikimel", "reranker", 4 * 6),
        ("mulrel_aida", "reranker", 24 * 20),
        ("et_tweets", "reranker", 4 * 17),
    ],
)
def test_a_recipe_is_measured(name, kind, pairs, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")  # which fits the trees
    bert = lambda encoders: BertForNextSentencePrediction(BertConfig(vocab_size=30522, **TINY))  # noqa: E731
    monkeypatch.setattr(methods, "_ENCODERS", {"bert": bert, "resnet": methods._ENCODERS["resnet"]})
    options = ["--batch-size", "4", "--steps", "2", "--repeats", "1", "--scratch", str(tmp_path)]
    entities = methods.accounts(generated_entities(20))
    row = methods.measure(name, methods.arguments().parse_args(options), entities, tmp_path)
    assert row["kind"] == kind
    assert row["pairs"] == pairs
    assert row["method"] == Recipe.load(name).model.type
    assert 0 <= row["waiting_s"] < row["step_s"]
    assert all(row[f"{case}_cpu_s"] > 0 for case in ("step", "data", "scoring", "plain"))


def test_a_table_of_shares(tmp_path):
    row = {"recipe": "a_data", "method": "a", "batch_size": 16, "pairs": 1600, "step_s": 0.5, "waiting_s": 0.005}
    row |= {"step_cpu_s": 2.0, "data_cpu_s": 0.05, "scoring_cpu_s": 0.125, "plain_cpu_s": 1.6}
    machine = {"cpu": "a CPU", "cores": 2, "threads": 1, "load_at_start": 0.1, "gemm_gflops": 200.0, "software": {}}
    result = {
        "rows": [row],
        "entities": 512,
        "encoders": "small",
        "dtype": "float32",
        "repeats": 2,
        "machine": machine,
    }
    harness.write(tmp_path, "methods", json.loads(json.dumps(result)))
    expected = "| a_data | a | 16 (1,600 pairs) | 1.0% | 2.5% | 6.2% | 1.25 | 2,000 ms | 50 ms | 125 ms | 1,600 ms |"
    assert expected in summary.markdown(tmp_path)

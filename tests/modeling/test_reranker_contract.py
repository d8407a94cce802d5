"""Laws that every reranker among the baselines keeps: batches, padding and order change nothing, and it loads without hf_mel."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.hub.saving import save_model_repository
from hf_mel.modeling.autoregressive import AutoregressiveConfig, AutoregressiveModel, AutoregressiveProcessor
from hf_mel.modeling.candidate_graph import CandidateGraphConfig, CandidateGraphModel, CandidateGraphProcessor
from hf_mel.modeling.extra_trees import ExtraTreesConfig, ExtraTreesModel, ExtraTreesProcessor
from hf_mel.protocols import MelProcessor, Reranker
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from tests.toy import toy_entities, toy_mentions
from tests.toy_documents import toy_documents

BERT = {
    "model_type": "bert",
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [6], "depths": [1], "layer_type": "basic"}


def make_tokenizer():
    return train_wordpiece(texts_of(toy_mentions(), toy_entities()), 150)


def extra_trees():
    tokenizer = make_tokenizer()
    text = BERT | {"vocab_size": len(tokenizer)}
    config = ExtraTreesConfig(text_config=text, vision_config=RESNET, list_scores=True, n_estimators=9)
    model = ExtraTreesModel(config)
    processor = ExtraTreesProcessor.from_parts(tokenizer, {"size": {"height": 16, "width": 16}}, max_length=20)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 11)).astype(np.float32))
    model.fit(features, features[:, 4] + features[:, 8] + features[:, 9] > 0)
    return model, processor


def graph(**fields):
    tokenizer = make_tokenizer()
    config = CandidateGraphConfig(vocab_size=len(tokenizer), word_dim=6, mlp_sizes=[7], threshold=0.1, **fields)
    return CandidateGraphModel(config), CandidateGraphProcessor.from_parts(tokenizer)


def dgcn():
    return graph(graph="dynamic", graph_size=5, num_graph_layers=3, share_layers=True, window=None, loss="margin")


BART = {
    "model_type": "bart",
    "d_model": 12,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def genre():
    tokenizer = make_tokenizer()
    text = BART | {"vocab_size": len(tokenizer), "pad_token_id": 0, "init_std": 0.5}
    return AutoregressiveModel(AutoregressiveConfig(text_config=text)), AutoregressiveProcessor.from_parts(tokenizer)


def autoregressive():
    tokenizer = make_tokenizer()
    text = BERT | {"vocab_size": len(tokenizer), "initializer_range": 0.5}
    config = AutoregressiveConfig(text_config=text, name_decoder="lstm", correction=True)
    return AutoregressiveModel(config), AutoregressiveProcessor.from_parts(tokenizer)


METHODS = {"autoregressive": autoregressive, "genre": genre, "dgcn": dgcn, "extra_trees": extra_trees, "ncel": graph}


@pytest.fixture(params=METHODS, scope="module")
def method(request):
    torch.manual_seed(0)
    model, processor = METHODS[request.param]()
    return model.eval(), processor


def pairs(counts=(3, 1, 4, 2, 3, 2)):
    """Returns mentions of two documents with different numbers of candidates, some without images."""
    draw = np.random.default_rng(1)
    entities = [dict(row) for row in toy_entities(6)]
    for row in entities:
        row["images"] = [Image.fromarray(draw.integers(0, 255, (9, 7, 3), dtype=np.uint8))] if row["images"] else []
    out = []
    for k, (row, count) in enumerate(zip(toy_documents(12), counts, strict=False)):
        chosen = draw.permutation(6)[:count]
        row = row | {"document_id": f"d{k % 2}", "context_id": f"c{k % 2}", "modality": "text"}
        scores = [{"prior": float(draw.random()), "list_score": -float(draw.random())} for _ in chosen]
        out.append((row, [entities[e] | score for e, score in zip(chosen, scores, strict=True)]))
    return out


@torch.no_grad()
def scores(method, rows):
    model, processor = method
    return model(**processor(pairs=rows)).scores


def examples(method, rows):
    """Returns the rows of each example."""
    if method[0].example_unit == "mention":
        return [[k] for k in range(len(rows))]
    return [[k for k in range(len(rows)) if k % 2 == d] for d in range(2)]


def test_it_is_a_reranker(method):
    model, processor = method
    assert isinstance(model, Reranker)
    assert isinstance(processor, MelProcessor)
    batch = processor(pairs=pairs())
    assert batch["pair_mask"].dtype == torch.bool
    assert batch["pair_mask"].sum(1).tolist() == [3, 1, 4, 2, 3, 2]
    assert batch["pair_context"].tolist() == [0, 1, 0, 1, 0, 1]
    found = scores(method, pairs())
    assert found.isfinite().equal(batch["pair_mask"])
    assert torch.isneginf(found[~batch["pair_mask"]]).all()
    assert len(found[batch["pair_mask"]].unique()) > 3


def test_batched_equals_single(method):
    rows, together = pairs(), scores(method, pairs())
    for example in examples(method, rows):
        alone = scores(method, [rows[k] for k in example])
        for k, row in zip(example, alone, strict=True):
            size = len(rows[k][1])
            torch.testing.assert_close(together[k, :size], row[:size], atol=2e-5, rtol=1e-4)


def test_permuted_candidates_have_permuted_scores(method):
    rows = pairs()
    turned = [(mention, candidates[::-1]) for mention, candidates in rows]
    for k, (row, backwards) in enumerate(zip(scores(method, rows), scores(method, turned), strict=True)):
        size = len(rows[k][1])
        torch.testing.assert_close(row[:size].flip(0), backwards[:size], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["dgcn", "ncel"], indirect=True)
def test_a_graph_says_that_its_pairs_are_not_independent(method):
    assert not method[0].pairs_are_independent


@pytest.mark.parametrize("method", ["autoregressive", "genre", "extra_trees"], indirect=True)
def test_pairs_are_independent_if_it_says_so(method):
    assert method[0].pairs_are_independent
    rows, together = pairs(), scores(method, pairs())
    for k, (mention, candidates) in enumerate(rows):
        for c, candidate in enumerate(candidates):
            alone = scores(method, [(mention, [candidate])])
            torch.testing.assert_close(alone[0, 0], together[k, c], atol=2e-5, rtol=1e-4)


def test_a_mention_without_candidates_changes_nothing(method):
    rows = pairs()
    expected = scores(method, rows)
    other = rows[0][0] | {"document_id": "d9", "context_id": "c9"}
    found = scores(method, [*rows, (other, [])])
    torch.testing.assert_close(found[:-1], expected, atol=2e-5, rtol=1e-4)
    assert torch.isneginf(found[-1]).all()
    assert torch.isneginf(scores(method, [(rows[0][0], [])])).all()


def test_it_loads_by_the_auto_classes_and_without_hf_mel(method, tmp_path):
    model, processor = method
    expected = scores(method, pairs())
    save_model_repository(model, processor, tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(again) is type(processor)
    torch.testing.assert_close(scores((loaded.eval(), again), pairs()), expected, atol=0, rtol=0)
    torch.save((pairs(), expected), tmp_path / "rows.pt")
    program = f"""
import sys
sys.modules["hf_mel"] = sys.modules["sklearn"] = None  # makes every import of them fail
import torch
from transformers import AutoModel, AutoProcessor
rows, scores = torch.load({str(tmp_path / "rows.pt")!r}, weights_only=False)
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(**processor(pairs=rows)).scores, scores, atol=1e-5, rtol=1e-5)
for part in (model, processor):
    assert type(part).__module__.startswith("transformers_modules"), type(part)
print("loaded")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "loaded", run.stderr

"""The contract of every method that is a row of a paper's table: each recipe trains a step, saves, loads, ranks and links.

A row is a recipe, or a recipe with overrides that its header names. The encoders are small ones of random weights.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.candidates.make import make_candidates
from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.hub.saving import save_model_repository
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.protocols import Retriever
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer
from tests.recipes.test_rerankers import encoders, load  # noqa: F401 (a fixture)
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model

#: Recipe and overrides of every row that is built here, one method after the other.
ROWS = [
    ("arnn_wikimel", ""),
    ("arnn_tweets", ""),
    ("arnn-text_wikimel", ""),
    ("arnn-bert-text_wikimel", ""),
    ("att_tweets", ""),
    ("att_flags", ""),
    ("att_flags", "model.vision=null model.config.images=none"),
    ("att-text_wikimel", ""),
    ("bi-encoder_flags", ""),
    ("colbert-text_wikimel", ""),
    ("cross-encoder-text_wikimel", "model.config.list_weight=null model.config.name_weight=null"),
    ("ghmfc_wikimel", ""),
    ("ghmfc_wikimel", "model.vision=null"),
    ("ghmfc_flags", ""),
    ("ghmfc-text_wikimel", ""),
    ("hiecoatt_wikimel", ""),
    ("hiecoatt_flags", ""),
    ("hiecoatt-text_wikimel", ""),
    *((f"{row}_{data}", "") for row in ("dzmned", "jmel", "velml") for data in ("wikimel", "flags")),
    *((f"{row}-text_wikimel", "") for row in ("dzmned", "jmel", "velml")),
    ("dzmned_tweets", ""),
    ("jmel_tweets", ""),
]
#: One row of every method, whose model repository is loaded without hf_mel.
REMOTE = [
    ("arnn-text_wikimel", ""),
    ("att_flags", ""),
    ("bi-encoder_flags", ""),
    ("cross-encoder-text_wikimel", "model.config.list_weight=null model.config.name_weight=null"),
    ("ghmfc_flags", ""),
    ("dzmned_flags", ""),
]

ENTITIES, MENTIONS = toy_entities(8), toy_mentions(8, entities=8)


def build(name, overrides, encoders):  # noqa: F811
    torch.manual_seed(0)
    return build_model(load(name, overrides, encoders), texts_of(MENTIONS, ENTITIES))


def scores_of(model, processor) -> torch.Tensor:
    """Scores [4, 8] of four mentions against all entities."""
    mentions, entities = [dict(row) for row in MENTIONS.select(range(4))], [dict(row) for row in ENTITIES]
    with torch.no_grad():
        if isinstance(model, Retriever):
            sides = (
                model.encode_mentions(**processor(mentions=mentions)),
                model.encode_entities(**processor(entities=entities)),
            )
            return model.score(*sides)
        return model(**processor(pairs=[(mention, entities) for mention in mentions])).scores


@pytest.mark.parametrize(("name", "overrides"), ROWS)
def test_a_row_trains_saves_loads_ranks_and_links(name, overrides, encoders, tmp_path):  # noqa: F811
    model, processor = build(name, overrides, encoders)
    is_retriever = isinstance(model, Retriever)
    lists = None
    register()
    toy_kb = KnowledgeBase.build(ENTITIES, toy_model(), ToyProcessor(), progress=False)
    if not is_retriever:
        lists = make_candidates("name", MENTIONS, ENTITIES, k=4)
    arguments = MelTrainingArguments(
        tmp_path / "run",
        max_steps=1,
        per_device_train_batch_size=8,
        num_negatives=3,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        report_to=[],
        bf16=False,
    )
    lists_of = {} if lists is None else {"train_candidates": lists}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = MelTrainer(model, arguments, MENTIONS, entities=ENTITIES, processing_class=processor, **lists_of)
    assert math.isfinite(trainer.train().training_loss)
    model.eval()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())

    save_model_repository(model, processor, tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved").eval()
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    expected = scores_of(model, processor)
    assert expected.isfinite().all()
    torch.testing.assert_close(scores_of(loaded, again), expected)
    order = torch.randperm(len(ENTITIES))
    inputs = ModelInputs(loaded, again)
    if is_retriever:
        results = [
            FullEvaluator(rows, progress=False)(inputs, MENTIONS) for rows in (ENTITIES, ENTITIES.select(order))
        ]
        metrics = [result.metrics["mrr"] for result in results]
        kb = KnowledgeBase.build(ENTITIES, loaded, again, progress=False)
        linker = EntityLinker(loaded, again, kb)
    else:
        results = [
            CandidateEvaluator(rows, progress=False)(inputs, MENTIONS, lists)
            for rows in (ENTITIES, ENTITIES.select(order))
        ]
        metrics = [result.metrics["mrr"] for result in results]
        linker = EntityLinker(toy_model(), ToyProcessor(), toy_kb, reranker=loaded, reranker_processor=again)
    assert metrics[0] == pytest.approx(metrics[1])
    result = linker(text="Here Entity b met somebody.", mention="Entity b")
    assert result.best is not None
    assert result.best.name.startswith("Entity")


def test_remote_code_loads_without_the_package(encoders, tmp_path):  # noqa: F811
    """Model and processor of every repository score plain rows without hf_mel installed."""
    mentions = [{**dict(row), "image": None} for row in MENTIONS.select(range(2))]
    entities = [{**dict(row), "images": []} for row in ENTITIES]
    calls = {
        True: "model.score(model.encode_mentions(**processor(mentions=mentions)), "
        "model.encode_entities(**processor(entities=entities)))",
        False: "model(**processor(pairs=[(mention, entities) for mention in mentions])).scores",
    }
    rows = []
    for number, (name, overrides) in enumerate(REMOTE):
        model, processor = build(name, overrides, encoders)
        folder = tmp_path / str(number)
        save_model_repository(model.eval(), processor, folder)
        names = {"model": model, "processor": processor, "mentions": mentions, "entities": entities}
        rows.append((str(folder), calls[isinstance(model, Retriever)]))
        with torch.no_grad():
            torch.save(eval(rows[-1][1], names), folder / "scores.pt")
    program = f"""
import sys
sys.modules["hf_mel"] = None  # makes every import of it fail
import torch
from transformers import AutoModel, AutoProcessor
mentions, entities = {mentions!r}, {entities!r}
for folder, call in {rows!r}:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(eval(call), torch.load(f"{{folder}}/scores.pt"), atol=1e-5, rtol=1e-5, msg=folder)
    for part in (model, processor):
        assert type(part).__module__.startswith("transformers_modules"), type(part)
print("loaded")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "loaded", run.stderr

"""Tests of MM-nel's recipes: every variant that a recipe names trains for one step, and one recipe runs end to end."""

from __future__ import annotations

import json

import pytest
import torch

from hf_mel.building.build import build_dataset
from hf_mel.candidates.make import make_candidates
from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator
from hf_mel.inference.checkpoints import load_reranker
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.training.assemble import build_model
from hf_mel.training.run import run_recipe
from tests.dataset_scripts import aida_conll_release, m3el_release
from tests.recipes.test_rerankers import encoders, load, step  # noqa: F401 (a fixture)
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model, write_toy_dataset
from tests.toy_documents import toy_documents

PAPER = (
    "candidates.k=30 training.num_negatives=29 model.config.num_candidates=30",
    {"num_candidates": 30},
)
VARIANTS = [
    *((name, "", {"joint": "transport"}) for name in ("mm_nel_flags", "mm_nel-plain_flags", "mm_nel_m3el")),
    *((name, "", {"joint": "none"}) for name in ("mm_nel-text_wikimel", "mm_nel_aida")),
    *((f"mulrel{data}", "", {"num_relations": 3, "lbp_damping": 0.3}) for data in ("_aida", "-text_wikimel")),
    *((f"ganea{data}", "", {"uniform_relations": True, "num_relations": 1}) for data in ("_aida", "-text_wikimel")),
    *(
        (f"ganea{data}", "model.config.num_relations=0 model.config.uniform_relations=false", {"num_relations": 0})
        for data in ("_aida", "-text_wikimel")
    ),
    ("mm_nel_flags", "model.config.joint=none", {"joint": "none", "num_relations": 3}),
    ("mm_nel_flags", "model.config.joint=none model.config.num_relations=0", {"joint": "none", "num_relations": 0}),
    ("mm_nel-text_wikimel", "model.config.num_relations=0", {"num_relations": 0}),
    ("mm_nel-text_wikimel", *PAPER),
]


def candidate_pairs(rows, visual: bool):
    """Returns pairs of a mention and its candidates, without visual mentions unless `visual`."""
    entities = [dict(row) for row in toy_entities(6)]
    return [(dict(row), entities) for row in rows if visual or row["modality"] == "text"]


@pytest.mark.parametrize(("name", "overrides", "expected"), VARIANTS)
def test_a_variant_trains(name, overrides, expected, encoders):  # noqa: F811
    recipe = load(name, overrides, encoders)
    model, processor = build_model(recipe)
    assert {field: getattr(model.config, field) for field in expected} == expected
    pairs = candidate_pairs(toy_documents(8), model.config.sees_images)
    batch = dict(processor(pairs=pairs))
    batch["labels"] = torch.tensor([k % 6 for k in range(len(pairs))])
    step(model, batch)


@pytest.mark.parametrize("joint", ["transport", "none"])
def test_trains_evaluates_and_links(encoders, tmp_path, joint):  # noqa: F811
    register()
    splits = {
        "train": toy_documents(24),
        "validation": toy_documents(12),
        "test": toy_documents(8, nil_every=4),
    }
    splits = {
        name: rows.map(lambda row, name=name: {"mention_id": f"{name} {row['mention_id']}"})
        for name, rows in splits.items()
    }
    data = write_toy_dataset(tmp_path / "data", entities=toy_entities(12), **splits)
    recipe = load("mm_nel_flags", "", encoders)
    recipe.model.config["joint"] = joint
    recipe.data.dataset, recipe.data.config = str(data), "mentions"
    recipe.candidates.source, recipe.candidates.retriever, recipe.candidates.k = "name+prior+document", None, 6
    quick = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "num_negatives": 5,
    }
    recipe.training.update(quick)
    run = run_recipe(recipe, tmp_path / "run")

    model, processor = load_reranker(run)
    lists = make_candidates("name+prior+document", splits["test"], toy_entities(12), training=splits["train"], k=6)
    whole = CandidateEvaluator(toy_entities(12), progress=False)(ModelInputs(model, processor), splits["test"], lists)
    again = CandidateEvaluator(toy_entities(12), batch_size=1, progress=False)(
        ModelInputs(model, processor), splits["test"], lists
    )
    assert whole.metrics == again.metrics
    assert 0 < whole.metrics["mrr"] <= 1
    kb = KnowledgeBase.build(toy_entities(12), toy_model(), ToyProcessor(), progress=False)
    linker = EntityLinker(toy_model(), ToyProcessor(), kb, reranker=model, reranker_processor=processor)
    linked = linker([dict(row) for row in toy_mentions(4)], top_k=3)
    assert all(len(result.candidates) == 3 for result in linked)


def test_trains_on_the_documents_and_priors_of_two_releases(encoders, tmp_path):  # noqa: F811
    """Table 4: M3EL, whose mentions have documents and images, and AIDA, whose mentions are text alone."""
    m3el_release.write(tmp_path / "m3el_raw")
    (tmp_path / "aida_raw").mkdir()
    aida_conll_release.write(tmp_path / "aida_raw")
    build_dataset("m3el", raw_dir=tmp_path / "m3el_raw", output=tmp_path / "m3el")
    build_dataset("aida_conll", raw_dir=tmp_path / "aida_raw", output=tmp_path / "aida", allow_count_mismatch=True)
    recipe = load("mm_nel_m3el", "", encoders)
    recipe.data.dataset, recipe.data.extra_datasets = str(tmp_path / "m3el"), [str(tmp_path / "aida")]
    recipe.data.validation_split = "train"  # the validation mentions of the small release have no candidates
    recipe.training.update({"num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True})
    run = run_recipe(recipe, tmp_path / "run")
    data = json.loads((run / "results.json").read_text())["data"]
    assert (data["train_mentions"], data["entities"]) == (5 + 4, 3 + 6)
    assert load_reranker(run)[0].config.model_type == "mm_nel"

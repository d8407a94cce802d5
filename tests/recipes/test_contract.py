"""The contract of every system of the five papers: by its recipe it trains a step, is saved, loaded, ranks and links.

A system is a recipe, or a recipe with overrides that its header names. The encoders are small ones of random weights.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.auto import _METHODS
from hf_mel.candidates.make import make_candidates
from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.hub.saving import save_model_repository
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.protocols import FitsFeatures, Retriever, knows_posts
from hf_mel.training.assemble import build_model
from hf_mel.training.pretraining import pretraining_model
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import training_arguments
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer
from tests.recipes.test_bi_encoder import shrink
from tests.recipes.test_rerankers import RECIPES, encoders, load  # noqa: F401 (a fixture)
from tests.toy import ToyProcessor, register, toy_entities, toy_model
from tests.toy_documents import toy_documents
from tests.toy_posts import toy_posts

ROOT = Path(__file__).parents[2]
WITHOUT_LIST = "model.config.list_weight=null model.config.name_weight=null"
#: Recipe and overrides of every system, by its name in docs/methods/index.md. Those of a paper's own data come first.
SYSTEMS = {
    "MIMIC": ("mimic_wikimel", ""),
    "IMN": ("imn_tweets", ""),
    "MM-nel": ("mm_nel_m3el", ""),
    "MMEL": ("mmel_wikimel", ""),
    "PFMEL": ("pfmel_tweets", ""),
    "FMEL": ("pfmel-fmel_tweets", ""),
    "NSP-BERT": ("pfmel-fmel_tweets", "model.vision=null"),
    "Bi-encoder": ("bi-encoder_flags", ""),
    "BERT": ("bert_wikimel", ""),
    "RoBERTa": ("roberta_wikimel", ""),
    "BLINK's first stage": ("blink_wikimel", ""),
    "CLIP": ("clip_wikimel", ""),
    "ViLT": ("vilt_wikimel", ""),
    "ALBEF": ("albef_wikimel", ""),
    "METER": ("meter_wikimel", ""),
    "LXMERT": ("lxmert_wikimel", ""),
    "ColBERT": ("colbert-text_wikimel", ""),
    "DZMNED": ("dzmned_tweets", ""),
    "DZMNED(BERT)": ("dzmned_wikimel", ""),
    "JMEL": ("jmel_wikimel", ""),
    "VELML": ("velml_wikimel", ""),
    "GHMFC": ("ghmfc_wikimel", ""),
    "GHMFC-onlytext": ("ghmfc_wikimel", "model.vision=null"),
    "HieCoATT-Alter": ("hiecoatt_wikimel", ""),
    "Cross-encoder": ("cross-encoder_flags", ""),
    "BLINK's second stage": ("blink-cross_wikimel", ""),
    "CHOLAN": ("cholan_tweets", ""),
    "ARNN": ("arnn_wikimel", ""),
    'IMN\'s "BERT"': ("arnn-bert-text_wikimel", ""),
    "Att": ("att_tweets", ""),
    "GENRE": ("genre_wikimel", ""),
    "Autoregressive": ("autoregressive_tweets", ""),
    "NCEL": ("ncel_wikimel", ""),
    "NCEL without its graph": ("ncel_wikimel", "model.config.graph=none"),
    "DGCN": ("dgcn_aida", ""),
    "DGCN without its graph": ("dgcn_aida", "model.config.graph=none model.config.margin=0.01"),
    "MulRel": ("mulrel_aida", ""),
    "Ganea and Hofmann": ("ganea_aida", ""),
    "Ganea and Hofmann, local": ("ganea_aida", "model.config.num_relations=0 model.config.uniform_relations=false"),
    "Naïve": ("mm_nel_m3el", "model.config.joint=none"),
    "ET": ("et_tweets", ""),
}
#: Further recipes of these systems.
VARIANTS = [
    ("arnn_tweets", ""),
    ("arnn-text_wikimel", ""),
    ("att_flags", ""),
    ("att_flags", "model.vision=null model.config.images=none"),
    ("att-text_wikimel", ""),
    ("cross-encoder-text_wikimel", WITHOUT_LIST),
    ("ghmfc_flags", ""),
    ("ghmfc-text_wikimel", ""),
    ("hiecoatt_flags", ""),
    ("hiecoatt-text_wikimel", ""),
    *((f"{row}_flags", "") for row in ("dzmned", "jmel", "velml")),
    *((f"{row}-text_wikimel", "") for row in ("dzmned", "jmel", "velml")),
    ("jmel_tweets", ""),
]
#: One row of every method, whose model repository is loaded without hf_mel.
REMOTE = [
    ("arnn-text_wikimel", ""),
    ("att_flags", ""),
    ("bi-encoder_flags", ""),
    ("cross-encoder-text_wikimel", WITHOUT_LIST),
    ("ghmfc_flags", ""),
    ("dzmned_flags", ""),
]
#: Sizes in place of the default ones, by model type. Small models also need less than the recipe's warm-up.
SIZES = {
    "ghmfc": {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
    "imn": {"hidden_dim": 8, "aux_dim": 8, "conv_dim": 8, "num_heads": 2},
    "mm_nel": {"hidden_size": 12, "intermediate_size": 16, "num_image_layers": 1, "num_attention_heads": 2},
    "mmel": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
    "modal_fusion": {"hidden_size": 16},
}
QUICK = {
    "max_steps": 1,
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
    "check_memory": False,
    "use_cpu": True,
    "bf16": False,
}

ENTITIES = toy_entities(8).map(
    lambda row: {"screen_name": f"@{row['entity_id']}", "location": "Here", "recent_posts": ["one", "two"]}
)
#: Mentions of documents, some of which are images; and those that are text.
DOCUMENTS = toy_documents(16).filter(lambda row: row["entity_id"] in set(ENTITIES["entity_id"]))
TEXTS = DOCUMENTS.filter(lambda row: row["modality"] == "text")


def small(name, overrides, encoders, folder) -> Recipe:  # noqa: F811
    """Loads a recipe with small encoders and sizes."""
    recipe = load(name, overrides, encoders)
    if recipe.model.type == "bi_encoder":
        shrink(recipe, Recipe.load(name), folder)
    if recipe.model.type is not None:
        recipe.model.config |= SIZES.get(recipe.model.type, {})
    recipe.training.update(QUICK)
    return recipe


def build(recipe, encoders, folder):  # noqa: F811
    """Builds a model. A stage that continues another starts with its untrained model."""
    torch.manual_seed(0)
    if recipe.model.from_pretrained is not None:
        name = Path(recipe.model.from_pretrained).name
        save_model_repository(*pretraining_model(small(name, "", encoders, folder)), folder / name)
        recipe.model.from_pretrained = str(folder / name)
    return build_model(recipe, texts_of(TEXTS, ENTITIES))


def scores_of(inputs, mentions) -> torch.Tensor:
    """Scores [M, E] of the mentions and all entities."""
    with torch.no_grad():
        if isinstance(inputs.model, Retriever):
            sides = (encode_rows(inputs, mentions, "mentions"), encode_rows(inputs, ENTITIES, "entities"))
            return inputs.model.score(*sides)
        entities = [dict(row) | {"list_score": -0.1 * number} for number, row in enumerate(ENTITIES)]
        pairs = [(dict(row), entities) for row in mentions]
        return inputs.model(**inputs.processor(pairs=pairs)).scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def toy_kb():
    """The knowledge base from which a toy retriever takes the candidates of rerankers."""
    register()
    return KnowledgeBase.build(ENTITIES, toy_model(), ToyProcessor(), progress=False)


@pytest.fixture(scope="module")
def lists():
    """Mentions and their candidates: of names for the models of single mentions, with priors for those of documents."""
    sources = {
        "mentions": (TEXTS, "name"),
        "texts": (TEXTS, "name+prior"),
        "documents": (DOCUMENTS, "name+prior+document"),
    }
    return {
        unit: (rows, make_candidates(source, rows, ENTITIES, training=rows, k=4))
        for unit, (rows, source) in sources.items()
    }


ROWS = [
    *(pytest.param(*row, id=system) for system, row in SYSTEMS.items()),
    *(pytest.param(*row, id=" ".join(row).strip()) for row in VARIANTS),
]


@pytest.mark.parametrize(("name", "overrides"), ROWS)
def test_a_system_trains_saves_loads_ranks_and_links(name, overrides, encoders, folder, toy_kb, lists, tmp_path):  # noqa: F811
    recipe = small(name, overrides, encoders, folder)
    model, processor = build(recipe, encoders, folder)
    is_retriever, posts = isinstance(model, Retriever), toy_posts() if knows_posts(model) else None
    unit = "mentions"
    if getattr(model, "example_unit", None) == "document":
        unit = "documents" if getattr(model.config, "sees_images", False) else "texts"
    mentions, candidates = lists[unit]
    arguments = training_arguments(recipe, tmp_path / "run")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = MelTrainer(
        model,
        arguments,
        mentions,
        entities=ENTITIES,
        processing_class=processor,
        inputs=ModelInputs(model, processor, posts),
        **({} if is_retriever else {"train_candidates": candidates}),
    )
    assert math.isfinite(trainer.train().training_loss)
    assert isinstance(model, FitsFeatures) or trainer.state.global_step == 1
    model.eval()
    after = model.state_dict()
    assert any(key not in before or not torch.equal(value, before[key]) for key, value in after.items())

    save_model_repository(model, processor, tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved").eval()
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    inputs = ModelInputs(loaded, again, posts)
    expected = scores_of(ModelInputs(model, processor, posts), mentions)
    assert expected.shape == (len(mentions), len(ENTITIES))
    assert expected.isfinite().all()
    assert expected.std() > 0
    torch.testing.assert_close(scores_of(inputs, mentions), expected)

    order = torch.randperm(len(ENTITIES))
    metrics = []
    for entities in (ENTITIES, ENTITIES.select(order)):
        if is_retriever:
            result = FullEvaluator(entities, progress=False)(inputs, mentions)
        else:
            result = CandidateEvaluator(entities, progress=False)(inputs, mentions, candidates)
        metrics.append(result.metrics["mrr"])
    assert metrics[0] == pytest.approx(metrics[1])
    if is_retriever:
        kb = KnowledgeBase.build(ENTITIES, loaded, again, posts=posts, progress=False)
        linker = EntityLinker(loaded, again, kb)
    else:
        linker = EntityLinker(toy_model(), ToyProcessor(), toy_kb, reranker=loaded, reranker_processor=again)
    result = linker(text="Here Entity b met somebody.", mention="Entity b")
    assert result.best is not None
    assert result.best.name.startswith("Entity")


def test_every_system_of_the_table_of_methods_is_a_row():
    """A name is in the first column, or in the list of baselines in the second one."""
    table = (ROOT / "docs/methods/index.md").read_text(encoding="utf-8")
    names = set()
    for line in re.findall(r"^\| (\[.*) \|$", table, re.MULTILINE):
        method, paper = line.split(" | ")[:2]
        listed = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", method).split(", ")
        names.update(listed, paper.removeprefix("baselines: ").split(", ") if "baselines: " in paper else ())
    assert len(names) > 30
    assert not {name.strip('"') for name in names} - {name.strip('"') for name in SYSTEMS}
    types = {Recipe.load(name).model.type for name, _ in SYSTEMS.values()}
    assert types - {None} == _METHODS.keys()


def test_remote_code_loads_without_the_package(encoders, folder, tmp_path):  # noqa: F811
    """Model and processor of every repository score plain rows without hf_mel installed."""
    mentions = [{**dict(row), "image": None} for row in TEXTS.select(range(2))]
    entities = [{**dict(row), "images": []} for row in ENTITIES]
    calls = {
        True: "model.score(model.encode_mentions(**processor(mentions=mentions)), "
        "model.encode_entities(**processor(entities=entities)))",
        False: "model(**processor(pairs=[(mention, entities) for mention in mentions])).scores",
    }
    rows = []
    for number, (name, overrides) in enumerate(REMOTE):
        model, processor = build(small(name, overrides, encoders, folder), encoders, folder)
        saved = tmp_path / str(number)
        save_model_repository(model.eval(), processor, saved)
        names = {"model": model, "processor": processor, "mentions": mentions, "entities": entities}
        rows.append((str(saved), calls[isinstance(model, Retriever)]))
        with torch.no_grad():
            torch.save(eval(rows[-1][1], names), saved / "scores.pt")
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

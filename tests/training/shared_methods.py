"""A step of every shipped method, by two processes or by one with twice the batch: `python -m tests.training.shared_methods FOLDER SIZE [NAME ...]`."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.candidates.lists import CandidateLists
from hf_mel.protocols import Reranker
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.recipe import Recipe
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer
from tests.recipes.test_rerankers import load
from tests.toy import toy_entities, toy_mentions

#: Recipes of every method that gradients train.
METHODS = [
    "mimic_flags",
    "mimic-text_wikimel",
    "bi-encoder_flags",
    "colbert-text_wikimel",
    "imn-text_wikimel",
    "imn_tweets",
    "ghmfc_flags",
    "hiecoatt_flags",
    "dzmned_flags",
    "jmel_flags",
    "velml_flags",
    "arnn_tweets",
    "att_flags",
    "autoregressive-text_wikimel",
    "cross-encoder_flags",
    "dgcn-text_wikimel",
    "ncel-text_wikimel",
    "ganea-text_wikimel",
    "mulrel-text_wikimel",
    "mm_nel_flags",
    "mmel_flags",
    "pfmel-fmel_flags",
]
#: Fields of a configuration that need the scores of a retriever's list, which lists of names and priors lack.
_OF_LISTS = ("list_weight", "name_weight", "list_loss_weight")
ENTITIES, MENTIONS = toy_entities(12), toy_mentions(7)


def tiny(name: str, encoders: dict[str, str]) -> Recipe:
    """Returns a shipped recipe with small encoders."""
    recipe = load(name, "", encoders)
    for field in _OF_LISTS:
        recipe.model.config.pop(field, None)
    return recipe


def candidates() -> CandidateLists:
    """Returns five candidates of every mention, with the gold, and priors that do not favour it."""
    draw = random.Random(0)
    ids = [[f"Q{1 + (int(gold[1:]) - 1 + c) % 12}" for c in range(5)] for gold in MENTIONS["entity_id"]]
    priors = [[draw.uniform(0.05, 0.25) for _ in row] for row in ids]
    return CandidateLists(list(MENTIONS["mention_id"]), ids, {"prior": priors}, {"source": "made up"})


def step(recipe: Recipe, folder: Path, size: int) -> dict[str, Any]:
    """Returns the loss of a batch and the gradients of all weights, which a step of SGD with rate 1 subtracts."""
    torch.manual_seed(0)
    model, processor = build_model(recipe, texts_of(MENTIONS, ENTITIES))
    # Dropout and batch normalisation are not shared by processes.
    model.eval()
    model.train = lambda mode=True: model
    lists: dict[str, Any] = {}
    if isinstance(model, Reranker):
        lists["train_candidates"] = candidates()
    arguments = MelTrainingArguments(
        output_dir=str(folder / recipe.name),
        max_steps=1,
        per_device_train_batch_size=size,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        num_negatives=3,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        log_level="error",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        check_memory=False,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = MelTrainer(model, arguments, MENTIONS, entities=ENTITIES, processing_class=processor, **lists)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    gradients = {name: before[name] - parameter.detach() for name, parameter in trained.named_parameters()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "gradients": gradients}


def steps(folder: Path, size: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Returns loss and gradients of methods by name. The folder has the encoders that [`save_encoders`] wrote."""
    encoders = {side: str(folder / side) for side in ("text", "vision")}
    return {name: step(tiny(name, encoders), folder, size) for name in names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, size, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or METHODS
    torch.save(steps(folder, size, names), folder / f"{PartialState().process_index}.pt")

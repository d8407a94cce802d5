"""Trainings that two processes share, or that one process does with twice the batch: `python -m tests.training.shared_training FOLDER SIZE`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate import PartialState

from hf_mel.candidates.lists import CandidateLists
from hf_mel.data import image_checks
from hf_mel.errors import DataFormatError
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.readable_images import with_readable_images
from hf_mel.training.recipe import Recipe
from hf_mel.training.shared_batches import made_by_first
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyPairProcessor, ToyProcessor, toy_entities, toy_mentions, toy_model, toy_reranker
from tests.toy_documents import ToyDocumentProcessor, toy_document_reranker, toy_documents
from tests.training.toy_run import recipe_dict

ENTITIES = toy_entities(12)


def lists(mentions) -> CandidateLists:
    """Returns five candidates per mention, with the gold."""
    candidates = [[f"Q{1 + (int(gold[1:]) - 1 + c) % 12}" for c in range(5)] for gold in mentions["entity_id"]]
    return CandidateLists(list(mentions["mention_id"]), candidates, {}, {"source": "made up"})


def mimic() -> tuple[Any, Any]:
    """Returns a tiny MIMIC with a NIL score and its processor, which leaves missing images out."""
    content = recipe_dict(Path("unused"))
    for encoder in ("text_config", "vision_config"):
        content["model"]["config"][encoder] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    content["model"]["config"] |= {"nil_score": True, "missing_images": "absent"}
    content["processor"]["options"]["modality_masks"] = True
    torch.manual_seed(0)
    return build_model(Recipe.from_dict(content), [*ENTITIES["name"], *toy_mentions(40)["text"]])


def trainings(folder: Path, size: int) -> Iterator[tuple[str, MelTrainer]]:
    """Yields trainers by name, whose last batch is smaller than `size` mentions and has one example fewer than processes."""
    parts: dict[str, dict[str, Any]] = {
        "retriever": {"random_negatives": 3, "gradient_accumulation_steps": 2},
        "retriever that learns NIL": {"random_negatives": 2, "augment_images": True, "simulated_nil": 0.3},
        "reranker of mentions": {"num_negatives": 2},
        "reranker of contexts": {"num_negatives": 2, "gradient_accumulation_steps": 2},
        "reranker of documents": {"num_negatives": 4},
    }
    for name, options in parts.items():
        train: Any = toy_mentions(17, nil_every=5 if "NIL" in name else 0)
        candidates: dict[str, Any] = {}
        if name == "retriever":
            model, processor = toy_model(), ToyProcessor()
        elif name == "retriever that learns NIL":
            model, processor = mimic()
        elif name == "reranker of documents":
            train = toy_documents()
            model, processor = toy_document_reranker(), ToyDocumentProcessor()
        else:
            model, processor = toy_reranker(unit=name.split()[-1].removesuffix("s")), ToyPairProcessor()
        validation = toy_mentions(12) if name != "reranker of documents" else train
        if "reranker" in name:
            candidates = {"train_candidates": lists(train), "eval_candidates": lists(validation)}
        arguments = MelTrainingArguments(
            output_dir=str(folder / name),
            num_train_epochs=2,
            per_device_train_batch_size=size,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="linear",
            disable_tqdm=True,
            log_level="error",
            logging_steps=1,
            save_strategy="no",
            load_best_model_at_end=False,
            use_cpu=True,
            bf16=False,
            **options,
        )
        yield (
            name,
            MelTrainer(
                model,
                arguments,
                train_dataset=train,
                eval_dataset=validation,
                entities=ENTITIES,
                processing_class=processor,
                **candidates,
            ),
        )


def train_all(folder: Path, size: int) -> dict[str, Any]:
    """Trains all, and returns the losses, validation metrics and weights by name."""
    results = {}
    for name, trainer in trainings(folder, size):
        pairs = [0]  # of validation, scored by this process

        def count(module, args, inputs, pairs=pairs):
            if not module.training and "pair_mask" in inputs:
                pairs[0] += int(inputs["pair_mask"].sum())

        trainer.model.register_forward_pre_hook(count, with_kwargs=True)
        trainer.train()
        history = trainer.state.log_history
        results[name] = {
            "pairs": pairs[0],
            "losses": [entry["loss"] for entry in history if "loss" in entry],
            "metrics": [
                {k: v for k, v in entry.items() if "eval_" in k and "_per_second" not in k and k != "eval_runtime"}
                for entry in history
                if "eval_mrr" in entry
            ],
            "weights": {k: v.clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()},
        }
    return results


def counted(opened: list[Any], verify: Any, image: Any) -> Any:
    """Opens an image, and notes it."""
    opened.append(image)
    return verify(image)


def made_by_the_first() -> dict[str, Any]:
    """Returns what processes get that wait longer for the first than their group allows, the message of its error, and
    the numbers of readable images of some entities.
    """
    entities = ENTITIES.select(range(5)).to_list()
    for row, number in ((0, 0), (4, 1)):
        entities[row]["images"] = [{"bytes": b"none", "path": f"{number}.png"}]
    undecoded = datasets.Features({**ENTITIES.features, "images": datasets.List(datasets.Image())})
    readable = with_readable_images(toy_model(), ToyProcessor(), datasets.Dataset.from_list(entities, undecoded))[0]
    process = PartialState().process_index
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)

    def fail():
        raise DataFormatError(f"Process {process} cannot make them.", remedy="Give others.")

    def slowly():
        time.sleep(3)
        return f"made by {process}"

    made = {"slowly": made_by_first(slowly)}
    try:
        made_by_first(fail)
    except DataFormatError as error:
        made["error"] = str(error)
    return {**made, "images": [len(images) for images in readable["images"]]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    outcome = train_all(folder, int(sys.argv[2]))
    process = PartialState().process_index
    opened: list[Any] = []
    image_checks.verify_image = partial(counted, opened, image_checks.verify_image)
    torch.save({"trained": outcome, "made": made_by_the_first(), "opened": len(opened)}, folder / f"{process}.pt")

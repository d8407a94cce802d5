"""Benchmark of training: mentions per second of `MelTrainer`, compared with a plain loop over the same encoders.

Both read the same mentions and entities with texts and PNG images, prepare them with the same tokenizer and image
processor, and take AdamW steps on both encoders. The plain loop scores a pair by the inner products of pooled texts and of
pooled images. The library trains MIMIC, with three units, four losses, gradient clipping and a schedule. MIMIC's pair
scoring, forward and backward over 128 × 128 pairs, is also timed alone. Weights are random, because they do not affect
the speed. The encoders are small by default (text 6 layers of width 384, images 12 layers of width 192, 50 patches).
`--encoders clip` uses those of CLIP ViT-B/32.

    python -m benchmarks.training
    python -m benchmarks.training --batch-size 16 --repeats 3
    python -m benchmarks.training --device cuda --dtype bfloat16 --encoders clip --steps 20
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from transformers import TrainerCallback
from transformers.utils import logging

from benchmarks import harness
from benchmarks.building import generated_entities, model_and_processor
from hf_mel.schema import mention_features
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.trainer import MelTrainer


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=128, help="mentions per batch")
    parser.add_argument("--steps", type=int, default=2, help="steps of one repeat, at least 2; the first is not timed")
    parser.add_argument("--encoders", choices=["clip", "small"], default="small", help="see above")
    return parser


def mentions_of(entities: datasets.Dataset) -> datasets.Dataset:
    """Returns a mention of each entity: its name before the words of its attributes, and its image."""
    columns_of_entities = entities.with_format("arrow")[:].to_pydict()
    columns: dict[str, list] = {name: [] for name in mention_features()}
    for row, (entity_id, name) in enumerate(
        zip(columns_of_entities["entity_id"], columns_of_entities["name"], strict=True)
    ):
        values = {
            "mention_id": f"m{row}",
            "context_id": f"c{row}",
            "text": f"{name} {columns_of_entities['attributes'][row]}",
            "mention": name,
            "start": 0,
            "end": len(name),
            "mention_type": "",
            "topic": "",
            "image": columns_of_entities["images"][row][0],
            "entity_id": entity_id,
            "candidates": [],
        }
        for column, value in values.items():
            columns[column].append(value)
    return datasets.Dataset.from_dict(columns, features=mention_features())


class _StepClock(TrainerCallback):
    """Records the time at the end of each step."""

    def __init__(self, device: str):
        self.device, self.ends = device, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def library_steps(args: argparse.Namespace, model: Any, processor: Any, mentions: Any, entities: Any) -> list[float]:
    """Trains with the library. Returns the seconds of each step after the first, including data preparation."""
    clock = _StepClock(args.device)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        options = MelTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
            bf16=args.dtype == "bfloat16",
            fp16=args.dtype == "float16",
            # Memory that the repeats before have freed still counts as used by this process.
            check_memory=False,
        )
        trainer = MelTrainer(
            model, options, train_dataset=mentions, entities=entities, processing_class=processor, callbacks=[clock]
        )
        trainer.train()
    return [after - before for before, after in pairwise(clock.ends)]


def plain_steps(args: argparse.Namespace, model: Any, processor: Any, mentions: Any, entities: Any) -> list[float]:
    """Trains the encoders alone in a plain loop. Returns the same seconds."""
    encoders = torch.nn.ModuleList([model.text_model, model.vision_model])
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=1e-5)
    half = args.dtype != "float32"
    autocast = torch.autocast(args.device, getattr(torch, args.dtype)) if half else contextlib.nullcontext()
    ends = []

    def features(batch: Any, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {
            name: batch[f"{side}_{name}"].to(args.device) for name in ("input_ids", "attention_mask", "pixel_values")
        }
        mask = inputs["attention_mask"][:, :, None].float()
        text = encoders[0](input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        image = encoders[1](pixel_values=inputs["pixel_values"]).last_hidden_state
        pooled = (text * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled.float(), dim=-1), F.normalize(image.mean(1).float(), dim=-1)

    encoders.train()
    for step in range(args.steps):
        chosen = range(step * args.batch_size, (step + 1) * args.batch_size)
        batch = processor(mentions=[mentions[row] for row in chosen])
        batch = {**batch, **processor(entities=[entities[row] for row in chosen])}
        with autocast:
            (text, image), (entity_text, entity_image) = features(batch, "mention"), features(batch, "entity")
            scores = text @ entity_text.T + image @ entity_image.T
        loss = F.cross_entropy(scores.float() / 0.05, torch.arange(len(scores), device=scores.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return [after - before for before, after in pairwise(ends)]


def pair_scoring(model: Any, processor: Any, mentions: Any, entities: Any, batch_size: int):
    """Returns a function that scores all pairs of a batch, forward and backward, from precomputed encodings."""
    with torch.no_grad():
        sides = []
        for kind, data in (("mentions", mentions), ("entities", entities)):
            inputs = processor(**{kind: [data[row] for row in range(batch_size)]})
            encode = model.encode_mentions if kind == "mentions" else model.encode_entities
            encodings = encode(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
            sides.append({k: v.detach() for k, v in encodings.items()})
    for side in sides:
        for tensor in side.values():
            if tensor.is_floating_point():
                tensor.requires_grad_()
    labels = torch.arange(batch_size, device=model.device)

    def score() -> None:
        units = model.unit_scores(*sides)
        total = torch.stack(list(units.values())).mean(0)
        sum(F.cross_entropy(scores, labels) for scores in (total, *units.values())).backward()

    return score


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times the library, the plain loop and the pair scoring, and returns the result."""
    harness.start(args)
    logging.set_verbosity_error()
    # The library prepares the next batch during a step. With one more batch, the last step prepares one, too.
    entities = generated_entities(args.batch_size * (args.steps + 1))
    mentions = mentions_of(entities)
    model, processor = model_and_processor(args.encoders, entities["attributes"])
    model.to(args.device)
    machine = harness.machine(args.device)
    steps: dict[str, list[float]] = {"library": [], "plain loop": []}
    data = (args, model, processor, mentions, entities)
    cases = {
        "library": lambda: steps["library"].append(statistics.median(library_steps(*data))),
        "plain loop": lambda: steps["plain loop"].append(statistics.median(plain_steps(*data))),
    }
    harness.interleaved(cases, args.repeats, device=args.device, progress=harness.say, warm_up=False)
    score = pair_scoring(model, processor, mentions, entities, args.batch_size)
    pair_seconds = harness.interleaved({"pair scoring": score}, args.repeats, device=args.device)["pair scoring"]
    medians = {name: statistics.median(times) for name, times in steps.items()}
    return {
        "model": f"MIMIC, {'CLIP ViT-B/32' if args.encoders == 'clip' else 'small'} encoders, random weights",
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "share_of_plain_loop": medians["plain loop"] / medians["library"],
        "mentions_per_second": args.batch_size / medians["library"],
        "plain_mentions_per_second": args.batch_size / medians["plain loop"],
        "share_of_pair_scoring": statistics.median(pair_seconds) / medians["library"],
        "library_step": harness.summary(steps["library"]),
        "plain_step": harness.summary(steps["plain loop"]),
        "pair_scoring": harness.summary(pair_seconds),
        "repeats": args.repeats,
        "device": args.device,
        "machine": machine,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    path = harness.write(args.output, "training", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

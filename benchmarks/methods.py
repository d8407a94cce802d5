"""Benchmark of training every method: the shares of a step that preparing data and scoring pairs cost, and a plain loop beside it.

A row is a recipe, trained by `MelTrainer` with the batch, the negatives and the lengths that the recipe has. Pretrained encoders
are replaced by smaller ones of their kind with random weights: texts 6 layers of width 384, images 12 layers of width 192 with 50
patches or a ResNet-18, word vectors of width 300. `--encoders base` takes the sizes of BERT base, ViT-B/32 and ResNet-50. Entities
have 20 to 40 words and a 256 × 256 PNG image, as in `benchmarks.building`; a context has 2 mentions, a document 24. Candidates are
drawn at random. Everything is generated.

- "waiting" is the time by the clock that the trainer waits for its next batch, as a share of the step. A second thread prepares it
  during the step before, as the trainer does by default. "data" is the processor time of that work, as a share of the step's.
- "pair scoring" is the forward and backward pass of what follows the encoders, from their given outputs, as a share of the step. For a
  retriever it follows `encode_mentions` and `encode_entities`, and ends with the losses. For a reranker it is everything but the
  modules of `backbone_names`. A model that names no pretrained part, or word vectors alone, consists of pair scoring.
- The plain loop makes the same batches, and takes the same steps of AdamW with the same model: the rest is the trainer.

Processor time counts all threads, and hardly depends on what else runs. The step of a model that is fitted without gradients is the
forward pass of a batch; its fit at the end is not measured.

    python -m benchmarks.methods
    python -m benchmarks.methods --batch-size 16 --repeats 2 --threads 1
    python -m benchmarks.methods --recipes mmel_wikimel --encoders base --batch-size 4
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils import _pytree
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForNextSentencePrediction,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PrinterCallback,
    ResNetConfig,
    ResNetModel,
    TrainerCallback,
    ViltConfig,
    ViltModel,
    set_seed,
)
from transformers.utils import logging

from benchmarks import harness
from benchmarks.building import encoder_configs, generated_entities
from hf_mel.candidates.lists import CandidateLists
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import FitsFeatures, Retriever, knows_posts
from hf_mel.schema import mention_features, post_features
from hf_mel.training.assemble import build_model
from hf_mel.training.collators import BATCH_IDS
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import training_arguments
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from hf_mel.training.trainer import MelTrainer

#: Recipes to measure, of each method and its baselines.
RECIPES = (
    "mimic_wikimel",
    "bert_wikimel",
    "clip_wikimel",
    "vilt_wikimel",
    "colbert-text_wikimel",
    "ghmfc_wikimel",
    "hiecoatt_wikimel",
    "dzmned_wikimel",
    "jmel_wikimel",
    "velml_wikimel",
    "imn_tweets",
    "mmel_wikimel",
    "pfmel-fmel_tweets",
    "blink-cross_wikimel",
    "cholan_tweets",
    "genre_wikimel",
    "autoregressive_tweets",
    "arnn_wikimel",
    "att_tweets",
    "ncel_wikimel",
    "dgcn_aida",
    "mulrel_aida",
    "ganea_aida",
    "mm_nel_m3el",
    "et_tweets",
)
_ENTITIES, _CONTEXT, _DOCUMENT = 512, 2, 24
#: What the trainer of a benchmark does not do, and settings that only change when it does what it does.
_QUICK: dict[str, Any] = {
    "num_train_epochs": 1,
    "warmup_steps": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "disable_tqdm": True,
    "check_memory": False,
    "dataloader_num_workers": 0,
}


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="recipes to measure, separated by commas")
    parser.add_argument("--steps", type=int, default=3, help="steps of a recipe, at least 2; the first is not timed")
    parser.add_argument("--encoders", choices=["base", "small"], default="small", help="see above")
    parser.add_argument("--batch-size", type=int, help="largest batch; a recipe may have a smaller one")
    return parser


def _sizes(side: str, encoders: str) -> dict[str, Any]:
    """Returns the sizes of an encoder of texts or images: small ones, or those of BERT base and ViT-B/32."""
    sizes = dict(encoder_configs("small")[f"{side}_config"])
    sizes.pop("model_type")
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    return sizes if encoders == "small" else sizes | base


def _clip(encoders: str) -> Any:
    text, vision = ({**_sizes(side, encoders), "projection_dim": 256} for side in ("text", "vision"))
    return CLIPModel(CLIPConfig(text_config=text | {"eos_token_id": 3}, vision_config=vision, projection_dim=256))


def _bart(encoders: str) -> Any:
    text, sizes = _sizes("text", encoders), {}
    for side in ("encoder", "decoder"):
        sizes |= {
            f"{side}_layers": text["num_hidden_layers"],
            f"{side}_attention_heads": text["num_attention_heads"],
            f"{side}_ffn_dim": text["intermediate_size"],
        }
    config = BartConfig(vocab_size=text["vocab_size"], d_model=text["hidden_size"], **sizes)
    return BartForConditionalGeneration(config)


def _resnet(encoders: str) -> Any:
    small = {"hidden_sizes": [64, 128, 256, 512], "depths": [2] * 4, "layer_type": "basic"}
    return ResNetModel(ResNetConfig(**(small if encoders == "small" else {})))


#: What takes the place of a pretrained encoder, by the first of these words that its name has; otherwise the first.
_ENCODERS: dict[str, Callable[[str], Any]] = {
    "bert": lambda encoders: BertForNextSentencePrediction(BertConfig(**_sizes("text", encoders))),
    "clip": _clip,
    "bart": _bart,
    "vilt": lambda encoders: ViltModel(ViltConfig(**_sizes("text", encoders), image_size=224, patch_size=32)),
    "resnet": _resnet,
}


def encoder(reference: str, folder: Path, texts: list[str], encoders: str) -> str:
    """Saves a smaller encoder of the kind of a pretrained one, or word vectors, and returns where it is."""
    if reference.endswith(".txt"):
        path, generator = folder / "vectors.txt", random.Random(0)
        if not path.exists():
            words = sorted({word for text in texts for word in text.lower().split()})
            lines = (" ".join([word, *(f"{generator.gauss(0, 0.4):.4f}" for _ in range(300))]) for word in words)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)
    kind = next((kind for kind in _ENCODERS if kind in reference.lower()), "bert")
    if not (folder / kind).exists():
        torch.manual_seed(0)
        _ENCODERS[kind](encoders).save_pretrained(folder / kind)
        train_wordpiece(texts, 2000).save_pretrained(folder / kind)
        sizes = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
        CLIPImageProcessorPil(**sizes).save_pretrained(folder / kind)
    return str(folder / kind)


def accounts(entities: datasets.Dataset) -> datasets.Dataset:
    """Returns entities with the columns of accounts."""
    columns: dict[str, list[Any]] = {
        "screen_name": [f"user{row}" for row in range(len(entities))],
        "location": ["Here"] * len(entities),
    }
    columns |= {"recent_posts": [[text[:60], text[-60:]] for text in entities["attributes"]]}
    for name, values in columns.items():
        entities = entities.add_column(name, values)
    return entities


def mentions_of(entities: datasets.Dataset, count: int, size: int) -> datasets.Dataset:
    """Returns `count` mentions of the entities in turn, with their words and images, in contexts and documents of `size`."""
    given = entities.with_format("arrow")[:].to_pydict()
    rows = []
    for number in range(count):
        entity = number % len(entities)
        name, words = given["name"][entity], given["attributes"][entity].split()
        before = " ".join(words[5:15])
        rows.append(
            {
                "mention_id": f"m{number}",
                "context_id": f"c{number // size}",
                "document_id": f"d{number // size}",
                "modality": "text",
                "text": f"{before} {name} {' '.join(words[15:])}",
                "mention": name,
                "start": len(before) + 1,
                "end": len(before) + 1 + len(name),
                "mention_type": "",
                "topic": "",
                "image": given["images"][entity][0],
                "entity_id": given["entity_id"][entity],
                "candidates": [],
            }
        )
    kinds = {name: datasets.Value("string") for name in ("document_id", "modality")}
    return datasets.Dataset.from_list(rows, features=mention_features(**kinds))


def posts_about(entities: datasets.Dataset, count: int = 4) -> datasets.Dataset:
    """Returns `count` posts about each of 64 entities, as a model reads that represents entities by posts."""
    given = entities.select(range(min(64, len(entities)))).with_format("arrow")[:].to_pydict()
    rows = [
        {
            "post_id": f"p{row}-{number}",
            "entity_id": entity_id,
            "text": given["attributes"][row][10 * number :],
            "image": given["images"][row][0],
        }
        for row, entity_id in enumerate(given["entity_id"])
        for number in range(count)
    ]
    return datasets.Dataset.from_list(rows, features=post_features())


def drawn_candidates(mentions: datasets.Dataset, entities: datasets.Dataset, count: int) -> CandidateLists:
    """Returns a list for each mention: its gold and others, with scores of all sources that a model may read."""
    draw, ids = random.Random(0), list(entities["entity_id"])
    lists: list[list[str]] = []
    for gold in mentions["entity_id"]:
        lists.append(list(dict.fromkeys([gold, *draw.sample(ids, min(count, len(ids)))]))[:count])
    falling = [[1 / (place + 2) for place in range(len(each))] for each in lists]
    return CandidateLists(list(mentions["mention_id"]), lists, dict.fromkeys(("prior", "retriever"), falling))


class _Watch(TrainerCallback):
    """Times of the trainer's loop: when steps end, by the clock and in processor time, and how long it waits for batches."""

    def __init__(self, device: str):
        self.device = device
        self.waits: list[float] = []
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures a block that gets the batch of the next step."""
        begin = time.perf_counter()
        yield
        self.waits.append(time.perf_counter() - begin)

    def medians(self) -> dict[str, float]:
        """Returns the times of the steps after the first, which also starts the loader."""
        pairs = list(pairwise(self.ends))
        times = {
            "step_s": [after[0] - before[0] for before, after in pairs],
            "step_cpu_s": [after[1] - before[1] for before, after in pairs],
            "waiting_s": self.waits[1 : len(self.ends)],
        }
        return {name: statistics.median(values) for name, values in times.items()}


class _WatchedTrainer(MelTrainer):
    """The trainer, with a watch where its loop gets a batch."""

    def __init__(self, *args: Any, watch: _Watch, **kwargs: Any):
        super().__init__(*args, callbacks=[watch], **kwargs)
        self.watch = watch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Gets the batches of the next step."""
        with self.watch.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def _fitting_batches(self) -> Iterator[dict[str, Any]]:
        batches = super()._fitting_batches()
        while True:
            with self.watch.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self.watch.on_step_end(self.args, self.state, self.control)


def encoder_calls(model: Any) -> list[tuple[Any, str]]:
    """Returns the functions, as owners and names, that a step calls before it scores pairs."""
    if isinstance(model, Retriever):
        return [(model, "encode_mentions"), (model, "encode_entities")]
    modules = dict(model.named_modules())
    return [(modules[name], "forward") for name in model.backbone_names if name in modules]


@contextlib.contextmanager
def replaced(calls: list[tuple[Any, str]], make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replaces functions by what `make` makes of them while the block runs."""
    for owner, name in calls:
        setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in calls:
            delattr(owner, name)


def scoring(model: Any, run: Callable[[], None]) -> Callable[[], None]:
    """Returns a function that does what `run` does with the outputs of the encoders given, so that they take no time.

    Args:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]): The model that `run` calls.
        run (callable): The forward pass, and the backward pass if the model has one.
    """
    calls, outputs, inside = encoder_calls(model), [], [False]

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:  # an encoder within an encoder
                return function(*args, **kwargs)
            inside[0] = True
            try:
                outputs.append(function(*args, **kwargs))
            finally:
                inside[0] = False
            return outputs[-1]

        return call

    with replaced(calls, recording):
        run()

    def as_leaf(value: Any) -> Any:
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value

    outputs[:] = [_pytree.tree_map(as_leaf, output) for output in outputs]

    def score() -> None:
        remaining = iter(outputs)
        with replaced(calls, lambda function: lambda *args, **kwargs: next(remaining)):
            run()

    return score


def small_recipe(name: str, folder: Path, texts: list[str], batch_size: int | None, encoders: str) -> Recipe:
    """Loads a recipe with smaller encoders, for a few steps."""
    recipe = Recipe.load(name)
    for side in ("text", "vision"):
        if reference := getattr(recipe.model, side):
            setattr(recipe.model, side, encoder(reference, folder, texts, encoders))
    own = recipe.training["per_device_train_batch_size"]
    recipe.training |= _QUICK | {"per_device_train_batch_size": min(own, batch_size or own)}
    return recipe


def measure(name: str, args: argparse.Namespace, entities: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Trains by a recipe for some steps, in a plain loop too, and returns the row."""
    recipe = small_recipe(name, folder, list(entities["attributes"]), args.batch_size, args.encoders)
    set_seed(0)
    model, processor = build_model(recipe, texts_of(mentions_of(entities, 64, 1), entities))
    model.to(args.device)
    unit = getattr(model, "example_unit", "mention")
    size = {"context": _CONTEXT, "document": _DOCUMENT}.get(unit, 1)
    batch_size = recipe.training["per_device_train_batch_size"]
    # The trainer asks for a batch during the step before.
    mentions = mentions_of(entities, (args.steps + 1) * batch_size * size, size)
    watch = _Watch(args.device)
    half = args.dtype != "float32"
    precision = {"bf16": args.dtype == "bfloat16", "fp16": args.dtype == "float16", "use_cpu": args.device == "cpu"}
    with tempfile.TemporaryDirectory(dir=args.scratch) as output:
        recipe.training |= {"max_steps": args.steps} | precision
        lists = {}
        if not isinstance(model, Retriever):
            assert recipe.candidates is not None
            lists = {"train_candidates": drawn_candidates(mentions, entities, recipe.candidates.k)}
        trainer = _WatchedTrainer(
            model,
            training_arguments(recipe, output),
            mentions,
            entities=entities,
            processing_class=processor,
            inputs=ModelInputs(model, processor, posts_about(entities) if knows_posts(model) else None),
            watch=watch,
            **lists,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6) if learned else None
    batches = list(torch.arange((args.steps + 1) * batch_size).split(batch_size))
    rows: Any = trainer.train_dataset
    collate, fitted = trainer.data_collator, isinstance(model, FitsFeatures)

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast(args.device, getattr(torch, args.dtype), enabled=half):
            if fitted:
                with torch.no_grad():
                    model.pair_features(**{key: value for key, value in batch.items() if key != "labels"})
                return
            loss = model(**batch).loss
        model.zero_grad()
        loss.backward()

    def prepared(number: int) -> dict[str, Any]:
        batch = trainer._prepare_inputs(collate(rows.__getitems__(batches[number].tolist())))
        batch.pop(BATCH_IDS, None)
        return batch

    def plain() -> None:
        step(prepared(next(numbers)))
        if optimizer is not None:
            optimizer.step()

    model.train(not fitted)
    numbers = itertools.cycle(range(len(batches)))
    cpu: dict[str, list[float]] = {}
    batch = prepared(0)
    given = scoring(model, lambda: step(batch))
    cases = {"plain": plain, "scoring": given, "data": lambda: prepared(next(numbers))}
    harness.interleaved(cases, args.repeats, device=args.device, cpu_seconds=cpu)
    return {
        "recipe": name,
        "method": model.config.model_type,
        "kind": "retriever" if isinstance(model, Retriever) else "reranker",
        "batch_size": batch_size,
        "pairs": next((tensor.numel() for key, tensor in batch.items() if key == "pair_mask"), None),
        **watch.medians(),
        **{f"{case}_cpu_s": statistics.median(cpu[case]) for case in cases},
    }


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures each recipe, and yields the result after each, so that an interrupted run is not lost."""
    harness.start(args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    entities = accounts(generated_entities(_ENTITIES))
    result: dict[str, Any] = {"rows": [], "entities": len(entities), "machine": harness.machine(args.device)}
    result |= {name: getattr(args, name) for name in ("encoders", "dtype", "repeats", "device")}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for name in args.recipes.split(","):
            row = measure(name, args, entities, Path(folder))
            result["rows"].append(row)
            shares = [f"{key} {row[f'{key}_cpu_s'] / row['step_cpu_s']:.1%}" for key in ("data", "scoring", "plain")]
            shares.append(f"waiting {row['waiting_s'] / row['step_s']:.1%}")
            harness.say(f"{name}: {row['step_cpu_s']:.2f} s of CPU time a step, {', '.join(shares)}")
            yield result
            gc.collect()


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    name = "methods" + ("" if args.encoders == "small" else f"-{args.encoders}")
    for result in run(args):
        harness.write(args.output, name, result)
    show(args.output, [name])


if __name__ == "__main__":
    main()

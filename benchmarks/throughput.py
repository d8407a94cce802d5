"""Benchmark of throughput with encoding: mentions a second from a file to a file of links, and from a split to its ranks.

"link" reads a file of mentions and links it, by the functions of `hf-mel link --input`. "evaluate" ranks the mentions of a
split, by those of `hf-mel evaluate`; the entities are those of the knowledge base, which the command would encode first.
Both run beside two peers, over the same mentions, in turns:

- the encoder alone: the forward pass over prepared tensors, in batches of similar length;
- a plain loop: a batch in the order of the file is tokenised, padded to its longest text, encoded, and scored with all entities,
  whose encodings are in memory. Mentions are fewer, because it is slow.

Each is measured in float32 and in bfloat16 (`--bf16`), which are what the library offers. Links in bfloat16 are compared with those in
float32. Processor time counts all threads, and hardly depends on what else runs. Opening the model is not measured.

Without a run, texts are generated, and the weights of MIMIC with a small text encoder are random. A run's knowledge base grows
as in `benchmarks.latency` ([`benchmarks.sources.Resampled.named_kb`]).

    python -m benchmarks.throughput
    python -m benchmarks.throughput --model runs/mimic-text_wikimel --dataset data/wikimel --mentions 1024 --threads 1
    python -m benchmarks.throughput … --sizes 18880,100000 --indexes exact,faiss-pq
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch

from benchmarks import harness
from benchmarks.building import encoder_configs
from benchmarks.latency import build_once
from benchmarks.sources import Resampled
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.encodings import as_float, row_lengths, slice_encodings
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.link_file import link_file, read_mentions
from hf_mel.linking.linker import EntityLinker
from hf_mel.modeling.mimic import MimicConfig, MimicModel, MimicProcessor
from hf_mel.schema import entity_features, mention_features
from hf_mel.training.tokenizer import train_wordpiece

TOP_K = 10
DTYPES = {"float32": False, "bfloat16": True}
#: Mentions and entities that the plain loop takes at a time.
PLAIN_BATCH, _PLAIN_ENTITIES = 32, 4096
#: Columns of the file of mentions.
_COLUMNS = ("text", "mention", "start", "end")


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", default="2000", help="entities of the knowledge bases")
    parser.add_argument("--indexes", default="exact", help="index of each size")
    parser.add_argument("--mentions", type=int, default=256, help="number of mentions")
    parser.add_argument("--plain-mentions", type=int, default=PLAIN_BATCH, help="number of mentions of the plain loop")
    parser.add_argument("--model", help="run folder to measure in place of generated texts")
    parser.add_argument("--dataset", help="data-set folder of that run")
    return parser


class GeneratedTexts:
    """Entities of 20 to 40 made-up words, mentions of them, and MIMIC with a small text encoder and random weights."""

    description = "generated texts, MIMIC with a small text encoder and random weights"

    def __init__(self, scratch: Path, size: int, encoder: dict[str, Any] | None = None):
        generator = random.Random(0)
        syllables = ["ka", "ro", "mi", "tel", "an", "sor", "ve", "lu", "den", "pi"]
        self.scratch, self._texts = scratch, []
        for _ in range(size):
            words = ["".join(generator.choices(syllables, k=3)) for _ in range(generator.randint(20, 40))]
            self._texts.append(" ".join(words))
        tokenizer = train_wordpiece(self._texts[:2000], vocab_size=2000)
        text = encoder_configs("small")["text_config"] | (encoder or {})
        torch.manual_seed(0)
        config = MimicConfig(text_config=text, units=["text"], text_pooling="mean", mask_padding=True)
        self.model, self.processor = MimicModel(config).eval(), MimicProcessor.from_parts(tokenizer)

    def builder(self, size: int) -> tuple[Any, Any]:
        """Returns the model and the processor."""
        return self.model, self.processor

    def named_kb(self, size: int) -> KnowledgeBase:
        """Builds the knowledge base of the first `size` entities."""
        columns: dict[str, list] = {name: [""] * size for name in entity_features()}
        columns |= {"aliases": [[]] * size, "images": [[]] * size, "attributes": self._texts[:size]}
        columns["entity_id"] = [f"Q{row}" for row in range(size)]
        columns["name"] = [" ".join(text.split()[:2]) for text in self._texts[:size]]
        entities = datasets.Dataset.from_dict(columns, features=entity_features())
        return KnowledgeBase.build(entities, self.model, self.processor, dtype="bfloat16", progress=False)

    def mention_rows(self, count: int, size: int) -> list[dict[str, Any]]:
        """Returns mentions of the first `size` entities: their names before and after some of their words."""
        generator, rows = random.Random(1), []
        for row in (number % size for number in range(count)):
            words = self._texts[row].split()
            name, before = " ".join(words[:2]), " ".join(words[2 : generator.randint(3, 12)])
            start = len(before) + 1
            after = " ".join(words[12 : generator.randint(12, len(words))])
            rows.append(
                {
                    "text": f"{before} {name} {after}",
                    "mention": name,
                    "start": start,
                    "end": start + len(name),
                    "entity_id": f"Q{row}",
                }
            )
        return rows


class RunTexts(Resampled):
    """The test mentions of a run's data set, without images, with the ids that grown knowledge bases have."""

    def mention_rows(self, count: int, size: int) -> list[dict[str, Any]]:
        """Returns the first mentions whose golds are among the first `size` entities."""
        row_of = {entity_id: row for row, entity_id in enumerate(self.entities["entity_id"][:size])}
        texts = self._mentions.select_columns([*_COLUMNS, "entity_id"])
        found = (row for row in texts if row["entity_id"] in row_of)
        chosen = [row for row, _ in zip(found, range(count), strict=False)]
        return [{**row, "entity_id": f"Q{row_of[row['entity_id']]}"} for row in chosen]


def as_dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Returns mentions as rows of the schema."""
    columns: dict[str, list] = {name: [""] * len(rows) for name in mention_features()}
    columns |= {name: [row[name] for row in rows] for name in (*_COLUMNS, "entity_id")}
    columns |= {name: [f"{name}{row}" for row in range(len(rows))] for name in ("mention_id", "context_id")}
    columns |= {"image": [None] * len(rows), "candidates": [[]] * len(rows)}
    return datasets.Dataset.from_dict(columns, features=mention_features())


def encoder_alone(model: Any, processor: Any, rows: Sequence[dict[str, Any]], bf16: bool) -> Callable[[], None]:
    """Returns a function that encodes prepared mentions, those of similar length together."""
    inputs = ModelInputs(model, processor).mentions([{**row, "image": None} for row in rows])
    order = torch.from_numpy(row_lengths(inputs)).argsort()
    batches = [slice_encodings(inputs, part) for part in order.split(PLAIN_BATCH)]

    @torch.inference_mode()
    def run() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            for batch in batches:
                model.encode_mentions(**batch)

    return run


def plain_loop(model: Any, processor: Any, rows: Sequence[dict[str, Any]], entities: Any, bf16: bool) -> torch.Tensor:
    """Encodes batch after batch, and scores every pair. Returns the best entities [M, k] of each mention."""
    count = len(next(iter(entities.values())))
    best = []
    for first in range(0, len(rows), PLAIN_BATCH):
        inputs = processor(mentions=[{**row, "image": None} for row in rows[first : first + PLAIN_BATCH]])
        longest = int(inputs["mention_attention_mask"].sum(1).max())
        texts = ("mention_input_ids", "mention_attention_mask")
        inputs = {name: x[:, :longest] if name in texts else x for name, x in inputs.items()}
        inputs = {name: x.to(model.device) for name, x in inputs.items()}
        with torch.inference_mode():
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                encoded = as_float(model.encode_mentions(**inputs))
            scores = [
                model.score(encoded, as_float(slice_encodings(entities, slice(start, start + _PLAIN_ENTITIES))))
                for start in range(0, count, _PLAIN_ENTITIES)
            ]
            best.append(torch.cat(scores, 1).topk(min(TOP_K, count)).indices)
    return torch.cat(best)


def links_of(output: Path) -> list[list[str]]:
    """Returns the ids of the candidates of each mention in a file of links."""
    lines = output.read_text(encoding="utf-8").splitlines()
    return [[candidate["entity_id"] for candidate in json.loads(line)["linked"]["candidates"]] for line in lines]


def changes(golds: Sequence[str], links: Sequence[list[str]], others: Sequence[list[str]]) -> dict[str, int]:
    """Counts the mentions whose first entity differs, and those whose gold has another place among the candidates."""

    def places(lists: Sequence[list[str]]) -> list[int | None]:
        return [found.index(gold) if gold in found else None for gold, found in zip(golds, lists, strict=True)]

    first = sum(found[:1] != other[:1] for found, other in zip(links, others, strict=True))
    moved = sum(place != other for place, other in zip(places(links), places(others), strict=True))
    return {"changed_first_places": first, "changed_gold_places": moved}


def measure(
    source: Any,
    size: int,
    index: str,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    plain_mentions: int,
    repeats: int,
    device: str,
) -> Iterator[dict[str, Any]]:
    """Measures one knowledge base and index. Yields a result for each dtype."""
    kb = source.named_kb(size)
    model, processor = source.builder(size)
    if index != "exact":
        build_once(kb, index, model, processor)
    mentions, file = as_dataset(rows), folder / "mentions.jsonl"
    lines = [json.dumps({name: row[name] for name in _COLUMNS}) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    plain_rows, entities = rows[:plain_mentions], kb.encodings(range(len(kb)))
    evaluator = FullEvaluator(kb, batch_size=64, progress=False)
    inputs = ModelInputs(model, processor)
    cases: dict[str, Callable[[], Any]] = {}

    def link(linker: EntityLinker, output: Path) -> None:
        link_file(linker, read_mentions(file), output, top_k=TOP_K)

    def evaluate(bf16: bool) -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            evaluator(inputs, mentions)

    for dtype, bf16 in DTYPES.items():
        linker = EntityLinker(model, processor, kb, index=index, bf16=bf16)
        cases[f"link {dtype}"] = partial(link, linker, folder / f"{dtype}.jsonl")
        cases[f"encoder {dtype}"] = encoder_alone(model, processor, rows, bf16)
        cases[f"plain {dtype}"] = partial(plain_loop, model, processor, plain_rows, entities, bf16)
        if index == "exact":
            cases[f"evaluate {dtype}"] = partial(evaluate, bf16)
    cpu: dict[str, list[float]] = {}
    seconds = harness.interleaved(cases, repeats, device=device, progress=harness.say, cpu_seconds=cpu)
    links = {dtype: links_of(folder / f"{dtype}.jsonl") for dtype in DTYPES}
    golds = [row["entity_id"] for row in rows]
    for dtype in DTYPES:
        result: dict[str, Any] = {"entities": len(kb), "index": index, "dtype": dtype, "mentions": len(rows)}
        for case in ("link", "encoder", "plain", "evaluate"):
            if f"{case} {dtype}" in cases:
                count = len(plain_rows) if case == "plain" else len(rows)
                result[f"{case}_cpu_s"] = statistics.median(cpu[f"{case} {dtype}"]) / count
                result[f"{case}_s"] = statistics.median(seconds[f"{case} {dtype}"]) / count
        hits = sum(found[:1] == [gold] for gold, found in zip(golds, links[dtype], strict=True))
        yield result | changes(golds, links[dtype], links["float32"]) | {"hits@1": hits / len(golds)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all sizes and returns the result."""
    harness.start(args)
    sizes, indexes = [int(size) for size in args.sizes.split(",")], args.indexes.split(",")
    if len(sizes) != len(indexes):
        raise SystemExit(f"--sizes has {len(sizes)} sizes, and --indexes {len(indexes)} indexes. Give as many.")
    if (args.model is None) != (args.dataset is None):
        raise SystemExit("--model and --dataset must be given together.")
    source: Any = (
        GeneratedTexts(args.scratch, max(sizes))
        if args.model is None
        else RunTexts(args.scratch, args.model, args.dataset)
    )
    source.model.to(args.device)
    rows = source.mention_rows(args.mentions, min(sizes))
    machine = harness.machine(args.device)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for size, index in zip(sizes, indexes, strict=True):
            options = {"plain_mentions": args.plain_mentions, "repeats": args.repeats, "device": args.device}
            results += measure(source, size, index, rows, Path(folder), **options)
    return {
        "source": source.description,
        "plain_mentions": min(args.plain_mentions, len(rows)),
        "top_k": TOP_K,
        "rows": results,
        "repeats": args.repeats,
        "device": args.device,
        "machine": machine,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    name = "throughput" + ("-" + Path(args.model).resolve().name if args.model else "")
    path = harness.write(args.output, name, run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

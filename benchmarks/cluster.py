"""Cost of a large knowledge base on several hosts: hosts, hours, bytes and money, from measured figures.

    python -m benchmarks.cluster                                   # prints the tables for 100 million entities
    python -m benchmarks.cluster --entities 1000000000 --hosts 32 --price 0.10
    python -m benchmarks.cluster --docs                            # writes them into docs/guides/cluster.md
    python -m benchmarks.cluster --measure --model runs/mimic-text_wikimel --dataset data/wikimel --threads 1

`--measure` encodes entities of a data set with one thread and writes CPU seconds and bytes an entity into
`benchmarks/results/cluster.json`. All else is multiplication. The figures of images come from `building.json`, those of indexes
and ranking from `latency-mimic-text_wikimel-codes.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness

#: Page with the tables, and the comments around them.
PAGE = harness.ROOT / "docs" / "guides" / "cluster.md"
BEGIN, END = "<!-- cluster: begin -->", "<!-- cluster: end -->"
_LATENCY = "latency-mimic-text_wikimel-codes"


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--entities", type=int, default=100_000_000, help="entities of the knowledge base")
    parser.add_argument("--hosts", type=int, default=8, help="hosts that share them")
    parser.add_argument("--cores", type=int, default=32, help="cores of a host")
    parser.add_argument(
        "--price", type=float, default=0.04, help="price of a core for an hour: an assumption, give yours"
    )
    parser.add_argument("--docs", action="store_true", help=f"write the tables into {PAGE.name}")
    parser.add_argument("--measure", action="store_true", help="measure CPU seconds and bytes an entity first")
    parser.add_argument("--model", type=Path, help="the run folder to measure")
    parser.add_argument("--dataset", type=Path, help="the data set to measure")
    parser.add_argument("--sample", type=int, default=2048, help="entities to measure")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Builds a knowledge base of a sample, and returns CPU seconds and bytes an entity."""
    from hf_mel.data.loading import load_entities
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.entities import check_ids, content_sha256, open_entities
    from hf_mel.kb.knowledge_base import KnowledgeBase

    harness.start(args)
    machine = harness.machine()
    every = load_entities(str(args.dataset))
    entities = every.select(range(0, len(every), max(1, len(every) // args.sample))).flatten_indices()
    model, processor = load_retriever(str(args.model))
    cpu: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for name, rows in (("start", entities.select(range(64))), ("whole", entities)):
            begin = time.process_time()
            kb = KnowledgeBase.build(
                rows, model, processor, output=Path(folder, name), dtype="float16", batch_size=64, progress=False
            )
            cpu[name] = time.process_time() - begin
        info = kb.info()
    begin = time.process_time()
    rows, name = open_entities(entities)
    check_ids(rows, name)
    content_sha256(rows)
    reading = (time.process_time() - begin) / len(entities)
    return {
        "model": args.model.name,
        "dataset": args.dataset.name,
        "entities": len(entities),
        "dtype": info["dtype"],
        "cpu_seconds_per_entity": (cpu["whole"] - cpu["start"]) / (len(entities) - 64) - reading,
        "reading_cpu_seconds_per_entity": reading,
        "encoding_bytes_per_entity": info["encoding_bytes"] / len(entities),
        "table_bytes_per_entity": info["entity_bytes"] / len(entities),
        "machine": machine,
    }


def tables(folder: Path, entities: int, hosts: int, cores: int, price: float) -> str:
    """Returns the tables as Markdown."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    text, image, latency = read("cluster"), read("building"), read(_LATENCY)
    indexes = {row["index"]: row for row in latency["rows"] if row["entities"] == 1_000_000}
    all_cores, millions = hosts * cores, entities / 1e6
    kinds = {
        "texts": (f"`{text['model']}`", text["cpu_seconds_per_entity"]),
        "texts and images": (
            "MIMIC with CLIP ViT-B/32",
            image["machine"]["threads"] / image["entities_per_second"],
        ),
    }
    lines = [
        f"**Building {entities:,} entities** on {hosts} hosts of {cores} cores, one process a core. A core costs {price:.2f} an "
        "hour: an assumption, no measurement.",
        "",
        "| entities with | model | an entity, CPU (measured) | all, core-hours (computed) | hours (computed) | money (computed) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, (model, seconds) in kinds.items():
        core_hours = seconds * entities / 3600
        hours = core_hours / all_cores
        lines.append(
            f"| {kind} | {model} | {_figure(seconds * 1e3)} ms | {core_hours:,.0f} | {_figure(hours)} | "
            f"{core_hours * price:,.0f} |"
        )
    reading = text["reading_cpu_seconds_per_entity"]
    lines += [
        "",
        f"Every process reads and hashes all entities before it starts: {_figure(reading * 1e6)} µs an entity (measured, texts), "
        f"{_figure(reading * entities / 3600)} hours (computed), which more hosts do not shorten.",
        "",
        f"**Storing them** (texts, `{text['model']}`).",
        "",
        f"| part | bytes an entity (measured) | all (computed) | a host, of {hosts} (computed) |",
        "| --- | --- | --- | --- |",
    ]
    parts = {
        f"encodings, {text['dtype']}": text["encoding_bytes_per_entity"],
        "table of entities": text["table_bytes_per_entity"],
        "index `codes`": indexes["codes"]["index_bytes"] / 1e6,
        "index `faiss-pq`": indexes["faiss-pq"]["index_bytes"] / 1e6,
    }
    for part, size in parts.items():
        of_host = _bytes(size * entities / hosts) if part.startswith("encodings") else "all"
        lines.append(f"| {part} | {size:,.0f} | {_bytes(size * entities)} | {of_host} |")
    lines += [
        "",
        f"**Linking one mention** (texts, the best {latency['top_k']}; one thread).",
        "",
        "| ranking | at a million, CPU p50 (measured) | "
        f"at {entities:,}, CPU seconds (computed, linear) | by {all_cores} cores, seconds (computed) | "
        "a million mentions, money (computed) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in ("exact", "codes", "faiss-pq"):
        seconds = indexes[kind]["cpu_p50_s"] * millions
        shared = f"{_figure(seconds / all_cores)}" if kind == "exact" else "not shared"
        lines.append(
            f"| `{kind}` | {indexes[kind]['cpu_p50_s'] * 1e3:,.0f} ms | {_figure(seconds)} | {shared} | "
            f"{seconds * 1e6 / 3600 * price:,.0f} |"
        )
    machines = [
        f"{name}: {source['machine']['cpu']}, {source['machine']['threads']} threads, load {source['machine']['load_at_start']:.0f}, torch {source['machine']['software']['torch']}"
        for name, source in (("`cluster.json`", text), ("`building.json`", image), (f"`{_LATENCY}.json`", latency))
    ]
    lines += [
        "",
        f"Measured with {text['entities']:,} entities of {text['dataset']} (one thread), {image['entities']} generated ones "
        f"with images (by the clock of a quiet machine, times its threads), and {1_000_000:,} grown from WikiMEL. Sources: {'; '.join(machines)}. Command: "
        f"`python -m benchmarks.cluster --entities {entities} --hosts {hosts} --cores {cores} --price {price:.2f}`.",
    ]
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Returns a number with two significant digits, or all before the point."""
    if value >= 10:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def _bytes(value: float) -> str:
    return f"{value / 1e12:.1f} TB" if value >= 1e12 else f"{value / 1e9:.0f} GB"


def page_with(text: str, page: str) -> str:
    """Returns the page with the tables between its comments."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    args = arguments().parse_args()
    if args.measure:
        harness.write(args.output, "cluster", measure(args))
    text = tables(args.output, args.entities, args.hosts, args.cores, args.price)
    print(text)
    if args.docs:
        PAGE.write_text(page_with(text, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

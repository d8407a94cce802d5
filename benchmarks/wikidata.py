"""Benchmark of building a knowledge base from a dump of Wikidata: lines per second of a core, and memory.

The dump is generated from real entity documents (`--pattern`, a folder of `Special:EntityData` or `wbgetentities` JSON,
which is not part of this repository). A line keeps a random share of the languages, statements and pages of one of them,
so that lines have `--line-bytes` on average, gets its own id, and names its own values. Items and properties that values
name have lines, too. We read CPU seconds, which other programs on the machine change little.

    python -m benchmarks.wikidata --pattern DOCUMENTS --lines 100000
    python -m benchmarks.wikidata --pattern DOCUMENTS --lines 1000000 --line-bytes 13000
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from hf_mel.dataset_scripts.wikidata import parts, wikidata

#: Number of entities of Wikidata for which the time is extrapolated.
ENTITIES = 115_000_000
#: Distinct lines before ids repeat their content.
_NUM_TEMPLATES = 400
_OPTIONS = ["classes=Q5", "languages=en,de", "min_sitelinks=5"]
#: Placeholder of an id in a template.
_ID = 987_654_321


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--pattern", type=Path, required=True, help="folder of real entity documents")
    parser.add_argument("--lines", type=int, default=100_000, help="lines of the dump")
    parser.add_argument("--line-bytes", type=int, default=13_000, help="mean length of a line")
    return parser


def real_items(folder: Path) -> list[dict[str, Any]]:
    """Returns the items of the documents in a folder."""
    documents = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    entities = [entity for document in documents for entity in document["entities"].values()]
    return [entity for entity in entities if entity.get("type") == "item" and entity.get("claims")]


def templates(items: list[dict[str, Any]], line_bytes: int) -> list[bytes]:
    """Returns lines with a placeholder for their id, of `line_bytes` on average."""
    generator = random.Random(0)
    lines = []
    for number in range(_NUM_TEMPLATES):
        item = items[number % len(items)]
        size = len(json.dumps(item))
        # Lengths of entities vary much: most are short, few are long.
        share = min(1.0, line_bytes / size * generator.choice([0.3, 0.5, 0.8, 1.0, 2.4]))
        kept: dict[str, Any] = {"type": "item", "id": f"Q{_ID}"}
        for name in ("labels", "descriptions", "aliases", "claims", "sitelinks"):
            kept[name] = {
                key: value
                for key, value in (item.get(name) or {}).items()
                if key in ("en", "P31", "P106") or generator.random() < share
            }
        kept["lastrevid"] = 0
        kept["claims"]["P31"] = [_statement("P31", 5 if number % 3 == 0 else 515)]  # a third are people
        lines.append(json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode())
    return lines


def _statement(property_id: str, number: int) -> dict[str, Any]:
    value = {"value": {"entity-type": "item", "numeric-id": number, "id": f"Q{number}"}, "type": "wikibase-entityid"}
    snak = {"snaktype": "value", "property": property_id, "datavalue": value, "datatype": "wikibase-item"}
    return {"mainsnak": snak, "type": "statement", "rank": "normal"}


def _named_entities(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """Yields short items and properties for everything that the lines name, with a chain of classes above it."""
    numbers: set[int] = set()
    for line in lines:
        for statements in json.loads(line)["claims"].values():
            for statement in statements:
                value = statement["mainsnak"].get("datavalue", {}).get("value")
                if isinstance(value, dict) and "numeric-id" in value:
                    numbers.add(value["numeric-id"])
    for number in sorted(numbers):
        label = {"en": {"language": "en", "value": f"thing {number}"}}
        claims = {"P279": [_statement("P279", number // 2)]} if number > 1 else {}
        yield {"type": "item", "id": f"Q{number}", "labels": label, "claims": claims}
    for property_id in wikidata.PROPERTIES:
        yield {
            "type": "property",
            "id": property_id,
            "labels": {"en": {"language": "en", "value": f"fact {property_id}"}},
        }


def write_dump(path: Path, items: list[dict[str, Any]], count: int, line_bytes: int) -> None:
    """Writes a packed dump of `count` lines."""
    lines = templates(items, line_bytes)
    temporary = path.with_suffix(".tmp")
    with gzip.open(temporary, "wb", compresslevel=1) as file:
        file.write(b"[\n")
        for entity in _named_entities(lines):
            file.write(json.dumps(entity).encode() + b",\n")
        for number in range(count):
            line = lines[number % len(lines)].replace(str(_ID).encode(), str(200_000_000 + number).encode())
            file.write(line + (b",\n" if number + 1 < count else b"\n"))
        file.write(b"]\n")
    temporary.replace(path)


def measure_steps(dump: Path, seconds: float = 10.0) -> dict[str, float]:
    """Returns CPU seconds and lines of unpacking, and of reading parts, in this process, for about `seconds` each."""
    config = wikidata.WikidataConfig(**dict(option.split("=") for option in _OPTIONS))
    selection, _ = wikidata._selection(config)
    result = {"unpack_seconds": 0.0, "read_seconds": 0.0, "lines": 0.0, "bytes": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        for number, part in enumerate(parts._line_parts(dump, {})):
            result["unpack_seconds"] += time.process_time() - begin
            [(_, _, data)] = part.contents
            result["lines"] += data.count(b"\n")
            result["bytes"] += len(data)
            begin = time.process_time()
            parts.process_part(Path(folder), number, part, selection)
            result["read_seconds"] += time.process_time() - begin
            if result["read_seconds"] > seconds:
                break
            begin = time.process_time()
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generates the dump unless it is there, measures the steps, and builds."""
    harness.start(args)
    dump = args.scratch / f"wikidata-{args.lines}-{args.line_bytes}.json.gz"
    if not dump.exists():
        harness.say(f"Generating {dump} …")
        write_dump(dump, real_items(args.pattern), args.lines, args.line_bytes)
    harness.say("Measuring unpacking and reading on one core …")
    steps = measure_steps(dump)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        output = Path(folder, "built")
        command = [sys.executable, "-m", "hf_mel", "data", "build", "wikidata", "--raw-dir", str(dump)]
        command += [word for option in _OPTIONS for word in ("--option", option)] + ["--output", str(output)]
        harness.say(" ".join(command[1:]))
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True)
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        built_bytes = sum(path.stat().st_size for path in output.rglob("*.parquet"))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    per_line = {name: steps[f"{name}_seconds"] / steps["lines"] for name in ("unpack", "read")}
    return {
        "lines": args.lines,
        "mean_line_bytes": steps["bytes"] / steps["lines"],
        "dump_bytes": dump.stat().st_size,
        "options": _OPTIONS,
        "entities": report["counts"]["entities"]["kb"],
        "left_out": report["left_out"],
        "built_bytes": built_bytes,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "cores": len(os.sched_getaffinity(0)),
        # The largest of the processes: the one that unpacks and writes, or a worker.
        "peak_bytes_of_a_process": after.ru_maxrss * 1024,
        "read_lines_per_core_second": 1 / per_line["read"],
        "unpacked_lines_per_second": 1 / per_line["unpack"],
        "hours_for_115_million_on_one_core": ENTITIES * cpu / args.lines / 3600,
        "hours_of_unpacking_115_million": ENTITIES * per_line["unpack"] / 3600,
        "machine": harness.machine("cpu"),
    }


def main() -> None:
    args = arguments().parse_args()
    path = harness.write(args.output, "wikidata", run(args))
    harness.say(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

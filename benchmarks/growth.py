"""Benchmark of the growth of ranking time and memory with the number of entities N and of mentions M.

Ranks 32 mentions against growing knowledge bases, and growing numbers of mentions against a knowledge base of 10,000
entities, with the library's default settings. Fits time ≈ a·Nᵇ and memory ≈ a·Nᵇ by least squares to the logarithms.
Memory is measured in a child process, from before it opens the knowledge base. The byte budget is small (64 MB), so that
growth is visible. The model and the knowledge bases are those of `benchmarks.ranking`.

    python -m benchmarks.growth
    python -m benchmarks.growth --sizes 5000,10000 --mentions-sizes 16,32 --repeats 3
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import harness
from benchmarks.ranking import child_options, rank_mentions
from benchmarks.sources import open_source
from hf_mel.inference.encodings import slice_encodings

BYTE_BUDGET = 2**26


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--sizes", default="10000,20000,50000,110000", help="numbers of entities to rank --mentions mentions against"
    )
    parser.add_argument("--mentions", type=int, default=32, help="number of mentions while the entities grow")
    parser.add_argument(
        "--mentions-sizes", default="16,32,64,128,256", help="numbers of mentions to rank against --entities"
    )
    parser.add_argument("--entities", type=int, default=10_000, help="number of entities while the mentions grow")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the generated model")
    parser.add_argument("--model", help="run folder to measure in place of the generated model")
    parser.add_argument("--dataset", help="data-set folder of that run")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures both series and returns the result."""
    harness.start(args)
    sizes, counts = ([int(size) for size in text.split(",")] for text in (args.sizes, args.mentions_sizes))
    source = open_source(args.scratch, [*sizes, args.entities], args.model, args.dataset, args.steps)
    source.model.to(args.device)
    points = [("entities", size, args.mentions) for size in sizes]
    points += [("mentions", args.entities, count) for count in counts]
    kbs = {size: source.knowledge_base(size) for size in dict.fromkeys([*sizes, args.entities])}
    machine = harness.machine(args.device)
    encoded, _, golds = source.mentions(max(args.mentions, *counts))

    def ranking(size: int, count: int):
        if count > len(golds):
            raise SystemExit(f"The data set has only {len(golds)} mentions. Lower {count} in --mentions-sizes.")
        mentions = slice_encodings(encoded, slice(count))
        return lambda: rank_mentions(
            source.model, mentions, kbs[size], golds[:count], prune=True, byte_budget=BYTE_BUDGET
        )

    cases = {f"{axis} {size} × {count}": ranking(size, count) for axis, size, count in points}
    seconds = harness.interleaved(cases, args.repeats, device=args.device, progress=harness.say)
    options = child_options(args) | {"form": "pruned", "block": [0, 0], "byte_budget": BYTE_BUDGET}
    options["sizes"] = [*sizes, args.entities]
    series: dict[str, Any] = {}
    for axis, size, count in points:
        harness.say(f"memory of {size:,} entities × {count} mentions")
        used = harness.in_child("benchmarks.ranking:child_memory", options | {"size": size, "mentions": count})
        memory = {name: used[name] for name in ("peak_bytes", "own_bytes")}
        point = {"entities": size, "mentions": count, **harness.summary(seconds[f"{axis} {size} × {count}"]), **memory}
        series.setdefault(axis, {"points": []})["points"].append(point)
    for axis, curve in series.items():
        sizes_on_axis = [point[axis] for point in curve["points"]]
        for name in ("median_s", "peak_bytes", "own_bytes"):
            values = [max(1e-9, point[name]) for point in curve["points"]]
            is_curve = len(set(sizes_on_axis)) > 1
            curve[f"exponent_{name}"] = harness.exponent(sizes_on_axis, values) if is_curve else None
    return {
        "source": source.description,
        "byte_budget": BYTE_BUDGET,
        "series": series,
        "repeats": args.repeats,
        "device": args.device,
        "machine": machine,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    path = harness.write(args.output, "growth", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

"""How time and memory of ranking grow with the number of entities N and of mentions M.

Ranks 32 mentions against growing knowledge bases, and growing numbers of mentions against one of 10,000, as the library
ranks by default; fits time ≈ a·Nᵇ and memory ≈ a·Nᵇ by least squares between logarithms. Memory is that of a process of
its own each, above what it had before it opened the knowledge base; the budget is small (64 MB), so that what does grow
shows. Uses the model and knowledge bases of `benchmarks.ranking`.

    python -m benchmarks.growth
    python -m benchmarks.growth --sizes 5000,10000 --mentions-sizes 16,32 --repeats 3
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import harness
from benchmarks.ranking import child_options, ranked
from benchmarks.sources import open_source
from hf_mel.inference.encodings import slice_encodings

BYTE_BUDGET = 2**26


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", default="10000,20000,50000,110000", help="entities, at --mentions mentions")
    parser.add_argument("--mentions", type=int, default=32)
    parser.add_argument("--mentions-sizes", default="16,32,64,128,256", help="mentions, at --entities entities")
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=300, help="of training the generated source's model")
    parser.add_argument("--model", help="a run folder, in place of the generated source")
    parser.add_argument("--dataset", help="its data-set folder")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both series as one record."""
    harness.start(args)
    sizes, counts = ([int(size) for size in text.split(",")] for text in (args.sizes, args.mentions_sizes))
    source = open_source(args.scratch, [*sizes, args.entities], args.model, args.dataset, args.steps)
    source.model.to(args.device)
    points = [("entities", size, args.mentions) for size in sizes]
    points += [("mentions", args.entities, count) for count in counts]
    kbs = {size: source.knowledge_base(size) for size in dict.fromkeys([*sizes, args.entities])}
    described = harness.machine(args.device)
    encoded, _, golds = source.mentions(max(args.mentions, *counts))

    def ranking(size: int, count: int):
        if count > len(golds):
            raise SystemExit(f"The source has {len(golds)} mentions, fewer than {count}: --mentions-sizes")
        mentions = slice_encodings(encoded, slice(count))
        return lambda: ranked(source.model, mentions, kbs[size], golds[:count], prune=True, byte_budget=BYTE_BUDGET)

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
    for axis, found in series.items():
        places = [point[axis] for point in found["points"]]
        for name in ("median_s", "peak_bytes", "own_bytes"):
            values = [max(1e-9, point[name]) for point in found["points"]]
            found[f"exponent_{name}"] = harness.exponent(places, values) if len(set(places)) > 1 else None
    return {
        "source": source.description,
        "byte_budget": BYTE_BUDGET,
        "series": series,
        "repeats": args.repeats,
        "device": args.device,
        "machine": described,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    path = harness.write(args.output, "growth", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

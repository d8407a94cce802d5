"""All benchmarks one after another, then their tables and plot: what `make bench` runs.

    python -m benchmarks                            # sizes for two cores, about 20 minutes
    python -m benchmarks --only growth,latency      # some; what was trained and built before is used again
    python -m benchmarks --full                     # all sizes, a million entities too: hours, 40 GB of scratch space
    python -m benchmarks --model runs/mimic-text_wikimel --dataset data/wikimel   # and that run, ranking and latency
    python -m benchmarks --device cuda --dtype bfloat16 --output results-gpu

Each writes its own JSON as soon as it is done, so that a run which was stopped goes on with `--only`. Results go to
`benchmarks/results`, which is committed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks import harness, summary

#: Arguments of each benchmark: of a short run, and of a full one.
SHORT: dict[str, list[str]] = {
    "ranking": ["--mentions", "8"],
    "growth": ["--sizes", "10000,50000,110000", "--mentions-sizes", "16,64,128"],
    "latency": ["--sizes", "10000,50000", "--graph-limit", "10000"],
    "building": ["--entities", "64"],
    "training": [],
}
FULL: dict[str, list[str]] = {
    "ranking": ["--mentions", "128"],
    "growth": ["--sizes", "10000,20000,50000,110000,200000", "--mentions-sizes", "16,32,64,128,256,512"],
    "latency": ["--sizes", "100000,1000000", "--graph-limit", "1000000", "--mentions", "200"],
    "building": ["--entities", "512"],
    "training": ["--encoders", "clip"],
}


def commands(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, arguments after `python -m`) of what is to run, in order."""
    shared = ["--repeats", str(args.repeats), "--device", args.device, "--dtype", args.dtype]
    shared += ["--scratch", str(args.scratch), "--output", str(args.output)]
    shared += ["--threads", str(args.threads)] if args.threads else []
    sizes = FULL if args.full else SHORT
    wanted = args.only.split(",") if args.only else list(sizes)
    if unknown := [name for name in wanted if name not in sizes]:
        raise SystemExit(f"There is no benchmark {', '.join(unknown)}; there are {', '.join(sizes)}.")
    found = [(name, [f"benchmarks.{name}", *sizes[name], *shared]) for name in wanted]
    if args.full and "ranking" in wanted:
        found.append(("ranking, random weights", ["benchmarks.ranking", "--steps", "0", "--sizes", "10000", *shared]))
    if args.model:
        run = ["--model", args.model, "--dataset", args.dataset]
        for name in ("ranking", "latency"):
            if name in wanted:
                found.append((f"{name} of {args.model}", [f"benchmarks.{name}", *sizes[name], *run, *shared]))
    return found


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="all sizes")
    parser.add_argument("--only", help=f"some of {', '.join(SHORT)}")
    parser.add_argument("--model", help="a MIMIC run folder to measure as well")
    parser.add_argument("--dataset", help="its data-set folder")
    args = parser.parse_args()
    if bool(args.model) != bool(args.dataset):
        parser.error("--model and --dataset belong together.")
    args.scratch, args.output = args.scratch.resolve(), args.output.resolve()
    failed = []
    for name, command in commands(args):
        begin = time.perf_counter()
        harness.say(f"[b]{name}[/b]: python -m {' '.join(command)}")
        code = subprocess.run([sys.executable, "-m", *command], cwd=harness.ROOT).returncode
        harness.say(f"{name}: {time.perf_counter() - begin:.0f} s")
        if code:
            failed.append(name)
    if (args.output / "ranking.json").exists():
        summary.plot(args.output, args.output / "ranking.png")
    if failed:
        harness.say(f"[red]failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

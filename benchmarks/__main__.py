"""Runs all benchmarks, then prints their tables and draws the plot. `make bench` calls this.

    python -m benchmarks                            # small sizes: about 23 minutes of CPU time
    python -m benchmarks --only growth,latency      # some benchmarks; trained models and built indexes are reused
    python -m benchmarks --full                     # all sizes up to a million entities: hours, 40 GB of scratch space
    python -m benchmarks --model runs/mimic-text_wikimel --dataset data/wikimel   # also ranking, latency and throughput
    python -m benchmarks --device cuda --dtype bfloat16 --output results-gpu

Each benchmark writes a JSON file as soon as it is finished, so you can continue an interrupted run with `--only`. The
files are written to `benchmarks/results`, which is committed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from benchmarks import harness, summary

#: Recipes of the short run, one of each kind of method: IMN, PFMEL and MMEL take most of the time of all.
_QUICK_RECIPES = "mimic_wikimel,bert_wikimel,ghmfc_wikimel,cholan_tweets,genre_wikimel,mulrel_aida,et_tweets"
#: Arguments of each benchmark, for a short run and for a full one.
SHORT: dict[str, list[str]] = {
    "ranking": ["--mentions", "8"],
    "growth": ["--sizes", "10000,50000,110000", "--mentions-sizes", "16,64,128"],
    "latency": ["--sizes", "10000,50000", "--graph-limit", "10000"],
    "throughput": ["--sizes", "2000", "--mentions", "256"],
    "building": ["--entities", "64"],
    "training": [],
    "methods": ["--batch-size", "4", "--steps", "2", "--recipes", _QUICK_RECIPES],
    "precision": ["--people", "5000"],
}
FULL: dict[str, list[str]] = {
    "ranking": ["--mentions", "128"],
    "growth": ["--sizes", "10000,20000,50000,110000,200000", "--mentions-sizes", "16,32,64,128,256,512"],
    "latency": ["--sizes", "100000,1000000", "--graph-limit", "1000000", "--mentions", "200"],
    "throughput": ["--sizes", "20000", "--mentions", "1024"],
    "building": ["--entities", "512"],
    "training": ["--encoders", "clip"],
    "methods": [],
    "precision": [],
}


def commands(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Returns (name, arguments after `python -m`) of each benchmark to run, in order.

    Raises:
        SystemExit: A name in `--only` is unknown.
    """
    shared = ["--repeats", str(args.repeats), "--device", args.device, "--dtype", args.dtype]
    shared += ["--scratch", str(args.scratch), "--output", str(args.output)]
    shared += ["--threads", str(args.threads)] if args.threads else []
    sizes = FULL if args.full else SHORT
    chosen = args.only.split(",") if args.only else list(sizes)
    if unknown := [name for name in chosen if name not in sizes]:
        raise SystemExit(f"Unknown benchmark: {', '.join(unknown)}. Choose from: {', '.join(sizes)}.")
    runs = [(name, [f"benchmarks.{name}", *sizes[name], *shared]) for name in chosen]
    if args.full and "ranking" in chosen:
        runs.append(("ranking, random weights", ["benchmarks.ranking", "--steps", "0", "--sizes", "10000", *shared]))
    if args.model:
        run = ["--model", args.model, "--dataset", args.dataset]
        for name in ("ranking", "latency", "throughput"):
            if name in chosen:
                runs.append((f"{name} of {args.model}", [f"benchmarks.{name}", *sizes[name], *run, *shared]))
        if args.full and not args.only:
            runs.append(("peers", ["benchmarks.peers", "--dataset", args.dataset, *shared]))
    return runs


def _child_cpu_seconds() -> float:
    """Returns the CPU seconds of all finished child processes."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="run all sizes, up to a million entities")
    parser.add_argument("--only", metavar="NAMES", help=f"run only these, separated by commas: {', '.join(SHORT)}")
    parser.add_argument("--model", help="folder of a MIMIC run; ranking, latency and throughput measure it, too")
    parser.add_argument("--dataset", help="data-set folder of that run")
    args = parser.parse_args()
    if bool(args.model) != bool(args.dataset):
        parser.error("--model and --dataset must be given together.")
    args.scratch, args.output = args.scratch.resolve(), args.output.resolve()
    failed = []
    for name, command in commands(args):
        begin, cpu_begin = time.perf_counter(), _child_cpu_seconds()
        harness.say(f"[b]{name}[/b]: python -m {' '.join(command)}")
        code = subprocess.run([sys.executable, "-m", *command], cwd=harness.ROOT).returncode
        seconds, cpu_seconds = time.perf_counter() - begin, _child_cpu_seconds() - cpu_begin
        harness.say(f"{name}: {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time")
        if code:
            failed.append(name)
    if (args.output / "ranking.json").exists():
        summary.plot(args.output, args.output / "ranking.png")
    if failed:
        harness.say(f"[red]Failed: {', '.join(failed)}.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

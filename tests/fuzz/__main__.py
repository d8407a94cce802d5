"""Fuzzing without end: `python -m tests.fuzz --inputs 100000`. Repeat the command to go on after an interruption.

The state file has the number of inputs and of failures of every target. Each failure is written to the corpus, which
`make test` replays.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import traceback
import warnings
from pathlib import Path

from tests.fuzz.engine import fuzz, save_failing
from tests.fuzz.targets import TARGETS

#: Inputs of one run of Hypothesis per share of a target.
_BATCH = 25


def main() -> int:
    """Tries inputs of all targets in turn until there are enough. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="number of inputs of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("artifacts/fuzz.json"))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    state = {"seed": options.seed, "targets": {}, "failures": []}
    if options.state.is_file():
        state = json.loads(options.state.read_text())
        if state["seed"] != options.seed:
            parser.error(f"{options.state} has seed {state['seed']}; give another --state.")
    while (total := sum(entry["inputs"] for entry in state["targets"].values())) < options.inputs:
        counts = {
            name: state["targets"].setdefault(name, {"inputs": 0, "accepted": 0, "batches": 0, "seconds": 0.0})
            for name in options.targets
        }
        # The target that is furthest behind its share comes next.
        name = min(counts, key=lambda name: counts[name]["inputs"] / TARGETS[name].share)
        target, entry, started = TARGETS[name], counts[name], time.process_time()
        outcome = fuzz(
            target, _BATCH * target.share if target.share > 1 else 2, number=hash((options.seed, entry["batches"]))
        )
        entry["inputs"] += outcome.tried
        entry["accepted"] += outcome.accepted
        entry["batches"] += 1
        entry["seconds"] = round(entry["seconds"] + time.process_time() - started, 1)
        if outcome.error is not None:
            path = save_failing(target, outcome.failing)
            text = "".join(traceback.format_exception(outcome.error))
            state["failures"].append({"target": name, "file": path.name, "error": text[-3000:]})
            print(f"{name}: {path}\n{text}", flush=True)
        print(
            f"{total:,} {name} {entry['inputs']:,} ({entry['accepted']:,} accepted, {entry['seconds']} CPU s)",
            flush=True,
        )
        options.state.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.state.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(state, indent=1))
        temporary.replace(options.state)
    print(f"{total:,} inputs, {len(state['failures'])} failures")
    return 1 if state["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

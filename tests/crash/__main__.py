"""Kills every command at random moments, or fills its disk: `python -m tests.crash --kills 20`. Repeat it to go on after an interruption."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from tests.crash.killing import Moment, prepare, run_job, survives


def main() -> int:
    """Kills commands and compares what they leave in the end. Returns 1 if one differs."""
    from tests.crash.jobs import JOBS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of every command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("artifacts/crash.json"))
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), help=", ".join(JOBS))
    options = parser.parse_args()
    options.state.parent.mkdir(parents=True, exist_ok=True)
    state = json.loads(options.state.read_text()) if options.state.is_file() else {}
    root = Path(tempfile.mkdtemp(prefix="hf_mel-crash-"))
    failures = 0
    for name in options.jobs:
        folder = root / "job"
        entry = state.setdefault(name, {"kills": 0, "trials": 0, "failures": []})
        if entry["kills"] >= options.kills:
            continue
        prepare(name, folder)
        course = run_job(name, folder)
        assert course is not None
        print(f"{name}: {course.operations} operations on files, {course.seconds:.1f} CPU s", flush=True)
        while entry["kills"] < options.kills:
            shutil.rmtree(folder)
            draw = random.Random(f"{options.seed} {name} {entry['trials']}")
            moments = []
            for _ in range(draw.choice([1, 1, 2])):  # some are killed again after they went on
                kind = draw.choices(["operation", "full", "seconds"], [5, 2, 3])[0]
                number = draw.randint(1, max(1, course.operations))
                if kind == "seconds":
                    moments.append(Moment("seconds", draw.uniform(0.02, 0.98) * course.seconds))
                else:
                    moments.append(Moment(kind, number))
            entry["trials"] += 1
            try:
                entry["kills"] += survives(name, folder, course, moments)
            except AssertionError as error:
                failures += 1
                entry["kills"] += 1
                entry["failures"].append({"moments": moments, "error": str(error)[-2000:]})
                print(f"{name} {moments}: {error}", flush=True)
                kept = root / f"failed{failures}"
                if folder.exists():
                    folder.rename(kept)
                folder.mkdir()
            options.state.write_text(json.dumps(state, indent=1))
        print(f"{name}: {entry['kills']} kills, {len(entry['failures'])} failures", flush=True)
        shutil.rmtree(folder)
    total = sum(len(entry["failures"]) for entry in state.values())
    print(f"{sum(entry['kills'] for entry in state.values())} kills, {total} failures")
    return 1 if total else 0


if __name__ == "__main__":
    raise SystemExit(main())

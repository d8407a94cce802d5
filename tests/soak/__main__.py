"""The Space under mixed load, and a linker in many threads while its knowledge base is edited: `python -m tests.soak --minutes 30`.

Each takes the minutes. Every answer must be the right one, and after a sixth of the time memory and open files must not grow. `--pause`
makes room for others on the machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> int:
    """Returns 1 if an answer differs, memory grows or files stay open."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="linker, space (default: both, one after the other)")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16, help="number of threads or visitors at the same time")
    parser.add_argument("--pause", type=float, default=0, help="seconds between two requests of a client")
    parser.add_argument(
        "--model", type=Path, help="run folder for the Space, with --kb (default: a small untrained model)"
    )
    parser.add_argument("--kb", type=Path, help="knowledge base of flags that the model built")
    parser.add_argument("--output", type=Path, default=Path("artifacts/soak.json"))
    options = parser.parse_args()
    # Each part imports what the other does without.
    results = {}
    common = {"minutes": options.minutes, "clients": options.clients, "pause": options.pause}
    for part in options.parts or ["linker", "space"]:
        if part == "linker":
            from tests.soak.linker import soak_linker

            results[part] = soak_linker(**common)
        elif part == "space":
            from tests.soak.space import soak_space

            results[part] = soak_space(**common, model=options.model, kb=options.kb)
        else:
            parser.error(f"There is no part {part!r}. Choose linker or space.")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({part: results[part]}, indent=1), flush=True)
    return int(any(result["wrong"] or result["grown"] for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())

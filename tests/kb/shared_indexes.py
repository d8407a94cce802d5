"""A program that several processes run: it builds indexes of one knowledge base together, as its first argument says.

The argument is a JSON list. Each entry has the "kind", and optionally changes of one "process" (by default the second): at a
row, it "fails" or "dies", "locked" (it changes the knowledge base meanwhile), and "kb" (it opens another one). The error and
the number of rows that the process coded are written beside the knowledge base.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState

from hf_mel.kb import shared_work
from hf_mel.kb.folders import kb_lock
from hf_mel.kb.indexes import build_index, certified
from hf_mel.kb.knowledge_base import KnowledgeBase
from tests.kb.test_certified import PROCESSOR, bounded


def watch(model, fails: int | None, dies: int | None) -> list[int]:
    """Lets a model fail or die at a row, and returns a list of the rows whose bounds it gives, which grows."""
    seen: list[int] = []
    bound_vectors = model.bound_vectors

    def watched(entities):
        if len(entities["text"]) > 1:  # no probes
            if fails is not None and len(seen) >= fails:
                raise RuntimeError("The lights went out.")
            if dies is not None and len(seen) >= dies:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.extend(range(len(entities["text"])))
        return bound_vectors(entities)

    model.bound_vectors = watched
    return seen


def small_units() -> None:
    """Makes chunks of 4 rows, and units of 8."""
    certified._CHUNK_ROWS, certified._UNIT_ROWS = 4, 8
    certified._sample = lambda kb, model: SAMPLE(kb, bounded())  # whose rows are not counted
    shared_work._POLL_SECONDS, shared_work._SEEN_SECONDS = 0.05, 1.0


SAMPLE = certified._sample


def main() -> None:
    processes = PartialState(cpu=True)
    root = Path(sys.argv[2])
    small_units()
    for number, settings in enumerate(json.loads(sys.argv[1])):
        change = settings if processes.process_index == settings.get("process", 1) else {}
        model, outcome = bounded(), {}
        seen = watch(model, change.get("fails"), change.get("dies"))
        kb = KnowledgeBase(root / change.get("kb", "kb"))
        try:
            with kb_lock(kb.path) if "locked" in change else nullcontext():
                processes.wait_for_everyone()
                index = build_index(kb, settings["kind"], model, PROCESSOR, processes=processes, progress=False)
                outcome["has_index"] = index is not None
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        outcome["num_seen"] = len(seen)
        (root / f"outcome-{number}-{processes.process_index}.json").write_text(json.dumps(outcome))
        processes.wait_for_everyone()
    processes.destroy_process_group()


if __name__ == "__main__":
    main()

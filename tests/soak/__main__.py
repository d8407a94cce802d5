"""A linker in sixteen threads while its knowledge base is edited: `python -m tests.soak --minutes 30`.

Every answer must be that of the state of the knowledge base that the linker has opened. Another thread adds, replaces and removes
entities in the folder, and from time to time the linker opens the new state. After a sixth of the time, memory must not grow by more than
a tenth, and there must be no more open files than then. The Space has `python -m benchmarks.space_load`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

MODEL, PROCESSOR = toy_model(), ToyProcessor()
MENTIONS = [dict(row) for row in toy_mentions(24, entities=40)]
_REOPEN_SECONDS = 5


def answers(linker: EntityLinker, mention: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns the candidates of a mention with their scores, rounded as single and batched scores differ."""
    return [(candidate.entity_id, round(candidate.score, 4)) for candidate in linker(mention, top_k=5).candidates]


def figures() -> dict[str, float]:
    """Returns the resident memory of this process in MB, and its numbers of open files and threads."""
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
    return {"mb": round(memory, 1), "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def main() -> int:
    """Returns 1 if an answer differs, memory grows or files stay open."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("artifacts/soak.json"))
    options = parser.parse_args()
    end, state = time.monotonic() + 60 * options.minutes, {}
    counts = {"answers": 0, "edits": 0, "states": 0}
    problems: list[str] = []
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        KnowledgeBase.build(toy_entities(40), MODEL, PROCESSOR, output=f"{folder}/kb", progress=False)

        def open_state() -> None:
            linker = EntityLinker(MODEL, PROCESSOR, KnowledgeBase(f"{folder}/kb"))
            state["now"] = linker, [answers(linker, mention) for mention in MENTIONS]
            counts["states"] += 1

        def work(number: int) -> None:
            turn = number
            while time.monotonic() < end and not problems:
                (linker, expected), turn = state["now"], turn + 1
                try:
                    answer = answers(linker, MENTIONS[turn % len(MENTIONS)])
                    if answer != expected[turn % len(MENTIONS)]:
                        problems.append(f"{answer} is not {expected[turn % len(MENTIONS)]}")
                except Exception as error:
                    problems.append(f"{type(error).__name__}: {error}")
                with lock:
                    counts["answers"] += 1

        def edit() -> None:
            while time.monotonic() < end and not problems:
                kb = KnowledgeBase(f"{folder}/kb")
                step = counts["edits"] % 20
                if step == 19:
                    kb.save(f"{folder}/kb")  # compacts it, or its shards would become more and more
                elif step % 2:
                    kb.remove([f"Q{2 * step + 1}"])
                else:
                    kb.add(
                        toy_entities(40).select([2 * step, 2 * step + 2]),
                        MODEL,
                        PROCESSOR,
                        replace=True,
                        progress=False,
                    )
                counts["edits"] += 1
                time.sleep(0.2)

        open_state()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(options.threads)]
        threads.append(threading.Thread(target=edit))
        for thread in threads:
            thread.start()
        samples = [figures()]
        while any(thread.is_alive() for thread in threads):
            time.sleep(_REOPEN_SECONDS)
            open_state()
            samples.append(figures())
    early = samples[max(1, len(samples) // 6) :]
    result = {
        "minutes": options.minutes, **counts, "problems": problems[:5], "start": samples[0], "after a sixth": early[0],
        "end": samples[-1], "most mb": max(sample["mb"] for sample in samples),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    grown = max(sample["mb"] for sample in early) > 1.1 * early[0]["mb"]
    leaked = min(sample["files"] for sample in early[len(early) // 2 :]) > early[0]["files"]
    return int(bool(problems) or grown or leaked)


if __name__ == "__main__":
    raise SystemExit(main())

"""A linker in many threads while its knowledge base is edited.

Every answer must be that of the state of the knowledge base that the linker has opened. Another thread adds, replaces and removes
entities in the folder, and from time to time the linker opens the new state.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from typing import Any

from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from tests.soak.watching import Watch
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

MODEL, PROCESSOR = toy_model(), ToyProcessor()
MENTIONS = [dict(row) for row in toy_mentions(24, entities=40)]


def answers(linker: EntityLinker, mention: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns the candidates of a mention with their scores, rounded as single and batched scores differ."""
    return [(candidate.entity_id, round(candidate.score, 4)) for candidate in linker(mention, top_k=5).candidates]


def soak_linker(minutes: float, clients: int = 16, pause: float = 0, reopen: float = 5) -> dict[str, Any]:
    """Links in threads while another edits the knowledge base.

    Args:
        minutes (`float`): The time.
        clients (`int`): Number of threads that link.
        pause (`float`): Seconds between two mentions of a thread.
        reopen (`float`): Seconds after which the linker opens the new state.

    Returns:
        `dict`: Counts, memory and open files over time, wrong answers, and what grew.
    """
    end, state = time.monotonic() + 60 * minutes, {}
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
                time.sleep(pause)

        def edit() -> None:
            while time.monotonic() < end and not problems:
                try:
                    _edit(f"{folder}/kb", counts["edits"] % 20)
                except Exception as error:
                    problems.append(f"editing: {type(error).__name__}: {error}")
                counts["edits"] += 1
                time.sleep(max(0.2, pause))

        open_state()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        threads.append(threading.Thread(target=edit))
        watch = Watch(os.getpid())
        for thread in threads:
            thread.start()
        watch.look()
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(reopen, max(0.1, end - time.monotonic())))
            open_state()
            watch.look()
    return {"minutes": minutes, **counts, "wrong": problems[:5], "grown": watch.growth(), **watch.summary()}


def _edit(folder: str, step: int) -> None:
    kb = KnowledgeBase(folder)
    if step == 19:
        kb.save(folder)  # compacts it, or its shards would become more and more
    elif step % 2:
        kb.remove([f"Q{2 * step + 1}"])
    else:
        rows = toy_entities(40).select([2 * step, 2 * step + 2])
        kb.add(rows, MODEL, PROCESSOR, replace=True, progress=False)

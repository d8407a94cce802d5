"""A program that several processes run: it builds knowledge bases together, as its first argument says.

At the end it links with the first knowledge base, if that was built. The argument is a JSON list. Each entry has the
name of the output, optionally "file" (of entities, in place of 30 made ones), "strict", "tokens" (a model that has them), "window" (its batches) and "shard" (its entities), and
changes of one process: "file", "dtype", "model", "folder" (another working folder), "entities" (their number), "batch_size",
"locked" (it changes the knowledge base meanwhile), "reads" (seconds that it takes to read the entities), and at an
entity "fails", "dies", "sleeps" and "full" (its disk is full from there on). "reranker" gives all processes a reranker,
and "lost" is the number of seconds without a sign after which a process is lost. The files of errors and of the numbers
of encoded entities and opened images are written beside the output. LIMIT in the environment is the time limit of ordinary collective
calls, and IDLE the seconds for which the first process does nothing before it links.
"""

import errno
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState

from hf_mel.data import entity_files, image_checks, images
from hf_mel.errors import ScoreError
from hf_mel.inference import encode
from hf_mel.kb import knowledge_base, shards, shared_work
from hf_mel.kb.folders import kb_lock
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from tests.toy import ToyConfig, ToyProcessor, ToyTokenRetriever, toy_entities, toy_mentions, toy_model, toy_reranker


def fail() -> None:
    raise RuntimeError("The lights went out.")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    shards.save_file = os.mkdir = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))


#: What may happen at an entity.
EVENTS = {"fails": fail, "dies": die, "sleeps": lambda: time.sleep(8), "full": fill_disk}


class WatchedProcessor(ToyProcessor):
    """Counts entities, and calls functions before the batches that contain entities with these ids."""

    def __init__(self, events=None):
        super().__init__()
        self.events, self.num_seen = events or {}, 0

    def __call__(self, entities=None, **kwargs):
        for row in entities or ():
            self.events.get(row["entity_id"], int)()
        if entities and len(entities) > 1 and entities[0]["entity_id"] != "Q0":  # no probes
            self.num_seen += len(entities)
        return super().__call__(entities=entities, **kwargs)


def small_files(settings) -> None:
    """Makes shards of eight entities and windows of one batch, unless the settings say otherwise."""
    shards._SHARD_BYTES, shards._GROUP_ROWS = settings.get("shard", 8) * 2 * 16 * 4, 4
    encode._WINDOW_BATCHES = settings.get("window", 1)
    shared_work._MIN_UNITS, shared_work._SEEN_SECONDS = settings.get("units", 64), 1.0
    shared_work._POLL_SECONDS = 0.05
    shared_work._SIGN_SECONDS, shared_work._LOST_SECONDS = 0.2, settings.get("lost", 600.0)


def token_model() -> ToyTokenRetriever:
    """Returns a model with vectors of tokens."""
    torch.manual_seed(0)
    return ToyTokenRetriever(ToyConfig()).eval()


def main() -> None:
    processes = PartialState(cpu=True, timeout=timedelta(seconds=float(os.environ.get("LIMIT", "1800"))))
    open_entities, save_file, mkdir = knowledge_base.open_entities, shards.save_file, os.mkdir
    root = Path(sys.argv[2])
    for number, settings in enumerate(json.loads(sys.argv[1])):
        small_files(settings)
        change = settings.get("change", {}) if processes.process_index == settings.get("process", 1) else {}
        opened = mock.Mock(side_effect=images.verify_image)
        entity_files.verify_image = image_checks.verify_image = opened
        entities = change.get("file", settings.get("file")) or toy_entities(change.get("entities", 30))
        processor = WatchedProcessor({change[name]: event for name, event in EVENTS.items() if name in change})
        os.chdir(change.get("folder", root))
        knowledge_base.open_entities = lambda *args: time.sleep(change.get("reads", 0)) or open_entities(*args)  # noqa: B023
        outcome = {}
        try:
            model = token_model() if settings.get("tokens") else toy_model(seed=change.get("model", 0))
            model = toy_reranker() if "reranker" in settings else model
            with kb_lock(Path(settings["output"])) if "locked" in change else nullcontext():
                processes.wait_for_everyone()
                KnowledgeBase.build(
                    entities,
                    model,
                    processor,
                    output=settings["output"],
                    batch_size=change.get("batch_size", 4),
                    dtype=change.get("dtype", settings.get("dtype", "float32")),
                    strict=settings.get("strict", False),
                    processes=processes,
                    progress=False,
                )
        except Exception as error:
            outcome = {"error": " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])}
        shards.save_file, os.mkdir = save_file, mkdir
        outcome |= {"num_seen": processor.num_seen, "num_opened": opened.call_count}
        (root / f"outcome-{number}-{processes.process_index}.json").write_text(json.dumps(outcome))
        processes.wait_for_everyone()
    link_together(root, processes)
    processes.destroy_process_group()


def link_together(root: Path, processes: PartialState) -> None:
    """Links mentions with the first knowledge base in all processes, then one that raises an error in the second process."""
    folder = root / "parts"
    if not folder.exists():
        return
    linker = EntityLinker(toy_model(), WatchedProcessor(), folder, name_weight=0.5)
    count_ties_together(folder, root, processes)
    results = []
    for where in (None, "name = 'Entity a' or name = 'Entity dd'", "name = 'Entity z'"):
        linker.where = where
        with linker.sharing(processes) as is_first:
            if is_first:
                time.sleep(float(os.environ.get("IDLE", "0")))
                results += linker(list(toy_mentions(11)), top_k=4, batch_size=3)
                results += linker(list(toy_mentions(3)), top_k=4, units=["text"])
    assert is_first == processes.is_main_process
    (root / f"linked-{processes.process_index}.json").write_text(json.dumps([result.to_dict() for result in results]))
    if not processes.is_main_process:
        last = linker.kb._encodings[-1]
        linker.kb._encodings[-1] = {name: torch.full_like(tensor, torch.nan) for name, tensor in last.items()}
    linker.where = None
    try:
        with linker.sharing(processes) as is_first:
            if is_first:
                linker(list(toy_mentions(3)))
    except ScoreError as error:
        (root / f"error-{processes.process_index}.json").write_text(json.dumps(str(error)))


def count_ties_together(folder: Path, root: Path, processes: PartialState) -> None:
    """Links mentions that every entity scores alike, and notes the rows that each process reads for it."""
    model = toy_model()
    encode = model.encode_mentions
    linker, read, ties = EntityLinker(model, WatchedProcessor(), folder), [], {}
    model.encode_mentions = lambda **inputs: {name: tensor * 0 for name, tensor in encode(**inputs).items()}
    iter_chunks = linker.kb.iter_chunks

    def watched(chunk_size, *, rows=None, **options):
        chosen = range(len(linker.kb)) if rows is None else rows
        read.extend([chosen.start, chosen.stop])
        return iter_chunks(chunk_size, rows=rows, **options)

    linker.kb.iter_chunks = watched
    for where in (None, "name != 'Entity c'"):
        linker.where = where
        with linker.sharing(processes) as is_first:
            if is_first:
                ties[str(where)] = [result.num_tied for result in linker(list(toy_mentions(3)), top_k=2)]
    (root / f"ties-{processes.process_index}.json").write_text(json.dumps([ties, min(read), max(read)]))


if __name__ == "__main__":
    main()

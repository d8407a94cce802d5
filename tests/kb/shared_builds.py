"""A program that several processes run: it builds knowledge bases together, as its first argument says.

At the end it links with the first knowledge base, if that was built. The argument is a JSON list. Each entry has the name of
the output, optionally "window" (its batches) and "shard" (its entities), and changes of one process: "dtype", "model",
"folder" (another working folder), "texts", "batch size", "fails" and "dies" (at an entity). The files of errors and of the
number of encoded entities are written beside the output.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from hf_mel.errors import ScoreError
from hf_mel.inference import encode
from hf_mel.kb import shards, shared_build
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model


class WatchedProcessor(ToyProcessor):
    """Counts entities, and raises an error or dies before the batch that contains entity `at`."""

    def __init__(self, at=None, dies=False):
        super().__init__()
        self.at, self.dies, self.num_seen = at, dies, 0

    def __call__(self, entities=None, **kwargs):
        if any(row["entity_id"] == self.at for row in entities or ()):
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("The lights went out.")
        if entities and len(entities) > 1 and entities[0]["entity_id"] != "Q0":  # no probes
            self.num_seen += len(entities)
        return super().__call__(entities=entities, **kwargs)


def small_files(settings) -> None:
    """Makes shards of eight entities and windows of one batch, unless the settings say otherwise."""
    shards._SHARD_BYTES, shards._GROUP_ROWS = settings.get("shard", 8) * 2 * 16 * 4, 4
    encode._WINDOW_BATCHES = settings.get("window", 1)
    shared_build._MIN_UNITS, shared_build._SEEN_SECONDS = settings.get("units", 64), 1.0
    shared_build._POLL_SECONDS = 0.05


def main() -> None:
    processes = PartialState(cpu=True)
    root = Path(sys.argv[2])
    for number, settings in enumerate(json.loads(sys.argv[1])):
        small_files(settings)
        change = settings.get("change", {}) if processes.process_index == settings.get("process", 1) else {}
        entities = toy_entities(change.get("entities", 30))
        processor = WatchedProcessor(change.get("fails") or change.get("dies"), "dies" in change)
        os.chdir(change.get("folder", root))
        outcome = {}
        try:
            KnowledgeBase.build(
                entities,
                toy_model(seed=change.get("model", 0)),
                processor,
                output=settings["output"],
                batch_size=change.get("batch_size", 4),
                dtype=change.get("dtype", settings.get("dtype", "float32")),
                processes=processes,
                progress=False,
            )
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        outcome["num_seen"] = processor.num_seen
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
    results = []
    for where in (None, "name = 'Entity a' or name = 'Entity dd'", "name = 'Entity z'"):
        linker.where = where
        with linker.sharing(processes) as is_first:
            if is_first:
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


if __name__ == "__main__":
    main()

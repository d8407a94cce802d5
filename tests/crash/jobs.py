"""Commands that are killed at any moment and then repeated. Each leaves what it would have left without the kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from safetensors.torch import load_file

import hf_mel.bench.grid as grid
import hf_mel.candidates.make as making
from hf_mel.bench.suite import Suite
from hf_mel.building.build import build_dataset
from hf_mel.candidates.lists import CandidateLists
from hf_mel.hub.saving import save_model_repository
from hf_mel.kb import build_index, shards
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.link_file import link_file, read_mentions
from hf_mel.linking.linker import EntityLinker
from hf_mel.training.adaptation import adaptation_recipe
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from tests.bench.tiny_suite import InProcess, write_suite_file
from tests.dataset_scripts import wikimel_release
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model
from tests.training.test_adaptation import QUICK, write_people
from tests.training.toy_run import recipe_dict, write_dataset

#: Evaluations and checkpoints after every second of the six steps; only two checkpoints stay.
_STEPWISE = {
    "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command.

    Args:
        prepare (`Callable`): Writes to a folder what the command reads.
        run (`Callable`): The command, in the form that goes on after an interruption.
        result (`Callable`): What the command has left: digests and values by name.
        check (`Callable`): Checks of a folder after a kill: no half-written output may be there.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    result: Callable[[Path], dict[str, Any]]
    check: Callable[[Path], None] = lambda folder: None


def digests(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file in a folder, locks left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".writer"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _trained(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    # The time that it took, and whether it was resumed, may differ. Nothing else may.
    results.pop("run")
    results["validation"].pop("wall_time_seconds")
    weights = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in load_file(run / "model.safetensors").items()}  # fmt: skip
    log = json.loads((run / "training_log.json").read_text())
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    files = {
        name: digest for name, digest in digests(run).items() if name.startswith(("config", "processor", "tokenizer"))
    }
    leftovers = sorted(path.name for path in run.iterdir() if path.name.startswith(".") or path.name == "checkpoints")
    return {
        "results": results,
        "weights": weights,
        "losses": losses,
        **files,
        "leftovers": [name for name in leftovers if name != ".writer.lock"],
    }


def _check_run(folder: Path) -> None:
    """The best checkpoint that the last complete checkpoint names is there, and complete."""
    run = folder / "run"
    states = {}
    for file in run.glob("checkpoints/checkpoint-*/trainer_state.json"):
        try:
            states[int(file.parent.name.rpartition("-")[2])] = json.loads(file.read_text())
        except ValueError:  # cut off: resuming passes over it
            continue
    if states and not (run / "results.json").exists():
        best = states[max(states)]["best_model_checkpoint"]
        assert best is not None
        load_file(Path(best) / "model.safetensors")
        assert (Path(best) / "trainer_state.json").exists()


def _prepare_training(folder: Path) -> None:
    write_dataset(folder / "data")


def _train(folder: Path) -> None:
    recipe = Recipe.from_dict(recipe_dict(folder / "data", logging_steps=1, **_STEPWISE))
    run_recipe(recipe, folder / "run", resume=True)


def _prepare_model(folder: Path) -> None:
    toy_model().save_pretrained(folder / "model")
    ToyProcessor().save_pretrained(folder / "model")


def _build_kb(folder: Path) -> None:
    shards._SHARD_BYTES = 9 * 2 * 16 * 4  # three shards
    KnowledgeBase.build(
        toy_entities(30), toy_model(), ToyProcessor(), output=folder / "kb", batch_size=4, progress=False
    )


def _check_kb(folder: Path) -> None:
    if (folder / "kb").exists():
        KnowledgeBase.from_pretrained(folder / "kb", verify=True)


def _index_kb(folder: Path) -> None:
    build_index(KnowledgeBase(folder / "kb"), "faiss-flat", toy_model(), ToyProcessor(), progress=False)


def _edit_kb(folder: Path) -> None:
    kb = KnowledgeBase(folder / "kb")
    entities = toy_entities(40)
    kb.add(entities.select(range(20, 40)), toy_model(), ToyProcessor(), replace=True, progress=False)
    if "Q2" in kb.entity_ids:
        kb.remove(["Q2"])


def _edited(folder: Path) -> dict[str, Any]:
    kb = KnowledgeBase.from_pretrained(folder / "kb", verify=True)
    rows = sorted(map(repr, kb.rows(range(len(kb)))))
    names = {name for name in digests(folder / "kb") if not name.startswith("kb.json")}
    manifest = json.loads((folder / "kb" / "kb.json").read_text())
    listed = {shard[part]["file"] for shard in manifest["shards"] for part in ("encodings", "entities")}
    return {"rows": rows, "left over": sorted(names - listed)}


def _make_candidates(folder: Path) -> None:
    making.default_cache = lambda: folder / "cache"  # type: ignore[assignment]
    mentions, entities = toy_mentions(40, entities=30), toy_entities(30)
    lists = making.load_or_make_candidates(
        "name", mentions, entities, lambda split: mentions, k=5, scorer="WRatio", retriever=None
    )
    lists.save(folder / "candidates.parquet")


def _check_candidates(folder: Path) -> None:
    if (folder / "candidates.parquet").exists():
        CandidateLists.load(folder / "candidates.parquet")


def _prepare_links(folder: Path) -> None:
    _build_kb(folder)
    rows = [{"text": row["text"], "mention": row["mention"]} for row in toy_mentions(40, entities=30)]
    (folder / "mentions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _link(folder: Path) -> None:
    linker = EntityLinker(toy_model(), ToyProcessor(), KnowledgeBase(folder / "kb"))
    rows = read_mentions(folder / "mentions.jsonl")
    link_file(linker, rows, folder / "linked.jsonl", batch_size=4, resume=True)


def _check_links(folder: Path) -> None:
    if (folder / "linked.jsonl").exists():
        assert len((folder / "linked.jsonl").read_text().splitlines()) == 40


def _build_data(folder: Path) -> None:
    build_dataset("wikimel", output=folder / "built", raw_dir=folder / "raw", **wikimel_release.OPTIONS)


def _prepare_data(folder: Path) -> None:
    (folder / "raw").mkdir()
    wikimel_release.write(folder / "raw")


def _check_data(folder: Path) -> None:
    if (folder / "built").exists():
        datasets.load_dataset(str(folder / "built"), "entities", cache_dir=str(folder / "cache"))
        shutil.rmtree(folder / "cache")


def _prepare_adaptation(folder: Path) -> None:
    from hf_mel.training.assemble import build_model
    from hf_mel.training.tokenizer import texts_of

    write_people(folder / "people.jsonl")
    content = recipe_dict(folder / "data")
    content["model"]["config"] = {name: value for name, value in content["model"]["config"].items() if name != "vision_config"} | {"units": ["text"]}  # fmt: skip
    content["processor"].pop("vision")
    save_model_repository(
        *build_model(Recipe.from_dict(content), texts_of(toy_mentions(20), toy_entities(12))), folder / "model"
    )


def _adapt(folder: Path) -> None:
    sets = [
        *QUICK,
        "training.max_steps=6",
        "adaptation.train=true",
        "training.save_total_limit=2",
        *(f"training.{name}={value}" for name, value in _STEPWISE.items() if name != "save_total_limit"),
    ]
    recipe = adaptation_recipe(str(folder / "model"), str(folder / "people.jsonl"), name="run", overrides=sets)
    run_recipe(recipe, output=folder / "run", resume=True)


def _bench(folder: Path) -> None:
    grid.run_suite(Suite.load(folder / "tiny.yaml"), folder / "runs", run=InProcess(), log=lambda _: None)


def _benched(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted((folder / "runs").rglob("model.safetensors")):
        found[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted((folder / "runs").rglob("predictions.jsonl")):
        found[file.relative_to(folder).as_posix()] = file.read_text()
    return found


JOBS = {
    "train": Job(_prepare_training, _train, lambda folder: _trained(folder / "run"), _check_run),
    "kb build": Job(lambda folder: None, _build_kb, lambda folder: digests(folder / "kb"), _check_kb),
    "kb index": Job(_build_kb, _index_kb, lambda folder: digests(folder / "kb"), _check_kb),
    "kb add, kb remove": Job(_build_kb, _edit_kb, _edited, _check_kb),
    "candidates": Job(
        lambda folder: None,
        _make_candidates,
        lambda folder: {"sha256": CandidateLists.load(folder / "candidates.parquet").sha256},
        _check_candidates,
    ),
    "link --input": Job(
        _prepare_links, _link, lambda folder: {"output": (folder / "linked.jsonl").read_text()}, _check_links
    ),
    "data build": Job(_prepare_data, _build_data, lambda folder: digests(folder / "built"), _check_data),
    "adapt": Job(_prepare_adaptation, _adapt, lambda folder: _trained(folder / "run"), _check_run),
    "bench": Job(lambda folder: write_suite_file(folder), _bench, _benched),
}
register()
os.environ["TOKENIZERS_PARALLELISM"] = "false"

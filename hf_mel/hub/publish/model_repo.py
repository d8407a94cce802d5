"""hf_mel.hub.publish.model_repo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from hf_mel.data.loading import dataset_version
from hf_mel.errors import HubError, PublishError, UnknownDatasetError
from hf_mel.hub.model_cards import MARKER, eval_results, evaluations, model_card
from hf_mel.hub.publish.publication import (
    _BINARY,
    Content,
    Publication,
    _card_metadata,
    _folder,
    _json_file,
    _read,
    _unfit,
)
from hf_mel.hub_errors import check_repo_id

_MODEL_SUFFIXES = (".json", ".safetensors", ".py", ".txt", ".model", ".md", ".yaml", ".png", ".jinja")


_TEST_RESULTS = "results_*.json"


EVAL_RESULTS = ".eval_results/hf_mel.yaml"


def model_publication(
    run: str | os.PathLike[str], repo_id: str, *, dataset: str | None = None, dataset_revision: str | None = None
) -> Publication:
    """A run folder, or any model folder with a card, as a model repository.

    The card is written anew for this repository from `results.json`, with the results of each `results_*.json` that
    [`hf-mel evaluate --output`] left there for the same weights, unless the card's last line, which says so, is gone.

    Args:
        run (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Where to, `OWNER/NAME`.
        dataset (`str`, *optional*): Hub id of the data set of a run that was trained on a local build; it is checked to
            be the same, byte for byte.
        dataset_revision (`str`, *optional*): Branch, tag or commit of it.

    Raises:
        PublishError: No model there, weights that are not safetensors or damaged, code that is missing, no card and
            nothing to make one from, another data set, or an access token in a file.
        HubError: `dataset` cannot be read.
    """
    folder = _folder(run)
    config = _json_file(folder / "config.json", "Give a run folder or a model folder.")
    files, left_out = _top_level(folder, _MODEL_SUFFIXES)
    _check_weights(folder, files)
    notes = _check_code(folder, config, files)
    card: str | None
    if "results.json" in files:
        info = _json_file(folder / "results.json", "Train again.")
        card, more = _card_of_run(folder, info, repo_id, dataset, dataset_revision, notes)
        license_id = info.get("license")
        files |= more
    elif dataset is not None:
        raise PublishError("there is no results.json that says what it was trained on.", file=folder)
    elif "README.md" not in files:
        raise PublishError(
            "has neither results.json, to make a card from, nor a README.md.",
            file=folder,
            remedy="Write a README.md that says what the model is, where it comes from and under which licence.",
        )
    else:
        card, license_id = None, _card_metadata(folder / "README.md").get("license")
    if card is not None:
        files["README.md"] = card.encode()
    if "recipe.yaml" in files:
        files["recipe.yaml"] = _public_recipe(folder / "recipe.yaml", dataset)
    notes += _paths_of_this_machine(files)
    return Publication(
        "model",
        repo_id,
        "model",
        files,
        owned=("*.safetensors", "*.safetensors.index.json", EVAL_RESULTS),
        left_out=left_out,
        notes=notes,
        license=license_id,
    )


def _top_level(folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, Content], dict[str, str]]:
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            left_out[f"{path.name}/"] = "a folder"
        elif path.name == "example.png":
            left_out[path.name] = "not a part of it"
        elif reason := _unfit(path, path.name, suffixes):
            left_out[path.name] = reason
        else:
            files[path.name] = path
    return files, left_out


def _check_weights(folder: Path, files: Mapping[str, Content]) -> None:

    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise PublishError(
            "has no safetensors weights.",
            file=folder,
            remedy="Load the model and save it again with save_pretrained; other formats may run code when opened.",
        )
    for name in weights:
        try:
            with safe_open(folder / name, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise PublishError(f"is not a safetensors file ({error}).", file=folder / name) from error
    for name in [name for name in files if name.endswith(".safetensors.index.json")]:
        parts = _json_file(folder / name, "Save the model again.").get("weight_map")
        named = set(parts.values()) if isinstance(parts, dict) else set()
        if missing := sorted(part for part in named if part not in files):
            raise PublishError(f"names {missing[0]!r}, which is not there.", file=folder / name)


def _check_code(folder: Path, config: Mapping[str, Any], files: Mapping[str, Content]) -> list[str]:
    """Notes; the code that config and processor name is there."""
    notes = []
    processor = "processor_config.json"
    references = [config.get("auto_map")]
    if processor in files:
        references.append(_json_file(folder / processor, "Save the processor again.").get("auto_map"))
    else:
        notes.append("It has no processor: evaluating, linking and building a knowledge base need one.")
    if not isinstance(config.get("auto_map"), dict):
        notes.append("It carries no code of its own: it loads where transformers or hf_mel has its class.")
    for auto_map in references:
        for reference in auto_map.values() if isinstance(auto_map, dict) else ():
            module = str(reference).rpartition("--")[2].partition(".")[0]
            if f"{module}.py" not in files:
                raise PublishError(
                    f"its code is not whole: {module}.py is missing.", file=folder, remedy="Save the model again."
                )
    return notes


def _card_of_run(
    folder: Path,
    info: dict[str, Any],
    repo_id: str,
    dataset: str | None,
    dataset_revision: str | None,
    notes: list[str],
) -> tuple[str | None, dict[str, Content]]:
    """The card, `None` to keep the one that is there, and the file of results."""

    try:
        data = dict(info["data"])
        weights = info["validation"].get("model", {}).get("weights")
        if dataset is not None:
            data |= _checked_dataset(dataset, dataset_revision, data.get("sha256"))
        tests = []
        for path in sorted(folder.glob(_TEST_RESULTS)):
            test = _json_file(path, "Evaluate again.")
            if not isinstance(test.get("metrics"), dict) or test.get("units"):
                continue
            if weights is None or (test.get("model") or {}).get("weights") != weights:
                notes.append(f"{path.name} was measured on other weights: it is not in the card.")
                continue
            tests.append(test)
        info = info | {"data": data, "repo_id": repo_id, "tests": tests}
        card = model_card(info)
        entries = eval_results(info)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, (PublishError, HubError)):
            raise
        raise PublishError(
            f"is not what hf_mel writes ({type(error).__name__}: {error}).",
            file=folder / "results.json",
            remedy="Train again with this version.",
        ) from error
    for split, evaluation in evaluations(info):
        metrics = evaluation["metrics"]
        notes.append(f"Results, {split}: H@1 {100 * metrics['hits@1']:.1f}, MRR {100 * metrics['mrr']:.1f}.")
    if info.get("task") == "pretraining":
        notes.append("The card says that this is a pre-training: a loss, and no results of linking.")
    elif not tests:
        notes.append(
            "The card has results on validation only. For a test split: hf-mel evaluate RUN … --output RUN/results_test.json"
        )
    more: dict[str, Content] = {}
    if entries:
        more[EVAL_RESULTS] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode()
    else:
        notes.append("No .eval_results: they name a data set on the Hub, and this run's was a folder (see --dataset).")
    readme = folder / "README.md"
    if readme.is_file() and MARKER not in readme.read_text(encoding="utf-8", errors="replace"):
        notes.append("README.md was edited by hand, and goes up as it is; delete it to have it written anew.")
        return None, more
    return card, more


def _checked_dataset(dataset: str, revision: str | None, sha256: str | None) -> dict[str, Any]:

    check_repo_id(dataset)
    try:
        version = dataset_version(dataset, revision=revision)
    except UnknownDatasetError as error:
        raise HubError(error.message, file=dataset, remedy="Publish the data set first.") from error
    if version["sha256"] is None or version["sha256"] != sha256:
        raise PublishError(
            f"is not the data the run was trained on (sha256 {version['sha256']}, the run's is {sha256}).",
            file=dataset,
            remedy="Publish the folder it was trained on, or leave --dataset out.",
        )
    return {"dataset": dataset, "revision": version["revision"]}


def _public_recipe(path: Path, dataset: str | None) -> bytes:
    """The recipe with the data set by its Hub id, or by its folder's name: where it lay is nobody's business."""
    try:
        recipe = yaml.safe_load(_read(path))
        local = recipe["data"]["dataset"]
        recipe["data"]["dataset"] = dataset or (Path(local).name if Path(local).is_absolute() else local)
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise PublishError(f"is not a recipe ({error}).", file=path) from error
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=119).encode()


def _paths_of_this_machine(files: Mapping[str, Content]) -> list[str]:
    places = {str(Path.home()), str(Path.cwd())} - {"/", "/root"}
    found = []
    for name, content in sorted(files.items()):
        if name.endswith(_BINARY) or name == "tokenizer.json":
            continue
        text = content if isinstance(content, bytes) else _read(content)
        found += [
            f"{name} names a folder of this machine: {place}" for place in sorted(places) if place.encode() in text
        ]
    return found

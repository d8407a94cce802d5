"""Publications of models."""

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
    BINARY_SUFFIXES,
    Content,
    Publication,
    content_bytes,
    existing_folder,
    read_card_metadata,
    read_json_object,
    reason_to_skip,
)
from hf_mel.hub_errors import check_repo_id

#: The file of results that the Hub shows beside a model.
EVAL_RESULTS = ".eval_results/hf_mel.yaml"

_MODEL_SUFFIXES = (".json", ".safetensors", ".py", ".txt", ".model", ".md", ".yaml", ".png", ".jinja")


def model_publication(
    run: str | os.PathLike[str], repo_id: str, *, dataset: str | None = None, dataset_revision: str | None = None
) -> Publication:
    """Returns the publication of a run folder, or of any model folder with a card.

    The card is rendered for this repository from `results.json` and from every `results_*.json` of the folder that
    `hf-mel evaluate --output` measured on the same weights. A README.md without the marker in its last line counts as
    edited by hand and is uploaded unchanged.

    Args:
        run (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Repository id, `OWNER/NAME`.
        dataset (`str`, *optional*): Hub id of the data set, for a run that was trained on a local build. Its files must
            be identical to those of the build.
        dataset_revision (`str`, *optional*): Branch, tag or commit of the data set.

    Raises:
        HubError: `repo_id` is not valid, or `dataset` cannot be read.
        PublishError: The folder holds no model; its weights are not safetensors or are damaged; its code is incomplete;
            it has no card and no results to write one from; `dataset` differs from the training data; or a file holds
            an access token.
    """
    folder = existing_folder(run)
    config = read_json_object(folder / "config.json", "Give a run folder or a model folder.")
    files, left_out = _model_files(folder)
    _check_weights(folder, files)
    notes = _check_code(folder, config, files)
    if "results.json" in files:
        info = read_json_object(folder / "results.json", "Train again.")
        license_id = info.get("license")
        files |= _card_and_results(folder, info, repo_id, dataset, dataset_revision, notes)
    elif dataset is not None:
        raise PublishError(
            "The folder has no results.json that names the training data.",
            file=folder,
            remedy="Omit --dataset, or give a run folder.",
        )
    elif "README.md" not in files:
        raise PublishError(
            "The folder has neither a results.json to write a card from nor a README.md.",
            file=folder,
            remedy="Write a README.md that describes the model, its origin and its licence.",
        )
    else:
        license_id = read_card_metadata(folder / "README.md").get("license")
    if "recipe.yaml" in files:
        files["recipe.yaml"] = _recipe_without_paths(folder / "recipe.yaml", dataset)
    notes += _notes_on_local_paths(files)
    return Publication(
        "model",
        repo_id,
        "model",
        files,
        managed_patterns=("*.safetensors", "*.safetensors.index.json", EVAL_RESULTS),
        left_out=left_out,
        notes=notes,
        license=license_id,
    )


def _model_files(folder: Path) -> tuple[dict[str, Content], dict[str, str]]:
    """The files of the folder to upload, and those left out with the reason."""
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            left_out[f"{path.name}/"] = "a folder"
        elif path.name in ("example.png", "post.png", "post.html"):  # written by hf-mel demo
            left_out[path.name] = "not part of the publication"
        elif path.name == "environment.json":
            left_out[path.name] = "it describes this machine"
        elif reason := reason_to_skip(path, path.name, _MODEL_SUFFIXES):
            left_out[path.name] = reason
        else:
            files[path.name] = path
    return files, left_out


def _check_weights(folder: Path, files: Mapping[str, Content]) -> None:
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise PublishError(
            "The folder has no safetensors weights.",
            file=folder,
            remedy="Load the model and save it again with save_pretrained. Other formats may run code when opened.",
        )
    for name in weights:
        try:
            with safe_open(folder / name, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise PublishError(
                f"The file is not a safetensors file ({error}).", file=folder / name, remedy="Save the model again."
            ) from error
    for name in [name for name in files if name.endswith(".safetensors.index.json")]:
        shards = read_json_object(folder / name, "Save the model again.").get("weight_map")
        named = set(shards.values()) if isinstance(shards, dict) else set()
        if missing := sorted(named - files.keys()):
            raise PublishError(
                f"The index names {missing[0]!r}, which is missing.",
                file=folder / name,
                remedy="Save the model again.",
            )


def _check_code(folder: Path, config: Mapping[str, Any], files: Mapping[str, Content]) -> list[str]:
    """Checks that the code named by configuration and processor is present; returns notes on how the model loads."""
    notes = []
    auto_maps = [config.get("auto_map")]
    if "processor_config.json" in files:
        processor = read_json_object(folder / "processor_config.json", "Save the processor again.")
        auto_maps.append(processor.get("auto_map"))
    else:
        notes.append("The folder has no processor. Evaluation, linking and knowledge bases need one.")
    if not isinstance(config.get("auto_map"), dict):
        notes.append("The model carries no code. It loads only where transformers or hf_mel provides its class.")
    for auto_map in auto_maps:
        for reference in auto_map.values() if isinstance(auto_map, dict) else ():
            module = str(reference).rpartition("--")[2].partition(".")[0]
            if f"{module}.py" not in files:
                raise PublishError(
                    f"The code is incomplete: {module}.py is missing.", file=folder, remedy="Save the model again."
                )
    return notes


def _card_and_results(
    folder: Path,
    info: dict[str, Any],
    repo_id: str,
    dataset: str | None,
    dataset_revision: str | None,
    notes: list[str],
) -> dict[str, Content]:
    """The card, unless README.md was edited by hand, and the results for the Hub; appends to `notes`."""
    files: dict[str, Content] = {}
    try:
        data = dict(info["data"])
        weights = (info["validation"] or {}).get("model", {}).get("weights")
        if dataset is not None:
            data |= _verified_dataset(dataset, dataset_revision, data.get("sha256"))
        tests = []
        for path in sorted(folder.glob("results_*.json")):
            test = read_json_object(path, "Evaluate again.")
            if not isinstance(test.get("metrics"), dict) or test.get("units"):
                continue
            if weights is None or (test.get("model") or {}).get("weights") != weights:
                notes.append(f"{path.name} was measured on other weights and is not in the card.")
                continue
            tests.append(test)
        info = info | {"data": data, "repo_id": repo_id, "tests": tests}
        card = model_card(info)
        entries = eval_results(info)
    except (HubError, PublishError):
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PublishError(
            f"The file is not a results.json of this version of hf_mel ({type(error).__name__}: {error}).",
            file=folder / "results.json",
            remedy="Train again with this version.",
        ) from error
    for split, evaluation in evaluations(info):
        metrics = evaluation["metrics"]
        notes.append(f"Results, {split}: H@1 {100 * metrics['hits@1']:.1f}, MRR {100 * metrics['mrr']:.1f}.")
    if info.get("task") == "pretraining":
        notes.append("The card describes a pre-trained model: it gives a loss and no linking results.")
    elif not tests:
        notes.append(
            "The card has validation results only. For a test split, first run: "
            "hf-mel evaluate RUN … --output RUN/results_test.json"
        )
    if entries:
        files[EVAL_RESULTS] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode()
    else:
        notes.append(
            "The Hub will show no evaluation results: they must name a data set on the Hub, and this run used a local "
            "folder (see --dataset)."
        )
    readme = folder / "README.md"
    if readme.is_file() and MARKER not in readme.read_text(encoding="utf-8", errors="replace"):
        notes.append("README.md was edited by hand and is uploaded unchanged. Delete it to have it written again.")
    else:
        files["README.md"] = card.encode()
    return files


def _verified_dataset(dataset: str, revision: str | None, sha256: str | None) -> dict[str, Any]:
    """Hub id and commit of the data set, if its files have the given digest."""
    check_repo_id(dataset)
    try:
        version = dataset_version(dataset, revision=revision)
    except UnknownDatasetError as error:
        raise HubError(error.message, file=dataset, remedy="Publish the data set first.") from error
    if version["sha256"] is None or version["sha256"] != sha256:
        raise PublishError(
            f"The data set is not the one the model was trained on (sha256 {version['sha256']}, expected {sha256}).",
            file=dataset,
            remedy="Publish the folder it was trained on, or omit --dataset.",
        )
    return {"dataset": dataset, "revision": version["revision"]}


def _without_folder(dataset: str) -> str:
    return Path(dataset).name if Path(dataset).is_absolute() else dataset


def _recipe_without_paths(path: Path, dataset: str | None) -> bytes:
    """The recipe, with the data set's Hub id, or the folder names of data sets in place of absolute paths."""
    try:
        recipe = yaml.safe_load(content_bytes(path))
        data = recipe["data"]
        data["dataset"] = dataset or _without_folder(data["dataset"])
        if "extra_datasets" in data:  # recipes of earlier versions have none
            data["extra_datasets"] = [_without_folder(extra) for extra in data["extra_datasets"]]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise PublishError(
            f"The file is not a recipe ({error}).", file=path, remedy="Remove it, or train again."
        ) from error
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=119).encode()


def _notes_on_local_paths(files: Mapping[str, Content]) -> list[str]:
    folders = sorted({str(Path.home()), str(Path.cwd())} - {"/", "/root"})
    notes = []
    for name, content in sorted(files.items()):
        if name.endswith(BINARY_SUFFIXES) or name == "tokenizer.json":
            continue
        text = content_bytes(content)
        notes += [f"{name} names a folder of this machine: {folder}" for folder in folders if folder.encode() in text]
    return notes

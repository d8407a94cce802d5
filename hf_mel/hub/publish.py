"""Publishing: a folder on disk → one commit in a repository of the Hub, or none.

[`model_publication`] and its siblings say what would go up; [`compare`] says what that changes; [`publish`] does it. Files
that are large are uploaded first (by the client, which skips those the Hub has), then one commit names everything: until
it is there the earlier revision is what everybody gets, and a run that was cut off is simply repeated.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from hf_mel.errors import HubError, PublishError
from hf_mel.files import file_sha256
from hf_mel.remote import check_repo_id, holds_token, hub_errors

Content = Path | bytes
Gated = Literal["auto", "manual"]

_MODEL_SUFFIXES = (".json", ".safetensors", ".py", ".txt", ".model", ".md", ".yaml", ".png", ".jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
#: Files of these kinds are not looked through for access tokens: they hold no text of the user's.
_BINARY = (".safetensors", ".parquet", ".png", ".jpg", ".jpeg", ".webp", ".gif")
_TEST_RESULTS = "results_*.json"
EVAL_RESULTS = ".eval_results/hf_mel.yaml"


@dataclass
class Publication:
    """What goes up.

    Args:
        kind (`str`): "model", "data set", "knowledge base", "metric" or "Space".
        repo_id (`str`): Where to.
        repo_type (`str`): "model", "dataset" or "space".
        files (`dict[str, Path | bytes]`): Path in the repository → the file, or its content.
        owned (`tuple[str, ...]`): Patterns of files that only publications write: what they leave behind is deleted.
        left_out (`dict[str, str]`): Files of the folder that do not go up, and why.
        notes (`list[str]`): What whoever approves it should know.
        license (`str`, *optional*): As the card says it.
        space_sdk (`str`, *optional*): Of a Space.
    """

    kind: str
    repo_id: str
    repo_type: str
    files: dict[str, Content]
    owned: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    license: str | None = None
    space_sdk: str | None = None

    def __post_init__(self):
        check_repo_id(self.repo_id)
        if "/" not in self.repo_id:
            raise PublishError(f"{self.repo_id!r} has no owner.", remedy="Give OWNER/NAME.")
        for path, content in sorted(self.files.items()):
            if path.endswith(_BINARY):
                continue
            if holds_token(content if isinstance(content, bytes) else _read(content)):
                raise PublishError(
                    "holds an access token of the Hub.",
                    file=path,
                    remedy="Take it out, and revoke it if anybody has seen the file.",
                )

    def size(self, path: str) -> int:
        """Bytes of one file."""
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


@dataclass
class Change:
    """What a publication does to one file: `what` is "new", "changed", "unchanged" or "deleted"; `size` in bytes."""

    path: str
    what: str
    size: int


@dataclass
class Comparison:
    """A publication beside what the repository holds.

    Args:
        head (`str` or `None`): The commit compared with; `None` if there is no such repository yet, or none was asked.
        exists (`bool` or `None`): `None` if the Hub could not be asked.
        private, gated: The repository's settings as they are.
        changes (`list[Change]`): Each file, by path.
    """

    head: str | None
    exists: bool | None
    private: bool | None
    gated: str | bool | None
    changes: list[Change]

    @property
    def upload_bytes(self) -> int:
        """Bytes of new and changed files."""
        return sum(change.size for change in self.changes if change.what in ("new", "changed"))

    @property
    def is_empty(self) -> bool:
        """Whether no file would change."""
        return all(change.what == "unchanged" for change in self.changes)


@dataclass
class PublishResult:
    """What [`publish`] did: `commit` is `None` where nothing was left to do; `url` is the repository's page."""

    commit: str | None
    url: str
    comparison: Comparison


# -- what goes up ------------------------------------------------------------------------------------------------------


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


def dataset_publication(
    folder: str | os.PathLike[str], repo_id: str, *, i_hold_the_rights: bool = False
) -> Publication:
    """A folder that `hf-mel data build` wrote, as a data-set repository.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Where to, `OWNER/NAME`.
        i_hold_the_rights (`bool`): Publish although the release's terms do not let everybody.

    Raises:
        PublishError: Not such a folder, or its terms forbid it.
    """
    folder = _folder(folder)
    report = _json_file(folder / "report.json", "Give a folder written by hf-mel data build.")
    metadata = _card_metadata(folder / "README.md")
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if reason := _unfit(path, name, (".parquet", ".json", ".md")):
            left_out[name] = reason
        else:
            files[name] = path
    rows = sum(name.endswith(".parquet") for name in files)
    if not rows:
        raise PublishError("holds no Parquet files.", file=folder, remedy="Build it: hf-mel data build.")
    _check_parquet(files)
    # A report that does not say was written by an older version: not knowing is no leave.
    terms = report.get("redistribution", "its report does not say whether it may (build it again)")
    if terms is not None and not isinstance(terms, str):
        raise PublishError(f"'redistribution' is {terms!r}, not a text.", file=folder / "report.json")
    notes = []
    if terms:
        if not i_hold_the_rights:
            raise PublishError(
                f"may not be passed on: {terms}",
                file=folder,
                remedy="If its rights are yours, or you were given leave, say --i-hold-the-rights.",
            )
        notes.append(f"Published because you say you hold the rights. The terms: {terms}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    builder = report.get("dataset")
    if isinstance(builder, str):
        files["README.md"] = text.replace(f"path/to/{builder}", repo_id).encode()
    if not metadata.get("license"):
        notes.append("The card names no licence.")
    return Publication(
        "data set",
        repo_id,
        "dataset",
        files,
        owned=("*.parquet",),
        left_out=left_out,
        notes=notes,
        license=metadata.get("license"),
    )


def kb_publication(kb: str | os.PathLike[str], repo_id: str, *, work: str | os.PathLike[str]) -> Publication:
    """A knowledge base as a data-set repository, which [`~hf_mel.KnowledgeBase.from_pretrained`] reads.

    Args:
        kb (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Where to, `OWNER/NAME`.
        work (`str` or `os.PathLike`): A folder for a compact copy, needed where entities were removed: their rows are
            marked in the original, not gone, and would go up with it. It has to be there until the files are uploaded.

    Raises:
        KnowledgeBaseError: No knowledge base there, or a damaged one.
    """
    from hf_mel.hub.cards import kb_card
    from hf_mel.linking.knowledge_base import KnowledgeBase

    opened = KnowledgeBase.load(kb, verify=True)
    notes = ["It holds the names, texts and first images of its entities: publish what you may pass on."]
    if removed := opened.info()["removed"]:
        opened = opened.save(Path(work) / "kb")
        notes.append(f"{removed:,} removed entities are left out: a compact copy goes up.")
    files: dict[str, Content] = {name: opened.path / name for name in opened.files()}
    files["README.md"] = kb_card(opened.info(), repo_id).encode()
    return Publication(
        "knowledge base",
        repo_id,
        "dataset",
        files,
        owned=("encodings-*.safetensors", "entities-*.parquet"),
        notes=notes,
    )


def space_publication(folder: str | os.PathLike[str], repo_id: str, *, metric: bool = False) -> Publication:
    """A folder with a Space in it, or the Space of a metric that `evaluate.load` reads.

    Args:
        folder (`str` or `os.PathLike`): The folder, or the name of one that comes with hf_mel.
        repo_id (`str`): Where to, `OWNER/NAME`.
        metric (`bool`): Check it as a metric.

    Raises:
        PublishError: What the Hub or `evaluate` need is missing.
    """
    folder = _space_folder(folder)
    metadata = _card_metadata(folder / "README.md")
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or "__pycache__" in path.parts or path.suffix == ".pyc":
            continue
        if name == "__init__.py":
            left_out[name] = "for the Python package only"
        elif reason := _unfit(path, name, None):
            left_out[name] = reason
        else:
            files[name] = path
    for key in ("title", "sdk", "app_file"):
        if not isinstance(metadata.get(key), str):
            raise PublishError(f"its metadata has no {key!r}.", file=folder / "README.md", remedy="A Space needs it.")
    if metadata["sdk"] != "static":
        for name in (metadata["app_file"], "requirements.txt"):
            if name not in files:
                raise PublishError(f"there is no {name}.", file=folder, remedy="A Space needs it to start.")
    if metric:
        wanted = repo_id.rpartition("/")[2]
        modules = sorted(
            path.removesuffix(".py")
            for path, content in files.items()
            if path.endswith(".py")
            and b"evaluate.Metric" in (content if isinstance(content, bytes) else _read(content))
        )
        if wanted not in modules:
            raise PublishError(
                f"evaluate.load({repo_id!r}) looks for {wanted}.py, which is not there.",
                file=folder,
                remedy=f"Publish to OWNER/{modules[0]}."
                if modules
                else "A metric is a module with an evaluate.Metric.",
            )
        for page in ("README.md", metadata["app_file"]):  # they call the metric where it is published
            text = _read(folder / page).decode("utf-8", errors="replace")
            files[page] = re.sub(rf"\bhf-mel/{re.escape(wanted)}\b", repo_id, text).encode()
    return Publication(
        "metric" if metric else "Space",
        repo_id,
        "space",
        files,
        left_out=left_out,
        license=metadata.get("license"),
        space_sdk=metadata["sdk"],
    )


# -- what that changes, and doing it ----------------------------------------------------------------------------------


def compare(publication: Publication, *, api: HfApi | None = None) -> Comparison:
    """What the publication changes in its repository; asks the Hub, writes nothing.

    Raises:
        HubError: The Hub cannot be asked, or does not answer.
    """
    api = api or HfApi()
    repo_id, repo_type = publication.repo_id, publication.repo_type
    with hub_errors(repo_id):
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            return Comparison(None, False, None, None, _changes(publication, {}))
        tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha, repo_type=repo_type)
        remote = {item.path: item for item in tree if isinstance(item, RepoFile)}
    private, gated = (getattr(info, name, None) for name in ("private", "gated"))
    return Comparison(info.sha, True, private, gated, _changes(publication, remote))


def offline_comparison(publication: Publication) -> Comparison:
    """As [`compare`], with everything new: what can be said without asking the Hub."""
    return Comparison(None, None, None, None, _changes(publication, {}))


def publish(
    publication: Publication,
    *,
    private: bool = False,
    gated: Gated | None = None,
    message: str | None = None,
    api: HfApi | None = None,
) -> PublishResult:
    """Makes the repository hold the publication: one commit, or none if there is nothing to change.

    The repository is made if need be. It becomes private, or gated, before the first file is in it; one that is private
    or gated is never opened. The commit names the one it was compared with, so that it fails, and nothing changes, where
    somebody else was faster. The access token is the one of `hf auth login`, or `HF_TOKEN`.

    Args:
        publication ([`Publication`]): What goes up.
        private (`bool`): Only the owner, or the organisation, may see it.
        gated (`str`, *optional*): Readers have to ask: "auto" lets everybody in who asks, "manual" those you accept.
        message (`str`, *optional*): Title of the commit.

    Raises:
        HubError: No account, no right to write, a connection that failed, a repository that changed meanwhile. Nothing
            was committed, or (a connection that failed at the last moment) everything was: running it again tells.
    """
    api = api or HfApi()
    repo_id, repo_type = publication.repo_id, publication.repo_type
    comparison = compare(publication, api=api)
    with hub_errors(repo_id):
        if not comparison.exists:
            api.create_repo(
                repo_id,
                repo_type=repo_type,
                private=private or None,
                exist_ok=True,
                space_sdk=publication.space_sdk if repo_type == "space" else None,
            )
            comparison = compare(publication, api=api)
        settings: dict[str, Any] = {}
        if private and not comparison.private:
            settings["private"] = True
        if gated is not None and comparison.gated != gated:
            settings["gated"] = gated
        if settings:
            api.update_repo_settings(repo_id, repo_type=repo_type, **settings)
        operations: list[Any] = []
        for change in comparison.changes:
            if change.what in ("new", "changed"):
                content = publication.files[change.path]
                operations.append(
                    CommitOperationAdd(change.path, content if isinstance(content, bytes) else str(content))
                )
            elif change.what == "deleted":
                operations.append(CommitOperationDelete(change.path, is_folder=False))
        url = f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if not operations:
            return PublishResult(None, url, comparison)
        try:
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=message or f"Publish the {publication.kind} with hf_mel",
                repo_type=repo_type,
                parent_commit=comparison.head,
            )
        except HfHubHTTPError:
            raise
        except ValueError as error:  # the Hub checks the card's metadata before it takes anything
            raise PublishError(str(error), file="README.md", remedy="Correct the card's metadata.") from error
    return PublishResult(commit.oid, url, comparison)


def _changes(publication: Publication, remote: Mapping[str, RepoFile]) -> list[Change]:
    changes = []
    with tqdm(sorted(publication.files.items()), desc="Comparing", unit="file", delay=2) as bar:
        for path, content in bar:
            what = "new" if path not in remote else "unchanged" if _same(content, remote[path]) else "changed"
            changes.append(Change(path, what, publication.size(path)))
    stale = [
        path
        for path in remote
        if path not in publication.files and any(fnmatch.fnmatchcase(path, pattern) for pattern in publication.owned)
    ]
    changes += [Change(path, "deleted", remote[path].size) for path in sorted(stale)]
    return changes


def _same(content: Content, remote: RepoFile) -> bool:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != remote.size:
        return False
    if remote.lfs is not None:
        sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        return sha256 == remote.lfs.sha256
    data = content if isinstance(content, bytes) else _read(content)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.blob_id  # git's own name of a content


# -- checks ------------------------------------------------------------------------------------------------------------


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise PublishError("there is no such folder.", file=folder, remedy="Check the path.")
    return folder


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PublishError(f"cannot be read ({error.strerror}).", file=path) from error


def _json_file(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise PublishError(f"there is no {path.name}.", file=path.parent, remedy=remedy)
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise PublishError(f"is not JSON ({error}).", file=path, remedy=remedy) from error
    if not isinstance(content, dict):
        raise PublishError("is not a JSON object.", file=path, remedy=remedy)
    return content


def _card_metadata(path: Path) -> dict[str, Any]:
    """The YAML at the top of a card."""
    if not path.is_file():
        raise PublishError("there is no README.md, the card.", file=path.parent, remedy="Every repository needs one.")
    match = re.match(r"---\r?\n(.*?)\r?\n---(?:\r?\n|$)", _read(path).decode("utf-8", errors="replace"), re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, RecursionError) as error:
        raise PublishError(f"its metadata is not YAML ({error}).", file=path) from error
    if not isinstance(metadata, dict):
        raise PublishError("its metadata is not a mapping.", file=path)
    return metadata


def _unfit(path: Path, name: str, suffixes: Iterable[str] | None) -> str | None:
    """Why a file does not go up, `None` if it does."""
    if path.is_symlink() or not path.is_file():
        return "a link, or not a file"
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if path.suffix.lower() in _PICKLES:
        return "may hold a pickle, which runs code when it is opened"
    if suffixes is not None and path.suffix not in suffixes:
        return "not a part of it"
    return None


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
    from safetensors import SafetensorError, safe_open

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


def _check_parquet(files: Mapping[str, Content]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, content in files.items():
        if name.endswith(".parquet"):
            try:
                pq.ParquetFile(content).close()
            except (pa.ArrowException, OSError) as error:
                raise PublishError(f"is not a Parquet file ({error}).", file=name, remedy="Build it again.") from error


def _card_of_run(
    folder: Path,
    info: dict[str, Any],
    repo_id: str,
    dataset: str | None,
    dataset_revision: str | None,
    notes: list[str],
) -> tuple[str | None, dict[str, Content]]:
    """The card, `None` to keep the one that is there, and the file of results."""
    from hf_mel.hub.cards import MARKER, eval_results, evaluations, model_card

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
    from hf_mel.data.loading import dataset_version
    from hf_mel.errors import UnknownDatasetError

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


def _space_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = os.fspath(path)
    if re.fullmatch(r"[A-Za-z]\w*", name):
        shipped = Path(str(resources.files("hf_mel.spaces"))) / name
        if (shipped / "README.md").is_file():
            return shipped
    return _folder(path)

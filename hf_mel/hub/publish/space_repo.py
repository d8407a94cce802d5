"""Publications of Spaces, including those that `evaluate.load` reads as metrics."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from hf_mel.errors import PublishError
from hf_mel.hub.publish.publication import (
    Content,
    Publication,
    content_bytes,
    existing_folder,
    read_card_metadata,
    reason_to_skip,
)


def space_publication(folder: str | os.PathLike[str], repo_id: str, *, metric: bool = False) -> Publication:
    """Returns the publication of a Space.

    Args:
        folder (`str` or `os.PathLike`): Folder of the Space, or the name of a Space that comes with hf_mel.
        repo_id (`str`): Repository id, `OWNER/NAME`.
        metric (`bool`): The Space is a metric for `evaluate.load`, which expects a module named like the repository.

    Raises:
        HubError: `repo_id` is not valid.
        PublishError: The folder lacks something that the Hub or `evaluate` needs.
    """
    folder = _space_folder(folder)
    metadata = read_card_metadata(folder / "README.md")
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or "__pycache__" in path.parts or path.suffix == ".pyc":
            continue
        if name == "__init__.py":
            left_out[name] = "only the Python package needs it"
        elif reason := reason_to_skip(path, name, None):
            left_out[name] = reason
        else:
            files[name] = path
    for key in ("title", "sdk", "app_file"):
        if not isinstance(metadata.get(key), str):
            raise PublishError(
                f"The card's metadata has no {key!r}.",
                file=folder / "README.md",
                remedy="Add it; the Hub requires it of a Space.",
            )
    if metadata["sdk"] != "static":
        for name in (metadata["app_file"], "requirements.txt"):
            if name not in files:
                raise PublishError(
                    f"The folder has no {name}.", file=folder, remedy="Add it; the Space needs it to start."
                )
    if metric:
        module = repo_id.rpartition("/")[2]
        _check_metric_module(folder, files, module, repo_id)
        # The metric's pages load it by its Hub id, which must be the id it is published under.
        for page in ("README.md", metadata["app_file"]):
            text = content_bytes(folder / page).decode("utf-8", errors="replace")
            files[page] = re.sub(rf"\bhf-mel/{re.escape(module)}\b", repo_id, text).encode()
    return Publication(
        "metric" if metric else "Space",
        repo_id,
        "space",
        files,
        left_out=left_out,
        license=metadata.get("license"),
        space_sdk=metadata["sdk"],
    )


def _space_folder(path: str | os.PathLike[str]) -> Path:
    folder, name = Path(path), os.fspath(path)
    if not folder.is_dir() and re.fullmatch(r"[A-Za-z]\w*", name):
        shipped = Path(str(resources.files("hf_mel.spaces"))) / name
        if (shipped / "README.md").is_file():
            return shipped
    return existing_folder(folder)


def _check_metric_module(folder: Path, files: dict[str, Content], module: str, repo_id: str) -> None:
    metrics = sorted(
        path.removesuffix(".py")
        for path, content in files.items()
        if path.endswith(".py") and b"evaluate.Metric" in content_bytes(content)
    )
    if module not in metrics:
        raise PublishError(
            f"evaluate.load({repo_id!r}) needs a metric in {module}.py, which does not exist.",
            file=folder,
            remedy=f"Publish to OWNER/{metrics[0]}."
            if metrics
            else "Write a module with a subclass of evaluate.Metric.",
        )

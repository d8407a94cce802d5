"""hf_mel.hub.publish.space_repo."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from hf_mel.errors import PublishError
from hf_mel.hub.publish.publication import Content, Publication, _card_metadata, _folder, _read, _unfit


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

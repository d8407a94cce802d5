"""hf_mel.hub.publish.publication."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_mel.errors import PublishError
from hf_mel.hub_errors import check_repo_id, holds_token

Content = Path | bytes


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")


#: Files of these kinds are not looked through for access tokens: they hold no text of the user's.
_BINARY = (".safetensors", ".parquet", ".png", ".jpg", ".jpeg", ".webp", ".gif")


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

"""The description of an upload: which files go to which repository, and what the user should know before it happens."""

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

#: A file to upload: its path, or its content.
Content = Path | bytes

#: Suffixes of formats that can hold a pickle. They are never uploaded.
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
#: Suffixes of binary formats. They are not searched for access tokens and paths because they hold no user-written text.
BINARY_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass
class Publication:
    """The files of one upload and the repository they go to.

    Args:
        kind (`str`): "model", "data set", "knowledge base", "metric" or "Space".
        repo_id (`str`): Repository id, `OWNER/NAME`.
        repo_type (`str`): "model", "dataset" or "space".
        files (`dict[str, Path | bytes]`): Path in the repository → local file, or content.
        managed_patterns (`tuple[str, ...]`): Patterns of repository files that only publications write. Files that match
            and are not part of this publication are deleted from the repository.
        left_out (`dict[str, str]`): Local files that are not uploaded → the reason.
        notes (`list[str]`): Remarks for the person who confirms the upload.
        license (`str`, *optional*): Licence id of the card.
        space_sdk (`str`, *optional*): SDK of a Space.

    Raises:
        HubError: The id is not valid on the Hub.
        PublishError: The id has no owner, or a file holds an access token.
    """

    kind: str
    repo_id: str
    repo_type: str
    files: dict[str, Content]
    managed_patterns: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    license: str | None = None
    space_sdk: str | None = None

    def __post_init__(self):
        check_repo_id(self.repo_id)
        if "/" not in self.repo_id:
            raise PublishError(f"The repository id {self.repo_id!r} has no owner.", remedy="Use OWNER/NAME.")
        for path, content in sorted(self.files.items()):
            if not path.endswith(BINARY_SUFFIXES) and holds_token(content_bytes(content)):
                raise PublishError(
                    "The file holds a Hub access token.",
                    file=path,
                    remedy="Remove the token, and revoke it if anyone else has seen the file.",
                )

    def size(self, path: str) -> int:
        """Returns the size of one file in bytes."""
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def url(self, endpoint: str) -> str:
        """Returns the address of the repository's page on the Hub at `endpoint`."""
        return f"{endpoint}/{'' if self.repo_type == 'model' else f'{self.repo_type}s/'}{self.repo_id}"


def content_bytes(content: Content) -> bytes:
    """Returns the bytes of a file to upload.

    Raises:
        PublishError: The file cannot be read.
    """
    if isinstance(content, bytes):
        return content
    try:
        return content.read_bytes()
    except OSError as error:
        raise PublishError(
            f"The file cannot be read ({error.strerror}).", file=content, remedy="Check its permissions."
        ) from error


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Returns `path` as a `Path`.

    Raises:
        PublishError: The path is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise PublishError("The folder does not exist.", file=folder, remedy="Check the path.")
    return folder


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Args:
        path (`Path`): The file.
        remedy (`str`): Remedy of the errors below.

    Raises:
        PublishError: The file is missing, unreadable, or not a JSON object.
    """
    if not path.is_file():
        raise PublishError(f"The folder has no {path.name}.", file=path.parent, remedy=remedy)
    try:
        content = json.loads(content_bytes(path))
    except (ValueError, RecursionError) as error:
        raise PublishError(f"The file is not JSON ({error}).", file=path, remedy=remedy) from error
    if not isinstance(content, dict):
        raise PublishError("The file is not a JSON object.", file=path, remedy=remedy)
    return content


def read_card_metadata(path: Path) -> dict[str, Any]:
    """Returns the YAML metadata at the top of a card; empty if the card has none.

    Raises:
        PublishError: The card is missing, or its metadata is not a YAML mapping.
    """
    if not path.is_file():
        raise PublishError("The folder has no README.md.", file=path.parent, remedy="Write one; it becomes the card.")
    match = re.match(
        r"---\r?\n(.*?)\r?\n---(?:\r?\n|$)", content_bytes(path).decode("utf-8", errors="replace"), re.DOTALL
    )
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, RecursionError) as error:
        raise PublishError(
            f"The card's metadata is not YAML ({error}).", file=path, remedy="Correct the block between the --- lines."
        ) from error
    if not isinstance(metadata, dict):
        raise PublishError(
            "The card's metadata is not a mapping.", file=path, remedy="Write one 'key: value' per line."
        )
    return metadata


def reason_to_skip(path: Path, name: str, suffixes: Iterable[str] | None) -> str | None:
    """Returns why a file must not be uploaded, or `None` if it may be.

    Args:
        path (`Path`): The file.
        name (`str`): Its path in the repository, with "/" between the parts.
        suffixes (iterable of `str`, *optional*): The suffixes that this kind of publication takes; `None` for all.
    """
    if path.is_symlink() or not path.is_file():
        return "a link or a special file"
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        return "may hold a pickle, which runs code when opened"
    if suffixes is not None and path.suffix not in suffixes:
        return "not part of the publication"
    return None

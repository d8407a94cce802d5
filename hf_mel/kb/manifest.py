"""The manifest `kb.json` of a knowledge base: atomic writing, and strict reading of files from untrusted sources."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from hf_mel.errors import KnowledgeBaseError
from hf_mel.files import write_errors

MANIFEST_NAME = "kb.json"
FORMAT = "hf_mel.knowledge_base"
VERSION = 1
#: Forms in which floating-point encodings can be stored: dtypes as `torch` names them, and those of
#: [`~hf_mel.inference.quantisation`].
Dtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]
DTYPES: tuple[str, ...] = get_args(Dtype)

#: Size limit of an untrusted `kb.json`.
_MAX_MANIFEST_BYTES = 32 << 20


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `kb.json` atomically: the file is flushed to disk and then renamed into place.

    Args:
        folder (`Path`): The folder of the knowledge base.
        manifest (mapping): The fields of `kb.json`.

    Raises:
        KnowledgeBaseError: The file cannot be written.
    """
    temporary = folder / f".{MANIFEST_NAME}.{os.getpid()}"
    # The list of removed rows may be long, so it gets one line instead of one line a row.
    text = json.dumps({k: v for k, v in manifest.items() if k != "removed"}, indent=2, ensure_ascii=False)
    text = f'{text[:-2]},\n  "removed": {json.dumps(manifest["removed"])}\n}}\n'
    try:
        with write_errors(folder / MANIFEST_NAME), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST_NAME)
    finally:
        # Also those of writers that were killed: whoever writes holds the lock.
        for left in folder.glob(f".{MANIFEST_NAME}.*"):
            left.unlink(missing_ok=True)


def read_manifest(folder: Path) -> tuple[str, dict[str, Any]]:
    """Reads and validates `kb.json`, and checks that its files exist and have the recorded sizes.

    Args:
        folder (`Path`): The folder of the knowledge base.

    Returns:
        `tuple[str, dict]`: The text of `kb.json` and its parsed content.

    Raises:
        KnowledgeBaseError: The folder holds no knowledge base, one of another version, or a damaged one.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise damage_error(path, f"it has {path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KnowledgeBaseError(
            f"The folder holds no knowledge base: it has no {MANIFEST_NAME}."
            if folder.is_dir()
            else "The path is not an existing folder.",
            file=folder,
            remedy="Check the path, or build one: hf-mel kb build MODEL --dataset … --output …",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise damage_error(path, str(error)) from error
    try:
        manifest = json.loads(text)
        found_format, found_version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damage_error(path, "hf_mel did not write this file") from error
    if found_format != FORMAT or found_version != VERSION:
        raise KnowledgeBaseError(
            f"The format is {found_format!r}, version {found_version!r}; "
            f"this hf_mel reads {FORMAT!r}, version {VERSION}.",
            file=path,
            remedy="Update hf_mel, or build the knowledge base again.",
        )
    try:
        problem = _find_problem(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"a field is missing or malformed ({type(error).__name__}: {error})"
    if problem:
        raise damage_error(path, problem)
    for shard in manifest["shards"]:
        for entry in (shard["encodings"], shard["entities"]):
            file = folder / entry["file"]
            if not file.is_file():
                raise damage_error(file, "the file is missing")
            if file.stat().st_size != entry["bytes"]:
                raise damage_error(file, f"it has {file.stat().st_size:,} bytes, {entry['bytes']:,} were written")
    return text, manifest


def _find_problem(manifest: dict[str, Any]) -> str | None:
    """Returns the first problem of a parsed manifest, or `None`."""
    model, processor = manifest["model"], manifest["processor"]
    if not isinstance(model["config"], dict) or not all(
        isinstance(value, str)
        for value in (
            *(model[k] for k in ("name", "type", "dtype", "weights")),
            processor["type"],
            processor["tensors"],
        )
    ):
        return "model or processor are malformed"
    if manifest["dtype"] not in DTYPES:
        return f"dtype is {manifest['dtype']!r}"
    for spec in manifest["encodings"].values():
        if not isinstance(spec["dtype"], str) or not all(type(size) is int and size >= 0 for size in spec["shape"]):
            return "encodings are malformed"
    # It imports torch, and the help of the command line imports this module.
    from hf_mel.inference.quantisation import is_sound

    if not is_sound(manifest["encodings"], manifest["dtype"]):
        return f"its encodings are not those of dtype {manifest['dtype']}"
    total = 0
    for shard in manifest["shards"]:
        if type(shard["rows"]) is not int or shard["rows"] < 1:
            return f"a shard has {shard['rows']!r} rows"
        total += shard["rows"]
        for part, pattern in (("encodings", r"encodings-\d+\.safetensors"), ("entities", r"entities-\d+\.parquet")):
            entry = shard[part]
            # The manifest may come from the Hub: a file name must not lead out of the folder.
            if not re.fullmatch(pattern, entry["file"], re.ASCII) or type(entry["bytes"]) is not int:
                return f"a shard names the file {entry['file']!r}"
            if not isinstance(entry["sha256"], str):
                return "a shard has no sha256"
        # Memory is allocated per row, so the number of rows is bounded by the size of a file that exists.
        if shard["rows"] > shard["encodings"]["bytes"]:
            return f"a shard has {shard['rows']:,} rows in {shard['encodings']['bytes']:,} bytes"
    removed = manifest["removed"]
    if not all(type(row) is int and 0 <= row < total for row in removed) or len(set(removed)) != len(removed):
        return "removed rows are malformed"
    if total - len(removed) < 1:
        return "it has no entities"
    return None


def damage_error(file: Path, problem: str) -> KnowledgeBaseError:
    """Returns the error for a knowledge base whose files are damaged."""
    return KnowledgeBaseError(
        f"The knowledge base is damaged: {problem}.",
        file=file,
        remedy="Build it again, or copy it again from its source.",
    )

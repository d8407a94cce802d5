"""hf_mel.kb.manifest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_mel.errors import KnowledgeBaseError
from hf_mel.files import writing

#: Types a knowledge base can store floating-point encodings in.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


_MANIFEST = "kb.json"


_FORMAT = "hf_mel.knowledge_base"


_VERSION = 1


#: What nobody's knowledge base comes near: a `kb.json`, values in a column of a row group, and what one read decodes to.
_MANIFEST_BYTES = 32 << 20


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    temporary = folder / f".{_MANIFEST}.{os.getpid()}"
    try:
        with writing(folder / _MANIFEST), temporary.open("w", encoding="utf-8") as file:
            file.write(_dump(manifest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / _MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def _dump(manifest: Mapping[str, Any]) -> str:
    """JSON for people, with the (perhaps long) list of removed rows on one line."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "removed"}, indent=2, ensure_ascii=False)
    return f'{text[:-2]},\n  "removed": {json.dumps(manifest["removed"])}\n}}\n'


def _read_manifest(folder: Path) -> tuple[str, dict[str, Any]]:
    """The text of kb.json and its checked content; the files it names exist and have their sizes."""
    path = folder / _MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            raise _damaged(path, f"it has {path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KnowledgeBaseError(
            f"there is no knowledge base here (no {_MANIFEST}).",
            file=folder,
            remedy="Check the path, or build one: hf-mel kb build MODEL --dataset … --output …",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    try:
        manifest = json.loads(text)
        kind, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "it is not what hf_mel writes") from error
    if kind != _FORMAT or version != _VERSION:
        raise KnowledgeBaseError(
            f"its format is {kind!r}, version {version!r}; this hf_mel reads {_FORMAT!r}, version {_VERSION}.",
            file=path,
            remedy="Update hf_mel, or build the knowledge base again.",
        )
    try:
        problem = _manifest_problem(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"a field is missing or malformed ({type(error).__name__}: {error})"
    if problem:
        raise _damaged(path, problem)
    for shard in manifest["shards"]:
        for entry in (shard["encodings"], shard["entities"]):
            file = folder / entry["file"]
            if not file.is_file():
                raise _damaged(file, "the file is missing")
            if file.stat().st_size != entry["bytes"]:
                raise _damaged(file, f"it has {file.stat().st_size:,} bytes, {entry['bytes']:,} were written")
    return text, manifest


def _manifest_problem(manifest: dict[str, Any]) -> str | None:
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
    total = 0
    for shard in manifest["shards"]:
        if type(shard["rows"]) is not int or shard["rows"] < 1:
            return f"a shard has {shard['rows']!r} rows"
        total += shard["rows"]
        for part, pattern in (("encodings", r"encodings-\d+\.safetensors"), ("entities", r"entities-\d+\.parquet")):
            entry = shard[part]
            # A name from the Hub must not lead out of the folder.
            if not re.fullmatch(pattern, entry["file"], re.ASCII) or type(entry["bytes"]) is not int:
                return f"a shard names the file {entry['file']!r}"
            if not isinstance(entry["sha256"], str):
                return "a shard has no sha256"
        if shard["rows"] > shard["encodings"]["bytes"]:  # what is in memory per row is bounded by a file that exists
            return f"a shard has {shard['rows']:,} rows in {shard['encodings']['bytes']:,} bytes"
    removed = manifest["removed"]
    if not all(type(row) is int and 0 <= row < total for row in removed) or len(set(removed)) != len(removed):
        return "removed rows are malformed"
    if total - len(removed) < 1:
        return "it has no entities"
    return None


def _damaged(file: Path, what: str) -> KnowledgeBaseError:
    return KnowledgeBaseError(
        f"the knowledge base is damaged: {what}.",
        file=file,
        remedy="Build it again, or copy it again from where it was.",
    )

"""Loading of data sets, files of entities, images and posts. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_mel.data.entity_files import check_entity_file, read_entity_file
    from hf_mel.data.images import open_image
    from hf_mel.data.loading import load_entities, load_mentions, load_posts

_EXPORTS = {
    "check_entity_file": "hf_mel.data.entity_files",
    "load_entities": "hf_mel.data.loading",
    "load_mentions": "hf_mel.data.loading",
    "load_posts": "hf_mel.data.loading",
    "open_image": "hf_mel.data.images",
    "read_entity_file": "hf_mel.data.entity_files",
}

__all__ = ["check_entity_file", "load_entities", "load_mentions", "load_posts", "open_image", "read_entity_file"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

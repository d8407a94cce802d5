"""Loading of data sets, files of entities, images and posts. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

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

__getattr__ = lazy_exports(__name__, _EXPORTS)

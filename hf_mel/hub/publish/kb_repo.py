"""hf_mel.hub.publish.kb_repo."""

from __future__ import annotations

import os
from pathlib import Path

from hf_mel.hub.model_cards import kb_card
from hf_mel.hub.publish.publication import Content, Publication
from hf_mel.kb.knowledge_base import KnowledgeBase


def kb_publication(kb: str | os.PathLike[str], repo_id: str, *, work: str | os.PathLike[str]) -> Publication:
    """A knowledge base as a data-set repository, which [`~hf_mel.KnowledgeBase.from_pretrained`] reads.

    Args:
        kb (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Where to, `OWNER/NAME`.
        work (`str` or `os.PathLike`): A folder for a compact copy, needed where entities were removed: their rows are
            marked in the original, not gone, and would go up with it. It has to be there until the files are uploaded.

    Raises:
        KnowledgeBaseError: No knowledge base there, or a damaged one.
    """

    opened = KnowledgeBase.load(kb, verify=True)
    notes = ["It holds the names, texts and first images of its entities: publish what you may pass on."]
    if removed := opened.info()["removed"]:
        opened = opened.save(Path(work) / "kb")
        notes.append(f"{removed:,} removed entities are left out: a compact copy goes up.")
    files: dict[str, Content] = {name: opened.path / name for name in opened.files()}
    files["README.md"] = kb_card(opened.info(), repo_id).encode()
    return Publication(
        "knowledge base",
        repo_id,
        "dataset",
        files,
        owned=("encodings-*.safetensors", "entities-*.parquet"),
        notes=notes,
    )

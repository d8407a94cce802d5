"""Publications of knowledge bases."""

from __future__ import annotations

import os
from pathlib import Path

from hf_mel.hub.model_cards import kb_card
from hf_mel.hub.publish.publication import Content, Publication
from hf_mel.kb.knowledge_base import KnowledgeBase


def kb_publication(kb: str | os.PathLike[str], repo_id: str, *, work: str | os.PathLike[str]) -> Publication:
    """Returns the publication of a knowledge base, for [`~hf_mel.KnowledgeBase.from_pretrained`].

    Args:
        kb (`str` or `os.PathLike`): Folder of the knowledge base.
        repo_id (`str`): Repository id, `OWNER/NAME`.
        work (`str` or `os.PathLike`): A folder for a compact copy. The copy is written if entities were removed: the
            original only marks their rows, which must not be uploaded. Keep the folder until the upload has finished.

    Raises:
        HubError: `repo_id` is not valid.
        KnowledgeBaseError: The folder holds no knowledge base, or a damaged one.
    """
    opened = KnowledgeBase(kb)
    opened.verify()
    notes = [
        "The knowledge base holds the names, texts and first images of its entities. Publish only what you may "
        "redistribute."
    ]
    if removed := opened.info()["removed"]:
        opened = opened.save(Path(work) / "kb")
        notes.append(f"{removed:,} removed entities are left out; a compact copy is uploaded.")
    files: dict[str, Content] = {name: opened.path / name for name in opened.files()}
    files["README.md"] = kb_card(opened.info(), repo_id).encode()
    return Publication(
        "knowledge base",
        repo_id,
        "dataset",
        files,
        managed_patterns=("encodings-*.safetensors", "entities-*.parquet"),
        notes=notes,
    )

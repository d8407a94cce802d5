"""hf_mel: multimodal entity linking on the Hugging Face Hub.

`import hf_mel` makes the shipped methods known to `AutoConfig`, `AutoModel` and `AutoProcessor`, so that
`AutoModel.from_pretrained("org/mimic-wikimel")` needs no remote code, and the task "multimodal-entity-linking" to
`transformers.pipeline`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.auto import register_methods

__version__ = "0.1.0"

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.data.entity_files import check_entity_file as check_entity_file
    from hf_mel.data.images import open_image as open_image
    from hf_mel.errors import ImageError as ImageError
    from hf_mel.errors import KnowledgeBaseError as KnowledgeBaseError
    from hf_mel.errors import MelError as MelError
    from hf_mel.inference.checkpoints import load_reranker as load_reranker
    from hf_mel.inference.checkpoints import load_retriever as load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase as KnowledgeBase
    from hf_mel.linking.linker import EntityLinker as EntityLinker
    from hf_mel.row_columns import ColumnMapping as ColumnMapping
    from hf_mel.row_files import read_rows as read_rows
    from hf_mel.training.arguments import MelTrainingArguments as MelTrainingArguments
    from hf_mel.training.trainer import MelTrainer as MelTrainer

#: Public name → its module. Modules that need torch or transformers are imported on first use of the name.
_EXPORTS = {
    "ColumnMapping": "hf_mel.row_columns",
    "EntityLinker": "hf_mel.linking.linker",
    "KnowledgeBase": "hf_mel.kb.knowledge_base",
    "KnowledgeBaseError": "hf_mel.errors",
    "ImageError": "hf_mel.errors",
    "MelError": "hf_mel.errors",
    "MelTrainer": "hf_mel.training.trainer",
    "MelTrainingArguments": "hf_mel.training.arguments",
    "check_entity_file": "hf_mel.data.entity_files",
    "load_reranker": "hf_mel.inference.checkpoints",
    "load_retriever": "hf_mel.inference.checkpoints",
    "open_image": "hf_mel.data.images",
    "read_rows": "hf_mel.row_files",
}

__all__ = ["__version__", *_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)


register_methods()

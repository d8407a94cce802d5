"""hf_mel: multimodal entity linking on the Hugging Face Hub.

Importing the package registers its methods with `AutoConfig`, `AutoModel` and `AutoProcessor`, so that
`AutoModel.from_pretrained("org/mimic-wikimel")` needs no remote code, and the task "multimodal-entity-linking" with
`transformers.pipeline`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_mel.data.images import open_image
    from hf_mel.data.loading import check_entity_file
    from hf_mel.errors import KnowledgeBaseError, MelError
    from hf_mel.inference.checkpoints import load_reranker, load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase
    from hf_mel.linking.linker import EntityLinker
    from hf_mel.training.arguments import MelTrainingArguments
    from hf_mel.training.trainer import MelTrainer

# Heavy modules (torch, transformers) load on first use of a name, not on import of the package.
_EXPORTS = {
    "KnowledgeBase": "hf_mel.kb.knowledge_base",
    "EntityLinker": "hf_mel.linking.linker",
    "KnowledgeBaseError": "hf_mel.errors",
    "MelError": "hf_mel.errors",
    "load_reranker": "hf_mel.inference.checkpoints",
    "load_retriever": "hf_mel.inference.checkpoints",
    "check_entity_file": "hf_mel.data.loading",
    "open_image": "hf_mel.data.images",
    "MelTrainer": "hf_mel.training.trainer",
    "MelTrainingArguments": "hf_mel.training.arguments",
}

__all__ = [
    "EntityLinker",
    "KnowledgeBase",
    "KnowledgeBaseError",
    "MelError",
    "MelTrainer",
    "MelTrainingArguments",
    "__version__",
    "check_entity_file",
    "load_reranker",
    "load_retriever",
    "open_image",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hf_mel' has no attribute {name!r}")


# The console script answers `--help` without paying seconds for torch; its verbs register when they need a model.
# Builders run without transformers, too: a script of an older `datasets` needs only the schema.
if Path(sys.argv[0]).name not in ("hf-mel", "hf-mel.exe") and find_spec("transformers") is not None:
    import hf_mel.auto
    import hf_mel.linking.pipeline  # noqa: F401

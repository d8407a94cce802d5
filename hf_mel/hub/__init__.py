"""Cards, model repositories, converted checkpoints and, in [`hf_mel.hub.publish`], publications on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.hub.convert import convert_checkpoint as convert_checkpoint
    from hf_mel.hub.model_cards import eval_results as eval_results
    from hf_mel.hub.model_cards import kb_card as kb_card
    from hf_mel.hub.model_cards import model_card as model_card
    from hf_mel.hub.saving import save_model_repository as save_model_repository

_EXPORTS = {
    "convert_checkpoint": "hf_mel.hub.convert",
    "eval_results": "hf_mel.hub.model_cards",
    "kb_card": "hf_mel.hub.model_cards",
    "model_card": "hf_mel.hub.model_cards",
    "save_model_repository": "hf_mel.hub.saving",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)

"""An untrained MIMIC with all three units and a knowledge base of flags, in place of slow published ones."""

from __future__ import annotations

from pathlib import Path

from hf_mel.building.build import build_dataset
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.hub.saving import save_model_repository
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.training.assemble import build_model
from hf_mel.training.recipe import Recipe
from hf_mel.training.tokenizer import texts_of


def small_model(folder: Path) -> Path:
    """Writes the model to `folder`, its data set to `folder`/data and its knowledge base to `folder`/kb."""
    import torch

    data = folder.with_name(f"{folder.name}-data")
    build_dataset("flags_mel", output=data)
    entities = load_entities(data)
    torch.manual_seed(0)
    recipe = Recipe.load("mimic_flags", [f"data.dataset={data}"])
    model, processor = build_model(recipe, texts_of(load_mentions(data, "validation"), entities))
    model.eval()
    save_model_repository(model, processor, folder)
    KnowledgeBase.build(entities, model, processor, output=folder / "kb", progress=False)
    return folder

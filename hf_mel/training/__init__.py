"""Training: recipes, trainers, and the batches that they train on.

Names load on first use, so that the command line can read this package without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.training.arguments import MelTrainingArguments as MelTrainingArguments
    from hf_mel.training.assemble import build_model as build_model
    from hf_mel.training.collators import PairCollator as PairCollator
    from hf_mel.training.collators import RetrieverCollator as RetrieverCollator
    from hf_mel.training.pretraining import PretrainingTrainer as PretrainingTrainer
    from hf_mel.training.recipe import Recipe as Recipe
    from hf_mel.training.recipe import shipped_recipes as shipped_recipes
    from hf_mel.training.run import run_recipe as run_recipe
    from hf_mel.training.sampling import GroupingSampler as GroupingSampler
    from hf_mel.training.tokenizer import texts_of as texts_of
    from hf_mel.training.tokenizer import train_wordpiece as train_wordpiece
    from hf_mel.training.trainer import MelTrainer as MelTrainer

_EXPORTS = {
    "GroupingSampler": "hf_mel.training.sampling",
    "MelTrainer": "hf_mel.training.trainer",
    "MelTrainingArguments": "hf_mel.training.arguments",
    "PairCollator": "hf_mel.training.collators",
    "PretrainingTrainer": "hf_mel.training.pretraining",
    "Recipe": "hf_mel.training.recipe",
    "RetrieverCollator": "hf_mel.training.collators",
    "build_model": "hf_mel.training.assemble",
    "run_recipe": "hf_mel.training.run",
    "shipped_recipes": "hf_mel.training.recipe",
    "texts_of": "hf_mel.training.tokenizer",
    "train_wordpiece": "hf_mel.training.tokenizer",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)

"""Fields of the Trainer that a recipe passes on: gradient checkpointing and bf16."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from hf_mel.errors import RecipeError
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model
from tests.training.toy_run import recipe_dict, write_dataset


def trained(folder, name, **training):
    """Returns the weights of a tiny MIMIC after two epochs, and how often a layer of its text encoder was computed."""
    from transformers.models.bert.modeling_bert import BertIntermediate

    if not (folder / "data").exists():
        write_dataset(folder / "data")
    calls, forward = [], BertIntermediate.forward

    def counting(self, *args, **kwargs):
        calls.append(self.training)
        return forward(self, *args, **kwargs)

    options = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "final_evaluation": False,
    }
    recipe = Recipe.from_dict(recipe_dict(folder / "data", **options, **training))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BertIntermediate, "forward", counting)
        run_recipe(recipe, folder / name)
    return load_file(folder / name / "model.safetensors"), sum(calls)


def test_gradient_checkpointing_computes_activations_again_and_changes_no_weight(tmp_path):
    plain, once = trained(tmp_path, "plain", check_memory=False)
    again, twice = trained(tmp_path, "again", check_memory=False, gradient_checkpointing=True)
    assert twice == 2 * once > 0
    assert plain.keys() == again.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_a_model_that_cannot_compute_activations_again_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="No part of ToyRetriever can compute its activations again"):
        MelTrainer(
            toy_model(),
            MelTrainingArguments(str(tmp_path), gradient_checkpointing=True, use_cpu=True, bf16=False),
            toy_mentions(4),
            toy_mentions(4),
            entities=toy_entities(12),
            processing_class=ToyProcessor(),
        )


def test_bf16_trains_float32_weights_that_are_nearly_those_of_float32(tmp_path):
    plain, _ = trained(tmp_path, "plain", max_steps=2)
    half, _ = trained(tmp_path, "half", max_steps=2, bf16=True)
    assert {weight.dtype for weight in half.values()} == {torch.float32}
    assert any(not torch.equal(half[name], weight) for name, weight in plain.items())
    for name, weight in plain.items():
        torch.testing.assert_close(half[name], weight, rtol=0, atol=5e-3, msg=name)

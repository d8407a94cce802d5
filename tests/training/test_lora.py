"""LoRA: which parameters train, and what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from hf_mel.errors import MissingExtraError, RecipeError
from hf_mel.training.assemble import build_model
from hf_mel.training.lora import has_lora, merge_lora, merged_state_dict
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from tests.toy import toy_entities, toy_mentions
from tests.training.toy_run import recipe_dict, write_dataset

TEXTS = [*toy_entities(12)["name"], *toy_mentions(40)["text"]]
LORA = {"r": 2, "alpha": 6, "targets": ["query", "value"]}


def recipe(folder, lora, **training) -> Recipe:
    content = recipe_dict(folder / "data", **training)
    content["model"]["lora"] = lora
    return Recipe.from_dict(content)


def built(folder, lora):
    torch.manual_seed(0)
    return build_model(recipe(folder, lora), TEXTS)


def scores(model, processor) -> torch.Tensor:
    mentions, entities = (list(rows) for rows in (toy_mentions(5), toy_entities(5)))
    model.eval()
    with torch.no_grad():
        return model.score(
            model.encode_mentions(**processor(mentions=mentions)),
            model.encode_entities(**processor(entities=entities)),
        )


def changed(model) -> None:
    """Gives every matrix of LoRA, and everything else that trains, other numbers."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


def test_only_small_matrices_of_the_encoders_train_and_everything_outside(tmp_path):
    plain, _ = built(tmp_path, {})
    model, _ = built(tmp_path, LORA)
    assert not has_lora(plain)
    encoders = tuple(f"{name}." for name in plain.backbone_names)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    inside = {name: shape for name, shape in trained.items() if name.startswith(encoders)}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in inside} == {"query", "value"}
    assert all(".lora_A." in name or ".lora_B." in name for name in inside)
    assert all(2 in shape for shape in inside.values())
    outside = {name for name, p in plain.named_parameters() if p.requires_grad and not name.startswith(encoders)}
    assert trained.keys() - inside.keys() == outside
    assert sum(map(torch.Size.numel, trained.values())) < sum(p.numel() for p in plain.parameters() if p.requires_grad)


def test_training_starts_at_the_model_without_lora(tmp_path):
    torch.testing.assert_close(scores(*built(tmp_path, LORA)), scores(*built(tmp_path, {})), rtol=0, atol=0)


@pytest.mark.parametrize("lora", [LORA, {"r": 3}])
def test_the_merged_model_has_the_scores_of_the_unmerged_and_the_weights_of_the_formula(tmp_path, lora):
    model, processor = built(tmp_path, lora)
    changed(model)
    before, expected = merged_state_dict(model), scores(model, processor)
    name, layer = next((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
    pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(
        before[f"{name}.weight"], layer.base_layer.weight + lora.get("alpha", 2 * lora["r"]) / lora["r"] * pair
    )
    merge_lora(model)
    assert not has_lora(model)
    torch.testing.assert_close(scores(model, processor), expected, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == built(tmp_path, {})[0].state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_writes_a_plain_model_and_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 1}
    made = recipe(tmp_path, LORA, **steps)
    run_recipe(made, tmp_path / "whole")
    saved = load_file(tmp_path / "whole/model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in saved)
    model, report = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert json.loads((tmp_path / "whole/results.json").read_text())["model"]["parameters"] == sum(
        parameter.numel() for parameter in model.parameters()
    )

    from hf_mel.training import base_trainer

    plain = base_trainer.BaseTrainer.__init__

    def stopping(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.add_callback(_Stop())

    monkeypatch.setattr(base_trainer.BaseTrainer, "__init__", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(made, tmp_path / "stopped")
    monkeypatch.undo()
    checkpoint = tmp_path / "stopped/checkpoints/checkpoint-2"
    assert AutoModel.from_pretrained(checkpoint, output_loading_info=True)[1]["missing_keys"] == set()
    run_recipe(made, tmp_path / "stopped", resume=True)
    resumed = load_file(tmp_path / "stopped/model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 4}, r"unknown key 'model\.lora\.rank'"),
        ({"r": 0}, r"model\.lora\.r is not a whole number"),
        ({"r": True}, r"model\.lora\.r is not a whole number"),
        ({"dropout": 1}, r"model\.lora\.dropout is not a number from 0"),
        ({"targets": "query"}, r"model\.lora\.targets is not a list"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(tmp_path, lora, words):
    with pytest.raises(RecipeError, match=words):
        recipe(tmp_path, lora)


def test_targets_that_no_encoder_has_are_refused_with_those_it_has(tmp_path):
    with pytest.raises(RecipeError, match=r"No linear layer .* among these: .*query"):
        built(tmp_path, {"targets": ["nowhere"]})


def test_without_peft_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'pip install "hf_mel\[peft\]"'):
        built(tmp_path, LORA)

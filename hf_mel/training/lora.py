"""LoRA: a pretrained encoder is trained through small matrices beside its linear layers (Hu et al., 2022).

The weight W of a layer becomes W + (alpha / r) B A, with B [out, r] and A [in, r] transposed (equation 3 of the paper). Only A and B are trained;
B starts as zero, so that the first step begins at the pretrained model. All parts of a model outside its encoders are trained as without
LoRA. A model that is saved has the sums as its weights: it is a plain model, whose files do not say how it was trained.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_mel.errors import MissingExtraError, TrainingError

if TYPE_CHECKING:
    from hf_mel.training.recipe import Recipe

logger = logging.getLogger(__name__)

#: The parameters that train, beside the whole weights of a checkpoint: a sum does not say what its parts were.
TRAINED_PARAMETERS = "trained_parameters.safetensors"
_ADAPTER = "default"


def add_lora(model: Any, recipe: Recipe) -> None:
    """Puts LoRA beside the linear layers of a model's encoders, and freezes everything else in them.

    Args:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]): The model. It is changed.
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe, whose `model.lora` has the settings.

    Raises:
        MissingExtraError: The package peft is not installed.
        RecipeError: The model does not name its encoders, or none of their layers can be trained in this way.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError(
            "model.lora needs the package peft, which is not installed.",
            file=recipe.source,
            remedy='Run pip install "hf_mel[peft]".',
        ) from error
    settings = recipe.model.lora
    prefixes = tuple(f"{name}." for name in getattr(model, "backbone_names", None) or ())
    if not prefixes:
        raise recipe.error(
            f"{type(model).__name__} does not name its encoders (backbone_names), which LoRA is for.",
            "Remove model.lora.",
        )
    endings = settings.get("targets")
    layers = {
        name: module
        for name, module in model.named_modules()
        # A frozen encoder stays so: its outputs are cached.
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and module.weight.requires_grad
    }
    targets = [name for name in layers if endings is None or any(f".{name}".endswith(f".{end}") for end in endings)]
    if not targets:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none"
        raise recipe.error(
            f"No linear layer of the encoders of {type(model).__name__} is trained by model.lora.",
            f"Unfreeze an encoder, or choose model.lora.targets among these: {names}.",
        )
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith(prefixes)]
    trained = [parameter for parameter in others if parameter.requires_grad]
    rank = settings.get("r", 8)
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=settings.get("alpha", 2 * rank),
            lora_dropout=settings.get("dropout", 0.0),
            target_modules=targets,
        ),
        model,
        _ADAPTER,
    )
    for parameter in trained:
        parameter.requires_grad_(True)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
    logger.info(
        "LoRA beside %d layers: training changes %s of %s parameters.", len(targets), *(f"{n:,}" for n in counts)
    )


def has_lora(model: nn.Module) -> bool:
    """Whether a model has layers with LoRA beside them."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of the plain model that computes what a model with LoRA does, under the names of the plain model."""
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if f".{_ADAPTER}." not in name
    }
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weights[f"{name}.weight"] = _merged_weight(module)
    return weights


def merge_lora(model: nn.Module) -> None:
    """Makes a model with LoRA the plain model that computes the same. Without LoRA, it stays as it is."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            layer = module.base_layer
            with torch.no_grad():
                layer.weight.copy_(_merged_weight(module))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def _merged_weight(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module.base_layer.weight + module.get_delta_weight(_ADAPTER)


def save_trained_parameters(model: nn.Module, folder: str | Path) -> None:
    """Writes the parameters that train, and the buffers, to a checkpoint, from which training goes on exactly."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in frozen}
    save_file(tensors, Path(folder, TRAINED_PARAMETERS))


def load_trained_parameters(model: nn.Module, folder: str | Path) -> None:
    """Loads what [`save_trained_parameters`] has written.

    Raises:
        TrainingError: The checkpoint has no such file, or lacks a parameter.
    """
    try:
        missing = model.load_state_dict(load_file(Path(folder, TRAINED_PARAMETERS)), strict=False).missing_keys
    except FileNotFoundError:
        missing = [TRAINED_PARAMETERS]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lacking = sorted((trained | {TRAINED_PARAMETERS}) & set(missing))
    if lacking:
        raise TrainingError(
            f"The checkpoint lacks {lacking[0]}, which training with LoRA goes on from.",
            file=folder,
            remedy="Remove the folder of the run, and train again.",
        )

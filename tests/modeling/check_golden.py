"""Compares the outputs of converted weights with those of the published network: `make golden GOLDEN=FOLDER`.

The folder holds `config.json`, `state_dict.safetensors` and `io.safetensors` (inputs `mention_*`, `entity_*`; outputs
`score`, `text_score`, `vision_score`, `cross_modal_score`, `loss_first_entities_as_positives`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, CLIPConfig, CLIPModel

from hf_mel.hub.convert import convert_checkpoint
from tests.modeling import published_mimic

TOLERANCE = 1e-5


def differences(golden: Path) -> dict[str, float]:
    """Returns the largest difference of each output, for the converted model and the reference implementation."""
    io = load_file(golden / "io.safetensors")
    batch = {k: v for k, v in io.items() if k.startswith(("mention_", "entity_"))}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        convert_checkpoint("mimic", golden / "state_dict.safetensors", golden / "config.json", output)
        model = AutoModel.from_pretrained(output).eval()
    with torch.no_grad():
        out = model(**batch)
        count = len(out.scores)
        first = {k: v[:count] if k.startswith("entity_") else v for k, v in batch.items()}
        loss = model(**first, labels=torch.arange(count)).loss
    result = {"score": out.scores, "loss_first_entities_as_positives": loss.reshape(1)}
    result |= {f"{unit}_score": scores for unit, scores in out.unit_scores.items()}

    weights = load_file(golden / "state_dict.safetensors")
    clip = CLIPModel(CLIPConfig.from_dict(json.loads((golden / "config.json").read_text())["clip_config"]))
    clip.load_state_dict(
        {k.removeprefix("encoder.clip."): v for k, v in weights.items() if k.startswith("encoder.clip.")}
    )
    direct = published_mimic.outputs(weights, batch, clip)
    table = {f"model: {name}": (value - io[name]).abs().max().item() for name, value in result.items()}
    return table | {f"direct: {name}": (value - io[name]).abs().max().item() for name, value in direct.items()}


if __name__ == "__main__":
    table = differences(Path(sys.argv[1]))
    for name, value in table.items():
        print(f"{name:45s} {value:.2e}  {'ok' if value <= TOLERANCE else 'DIFFERS'}")
    sys.exit(any(value > TOLERANCE for value in table.values()))

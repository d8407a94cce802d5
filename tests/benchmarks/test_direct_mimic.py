"""Tests that the direct form of the benchmarks computes MIMIC's scores."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, ViTConfig

from benchmarks.direct_mimic import DirectMimic, rank_directly
from hf_mel.modeling.mimic import MimicConfig, MimicModel
from tests.modeling import direct_mimic as looped

LENGTH = 7


def model(**options) -> MimicModel:
    torch.manual_seed(0)
    text = BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).to_dict()
    vision = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    ).to_dict()
    sizes = {"text_dim": 6, "vision_dim": 10, "fusion_dim": 4}
    made = MimicModel(MimicConfig(text_config=text, vision_config=vision, text_pooling="mean", **sizes, **options))
    with torch.no_grad():
        for parameter in made.parameters():  # LayerNorms start as the identity, which would hide a missing one
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.eval()


def inputs(rows: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH + 1, (rows,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(1, 30, (rows, LENGTH), generator=generator) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
    }


def encoded(made: MimicModel, mentions: dict, entities: dict):
    with torch.no_grad():
        return (
            made.encode_mentions(**{f"mention_{name}": tensor for name, tensor in mentions.items()}),
            made.encode_entities(**{f"entity_{name}": tensor for name, tensor in entities.items()}),
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection_dim": 9},
        {"mask_padding": True, "query_norm": False, "gate": "vector"},
        {"units": ["text"], "mask_padding": True, "global_norm": "l2", "local_scale": 0.25, "temperature": 0.05},
        {"units": ["text"], "text_local": False},
    ],
    ids=["published", "joint space", "masked", "cosines", "global alone"],
)
def test_direct_scores_equal_those_of_the_model(options):
    made = model(**options)
    mentions, entities = inputs(4, 1), inputs(6, 2)
    direct = DirectMimic(made)
    units = direct.unit_scores(direct.features(**mentions), direct.features(**entities))
    with torch.no_grad():
        expected = made.unit_scores(*encoded(made, mentions, entities))
    assert set(units) == set(expected)
    for unit in units:
        torch.testing.assert_close(units[unit], expected[unit], rtol=1e-4, atol=2e-5)


def test_direct_scores_equal_those_of_loops_over_tokens():
    """Compares with the oracle of the model tests, in case the model and the direct form share a mistake."""
    made = model()
    direct = DirectMimic(made)
    sides = [direct.features(**inputs(3, 1)), direct.features(**inputs(4, 2))]
    plain = []
    for side in sides:
        norm = direct._normed(side)
        plain.append(
            [
                {
                    "text": {
                        "global": norm["text_global"][i],
                        "local": norm["text_tokens"][i],
                        "mask": torch.ones(LENGTH),
                    },
                    "image": {"global": norm["image_global"][i], "local": norm["image_patches"][i]},
                }
                for i in range(len(side["text_global"]))
            ]
        )
    expected = looped.all_scores(direct.weights, *plain, ("text", "vision", "cross_modal"))
    torch.testing.assert_close(direct.score(*sides), expected["score"], rtol=1e-4, atol=2e-5)


def test_blocks_do_not_change_scores():
    direct = DirectMimic(model())
    mentions, entities = direct.features(**inputs(5, 1)), direct.features(**inputs(11, 2))
    whole = direct.score(mentions, entities)
    torch.testing.assert_close(rank_directly(direct, mentions, entities, (2, 4)), whole)


def test_the_cache_has_the_papers_size():
    """Two global vectors, 40 tokens of width 512 and 50 patches of width 96 are 103,552 bytes per entity."""
    made = model(projection_dim=9)
    cached = DirectMimic(made).features(**inputs(2, 1))
    assert {name: tuple(tensor.shape[1:]) for name, tensor in cached.items()} == {
        "text_global": (9,),
        "text_tokens": (LENGTH, 12),
        "image_global": (10,),
        "image_patches": (5, 10),
    }
    assert 4 * (512 + 40 * 512 + 96 + 50 * 96) == 103_552

"""A data set folder and a recipe that trains in about a second."""

from __future__ import annotations

from pathlib import Path

import datasets

from tests.toy import toy_entities, toy_mentions
from tests.toy_posts import toy_posts

_README = """---
configs:
- config_name: mentions
  default: true
  data_files:
  - {split: train, path: mentions/train.parquet}
  - {split: validation, path: mentions/validation.parquet}
- config_name: entities
  data_files:
  - {split: kb, path: entities/kb.parquet}
---
"""


def write_dataset(folder: Path, mentions: int = 24, entities: int = 12, nil_every: int = 0) -> Path:
    """Writes a data set with training and validation mentions and a knowledge base to a folder."""
    (folder / "mentions").mkdir(parents=True)
    (folder / "entities").mkdir()
    train = toy_mentions(mentions, entities, nil_every)
    validation = toy_mentions(mentions // 2, entities, nil_every).map(
        lambda row: {"mention_id": f"v{row['mention_id']}"}
    )
    train.to_parquet(folder / "mentions/train.parquet")
    validation.to_parquet(folder / "mentions/validation.parquet")
    toy_entities(entities).to_parquet(folder / "entities/kb.parquet")
    (folder / "README.md").write_text(_README)
    return folder


def add_posts(folder: Path) -> datasets.Dataset:
    """Adds the toy posts to a data set that [`write_dataset`] wrote, and returns them."""
    card = (folder / "README.md").read_text()
    config = "- config_name: posts\n  data_files:\n  - {split: kb, path: posts/kb.parquet}\n---"
    (folder / "README.md").write_text(config.join(card.rsplit("---", 1)))
    (folder / "posts").mkdir()
    posts = toy_posts()
    posts.to_parquet(folder / "posts/kb.parquet")
    return posts


def recipe_dict(dataset: Path, **training) -> dict:
    """Returns a recipe with both modalities, from scratch. With dropout, a resumed run needs the same random numbers."""
    text = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 40,
    }
    vision = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 16,
        "patch_size": 8,
    }
    dims = {"text_dim": 8, "vision_dim": 8, "fusion_dim": 8}
    return {
        "name": "tiny",
        "description": "A tiny model.",
        "model": {
            "type": "mimic",
            "config": {"text_config": text, "vision_config": vision, "text_pooling": "mean", **dims},
        },
        "processor": {
            "tokenizer": {"vocab_size": 200},
            "vision": {"size": {"height": 16, "width": 16}},
            "options": {"max_length": 16},
        },
        "data": {"dataset": str(dataset)},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            **training,
        },
    }

"""Benchmark of building a knowledge base: entities per second, compared with the encoders alone.

The floor is the time of the two encoders' forward passes over prepared tensors. The library also reads rows, opens
images, tokenises, computes the encodings for scoring, checks them and writes them. Both process the same entities with
the same batch size. Speed does not depend on the weights, so they are random. The model is MIMIC, by default with the
encoders of CLIP ViT-B/32 (40 tokens, 224 × 224 pixels). Texts and PNG images are generated.

With one thread, the library prepares the next batch on a second core, which the floor does not use; the ratio of processor time
counts both.

    python -m benchmarks.building
    python -m benchmarks.building --threads 1 --entities 160 --repeats 2
    python -m benchmarks.building --entities 64 --encoders small
    python -m benchmarks.building --device cuda --dtype bfloat16 --entities 4096
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.modeling.mimic import MimicConfig, MimicModel, MimicProcessor
from hf_mel.schema import entity_features
from hf_mel.training.tokenizer import train_wordpiece

LENGTH = 40


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--entities", type=int, default=96, help="number of entities")
    parser.add_argument("--batch-size", type=int, default=32, help="entities to encode at a time")
    parser.add_argument(
        "--encoders",
        choices=["clip", "small"],
        default="clip",
        help="CLIP ViT-B/32, or small ones: text 6 layers of width 384, images 12 layers of width 192",
    )
    return parser


def encoder_configs(kind: str) -> dict[str, Any]:
    """Returns the fields of a configuration for the encoders: CLIP ViT-B/32, or small ones with as many tokens."""
    if kind == "clip":
        text = {"model_type": "clip_text_model", "max_position_embeddings": 77}
        vision = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32}
        return {"text_config": text, "vision_config": vision, "projection_dim": 512}
    text = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    vision = {"model_type": "vit", "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
    text |= {"intermediate_size": 1536, "vocab_size": 30522}
    vision |= {"intermediate_size": 768, "image_size": 224, "patch_size": 32}
    return {"text_config": text, "vision_config": vision, "text_pooling": "mean"}


def generated_entities(count: int, seed: int = 0) -> datasets.Dataset:
    """Generates entities with a name, 20 to 40 words of attributes and a 256 × 256 PNG image."""
    generator, noise = random.Random(seed), np.random.default_rng(seed)
    syllables = ["ka", "ro", "mi", "tel", "an", "sor", "ve", "lu", "den", "pi"]
    columns: dict[str, list] = {name: [] for name in entity_features()}
    for row in range(count):
        words = ["".join(generator.choices(syllables, k=3)) for _ in range(generator.randint(20, 40))]
        coarse = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((256, 256), Image.BICUBIC)
        coarse.save(png := io.BytesIO(), "PNG")
        columns["entity_id"].append(f"Q{row}")
        columns["name"].append(" ".join(words[:2]).title())
        columns["attributes"].append(" ".join(words))
        columns["description"].append("")
        columns["aliases"].append([])
        columns["images"].append([{"bytes": png.getvalue(), "path": None}])
    return datasets.Dataset.from_dict(columns, features=entity_features())


def model_and_processor(encoders: str, texts: list[str]) -> tuple[MimicModel, MimicProcessor]:
    """Returns MIMIC with random weights, and a processor whose tokenizer is trained on `texts`."""
    tokenizer = train_wordpiece(texts, vocab_size=2000)
    configs = encoder_configs(encoders)
    if encoders == "clip":  # CLIP pools at the end token
        special = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        configs["text_config"] |= {**special, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = MimicModel(MimicConfig(**configs)).eval()
    vision = {"size": {"height": 224, "width": 224}}
    return model, MimicProcessor.from_parts(tokenizer, vision, max_length=LENGTH)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times the library and the floor, and returns the result."""
    harness.start(args)
    entities = generated_entities(args.entities)
    model, processor = model_and_processor(args.encoders, entities["attributes"])
    model = model.to(args.device, getattr(torch, args.dtype))
    machine = harness.machine(args.device, model.dtype)
    rows = [entities[row] for row in range(len(entities))]
    inputs = dict(processor(entities=rows).items())
    batches = [
        {
            name: tensor[first : first + args.batch_size].to(
                model.device, model.dtype if tensor.is_floating_point() else None
            )
            for name, tensor in inputs.items()
        }
        for first in range(0, len(entities), args.batch_size)
    ]

    @torch.inference_mode()
    def floor() -> None:
        for batch in batches:
            model.text_model(input_ids=batch["entity_input_ids"], attention_mask=batch["entity_attention_mask"])
            model.vision_model(pixel_values=batch["entity_pixel_values"])

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        output = Path(folder) / "kb"

        def build() -> None:
            KnowledgeBase.build(
                entities, model, processor, output=output, batch_size=args.batch_size, dtype="bfloat16", progress=False
            )

        cases = {"encoders alone": floor, "library": build}
        cpu: dict[str, list[float]] = {}
        seconds = harness.interleaved(cases, args.repeats, device=args.device, progress=harness.say, cpu_seconds=cpu)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    cpu_medians = {name: statistics.median(taken) for name, taken in cpu.items()}
    return {
        "model": f"MIMIC, {'CLIP ViT-B/32' if args.encoders == 'clip' else 'small'} encoders, random weights",
        "entities": args.entities,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "share_of_floor": medians["encoders alone"] / medians["library"],
        "cpu_share_of_floor": cpu_medians["encoders alone"] / cpu_medians["library"],
        "entities_per_second": args.entities / medians["library"],
        "floor_entities_per_second": args.entities / medians["encoders alone"],
        "library": harness.summary(seconds["library"]) | {"cpu_s": cpu_medians["library"]},
        "encoders_alone": harness.summary(seconds["encoders alone"]) | {"cpu_s": cpu_medians["encoders alone"]},
        "repeats": args.repeats,
        "device": args.device,
        "machine": machine,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    path = harness.write(args.output, "building", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

"""Benchmark of missing images: evaluates retrievers with images removed from mentions, from half of the entities, or both.

A missing image should cost what it would have told, and no more: without images of mentions, a model should be as good as
its text unit alone. An entity should be neither better nor worse off for having no image: `half_without` of the JSON has H@1
of golds with and without an image, and the share of first places that go to entities without one. The images of an entity
include those of the posts about it, for a model that reads posts. To measure a model of FlagsMEL:

    python -m benchmarks.missing_images runs/mimic_flags --dataset data/flags_mel --output results.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_mel.data.loading import dataset_version, load_entities, load_mentions
from hf_mel.data.posts import posts_of
from hf_mel.evaluation.full_evaluator import FullEvaluator, FullResult, encode_entities
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import knows_posts

#: Name of a condition → whether mentions and half of the entities lose their images.
CONDITIONS = {
    "all images": (False, False),
    "mentions without": (True, False),
    "half of the entities without": (False, True),
    "both": (True, True),
}
TEXT_UNIT = "mentions without: text unit alone"


def without_images(rows: datasets.Dataset, numbers: Collection[int]) -> datasets.Dataset:
    """Returns mentions, posts or entities of which some rows have lost their images."""
    column = "image" if "image" in rows.column_names else "images"
    feature, nothing, chosen = rows.features[column], None if column == "image" else [], set(numbers)
    undecoded = datasets.Image(decode=False)
    rows = rows.cast_column(column, undecoded if column == "image" else datasets.List(undecoded))
    rows = rows.map(
        lambda row, number: {column: nothing if number in chosen else row[column]},
        with_indices=True,
        keep_in_memory=True,
        features=rows.features,
    )
    return rows.cast_column(column, feature)


def compare_golds(result: FullResult, hidden: Collection[str]) -> dict[str, float | None]:
    """Returns H@1 of golds with and without an image, and the share of first places of entities without one.

    Args:
        result ([`FullResult`]): The evaluation.
        hidden (collection of `str`): Ids of the entities without an image.
    """
    ranked = [record for record in result.records() if record["rank"] is not None]
    hits: dict[bool, list[bool]] = {False: [], True: []}
    for record in ranked:
        hits[record["entity_id"] in hidden].append(record["rank"] <= 1)
    first = [record["candidates"][0]["entity_id"] in hidden for record in ranked]
    names = {"hits@1 of golds with": hits[False], "hits@1 of golds without": hits[True], "first places without": first}
    return {name: sum(values) / len(values) if values else None for name, values in names.items()}


def measure(name: str, dataset: str, split: str, seed: int) -> dict[str, Any]:
    """Returns H@1 of one retriever by condition, and `half_without` ([`compare_golds`])."""
    model, processor = load_retriever(name)
    mentions, entities = load_mentions(dataset, split), load_entities(dataset)
    posts = posts_of(dataset) if knows_posts(model) else None
    chosen = random.Random(seed).sample(range(len(entities)), round(len(entities) / 2))
    hidden = {entities[number]["entity_id"] for number in chosen}
    every = ModelInputs(model, processor, posts)
    if posts is not None:
        about = [number for number, entity_id in enumerate(posts["entity_id"]) if entity_id in hidden]
        posts = without_images(posts, about)
    half = ModelInputs(model, processor, posts)
    blind = without_images(mentions, range(len(mentions)))
    with evaluation_mode(model):
        encoded = {
            False: encode_entities(every, entities),
            True: encode_entities(half, without_images(entities, chosen)),
        }
        mention_encodings = {
            False: encode_rows(every, mentions, "mentions"),
            True: encode_rows(every, blind, "mentions"),
        }
    row: dict[str, Any] = {}
    for condition, (no_mention_images, no_entity_images) in CONDITIONS.items():
        evaluate = FullEvaluator(encoded[no_entity_images], progress=False)
        result = evaluate(every, mentions, mention_encodings=mention_encodings[no_mention_images])
        row[condition] = result.metrics["hits@1"]
        if condition == "half of the entities without":
            row["half_without"] = compare_golds(result, hidden)
    if "text" in (getattr(model.config, "units", None) or ()):
        evaluate = FullEvaluator(encoded[False], units=["text"], progress=False)
        row[TEXT_UNIT] = evaluate(every, mentions, mention_encodings=mention_encodings[True]).metrics["hits@1"]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="run folders or Hub ids of retrievers")
    parser.add_argument("--dataset", required=True, help="data-set folder or Hub id")
    parser.add_argument("--split", default="test", help="split to evaluate on (default: test)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of entities (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {
        "data": dataset_version(args.dataset),
        "split": args.split,
        "seed": args.seed,
        "models": {},
    }
    columns = [*CONDITIONS, TEXT_UNIT]
    print(" | ".join(["H@1", *columns]))
    for name in args.models:
        row = results["models"][name] = measure(name, args.dataset, args.split, args.seed)
        cells = (f"{100 * row[column]:.1f}" if column in row else "–" for column in columns)
        print(name, *cells, sep=" | ", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

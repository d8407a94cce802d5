"""Evaluates retrievers on data from which images were removed: of all mentions, of half of the knowledge base, or of both.

A missing image should cost what it would have told, and no more: without images of mentions, a model should be as good as its
text unit alone. The table of docs/results.md:

    python -m benchmarks.missing_images runs/mimic_flags --dataset data/flags_mel --output results.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import datasets

from hf_mel.data.loading import dataset_version, load_entities, load_mentions
from hf_mel.evaluation import FullEvaluator
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.inputs import ModelInputs

#: Name of a condition → whether mentions lose their images, and the share of entities that lose theirs.
CONDITIONS = {
    "all images": (False, 0.0),
    "mentions without": (True, 0.0),
    "half of the entities without": (False, 0.5),
    "both": (True, 0.5),
}


def without_images(rows: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """Returns mentions or entities of which a random share has no image."""
    column = "image" if "image" in rows.column_names else "images"
    feature, nothing = rows.features[column], None if column == "image" else []
    chosen = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    undecoded = datasets.Image(decode=False)
    rows = rows.cast_column(column, undecoded if column == "image" else datasets.List(undecoded))
    rows = rows.map(
        lambda row, number: {column: nothing if number in chosen else row[column]},
        with_indices=True,
        keep_in_memory=True,
        features=rows.features,
    )
    return rows.cast_column(column, feature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="run folders or Hub ids of retrievers")
    parser.add_argument("--dataset", required=True, help="data-set folder or Hub id")
    parser.add_argument("--split", default="test", help="split to evaluate on (default: test)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of entities (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    mentions, entities = load_mentions(args.dataset, args.split), load_entities(args.dataset)
    results: dict[str, Any] = {
        "data": dataset_version(args.dataset),
        "split": args.split,
        "seed": args.seed,
        "models": {},
    }
    header = ["H@1", *CONDITIONS, "mentions without: text unit alone"]
    print(" | ".join(header))
    for name in args.models:
        inputs = ModelInputs(*load_retriever(name))
        row: dict[str, float | None] = {}
        for condition, (removed, share) in CONDITIONS.items():
            shown = without_images(mentions, 1.0, args.seed) if removed else mentions
            evaluate = FullEvaluator(without_images(entities, share, args.seed) if share else entities)
            row[condition] = evaluate(inputs, shown).metrics["hits@1"]
        units = getattr(inputs.model.config, "units", None) or ()
        if "text" in units:
            evaluate = FullEvaluator(entities, units=["text"])
            row[header[-1]] = evaluate(inputs, without_images(mentions, 1.0, args.seed)).metrics["hits@1"]
        results["models"][name] = row
        print(name, *("–" if value is None else f"{100 * value:.1f}" for value in row.values()), sep=" | ", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

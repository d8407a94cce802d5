"""Predicted beside measured peak memory of trainings: two steps and the evaluation of each recipe, in a process of its own.

python -m benchmarks.memory --dataset data/flags_mel
python -m benchmarks.memory --dataset data/flags_mel --recipes mimic_flags --set training.per_device_train_batch_size=256
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

#: Five retrievers of five methods and a reranker, each with its overrides.
RECIPES: dict[str, list[str]] = {
    "mimic_flags": [],
    "bi-encoder_flags": [],
    "ghmfc_flags": [],
    "velml_flags": [],
    "jmel_flags": [],
    "mmel_flags": ["candidates.source=name", "candidates.retriever=null", "training.eval_mentions=64"],
}


def measure(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Trains a recipe in this process, and returns the predicted and the measured peak, in bytes."""
    from hf_mel.training import memory, trainer
    from hf_mel.training.recipe import Recipe
    from hf_mel.training.run import run_recipe

    predictions = []

    def keep(*args: Any) -> Any:
        predictions.append(memory.check_memory(*args))
        return predictions[-1]

    trainer.check_memory = keep  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(Recipe.load(recipe, overrides), output=folder)
    measured = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"predicted": predictions[-1].peak, "parts": vars(predictions[-1]), "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="data/flags_mel", help="built by hf-mel data build flags_mel --output data/flags_mel"
    )
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--set", action="append", default=[], help="as in hf-mel train")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.set)))
        return
    print(f"{'recipe':<28}{'predicted MB':>14}{'measured MB':>14}{'difference':>12}")
    for recipe in options.recipes:
        short = ["max_steps=2", "eval_strategy=no", "save_strategy=no", "load_best_model_at_end=false"]
        overrides = [f"data.dataset={options.dataset}", *(f"training.{each}" for each in short)]
        overrides += [*RECIPES.get(recipe, []), *options.set]
        words = [sys.executable, "-m", "benchmarks.memory", "--one", recipe]
        words += [word for override in overrides for word in ("--set", override)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            print(f"{recipe:<28}failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        predicted, measured = (result[name] / 1e6 for name in ("predicted", "measured"))
        print(
            f"{recipe:<28}{predicted:>14,.0f}{measured:>14,.0f}{predicted / measured - 1:>12.0%}  {result['parts']}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Measures how far seeds and numbers of threads move a training, and whether an average of its weights moves less.

    OMP_NUM_THREADS=1 python -m benchmarks.averaging train mimic_flags --seed 0 --output runs/average-0
    OMP_NUM_THREADS=2 python -m benchmarks.averaging train mimic_flags --seed 0 --output runs/average-0-threads2
    python -m benchmarks.averaging evaluate runs/average-* --output averaging.json

`train` trains a recipe as `hf-mel train` does, and beside the run keeps the weights after every epoch, moving averages of the weights
of all steps, and the weights after the first steps. `evaluate` says how far runs have moved apart after each of these steps,
what every form of the weights has on validation and test, and of how many mentions two runs have another first entity.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import hf_mel.training.linking_run as linking_run
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.inputs import ModelInputs
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.run_folder import recorded_values
from hf_mel.training.trainer import MelTrainer

#: Shares that moving averages keep of themselves at every step.
DECAYS = (0.9, 0.98)
#: Steps whose weights are kept, beside those at the ends of epochs.
STEPS = (1, 2, 5, 10, 20, 40)
Weights = dict[str, torch.Tensor]


class _Recorder(TrainerCallback):
    """Keeps weights of a training in a folder: of single steps, of every epoch, and moving averages of all steps."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.averages: dict[float, Weights] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.averages = {decay: _copy(model) for decay in DECAYS}
        save_file(_copy(model), self.folder / "step-0.safetensors")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = model.state_dict()
        for decay, average in self.averages.items():
            # A short average at first, or the initial weights would stay in it for long.
            kept = min(decay, state.global_step / (state.global_step + 9))
            for name, tensor in average.items():
                if tensor.is_floating_point():
                    tensor.lerp_(weights[name], 1 - kept)
                else:
                    tensor.copy_(weights[name])
        if state.global_step in STEPS:
            save_file(_copy(model), self.folder / f"step-{state.global_step}.safetensors")

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        save_file(_copy(model), self.folder / f"step-{state.global_step}.safetensors")
        save_file(_copy(model), self.folder / f"epoch-{round(state.epoch)}.safetensors")

    def on_train_end(self, args, state, control, **kwargs):
        for decay, average in self.averages.items():
            save_file(average, self.folder / f"moving-{decay}.safetensors")


def _copy(model: torch.nn.Module) -> Weights:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def train(args: argparse.Namespace) -> None:
    """Trains a recipe and keeps its weights in the folder `weights` beside the run's files."""

    class Recorded(MelTrainer):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self.add_callback(_Recorder(args.output.with_name(f"{args.output.name}.weights")))

    linking_run.MelTrainer = Recorded  # type: ignore[misc]
    run_recipe(Recipe.load(args.recipe, [f"training.seed={args.seed}", *args.set]), args.output)


def forms(folder: Path) -> dict[str, Weights]:
    """Returns the forms of a run's weights by name: of the last epoch, means over the last epochs, and moving averages."""
    epochs = {int(file.stem.rpartition("-")[2]): file for file in folder.glob("epoch-*.safetensors")}
    last = max(epochs)
    kinds = {"last epoch": load_file(epochs[last])}
    for count in (2, 3):
        parts = [load_file(epochs[last - number]) for number in range(count)]
        kinds[f"mean of the last {count} epochs"] = {
            name: torch.stack([part[name] for part in parts]).mean(0) if tensor.is_floating_point() else tensor
            for name, tensor in parts[0].items()
        }
    for decay in DECAYS:
        kinds[f"moving average, {decay}"] = load_file(folder / f"moving-{decay}.safetensors")
    return kinds


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates all forms of the weights of runs, and compares the runs."""
    results: dict[str, Any] = {"runs": {}, "distance": {}, "other first entity": {}}
    firsts: dict[str, dict[str, torch.Tensor]] = {}
    for run in args.runs:
        model, processor = load_retriever(str(run), device="cpu")
        data = recorded_values(run, "data")
        entities = load_entities(data["dataset"])
        splits = {split: load_mentions(data["dataset"], split) for split in ("validation", "test")}
        saved = {"chosen epoch": _copy(model)}
        for form, weights in (saved | forms(run.with_name(f"{run.name}.weights"))).items():
            model.load_state_dict(weights)
            for split, mentions in splits.items():
                result = FullEvaluator(entities, progress=False)(ModelInputs(model, processor), mentions)
                entry = results["runs"].setdefault(run.name, {}).setdefault(form, {})
                entry[split] = {name: round(100 * result.metrics[name], 2) for name in ("hits@1", "mrr")}
                if split == "test":
                    firsts.setdefault(form, {})[run.name] = result.ranking.top_rows[:, 0][
                        torch.tensor(result.gold_rows) >= 0
                    ]
            print(run.name, form, json.dumps(results["runs"][run.name][form]), flush=True)
    for first, second in itertools.combinations(args.runs, 2):
        pair = f"{first.name} and {second.name}"
        results["distance"][pair] = _distances(first, second)
        results["other first entity"][pair] = {
            form: round(100 * (rows[first.name] != rows[second.name]).float().mean().item(), 1)
            for form, rows in firsts.items()
        }
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _distances(first: Path, second: Path) -> dict[str, float]:
    """Returns the distance of two runs' weights after steps that both kept, as a share of how far the first has moved."""
    folders = [run.with_name(f"{run.name}.weights") for run in (first, second)]
    names = {file.name for file in folders[0].glob("step-*")} & {file.name for file in folders[1].glob("step-*")}
    start, distances = load_file(folders[0] / "step-0.safetensors"), {}
    for name in sorted(names, key=lambda name: int(re.findall(r"\d+", name)[0])):
        one, other = (_parameters(load_file(folder / name)) for folder in folders)
        moved = (one - _parameters(start)).norm().item()
        distance = (one - other).norm().item()
        distances[name.split(".")[0]] = distance / moved if moved else distance
    return distances


def _parameters(weights: Weights) -> torch.Tensor:
    kept = [
        tensor.double().flatten()
        for name, tensor in sorted(weights.items())
        if tensor.is_floating_point() and "running_" not in name
    ]
    return torch.cat(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("train")
    verb.add_argument("recipe")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--set", action="append", default=[], help="a field of the recipe, as in hf-mel train")
    verb.add_argument("--output", type=Path, required=True)
    verb.set_defaults(run=train)
    verb = verbs.add_parser("evaluate")
    verb.add_argument("runs", type=Path, nargs="+")
    verb.add_argument("--output", type=Path, required=True)
    verb.set_defaults(run=evaluate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

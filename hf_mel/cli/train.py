"""`hf-mel train`: trains the model of a recipe and writes a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe file, or the name of a recipe that comes with hf_mel, such as [b]mimic_flags[/b]."
        ),
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe. Repeat it to change several."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run. A finished run is not changed.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/<name of the recipe>.")] = None,
) -> None:
    """Train the model of a recipe, and write a folder that is ready to be a model repository.

    On several devices, run [b]accelerate launch train.py RECIPE[/b] with the same options.

    Training uses bfloat16 mixed precision if the processor or GPU has it natively, and float32 otherwise. To choose
    yourself, add [b]--set training.bf16=true[/b] or [b]false[/b].

    Examples:

      hf-mel train mimic_flags

      hf-mel train recipes/mimic_flags.yaml --set training.num_train_epochs=1 --output runs/short
    """
    import json

    from accelerate import PartialState
    from rich.console import Console

    from hf_mel.cli.printing import print_adaptation, show_logs
    from hf_mel.evaluation.tables import orders_table, results_table
    from hf_mel.training import run_folder
    from hf_mel.training.recipe import Recipe
    from hf_mel.training.run import run_recipe

    with show_logs():
        loaded = Recipe.load(recipe, overrides or ())
        folder = run_recipe(loaded, output=output, resume=resume)
    if not PartialState().is_main_process:
        return
    if loaded.task == "adaptation":
        print_adaptation(folder, loaded.data.dataset)
        return
    results = json.loads((folder / run_folder.RESULTS).read_text(encoding="utf-8"))
    minutes = f"{results['run']['seconds'] / 60:.1f} minutes"
    console = Console()
    if loaded.task == "pretraining":
        console.print(
            f"Pre-trained in {minutes}. Loss on {results['data']['validation_split']}: "
            f"{results['validation']['loss']:.3f}. To train for linking from here, run a recipe with "
            f"--set model.from_pretrained={folder}",
            markup=False,
            soft_wrap=True,
        )
        return
    if loaded.task == "candidates":
        recall = ", ".join(
            f"{100 * value:.1f} at {name.partition('@')[2]}" for name, value in results["candidates"]["recall"].items()
        )
        console.print(
            f"Trained {results['candidates']['count']} retrievers in {minutes}. Golds among the first k candidates, in %: "
            f"{recall}. To train a reranker on these lists, run its recipe with "
            f"--set candidates.train_file={folder / 'train.parquet'}",
            markup=False,
            soft_wrap=True,
        )
        return
    reranks = loaded.candidates is not None
    if results["validation"] is not None:
        console.print(
            results_table(results["validation"], title=f"{results['recipe']}, {results['data']['validation_split']}")
        )
        if reranks:
            console.print(orders_table(results["validation"]))
    names = (run_folder.RESULTS, run_folder.RECIPE, run_folder.LOG, run_folder.PLOT, run_folder.CARD)
    files = ", ".join(name for name in names if (folder / name).exists())
    console.print(f"Trained in {minutes}. Model, processor, {files}: {folder}", markup=False)
    console.print("Next:")
    dataset = loaded.data.dataset
    evaluate = f"hf-mel evaluate {folder} --dataset {dataset} --split test"
    if reranks:
        steps = [
            ("evaluate it", f"{evaluate} --candidates FILE --output results.json"),
            ("link with it", f'hf-mel link RETRIEVER --kb KB --reranker {folder} --text "…" --mention "…"'),
        ]
    else:
        steps = [
            ("evaluate it", f"{evaluate} --output results.json"),
            ("encode the entities", f"hf-mel kb build {folder} --dataset {dataset} --output kb/{Path(dataset).name}"),
        ]
    for purpose, command in steps:
        console.print(f"  {purpose:<20} {command}", markup=False, soft_wrap=True)

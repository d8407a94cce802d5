"""`hf-mel train`: a recipe → a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe file, or the name of one that comes with hf_mel, such as [b]mimic_flags[/b]."),
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be given several times."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; a finished one is left as it is.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/<name of the recipe>.")] = None,
) -> None:
    """Train what a recipe describes, and write a folder that is ready to be a model repository.

    On several devices: [b]accelerate launch train.py RECIPE[/b], with the same options.

    Examples:

      hf-mel train mimic_flags

      hf-mel train recipes/mimic_flags.yaml --set training.num_train_epochs=1 --output runs/short
    """
    import json

    from accelerate import PartialState
    from rich.console import Console

    import hf_mel.auto  # noqa: F401 (the shipped methods register with the Auto classes)
    from hf_mel.evaluation.tables import orders_table, results_table
    from hf_mel.training.recipe import Recipe
    from hf_mel.training.run import run_recipe
    from hf_mel.training.run_folder import LOG, PLOT, RECIPE, RESULTS

    loaded = Recipe.load(recipe, overrides or ())
    folder = run_recipe(loaded, output=output, resume=resume)
    if not PartialState().is_main_process:
        return
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    console = Console()
    if loaded.task == "pretraining":
        console.print(
            f"Loss on {results['data']['validation_split']} {results['validation']['loss']:.3f}, after "
            f"{results['run']['seconds'] / 60:.1f} minutes. For a recipe that trains linking: "
            f"--set model.from_pretrained={folder}",
            markup=False,
            soft_wrap=True,
        )
        return
    console.print(
        results_table(results["validation"], title=f"{results['recipe']}, {results['data']['validation_split']}")
    )
    reranks = loaded.candidates is not None
    if reranks:
        console.print(orders_table(results["validation"]))
    others = ", ".join(name for name in (RESULTS, RECIPE, LOG, PLOT, "README.md") if (folder / name).exists())
    dataset, split = loaded.data.dataset, "test"
    console.print(
        f"Trained in {results['run']['seconds'] / 60:.1f} minutes. Model, processor, {others}: {folder}", markup=False
    )
    console.print("Next:")
    measure = f"hf-mel evaluate {folder} --dataset {dataset} --split {split}"
    index = f"hf-mel kb build {folder} --dataset {dataset} --output kb/{Path(dataset).name}"
    steps = [("measure it", f"{measure} --output results.json"), ("index the entities", index)]
    if reranks:
        link = f'hf-mel link RETRIEVER --kb KB --reranker {folder} --text "…" --mention "…"'
        steps = [("measure it", f"{measure} --candidates FILE --output results.json"), ("link with it", link)]
    for purpose, command in steps:
        console.print(f"  {purpose:<19} {command}", markup=False, soft_wrap=True)

"""`hf-mel convert`: other people's checkpoints → model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    method: Annotated[str, typer.Argument(help="Whose checkpoint it is, for instance [b]mimic[/b].")],
    state_dict: Annotated[Path, typer.Option(help="The published weights: safetensors, or a PyTorch checkpoint.")],
    config: Annotated[Path, typer.Option(help="The published configuration as JSON.")],
    output: Annotated[Path, typer.Option(help="The model folder to write; must be new or empty.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of the encoder it was trained with, such as openai/clip-vit-base-patch32: "
            "its tokenizer goes into the folder too. Evaluating and linking need it."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Where to write, as JSON, every key that found no place.", dir_okay=False)
    ] = None,
) -> None:
    """Turn published weights into a model folder that [b]AutoModel.from_pretrained[/b] reads.

    Every key of the checkpoint must find its place; a key that is unknown, missing or of another shape is an error that
    names it, and nothing is written.
    """
    from rich.console import Console

    from hf_mel.hub.convert import convert_checkpoint

    done = convert_checkpoint(method, state_dict, config, output, tokenizer, report)
    console = Console()
    console.print(f"{done.converted} tensors converted to [b]{done.output}[/b].")
    if done.unused:
        console.print(f"Left out, since no score uses them: {', '.join(done.unused)}.")
    if tokenizer is None:
        console.print("No processor was written; give --tokenizer to evaluate and link with the folder.")
    console.print(f'Next: AutoModel.from_pretrained("{done.output}")', markup=False)

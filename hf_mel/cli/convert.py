"""`hf-mel convert`: converts published checkpoints to model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    method: Annotated[str, typer.Argument(help="The method of the checkpoint, for instance [b]mimic[/b].")],
    state_dict: Annotated[
        Path, typer.Option(help="The published weights, a safetensors file or a PyTorch checkpoint.")
    ],
    config: Annotated[Path, typer.Option(help="The published configuration, a JSON file.")],
    output: Annotated[Path, typer.Option(help="The model folder to write; must be new or empty.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of the encoder it was trained with, such as openai/clip-vit-base-patch32. Its tokenizer "
            "is saved too; evaluating and linking need it."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="A JSON file to write that lists all keys that do not match.", dir_okay=False),
    ] = None,
) -> None:
    """Convert published weights to a model folder that [b]AutoModel.from_pretrained[/b] reads.

    Every key of the checkpoint must match a parameter. If a key is unknown, missing or of another shape, the command fails
    with its name and writes nothing.
    """
    from rich.console import Console

    from hf_mel.hub.convert import convert_checkpoint

    converted, unused = convert_checkpoint(method, state_dict, config, output, tokenizer, report)
    console = Console()
    console.print(f"{converted} tensors converted to {output}.", markup=False, soft_wrap=True)
    if unused:
        console.print(f"Left out because no score uses them: {', '.join(unused)}.")
    if tokenizer is None:
        console.print("No processor was written. Give --tokenizer to evaluate and link with the folder.")
    console.print(f'Next: AutoModel.from_pretrained("{output}")', markup=False)

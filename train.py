"""`accelerate launch train.py RECIPE [--set key=value] [--resume] [--output DIR]`: `hf-mel train` on several devices."""

import sys

import typer

from hf_mel.cli.train import train
from hf_mel.errors import MelError

if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich")
    app.command()(train)
    try:
        app()
    except MelError as error:
        sys.exit(f"{type(error).__name__}: {error}")

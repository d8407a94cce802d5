"""`accelerate launch train.py RECIPE [--set key=value] [--resume] [--output DIR]`: `hf-mel train` on several devices."""

import typer

from hf_mel.cli import main
from hf_mel.cli.train import train

if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich")
    app.command()(train)
    main(app)

"""`hf-mel`: one file per verb. Heavy imports live inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys

# PyTorch's threads wait for each other after every operation. By default they wait busily, which takes the processor
# from the very thread they wait for as soon as another program runs. It is read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from hf_mel.cli import bench, data, kb, publish
from hf_mel.cli.adapt import adapt
from hf_mel.cli.annotate import annotate
from hf_mel.cli.candidates import candidates
from hf_mel.cli.convert import convert
from hf_mel.cli.demo import demo
from hf_mel.cli.evaluate import evaluate
from hf_mel.cli.link import link
from hf_mel.cli.relink import relink
from hf_mel.cli.space import space
from hf_mel.cli.train import train
from hf_mel.errors import MelError
from hf_mel.terminal import print_in_any_encoding, safe_text

app = typer.Typer(
    name="hf-mel",
    help="Multimodal entity linking, from raw data sets to linked mentions.\n\n"
    "The usual order: [b]data build[/b] → [b]train[/b] (or without labels [b]adapt[/b]) → [b]evaluate[/b] → [b]kb build[/b] → [b]link[/b] or [b]annotate[/b] → [b]publish[/b]. "
    "[b]demo[/b] does all of it once, on a small data set that it generates.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.command()(candidates)
app.command()(train)
app.command()(adapt)
app.command()(evaluate)
app.add_typer(kb.app, name="kb")
app.command()(link)
app.command()(relink)
app.command()(annotate)
app.add_typer(publish.app, name="publish")
app.command()(convert)
app.command()(space)
app.command()(demo)
app.add_typer(bench.app, name="bench")


def main(app: typer.Typer = app) -> None:
    """Runs the command line. A `MelError` ends it with one message and its exit status, without a traceback."""
    print_in_any_encoding()
    try:
        app()
    except SystemExit as ended:
        if not ended.code and "accelerate" in sys.modules:
            from accelerate import PartialState

            # A process group that is still open can abort one of several processes while Python exits.
            if PartialState._shared_state:
                PartialState().destroy_process_group()
        raise
    except MelError as error:
        from rich.console import Console

        Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/]", end=" ")
        print(safe_text(str(error), keep_lines=True), file=sys.stderr)
        sys.exit(error.exit_status)

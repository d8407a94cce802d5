"""`hf-mel data`: raw releases → data-set folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Build data sets from their raw releases.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    # With a callback, `build` stays a verb of its own even while it is the only one.
    pass


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="The data set, for instance [b]flags_mel[/b], [b]wikimel[/b].")],
    output: Annotated[Path, typer.Option(help="The folder to write. An earlier build in it is replaced.")],
    raw_dir: Annotated[
        Path | None, typer.Option(help="The folder of the released JSON files, for data sets built from a release.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder of the mention images, if it is not in the raw folder.")
    ] = None,
    entity_images: Annotated[
        Path | None, typer.Option(help="The folder of the entity images, if it is not in the raw folder.")
    ] = None,
    allow_count_mismatch: Annotated[
        bool, typer.Option("--allow-count-mismatch", help="Build although rows are missing or too many.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder whatever it holds.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="For data sets that are generated.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="What this data set alone asks; may be given often.")
    ] = None,
) -> None:
    """Build a data set into a folder of Parquet files that the Hub and [b]datasets[/b] read as they are.

    Everything the release lacks (images, sentences, golds) is counted, and listed in report.json. If a split does not
    have its official number of rows, nothing is written.

    Examples:

      hf-mel data build flags_mel --output data/flags_mel

      hf-mel data build wikimel --raw-dir RAW --images RAW/mention_images --output data/wikimel
    """
    options = {}
    for item in option or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{item!r} is not KEY=VALUE.", param_hint="--option")
        options[key] = value

    from rich.console import Console
    from rich.table import Table

    from hf_mel.data.building import build_dataset

    report = build_dataset(
        name,
        output=output,
        raw_dir=raw_dir,
        images=images,
        entity_images=entity_images,
        allow_count_mismatch=allow_count_mismatch,
        overwrite=overwrite,
        seed=seed,
        config_options=options,
    )
    console = Console()
    layout = f" from the {report.layout} layout" if report.layout else ""
    table = Table("configuration", "split", title=f"{report.dataset}{layout}")
    for column in ("rows", "images", "rows without image"):
        table.add_column(column, justify="right")
    for config, splits in report.counts.items():
        for split, rows in splits.items():
            found = report.images[config][split]
            table.add_row(config, split, f"{rows:,}", f"{found['images']:,}", f"{found['rows_without']:,}")
    console.print(table)
    if report.problems:
        problems = Table("found in the raw files", title="problems, each case in report.json")
        problems.add_column("count", justify="right")
        problems.add_column("first")
        for kind, entries in sorted(report.problems.items()):
            problems.add_row(kind.replace("_", " "), f"{len(entries):,}", f"{entries[0][0]}, row {entries[0][1]}")
        console.print(problems)
    folder = str(report.output)
    console.print(
        f"\nWritten to {folder} (card: README.md, cases: report.json). Next:\n"
        f'  in Python        load_dataset("{folder}"), load_dataset("{folder}", "entities")\n'
        "  train a model    hf-mel train RECIPE   (a YAML file that names this folder as its data set)\n"
        f"  use its entities hf-mel kb build RUN --dataset {folder} --output KB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )

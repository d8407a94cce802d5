"""`hf-mel data`: raw releases → data-set folders, and what is wrong with a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hf_mel.building.report import CheckReport

app = typer.Typer(
    help="Build data sets from their raw releases, check any data set, and list those that can be built.",
    no_args_is_help=True,
)


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="The data set; [b]hf-mel data list[/b] shows them all.")],
    output: Annotated[Path, typer.Option(help="The folder to write. An earlier build in it is replaced.")],
    raw_dir: Annotated[
        Path | None, typer.Option(help="The folder of the released files, for data sets built from a release.")
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
    resize: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Scale images down to N pixels on the longest side. Default: as released."
        ),
    ] = None,
    mentions: Annotated[
        Path | None, typer.Option(help="For data of your own: the file of mentions, one row each.")
    ] = None,
    entities: Annotated[
        Path | None, typer.Option(help="For data of your own: the file of entities, one row each.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of this data set's own; may be given several times."),
    ] = None,
) -> None:
    """Build a data set into a folder of Parquet files that the Hub and [b]datasets[/b] read as they are.

    What the release lacks (images, sentences, golds) is listed in report.json.

    If a split does not have its official number of rows, nothing is written.

    If it is interrupted, the same command goes on where it was.

    Examples:

      hf-mel data build flags_mel --output data/flags_mel

      hf-mel data build wikimel --raw-dir RAW --images RAW/mention_images --output data/wikimel

      hf-mel data build jsonl --mentions mine.jsonl --entities kb.csv --output data/mine
    """
    options = {key: str(file) for key, file in (("mentions", mentions), ("entities", entities)) if file is not None}
    for item in option or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{item!r} is not KEY=VALUE.", param_hint="--option")
        options[key] = value

    from rich.console import Console

    from hf_mel.building.build import build_dataset

    try:
        report = build_dataset(
            name,
            output=output,
            raw_dir=raw_dir,
            images=images,
            entity_images=entity_images,
            allow_count_mismatch=allow_count_mismatch,
            overwrite=overwrite,
            seed=seed,
            resize=resize,
            config_options=options,
        )
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it was.")
        raise typer.Exit(130) from None
    console = Console()
    layout = f" from the {report.layout} layout" if report.layout else ""
    _print_report(console, report, f"{report.dataset}{layout}", report.official)
    if report.redistribution:
        console.print(f"Not to be passed on: {report.redistribution.rstrip('.')}.", markup=False, highlight=False)
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


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="A data-set folder, or a data set on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for one on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found, with each case, as JSON.")] = False,
) -> None:
    """Look for what is wrong with a data set, whoever built it, and for what its splits and images give away.

    Every row is read and every image decoded. Exit status 1 if the data set cannot be used as it is.

    Examples:

      hf-mel data check data/wikimel

      hf-mel data check OWNER/NAME --json
    """
    from rich.console import Console

    from hf_mel.building.checks import check_dataset

    report = check_dataset(dataset, revision)
    if as_json:
        import json

        print(json.dumps({"usable": not report.fatal, "fatal": report.fatal, **report.to_dict()}, indent=2))
    else:
        console = Console()
        _print_report(console, report, dataset)
        warnings = sum(len(entries) for kind, entries in report.problems.items() if kind not in report.fatal)
        if report.fatal:
            verdict = f"[bold red]Cannot be used as it is:[/] {', '.join(map(_words, report.fatal))}."
        else:
            verdict = "[bold green]Can be used.[/]" + (f" {warnings:,} warnings." if warnings else "")
        console.print(verdict + (" Each case: --json." if report.problems else ""))
    if report.fatal:
        raise typer.Exit(1)


@app.command(name="list")
def list_datasets(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the data sets that can be built: task, language, size, licence, what to fetch, options."""
    from hf_mel.building.builders import builder_options, find_builder, known_datasets

    found = []
    for name in known_datasets():
        builder: Any = find_builder(name)
        found.append(
            {
                "name": name,
                "title": builder.TITLE,
                "task": builder.TASK,
                "languages": list(builder.LANGUAGES),
                "license": builder.LICENSE,
                "redistribution": builder.REDISTRIBUTION,
                "homepage": builder.HOMEPAGE,
                "official_counts": builder.OFFICIAL_COUNTS,
                "download": builder.DOWNLOAD,
                "options": builder_options(builder),
            }
        )
    if as_json:
        import json

        print(json.dumps(found, indent=2))
        return

    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for entry in found:
        console.print(Text.assemble((entry["name"], "bold"), f"  {entry['title']}: {_sentence(entry['task'])}"))
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", width=9)
        table.add_column()
        languages = ", ".join(entry["languages"]) or "any"
        table.add_row("language", languages)
        table.add_row("size", Text("\n".join(_sizes(entry["official_counts"]))))
        table.add_row("licence", entry["license"] + (", not to be passed on" if entry["redistribution"] else ""))
        table.add_row("to fetch", Text(_sentence(entry["download"] or "nothing")))
        if entry["options"]:
            table.add_row("options", Text("\n".join(f"--option {key}=…" for key in entry["options"])))
        console.print(Padding(table, (0, 0, 1, 2)))


def _sizes(counts: dict[str, Any]) -> list[str]:
    """One line for each layout: mentions and entities, as far as known."""
    if "entities" in counts or not counts:
        return [_size(counts)]
    return [f"{layout}: {_size(of_layout)}" for layout, of_layout in counts.items()]


def _size(counts: dict[str, Any]) -> str:
    parts = []
    for config, splits in counts.items():
        rows = list(splits.values())
        if rows and None not in rows:
            listed = f" ({', '.join(f'{n:,} {split}' for split, n in splits.items())})" if len(rows) > 1 else ""
            parts.append(f"{sum(rows):,} {config}{listed}")
    return "; ".join(parts) or "unknown"


def _print_report(
    console: Any, report: CheckReport, title: str, official: dict[str, dict[str, int | None]] | None = None
) -> None:
    from rich.table import Table
    from rich.text import Text

    from hf_mel.building.dataset_card import leakage_rows

    counts = Table("configuration", "split", title=Text(title))
    for column in ("rows", *(["official"] if official else []), "images", "without image"):
        counts.add_column(column, justify="right")
    for config, splits in report.counts.items():
        for split, rows in splits.items():
            images = report.images[config][split]
            expected = (official or {}).get(config, {}).get(split)
            known = ["?" if expected is None else f"{expected:,}"] if official else []
            counts.add_row(
                Text(config), split, f"{rows:,}", *known, f"{images['images']:,}", f"{images['rows_without']:,}"
            )
    console.print(counts)
    problems = Table("problem", title="problems")
    problems.add_column("count", justify="right")
    problems.add_column("first")
    for kind, entries in sorted(report.problems.items()):
        file, row, _ = entries[0]
        first = Text(f"{file}, row {row}" if row else file)
        problems.add_row(Text(_words(kind), "bold red" if kind in report.fatal else ""), f"{len(entries):,}", first)
    for kind, n in report.duplicates.items():
        if n:
            problems.add_row(_words(kind), f"{n:,}")
    if problems.row_count:
        console.print(problems)
    if leaks := leakage_rows(report.leakage, report.counts):
        table = Table("configuration", "split", "mentions whose", title="leakage")
        table.add_column("count", justify="right")
        for leak in leaks:
            table.add_row(*map(Text, leak))
        console.print(table)


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."

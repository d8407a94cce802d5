"""`hf-mel data`: builds, checks and lists data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_mel.cli.options import Column, IgnoreOtherColumns, InvertedNames
from hf_mel.cli.printing import print_json
from hf_mel.errors import first_lines
from hf_mel.terminal import safe_text

if TYPE_CHECKING:
    from hf_mel.building.report import CheckReport

app = typer.Typer(
    help="Build data sets from their raw releases, check any data set, and list the data sets that can be built.\n\n"
    "A data set is a folder of Parquet files: [b]mentions[/b] to link, and the [b]entities[/b] of a knowledge base.",
    no_args_is_help=True,
)


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="The data set. [b]hf-mel data list[/b] shows all names.")],
    output: Annotated[
        Path, typer.Option(help="The folder to write. An earlier build of the same data set is replaced.")
    ],
    raw_dir: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the released files, for data sets built from a release. A dump may be a file."
        ),
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(
            metavar="RAW",
            help="Like --raw-dir, for a newer release of the data set in OUTPUT. Options that you leave out are those of "
            "the earlier build, and changes.json lists the entities that were added, changed and removed.",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder of the mention images, if it is not inside the raw folder.")
    ] = None,
    entity_images: Annotated[
        Path | None, typer.Option(help="The folder of the entity images, if it is not inside the raw folder.")
    ] = None,
    allow_count_mismatch: Annotated[
        bool,
        typer.Option("--allow-count-mismatch", help="Build even if the number of rows differs from the official one."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder even if it contains other files.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="The random seed, for data sets that are generated.")] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Scale images down to N pixels on the longest side. By default they stay as released.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at the first image that is missing or broken, and write nothing. By default such images are "
            "listed, and their rows go on without them.",
        ),
    ] = False,
    mentions: Annotated[
        Path | None,
        typer.Option(
            help="The file of your own mentions (JSON lines, JSON, CSV or TSV), one per row. Only for [b]jsonl[/b]."
        ),
    ] = None,
    entities: Annotated[
        Path | None,
        typer.Option(help="The file of your own entities, one per row. Only for [b]jsonl[/b]."),
    ] = None,
    column: Column = None,
    ignore_other_columns: IgnoreOtherColumns = False,
    inverted_names: InvertedNames = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of this data set. [b]hf-mel data list[/b] shows the keys. Can be repeated.",
        ),
    ] = None,
) -> None:
    """Build a data set into a folder of Parquet files, which the Hub and [b]datasets[/b] can read.

    It also has a card (README.md) and a list of everything that is missing or was left out (report.json).

    If a split does not have its official number of rows, nothing is written.

    If you interrupt a build, the same command continues it.

    Examples:

      hf-mel data build flags_mel --output data/flags_mel

      hf-mel data build wikimel --raw-dir RAW --images RAW/mention_images --output data/wikimel

      hf-mel data build wikidata --raw-dir latest-all.json.gz --option classes=Q5 --option languages=en,de \\
        --option min_sitelinks=5 --output data/wikidata-people

      hf-mel data build jsonl --mentions mine.jsonl --entities kb.csv --output data/mine

      hf-mel data build jsonl --mentions mine.csv --entities artists.csv --column text=caption --column name=artist \\
        --ignore-other-columns --output data/artists
    """
    if update is not None and raw_dir is not None:
        raise typer.BadParameter("Give either --raw-dir or --update.", param_hint="--update")
    files = {"mentions": mentions, "entities": entities}
    options: dict[str, Any] = {key: str(file) for key, file in files.items() if file is not None}
    reading = {"column": column, "ignore_other_columns": ignore_other_columns, "inverted_names": inverted_names}
    options |= {key: value for key, value in reading.items() if value}
    for item in option or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{item!r} is not KEY=VALUE.", param_hint="--option")
        options[key] = value

    import json
    import shlex

    from rich.console import Console

    from hf_mel.building.build import CHANGES_FILE, build_dataset
    from hf_mel.cli.printing import show_logs
    from hf_mel.data.folder_copies import is_literal

    try:
        with show_logs():
            report = build_dataset(
                name,
                output=output,
                raw_dir=raw_dir if update is None else update,
                images=images,
                entity_images=entity_images,
                allow_count_mismatch=allow_count_mismatch,
                overwrite=overwrite,
                seed=seed,
                resize=resize,
                strict=strict,
                update=update is not None,
                config_options=options,
            )
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues the build.")
        raise typer.Exit(130) from None
    console = Console()
    layout = f" from the {report.layout} layout" if report.layout else ""
    _print_report(console, report, f"{report.dataset}{layout}", report.official)
    num_missing, num_broken = report.num_missing_images, len(report.problems.get("broken_image", ()))
    if num_missing or num_broken:
        console.print(
            f"Images left out of their rows: {num_missing:,} missing, {num_broken:,} broken. report.json lists them. "
            "--strict stops at the first.",
            highlight=False,
        )
    if update is not None:
        changes = json.loads((report.output / CHANGES_FILE).read_text(encoding="utf-8"))
        counts = ", ".join(f"{len(ids):,} {kind}" for kind, ids in changes.items())
        console.print(f"Entities since the earlier build: {counts}. changes.json lists them.", highlight=False)
    if report.redistribution:
        console.print(f"Do not redistribute it: {report.redistribution.rstrip('.')}.", markup=False, highlight=False)
    folder = str(report.output)
    quoted, in_python = shlex.quote(folder), json.dumps(folder, ensure_ascii=False)
    load = f'load_dataset({in_python}), load_dataset({in_python}, "entities")'
    if not is_literal(report.output):  # load_dataset would look for the names that match it
        load = f'hf_mel.data.load_mentions({in_python}, "train"), hf_mel.data.load_entities({in_python})'
    train = f"  train a model:     hf-mel train RECIPE --set data.dataset={quoted} --output RUN\n"
    if "mentions" not in report.counts:
        load, train = f"hf_mel.data.load_entities({in_python})", ""
    console.print(
        f"\nWritten to {folder} (card: README.md, all problems: report.json). What to type next:\n"
        f"  in Python:         {load}\n{train}"
        f"  use its entities:  hf-mel kb build RUN --dataset {quoted} --output KB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def images(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a data set that [b]hf-mel data build[/b] has written.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="The folder that keeps the fetched images. Default: FOLDER with -images appended."),
    ] = None,
    width: Annotated[
        int,
        typer.Option(help="The width in pixels of images that are larger: 120, 250, 330, 500, 960 or 1280."),
    ] = 500,
    rate: Annotated[float, typer.Option(help="Requests per second, at most.")] = 2.0,
    contact: Annotated[
        str | None,
        typer.Option(help="Your mail address or page. The server's owners ask for it, and it goes only to them."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The address of the wiki that has the files. Default: https://commons.wikimedia.org."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fetch the images that the entities name (column image_file) from Wikimedia Commons, and store them in the data set.

    The data set gets the licence, author and page of each image as columns.

    Two requests a second fetch about 7,000 images in an hour. If you interrupt this, the same command goes on. Nothing
    is fetched twice, also not after a new build of the data set.

    Example:

      hf-mel data images data/wikidata-people --contact me@example.org
    """
    from dataclasses import asdict

    from hf_mel.building.commons_images import COMMONS, add_images
    from hf_mel.cli.printing import print_plain

    try:
        report = add_images(
            folder, images=images, width=width, rate=rate, contact=contact, url=COMMONS if url is None else url
        )
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on.")
        raise typer.Exit(130) from None
    if as_json:
        print_json({**asdict(report), "folder": str(report.folder)})
        return
    lines = [
        f"{report.num_entities:,} entities of {folder} have an image. {report.num_wanted:,} files are named: "
        f"{report.num_fetched:,} fetched, {report.num_kept:,} kept from before, {len(report.absent):,} not to be had, "
        f"{len(report.failed):,} failed."
    ]
    for title, reasons in (("Not to be had", report.absent), ("Failed (repeat the command)", report.failed)):
        if reasons:
            lines.append(f"{title}:")
            lines += first_lines([f"  {name}: {reason}" for name, reason in reasons.items()], 10)
    print_plain("\n".join(lines))


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="A data-set folder, or a data set on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a data set on the Hub.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as JSON, with every problem.")
    ] = False,
) -> None:
    """Check any data set for errors, and for leakage between its splits and its knowledge base.

    Every row is read and every image is decoded. The exit status is 1 if the data set is unusable.

    Examples:

      hf-mel data check data/wikimel

      hf-mel data check OWNER/NAME --json
    """
    from rich.console import Console

    from hf_mel.building.checks import check_dataset

    report = check_dataset(dataset, revision)
    if as_json:
        print_json({"usable": not report.fatal, "fatal": report.fatal, **report.to_dict()})
    else:
        console = Console()
        _print_report(console, report, dataset)
        num_warnings = sum(len(entries) for kind, entries in report.problems.items() if kind not in report.fatal)
        if report.fatal:
            verdict = f"[bold red]This data set is unusable:[/] {', '.join(map(_problem_words, report.fatal))}."
        else:
            verdict = "[bold green]This data set can be used.[/]"
            if num_warnings:
                verdict += f" {num_warnings:,} {'warning' if num_warnings == 1 else 'warnings'}."
        console.print(verdict + (" --json lists every problem." if report.problems else ""))
    if report.fatal:
        raise typer.Exit(1)


@app.command(name="list")
def list_datasets(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the data sets that can be built, with task, language, size, licence, files to fetch, and options."""
    from hf_mel.building.builders import builder_options, find_builder, known_datasets

    entries = []
    for name in known_datasets():
        builder: Any = find_builder(name)
        entries.append(
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
        print_json(entries)
        return

    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for entry in entries:
        console.print(Text.assemble((entry["name"], "bold"), f"  {entry['title']}: {_sentence(entry['task'])}"))
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", width=9)
        table.add_column()
        languages = ", ".join(entry["languages"]) or "any"
        table.add_row("language", languages)
        table.add_row("size", Text("\n".join(_sizes(entry["official_counts"]))))
        table.add_row("licence", entry["license"] + (", do not redistribute" if entry["redistribution"] else ""))
        table.add_row("to fetch", Text(_sentence(entry["download"] or "nothing")))
        if entry["options"]:
            table.add_row("options", Text("\n".join(f"--option {key}=…" for key in entry["options"])))
        console.print(Padding(table, (0, 0, 1, 2)))


def _sizes(official_counts: dict[str, Any]) -> list[str]:
    """One line of known row counts for each layout of a release."""
    if "entities" in official_counts or not official_counts:
        return [_size(official_counts)]
    return [f"{layout}: {_size(counts)}" for layout, counts in official_counts.items()]


def _size(counts: dict[str, Any]) -> str:
    parts = []
    for config, splits in counts.items():
        if splits and None not in splits.values():
            per_split = ", ".join(f"{count:,} {split}" for split, count in splits.items())
            parts.append(f"{sum(splits.values()):,} {config}" + (f" ({per_split})" if len(splits) > 1 else ""))
    return "; ".join(parts) or "unknown"


def _print_report(
    console: Any, report: CheckReport, title: str, official: dict[str, dict[str, int | None]] | None = None
) -> None:
    """Prints counts, problems and leakage as tables.

    Args:
        console (`rich.console.Console`): The console to print to.
        report ([`~hf_mel.building.report.CheckReport`]): The report.
        title (`str`): Title of the first table.
        official (`dict`, *optional*): Official numbers of rows, by configuration and split.
    """
    from rich.table import Table
    from rich.text import Text

    from hf_mel.building.dataset_card import leakage_rows

    counts = Table("configuration", "split", title=Text(safe_text(title)))
    for column in ("rows", *(["official"] if official else []), "images", "without image"):
        counts.add_column(column, justify="right")
    for config, splits in report.counts.items():
        for split, rows in splits.items():
            images = report.images[config][split]
            expected = (official or {}).get(config, {}).get(split)
            cells = ["?" if expected is None else f"{expected:,}"] if official else []
            cells += [f"{images['images']:,}", f"{images['rows_without']:,}"]
            counts.add_row(Text(safe_text(config)), Text(safe_text(split)), f"{rows:,}", *cells)
    console.print(counts)
    problems = Table("problem", title="problems")
    problems.add_column("count", justify="right")
    problems.add_column("first")
    for kind, entries in sorted(report.problems.items()):
        file, row, _ = entries[0]
        first = Text(safe_text(f"{file}, row {row}" if row else file))
        problems.add_row(
            Text(_problem_words(kind), "bold red" if kind in report.fatal else ""),
            f"{getattr(report, 'left_out', {}).get(kind, len(entries)):,}",
            first,
        )
    for kind, count in getattr(report, "left_out", {}).items():
        if kind not in report.problems:
            problems.add_row(_problem_words(kind), f"{count:,}")
    for kind, count in report.duplicates.items():
        if count:
            problems.add_row(_problem_words(kind), f"{count:,}")
    if problems.row_count:
        console.print(problems)
    if leakage := leakage_rows(report.leakage, report.counts):
        table = Table("configuration", "split", "mentions whose", title="leakage")
        table.add_column("count", justify="right")
        for row_of_words in leakage:
            table.add_row(*(Text(safe_text(words)) for words in row_of_words))
        console.print(table)


def _problem_words(kind: str) -> str:
    return kind.replace("_", " ")


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."

"""`hf-mel bench`: runs a grid of systems, data sets and seeds, and compares results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


class _RunByDefault(TyperGroup):
    """A group whose first word may be a suite in place of a command: `hf-mel bench SUITE` is `hf-mel bench run SUITE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts `run` before arguments that start with no command."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Train and evaluate a grid of systems, data sets and seeds by one protocol, and compare them with tests of "
    "significance.\n\n"
    "[b]hf-mel bench SUITE[/b] is [b]hf-mel bench run SUITE[/b]. A suite is a YAML file, or one that comes with hf_mel. "
    "Needs the extra [b]bench[/b].",
    no_args_is_help=True,
)


@app.command()
def run(
    suite: Annotated[
        str, typer.Argument(help="A suite file, or the name of a suite that comes with hf_mel, such as [b]flags[/b].")
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the suite. Repeat it to change several."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs: RUNS/<suite>/<cell>.")] = Path("runs/bench"),
    results: Annotated[
        Path, typer.Option(help="Folder of the results: RESULTS/<suite>.json, .md, .tex, .csv, .png.")
    ] = (Path("results")),
    keep: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            exists=True,
            help="Results of this suite from before, such as [b]results/SUITE.json[/b]: rows whose recipe, data and models are "
            "the same are taken from them and not run.",
        ),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run the cells again that failed before.")] = False,
    launch: Annotated[
        str | None,
        typer.Option(
            help="Words before [b]-m hf_mel[/b] for every run, such as [b]accelerate launch --num_processes 2[/b]. "
            "Default: Python, or accelerate launch with one process for each GPU if there are several."
        ),
    ] = None,
    delete_models: Annotated[
        bool, typer.Option("--delete-models", help="Delete the weights of a cell's model after its evaluation.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="List the cells and their state, and run nothing.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the results of the cells that are finished, and run nothing.")
    ] = False,
) -> None:
    """Train and evaluate every cell of a suite that is not finished, then write its tables.

    A cell is one system on one data set with one seed: one [b]hf-mel train[/b] and one [b]hf-mel evaluate[/b]. Repeat the
    command after an interruption: finished cells are not run again, and an interrupted training goes on from its last
    checkpoint. A cell whose recipe, data or models have changed is run again. A cell that fails stays empty, with the
    reason, and the others go on. Several processes may run one suite.

    Every row has its protocol. Rows of different protocols never share a table.

    Examples:

      hf-mel bench flags --list

      hf-mel bench flags --set 'seeds=[0]' --set budget.max_steps=200 --set data.flags.dataset=/data/flags_mel

      hf-mel bench suites/wikimel-text.yaml --runs runs/bench --results results

      hf-mel bench flags --keep results/flags.json   # runs only what was added or changed
    """
    from rich.console import Console

    from hf_mel.bench.grid import data_versions, launcher_words, run_command, run_suite
    from hf_mel.bench.kept_rows import rows_to_keep
    from hf_mel.bench.significance import check_packages
    from hf_mel.bench.suite import Suite
    from hf_mel.bench.suite_results import suite_results
    from hf_mel.bench.suite_tables import write_suite
    from hf_mel.cli.printing import print_plain, show_logs

    with show_logs():
        loaded = Suite.load(suite, overrides or ())
        folder = runs / loaded.name
        kept = {} if keep is None else rows_to_keep(loaded, folder, keep, data_versions(loaded))
        if show:
            _list_cells(loaded, folder, kept)
            return
        if loaded.compare_with:
            check_packages()  # before hours of training
        _check_writable("--runs", folder)
        _check_writable("--results", results)
        progress = None
        if not report:
            runner = run_command(launcher_words(launch))
            try:
                progress = run_suite(
                    loaded, folder, run=runner, retry=retry, delete_models=delete_models, kept=kept, log=print_plain
                )
            except KeyboardInterrupt:
                typer.echo("Interrupted. Repeat the command to go on: what is finished is kept.", err=True)
                raise
        written = suite_results(loaded, folder, _command(suite, overrides or ()), kept)
        files = write_suite(written, results)
    _print_tables(written)
    console = Console()
    console.print(f"Results: {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    if progress is not None and (progress.failed or progress.left):
        console.print(
            f"{progress.finished} cells are finished, {progress.failed} are empty (reasons above and in the notes of the "
            f"tables; --retry runs them again), {progress.left} were stopped or are run by another process.",
            markup=False,
        )


@app.command()
def compare(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="A.json B.json …",
            help="Results of [b]hf-mel evaluate --output A.json --predictions A.jsonl[/b]. The first is the one to compare "
            "with. Several seeds of one system: NAME=A0.json,A1.json,A2.json",
        ),
    ],
    output: Annotated[Path | None, typer.Option(dir_okay=False, help="The JSON file for the comparison.")] = None,
) -> None:
    """Compare results of hf-mel evaluate by a paired bootstrap and a paired t-test over the same mentions.

    p values are corrected for the number of comparisons by Holm. Results of different protocols are refused: other data,
    another knowledge base, another treatment of ties, or other candidate lists.

    Examples:

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --output a.json --predictions a.jsonl

      hf-mel bench compare a.json b.json c.json

      hf-mel bench compare mimic=m0.json,m1.json mine=x0.json,x1.json --output comparison.json
    """
    from hf_mel.bench.side_by_side import compare_results
    from hf_mel.cli.printing import message_console
    from hf_mel.evaluation.tables import write_results

    compared = compare_results(_named_files(files))
    console = message_console(output)
    _print_comparison(compared, console)
    if output is not None:
        write_results(compared, output)
        console.print(f"Comparison: {output}", markup=False)


@app.command()
def cases(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="A.jsonl B.jsonl …", help="Predictions of [b]hf-mel evaluate --predictions[/b], or NAME=FILE."
        ),
    ],
    dataset: Annotated[str, typer.Option(help="The data set: a folder, or a data set on the Hub.")],
    split: Annotated[str, typer.Option(help="Split of the mentions.")] = "test",
    config: Annotated[str, typer.Option(help="Configuration of the mentions.")] = "mentions",
    top: Annotated[int, typer.Option(min=1, help="Candidates of each system.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Number of cases that are printed.")] = 5,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The JSON file for all cases, with their texts and names.")
    ] = None,
) -> None:
    """Show mentions on which systems decide differently, with the best candidates of each side by side.

    Cases on which the first system is right come first.

    Example:

      hf-mel bench cases mimic=a.jsonl mine=b.jsonl --dataset data/flags_mel --limit 10 --output cases.json
    """
    from hf_mel.bench.side_by_side import cases as cases_of
    from hf_mel.cli.printing import message_console, print_plain
    from hf_mel.data.loading import load_entities, load_mentions
    from hf_mel.evaluation.tables import write_results

    systems = {name: paths[0] for name, paths in _named_files(files).items()}
    listed = cases_of(systems, top)
    mentions, entities = load_mentions(dataset, split, config=config), load_entities(dataset)
    names = dict(zip(entities["entity_id"], entities["name"], strict=True))
    columns = mentions.select_columns(["mention_id", "mention", "text"])
    row_of = {mention_id: row for row, mention_id in enumerate(columns["mention_id"])}
    console = message_console(output)
    for number, case in enumerate(listed):
        row = columns[row_of[case["mention_id"]]] if case["mention_id"] in row_of else {}
        case |= {"mention": row.get("mention"), "text": row.get("text"), "name": names.get(case["entity_id"])}
        for of_system in case["systems"].values():
            for candidate in of_system["candidates"]:
                candidate["name"] = names.get(candidate["entity_id"])
        if number < limit:
            print_plain(_case_text(case), console)
    console.print(f"{len(listed):,} of {len(mentions):,} mentions are cases.", markup=False)
    if output is not None:
        write_results(listed, output)
        console.print(f"Cases: {output}", markup=False)


def _case_text(case: dict[str, Any]) -> str:
    lines = [
        f"{case['mention'] or '(no mention)'} in: {case['text'] or ''}",
        f"  right: {case['name'] or case['entity_id']}",
    ]
    for name, of_system in case["systems"].items():
        candidates = (f"{item['name'] or item['entity_id']} ({item['score']:.3f})" for item in of_system["candidates"])
        lines.append(f"  {name}: {' · '.join(candidates) or 'no candidates'}")
    return "\n".join([*lines, ""])


def _named_files(words: Sequence[str]) -> dict[str, list[Path]]:
    """Returns name → files of arguments such as `A.json` and `NAME=A0.json,A1.json`."""
    systems: dict[str, list[Path]] = {}
    for word in words:
        name, named, value = word.partition("=")
        if not named or Path(word).is_file():
            name, paths = word, [Path(word)]
        else:
            paths = [Path(file) for file in value.split(",")]
        if name in systems:
            raise typer.BadParameter(f"{name!r} is given twice.", param_hint="FILES")
        systems[name] = paths
    return systems


def _command(suite: str, overrides: Sequence[str]) -> str:
    import shlex

    return shlex.join(["hf-mel", "bench", suite, *(word for value in overrides for word in ("--set", value))])


def _check_writable(option: str, folder: Path) -> None:
    """Raises a `MelError` if nothing can be written to a folder, which is created."""
    import tempfile

    from hf_mel.errors import MelError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MelError(
            f"Nothing can be written to the folder ({error}).", file=folder, remedy=f"Choose another {option}."
        ) from error


def _list_cells(suite: Any, folder: Path, kept: Collection[Any]) -> None:
    from hf_mel.bench.cells import empty_reason, grid_cells, prepared_cells
    from hf_mel.bench.grid import cell_state, data_versions
    from hf_mel.cli.printing import print_plain

    versions = data_versions(suite)
    cells = grid_cells(suite, folder)
    listed: list[Any] = [*prepared_cells(suite, folder), *cells]
    for cell in listed:
        if cell in cells and cell.row in kept:
            state = "kept"
        else:
            reason = empty_reason(cell) if cell in cells else None
            state = f"empty: {reason}" if reason else cell_state(cell, versions)
        print_plain(f"{state:<12} {cell.label}")
    print_plain(f"{len(cells)} cells, {len(suite.prepare)} prepared runs, in {folder}")


def _print_tables(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hf_mel.bench.suite_results import tables_of
    from hf_mel.bench.suite_tables import difference_text, metrics_table
    from hf_mel.evaluation.tables import display_name
    from hf_mel.terminal import safe_text

    console = Console()
    for rows in tables_of(results["rows"]):
        main = metrics_table(rows)
        table = Table(title=Text(safe_text(main.caption)), caption_justify="left")
        table.caption = Text(safe_text("\n".join(main.notes)))
        for number, heading in enumerate(main.header):
            table.add_column(Text(safe_text(heading)), justify="left" if number == 0 else "right")
        for number, row in enumerate(main.rows):
            styles = ("bold" if (number, column) in main.best else "" for column in range(len(row)))
            table.add_row(*(Text(safe_text(text), style) for text, style in zip(row, styles, strict=True)))
        console.print(table)
        names = {row["name"] for row in rows}
        for test in results["tests"]:
            if test["data"] == rows[0]["data"] and test["row"] in names:
                label = f"{test['row']} − {test['against']}, {display_name(test['metric'])}: {difference_text(test)}"
                console.print(safe_text(label), markup=False, highlight=False, soft_wrap=True)


def _print_comparison(compared: dict[str, Any], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from hf_mel.bench.comparability import protocol_line
    from hf_mel.bench.suite_tables import shown
    from hf_mel.evaluation.tables import display_name
    from hf_mel.terminal import safe_text

    columns = list(compared["rows"][0]["metrics"])
    table = Table("", title=Text(protocol_line(compared["protocol"])))
    for name in columns:
        table.add_column(display_name(name), justify="right")
    for row in compared["rows"]:
        table.add_row(Text(safe_text(row["name"])), *(shown(name, row["metrics"].get(name)) for name in columns))
    console.print(table)
    tests = Table(
        "", "metric", title=Text(safe_text(f"Differences from {compared['tests'][0]['against']}, in points"))
    )
    for heading in ("difference", "95 % interval", "better on", "worse on", "p bootstrap", "p t-test", "corrected"):
        tests.add_column(heading, justify="right")
    for test in compared["tests"]:
        tests.add_row(
            Text(safe_text(test["row"])),
            display_name(test["metric"]),
            f"{100 * test['difference']:+.2f}",
            f"{100 * test['low']:+.2f} to {100 * test['high']:+.2f}",
            f"{test['num_better']:,}",
            f"{test['num_worse']:,}",
            f"{test['p_bootstrap']:.4f}",
            f"{test['p_t']:.4f}",
            f"{test['p_bootstrap_corrected']:.4f}, {test['p_t_corrected']:.4f}",
        )
    console.print(tests)

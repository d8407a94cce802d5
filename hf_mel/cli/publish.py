"""`hf-mel publish`: uploads folders to repositories on the Hub. The default is a dry run; `--yes` uploads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_mel.cli.printing import print_plain
from hf_mel.terminal import safe_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hf_mel.hub.publish import Comparison, Publication

app = typer.Typer(
    help="Publish models, data sets, knowledge bases, metrics and Spaces on the Hub.\n\n"
    "Without [b]--yes[/b] nothing is uploaded; the command lists the files it would upload and their sizes. With it, all "
    "files are uploaded in one commit. Publishing the same files again does nothing. Log in first with [b]hf auth "
    "login[/b].",
    no_args_is_help=True,
)


def _check_gated(value: str | None) -> str | None:
    from hf_mel.hub.publish.upload import GATED

    if value is not None and value not in GATED:
        raise typer.BadParameter(f"{value!r} is not one of: {', '.join(GATED)}.")
    return value


_Repo = Annotated[str, typer.Argument(help="The repository, OWNER/NAME. It is created if it does not exist.")]
_Yes = Annotated[bool, typer.Option("--yes/--dry-run", help="Upload the files, or only list them (the default).")]
_Private = Annotated[
    bool,
    typer.Option("--private", help="Make the repository private. A private repository is never made public."),
]
_Gated = Annotated[
    str | None,
    typer.Option(
        help="Require readers to request access: [b]auto[/b] grants every request, [b]manual[/b] leaves the decision to "
        "you.",
        callback=_check_gated,
    ),
]
_Message = Annotated[str | None, typer.Option(help="Title of the commit.")]


@app.command()
def model(
    run: Annotated[Path, typer.Argument(help="A run folder, or any model folder with a README.md.")],
    repo: _Repo,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Hub id of the data set the model was trained on, if it was trained on a local build of it."
        ),
    ] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of that data set.")] = None,
    yes: _Yes = False,
    private: _Private = False,
    gated: _Gated = None,
    message: _Message = None,
) -> None:
    """Publish a trained model: weights, configuration, processor, code, card and results.

    The card shows every [b]results_*.json[/b] in the run folder that was measured on these weights.

    Examples:

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --output runs/mimic_flags/results_test.json

      hf-mel publish model runs/mimic_flags ORG/mimic-flags --dataset ORG/flags_mel --yes
    """
    from hf_mel.hub.publish import model_publication

    _publish(
        model_publication(run, repo, dataset=dataset, dataset_revision=dataset_revision), yes, private, gated, message
    )


@app.command()
def dataset(
    folder: Annotated[Path, typer.Argument(help="A folder written by [b]hf-mel data build[/b].")],
    repo: _Repo,
    i_hold_the_rights: Annotated[
        bool,
        typer.Option("--i-hold-the-rights", help="Publish although the terms of the release restrict redistribution."),
    ] = False,
    yes: _Yes = False,
    private: _Private = False,
    gated: _Gated = None,
    message: _Message = None,
) -> None:
    """Publish a built data set: its Parquet files, its card and its report.

    Example:

      hf-mel publish dataset data/flags_mel ORG/flags_mel --yes
    """
    from hf_mel.hub.publish import dataset_publication

    _publish(dataset_publication(folder, repo, i_hold_the_rights=i_hold_the_rights), yes, private, gated, message)


@app.command()
def kb(
    folder: Annotated[Path, typer.Argument(help="A folder written by [b]hf-mel kb build[/b].")],
    repo: _Repo,
    yes: _Yes = False,
    private: _Private = False,
    gated: _Gated = None,
    message: _Message = None,
) -> None:
    """Publish a knowledge base for [b]hf-mel link MODEL --kb ORG/NAME[/b].

    Example:

      hf-mel publish kb kb/flags_mel ORG/flags-kb --yes
    """
    from hf_mel.hub.publish import kb_publication

    with tempfile.TemporaryDirectory(prefix="hf_mel-publish-") as work:
        _publish(kb_publication(folder, repo, work=work), yes, private, gated, message)


@app.command()
def metric(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder of the metric, or [b]mel_ranking[/b] or [b]mel_annotation[/b], which come with hf_mel."
        ),
    ],
    repo: _Repo,
    yes: _Yes = False,
    private: _Private = False,
    message: _Message = None,
) -> None:
    """Publish a metric as a Space that [b]evaluate.load("ORG/NAME")[/b] reads.

    Example:

      hf-mel publish metric mel_ranking ORG/mel_ranking --yes
    """
    from hf_mel.hub.publish import space_publication

    _publish(space_publication(folder, repo, metric=True), yes, private, None, message)


@app.command()
def space(
    folder: Annotated[str, typer.Argument(help="Folder of the Space, or the name of one that comes with hf_mel.")],
    repo: _Repo,
    yes: _Yes = False,
    private: _Private = False,
    message: _Message = None,
) -> None:
    """Publish a Space.

    Example:

      hf-mel publish space spaces/my_demo ORG/my-demo --yes
    """
    from hf_mel.hub.publish import space_publication

    _publish(space_publication(folder, repo), yes, private, None, message)


def _publish(publication: Publication, yes: bool, private: bool, gated: Any, message: str | None) -> None:
    from huggingface_hub import HfApi

    from hf_mel.errors import HubError
    from hf_mel.hub.publish.upload import Change, Comparison, compare, publish

    api = HfApi(library_name="hf_mel")
    url = publication.url(api.endpoint)
    if yes:
        commit, comparison = publish(publication, private=private, gated=gated, message=message, api=api)
        _print_changes(publication, url, comparison, private, gated)
        if commit is None:
            print_plain(f"Nothing to change: {url} already holds these files.")
        else:
            print_plain(f"Published in one commit, {commit[:12]}: {url}")
        return
    try:
        comparison = compare(publication, api=api)
        status = f"Account: {_account(api)}."
    except HubError as error:
        comparison = Comparison([Change(path, "new", publication.size(path)) for path in sorted(publication.files)])
        status = f"Not compared with the repository: {error}"
    _print_changes(publication, url, comparison, private, gated)
    print_plain(status)
    if comparison.is_empty and comparison.exists:
        print_plain("Nothing would change.")
    else:
        print_plain("This was a dry run: nothing was uploaded. Add --yes to publish.")


def _account(api: HfApi) -> str:
    from huggingface_hub import get_token

    from hf_mel.errors import HubError
    from hf_mel.hub_errors import hub_errors

    if get_token() is None:
        return "none; log in with hf auth login"
    try:
        with hub_errors("your account"):
            return str(api.whoami()["name"])
    except HubError as error:
        return f"unknown ({error.message})"


def _print_changes(
    publication: Publication, url: str, comparison: Comparison, private: bool, gated: str | None
) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    changed = [change for change in comparison.changes if change.kind != "unchanged"]
    unchanged = [change for change in comparison.changes if change.kind == "unchanged"]
    print_plain(f"{publication.kind} → {url}")
    table = Table()
    table.add_column("")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for change in changed:
        table.add_row(
            change.kind, Text(safe_text(change.path)), "" if change.kind == "deleted" else decimal(change.size)
        )
    if unchanged:
        table.add_row("unchanged", _count(unchanged), decimal(sum(change.size for change in unchanged)))
    Console().print(table)
    uploads = [change for change in changed if change.kind != "deleted"]
    print_plain(
        f"{_count(uploads)}, {decimal(comparison.upload_bytes)}, to upload; {_visibility(comparison, private, gated)}."
    )
    print_plain(f"Licence: {publication.license or 'none named'}.")
    for name, reason in publication.left_out.items():
        print_plain(f"Left out: {name} ({reason}).")
    for note in publication.notes:
        print_plain(f"Note: {note}")


def _visibility(comparison: Comparison, private: bool, gated: str | None) -> str:
    if comparison.exists:
        state = "private" if comparison.private else "public"
        if private and not comparison.private:
            state += ", to become private"
        if comparison.gated:
            state += f", gated ({comparison.gated})"
        if gated is not None and gated != comparison.gated:
            state += f", to become gated ({gated})"
        return f"the repository exists and is {state}"
    state = ("private" if private else "public") + (f", gated ({gated})" if gated is not None else "")
    if comparison.exists is None:
        return f"a new repository would be {state}"
    return f"a new repository, {state}"


def _count(changes: list[Any]) -> str:
    return f"{len(changes):,} {'file' if len(changes) == 1 else 'files'}"

"""`hf-mel publish`: folders → repositories of the Hub. Shows what would go up; `--yes` does it."""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hf_mel.hub.publish.publication import Publication
    from hf_mel.hub.publish.upload import Comparison

app = typer.Typer(
    help="Publish models, data sets, knowledge bases, metrics and Spaces on the Hub.\n\n"
    "Without [b]--yes[/b], nothing is uploaded: you see which files would go up, and how large they are. A publication "
    "is one commit or none, and publishing the same again does nothing. Log in first: [b]hf auth login[/b].",
    no_args_is_help=True,
)


class Gated(str, Enum):
    """Who is let in that asks."""

    AUTO = "auto"
    MANUAL = "manual"


_Repo = Annotated[str, typer.Argument(help="The repository, OWNER/NAME. It is made if it is not there.")]
_Yes = Annotated[
    bool, typer.Option("--yes/--dry-run", help="Upload, or only show what would be uploaded (the default).")
]
_Private = Annotated[
    bool, typer.Option("--private", help="Only you, or the organisation, can see it. Nothing private is ever opened.")
]
_Gated = Annotated[
    Gated | None,
    typer.Option(help="Readers have to ask: [b]auto[/b] lets in all who do, [b]manual[/b] those you accept."),
]
_Message = Annotated[str | None, typer.Option(help="Title of the commit.")]


@app.command()
def model(
    run: Annotated[Path, typer.Argument(help="A run folder, or any model folder with a README.md.")],
    repo: _Repo,
    dataset: Annotated[
        str | None,
        typer.Option(help="Where the data set it was trained on is on the Hub, if it was trained on a local build."),
    ] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of that data set.")] = None,
    yes: _Yes = False,
    private: _Private = False,
    gated: _Gated = None,
    message: _Message = None,
) -> None:
    """Publish a trained model: weights, configuration, processor, its code, a card and its results.

    The card has the results of every [b]results_*.json[/b] in the run folder that was measured on these weights.

    Examples:

      hf-mel evaluate runs/mimic_flags --dataset data/flags_mel --output runs/mimic_flags/results_test.json

      hf-mel publish model runs/mimic_flags ORG/mimic-flags --dataset ORG/flags_mel --yes
    """
    from hf_mel.hub.publish.model_repo import model_publication

    _publish(
        model_publication(run, repo, dataset=dataset, dataset_revision=dataset_revision), yes, private, gated, message
    )


@app.command()
def dataset(
    folder: Annotated[Path, typer.Argument(help="A folder written by [b]hf-mel data build[/b].")],
    repo: _Repo,
    i_hold_the_rights: Annotated[
        bool,
        typer.Option("--i-hold-the-rights", help="Publish although its terms do not let everybody pass it on."),
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
    from hf_mel.hub.publish.dataset_repo import dataset_publication

    _publish(dataset_publication(folder, repo, i_hold_the_rights=i_hold_the_rights), yes, private, gated, message)


@app.command()
def kb(
    folder: Annotated[Path, typer.Argument(help="A knowledge base: [b]hf-mel kb build[/b].")],
    repo: _Repo,
    yes: _Yes = False,
    private: _Private = False,
    gated: _Gated = None,
    message: _Message = None,
) -> None:
    """Publish a knowledge base, for [b]hf-mel link MODEL --kb ORG/NAME[/b].

    Example:

      hf-mel publish kb kb/flags_mel ORG/flags-kb --yes
    """
    from hf_mel.hub.publish.kb_repo import kb_publication

    with tempfile.TemporaryDirectory(prefix="hf_mel-publish-") as work:
        _publish(kb_publication(folder, repo, work=work), yes, private, gated, message)


@app.command()
def metric(
    folder: Annotated[str, typer.Argument(help="A metric's folder, or [b]mel_ranking[/b], which comes with hf_mel.")],
    repo: _Repo,
    yes: _Yes = False,
    private: _Private = False,
    message: _Message = None,
) -> None:
    """Publish a metric as a Space that [b]evaluate.load("ORG/NAME")[/b] reads.

    Example:

      hf-mel publish metric mel_ranking ORG/mel_ranking --yes
    """
    from hf_mel.hub.publish.space_repo import space_publication

    _publish(space_publication(folder, repo, metric=True), yes, private, None, message)


@app.command()
def space(
    folder: Annotated[str, typer.Argument(help="A Space's folder, or the name of one that comes with hf_mel.")],
    repo: _Repo,
    yes: _Yes = False,
    private: _Private = False,
    message: _Message = None,
) -> None:
    """Publish a Space.

    Example:

      hf-mel publish space spaces/my_demo ORG/my-demo --yes
    """
    from hf_mel.hub.publish.space_repo import space_publication

    _publish(space_publication(folder, repo), yes, private, None, message)


def _publish(publication: Publication, yes: bool, private: bool, gated: Gated | None, message: str | None) -> None:
    from huggingface_hub import HfApi

    from hf_mel.errors import HubError
    from hf_mel.hub.publish.upload import compare, offline_comparison, publish

    api = HfApi(library_name="hf_mel")
    wanted: Any = None if gated is None else gated.value
    if yes:
        result = publish(publication, private=private, gated=wanted, message=message, api=api)
        _show(publication, result.comparison, private, wanted, api.endpoint)
        if result.commit is None:
            _print(f"Nothing to change: {result.url} holds exactly this.")
        else:
            _print(f"Published in one commit, {result.commit[:12]}: {result.url}")
        return
    reason = None
    try:
        comparison = compare(publication, api=api)
    except HubError as error:
        comparison, reason = offline_comparison(publication), error
    _show(publication, comparison, private, wanted, api.endpoint)
    if reason is not None:
        _print(f"Not compared with what is there: {reason}")
    else:
        _print(f"Account: {_account(api)}.")
    if comparison.is_empty and comparison.exists:
        _print("Nothing would change.")
    else:
        _print("This was a dry run: nothing was uploaded. Give --yes to publish.")


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


def _show(publication: Publication, comparison: Comparison, private: bool, gated: str | None, endpoint: str) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    kind = "" if publication.repo_type == "model" else f"{publication.repo_type}s/"
    changed = [change for change in comparison.changes if change.what != "unchanged"]
    same = [change for change in comparison.changes if change.what == "unchanged"]
    _print(f"{publication.kind} → {endpoint}/{kind}{publication.repo_id}")
    table = Table()
    table.add_column("")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for change in changed:
        table.add_row(change.what, Text(change.path), "" if change.what == "deleted" else decimal(change.size))
    if same:
        table.add_row("unchanged", f"{_files(len(same))}", decimal(sum(change.size for change in same)))
    Console().print(table)
    uploads = sum(change.what != "deleted" for change in changed)
    _print(
        f"{_files(uploads)}, {decimal(comparison.upload_bytes)}, to upload; {_visibility(comparison, private, gated)}."
    )
    _print(f"Licence: {publication.license or 'none named'}.")
    for name, reason in publication.left_out.items():
        _print(f"Left out: {name} ({reason}).")
    for note in publication.notes:
        _print(f"Note: {note}")


def _visibility(comparison: Comparison, private: bool, gated: str | None) -> str:
    if comparison.exists:
        state = "private" if comparison.private else "public"
        if private and not comparison.private:
            state += ", to become private"
        if comparison.gated:
            state += f", gated ({comparison.gated})"
        if gated is not None and gated != comparison.gated:
            state += f", to become gated ({gated})"
        return f"the repository is there, {state}"
    new = "private" if private else "public"
    if gated is not None:
        new += f", gated ({gated})"
    return f"a new repository, {new}" if comparison.exists is False else f"if it is new, the repository will be {new}"


def _files(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)

"""`hf-mel adapt`: fits a model to a knowledge base, without a labelled mention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hf_mel.cli.options import Column, IgnoreOtherColumns, InvertedNames, ModelArgument

_CONFIGURED = {"limit": "adaptation.limit", "seed": "training.seed"}


def adapt(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="The run folder to write.")],
    entities: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl, .ndjson, .json, .csv or .tsv file of your own entities, as for [b]hf-mel kb build[/b]."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A data set: a folder, or one on the Hub. Its entities and posts are read, no mention."),
    ] = None,
    kb: Annotated[
        str | None,
        typer.Option(help="A knowledge base: a folder that [b]hf-mel kb build[/b] wrote, or one on the Hub."),
    ] = None,
    column: Column = None,
    ignore_other_columns: IgnoreOtherColumns = False,
    inverted_names: InvertedNames = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of training mentions. Default: that of the recipe, 4000.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything that is drawn. Default: 0.")] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe. Repeat it to change several."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run. A finished run is not changed.")
    ] = False,
) -> None:
    """Adapt a model to your entities without a label: choose how much a name counts beside the model's score.

    The weight of the names is chosen by mentions that are made of the entities: names, aliases and parts of names, among
    entities with similar ones. It is kept in the new model's configuration, and every command uses it. Nothing is trained.
    A model that finds the made mentions as well without names stays as it is.

    MODEL is a text encoder such as sentence-transformers/all-MiniLM-L6-v2, or a retriever that you trained. For the latter, the
    command needs --set adaptation.names=true: where texts name entities by other words, such as "the republic", the chosen
    weight is too high, and labelled mentions choose it better. The recipe that the command fills in is kept in the run
    folder: [b]adapt-encoder[/b] or [b]adapt-model[/b].

    Made mentions are no real ones. Measure with [b]hf-mel evaluate[/b] on some hundred mentions of yours. With more of them,
    [b]hf-mel evaluate --name-weight auto --save-name-weight[/b] chooses the weight better, and [b]hf-mel train[/b] trains. Training
    on made mentions (--set adaptation.train=true) made models worse wherever we measured it.

    Examples:

      hf-mel adapt sentence-transformers/all-MiniLM-L6-v2 --entities mine.jsonl --output runs/mine

      hf-mel adapt sentence-transformers/all-MiniLM-L6-v2 --dataset data/mine --seed 1 --output runs/mine-1

      hf-mel adapt runs/mimic-text_wikimel --kb kb/mine --set adaptation.names=true --output runs/mine-2
    """
    given = [source for source in (entities, dataset, kb) if source is not None]
    if len(given) != 1:
        raise typer.BadParameter("Give one of --entities, --dataset and --kb.", param_hint="--entities")
    if entities is None and (column or ignore_other_columns or inverted_names):
        raise typer.BadParameter("Give a file of --entities, or leave this out.", param_hint="--column")

    from accelerate import PartialState

    from hf_mel.cli.printing import print_adaptation, show_logs
    from hf_mel.training.adaptation import adaptation_recipe
    from hf_mel.training.run import run_recipe

    columns = None if entities is None else _columns(entities, column, ignore_other_columns, inverted_names)
    source = str(given[0]) if kb is None else _kb_folder(kb)
    values = {"limit": limit, "seed": seed}
    sets = [f"{_CONFIGURED[name]}={value}" for name, value in values.items() if value is not None]
    with show_logs():
        recipe = adaptation_recipe(
            model, source, name=output.resolve().name, columns=columns, overrides=[*sets, *(overrides or ())]
        )
        folder = run_recipe(recipe, output=output, resume=resume)
    if not PartialState().is_main_process:
        return
    print_adaptation(folder, source)


def _columns(
    entities: Path, column: list[str] | None, ignore_other_columns: bool, inverted_names: bool
) -> dict[str, Any] | None:
    """Checks the file of entities before a model is loaded, and returns the arguments of its column mapping."""
    from hf_mel.data.entity_files import check_entity_rows
    from hf_mel.row_columns import ColumnMapping

    mapping = ColumnMapping.parse(column or (), ignore_others=ignore_other_columns, inverted_names=inverted_names)
    check_entity_rows(entities, mapping)
    arguments = {
        "sources": {target: list(sources) for target, sources in mapping.sources.items()},
        "ignore_others": ignore_other_columns,
        "inverted_names": inverted_names,
    }
    return {name: value for name, value in arguments.items() if value} or None


def _kb_folder(kb: str) -> str:
    """Returns the folder of a knowledge base, downloaded if it is on the Hub."""
    from hf_mel.kb.knowledge_base import KnowledgeBase

    if Path(kb).exists():
        return kb
    return str(KnowledgeBase.from_pretrained(kb).path)

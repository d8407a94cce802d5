"""Arguments and options of the command line that several verbs share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_mel.kb.indexes import Kind

if TYPE_CHECKING:
    from accelerate import PartialState

    from hf_mel.row_columns import ColumnMapping

ModelArgument = Annotated[
    str, typer.Argument(help="A run folder, a model folder, or a model or text encoder on the Hub.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code from the model's repository. Needed for methods not in hf_mel."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where to compute, for instance cpu or cuda:1. Default: a GPU if available.")
]
MentionConfig = Annotated[str, typer.Option(help="Configuration of the mentions, for a data set with several.")]
Split = Annotated[str, typer.Option(help="Split of the mentions: train, validation or test.")]
Index = Annotated[
    Kind,
    typer.Option(
        help="How to find entities. [b]exact[/b] finds the best of all of them. It scores every one, or those that [b]codes[/b] "
        "([b]hf-mel kb index --kind codes[/b]) do not prove to be worse. [b]faiss-pq[/b], [b]faiss-flat[/b] and "
        "[b]milvus[/b] score only the candidates that an index finds; build it with [b]hf-mel kb index[/b]."
    ),
]
Certify = Annotated[
    bool,
    typer.Option(
        "--certify",
        help="Insist on proven answers and on the codes that prove them: it is an error if there are none, or if they do not "
        "fit. Without it, [b]exact[/b] scores every entity then.",
    ),
]
FirstStage = Annotated[
    int | None,
    typer.Option(min=1, help="Number of candidates that an index finds and the model scores. Default: 256."),
]
NameWeight = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Weight of the names: it is multiplied by the similarity of the mention and the best name or alias of an "
        "entity, in \\[0, 1], and added to the score of the model. [b]hf-mel evaluate --name-weight auto[/b] chooses one. "
        "Default: the weight of the model, if any.",
    ),
]
Bf16 = Annotated[
    bool,
    typer.Option(
        "--bf16",
        help="Encode mentions in bfloat16. Only a processor or GPU with native bfloat16 gets faster, others get slower.",
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        metavar="FILTER",
        help="Rank only the entities that pass a filter over columns of the knowledge base, for instance "
        "[b]\"type = 'human' and born < 1900\"[/b]: =, !=, <, <=, >, >=, in, is null, and, or, not.",
    ),
]
Soft = Annotated[
    str | None,
    typer.Option(
        metavar="FILTER", help="Give the entities that pass a filter --soft-bonus, in place of leaving others out."
    ),
]
SoftBonus = Annotated[float | None, typer.Option(help="Bonus of --soft, in the units of the scores.")]
LinkedKb = Annotated[
    str | None,
    typer.Option(help="A knowledge base that this model built: a folder (hf-mel kb build), or one on the Hub."),
]
LinkedEntities = Annotated[
    Path | None,
    typer.Option(
        help="A file of entities in place of --kb, as for [b]hf-mel kb build[/b]. They are encoded each time."
    ),
]
TextImage = Annotated[Path | None, typer.Option(help="The image that belongs to the text.")]
NilThreshold = Annotated[
    float | None,
    typer.Option(help="A mention is NIL if its best score is lower. Default: the threshold of the model, if any."),
]
LinkPrecision = Annotated[
    float | None,
    typer.Option(
        help="Make only the links that are sure enough for this precision, such as [b]0.95[/b], on mentions like those "
        "of the model's validation split. The others are for review: their [b]entity_id[/b] is null.",
    ),
]
RerankerOption = Annotated[
    str | None,
    typer.Option(help="A reranker that reorders the best candidates: a run folder or a model."),
]
RerankK = Annotated[int, typer.Option(min=1, help="Number of candidates that the reranker reorders.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
MentionsPerPass = Annotated[int, typer.Option(min=1, help="Mentions per pass over the knowledge base.")]
KbRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a knowledge base on the Hub.")]
NameScorer = Annotated[
    str,
    typer.Option(help="How the source [b]name[/b] compares names: WRatio, composite (as in MMEL), jaro_winkler, …"),
]
RetrieverOption = Annotated[
    str | None, typer.Option(help="The retriever of the source [b]retriever[/b]: a run folder or a model.")
]
Column = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
    typer.Option(
        metavar="NAME=COLUMN",
        help="Read the column [b]NAME[/b] from a column of your file that has another name: name=artist. Several columns "
        'are joined: attributes=sex,placeOfBirth becomes "Sex: female. Place of birth: Rome." With "image=", no image is '
        "read. Can be repeated.",
    ),
]
KeepColumn = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
    typer.Option(
        metavar="COLUMN",
        help="Keep a further column of your file in the knowledge base, such as types or born, to filter by with "
        "[b]--where[/b]. Can be repeated.",
    ),
]
IgnoreOtherColumns = Annotated[
    bool,
    typer.Option(
        "--ignore-other-columns",
        help="Leave out columns of your file that have none of the known names, and say which. By default they are errors.",
    ),
]
InvertedNames = Annotated[
    bool,
    typer.Option(
        "--inverted-names",
        help='Entities are named as in "Turner, William": each gets the alias "William Turner".',
    ),
]


def shared_processes(device: str | None) -> tuple[PartialState, str | None]:
    """Returns the processes that `accelerate launch` started, and the device: with several, that of this process by default."""
    from accelerate import PartialState

    processes = PartialState(cpu=device == "cpu")
    return processes, str(processes.device) if processes.num_processes > 1 and device is None else device


def check_link_options(
    soft: str | None, soft_bonus: float | None, nil_threshold: float | None, precision: float | None
) -> None:
    """Raises an error for values of these options that no linker takes."""
    if (soft is None) != (soft_bonus is None):
        raise typer.BadParameter("Give --soft and --soft-bonus together.", param_hint="--soft")
    if nil_threshold is not None and math.isnan(nil_threshold):
        raise typer.BadParameter("nan is no threshold. Give a number.", param_hint="--nil-threshold")
    if precision is not None and not 0 < precision < 1:
        raise typer.BadParameter("A precision is above 0 and below 1, such as 0.95.", param_hint="--precision")


def check_certify(certify: bool, index: str) -> None:
    """Refuses proven answers of an index that proves none."""
    if certify and index != "exact":
        raise typer.BadParameter(f"{index} may miss entities. Leave out --index.", param_hint="--certify")


def check_column_options(
    entities: Path | None,
    rows: Path | None,
    column: list[str] | None,
    ignore_other_columns: bool,
    inverted_names: bool,
    keep_column: list[str] | None,
) -> None:
    """Refuses options about columns that no file is given for."""
    if rows is None and entities is None and column:
        raise typer.BadParameter("Give a file with --input or --entities.", param_hint="--column")
    options = {
        "--keep-column": keep_column,
        "--ignore-other-columns": ignore_other_columns,
        "--inverted-names": inverted_names,
    }
    for name, value in options.items():
        if entities is None and value:
            raise typer.BadParameter("Give a file of --entities, or leave this out.", param_hint=name)


def column_mappings(
    entities: Path | None,
    rows: Path | None,
    row_columns: Mapping[str, str],
    column: list[str] | None,
    ignore_other_columns: bool,
    inverted_names: bool,
    keep_column: list[str] | None,
) -> tuple[ColumnMapping | None, ColumnMapping | None]:
    """Returns what becomes of the columns of a file of entities, and of a file of rows to link, which has `row_columns`.

    An assignment counts for the files that have its columns.
    """
    from hf_mel.kb.entities import is_row_file
    from hf_mel.row_columns import ColumnMapping
    from hf_mel.row_files import ENTITY_COLUMNS, column_names

    options: dict[str, Any] = {
        "ignore_others": ignore_other_columns,
        "inverted_names": inverted_names,
        "kept": keep_column or (),
    }
    if entities is not None and not is_row_file(entities) and not any(options.values()):
        entities = None  # a data set has no columns with other names
    mapping = ColumnMapping.parse(column or (), **options)
    files = [(entities, ENTITY_COLUMNS), (rows, row_columns)]
    mapping.check_targets({name: key for file, columns in files if file for name, key in columns.items()})
    names = [column_names(file, columns, mapping) if file and column else [] for file, columns in files]
    mapping.check_used(entities if rows is None else rows if entities is None else None)
    of_entities, of_rows = (
        None if file is None else mapping.restricted(columns, file_names)
        for (file, columns), file_names in zip(files, names, strict=True)
    )
    return of_entities, None if of_rows is None else replace(of_rows, kept=())  # kept columns are those of entities

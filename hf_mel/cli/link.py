"""`hf-mel link`: links mentions in texts to the entities of a knowledge base."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_mel.cli.options import (
    Column,
    Device,
    FirstStage,
    IgnoreOtherColumns,
    Index,
    InvertedNames,
    KeepColumn,
    ModelArgument,
    NameWeight,
    Revision,
    Soft,
    SoftBonus,
    TrustRemoteCode,
    Where,
    check_soft,
)
from hf_mel.cli.printing import print_json, print_link
from hf_mel.errors import MelError, first_lines
from hf_mel.files import is_stream
from hf_mel.terminal import safe_text

if TYPE_CHECKING:
    from hf_mel.row_columns import ColumnMapping


def link(
    model: ModelArgument,
    kb: Annotated[
        str | None,
        typer.Option(help="A knowledge base that this model built: a folder (hf-mel kb build), or one on the Hub."),
    ] = None,
    entities: Annotated[
        Path | None,
        typer.Option(
            help="A file of entities in place of --kb, as for [b]hf-mel kb build[/b]. They are encoded each time."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="The text that contains the mention.")] = None,
    mention: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
        typer.Option(help="The mention, exactly as in the text. Repeat the option for several mentions of one text."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The image that belongs to the text.")] = None,
    start: Annotated[int | None, typer.Option(help="First character of the mention, counted from 0.")] = None,
    end: Annotated[int | None, typer.Option(help="First character after the mention.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl, .ndjson, .json, .csv or .tsv file of mentions. Columns: [b]text[/b]; [b]mention[/b], or [b]start[/b] "
            "and [b]end[/b]; optionally [b]image[/b], a path relative to the file. Other columns are kept."
        ),
    ] = None,
    column: Column = None,
    ignore_other_columns: IgnoreOtherColumns = False,
    inverted_names: InvertedNames = False,
    keep_column: KeepColumn = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The .jsonl file to which the linked mentions of --input are written, one a line, in their order; - for "
            "standard output. Until all are linked, results are kept in .NAME.partial beside it.",
            dir_okay=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an --output that was interrupted, and link only the rest.")
    ] = False,
    skip_bad_rows: Annotated[
        bool,
        typer.Option(
            "--skip-bad-rows",
            help="Link the other rows of --input if some cannot be linked. Bad rows have an [b]error[/b] in the output. "
            "Without this option, all bad rows are listed, and nothing is linked.",
        ),
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Number of candidates to show.")] = 10,
    nil_threshold: Annotated[
        float | None,
        typer.Option(help="A mention is NIL if its best score is lower. Default: the threshold of the model, if any."),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            help="Make only the links that are sure enough for this precision, such as [b]0.95[/b], on mentions like those "
            "of the model's validation split. The others are for review: their [b]entity_id[/b] is null.",
        ),
    ] = None,
    reranker: Annotated[
        str | None,
        typer.Option(help="A reranker that reorders the best candidates: a run folder or a model."),
    ] = None,
    rerank_k: Annotated[int, typer.Option(min=1, help="Number of candidates that the reranker reorders.")] = 16,
    index: Index = "exact",
    first_stage: FirstStage = None,
    name_weight: NameWeight = None,
    where: Where = None,
    soft: Soft = None,
    soft_bonus: SoftBonus = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Mentions per pass over the knowledge base.")] = 32,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    kb_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a knowledge base on the Hub.")
    ] = None,
) -> None:
    """Link a mention in a text to the entities of a knowledge base.

    Prints the candidates with their scores. The score is the mean of the scores of the model's units, which are shown
    beside it. Models may weigh the units, and a model that learns NIL takes off the mention's NIL score. With a name weight,
    the similarity of the names times the weight is added.

    If the mention occurs several times, the first occurrence is linked. Use --start and --end to choose another one.
    A reranker can rank all mentions of a text together.

    Examples:

      hf-mel link runs/mimic_flags --kb kb/flags --text "Georgia won again." --mention Georgia --image photo.jpg

      hf-mel link runs/mimic_wikimel --kb kb/wikimel --reranker runs/RERANKER --text "Kerry met Marzouki." \\
        --mention Kerry --mention Marzouki

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --index faiss-pq

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --precision 0.9

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --skip-bad-rows --resume

      hf-mel link runs/mimic_flags --kb kb/flags --input letters.csv --column text=letter --column mention=person \\
        --output linked.jsonl

      hf-mel link runs/mimic_wikimel --kb kb/wikimel --text "Blake saw angels." --mention Blake \\
        --where "type = 'human' and born < 1800"

      hf-mel link sentence-transformers/all-MiniLM-L6-v2 --entities artists.csv --column name=artist \\
        --ignore-other-columns --text "Blake saw angels in Peckham." --mention Blake
    """
    surfaces: list[str | None] = [*mention] if mention else [None]
    single = {"text": text, "mention": surfaces[0], "image": image, "start": start, "end": end}
    if input is None and text is None:
        raise typer.BadParameter("Give a text and a mention, or a file of mentions with --input.", param_hint="--text")
    if text is not None and mention is None and start is None and end is None:
        raise typer.BadParameter("Give the mention, or its --start and --end.", param_hint="--mention")
    if input is not None and any(value is not None for value in single.values()):
        raise typer.BadParameter("Give one mention or a file of them, not both.", param_hint="--input")
    if (input is None) != (output is None):
        raise typer.BadParameter("Give --input and --output together.", param_hint="--output")
    if input is not None and as_json:
        raise typer.BadParameter("Leave it out: --output is written as JSON lines anyway.", param_hint="--json")
    if (kb is None) == (entities is None):
        raise typer.BadParameter("Give either --kb or --entities.", param_hint="--kb")
    if input is None and entities is None and column:
        raise typer.BadParameter("Give a file with --input or --entities.", param_hint="--column")
    if entities is None and (ignore_other_columns or inverted_names or keep_column):
        name = "--ignore-other-columns" if ignore_other_columns else "--inverted-names"
        name = "--keep-column" if keep_column else name
        raise typer.BadParameter("Give a file of --entities, or leave this out.", param_hint=name)
    if input is None and (resume or skip_bad_rows):
        name = "--resume" if resume else "--skip-bad-rows"
        raise typer.BadParameter("Give a file of mentions with --input.", param_hint=name)
    check_soft(soft, soft_bonus)
    if nil_threshold is not None and math.isnan(nil_threshold):
        raise typer.BadParameter("nan is no threshold. Give a number.", param_hint="--nil-threshold")
    if precision is not None and not 0 < precision < 1:
        raise typer.BadParameter("A precision is above 0 and below 1, such as 0.95.", param_hint="--precision")
    if len(surfaces) > 1 and (start is not None or end is not None):
        raise typer.BadParameter("Give --start and --end only for a single mention.", param_hint="--start")
    from hf_mel.linking.link_file import check_output, link_file, read_mentions
    from hf_mel.linking.linker import EntityLinker
    from hf_mel.row_files import MAX_LISTED

    if output is not None:
        check_output(output)
    mapping_of_entities, mapping_of_mentions = _mappings(
        entities, input, column, ignore_other_columns, inverted_names, keep_column
    )
    rows = None
    if input is not None:
        rows = read_mentions(input, mapping=mapping_of_mentions, skip_bad_rows=skip_bad_rows)

    linker = EntityLinker.from_pretrained(
        model,
        kb,
        entities=entities,
        mapping=mapping_of_entities,
        nil_threshold=nil_threshold,
        precision=precision,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
        kb_revision=kb_revision,
        reranker=reranker,
        rerank_k=rerank_k,
        index=index,
        first_stage=first_stage,
        name_weight=name_weight,
        where=where,
        soft=soft,
        soft_bonus=soft_bonus,
    )
    if rows is None:
        if len(surfaces) == 1:
            results = [linker(single, top_k=top_k)]
        else:
            results = linker([{**single, "mention": surface} for surface in surfaces], top_k=top_k)
        if as_json:
            plain = [result.to_dict() for result in results]
            print_json(plain if len(plain) > 1 else plain[0])
        else:
            for result in results:
                print_link(result)
        return

    assert output is not None
    try:
        summary = link_file(linker, rows, output, top_k=top_k, batch_size=batch_size, resume=resume, progress=True)
    except KeyboardInterrupt:
        if not is_stream(output):
            typer.echo("Interrupted. What is linked is kept: repeat the command with --resume to go on.", err=True)
        raise
    except MelError as error:
        raise error.changed(file=error.file or input) from error
    # The lines of the results may be on standard output.
    log = partial(typer.echo, err=is_stream(output))
    review = "" if precision is None else f", {summary.num_review:,} left to review"
    log(f"{summary.num_linked:,} mentions linked, {summary.num_nil:,} of them NIL{review}, written to {output}.")
    if summary.num_resumed:
        log(f"{summary.num_resumed:,} of them were linked before the interruption.")
    for warning, count in summary.warnings.items():
        log(f"For {count:,} of them: {warning}")
    if summary.bad_rows:
        log(f'{len(summary.bad_rows):,} rows were not linked. Each has an "error" in the output:')
        for line in first_lines([f"row {bad.row}: {safe_text(bad.message)}" for bad in summary.bad_rows], MAX_LISTED):
            log(f"  {line}")


def _mappings(
    entities: Path | None,
    mentions: Path | None,
    column: list[str] | None,
    ignore_other_columns: bool,
    inverted_names: bool,
    keep_column: list[str] | None,
) -> tuple[ColumnMapping | None, ColumnMapping | None]:
    """Returns what becomes of the columns of both files. An assignment counts for those that have its columns."""
    from hf_mel.kb.entities import is_row_file
    from hf_mel.linking.link_file import MENTION_COLUMNS
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
    files = [(entities, ENTITY_COLUMNS), (mentions, MENTION_COLUMNS)]
    mapping.check_targets({name: key for file, columns in files if file for name, key in columns.items()})
    names = [column_names(file, columns, mapping) if file and column else [] for file, columns in files]
    mapping.check_used(entities if mentions is None else mentions if entities is None else None)
    restricted = [
        None if file is None else mapping.restricted(columns, file_names)
        for (file, columns), file_names in zip(files, names, strict=True)
    ]
    return restricted[0], restricted[1]

"""`hf-mel link`: links mentions in texts to the entities of a knowledge base."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hf_mel.cli.options import Device, FirstStage, Index, ModelArgument, Revision, TrustRemoteCode
from hf_mel.errors import DataFormatError, MelError


def link(
    model: ModelArgument,
    kb: Annotated[
        str,
        typer.Option(help="A knowledge base that this model built: a folder (hf-mel kb build), or one on the Hub."),
    ],
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
            help="A .jsonl, .json, .csv or .tsv file of mentions. Columns: [b]text[/b]; [b]mention[/b], or [b]start[/b] "
            "and [b]end[/b]; optionally [b]image[/b], a path relative to the file. Other columns are kept."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The .jsonl file to which the linked mentions of --input are written, one a line, in their order.",
            dir_okay=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of candidates to show.")] = 10,
    nil_threshold: Annotated[
        float | None,
        typer.Option(help="A mention is NIL if its best score is lower. Default: the threshold of the model, if any."),
    ] = None,
    reranker: Annotated[
        str | None,
        typer.Option(help="A reranker that reorders the best candidates: a run folder or a model."),
    ] = None,
    rerank_k: Annotated[int, typer.Option(min=1, help="Number of candidates that the reranker reorders.")] = 16,
    index: Index = "exact",
    first_stage: FirstStage = None,
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
    beside it.

    If the mention occurs several times, the first occurrence is linked. Use --start and --end to choose another one.
    A reranker can rank all mentions of a text together.

    Examples:

      hf-mel link runs/mimic_flags --kb kb/flags --text "Georgia won again." --mention Georgia --image photo.jpg

      hf-mel link runs/mimic_wikimel --kb kb/wikimel --reranker runs/RERANKER --text "Kerry met Marzouki." \\
        --mention Kerry --mention Marzouki

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --index faiss-pq
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
    if len(surfaces) > 1 and (start is not None or end is not None):
        raise typer.BadParameter("Give --start and --end only for a single mention.", param_hint="--start")
    rows = None if input is None else _read_mentions(input)

    from hf_mel.cli.printing import print_link
    from hf_mel.evaluation.tables import write_records
    from hf_mel.linking.linker import EntityLinker

    linker = EntityLinker.from_pretrained(
        model,
        kb,
        nil_threshold=nil_threshold,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
        kb_revision=kb_revision,
        reranker=reranker,
        rerank_k=rerank_k,
        index=index,
        first_stage=first_stage,
    )
    if rows is None:
        if len(surfaces) == 1:
            results = [linker(single, top_k=top_k)]
        else:
            results = linker([{**single, "mention": surface} for surface in surfaces], top_k=top_k)
        if as_json:
            plain = [result.to_dict() for result in results]
            typer.echo(json.dumps(plain if len(plain) > 1 else plain[0], ensure_ascii=False, indent=2))
        else:
            for result in results:
                print_link(result)
        return

    assert input is not None
    assert output is not None
    try:
        results = linker([mention for _, _, mention in rows], top_k=top_k, batch_size=batch_size, progress=True)
    except MelError as error:
        raise _with_line(error, input, [line for line, _, _ in rows]) from error
    linked = [row | {"linked": result.to_dict()} for (_, row, _), result in zip(rows, results, strict=True)]
    write_records(linked, output)
    num_nil = sum(result.is_nil for result in results)
    typer.echo(f"{len(results):,} mentions linked, {num_nil:,} of them NIL, written to {output}.")
    for warning, count in Counter(warning for result in results for warning in result.warnings).items():
        typer.echo(f"For {count:,} of them: {warning}")


def _read_mentions(path: Path) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Reads a file of mentions; returns the line, the row and the mention for the linker of each."""
    from hf_mel.row_files import int_cell, read_rows, text_cell

    rows = []
    is_table = path.suffix.lower() in (".csv", ".tsv")
    for line, row in read_rows(path):
        mention = {column: cell for column, cell in row.items() if not (is_table and cell == "")}
        for column in ("text", "mention", "image"):
            is_required = column == "text" and row.get("modality") != "image"
            text_cell(path, line, mention, column, is_required)
        for column in mention.keys() & {"start", "end"}:
            row[column] = mention[column] = int_cell(path, line, mention, column)
        mention["image"] = path.parent / mention["image"] if mention.get("image") else None
        rows.append((line, row, mention))
    if not rows:
        raise DataFormatError("The file holds no mentions.", file=path, remedy="Add at least one row.")
    return rows


def _with_line(error: MelError, path: Path, lines: list[int]) -> MelError:
    """Returns the error with the line of the file in place of the position in the list of mentions."""
    if not isinstance(error.row, int):
        return error
    message = error.message if error.file is None else f"{error.file}: {error.message}"
    return type(error)(message, file=path, row=lines[error.row], remedy=error.remedy)

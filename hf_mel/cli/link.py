"""`hf-mel link`: what does this mention mean?"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_mel.errors import DataFormatError, MelError

if TYPE_CHECKING:
    from rich.table import Table

    from hf_mel.linking.linker import Candidate, LinkResult


def link(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model on the Hub.")],
    kb: Annotated[
        str, typer.Option(help="The knowledge base this model built: a folder (hf-mel kb build), or one on the Hub.")
    ],
    text: Annotated[str | None, typer.Option(help="The text the mention stands in.")] = None,
    mention: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
        typer.Option(help="The mention, exactly as in the text; may be given several times."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The image beside the text, if there is one.")] = None,
    start: Annotated[int | None, typer.Option(help="Where the mention starts, in characters from 0.")] = None,
    end: Annotated[int | None, typer.Option(help="Where it ends, exclusive.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl file of mentions instead of one: [b]text[/b], and [b]mention[/b] or [b]start[/b] and "
            "[b]end[/b], and if there is one [b]image[/b] (a path, seen from the file)."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write the linked mentions of --input, one a line, in its order.", dir_okay=False),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many candidates to show.")] = 10,
    nil_threshold: Annotated[
        float | None,
        typer.Option(help="A mention is NIL if its best score is below this. Default: the model's, if it has one."),
    ] = None,
    reranker: Annotated[
        str | None,
        typer.Option(help="A reranker (a run folder or a model) that puts the best candidates into a new order."),
    ] = None,
    rerank_k: Annotated[int, typer.Option(min=1, help="How many candidates the reranker looks at.")] = 16,
    index: Annotated[
        str,
        typer.Option(
            help="What finds the entities: [b]exact[/b] scores all of them; the others are built with hf-mel kb index: "
            "[b]faiss-pq[/b], [b]faiss-flat[/b], [b]faiss-ivf[/b], [b]faiss-hnsw[/b], [b]milvus[/b]."
        ),
    ] = "exact",
    first_stage: Annotated[
        int | None, typer.Option(min=1, help="How many candidates an index finds, which are scored. Default: 256.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Mentions per pass over the knowledge base.")] = 32,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model, if it is not ours.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    kb_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a knowledge base on the Hub.")
    ] = None,
) -> None:
    """Link a mention in a text to the entities of a knowledge base.

    Shows the candidates, the score of each, and the parts it is the mean of.

    With a reranker, the mentions of one text are ranked together, if it can.

    Where the mention occurs several times, the first one is meant; --start and --end choose another.

    Examples:

      hf-mel link runs/mimic_flags --kb kb/flags --text "Georgia won again." --mention Georgia --image photo.jpg

      hf-mel link runs/mimic_wikimel --kb kb/wikimel --reranker runs/RERANKER --text "Kerry met Marzouki." \\
        --mention Kerry --mention Marzouki

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.jsonl --output linked.jsonl --index faiss-pq
    """
    surfaces: list[str | None] = [*mention] if mention else [None]
    single = {"text": text, "mention": surfaces[0], "image": image, "start": start, "end": end}
    if input is None and text is None:
        raise typer.BadParameter("Give a text and a mention, or a file of them with --input.", param_hint="--text")
    if input is not None and any(value is not None for value in single.values()):
        raise typer.BadParameter("Give one mention or a file of them, not both.", param_hint="--input")
    if (input is None) != (output is None):
        raise typer.BadParameter("--input and --output go together.", param_hint="--output")
    if input is not None and as_json:
        raise typer.BadParameter("--output is JSON lines as it is.", param_hint="--json")
    if len(surfaces) > 1 and (start is not None or end is not None):
        raise typer.BadParameter("--start and --end are for one mention.", param_hint="--start")
    records = None if input is None else _read(input)

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
    if records is None:
        if len(surfaces) == 1:
            found = [linker(single, top_k=top_k)]
        else:
            found = linker([{**single, "mention": surface} for surface in surfaces], top_k=top_k)
        if as_json:
            plain = [result.to_dict() for result in found]
            typer.echo(json.dumps(plain if len(plain) > 1 else plain[0], ensure_ascii=False, indent=2))
        else:
            for result in found:
                _show(result)
        return

    assert input is not None
    assert output is not None
    mentions = [_with_image_path(record, input.parent) for record in records.values()]
    try:
        results = linker(mentions, top_k=top_k, batch_size=batch_size, progress=True)
    except MelError as error:
        raise _in_file(error, input, list(records)) from error
    linked = zip(records.values(), results, strict=True)
    write_records([record | {"linked": result.to_dict()} for record, result in linked], output)
    nil = sum(result.is_nil for result in results)
    typer.echo(f"{len(results):,} mentions linked, {nil:,} of them NIL, written to {output}.")
    for warning, count in Counter(warning for result in results for warning in result.warnings).items():
        typer.echo(f"For {count:,} of them: {warning}")


def _show(result: LinkResult) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    units = list(result.best.unit_scores) if len(result.best.unit_scores) > 1 else []
    reranked = any(candidate.reranker_score is not None for candidate in result.candidates)
    header = [
        "",
        "entity",
        "id",
        *(["reranker"] if reranked else []),
        "score",
        *(unit.replace("_", " ") for unit in units),
    ]
    rows: list[list[Any]] = []
    for candidate in result.candidates:
        scores: list[float | None] = [*([candidate.reranker_score] if reranked else []), candidate.score]
        scores += [candidate.unit_scores[unit] for unit in units]
        # Text, because a name in square brackets is no markup.
        entity = [Text(_cut(candidate.name, 32)), Text(candidate.entity_id)]
        rows.append([str(candidate.rank), *entity, *("–" if score is None else f"{score:.3f}" for score in scores)])
    title = Text(f"{_cut(result.mention, 60)!r} may mean")
    table = _table(title, header, rows)
    about = [_about(candidate) for candidate in result.candidates]
    room = console.width - console.measure(table).maximum - 3
    if any(about) and room >= 16:  # otherwise names and scores have the whole width
        cells = [Text(_cut(words, room)) for words in about]
        table = _table(title, [*header, "about"], [[*row, cell] for row, cell in zip(rows, cells, strict=True)])
    console.print(table)
    best = result.best
    if result.is_nil:
        decision = f"NIL: the best score, {best.score:.3f}, is below the threshold {result.nil_threshold:.3f}."
    else:
        decision = f"{_cut(result.mention, 60)} → {_cut(best.name, 120)} ({best.entity_id})"
        if result.nil_threshold is None:
            decision += "\nThe model has no NIL threshold: the best entity is taken, however low its score."
    for line in (decision, *result.warnings):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _about(candidate: Candidate) -> str:
    parts = (" ".join(text.split()) for text in (candidate.description, candidate.attributes))
    return " · ".join(part for part in parts if part)


def _table(title: Any, header: list[str], rows: list[list[Any]]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for name in header:
        texts = name in ("entity", "id", "about")
        table.add_column(name, justify="left" if texts else "right", no_wrap=name != "entity", overflow="ellipsis")
    for row in rows:
        table.add_row(*row)
    return table


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """The records of a .jsonl file by line number."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataFormatError(f"cannot be read ({error.strerror}).", file=path, remedy="Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataFormatError(f"is not UTF-8 text ({error}).", file=path, remedy="Save it as UTF-8.") from error
    records = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataFormatError(f"is not JSON ({error}).", file=path, row=number) from error
        if not isinstance(record, dict) or not isinstance(record.get("image"), str | None):
            raise DataFormatError(
                "is not a mention.", file=path, row=number, remedy='Write {"text": …, "mention": …, "image": PATH}.'
            )
        records[number] = record
    if not records:
        raise DataFormatError("holds no mentions.", file=path, remedy="Write one JSON object a line.")
    return records


def _with_image_path(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    return record | {"image": folder / record["image"] if record.get("image") else None}


def _in_file(error: MelError, path: Path, lines: list[int]) -> MelError:
    """The same error with the line of the file in place of the position in a list."""
    if not isinstance(error.row, int):
        return error
    message = error.message if error.file is None else f"{error.file}: {error.message}"
    return type(error)(message, file=path, row=lines[error.row], remedy=error.remedy)

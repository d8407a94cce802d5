"""Output of the command line that several verbs share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mel.errors import MelError, first_lines
from hf_mel.files import is_stream
from hf_mel.terminal import safe_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hf_mel.linking.annotating import AnnotatedText
    from hf_mel.linking.results import Candidate, LinkResult


class _LinePrinter(logging.Handler):
    """Prints each log record as one line on standard error, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: "
        tqdm.write(f"{prefix}{safe_text(record.getMessage(), keep_lines=True)}", file=sys.stderr)


@contextlib.contextmanager
def show_logs() -> Iterator[None]:
    """Prints the log lines of hf_mel while the block runs. Of several processes, only the first prints."""
    logger = logging.getLogger("hf_mel")
    first = int(os.environ.get("RANK", "0")) == 0
    handler, level = (_LinePrinter() if first else logging.NullHandler()), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def print_json(value: Any) -> None:
    """Prints a value as JSON. Characters that the encoding of the terminal may lack are written as JSON's own escapes."""
    import typer

    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    is_unicode = encoding.startswith("utf")
    typer.echo(json.dumps(value, ensure_ascii=not is_unicode, indent=2, allow_nan=False))


def message_console(*outputs: Path | None, quiet: bool = False) -> Console:
    """Returns a console for messages: standard error if an output is a stream, which may be standard output."""
    from rich.console import Console

    return Console(quiet=quiet, stderr=any(output is not None and is_stream(output) for output in outputs))


@contextlib.contextmanager
def kept_results(output: Path, input: Path | None, what: str) -> Iterator[None]:
    """Says, if the block is interrupted, that its results so far are kept, and names the input in its errors.

    Args:
        output (`Path`): The file of the results. A stream keeps nothing for --resume.
        input (`Path`, *optional*): The file that is read.
        what (`str`): "linked" or "done": what is kept.
    """
    import typer

    try:
        yield
    except KeyboardInterrupt:
        if not is_stream(output):
            typer.echo(f"Interrupted. What is {what} is kept: repeat the command with --resume to go on.", err=True)
        raise
    except MelError as error:
        raise error.changed(file=error.file or input) from error


def print_bad_rows(bad_rows: Sequence[MelError], what: str, log: Callable[[str], None]) -> None:
    """Prints the rows of a file that were not "linked" or "annotated", the first of many."""
    from hf_mel.row_files import MAX_LISTED  # imports datasets

    if bad_rows:
        log(f'{len(bad_rows):,} rows were not {what}. Each has an "error" in the output:')
        for line in first_lines([f"row {bad.row}: {safe_text(bad.message)}" for bad in bad_rows], MAX_LISTED):
            log(f"  {line}")


def print_plain(text: str, console: Console | None = None) -> None:
    """Prints text without markup, highlighting or line wrapping."""
    from rich.console import Console

    (console or Console()).print(safe_text(text, keep_lines=True), markup=False, highlight=False, soft_wrap=True)


def print_link(result: LinkResult) -> None:
    """Prints the candidates of a mention with their scores, and the decision of the linker.

    Args:
        result ([`~hf_mel.linking.results.LinkResult`]): The linked mention.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    best = result.best
    units = list(best.unit_scores) if len(best.unit_scores) > 1 else []
    is_reranked = any(candidate.reranker_score is not None for candidate in result.candidates)
    has_names = any(candidate.name_score is not None for candidate in result.candidates)
    header = [
        "",
        "entity",
        "id",
        *(["reranker"] if is_reranked else []),
        "score",
        *(unit.replace("_", " ") for unit in units),
        *(["name"] if has_names else []),
    ]
    rows: list[list[Any]] = []
    for candidate in result.candidates:
        scores: list[float | None] = [*([candidate.reranker_score] if is_reranked else []), candidate.score]
        scores += [candidate.unit_scores[unit] for unit in units] + ([candidate.name_score] if has_names else [])
        # Text objects are printed literally, so that a name in square brackets is not taken for markup.
        entity = [Text(shorten(candidate.name, 32)), Text(safe_text(candidate.entity_id))]
        rows.append([str(candidate.rank), *entity, *("–" if score is None else f"{score:.3f}" for score in scores)])
    title = Text(f"'{shorten(result.mention, 60)}' may mean")
    table = _candidate_table(title, header, rows)
    descriptions = [_description(candidate) for candidate in result.candidates]
    free_width = console.width - console.measure(table).maximum - 3
    if any(descriptions) and free_width >= 16:
        cells = [Text(shorten(description, free_width)) for description in descriptions]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
        table = _candidate_table(title, [*header, "about"], rows)
    console.print(table)
    if result.is_nil:
        decision = f"NIL: the best score, {best.score:.3f}, is below the threshold {result.nil_threshold:.3f}."
    elif result.needs_review:
        decision = (
            f"Review: {shorten(result.mention, 60)} → {shorten(best.name, 120)} ({safe_text(best.entity_id)}) is not sure "
            f"enough for the stated precision. Its confidence is {result.confidence:.3f}."
        )
    else:
        decision = f"{shorten(result.mention, 60)} → {shorten(best.name, 120)} ({safe_text(best.entity_id)})"
        if result.nil_threshold is None:
            decision += "\nThe model has no NIL threshold, so the best entity is taken, however low its score."
    if result.bound is not None:
        decision += f"\nProven: no entity that is not shown here scores above {result.bound:.3f}."
    elif not result.certified:
        decision += "\nNot proven: the index may have missed entities."
    for line in (decision, *result.warnings):
        console.print(safe_text(line, keep_lines=True), markup=False, highlight=False, soft_wrap=True)


def print_annotated(annotated: AnnotatedText) -> None:
    """Prints a text with its mentions marked, and what each is linked to.

    Args:
        annotated ([`~hf_mel.linking.annotating.AnnotatedText`]): The annotated text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    marked, position = Text(), 0
    for mention in annotated:
        start = max(mention.start, position)
        marked.append(safe_text(annotated.text[position:start], keep_lines=True))
        if mention.end > start:
            marked.append(safe_text(annotated.text[start : mention.end]), style="bold underline")
        position = max(position, mention.end)
    marked.append(safe_text(annotated.text[position:], keep_lines=True))
    console.print(marked)
    if annotated.mentions:
        has_labels = any(mention.label for mention in annotated)
        table = Table()
        for column in ("mention", *(["label"] if has_labels else []), "entity", "id"):
            table.add_column(column, overflow="ellipsis")
        table.add_column("score", justify="right")
        for mention in annotated:
            labels = [Text(shorten(mention.label, 24))] if has_labels else []
            score = "–" if mention.score is None else f"{mention.score:.3f}"
            decision = Text(shorten(mention.name or ("not linked" if mention.entity_id is None else "NIL"), 48))
            entity_id = Text(safe_text(mention.entity_id or "") if mention.name else "")
            table.add_row(Text(shorten(mention.mention, 40)), *labels, decision, entity_id, score)
        console.print(table)
    counts = Counter(warning for mention in annotated if mention.link for warning in mention.link.warnings)
    lines = [*annotated.warnings]
    lines += [
        warning if count == len(annotated) else f"For {count} of the mentions: {warning}"
        for warning, count in counts.items()
    ]
    for line in lines:
        console.print(safe_text(line, keep_lines=True), markup=False, highlight=False, soft_wrap=True)


def shorten(text: str, length: int) -> str:
    """Returns text that is safe to print, cut to `length` columns of a terminal, of which an ellipsis takes the last."""
    from rich.cells import cell_len, set_cell_size

    text = safe_text(text)
    return text if cell_len(text) <= length else set_cell_size(text, length - 1).rstrip() + "…"


def _description(candidate: Candidate) -> str:
    parts = (" ".join(text.split()) for text in (candidate.description, candidate.attributes))
    return " · ".join(part for part in parts if part)


def _candidate_table(title: Any, header: list[str], rows: list[list[Any]]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for name in header:
        is_text = name in ("entity", "id", "about")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "entity", overflow="ellipsis")
    for row in rows:
        table.add_row(*row)
    return table


def print_adaptation(folder: Path, source: str) -> None:
    """Prints what an adaptation made and left out, whether it helped, where the model is, and the next commands.

    Args:
        folder (`Path`): The run folder.
        source (`str`): What the model was adapted to: a file of entities, a data set or a knowledge base.
    """
    from hf_mel.training.recipe import Recipe

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    data, adaptation = results["data"], results["adaptation"]
    if adaptation["trained"]:
        posts = f", {data['train_posts']:,} of them posts" if data["train_posts"] else ""
        print_plain(
            f"Trained on {data['train_mentions']:,} mentions, made of {data['trained_entities']:,} of {data['entities']:,} "
            f"entities{posts}."
        )
        if left_out := data["left_out_entities"]:
            print_plain(
                f"Left out {left_out:,} {'entity' if left_out == 1 else 'entities'}, so that mentions of them are NIL. The "
                "model links to them too, but has not learned from them."
            )
    if names := adaptation.get("names"):
        weight, mrr = f"{names['weight']:g}", names["chosen_by_mrr"]
        print_plain(
            f"Weight of the names, chosen on made mentions: {weight} (MRR {100 * mrr['0']:.1f} without names, "
            f"{100 * mrr[weight]:.1f} with this weight)."
        )
    elif not adaptation["trained"]:
        print_plain("Nothing changed: the model has a weight of the names already, and training was not asked for.")
    print_plain("Made mentions are no real ones. Measure on some of yours, with hf-mel evaluate.")
    print_plain(
        f"Adapted in {results['run']['seconds'] / 60:.1f} minutes. Model, processor, card, recipe and results: {folder}"
    )
    # A file whose columns have other names needs the same options again.
    columns = Recipe.load(folder / "recipe.yaml").data.columns
    is_kb, is_file = (Path(source) / "kb.json").is_file(), Path(source).is_file()
    entities = "--entities FILE" if is_kb else f"--{'entities' if is_file else 'dataset'} {source}"
    entities += " (and the same --column …)" if columns else ""
    kb = f"kb/{Path(source).name.partition('.')[0]}{'-adapted' if is_kb else ''}"
    print_plain(
        f'Next: hf-mel kb build {folder} {entities} --output {kb}\n      hf-mel link {folder} --kb {kb} --text "…" --mention "…"'
    )

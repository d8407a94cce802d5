"""`hf-mel annotate`: finds the mentions of texts, and links them to the entities of a knowledge base."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_mel.cli.options import (
    AsJson,
    Bf16,
    Certify,
    Column,
    Device,
    FirstStage,
    IgnoreOtherColumns,
    Index,
    InvertedNames,
    KbRevision,
    KeepColumn,
    LinkedEntities,
    LinkedKb,
    LinkPrecision,
    ModelArgument,
    NameWeight,
    NilThreshold,
    RerankerOption,
    RerankK,
    Revision,
    Soft,
    SoftBonus,
    Split,
    TextImage,
    TrustRemoteCode,
    Where,
    check_certify,
    check_column_options,
    check_link_options,
    column_mappings,
)
from hf_mel.cli.printing import kept_results, print_annotated, print_bad_rows, print_json
from hf_mel.files import is_stream

if TYPE_CHECKING:
    from hf_mel.detection.spans import MentionDetector
    from hf_mel.linking.linker import EntityLinker


def annotate(
    model: ModelArgument,
    kb: LinkedKb = None,
    entities: LinkedEntities = None,
    text: Annotated[str | None, typer.Option(help="The text. - reads it from standard input.")] = None,
    image: TextImage = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl, .ndjson, .json, .csv or .tsv file of texts. Columns: [b]text[/b]; optionally [b]image[/b], a "
            "path relative to the file, and [b]spans[/b], the start and end of mentions that are then not searched. Other "
            "columns are kept. Or a folder of .txt, .md and .html files."
        ),
    ] = None,
    column: Column = None,
    ignore_other_columns: IgnoreOtherColumns = False,
    inverted_names: InvertedNames = False,
    keep_column: KeepColumn = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The .jsonl file to which the texts of --input and their mentions are written, one text a line, in their "
            "order; - for standard output. Until all are done, results are kept in .NAME.partial beside it. With --dataset: "
            "the JSON file for the figures.",
            dir_okay=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A data set whose texts are annotated and compared with its mentions, in place of --text or --input: "
            "prints precision, recall and F1."
        ),
    ] = None,
    split: Split = "test",
    gold_spans: Annotated[
        bool, typer.Option("--gold-spans", help="Link the gold mentions of --dataset, and search none.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an --output that was interrupted, and annotate only the rest.")
    ] = False,
    skip_bad_rows: Annotated[
        bool,
        typer.Option(
            "--skip-bad-rows",
            help="Annotate the other rows of --input if some cannot be read. Bad rows have an [b]error[/b] in the output. "
            "Without this option, all bad rows are listed, and nothing is annotated.",
        ),
    ] = False,
    detector: Annotated[
        str,
        typer.Option(
            help="What finds the mentions. [b]gazetteer[/b]: the names and aliases of the knowledge base. "
            "[b]spacy:PIPELINE[/b], [b]transformers:MODEL[/b] (token classification) or [b]gliner:MODEL[/b]: what the "
            "model names."
        ),
    ] = "gazetteer",
    labels: Annotated[
        str | None,
        typer.Option(
            help="Labels of the mentions to link, with commas: PERSON,GPE. For GLiNER what to find, in words: "
            '"person,football club".'
        ),
    ] = None,
    learn_from: Annotated[
        str | None,
        typer.Option(
            help="A data set from whose mentions the gazetteer learns which names are common words, and further surface "
            "forms. Its splits train and validation are read."
        ),
    ] = None,
    ignore_case: Annotated[
        bool,
        typer.Option("--ignore-case", help="The gazetteer finds names in any case, also in texts without capitals."),
    ] = False,
    overlapping: Annotated[
        bool, typer.Option("--overlapping", help="Keep mentions that overlap, instead of the longest ones.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page that shows the texts in a browser, with the mentions marked.", dir_okay=False
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of candidates of each mention.")] = 5,
    nil_threshold: NilThreshold = None,
    precision: LinkPrecision = None,
    reranker: RerankerOption = None,
    rerank_k: RerankK = 16,
    index: Index = "exact",
    first_stage: FirstStage = None,
    certify: Certify = False,
    name_weight: NameWeight = None,
    where: Where = None,
    soft: Soft = None,
    soft_bonus: SoftBonus = None,
    bf16: Bf16 = False,
    as_json: AsJson = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Mentions per pass over the knowledge base. Default: 256, and 32 with a reranker."),
    ] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    kb_revision: KbRevision = None,
) -> None:
    """Find the mentions of a text, and link each to an entity of a knowledge base.

    A mention is linked to an entity, or is NIL: the knowledge base does not hold its entity. With --precision, a mention can
    also be left to review. In JSON, such a mention, which was not linked, has the entity_id null.

    The names of the knowledge base are found without any download. They are not found where a text says it in other
    words ("the hosts"): a detector that knows such words, or --learn-from, finds these, too.

    Examples:

      hf-mel annotate runs/mimic_flags --kb kb/flags --text "Georgia drew with Ghana." --image photo.jpg

      hf-mel annotate runs/mimic_flags --kb kb/flags --text "The hosts won in Accra." --learn-from data/flags_mel --json

      hf-mel annotate runs/mimic_wikimel --kb kb/wikimel --input posts.jsonl --output linked.jsonl --html linked.html

      hf-mel annotate runs/mimic_wikimel --kb kb/wikimel --input articles/ --output linked.jsonl --resume

      hf-mel annotate runs/mimic_wikimel --kb kb/wikimel --detector spacy:en_core_web_sm --labels PERSON \\
        --text "Hiddleston met Swift in Nashville."

      hf-mel annotate runs/mimic_flags --kb kb/flags --dataset data/flags_mel --learn-from data/flags_mel
    """
    if sum(source is not None for source in (text, input, dataset)) != 1:
        raise typer.BadParameter(
            "Give a text, a file of texts with --input, or a data set with --dataset.", param_hint="--text"
        )
    if dataset is not None:
        options_of_others = {
            "--image": image,
            "--html": html,
            "--resume": resume,
            "--json": as_json,
            "--overlapping": overlapping,
        }
        for name, value in options_of_others.items():
            if value:
                raise typer.BadParameter("Leave it out with --dataset.", param_hint=name)
    elif gold_spans:
        raise typer.BadParameter("Give a data set with --dataset.", param_hint="--gold-spans")
    if input is not None and image is not None:
        raise typer.BadParameter("Give it in the column image of --input.", param_hint="--image")
    if dataset is None and (input is None) != (output is None):
        raise typer.BadParameter("Give --input and --output together.", param_hint="--output")
    if input is not None and as_json:
        raise typer.BadParameter("Leave it out: --output is written as JSON lines anyway.", param_hint="--json")
    if (kb is None) == (entities is None):
        raise typer.BadParameter("Give either --kb or --entities.", param_hint="--kb")
    check_column_options(entities, input, column, ignore_other_columns, inverted_names, keep_column)
    if input is None and (resume or skip_bad_rows):
        name = "--resume" if resume else "--skip-bad-rows"
        raise typer.BadParameter("Give a file of texts with --input.", param_hint=name)
    if html is not None and output is not None and is_stream(output):
        raise typer.BadParameter("Give a file as --output.", param_hint="--html")
    check_link_options(soft, soft_bonus, nil_threshold, precision)
    check_certify(certify, index)
    from hf_mel.data.text_files import TEXT_SUFFIXES
    from hf_mel.linking.annotate_file import TEXT_COLUMNS, read_texts
    from hf_mel.linking.link_file import check_output
    from hf_mel.linking.linker import EntityLinker

    if output is not None and input is not None:
        check_output(output)
    is_table = input is not None and not input.is_dir() and input.suffix.lower() not in TEXT_SUFFIXES
    mapping_of_entities, mapping_of_texts = column_mappings(
        entities, input if is_table else None, TEXT_COLUMNS, column, ignore_other_columns, inverted_names, keep_column
    )
    rows = None
    if input is not None:
        rows = read_texts(input, mapping=mapping_of_texts, skip_bad_rows=skip_bad_rows)
    linker = EntityLinker.from_pretrained(
        model,
        kb,
        entities=entities,
        mapping=mapping_of_entities,
        nil_threshold=nil_threshold,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
        kb_revision=kb_revision,
        reranker=reranker,
        rerank_k=rerank_k,
        index=index,
        first_stage=first_stage,
        certify=certify,
        name_weight=name_weight,
        precision=precision,
        where=where,
        soft=soft,
        soft_bonus=soft_bonus,
        bf16=bf16,
    )
    if dataset is not None and gold_spans:
        _evaluate(linker, dataset, split, None, output, batch_size, gold_spans=True)
        return
    mention_detector = _open_detector(linker, detector, labels, learn_from, ignore_case, device)
    if dataset is not None:
        _evaluate(linker, dataset, split, mention_detector, output, batch_size)
        return
    options: dict[str, Any] = {"overlapping": overlapping, "top_k": top_k, "batch_size": batch_size}
    if text is not None:
        content = typer.get_text_stream("stdin").read() if text == "-" else text
        annotated = linker.annotate(content, image=image, detector=mention_detector, **options)
        if html is not None:
            from hf_mel.data.images import open_image

            photo = None if image is None else open_image(image)
            _write_page(html, [{**annotated.to_dict(), "photo": photo}], linker, title="Annotated text")
        if as_json:
            print_json(annotated.to_dict())
            return
        print_annotated(annotated)
        if not annotated.mentions and content.strip() and detector == "gazetteer" and learn_from is None:
            typer.echo(
                "The gazetteer knows only the names and aliases of the knowledge base. --learn-from DATA teaches it the "
                "mentions of a data set; --detector spacy:PIPELINE finds other names."
            )
        if html is not None:
            typer.echo(f"Written to {html}. Open it in a browser.")
        return
    assert rows is not None
    assert output is not None
    _annotate_file(linker, rows, output, mention_detector, resume, html, input, options)


def _open_detector(
    linker: EntityLinker,
    name: str,
    labels: str | None,
    learn_from: str | None,
    ignore_case: bool,
    device: str | None,
) -> MentionDetector:
    from hf_mel.detection.detectors import open_detector

    options: dict[str, Any] = {"ignore_case": True} if ignore_case else {}
    if learn_from is not None:
        from hf_mel.data.loading import load_mentions

        options |= {split: load_mentions(learn_from, name) for split, name in _SPLITS.items()}
    chosen = None if labels is None else [label.strip() for label in labels.split(",") if label.strip()]
    if name == "gazetteer" and not options and chosen is None:
        return linker.gazetteer
    return open_detector(name, kb=linker.kb, labels=chosen, device=device, **options)


_SPLITS = {"training": "train", "validation": "validation"}


def _evaluate(
    linker: EntityLinker,
    dataset: str,
    split: str,
    detector: MentionDetector | None,
    output: Path | None,
    batch_size: int | None,
    gold_spans: bool = False,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from hf_mel.data.loading import dataset_version, load_mentions
    from hf_mel.evaluation.annotation_evaluator import annotation_rows, evaluate_annotations
    from hf_mel.evaluation.tables import write_results

    mentions = load_mentions(dataset, split)
    results = evaluate_annotations(
        linker, mentions, detector, gold_spans=gold_spans, batch_size=batch_size, progress=True
    )
    table = Table(
        title=f"{results['num_mentions']:,} mentions in {results['num_texts']:,} texts, {results['kb_size']:,} entities"
    )
    for column in ("counted", "spans", "golds", "P", "R", "F1", "macro P", "R", "F1"):
        table.add_column(column, justify="left" if column in ("counted", "spans") else "right")
    for number, row in enumerate(annotation_rows(results)):
        if number and row[0] == "found":
            table.add_section()
        table.add_row(*row)
    Console().print(table)
    if results["num_left_out"]:
        typer.echo(f"{results['num_left_out']:,} mentions without a position in a text were left out.")
    if output is not None:
        describe = getattr(detector, "describe", None)
        settings = {"detector": "gold spans" if gold_spans else describe() if describe else repr(detector)}
        write_results({**results, **settings, "data": {**dataset_version(dataset), "split": split}}, output)
        typer.echo(f"Written to {output}.")


def _annotate_file(
    linker: EntityLinker,
    rows: Any,
    output: Path,
    detector: MentionDetector,
    resume: bool,
    html: Path | None,
    input: Path | None,
    options: dict[str, Any],
) -> None:
    from hf_mel.linking.annotate_file import annotate_file, read_annotated

    with kept_results(output, input, "done"):
        summary = annotate_file(linker, rows, output, detector, resume=resume, progress=True, **options)
    if html is not None:
        records = ({"file": f"Text {number}", **record} for number, record in enumerate(read_annotated(output), 1))
        _write_page(html, records, linker, title=f"Annotated texts of {input}")
    log = partial(typer.echo, err=is_stream(output))  # the lines of the results may be on standard output
    log(
        f"{summary.num_texts:,} texts annotated: {summary.num_mentions:,} mentions, {summary.num_nil:,} of them NIL"
        + (f", {summary.num_review:,} left to review" if summary.num_review else "")
        + f"; {summary.num_empty:,} texts without a mention. Written to {output}."
    )
    if html is not None:
        log(f"Written to {html}. Open it in a browser.")
    if summary.num_resumed:
        log(f"{summary.num_resumed:,} of the texts were annotated before the interruption.")
    for warning, count in summary.warnings.items():
        log(f"For {count:,} mentions: {warning}")
    print_bad_rows(summary.bad_rows, "annotated", log)


def _write_page(path: Path, records: Any, linker: EntityLinker, title: str) -> None:
    from hf_mel.linking.annotations_page import write_annotations_page

    kb = linker.kb
    write_annotations_page(
        path,
        records,
        entity_image=lambda entity_id: kb.image(kb.row_of(entity_id)) if entity_id in kb else None,
        title=title,
    )

"""`hf-mel link`: links mentions in texts to the entities of a knowledge base."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Optional

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
    MentionsPerPass,
    ModelArgument,
    NameWeight,
    NilThreshold,
    RerankerOption,
    RerankK,
    Revision,
    Soft,
    SoftBonus,
    TextImage,
    TrustRemoteCode,
    Where,
    check_certify,
    check_column_options,
    check_link_options,
    column_mappings,
    shared_processes,
)
from hf_mel.cli.printing import kept_results, print_bad_rows, print_json, print_link
from hf_mel.files import is_stream


def link(
    model: ModelArgument,
    kb: LinkedKb = None,
    entities: LinkedEntities = None,
    text: Annotated[str | None, typer.Option(help="The text that contains the mention.")] = None,
    mention: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates this on Python 3.10)
        typer.Option(help="The mention, exactly as in the text. Repeat the option for several mentions of one text."),
    ] = None,
    image: TextImage = None,
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
    relinkable: Annotated[
        bool,
        typer.Option(
            "--relinkable",
            help="Keep beside --output, in NAME.relink, what [b]hf-mel relink[/b] compares with a changed knowledge base. "
            "Requires the index exact.",
        ),
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
    batch_size: MentionsPerPass = 32,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    kb_revision: KbRevision = None,
) -> None:
    """Link a mention in a text to the entities of a knowledge base.

    Prints the candidates with their scores. The score is the mean of the scores of the model's units, which are shown
    beside it. Models may weigh the units, and a model that learns NIL takes off the mention's NIL score. With a name weight,
    the similarity of the names times the weight is added.

    With [b]accelerate launch -m hf_mel link …[/b], several processes share the entities, so that each reads a part of the
    knowledge base.

    If the mention occurs several times, the first occurrence is linked. Use --start and --end to choose another one.
    A reranker can rank all mentions of a text together.

    Examples:

      hf-mel link runs/mimic_flags --kb kb/flags --text "Georgia won again." --mention Georgia --image photo.jpg

      hf-mel link runs/mimic_wikimel --kb kb/wikimel --reranker runs/RERANKER --text "Kerry met Marzouki." \\
        --mention Kerry --mention Marzouki

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --index faiss-pq

      hf-mel link runs/mimic_flags --kb kb/flags --text "Georgia won again." --mention Georgia --certify

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --precision 0.9

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --skip-bad-rows --resume

      hf-mel link runs/mimic_flags --kb kb/flags --input mentions.csv --output linked.jsonl --relinkable

      hf-mel link runs/mimic_flags --kb kb/flags --input letters.csv --column text=letter --column mention=person \\
        --output linked.jsonl

      hf-mel link runs/mimic_wikimel --kb kb/wikimel --text "Blake saw angels." --mention Blake \\
        --where "type = 'human' and born < 1800"

      hf-mel link sentence-transformers/all-MiniLM-L6-v2 --entities artists.csv --column name=artist \\
        --ignore-other-columns --text "Blake saw angels in Peckham." --mention Blake

      accelerate launch -m hf_mel link runs/mimic_wikimel --kb kb/wikimel --input mentions.csv --output linked.jsonl
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
    check_column_options(entities, input, column, ignore_other_columns, inverted_names, keep_column)
    check_certify(certify, index)
    if input is None and (resume or skip_bad_rows or relinkable):
        name = "--resume" if resume else "--skip-bad-rows" if skip_bad_rows else "--relinkable"
        raise typer.BadParameter("Give a file of mentions with --input.", param_hint=name)
    if relinkable and kb is None:
        raise typer.BadParameter(
            "Entities of a file leave no knowledge base to change. Give --kb.", param_hint="--relinkable"
        )
    check_link_options(soft, soft_bonus, nil_threshold, precision)
    if len(surfaces) > 1 and (start is not None or end is not None):
        raise typer.BadParameter("Give --start and --end only for a single mention.", param_hint="--start")
    from hf_mel.linking.link_file import MENTION_COLUMNS, check_output, link_file, read_mentions
    from hf_mel.linking.linker import EntityLinker
    from hf_mel.linking.traces import LinkOrigin

    if output is not None:
        check_output(output)
    mapping_of_entities, mapping_of_mentions = column_mappings(
        entities, input, MENTION_COLUMNS, column, ignore_other_columns, inverted_names, keep_column
    )
    rows = None
    if input is not None:
        rows = read_mentions(input, mapping=mapping_of_mentions, skip_bad_rows=skip_bad_rows)

    processes, device = shared_processes(device)
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
        certify=certify,
        name_weight=name_weight,
        where=where,
        soft=soft,
        soft_bonus=soft_bonus,
        bf16=bf16,
    )
    if rows is None:
        with linker.sharing(processes) as is_first:
            if not is_first:
                return
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
    with linker.sharing(processes) as is_first:
        if not is_first:
            return
        with kept_results(output, input, "linked"):
            summary = link_file(
                linker,
                rows,
                output,
                top_k=top_k,
                batch_size=batch_size,
                resume=resume,
                origin=LinkOrigin(input, model, reranker, revision) if relinkable and input is not None else None,
                progress=True,
            )
    # The lines of the results may be on standard output.
    log = partial(typer.echo, err=is_stream(output))
    review = "" if precision is None else f", {summary.num_review:,} left to review"
    log(f"{summary.num_linked:,} mentions linked, {summary.num_nil:,} of them NIL{review}, written to {output}.")
    if summary.num_resumed:
        log(f"{summary.num_resumed:,} of them were linked before the interruption.")
    for warning, count in summary.warnings.items():
        log(f"For {count:,} of them: {warning}")
    print_bad_rows(summary.bad_rows, "linked", log)
    if relinkable:
        log(f"Next, after a change of the knowledge base: hf-mel relink {output} --kb {kb}")

"""`hf-mel kb`: builds, changes and inspects knowledge bases and their indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_mel.cli.options import (
    Column,
    Device,
    FirstStage,
    IgnoreOtherColumns,
    InvertedNames,
    KeepColumn,
    ModelArgument,
    Revision,
    TrustRemoteCode,
    shared_processes,
)
from hf_mel.errors import first_lines
from hf_mel.kb.indexes import BuiltKind
from hf_mel.kb.manifest import Dtype
from hf_mel.terminal import safe_text

if TYPE_CHECKING:
    from hf_mel.kb.knowledge_base import KnowledgeBase
    from hf_mel.row_columns import ColumnMapping

app = typer.Typer(
    help="Build the knowledge base to which a model links, and add or remove entities.\n\n"
    "A knowledge base is a folder of encoded entities. Only the model that built it can use it. One process at a time "
    "changes it, and any number may read it meanwhile.",
    no_args_is_help=True,
)

_ENTITIES_HELP = (
    "A .jsonl, .ndjson, .json, .csv or .tsv file of your own entities. Columns: [b]id[/b] and [b]name[/b]; optionally "
    "[b]description[/b], [b]attributes[/b], [b]aliases[/b] and [b]image[/b], a path relative to the file. Several "
    "aliases or images are separated by |."
)
_Folder = Annotated[Path, typer.Argument(help="The folder of the knowledge base.")]
_Model = Annotated[str, typer.Option(help="The model that built it: a run folder, a model folder, or one on the Hub.")]
_Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Stop at the first image that is missing or damaged, and write nothing. By default such images are listed, "
        "and their entities go without them.",
    ),
]
_BatchSize = Annotated[int, typer.Option(min=1, help="Entities to encode at a time.")]
_Wait = Annotated[
    float,
    typer.Option(min=0, help="Seconds to wait if another process is changing the knowledge base."),
]
_Kind = Annotated[
    BuiltKind,
    typer.Option(
        help="[b]faiss-pq[/b] compares short codes of the entities: the fastest, for any size. [b]faiss-flat[/b] "
        "compares whole vectors: misses nothing by coding, for up to about 100,000 entities. [b]milvus[/b] keeps the "
        "vectors in a database, in a file or on a server."
    ),
]


@app.command()
def build(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="The folder to write. An existing knowledge base is replaced.")],
    dataset: Annotated[
        str | None, typer.Option(help="The data set with the entities: a folder, or a data set on the Hub.")
    ] = None,
    entities: Annotated[Path | None, typer.Option(help=_ENTITIES_HELP)] = None,
    column: Column = None,
    ignore_other_columns: IgnoreOtherColumns = False,
    inverted_names: InvertedNames = False,
    keep_column: KeepColumn = None,
    posts: Annotated[
        str,
        typer.Option(
            help="Posts about the entities, for a model that represents entities by posts. [b]auto[/b]: the posts of "
            "the data set, or else the captions of its training split. [b]none[/b]: no posts. Otherwise a split, whose "
            "captions are the posts. A file of entities has no posts."
        ),
    ] = "auto",
    batch_size: _BatchSize = 64,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="How to store encodings. [b]float16[/b] and [b]bfloat16[/b] need half the disk space of float32, "
            "[b]int8[/b] a quarter. [b]int4[/b] needs about a seventh: it keeps vectors of tokens in 4 bits, and an "
            "entity's single vectors in 8."
        ),
    ] = "float32",
    strict: _Strict = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """Encode entities with a model into a folder, to which [b]hf-mel link[/b] links mentions.

    The entities come from a data set or from a file of your own. For your own entities take a model that knows language:
    one that you trained, or a text encoder such as sentence-transformers/all-MiniLM-L6-v2, which needs no training.

    To resume an interrupted build, repeat the command. With [b]accelerate launch -m hf_mel kb build …[/b], several processes
    share the entities, on one host or on several that see the folder of the output. The files are the same.

    Examples:

      hf-mel kb build runs/mimic_flags --dataset data/flags_mel --output kb/flags

      hf-mel kb build sentence-transformers/all-MiniLM-L6-v2 --entities mine.csv --output kb/mine

      hf-mel kb build runs/artists --entities artists.csv --column name=artist --column attributes=sex,placeOfBirth \\
        --keep-column born --ignore-other-columns --output kb/artists

      accelerate launch -m hf_mel kb build runs/mimic_wikimel --dataset data/wikimel --output kb/wikimel
    """
    if (dataset is None) == (entities is None):
        raise typer.BadParameter("Give either --dataset or --entities.", param_hint="--dataset")
    if entities is None and (column or ignore_other_columns or inverted_names or keep_column):
        raise typer.BadParameter("Give a file of --entities, or leave this out.", param_hint="--column")
    mapping = None
    if entities is not None:
        mapping = _checked_mapping(entities, column, ignore_other_columns, inverted_names, keep_column)

    from hf_mel.cli.printing import print_plain, show_logs
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase

    processes, device = shared_processes(device)
    with show_logs():
        retriever, processor = load_retriever(
            model, revision=revision, device=device, trust_remote_code=trust_remote_code
        )
        kb = KnowledgeBase.build(
            dataset if entities is None else entities,
            retriever,
            processor,
            output=output,
            posts=posts,
            batch_size=batch_size,
            dtype=dtype,
            strict=strict,
            mapping=mapping,
            processes=processes,
            progress=processes.is_main_process,
        )
    if not processes.is_main_process:
        return
    _print_info(kb)
    _print_left_out(kb, kb.left_out_images)
    print_plain(
        f'Next: hf-mel link {model} --kb {output} --text "…" --mention "…"\n'
        f"      hf-mel kb add {output} --model {model} --entities FILE\n"
        f"      hf-mel kb index {output} --model {model}   # for a large knowledge base"
    )


@app.command()
def add(
    kb: _Folder,
    model: _Model,
    entities: Annotated[Path, typer.Option(help=_ENTITIES_HELP)],
    column: Column = None,
    ignore_other_columns: IgnoreOtherColumns = False,
    inverted_names: InvertedNames = False,
    keep_column: KeepColumn = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace entities whose id exists, instead of reporting an error.")
    ] = False,
    strict: _Strict = False,
    batch_size: _BatchSize = 64,
    wait: _Wait = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """Add entities of your own. Existing entities are not encoded again.

    Example:

      hf-mel kb add kb/flags --model runs/mimic_flags --entities mine.jsonl
    """
    from hf_mel.cli.printing import print_plain, show_logs
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    mapping = _checked_mapping(entities, column, ignore_other_columns, inverted_names, keep_column)
    with opened.writing(wait=wait):
        retriever, processor = load_retriever(
            model, revision=revision, device=device, trust_remote_code=trust_remote_code
        )
        listed_before = len(opened.left_out_images)
        with show_logs():
            count = opened.add(
                entities,
                retriever,
                processor,
                replace=replace,
                batch_size=batch_size,
                strict=strict,
                mapping=mapping,
            )
        left_out = opened.left_out_images[listed_before:]
    print_plain(f"Added {_count_entities(count)} to {kb}, which now has {len(opened):,}.")
    _print_left_out(opened, left_out)


@app.command()
def update(
    kb: _Folder,
    model: _Model,
    dataset: Annotated[
        str | None, typer.Option(help="The data set with the entities: a folder, or a data set on the Hub.")
    ] = None,
    entities: Annotated[Path | None, typer.Option(help=_ENTITIES_HELP)] = None,
    column: Column = None,
    ignore_other_columns: IgnoreOtherColumns = False,
    inverted_names: InvertedNames = False,
    keep_column: KeepColumn = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all ids that were added, changed and removed, as JSON.")
    ] = False,
    strict: _Strict = False,
    batch_size: _BatchSize = 64,
    wait: _Wait = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """Make a knowledge base hold exactly the entities of a newer data set or file.

    Only new and changed entities are encoded. Those that are no longer there are removed, and listed. Indexes are kept.

    Examples:

      hf-mel kb update kb/people --model runs/mimic --dataset data/wikidata-people

      hf-mel kb update kb/mine --model runs/mimic --entities mine.csv --json
    """
    if (dataset is None) == (entities is None):
        raise typer.BadParameter("Give either --dataset or --entities.", param_hint="--dataset")
    if entities is None and (column or ignore_other_columns or inverted_names or keep_column):
        raise typer.BadParameter("Give a file of --entities, or leave this out.", param_hint="--column")

    from dataclasses import asdict

    from hf_mel.cli.printing import print_json, print_plain, show_logs
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    mapping = None
    if entities is not None:
        mapping = _checked_mapping(entities, column, ignore_other_columns, inverted_names, keep_column)
    with opened.writing(wait=wait):
        retriever, processor = load_retriever(
            model, revision=revision, device=device, trust_remote_code=trust_remote_code
        )
        with show_logs():
            done = opened.update(
                dataset if entities is None else entities,
                retriever,
                processor,
                batch_size=batch_size,
                strict=strict,
                mapping=mapping,
            )
        left_out = opened.left_out_images
        indexes = opened.info()["indexes"]
    if as_json:
        print_json(asdict(done))
        return
    print_plain(
        f"{kb} now has {_count_entities(len(opened))}: {len(done.added):,} added, {len(done.changed):,} changed, "
        f"{len(done.removed):,} removed, {done.num_unchanged:,} unchanged and not encoded again."
    )
    if done.removed:
        print_plain(
            "Removed (--json lists all):\n" + "\n".join(first_lines([f"  {name}" for name in done.removed], 10))
        )
    for kind in indexes if done.added or done.changed else ():
        print_plain(f"Next: hf-mel kb index {kb} --model {model} --kind {kind}   # adds the new rows to the index")
    _print_left_out(opened, left_out)


@app.command()
def remove(
    kb: _Folder,
    ids: Annotated[list[str], typer.Argument(help="The ids of the entities.")],
    wait: _Wait = 0,
) -> None:
    """Remove entities. They are no longer ranked, and can be added again.

    Example:

      hf-mel kb remove kb/flags Q30 Q145
    """
    from hf_mel.cli.printing import print_plain
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    with opened.writing(wait=wait):
        count = opened.remove(ids)
    print_plain(f"Removed {_count_entities(count)} from {kb}, which now has {len(opened):,}.")


@app.command()
def index(
    kb: _Folder,
    model: _Model,
    kind: _Kind = "faiss-pq",
    uri: Annotated[
        str | None,
        typer.Option(
            help="Address of a Milvus server, for [b]milvus[/b]. Its token is read from MILVUS_TOKEN. Default: a file "
            "in the folder of the knowledge base."
        ),
    ] = None,
    wait: _Wait = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """Build an index, so that a mention is not compared with every entity.

    The index finds candidates by one vector per entity, and the model scores only these, exactly. Entities that are
    not among the candidates are missed: measure how many with [b]hf-mel kb recall[/b].

    [b]codes[/b] miss nothing. They bound the scores of all entities, and the index exact of [b]hf-mel link[/b] uses them by
    itself: it scores only entities that may be among the best, and proves that no other is.

    After adding many entities, or after an interruption, run the command again: it continues from the existing index.
    Removing entities needs no new index. An index is not published with its knowledge base.

    With [b]accelerate launch -m hf_mel kb index …[/b], several processes share the entities of codes. An index of another
    kind is built by one of them.

    Examples:

      hf-mel kb index kb/wikimel --model runs/mimic_wikimel

      hf-mel kb index kb/wikimel --model runs/mimic_wikimel --kind codes

      hf-mel kb index kb/wikimel --model runs/mimic_wikimel --kind milvus --uri http://localhost:19530
    """
    from hf_mel.cli.printing import print_plain
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.inference.ranking import process_group
    from hf_mel.kb.indexes import build_index
    from hf_mel.kb.knowledge_base import KnowledgeBase
    from hf_mel.kb.shared_work import held_by_first

    processes, device = shared_processes(device)
    opened = KnowledgeBase(kb)
    with held_by_first(opened.writing(wait=wait), process_group(processes)):
        retriever, processor = load_retriever(
            model, revision=revision, device=device, trust_remote_code=trust_remote_code
        )
        is_first = processes.is_main_process
        build_index(opened, kind, retriever, processor, uri=uri, processes=processes, progress=is_first)
    if not is_first:
        return
    if kind == "codes":
        print_plain(
            f"The codes of {kb} cover its {_count_entities(len(opened))}.\n"
            f'Next: hf-mel link {model} --kb {kb} --certify --text "…" --mention "…"'
        )
        return
    print_plain(
        f"The index {kind} of {kb} covers its {_count_entities(len(opened))}.\n"
        f'Next: hf-mel link {model} --kb {kb} --index {kind} --text "…" --mention "…"\n'
        f"      hf-mel kb recall {kb} --model {model} --kind {kind} --dataset DATA"
    )


@app.command()
def recall(
    kb: _Folder,
    model: _Model,
    dataset: Annotated[str, typer.Option(help="The data set with the mentions: a folder, or a data set on the Hub.")],
    kind: _Kind = "faiss-pq",
    split: Annotated[str, typer.Option(help="Split of the mentions.")] = "validation",
    limit: Annotated[int, typer.Option(min=1, help="Number of mentions, taken evenly from the split.")] = 500,
    first_stage: FirstStage = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """Print the recall of an index at 1, 10 and 64 as JSON.

    Recall at k is the share of the k best of all entities that are among the candidates of the index.

    Example:

      hf-mel kb recall kb/wikimel --model runs/mimic_wikimel --dataset data/wikimel
    """
    import numpy as np

    from hf_mel.data.loading import load_mentions
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.inference.encode import encode_rows
    from hf_mel.inference.inputs import ModelInputs
    from hf_mel.kb.indexes import open_index
    from hf_mel.kb.indexes.base import FIRST_STAGE
    from hf_mel.kb.indexes.recall import recall as compute_recall
    from hf_mel.kb.knowledge_base import KnowledgeBase

    mentions = load_mentions(dataset, split)
    count = min(limit, len(mentions))
    sample = mentions.select(np.linspace(0, len(mentions) - 1, count).astype(int))
    opened = KnowledgeBase(kb)
    retriever, processor = load_retriever(model, revision=revision, device=device, trust_remote_code=trust_remote_code)
    opened.check_made_by(retriever, processor)
    built = open_index(opened, kind, retriever, first_stage=first_stage)
    encodings = encode_rows(ModelInputs(retriever, processor), sample, "mentions", progress=True)
    recalls = compute_recall(built, encodings, progress=True)
    result = {
        "index": kind,
        "first_stage": first_stage or FIRST_STAGE,
        "entities": len(opened),
        "mentions": count,
    }
    typer.echo(json.dumps({**result, **{f"recall@{k}": round(value, 4) for k, value in recalls.items()}}))


@app.command()
def info(
    kb: _Folder,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also read every file and compare its sha256. Sizes are always compared."),
    ] = False,
) -> None:
    """Show the content of a knowledge base and the model that built it.

    Example:

      hf-mel kb info kb/flags --verify
    """
    from hf_mel.cli.printing import print_plain
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    if verify:
        opened.verify()
    _print_info(opened)
    if verify:
        print_plain("All files have the recorded sha256.")


def _print_info(kb: KnowledgeBase) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    info = kb.info()
    model = info["model"]
    num_rows = info["entities"] + info["removed"]
    table = Table(title=Text(safe_text(str(info["path"]))), show_header=False)
    removed = f", and {info['removed']:,} removed" if info["removed"] else ""
    table.add_row("entities", f"{info['entities']:,}{removed}")
    revision = f", revision {model['revision']}" if model["revision"] else ""
    table.add_row("built by", Text(safe_text(f"{model['name']} ({model['type']}{revision})")))
    table.add_row("weights", f"sha256 {model['weights'][:16]}…")
    table.add_row(
        "encodings",
        f"{decimal(info['encoding_bytes'])} in {info['dtype']}, "
        f"{decimal(info['encoding_bytes'] // num_rows)} per entity",
    )
    for name, spec in info["encodings"].items():
        table.add_row("", f"{name} {' × '.join(map(str, spec['shape'])) or '1'} {spec['dtype']}")
    table.add_row("names and images", decimal(info["entity_bytes"]))
    table.add_row("shards", f"{info['shards']:,}")
    if info["indexes"]:
        table.add_row("indexes", ", ".join(info["indexes"]))
    Console().print(table)


def _checked_mapping(
    entities: Path,
    column: list[str] | None,
    ignore_other_columns: bool,
    inverted_names: bool,
    keep_column: list[str] | None,
) -> ColumnMapping | None:
    """Checks the rows of a file of entities before a model is loaded, and returns what its columns become.

    A data set has no columns with other names, and gives `None`.
    """
    from hf_mel.data.entity_files import check_entity_rows
    from hf_mel.kb.entities import is_row_file
    from hf_mel.row_columns import ColumnMapping

    options: dict[str, Any] = {
        "ignore_others": ignore_other_columns,
        "inverted_names": inverted_names,
        "kept": keep_column or (),
    }
    if not is_row_file(entities) and not column and not any(options.values()):
        return None
    mapping = ColumnMapping.parse(column or (), **options)
    check_entity_rows(entities, mapping)
    return mapping


def _print_left_out(kb: KnowledgeBase, left_out: list[dict[str, Any]]) -> None:
    """Prints how many images were missing or damaged, and the first of them."""
    from hf_mel.cli.printing import print_plain
    from hf_mel.kb.entities import LEFT_OUT_NAME

    if not left_out:
        return
    lines = first_lines(
        [f"{entry['file'] or 'entities'}, row {entry['row']}: {entry['problem']}" for entry in left_out], 10
    )
    print_plain(
        f"Images left out, because they are missing or damaged: {len(left_out):,}. {kb.path / LEFT_OUT_NAME} lists all; "
        "--strict stops at the first." + "".join(f"\n  {line}" for line in lines)
    )


def _count_entities(count: int) -> str:
    return f"{count:,} {'entity' if count == 1 else 'entities'}"

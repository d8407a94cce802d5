"""`hf-mel kb`: build, change and look at knowledge bases."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Build the knowledge base a model links to, and add or remove entities.\n\n"
    "A knowledge base is a folder of encoded entities. It belongs to the model that built it.",
    no_args_is_help=True,
)

_ENTITIES_HELP = (
    "A .jsonl or .csv file of your own entities: [b]id[/b] and [b]name[/b], and if there are any [b]description[/b], "
    "[b]attributes[/b], [b]aliases[/b], [b]image[/b] (a path, seen from the file)."
)
_Device = Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")]
_TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model, if it is not ours.")
]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Entities to encode at a time.")]


class Kind(str, Enum):
    """What an index is."""

    FAISS_PQ = "faiss-pq"
    FAISS_FLAT = "faiss-flat"
    MILVUS = "milvus"


_Kind = Annotated[
    Kind,
    typer.Option(
        help="[b]faiss-pq[/b]: compares with a short code of every entity, the fastest for most. [b]faiss-flat[/b]: with "
        "every vector, for a hundred thousand entities. [b]faiss-ivf[/b]: with the vectors of some lists, misses more. "
        "[b]faiss-hnsw[/b]: a graph, slow to build. [b]milvus[/b]: a database, in a file or on a server."
    ),
]


class Dtype(str, Enum):
    """What encodings are stored in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a model on the Hub.")],
    output: Annotated[Path, typer.Option(help="The folder to write. A knowledge base that is there is replaced.")],
    dataset: Annotated[
        str | None, typer.Option(help="A data-set folder, or a data set on the Hub, whose entities to take.")
    ] = None,
    entities: Annotated[Path | None, typer.Option(help=_ENTITIES_HELP)] = None,
    posts: Annotated[
        str,
        typer.Option(
            help="What a model that knows entities by posts knows them by: [b]auto[/b], the data set's posts, or without "
            "any the captions of its training split; [b]none[/b]; or a split. Entities of a file are known by themselves."
        ),
    ] = "auto",
    batch_size: _BatchSize = 64,
    dtype: Annotated[
        Dtype, typer.Option(help="What to store encodings in: the halves take half the disk, at some rounding.")
    ] = Dtype.FLOAT32,
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    revision: _Revision = None,
) -> None:
    """Encode entities with a model into a folder that [b]hf-mel link[/b] ranks.

    Entities come from a data set or from a file of your own. An interrupted build goes on when it is repeated.

    Examples:

      hf-mel kb build runs/mimic_flags --dataset data/flags_mel --output kb/flags

      hf-mel kb build runs/mimic_flags --entities mine.csv --output kb/mine
    """
    if (dataset is None) == (entities is None):
        raise typer.BadParameter("Give a data set or a file of entities, one of them.", param_hint="--dataset")

    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase

    retriever, processor = load_retriever(model, revision=revision, device=device, trust_remote_code=trust_remote_code)
    kb = KnowledgeBase.build(
        dataset if entities is None else entities,
        retriever,
        processor,
        output=output,
        posts=posts,
        batch_size=batch_size,
        dtype=dtype.value,
    )
    _report(kb)
    _print(
        f'Next: hf-mel link {model} --kb {output} --text "…" --mention "…"\n'
        f"      hf-mel kb add {output} --model {model} --entities FILE\n"
        f"      hf-mel kb index {output} --model {model}   # for a large one"
    )


@app.command()
def add(
    kb: Annotated[Path, typer.Argument(help="The folder of the knowledge base.")],
    model: Annotated[str, typer.Option(help="The model that built it.")],
    entities: Annotated[Path, typer.Option(help=_ENTITIES_HELP)],
    replace: Annotated[
        bool, typer.Option("--replace", help="An entity whose id is there already takes the place of the old one.")
    ] = False,
    batch_size: _BatchSize = 64,
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    revision: _Revision = None,
) -> None:
    """Add entities of your own. The ones that are there are not encoded again.

    Example:

      hf-mel kb add kb/flags --model runs/mimic_flags --entities mine.jsonl
    """
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    retriever, processor = load_retriever(model, revision=revision, device=device, trust_remote_code=trust_remote_code)
    count = opened.add(entities, retriever, processor, replace=replace, batch_size=batch_size)
    _print(f"{_entities(count)} added to {kb}, which now has {len(opened):,}.")


@app.command()
def remove(
    kb: Annotated[Path, typer.Argument(help="The folder of the knowledge base.")],
    ids: Annotated[list[str], typer.Argument(help="The ids of the entities.")],
) -> None:
    """Remove entities: they are not ranked any more, and can be added again.

    Example:

      hf-mel kb remove kb/flags Q30 Q145
    """
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    count = opened.remove(ids)
    _print(f"{_entities(count)} removed from {kb}, which now has {len(opened):,}.")


@app.command()
def index(
    kb: Annotated[Path, typer.Argument(help="The folder of the knowledge base.")],
    model: Annotated[str, typer.Option(help="The model that built it.")],
    kind: _Kind = Kind.FAISS_PQ,
    uri: Annotated[
        str | None,
        typer.Option(
            help="The address of a Milvus server, for [b]milvus[/b]; its token is taken from MILVUS_TOKEN. Default: a "
            "file in the knowledge base's folder."
        ),
    ] = None,
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    revision: _Revision = None,
) -> None:
    """Build an index, so that a mention need not be compared with every entity.

    An index finds candidates by one vector of each entity; the model then scores these as it scores everything. What
    is not among them is missed: [b]hf-mel kb recall[/b] says how often.

    Run it again after adding many entities: it goes on from the index that is there. It goes on after an interruption,
    too. Removing entities needs nothing. An index is not published with its knowledge base.

    Examples:

      hf-mel kb index kb/wikimel --model runs/mimic_wikimel

      hf-mel kb index kb/wikimel --model runs/mimic_wikimel --kind milvus --uri http://localhost:19530
    """
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.kb.indexes import build_index
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    retriever, processor = load_retriever(model, revision=revision, device=device, trust_remote_code=trust_remote_code)
    build_index(opened, kind.value, retriever, processor, uri=uri)
    _print(
        f"The index {kind.value} of {kb} has its {_entities(len(opened))}.\n"
        f'Next: hf-mel link {model} --kb {kb} --index {kind.value} --text "…" --mention "…"\n'
        f"      hf-mel kb recall {kb} --model {model} --kind {kind.value} --dataset DATA"
    )


@app.command()
def recall(
    kb: Annotated[Path, typer.Argument(help="The folder of the knowledge base.")],
    model: Annotated[str, typer.Option(help="The model that built it.")],
    dataset: Annotated[str, typer.Option(help="A data-set folder, or a data set on the Hub: whose mentions to take.")],
    kind: _Kind = Kind.FAISS_PQ,
    split: Annotated[str, typer.Option(help="Which mentions.")] = "validation",
    limit: Annotated[int, typer.Option(min=1, help="How many mentions, evenly drawn from all.")] = 500,
    first_stage: Annotated[
        int | None, typer.Option(min=1, help="How many candidates the index finds. Default: 256.")
    ] = None,
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    revision: _Revision = None,
) -> None:
    """Print, as JSON, how much of the exact ranking an index finds: recall at 1, 10 and 64.

    Recall at k is the share of the k best of all entities that are among the candidates.

    Example:

      hf-mel kb recall kb/wikimel --model runs/mimic_wikimel --dataset data/wikimel
    """
    import numpy as np

    from hf_mel.data.loading import load_mentions
    from hf_mel.inference.checkpoints import load_retriever
    from hf_mel.inference.encode import encode_rows
    from hf_mel.kb.indexes import open_index
    from hf_mel.kb.indexes.base import FIRST_STAGE
    from hf_mel.kb.indexes.recall import recall as recall_of
    from hf_mel.kb.knowledge_base import KnowledgeBase

    mentions = load_mentions(dataset, split)
    count = min(limit, len(mentions))
    some = mentions.select(np.linspace(0, len(mentions) - 1, count).astype(int))
    opened = KnowledgeBase(kb)
    retriever, processor = load_retriever(model, revision=revision, device=device, trust_remote_code=trust_remote_code)
    opened.check_made_by(retriever, processor)
    found = open_index(opened, kind.value, retriever, first_stage=first_stage)
    encoded = encode_rows(retriever, processor, some, "mentions", progress=True)
    values = recall_of(found, encoded, progress=True)
    result = {
        "index": kind.value,
        "first_stage": first_stage or FIRST_STAGE,
        "entities": len(opened),
        "mentions": count,
    }
    typer.echo(json.dumps({**result, **{f"recall@{at}": round(value, 4) for at, value in values.items()}}))


@app.command()
def info(
    kb: Annotated[Path, typer.Argument(help="The folder of the knowledge base.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read every file and compare its sha256. Sizes are always compared.")
    ] = False,
) -> None:
    """Show what a knowledge base holds and which model built it.

    Example:

      hf-mel kb info kb/flags --verify
    """
    from hf_mel.kb.knowledge_base import KnowledgeBase

    opened = KnowledgeBase(kb)
    if verify:
        opened.verify()
    _report(opened)
    if verify:
        _print("Every file is as it was written.")


def _report(kb) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    info = kb.info()
    rows = info["entities"] + info["removed"]
    table = Table(title=str(info["path"]), show_header=False)
    removed = f", and {info['removed']:,} removed" if info["removed"] else ""
    table.add_row("entities", f"{info['entities']:,}{removed}")
    revision = f", revision {info['model']['revision']}" if info["model"]["revision"] else ""
    table.add_row("built by", f"{info['model']['name']} ({info['model']['type']}{revision})")
    table.add_row("weights", f"sha256 {info['model']['weights'][:16]}…")
    table.add_row(
        "encodings",
        f"{decimal(info['encoding_bytes'])} in {info['dtype']}, {decimal(info['encoding_bytes'] // rows)} per entity",
    )
    for name, spec in info["encodings"].items():
        table.add_row("", f"{name} {' × '.join(map(str, spec['shape'])) or '1'} {spec['dtype']}")
    table.add_row("names and images", decimal(info["entity_bytes"]))
    table.add_row("shards", f"{info['shards']:,}")
    if info["indexes"]:
        table.add_row("indexes", ", ".join(info["indexes"]))
    Console().print(table)


def _entities(count: int) -> str:
    return f"{count:,} {'entity' if count == 1 else 'entities'}"


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)

"""`hf-mel kb`: build, change and look at knowledge bases."""

from __future__ import annotations

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
    batch_size: _BatchSize = 64,
    dtype: Annotated[
        Dtype, typer.Option(help="What to store encodings in: the halves take half the disk, at some rounding.")
    ] = Dtype.FLOAT32,
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    revision: _Revision = None,
) -> None:
    """Encode entities with a model into a folder that [b]hf-mel link[/b] ranks.

    Entities come from a data set or from a file of your own.

    Examples:

      hf-mel kb build runs/mimic_flags --dataset data/flags_mel --output kb/flags

      hf-mel kb build runs/mimic_flags --entities mine.csv --output kb/mine
    """
    if (dataset is None) == (entities is None):
        raise typer.BadParameter("Give a data set or a file of entities, one of them.", param_hint="--dataset")

    from hf_mel.linking.knowledge_base import KnowledgeBase
    from hf_mel.linking.loading import load_retriever

    retriever, processor = load_retriever(model, revision=revision, device=device, trust_remote_code=trust_remote_code)
    kb = KnowledgeBase.build(
        dataset if entities is None else entities,
        retriever,
        processor,
        output=output,
        batch_size=batch_size,
        dtype=dtype.value,
    )
    _report(kb)
    _print(
        f'Next: hf-mel link {model} --kb {output} --text "…" --mention "…"\n'
        f"      hf-mel kb add {output} --model {model} --entities FILE"
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
    from hf_mel.linking.knowledge_base import KnowledgeBase
    from hf_mel.linking.loading import load_retriever

    opened = KnowledgeBase.load(kb)
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
    from hf_mel.linking.knowledge_base import KnowledgeBase

    opened = KnowledgeBase.load(kb)
    count = opened.remove(ids)
    _print(f"{_entities(count)} removed from {kb}, which now has {len(opened):,}.")


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
    from hf_mel.linking.knowledge_base import KnowledgeBase

    _report(KnowledgeBase.load(kb, verify=verify))
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
    Console().print(table)


def _entities(count: int) -> str:
    return f"{count:,} {'entity' if count == 1 else 'entities'}"


def _print(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)

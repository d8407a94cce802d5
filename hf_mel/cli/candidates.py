"""`hf-mel candidates`: the few entities each mention may mean, for a reranker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import datasets

    from hf_mel.candidates.lists import CandidateLists


def candidates(
    dataset: Annotated[str, typer.Argument(help="A data-set folder, or a data set on the Hub.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="The Parquet file to write.")],
    split: Annotated[str, typer.Option(help="Which mentions: train, validation or test.")] = "test",
    config: Annotated[
        str, typer.Option(help="The configuration of the mentions, for a data set that has several.")
    ] = "mentions",
    source: Annotated[
        str,
        typer.Option(
            help="[b]name[/b], [b]prior[/b], [b]retriever[/b], [b]release[/b] (those the data set ships), or several of "
            "them joined by +; after these [b]document[/b]: what has none gets those of its document."
        ),
    ] = "name",
    k: Annotated[int, typer.Option("--k", min=1, help="Candidates per mention at most.")] = 100,
    scorer: Annotated[
        str, typer.Option(help="How names are compared: WRatio, composite (as MMEL has it), jaro_winkler, …")
    ] = "WRatio",
    retriever: Annotated[str | None, typer.Option(help="The trained retriever: a run folder or a model.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
) -> None:
    """List the entities each mention may mean, with the score and the source of each, and print how many golds are there.

    Lists that were made before are taken from a cache, by a digest of all they depend on.

    Examples:

      hf-mel candidates data/wikimel --split test --output cands/test.parquet

      hf-mel candidates data/wikimel --source retriever --retriever runs/mimic_wikimel --k 16 --output cands/test.parquet
    """
    from rich.console import Console

    from hf_mel.data.loading import load_entities, load_mentions
    from hf_mel.data.posts import posts_of
    from hf_mel.evaluation.full_evaluator import KS

    of_split = partial(load_mentions, dataset, config=config)
    mentions, entities = of_split(split), load_entities(dataset)
    lists = candidates_for(
        source,
        mentions,
        entities,
        of_split,
        k=k,
        scorer=scorer,
        retriever=retriever,
        device=device,
        posts=partial(posts_of, dataset, config=config),
    )
    lists.setting["split"] = split
    lists.save(output)
    lengths = [len(each) for each in lists.entity_ids]
    recall = lists.recall(list(mentions["entity_id"]), [*(each for each in KS if each < lists.longest), lists.longest])
    console = Console()
    mean = sum(lengths) / max(1, len(lengths))
    console.print(
        f"{len(lists):,} mentions, {mean:.1f} candidates each on average, {lengths.count(0):,} without: {output}",
        markup=False,
    )
    console.print(
        "Golds among the first k: "
        + ", ".join(f"{100 * value:.1f} at {name.partition('@')[2]}" for name, value in recall.items())
    )


def candidates_for(
    wanted: str,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    of_split: Callable[[str], datasets.Dataset],
    **options: Any,
) -> CandidateLists:
    """The candidates of mentions of a data set: from a Parquet file, or made from a source."""
    from hf_mel.candidates.lists import CandidateLists
    from hf_mel.candidates.make import check_source, default_cache, make_candidates

    if wanted.endswith(".parquet"):
        return CandidateLists.load(wanted)
    check_source(wanted, k=options["k"], scorer=options["scorer"], retriever=options["retriever"])
    training = of_split("train") if "prior" in wanted.split("+") else None
    return make_candidates(
        wanted, mentions, entities, training=training, cache_dir=default_cache(), progress=True, **options
    )

"""`hf-mel candidates`: lists the candidates of each mention, for a reranker."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hf_mel.cli.options import Device, MentionConfig, NameScorer, RetrieverOption, Split


def candidates(
    dataset: Annotated[str, typer.Argument(help="A data-set folder, or a data set on the Hub.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="The Parquet file to write.")],
    split: Split = "test",
    config: MentionConfig = "mentions",
    source: Annotated[
        str,
        typer.Option(
            help="[b]name[/b] (similar names), [b]exact[/b] (equal names), [b]bm25[/b] (words of the mention in the entity's "
            "texts), [b]prior[/b] (counts in the training split), [b]dictionary[/b] (names with all words of the mention), "
            "[b]namesake[/b] (the same in a random order), [b]retriever[/b] (a trained model), [b]release[/b] (candidates in the data set), "
            "or several joined by +. End with [b]+document[/b] to give mentions without candidates those of their "
            "document, or with [b]+shared[/b] to give every mention the first candidates of the others."
        ),
    ] = "name",
    k: Annotated[int, typer.Option("--k", min=1, help="Maximum number of candidates per mention.")] = 100,
    scorer: NameScorer = "WRatio",
    retriever: RetrieverOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of namesakes (--source namesake).")] = 0,
    device: Device = None,
) -> None:
    """List the candidates of each mention with their scores and sources, and print the recall of the golds.

    Finished lists are cached by a digest of everything they depend on.

    Examples:

      hf-mel candidates data/wikimel --split test --output cands/test.parquet

      hf-mel candidates data/wikimel --source retriever --retriever runs/mimic_wikimel --k 16 --output cands/test.parquet
    """
    from hf_mel.candidates.make import load_or_make_candidates
    from hf_mel.cli.printing import message_console, print_plain
    from hf_mel.data.loading import load_entities, load_mentions
    from hf_mel.data.posts import posts_of
    from hf_mel.evaluation.settings import KS

    load_split = partial(load_mentions, dataset, config=config)
    mentions, entities = load_split(split), load_entities(dataset)
    lists = load_or_make_candidates(
        source,
        mentions,
        entities,
        load_split,
        k=k,
        scorer=scorer,
        retriever=retriever,
        device=device,
        posts=partial(posts_of, dataset, config=config),
        seed=seed,
    )
    lists.setting["split"] = split
    lists.save(output)
    lengths = [len(ids) for ids in lists.entity_ids]
    ks = [*(value for value in KS if value < lists.longest), lists.longest]
    recall = lists.recall(list(mentions["entity_id"]), ks)
    mean = sum(lengths) / max(1, len(lengths))
    print_plain(
        f"{len(lists):,} mentions, {mean:.1f} candidates each on average, {lengths.count(0):,} without: {output}\n"
        "Golds among the first k candidates, in %: "
        + ", ".join(f"{100 * value:.1f} at {name.partition('@')[2]}" for name, value in recall.items()),
        message_console(output),
    )

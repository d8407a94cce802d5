"""Benchmark of a reranker: pairs per second, and seconds per mention for growing numbers of candidates.

Scores the first mentions of a split with 1, 4, 16, 64 and 100 candidates each, in the way of an evaluation: batches sorted
by length, each image encoded once, contexts ranked jointly if the model can. For comparison, it also scores one pair at a
time. A line is fitted to the seconds per mention. It gives the cost of a mention and the cost of a candidate.

    python -m benchmarks.reranking_cost runs/RERANKER data/wikimel --candidates cands/test.parquet --output cost.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hf_mel.candidates.lists import CandidateLists
from hf_mel.data.loading import dataset_version, load_entities, load_mentions
from hf_mel.evaluation.evaluator import device_name, software_versions
from hf_mel.inference.checkpoints import load_reranker
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.reranking import score_pairs
from hf_mel.protocols import ranks_jointly


def fit_line(results: Sequence[dict[str, float]], column: str) -> dict[str, float]:
    """Fits seconds per mention ≈ `per_mention` + `per_candidate` · |E| by least squares over the numbers of candidates."""
    sizes = [result["pairs"] / result["mentions"] for result in results]
    seconds = [result[column] for result in results]
    slope, intercept = statistics.linear_regression(sizes, seconds)
    return {"per_mention": intercept, "per_candidate": slope}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder or Hub id of a reranker")
    parser.add_argument("dataset", help="data-set folder")
    parser.add_argument("--split", default="test", help="split of the mentions")
    parser.add_argument("--candidates", help="candidate file of `hf-mel candidates` (default: random entities)")
    parser.add_argument("--mentions", type=int, default=16, help="number of mentions, from the start of the split")
    parser.add_argument("--sizes", default="1,4,16,64,100", help="numbers of candidates")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per batch")
    parser.add_argument("--device", default="cpu", help="device to run on: cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random candidates")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)

    model, processor = load_reranker(args.model, device=args.device)
    mentions, entities = load_mentions(args.dataset, args.split), load_entities(args.dataset)
    mentions = mentions.select(range(min(args.mentions, len(mentions))))
    generator = random.Random(args.seed)
    sizes = [int(size) for size in args.sizes.split(",")]
    given = [[] for _ in mentions["mention_id"]]
    if args.candidates:
        given = CandidateLists.load(args.candidates).for_mentions(mentions).rows(entities["entity_id"])
    lists = []
    for rows in given:  # random entities fill up lists that are too short
        others = generator.sample(range(len(entities)), min(max(sizes), len(entities)))
        lists.append(list(dict.fromkeys([*rows, *others]))[: max(sizes)])

    jointly = ranks_jointly(model)
    joint_seconds = 0.0  # spent in rank_jointly, which runs after scoring, once for a chunk of pairs
    if jointly:
        rank_jointly = model.rank_jointly

        def timed_rank_jointly(*inputs):
            nonlocal joint_seconds
            start = time.perf_counter()
            scores = rank_jointly(*inputs)
            joint_seconds += time.perf_counter() - start
            return scores

        model.rank_jointly = timed_rank_jointly

    def seconds(size: int, batch_size: int) -> tuple[float, float]:
        """Returns the seconds of scoring, and of ranking jointly."""
        nonlocal joint_seconds
        chosen, joint_seconds = [rows[:size] for rows in lists], 0.0
        masks = [torch.ones(len(chosen), max(map(len, chosen)), dtype=torch.bool)] if jointly else []
        start = time.perf_counter()
        score_pairs(
            ModelInputs(model, processor), mentions, entities, chosen, joint_masks=masks, batch_size=batch_size
        )
        return time.perf_counter() - start - joint_seconds, joint_seconds

    seconds(1, args.batch_size)  # warm-up
    results = []
    for size in sizes:
        plain, joint = seconds(size, args.batch_size)
        pairs = sum(len(rows[:size]) for rows in lists)
        result = {"candidates": size, "mentions": len(lists), "pairs": pairs, "pairs_per_second": pairs / plain}
        result["seconds_per_mention"] = plain / len(lists)
        if jointly:
            result["seconds_per_mention_jointly"] = (plain + joint) / len(lists)
        results.append(result)
    single = sum(len(rows[: sizes[0]]) for rows in lists) / seconds(sizes[0], 1)[0]
    timed_columns = [name for name in results[0] if name.startswith("seconds_")]
    fitted = {name: fit_line(results, name) for name in timed_columns} if len(set(sizes)) > 1 else {}

    table = Table("candidates", title=f"{Path(args.model).name}, {len(lists)} mentions of {args.split}")
    columns = ["pairs_per_second", *timed_columns]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for result in results:
        table.add_row(str(result["candidates"]), *(f"{result[name]:.4g}" for name in columns))
    table.caption = f"One pair at a time: {single:.4g} pairs per second."
    for name, fit in fitted.items():
        table.caption += f"\n{name.replace('_', ' ')} ≈ {fit['per_mention']:.3g} + {fit['per_candidate']:.3g} · |E|"
    Console().print(table)
    if args.output:
        content = {
            "model": Path(args.model).name,
            "data": {**dataset_version(args.dataset), "split": args.split},
            "mentions": len(lists),
            "batch_size": args.batch_size,
            "results": results,
            "fitted": fitted,
            "pairs_per_second_one_at_a_time": single,
            "device": device_name(model),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "software": software_versions(),
        }
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

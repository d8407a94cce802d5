"""Benchmark of linking one mention at a time: p50 and p95 of every index, and its recall of the exact ranking.

For knowledge bases of several sizes, each index is built and timed. It is kept in the scratch folder, so that a second
run can reuse it. It is then asked for the best 64 entities (or `--top-k`) of one encoded mention after another: first stage, reading the
candidates from the knowledge base, and exact scores. The indexes take turns. recall@k is the share of the best k entities
of the exact ranking that are among the best k of the index. An index whose package is not installed is reported as
missing.

    python -m benchmarks.latency                                          # 20,000 and 100,000 entities
    python -m benchmarks.latency --sizes 100000,1000000 --graph-limit 1000000   # hours for the graph index, 20 GB of disk
    python -m benchmarks.latency --sizes 10000 --mentions 40 --kinds exact,faiss-flat
    python -m benchmarks.latency --model runs/mimic-text_wikimel --dataset data/wikimel --sizes 100000
    python -m benchmarks.latency --model runs/mimic-text_wikimel --dataset data/wikimel --sizes 1000000 --kinds exact,codes,faiss-pq --top-k 10

"exact" scores every entity; "codes" is the same ranking, proven by codes (`docs/guides/exact.md`). For codes, the shares of
the entities that each step leaves are reported too, and the bytes that the first step reads for every mention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import harness
from benchmarks.sources import open_source
from hf_mel.errors import MissingExtraError
from hf_mel.inference.encodings import num_rows, slice_encodings
from hf_mel.kb.indexes import KINDS, build_index, certified, open_index
from hf_mel.kb.indexes.base import FIRST_STAGE, ExactIndex, Index
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.protocols import Encodings, bounds_scores

TOP_K = 64
CODES = certified.CODES
#: Indexes that build an HNSW graph, in minutes per 100,000 entities.
GRAPHS = ("milvus",)


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", default="20000,100000", help="entities of the knowledge bases")
    parser.add_argument("--mentions", type=int, default=100, help="number of mentions")
    parser.add_argument(
        "--exact-mentions", type=int, default=20, help="number of mentions to time the exact ranking on"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="indexes to measure, separated by commas")
    parser.add_argument(
        "--graph-limit", type=int, default=20_000, help="largest size for graph indexes, whose build is slow"
    )
    parser.add_argument("--first-stage", type=int, default=FIRST_STAGE, help="number of candidates to score exactly")
    parser.add_argument("--top-k", type=int, default=TOP_K, help="number of entities to find for a mention")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the generated model")
    parser.add_argument("--model", help="run folder to measure in place of the generated model")
    parser.add_argument("--dataset", help="data-set folder of that run")
    return parser


def build_once(
    kb: KnowledgeBase, kind: str, model: Any, processor: Any, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Builds an index unless it exists, and returns the seconds of the build, which a file beside the index records."""
    suffix = "seconds" if clock is time.perf_counter else clock.__name__
    note = kb.path.with_name(f"{kb.path.name}-{kind}.{suffix}")
    if kind in kb.info()["indexes"] and note.exists():
        return float(note.read_text())
    harness.say(f"building {kind} over {len(kb):,} entities")
    begin = clock()
    build_index(kb, kind, model, processor, progress=False)
    note.write_text(str(clock() - begin))
    return float(note.read_text())


def opened(kb: KnowledgeBase, kind: str, model: Any, first_stage: int) -> Index:
    """Opens an index. "exact" scores every entity, also where codes are built."""
    return ExactIndex(kb, model) if kind == "exact" else open_index(kb, kind, model, first_stage=first_stage)


def index_bytes(kb: KnowledgeBase, kind: str) -> int:
    """Returns the size of an index on disk, in bytes."""
    paths = (path for entry in kb.path.glob(f"index-{kind}*") for path in (entry, *entry.rglob("*")))
    return sum(path.stat().st_size for path in paths if path.is_file())


def left_by_steps(index: certified.CertifiedIndex, encoded: Encodings, top_k: int) -> dict[str, dict[str, float]]:
    """Returns the shares of the entities that the steps leave, p50 and p95 of encoded mentions.

    "heads" are those whose whole codes are read, "codes" those that the codes leave, and "scored" those that the model
    scores.
    """
    every, split, rank_rows = index._all_tight_bounds, certified._split, certified.rank_rows
    rank_all, num_entities = index._rank, len(index.kb)
    read: list[float] = []
    left: list[float] = []
    scored: list[np.ndarray] = []

    def all_bounds(*args: Any) -> torch.Tensor:
        read.append(1.0)
        return every(*args)

    def splitting(rows: torch.Tensor, *rest: Any) -> Any:
        read.append(len(rows) / num_entities)
        found = split(rows, *rest)
        left.append(len(found[0]) / num_entities)
        return found

    def ranked(model: Any, mention: Any, kb: Any, rows: np.ndarray, **options: Any) -> Any:
        scored.append(rows)
        return rank_rows(model, mention, kb, rows, **options)

    def ranked_all(*args: Any) -> Any:
        scored.append(np.arange(num_entities))
        return rank_all(*args)

    shares: dict[str, list[float]] = {"heads": [], "codes": [], "scored": []}
    with (
        mock.patch.object(index, "_all_tight_bounds", all_bounds),
        mock.patch.object(index, "_rank", ranked_all),
        mock.patch.object(certified, "_split", splitting),
        mock.patch.object(certified, "rank_rows", ranked),
    ):
        for row in range(num_rows(encoded)):
            for of_step in (read, left, scored):
                of_step.clear()
            index.find(slice_encodings(encoded, slice(row, row + 1)), top_k)
            shares["heads"].append(max(read, default=1.0))
            shares["codes"].append(left[-1] if left else 1.0)
            shares["scored"].append(len(np.unique(np.concatenate(scored))) / num_entities)
    return {step: {f"p{q}": float(np.percentile(values, q)) for q in (50, 95)} for step, values in shares.items()}


def measure(
    source: Any,
    kb: KnowledgeBase,
    kinds: list[str],
    *,
    mentions: int,
    exact_mentions: int,
    first_stage: int,
    rounds: int,
    top_k: int = TOP_K,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures the indexes of one knowledge base.

    Args:
        source ([`~benchmarks.sources.Source`]): Model and mentions.
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
        kinds (`list[str]`): Indexes to measure.
        mentions, exact_mentions (`int`): Number of mentions to time, and to time with "exact".
        first_stage (`int`): Number of candidates that an index retrieves.
        rounds (`int`): Number of rounds in which the indexes take turns.
        top_k (`int`): Number of entities to find for a mention.

    Returns:
        `tuple`: A result for each index, and the reason for each index that was left out.
    """
    left_out, build, indexes = [], {}, {}
    for kind in kinds:
        if kind == CODES and not bounds_scores(source.model):
            left_out.append("codes: the model has no bounds of its scores")
            continue
        try:
            build[kind] = 0.0 if kind == "exact" else build_once(kb, kind, *source.builder(len(kb)))
            indexes[kind] = opened(kb, kind, source.model, first_stage)
        except MissingExtraError as error:
            left_out.append(f"{kind}: {error.message}")
    encoded, _, golds = source.mentions(mentions)
    mentions, exact_mentions = min(mentions, len(golds)), min(exact_mentions, len(golds))
    harness.say(f"ranking {mentions} mentions against {len(kb):,} entities")
    k = min(top_k, len(kb))
    exact = ExactIndex(kb, source.model).find(encoded, k).top_rows
    seconds: dict[str, list[float]] = {kind: [] for kind in indexes}
    cpu_seconds: dict[str, list[float]] = {kind: [] for kind in indexes}
    retrieved = {kind: torch.full_like(exact, -1) for kind in indexes}
    counts = {kind: exact_mentions if kind == "exact" else mentions for kind in indexes}
    for turn in range(-1, rounds):
        harness.say(f"timing, {'warm-up' if turn < 0 else f'{turn + 1} of {rounds}'}")
        for kind, index in indexes.items():
            for row in range(counts[kind])[:3] if turn < 0 else range(turn, counts[kind], rounds):
                mention = slice_encodings(encoded, slice(row, row + 1))
                begin, cpu_begin = time.perf_counter(), time.process_time()
                result = index.find(mention, k)
                if turn >= 0:
                    seconds[kind].append(time.perf_counter() - begin)
                    cpu_seconds[kind].append(time.process_time() - cpu_begin)
                    retrieved[kind][row] = result.top_rows[0]
    rows = []
    for kind in indexes:
        timed = slice(counts[kind])
        recalls = {
            str(n): harness.recall(retrieved[kind][timed, :n], exact[timed, :n]) for n in (1, 10, 64) if n <= top_k
        }
        times = {f"p{q}_s": float(np.percentile(seconds[kind], q)) for q in (50, 95)}
        times |= {f"cpu_p{q}_s": float(np.percentile(cpu_seconds[kind], q)) for q in (50, 95)}
        size = 0 if kind == "exact" else index_bytes(kb, kind)
        row = {"entities": len(kb), "index": kind, **times, "recall": recalls, "build_s": build[kind]}
        row |= {"index_bytes": size, "mentions": counts[kind], "kb_bytes": kb.info()["encoding_bytes"]}
        index = indexes[kind]
        if isinstance(index, certified.CertifiedIndex):
            settings = index.record.settings
            row["first_step_bytes"] = (settings["head"] + 4 * (3 + settings["extras"])) * index.record.rows
            row["left"] = left_by_steps(index, encoded, k)
        rows.append(row)
    return rows, left_out


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all sizes and returns the result."""
    harness.start(args)
    sizes = [int(size) for size in args.sizes.split(",")]
    source = open_source(args.scratch, sizes, args.model, args.dataset, args.steps)
    source.model.to(args.device)
    machine = harness.machine(args.device)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for size in sizes:
        kinds = [kind for kind in args.kinds.split(",") if size <= args.graph_limit or kind not in GRAPHS]
        if kinds != args.kinds.split(","):
            left_out.append(f"{' and '.join(GRAPHS)} at {size:,}, to keep the run short (--graph-limit)")
        measured, missing = measure(
            source,
            source.knowledge_base(size),
            kinds,
            mentions=args.mentions,
            exact_mentions=min(args.exact_mentions, args.mentions),
            first_stage=args.first_stage,
            rounds=args.repeats,
            top_k=args.top_k,
        )
        rows += measured
        left_out += [reason for reason in missing if reason not in left_out]
    return {
        "source": source.description,
        "mentions": args.mentions,
        "candidates": args.first_stage,
        "top_k": args.top_k,
        "rows": rows,
        "left_out": left_out,
        "turns": args.repeats,
        "device": args.device,
        "machine": machine,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    name = "latency" + ("-" + Path(args.model).resolve().name if args.model else "")
    if args.top_k != TOP_K:
        name += f"-top{args.top_k}"
    if CODES in args.kinds.split(","):
        name += "-codes"
    if args.sizes.isdigit():
        name += f"-{args.sizes}"
    path = harness.write(args.output, name, run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

"""One mention at a time: p50 and p95 of every index, and what it misses of the exact ranking.

For knowledge bases of several sizes, each index is built (timed; kept in the scratch folder, so that a second run goes
on where the first was stopped), opened, and asked for the best 64 of one encoded mention after another: first stage,
reading what it found from the knowledge base, and exact scores. The indexes take turns. recall@k is the share of the
exact ranking's first k that an index's first k have. An index whose package is not installed is left out, and named.

    python -m benchmarks.latency                                          # 20,000 and 100,000 entities
    python -m benchmarks.latency --sizes 100000,1000000 --graph-limit 1000000   # hours for the graphs; 20 GB of disk
    python -m benchmarks.latency --sizes 10000 --mentions 40 --kinds exact,faiss-flat
    python -m benchmarks.latency --model runs/mimic-text_wikimel --dataset data/wikimel --sizes 100000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.sources import open_source
from hf_mel.errors import MissingExtraError
from hf_mel.inference.encodings import slice_encodings
from hf_mel.kb.indexes import KINDS, build_index, open_index
from hf_mel.kb.indexes.base import FIRST_STAGE
from hf_mel.kb.knowledge_base import KnowledgeBase

TOP_K = 64
#: Kinds that build an HNSW graph: minutes per 100,000 entities.
GRAPHS = ("milvus",)


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", default="20000,100000", help="entities of the knowledge bases")
    parser.add_argument("--mentions", type=int, default=100)
    parser.add_argument(
        "--exact-mentions", type=int, default=20, help="how many of them the exact ranking is timed on"
    )
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument(
        "--graph-limit", type=int, default=20_000, help="no HNSW, whose build is long, beyond this size"
    )
    parser.add_argument("--first-stage", type=int, default=FIRST_STAGE, help="candidates that are scored")
    parser.add_argument("--steps", type=int, default=300, help="of training the generated source's model")
    parser.add_argument("--model", help="a run folder, in place of the generated source")
    parser.add_argument("--dataset", help="its data-set folder")
    return parser


def built(kb: KnowledgeBase, kind: str, model: Any, processor: Any) -> float:
    """Builds an index unless it is there; seconds it took, as noted beside the knowledge base when it was built."""
    note = kb.path.with_name(f"{kb.path.name}-{kind}.seconds")
    if kind in kb.info()["indexes"] and note.exists():
        return float(note.read_text())
    harness.say(f"building {kind} over {len(kb):,} entities")
    begin = time.perf_counter()
    build_index(kb, kind, model, processor, progress=False)
    note.write_text(str(time.perf_counter() - begin))
    return float(note.read_text())


def index_bytes(kb: KnowledgeBase, kind: str) -> int:
    """Bytes on disk of what an index adds."""
    paths = (path for found in kb.path.glob(f"index-{kind}*") for path in (found, *found.rglob("*")))
    return sum(path.stat().st_size for path in paths if path.is_file())


def measure(
    source: Any,
    kb: KnowledgeBase,
    kinds: list[str],
    *,
    mentions: int,
    exact_mentions: int,
    first_stage: int,
    rounds: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per index, and what was left out.

    Args:
        source ([`~benchmarks.sources.Source`]): Model and mentions.
        kb ([`~hf_mel.KnowledgeBase`]): Where to look.
        kinds (`list[str]`): Indexes.
        mentions, exact_mentions (`int`): How many are timed, and how many with "exact".
        first_stage (`int`): Candidates of an index.
        rounds (`int`): In how many turns the indexes go through the mentions.
    """
    left_out, build, indexes = [], {}, {}
    for kind in kinds:
        try:
            build[kind] = 0.0 if kind == "exact" else built(kb, kind, *source.builder(len(kb)))
            indexes[kind] = open_index(kb, kind, source.model, first_stage=first_stage)
        except MissingExtraError as error:
            left_out.append(f"{kind}: {error.message}")
    encoded, _, golds = source.mentions(mentions)
    mentions, exact_mentions = min(mentions, len(golds)), min(exact_mentions, len(golds))
    harness.say(f"exact ranking of {mentions} mentions among {len(kb):,} entities")
    k = min(TOP_K, len(kb))
    exact = open_index(kb, "exact", source.model).find(encoded, k).top_rows
    seconds: dict[str, list[float]] = {kind: [] for kind in indexes}
    found = {kind: torch.full_like(exact, -1) for kind in indexes}
    counts = {kind: exact_mentions if kind == "exact" else mentions for kind in indexes}
    for turn in range(-1, rounds):
        harness.say(f"asking, {'warm-up' if turn < 0 else f'{turn + 1} of {rounds}'}")
        for kind, index in indexes.items():
            for row in range(counts[kind])[:3] if turn < 0 else range(turn, counts[kind], rounds):
                one = slice_encodings(encoded, slice(row, row + 1))
                begin = time.perf_counter()
                result = index.find(one, k)
                if turn >= 0:
                    seconds[kind].append(time.perf_counter() - begin)
                    found[kind][row] = result.top_rows[0]
    rows = []
    for kind in indexes:
        some = slice(counts[kind])
        recalls = {str(n): harness.recall(found[kind][some, :n], exact[some, :n]) for n in (1, 10, 64)}
        times = {f"p{q}_s": float(np.percentile(seconds[kind], q)) for q in (50, 95)}
        size = 0 if kind == "exact" else index_bytes(kb, kind)
        row = {"entities": len(kb), "index": kind, **times, "recall": recalls, "build_s": build[kind]}
        rows.append(row | {"index_bytes": size, "mentions": counts[kind]})
    return rows, left_out


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All sizes as one record."""
    harness.start(args)
    sizes = [int(size) for size in args.sizes.split(",")]
    source = open_source(args.scratch, sizes, args.model, args.dataset, args.steps)
    source.model.to(args.device)
    described = harness.machine(args.device)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for size in sizes:
        kinds = [kind for kind in args.kinds.split(",") if size <= args.graph_limit or kind not in GRAPHS]
        if kinds != args.kinds.split(","):
            left_out.append(f"{' and '.join(GRAPHS)} at {size:,}, to keep the run short (--graph-limit)")
        found, missing = measure(
            source,
            source.knowledge_base(size),
            kinds,
            mentions=args.mentions,
            exact_mentions=min(args.exact_mentions, args.mentions),
            first_stage=args.first_stage,
            rounds=args.repeats,
        )
        rows += found
        left_out += [why for why in missing if why not in left_out]
    return {
        "source": source.description,
        "mentions": args.mentions,
        "candidates": args.first_stage,
        "rows": rows,
        "left_out": left_out,
        "turns": args.repeats,
        "device": args.device,
        "machine": described,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    name = "latency" + ("-" + Path(args.model).resolve().name if args.model else "")
    path = harness.write(args.output, name, run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

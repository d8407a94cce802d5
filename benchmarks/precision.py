"""Benchmark of storing a knowledge base in half precision: changed ranks, changed first places, and metrics of a split.

The entities are encoded once in float32. float16 and bfloat16 encodings are rounded from them and scored as stored, as in
a knowledge base.

    python -m benchmarks.precision --model runs/mimic-text_wikimel --dataset data/wikimel
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.entity_sources import EncodedEntities
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import rank
from hf_mel.schema import NIL
from hf_mel.spaces.mel_ranking.mel_ranking import ranking_metrics


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, help="run folder of a retriever")
    parser.add_argument("--dataset", required=True, help="data-set folder of that run")
    parser.add_argument("--split", default="test", help="split of the mentions")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates each dtype and returns the result."""
    harness.start(args)
    model, processor = load_retriever(args.model, device=args.device)
    entities, mentions = load_entities(args.dataset), load_mentions(args.dataset, args.split)
    ids = list(entities["entity_id"])
    row_of = {entity_id: row for row, entity_id in enumerate(ids)}
    golds = [-1 if gold == NIL else row_of[gold] for gold in mentions["entity_id"]]
    linked = torch.tensor(golds) >= 0
    inputs = ModelInputs(model, processor)
    encoded = encode_rows(inputs, mentions, "mentions", progress=True)
    encodings = encode_rows(inputs, entities, "entities", progress=True)
    rows, exact = [], None
    for name in ("float32", "float16", "bfloat16"):
        dtype = getattr(torch, name)
        stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in encodings.items()}
        size = sum(tensor[0].numel() * tensor.element_size() for tensor in stored.values())
        begin = time.perf_counter()
        ranking = rank(model, encoded, EncodedEntities(ids, stored), gold_rows=golds, top_k=1, progress=True)
        assert ranking.best_rank is not None
        assert ranking.worst_rank is not None
        exact = exact or ranking
        ranks = [
            (ranking.best_rank + ranking.worst_rank)[linked] / 2,
            (exact.best_rank + exact.worst_rank)[linked] / 2,
        ]
        rows.append(
            {
                "dtype": name,
                "bytes_per_entity": size,
                "changed_ranks": int((ranks[0] != ranks[1]).sum()),
                "changed_first_places": int((ranking.top_rows[:, 0] != exact.top_rows[:, 0]).sum()),
                "metrics": ranking_metrics(ranking.best_rank[linked].numpy(), ranking.worst_rank[linked].numpy()),
                "seconds": time.perf_counter() - begin,
            }
        )
    described = {"model": Path(args.model).resolve().name, "dataset": Path(args.dataset).resolve().name}
    return {
        **described,
        "split": args.split,
        "mentions": len(mentions),
        "entities": len(ids),
        "rows": rows,
        "device": args.device,
        "machine": harness.machine(args.device),
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    path = harness.write(args.output, "precision", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

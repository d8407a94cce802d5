"""Benchmark of storing a knowledge base in few bits: changed ranks, changed first places, and metrics of a split.

The entities are encoded once in float32. The other forms are rounded from them and scored as stored, as in a knowledge base:
float16, bfloat16, int8, int4 (vectors of tokens in 4 bits, single vectors in 8), and for comparison every vector in 4 bits.

    python -m benchmarks.precision --model runs/mimic_flags --dataset data/flags_mel
    python -m benchmarks.precision --model runs/mimic-text_wikimel --dataset data/wikimel --kb kb/wikimel --split validation --mentions 1000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import row_bytes
from hf_mel.inference.entity_sources import EncodedEntities
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.quantisation import dequantise, dequantised, layout_of, quantise, quantised
from hf_mel.inference.ranking import rank
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.schema import NIL
from hf_mel.spaces.mel_ranking.mel_ranking import ranking_metrics


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, help="run folder of a retriever")
    parser.add_argument("--dataset", required=True, help="data-set folder of that run")
    parser.add_argument("--split", default="test", help="split of the mentions")
    parser.add_argument("--mentions", type=int, help="only the first mentions of the split")
    parser.add_argument(
        "--kb", help="knowledge base of the same entities in float32, to read instead of encoding them"
    )
    return parser


def _as_dtype(name: str) -> Callable[[Mapping[str, torch.Tensor]], tuple[dict[str, torch.Tensor], int]]:
    """Returns a function from encodings to those that a knowledge base of a dtype gives, and their stored bytes per entity."""

    def converted(encodings: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        if name in ("int8", "int4"):
            stored = quantised(encodings, name)
            return dequantised(stored, layout_of(encodings, name)), row_bytes(stored)
        dtype = getattr(torch, name)
        stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in encodings.items()}
        return stored, row_bytes(stored)

    return converted


def _all_in_4_bits(encodings: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """Rounds every vector to 4 bits, as no knowledge base does."""
    coded = {name: quantise(tensor, "int4") for name, tensor in encodings.items() if tensor.is_floating_point()}
    size = sum(part[0].numel() * part.element_size() for pair in coded.values() for part in pair)
    others = {name: tensor for name, tensor in encodings.items() if name not in coded}
    rounded = {name: dequantise(*pair, encodings[name].shape[-1]) for name, pair in coded.items()}
    return {**others, **rounded}, size + sum(tensor[0].numel() * tensor.element_size() for tensor in others.values())


FORMS = {name: _as_dtype(name) for name in ("float32", "float16", "bfloat16", "int8", "int4")}
FORMS["int4, single vectors too"] = _all_in_4_bits


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates each dtype and returns the result."""
    harness.start(args)
    model, processor = load_retriever(args.model, device=args.device)
    entities, mentions = load_entities(args.dataset), load_mentions(args.dataset, args.split)
    mentions = mentions.select(range(min(len(mentions), args.mentions or len(mentions))))
    ids = list(entities["entity_id"])
    row_of = {entity_id: row for row, entity_id in enumerate(ids)}
    golds = [-1 if gold == NIL else row_of[gold] for gold in mentions["entity_id"]]
    linked = torch.tensor(golds) >= 0
    inputs = ModelInputs(model, processor)
    encoded = encode_rows(inputs, mentions, "mentions", progress=True)
    if args.kb:
        kb = KnowledgeBase.from_pretrained(args.kb)
        kb.check_made_by(model, processor)
        if kb.entity_ids != ids or kb.dtype != "float32":
            raise SystemExit("--kb must hold the entities of the data set, in their order, in float32.")
        encodings = kb.encodings(range(len(kb)))
    else:
        encodings = encode_rows(inputs, entities, "entities", progress=True)
    rows, exact = [], None
    for name, form in FORMS.items():
        stored, size = form(encodings)
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
                "times_smaller": rows[0]["bytes_per_entity"] / size if rows else 1.0,
                "bytes_per_entity": size,
                "changed_ranks": int((ranks[0] != ranks[1]).sum()),
                "changed_first_places": int((ranking.top_rows[:, 0] != exact.top_rows[:, 0]).sum()),
                "metrics": ranking_metrics(ranking.best_rank[linked].numpy(), ranking.worst_rank[linked].numpy()),
                "seconds": time.perf_counter() - begin,
            }
        )
    described = {"model": Path(args.model).name, "dataset": Path(args.dataset).resolve().name}
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

    path = harness.write(args.output, f"precision-{Path(args.model).name}-{args.split}", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

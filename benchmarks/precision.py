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
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks import harness
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.inference import padding
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import num_rows, row_bytes
from hf_mel.inference.entity_sources import EncodedEntities
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.quantisation import QUANTISED, dequantised, is_quantised, layout_of, quantised
from hf_mel.inference.ranking import rank
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.protocols import entity_token_masks
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


#: Encodings as a knowledge base gives them, and their stored bytes per entity.
Stored: TypeAlias = tuple[dict[str, torch.Tensor], float]


def _of_16_or_32_bits(encodings: Mapping[str, torch.Tensor], masks: Mapping[str, str], name: str) -> Stored:
    dtype = getattr(torch, name)
    stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in encodings.items()}
    return stored, row_bytes(stored)


def _of_few_bits(encodings: Mapping[str, torch.Tensor], masks: Mapping[str, str], name: str, form: str = "") -> Stored:
    """Rounds encodings as a knowledge base does, or every vector to one form, as none does."""
    layout = layout_of(encodings, name, masks)
    if form:
        layout = {
            key: spec | {"dtype": form if is_quantised({key: spec}) else spec["dtype"]} for key, spec in layout.items()
        }
    stored = quantised(encodings, layout)
    tensors = stored | padding.first_vectors(stored, layout)
    return dequantised(stored, layout), sum(tensor.nbytes for tensor in tensors.values()) / num_rows(encodings)


FORMS: dict[str, Callable[[Mapping[str, torch.Tensor], Mapping[str, str]], Stored]] = {
    **{name: partial(_of_16_or_32_bits, name=name) for name in ("float32", "float16", "bfloat16")},
    **{name: partial(_of_few_bits, name=name) for name in QUANTISED},
    "int4, single vectors too": partial(_of_few_bits, name="int4", form="scaled int4"),
}


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
    masks = entity_token_masks(model)
    rows, exact = [], None
    for name, form in FORMS.items():
        stored, size = form(encodings, masks)
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
                "bytes_per_entity": round(size),
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

"""Benchmark of storing a knowledge base in few bits: changed ranks and first places, metrics, and the CPU time of ranking.

The entities are encoded once in float32. The other forms are rounded from them and scored as stored, as in a knowledge base:
float16, bfloat16, int8, int4 (vectors of tokens in 4 bits, single vectors in 8), and for comparison vectors of tokens alone in 4
bits, and every vector in 4 bits. Without a run, the entities are generated people, and MIMIC with three units is trained on
them (`benchmarks/sources.py`).

Of the best entities by float32, it counts those among the 64 best by a form: they are what scoring these 64 again by full
encodings would find.

The CPU time is that of ranking a knowledge base of each form, for 1 and for 8 mentions, as a ratio to bfloat16. The forms
take turns in one process.

    python -m benchmarks.precision                 # 20,000 generated people, 1,000 mentions
    python -m benchmarks.precision --model runs/mimic_flags --dataset data/flags_mel
    python -m benchmarks.precision --model runs/mimic-text_wikimel --dataset data/wikimel --kb kb/wikimel --split validation --mentions 1000
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks import harness
from benchmarks.sources import Generated, stored_kb
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.inference import padding
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import num_rows, row_bytes, slice_encodings
from hf_mel.inference.entity_sources import EncodedEntities
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.quantisation import QUANTISED, dequantised, is_quantised, layout_of, quantised
from hf_mel.inference.ranking import rank
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.kb.manifest import DTYPES
from hf_mel.protocols import Encodings, entity_token_masks
from hf_mel.schema import NIL
from hf_mel.spaces.mel_ranking.mel_ranking import ranking_metrics


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", help="run folder of a retriever to measure in place of the generated people")
    parser.add_argument("--dataset", help="data-set folder of that run")
    parser.add_argument("--people", type=int, default=20_000, help="number of generated people")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the generated model")
    parser.add_argument("--split", default="test", help="split of the mentions")
    parser.add_argument("--mentions", type=int, help="only the first mentions of the split; of people 1,000")
    parser.add_argument(
        "--kb", help="knowledge base of the same entities in float32, to read instead of encoding them"
    )
    return parser


#: Numbers of mentions that are ranked at once where time is measured.
NUM_TIMED = (1, 8)

#: Numbers of the best entities by float32 that are looked for among the best by a form, and number of these.
NUM_BEST, NUM_AMONG = (1, 10), 64

#: Encodings as a knowledge base gives them, and their stored bytes per entity.
Stored: TypeAlias = tuple[dict[str, torch.Tensor], float]


def _of_16_or_32_bits(encodings: Mapping[str, torch.Tensor], masks: Mapping[str, str], name: str) -> Stored:
    dtype = getattr(torch, name)
    stored = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in encodings.items()}
    return stored, row_bytes(stored)


def _of_few_bits(
    encodings: Mapping[str, torch.Tensor], masks: Mapping[str, str], name: str, single_vectors: str = ""
) -> Stored:
    """Rounds encodings as a knowledge base does, or single vectors to another form, as none does."""
    layout = layout_of(encodings, name, masks)
    if single_vectors:
        layout = {
            key: spec | {"dtype": single_vectors} if len(spec["shape"]) == 1 and is_quantised({key: spec}) else spec
            for key, spec in layout.items()
        }
    stored = quantised(encodings, layout)
    tensors = stored | padding.first_vectors(stored, layout)
    return dequantised(stored, layout), sum(tensor.nbytes for tensor in tensors.values()) / num_rows(encodings)


FORMS: dict[str, Callable[[Mapping[str, torch.Tensor], Mapping[str, str]], Stored]] = {
    **{name: partial(_of_16_or_32_bits, name=name) for name in ("float32", "float16", "bfloat16")},
    **{name: partial(_of_few_bits, name=name) for name in QUANTISED},
    "int4, single vectors in float32": partial(_of_few_bits, name="int4", single_vectors="float32"),
    "int4, single vectors too": partial(_of_few_bits, name="int4", single_vectors="scaled int4"),
}


@dataclass
class Measured:
    """M mentions with golds, and N entities, which the benchmark ranks.

    Args:
        described (`dict`): Words for the result: `model`, `split` and `dataset`.
        model ([`~hf_mel.protocols.Retriever`]): Their retriever.
        mentions (`dict`): Encodings of the mentions.
        golds (`list[int]`): The row of the gold of each mention, -1 for none.
        ids (`list[str]`): The ids of the entities.
        encodings (`dict`): Their encodings in float32.
    """

    described: dict[str, str]
    model: Any
    mentions: Encodings
    golds: list[int]
    ids: list[str]
    encodings: Encodings


def _of_run(args: argparse.Namespace) -> Measured:
    """Encodes a split and the entities of a data set, or reads the entities from a knowledge base."""
    model, processor = load_retriever(args.model, device=args.device)
    entities, mentions = load_entities(args.dataset), load_mentions(args.dataset, args.split)
    mentions = mentions.select(range(min(len(mentions), args.mentions or len(mentions))))
    ids = list(entities["entity_id"])
    row_of = {entity_id: row for row, entity_id in enumerate(ids)}
    inputs = ModelInputs(model, processor)
    if args.kb:
        kb = KnowledgeBase.from_pretrained(args.kb)
        kb.check_made_by(model, processor)
        if kb.entity_ids != ids or kb.dtype != "float32":
            raise SystemExit("--kb must hold the entities of the data set, in their order, in float32.")
        encodings = kb.encodings(range(len(kb)))
    else:
        encodings = encode_rows(inputs, entities, "entities", progress=True)
    return Measured(
        {"model": Path(args.model).name, "split": args.split, "dataset": Path(args.dataset).resolve().name},
        model,
        encode_rows(inputs, mentions, "mentions", progress=True),
        [-1 if gold == NIL else row_of[gold] for gold in mentions["entity_id"]],
        ids,
        encodings,
    )


def _of_people(args: argparse.Namespace) -> Measured:
    """Encodes generated people and mentions of them."""
    source = Generated(args.scratch, args.people, steps=args.steps, mask_padding=True)
    source.model.to(args.device)
    mentions, _, golds = source.mentions(args.mentions or 1000)
    kb = source.knowledge_base(args.people, "float32")
    described = {"model": f"MIMIC with three units, trained for {args.steps} steps", "dataset": "generated people"}
    encodings = kb.encodings(range(len(kb)))
    return Measured(
        described | {"split": "mentions"}, source.model, mentions, golds.tolist(), list(kb.entity_ids), encodings
    )


def cpu_seconds_of_ranking(measured: Measured, repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Returns the median CPU seconds of ranking a knowledge base of each dtype, for 1 and for 8 mentions."""
    seconds: dict[str, list[float]] = {}
    cases = {}
    kbs = {dtype: stored_kb(measured.model, measured.encodings, dtype) for dtype in DTYPES}
    for dtype, kb in kbs.items():
        for count in NUM_TIMED:
            mentions = slice_encodings(measured.mentions, slice(count))
            cases[f"{dtype} {count}"] = partial(rank, measured.model, mentions, kb, top_k=64)
    harness.interleaved(cases, repeats, device=device, cpu_seconds=seconds)
    return {
        dtype: {str(count): statistics.median(seconds[f"{dtype} {count}"]) for count in NUM_TIMED} for dtype in kbs
    }


def share_found(best: torch.Tensor, among: torch.Tensor) -> float:
    """Returns the share of entity rows [M, k] that are among other rows [M, n] of the same mention."""
    return (best[:, :, None] == among[:, None, :]).any(-1).double().mean().item()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates each form and returns the result."""
    if (args.model is None) != (args.dataset is None):
        raise SystemExit("--model and --dataset must be given together.")
    harness.start(args)
    measured = _of_people(args) if args.model is None else _of_run(args)
    model, golds = measured.model, measured.golds
    linked = torch.tensor(golds) >= 0
    masks = entity_token_masks(model)
    machine = harness.machine(args.device)
    cpu_seconds = cpu_seconds_of_ranking(measured, args.repeats, args.device)
    rows, exact = [], None
    for name, form in FORMS.items():
        stored, size = form(measured.encodings, masks)
        begin = time.process_time()
        entities = EncodedEntities(measured.ids, stored)
        ranking = rank(model, measured.mentions, entities, gold_rows=golds, top_k=NUM_AMONG, progress=True)
        assert ranking.best_rank is not None
        assert ranking.worst_rank is not None
        exact = exact or ranking
        ranks = [
            (ranking.best_rank + ranking.worst_rank)[linked] / 2,
            (exact.best_rank + exact.worst_rank)[linked] / 2,
        ]
        row = {
            "dtype": name,
            "times_smaller": rows[0]["bytes_per_entity"] / size if rows else 1.0,
            "bytes_per_entity": round(size),
            "changed_ranks": int((ranks[0] != ranks[1]).sum()),
            "changed_first_places": int((ranking.top_rows[:, 0] != exact.top_rows[:, 0]).sum()),
            "metrics": ranking_metrics(ranking.best_rank[linked].numpy(), ranking.worst_rank[linked].numpy()),
            "best_among_64": {str(k): share_found(exact.top_rows[:, :k], ranking.top_rows) for k in NUM_BEST},
            "cpu_seconds": time.process_time() - begin,
        }
        if name in cpu_seconds:
            row["cpu_of_bfloat16"] = {
                count: seconds / cpu_seconds["bfloat16"][count] for count, seconds in cpu_seconds[name].items()
            }
            row["cpu_seconds_of_mentions"] = cpu_seconds[name]
        rows.append(row)
    return {
        **measured.described,
        "mentions": len(golds),
        "entities": len(measured.ids),
        "rows": rows,
        "repeats": args.repeats,
        "device": args.device,
        "machine": machine,
    }


def main() -> None:
    args = arguments().parse_args()
    from benchmarks.summary import show

    measured = "people" if args.model is None else f"{Path(args.model).name}-{args.split}"
    path = harness.write(args.output, f"precision-{measured}", run(args))
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

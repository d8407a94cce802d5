"""Benchmark of ranking a whole knowledge base: pairs per second and peak memory, compared with a direct form of MIMIC.

Three forms are measured, at the paper's sizes (40 tokens, 50 patches, text of width 512, units of width 96) and for
knowledge bases of several sizes:

- direct: `benchmarks.direct_mimic` in float32, in the blocks of the published evaluation (20 mentions × 6,000 entities);
- whole: the library, with every pair scored in full;
- pruned: the library with its default settings. It skips the local half of TGLU if a bound shows that the half cannot
  change the ranks. The number of skipped pairs depends on the model, so random weights give other results
  (`--steps 0`).

The forms take turns in one process. Memory is measured in a child process for each form, from before it opens the
knowledge base. The direct form's time per pair does not depend on N, so one block is timed. Its memory is the measured
peak of one block plus its cache of N entities. Examples:

    python -m benchmarks.ranking                                        # trains a model first, about six minutes
    python -m benchmarks.ranking --sizes 10000 --mentions 8 --repeats 3 # quick
    python -m benchmarks.ranking --model runs/mimic-text_wikimel --dataset data/wikimel --sizes 18880,110000
    python -m benchmarks.ranking --device cuda --dtype bfloat16 --mentions 512
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.direct_mimic import BLOCK, DirectMimic
from benchmarks.sources import Source, open_source
from hf_mel.inference.encodings import slice_encodings
from hf_mel.inference.entity_sources import EncodedEntities
from hf_mel.inference.execution import to_model
from hf_mel.inference.ranking import RankingResult, rank
from hf_mel.kb.knowledge_base import KnowledgeBase

FORMS = ("whole", "pruned")


def arguments() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", default="10000,50000,110000", help="numbers of entities of the knowledge bases")
    parser.add_argument("--mentions", type=int, default=32, help="number of mentions that the library ranks at once")
    parser.add_argument(
        "--steps", type=int, default=300, help="training steps of the generated model; 0 keeps random weights"
    )
    parser.add_argument("--model", help="folder of a MIMIC run to measure in place of the generated model")
    parser.add_argument("--dataset", help="data-set folder of that run")
    parser.add_argument(
        "--block", default=",".join(map(str, BLOCK)), help="MENTIONS,ENTITIES of a block of the direct form"
    )
    return parser


def rank_mentions(
    model: Any, mentions: Any, kb: Any, golds: torch.Tensor, *, prune: bool, byte_budget: int | None = None
) -> RankingResult:
    """Ranks mentions with the library. Golds outside the knowledge base are unknown."""
    budget: dict[str, Any] = {} if byte_budget is None else {"byte_budget": byte_budget}
    gold_rows = golds.where(golds < len(kb), -1)
    return rank(model, mentions, kb, gold_rows=gold_rows, prune=prune, **budget)


class PairCounter:
    """Wraps a model and counts the pairs that pruning does not skip.

    Attributes:
        pairs (`int`): Number of pairs that were scored in full.
    """

    def __init__(self, model: Any):
        self._model, self.pairs = model, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def quick_scores(self, mentions: Any, entities: Any) -> torch.Tensor:
        """As in the model."""
        return self._model.quick_scores(mentions, entities)

    def remaining_scores(self, mentions: Any, entities: Any, floor: torch.Tensor) -> torch.Tensor:
        """As in the model. Counts the pairs that are not skipped."""
        rest = self._model.remaining_scores(mentions, entities, floor)
        self.pairs += int((rest != -torch.inf).sum())
        return rest


def operations_per_pair(mentions: Any, entities: Any) -> tuple[int, int]:
    """Returns the number of multiplications and additions, and of exponentials, per pair of the factorised scores.

    They follow from the shapes of the encodings.
    """
    operations = exponentials = 0
    if "text_global" in entities:
        operations += 2 * entities["text_global"].shape[-1]  # eq. 8
    if "text_queries" in entities:
        (queries, dim), keys = entities["text_queries"].shape[1:], mentions["text_keys"].shape[1]
        exponentials += queries * keys
        operations += 2 * queries * keys * dim  # QKᵀ of eq. 9
        operations += queries * keys  # mean of the weights over the entity's tokens
        operations += 2 * keys * keys + 2 * keys * dim  # |h|² and h·q of eq. 10
    if "vision_query" in entities:
        operations += 2 * 5 * 2 * entities["vision_query"].shape[-1]  # five inner products in each direction
    if "cross_modal" in entities:
        operations += 2 * entities["cross_modal"].shape[-1]  # eq. 19
    return operations, exponentials


def child_memory(form: str, size: int, block: list[int], **options: Any) -> dict[str, Any]:
    """Measures the peak memory of ranking. [`~benchmarks.harness.in_child`] calls it in a new process."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = options["device"]
    source = open_source(options["scratch"], options["sizes"], options["model"], options["dataset"], options["steps"])
    source.model.to(device)
    if form == "direct":
        direct = _DirectBlock(source, block, device, options["dtype"])
        direct.score(8)
        with harness.memory(device) as used:
            direct.score()
        return {**used, "cached_bytes_per_entity": direct.bytes_per_entity}
    kb = source.knowledge_base(size)
    mentions, _, golds = source.mentions(options["mentions"])
    few = EncodedEntities(["a", "b"], kb.encodings([0, 1]))
    rank_mentions(source.model, mentions, few, golds.clamp(max=1), prune=True)
    kb = KnowledgeBase.from_pretrained(kb.path)
    begin = time.perf_counter()
    with harness.memory(device) as used:
        rank_mentions(
            source.model, mentions, kb, golds, prune=form == "pruned", byte_budget=options.get("byte_budget")
        )
    return {**used, "seconds": time.perf_counter() - begin}


def child_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options with which a child process opens the same source."""
    names = ("threads", "device", "dtype", "model", "dataset", "steps", "mentions")
    return {name: getattr(args, name) for name in names} | {"scratch": str(args.scratch.resolve())}


def compare_with_direct(source: Source, kb: KnowledgeBase, device: str, block: list[int]) -> dict[str, Any]:
    """Compares the library's ranks on a stored knowledge base with those of the direct form in float32.

    Returns:
        `dict`: The sizes of the sample and, for each form, the share of mentions with the same rank of the gold, the share
        with the same first entity, and the largest difference of a score.
    """
    encoded, _, golds = source.mentions(block[0])
    golds = golds.clamp(max=len(kb) - 1)
    rows = torch.cat([golds, torch.arange(min(2000, block[1], len(kb)))]).unique()  # the golds, and others
    scores = _DirectBlock(source, block, device, rows=rows).score().cpu()
    golds = torch.searchsorted(rows, golds)
    gold_score = scores.gather(1, golds[:, None])
    expected = 1 + (scores > gold_score + 1e-6 * gold_score.abs().clamp(min=1)).sum(1)
    sample = EncodedEntities([str(row) for row in rows.tolist()], kb.encodings(rows.numpy()))
    forms = {}
    for form in FORMS:
        result = rank_mentions(source.model, encoded, sample, golds, prune=form == "pruned")
        forms[form] = {
            "same_gold_rank": (result.best_rank == expected).double().mean().item(),
            "same_first": (result.top_rows[:, 0] == scores.argmax(1)).double().mean().item(),
            "largest_score_difference": (result.gold_score - gold_score[:, 0]).abs().max().item(),
        }
    return {"mentions": len(golds), "entities": len(rows), "stored_as": kb.dtype, **forms}


class _DirectBlock:
    """One block of the direct form, with its features computed.

    Args:
        source ([`~benchmarks.sources.Source`]): Model, mentions and entities.
        block (`list[int]`): Number of mentions and of entities.
        device, dtype (`str`): Device and dtype of the computation.
        rows (`torch.Tensor`, *optional*): Rows of the entities. By default the first ones.
    """

    def __init__(self, source: Source, block: list[int], device: str, dtype: str = "float32", rows: Any = None):
        self.direct = DirectMimic(copy.deepcopy(source.model).to(device, getattr(torch, dtype)))
        self.mentions = self.direct.features(**to_model(self.direct.model, source.mentions(block[0])[1]))
        parts = [
            self.direct.features(**to_model(self.direct.model, source.entity_inputs(part)))
            for part in (torch.arange(block[1]) if rows is None else rows).split(256)
        ]
        self.entities = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.bytes_per_entity = sum(tensor[0].numel() * tensor.element_size() for tensor in self.entities.values())

    def score(self, entities: int | None = None) -> torch.Tensor:
        """Scores all mentions against the first `entities`, by default all."""
        return self.direct.score(self.mentions, slice_encodings(self.entities, slice(entities)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all forms and returns the result."""
    harness.start(args)
    sizes, block = ([int(number) for number in text.split(",")] for text in (args.sizes, args.block))
    source = open_source(args.scratch, sizes, args.model, args.dataset, args.steps)
    source.model.to(args.device)
    kbs = {size: source.knowledge_base(size) for size in sizes}
    machine = harness.machine(args.device)
    harness.say(f"{machine['cpu']}, {machine['cores']} cores, {machine['gemm_gflops']} GFLOP/s")
    encoded, _, golds = source.mentions(args.mentions)
    block = [min(block[0], len(golds)), min(block[1], source.num_real or max(1000, *sizes))]
    agreement = compare_with_direct(source, kbs[sizes[0]], args.device, block)

    direct = _DirectBlock(source, block, args.device, args.dtype)
    cases: dict[str, Callable[[], Any]] = {"direct": direct.score}
    for size, kb in kbs.items():
        for form in FORMS:
            cases[f"{form} {size}"] = partial(rank_mentions, source.model, encoded, kb, golds, prune=form == "pruned")
    seconds = harness.interleaved(cases, args.repeats, device=args.device, progress=harness.say)
    direct_rate = block[0] * block[1] / statistics.median(seconds["direct"])
    share_in_full, quality = {}, {}
    for size, kb in kbs.items():
        counter = PairCounter(source.model)
        first = rank_mentions(counter, encoded, kb, golds, prune=True).best_rank == 1
        share_in_full[size], quality[size] = counter.pairs / (size * len(golds)), first.double().mean().item()
    operations, exponentials = operations_per_pair(encoded, kbs[sizes[0]].encodings([0]))
    floor_seconds = operations / (machine["gemm_gflops"] * 1e9)
    del direct, cases

    def memory(form: str, size: int) -> dict[str, Any]:
        harness.say(f"memory of {form}, {size:,} entities")
        options = child_options(args) | {"form": form, "size": size, "sizes": sizes, "block": block}
        return harness.in_child("benchmarks.ranking:child_memory", options)

    direct_memory = memory("direct", sizes[0])
    rows = []
    for size, kb in kbs.items():
        direct_peak = direct_memory["peak_bytes"] + size * direct_memory["cached_bytes_per_entity"]
        for form in FORMS:
            times, used = seconds[f"{form} {size}"], memory(form, size)
            rate = size * len(golds) / statistics.median(times)
            row = {
                "entities": size,
                "form": form,
                "times_direct": rate / direct_rate,
                "pairs_per_second": rate,
                "of_products_floor": rate * floor_seconds,
                "pairs_in_full": share_in_full[size] if form == "pruned" else 1.0,
                "share_of_direct_memory": used["peak_bytes"] / direct_peak,
                "peak_bytes": used["peak_bytes"],
                "own_bytes": used["own_bytes"],
                "direct_peak_bytes": direct_peak,
                "stored_bytes_per_entity": stored_bytes(kb) / size,
            }
            rows.append(row | harness.summary(times))
    return {
        "source": source.description,
        "mentions": len(golds),
        "hits@1": {str(size): share for size, share in quality.items()},
        "direct": {
            "block": block,
            "dtype": args.dtype,
            "pairs_per_second": direct_rate,
            **harness.summary(seconds["direct"]),
            "block_peak_bytes": direct_memory["peak_bytes"],
            "cached_bytes_per_entity": direct_memory["cached_bytes_per_entity"],
        },
        "agreement_with_direct": agreement,
        "floor": {
            "operations_per_pair": operations,
            "exponentials_per_pair": exponentials,
            "products_pairs_per_second": 1 / floor_seconds,
            "products_and_exponentials_pairs_per_second": 1
            / (floor_seconds + exponentials / machine["exp_per_second"]),
        },
        "rows": rows,
        "repeats": args.repeats,
        "device": args.device,
        "machine": machine,
    }


def stored_bytes(kb: KnowledgeBase) -> int:
    """Returns the size of the encodings on disk, in bytes."""
    return sum(path.stat().st_size for path in Path(kb.path).glob("encodings-*.safetensors"))


def main() -> None:
    args = arguments().parse_args()
    results = run(args)
    name = (
        "ranking" + ("-" + Path(args.model).resolve().name if args.model else "") + ("" if args.steps else "-random")
    )
    from benchmarks.summary import show

    path = harness.write(args.output, name, results)
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()

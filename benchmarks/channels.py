"""Benchmark of the channels that find candidates: recall@k of vectors, of names, and of both, as the entities grow.

The first entities are the real ones of a data set, and the others are made up ([`benchmarks.sources.Resampled.named_kb`]), so
that namesakes grow with the entities. Every ranking is exact. Names alone leave many ties, and a gold counts by the mean of
its best and worst possible place. The work of the index of names is measured in CPU seconds.

    python -m benchmarks.channels --model runs/mimic-text_wikimel --dataset data/wikimel --name-weight 0.95
    python -m benchmarks.channels --model runs/mimic-text_wikimel --dataset data/wikimel --sizes 1000000 --names-only
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.sources import Resampled, grown_names
from hf_mel.candidates.name_index import NameIndex
from hf_mel.inference.entity_sources import EntityPart
from hf_mel.inference.ranking import rank

KS = (1, 8, 64)


def place_by_names(scores: tuple[np.ndarray, np.ndarray], gold: int, size: int) -> float:
    """Returns the mean of the best and the worst place of a gold by name scores alone."""
    rows, values = scores
    of_gold = float(values[rows == gold].sum())
    better = int((values > of_gold).sum())
    equal = int((values == of_gold).sum()) if of_gold else size - len(rows)
    return better + (1 + equal) / 2


def recalls(places: Sequence[float]) -> dict[str, float]:
    """Returns the share of places up to each k."""
    return {f"recall@{k}": float(np.mean(np.asarray(places) <= k)) for k in KS}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, help="run folder of a retriever")
    parser.add_argument("--dataset", required=True, help="data-set folder of that run")
    parser.add_argument("--split", default="validation", help="split of the mentions")
    parser.add_argument("--sizes", default="18880,200000", help="numbers of entities")
    parser.add_argument("--mentions", type=int, default=256, help="number of mentions, from the start of the split")
    parser.add_argument("--name-weight", type=float, default=0.0, help="weight of the names in both channels")
    parser.add_argument("--names-only", action="store_true", help="do not rank by vectors")
    args = parser.parse_args()
    harness.start(args)
    source = Resampled(args.scratch, args.model, args.dataset, split=args.split)
    chosen = source._mentions.select(range(min(args.mentions, len(source._mentions))))
    row_of = {entity_id: row for row, entity_id in enumerate(source.entities["entity_id"])}
    golds = [row_of[entity_id] for entity_id in chosen["entity_id"]]
    results: list[dict[str, Any]] = []
    sizes = [int(size) for size in args.sizes.split(",")]
    if not args.names_only:
        kb, encoded = source.named_kb(max(sizes)), source.mentions(len(golds))[0]
    for size in sizes:
        begin = time.process_time()
        index = NameIndex(grown_names(list(source.entities["name"]), size))
        built = time.process_time()
        scores = index.scores(chosen["mention"])
        looked_up = time.process_time()
        by_name = [place_by_names(scores[number], gold, size) for number, gold in enumerate(golds)]
        result: dict[str, Any] = {
            "entities": size,
            "mentions": len(golds),
            "build_cpu_s": built - begin,
            "look_up_cpu_ms_per_mention": 1000 * (looked_up - built) / len(golds),
            "named_entities_per_mention": len(scores.rows) / len(golds),
            "names": recalls(by_name),
        }
        if not args.names_only:
            entities = EntityPart(kb, range(size))
            for channel, added in (("vectors", None), ("both", scores * args.name_weight)):
                ranked = rank(source.model, encoded, entities, gold_rows=golds, top_k=1, added=added)
                assert ranked.best_rank is not None
                assert ranked.worst_rank is not None
                result[channel] = recalls(((ranked.best_rank + ranked.worst_rank) / 2).tolist())
        harness.say(str(result))
        results.append(result)
    harness.write(args.output, "channels", {"split": args.split, "name_weight": args.name_weight, "results": results})


if __name__ == "__main__":
    main()

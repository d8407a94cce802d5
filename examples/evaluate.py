"""Evaluate a model over the whole knowledge base, and read the strata.

Run `make demo` first. Then: python examples/evaluate.py
"""

from hf_mel import load_retriever
from hf_mel.data import load_entities, load_mentions
from hf_mel.evaluation.full_evaluator import evaluate_full
from hf_mel.inference import ModelInputs

inputs = ModelInputs(*load_retriever("runs/mimic_flags"))
mentions, entities = load_mentions("data/flags_mel", "test"), load_entities("data/flags_mel")
train_golds = set(load_mentions("data/flags_mel", "train")["entity_id"])

result = evaluate_full(inputs, mentions, entities, train_golds=train_golds)
print(f"all: H@1 {result.metrics['hits@1']:.3f}, MRR {result.metrics['mrr']:.3f}")

# Strata are groups of mentions: what decides them, mentions in a context, golds that training had or had not.
for name, groups in result.strata.items():
    for group, metrics in groups.items():
        print(f"{name} = {group}: H@1 {metrics['hits@1']:.3f} of {metrics['num_ranked']}")

# One unit by itself shows which modality a result comes from.
for unit in ("text", "vision"):
    alone = evaluate_full(inputs, mentions, entities, units=[unit], progress=False)
    print(f"{unit} alone: H@1 {alone.metrics['hits@1']:.3f}")

# The mentions that went worst.
records = [record for record in result.records() if record["rank"] is not None]
for record in sorted(records, key=lambda record: record["rank"])[-3:]:
    print(
        record["mention_id"],
        record["entity_id"],
        "rank",
        record["rank"],
        "first",
        record["candidates"][0]["entity_id"],
    )

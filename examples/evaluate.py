"""Evaluate a model over the whole knowledge base, and read the strata.

Run `make demo` first. Then: python examples/evaluate.py
"""

from hf_mel import load_retriever
from hf_mel.data import load_entities, load_mentions
from hf_mel.evaluation import FullEvaluator
from hf_mel.inference import ModelInputs

inputs = ModelInputs(*load_retriever("runs/mimic_flags"))
mentions, entities = load_mentions("data/flags_mel", "test"), load_entities("data/flags_mel")
train_golds = set(load_mentions("data/flags_mel", "train")["entity_id"])

evaluator = FullEvaluator(entities, train_golds=train_golds)
result = evaluator(inputs, mentions)
print(f"all: H@1 {result.metrics['hits@1']:.3f}, MRR {result.metrics['mrr']:.3f}")

# Strata are groups of mentions: by the modality that decides them, by the number of mentions in the context, and by
# whether training had the gold.
for name, groups in result.strata.items():
    for group, metrics in groups.items():
        print(f"{name} = {group}: H@1 {metrics['hits@1']:.3f} of {metrics['num_ranked']}")

# The score of a single unit shows which modality a result comes from.
for unit in ("text", "vision"):
    unit_evaluator = FullEvaluator(entities, units=[unit], progress=False)
    unit_result = unit_evaluator(inputs, mentions)
    print(f"{unit} alone: H@1 {unit_result.metrics['hits@1']:.3f}")

# The mentions with the worst ranks.
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

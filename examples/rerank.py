"""Rerank: a retriever proposes candidates, a reranker reads each of them together with the mention.

Run `make demo` first, then train a reranker: hf-mel train mmel_flags
Then: python examples/rerank.py
"""

from hf_mel import EntityLinker, load_reranker
from hf_mel.candidates import make_candidates
from hf_mel.data import load_entities, load_mentions
from hf_mel.evaluation import CandidateEvaluator
from hf_mel.inference import ModelInputs

# While linking: the linker gives the retriever's best eight entities to the reranker.
linker = EntityLinker.from_pretrained("runs/mimic_flags", kb="kb/flags_mel", reranker="runs/mmel_flags", rerank_k=8)
result = linker(text="The hosts met the Koreans.", mention="the Koreans", top_k=3)
for candidate in result.candidates:
    print(f"{candidate.name:30} retriever {candidate.score:6.1f}   reranker {candidate.reranker_score:6.2f}")

# For an evaluation: candidate lists of a whole split, here from the retriever.
mentions, entities = load_mentions("data/flags_mel", "test"), load_entities("data/flags_mel")
lists = make_candidates("retriever", mentions, entities, k=8, retriever="runs/mimic_flags")
print("recall of the lists:", lists.recall(mentions["entity_id"], [1, 8]))

# End to end, a gold that is not in its list counts as a miss; with the gold added, every list has it.
inputs = ModelInputs(*load_reranker("runs/mmel_flags"))
evaluator = CandidateEvaluator(entities)
result = evaluator(inputs, mentions, lists)
print("H@1 end to end:", result.metrics["hits@1"])

"""Link a mention, with and without the image, and several mentions at once.

Run `make demo` first; it makes the model and the knowledge base. Then: python examples/link_a_mention.py
"""

from hf_mel import EntityLinker
from hf_mel.data import load_mentions

linker = EntityLinker.from_pretrained("runs/mimic_flags", kb="kb/flags_mel")

# One mention in a text. `image=` takes a path, a PIL image or bytes.
result = linker(text="The hosts raised their flag in Accra.", mention="The hosts")
print(f"{result.mention!r} → {result.entity_id} ({result.best.name}, score {result.best.score:.1f})")

# A mention of the test split that only the image decides.
mentions = load_mentions("data/flags_mel", "test")
row = next(row for row in mentions if row["stratum"] == "image")
print(f"\n{row['text']}\n{row['mention']!r} is {row['entity_id']}.")
for name, image in (("with the image", row["image"]), ("without it", None)):
    result = linker(text=row["text"], start=row["start"], end=row["end"], image=image, top_k=3)
    print(f"{name}:", ", ".join(f"{candidate.name} {candidate.score:.1f}" for candidate in result.candidates))

# Many mentions are linked in batches. A mention whose best score is below the model's threshold is NIL.
results = linker(mentions.select(range(10)), top_k=1)
print("\nNIL:", sum(result.is_nil for result in results), "of", len(results))

"""Link to your own entities: write them down, build a knowledge base, change it, link.

Run `make demo` first; it makes the model. Then: python examples/your_own_entities.py
"""

import csv

from PIL import Image

from hf_mel import EntityLinker, KnowledgeBase, load_retriever

# A table of entities. CSV, TSV, JSON and JSON lines work. `image` is a path relative to the file.
Image.new("RGB", (60, 40), (0, 107, 63)).save("green.png")
rows = [
    {"id": "e1", "name": "Ghana", "attributes": "Capital: Accra. Continent: Africa.", "image": "green.png"},
    {"id": "e2", "name": "Togo", "attributes": "Capital: Lomé. Continent: Africa.", "image": ""},
    {"id": "e3", "name": "Georgia", "attributes": "Capital: Tbilisi. Continent: Asia.", "image": ""},
]
with open("my_entities.csv", "w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)

# The model encodes every entity once. The folder belongs to this model.
model, processor = load_retriever("runs/mimic_flags")
kb = KnowledgeBase.build("my_entities.csv", model, processor, output="kb/my_entities")
linker = EntityLinker(model, processor, kb)
print("Three entities:", linker(text="Georgia won again.", mention="Georgia").best.description or "the country")

# A second Georgia. Only the new entity is encoded.
with open("more.jsonl", "w", encoding="utf-8") as file:
    file.write(
        '{"id": "e4", "name": "Georgia", "description": "state of the United States", "attributes": "Capital: Atlanta."}\n'
    )
kb.add("more.jsonl", model, processor)
kb.remove(["e2"])
for text in ("Georgia won again, and Tbilisi danced.", "Georgia won again, and Atlanta danced."):
    result = linker(text=text, mention="Georgia", top_k=2)
    print(text, "→", [(candidate.entity_id, round(candidate.score, 1)) for candidate in result.candidates])

"""Tests of model and knowledge base cards, compared with complete expected texts."""

from __future__ import annotations

import json
import re

from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_mel.hub.model_cards import MARKER, eval_results, kb_card, model_card
from hf_mel.hub.publish.model_repo import model_publication
from hf_mel.hub.saving import save_model_repository
from tests.toy import ToyProcessor, ToyRetriever, toy_model


def metrics(num_ranked: int, **values: float) -> dict:
    return {
        "hits@1": 0.5,
        "hits@3": 0.625,
        "hits@20": 1.0,
        "mrr": 0.61234,
        "mr": 2.25,
        "num_ranked": num_ranked,
        **values,
    }


def run_info(**changes) -> dict:
    return {
        "recipe": "toy_planets",
        "description": "A toy on planets.",
        "license": "mit",
        "citation": "@misc{toy, title = {Toy}}\n",
        "model": {
            "type": "toy_retriever",
            "parameters": 1234567,
            "from_pretrained": None,
            "text": "org/encoder",
            "vision": "package:some_weights/vision",
        },
        "data": {
            "dataset": "org/planets",
            "revision": "abc123",
            "sha256": "f00d",
            "train_split": "train",
            "train_mentions": 1000,
            "train_nil": 10,
            "validation_split": "validation",
            "validation_mentions": 200,
            "entities": 3000,
        },
        "validation": {
            "metrics": metrics(190),
            "strata": {"stratum": {"text": metrics(100, mr=1.0), "none": metrics(0, mrr=float("nan"), mr=None)}},
        },
        "nil": {"threshold": 1.23456789, "accuracy": 0.875, "simulated": False},
        "best": {"step": 80, "epoch": 10.0},
        "training": {"num_train_epochs": 20, "learning_rate": 1e-05},
        "seed": 7,
        "run": {"seconds": 90.0, "resumed": False, "device": "2 CPU cores"},
        "versions": {"hf_mel": "0.1.0", "torch": "2.13.0"},
        **changes,
    }


EXPECTED = """---
base_model:
- org/encoder
datasets:
- org/planets
library_name: transformers
license: mit
tags:
- entity-linking
- multimodal
- hf_mel
- toy_retriever
---

# toy_planets

A toy on planets.

This model links mentions to entities: given a mention in a text, with or without an image, it scores the entities of a
knowledge base by their names, attributes and images. It encodes mentions and entities separately, so the entities of a
knowledge base are encoded only once.

It is a `toy_retriever` retriever with 1,234,567 parameters, built on `org/encoder` and `package:some_weights/vision`, trained with hf_mel.

## Use

With transformers alone (the repository contains the model's code):

```python
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("hf-mel/toy_planets", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("hf-mel/toy_planets", trust_remote_code=True)
mention = {"mention": "Jordan", "text": "Jordan scored 41 points in the final.", "image": None}
names = {"Jordan": "Capital: Amman. Continent: Asia.", "Michael Jordan": "Occupation: basketball player."}
entities = [{"name": name, "attributes": facts, "description": "", "images": []} for name, facts in names.items()]
with torch.no_grad():
    mentions = model.encode_mentions(**processor(mentions=[mention]))
    scores = model.score(mentions, model.encode_entities(**processor(entities=entities)))  # [1, 2], higher is better
print(entities[scores[0].argmax()]["name"])
```

Images are PIL images: one per mention in `"image"`, any number per entity in `"images"`, of which the first is used.
To link against your own knowledge base from the command line:

```bash
pip install hf_mel
hf-mel kb build hf-mel/toy_planets --entities entities.jsonl --output my_kb
hf-mel link hf-mel/toy_planets --kb my_kb --text "Jordan scored 41 points in the final." --mention Jordan
```

## Training data

|  |  |
| --- | --- |
| data set | `org/planets` |
| revision | `abc123` |
| sha256 of its files | `f00d` |
| mentions for training (`train`) | 1,000 |
| training mentions left out because their entity is NIL | 10 |
| mentions for validation (`validation`) | 200 |
| entities of the knowledge base | 3,000 |

## Results

Every mention is ranked against all 3,000 entities of the knowledge base. Ties count as the mean of the best and the
worst position.

The checkpoint was selected by MRR on `validation`, so these results are slightly optimistic.

| mentions | number | H@1 | H@3 | MRR | MR |
| --- | --- | --- | --- | --- | --- |
| `validation` | 190 | 50.0 | 62.5 | 61.2 | 2.2 |
| stratum: text | 100 | 50.0 | 62.5 | 61.2 | 1.0 |
| stratum: none | 0 | 50.0 | 62.5 |  |  |

A mention is predicted as NIL if its best score is below 1.235 (`config.nil_threshold`). The threshold was calibrated on the NIL mentions of this split, where it decides 87.5 % correctly.

## Training

| argument | value |
| --- | --- |
| `num_train_epochs` | `20` |
| `learning_rate` | `1e-05` |

1.5 minutes on 2 CPU cores; epoch 10 was the best; seed 7. With hf_mel 0.1.0, torch 2.13.0.

## Intended use

Suggesting which entity a name in a captioned picture, a post or an article refers to: for search, archives, annotation
with human review, and research on the task. Do not use it to make decisions about people or to recognise people in
pictures.

## Limits and bias

- It ranks only the entities of the knowledge base. Whether the right entity is among them can be decided by a threshold
  on the best score. Scores are not probabilities, and a threshold holds only for the model and the kind of text it was
  set on.
- Images are optional. Without one the model decides by the text, less accurately.
- It has seen only the languages, subjects and kinds of entity in its training data. Evaluate it on your own data before
  you rely on it.
- Identifying people in pictures and posts can harm them. Respect the law and the people concerned.
- Knowledge bases and training data cover some regions, languages and professions far better than others, and models
  inherit this: famous entities are found more easily than others of the same name.

## Citation

The method:

```bibtex
@misc{toy, title = {Toy}}
```

The software:

```bibtex
@software{hf_mel,
  title  = {hf\\_mel: multimodal entity linking on the Hugging Face Hub},
  author = {{The hf\\_mel contributors}},
  year   = {2026},
}
```

<!-- Written by hf_mel from results.json. Take this line out to keep what you change by hand. -->
"""


def test_the_card_of_a_retriever():
    assert model_card(run_info()) == EXPECTED


def pretraining_info(**changes) -> dict:
    info = run_info(task="pretraining", validation={"loss": 2.34567}, **changes)
    del info["nil"]
    data = {"train_posts": 1500, "validation_posts": 250}
    shared = {k: v for k, v in info["data"].items() if k not in ("train_mentions", "train_nil", "validation_mentions")}
    return info | {"data": shared | data}


def test_the_card_of_a_pretraining():
    """It shares metadata, data and training with a model card, but has no linking examples or ranking results."""
    card, model = model_card(pretraining_info()), model_card(run_info())
    assert ModelCard(card).data.to_dict() == ModelCard(model).data.to_dict()
    for words in (
        "the first of two training steps",
        "`toy_retriever` model with 1,234,567 parameters, built on `org/encoder`",
        "  from_pretrained: hf-mel/toy_planets\n",
        "| posts for training (`train`) | 1,500 |\n| posts for validation (`validation`) | 250 |\n| entities of",
        "The loss on `validation` is 2.346. The checkpoint was selected by this loss.",
        "1.5 minutes on 2 CPU cores; epoch 10 was the best; seed 7. With hf_mel 0.1.0, torch 2.13.0.",
        "@misc{toy, title = {Toy}}",
    ):
        assert words in card
    assert "H@1" not in card
    assert "NIL" not in card
    assert card.endswith(f"```\n\n{MARKER}\n")
    assert not re.search(r"\n{3}|\$\w", card)
    assert eval_results(pretraining_info()) == []


def test_a_pretrained_model_is_published_with_its_card(tmp_path):
    save_model_repository(toy_model(), ToyProcessor(), tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(pretraining_info()))
    publication = model_publication(tmp_path, "me/first")
    assert b"the first of two training steps" in publication.files["README.md"]
    assert b"from_pretrained: me/first" in publication.files["README.md"]
    assert any("pre-trained" in note for note in publication.notes)
    assert not any("validation results only" in note for note in publication.notes)


def test_a_threshold_from_simulated_nil_mentions_is_suggested_but_not_set():
    card = model_card(run_info(nil={"threshold": 1.23456789, "accuracy": 0.875, "simulated": True}))
    assert "predicts no NIL by default" in card
    assert "`--nil-threshold 1.235`" in card
    assert "config.nil_threshold" not in card


def test_the_card_shows_risk_and_coverage_in_about_ten_rows():
    links = list(range(4, 161, 4))
    curve = {
        "confidences": [float(-n) for n in links],
        "links": links,
        "wrong": [n // 8 for n in links],
        "mentions": 200,
    }
    card = model_card(run_info(risk_coverage=curve))
    lines = card.splitlines()
    first = lines.index("| mentions linked | least confidence | precision |") + 2
    rows = [line.strip("| ").split(" | ") for line in lines[first : lines.index("", first)]]
    assert rows == [[f"{n / 2:.0f} %", f"{-n:.3g}", f"{100 * (1 - (n // 8) / n):.1f}"] for n in range(16, 161, 16)]
    for empty in (None, {"confidences": [], "links": [], "wrong": [], "mentions": 0}):
        assert "mentions linked" not in model_card(run_info(risk_coverage=empty))
    one = {"confidences": [0.5], "links": [3], "wrong": [1], "mentions": 4}
    assert "| 75 % | 0.5 | 66.7 |" in model_card(run_info(risk_coverage=one))


def test_the_card_of_a_model_trained_from_scratch_on_a_local_build_names_no_repositories():
    info = run_info(citation="", nil=None, best=None, repo_id="me/mine")
    info["model"] |= {"text": None, "vision": None}
    info["data"] |= {"dataset": "planets", "revision": None, "sha256": None, "train_nil": 0}
    info["run"]["resumed"] = True
    card = model_card(info)
    metadata = ModelCard(card).data
    assert metadata.base_model is None
    assert metadata.datasets is None
    assert "NIL (`config" not in card
    assert "left out" not in card
    assert "trained from scratch" in card
    assert "| revision | a local build |" in card
    assert "1.5 minutes on 2 CPU cores since it was last resumed; the last step was kept; seed 7." in card
    assert 'from_pretrained("me/mine"' in card
    assert "hf-mel/" not in card
    assert "The method" not in card
    assert card.endswith(f"```\n\n{MARKER}\n")
    assert not re.search(r"\n{3}|\$\w", card)


def test_the_base_model_is_the_one_that_training_started_from():
    info = run_info()
    info["model"] |= {"from_pretrained": "org/first", "text": None, "vision": None}
    assert ModelCard(model_card(info)).data.base_model == ["org/first"]


def test_a_repository_contains_the_code_of_its_classes_and_does_not_modify_them(tmp_path):
    model = toy_model()
    save_model_repository(model, ToyProcessor(), tmp_path)
    assert (tmp_path / "toy.py").exists()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "toy.ToyConfig",
        "AutoModel": "toy.ToyRetriever",
    }
    assert '"AutoProcessor": "toy.ToyProcessor"' in (tmp_path / "processor_config.json").read_text()
    for kind in (ToyRetriever, type(model.config), ToyProcessor):
        assert kind._auto_class is None
    ToyRetriever.from_pretrained(tmp_path).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain/toy.py").exists()


def test_test_results_come_first_and_all_results_name_their_split():
    test = {"metrics": metrics(700, **{"hits@1": 0.25}), "strata": {}, "data": {"split": "test"}, "ties": "realistic"}
    card = model_card(run_info(tests=[test]))
    assert (
        card.index("| `test` | 700 | 25.0 |") < card.index("selected by MRR on `validation`") < card.index("| `valid")
    )


def test_the_card_omits_secrets_in_the_training_arguments():
    card = model_card(run_info(training={"seed": 1, "hub_token": "hf_" + "x" * 34, "push_to_hub_token": "secret"}))
    assert "hf_x" not in card
    assert "secret" not in card
    assert "| `seed` | `1` |" in card


def test_the_hub_client_parses_eval_results():
    test = {"metrics": metrics(700, **{"hits@1": 0.25}), "strata": {}, "data": {"split": "test"}, "ties": "realistic"}
    parsed = parse_eval_result_entries(eval_results(run_info(tests=[test])))
    assert [(entry.task_id, entry.value) for entry in parsed] == [
        ("test_hits_at_1", 25.0),
        ("test_mrr", 61.23),
        ("validation_hits_at_1", 50.0),
        ("validation_mrr", 61.23),
    ]
    assert {(entry.dataset_id, entry.dataset_revision) for entry in parsed} == {("org/planets", "abc123")}
    assert "700 mentions of test" in parsed[0].notes
    assert "3,000 entities" in parsed[0].notes


def test_a_local_data_set_has_no_eval_results():
    info = run_info()
    for change in ({"revision": None}, {"dataset": "planets"}):
        assert eval_results(info | {"data": info["data"] | change}) == []


def test_the_card_of_a_knowledge_base():
    info = {
        "entities": 1200,
        "dtype": "float16",
        "encodings": {"text": {"dtype": "float16", "shape": [64]}, "mask": {"dtype": "bool", "shape": []}},
        "model": {"name": "org/mimic", "revision": "abc", "type": "mimic", "weights": "f00d"},
    }
    card = kb_card(info, "org/planets-kb")
    assert ModelCard(card).data.to_dict()["configs"][0]["data_files"][0]["path"] == "entities-*.parquet"
    for words in (
        "1,200 entities",
        "(`mimic`, revision `abc`)",
        'from_pretrained("org/mimic", kb="org/planets-kb")',
        "| `text` | 64 float16 |",
        "| `mask` | 1 bool |",
        "`f00d`",
    ):
        assert words in card
    local = kb_card(info | {"model": info["model"] | {"name": "run", "revision": None}}, "org/planets-kb")
    assert "encoded by `run`\n(`mimic`)" in local
    assert 'from_pretrained("MODEL"' in local


def test_the_card_of_a_reranker():
    def evaluation(protocol: str, mrr: float) -> dict:
        orders = {
            "reranker": {"metrics": metrics(190, mrr=mrr), "strata": {}},
            "candidates: name": {"metrics": metrics(190, mrr=0.5), "strata": {}},
        }
        return {"protocol": protocol, "metrics": metrics(190, mrr=mrr), "strata": {}, "orders": orders}

    validation = evaluation("candidates (end to end)", 0.61234)
    validation["gold_added"] = evaluation("candidates (gold added)", 0.70126)
    validation["candidates"] = {"source": "name", "k": 16, "recall": {"recall@1": 0.4, "recall@16": 0.931}}
    info = run_info(validation=validation, nil=None)
    card = " ".join(model_card(info).split())
    assert "`toy_retriever` reranker with 1,234,567 parameters" in card
    assert "its candidates (up to 16 by name, with 93.1 % of the golds), out of 3,000 entities" in card
    assert "| reranker, end to end | 50.0 | 62.5 | 61.2 | 2.2 |" in card
    assert "| reranker, gold added | 50.0 | 62.5 | 70.1 | 2.2 |" in card
    assert "| candidates: name, end to end | 50.0 | 62.5 | 50.0 | 2.2 |" in card
    assert "--reranker hf-mel/toy_planets" in card
    assert "against all" not in card
    assert "$" not in card
    assert "up to 16 by name, with 93.1 % of the golds reranked, end to end" in eval_results(info)[0]["notes"]

"""The rendered card of a small data set, compared as a whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_mel.building.build import build_dataset
from hf_mel.building.builders import find_builder, known_datasets
from hf_mel.dataset_scripts.wikimel.wikimel import WikiMel
from tests.dataset_scripts.fixtures import write_json, write_melbench

TEMPLATE = """# $title ($name)
From $homepage, layout $layout. $options
## Fetch
$download
## Size
$counts
## Columns
$schema
## Defects
$problems
## Leakage
$leakage
## Licence
$redistribution
## Files
$raw_files
## Citation
$citation
"""

EXPECTED = """---
language:
- en
license: mit
size_categories: n<1K
task_categories:
- text-retrieval
task_ids:
- entity-linking-retrieval
pretty_name: WikiMEL
tags:
- entity-linking
- multimodal
- knowledge-base
dataset_info:
- config_name: entities
  features:
  - name: entity_id
    dtype: string
  - name: name
    dtype: string
  - name: description
    dtype: string
  - name: attributes
    dtype: string
  - name: aliases
    list: string
  - name: images
    list: image
  splits:
  - name: kb
    num_bytes: {kb_bytes}
    num_examples: 4
  download_size: {entities_size}
  dataset_size: {kb_bytes}
- config_name: mentions
  features:
  - name: mention_id
    dtype: string
  - name: context_id
    dtype: string
  - name: text
    dtype: string
  - name: mention
    dtype: string
  - name: start
    dtype: int32
  - name: end
    dtype: int32
  - name: mention_type
    dtype: string
  - name: topic
    dtype: string
  - name: image
    dtype: image
  - name: entity_id
    dtype: string
  - name: candidates
    list: string
  splits:
  - name: train
    num_bytes: {train_bytes}
    num_examples: 5
  - name: validation
    num_bytes: {validation_bytes}
    num_examples: 2
  - name: test
    num_bytes: {test_bytes}
    num_examples: 2
  download_size: {mentions_size}
  dataset_size: {mentions_bytes}
configs:
- config_name: entities
  data_files:
  - split: kb
    path: entities/kb-*
- config_name: mentions
  default: true
  data_files:
  - split: train
    path: mentions/train-*
  - split: validation
    path: mentions/validation-*
  - split: test
    path: mentions/test-*
---

# WikiMEL (wikimel)
From https://github.com/seukgcode/MELBench, layout melbench. Built with `resize=500`.
## Fetch
Everything from there.
## Size
| configuration | split | rows | images | rows without image | official rows |
| --- | --- | --- | --- | --- | --- |
| mentions | train | 5 | 4 | 1 | 5 |
| mentions | validation | 2 | 2 | 0 | unknown |
| mentions | test | 2 | 2 | 0 | 2 |
| entities | kb | 4 | 1 | 3 | 4 |

sha256 of all Parquet files together: `{data}`
## Columns
**mentions**

| column | type |
| --- | --- |
| `mention_id` | string |
| `context_id` | string |
| `text` | string |
| `mention` | string |
| `start` | int32 |
| `end` | int32 |
| `mention_type` | string |
| `topic` | string |
| `image` | image |
| `entity_id` | string |
| `candidates` | list of string |

**entities**

| column | type |
| --- | --- |
| `entity_id` | string |
| `name` | string |
| `description` | string |
| `attributes` | string |
| `aliases` | list of string |
| `images` | list of image |
## Defects
| kind | count | first |
| --- | --- | --- |
| entity without attributes | 2 | qid2abs.json, row Q903 |
| mention not in text | 1 | mentions/train, row 103 |
| mention not located | 1 | mentions/test, row 105-1 |
| missing entity image | 3 | qid2ne.json, row Q901 |
| missing mention image | 1 | Wikidata-MEL.json, row 103 |
| split id without sentence | 1 | splits.json, row 199 |
| entities sharing their text | 2 |  |
| mention images in kb | 2 |  |
## Leakage
| configuration | split | mentions whose | count |
| --- | --- | --- | --- |
| mentions | validation | image is one of the knowledge base | 2 of 2 (100.0%) |
| mentions | validation | image is one of its gold | 2 of 2 (100.0%) |
| mentions | test | gold occurs in train | 2 of 2 (100.0%) |
## Licence
Do not redistribute this copy: the photographers were not asked.
## Files
| file | sha256 |
| --- | --- |
| Wikidata-MEL.json | `{Wikidata-MEL.json}` |
| qid2abs.json | `{qid2abs.json}` |
| qid2ne.json | `{qid2ne.json}` |
| splits.json | `{splits.json}` |
## Citation
```bibtex
@misc{wikimel}
```
"""


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Builds a small WikiMEL. Returns its card, the raw folder and the built folder."""
    raw, out = write_melbench(tmp_path / "raw"), tmp_path / "out"
    write_json(raw / "qid2ne.json", {"Q901": "A", "Q902": "A", "Q903": "Berta von Holm", "Q904": "José Brun"})
    write_json(raw / "qid2abs.json", {"Q901": "Sex: .", "Q902": "Sex: .", "Q903": "", "Q904": ""})
    (raw / "entity_images").mkdir()
    (raw / "entity_images" / "Q904.jpg").write_bytes((raw / "mention_images" / "104.jpg").read_bytes())
    counts = {"mentions": {"train": 5, "validation": None, "test": 2}, "entities": {"kb": 4}}
    for name, value in (
        ("OFFICIAL_COUNTS", {"melbench": counts}),
        ("LICENSE", "mit"),
        ("DOWNLOAD", "Everything from there"),
        ("REDISTRIBUTION", "the photographers were not asked."),
        ("CITATION", "@misc{wikimel}"),
    ):
        monkeypatch.setattr(WikiMel, name, value)
    read = Path.read_text
    template = lambda self, **kwargs: TEMPLATE if self.name == "README.template.md" else read(self, **kwargs)  # noqa: E731
    monkeypatch.setattr(Path, "read_text", template)
    build_dataset("wikimel", output=out, raw_dir=raw, resize=500)
    return (out / "README.md").read_text(encoding="utf-8"), raw, out


def test_a_whole_card(card):
    text, raw, out = card
    expected = EXPECTED
    sizes = {"entities": ["kb"], "mentions": ["train", "validation", "test"]}
    for config, splits in sizes.items():
        files = [out / config / f"{split}-00000-of-00001.parquet" for split in splits]
        tables = [pq.read_table(file) for file in files]
        nbytes = [pa.Table.from_pylist(table.to_pylist(), schema=table.schema).nbytes for table in tables]
        for split, size in zip(splits, nbytes, strict=True):
            expected = expected.replace(f"{{{split}_bytes}}", str(size))
        expected = expected.replace(f"{{{config}_bytes}}", str(sum(nbytes)))
        expected = expected.replace(f"{{{config}_size}}", str(sum(file.stat().st_size for file in files)))
    parquet = {path.relative_to(out).as_posix(): path for path in out.glob("*/*.parquet")}
    lines = [f"{name} {hashlib.sha256(parquet[name].read_bytes()).hexdigest()}\n" for name in sorted(parquet)]
    expected = expected.replace("{data}", hashlib.sha256("".join(lines).encode()).hexdigest())
    for file in raw.glob("*.json"):
        expected = expected.replace(f"{{{file.name}}}", hashlib.sha256(file.read_bytes()).hexdigest())
    assert text == expected


@pytest.mark.parametrize("name", known_datasets())
def test_every_template_has_the_required_placeholders(name):
    builder = find_builder(name)
    text = (
        Path(str(__import__(builder.__module__, fromlist=["_"]).__file__)).with_name("README.template.md").read_text()
    )
    for placeholder in ("title", "counts", "options", "schema", "citation"):
        assert f"${placeholder}" in text
    assert "$leakage" in text or "mentions" not in builder.CONFIGS
    if builder.NEEDS_RAW:
        assert "$download" in text
        assert "$raw_files" in text
        assert "$problems" in text
        assert "$redistribution" in text

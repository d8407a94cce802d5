"""Tests of the dump that the benchmark of the Wikidata build generates."""

from __future__ import annotations

import gzip
import json

from benchmarks import wikidata
from tests.dataset_scripts import wikidata_release as release


def test_lines_have_ids_of_their_own_and_name_what_the_dump_holds(tmp_path):
    release.write_documents(tmp_path)
    (tmp_path / "bad.json").unlink()
    items = wikidata.real_items(tmp_path)
    assert all(item["claims"] for item in items)
    wikidata.write_dump(tmp_path / "dump.gz", items, 500, line_bytes=600)
    text = gzip.decompress((tmp_path / "dump.gz").read_bytes()).decode()
    entities = json.loads(text)
    generated = [entity for entity in entities if entity["type"] == "item" and int(entity["id"][1:]) >= 200_000_000]
    assert len({entity["id"] for entity in generated}) == 500
    ids = {entity["id"] for entity in entities}
    named = {
        f"Q{statement['mainsnak']['datavalue']['value']['numeric-id']}"
        for entity in generated
        for statement in entity["claims"].get("P31", [])
    }
    assert named <= ids
    assert len(text.splitlines()) == len(entities) + 2
    people = [entity for entity in generated if release.item_value(5)["mainsnak"]["datavalue"]["value"] in [
        statement["mainsnak"]["datavalue"]["value"] for statement in entity["claims"]["P31"]
    ]]  # fmt: skip
    assert len(people) == 134 + 34  # every third of 400 templates, and of the first 100 again


def test_lines_have_the_length_that_was_asked_for(tmp_path):
    item = release.item(
        1, {f"l{k}": {"language": "x", "value": "y" * 40} for k in range(400)}, P31=[release.item_value(5)]
    )
    lines = wikidata.templates([item], 4000)
    assert 3000 < sum(map(len, lines)) / len(lines) < 5000

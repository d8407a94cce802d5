"""A small invented dump in Wikidata's JSON, malformed data included, and the documents of the same entities.

The classes are human (Q5) < person (Q215627) < agent (Q24229398) < person (a cycle), and musician group < agent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.dataset_scripts.fixtures import write_json

OPTIONS: dict[str, Any] = {"config_options": {"languages": "en,de", "classes": "Q215627", "min_sitelinks": "2"}}
SPLITS = {"entities": {"kb": 6}}


def terms(**texts: str) -> dict[str, Any]:
    return {language: {"language": language, "value": text} for language, text in texts.items()}


def value(content: Any, kind: str, rank: str = "normal") -> dict[str, Any]:
    return {"mainsnak": {"snaktype": "value", "datavalue": {"value": content, "type": kind}}, "rank": rank}


def item_value(number: int, rank: str = "normal", old: bool = False) -> dict[str, Any]:
    content = {"entity-type": "item", "numeric-id": number} | ({} if old else {"id": f"Q{number}"})
    return value(content, "wikibase-entityid", rank)


def text_value(text: str) -> dict[str, Any]:
    return value(text, "string")


def date(time: str, precision: int = 11) -> dict[str, Any]:
    return value({"time": time, "precision": precision, "calendarmodel": "Q1985727"}, "time")


def place(latitude: float, longitude: float, globe: str = "Q2") -> dict[str, Any]:
    content = {"latitude": latitude, "longitude": longitude, "globe": f"http://www.wikidata.org/entity/{globe}"}
    return value(content, "globecoordinate")


def unknown() -> dict[str, Any]:
    return {"mainsnak": {"snaktype": "somevalue"}, "rank": "preferred"}


def item(number: int, labels: Any, sitelinks: int = 0, descriptions: Any = None, aliases: Any = None, **claims: Any):
    return {
        "type": "item",
        "id": f"Q{number}",
        "labels": labels,
        "descriptions": descriptions or [],  # PHP writes an empty object as a list
        "aliases": {k: [{"language": k, "value": text} for text in v] for k, v in (aliases or {}).items()},
        "claims": claims or [],
        "sitelinks": {f"w{k}": {"title": "x"} for k in range(sitelinks)},
    }


def entities() -> list[Any]:
    human = [item_value(5)]
    return [
        item(5, terms(en="human", de="Mensch"), 90, P279=[item_value(215627)]),
        item(215627, terms(en="person"), 90, P279=[item_value(24229398)]),
        item(24229398, terms(en="agent"), 90, P279=[item_value(215627)]),
        item(215380, terms(en="musical group"), 90, P279=[item_value(24229398)]),
        item(7, terms(en="painter", de="Maler")),
        item(8, terms(de="Dichterin")),
        item(30, terms(en="Norland")),
        item(11573, terms(en="metre")),
        {"type": "property", "id": "P106", "datatype": "wikibase-item", "labels": terms(en="occupation"), "claims": {}},
        {"type": "property", "id": "P27", "labels": terms(fr="pays")},
        {"type": "lexeme", "id": "L5", "lemmas": {}},
        item(
            101,
            terms(en="Ada  Orme", de="Ada Orme (Malerin)", fr="Ade"),
            3,
            terms(en="Norland painter"),
            {"en": ["A. Orme", "Ada Orme"], "fr": ["Adèle"]},
            P31=human,
            P106=[item_value(7, "normal"), item_value(8, old=True), item_value(9999, "deprecated")],
            P27=[item_value(30), item_value(31, "deprecated"), unknown()],
            P569=[date("+1852-03-11T00:00:00Z")],
            P570=[date("+1911-00-00T00:00:00Z", 9)],
            P19=[item_value(30)],
            P625=[place(1.5, 2.5, "Q111"), place(49.25, -8.5)],
            P18=[text_value("Ada Orme by Lund.jpg")],
            P2048=[value({"amount": "+1.75", "unit": "http://www.wikidata.org/entity/Q11573"}, "quantity")],
        ),
        item(102, terms(de="Bo Falk"), 2, P31=[item_value(215627)], P106=[item_value(404)], P569=[date("+1950-00-00T00:00:00Z", 8)]),
        item(103, terms(mul="Cy Lund"), 2, P31=human, P569=[date("-0044-03-15T00:00:00Z")]),
        item(104, terms(fr="Sans nom"), 5, P31=human),
        item(105, terms(en="Few Links"), 1, P31=human),
        item(106, terms(en="The Drums"), 9, P31=[item_value(215380)], P571=[
            date("+1990-00-00T00:00:00Z", 9), {**date("+1988-00-00T00:00:00Z", 9), "rank": "preferred"}]),
        item(107, terms(en="No Class"), 9),
        item(101, terms(en="Ada again"), 9, P31=human),
        item(108, {"en": "broken"}, 9, P31=human),
        item(109, terms(en="Dee Moor"), 4, P31=[item_value(15)]),
        {"id": "Q6", "missing": ""},
        {**item(110, terms(en="Old Id"), 1, P31=human), "redirects": {"from": "Q110", "to": "Q106"}},
        item(16, terms(en="Q16 is below human"), 0, P279=[item_value(5)]),
        {"id": "Q15", "type": "item", "redirects": {"from": "Q15", "to": "Q16"}, "labels": terms(en="old class")},
        item(17, terms(en="below a merged class"), 0, P279=[item_value(15)]),
        item(111, terms(en="Fay Hill"), 4, P31=[item_value(17)]),
    ]  # fmt: skip


def write_dump(path: Path) -> None:
    lines = [json.dumps(entity, ensure_ascii=False) for entity in entities()]
    lines.insert(3, '{"type": "item", "id": "Q9", "labels": {')  # cut off
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def write(folder: Path) -> None:
    write_dump(folder / "dump.json")


def write_documents(folder: Path) -> None:
    for number, entity in enumerate(entities()):
        write_json(folder / f"{number:02d}.json", {"entities": {entity["id"]: entity}, "success": 1})
    (folder / "bad.json").write_text('{"entities": ', encoding="utf-8")


LAYOUTS = {"documents": (write_documents, SPLITS)}


def tabular_entities() -> list[Any]:
    """The entities that tables can hold: each once, and none that is malformed, merged or deleted."""
    kept = {}
    for entity in entities():
        if entity.get("type") in ("item", "property") and "redirects" not in entity and entity["id"] != "Q108":
            kept.setdefault(entity["id"], entity)
    return list(kept.values())


def write_tables(folder: Path, rows_of_a_file: int = 3) -> None:
    """Writes the entities as the tables of wikidata-pq, sorted by id, the claims in several files."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in ("claims", "links")}
    for entity in sorted(tabular_entities(), key=lambda entity: entity["id"]):
        entity_id = entity["id"]
        for table, single in (("labels", True), ("descriptions", True), ("aliases", False)):
            for language, given in dict(entity.get(table) or {}).items():
                for term in [given] if single else given:
                    row = {"id": entity_id, "language": language, "value": term["value"]}
                    tables.setdefault(f"wikidata-{table}/{language}", []).append(row)
        tables["links"] += [
            {"id": entity_id, "site": site, "title": "x"} for site in dict(entity.get("sitelinks") or {})
        ]
        for property_id, statements in dict(entity.get("claims") or {}).items():
            tables["claims"] += [
                {"id": entity_id, "property": property_id, "datavalue": _fields(statement), "rank": statement["rank"]}
                for statement in statements
            ]
    for name, rows in tables.items():
        (folder / name).mkdir(parents=True)
        size = rows_of_a_file if name == "claims" else len(rows)
        for start in range(0, len(rows), size):
            features = _TABLE_SCHEMAS.get(name)
            table = pa.Table.from_pylist(rows[start : start + size], schema=features)
            pq.write_table(table, folder / name / f"part-{start // size + 1}-of-9.parquet")


def _fields(statement: dict[str, Any]) -> dict[str, Any] | None:
    snak = statement["mainsnak"]
    if snak["snaktype"] != "value":
        return None
    content, kind = snak["datavalue"]["value"], snak["datavalue"]["type"]
    if kind == "string":
        return {"datavalue__string": content}
    if kind == "wikibase-entityid":
        return {"id": f"Q{content['numeric-id']}"}
    if kind == "globecoordinate":
        return {**content, **{axis: {f"{axis}__number": content[axis]} for axis in ("latitude", "longitude")}}
    if kind == "time":
        return {**content, "precision": {"precision__integer": content["precision"]}}
    return content


def _numbers(name: str) -> pa.DataType:
    return pa.struct([(f"{name}__integer", pa.int64()), (f"{name}__number", pa.float64())])


_TEXT_FIELDS = ("id", "datavalue__string", "text", "language", "amount", "unit", "time", "calendarmodel", "globe")
_TABLE_SCHEMAS = {
    "claims": pa.schema(
        [
            ("id", pa.string()),
            ("property", pa.string()),
            (
                "datavalue",
                pa.struct(
                    [
                        *((name, pa.string()) for name in _TEXT_FIELDS),
                        *((name, _numbers(name)) for name in ("precision", "latitude", "longitude")),
                    ]
                ),
            ),
            ("rank", pa.string()),
        ]
    )
}

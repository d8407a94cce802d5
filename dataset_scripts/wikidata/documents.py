"""Reads entity documents of Wikidata (JSON) into records whose values are not named yet.

A *reference* is the number of an item (Q42 is 42) or of a property (P31 is -31). The label of a value is in another
document than the value, so that a record keeps references, and [`~hf_mel.dataset_scripts.wikidata.tables`] names them
when all documents have been read.

The format is that of https://doc.wikimedia.org/Wikibase/master/php/docs_topics_json.html. Older documents give
`numeric-id` for `id`, and have no `datatype`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_mel.errors import MissingExtraError

#: Language code of labels that hold in every language. It is tried after the wanted languages.
_ANY_LANGUAGE = "mul"
_INSTANCE_OF, _SUBCLASS_OF, _IMAGE, _COORDINATES = "P31", "P279", "P18", "P625"
#: Globe of coordinates that are places on the Earth.
_EARTH = "http://www.wikidata.org/entity/Q2"
#: Column of years → properties, of which the first that an entity has gives the year.
YEARS = {
    "born": ("P569",),
    "died": ("P570",),
    "founded": ("P571", "P577", "P580", "P585"),
    "dissolved": ("P576", "P582"),
}
#: Properties of which the first that an entity has gives its place: where it lies or is based, else the place of birth,
#: else the country.
PLACES = ("P131", "P276", "P159", "P19", "P17")

_TIME = re.compile(r"([+-])(\d{1,16})-(\d\d)-(\d\d)T.*", re.ASCII | re.DOTALL)
_ID = re.compile(r"([QP])([1-9]\d{0,14})", re.ASCII)

#: Kinds of entities that a user's choice leaves out. They are counted, and not listed.
CHOICES = ("not_in_ids", "too_few_sitelinks", "without_property", "not_of_classes")
#: Number of problems of one kind that are listed. All are counted.
MAX_LISTED = 1_000


def parse_json(data: bytes) -> Any:
    """Returns the value of JSON bytes.

    Raises:
        ValueError: They are no JSON, not UTF-8, or hold an unpaired surrogate.
        MissingExtraError: orjson is not installed.
    """
    return _orjson().loads(data)


def to_json(value: Any) -> bytes:
    """Returns a value as JSON bytes."""
    return _orjson().dumps(value)


def _orjson() -> Any:
    try:
        import orjson
    except ImportError as error:
        raise MissingExtraError(
            "Documents of Wikidata are read with orjson, which is not installed.",
            remedy='Run pip install "hf_mel[wikidata]".',
        ) from error
    return orjson


def reference_of(entity_id: Any) -> int | None:
    """Returns the reference of an id, such as 42 of "Q42" and -31 of "P31", or `None` of any other value."""
    match = _ID.fullmatch(entity_id) if isinstance(entity_id, str) else None
    return None if match is None else int(match[2]) * (1 if match[1] == "Q" else -1)


def id_of(reference: int) -> str:
    """Returns the id of a reference, such as "Q42" of 42 and "P31" of -31."""
    return f"Q{reference}" if reference > 0 else f"P{-reference}"


@dataclass(frozen=True)
class Selection:
    """The choice of what is read of each document, and of the items that become candidates.

    Args:
        languages (tuple of `str`): Language codes, the most wanted first.
        properties (tuple of `str`): Ids of the properties that become attributes, in their order.
        min_sitelinks (`int`): Number of pages of Wikimedia's projects that an item must have.
        required (tuple of `tuple[str, int or None]`): Properties that an item must have, each with the reference of a
            value, or `None` for any value.
        ids (`frozenset[int]`, *optional*): References of the wanted items. Default: all.
    """

    languages: tuple[str, ...]
    properties: tuple[str, ...]
    min_sitelinks: int = 0
    required: tuple[tuple[str, int | None], ...] = ()
    ids: frozenset[int] | None = None


def wanted_languages(selection: Selection) -> tuple[str, ...]:
    """Returns the languages of the labels, descriptions and aliases that are read."""
    return (*selection.languages, _ANY_LANGUAGE)


def needed_properties(selection: Selection) -> set[str]:
    """Returns the ids of all properties that are read."""
    years = {property_id for properties in YEARS.values() for property_id in properties}
    required = {property_id for property_id, _ in selection.required}
    return {_INSTANCE_OF, _SUBCLASS_OF, _IMAGE, _COORDINATES, *years, *PLACES, *required, *selection.properties}


@dataclass
class Records:
    """The contents of some documents, as values of JSON.

    Args:
        labels (`list[list]`): [reference, label] of every item and property that has a label.
        superclasses (`list[list]`): [item, superclasses] of every item with P279.
        items (`list[dict]`): The candidates: `id`, `name`, `description`, `aliases`, `sitelinks`, `classes` (P31),
            `facts` ([property, values]), `years`, `place`, `latitude`, `longitude`, `image_file`. A value is a text, a
            reference, or [text, reference of its unit].
        redirects (`list[list]`): [old, new] reference of each merged item.
        counts (`dict[str, int]`): Number of documents and values that were left out, by kind.
        problems (`list[list[str]]`): The first of them, [kind, file, row, detail]; none of a kind of [`CHOICES`].
    """

    labels: list[list[Any]] = field(default_factory=list)
    superclasses: list[list[Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    redirects: list[list[int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[list[str]] = field(default_factory=list)

    def problem(self, kind: str, file: str, row: str | int, detail: str = "") -> None:
        """Counts something that was left out, and lists it unless many were."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= MAX_LISTED and kind not in CHOICES:
            self.problems.append([kind, file, str(row), detail])


def read_line(line: bytes, file: str, number: int, selection: Selection, records: Records) -> None:
    """Adds the entity of one line of a dump. The brackets around the entities and blank lines are no entities."""
    line = line.strip()
    line = line[:-1].rstrip() if line.endswith(b",") else line
    if line in (b"", b"[", b"]"):
        return
    try:
        entity = parse_json(line)
    except ValueError as error:
        records.problem("line_not_json", file, number, str(error))
        return
    read_entity(entity, file, number, selection, records)


def read_document(data: bytes, file: str, selection: Selection, records: Records) -> None:
    """Adds the entities of a file of `Special:EntityData` or `wbgetentities`, or of a file with one entity."""
    try:
        document = parse_json(data)
    except ValueError as error:
        records.problem("file_not_json", file, "", str(error))
        return
    entities = document.get("entities", document) if isinstance(document, dict) else None
    if isinstance(entities, dict) and "id" in entities and "entities" not in document:
        entities = {entities["id"] if isinstance(entities["id"], str) else "": entities}
    if not isinstance(entities, dict):
        records.problem("file_without_entities", file, "")
        return
    for key, entity in entities.items():
        new_id = entity.get("id") if isinstance(entity, dict) else None
        old, new = reference_of(key), reference_of(new_id)
        if old is not None and new is not None and old != new:
            _add_redirect(old, new, file, records)
        read_entity(entity, file, key, selection, records)


def read_entity(entity: Any, file: str, row: str | int, selection: Selection, records: Records) -> None:
    """Adds one entity: its label, its superclasses, and, if it is an item that the selection takes, its record."""
    reference = reference_of(entity.get("id")) if isinstance(entity, dict) else None
    if reference is None:
        is_other = isinstance(entity, dict) and isinstance(entity.get("id"), str) and "type" in entity
        records.problem("not_an_item" if is_other else "malformed_entity", file, row)
        return
    entity_id = entity["id"]
    if "missing" in entity:
        records.problem("deleted_id", file, row, entity_id)
        return
    try:
        _add_entity(entity, reference, file, row, selection, records)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        records.problem("malformed_entity", file, row, f"{entity_id}: {type(error).__name__}: {error}"[:200])


def _add_entity(
    entity: Mapping[str, Any], reference: int, file: str, row: str | int, selection: Selection, records: Records
) -> None:
    labels = _mapping(entity.get("labels"))
    name = _first_text(labels, selection.languages)
    if isinstance(redirect := entity.get("redirects"), dict):
        old, new = reference_of(redirect.get("from")), reference_of(redirect.get("to"))
        if old is not None and new is not None:
            _add_redirect(old, new, file, records)
            reference = new
    claims = _mapping(entity.get("claims"))
    if reference < 0:
        if name:
            records.labels.append([reference, name])
        return
    superclasses = _references(claims.get(_SUBCLASS_OF))
    chosen = _chosen(entity, {reference, reference_of(entity["id"])}, claims, selection, records)
    item = None
    if chosen and name:
        item = _item(entity, reference, name, claims, selection, file, row, records)
    # Nothing of a malformed entity is kept, so records are added when everything has been read.
    if name:
        records.labels.append([reference, name])
    if superclasses:
        records.superclasses.append([reference, superclasses])
    if item is not None:
        records.items.append(item)
    elif chosen:
        records.problem("no_label", file, row, id_of(reference))


def _add_redirect(old: int, new: int, file: str, records: Records) -> None:
    if [old, new] not in records.redirects[-1:]:
        records.redirects.append([old, new])
        records.problem("merged_id", file, id_of(old), id_of(new))


def _chosen(
    entity: Mapping[str, Any],
    references: set[int | None],
    claims: Mapping[str, Any],
    selection: Selection,
    records: Records,
) -> bool:
    """Whether the selection takes an item, apart from its classes. A merged item has two references."""
    kind = None
    if selection.ids is not None and not references & selection.ids:
        kind = "not_in_ids"
    elif len(_mapping(entity.get("sitelinks"))) < selection.min_sitelinks:
        kind = "too_few_sitelinks"
    else:
        for property_id, value in selection.required:
            claim = claims.get(property_id)
            if not _best(claim) or (value is not None and value not in _references(claim)):
                kind = "without_property"
    if kind is not None:
        records.problem(kind, "", "")
    return kind is None


def _item(
    entity: Mapping[str, Any],
    reference: int,
    name: str,
    claims: Mapping[str, Any],
    selection: Selection,
    file: str,
    row: str | int,
    records: Records,
) -> dict[str, Any]:
    facts: list[list[Any]] = []
    for property_id in selection.properties:
        values: list[Any] = []
        for value in _best(claims.get(property_id)):
            converted = _value(value, selection.languages)
            if converted is None:
                records.problem("value_of_other_type", file, row, f"{id_of(reference)}: {property_id}")
            elif converted not in ("", *values):
                values.append(converted)
        if values:
            facts.append([-int(property_id[1:]), values])
    latitude = longitude = None
    for value in _best(claims.get(_COORDINATES)):
        position = value.get("value")
        if latitude is None and isinstance(position, dict) and position.get("globe") == _EARTH:
            latitude, longitude = float(position["latitude"]), float(position["longitude"])
    images = [value.get("value") for value in _best(claims.get(_IMAGE))]
    places = (_references(claims.get(property_id)) for property_id in PLACES)
    return {
        "id": reference,
        "name": name,
        "description": _first_text(_mapping(entity.get("descriptions")), selection.languages),
        "aliases": _aliases(entity, name, selection.languages),
        "sitelinks": len(_mapping(entity.get("sitelinks"))),
        "classes": _references(claims.get(_INSTANCE_OF)),
        "facts": facts,
        "years": [_first_year(claims, properties) for properties in YEARS.values()],
        "place": next((references[0] for references in places if references), None),
        "latitude": latitude,
        "longitude": longitude,
        "image_file": _text(images[0]) if images else "",
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    """Returns an object of the document. PHP writes an empty one as an empty list, and some dumps leave it out."""
    if isinstance(value, dict):
        return value
    if value in ([], None):
        return {}
    raise TypeError(f"expected an object, not {type(value).__name__}")


def _text(value: Any) -> str:
    """Returns a string with single spaces, and without spaces around it."""
    if not isinstance(value, str):
        raise TypeError(f"expected a string, not {type(value).__name__}")
    return " ".join(value.split())


def _first_text(terms: Mapping[str, Any], languages: Iterable[str]) -> str:
    """Returns the label or description in the first language that has one, else in any ("mul"), else an empty text."""
    for language in (*languages, _ANY_LANGUAGE):
        if language in terms and (text := _text(terms[language]["value"])):
            return text
    return ""


def _aliases(entity: Mapping[str, Any], name: str, languages: Iterable[str]) -> list[str]:
    """Returns the aliases in the wanted languages, and the labels in all of them but the first, each once."""
    labels, aliases = _mapping(entity.get("labels")), _mapping(entity.get("aliases"))
    texts: dict[str, None] = {}
    for language in (*languages, _ANY_LANGUAGE):
        terms = [labels[language]] if language in labels else []
        for term in (*terms, *(aliases.get(language) or ())):
            texts[_text(term["value"])] = None
    return [text for text in texts if text and text != name]


def _best(statements: Any) -> list[Mapping[str, Any]]:
    """Returns the values of the statements that hold: the preferred ones, or without any the normal ones."""
    by_rank: dict[str, list[Mapping[str, Any]]] = {"preferred": [], "normal": []}
    for statement in statements or ():
        snak = statement["mainsnak"]
        rank = statement.get("rank", "normal")
        if snak["snaktype"] == "value" and rank in by_rank:
            value = snak["datavalue"]
            if not isinstance(value, dict):
                raise TypeError(f"expected an object, not {type(value).__name__}")
            by_rank[rank].append(value)
    return by_rank["preferred"] or by_rank["normal"]


def _reference(value: Any) -> int | None:
    """Returns the reference of a value that is an item, or `None`."""
    if not isinstance(value, dict):
        return None
    if "id" in value:
        reference = reference_of(value["id"])
    else:
        number = value.get("numeric-id")
        is_item = value.get("entity-type") == "item" and isinstance(number, int)
        reference = number if is_item else None
    return reference if reference is not None and 0 < reference < 10**15 else None


def _references(statements: Any) -> list[int]:
    values = (_reference(value.get("value")) for value in _best(statements))
    return list(dict.fromkeys(value for value in values if value is not None))


def _value(value: Mapping[str, Any], languages: tuple[str, ...]) -> Any:
    """Returns a value as text, reference, or [text, reference of the unit]. `None` means another type.

    A text in a language that is not wanted is empty.
    """
    kind, content = value.get("type"), value.get("value")
    if kind == "wikibase-entityid":
        return _reference(content)
    if kind == "string":
        return _text(content)
    if not isinstance(content, dict):
        return None
    if kind == "time":
        return date_text(content.get("time"), content.get("precision"))
    if kind == "monolingualtext":
        return _text(content["text"]) if content.get("language") in (*languages, _ANY_LANGUAGE) else ""
    if kind == "globecoordinate":
        return f"{float(content['latitude']):.4f}, {float(content['longitude']):.4f}"
    if kind == "quantity":
        amount = _text(content["amount"]).removeprefix("+")
        unit = reference_of(str(content.get("unit")).rpartition("/")[2])
        return amount if unit is None else [amount, unit]
    return None


def date_text(time: Any, precision: Any) -> str | None:
    """Returns a date to its precision: "1952-03-11", "1952-03", "1952", "195X" (decade), "19XX" (century), "1XXX".

    The forms are those of ISO 8601-2 (EDTF). A year before our era has a minus, as Wikidata counts it: "-0044" is 44 BC.

    Returns:
        `str` or `None`: The date; `None` for another value, or a precision of more than a millennium.
    """
    match = _TIME.fullmatch(time) if isinstance(time, str) else None
    if match is None or not isinstance(precision, int) or precision < 6:
        return None
    year = match[2].lstrip("0").rjust(4, "0")
    sign = "-" if match[1] == "-" else ""
    if precision >= 9:
        parts = [year, match[3], match[4]][: max(min(precision, 11) - 8, 1)]
        return sign + "-".join(part for part in parts if part != "00")
    unknown = 9 - precision
    return f"{sign}{year[:-unknown]}{'X' * unknown}"


def _first_year(claims: Mapping[str, Any], properties: tuple[str, ...]) -> int | None:
    """Returns the year of the first date that is known to the year. A year before our era is negative."""
    for property_id in properties:
        for value in _best(claims.get(property_id)):
            content = value.get("value")
            if not isinstance(content, dict):
                continue
            match = _TIME.fullmatch(content["time"]) if isinstance(content.get("time"), str) else None
            precision = content.get("precision")
            if match and isinstance(precision, int) and precision >= 9 and 0 < int(match[2]) < 10_000:
                return int(match[2]) * (-1 if match[1] == "-" else 1)
    return None

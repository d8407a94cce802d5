"""Names the values of records, decides which items belong to the wanted classes, and makes the rows of entities.

All parts have been read before ([`~hf_mel.dataset_scripts.wikidata.parts`]). Memory holds the tree of classes, eight
bytes for each candidate, and the labels of the values that the rows name.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hf_mel.dataset_scripts.release import ReleaseLog
from hf_mel.dataset_scripts.wikidata.documents import CHOICES, MAX_LISTED, YEARS, Selection, id_of
from hf_mel.dataset_scripts.wikidata.parts import load_items, load_labels


class Tables:
    """The records of all parts.

    Args:
        folder (`Path`): Folder of the parts.
        num_parts (`int`): Number of parts.
        selection ([`~hf_mel.dataset_scripts.wikidata.documents.Selection`]): What was read.
        classes (iterable of `int`): References of the wanted classes. Empty for all items.
        property_names (mapping of `str` to `str`): Names of properties whose documents are not there, by id.
        release ([`~hf_mel.dataset_scripts.release.ReleaseLog`]): Receives what was left out.
    """

    def __init__(
        self,
        folder: Path,
        num_parts: int,
        selection: Selection,
        classes: Iterable[int],
        property_names: Mapping[str, str],
        release: ReleaseLog,
    ):
        self._property_names = property_names
        self._folder, self._num_parts, self._selection, self._release = folder, num_parts, selection, release
        self._superclasses: dict[int, list[int]] = {}
        self._redirects: dict[int, int] = {}
        ids = array("q")
        for part in self._parts():
            for item, superclasses in part["superclasses"]:
                self._superclasses.setdefault(item, superclasses)
            self._redirects.update(map(tuple, part["redirects"]))
            ids.extend(item["id"] for item in part["items"])
            for kind, count in part["counts"].items():
                release.left_out[kind] = release.left_out.get(kind, 0) + count
            for kind, file, row, detail in part["problems"]:
                if len(release.problems.get(kind, ())) < MAX_LISTED:
                    release.problem(kind, file, row, detail)
        values, counts = np.unique(np.frombuffer(ids, dtype=np.int64), return_counts=True)
        self._repeated = set(values[counts > 1].tolist())
        self._list_absent(values)
        self._wanted = self._subclasses(classes)
        self._all_classes = lru_cache(maxsize=200_000)(self._with_superclasses)
        self._labels = self._read_labels()

    def _parts(self) -> Iterator[dict[str, Any]]:
        for number in range(self._num_parts):
            yield load_items(self._folder, number)

    def _list_absent(self, candidates: np.ndarray) -> None:
        """Lists the wanted ids that no document has, or whose item was left out."""
        for reference in sorted(self._selection.ids or ()):
            wanted = self._redirects.get(reference, reference)
            at = np.searchsorted(candidates, wanted)
            if at == len(candidates) or candidates[at] != wanted:
                self._problem("id_without_entity", "ids", id_of(reference))

    def _problem(self, kind: str, file: str, row: str, detail: str = "") -> None:
        count = self._release.left_out[kind] = self._release.left_out.get(kind, 0) + 1
        if count <= MAX_LISTED and kind not in CHOICES:
            self._release.problem(kind, file, row, detail)

    def _subclasses(self, classes: Iterable[int]) -> set[int]:
        """Returns classes and everything that is below them by P279. A cycle ends where it began."""
        below: dict[int, list[int]] = {}
        for item, superclasses in self._superclasses.items():
            for superclass in superclasses:
                below.setdefault(self._redirects.get(superclass, superclass), []).append(item)
        wanted = {self._redirects.get(reference, reference) for reference in classes}
        waiting = list(wanted)
        while waiting:
            new = [item for item in below.get(waiting.pop(), ()) if item not in wanted]
            wanted.update(new)
            waiting += new
        return wanted

    def _with_superclasses(self, classes: tuple[int, ...]) -> list[int]:
        """Returns classes and everything that is above them by P279, the nearest first."""
        reached = dict.fromkeys(self._redirects.get(item, item) for item in classes)
        waiting = list(reached)
        for item in waiting:  # grows
            for superclass in self._superclasses.get(item, ()):
                superclass = self._redirects.get(superclass, superclass)
                if superclass not in reached:
                    reached[superclass] = None
                    waiting.append(superclass)
        return waiting

    def _kept_items(self, log: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the items of the wanted classes, each id once."""
        seen: set[int] = set()
        for part in self._parts():
            for item in part["items"]:
                classes = {self._redirects.get(reference, reference) for reference in item["classes"]}
                if self._wanted and not classes & self._wanted:
                    if log:
                        self._problem("not_of_classes", "", "")
                elif item["id"] in seen:
                    if log:
                        self._problem("repeated_id", "entities/kb", id_of(item["id"]), "the first entity is kept")
                else:
                    if item["id"] in self._repeated:
                        seen.add(item["id"])
                    yield item

    def _read_labels(self) -> dict[int, str]:
        """Returns the labels of all values, classes and properties that rows name."""
        needed: set[int] = {-int(name[1:]) for name in self._selection.properties}
        for item in self._kept_items(log=True):
            needed.update(self._all_classes(tuple(item["classes"])))
            needed.update(_references_in(item))
        needed |= {self._redirects[reference] for reference in needed if reference in self._redirects}
        labels: dict[int, str] = {}
        for number in range(self._num_parts):
            for reference, label in load_labels(self._folder, number):
                if reference in needed:
                    labels.setdefault(reference, label)
        return labels

    def _label(self, reference: int) -> str | None:
        return self._labels.get(self._redirects.get(reference, reference)) or self._labels.get(reference)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields a row for each item that is kept, in the order of the documents."""
        unnamed: set[str] = set()
        for item in self._kept_items():
            types = (self._label(reference) for reference in self._all_classes(tuple(item["classes"])))
            facts = []
            for reference, values in item["facts"]:
                texts = []
                for value in values:
                    text = self._text(value)
                    if text:
                        texts.append(text)
                    else:
                        self._problem(
                            "value_without_label", "entities/kb", id_of(item["id"]), f"{id_of(reference)}: {value}"
                        )
                if not texts:
                    continue
                label = self._label(reference)
                if label is None:
                    property_id = id_of(reference)
                    label = self._property_names.get(property_id, property_id)
                    if property_id not in unnamed:
                        unnamed.add(property_id)
                        self._problem("property_without_label", "entities/kb", property_id, f"it is called {label}")
                facts.append(f"{label[:1].upper()}{label[1:]}: {', '.join(dict.fromkeys(texts))}.")
            yield {
                "entity_id": id_of(item["id"]),
                "name": item["name"],
                "description": item["description"],
                "attributes": " ".join(facts),
                "aliases": item["aliases"],
                "images": [],
                "types": list(dict.fromkeys(name for name in types if name)),
                **dict(zip(YEARS, item["years"], strict=True)),
                "place": "" if item["place"] is None else self._label(item["place"]) or "",
                "latitude": item["latitude"],
                "longitude": item["longitude"],
                "sitelinks": item["sitelinks"],
                "image_file": item["image_file"],
            }

    def _text(self, value: Any) -> str | None:
        """Returns a value with its label; `None` without one. A quantity whose unit has no label has its number."""
        if isinstance(value, int):
            return self._label(value)
        if isinstance(value, list):
            amount, unit = value
            return " ".join(filter(None, (amount, self._label(unit))))
        return value


def _references_in(item: dict[str, Any]) -> Iterator[int]:
    if item["place"] is not None:
        yield item["place"]
    for _, values in item["facts"]:
        for value in values:
            if isinstance(value, int):
                yield value
            elif isinstance(value, list):
                yield value[1]

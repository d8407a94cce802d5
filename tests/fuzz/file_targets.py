"""Targets that read files of users: rows, recipes, suites, texts, results, and the raw layouts of data sets."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from hf_mel.bench.comparability import MentionRanks, load_results, read_predictions
from hf_mel.bench.suite import Suite, shipped_suites
from hf_mel.building.builders import find_builder
from hf_mel.candidates.lists import CandidateLists
from hf_mel.data.entity_files import check_entity_file, read_entity_file
from hf_mel.data.loading import load_entities
from hf_mel.data.text_files import TEXT_SUFFIXES, read_text_file
from hf_mel.errors import MelError
from hf_mel.linking.annotate_file import read_texts
from hf_mel.linking.link_file import read_mentions
from hf_mel.row_columns import ColumnMapping
from hf_mel.row_files import ROW_SUFFIXES, read_rows
from hf_mel.training.recipe import Recipe, shipped_recipes
from tests.dataset_scripts import test_every_dataset as every
from tests.fuzz.engine import Target, empty_folder
from tests.fuzz.strategies import HOSTILE_BYTES, long_texts, mutated, mutations, texts, values

ROOT = Path(__file__).parents[2]

# Rows


def _table(names: list[str], rows: list[list[Any]], delimiter: str) -> bytes:
    return "\n".join(delimiter.join(str(cell) for cell in row) for row in [names, *rows]).encode(
        "utf-8", "surrogatepass"
    )


def _objects(names: list[str], rows: list[list[Any]], as_list: bool) -> bytes:
    records = [dict(zip(names, row, strict=False)) for row in rows]
    lines = json.dumps(records) if as_list else "\n".join(json.dumps(record) for record in records)
    return lines.encode()


def row_file(names: list[str], always: int = 2) -> st.SearchStrategy:
    """Files of rows: a suffix, bytes, and changes of the bytes. Most have good columns, the first `always`, and hostile cells."""
    columns = st.lists(st.sampled_from(names), unique=True, max_size=len(names)).map(
        lambda drawn: [*dict.fromkeys([*drawn, *names[:always]])]
    )
    header = st.one_of(columns, st.lists(st.one_of(st.sampled_from(names), texts), max_size=5))
    cell = st.one_of(
        values, st.sampled_from(["Q1", "Q2", "Georgia", "Georgia is a state", 0, 7, "a|b", "picture.png"])
    )
    rows = st.lists(st.lists(cell, max_size=6), max_size=4)
    made = st.tuples(st.sampled_from(ROW_SUFFIXES), header, rows).map(_bytes_of_rows)
    raw = st.tuples(
        st.sampled_from([*ROW_SUFFIXES, ".CSV", ".xlsx"]),
        st.one_of(st.binary(max_size=60), *[st.just(b"id,name\nQ1,a\n")]),
    )
    return st.tuples(st.one_of(made, made, raw), st.one_of(st.just([]), mutations))


def _bytes_of_rows(drawn: tuple[str, list[str], list[list[Any]]]) -> tuple[str, bytes]:
    suffix, names, rows = drawn
    if suffix in (".csv", ".tsv"):
        return suffix, _table(names, rows, "\t" if suffix == ".tsv" else ",")
    return suffix, _objects(names, rows, suffix == ".json")


def _write_rows(value: Any, folder: Path) -> Path:
    (suffix, data), changes = value
    path = folder / f"rows{suffix}"
    path.write_bytes(mutated(data, changes))
    (folder / "picture.png").write_bytes(_picture())
    return path


@cache
def _picture() -> bytes:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "PNG")
    return file.getvalue()


def _read_rows(value: Any, folder: Path) -> None:
    path = _write_rows(value, folder)
    bad: list[MelError] = []
    kept = list(read_rows(path, bad_rows=bad))  # errors of the whole file are raised
    try:
        strict = list(read_rows(path))
    except MelError:
        strict = None
    assert (strict is None) == bool(bad)
    assert strict is None or strict == kept
    for line, row in kept:
        assert line >= 1
        json.dumps(row, ensure_ascii=False).encode()  # can be written again


def _read_entities(value: Any, folder: Path) -> None:
    path = _write_rows(value, folder)
    count, problems = check_entity_file(path)
    try:
        rows = read_entity_file(path, mapping=ColumnMapping(ignore_others=True), bad_images=[])
    except MelError:
        rows = None
    try:
        read_entity_file(path)
    except MelError:
        assert problems or not count, "read_entity_file refuses a file that check_entity_file passes"
        if rows is None:
            raise
        return
    assert not problems
    assert rows is not None
    assert len(set(rows["entity_id"])) == len(rows) == count


def _read_kept_columns(value: Any, folder: Path) -> None:
    """Columns of users that are kept to filter by."""
    mapping = ColumnMapping(kept=("born", "types"), ignore_others=True)
    rows = read_entity_file(_write_rows(value, folder), mapping=mapping, bad_images=[])
    assert {"born", "types"} <= set(rows.column_names)
    rows[:]


def _read_mentions(value: Any, folder: Path) -> None:
    path = _write_rows(value, folder)
    rows = read_mentions(path, skip_bad_rows=True)
    for row in rows:
        assert row.error is not None or row.mention, "a row has neither content nor an error"
    if not any(row.error for row in rows):
        assert [row.mention for row in read_mentions(path)] == [row.mention for row in rows]


def _read_texts(value: Any, folder: Path) -> None:
    read_texts(_write_rows(value, folder), skip_bad_rows=True)


def _read_text_file(value: Any, folder: Path) -> None:
    suffix, data, changes = value
    path = folder / f"text{suffix}"
    path.write_bytes(mutated(data, changes))
    text = read_text_file(path)
    text.encode()


_tag = st.sampled_from(
    [
        "<p>",
        "</p>",
        "<b>",
        "<script>",
        "</script>",
        "<!--",
        "-->",
        "<![CDATA[",
        "]]>",
        "<pre>",
        "<a",
        "href='",
        "&amp;",
        "&#xD800;",
        "&#0;",
        "&#99999999;",
        "&lt",
        "<br/>",
        "<table><tr><td>",
        "<textarea>",
        "<!DOCTYPE",
        "<?xml",
        "</html",
        "<svg><style>",
        "&nbsp;",
        "<title>",
    ]
)
_html = st.lists(st.one_of(_tag, long_texts), max_size=8).map(
    lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
)


def _parse_columns(value: Any, folder: Path) -> None:
    mapping = ColumnMapping.parse(value)
    mapping.check_targets(["name", "id"])


# Recipes and suites


def _documents(folder: str, names: list[str]) -> list[str]:
    return [(ROOT / folder / f"{name}.yaml").read_text(encoding="utf-8") for name in names]


@cache
def _recipes() -> list[str]:
    return _documents("recipes", shipped_recipes()[::4])


@cache
def _suites() -> list[str]:
    return _documents("suites", shipped_suites())


_paths = st.sampled_from(
    [
        "name",
        "task",
        "model",
        "model.type",
        "model.text",
        "model.vision",
        "model.config",
        "model.config.text_dim",
        "processor",
        "processor.tokenizer",
        "processor.tokenizer.vocab_size",
        "processor.options",
        "data",
        "data.dataset",
        "data.columns",
        "data.extra_mentions",
        "data.extra_datasets",
        "data.train_fraction",
        "data.train_order",
        "data.posts_split",
        "candidates",
        "candidates.k",
        "candidates.source",
        "candidates.file",
        "folds",
        "folds.count",
        "adaptation",
        "adaptation.nil",
        "training",
        "training.seed",
        "training.learning_rate",
        "a.b.c",
        ".",
        "..",
        "=",
        "seeds",
        "systems",
        "data.wikimel",
        "budget",
        "budget.minutes",
        "sweep",
        "sweep.values",
        "prepare",
        "compare_with",
        "evaluate",
        "set",
        "train_fractions",
        "title",
    ]
)
_override = st.one_of(
    st.tuples(_paths, st.one_of(values.map(repr), texts)).map("=".join),
    st.tuples(_paths, values).map(lambda pair: f"{pair[0]}={json.dumps(pair[1])}"),
    texts,
)
_edit = st.tuples(_paths, values)


def _edited(text: str, edits: list[tuple[str, Any]]) -> str:
    """A YAML document with values set by path, as a user writes them."""
    content = yaml.safe_load(text)
    for path, value in edits:
        target = content
        *parents, last = path.split(".")
        for parent in parents:
            inner = target.get(parent)
            target[parent] = target = inner if isinstance(inner, dict) else {}
        target[last] = value
    return yaml.safe_dump(content, allow_unicode=True)


def _document(documents: Any) -> st.SearchStrategy:
    edits = st.one_of(st.just([]), st.lists(_edit, max_size=3))
    return st.tuples(
        st.integers(0, len(documents()) - 1), edits, st.one_of(st.just([]), mutations), st.lists(_override, max_size=2)
    )


def _load_document(value: Any, folder: Path, documents: list[str]) -> tuple[Path, list[str]]:
    number, edits, changes, overrides = value
    text = documents[number % len(documents)]
    path = folder / "document.yaml"
    path.write_bytes(mutated((_edited(text, edits) if edits else text).encode("utf-8", "surrogatepass"), changes))
    return path, overrides


def _load_recipe(value: Any, folder: Path) -> None:
    recipe = Recipe.load(*_load_document(value, folder, _recipes()))
    path = folder / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path).to_dict() == recipe.to_dict(), "a recipe that was written reads as another one"


def _load_suite(value: Any, folder: Path) -> None:
    Suite.load(*_load_document(value, folder, _suites()))


# Results, predictions, candidates

_RESULTS = json.dumps(
    {
        "metrics": {"hits@1": 0.5, "mrr": 0.6},
        "setting": {
            "split": "test",
            "kb_size": 3,
            "num_mentions": 2,
            "ties": "realistic",
            "ks": [1],
            "candidates": None,
        },
        "dataset": {"name": "d", "version": None},
        "predictions": "predictions.jsonl",
    }
).encode()
_PREDICTIONS = b'{"mention_id": "m1", "entity_id": "Q1", "rank": 1, "candidates": [["Q1", 0.5]]}\n{"mention_id": "m2", "entity_id": "NIL"}\n'


def _read_results(value: Any, folder: Path) -> None:
    results, predictions = folder / "results.json", folder / "predictions.jsonl"
    results.write_bytes(mutated(_RESULTS, value[0]))
    predictions.write_bytes(mutated(_PREDICTIONS, value[1]))
    list(read_predictions(predictions, with_candidates=True))
    MentionRanks.load(predictions)
    MentionRanks.of_results(results, load_results(results))


@cache
def _candidate_file() -> bytes:
    lists = CandidateLists(["m1", "m2"], [["Q1", "Q2"], []], {"name": [[0.5, 0.25], []]}, {"source": "name", "k": 2})
    with empty_folder() as folder:
        lists.save(folder / "candidates.parquet")
        return (folder / "candidates.parquet").read_bytes()


def _load_candidates(value: Any, folder: Path) -> None:
    path = folder / "candidates.parquet"
    path.write_bytes(mutated(_candidate_file(), value))
    lists = CandidateLists.load(path)
    assert len(lists.by_mention) == len(lists.mention_ids)
    lists.recall(["Q1"] * len(lists.mention_ids), [1])


# Raw layouts of the builders


@cache
def _release(number: int) -> dict[str, bytes]:
    name, layout = every.CASES[number]
    with empty_folder() as folder:
        every.layouts_of(name)[layout][0](folder)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _build_release(value: Any, folder: Path) -> None:
    number, changes = value
    name, _ = every.CASES[number % len(every.CASES)]
    files = dict(_release(number % len(every.CASES)))
    for change in changes:
        files = every.mutated(files, change) if files else files
    raw, output = folder / "raw", folder / "out" / "built"
    raw.mkdir()
    output.parent.mkdir()
    for file, data in files.items():
        (raw / file).parent.mkdir(parents=True, exist_ok=True)
        (raw / file).write_bytes(data)
    try:
        every.build(name, raw, output)
    except MelError:
        assert list(output.parent.iterdir()) == [], "something is left of a build that failed"
        raise
    assert [path.name for path in output.parent.iterdir()] == ["built"]
    assert len(load_entities(output)) > 0


_generated = [number for number, (name, _) in enumerate(every.CASES) if find_builder(name).NEEDS_RAW]

TARGETS = [
    Target("rows", row_file(["id", "name", "text", "born"]), _read_rows, 30),
    Target("entity_files", row_file(["id", "name", "description", "aliases", "image"]), _read_entities, 12),
    Target("kept_columns", row_file(["id", "name", "born", "types"], 4), _read_kept_columns, 8),
    Target("mention_files", row_file(["text", "mention", "start", "end", "image"]), _read_mentions, 20),
    Target("text_tables", row_file(["text", "spans", "image"]), _read_texts, 10),
    Target(
        "text_files",
        st.tuples(
            st.sampled_from(TEXT_SUFFIXES),
            st.one_of(_html, st.sampled_from(HOSTILE_BYTES)),
            st.one_of(st.just([]), mutations),
        ),
        _read_text_file,
        10,
    ),
    Target(
        "column_assignments",
        st.lists(st.one_of(texts, st.tuples(st.sampled_from(["name", "id", "x"]), texts).map("=".join)), max_size=3),
        _parse_columns,
        5,
    ),
    Target("recipes", _document(_recipes), _load_recipe, 12),
    Target("suites", _document(_suites), _load_suite, 4),
    Target(
        "results", st.tuples(st.one_of(st.just([]), mutations), st.one_of(st.just([]), mutations)), _read_results, 8
    ),
    Target("candidate_files", mutations, _load_candidates, 8),
    Target(
        "releases",
        st.tuples(st.sampled_from(_generated), st.lists(every._MUTATION, min_size=1, max_size=2)),
        _build_release,
        2,
    ),
]

"""Laws that every data set keeps, whatever its release looks like.

Beside this file stands `<name>_release.py` for each: `write(folder)` writes a small invented release in the exact layout,
malformed data included; `OPTIONS` are keyword arguments of `build_dataset` ("{folder}" in a text is that folder); `SPLITS` are the
rows to expect by configuration and split; `LAYOUTS`, if there, holds more layouts: name → (write, splits).
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_mel.building.build import build_dataset
from hf_mel.building.builders import find_builder, known_datasets
from hf_mel.building.checks import check_dataset
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.errors import MelError
from hf_mel.schema import NIL, NO_SPAN

NAMES = known_datasets()
SUFFIXES_WITH_ROWS = {".jsonl", ".csv", ".tsv"}


def release_of(name: str) -> Any:
    return importlib.import_module(f"tests.dataset_scripts.{name}_release")


def layouts_of(name: str) -> dict[str, tuple[Callable[[Path], Any], dict[str, dict[str, int]]]]:
    release = release_of(name)
    return {"": (release.write, release.SPLITS), **getattr(release, "LAYOUTS", {})}


def _cases() -> list[tuple[str, str]]:
    # A data set without its release fails in every test, not the collection of all.
    return [
        (name, layout)
        for name in NAMES
        for layout in (layouts_of(name) if find_spec(f"tests.dataset_scripts.{name}_release") else [""])
    ]


CASES = _cases()


def has_mentions(name: str) -> bool:
    return "mentions" in find_builder(name).CONFIGS  # type: ignore[attr-defined]


def filled(value: Any, folder: Path) -> Any:
    """`value` with the folder in its texts."""
    if isinstance(value, dict):
        return {key: filled(item, folder) for key, item in value.items()}
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


def build(name: str, folder: Path, output: Path) -> Any:
    raw = {"raw_dir": folder} if find_builder(name).NEEDS_RAW else {}
    return build_dataset(name, output=output, **raw, **filled(release_of(name).OPTIONS, folder))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str, str], Path]:
    """The folder of a data set, built once."""
    folders: dict[tuple[str, str], Path] = {}

    def folder_of(name: str, layout: str = "") -> Path:
        if (name, layout) not in folders:
            root = tmp_path_factory.mktemp(f"{name}_{layout}")
            (root / "raw").mkdir()
            layouts_of(name)[layout][0](root / "raw")
            build(name, root / "raw", root / "built")
            folders[name, layout] = root / "built"
        return folders[name, layout]

    return folder_of


@pytest.mark.parametrize("name", NAMES)
def test_datasets_3_finds_the_builder_in_a_copy_of_its_folder(name, tmp_path, monkeypatch):
    """`datasets` 3 imports a copy, and takes the first builder class that belongs to it, else the last one imported."""
    (tmp_path / "copies").mkdir()
    shutil.copytree(Path(str(sys.modules[find_builder(name).__module__].__file__)).parent, tmp_path / "copies" / name)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(f"copies.{name}.{name}")
    try:
        classes = {value for value in vars(module).values() if isinstance(value, type)}
        builders = {value for value in classes if issubclass(value, datasets.DatasetBuilder)}
        assert {value for value in builders if value.__module__ == module.__name__} == {module.BUILDER_CLASS}
        assert module.BUILDER_CLASS.__name__ == find_builder(name).__name__
        names = [config.name for config in module.BUILDER_CLASS.BUILDER_CONFIGS]
        assert names[0] == "mentions" or names == ["entities"]
    finally:
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "copies"]:
            del sys.modules[loaded]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_it_loads_in_one_line_with_its_splits(name, layout, built):
    folder, expected = built(name, layout), layouts_of(name)[layout][1]
    default = expected["mentions"] if "mentions" in expected else expected["entities"]
    assert {split: len(rows) for split, rows in load_dataset(str(folder)).items()} == default
    for config, splits in expected.items():
        actual = load_dataset(str(folder), config)
        assert {split: len(rows) for split, rows in actual.items()} == splits, config
    configs = [config.name for config in find_builder(name).BUILDER_CONFIGS]
    assert set(expected) <= set(configs)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_its_rows_are_what_the_schema_says(name, layout, built):
    folder, expected = built(name, layout), layouts_of(name)[layout][1]
    known = set(load_entities(folder)["entity_id"])
    for config, splits in expected.items():
        for split in splits:
            rows = load_dataset(str(folder), config, split=split)
            if "mention" not in rows.column_names:
                continue
            assert len(set(rows["mention_id"])) == len(rows)
            for row in rows.remove_columns("image"):
                assert row["entity_id"] == NIL or row["entity_id"] in known
                if row["start"] == NO_SPAN:
                    assert row["end"] == NO_SPAN
                else:
                    assert row["text"][row["start"] : row["end"]] == row["mention"]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_it_passes_the_checks_of_any_data_set(name, layout, built):
    report = check_dataset(built(name, layout))
    assert report.fatal == []
    assert report.counts == layouts_of(name)[layout][1]


@pytest.mark.parametrize("name", NAMES)
def test_two_builds_are_the_same_byte_for_byte(name, built, tmp_path):
    (tmp_path / "raw").mkdir()
    release_of(name).write(tmp_path / "raw")
    build(name, tmp_path / "raw", tmp_path / "built")
    files = [
        {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (built(name), tmp_path / "built")
    ]
    assert files[0].keys() == files[1].keys()
    assert [file for file in files[0] if files[0][file] != files[1][file]] == []


@pytest.mark.parametrize("name", [name for name, layout in CASES if not layout and has_mentions(name)])
def test_it_trains_a_step(name, built, tmp_path):
    from transformers import BertConfig

    from hf_mel.modeling.mimic.configuration_mimic import MimicConfig
    from hf_mel.modeling.mimic.modeling_mimic import MimicModel
    from hf_mel.modeling.mimic.processing_mimic import MimicProcessor
    from hf_mel.training.arguments import MelTrainingArguments
    from hf_mel.training.tokenizer import texts_of, train_wordpiece
    from hf_mel.training.trainer import MelTrainer

    entities = load_entities(built(name))
    splits = release_of(name).SPLITS["mentions"]
    mentions = load_mentions(built(name), "train" if "train" in splits else next(iter(splits)))
    mentions, shown = mentions.select(range(min(len(mentions), 16))), entities.select(range(min(len(entities), 16)))
    tokenizer = train_wordpiece(texts_of(mentions.remove_columns("image"), shown.remove_columns("images")), 300)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = BertConfig(vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=40, **sizes)
    model = MimicModel(MimicConfig(text_config=text.to_dict(), units=["text"], text_dim=8))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    arguments = MelTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    )
    processor = MimicProcessor.from_parts(tokenizer)
    trainer = MelTrainer(model, arguments, mentions, entities=entities, processing_class=processor)
    output = trainer.train()
    assert output.global_step == 1
    assert 0 < output.training_loss < float("inf")
    assert any(not tensor.equal(before[key]) for key, tensor in model.state_dict().items())


# Any mutation of the raw files: a valid build, or a typed error that names the file; and no partial output.

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+|[^\t\n,]+')
_HOSTILE = [
    b"null", b"true", b"5", b"-1", b'"x"', b'""', b"[]", b"[[]]", b"{}", b'{"a": 1}', b"NaN", b"1e999", b"1.5",
    b'"\\ud800"', b'"\\u0000"', b"9" * 30, b"9" * 5000, b'"' + b"x" * 300 + b'"', b"\xff", b"\t", b",", b"\n", b'"', b"nil",
    b'"../../x.jpg"', b"[" * 3000, b'"%ff"', b"@@@@", "\u2028".encode(), b"\xef\xbb\xbf", b"\r\n",
]  # fmt: skip
_PLACE = st.floats(0, 1, exclude_max=True)
_MUTATION = st.one_of(
    st.tuples(st.just("token"), _PLACE, _PLACE, st.sampled_from(_HOSTILE)),
    st.tuples(st.just("insert"), _PLACE, _PLACE, st.sampled_from(_HOSTILE)),
    st.tuples(st.just("flip"), _PLACE, _PLACE, st.integers(1, 255)),
    st.tuples(st.just("delete"), _PLACE, _PLACE, st.integers(1, 40)),
    st.tuples(st.just("cut"), _PLACE, _PLACE, st.just(0)),
    st.tuples(st.sampled_from(["drop", "empty"]), _PLACE, _PLACE, st.just(0)),
    st.tuples(st.just("swap"), _PLACE, _PLACE, st.just(0)),
)


def mutated(files: dict[str, bytes], mutation: tuple[str, float, float, Any]) -> dict[str, bytes]:
    kind, which, where, what = mutation
    # Texts four times as often as pictures, whose bytes only make them broken pictures.
    texts = [name for name in sorted(files) if not name.lower().endswith((".jpg", ".jpeg", ".png", ".svg"))]
    names = [*texts * 4, *sorted(set(files) - set(texts))]
    name = names[int(which * len(names))]
    data, at = files[name], int(where * len(files[name]))
    if kind == "token":
        tokens = list(_TOKEN.finditer(data)) or [re.match(b"", data)]
        token = tokens[int(where * len(tokens))]
        assert token is not None
        return {**files, name: data[: token.start()] + what + data[token.end() :]}
    if kind == "drop":
        return {key: value for key, value in files.items() if key != name}
    if kind == "swap":
        other = names[int(where * len(names))]
        return {**files, name: files[other], other: data}
    changed = {
        "insert": lambda: data[:at] + what + data[at:],
        "flip": lambda: data[:at] + bytes([data[at] ^ what]) + data[at + 1 :] if data else b"\xff",
        "delete": lambda: data[:at] + data[at + what :],
        "cut": lambda: data[:at],
        "empty": lambda: b"",
    }[kind]()
    return {**files, name: changed}


def error_of(action: Callable[[], Any]) -> MelError | None:
    try:
        action()
    except MelError as error:
        return error
    return None


@pytest.mark.parametrize(("name", "layout"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_any_mutation_gives_a_build_or_a_typed_error(name, layout, tmp_path):
    template = tmp_path / "template"
    template.mkdir()
    layouts_of(name)[layout][0](template)
    files = {
        path.relative_to(template).as_posix(): path.read_bytes() for path in template.rglob("*") if path.is_file()
    }
    if not files:
        return  # it is generated

    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(_MUTATION, min_size=1, max_size=2))
    def builds_or_raises(mutations):
        changed = files
        for mutation in mutations:
            changed = mutated(changed, mutation) if changed else changed
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        raw, output = root / "raw", root / "out" / "built"
        raw.mkdir()
        for file, data in changed.items():
            (raw / file).parent.mkdir(parents=True, exist_ok=True)
            (raw / file).write_bytes(data)
        output.parent.mkdir()
        try:
            error = error_of(lambda: build(name, raw, output))
            left = [path.name for path in output.parent.iterdir()]
            if error is None:
                assert left == ["built"]
                assert len(load_entities(output)) > 0
                return
            assert left == [], "something is left of a build that failed"
            several = "rows cannot be used:" in error.message  # each line of the message names its row
            assert error.file is not None or several, f"names no file: {error}"
            str(error).encode()  # can be printed
            gone = several or not Path(error.file).exists()
            whole = re.search("is not UTF-8|is not JSON|cannot be read|holds no|is neither|is none of", error.message)
            if Path(error.file).suffix in SUFFIXES_WITH_ROWS and not gone and not whole:
                assert error.row is not None, f"names no row: {error}"
        finally:
            shutil.rmtree(root)

    builds_or_raises()

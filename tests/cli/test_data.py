from __future__ import annotations

import json
import subprocess
import sys

import datasets
import pytest
from typer.testing import CliRunner

from hf_mel.building import build as building
from hf_mel.building.builders import known_datasets
from hf_mel.candidates.lists import CandidateLists
from hf_mel.cli.data import app
from hf_mel.data.loading import load_mentions
from hf_mel.errors import ImageError
from hf_mel.hub.publish.dataset_repo import dataset_publication
from hf_mel.kb.knowledge_base import KnowledgeBase
from tests.building.test_checks import entity, mention, small, write_folder
from tests.data.test_images import photo
from tests.toy import ToyProcessor, toy_model


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"}, catch_exceptions=False)

    return run


def test_list_shows_every_data_set_within_80_columns(run):
    done = run("list")
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    for name in known_datasets():
        assert any(line.startswith(f"{name}  ") for line in done.output.splitlines())
    listed = json.loads(run("list", "--json").output)
    assert [entry["name"] for entry in listed] == known_datasets()
    for entry in listed:
        assert entry["task"]
        assert entry["license"]
        assert isinstance(entry["languages"], list)
        assert isinstance(entry["options"], list)


def test_listing_loads_no_models():
    code = """
import sys
sys.argv[0] = "hf-mel"
from typer.testing import CliRunner
from hf_mel.cli.data import app
assert CliRunner().invoke(app, ["list"]).exit_code == 0
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_check_of_a_good_data_set(run, tmp_path):
    done = run("check", write_folder(tmp_path / "good", small()))
    assert done.exit_code == 0
    assert "This data set can be used." in done.output
    assert "warning" not in done.output


def test_check_warns_with_exit_status_0(run, tmp_path):
    rows = [mention("[/b]", text="Two.", start=-1, end=-1), mention("m")]  # an id in square brackets is not markup
    folder = write_folder(tmp_path / "data", small({"train": [mention("t")], "test": rows}))
    done = run("check", folder)
    assert done.exit_code == 0
    assert "mention not in text" in done.output
    assert "row [/b]" in done.output
    assert "2 of 2 (100.0%)" in done.output  # test mentions with a gold that occurs in train
    assert "1 of 2 (50.0%)" in done.output  # with a text that occurs in train
    assert "1 warning." in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_check_fails_with_exit_status_1_and_the_reasons(run, tmp_path):
    data = small({"test": [mention("a", "E9"), mention("a")]}, [entity("E1")])
    folder = write_folder(tmp_path / "data", data)
    done = run("check", folder)
    assert done.exit_code == 1
    assert "This data set is unusable: duplicate id, gold not in kb." in " ".join(done.output.split())
    as_json = run("check", folder, "--json")
    assert as_json.exit_code == 1
    report = json.loads(as_json.stdout)
    assert report["usable"] is False
    assert report["fatal"] == ["duplicate_id", "gold_not_in_kb"]
    assert report["problems"]["gold_not_in_kb"] == {"count": 1, "entries": {"mentions/test": [["a", "E9"]]}}


def test_options_of_a_builder_and_files_of_your_own_are_passed_on(run, tmp_path, monkeypatch):
    received = {}

    def build_dataset(name, **arguments):
        received.update(arguments, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "build_dataset", build_dataset)
    words = ["build", "jsonl", "--output", tmp_path / "out", "--resize", 64, "--mentions", "m.jsonl"]
    done = run(*words, "--entities", "e.csv", "--option", "posts=p=1.csv", "--option", "split=test")
    assert done.exit_code == 130
    assert "The same command continues the build." in done.output
    assert received["resize"] == 64
    assert received["config_options"] == {
        "mentions": "m.jsonl",
        "entities": "e.csv",
        "posts": "p=1.csv",
        "split": "test",
    }
    for wrong in ("posts", "=p"):
        done = run(*words, "--option", wrong)
        assert done.exit_code == 2
        assert "is not KEY=VALUE" in done.output


@pytest.mark.parametrize(("raw", "out"), [("in", "out[1]"), ("zip::[in]", "a::*{b}")])
def test_files_and_folders_of_any_name_are_built_checked_and_encoded(run, tmp_path, monkeypatch, raw, out):
    (tmp_path / raw).mkdir()
    monkeypatch.chdir(tmp_path)
    picture = photo("PNG")
    for name, content in (
        ("e.jsonl", '{"id": "Q1", "name": "Ghana", "image": "flag[1].png"}\n{"id": "Q2", "name": "Togo"}'),
        ("m.jsonl", '{"text": "in Ghana", "mention": "Ghana", "entity_id": "Q1", "split": "train"}'),
    ):
        (tmp_path / raw / name).write_text(content)
    (tmp_path / raw / "flag[1].png").write_bytes(picture)
    done = run("build", "jsonl", "--mentions", f"{raw}/m.jsonl", "--entities", f"{raw}/e.jsonl", "--output", out)
    assert done.exit_code == 0, done.output
    assert f'load_mentions("{out}", "train")' in done.output
    assert f"hf-mel kb build RUN --dataset '{out}' --output KB" in done.output
    assert run("check", out).exit_code == 0
    # A folder that the name would match as a pattern has other rows.
    write_folder(tmp_path / "out1", small({"train": [mention("other")]}))
    assert load_mentions(out, "train")["mention"] == ["Ghana"]
    kb = KnowledgeBase.build(out, toy_model(), ToyProcessor(), output=f"kb{out}", progress=False)
    assert KnowledgeBase(f"kb{out}").entity_ids == kb.entity_ids == ["Q1", "Q2"]
    assert kb.image(0).size == (64, 48)
    lists = CandidateLists(["m"], [["Q1"]], {}, {"source": "name"})
    lists.save(f"lists{out}/train.parquet")
    assert CandidateLists.load(f"lists{out}/train.parquet").entity_ids == [["Q1"]]
    publication = dataset_publication(out, "me/data", i_hold_the_rights=True)
    assert {"entities/kb-00000-of-00001.parquet", "mentions/train-00000-of-00001.parquet"} < set(publication.files)


def test_the_closing_lines_count_images_that_were_left_out(run, tmp_path):
    (tmp_path / "broken.png").write_bytes(photo("PNG")[:500])
    (tmp_path / "e.jsonl").write_text(
        '{"id": "Q1", "name": "Ghana", "image": "gone.png"}\n{"id": "Q2", "name": "Togo", "image": "broken.png"}'
    )
    (tmp_path / "m.jsonl").write_text('{"text": "in Ghana", "mention": "Ghana", "entity_id": "Q1", "split": "train"}')
    words = ["build", "jsonl", "--mentions", tmp_path / "m.jsonl", "--entities", tmp_path / "e.jsonl"]
    done = run(*words, "--output", tmp_path / "out")
    assert done.exit_code == 0
    assert "Images left out of their rows: 1 missing, 1 broken." in " ".join(done.output.split())
    assert "use its entities:  hf-mel kb build" in done.output
    with pytest.raises(ImageError, match=r"e\.jsonl, row 1: An image is missing \(gone\.png\)"):
        run(*words, "--output", tmp_path / "strict", "--strict")
    assert not (tmp_path / "strict").exists()

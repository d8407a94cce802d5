"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib

import pytest

from hf_mel.errors import MelError
from hf_mel.files import file_sha256, write_text


def test_written_whole_and_folders_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_text(path, ["{", "é", "}\n"])
    assert path.read_bytes() == "{é}\n".encode()
    assert file_sha256(path) == hashlib.sha256("{é}\n".encode()).hexdigest()


def test_what_was_there_survives_a_failure(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def parts():
        yield "new"
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_text(path, parts())
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "results.json", tmp_path):
        with pytest.raises(MelError, match="Cannot be written"):
            write_text(place, ["x"])

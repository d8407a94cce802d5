"""Tests that files and folders are written completely or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mel.errors import MelError
from hf_mel.files import file_sha256, replace_folder, write_text


def test_writing_a_file_creates_its_folders(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_text(path, ["{", "é", "}\n"])
    assert path.read_bytes() == "{é}\n".encode()
    assert file_sha256(path) == hashlib.sha256("{é}\n".encode()).hexdigest()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def parts():
        yield "new"
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_text(path, parts())
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "old"


def test_two_writers_of_one_file_leave_the_whole_text_of_one(tmp_path):
    """Threads share a process id, and so may processes of two hosts that share a file system."""
    path = tmp_path / "results.json"

    def parts():
        yield "first "
        write_text(path, ["second"])
        yield "writer"

    write_text(path, parts())
    assert path.read_text() == "first writer"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "results.json", tmp_path):
        with pytest.raises(MelError, match="cannot be written"):
            write_text(path, ["x"])


def test_replacing_a_folder_succeeds_or_keeps_the_old_one(tmp_path, monkeypatch):
    work, target = tmp_path / "work", tmp_path / "target"
    for folder in (work, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = type(work).rename

    def fail(self, target):
        if self == work:
            raise OSError("no space left")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(work), "rename", fail)
        with pytest.raises(OSError, match="no space left"):
            replace_folder(work, target)
    assert (target / "name").read_text() == "target"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "work"]
    replace_folder(work, target)
    assert (target / "name").read_text() == "work"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to("real/file.txt")
    write_text(tmp_path / "link.txt", ["one"])
    write_text(tmp_path / "link.txt", ["two"])
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real/file.txt").read_text() == "two"
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["file.txt"]


def test_a_folder_that_is_a_link_is_replaced_where_it_points(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/old").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/new").touch()
    replace_folder(tmp_path / "work", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]


@pytest.mark.parametrize("target", ["-", "/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"])
@pytest.mark.parametrize("piped", [True, False])
def test_standard_output_is_written_to_and_not_replaced(tmp_path, target, piped):
    code = f"from hf_mel.files import write_text; print('a', flush=True); write_text({target!r}, ['b\\n']); print('c')"
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    if piped:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout == "a\nb\nc\n"
        return
    with (tmp_path / "out.txt").open("a") as out:
        subprocess.run([sys.executable, "-c", code], env=env, stdout=out, check=True)
    assert (tmp_path / "out.txt").read_text() == "a\nb\nc\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_a_device_stays_a_device(tmp_path):
    write_text("/dev/null", ["nothing"])
    assert not Path("/dev/null").is_file()
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", ["nothing"])
    assert (tmp_path / "null").is_symlink()


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(MelError, match="in a circle"):
        write_text(tmp_path / "a", ["x"])

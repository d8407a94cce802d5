"""Tests of text that is safe to print."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.terminal import safe_text


@given(st.text(), st.booleans())
def test_no_control_character_is_left(text, keep_lines):
    safe = safe_text(text, keep_lines=keep_lines)
    left = [c for c in safe if unicodedata.category(c) in ("Cc", "Cs") and not (keep_lines and c == "\n")]
    assert not left
    safe.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("two\nlines\tand\rmore", "two lines and more"),
        ("abc\u202egnp.exe", r"abc\u202egnp.exe"),
        ("half \ud83d", r"half \ud83d"),
        ("東京 👩‍🚀 Lomé", "東京 👩‍🚀 Lomé"),
    ],
)
def test_controls_are_escaped_and_words_stay(text, shown):
    assert safe_text(text) == shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_in_another_encoding_does_not_fail(encoding):
    code = "from hf_mel.terminal import print_in_any_encoding as f; f(); print('東京 … \\ud83d')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u6771" in done.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_json_is_json_in_every_encoding(encoding):
    value = "Lom\u00e9 \u6771 \U0001f1ec"
    code = (
        "from hf_mel.terminal import print_in_any_encoding as f; from hf_mel.cli.printing import print_json; "
        f"f(); print_json({value!a})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout.decode(encoding)) == value

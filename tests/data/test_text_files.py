"""Text files of users: what a reader sees of HTML, and files that cannot be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.data.text_files import html_text, read_text_file, text_files
from hf_mel.errors import DataFormatError


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<p>Ghana <b>won</b> in\n  Accra.<p>Sudan&nbsp;lost", "Ghana won in Accra.\nSudan lost"),
        ("<title>A &amp; B</title><h1>A</h1>x<br/>y", "A & B\nA\nx\ny"),
        ("<script>if (a < b) alert('Ghana')</script>Mali", "Mali"),
        ("<style>p { color: red }</style><svg><text>Ghana</text></svg>Mali<!-- Togo -->", "Mali"),
        ("a<SCRIPT src=x>Ghana</SCRIPT >b", "ab"),
        ("<template><template>x</template>Ghana</template>Mali", "Mali"),
        ("<pre>  a\n  b</pre> c  d", "  a\n  b\nc d"),
        ("&lt;script&gt;Togo", "<script>Togo"),
        ("Mali <script>never closed Ghana", "Mali"),
        ("</p></script>1 < 2 <p", "1 < 2 <p"),
        ("", ""),
    ],
)
def test_the_text_of_html_is_what_a_reader_sees(source, text):
    assert html_text(source) == text


@given(st.text("<>/ab &;=\"'!-scriptyle\n", max_size=80))
def test_any_html_has_a_text(source):
    lines = html_text(source).split("\n")
    assert all(lines) or lines == [""]


def test_text_files_are_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.HTML", "d.pdf", ".git/e.txt", ".f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in text_files(tmp_path)] == ["a.md", "b.txt", "sub/c.HTML"]
    with pytest.raises(DataFormatError, match="no text files"):
        text_files(tmp_path / ".git" / "none")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("Köln".encode("cp1252"))
    with pytest.raises(DataFormatError, match="Windows-1252") as error:
        read_text_file(tmp_path / "a.txt")
    assert error.value.file == tmp_path / "a.txt"
    with pytest.raises(DataFormatError, match="cannot be read"):
        read_text_file(tmp_path / "missing.txt")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfK\xc3\xb6ln <b>")
    assert read_text_file(tmp_path / "b.txt") == "Köln <b>"

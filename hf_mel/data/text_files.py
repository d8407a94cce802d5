"""Text files of users: plain text, Markdown and HTML, in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from hf_mel.errors import DataFormatError
from hf_mel.row_files import read_utf8

#: Suffixes of files that hold one text each.
TEXT_SUFFIXES = (".txt", ".md", ".html", ".htm")
# Elements whose content is not shown as text.
_HIDDEN = frozenset(
    {"script", "style", "noscript", "template", "iframe", "object", "svg", "math", "select", "textarea"}
)
# Elements inside a line. All others start and end a line.
# fmt: off
_INLINE = frozenset({
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i",
    "img", "ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike",
    "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
})
# fmt: on


def text_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the text files in a folder and its subfolders, sorted by path. Hidden files are left out.

    Raises:
        DataFormatError: There are none.
    """
    root = Path(folder)
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in TEXT_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not paths:
        raise DataFormatError(
            "The folder has no text files.", file=root, remedy=f"Add files with one of {', '.join(TEXT_SUFFIXES)}."
        )
    return paths


def read_text_file(path: str | os.PathLike[str]) -> str:
    """Returns the text of a UTF-8 file. Of HTML, it is what a reader sees, without tags, scripts and styles.

    Raises:
        DataFormatError: The file cannot be read, or is not UTF-8.
    """
    path = Path(path)
    text = read_utf8(path)
    return html_text(text) if path.suffix.lower() in (".html", ".htm") else text


def html_text(source: str) -> str:
    """Returns the text of an HTML page: its title and body, without tags, scripts, styles and comments.

    Every block is a line. White space inside a line becomes one space, as a browser shows it, except in `<pre>`.
    """
    parser = _TextParser()
    parser.feed(source)
    parser.close()
    return "\n".join(parser.finished_lines())


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[tuple[str, bool]] = []  # text and whether it is preformatted
        self._parts: list[str] = []
        self._hidden: list[str] = []  # names of the open hidden elements
        self._num_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens an element."""
        if self._hidden:
            if tag == self._hidden[-1]:
                self._hidden.append(tag)
            return
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag not in _INLINE:
            self._end_line()
            self._num_pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """Closes an element."""
        if self._hidden:
            if tag == self._hidden[-1]:
                self._hidden.pop()
            return
        if tag not in _INLINE:
            self._end_line()
            self._num_pre = max(0, self._num_pre - (tag == "pre"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Handles `<br/>`, and in SVG an element without content."""
        if not self._hidden and tag not in _INLINE:
            self._end_line()

    def handle_data(self, data: str) -> None:
        """Keeps text that is shown."""
        if not self._hidden:
            self._parts.append(data)

    def _end_line(self) -> None:
        self._lines.append(("".join(self._parts), self._num_pre > 0))
        self._parts.clear()

    def finished_lines(self) -> Iterator[str]:
        """Yields the lines that hold text."""
        self._end_line()
        for text, is_preformatted in self._lines:
            line = text.strip("\n") if is_preformatted else " ".join(text.split())
            if line.strip():
                yield line

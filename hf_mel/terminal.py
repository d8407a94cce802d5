"""Text that is safe to print: names and texts of users may hold escape sequences, line ends and other controls."""

from __future__ import annotations

import sys
import unicodedata

#: Characters that reorder the text around them (Unicode's bidirectional controls), and line and paragraph separators.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def safe_text(text: str, *, keep_lines: bool = False) -> str:
    """Returns text without characters that control a terminal.

    White space becomes one space; other controls, halves of surrogate pairs and characters that reorder text are
    written as escapes such as `\\x1b`.

    Args:
        text (`str`): Any text.
        keep_lines (`bool`): Whether line ends stay.
    """
    return "".join(_safe_character(character, keep_lines) for character in text)


def _safe_character(character: str, keep_lines: bool) -> str:
    if character == "\n" and keep_lines:
        return character
    if character in "\t\n\r\v\f":
        return " "
    if unicodedata.category(character) in ("Cc", "Cs") or character in _REORDERING:
        return character.encode("unicode_escape").decode()
    return character


def print_in_any_encoding() -> None:
    """Lets standard output and error write characters that their encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test or a notebook may have replaced it
            stream.reconfigure(errors="backslashreplace")

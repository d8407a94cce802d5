"""Hostile inputs: texts, values and bytes that users, spreadsheets, broken downloads and attackers produce."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

#: Texts that have broken readers before: right-to-left, emoji with joiners, zero-width, surrogates, controls, numbers.
AWKWARD_TEXTS = [
    "", " ", "\u00a0", "\u200b", "\ufeff", "\u2028", "\x00", "\x1b[31m", "\r", "\n", "\t", "é", "e\u0301", "ß", "İ", "ﬁ",
    "\ud800", "\udfff", "🇬🇪", "👩‍👩‍👧‍👦", "🏴\U000e0067\U000e0062\U000e007f", "עברית", "\u202eabc\u202c", "تبليسي",
    "加纳首都阿克拉", "กรุงเทพ", "a\u0300" * 40, "Ǆ", "ŉ", "𝔾𝕖𝕠𝕣𝕘𝕚𝕒", "NIL", "None", "nan", "null", "true", "1e999", "-0", "٣",
    "²", "9" * 400, "'; drop table", "../../etc/passwd", "%s%n", "{0.__class__}", "<script>", "[MASK]", "[SEP]", "«»",
]  # fmt: skip
#: Texts of all kinds, surrogates included.
texts = st.one_of(
    st.sampled_from(AWKWARD_TEXTS),
    st.text(max_size=30),
    st.text(st.characters(categories=["L", "M", "Cf", "So", "Zs", "Cs"]), max_size=20),
    st.lists(st.sampled_from([*AWKWARD_TEXTS, "Georgia", " ", "the"]), max_size=6).map("".join),
    st.tuples(st.text(min_size=1, max_size=8), st.sampled_from([2, 50, 500])).map(lambda pair: pair[0] * pair[1]),
)
megabytes = st.sampled_from(["a", "ab ", "加", "\u200b", "👩‍👩‍👧‍👦", "é", "a\u0300", "\u202e"]).map(
    lambda piece: piece * (2**20 // len(piece.encode()))
)
#: One text in many is a megabyte long.
long_texts = st.one_of(*[texts] * 40, megabytes)
#: Numbers as JSON and YAML have them.
numbers = st.one_of(
    st.integers(-3, 30), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63) - 1, 2**31, 1e308, -0.0])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
#: Values of JSON and YAML of any form.
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)

HOSTILE_BYTES = [
    b"null", b"true", b"5", b"-1", b'"x"', b'""', b"[]", b"[[]]", b"{}", b'{"a": 1}', b"NaN", b"1e999", b"1.5", b"-0",
    b'"\\ud800"', b'"\\u0000"', b"9" * 30, b"9" * 5000, b'"' + b"x" * 300 + b'"', b"\xff", b"\t", b",", b";", b"\n", b'"',
    b"nil", b'"../../x.jpg"', b"[" * 3000, b'"%ff"', b"@@@@", "\u2028".encode(), b"\xef\xbb\xbf", b"\r\n", b"\x00", b"'",
    b"{" * 2000, b"&a [*a]", b"!!python/object:x {}", b"<<: *x", b"~", b"? ", b": ", b"- ", b"|", b"2001-01-01", b"0x10",
    b"!!set {a}", b"!!binary x", b"!!timestamp 0000-00-00", b"99999-01-01", b"1:30:60", b"#", b"=", b"\xed\xa0\x80",
]  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+|[^\s:,{}\[\]]+')
_place = st.floats(0, 1, exclude_max=True, width=32)
_mutation = st.one_of(
    st.tuples(st.just("token"), _place, st.sampled_from(HOSTILE_BYTES)),
    st.tuples(st.just("insert"), _place, st.sampled_from(HOSTILE_BYTES)),
    st.tuples(st.just("insert"), _place, st.binary(min_size=1, max_size=6)),
    st.tuples(st.just("flip"), _place, st.integers(1, 255)),
    st.tuples(st.just("delete"), _place, st.integers(1, 40)),
    st.tuples(st.just("repeat"), _place, st.integers(1, 200)),
    st.tuples(st.just("cut"), _place, st.just(0)),
)
#: Lists of changes of bytes, for [`mutated`].
mutations = st.lists(_mutation, min_size=1, max_size=4)


def mutated(data: bytes, changes: list[tuple[str, float, Any]]) -> bytes:
    """Returns bytes after changes: a kind, a place as a share of the length, and what is put there."""
    for kind, place, what in changes:
        at = int(place * len(data))
        if kind == "token":
            tokens = list(_TOKEN.finditer(data)) or [re.match(b"", data)]
            token = tokens[int(place * len(tokens))]
            assert token is not None
            data = data[: token.start()] + what + data[token.end() :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "flip":
            data = data[:at] + bytes([data[at] ^ what]) + data[at + 1 :] if data else b"\xff"
        elif kind == "delete":
            data = data[:at] + data[at + what :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + what] * 3 + data[at + what :]
        else:
            data = data[:at]
    return data

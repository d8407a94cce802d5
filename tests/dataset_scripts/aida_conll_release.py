"""Small invented sets in the forms in which AIDA-CoNLL and its companions go round, malformed data included: empty contexts, no
candidates, golds that are no candidate, underscores, percent-encoding, entities of HTML, Windows line ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {"config_options": {"entities": "{folder}/texts.jsonl"}, "allow_count_mismatch": True}
SPLITS = {
    "mentions": {"train": 4, "validation": 1, "test": 1},
    "msnbc": {"test": 1},
    "wiki": {"test": 2},
    "entities": {"kb": 6},
}

#: Form csv: document, document, mention, left context, right context, candidates, gold.
Row = tuple[str, str, str, str, str, list[str], str]
CSV: dict[str, list[Row]] = {
    "aida_train.csv": [
        (
            "1 EU",
            "1 EU",
            "Nordby",
            "EMPTYCTXT",
            "beat Falk , 3-1 .",
            ["11,0.75,Nordby", "12,0.125,Nordby, Ohio", "13,0.0625,Falk &amp; Sons"],
            "2,12,0.125,Nordby, Ohio",
        ),
        (
            "1 EU",
            "1 EU",
            "Falk",
            "Nordby beat",
            ", 3-1 .",
            ["13,1,Falk & Sons", "14,0.5,Falk_&amp;_Sons"],
            "-1,15,Ada Falk",
        ),
        ("2 Rugby", "2 Rugby", "Harbour Cup", "The", "EMPTYCTXT", ["EMPTYCAND"], "-1,16,Harbour Cup"),
        ("2 Rugby", "2 Rugby", "Nobody", "The", "left", ["EMPTYCAND"], "-1"),
    ],
    "aida_testA.csv": [
        ("947testa CRICKET", "947testa CRICKET", "Brun", "for", "won", ["17,1.0,José Brun"], "1,17,1.0,José Brun")
    ],
    "aida_testB.csv": [
        ("1163testb SOCCER", "1163testb SOCCER", "Falk", "for", "lost", ["15,0.5,Ada Falk"], "1,15,0.5,Ada Falk")
    ],
    "wned-msnbc.csv": [("3.txt", "3.txt", "Nordby", "at", "EMPTYCTXT", ["11,0.75,Nordby"], "1,11,0.75,Nordby")],
}
#: Form jsonl as GENRE has it, then as BLINK has it.
GENRE = [
    {
        "id": "0",
        "input": "in [START_ENT] Nordby [END_ENT] there",
        "output": [{"answer": "Nordby, Ohio", "provenance": [{"wikipedia_id": "12", "title": "Nordby, Ohio"}]}],
        "candidates": ["Nordby", "Nordby,_Ohio", "Nordby"],
        "meta": {"left_context": "in ", "mention": "Nordby", "right_context": "there"},
    },
    {
        "id": "1",
        "input": "",
        "output": [],
        "candidates": None,
        "meta": {"left_context": "", "mention": "Falk", "right_context": ""},
    },
]
BLINK = [
    {"context_left": "in", "mention": "Nordby", "context_right": "there", "label": "Nordby, Ohio", "label_id": 12},
    {"context_left": "", "mention": "Falk", "context_right": "", "label": "unknown", "label_id": -1},
]
CONLL = """\
-DOCSTART- (1 EU)
Nordby\tB\tNordby\tNordby,_Ohio\thttp://en.wikipedia.org/wiki/Nordby%2C_Ohio\t12\t/m/01
beat
Ada\tB\tAda Falk\tAda_Falk\thttp://en.wikipedia.org/wiki/Ada_Falk\t15
Falk\tI\tAda Falk\tAda_Falk\thttp://en.wikipedia.org/wiki/Ada_Falk\t15
.

Nobody\tB\tNobody\t--NME--
Nordby\tB\tNordby\tJos\\u00e9_Brun
won

-DOCSTART- (947testa CRICKET)

Brun\tB\tBrun\tJosé_Brun\thttp://en.wikipedia.org/wiki/Jos%C3%A9_Brun\t17

-DOCSTART- (1163testb)
Falk\tB\tFalk\tAda_Falk\thttp://en.wikipedia.org/wiki/Ada_Falk\t15
"""


def line(row: Row) -> str:
    document, again, mention, left, right, candidates, gold = row
    return "\t".join([document, again, mention, left, right, "CANDIDATES", *candidates, "GT:", gold])


def write_texts(folder: Path) -> None:
    texts = [
        {"id": 12, "title": "Nordby (Ohio)", "text": "A town."},
        {"title": "Ada Falk", "text": "A sailor."},
        {"id": "99", "title": "Elsewhere", "text": "No."},
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")


def write(folder: Path) -> Path:
    """AIDA and MSNBC as csv, WIKI as JSON lines of GENRE; the other sets are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in CSV.items():
        (folder / name).write_bytes("".join(f"{line(row)}\r\n" for row in rows).encode())
    (folder / "wiki-test-kilt.jsonl").write_text("\n".join(map(json.dumps, GENRE)) + "\n\n", encoding="utf-8")
    write_texts(folder)
    return folder


def write_conll(folder: Path) -> Path:
    """AIDA as its own tool writes it, and ACE2004 as JSON lines of BLINK."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "AIDA-YAGO2-dataset.tsv").write_bytes(f"\ufeff{CONLL}".replace("\n", "\r\n").encode())
    (folder / "ace2004_questions.jsonl").write_text("\n".join(map(json.dumps, BLINK)), encoding="utf-8")
    write_texts(folder)
    return folder


LAYOUTS = {
    "conll": (
        write_conll,
        {
            "mentions": {"train": 4, "validation": 1, "test": 1},
            "ace2004": {"test": 2},
            "entities": {"kb": 3},
        },
    )
}

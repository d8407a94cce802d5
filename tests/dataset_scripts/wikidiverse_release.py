"""A small invented WikiDiverse in the release's layouts, with the malformed data of the real one.

`write` gives the layout with candidates, `write_passages` that of the captions. The knowledge base tables serve both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.dataset_scripts.fixtures import picture, write_cleaned, write_kgmel

WIKI = "https://en.wikipedia.org/wiki/"
BARGE = "https://upload.wikimedia.org/wikipedia/commons/0/06/Barge%20race_%282007%29.JPG"
CREST = "https://upload.wikimedia.org/wikinews/en/c/ca/Nordby_crest.svg"
GONE = "https://upload.wikimedia.org/wikipedia/commons/1/11/Gone.png"

#: [sentence, image, mention, type, left, right, gold, candidates, topic, start, end]
CANDIDATE_ROWS: dict[str, list[list[Any]]] = {
    "train": [
        [
            "Ada Falk beats Nordby United.",
            BARGE,
            "Ada Falk",
            "Person",
            [],
            ["beat", "nordby"],
            f"n{WIKI}Ada_Falk",
            [f"{WIKI}Ada_Falk", "Ada Falk", f"{WIKI}Ada-Falk", f"{WIKI}Jos%25C3%25A9_Brun"],
            "sports",
            0,
            8,
        ],
        [
            "Ada Falk beats Nordby United.",
            BARGE,
            "Nordby United",
            "Organization",
            ["ada", "falk", "beat"],
            [],
            f"]{WIKI}Nordby-United ",
            [],
            "sports",
            "15",  # ids and offsets come as strings, too
            "28",
        ],
        # One to the right of where the mention stands.
        ["The Nordby crest", CREST, "Nordby", "Location", ["the"], ["crest"], "NIL", ["Nordby"], "politics", 5, 11],
        ["The Nordby crest", CREST, "crest", "Other", ["the"], [], None, [], "politics", 11, 16],
        ["An empty mention", "", "", "Other", [], [], "nil", [], "other", 0, 0],
        ["A lost link", "", "lost", "Other", [], [], WIKI, [], "other", 2, 6],
    ],
    "valid": [
        [
            "José Brun, skipper",
            GONE,
            "José Brun",
            "Person",
            [],
            ["skipper"],
            f"h{WIKI}Jos%C3%A9_Brun#Early_life",
            ["Nil", f"{WIKI}Bruno?oldid=12"],
            "sports",
            0,
            9,
        ],
        ["Nobody here", "", "Someone", "Person", [], [], " nil ", [], "other", 0, 7],
    ],
    "test": [
        [
            "Falk at the Hafen",
            BARGE,
            "Hafen",
            "Location",
            ["falk", "at", "the"],
            [],
            "ttps://de.wikipedia.org/wiki/Hafen",
            [],
            "travel",
            12,
            17,
        ],
        ["Falk at the Hafen", BARGE, "Falk", "Person", [], ["at"], "ada Falk", ["https://a.org/x"], "travel", 0, 4],
    ],
}

#: Titles and addresses, twice the same page in other spellings, a row without separator, and one without a title.
DESCRIPTIONS = [
    "Ada_Falk@@@@Ada Falk is a sailor. @@@@ not a field",
    "Ada Falk@@@@A second row of hers.",
    f"{WIKI}Jos%C3%A9_Brun@@@@José Brun is a skipper.",
    "Nordby@@@@A town on an island.",
    "no separator here",
    "_@@@@no title",
    "Nordby United@@@@",
    "Unrelated_page@@@@Something else.",
]
IMAGES = [
    f"Ada Falk@@@@{BARGE}[AND]{GONE}[AND]{CREST}",
    f"Unrelated page@@@@{CREST}",
]


def stored(part: str, suffix: str) -> str:
    return hashlib.md5(part.encode()).hexdigest() + suffix


#: Id, context, surface, start, end, type, topic, gold, candidates, whether it has an image, address as released.
MENTIONS = {
    "train": [
        (
            "train-0",
            "train-0",
            "Ada Falk",
            0,
            8,
            "Person",
            "sports",
            "Ada Falk",
            ["Ada Falk", "José Brun"],
            True,
            f"n{WIKI}Ada_Falk",
        ),
        (
            "train-1",
            "train-0",
            "Nordby United",
            15,
            28,
            "Organization",
            "sports",
            "Nordby United",
            [],
            True,
            f"]{WIKI}Nordby-United ",
        ),
        ("train-2", "train-2", "Nordby", 4, 10, "Location", "politics", "NIL", ["Nordby"], True, "NIL"),
        ("train-3", "train-2", "crest", 11, 16, "Other", "politics", "NIL", [], True, ""),
    ],
    "validation": [
        (
            "valid-0",
            "valid-0",
            "José Brun",
            0,
            9,
            "Person",
            "sports",
            "José Brun",
            ["Bruno"],
            False,
            f"h{WIKI}Jos%C3%A9_Brun#Early_life",
        ),
        ("valid-1", "valid-1", "Someone", -1, -1, "Person", "other", "NIL", [], False, " nil "),
    ],
    "test": [
        (
            "test-0",
            "test-0",
            "Hafen",
            12,
            17,
            "Location",
            "travel",
            "de:Hafen",
            [],
            True,
            "ttps://de.wikipedia.org/wiki/Hafen",
        ),
        ("test-1", "test-0", "Falk", 0, 4, "Person", "travel", "Ada Falk", ["https://a.org/x"], True, "ada Falk"),
    ],
}

#: Id, name, description, number of images: rows of the table in its order, then pages without a row as first met.
ENTITIES = [
    ("Ada Falk", "Ada Falk", "Ada Falk is a sailor. @@@@ not a field", 2),
    ("José Brun", "José Brun", "José Brun is a skipper.", 0),
    ("Nordby", "Nordby", "A town on an island.", 0),
    ("Nordby United", "Nordby United", "", 0),
    ("Bruno", "Bruno", "", 0),
    ("de:Hafen", "Hafen", "", 0),
    ("https://a.org/x", "https://a.org/x", "", 0),
]

SPLITS = {"mentions": {split: len(rows) for split, rows in MENTIONS.items()}, "entities": {"kb": len(ENTITIES)}}
OPTIONS = {"allow_count_mismatch": True}


def write_tables(folder: Path) -> None:
    """The two tables, with a byte-order mark and Windows line ends, and the images of both sides."""
    (folder / "wikipedia_entity2desc_filtered.tsv").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(DESCRIPTIONS).encode() + b"\r\nbad\xff@@@@bytes\r\n"
    )
    (folder / "wikipedia_entity2imgs.tsv").write_text("\n".join(IMAGES) + "\n", encoding="utf-8")
    for place in ("wikinewsImgs", "entity_images"):
        (folder / place).mkdir(exist_ok=True)
        # Hashed as in the address; the SVG file is a PNG.
        (folder / place / stored("Barge%20race_%282007%29.JPG", ".JPG")).write_bytes(picture("navy"))
        (folder / place / stored("Nordby_crest.svg", ".png")).write_bytes(picture("red", form="PNG"))


def write(folder: Path) -> Path:
    """The layout with candidates."""
    (folder / "wikidiverse_w_cands").mkdir(parents=True, exist_ok=True)
    for split, rows in CANDIDATE_ROWS.items():
        path = folder / "wikidiverse_w_cands" / f"{split}_w_10cands.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False, indent=1).encode())
    write_tables(folder)
    return folder


def write_passages(folder: Path) -> Path:
    """The layout of the captions: the same annotations, several to a row and without candidates."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in CANDIDATE_ROWS.items():
        captions: dict[str, list[Any]] = {}
        for text, image, surface, kind, _, _, url, _, topic, start, end in rows:
            caption = captions.setdefault(text, [text, image, topic, []])
            caption[3].append([surface, kind, start, end, url])
        path = folder / f"{split}.json"
        path.write_text(json.dumps(list(captions.values()), ensure_ascii=False), encoding="utf-8")
    write_tables(folder)
    return folder


LAYOUTS = {
    "passages": (write_passages, {"mentions": SPLITS["mentions"], "entities": {"kb": 4}}),  # golds only
    "mimic": (
        lambda folder: write_cleaned(folder, "wiki_diverse"),
        {"mentions": {"train": 3, "validation": 1, "test": 1}, "entities": {"kb": 3}},
    ),
    "kgmel": (
        lambda folder: write_kgmel(folder, "WikiDiverse"),
        {"mentions": {"train": 3, "validation": 1, "test": 2}, "entities": {"kb": 3}},
    ),
}

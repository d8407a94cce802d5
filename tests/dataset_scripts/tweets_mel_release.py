"""A small invented Tweets-MEL: the id lists, and tweets hydrated in the release's form, with malformed data of every kind."""

from __future__ import annotations

from pathlib import Path

from tests.dataset_scripts.fixtures import picture

MEDIA = "https://pbs.twimg.com/media/"

IDS = {
    # More digits than a float holds; a blank line, quotes and no newline at the end; 1003 and 3003 are gone.
    "mel_train_ids": "\ufeff1088612476130750001\r\n1088612476130750002\r\n\r\n1003\r\n1.08861E+18\r\n1003\r\n",
    "mel_dev_ids": "2001\n'2002'\n",
    "mel_test_ids": " 3001 \n3002\n3003",
}
#: The release's lists of PFMEL, across the splits; train07 and train05 are nested.
PFMEL_IDS = {
    "Train_ids.txt": "3001\n2001\n",
    "Train07_ids.txt": "3001\n",
    "Dev_ids.txt": "1088612476130750001\n",
    "Test_ids.txt": "1088612476130750002\n3002\n3003\n",
}
TWEETS = {
    # Two accounts in one tweet, the second counted before the first was replaced; another line end; a repeated row.
    "Train.txt": [
        f"1088612476130750001\t5\t9\tFalk\t@AdaFalk\tBrun Falk won!\t{MEDIA}Dx1.jpg",
        f"1088612476130750002\t0\t4\tFalk\t@bofalk\tFalk meets @JBrun\t{MEDIA}Dx2?format=jpg&name=large",
        f"1088612476130750002\t13\t17\tBrun\tJBrun\t@bofalk meets Brun\t{MEDIA}Dx2?format=jpg&name=large",
        f"1088612476130750001\t5\t9\tFalk\t@adafalk\tBrun Falk won!\t{MEDIA}Dx1.jpg",
        "9999\t0\t4\tFalk\t@nobody\tFalk\t",
        "too\tfew",
        "abc\t0\t4\tFalk\t@AdaFalk\tFalk\t",
    ],
    # A row of the test list stands here. No address, so no last tab.
    "Dev.txt": [
        "2001\t1\t5\tFalk\t@ADAFALK\t Falk and Falk",
        f"3001\t0\t4\tFalk\t@AdaFalk\tno such name\t{MEDIA}gone.jpg",
    ],
    "Test.txt": [
        "3002\tx\t-4\tBrun\t@JBrun\tBrun, Brun\tnone",
        "2002\t9\t13\tFalk\t@bofalk\tFalk? No: Falk\t",
    ],
}
MAP = "@AdaFalk|Falk\r\n@bofalk|Falk\n@JBrun|Brun\nno bar\n@adafalk|Falk\n@other_1|Falk \n"
KB_IDS = "".join(f"{k}\n" for k in (51, 52, 53, 54, 55, 56, 57))
TIMELINES = [
    f"@AdaFalk\t51\toldest\t{MEDIA}t51.jpg",
    "@AdaFalk\t53\tlate\t",
    "AdaFalk\t52\tmiddle\t",  # as the release's program writes it, without "@"
    "@adafalk\t54\tlatest",
    f"@Timeline_Only\t55\thello\t{MEDIA}t55.jpg",
    "@AdaFalk\t54\tlatest again\t",
    "@AdaFalk\t99\tnot listed\t",
    "@AdaFalk\tx\tno id\t",
]
PROFILES = [
    "@adafalk\tAda Falk\tSailor.  Mother.\tNordby",
    "@JBrun\tJosé Brun\t",
    "@stranger\tSomebody\tElse",
    "no name",
]

#: Id, context, text, mention, start, end, account, candidates, whether it has an image.
FALKS = ["@adafalk", "@bofalk", "@other_1"]
MENTIONS = {
    "train": [
        ("1088612476130750001", "1088612476130750001", "Brun Falk won!", "Falk", 5, 9, "@adafalk", FALKS, True),
        (
            "1088612476130750002-0",
            "1088612476130750002",
            "Falk meets @JBrun",
            "Falk",
            0,
            4,
            "@bofalk",
            FALKS,
            True,
        ),
        (
            "1088612476130750002-1",
            "1088612476130750002-1",
            "@bofalk meets Brun",
            "Brun",
            14,
            18,
            "@jbrun",
            ["@jbrun"],
            True,
        ),
    ],
    "validation": [
        ("2001", "2001", " Falk and Falk", "Falk", 1, 5, "@adafalk", FALKS, False),
        ("2002", "2002", "Falk? No: Falk", "Falk", 10, 14, "@bofalk", FALKS, True),
    ],
    "test": [
        ("3001", "3001", "no such name", "Falk", -1, -1, "@adafalk", FALKS, False),
        ("3002", "3002", "Brun, Brun", "Brun", 0, 4, "@jbrun", ["@jbrun"], False),
    ],
}
#: Id, name, description, attributes, screen name, location, recent posts, number of images.
ENTITIES = [
    (
        "@adafalk",
        "Ada Falk",
        "Sailor. Mother.",
        "Location: Nordby",
        "@AdaFalk",
        "Nordby",
        ["latest", "late", "middle"],
        1,
    ),
    ("@bofalk", "Falk", "", "", "@bofalk", "", [], 0),
    ("@jbrun", "José Brun", "", "", "@JBrun", "", [], 0),
    ("@other_1", "Falk", "", "", "@other_1", "", [], 0),
    ("@timeline_only", "Timeline_Only", "", "", "@Timeline_Only", "", ["hello"], 0),
]
POSTS = [
    ("51", "@adafalk", "oldest", True),
    ("53", "@adafalk", "late", False),
    ("52", "@adafalk", "middle", False),
    ("54", "@adafalk", "latest", False),
    ("55", "@timeline_only", "hello", False),
]

SPLITS = {
    "mentions": {split: len(rows) for split, rows in MENTIONS.items()},
    "entities": {"kb": len(ENTITIES)},
    "posts": {"kb": len(POSTS)},
}
OPTIONS: dict[str, object] = {}
PFMEL_SPLITS = {
    "pfmel": {"train": 2, "validation": 1, "test": 3},
    "pfmel_train07": {"train": 1, "validation": 1, "test": 3},
}


def write_ids(folder: Path) -> Path:
    """The release as it is: ids only."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**IDS, "kb": KB_IDS}.items():
        (folder / name).write_bytes(text.encode())
    return folder


def write_pfmel(folder: Path) -> None:
    """PFMEL's lists, but for the smallest."""
    for name, text in PFMEL_IDS.items():
        (folder / name).write_bytes(text.encode())


def write_with_pfmel(folder: Path) -> None:
    write(folder)
    write_pfmel(folder)


def write(folder: Path) -> Path:
    """The ids, and a user's own tweets, timelines, profiles and images."""
    write_ids(folder)
    for name, rows in TWEETS.items():
        ends = "\r\n" if name == "Dev.txt" else "\n"
        start = "\ufeff" if name == "Train.txt" else ""
        (folder / name).write_bytes((start + ends.join(rows) + ends).encode())
    (folder / "mapSreenNameToMention.txt").write_bytes(MAP.encode())
    (folder / "timelineKB.txt").write_bytes(("\n".join(TIMELINES) + "\n").encode())
    (folder / "profiles.tsv").write_bytes(("\ufeff" + "\r\n".join(PROFILES)).encode())
    for path, colour in (
        ("images/Dx1.jpg", "red"),
        ("images/Dx2.jpg", "green"),
        ("images/2002.jpg", "blue"),
        ("entity_images/t51.jpg", "navy"),
        ("entity_images/adafalk.png", "white"),
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(picture(colour))
    return folder


LAYOUTS = {"pfmel": (write_with_pfmel, {**SPLITS, **PFMEL_SPLITS})}

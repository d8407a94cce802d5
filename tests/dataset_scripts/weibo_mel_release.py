"""A small invented Weibo-MEL in the layout with `splits.json`, malformed data included: byte-order mark, Windows line ends, ids
as numbers and texts, NIL in several spellings, a missing image, brackets in titles, a mention without surface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.dataset_scripts.fixtures import picture, write_json

OPTIONS: dict[str, Any] = {
    "config_options": {"entities": "{folder}/texts.jsonl", "timelines": "{folder}/more/timelines.jsonl"},
    "allow_count_mismatch": True,
}
SPLITS = {"mentions": {"train": 4, "validation": 1, "test": 2}, "entities": {"kb": 4}, "posts": {"kb": 3}}

POSTS: list[dict[str, Any]] = [
    {"id": 1, "entity_id": "Q901", "text": "今天发布新品", "image": "1.png"},
    {"id": "2", "entity_id": 902, "text": "", "image": "gone.jpg"},
    {"id": "1", "entity_id": "Q903", "text": "又一次"},
    {"id": "3", "entity_id": "Q999", "text": "无关"},
    {"id": "4", "entity_id": "Q903", "text": "花开了", "image": None},
]

SAMPLES: dict[str, dict[str, Any]] = {
    "7001": {
        "id": 7001,
        "sentence": "海棠（新品）今天发布，老柯在海棠大楼亮相。",
        "mentions": ["海棠", "老柯"],
        "entities": ["海棠（公司）", "柯大山[企业家]"],
        "answer": ["Q901", 902],
    },
    "7002": {
        "id": "7002",
        "sentence": "海棠花开了【图】",
        "mentions": ["海棠花", ""],
        "entities": ["海棠（植物）", ""],
        "answer": ["Q903", "Q903"],
        "imgPath": "weibo/pic.png",
    },
    "7003": {"id": "7003", "sentence": "无人知晓小宋", "mentions": "小宋", "entities": "", "answer": None},
    "7004": {
        "id": "7004",
        "sentence": "海棠股价",
        "mentions": ["海棠"],
        "entities": ["海棠集团"],
        "answer": [" Q901 "],
    },
    "7005": {
        "id": "7005",
        "sentence": "小宋和阿宋",
        "mentions": ["小宋", "阿宋"],
        "entities": ["宋甲", "宋乙"],
        "answer": ["Nil", "Q905"],
    },
    "7006": {"id": "7006", "sentence": "没有划分", "mentions": ["划分"], "entities": ["划分"], "answer": ["Q906"]},
}


def write(folder: Path) -> Path:
    """Writes the release; 2 of the 5 posts in a split have an image."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(SAMPLES, ensure_ascii=False, indent=1).replace("\n", "\r\n")
    (folder / "Weibo-MEL.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    write_json(folder / "splits.json", {"train": ["7001", 7002, "7003", "7099"], "dev": ["7004"], "test": [7005]})
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "7001.jpg").write_bytes(picture("red"))
    (folder / "images" / "pic.png").write_bytes(picture("green", form="PNG"))
    texts = [
        {"id": "Q901", "title": "海棠（公司）", "text": "一家公司。"},
        {"title": "902", "text": "一位企业家。"},
        {"id": 999, "title": "别的", "text": "无关。"},
    ]
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in texts)
    (folder / "texts.jsonl").write_text(f"\ufeff{lines}\r\n\r\n", encoding="utf-8", newline="")
    (folder / "more" / "timeline_images").mkdir(parents=True, exist_ok=True)
    (folder / "more" / "timeline_images" / "1.png").write_bytes(picture("blue", form="PNG"))
    posts = "\n".join(json.dumps(post, ensure_ascii=False) for post in POSTS)
    (folder / "more" / "timelines.jsonl").write_text(posts, encoding="utf-8")
    return folder

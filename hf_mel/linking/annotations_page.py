"""A page that shows annotated texts in a browser, without a server and without scripts."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from PIL import Image

from hf_mel.files import write_text
from hf_mel.schema import NIL

_NUM_CANDIDATES = 3
_SIDE = 96  # pixels of a picture, twice what is shown, for dense screens
_STYLE = """
:root { color-scheme: light dark; --edge: #8888; --back: #fff; --linked: #cfe3ff; --nil: #ffd9d2; --none: #e4e4e7; }
@media (prefers-color-scheme: dark) { :root { --back: #1f2937; --linked: #1e4a86; --nil: #7c2d20; --none: #3f3f46; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem 14rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere; }
.key mark { cursor: auto; }
.text { position: relative; white-space: pre-wrap; line-height: 2; overflow-wrap: anywhere; margin: .3rem 0; }
.photo { max-width: 16rem; max-height: 12rem; border-radius: 6px; display: block; }
mark { color: inherit; background: var(--linked); border-radius: 4px; padding: .1em .2em; cursor: help; }
mark.nil { background: var(--nil); } mark.none { background: var(--none); }
mark:focus { outline: 2px solid; }
.cards { display: none; position: absolute; left: 0; z-index: 1; width: min(30rem, 100%); margin-top: .1rem; padding: .6rem .8rem;
  box-sizing: border-box; background: var(--back); border: 1px solid var(--edge); border-radius: 8px;
  box-shadow: 0 4px 16px #0004; line-height: 1.4; font-size: .9rem; white-space: normal; }
mark:hover > .cards, mark:focus > .cards, .cards:hover { display: block; }
.cards > span { display: block; } .cards > span + span { margin-top: .6rem; border-top: 1px solid var(--edge); padding-top: .6rem; }
.cards b, .cards small, .row { display: block; } .cards small { opacity: .8; }
.row { display: grid; grid-template-columns: 2.6rem 1fr auto; gap: .5rem; align-items: center; margin-top: .4rem; }
.row img, .row i { width: 2.6rem; height: 2.6rem; object-fit: contain; border-radius: 4px; } .row i { background: var(--none); }
.row span { overflow-wrap: anywhere; } .score { font-variant-numeric: tabular-nums; }
.note { opacity: .8; font-size: .9rem; }
"""


def write_annotations_page(
    path: str | os.PathLike[str],
    records: Iterable[Mapping[str, Any]],
    *,
    entity_image: Callable[[str], Image.Image | None] | None = None,
    title: str = "Annotated texts",
) -> None:
    """Writes a page with the mentions of texts marked. The candidates of a mention are shown when it is pointed at.

    The page holds everything that it shows. All text is escaped.

    Args:
        path (`str` or `os.PathLike`): The .html file.
        records (iterable of mappings): Plain data of texts: `text` and `mentions`
            ([`~hf_mel.linking.annotating.AnnotatedText.to_dict`]), optionally `file`, a heading, and `photo`, a PIL image.
            A record with `error` shows it.
        entity_image (callable, *optional*): Takes the id of an entity, and returns its image or `None`.
        title (`str`): Heading of the page.

    Raises:
        MelError: The file cannot be written.
    """
    write_text(path, _page(records, entity_image or (lambda entity_id: None), title))


def _page(
    records: Iterable[Mapping[str, Any]], entity_image: Callable[[str], Image.Image | None], title: str
) -> Iterator[str]:
    pictures: dict[str, str] = {}

    def picture(entity_id: str) -> str:
        if entity_id not in pictures:
            image = entity_image(entity_id)
            pictures[entity_id] = "<i></i>" if image is None else f'<img alt="" src="{_data_url(image, _SIDE)}">'
        return pictures[entity_id]

    yield (
        f'<!doctype html><html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body><h1>{_escape(title)}</h1>"
        '<p class="key"><mark>linked</mark> <mark class="nil">NIL: not in the knowledge base</mark> '
        '<mark class="none">not linked</mark><br><span class="note">Point at a mention to see its candidates.</span></p>\n'
    )
    for record in records:
        if record.get("file"):
            yield f"<h2>{_escape(str(record['file']))}</h2>"
        if record.get("photo") is not None:
            yield f'<img class="photo" alt="" src="{_data_url(record["photo"], 512)}">'
        if "error" in record:
            yield f'<p class="note">{_escape(str(record["error"]))}</p>\n'
            continue
        yield f'<p class="text" dir="auto">{_marked(record["text"], record["mentions"], picture)}</p>\n'
        for warning in record.get("warnings", ()):
            yield f'<p class="note">{_escape(warning)}</p>\n'
    yield "</body></html>\n"


def _marked(text: str, mentions: Sequence[Mapping[str, Any]], picture: Callable[[str], str]) -> str:
    """Returns a text with its mentions marked. Where mentions overlap, a part shows the cards of all that cover it."""
    edges = sorted({0, len(text), *(m["start"] for m in mentions), *(m["end"] for m in mentions)})
    waiting = sorted(mentions, key=lambda mention: mention["start"], reverse=True)
    covering: list[Mapping[str, Any]] = []
    parts = []
    for start, end in pairwise(edges):
        covering = [mention for mention in covering if mention["end"] > start]
        while waiting and waiting[-1]["start"] <= start:
            covering.append(waiting.pop())
        words = _escape(text[start:end])
        if covering:
            cards = "".join(f"<span>{_card(mention, picture)}</span>" for mention in covering)
            kind = _kind(min(covering, key=lambda mention: mention["end"] - mention["start"]))
            words = f'<mark class="{kind}" tabindex="0">{words}<span class="cards">{cards}</span></mark>'
        parts.append(words)
    return "".join(parts)


def _kind(mention: Mapping[str, Any]) -> str:
    return "none" if mention["entity_id"] is None else "nil" if mention["entity_id"] == NIL else "linked"


def _card(mention: Mapping[str, Any], picture: Callable[[str], str]) -> str:
    candidates = mention["candidates"][:_NUM_CANDIDATES]
    decision = {"none": "not linked", "nil": "NIL: not in the knowledge base"}.get(_kind(mention))
    if decision is None:
        decision = next(
            (c["name"] for c in candidates if c["entity_id"] == mention["entity_id"]), mention["entity_id"]
        )
    label = f" <small>{_escape(mention['label'])}</small>" if mention["label"] else ""
    rows = []
    for candidate in candidates:
        description = candidate["description"] or candidate["attributes"]
        description = description if len(description) <= 160 else description[:159] + "…"
        rows.append(
            f'<span class="row">{picture(candidate["entity_id"])}<span>{_escape(candidate["name"])} '
            f"({_escape(candidate['entity_id'])})<small>{_escape(description)}</small></span>"
            f'<span class="score">{_shown_score(candidate):.3f}</span></span>'
        )
    return f"<b>{_escape(mention['mention'])} → {_escape(decision)}</b>{label}{''.join(rows)}"


def _shown_score(candidate: Mapping[str, Any]) -> float:
    score = candidate.get("reranker_score")
    return candidate["score"] if score is None else score


def _escape(text: str) -> str:
    """Escapes text for HTML. Halves of surrogate pairs, which UTF-8 lacks, become the replacement character."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def _data_url(image: Image.Image, side: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()

"""HTML of linked mentions: cards of candidates, bars of the evidence, and the model's attention.

All text from visitors and knowledge bases is escaped with `html.escape`.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

#: A scoring unit's name in the model → its displayed name, and the class of its colour in style.css.
UNITS = {"text": ("Text", "text"), "vision": ("Image", "vision"), "cross_modal": ("Text × image", "fusion")}
#: A scoring unit's name in the model → its name in a sentence.
_PHRASES = {"text": "the text", "vision": "the image", "cross_modal": "text and image together"}
_QID = re.compile(r"Q[1-9][0-9]{0,11}")


def unit_name(unit: str) -> str:
    """Returns the displayed name of a scoring unit."""
    return UNITS.get(unit, (unit.replace("_", " "), ""))[0]


def results(answers: Sequence[dict[str, Any]], seconds: float, note: str = "") -> str:
    """Returns the decision and the cards of every mention of a text.

    Args:
        answers (sequence of `dict`): For every mention, `result` (a `LinkResult`), `images` (a PIL image or `None` per
            candidate) and, optionally, `evidence` (the HTML that [`evidence`] returned).
        seconds (`float`): Duration of linking.
        note (`str`): A hint about an example, shown first.
    """
    parts = [_answer(**answer) for answer in answers]
    if note:
        parts.insert(0, f'<p class="mel-expect">{escape(note)}</p>')
    return f'<div class="mel">{"".join(parts)}<p class="mel-time">Linked in {seconds:.2f} s.</p></div>'


def annotated_text(text: str, answers: Sequence[dict[str, Any]], seconds: float) -> str:
    """Returns a text with its mentions marked, and the decision and cards of each, which a click shows (mentions.js).

    Args:
        text (`str`): The text.
        answers (sequence of `dict`): As in [`results`], in the order of the text.
        seconds (`float`): Duration of finding and linking.
    """
    if not answers:
        return message(
            "No name of the knowledge base was found in this text. Words that are no name, such as “the republic”, can be linked "
            "on the first page: select them there.",
            "info",
        )
    parts, position = [], 0
    for number, answer in enumerate(answers):
        result = answer["result"]
        meaning = "NIL: not in this knowledge base" if result.is_nil else result.best.name
        parts.append(escape(text[position : result.start]))
        parts.append(
            f'<button type="button" class="mel-mention{" mel-mention-nil" if result.is_nil else ""}" data-mention="{number}" '
            f'aria-expanded="{"true" if number == 0 else "false"}" title="{escape(meaning)}">'
            f"{escape(text[result.start : result.end])}</button>"
        )
        position = result.end
    parts.append(escape(text[position:]))
    cards = "".join(
        f'<div class="mel-found" data-mention="{number}"{"" if number == 0 else " hidden"}>{_answer(**answer)}</div>'
        for number, answer in enumerate(answers)
    )
    num_nil = sum(answer["result"].is_nil for answer in answers)
    counts = f"{len(answers)} mention{'' if len(answers) == 1 else 's'} found" + (
        f", {num_nil} of them NIL" if num_nil else ""
    )
    return (
        f'<div class="mel mel-post"><p class="mel-time">{counts}, linked in {seconds:.2f} s. Click a mention for its '
        f'evidence.</p><p class="mel-text-marked" dir="auto">{"".join(parts)}</p>{cards}</div>'
    )


def _answer(result: Any, images: Sequence[Image.Image | None], evidence: str = "") -> str:
    best = result.best
    mention = f"<q>{escape(result.mention)}</q>"
    if result.is_nil:
        decision = (
            f'<p class="mel-decision mel-nil" role="status">{mention} → <strong>NIL</strong>: not in this knowledge '
            f"base. The best score, {_number(best.score)}, is below the threshold {_number(result.nil_threshold)}.</p>"
        )
    else:
        decision = (
            f'<p class="mel-decision" role="status">{mention} → <strong>{escape(best.name)}</strong>'
            f"{_reason(result.candidates)}</p>"
        )
    lowest = {unit: min(c.unit_scores[unit] for c in result.candidates) for unit in best.unit_scores}
    max_lead = max((_lead(c, lowest) for c in result.candidates), default=0.0)
    cards = [_card(c, image, lowest, max_lead) for c, image in zip(result.candidates, images, strict=True)]
    warnings = "".join(f'<p class="mel-note">{escape(warning)}</p>' for warning in result.warnings)
    warnings += f'<p class="mel-proof">{escape(_proof(result))}</p>'
    legend = _legend(lowest) if len(lowest) > 1 else ""
    taken = "" if result.is_nil else " mel-taken"
    return f'<section class="mel-answer">{decision}{warnings}{legend}<ol class="mel-cards{taken}">{"".join(cards)}</ol>{evidence}</section>'


def _proof(result: Any) -> str:
    """A sentence on entities that are not shown: whether one of them could belong among the candidates."""
    if not result.certified:
        return "Not proven: the index may have missed an entity that belongs here."
    if result.bound is None:
        return "Proven: every entity was scored."
    return f"Proven: no entity that was not scored reaches more than {_number(result.bound)}, which is too low for this list."


def _reason(candidates: Sequence[Any]) -> str:
    """A sentence on the evidence that ranks the first candidate ahead of the second."""
    if len(candidates) < 2:
        return ""
    first, second = candidates[:2]
    if first.rank == second.rank:
        return ""  # a warning of the result says that they are tied
    behind = escape(second.name or second.entity_id)
    if first.reranker_score is not None:
        scores = f"{_number(first.reranker_score)} to {_number(second.reranker_score)}"
        return f'<span class="mel-reason">The <b>reranker</b> ranks it ahead of {behind}, {scores}.</span>'
    if len(first.unit_scores) < 2:
        return ""
    leads = {unit: first.unit_scores[unit] - second.unit_scores[unit] for unit in first.unit_scores}
    decisive = max(leads, key=lambda unit: leads[unit])
    against = [_PHRASES.get(unit, unit_name(unit)) for unit, lead in leads.items() if lead < 0]
    words = f"Ahead of {behind} mostly because of <b>{escape(_PHRASES.get(decisive, unit_name(decisive)))}</b>."
    if against:
        words += f" Alone, {escape(' and '.join(against))} would favour {behind}."
    return f'<span class="mel-reason">{words}</span>'


def _legend(units: dict[str, float]) -> str:
    items = "".join(
        f'<li><span class="mel-swatch mel-{UNITS.get(unit, ("", "other"))[1]}"></span>{escape(unit_name(unit))}</li>'
        for unit in units
    )
    return (
        f'<div class="mel-legend"><ul>{items}</ul><span>Bars: how far each kind of evidence lifts a candidate above the '
        "weakest one shown.</span></div>"
    )


def _lead(candidate: Any, lowest: dict[str, float]) -> float:
    return sum(candidate.unit_scores[unit] - low for unit, low in lowest.items()) / max(1, len(lowest))


def _card(candidate: Any, image: Image.Image | None, lowest: dict[str, float], max_lead: float) -> str:
    name = escape(candidate.name or candidate.entity_id)
    about = escape(_truncate(" · ".join(t for t in (candidate.description, candidate.attributes) if t.strip()), 180))
    picture = (
        f'<img src="{data_url(image, 96)}" alt="Image of {name}" loading="lazy">'
        if image is not None
        else '<span class="mel-noimage" role="img" aria-label="No image of this entity">no image</span>'
    )
    reranked = candidate.reranker_score is not None
    kind, score = ("reranked", candidate.reranker_score) if reranked else ("score", candidate.score)
    identifier = escape(candidate.entity_id)
    if _QID.fullmatch(candidate.entity_id):
        identifier = (
            f'<a href="https://www.wikidata.org/wiki/{identifier}" target="_blank" rel="noopener noreferrer">'
            f"{identifier}</a>"
        )
    return (
        f'<li class="mel-card">{picture}<div class="mel-body"><h3><span class="mel-rank">{candidate.rank}</span> {name} '
        f"<small>{identifier}</small></h3><p>{about}</p>{_bar(candidate, lowest, max_lead)}</div>"
        f'<span class="mel-score"><small>{kind}</small> {_number(score)}</span></li>'
    )


def _bar(candidate: Any, lowest: dict[str, float], max_lead: float) -> str:
    if len(lowest) < 2 or max_lead <= 0:
        return ""
    parts, scores = [], []
    for unit, low in lowest.items():
        lead = (candidate.unit_scores[unit] - low) / len(lowest)
        width = 100 * lead / max_lead
        scores.append(f"{unit_name(unit)} {_number(candidate.unit_scores[unit])}")
        if width > 0.05:
            colour = UNITS.get(unit, ("", "other"))[1]
            parts.append(f'<span class="mel-part mel-{colour}" style="width:{width:.1f}%"></span>')
    label = escape(", ".join(scores))
    return f'<div class="mel-bar" role="img" aria-label="{label}" title="{label}">{"".join(parts)}</div><p class="mel-units">{label}</p>'


def evidence(
    text: str, explanation: Any, image: Image.Image | None, entity_image: Image.Image | None, name: str
) -> str:
    """Returns the model's attention when it scored the first candidate: shaded words and lit parts of images.

    Args:
        text (`str`): The caption.
        explanation (`Explanation`, *optional*): Its shares of the attention; `None` gives an empty string.
        image, entity_image (`Image.Image`, *optional*): The photo, and the image of the candidate.
        name (`str`): Name of the candidate.
    """
    if explanation is None:
        return ""
    parts = []
    if explanation.words:
        parts.append(f'<p class="mel-words">{_shade_words(text, explanation.words)}</p>')
    figures = []
    if image is not None and explanation.mention_patches:
        figures.append(
            _figure(
                _light_patches(image, explanation.mention_patches), "Your image: the model looked at the bright parts"
            )
        )
    if entity_image is not None and explanation.entity_patches:
        figures.append(
            _figure(
                _light_patches(entity_image, explanation.entity_patches),
                f"Image of {name}: the model looked at the bright parts",
            )
        )
    if figures:
        parts.append(f'<div class="mel-figures">{"".join(figures)}</div>')
    if not parts:
        return ""
    return (
        f'<details class="mel-evidence" open><summary>Where the model looked for {escape(name)}</summary>'
        f"<p>Words and parts of images by their share of the model's attention. This is a hint, not a proof.</p>{''.join(parts)}"
        "</details>"
    )


def _shade_words(text: str, words: Sequence[tuple[int, int, float]]) -> str:
    max_share = max((share for _, _, share in words), default=0) or 1
    parts, position = [], 0
    for start, end, share in words:
        parts.append(escape(text[position:start]))
        strength = max(0.0, min(1.0, share / max_share)) if math.isfinite(share) else 0.0
        parts.append(
            f'<mark style="--share:{strength:.2f}" title="{100 * share:.1f} % of the attention">'
            f"{escape(text[start:end])}</mark>"
        )
        position = end
    return "".join(parts) + escape(text[position:])


def _light_patches(image: Image.Image, patches: Sequence[Sequence[float]]) -> Image.Image:
    """The image, darkened where it got little attention."""
    picture = image.convert("RGB")
    picture.thumbnail((320, 320))
    max_share = max(max(row) for row in patches) or 1
    mask = Image.new("L", (len(patches[0]), len(patches)))
    mask.putdata([round(255 * min(1.0, share / max_share)) for row in patches for share in row])
    dark = Image.blend(picture, Image.new("RGB", picture.size, "black"), 0.72)
    return Image.composite(picture, dark, mask.resize(picture.size, Image.Resampling.BILINEAR))


def _figure(image: Image.Image, caption: str) -> str:
    words = escape(caption)
    return f'<figure><img src="{data_url(image, 320)}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def comparison(columns: Sequence[tuple[str, Any, Sequence[Image.Image | None]]], note: str = "") -> str:
    """Returns several results of the same mention side by side.

    Args:
        columns (sequence): For every column, its heading, a `LinkResult`, and the images of its candidates.
        note (`str`): A remark, shown first.
    """
    parts = [f'<p class="mel-note">{escape(note)}</p>'] if note else []
    for heading, result, images in columns:
        rows = "".join(
            f'<li><span class="mel-rank">{c.rank}</span>{_thumbnail(image, c.name)}<span>{escape(c.name or c.entity_id)}'
            f"</span><b>{_number(c.score)}</b></li>"
            for c, image in zip(result.candidates, images, strict=True)
        )
        nil = " mel-nil" if result.is_nil else ""
        answer = "NIL" if result.is_nil else escape(result.best.name)
        parts.append(
            f'<section class="mel-column"><h3>{escape(heading)}</h3><p class="mel-decision{nil}">→ <strong>{answer}'
            f"</strong></p><ol>{rows}</ol></section>"
        )
    return f'<div class="mel mel-columns">{"".join(parts)}</div>'


def _thumbnail(image: Image.Image | None, name: str) -> str:
    if image is None:
        return '<span class="mel-noimage mel-small" aria-hidden="true"></span>'
    return f'<img src="{data_url(image, 40)}" alt="Image of {escape(name)}" class="mel-small">'


def message(words: str, kind: str = "error") -> str:
    """Returns a message that replaces an answer; `kind` is "error" or "info"."""
    lines = "<br>".join(escape(line) for line in words.split("\n"))
    return f'<div class="mel"><p class="mel-message mel-{kind}" role="alert">{lines}</p></div>'


def data_url(image: Image.Image, side: int) -> str:
    """Returns an image as a data URL, with at most 2 · `side` pixels per side (for dense screens)."""
    small = image.convert("RGB")
    small.thumbnail((2 * side, 2 * side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _truncate(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

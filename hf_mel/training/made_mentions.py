"""Mentions made from a knowledge base alone, as training material: its names, in what it says about its entities."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import datasets

from hf_mel.names import WORD, fold_name
from hf_mel.schema import NO_SPAN, mention_features

#: Kinds of surface forms and how often each is drawn. A kind that a name does not have gives the whole name.
SURFACE_WEIGHTS = {"whole": 6, "alias": 3, "last": 6, "first": 1, "some": 2, "initials": 1, "none": 2}
#: How many pieces of what is said about the entity a mention has, and how often.
_NUM_PIECES = {0: 2, 1: 6, 2: 6, 3: 4}
#: Share of the mentions whose text names another entity too, and share of those that tell something of another.
_OTHER_NAME, _OTHER_PIECE = 0.25, 0.15
#: Where the surface form stands among the pieces. The pieces are neutral in language, so only punctuation joins them.
_LAYOUTS = (
    "{mention}, {pieces}",
    "{mention} ({pieces})",
    "{pieces}: {mention}",
    "{mention}: {pieces}",
    "{pieces}, {mention}",
)
_SUFFIXES = {"jr", "sr", "ii", "iii", "iv"}
#: Number of entities that are looked at to see what is common, and that are named beside others.
_SAMPLE = 2_000
_MAX_WORDS = 24
#: A day, of which a text usually tells the year; and the years of a life or a reign, of which it usually tells one.
_DATE, _YEARS = re.compile(r"\b(\d{4})-\d\d-\d\d\b"), re.compile(r"\b(\d{3,4})\s*[-–—]\s*(\d{3,4})\b")
_SENTENCE_END = re.compile(r"(?<=[.!?。])\s+")


@dataclass
class _Entity:
    """The names and facts of an entity of which mentions are made.

    Args:
        names (list of `str`): Its name and aliases, the most usual order of words first.
        sentences (list of `str`): Sentences of the description that hold one of its names.
        pieces (list of `str`): Sentences of the description without its names, and the values of its attributes.
    """

    names: list[str]
    sentences: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    def draw_pieces(self, number: int, counts: Counter[str], draw: random.Random) -> list[str]:
        """Draws up to `number` different pieces, the more often the fewer entities of a sample have them (`counts`)."""
        drawn = [(draw.random() ** (max(1, counts[piece]) ** 0.5), piece) for piece in self.pieces]
        return [piece for _, piece in sorted(drawn, reverse=True)[:number]]


def made_mentions(
    entities: datasets.Dataset, count: int, *, seed: int = 0, prefix: str = "made", chosen: Sequence[int] | None = None
) -> datasets.Dataset:
    """Makes mentions of entities from what the knowledge base says about them.

    The surface form is the name or an alias, a part of it (the last word, the first, some of its words), its initials with
    the last word, or nothing. The text is a sentence of the description with the surface form in place of the name, or up
    to three pieces of description and attributes around the surface form. In some texts another entity is named, or
    something that is true of another one is said. Names of the entity do not occur in the text beside the surface form.
    The image is a random one of the entity's. An entity of which nothing is known but its name is mentioned by its name.

    What is made of an entity depends on the seed, the entity and, for other entities in its texts, the knowledge base.

    Args:
        entities (`datasets.Dataset`): N entities.
        count (`int`): Mentions of each entity. Of two that are equal, one is left out.
        seed (`int`): Seed of all draws.
        prefix (`str`): Start of the ids of the mentions.
        chosen (sequence of `int`, *optional*): Rows of the entities to mention. Default: all.

    Returns:
        `datasets.Dataset` of up to N · `count` rows in the columns of [`~hf_mel.schema.mention_features`].
    """
    columns = entities.select_columns(["entity_id", "name", "aliases", "description", "attributes"])[:]

    def told(row: int) -> _Entity:
        return _entity(*(columns[name][row] for name in ("name", "aliases", "description", "attributes")))

    # Few are enough to say which pieces are common, and to be named beside others.
    sample = random.Random(seed).sample(range(len(entities)), min(len(entities), _SAMPLE))
    others = [told(row) for row in sample]
    counts = Counter(piece for other in others for piece in other.pieces)
    rows = range(len(entities)) if chosen is None else chosen
    images = entities.select_columns(["images"]).cast_column("images", datasets.List(datasets.Image(decode=False)))
    made = []
    for row in rows:
        entity_id, pictures = columns["entity_id"][row], images[row]["images"]
        draw, entity = random.Random(f"{seed} {prefix} {entity_id}"), told(row)
        seen = set()
        for number in range(count):
            text, start, end = _mention(entity, others, counts, draw)
            if (not text and not pictures) or (text, start, end) in seen:
                continue
            if not pictures:
                seen.add((text, start, end))
            made.append(
                {
                    "mention_id": f"{prefix}-{entity_id}-{number}",
                    "context_id": f"{prefix}-{entity_id}-{number}",
                    "text": text,
                    "mention": text[start:end] if start != NO_SPAN else "",
                    "start": start,
                    "end": end,
                    "mention_type": "",
                    "topic": "",
                    "image": draw.choice(pictures) if pictures else None,
                    "entity_id": entity_id,
                    "candidates": [],
                }
            )
    features = mention_features()
    return datasets.Dataset.from_dict(
        {column: [row[column] for row in made] for column in features}, features=features
    )


def look_alike_groups(names: Iterable[str], draw: random.Random) -> Iterator[list[int]]:
    """Yields the rows of entities whose names end in the same word, in random order of the groups.

    Groups with several members come alternately with single entities, so that any first part of them has both.

    Args:
        names (iterable of `str`): The name of each entity. "Turner, William" ends in "Turner".
        draw (`random.Random`): Source of the order.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        words = [word for word in WORD.findall(fold_name(_usual_order(name))) if word not in _SUFFIXES]
        groups[words[-1] if words else ""].append(row)
    several = [group for group in groups.values() if len(group) > 1]
    single = [group for group in groups.values() if len(group) == 1]
    draw.shuffle(several)
    draw.shuffle(single)
    while several or single:
        if several:
            group = several.pop()
            yield group
        for _ in range(min(len(group) if several else len(single), len(single))):
            yield single.pop()


def _entity(name: str, aliases: Sequence[str] | None, description: str | None, attributes: str | None) -> _Entity:
    names = [_usual_order(each) for each in (name, *(aliases or ())) if each and each.strip()]
    entity = _Entity(list(dict.fromkeys(names)) or [""])
    for sentence in _SENTENCE_END.split((description or "").strip()):
        sentence = sentence.strip().rstrip(".")
        if sentence and _find_name(sentence, entity.names):
            entity.sentences.append(sentence)
            sentence = without_names(sentence, entity.names)
        if sentence:
            entity.pieces.append(sentence)
    for fact in (attributes or "").split(". "):
        key, _, value = fact.strip().rstrip(".").rpartition(": ")
        values = [part.strip() for part in value.split(",") if part.strip()]
        entity.pieces += values if len(values) > 1 else [f"{key} {values[0]}".strip()] if values else []
    entity.pieces = [piece for piece in entity.pieces if any(map(str.isalnum, piece))]
    return entity


def _usual_order(name: str) -> str:
    """Returns "William Turner" for "Turner, William", and a name without a remark in brackets."""
    name = re.sub(r"\s*[(\[][^)\]]*[)\]]\s*$", "", name).strip() or name.strip()
    last, comma, first = (part.strip() for part in name.partition(","))
    return f"{first} {last}" if comma and first and last and "," not in first else name


def _mention(
    entity: _Entity, others: Sequence[_Entity], counts: Counter[str], draw: random.Random
) -> tuple[str, int, int]:
    """Draws a mention: its text, and start and end of its surface form, which are `NO_SPAN` without one."""
    surface = _surface(entity, draw)
    if entity.sentences and surface and draw.random() < 0.5:
        return _in_sentence(draw.choice(entity.sentences), surface, entity.names, draw)
    (number,) = draw.choices(list(_NUM_PIECES), weights=list(_NUM_PIECES.values()))
    number = max(number, 0 if surface else 2)
    pieces = [_shortened(piece, draw) for piece in entity.draw_pieces(number, counts, draw)]
    other = draw.choice(others)
    if other.names != entity.names and pieces and draw.random() < _OTHER_PIECE:
        pieces += [_shortened(piece, draw) for piece in other.draw_pieces(1, counts, draw)]
    if other.names != entity.names and surface and draw.random() < _OTHER_NAME:
        pieces.append(draw.choice(other.names))
    draw.shuffle(pieces)
    if not surface:
        return ", ".join(pieces), NO_SPAN, NO_SPAN
    if not pieces:
        return surface, 0, len(surface)
    layout = draw.choice(_LAYOUTS)
    if len(pieces) > 1 and draw.random() < 0.5:  # the surface form stands in the middle
        before, layout = pieces.pop(0), "{before}, " + layout
    else:
        before = ""
    text = layout.replace("{before}", before).replace("{pieces}", ", ".join(pieces))
    start = text.index("{mention}")
    return text.replace("{mention}", surface), start, start + len(surface)


def _surface(entity: _Entity, draw: random.Random) -> str:
    """Draws a surface form of an entity; empty for none, which only an entity has of which something is known."""
    kind = draw.choices(list(SURFACE_WEIGHTS), weights=list(SURFACE_WEIGHTS.values()))[0]
    if kind == "none":
        return "" if entity.pieces else entity.names[0]
    name = entity.names[0]
    if kind == "alias":
        return draw.choice(entity.names)
    words = [word.strip(",;") for word in name.split()]
    if len(words) > 2 and fold_name(words[-1]).strip(".") in _SUFFIXES:
        words.pop()
    if len(words) < 2 or kind == "whole":
        return name
    if kind == "last":
        return words[-1]
    if kind == "first":
        return words[0]
    given = words[:-1]
    if kind == "some":
        kept = sorted(draw.sample(range(len(given)), draw.randint(1, len(given))))
        return " ".join([*(given[k] for k in kept), words[-1]])
    count = draw.randint(1, len(given))
    return " ".join([*(f"{word[0].upper()}." for word in given[:count]), words[-1]])


def _in_sentence(sentence: str, surface: str, names: Sequence[str], draw: random.Random) -> tuple[str, int, int]:
    """Puts a surface form in place of the first name in a sentence, of which the words around it are kept."""
    start, end = _find_name(sentence, names) or (0, 0)
    before, after = without_names(sentence[:start], names).split(), without_names(sentence[end:], names).split()
    kept = draw.randint(_MAX_WORDS // 3, _MAX_WORDS)
    left = max(kept // 2, kept - len(after))
    head = " ".join(before[max(0, len(before) - left) :])
    joint = " " if head and not head.endswith(("(", "«", "“")) else ""
    tail = " ".join(after[:kept])
    space = "" if not tail or tail[0] in ",.;:!?)’'" else " "
    place = len(head) + len(joint)
    return f"{head}{joint}{surface}{space}{tail}", place, place + len(surface)


def _find_name(text: str, names: Sequence[str]) -> tuple[int, int] | None:
    """Returns where the first of the longest names in a text stands, or else the last word of a name."""
    for candidates in (names, [name.split()[-1] for name in names if len(name.split()) > 1]):
        for name in sorted(candidates, key=len, reverse=True):
            match = _whole_words(name).search(text) if len(name) > 1 else None
            if match:
                return match.span()
    return None


def without_names(text: str, names: Sequence[str]) -> str:
    """Returns a text without whole names, and without the first and last words of names of several words."""
    parts = {name for name in names if len(name) > 1}
    for name in list(parts):
        words = name.split()
        parts |= {word for word in (words[0], words[-1]) if len(words) > 1 and len(word) > 2}
    for part in sorted(parts, key=len, reverse=True):
        text = _whole_words(part).sub(" ", text)
    return " ".join(text.split())


def _whole_words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def _shortened(piece: str, draw: random.Random) -> str:
    """Returns at most so many neighbouring words of a piece as fit into a mention's text; years in place of dates."""
    words = piece.split()
    first = draw.randint(0, max(0, len(words) - _MAX_WORDS))
    shortened = " ".join(words[first : first + _MAX_WORDS])
    shortened = _DATE.sub(r"\1", shortened)
    return _YEARS.sub(lambda match: draw.choice([match[0], match[1], match[2]]), shortened)

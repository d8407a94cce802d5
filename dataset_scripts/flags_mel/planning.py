"""Plans the contexts, documents and posts from a seed, before any picture is drawn.

Two sets decide the stratum of a mention. The *text set* has the states and territories that match the surface and the
facts in the sentences. The *picture set* has those that match the flag in the photograph. Both sets include states and
territories outside the knowledge base.

- `text`: the text set is the gold alone. The photograph shows no flag, or is missing.
- `image`: the picture set is the gold alone. The sentences give no fact.
- `both`: each set has at least two members, and the gold is the only one in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from .countries import BY_QID, COUNTRIES, Country
from .flags import CROPS, FLAGS
from .look_alikes import difference, picture_set
from .photo import Shot
from .sentences import (
    ASIDES,
    CLUES,
    FILLERS,
    FOLLOW_UPS,
    GENERIC,
    LATER,
    LEADS,
    MEANINGS,
    POSTS,
    TOGETHER,
    UNSEEN_GENERIC,
    in_a_sentence,
    surfaces,
)

#: Mentions per split.
SPLIT_SIZES = {"train": 2400, "validation": 400, "test": 800}
#: Share of the mentions per stratum.
STRATA = {"text": 0.25, "image": 0.25, "both": 0.5}
#: Share of contexts with a gold outside the knowledge base.
NIL_SHARE = 0.05
#: Share of the other contexts of validation and test with a gold that never occurs in train.
UNSEEN_SHARE = 0.22
#: Share of the knowledge base that never occurs in train.
_HELD_OUT_SHARE = 0.18
#: A flag identifies its entity if every other flag differs on at least this share of the area.
_CLEARLY_DIFFERENT = 0.04

#: Possible numbers of contexts in a document, and of consecutive contexts about one state or territory.
_DOCUMENT_SIZES, _CONTEXTS_PER_SUBJECT = (4, 5, 6), (2, 3)

#: Share of the golds of `text` and `image` that are drawn from entities with namesakes ("Congo", "the Dominicans").
_NAMESAKE_SHARE = 0.35

_FACTS_OF_TEXT = (
    ("capital", "language"),
    ("capital", "currency"),
    ("capital", "continent"),
    ("capital", "currency", "language"),
    ("currency", "language"),
    ("currency", "region"),
    ("currency", "continent"),
)
_FACTS_OF_ASIDE = (("capital",), ("currency",), ("language",))
_FACTS_OF_BOTH = (
    (),
    ("continent",),
    ("continent",),
    ("region",),
    ("region",),
    ("language",),
    ("language",),
    ("currency",),
    ("currency",),
    ("language", "continent"),
    ("language", "currency"),
)

#: (key, value) pairs.
Facts = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlannedMention:
    """A mention in a context: its offsets, its surface, and the id of its gold, inside the knowledge base or not."""

    start: int
    end: int
    surface: str
    qid: str


@dataclass(frozen=True)
class Context:
    """Sentences with one to three mentions, and at most one photograph."""

    stratum: str
    topic: str
    text: str
    mentions: tuple[PlannedMention, ...]
    shot: Shot | None


@dataclass(frozen=True)
class Post:
    """A post about one state or territory, with or without a photograph."""

    qid: str
    text: str
    shot: Shot | None


def values(country: Country, key: str) -> tuple[str, ...]:
    """Returns the values of a fact: `"capital"`, `"currency"`, `"language"`, `"continent"` or `"region"`."""
    if key == "language":
        return country.languages
    value: str = getattr(country, key)
    return (value,) if value else ()


@cache
def _with_fact(key: str, value: str) -> frozenset[str]:
    return frozenset(country.qid for country in COUNTRIES if value in values(country, key))


@cache
def text_set(surface: str, facts: Facts) -> frozenset[str]:
    """Returns the ids that a surface can mean, given facts."""
    return MEANINGS[surface].intersection(*(_with_fact(key, value) for key, value in facts))


@cache
def _groups() -> tuple[tuple[str, ...], ...]:
    """Groups the countries of the knowledge base that share a name, a people or a look.

    A group is in train as a whole or not at all.
    """
    group = {country.qid: {country.qid} for country in COUNTRIES}
    sets = [MEANINGS[s] for c in COUNTRIES for s in surfaces(c)["family"]]
    sets += [picture_set(qid, "full") for qid in FLAGS]
    for members in sets:
        union = set().union(*(group[qid] for qid in members))
        for qid in union:
            group[qid] = union
    order = {country.qid: i for i, country in enumerate(COUNTRIES)}
    unique = {min(members, key=order.__getitem__): members for members in group.values()}
    in_kb = (
        tuple(sorted((qid for qid in members if BY_QID[qid].in_kb), key=order.__getitem__))
        for members in unique.values()
    )
    return tuple(members for members in in_kb if members)


def held_out(seed: int) -> frozenset[str]:
    """Returns the entities that are never a gold in train: three groups of namesakes or look-alikes, and single ones."""
    rng = Random(f"held out {seed}")
    groups = list(_groups())
    rng.shuffle(groups)
    pairs = [group for group in groups if 1 < len(group) < 4]
    singles = [group for group in groups if len(group) == 1]
    chosen = [qid for group in pairs[:3] for qid in group]
    size = round(_HELD_OUT_SHARE * sum(country.in_kb for country in COUNTRIES))
    chosen += [qid for group in singles[: size - len(chosen)] for qid in group]
    return frozenset(chosen)


@cache
def _decisive_flags() -> frozenset[str]:
    return frozenset(
        qid for qid in FLAGS if all(difference(qid, other) >= _CLEARLY_DIFFERENT for other in FLAGS if other != qid)
    )


#: Kind of surface → (surface, facts) pairs.
Options = dict[str, tuple[tuple[str, Facts], ...]]


@cache
def _text_options(qid: str, aside: bool = False) -> Options:
    """Returns the surfaces and facts that identify a country without a photograph.

    Args:
        qid (`str`): Wikidata id of the country.
        aside (`bool`): Use one fact, which fits beside the mention, and no generic surface.
    """
    options: dict[str, list[tuple[str, Facts]]] = {}
    for kind, surfaces_of_kind in surfaces(BY_QID[qid]).items():
        if aside and kind == "generic":
            continue
        for surface in surfaces_of_kind:
            for facts in _fact_choices(BY_QID[qid], _FACTS_OF_ASIDE if aside else _FACTS_OF_TEXT):
                if text_set(surface, facts) == {qid}:
                    options.setdefault(kind, []).append((surface, facts))
    return {kind: tuple(pairs) for kind, pairs in options.items()}


def _fact_choices(country: Country, key_choices: Sequence[tuple[str, ...]]) -> Iterable[Facts]:
    """Yields the facts of a country for each choice of keys, once for each combination of values."""
    for keys in key_choices:
        choices: list[Facts] = [()]
        for key in keys:
            choices = [(*facts, (key, value)) for facts in choices for value in values(country, key)]
        yield from choices


@cache
def _joint_options() -> dict[str, dict[str, Options]]:
    """Returns the options of stratum `both` by gold and crop: they identify the gold only together with the photograph.

    The text set and the picture set must each contain a second country that can be a gold of this stratum. Otherwise a
    model could learn from train that only one of two look-alikes is ever a gold.
    """
    golds = frozenset(FLAGS)
    while True:
        joint = {qid: _joint_options_among(qid, golds) for qid in FLAGS if qid in golds}
        joint = {qid: by_crop for qid, by_crop in joint.items() if by_crop}
        if len(joint) == len(golds):
            return joint
        golds = frozenset(joint)


def _joint_options_among(qid: str, golds: frozenset[str]) -> dict[str, Options]:
    country = BY_QID[qid]
    by_crop: dict[str, Options] = {}
    for crop in CROPS:
        look_alikes = picture_set(qid, crop)
        if len(picture_set(qid, crop, doubtful=False) & golds) < 2:
            continue
        options: dict[str, list[tuple[str, Facts]]] = {}
        for kind, surfaces_of_kind in surfaces(country).items():
            for surface in surfaces_of_kind:
                for facts in _fact_choices(country, _FACTS_OF_BOTH):
                    meanings = text_set(surface, facts)
                    if len(meanings & golds) > 1 and meanings & look_alikes == {qid}:
                        options.setdefault(kind, []).append((surface, facts))
        if options:
            by_crop[crop] = {kind: tuple(pairs) for kind, pairs in options.items()}
    return by_crop


@cache
def _possible_golds(stratum: str) -> frozenset[str]:
    """Returns the countries that can be the gold of a mention of this stratum."""
    if stratum == "text":
        return frozenset(country.qid for country in COUNTRIES if _text_options(country.qid))
    if stratum == "image":
        return _decisive_flags()
    return frozenset(_joint_options())


class _ContextWriter:
    """Joins sentences to one string and records the offsets of the mentions."""

    def __init__(self) -> None:
        self.text = ""
        self.mentions: list[PlannedMention] = []

    def add(self, sentence: str) -> None:
        """Appends a sentence."""
        self.text += (" " if self.text else "") + sentence

    def add_mention(self, template: str, surface: str, qid: str) -> None:
        """Appends a sentence with the mention in place of `{m}`."""
        before, _, after = template.partition("{m}")
        self.add(before.rstrip())
        self.place(surface, qid)
        self.text += after

    def place(self, surface: str, qid: str) -> None:
        """Appends a mention, capitalised at the start of a sentence."""
        if self.text and not self.text.endswith(" "):
            self.text += " "
        written = surface if self.text and self.text[-2:] != ". " else surface[0].upper() + surface[1:]
        start = len(self.text)
        self.text += written
        self.mentions.append(PlannedMention(start, len(self.text), surface, qid))


class _Planner:
    """Draws the contexts of one split."""

    def __init__(self, seed: int, split: str):
        self.rng = Random(f"{split} {seed}")
        self.split = split
        self.unseen = held_out(seed)
        in_kb = frozenset(country.qid for country in COUNTRIES if country.in_kb)
        pools = {"seen": in_kb - self.unseen, "unseen": self.unseen, "nil": frozenset(BY_QID) - in_kb}
        self.pools = {
            (stratum, name): sorted(_possible_golds(stratum) & pool)
            for stratum in STRATA
            for name, pool in pools.items()
        }

    def gold(self, stratum: str) -> str:
        """Draws a gold: outside the knowledge base, unseen in train, or seen."""
        pool = "seen"
        if self.rng.random() < NIL_SHARE:
            pool = "nil"
        elif self.split != "train" and self.rng.random() < UNSEEN_SHARE:
            pool = "unseen"
        golds = self.pools[stratum, pool] or self.pools[stratum, "seen"]  # some rare seeds hold out no look-alike
        if stratum != "both" and self.rng.random() < _NAMESAKE_SHARE:
            golds = [qid for qid in golds if surfaces(BY_QID[qid])["family"]] or golds
        return self.rng.choice(golds)

    def generic(self) -> str:
        """Draws a surface that can mean any country."""
        if self.split != "train" and self.rng.random() < 0.2:
            return self.rng.choice(UNSEEN_GENERIC)
        return self.rng.choice(GENERIC)

    def option(self, options: Options) -> tuple[str, Facts]:
        """Draws a surface and facts."""
        kind = "family" if "family" in options and self.rng.random() < 0.6 else self.rng.choice(sorted(options))
        surface, facts = self.rng.choice(options[kind])
        return (self.generic() if kind == "generic" else surface), facts

    def seed(self) -> int:
        """Draws the seed of a photograph."""
        return self.rng.getrandbits(48)

    def scene(self) -> Shot | None:
        """Draws a photograph without a flag, or none."""
        return Shot(self.seed()) if self.rng.random() < 0.55 else None

    def context(self, stratum: str, mentions: int) -> Context:
        """Draws a context with at most this many mentions."""
        rng = self.rng
        if stratum == "text" and mentions > 1 and rng.random() < 0.5:
            return self.together(mentions)
        qid = self.gold(stratum)
        shot: Shot | None
        facts: Facts = ()
        if stratum == "text":
            surface, facts = self.option(_text_options(qid))
            shot = self.scene()
        elif stratum == "image":
            families = surfaces(BY_QID[qid])["family"]
            surface = rng.choice(families) if families and rng.random() < 0.7 else self.generic()
            shot = Shot(self.seed(), qid)
        else:
            crops = _joint_options()[qid]
            cut = [crop for crop in crops if crop != "full"]
            crop = "full" if "full" in crops and (not cut or rng.random() < 0.7) else rng.choice(cut)
            surface, facts = self.option(crops[crop])
            shot = Shot(self.seed(), qid, crop, mirrored=rng.random() < 0.5)

        topic = rng.choice(sorted(LEADS))
        clues = [rng.choice(CLUES[key]).format(v=in_a_sentence(value)) for key, value in facts]
        if rng.random() < 0.5:
            clues.append(rng.choice(FILLERS))
        rng.shuffle(clues)
        writer = _ContextWriter()
        if clues and rng.random() < 0.3:
            writer.add(clues.pop())
        writer.add_mention(rng.choice(LEADS[topic]), surface, qid)
        for clue in clues:
            writer.add(clue)
        follow_ups = zip(rng.sample(FOLLOW_UPS, mentions - 1), rng.sample(LATER, mentions - 1), strict=True)
        for template, surface in follow_ups:
            writer.add_mention(template, surface, qid)
        return Context(stratum, topic, writer.text, tuple(writer.mentions), shot)

    def together(self, mentions: int) -> Context:
        """Draws a sentence with mentions of different golds, each with another surface and fact."""
        rng = self.rng
        chosen: list[tuple[str, str, Facts]] = []
        while len(chosen) < mentions:
            qid = self.gold("text")
            options = _text_options(qid, aside=True)
            if not options:
                continue
            surface, facts = self.option(options)
            if all(not MEANINGS[surface] & MEANINGS[other] for other, _, _ in chosen):
                chosen.append((surface, qid, facts))
        writer = _ContextWriter()
        if rng.random() < 0.4:
            writer.add(rng.choice(FILLERS))
        template = rng.choice(TOGETHER[mentions])
        for i, (surface, qid, ((key, value),)) in enumerate(chosen):
            before, _, template = template.partition(f"{{{i}}}")
            writer.text += before
            writer.place(surface, qid)
            writer.text += " " + rng.choice(ASIDES[key]).format(v=value)
        writer.text += template
        return Context("text", "", writer.text, tuple(writer.mentions), self.scene())


def plan_mentions(seed: int, split: str) -> list[Context]:
    """Plans the contexts of a split, with `SPLIT_SIZES[split]` mentions in total."""
    planner = _Planner(seed, split)
    size = SPLIT_SIZES[split]
    remaining = {stratum: round(size * share) for stratum, share in STRATA.items()}
    contexts = []
    while any(remaining.values()):
        stratum = max(remaining, key=lambda name: (remaining[name] / STRATA[name], name))
        mentions = min(planner.rng.choices((1, 2, 3), (0.6, 0.28, 0.12))[0], remaining[stratum])
        context = planner.context(stratum, mentions)
        remaining[stratum] -= len(context.mentions)
        contexts.append(context)
    planner.rng.shuffle(contexts)
    return contexts


def plan_documents(seed: int, split: str) -> list[list[int]]:
    """Plans the documents of a split, each as the numbers of its contexts in `plan_mentions(seed, split)`.

    Every context is in one document. A document has four to six contexts (the last document of a split may have fewer):
    up to two or three about one state or territory, then about the next. So its sentences and photographs share their
    subjects, and some of them identify a subject that others leave ambiguous.
    """
    rng = Random(f"documents {split} {seed}")
    contexts = plan_mentions(seed, split)
    contexts_about: dict[str, list[int]] = {}
    for number, context in enumerate(contexts):
        for qid in dict.fromkeys(mention.qid for mention in context.mentions):
            contexts_about.setdefault(qid, []).append(number)
    remaining = dict.fromkeys(range(len(contexts)))
    documents: list[list[int]] = []
    while remaining:
        document: list[int] = []
        size = rng.choice(_DOCUMENT_SIZES)
        while remaining and len(document) < size:
            subject = contexts[next(iter(remaining))].mentions[0].qid
            unused = [number for number in contexts_about[subject] if number in remaining]
            chosen = unused[: min(rng.choice(_CONTEXTS_PER_SUBJECT), size - len(document))]
            document += chosen
            for number in chosen:
                del remaining[number]
        documents.append(sorted(document))
    return documents


def plan_posts(seed: int) -> list[Post]:
    """Plans four to eight posts about every entity of the knowledge base."""
    rng = Random(f"posts {seed}")
    posts = []
    for number, country in enumerate(country for country in COUNTRIES if country.in_kb):
        templates = [template for template in POSTS if country.capital or "{capital}" not in template]
        # The number of posts is the same for every seed.
        for template in rng.sample(templates, 4 + number % 5):
            text = template.format(
                name=country.name,
                capital=country.capital,
                currency=country.currency,
                region=in_a_sentence(country.region),
                language=rng.choice(country.languages),
            )
            kind = rng.random()
            shot = Shot(rng.getrandbits(48), country.qid if kind < 0.5 else None) if kind < 0.75 else None
            posts.append(Post(country.qid, text, shot))
    return posts

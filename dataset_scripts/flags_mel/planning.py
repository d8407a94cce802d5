"""Who is mentioned where: the plan of every context, from a seed, before any picture is taken.

Two sets decide the stratum of a mention. The *text set* holds the states and territories that the surface and the facts
in the sentences leave open; the *picture set* those whose flags look like this in the photograph. Both are taken over
the whole world of the data set, inside the knowledge base or not:

- `text`: the text set is the gold alone, the picture shows no flag (or there is none);
- `image`: the picture set is the gold alone, the sentences give no fact;
- `both`: each set has two members or more, and the gold is the only one in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from .countries import BY_QID, COUNTRIES, Country
from .flags import CROPS, FLAGS, difference, picture_set
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
#: Share of contexts whose gold is outside the knowledge base.
NIL_SHARE = 0.05
#: Share of the other contexts of validation and test whose gold never occurs in train.
UNSEEN_SHARE = 0.22
#: Share of the knowledge base that never occurs in train.
_HELD_OUT_SHARE = 0.18
#: A flag alone decides if every other one differs on this share of its area at least.
_CLEARLY_DIFFERENT = 0.04

#: Contexts of a document, and how many of them at most are about one state or territory before the next one's turn.
_DOCUMENT_SIZES, _SUBJECT_SIZES = (4, 5, 6), (2, 3)

#: Share of the golds of `text` and `image` that are drawn among those with namesakes ("Congo", "the Dominicans").
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

Facts = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlannedMention:
    """A mention in a context: its surface where it stands, the id of what it means, inside the KB or not."""

    start: int
    end: int
    surface: str
    qid: str


@dataclass(frozen=True)
class Context:
    """A text with one to three mentions and at most one photograph."""

    stratum: str
    topic: str
    text: str
    mentions: tuple[PlannedMention, ...]
    shot: Shot | None


@dataclass(frozen=True)
class Post:
    """A text with or without a photograph about one state or territory."""

    qid: str
    text: str
    shot: Shot | None


def values(country: Country, key: str) -> tuple[str, ...]:
    """The values of a fact: `"capital"`, `"currency"`, `"language"`, `"continent"` or `"region"`."""
    if key == "language":
        return country.languages
    value: str = getattr(country, key)
    return (value,) if value else ()


@cache
def _having(key: str, value: str) -> frozenset[str]:
    return frozenset(country.qid for country in COUNTRIES if value in values(country, key))


@cache
def text_set(surface: str, facts: Facts) -> frozenset[str]:
    """What a surface can mean, given facts as (key, value) pairs."""
    return MEANINGS[surface].intersection(*(_having(key, value) for key, value in facts))


@cache
def _groups() -> tuple[tuple[str, ...], ...]:
    """Countries of the KB that share a name, a people or a look belong together: train has all of a group or none."""
    group = {country.qid: {country.qid} for country in COUNTRIES}
    sets = [MEANINGS[s] for c in COUNTRIES for s in surfaces(c)["family"]]
    sets += [picture_set(qid, "full") for qid in FLAGS]
    for members in sets:
        union = set().union(*(group[qid] for qid in members))
        for qid in union:
            group[qid] = union
    order = {country.qid: i for i, country in enumerate(COUNTRIES)}
    unique = {min(members, key=order.__getitem__): members for members in group.values()}
    kept = (tuple(sorted((q for q in g if BY_QID[q].in_kb), key=order.__getitem__)) for g in unique.values())
    return tuple(members for members in kept if members)


def held_out(seed: int) -> frozenset[str]:
    """The entities that are never a gold in train: three groups of namesakes or look-alikes, the rest single ones."""
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
        q for q in FLAGS if all(difference(q, other) >= _CLEARLY_DIFFERENT for other in FLAGS if other != q)
    )


Options = dict[str, tuple[tuple[str, Facts], ...]]  # by kind of surface: (surface, facts)


@cache
def _text_options(qid: str, aside: bool = False) -> Options:
    """The surfaces and facts after which the text leaves this country alone.

    Args:
        qid (`str`): Wikidata id.
        aside (`bool`): One fact that fits beside the mention, and no surface that can mean anyone.
    """
    options: dict[str, list[tuple[str, Facts]]] = {}
    for kind, of_kind in surfaces(BY_QID[qid]).items():
        if aside and kind == "generic":
            continue
        for surface in of_kind:
            for facts in _fact_choices(BY_QID[qid], _FACTS_OF_ASIDE if aside else _FACTS_OF_TEXT):
                if text_set(surface, facts) == {qid}:
                    options.setdefault(kind, []).append((surface, facts))
    return {kind: tuple(found) for kind, found in options.items()}


def _fact_choices(country: Country, keys_of: Sequence[tuple[str, ...]]) -> Iterable[Facts]:
    for keys in keys_of:
        chosen: list[Facts] = [()]
        for key in keys:
            chosen = [(*facts, (key, value)) for facts in chosen for value in values(country, key)]
        yield from chosen


@cache
def _joint_options() -> dict[str, dict[str, Options]]:
    """By gold, crop and kind of surface: the (surface, facts) that decide together with the picture, and only together.

    Each of the two sets must hold a second country that can be a gold of this stratum. Otherwise a model could learn
    from train that of two look-alikes only one is ever asked for.
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
        looks = picture_set(qid, crop)
        if len(picture_set(qid, crop, doubtful=False) & golds) < 2:
            continue
        options: dict[str, list[tuple[str, Facts]]] = {}
        for kind, of_kind in surfaces(country).items():
            for surface in of_kind:
                for facts in _fact_choices(country, _FACTS_OF_BOTH):
                    open_to = text_set(surface, facts)
                    if len(open_to & golds) > 1 and open_to & looks == {qid}:
                        options.setdefault(kind, []).append((surface, facts))
        if options:
            by_crop[crop] = {kind: tuple(found) for kind, found in options.items()}
    return by_crop


@cache
def _candidates_for(stratum: str) -> frozenset[str]:
    """The countries that can be the gold of a mention of this stratum."""
    if stratum == "text":
        return frozenset(country.qid for country in COUNTRIES if _text_options(country.qid))
    if stratum == "image":
        return _decisive_flags()
    return frozenset(_joint_options())


class _Writer:
    """Puts sentences together and keeps the offsets of the mentions."""

    def __init__(self) -> None:
        self.text = ""
        self.mentions: list[PlannedMention] = []

    def add(self, sentence: str) -> None:
        self.text += (" " if self.text else "") + sentence

    def add_mention(self, template: str, surface: str, qid: str) -> None:
        before, _, after = template.partition("{m}")
        self.add(before.rstrip())
        self.place(surface, qid)
        self.text += after

    def place(self, surface: str, qid: str) -> None:
        if self.text and not self.text.endswith(" "):
            self.text += " "
        written = surface if self.text and self.text[-2:] != ". " else surface[0].upper() + surface[1:]
        start = len(self.text)
        self.text += written
        self.mentions.append(PlannedMention(start, len(self.text), surface, qid))


class _Planner:
    def __init__(self, seed: int, split: str):
        self.rng = Random(f"{split} {seed}")
        self.split = split
        self.unseen = held_out(seed)
        in_kb = frozenset(country.qid for country in COUNTRIES if country.in_kb)
        pools = {"seen": in_kb - self.unseen, "unseen": self.unseen, "nil": frozenset(BY_QID) - in_kb}
        self.pools = {
            (stratum, name): sorted(_candidates_for(stratum) & pool)
            for stratum in STRATA
            for name, pool in pools.items()
        }

    def gold(self, stratum: str) -> str:
        pool = "seen"
        if self.rng.random() < NIL_SHARE:
            pool = "nil"
        elif self.split != "train" and self.rng.random() < UNSEEN_SHARE:
            pool = "unseen"
        golds = self.pools[stratum, pool] or self.pools[stratum, "seen"]  # a rare seed holds out no look-alike
        if stratum != "both" and self.rng.random() < _NAMESAKE_SHARE:
            golds = [qid for qid in golds if surfaces(BY_QID[qid])["family"]] or golds
        return self.rng.choice(golds)

    def generic(self) -> str:
        if self.split != "train" and self.rng.random() < 0.2:
            return self.rng.choice(UNSEEN_GENERIC)
        return self.rng.choice(GENERIC)

    def option(self, options: Options) -> tuple[str, Facts]:
        kind = "family" if "family" in options and self.rng.random() < 0.6 else self.rng.choice(sorted(options))
        surface, facts = self.rng.choice(options[kind])
        return (self.generic() if kind == "generic" else surface), facts

    def seed(self) -> int:
        return self.rng.getrandbits(48)

    def scene(self) -> Shot | None:
        return Shot(self.seed()) if self.rng.random() < 0.55 else None

    def context(self, stratum: str, mentions: int) -> Context:
        """One context with at most this many mentions."""
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
        writer = _Writer()
        if clues and rng.random() < 0.3:
            writer.add(clues.pop())
        writer.add_mention(rng.choice(LEADS[topic]), surface, qid)
        for clue in clues:
            writer.add(clue)
        later = zip(rng.sample(FOLLOW_UPS, mentions - 1), rng.sample(LATER, mentions - 1), strict=True)
        for template, surface in later:
            writer.add_mention(template, surface, qid)
        return Context(stratum, topic, writer.text, tuple(writer.mentions), shot)

    def together(self, mentions: int) -> Context:
        """Mentions of different golds in one sentence, each with a surface and a fact of its own."""
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
        writer = _Writer()
        if rng.random() < 0.4:
            writer.add(rng.choice(FILLERS))
        template = rng.choice(TOGETHER[mentions])
        for i, (surface, qid, ((key, value),)) in enumerate(chosen):
            between, _, template = template.partition(f"{{{i}}}")
            writer.text += between
            writer.place(surface, qid)
            writer.text += " " + rng.choice(ASIDES[key]).format(v=value)
        writer.text += template
        return Context("text", "", writer.text, tuple(writer.mentions), self.scene())


def plan_mentions(seed: int, split: str) -> list[Context]:
    """The contexts of a split, `SPLIT_SIZES[split]` mentions in all."""
    planner = _Planner(seed, split)
    size = SPLIT_SIZES[split]
    left = {stratum: round(size * share) for stratum, share in STRATA.items()}
    contexts = []
    while any(left.values()):
        stratum = max(left, key=lambda name: (left[name] / STRATA[name], name))
        mentions = min(planner.rng.choices((1, 2, 3), (0.6, 0.28, 0.12))[0], left[stratum])
        context = planner.context(stratum, mentions)
        left[stratum] -= len(context.mentions)
        contexts.append(context)
    planner.rng.shuffle(contexts)
    return contexts


def plan_documents(seed: int, split: str) -> list[list[int]]:
    """The contexts of each document, as numbers in `plan_mentions(seed, split)`; every context is in one document.

    A document holds four to six contexts (the last one of a split what is left): two or three about one state or
    territory, as long as there are so many, then about the next. So sentences and photographs of a document are about
    the same ones, some that tell them and some that leave them open.
    """
    rng = Random(f"documents {split} {seed}")
    contexts = plan_mentions(seed, split)
    about: dict[str, list[int]] = {}
    for number, context in enumerate(contexts):
        for qid in dict.fromkeys(mention.qid for mention in context.mentions):
            about.setdefault(qid, []).append(number)
    left = dict.fromkeys(range(len(contexts)))
    documents: list[list[int]] = []
    while left:
        document: list[int] = []
        size = rng.choice(_DOCUMENT_SIZES)
        while left and len(document) < size:
            subject = contexts[next(iter(left))].mentions[0].qid
            others = [number for number in about[subject] if number in left]
            chosen = others[: min(rng.choice(_SUBJECT_SIZES), size - len(document))]
            document += chosen
            for number in chosen:
                del left[number]
        documents.append(sorted(document))
    return documents


def plan_posts(seed: int) -> list[Post]:
    """Four to eight posts about every entity of the knowledge base."""
    rng = Random(f"posts {seed}")
    posts = []
    for number, country in enumerate(country for country in COUNTRIES if country.in_kb):
        templates = [template for template in POSTS if country.capital or "{capital}" not in template]
        # How many is the same for every seed, so that the number of rows is.
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

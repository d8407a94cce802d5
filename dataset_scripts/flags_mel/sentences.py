"""The words of FlagsMEL: templates of sentences, and ambiguous surfaces with their meanings.

Sentences are in the past tense and have no pronoun for the mention, so that a name, a people and a nominal all fit.
"""

from __future__ import annotations

from functools import cache

from .countries import COUNTRIES, Country

#: Nominals that can mean any country, for a first mention.
GENERIC = (
    "the hosts",
    "the visitors",
    "the guests",
    "the newcomers",
    "the favourites",
    "the champions",
    "the organisers",
)
#: More of these nominals, for validation and test only.
UNSEEN_GENERIC = ("the underdogs", "the travellers", "the neighbours")
#: Nominals for a later mention of the same country.
LATER = ("the side", "the team", "the party", "the group", "the delegation", "the contingent")

_REGION_PEOPLE = {
    "Western Africa": "the West Africans",
    "Eastern Africa": "the East Africans",
    "Northern Africa": "the North Africans",
    "Southern Africa": "the southern Africans",
    "Northern Europe": "the Northern Europeans",
    "Western Europe": "the Western Europeans",
    "Eastern Europe": "the Eastern Europeans",
    "Southern Europe": "the Southern Europeans",
    "South-eastern Asia": "the Southeast Asians",
    "Southern Asia": "the South Asians",
    "Eastern Asia": "the East Asians",
    "Western Asia": "the West Asians",
    "South America": "the South Americans",
    "Central America": "the Central Americans",
    "Caribbean": "the Caribbeans",
    "Micronesia": "the Micronesians",
    "Polynesia": "the Polynesians",
}
_CONTINENT_PEOPLE = {"Africa": "the Africans", "Europe": "the Europeans", "Asia": "the Asians"}
#: Names of peoples that two or more countries share.
_SHARED_PEOPLE = {
    country.people for country in COUNTRIES if sum(other.people == country.people for other in COUNTRIES) > 1
}


@cache
def surfaces(country: Country) -> dict[str, tuple[str, ...]]:
    """Returns all surfaces that can mean a country, by kind.

    The kinds are `family` (a shared name or a shared people), `form` ("the kingdom", "the islands"), `people` ("the
    Africans") and `generic` ([`GENERIC`], without [`UNSEEN_GENERIC`]).
    """
    family: tuple[str, ...] = (country.family,) if country.family else ()
    if country.people in _SHARED_PEOPLE:
        family += (f"the {country.people}",)
    people = (_REGION_PEOPLE.get(country.region, ""), _CONTINENT_PEOPLE.get(country.continent, ""))
    return {
        "family": family,
        "form": (f"the {country.form}", *(["the islands"] if country.islands else [])),
        "people": tuple(surface for surface in people if surface),
        "generic": GENERIC,
    }


def _meanings() -> dict[str, frozenset[str]]:
    meanings: dict[str, set[str]] = {
        surface: {country.qid for country in COUNTRIES} for surface in (*GENERIC, *UNSEEN_GENERIC, *LATER)
    }
    for country in COUNTRIES:
        for surfaces_of_kind in surfaces(country).values():
            for surface in surfaces_of_kind:
                meanings.setdefault(surface, set()).add(country.qid)
    return {surface: frozenset(qids) for surface, qids in meanings.items()}


#: Surface → ids of all states and territories that it can mean, inside the knowledge base or not.
MEANINGS: dict[str, frozenset[str]] = _meanings()


_PEOPLES = {f"the {country.people}" for country in COUNTRIES} | {*_REGION_PEOPLE.values(), *_CONTINENT_PEOPLE.values()}


def mention_type(surface: str) -> str:
    """Returns the type of a surface: `"name"`, `"demonym"` or `"nominal"`."""
    if not surface.startswith("the "):
        return "name"
    return "demonym" if surface in _PEOPLES else "nominal"


#: First sentences by topic. `{m}` is the mention.
LEADS: dict[str, tuple[str, ...]] = {
    "sport": (
        "{m} walked out first and saved the applause for later.",
        "Two late goals sent {m} through to the next round.",
        "The referee let {m} restart from the halfway line.",
        "Nobody in the press box had expected {m} to hold on.",
        "{m} took bronze in the relay and danced on the track.",
        "A penalty in added time was enough for {m}.",
        "The coach of {m} refused to name a line-up.",
        "After the final whistle {m} stayed on the grass to sing.",
        "{m} trained behind a fence the day before the semi-final.",
        "Our seats were right above the bench of {m}.",
    ),
    "politics": (
        "Talks with {m} resumed behind closed doors.",
        "The minister thanked {m} for a frank exchange.",
        "{m} abstained when the motion came to a vote.",
        "A treaty with {m} was signed shortly before midnight.",
        "Observers said {m} had moved further than planned.",
        "The envoy of {m} left through the side entrance.",
        "{m} asked for more time to read the draft.",
        "For once {m} spoke before the chair did.",
        "The letter from {m} arrived a day late.",
    ),
    "culture": (
        "The parade ended with {m} and forty drums.",
        "A choir sang before {m} took the stage.",
        "At the festival {m} showed a film about a fisherman.",
        "{m} won the prize for the best costume.",
        "The cooks of {m} ran out of bread by noon.",
        "The exhibition opened with a speech on behalf of {m}.",
        "Everybody wanted a picture with {m}.",
        "{m} closed the evening with a very slow waltz.",
    ),
    "trade": (
        "{m} ordered forty buses from the same factory.",
        "The fair gave {m} the corner stand this year.",
        "A shipment for {m} was held at the port.",
        "The cooperative sold its coffee to {m} again.",
        "{m} paid for the new bridge in advance.",
        "Engineers from the firm spent a month with {m}.",
        "The contract with {m} runs for nine years.",
        "{m} turned down the second offer as well.",
    ),
}

#: Sentences for a later mention of the same country.
FOLLOW_UPS = (
    "By then {m} had stopped counting the cameras.",
    "Later {m} posed for photographs.",
    "It was a long evening for {m}.",
    "Nobody could say what {m} would do next.",
    "The crowd gave {m} a warm welcome.",
    "Afterwards {m} thanked the volunteers.",
    "A spokesman for {m} declined to comment.",
    "{m} promised to come back next year.",
    "The local paper put {m} on its front page.",
    "Even so, {m} looked pleased.",
    "Someone had saved a table for {m}.",
)

#: Sentences without information about the gold.
FILLERS = (
    "The evening was mild.",
    "It had rained all morning.",
    "We got there an hour early.",
    "The trains were full.",
    "A brass band played at the gate.",
    "The queue went round the block.",
    "Somebody had forgotten the keys.",
    "There was tea for everyone.",
)

#: Sentences that reveal one fact `{v}` about the gold, by fact.
CLUES: dict[str, tuple[str, ...]] = {
    "capital": (
        "In {v}, the capital, people followed it on the radio.",
        "The news reached {v} within minutes.",
        "A plane was waiting to fly everyone home to {v}.",
        "Crowds gathered in the streets of {v}.",
        "The government in {v} sent a telegram.",
        "Back in {v} the schools closed early.",
    ),
    "currency": (
        "The bonus was paid in the local currency, the {v}.",
        "Back home the currency is the {v}.",
        "One {v} was all it had cost.",
        "The {v} rose a little that day.",
        "Nobody at the station would take the {v}.",
    ),
    "language": (
        "The speeches were in {v}.",
        "Everyone around me was speaking {v}.",
        "The banner was written in {v}.",
        "The radio commentary in {v} went on for hours.",
        "They sang the anthem in {v}.",
    ),
    "continent": (
        "Papers all over {v} carried the story.",
        "Nobody else from {v} was left by then.",
        "It was a proud day for {v}.",
        "The rest of {v} had gone home already.",
    ),
    "region": (
        "Neighbours across {v} sent their congratulations.",
        "Few in {v} had seen it coming.",
        "It was a first for {v}.",
        "Everywhere else in {v} it was a quiet day.",
    ),
}


def in_a_sentence(value: str) -> str:
    """Returns the value of a fact with the article that it needs in a sentence."""
    return "the Caribbean" if value == "Caribbean" else value


#: Sentences with two or three mentions of different golds, each of which is followed by a fact.
TOGETHER: dict[int, tuple[str, ...]] = {
    2: (
        "{0} drew with {1} after extra time.",
        "{0} shared a table with {1} at the dinner.",
        "{0} sold two ferries to {1} in spring.",
        "{0} asked {1} to chair the session.",
        "{0} marched right behind {1} at the opening.",
    ),
    3: (
        "{0} finished ahead of {1} and {2} on points.",
        "{0} joined {1} and {2} in the vote.",
        "{0} rehearsed with {1} before {2} arrived.",
    ),
}

#: Words for the fact after a mention in such a sentence.
ASIDES: dict[str, tuple[str, ...]] = {
    "capital": ("(capital {v})", "(governed from {v})", "(flying home to {v})"),
    "currency": ("(where the {v} is the currency)", "(currency {v})"),
    "language": ("(speaking {v})", "(where they speak {v})"),
}

#: Posts about a state or territory, with placeholders for its name and facts.
POSTS = (
    "Good morning from {capital}!",
    "Flag day in {name}: the whole street is out.",
    "The market here takes nothing but the {currency}, so bring cash.",
    "My {language} is getting better, one song at a time.",
    "First snow, first sun, first bus: {capital} at six in the morning.",
    "Is there anywhere in {region} with better bread than {name}?",
    "We hung a flag of {name} over the balcony for the match.",
    "Landed in {name}. Someone please teach me some {language}.",
    "Down to my last {currency} and the museum is not even free.",
    "A week in {name} and I have not met one rude person.",
    "Night train to {capital}, window seat, no regrets.",
    "The radio plays nothing but old {language} songs tonight.",
    "Proud of {name} today, win or lose.",
)

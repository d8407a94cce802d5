"""The gazetteer: names in texts, at word boundaries, with rules of case and a learned floor."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_mel.detection.detectors import open_detector
from hf_mel.detection.folded_words import folded_words
from hf_mel.detection.gazetteer import Gazetteer
from hf_mel.detection.spans import resolve_overlaps
from hf_mel.errors import DataFormatError, UnknownModelError
from hf_mel.names import fold_name


def surfaces(gazetteer, text):
    return [text[span.start : span.end] for span in gazetteer([text])[0]]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("Ghana", "Ghana's team and Ghanaians; GHANA!", ["Ghana", "GHANA"]),
        ("Turkey", "We ate a turkey in Turkey. TURKEY!", ["Turkey", "TURKEY"]),
        ("US", "Let us go to the US. Us?", ["US"]),
        ("NATO", "Nato and NATO, not nato", ["Nato", "NATO"]),
        ("The Hague", "in the Hague, the hague", ["the Hague"]),
        ("The Who", "The who's who saw the Who", ["the Who"]),
        ("iPhone", "an iPhone, an IPHONE, an iphone", ["iPhone", "IPHONE"]),
        ("paris", "paris, Paris", ["paris", "Paris"]),  # the names of this knowledge base have no capitals
        ("Côte d'Ivoire", "Cote d’Ivoire and CÔTE D'IVOIRE", ["Cote d’Ivoire", "CÔTE D'IVOIRE"]),
        ("Guinea-Bissau", "Guinea–Bissau", ["Guinea–Bissau"]),
        ("New York", "New\n  York, New, York", ["New\n  York"]),
        (
            "Fred (footballer, born 1979)",
            "Fred (footballer, born 1979), Fred",
            ["Fred (footballer, born 1979)", "Fred"],
        ),
        ("Diyarbakır", "DİYARBAKIR", ["DİYARBAKIR"]),
        ("Straße", "STRASSE", ["STRASSE"]),
        ("東京", "私は東京都へ行く", ["東京"]),
        ("서울", "서울에서 동서울까지", ["서울"]),
        ("กรุงเทพ", "ไปกรุงเทพมหานคร", ["กรุงเทพ"]),
        ("हिन्दी", "यह हिन्दी है।", ["हिन्दी"]),
        ("باريس", "في \u202bباريس\u202c اليوم", ["باريس"]),
        ("می‌خواهم", "می‌خواهم", ["می‌خواهم"]),
        ("Wham!", "Wham!, Wham", ["Wham!"]),
        ("AT&T", "AT & T, AT&T", ["AT & T", "AT&T"]),
        ("𝒢hana", "😀 Ghana 😀", ["Ghana"]),
    ],
)
def test_names_are_found_as_they_are_written(name, text, expected):
    assert surfaces(Gazetteer([name]), text) == expected


def test_decomposed_accents_belong_to_the_span():
    text = unicodedata.normalize("NFD", "Die Universität São Tomé.")
    assert surfaces(Gazetteer(["São Tomé"]), text) == [unicodedata.normalize("NFD", "São Tomé")]


def test_the_longest_name_is_found():
    gazetteer = Gazetteer(["New York", "New York Times", "York", "Times Square"])
    assert surfaces(gazetteer, "The New York Times of York") == ["New York Times", "York"]


def test_names_inside_longer_ones_are_given_where_overlaps_are_asked_for():
    text = "The New York Times of York"
    gazetteer = Gazetteer(["New York", "New York Times", "York", "Times Square"])
    (spans,) = gazetteer.with_overlaps([text])
    assert sorted(text[span.start : span.end] for span in spans) == ["New York", "New York Times", "York", "York"]


@pytest.mark.parametrize("text", ["", "   ", "😀😀", "\ud800 \x00 \x1f", "x" * 1_000_000, "١٢٣"])
def test_odd_texts_have_no_names(text):
    assert Gazetteer(["Ghana"])([text]) == [[]]


def test_a_name_in_a_long_text_without_a_space():
    text = "中" * 100_000 + "東京" + "中" * 100_000
    assert surfaces(Gazetteer(["東京"]), text) == ["東京"]


def test_short_names_and_numbers_are_no_names():
    assert surfaces(Gazetteer(["A", "1984", "C-", "Oslo"]), "A 1984 C- Oslo") == ["Oslo"]


def test_names_without_a_usable_one_are_refused():
    with pytest.raises(DataFormatError, match="no names"):
        Gazetteer(["A", "", "1984"])


def test_case_can_be_ignored():
    assert surfaces(Gazetteer(["Paris", "US"], ignore_case=True), "paris and us") == ["paris", "us"]


def test_a_knowledge_base_without_aliases():
    class Kb:
        def names(self):
            return [["Entity a"], ["Entity b"], ["Entity c", "Entity sea"]]

    assert surfaces(Gazetteer.from_kb(Kb()), "Entity b met Entity zz") == ["Entity b"]


NAMES = st.lists(
    st.text("ab é", min_size=2, max_size=5).filter(lambda name: len(fold_name(name).replace(" ", "")) > 1)
)


@settings(max_examples=200)
@given(NAMES.filter(bool), st.lists(st.text("ab é-中.", max_size=30), min_size=1, max_size=4))
@example(["a b"], ["a  b a b"])
def test_a_regular_expression_finds_the_same(names, texts):
    gazetteer = Gazetteer(names)
    batched = gazetteer(texts)
    for text, spans in zip(texts, batched, strict=True):
        folded = text.replace("é", "e").replace("中", "|")  # of equal length; a Chinese letter ends a word
        matches = []
        for name in names:
            pattern = r"\s+".join(map(re.escape, fold_name(name).split()))
            for match in re.finditer(rf"(?<![a-z])(?=({pattern})(?![a-z]))", folded):
                matches.append((match.start(1), match.end(1)))
        expected = resolve_overlaps([type(spans[0])(*match) for match in matches] if matches and spans else [])
        assert bool(matches) == bool(spans)
        assert spans == expected
        assert gazetteer([text]) == [spans]  # a text alone


@given(st.text())
def test_places_are_those_of_the_text(text):
    words = folded_words(text)
    assert len(words.words) == len(words.starts) == len(words.ends)
    for word, start, end in zip(words.words, words.starts, words.ends, strict=True):
        assert 0 <= start < end <= len(text)
        assert word in "".join(folded_words(text[start:end]).words)
        assert not any(character.isspace() for character in word)
    assert words.starts == sorted(words.starts)


@given(st.text(max_size=20))
def test_a_name_is_found_in_its_own_text(name):
    try:
        gazetteer = Gazetteer([name])
    except DataFormatError:
        return
    assert gazetteer([name])[0]


def rows(*marked):
    """Mentions of texts in which they are in square brackets."""
    for text in marked:
        plain = text.replace("[", "").replace("]", "")
        for match in re.finditer(r"\[(.*?)\]", text):
            start = match.start() - text[: match.start()].count("[") - text[: match.start()].count("]")
            yield {"text": plain, "mention": match[1], "start": start, "end": start + len(match[1])}


def test_link_probabilities_are_learned():
    training = list(rows("[Essen] hat Essen.", "Das Essen in [Bonn].", "[Bonn], [die Stadt]"))
    gazetteer = Gazetteer(["Essen", "Bonn", "Köln"], training=training)
    # 4 links in 6 occurrences of names: Essen 1 of 3, Bonn 2 of 2, die Stadt 1 of 1; Köln does not occur.
    [spans] = gazetteer(["Essen, Bonn, die Stadt, Köln"])
    assert [round(span.score, 4) for span in spans] == [
        round(probability, 4) for probability in ((1 + 4 / 6) / 4, (2 + 4 / 6) / 3, (1 + 4 / 6) / 2, 1.0)
    ]
    assert gazetteer.floor == 0.1


def test_the_floor_is_chosen_on_validation():
    training = list(rows("Essen Essen Essen Essen Essen [Bonn] Essen Essen Essen Essen [Essen]"))
    validation = list(rows("Das Essen in [Bonn], Essen.", "[Bonn]: Essen"))
    gazetteer = Gazetteer(["Essen", "Bonn"], training=training, validation=validation)
    assert surfaces(gazetteer, "Essen in Bonn") == ["Bonn"]
    assert gazetteer.floor == 0.2  # (1 + 2/11) / 11 = 0.107 is the link probability of Essen
    assert gazetteer.describe() != Gazetteer(["Essen", "Bonn"], training=training).describe()


def test_training_mentions_without_places_are_refused():
    with pytest.raises(DataFormatError, match="No training mention"):
        Gazetteer(["Bonn"], training=[{"text": "Bonn", "mention": "Bonn", "start": -1, "end": -1}])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gazeteer", {}, "no detector 'gazeteer'"),
        ("spacy", {}, "needs a model"),
        ("gazetteer", {"labels": ["person"]}, "no labels"),
        ("gazetteer", {}, "needs a knowledge base"),
        ("spacy:en", {"ignore_case": True}, "has no ignore_case"),
    ],
)
def test_a_detector_that_is_not_there_is_named(name, options, message):
    with pytest.raises(UnknownModelError, match=message):
        open_detector(name, **options)

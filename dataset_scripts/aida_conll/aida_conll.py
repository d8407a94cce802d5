"""AIDA-CoNLL and the text-only sets that are evaluated beside it: MSNBC, AQUAINT, ACE2004, CWEB and WIKI.

Names in news and web pages are linked to Wikipedia; the sets have no images. The configuration `mentions` is AIDA-CoNLL
(train, A as validation, B as test). `msnbc`, `aquaint`, `ace2004`, `cweb` and `wiki` have the split test only. The builder
gives each set whose files are present in one of three forms, and takes the first form that is complete:

- `csv`: the files of Ganea and Hofmann (2017), which Le and Titov (2018) and the M3EL paper use, too
  (`aida_train.csv`, `wned-msnbc.csv`, …): columns separated by tabs, with 100 words before and after the mention,
  candidates and priors.
- `jsonl`: JSON lines in the form of GENRE (`aida-train-kilt.jsonl`, …: `meta`, `output`, `candidates`) or of BLINK
  (`AIDA-YAGO2_train.jsonl`, `msnbc_questions.jsonl`, …: `context_left`, `mention`, `context_right`, `label`).
- `conll`: AIDA-CoNLL only, `AIDA-YAGO2-dataset.tsv`, which AIDA's tool makes from the CoNLL 2003 corpus. Only this form
  has the mentions without entity (`--NME--`), and whole documents as texts.

The id of an entity is the title of its page, with spaces and without percent-encoding, so that the forms agree.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets

from hf_mel.dataset_scripts.builder import ReleaseBuilder, mention_row
from hf_mel.dataset_scripts.mapping import TEXT, Keys, read_entity_texts, read_json_lines
from hf_mel.dataset_scripts.release import Release
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL

_CONLL = "AIDA-YAGO2-dataset.tsv"


def _test_files(csv: str, *jsonl: str) -> dict[str, dict[str, tuple[str, ...]]]:
    return {"csv": {"test": (csv,)}, "jsonl": {"test": jsonl}}


#: Configuration → form → split → names that the file may have.
_FILES: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "mentions": {
        "csv": {"train": ("aida_train.csv",), "validation": ("aida_testA.csv",), "test": ("aida_testB.csv",)},
        "jsonl": {
            "train": ("aida-train-kilt.jsonl", "AIDA-YAGO2_train.jsonl"),
            "validation": ("aida-dev-kilt.jsonl", "AIDA-YAGO2_testa.jsonl"),
            "test": ("aida-test-kilt.jsonl", "AIDA-YAGO2_testb.jsonl"),
        },
        "conll": {"train": (_CONLL,), "validation": (_CONLL,), "test": (_CONLL,)},
    },
    "msnbc": _test_files("wned-msnbc.csv", "msnbc-test-kilt.jsonl", "msnbc_questions.jsonl"),
    "aquaint": _test_files("wned-aquaint.csv", "aquaint-test-kilt.jsonl", "aquaint_questions.jsonl"),
    "ace2004": _test_files("wned-ace2004.csv", "ace2004-test-kilt.jsonl", "ace2004_questions.jsonl"),
    "cweb": _test_files("wned-clueweb.csv", "clueweb-test-kilt.jsonl", "clueweb_questions.jsonl"),
    "wiki": _test_files("wned-wikipedia.csv", "wiki-test-kilt.jsonl", "wnedwiki_questions.jsonl"),
}
#: Mark of the split in the name of a document → split.
_CONLL_SPLITS = {"": "train", "testa": "validation", "testb": "test"}
_KEYS = ("meta", "output", "left_context", "right_context", "context_left", "mention", "context_right")
_COUNTS = {
    "mentions": {"train": 18_448, "validation": 4_791, "test": 4_485},
    "msnbc": {"test": 656},
    "aquaint": {"test": 727},
    "ace2004": {"test": 257},
    "cweb": {"test": 11_154},
}


@dataclass
class AidaConllConfig(datasets.BuilderConfig):
    """Files of the release.

    Args:
        data_dir (`str`): Folder of the raw files of any of the sets.
        entities (`str`, *optional*): JSON lines with `title`, `text` and possibly `id`: descriptions of the entities.
    """

    entities: str | None = None


@dataclass
class _Mention:
    """One mention of any form. An entity is a pair of title and page id ("" if unknown)."""

    row: int
    document_id: str
    text: str
    start: int
    surface: str
    gold: tuple[str, str] | None
    candidates: list[tuple[str, str]] = field(default_factory=list)
    priors: list[float] = field(default_factory=list)


class AidaConll(ReleaseBuilder):
    """Builder of AIDA-CoNLL, of five further test sets, and of the golds and candidates of all of them."""

    NAME = "aida_conll"
    TITLE = "AIDA-CoNLL, MSNBC, AQUAINT, ACE2004, CWEB, WIKI"
    TASK = "names in news and web pages, text only → Wikipedia"
    LICENSE = "other"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://www.mpi-inf.mpg.de/departments/databases-and-information-systems/research/ambiverse-nlu/aida"
    DOWNLOAD = (
        "the csv files of github.com/dalab/deep-ed or github.com/lephong/mulrel-nel (generated/test_train_data), or the"
        " JSON lines of github.com/facebookresearch/GENRE, or AIDA-YAGO2-dataset.tsv made by AIDA's tool from CoNLL 2003"
    )
    REDISTRIBUTION = (
        "The texts of CoNLL 2003 are from the Reuters corpus, ACE2004 and AQUAINT from the Linguistic Data Consortium;"
        " their licences do not allow redistribution."
    )
    CITATION = """\
@inproceedings{hoffart2011robust,
  title = {Robust Disambiguation of Named Entities in Text},
  author = {Hoffart, Johannes and Yosef, Mohamed Amir and Bordino, Ilaria and F{\\"u}rstenau, Hagen and Pinkal, Manfred
            and Spaniol, Marc and Taneva, Bilyana and Thater, Stefan and Weikum, Gerhard},
  booktitle = {Proceedings of the 2011 Conference on Empirical Methods in Natural Language Processing},
  year = {2011},
  pages = {782--792}
}
@inproceedings{ganea2017deep,
  title = {Deep Joint Entity Disambiguation with Local Neural Attention},
  author = {Ganea, Octavian-Eugen and Hofmann, Thomas},
  booktitle = {Proceedings of the 2017 Conference on Empirical Methods in Natural Language Processing},
  year = {2017},
  pages = {2619--2629}
}"""
    NEEDS_RAW = True
    #: Mentions with an entity as Ganea and Hofmann (2017) count them, and lines as GENRE's page counts them. WIKI (6,821)
    #: is left out for `csv`, because some later versions of its file lack a document.
    OFFICIAL_COUNTS: dict[str, dict[str, dict[str, int]]] = {
        "csv": _COUNTS,
        "jsonl": {**_COUNTS, "wiki": {"test": 6_821}},
        "conll": {config: splits for config, splits in _COUNTS.items() if config != "mentions"},
    }

    SPLITS = tuple(_FILES["mentions"]["csv"])
    CONFIGS = {
        "mentions": "Mentions of AIDA-CoNLL.",
        "msnbc": "Mentions of MSNBC.",
        "aquaint": "Mentions of AQUAINT.",
        "ace2004": "Mentions of ACE2004.",
        "cweb": "Mentions of WNED-CWEB (ClueWeb).",
        "wiki": "Mentions of WNED-WIKI.",
        "entities": "All golds and candidates.",
    }
    COLUMNS = {
        **{
            config: {"document_id": datasets.Value("string"), "candidate_priors": [datasets.Value("float32")]}
            for config in _FILES
        },
        "entities": {"wikipedia_id": datasets.Value("string")},
    }
    BUILDER_CONFIG_CLASS = AidaConllConfig

    @classmethod
    def configs_in(cls, data_dir: str | os.PathLike[str], options: Mapping[str, Any]) -> list[str]:
        """Returns the configurations whose files are in the folder, and `entities`; all of them if none is."""
        present = [config for config in _FILES if _form(Path(data_dir), config)]
        return [*(present or _FILES), "entities"]

    def open_release(self) -> Release:
        """Opens the files of the current configuration, or for `entities` those of any set."""
        config = self.config.name
        layouts = {
            f"{name}, {form}" if config == "entities" else form: list(splits.values())
            for name in (_FILES if config == "entities" else [config])
            for form, splits in _FILES[name].items()
        }
        release = Release(self.config.data_dir, layouts)
        # The official counts of AIDA-CoNLL depend on its form; those of the other sets are the same in both forms.
        forms = (_form(release.root, name) for name in _FILES)
        release.layout = next(form for form in forms if form)
        return release

    def splits(self) -> list[str]:
        """Returns the splits of the current set."""
        return list(_FILES[self.config.name]["csv"])

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split of the current set."""
        config = self.config.name
        contexts: dict[str, str] = {}
        for mention in self._read_mentions(config, split):
            mention_id = f"{split if config == 'mentions' else config}-{mention.row}"
            context_id = contexts.setdefault(mention.text, mention_id)
            yield mention_row(
                mention_id=mention_id,
                context_id=context_id,
                text=mention.text,
                mention=mention.surface,
                start=mention.start,
                end=mention.start + len(mention.surface),
                entity_id=mention.gold[0] if mention.gold else NIL,
                candidates=[title for title, _ in mention.candidates],
                document_id=mention.document_id or context_id,
                candidate_priors=mention.priors,
            )

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields all golds, then all candidates, of the sets whose files are present."""
        release = self.release
        golds: dict[str, str] = {}
        candidates: dict[str, str] = {}
        for config, forms in _FILES.items():
            for split in forms["csv"]:
                for mention in self._read_mentions(config, split):
                    for title, page in [mention.gold] if mention.gold else []:
                        golds[title] = golds.get(title) or page
                    for title, page in mention.candidates:
                        candidates[title] = candidates.get(title) or page
        release.problems.clear()  # the configurations of mentions log these problems
        pages = golds
        for title, page in candidates.items():
            pages[title] = pages.get(title) or page
        texts = read_entity_texts(release, self.config.entities, {*pages, *filter(None, pages.values())})
        for title, page in pages.items():
            text = texts.get(title) or texts.get(page)
            if self.config.entities is not None and text is None:
                release.problem("entity_without_text", "entities", title, page)
            yield {
                "entity_id": title,
                "name": title,
                "description": text[1] if text else "",
                "attributes": "",
                "aliases": [],
                "images": [],
                "wikipedia_id": page,
            }

    def _read_mentions(self, config: str, split: str) -> Iterator[_Mention]:
        """Yields the mentions of a split in file order; none if the folder lacks the set."""
        release = self.release
        form = _form(release.root, config)
        if form == "conll":
            yield from _from_conll(release, split)
        elif form is not None:
            file = str(release.find_file(*_FILES[config][form][split]))
            yield from _from_csv(release, file) if form == "csv" else _from_jsonl(release, file)


def _form(root: Path, config: str) -> str | None:
    """Returns the first form in which all files of a configuration are in the folder, or `None`."""
    for form, splits in _FILES[config].items():
        if all(any((root / name).is_file() for name in names) for names in splits.values()):
            return form
    return None


def page_title(raw: str) -> str:
    """Returns the title of a page as an entity id: underscores become spaces, HTML entities become characters."""
    return html.unescape(raw).replace("_", " ").strip()


def _joined(before: str, mention: str, after: str) -> tuple[str, int]:
    """Joins a mention and its contexts, with a space where they have none; returns the text and the mention's start."""
    before = f"{before} " if before and not before[-1].isspace() else before
    after = f" {after}" if after and not after[0].isspace() else after
    return before + mention + after, len(before)


def _from_csv(release: Release, file: str) -> Iterator[_Mention]:
    """Yields the mentions of a file in the form `csv`.

    The columns are document, document, mention, left context, right context, CANDIDATES, one column per candidate, GT:,
    gold. A candidate is "page id,prior,title"; EMPTYCAND means no candidates and EMPTYCTXT an empty context. The gold is
    "number,page id,prior,title", "-1,page id,title" if it is not a candidate, or "-1" without gold.
    """
    path = release.root / file
    for row, line in release.read_lines(file):
        if not line.strip():
            continue
        columns = line.strip().split("\t")
        if len(columns) < 9 or columns[5] != "CANDIDATES" or columns[-2] != "GT:":
            raise DataFormatError(
                f"The line has {len(columns)} columns, expected 9 or more, CANDIDATES as the sixth and GT: as the last but"
                " one.",
                file=path,
                row=row,
                remedy="Use a file in the form that github.com/dalab/deep-ed writes.",
            )
        document, _, mention, left, right = (column.strip() for column in columns[:5])
        left, right = ("" if context == "EMPTYCTXT" else context for context in (left, right))
        candidates, priors, seen = [], [], set()
        for column in columns[6:-2] if columns[6] != "EMPTYCAND" else []:
            page, prior, title = _candidate(column, path, row)
            if title in seen:  # two pages with one title; the likelier one comes first
                release.problem("candidate_twice", file, row, title)
                continue
            seen.add(title)
            candidates.append((title, page))
            priors.append(prior)
        number, *rest = columns[-1].split(",", 1)
        gold = None
        if number == "-1":
            page, _, title = (rest[0] if rest else "").partition(",")
            gold = (page_title(title), page) if page_title(title) else None
        elif number.isdigit():
            page, _, title = _candidate(rest[0] if rest else "", path, row)
            gold = (title, page)
        else:
            raise DataFormatError(
                f"The line has the gold {columns[-1]!r}, expected a number first.", file=path, row=row
            )
        if not mention:
            release.problem("mention_without_surface", file, row)
            continue
        text, start = _joined(left, mention, right)
        yield _Mention(row, document, text, start, mention, gold, candidates, priors)


def _candidate(column: str, path: Path, row: int) -> tuple[str, float, str]:
    page, _, rest = column.partition(",")
    prior, _, raw = rest.partition(",")
    title = page_title(raw)
    try:
        value = float(prior)
    except ValueError:
        value = math.nan
    if not page.isdigit() or not abs(value) < 1e30 or not title:  # the comparison is false for nan
        raise DataFormatError(
            f"The line has the candidate {column!r}, expected page id,prior,title.", file=path, row=row
        )
    return page, value, title


def _from_jsonl(release: Release, file: str) -> Iterator[_Mention]:
    """Yields the mentions of JSON lines of GENRE (which have `meta`) or of BLINK. Without a gold the mention has no entity."""
    path, keys = release.root / file, Keys(_KEYS)
    for row, record in read_json_lines(release, file):
        candidates: list[tuple[str, str]] = []
        if isinstance(record, dict) and "meta" in record:
            required = {"left_context": TEXT, "mention": TEXT, "right_context": TEXT}
            values = keys.read(release, file, row, record["meta"], required)
            left, mention, right = (values[key] for key in required)
            gold = _genre_gold(release, file, row, record.get("output"))
            titles = record.get("candidates") or []
            if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
                raise DataFormatError("The row has candidates that are not a list of strings.", file=path, row=row)
            candidates = [(page_title(title), "") for title in titles]
            candidates = list(dict.fromkeys(candidate for candidate in candidates if candidate[0]))
        else:
            required = {"context_left": TEXT, "mention": TEXT, "context_right": TEXT}
            values = keys.read(release, file, row, record, required)
            left, mention, right = (values[key] for key in required)
            title, page = record.get("label_title", record.get("label")), record.get("label_id")
            if title is not None and not isinstance(title, str):
                raise DataFormatError(f"The row has {title!r} for a label, expected a title.", file=path, row=row)
            page = "" if page in (None, -1, "-1") else release.identifier(file, row, page)
            title = page_title(title or "")
            gold = None if not title or title.casefold() in ("nil", "unknown") else (title, page)
        mention = mention.strip()
        if not mention:
            release.problem("mention_without_surface", file, row)
            continue
        text, start = _joined(left.strip(), mention, right.strip())
        yield _Mention(row, "", text, start, mention, gold, candidates)


def _genre_gold(release: Release, file: str, row: int, output: Any) -> tuple[str, str] | None:
    """Returns the title of the first answer and the page id of its provenance, "" if it has none."""
    if output is None or output == []:
        return None
    answer = output[0] if isinstance(output, list) else None
    if not isinstance(answer, dict) or not isinstance(answer.get("answer"), (str, type(None))):
        raise DataFormatError(
            "The row has no output of the form [{answer, provenance}].", file=release.root / file, row=row
        )
    title = page_title(answer.get("answer") or "")
    provenance = answer.get("provenance")
    source = provenance[0] if isinstance(provenance, list) and provenance else None
    page = source.get("wikipedia_id") if isinstance(source, dict) else None
    return (title, "" if page is None else release.identifier(file, row, page)) if title and title != "NIL" else None


def _from_conll(release: Release, split: str) -> Iterator[_Mention]:
    """Yields the mentions of a split in the form `conll`.

    The file has one token a line. A token of a mention has further columns: B or I, the mention, the YAGO entity, its URL
    and its page id. A document starts with "-DOCSTART- (1 EU)", whose number ends in testa or testb for the sets A and B;
    empty lines end sentences. The text of a mention is the whole document, with one space between tokens and a line break
    after each sentence.
    """
    path = release.root / _CONLL
    document: _Document | None = None
    for row, line in release.read_lines(_CONLL):
        if line.startswith("-DOCSTART-"):
            header = re.fullmatch(r"-DOCSTART- \((\d+(testa|testb)?(?: .*)?)\)", line.strip())
            if header is None:
                raise DataFormatError(f"The line is {line!r}, expected -DOCSTART- (number name).", file=path, row=row)
            if document is not None and document.split == split:
                yield from document.mentions()
            document = _Document(header[1], _CONLL_SPLITS[header[2] or ""])
            continue
        if document is None:
            if line.strip():
                raise DataFormatError("The line is before the first -DOCSTART-.", file=path, row=row)
            continue
        columns = line.split("\t")
        if not columns[0].strip():
            document.end_sentence()
        elif len(columns) == 1:
            document.add(columns[0].strip())
        elif columns[1] == "I" and document.in_mention:
            document.add(columns[0].strip(), inside=True)
        elif columns[1] == "B" and len(columns) >= 4:
            document.add(columns[0].strip())
            document.begin(row, *_conll_gold(columns, path, row))
        else:
            raise DataFormatError(
                f"The line has {len(columns)} columns and {columns[1]!r} in the second; expected B (with mention and"
                " entity) to begin a mention, or I to continue one.",
                file=path,
                row=row,
            )
    if document is not None and document.split == split:
        yield from document.mentions()


def _conll_gold(columns: list[str], path: Path, row: int) -> tuple[str, str]:
    """Returns title and page id of a mention's entity, both empty if it has none."""
    if columns[3] == "--NME--":
        return "", ""
    page = columns[5].strip() if len(columns) > 5 else ""
    if len(columns) > 4 and "/wiki/" in columns[4]:
        title = page_title(unquote(columns[4].split("/wiki/", 1)[1]))
    else:  # YAGO writes other characters than ASCII as \uXXXX; unpaired surrogates become "?"
        title = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), columns[3])
        title = page_title(title.encode("utf-8", "replace").decode())
    if not title:
        raise DataFormatError(
            "The mention names no entity.", file=path, row=row, remedy="Write --NME-- if it has none."
        )
    return title, page


class _Document:
    """A document of the form `conll`, built token by token."""

    def __init__(self, name: str, split: str):
        self.name, self.split = name, split
        self.in_mention = False
        self._text = ""
        self._gap = ""
        self._spans: list[list[Any]] = []  # row, start, end, title, page

    def add(self, token: str, inside: bool = False) -> None:
        """Appends a token; `inside` extends the last mention to it."""
        self._text += self._gap + token
        self._gap = " "
        self.in_mention = inside
        if inside:
            self._spans[-1][2] = len(self._text)
        self._last = len(self._text) - len(token)

    def begin(self, row: int, title: str, page: str) -> None:
        """Begins a mention at the last token."""
        self._spans.append([row, self._last, len(self._text), title, page])
        self.in_mention = True

    def end_sentence(self) -> None:
        """Puts a line break before the next token."""
        self._gap = "\n" if self._text else ""
        self.in_mention = False

    def mentions(self) -> Iterator[_Mention]:
        """Yields the mentions of the document."""
        for row, start, end, title, page in self._spans:
            yield _Mention(row, self.name, self._text, start, self._text[start:end], (title, page) if title else None)


BUILDER_CLASS = AidaConll

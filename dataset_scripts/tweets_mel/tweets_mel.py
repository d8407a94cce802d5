"""Tweets-MEL (Twitter-MEL): ambiguous last names in tweets, linked to Twitter accounts.

The release gives ids only (`mel_train_ids`, `mel_dev_ids`, `mel_test_ids`, `kb`), as Twitter's terms demand. The tweets
are the user's own, fetched and written as the release's programs write them:

- `Train.txt`, `Dev.txt`, `Test.txt`: seven columns parted by tabs: tweetId, startPos, endPos, mention, @screenName,
  text (in which the mention stands for the screen name), mediaURL (may be missing).
- `mapSreenNameToMention.txt`: `@screenName|mention`, the accounts each mention may mean.
- `timelineKB.txt` (or `timeline_KB.txt`): @screenName, tweetId, text, imageURL.

Not part of the release, but read if there: `profiles.tsv` (@screenName, name, description and, optionally, location,
parted by tabs) or `profiles.jsonl` (objects with the keys screen_name, name, description, location); and the id lists of
PFMEL (`Train_ids.txt`, `Train07_ids.txt`, `Train05_ids.txt`, `Dev_ids.txt`, `Test_ids.txt`), each training list a
configuration of its own.

The id lists decide in which split a tweet is: the program that wrote `Train.txt`, `Dev.txt` and `Test.txt` drew them
without a seed, so which of the three holds a row says nothing.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import datasets
import numpy as np

from hf_mel.dataset_scripts.release import Release, nearest, read_image
from hf_mel.errors import DataFormatError, DuplicateIdError
from hf_mel.schema import entity_features, mention_features, post_features

_LISTS = {"train": "mel_train_ids", "validation": "mel_dev_ids", "test": "mel_test_ids"}
_KB = "kb"
_TWEETS = ("Train.txt", "Dev.txt", "Test.txt")
_TIMELINES = ("timelineKB.txt", "timeline_KB.txt")
_MENTIONS = "mapSreenNameToMention.txt"
_PROFILES = ("profiles.jsonl", "profiles.tsv")
_PFMEL = {"pfmel": "Train", "pfmel_train07": "Train07", "pfmel_train05": "Train05"}
#: Ids in each list: the release's README, and for PFMEL's lists their lengths.
_OFFICIAL_IDS = {
    "mel_train_ids": 35_976,
    "mel_dev_ids": 16_599,
    "mel_test_ids": 36_521,
    "kb": 2_657_213,
    "Train_ids.txt": 10_619,
    "Train07_ids.txt": 9_533,
    "Train05_ids.txt": 8_809,
    "Dev_ids.txt": 10_542,
    "Test_ids.txt": 36_744,
}
#: Posts an entity row shows of its account, the latest first, as many as PFMEL reads.
_RECENT_POSTS = 3


def _pfmel_lists(config: str) -> dict[str, tuple[str, ...]]:
    names = {"train": _PFMEL[config], "validation": "Dev", "test": "Test"}
    return {split: (f"{name}_ids.txt", f"pfmel/{name}_ids.txt") for split, name in names.items()}


def account_id(screen_name: str) -> str:
    """The entity id of an account: "@" and its screen name in lower case, empty if it is none.

    Twitter takes no notice of case in screen names, and files hydrated at different times spell an account differently.
    """
    name = screen_name.strip().removeprefix("@")
    return f"@{name.lower()}" if re.fullmatch(r"[A-Za-z0-9_]{1,50}", name) else ""


def tweet_id(text: str) -> str:
    """The digits of a tweet id, empty if it is none. Ids stay texts: they have more digits than a float holds."""
    digits = text.strip().strip("\"'")
    return digits if re.fullmatch(r"[0-9]{1,19}", digits) else ""


def image_names(url: str, tweet: str) -> list[str]:
    """File names the image of a tweet may have: the last part of its address, or the id of the tweet."""
    try:  # no os.path: datasets replaces it in a builder's module by one for addresses, where "" is "."
        parts = urlsplit(url.strip())
        name, form = parts.path.rpartition("/")[2], parse_qs(parts.query).get("format", [""])[0]
    except ValueError:  # an address with half a bracket
        name, form = url.strip().rpartition("/")[2], ""
    names = [name] if name else []
    if names and form:
        names.append(f"{name}.{form}")
    return [*names, f"{tweet}.jpg", f"{tweet}.png"]


class _Tweet(NamedTuple):
    """One row of the hydrated files."""

    file: str
    row: int
    tweet: str
    start: str
    end: str
    mention: str
    screen_name: str
    text: str
    url: str


@dataclass
class TweetsMelConfig(datasets.BuilderConfig):
    """Where the raw files lie.

    Args:
        data_dir (`str`): Folder of the id lists and of the files of your own tweets.
        images (`str`, *optional*): Folder of the tweets' images, named as in their address or `<tweetId>.jpg`; by default
            looked for beside the raw files.
        entity_images (`str`, *optional*): Folder of the timelines' images, named alike, and of the accounts' profile
            pictures, `<screenName>.jpg`; the same.
    """

    images: str | None = None
    entity_images: str | None = None


class TweetsMel(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions`, `entities`, `posts`, and PFMEL's choices of mentions."""

    NAME = "tweets_mel"
    TITLE = "Tweets-MEL"
    TASK = "last names in tweets → Twitter accounts"
    LICENSE = "cc-by-nc-sa-3.0"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://github.com/OA256864/MEL_Tweets"
    DOWNLOAD = (
        "mel_dataset.tar.bz2 (tweet ids; link in corpus/README.md of the homepage), then fetch the tweets yourself: its"
        " README describes Train.txt, Dev.txt, Test.txt, timelineKB.txt and mapSreenNameToMention.txt"
    )
    REDISTRIBUTION = "Twitter's terms allow the ids of tweets to be redistributed, not their texts or images."
    CITATION = """\
@inproceedings{adjali2020building,
  title = {Building a Multimodal Entity Linking Dataset From Tweets},
  author = {Adjali, Omar and Besan{\\c{c}}on, Romaric and Ferret, Olivier and {Le Borgne}, Herv{\\'e} and Grau, Brigitte},
  booktitle = {Proceedings of the 12th Language Resources and Evaluation Conference},
  year = {2020},
  pages = {4285--4292}
}"""
    NEEDS_RAW = True
    #: None: of the tweets listed, only some can still be fetched. The lengths of the id lists are checked instead.
    OFFICIAL_COUNTS: dict[str, dict[str, int | None]] = {
        "mentions": dict.fromkeys(_LISTS),
        "entities": {"kb": None},
        "posts": {"kb": None},
    }

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = TweetsMelConfig
    BUILDER_CONFIGS = [
        TweetsMelConfig(
            name="mentions", version=VERSION, description="Tweets with a last name, its account and image."
        ),
        TweetsMelConfig(name="entities", version=VERSION, description="The accounts."),
        TweetsMelConfig(name="posts", version=VERSION, description="The timelines of the accounts."),
        TweetsMelConfig(name="pfmel", version=VERSION, description="PFMEL's mentions."),
        TweetsMelConfig(name="pfmel_train07", version=VERSION, description="With its Train07."),
        TweetsMelConfig(name="pfmel_train05", version=VERSION, description="With its Train05."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    @classmethod
    def configs_in(cls, data_dir: str | os.PathLike[str], options: Mapping[str, Any]) -> list[str]:
        """The configurations that the files in `data_dir` suffice for."""
        root = Path(data_dir)
        configs = ["mentions", "entities"]
        if any((root / name).is_file() for name in _TIMELINES):
            configs.append("posts")
        for config in _PFMEL:
            if all(any((root / name).is_file() for name in names) for names in _pfmel_lists(config).values()):
                configs.append(config)
        return configs

    def _info(self) -> datasets.DatasetInfo:
        if self.config.name == "entities":
            features = entity_features(
                screen_name=datasets.Value("string"),
                location=datasets.Value("string"),
                recent_posts=[datasets.Value("string")],
            )
        else:
            features = post_features() if self.config.name == "posts" else mention_features()
        return datasets.DatasetInfo(features=features, homepage=self.HOMEPAGE, citation=self.CITATION)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = release = Release(self.config.data_dir, {"ids": list(_LISTS.values())})
        self.tweets = self._read_tweets()
        self.meant = self._read_mentions()
        lists: Mapping[str, str] = _LISTS
        ids = self._read_ids(lists)
        if self.config.name == "mentions":
            listed = {tweet for tweets in ids.values() for tweet in tweets}
            for tweet, rows in self.tweets.items():
                if tweet not in listed:
                    for row in rows:
                        release.problem("row_of_unlisted_tweet", row.file, row.row, tweet)
        else:  # what is wrong with these files is listed once, for the mentions
            release.problems.clear()
        if self.config.name in ("entities", "posts"):
            return [datasets.SplitGenerator(name="kb", gen_kwargs={"split": "kb", "ids": []})]
        if self.config.name in _PFMEL:
            lists = self._pfmel_lists()
            ids = self._read_ids(lists)
        generators = []
        for split, tweets in ids.items():
            for tweet in tweets:
                if tweet not in self.tweets:
                    release.problem("tweet_gone", lists[split], tweet, split)
            if any(tweet in self.tweets for tweet in tweets):
                generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "ids": tweets}))
            else:
                release.problem("split_left_out", lists[split], "", f"{split}: none of its tweets is there")
        if not generators:
            raise DataFormatError(
                f"holds rows of none of the tweets in {', '.join(lists.values())}.",
                file=release.root,
                remedy=f"The first column of {', '.join(_TWEETS)} must hold ids of these lists; without tweets of PFMEL's"
                " lists, take those away.",
            )
        return generators

    def _generate_examples(self, split: str, ids: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.config.name == "entities":
            for row in self._entities():
                yield row["entity_id"], row
        elif self.config.name == "posts":
            for row in self._posts():
                yield row["post_id"], row
        else:
            for row in self._mentions(ids):
                yield row["mention_id"], row

    def _mentions(self, ids: list[str]) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.images, "images", "media", "mention_images")
        note = self.config.name == "mentions"
        for tweet in ids:
            rows = self.tweets.get(tweet, [])
            for k, row in enumerate(rows):
                start, end = (
                    int(place) if re.fullmatch(r"[0-9]{1,6}", place) else -1 for place in (row.start, row.end)
                )
                if not 0 <= start < end or row.text[start:end] != row.mention:
                    start, end = nearest(row.text, row.mention, start)
                    if start >= 0 and note:
                        release.problem("span_repaired", row.file, row.row, f"{row.start}:{row.end} → {start}:{end}")
                image = read_image(folder, *image_names(row.url, tweet))
                if image is None and row.url and note:
                    release.problem("missing_mention_image", row.file, row.row, row.url)
                mention_id = tweet if len(rows) == 1 else f"{tweet}-{k}"
                yield {
                    "mention_id": mention_id,
                    # The screen name of one mention is replaced in its own row only, so the rows may differ in text.
                    "context_id": tweet if row.text == rows[0].text else mention_id,
                    "text": row.text,
                    "mention": row.mention,
                    "start": start,
                    "end": end,
                    "mention_type": "",
                    "topic": "",
                    "image": image,
                    "entity_id": account_id(row.screen_name),
                    "candidates": self.meant.get(row.mention.lower(), []),
                }

    def _entities(self) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.entity_images, "entity_images")
        spelled: dict[str, str] = {}  # id → screen name as first met: in the map, the timelines, the tweets
        names: dict[str, str] = {}
        for screen_name, mention in self._map():
            spelled.setdefault(account_id(screen_name), screen_name)
            names.setdefault(account_id(screen_name), mention)
        recent: dict[str, list[tuple[int, str]]] = {}
        if timeline := release.first(*_TIMELINES):
            for _, screen_name, tweet, text, _ in self._timeline(timeline):
                account = account_id(screen_name)
                spelled.setdefault(account, screen_name)
                latest = recent.setdefault(account, [])
                (heapq.heappush if len(latest) < _RECENT_POSTS else heapq.heappushpop)(latest, (int(tweet), text))
        release.problems.clear()  # those of the timelines are listed with the posts, of the map with the mentions
        listed = set().union(*self._read_ids(_LISTS).values())
        for config in _PFMEL:
            for alternatives in _pfmel_lists(config).values():
                if name := release.first(*alternatives):
                    listed.update(*self._read_ids({"": name}).values())
        release.problems.clear()
        for tweet, rows in self.tweets.items():
            for tweet_row in rows if tweet in listed else ():
                spelled.setdefault(account_id(tweet_row.screen_name), tweet_row.screen_name)
                names.setdefault(account_id(tweet_row.screen_name), tweet_row.mention)
        profiles = self._profiles(spelled)
        for account, screen_name in spelled.items():
            plain = screen_name.strip().removeprefix("@")
            name, description, location = profiles.get(account, ("", "", ""))
            files = [f"{form}.{suffix}" for form in (plain, plain.lower()) for suffix in ("jpg", "png", "jpeg")]
            image = read_image(folder, *files)
            yield {
                "entity_id": account,
                "name": name or names.get(account, plain),
                "description": description,
                "attributes": f"Location: {location}" if location else "",
                "aliases": [f"@{plain}"],
                "images": [image] if image else [],
                "screen_name": f"@{plain}",
                "location": location,
                "recent_posts": [text for _, text in sorted(recent.get(account, ()), reverse=True)],
            }

    def _posts(self) -> Iterator[dict[str, Any]]:
        release = self.release
        timeline = release.first(*_TIMELINES)
        if timeline is None:
            raise DataFormatError(
                f"holds no {_TIMELINES[0]}.",
                file=release.root,
                remedy=f"Write one, with the columns @screenName, tweetId, text, imageURL ({self.HOMEPAGE}).",
            )
        folder = release.folder(self.config.entity_images, "timeline_images", "entity_images", "images")
        missing = 0
        for _, screen_name, tweet, text, url in self._timeline(timeline):
            image = read_image(folder, *image_names(url, tweet))
            missing += image is None and bool(url)
            yield {"post_id": tweet, "entity_id": account_id(screen_name), "text": text, "image": image}
        if missing:  # up to millions: one line for all
            release.problem("missing_post_image", timeline, "", f"{missing:,} images are not there")

    def _read_tweets(self) -> dict[str, list[_Tweet]]:
        """The hydrated rows by tweet id, in file order; a tweet may mention several accounts, each in a row."""
        release = self.release
        files = [name for name in _TWEETS if release.first(name)]
        if not files:
            raise DataFormatError(
                "holds the ids of tweets, but no tweets: the release may give no more than the ids. Needed are, in UTF-8"
                " and without header:\n"
                f"  {', '.join(_TWEETS)} (one of them suffices): tweetId, startPos, endPos, mention, @screenName, text"
                " with the mention in place of the screen name, mediaURL, parted by tabs\n"
                "and, if you have them:\n"
                f"  {_MENTIONS}: @screenName|mention, the accounts a mention may mean (the candidates)\n"
                f"  {_TIMELINES[0]}: @screenName, tweetId, text, imageURL, parted by tabs (the posts)\n"
                f"  {_PROFILES[1]}: @screenName, name, description, location, parted by tabs (not from the release)\n",
                file=release.root,
                remedy="Fetch the tweets of the id lists with your own access to Twitter and write these files. The release"
                f" describes them in its README, and corpus/README.md names its programs for it ({self.HOMEPAGE}).",
            )
        tweets: dict[str, list[_Tweet]] = {}
        for name in files:
            for row, line in release.lines(name):
                if not line.strip():
                    continue
                fields = line.split("\t")
                if len(fields) == 6:  # the release's own program drops the last tab with the address
                    fields.append("")
                if len(fields) != 7:
                    release.problem("malformed_row", name, row, f"{len(fields)} columns instead of 7")
                    continue
                tweet, start, end, mention, screen_name, text, url = (field.strip() for field in fields)
                text = fields[5]  # offsets count leading spaces
                if not tweet_id(tweet) or not mention or not account_id(screen_name):
                    release.problem("malformed_row", name, row, f"{tweet!r}, {mention!r}, {screen_name!r}")
                    continue
                tweet, url = tweet_id(tweet), "" if url.lower() == "none" else url
                same = tweets.setdefault(tweet, [])
                if any(account_id(other.screen_name) == account_id(screen_name) for other in same):
                    release.problem("repeated_row", name, row, tweet)
                    continue
                same.append(_Tweet(name, row, tweet, start, end, mention, screen_name, text, url))
        return tweets

    def _map(self) -> Iterator[tuple[str, str]]:
        """Screen name and mention of each line of the map, if there is one."""
        if self.release.first(_MENTIONS):
            for row, line in self.release.lines(_MENTIONS):
                screen_name, separator, mention = line.partition("|")
                if separator and mention.strip() and account_id(screen_name):
                    yield screen_name.strip(), mention.strip()
                elif line.strip():
                    self.release.problem("malformed_row", _MENTIONS, row, line[:80])

    def _read_mentions(self) -> dict[str, list[str]]:
        """Mention, in lower case → ids of the accounts it may mean."""
        meant: dict[str, dict[str, None]] = {}
        for screen_name, mention in self._map():
            meant.setdefault(mention.lower(), {})[account_id(screen_name)] = None
        return {mention: list(accounts) for mention, accounts in meant.items()}

    def _pfmel_lists(self) -> dict[str, str]:
        lists = {}
        for split, names in _pfmel_lists(self.config.name).items():
            found = self.release.first(*names)
            if found is None:
                raise DataFormatError(
                    f"holds no {names[0]}, one of PFMEL's lists of ids.",
                    file=self.release.root,
                    remedy="They are in the folder data of https://github.com/numsi/mel_nsp.",
                )
            lists[split] = found
        return lists

    def _read_ids(self, lists: Mapping[str, str]) -> dict[str, list[str]]:
        """The ids of each split, in file order.

        Raises:
            DuplicateIdError: An id is in two splits.
        """
        release = self.release
        where: dict[str, str] = {}
        ids: dict[str, dict[str, None]] = {split: {} for split in lists}
        for split, name in lists.items():
            rows = 0
            for row, line in release.lines(name):
                if not line.strip():
                    continue
                rows += 1
                tweet = tweet_id(line)
                if not tweet:
                    release.problem("malformed_id", name, row, line[:80])
                elif where.setdefault(tweet, split) != split:
                    raise DuplicateIdError(
                        f"the id {tweet} is in {lists[where[tweet]]} too.", file=release.root / name, row=row
                    )
                elif tweet in ids[split]:
                    release.problem("repeated_id", name, row, tweet)
                else:
                    ids[split][tweet] = None
            self._check_length(name, rows)
        return {split: list(tweets) for split, tweets in ids.items()}

    def _check_length(self, name: str, rows: int) -> None:
        official = _OFFICIAL_IDS[name.rpartition("/")[2]]
        if rows != official:
            self.release.problem("id_list_not_as_released", name, "", f"{rows:,} ids, the release has {official:,}")

    def _timeline(self, name: str) -> Iterator[tuple[int, str, str, str, str]]:
        """Row, screen name, tweet id, text and image address of each post, once; those not in the list `kb` left out."""
        release = self.release
        listed = self._kb_ids()
        there = np.zeros(0 if listed is None else len(listed), dtype=bool)
        seen: set[int] = set()
        for row, line in release.lines(name):
            if not line.strip():
                continue
            fields = line.split("\t")
            if len(fields) == 3:
                fields.append("")
            tweet = tweet_id(fields[1]) if len(fields) == 4 else ""
            if not tweet or not account_id(fields[0]):
                release.problem("malformed_row", name, row, line[:80])
                continue
            number = int(tweet)
            if listed is None:
                repeated = number in seen
                seen.add(number)
            else:
                place = int(np.searchsorted(listed, np.uint64(number)))
                if place == len(listed) or int(listed[place]) != number:
                    release.problem("row_of_unlisted_tweet", name, row, tweet)
                    continue
                repeated = bool(there[place])
                there[place] = True
            if repeated:
                release.problem("repeated_row", name, row, tweet)
            else:
                yield row, fields[0].strip(), tweet, fields[2], fields[3].strip()
        if gone := len(there) - int(there.sum()):  # up to millions: one line for all
            release.problem("tweet_gone", _KB, "", f"{gone:,} of {len(there):,} posts")

    def _kb_ids(self) -> np.ndarray | None:
        """The ids of the release's list of posts, sorted; eight bytes each, for there are millions. `None` without it."""
        release = self.release
        if release.first(_KB) is None:
            release.problem("missing_file", _KB, "", "posts are not checked against the release's list")
            return None
        numbers, rows = array("Q"), 0
        for row, line in release.lines(_KB):
            if line.strip():
                rows += 1
                if tweet := tweet_id(line):
                    numbers.append(int(tweet))
                else:
                    release.problem("malformed_id", _KB, row, line[:80])
        self._check_length(_KB, rows)
        return np.unique(np.frombuffer(numbers, dtype=np.uint64))

    def _profiles(self, accounts: Mapping[str, str]) -> dict[str, tuple[str, str, str]]:
        """Account → name, description and location, from the user's own file of profiles, if there is one."""
        release = self.release
        name = release.first(*_PROFILES)
        profiles: dict[str, tuple[str, str, str]] = {}
        for row, line in release.lines(name) if name else ():
            if not line.strip():
                continue
            fields = _profile(line) if str(name).endswith(".jsonl") else line.split("\t")
            if fields is None or len(fields) > 4 or not account_id(fields[0]):
                release.problem("malformed_row", str(name), row, line[:80])
            elif account_id(fields[0]) not in accounts:
                release.problem("profile_of_unknown_account", str(name), row, fields[0])
            else:
                title, description, location = (" ".join(field.split()) for field in [*fields[1:], "", "", ""][:3])
                profiles.setdefault(account_id(fields[0]), (title, description, location))
        return profiles


def _profile(line: str) -> list[str] | None:
    """Screen name, name, description and location of a line of JSON; `None` if it is not of this form."""
    try:
        value = json.loads(line)
        fields = [value.get(key) or "" for key in ("screen_name", "name", "description", "location")]
        "".join(fields).encode()  # a text, and without half of a surrogate pair
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None
    return fields


BUILDER_CLASS = TweetsMel

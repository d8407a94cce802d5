"""Tweets-MEL (Twitter-MEL): ambiguous last names in tweets, linked to Twitter accounts.

The release has ids only (`mel_train_ids`, `mel_dev_ids`, `mel_test_ids`, `kb`), as Twitter's terms demand. Users fetch the
tweets themselves, in the form that the programs of the release write:

- `Train.txt`, `Dev.txt`, `Test.txt`: seven columns separated by tabs: tweetId, startPos, endPos, mention, @screenName,
  text (with the mention in place of the screen name), mediaURL (may be missing).
- `mapSreenNameToMention.txt`: `@screenName|mention`, the accounts that a mention may mean.
- `timelineKB.txt` (or `timeline_KB.txt`): @screenName, tweetId, text, imageURL.

The builder also reads files that are not part of the release, if they exist: `profiles.tsv` (@screenName, name,
description and optionally location, separated by tabs) or `profiles.jsonl` (objects with the keys screen_name, name,
description, location); and PFMEL's lists of ids (`Train_ids.txt`, `Train07_ids.txt`, `Train05_ids.txt`, `Dev_ids.txt`,
`Test_ids.txt`), which give one configuration per training list.

The lists of ids decide the split of a tweet. `Train.txt`, `Dev.txt` and `Test.txt` do not, because the program that wrote
them drew them without a seed.
"""

from __future__ import annotations

import heapq
import itertools
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

from hf_mel.dataset_scripts.builder import ReleaseBuilder, ReleaseConfig, mention_row
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.release import ReleaseLog
from hf_mel.dataset_scripts.spans import nearest
from hf_mel.errors import DataFormatError, DuplicateIdError

_ID_LISTS = {"train": "mel_train_ids", "validation": "mel_dev_ids", "test": "mel_test_ids"}
_KB = "kb"
_TWEETS = ("Train.txt", "Dev.txt", "Test.txt")
_TIMELINES = ("timelineKB.txt", "timeline_KB.txt")
_MENTION_MAP = "mapSreenNameToMention.txt"
_PROFILES = ("profiles.jsonl", "profiles.tsv")
#: Configuration → name of PFMEL's training list.
_PFMEL = {"pfmel": "Train", "pfmel_train07": "Train07", "pfmel_train05": "Train05"}
#: Number of ids in each list: from the README of the release, and counted in PFMEL's lists.
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
#: Number of latest posts in an entity row, which is the number that PFMEL reads.
_RECENT_POSTS = 3


def _pfmel_files(config: str) -> dict[str, tuple[str, ...]]:
    """Returns the names that PFMEL's list of ids may have, by split."""
    names = {"train": _PFMEL[config], "validation": "Dev", "test": "Test"}
    return {split: (f"{name}_ids.txt", f"pfmel/{name}_ids.txt") for split, name in names.items()}


def account_id(screen_name: str) -> str:
    """Returns the entity id of an account, "@" and the screen name in lower case; empty if it is not a screen name.

    Twitter ignores case in screen names, and files that were fetched at different times spell an account differently.
    """
    name = screen_name.strip().removeprefix("@")
    return f"@{name.lower()}" if re.fullmatch(r"[A-Za-z0-9_]{1,50}", name) else ""


def tweet_id(text: str) -> str:
    """Returns the digits of a tweet id, empty if it is not one. Ids stay strings: they have too many digits for a float."""
    digits = text.strip().strip("\"'")
    return digits if re.fullmatch(r"[0-9]{1,19}", digits) else ""


def image_names(url: str, tweet: str) -> list[str]:
    """Returns file names that the image of a tweet may have: the last part of its URL, or the id of the tweet."""
    try:  # not os.path: `datasets` replaces it in a builder's module by a version for URLs, in which "" becomes "."
        parts = urlsplit(url.strip())
        name, form = parts.path.rpartition("/")[2], parse_qs(parts.query).get("format", [""])[0]
    except ValueError:  # a URL with an unpaired bracket
        name, form = url.strip().rpartition("/")[2], ""
    names = [name] if name else []
    if names and form:
        names.append(f"{name}.{form}")
    return [*names, f"{tweet}.jpg", f"{tweet}.png"]


class _Tweet(NamedTuple):
    """One row of the fetched tweets."""

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
class TweetsMelConfig(ReleaseConfig):
    """Folders of the raw files, and the images of an entity.

    Args:
        timeline_images (`int` or `str`, defaults to 0): The number of images of its timeline that an account has in
            `entities`, the latest first, or "all". With "all" they are T(e) of PFMEL. An account without such an image,
            and with 0 every account, has its profile picture instead.
    """

    timeline_images: int | str = 0


class TweetsMel(ReleaseBuilder):
    """Builder of Tweets-MEL, of the posts of its accounts, and of PFMEL's selections of mentions."""

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
    BUILDER_CONFIG_CLASS = TweetsMelConfig
    #: Unknown, because only some of the listed tweets can still be fetched. The builder checks the lengths of the lists.
    OFFICIAL_COUNTS: dict[str, dict[str, int | None]] = {
        "mentions": dict.fromkeys(_ID_LISTS),
        "entities": {"kb": None},
        "posts": {"kb": None},
    }

    LAYOUTS = {"ids": list(_ID_LISTS.values())}
    CONFIGS = {
        "mentions": "Tweets with a last name, its account and image.",
        "entities": "The accounts.",
        "posts": "The timelines of the accounts.",
        "pfmel": "PFMEL's mentions.",
        "pfmel_train07": "PFMEL's mentions with its training list Train07.",
        "pfmel_train05": "PFMEL's mentions with its training list Train05.",
    }
    COLUMNS = {
        "entities": {
            "screen_name": datasets.Value("string"),
            "location": datasets.Value("string"),
            "recent_posts": [datasets.Value("string")],
        }
    }

    @classmethod
    def configs_in(cls, data_dir: str | os.PathLike[str], options: Mapping[str, Any]) -> list[str]:
        """Returns the configurations whose files are in `data_dir`."""
        root = Path(data_dir)
        configs = ["mentions", "entities"]
        if any((root / name).is_file() for name in _TIMELINES):
            configs.append("posts")
        for config in _PFMEL:
            if all(any((root / name).is_file() for name in names) for names in _pfmel_files(config).values()):
                configs.append(config)
        return configs

    def open_release(self) -> ReleaseLog:
        """Reads tweets, candidates and lists of ids, too. Only the configuration `mentions` logs their problems."""
        self.release = super().open_release()
        self.tweets = self._read_tweets()
        self.candidates = self._read_candidates()
        self.ids = self._read_ids(_ID_LISTS)
        if self.config.name == "mentions":
            listed = {tweet for tweets in self.ids.values() for tweet in tweets}
            for tweet, rows in self.tweets.items():
                if tweet not in listed:
                    for row in rows:
                        self.release.problem("row_of_unlisted_tweet", row.file, row.row, tweet)
        else:
            self.release.problems.clear()
        return self.release

    def splits(self) -> list[str]:
        """Returns the splits with at least one tweet, after reading PFMEL's lists of ids if they are asked for."""
        release, lists = self.release, _ID_LISTS
        if self.config.name in _PFMEL:
            lists = self._find_pfmel_lists()
            self.ids = self._read_ids(lists)
        splits = []
        for split, tweets in self.ids.items():
            for tweet in tweets:
                if tweet not in self.tweets:
                    release.problem("tweet_gone", lists[split], tweet, split)
            if any(tweet in self.tweets for tweet in tweets):
                splits.append(split)
            else:
                release.problem("split_left_out", lists[split], "", f"{split}: none of its tweets is there")
        if not splits:
            raise DataFormatError(
                f"The folder has rows of none of the tweets in {', '.join(lists.values())}.",
                file=release.root,
                remedy=f"The first column of {', '.join(_TWEETS)} must hold ids of these lists. If you have no tweets of"
                " PFMEL's lists, remove those lists.",
            )
        return splits

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split."""
        release = self.release
        folder = release.find_folder(self.config.images, "images", "media", "mention_images")
        log_problems = self.config.name == "mentions"  # once, not again for PFMEL's selections
        for tweet in self.ids[split]:
            rows = self.tweets.get(tweet, [])
            for k, row in enumerate(rows):
                start, end = (
                    int(offset) if re.fullmatch(r"[0-9]{1,6}", offset) else -1 for offset in (row.start, row.end)
                )
                if not 0 <= start < end or row.text[start:end] != row.mention:
                    start, end = nearest(row.text, row.mention, start)
                    if start >= 0 and log_problems:
                        release.problem("span_repaired", row.file, row.row, f"{row.start}:{row.end} → {start}:{end}")
                image = read_image(folder, *image_names(row.url, tweet))
                if image is None and row.url and log_problems:
                    release.problem("missing_mention_image", row.file, row.row, row.url)
                mention_id = tweet if len(rows) == 1 else f"{tweet}-{k}"
                yield mention_row(
                    mention_id=mention_id,
                    # Each row replaces the screen name of its own mention only, so rows of a tweet may differ in text.
                    context_id=tweet if row.text == rows[0].text else mention_id,
                    text=row.text,
                    mention=row.mention,
                    start=start,
                    end=end,
                    image=image,
                    entity_id=account_id(row.screen_name),
                    candidates=self.candidates.get(row.mention.lower(), []),
                )

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the accounts of the map, of the timelines, and of the listed tweets, in this order."""
        release = self.release
        folder = release.find_folder(self.config.entity_images, "entity_images")
        spellings: dict[str, str] = {}  # the first spelling of each account
        last_names: dict[str, str] = {}
        for screen_name, mention in self._read_map():
            spellings.setdefault(account_id(screen_name), screen_name)
            last_names.setdefault(account_id(screen_name), mention)
        recent: dict[str, list[tuple[int, str]]] = {}
        image_limit = self._timeline_limit()
        timeline_folder = self._timeline_folder()
        posts_of: dict[str, list[tuple[int, str]]] = {}  # number and image address of an account's posts
        if timeline := release.find_file(*_TIMELINES):
            for _, screen_name, tweet, text, url in self._read_timeline(timeline):
                account = account_id(screen_name)
                spellings.setdefault(account, screen_name)
                latest = recent.setdefault(account, [])
                (heapq.heappush if len(latest) < _RECENT_POSTS else heapq.heappushpop)(latest, (int(tweet), text))
                if image_limit != 0:
                    posts_of.setdefault(account, []).append((int(tweet), url))
        listed = set().union(*self._read_ids(_ID_LISTS).values())
        for config in _PFMEL:
            for names in _pfmel_files(config).values():
                if name := release.find_file(*names):
                    listed.update(*self._read_ids({"": name}).values())
        # `mentions` logs the problems of the map and of the lists, `posts` those of the timelines.
        release.problems.clear()
        for tweet, rows in self.tweets.items():
            for tweet_row in rows if tweet in listed else ():
                spellings.setdefault(account_id(tweet_row.screen_name), tweet_row.screen_name)
                last_names.setdefault(account_id(tweet_row.screen_name), tweet_row.mention)
        profiles = self._read_profiles(spellings)
        for account, spelling in spellings.items():
            screen_name = spelling.strip().removeprefix("@")
            name, description, location = profiles.get(account, ("", "", ""))
            stems = (screen_name, screen_name.lower())
            timeline_images = (
                read_image(timeline_folder, *image_names(url, str(tweet)))
                for tweet, url in sorted(posts_of.get(account, ()), reverse=True)
            )
            images = list(itertools.islice(filter(None, timeline_images), image_limit))
            if not images:
                image = read_image(
                    folder, *(f"{stem}.{suffix}" for stem in stems for suffix in ("jpg", "png", "jpeg"))
                )
                images = [image] if image else []
            yield {
                "entity_id": account,
                "name": name or last_names.get(account, screen_name),
                "description": description,
                "attributes": f"Location: {location}" if location else "",
                "aliases": [f"@{screen_name}"],
                "images": images,
                "screen_name": f"@{screen_name}",
                "location": location,
                "recent_posts": [text for _, text in sorted(recent.get(account, ()), reverse=True)],
            }

    def posts(self) -> Iterator[dict[str, Any]]:
        """Yields the posts of the timelines."""
        release = self.release
        timeline = release.find_file(*_TIMELINES)
        if timeline is None:
            raise DataFormatError(
                f"The folder has no {_TIMELINES[0]}.",
                file=release.root,
                remedy=f"Write one, with the columns @screenName, tweetId, text, imageURL ({self.HOMEPAGE}).",
            )
        folder = self._timeline_folder()
        num_missing = 0
        for _, screen_name, tweet, text, url in self._read_timeline(timeline):
            image = read_image(folder, *image_names(url, tweet))
            num_missing += image is None and bool(url)
            yield {"post_id": tweet, "entity_id": account_id(screen_name), "text": text, "image": image}
        if num_missing:  # up to millions: one entry for all
            release.problem("missing_post_image", timeline, "", f"{num_missing:,} images are not there")

    def _timeline_folder(self) -> Path | None:
        return self.release.find_folder(self.config.entity_images, "timeline_images", "entity_images", "images")

    def _timeline_limit(self) -> int | None:
        """Returns the maximum number of timeline images of an account; `None` for all."""
        value = self.config.timeline_images
        if value == "all":
            return None
        try:
            limit = int(value)
        except ValueError:
            limit = -1
        if limit < 0:
            raise DataFormatError(
                f"The option timeline_images is {value!r}.", remedy="Give a number of at least 0, or all."
            )
        return limit

    def _read_tweets(self) -> dict[str, list[_Tweet]]:
        """Reads the fetched rows by tweet id, in file order. A tweet may mention several accounts, each in one row."""
        release = self.release
        files = [name for name in _TWEETS if release.find_file(name)]
        if not files:
            raise DataFormatError(
                "The folder holds the ids of tweets, but no tweets, because the release may contain ids only. The builder"
                " needs, in UTF-8 and without header:\n"
                f"  {', '.join(_TWEETS)} (one of them suffices): tweetId, startPos, endPos, mention, @screenName, text"
                " with the mention in place of the screen name, mediaURL, separated by tabs\n"
                "and, if you have them:\n"
                f"  {_MENTION_MAP}: @screenName|mention, the accounts that a mention may mean (the candidates)\n"
                f"  {_TIMELINES[0]}: @screenName, tweetId, text, imageURL, separated by tabs (the posts)\n"
                f"  {_PROFILES[1]}: @screenName, name, description, location, separated by tabs (not from the release)\n",
                file=release.root,
                remedy="Fetch the tweets of the id lists with your own access to Twitter and write these files. The README"
                f" of the release describes them, and its corpus/README.md names programs for it ({self.HOMEPAGE}).",
            )
        tweets: dict[str, list[_Tweet]] = {}
        for name in files:
            for row, line in release.read_lines(name):
                if not line.strip():
                    continue
                fields = line.split("\t")
                if len(fields) == 6:  # the program of the release drops the last tab together with the URL
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
                tweet_rows = tweets.setdefault(tweet, [])
                if any(account_id(other.screen_name) == account_id(screen_name) for other in tweet_rows):
                    release.problem("repeated_row", name, row, tweet)
                    continue
                tweet_rows.append(_Tweet(name, row, tweet, start, end, mention, screen_name, text, url))
        return tweets

    def _read_map(self) -> Iterator[tuple[str, str]]:
        """Yields screen name and mention of each line of the map, if it exists."""
        if self.release.find_file(_MENTION_MAP):
            for row, line in self.release.read_lines(_MENTION_MAP):
                screen_name, separator, mention = line.partition("|")
                if separator and mention.strip() and account_id(screen_name):
                    yield screen_name.strip(), mention.strip()
                elif line.strip():
                    self.release.problem("malformed_row", _MENTION_MAP, row, line[:80])

    def _read_candidates(self) -> dict[str, list[str]]:
        """Reads the ids of the accounts that a mention may mean, by mention in lower case."""
        candidates: dict[str, dict[str, None]] = {}
        for screen_name, mention in self._read_map():
            candidates.setdefault(mention.lower(), {})[account_id(screen_name)] = None
        return {mention: list(accounts) for mention, accounts in candidates.items()}

    def _find_pfmel_lists(self) -> dict[str, str]:
        lists = {}
        for split, names in _pfmel_files(self.config.name).items():
            file = self.release.find_file(*names)
            if file is None:
                raise DataFormatError(
                    f"The folder has no {names[0]}, which is one of PFMEL's lists of ids.",
                    file=self.release.root,
                    remedy="Download it from the folder data of https://github.com/numsi/mel_nsp.",
                )
            lists[split] = file
        return lists

    def _read_ids(self, lists: Mapping[str, str]) -> dict[str, list[str]]:
        """Reads the ids of each split, in file order.

        Raises:
            DuplicateIdError: An id is in two splits.
        """
        release = self.release
        split_of: dict[str, str] = {}
        ids: dict[str, dict[str, None]] = {split: {} for split in lists}
        for split, name in lists.items():
            rows = 0
            for row, line in release.read_lines(name):
                if not line.strip():
                    continue
                rows += 1
                tweet = tweet_id(line)
                if not tweet:
                    release.problem("malformed_id", name, row, line[:80])
                elif split_of.setdefault(tweet, split) != split:
                    raise DuplicateIdError(
                        f"The id {tweet} is in {lists[split_of[tweet]]} too.",
                        file=release.root / name,
                        row=row,
                        remedy="Remove it from one of the lists.",
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

    def _read_timeline(self, name: str) -> Iterator[tuple[int, str, str, str, str]]:
        """Yields row, screen name, tweet id, text and image URL of each post that the list `kb` has, once."""
        release = self.release
        listed = self._read_kb_ids()
        is_present = np.zeros(0 if listed is None else len(listed), dtype=bool)
        seen: set[int] = set()
        for row, line in release.read_lines(name):
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
                position = int(np.searchsorted(listed, np.uint64(number)))
                if position == len(listed) or int(listed[position]) != number:
                    release.problem("row_of_unlisted_tweet", name, row, tweet)
                    continue
                repeated = bool(is_present[position])
                is_present[position] = True
            if repeated:
                release.problem("repeated_row", name, row, tweet)
            else:
                yield row, fields[0].strip(), tweet, fields[2], fields[3].strip()
        if num_gone := len(is_present) - int(is_present.sum()):  # up to millions: one entry for all
            release.problem("tweet_gone", _KB, "", f"{num_gone:,} of {len(is_present):,} posts")

    def _read_kb_ids(self) -> np.ndarray | None:
        """Reads the list of posts as sorted numbers, because it has millions of ids; `None` without the list."""
        release = self.release
        if release.find_file(_KB) is None:
            release.problem("missing_file", _KB, "", "posts are not checked against the release's list")
            return None
        numbers, rows = array("Q"), 0
        for row, line in release.read_lines(_KB):
            if line.strip():
                rows += 1
                if tweet := tweet_id(line):
                    numbers.append(int(tweet))
                else:
                    release.problem("malformed_id", _KB, row, line[:80])
        self._check_length(_KB, rows)
        return np.unique(np.frombuffer(numbers, dtype=np.uint64))

    def _read_profiles(self, accounts: Mapping[str, str]) -> dict[str, tuple[str, str, str]]:
        """Reads name, description and location of accounts from the user's file of profiles, if it exists."""
        release = self.release
        name = release.find_file(*_PROFILES)
        profiles: dict[str, tuple[str, str, str]] = {}
        for row, line in release.read_lines(name) if name else ():
            if not line.strip():
                continue
            fields = _parse_profile(line) if str(name).endswith(".jsonl") else line.split("\t")
            if fields is None or len(fields) > 4 or not account_id(fields[0]):
                release.problem("malformed_row", str(name), row, line[:80])
            elif account_id(fields[0]) not in accounts:
                release.problem("profile_of_unknown_account", str(name), row, fields[0])
            else:
                title, description, location = (" ".join(field.split()) for field in [*fields[1:], "", "", ""][:3])
                profiles.setdefault(account_id(fields[0]), (title, description, location))
        return profiles


def _parse_profile(line: str) -> list[str] | None:
    """Returns screen name, name, description and location of a line of JSON, or `None` if it is malformed."""
    try:
        value = json.loads(line)
        fields = [value.get(key) or "" for key in ("screen_name", "name", "description", "location")]
        "".join(fields).encode()  # fails for other types than strings and for unpaired surrogates
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None
    return fields


BUILDER_CLASS = TweetsMel

"""Fetches the images that the entities of a data set name (`image_file`) from Wikimedia Commons, and stores them in it.

Images are kept in a folder of their own, so that no second build fetches them again:

- `images.jsonl`: one JSON object a line for each file that was fetched, with its licence and author, or that cannot be
  had. A line is appended as soon as its image is on disk. A line that was cut off is ignored.
- the images, each under the start of the sha256 of its name on Commons.

Requests follow the rules of https://www.mediawiki.org/wiki/API:Etiquette: one at a time, with a user agent, a limit on
their rate, `maxlag`, fifty files in one question, and a longer wait after each refusal or as long as the server says.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import itertools
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_mel.building.build import REPORT_FILE, write_report_and_card
from hf_mel.building.builders import find_builder
from hf_mel.building.columns import read_parquet
from hf_mel.building.report import BuildReport
from hf_mel.data.images import verify_image
from hf_mel.errors import DataFormatError, ImageError, MelError, MissingExtraError
from hf_mel.files import building_folder, link_target, local_path, replace_file, replace_folder
from hf_mel.locks import writer_lock

logger = logging.getLogger(__name__)

#: Address of Wikimedia Commons.
COMMONS = "https://commons.wikimedia.org"
#: Widths in pixels at which Wikimedia keeps scaled images ready. Others have to be made for you, and may be refused.
WIDTHS = (120, 250, 330, 500, 960, 1280)
#: Columns about the image of an entity, which are added to `entities`.
CREDIT_COLUMNS = ("image_license", "image_license_url", "image_author", "image_page")

_LOG = "images.jsonl"
#: Files that one question may name.
_BATCH = 50
#: Attempts of a request before it counts as failed, and failed requests in a row before fetching ends.
_ATTEMPTS, _MAX_FAILURES = 5, 3
#: Statuses after which a request is repeated.
_TRY_AGAIN = (429, 500, 502, 503, 504)
_MAX_BYTES = 64 << 20
#: Characters that no page of a wiki has in its name. "|" would end the name within a question.
_NO_NAME = re.compile(r"[\x00-\x1f|#<>\[\]{}\x7f]")


@dataclass
class FetchReport:
    """Result of fetching.

    Args:
        folder (`Path`): Folder of the images.
        num_wanted (`int`): Number of files that the entities name.
        num_fetched (`int`): Number of files that this call fetched.
        num_kept (`int`): Number of files that were there before.
        absent (`dict[str, str]`): Files that cannot be had, with the reason: Commons does not have them, or they are no
            images. They are not asked for again.
        failed (`dict[str, str]`): Files whose request failed, with the reason. The next call asks for them again.
        num_entities (`int`): Number of entities with an image.
    """

    folder: Path
    num_wanted: int
    num_fetched: int
    num_kept: int
    absent: dict[str, str]
    failed: dict[str, str]
    num_entities: int


def add_images(
    dataset: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    width: int = 500,
    rate: float = 2.0,
    contact: str | None = None,
    url: str = COMMONS,
    backoff: float = 1.0,
    progress: bool = True,
) -> FetchReport:
    """Fetches the images of a data set's entities, and stores them in its column `images`.

    The data set gets the columns [`CREDIT_COLUMNS`]. It is replaced when everything has been written. An interrupted
    call goes on when it is repeated.

    Args:
        dataset (`str` or `os.PathLike`): Folder of a data set that `hf-mel data build` wrote, whose entities have a column
            `image_file` with names of files on Commons.
        images (`str` or `os.PathLike`, *optional*): Folder of the images. Default: `dataset` with "-images" appended.
        width (`int`): Width in pixels to which the server scales larger images; one of [`WIDTHS`].
        rate (`float`): Requests per second, at most.
        contact (`str`, *optional*): Mail address or page of whoever runs this, for the user agent.
        url (`str`): Address of the wiki, without its path `/w/api.php`.
        backoff (`float`): Seconds to wait before the first repetition of a request. Each further one waits twice as long.
        progress (`bool`): Whether to show progress bars.

    Returns:
        [`FetchReport`]

    Raises:
        DataFormatError: The folder is no built data set, or its entities name no images.
        MelError: The server cannot be reached, an argument is out of range, or the disk is full. Fetched images are kept.
        LockedError: Another process changes the data set or the folder of images.
        MissingExtraError: requests is not installed.
    """
    if width not in WIDTHS:
        raise MelError(f"Wikimedia has no images {width} pixels wide.", remedy=f"Choose from {_listed(WIDTHS)}.")
    if not 0 < rate <= 100:
        raise MelError(f"{rate} requests per second are out of range.", remedy="Give a rate above 0, up to 100.")
    target = link_target(dataset)
    report = _read_report(target)
    files = sorted((target / "entities").glob("*.parquet"))
    wanted = _wanted_files(target, files)
    folder = Path(images) if images is not None else target.with_name(f"{target.name}-images")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writer_lock(
            folder / ".lock", busy="Images are being fetched into it", remedy="Wait for the process.", target=folder
        ):
            log = _read_log(folder)
            before = [name for name in wanted if name in log]
            client = _Client(url, rate, contact, backoff, width)
            missing = [name for name in wanted if name not in log]
            failed = _fetch(client, folder, missing, log, progress)
            num_entities = _store(target, files, folder, log, report, progress)
    except OSError as error:
        raise MelError(
            f"The images cannot be stored ({error}).", file=folder, remedy="Check permissions and free disk space."
        ) from error
    absent = {name: log[name]["error"] for name in wanted if "error" in log.get(name, {})}
    num_fetched = sum(name in log and "error" not in log[name] for name in missing)
    num_kept = sum("error" not in log[name] for name in before)
    return FetchReport(folder, len(wanted), num_fetched, num_kept, absent, failed, num_entities)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _read_report(folder: Path) -> BuildReport:
    try:
        return BuildReport.from_dict(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")), folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataFormatError(
            "The folder holds no data set that hf-mel data build has written.",
            file=folder,
            remedy="Give the --output of a build.",
        ) from error


def _wanted_files(target: Path, files: list[Path]) -> list[str]:
    """Returns the names that the entities have in `image_file`, in their order, each once."""
    if not files or "image_file" not in pq.read_schema(local_path(files[0])).names:
        raise DataFormatError(
            "The entities of this data set have no column image_file.",
            file=target,
            remedy="Give a data set whose entities name files of Wikimedia Commons, such as one built from Wikidata.",
        )
    names: dict[str, None] = {}
    for file in files:
        for table in read_parquet(file, ["image_file"]):
            names.update(dict.fromkeys(name for name in table["image_file"].to_pylist() if name))
    return list(names)


def _read_log(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the entry of each file whose image is there, or that cannot be had."""
    log: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / _LOG).read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                name, path = entry["file"], entry.get("path")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut off by an interruption
            if "error" in entry or (path and (folder / path).is_file()):
                log[name] = entry
    return log


def _append(folder: Path, log: dict[str, dict[str, Any]], entry: dict[str, Any]) -> None:
    path = folder / _LOG
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line before was cut off
                file.write(b"\n")
        file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    log[entry["file"]] = entry


def _fetch(
    client: _Client, folder: Path, names: Sequence[str], log: dict[str, dict[str, Any]], progress: bool
) -> dict[str, str]:
    """Fetches files, adds them to the log, and returns those whose request failed, with the reason.

    Raises:
        MelError: Several requests in a row failed.
    """
    failed: dict[str, str] = {}
    in_a_row = 0
    with tqdm(total=len(names), desc="Fetching images", unit="file", disable=not progress) as bar:
        for first in range(0, len(names), _BATCH):
            try:
                answers = dict(client.describe(names[first : first + _BATCH]))
            except client.errors as error:
                raise _unreachable(client, folder, log, error) from error
            for name, answer in answers.items():
                try:
                    if "error" not in answer:
                        answer = {**answer, **_store_image(folder, name, client.download(answer["url"]))}
                        in_a_row = 0
                    _append(folder, log, {"file": name, **answer})
                except ImageError as error:
                    _append(folder, log, {"file": name, "error": error.message})
                except client.errors as error:
                    failed[name] = str(error)
                    in_a_row += 1
                    if in_a_row >= _MAX_FAILURES:
                        raise _unreachable(client, folder, log, error) from error
                bar.update()
    return failed


def _unreachable(client: _Client, folder: Path, log: dict[str, Any], error: Exception) -> MelError:
    return MelError(
        f"The server cannot be reached, or refuses ({error}).",
        file=client.url,
        remedy=f"Repeat the command later. {len(log):,} files are kept in {folder}.",
    )


def _store_image(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    """Writes an image, and returns its path in the folder, size and digest.

    Raises:
        ImageError: The bytes are no image that can be decoded.
    """
    verify_image(data)
    digest = hashlib.sha256(name.encode()).hexdigest()
    path = Path(digest[:2], digest[:24])
    with replace_file(folder / path) as temporary:
        temporary.write_bytes(data)
    return {"path": path.as_posix(), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class _Client:
    """Asks a wiki about files and fetches them, one request at a time.

    Attributes:
        errors (`tuple`): Classes of errors of a request that failed after all repetitions.
    """

    def __init__(self, url: str, rate: float, contact: str | None, backoff: float, width: int):
        try:
            import requests
            from requests.adapters import HTTPAdapter
            from urllib3.util.retry import Retry
        except ImportError as error:
            raise MissingExtraError(
                "Images are fetched with requests, which is not installed.",
                remedy='Run pip install "hf_mel[wikidata]".',
            ) from error
        self.url, self._pause, self._width, self._last, self._backoff = url.rstrip("/"), 1 / rate, width, 0.0, backoff
        self.errors = (requests.RequestException, _Refusal)
        self._session = requests.Session()
        about = f"; {contact}" if contact else ""
        self._session.headers["User-Agent"] = f"hf_mel/{_version()} (https://huggingface.co/hf-mel{about})"
        retries = Retry(
            total=_ATTEMPTS - 1,
            backoff_factor=backoff,
            status_forcelist=_TRY_AGAIN,
            allowed_methods=["GET"],
            respect_retry_after_header=True,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retries))

    def describe(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (file, address, licence and author) of files, or an `error` of one that cannot be had."""
        answer = self._ask(
            {
                "action": "query",
                "format": "json",
                "formatversion": "2",
                "prop": "imageinfo",
                "iiprop": "url|extmetadata",
                "iiextmetadatafilter": "LicenseShortName|LicenseUrl|Artist|Credit",
                "iiurlwidth": str(self._width),
                "redirects": "1",
                "maxlag": "5",
                "titles": "|".join(f"File:{name}" for name in names if not _NO_NAME.search(name)),
            }
        )
        query = answer.get("query") or {}
        renamed = {entry["from"]: entry["to"] for key in ("normalized", "redirects") for entry in query.get(key) or ()}
        pages = {page["title"]: page for page in query.get("pages") or ()}
        for name in names:
            title = f"File:{name}"
            for _ in range(3):
                title = renamed.get(title, title)
            yield name, _description(pages.get(title, {}))

    def _ask(self, parameters: dict[str, str]) -> dict[str, Any]:
        for attempt in itertools.count(1):
            response = self._get(f"{self.url}/w/api.php", params=parameters)
            answer = response.json()  # its error is a RequestException
            error = answer.get("error") if isinstance(answer, dict) else {"code": "no object"}
            if not error:
                return answer
            if error.get("code") not in ("maxlag", "ratelimited", "readonly") or attempt == _ATTEMPTS:
                raise _Refusal(f"{error.get('code')}: {error.get('info')}")
            time.sleep(_seconds(response.headers.get("Retry-After"), self._backoff * 2**attempt))
        raise AssertionError

    def download(self, url: str) -> bytes:
        """Returns the bytes at an address.

        Raises:
            ImageError: There are too many.
        """
        response = self._get(url, stream=True)
        chunks, size = [], 0
        with response:
            for chunk in response.iter_content(1 << 20):
                chunks.append(chunk)
                size += len(chunk)
                if size > _MAX_BYTES:
                    raise ImageError(f"The file has more than {_MAX_BYTES >> 20} MiB.")
        expected = response.headers.get("Content-Length")
        if expected is not None and "Content-Encoding" not in response.headers and int(expected) != size:
            raise _Refusal(f"the answer ended after {size:,} of {int(expected):,} bytes")
        return b"".join(chunks)

    def _get(self, url: str, **options: Any) -> Any:
        time.sleep(max(0.0, self._last + self._pause - time.monotonic()))
        self._last = time.monotonic()
        response = self._session.get(url, timeout=(10, 60), **options)
        if response.status_code in (404, 410):
            raise ImageError(f"The server answers {response.status_code} to {url}.")
        response.raise_for_status()
        return response


class _Refusal(Exception):
    """The server answers that it will not."""


def _seconds(text: str | None, default: float) -> float:
    try:
        return min(float(text or default), 120.0)
    except ValueError:
        return default


def _description(page: dict[str, Any]) -> dict[str, Any]:
    infos = page.get("imageinfo") or ()
    if not infos:
        return {"error": "Wikimedia Commons has no such file."}
    info, metadata = infos[0], infos[0].get("extmetadata") or {}

    def text(key: str) -> str:
        return plain_text(str((metadata.get(key) or {}).get("value") or ""))

    return {
        "url": info.get("thumburl") or info["url"],
        "page": info.get("descriptionurl") or "",
        "license": text("LicenseShortName"),
        "license_url": text("LicenseUrl"),
        "author": text("Artist"),
        "credit": text("Credit"),
    }


def plain_text(markup: str) -> str:
    """Returns the text of HTML as Wikimedia writes authors, without tags, hidden parts and repeated spaces."""
    markup = re.sub(r"(?is)<(style|script)\b.*?</\1>|<[^>]*display:\s*none[^>]*>.*?</[^>]*>", " ", markup)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def _version() -> str:
    from importlib.metadata import version

    return version("hf_mel")


def _store(
    target: Path,
    files: list[Path],
    folder: Path,
    log: dict[str, dict[str, Any]],
    report: BuildReport,
    progress: bool,
) -> int:
    """Writes the data set anew with the images, and returns the number of entities that have one."""
    with building_folder(target, uuid.uuid4().hex) as stage:
        ready = stage / "ready"
        names = {file.name for file in files} | {REPORT_FILE, "README.md"}
        shutil.copytree(target, ready, ignore=lambda _, entries: [name for name in entries if name in names])
        (ready / "entities").mkdir(exist_ok=True)
        num_rows = num_images = num_with_image = num_bytes = 0
        features: datasets.Features | None = None
        rows_in_all = sum(pq.read_metadata(local_path(file)).num_rows for file in files)
        with tqdm(total=rows_in_all, desc="Storing images", unit="row", disable=not progress) as bar:
            for file in files:
                features = features or _features_with_credits(file)
                with pq.ParquetWriter(
                    local_path(ready / "entities" / file.name), features.arrow_schema, compression="zstd"
                ) as writer:
                    for table in _small_tables(file):
                        rows = [_with_image(row, folder, log) for row in table.to_pylist()]
                        with_images = pa.Table.from_pylist(rows, schema=features.arrow_schema)
                        writer.write_table(with_images)
                        num_rows += len(rows)
                        num_images += sum(len(row["images"]) for row in rows)
                        num_with_image += sum(bool(row["images"]) for row in rows)
                        num_bytes += with_images.nbytes
                        bar.update(len(rows))
        assert features is not None
        _update_report(report, log, num_rows, num_images, num_with_image)
        infos = _infos(target, features, num_bytes, num_rows, ready)
        write_report_and_card(ready, find_builder(report.dataset), infos, report)
        replace_folder(ready, target)
    return num_with_image


def _small_tables(file: Path) -> Iterator[pa.Table]:
    """Yields the rows of a file in tables of at most 250, because their images are in memory together."""
    for table in read_parquet(file):
        for first in range(0, len(table), 250):
            yield table.slice(first, 250)


def _features_with_credits(file: Path) -> datasets.Features:
    features = datasets.Features.from_arrow_schema(pq.read_schema(local_path(file)))
    features["images"] = [datasets.Image()]
    return datasets.Features({**features, **{column: datasets.Value("string") for column in CREDIT_COLUMNS}})


def _with_image(row: dict[str, Any], folder: Path, log: dict[str, dict[str, Any]]) -> dict[str, Any]:
    entry = log.get(row["image_file"] or "", {})
    credit = dict.fromkeys(CREDIT_COLUMNS, "")
    if "path" not in entry:
        return {**credit, **row}
    image = {"bytes": (folder / entry["path"]).read_bytes(), "path": None}
    credit = {f"image_{key}": entry[key] for key in ("license", "license_url", "author", "page")}
    return {**row, **credit, "images": [image]}


def _update_report(
    report: BuildReport, log: dict[str, dict[str, Any]], num_rows: int, num_images: int, num_with_image: int
) -> None:
    report.images["entities"] = {"kb": {"images": num_images, "rows_without": num_rows - num_with_image}}
    report.problems.pop("missing_image", None)
    for name, entry in sorted(log.items()):
        if "error" in entry:
            report.problem("missing_image", "images", name, entry["error"])


def _infos(
    target: Path, features: datasets.Features, num_bytes: int, num_rows: int, ready: Path
) -> dict[str, datasets.DatasetInfo]:
    """Returns features and sizes of all configurations, those of `entities` anew."""
    infos = dict(datasets.info.DatasetInfosDict.from_directory(str(target)))
    download_size = sum(path.stat().st_size for path in (ready / "entities").glob("*.parquet"))
    infos["entities"] = datasets.DatasetInfo(
        features=features,
        splits=datasets.SplitDict({"kb": datasets.SplitInfo("kb", num_bytes=num_bytes, num_examples=num_rows)}),
        download_size=download_size,
        dataset_size=num_bytes,
    )
    return infos

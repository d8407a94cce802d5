"""Traces of linked mentions: what a later change of the knowledge base must be compared with, stored beside the results.

`NAME.relink` beside the results NAME is a safetensors file with one row for each linked mention. Its header has the settings
of the linker and the sha256 of the results that it belongs to.

Results and traces change together: new traces are first written to `.NAME.relink`, then both are renamed, the results first.
Of the two files of traces, the one with the sha256 of the results counts, so that a kill at any moment loses nothing.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_mel.errors import DataFormatError, MelError
from hf_mel.files import file_sha256, link_target, replace_file
from hf_mel.inference.score_bounds import QueryCodes

_FORMAT, _VERSION = "hf_mel.relink", "1"
_SUFFIX = ".relink"
_LINK_AGAIN = "Link the mentions again: hf-mel link … --input FILE --output RESULTS --relinkable"


@dataclass
class LinkTrace:
    """How the ranking of one mention came out.

    Args:
        physical_rows (`list[int]`): Physical rows of the k ranked entities in the knowledge base, best first.
        scores (`list[float]`): Their scores, before a reranker.
        num_tied (`int`): Number of entities with the best score.
        has_namesakes (`bool`): Whether an entity has a name with all words of the mention; `True` if names do not count.
            Without one, the scores of the names depend on all names of the knowledge base.
        query ([`~hf_mel.inference.score_bounds.QueryCodes`], *optional*): The mention, with which scores of later entities
            are bounded. `None` if the model has no bounds.
    """

    physical_rows: list[int]
    scores: list[float]
    num_tied: int
    has_namesakes: bool
    query: QueryCodes | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the trace as plain data for JSON."""
        content: dict[str, Any] = {k: v for k, v in vars(self).items() if k != "query"}
        if self.query is not None:
            content["query"] = [
                [str(part.dtype), list(part.shape), base64.b64encode(part.tobytes()).decode()]
                for part in vars(self.query).values()
            ]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LinkTrace:
        """Reads what [`LinkTrace.to_dict`] returned."""
        parts = [
            np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
            for dtype, shape, data in content.get("query") or ()
        ]
        return cls(**{**content, "query": QueryCodes(*parts) if parts else None})


@dataclass(frozen=True)
class LinkOrigin:
    """The sources of results, from which single mentions can be linked again.

    Args:
        input (`Path`): The file of the mentions. Paths of images are relative to it.
        model (`str`): Folder or Hub id of the retriever.
        reranker (`str`, *optional*): The same of the reranker.
        revision (`str`, *optional*): Revision of the retriever on the Hub.
    """

    input: Path
    model: str
    reranker: str | None = None
    revision: str | None = None


@dataclass
class Traces:
    """The traces of M linked mentions, and what the results depend on besides the mentions.

    Args:
        settings (`dict`): Of [`EntityLinker.describe`](hf_mel.linking.linker.EntityLinker.describe), and `top_k`.
        origin ([`LinkOrigin`]): With the path of the input relative to the folder of the results.
        lines (`np.ndarray` `[M]`): Line of each mention in the results, counted from 0.
        physical_rows (`np.ndarray` `[M, K]`): Physical rows of its ranked entities, -1 after the last.
        scores (`np.ndarray` `[M, K]`): Their scores (float32), -inf after the last.
        num_tied, has_namesakes (`np.ndarray` `[M]`): As in [`LinkTrace`].
        queries ([`~hf_mel.inference.score_bounds.QueryCodes`], *optional*): The M mentions.
    """

    settings: dict[str, Any]
    origin: LinkOrigin
    lines: np.ndarray
    physical_rows: np.ndarray
    scores: np.ndarray
    num_tied: np.ndarray
    has_namesakes: np.ndarray
    queries: QueryCodes | None

    @classmethod
    def join(
        cls, traces: Sequence[LinkTrace], lines: Sequence[int], settings: Mapping[str, Any], origin: LinkOrigin
    ) -> Traces:
        """Joins the traces of M mentions."""
        width = max((len(trace.scores) for trace in traces), default=0)
        rows = np.full((len(traces), width), -1, dtype=np.int64)
        scores = np.full((len(traces), width), -np.inf, dtype=np.float32)
        for number, trace in enumerate(traces):
            rows[number, : len(trace.scores)] = trace.physical_rows
            scores[number, : len(trace.scores)] = trace.scores
        queries = [trace.query for trace in traces if trace.query is not None]
        parts = [np.concatenate(values) for values in zip(*(vars(query).values() for query in queries), strict=True)]
        return cls(
            dict(settings),
            origin,
            np.asarray(lines, dtype=np.int64),
            rows,
            scores,
            np.asarray([trace.num_tied for trace in traces], dtype=np.int64),
            np.asarray([trace.has_namesakes for trace in traces], dtype=bool),
            QueryCodes(*parts) if parts else None,
        )

    def __len__(self) -> int:
        return len(self.lines)

    def replace(self, number: int, trace: LinkTrace) -> None:
        """Puts in another trace of one mention, with at most K ranked entities."""
        count = len(trace.scores)
        self.physical_rows[number], self.scores[number] = -1, -np.inf
        self.physical_rows[number, :count], self.scores[number, :count] = trace.physical_rows, trace.scores
        self.num_tied[number], self.has_namesakes[number] = trace.num_tied, trace.has_namesakes
        if self.queries is not None and trace.query is not None:
            for part, new in zip(vars(self.queries).values(), vars(trace.query).values(), strict=True):
                part[number] = new[0]

    def widen(self, width: int) -> None:
        """Makes room for `width` ranked entities of each mention."""
        missing = max(0, width - self.scores.shape[1])
        self.physical_rows = np.pad(self.physical_rows, ((0, 0), (0, missing)), constant_values=-1)
        self.scores = np.pad(self.scores, ((0, 0), (0, missing)), constant_values=-np.inf)

    def _save(self, path: Path, results: Path, sha256: str) -> None:
        """Writes the file of the traces of results with a sha256."""
        arrays = {
            "lines": self.lines,
            "physical_rows": self.physical_rows,
            "scores": self.scores,
            "num_tied": self.num_tied,
            "has_namesakes": self.has_namesakes,
        }
        if self.queries is not None:
            arrays |= {f"query_{name}": part for name, part in vars(self.queries).items()}
        origin = {**vars(self.origin), "input": os.path.relpath(self.origin.input, results.parent)}
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "results": sha256,
            "settings": json.dumps(self.settings, default=str),
            "origin": json.dumps(origin),
        }
        with replace_file(path) as temporary:
            save_file({k: np.ascontiguousarray(array) for k, array in arrays.items()}, temporary, header)
            temporary.chmod(0o644)  # as the results; safetensors lets only the owner read

    @classmethod
    def read(cls, results: Path) -> Traces:
        """Reads the file beside results.

        Raises:
            DataFormatError: The results do not exist, have no traces, were changed after them, or the traces are damaged.
        """
        if not results.is_file():
            raise DataFormatError("The file of results does not exist.", file=results, remedy="Check the path.")
        target = link_target(results)
        paths = [path for path in (trace_path(target), _new_trace_path(target)) if path.is_file()]
        if not paths:
            raise DataFormatError(
                f"The results have no traces ({trace_path(target).name}), which tell what a change of the knowledge base can "
                "reach.",
                file=results,
                remedy=_LINK_AGAIN,
            )
        sha256, damage = file_sha256(results), None
        for path in paths:
            try:
                if (traces := cls._read_file(path, target, sha256)) is not None:
                    return traces
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
                damage = DataFormatError(
                    f"The traces of the results are damaged ({error}).", file=path, remedy=_LINK_AGAIN
                )
                damage.__cause__ = error
        raise damage or DataFormatError(
            "The results were changed after they were linked, so their traces do not fit.",
            file=results,
            remedy=f"Give the unchanged file. Or: {_LINK_AGAIN}",
        )

    @classmethod
    def _read_file(cls, path: Path, results: Path, sha256: str) -> Traces | None:
        """Reads one file; `None` if it belongs to results with another sha256."""
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
            raise ValueError("this hf_mel does not write such a file")
        query = [arrays.pop(f"query_{name}", None) for name in QueryCodes.__dataclass_fields__]
        origin = json.loads(header["origin"])
        origin["input"] = Path(os.path.normpath(results.parent / origin["input"]))
        queries = None if any(part is None for part in query) else QueryCodes(*query)  # type: ignore[arg-type]
        traces = cls(json.loads(header["settings"]), LinkOrigin(**origin), queries=queries, **arrays)
        traces._check_shapes()
        return traces if header["results"] == sha256 else None

    def _check_shapes(self) -> None:
        parts = [self.lines, self.physical_rows, self.scores, self.num_tied, self.has_namesakes]
        parts += [] if self.queries is None else list(vars(self.queries).values())
        if (
            (self.lines < 0).any()
            or {len(part) for part in parts} != {len(self)}
            or self.scores.shape != self.physical_rows.shape
        ):
            raise ValueError("its parts differ in length")
        if not isinstance(self.settings, dict) or np.isnan(self.scores).any():
            raise ValueError("a part is malformed")


def write_traced(results: Path, lines: Iterable[str], traces: Callable[[], Traces]) -> None:
    """Writes results and their traces, so that whoever reads them finds both old or both new.

    Args:
        results (`Path`): The file of the results.
        lines (iterable of `str`): Its lines.
        traces: Returns the traces, after the lines were read.

    Raises:
        MelError: A file cannot be written.
    """
    results = link_target(results)
    new = _new_trace_path(results)
    try:
        _finish_interrupted_write(results, new)
        with replace_file(results) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(lines)
            traces()._save(new, results, file_sha256(temporary))
        new.replace(trace_path(results))
    except (OSError, SafetensorError) as error:
        raise MelError(
            f"The results and their traces cannot be written ({error}).",
            file=results,
            remedy="Check the path and the free disk space.",
        ) from error


def _finish_interrupted_write(results: Path, new: Path) -> None:
    """Renames new traces whose results are in place already, so that those of the next results do not replace them."""
    if not (new.is_file() and results.is_file()):
        return
    try:
        with safe_open(new, framework="np") as file:
            sha256 = (file.metadata() or {}).get("results")
    except SafetensorError:
        return  # damaged, and of no use
    if sha256 == file_sha256(results):
        new.replace(trace_path(results))


def delete_traces(results: Path) -> None:
    """Deletes the traces of results that were replaced by some without traces."""
    for path in (trace_path(results), _new_trace_path(results)):
        path.unlink(missing_ok=True)


def _new_trace_path(results: Path) -> Path:
    """Returns the path of traces that are written before their results are in place."""
    return results.with_name(f".{trace_path(results).name}")


def trace_path(results: str | os.PathLike[str]) -> Path:
    """Returns the path of the traces of results."""
    return Path(results).with_name(Path(results).name + _SUFFIX)

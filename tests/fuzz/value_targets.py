"""Targets that take values: filters, mentions, spans, metrics, names, images, detectors and processors."""

from __future__ import annotations

import itertools
import math
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from hf_mel.data.images import open_image, resize_image, verify_image
from hf_mel.detection.gazetteer import Gazetteer
from hf_mel.detection.spans import checked_spans, windows
from hf_mel.errors import ImageError, MelError
from hf_mel.evaluation.nil import calibrate_nil_threshold
from hf_mel.kb.filters import Filter
from hf_mel.linking.annotating import check_text
from hf_mel.linking.mentions import locate_mention
from hf_mel.names import fold_name, has_all_words, words_of
from hf_mel.spaces.mel_annotation.mel_annotation import annotation_metrics
from hf_mel.spaces.mel_ranking.mel_ranking import ranking_metrics, ranks_from_ids
from hf_mel.terminal import safe_text
from tests.fuzz.engine import Target
from tests.fuzz.strategies import long_texts, megabytes, mutated, mutations, numbers, scalars, texts, values
from tests.kb.test_filters import COLUMNS, TABLE

# Filters

_pieces = st.sampled_from(
    [
        "type",
        "types",
        "born",
        "place",
        "height",
        "alive",
        "day",
        "=",
        "==",
        "!=",
        "<>",
        "<",
        "<=",
        ">",
        ">=",
        "(",
        ")",
        ",",
        "and",
        "or",
        "not",
        "in",
        "is",
        "null",
        "true",
        "false",
        "1",
        "-1",
        "1.5",
        "1e400",
        "1e5",
        "99999999999999999999",
        "'human'",
        "'Rome'",
        "'1999-12-31'",
        "''",
        "''''",
        "'",
        '"',
        '"born"',
        "NOT",
        "In",
        "IS",
        ";",
        "--",
        "0x1",
        ".5",
        "5.",
        "ÿ",
    ]
)
_condition = st.tuples(
    st.sampled_from(["type", "born", "place", "height", "alive", "day"]),
    st.sampled_from(["=", "!=", "<", ">=", "in (", "not in (", "is", "is not"]),
    st.one_of(
        _pieces, numbers.map(repr), texts.map(lambda text: "'" + text.replace("'", "''") + "'"), st.just("null")
    ),
).map(lambda parts: " ".join(parts) + (")" if parts[1].endswith("(") else ""))
_filter = st.one_of(
    st.lists(st.one_of(_condition, st.sampled_from(["and", "or", "not", "(", ")"])), max_size=7).map(" ".join),
    st.lists(_condition, min_size=1, max_size=4).map(" and ".join),
    st.lists(st.one_of(_pieces, texts), max_size=8).map(" ".join),
    st.tuples(st.sampled_from(["(", "not ", "born = 1 or "]), st.integers(1, 3000), st.just("born = 1")).map(
        lambda parts: parts[0] * parts[1] + parts[2]
    ),
)


def _filter_rows(value: str, folder: Path) -> None:
    mask = Filter(value, COLUMNS).mask(lambda name: TABLE[name])
    assert len(mask) == len(TABLE)
    assert mask.null_count == 0


# Mentions, texts and spans

_offsets = st.one_of(st.integers(-3, 12), scalars)
_mention = st.one_of(
    st.fixed_dictionaries(
        {"text": st.one_of(long_texts, st.just("Georgia is a state"))},
        optional={
            "mention": st.one_of(texts, st.sampled_from(["Georgia", "state", "is"])),
            "start": _offsets,
            "end": _offsets,
            "modality": st.sampled_from(["image", "text", ""]),
            "image": values,
        },
    ),
    st.dictionaries(st.sampled_from(["text", "mention", "start", "end", "modality", "image"]), values),
    values,
)


def _locate(value: Any, folder: Path) -> None:
    surface, start, end = locate_mention(value, row=1)
    surface.encode()
    if start >= 0:
        assert value["text"][start:end] == surface


_spans = st.lists(
    st.one_of(
        st.tuples(_offsets, _offsets).map(list),
        st.dictionaries(st.sampled_from(["start", "end", "label", "score"]), scalars),
        values,
    ),
    max_size=6,
)


def _check_spans(value: Any, folder: Path) -> None:
    text, spans = value
    check_text({"text": text, "spans": spans}, row=3)
    kept = checked_spans(text, spans, overlapping=False)
    for first, second in itertools.pairwise(kept):
        assert first.end <= second.start
    for span in kept:
        assert text[span.start : span.end].strip() == text[span.start : span.end] != ""


def _split(value: Any, folder: Path) -> None:
    text, size, margin = value
    inner = "".join(text[part.first : part.last] for part in windows(text, size, margin))
    assert inner == text


# Names and terminals


def _fold(value: tuple[str, str], folder: Path) -> None:
    name, other = value
    assert fold_name(fold_name(name)) == fold_name(name)
    assert words_of(name) == words_of(fold_name(name))
    has_all_words(name, [other])
    shown = safe_text(name)
    shown.encode()
    assert shown == safe_text(shown)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)


def _detect(value: tuple[list[str], str], folder: Path) -> None:
    names, text = value
    for span in Gazetteer(names)([text])[0]:
        assert text[span.start : span.end].strip()


# Metrics: they stand alone and raise ValueError, of numpy's reading of values too


def _metrics(value: Any, folder: Path) -> None:
    kind, arguments = value
    function = {"ids": ranks_from_ids, "ranks": ranking_metrics, "nil": calibrate_nil_threshold}.get(
        kind, annotation_metrics
    )
    try:
        result = function(*arguments)
    except ValueError as error:
        raise MelError(str(error)) from error
    if kind == "ranks":
        shares = [result[name] for name in result if name.startswith("hits@") or name == "mrr"]
        assert all(math.isnan(share) or 0 <= share <= 1 for share in shares)


_ids = st.lists(st.sampled_from(["Q1", "Q2", "NIL", "Q3", ""]), max_size=4)
_floats = st.one_of(st.floats(), st.integers(-1, 5).map(float))
_rank = st.one_of(st.none(), st.integers(0, 9), st.floats())
_span = st.tuples(st.integers(-1, 6), st.integers(-1, 6), st.one_of(st.none(), st.sampled_from(["Q1", "NIL"])))
_texts_of_spans = st.lists(st.lists(_span, max_size=3), max_size=3)
_metric_inputs = st.one_of(
    st.tuples(
        st.just("ids"),
        st.tuples(
            st.lists(_ids, max_size=3),
            st.lists(st.sampled_from(["Q1", "NIL"]), max_size=3),
            st.one_of(st.none(), st.lists(st.lists(_floats, max_size=4), min_size=3, max_size=3)),
            st.floats(0, 1),
        ),
    ),
    st.tuples(
        st.just("ranks"),
        st.tuples(
            st.lists(_rank, max_size=4),
            st.one_of(st.none(), st.lists(_rank, max_size=4)),
            st.lists(st.one_of(st.integers(-1, 5), st.floats()), max_size=3),
            st.sampled_from(["realistic", "optimistic", "pessimistic", "other"]),
            st.one_of(st.none(), st.integers(-1, 10)),
        ),
    ),
    st.tuples(st.just("spans"), st.tuples(_texts_of_spans, _texts_of_spans)),
    st.tuples(
        st.just("nil"),
        st.tuples(
            st.lists(_floats, max_size=4), st.lists(st.booleans(), max_size=4), st.lists(st.booleans(), max_size=4), st.one_of(st.none(), st.lists(_floats, max_size=4))
        ),
    ),
)  # fmt: skip

# Images


@cache
def _pictures() -> list[bytes]:
    """Small pictures of the formats and modes that users have."""
    rgb = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((np.arange(24 * 16).reshape(16, 24) * 170).astype(np.uint16))
    frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
    saved: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {}),
        (rgb, "JPEG", {"exif": exif, "progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb, "PNG", {}),
        (rgb.convert("RGBA"), "PNG", {}),
        (rgb.convert("LA"), "PNG", {}),
        (rgb.convert("P"), "PNG", {"transparency": 3}),
        (rgb.convert("1"), "PNG", {}),
        (deep, "PNG", {}),
        (frames[0], "PNG", {"save_all": True, "append_images": frames[1:], "duration": 50}),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:], "duration": 50}),
        (rgb, "BMP", {}),
        (rgb, "WEBP", {}),
        (frames[0], "WEBP", {"save_all": True, "append_images": frames[1:]}),
        (deep, "TIFF", {}),
        (rgb.convert("CMYK"), "TIFF", {}),
        (rgb.convert("F"), "TIFF", {}),
        (rgb, "PPM", {}),
        (rgb, "ICO", {}),
        (rgb, "TGA", {}),
        (rgb.convert("P"), "PCX", {}),
    ]
    files = []
    for image, kind, options in saved:
        file = BytesIO()
        (image.convert("L") if options.get("L") else image).save(file, kind, **options)
        files.append(file.getvalue())
    return files


#: Sizes that a header claims without having the pixels: decompression bombs.
_sizes = st.sampled_from([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1])
_image = st.tuples(
    st.integers(0, 21), st.one_of(st.just([]), mutations, mutations), st.one_of(st.none(), st.tuples(_sizes, _sizes))
)


def _read_image(value: Any, folder: Path) -> None:
    number, changes, claimed = value
    data = _pictures()[number]
    if claimed is not None and data.startswith(b"\x89PNG"):
        import struct
        import zlib

        header = b"IHDR" + struct.pack(">II", *claimed) + data[24:29]
        data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    data = mutated(data, changes)
    try:
        image = open_image(data, row=4)
    except ImageError:
        image = None
    for reduce in (8, 10_000):
        try:
            small = resize_image(data, reduce)
        except ImageError:
            continue
        assert max(open_image(small).size) <= max(reduce, 8)
    if image is None:
        path = folder / "picture"
        path.write_bytes(data)
        open_image(path)  # the same error from a file
        raise AssertionError("bytes are refused, and the same bytes in a file are not")
    verify_image(data)
    assert image.mode == "RGB"
    assert min(image.size) > 0


_array = st.tuples(
    st.sampled_from(["uint8", "uint16", "int32", "float32", "float64", "bool", "complex64", "int64", "float16", "U1", "O"]),
    st.lists(st.integers(0, 5), max_size=4),
    st.one_of(numbers, st.booleans()),
)  # fmt: skip


def _read_array(value: Any, folder: Path) -> None:
    kind, shape, fill = value
    try:
        with np.errstate(all="ignore"):
            array = np.full(shape, fill, dtype=object).astype(kind)
    except (OverflowError, ValueError, TypeError):
        return
    assert open_image(array).mode == "RGB"


# Processors


@cache
def _processors() -> list[Any]:
    from hf_mel.modeling.autoregressive import AutoregressiveProcessor
    from hf_mel.modeling.candidate_graph import CandidateGraphProcessor
    from hf_mel.training.tokenizer import train_wordpiece
    from tests.modeling import test_mention_windows as methods

    tokenizer = train_wordpiece([*methods.TEXTS, "Mention Context Entity is . : « »"], 400)
    made = [methods.make(method, tokenizer) for method in methods.LIMITS]
    return [*made, *(method.from_parts(tokenizer) for method in (CandidateGraphProcessor, AutoregressiveProcessor))]


def _processor_inputs(drawn: st.SearchStrategy[str]) -> st.SearchStrategy:
    valid = drawn.map(lambda text: text.encode("utf-8", "replace").decode())
    return st.tuples(st.integers(0, 11), valid, texts, texts, st.integers(0, 60), st.integers(1, 12))


def _process(value: Any, folder: Path) -> None:
    import torch

    from hf_mel.data.posts import entity_as_post
    from hf_mel.modeling.imn import ImnProcessor
    from hf_mel.protocols import post_columns
    from tests.modeling import test_mention_windows as methods

    number, text, name, description, start, length = value
    processor = _processors()[number]
    name, description = (given.encode("utf-8", "replace").decode() for given in (name, description))
    text = text or "x"
    start = min(start, len(text) - 1)
    mention = {
        "mention_id": "m", "context_id": "c", "mention": text[start : start + length], "text": text, "start": start,
        "end": min(start + length, len(text)), "mention_type": "", "topic": "", "image": None, "candidates": [],
    }  # fmt: skip
    entity = {**methods.ENTITY, "name": name, "aliases": [description, name], "description": description}
    if isinstance(processor, methods.OF_RETRIEVERS):
        batch = {**processor(mentions=[mention]), **processor(entities=[entity])}
    elif isinstance(processor, ImnProcessor):
        batch = {**processor(mentions=[mention]), **processor(posts=[entity_as_post(entity, post_columns(processor))])}
    else:
        batch = processor(pairs=[(mention, [entity, methods.ENTITY])])
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            assert not tensor.isnan().any(), name


TARGETS = [
    Target("filters", _filter, _filter_rows, 30),
    Target("mentions", _mention, _locate, 30),
    Target("spans", st.tuples(long_texts, _spans), _check_spans, 20),
    Target(
        "windows",
        st.tuples(texts, st.integers(1, 60), st.integers(0, 20)).filter(lambda v: 2 * v[2] < v[1]),
        _split,
        5,
    ),
    Target("names", st.tuples(texts, texts), _fold, 20),
    Target("gazetteers", st.tuples(st.lists(texts, max_size=4), st.one_of(texts, texts)), _detect, 10),
    Target("metrics", _metric_inputs, _metrics, 30),
    Target("images", _image, _read_image, 25),
    Target("image_arrays", _array, _read_array, 10),
    Target("processors", _processor_inputs(texts), _process, 8),
    # A megabyte takes seconds of processor time.
    Target("processors_of_megabytes", _processor_inputs(megabytes), _process, 1),
]

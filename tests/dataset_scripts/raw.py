"""Helpers of the tests of several builders: rows as `datasets` gets them, and files with a few bytes changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hf_mel.errors import MelError

#: Edits of a file: (place as a share of its length, bytes taken out, bytes put in).
edits = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 12),
        st.one_of(
            st.binary(max_size=3),
            st.sampled_from(
                [b'"', b"{", b"}", b"[", b"]", b"null", b"true", b"1e999", b"-1", b",", b"\t", b"\n", b"{}"]
            ),
            st.sampled_from(
                [b"NaN", b"[[]]", b'{"a":1}', b"\\ud800", b"\xff", b"0", b'""', b" ", b"GT:", b"-DOCSTART-"]
            ),
        ),
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for share, out, put in changes:
        place = int(share * len(data))
        data = data[:place] + put + data[place + out :]
    return data


def rows_of(builder_class: Any, raw: Path, config: str, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """Split → rows of a configuration, and the builder."""
    builder = builder_class(config_name=config, data_dir=str(raw), cache_dir=str(tmp_path / "cache"), **options)
    rows = {
        str(split.name): [row for _, row in builder._generate_examples(**split.gen_kwargs)]
        for split in builder._split_generators(None)
    }
    return rows, builder


def reads_or_raises(builder_class: Any, raw: Path, tmp_path: Path, configs: list[str], **options: Any) -> None:
    """Reads every configuration to rows that Parquet can hold, or fails with a typed error that names a file."""
    for config in configs:
        try:
            rows, builder = rows_of(builder_class, raw, config, tmp_path, **options)
        except MelError as error:
            if error.file is None:
                raise AssertionError(f"names no file: {error}") from error
            continue
        for part in rows.values():
            builder.info.features.arrow_schema  # noqa: B018
            for row in part:
                encoded = builder.info.features.encode_example(row)
                for value in encoded.values():
                    if isinstance(value, str):
                        value.encode()
        for kind, entries in builder.release.problems.items():
            assert kind
            assert all(isinstance(value, str) for entry in entries for value in entry)

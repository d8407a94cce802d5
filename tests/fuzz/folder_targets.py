"""Targets that open folders whose files are damaged byte by byte: knowledge bases, indexes, and what is linked with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from hf_mel.errors import MelError
from hf_mel.kb import build_index, open_index
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from tests.fuzz.engine import Target, empty_folder
from tests.fuzz.strategies import long_texts, mutated, mutations, scalars, texts
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

MODEL, PROCESSOR = toy_model(), ToyProcessor()
_KINDS = ("faiss-flat", "faiss-pq")


@cache
def _kb_files() -> dict[str, bytes]:
    """The files of a knowledge base of two shards with two indexes and a removed entity."""
    with empty_folder() as folder:
        kb = KnowledgeBase.build(toy_entities(20), MODEL, PROCESSOR, output=folder / "kb", progress=False)
        kb.remove(["Q3"])
        for kind in _KINDS:
            build_index(kb, kind, MODEL, PROCESSOR, progress=False)
        return {path.name: path.read_bytes() for path in sorted((folder / "kb").iterdir()) if path.is_file()}


def _damaged(value: Any, folder: Path, wanted: str) -> Path:
    """Writes the knowledge base with changes to one of the files whose names begin like `wanted`."""
    number, kind, changes = value
    files = dict(_kb_files())
    names = [name for name in files if name.startswith(tuple(wanted.split(" ")))]
    name = names[number % len(names)]
    if kind == "drop":
        del files[name]
    elif kind == "swap":
        other = names[(number // 7) % len(names)]
        files[name], files[other] = files[other], files[name]
    else:
        files[name] = mutated(files[name], changes)
        if kind == "noted":  # the manifest has the size of the damaged file, as after an attack
            size = str(len(_kb_files()[name])).encode()
            files["kb.json"] = files["kb.json"].replace(
                b'"bytes": ' + size, b'"bytes": ' + str(len(files[name])).encode()
            )
    kb = folder / "kb"
    kb.mkdir()
    for file, data in files.items():
        (kb / file).write_bytes(data)
    return kb


_damage = st.tuples(st.integers(0, 100), st.sampled_from(["bytes", "noted", "noted", "drop", "swap"]), mutations)


def _open_kb(value: Any, folder: Path) -> None:
    path = _damaged(value, folder, "kb.json encodings entities")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    try:
        kb = KnowledgeBase.from_pretrained(path)
        kb.rows(range(len(kb)))
        for _, _chunk in kb.iter_chunks(7):
            pass
        list(kb.names())
        kb.where("name = 'x'")
        kb.verify()
    finally:
        assert before == {file.name: file.read_bytes() for file in path.iterdir()}, "reading changed the files"


def _edit_kb(value: Any, folder: Path) -> None:
    """A writer on a damaged knowledge base does its work or leaves every file as it was."""
    path = _damaged(value, folder, "kb.json encodings entities")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    try:
        KnowledgeBase.from_pretrained(path).add(toy_entities(24).select([21, 22]), MODEL, PROCESSOR, progress=False)
    except MelError:
        after = {file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith(".")}
        assert {name: data for name, data in before.items() if not name.startswith(".")} == after, "a partial change"
        raise


@cache
def _encoded_mentions() -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(MODEL.encode_mentions(**PROCESSOR(mentions=list(toy_mentions(2)))))


def _open_index(value: Any, folder: Path) -> None:
    path = _damaged(value, folder, "index")
    kb = KnowledgeBase.from_pretrained(path)
    for kind in _KINDS:
        index = open_index(kb, kind, MODEL)
        assert index.find(_encoded_mentions(), 5).top_rows.shape == (2, 5)


# Linking


@cache
def _linker() -> EntityLinker:
    return EntityLinker(MODEL, PROCESSOR, KnowledgeBase.build(toy_entities(20), MODEL, PROCESSOR, progress=False))


_link_inputs = st.tuples(
    st.lists(
        st.fixed_dictionaries(
            {"text": st.one_of(long_texts, st.just("the red house"))},
            optional={
                "mention": st.one_of(texts, st.just("red")),
                "start": st.integers(-2, 12),
                "end": st.integers(-2, 12),
                "image": st.one_of(scalars, st.binary(max_size=20)),
            },
        ),
        max_size=3,
    ),
    st.integers(-1, 5),
    st.integers(-1, 3),
)


def _link(value: Any, folder: Path) -> None:
    mentions, top_k, batch_size = value
    results = _linker()(mentions, top_k=top_k, batch_size=batch_size)
    assert len(results) == len(mentions)


_annotate_inputs = st.tuples(
    long_texts, st.one_of(st.none(), st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 9)).map(list), max_size=3))
)


def _annotate(value: Any, folder: Path) -> None:
    text, spans = value
    content = {"text": text} if spans is None else {"text": text, "spans": spans}
    for mention in _linker().annotate([content])[0].mentions:
        assert text[mention.start : mention.end].strip()


TARGETS = [
    Target("knowledge_bases", _damage, _open_kb, 10),
    Target("edited_knowledge_bases", _damage, _edit_kb, 4),
    Target("indexes", _damage, _open_index, 6),
    Target("linking", _link_inputs, _link, 6),
    Target("annotating", _annotate_inputs, _annotate, 6),
]

"""Linking: a mention in a text, with or without an image → the entities of a knowledge base it may mean, or NIL."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, overload

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.images import ImageSource, open_image
from hf_mel.data.lazy_rows import LazyRows
from hf_mel.errors import DataFormatError, KnowledgeBaseError, SpanError
from hf_mel.inference.checkpoints import load_reranker, load_retriever
from hf_mel.inference.encodings import as_float, slice_encodings, to_device
from hf_mel.inference.execution import model_device
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.probe import sees_images, sees_images_in_pairs
from hf_mel.inference.reranking import score_pairs
from hf_mel.kb.indexes import open_index
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.explaining import Explanation, explain
from hf_mel.protocols import MelProcessor, knows_posts, ranks_jointly
from hf_mel.schema import NIL, NO_SPAN

#: A mention to link: `text`, and `mention`, or `start` and `end`, or all three; `image` if there is one. Or a visual one, for
#: a reranker of documents: `modality` "image" and `image`. Those of one document share a `document_id`.
MentionLike = Mapping[str, Any]

_EXAMPLE = '{"text": "Swift on stage.", "mention": "Swift"}'
# What a mention row of the schema has and a mention to link need not have.
_DEFAULTS = {"mention_id": "", "context_id": "", "mention_type": "", "topic": "", "image": None, "candidates": ()}


@dataclass
class Candidate:
    """One entity a mention may mean.

    Args:
        rank (`int`): 1 for the best.
        entity_id, name, description, attributes (`str`): The entity.
        score (`float`): The model's score, higher is better.
        unit_scores (`dict[str, float]`): The parts it is the mean of; empty for a model of one part.
        reranker_score (`float`, *optional*): The reranker's score, by which the first `rerank_k` candidates are ordered;
            `None` without a reranker, and for the candidates after them.
    """

    rank: int
    entity_id: str
    name: str
    description: str
    attributes: str
    score: float
    unit_scores: dict[str, float]
    reranker_score: float | None = None


@dataclass
class LinkResult:
    """What a mention was linked to.

    Args:
        mention (`str`): The surface form.
        start, end (`int`): Where it stands in the text, end exclusive; -1 if it was given as not located.
        entity_id (`str`): The best candidate, or "NIL".
        is_nil (`bool`): Whether the best score is below `nil_threshold`; with a reranker too, the model's own score.
        nil_threshold (`float`, *optional*): `None` if the model has none and none was given: never NIL.
        candidates (`list[Candidate]`): The best first, as many as asked for; also where the mention is NIL.
        warnings (`list[str]`): What the reader should know, for instance that an image was not looked at.
    """

    mention: str
    start: int
    end: int
    entity_id: str
    is_nil: bool
    nil_threshold: float | None
    candidates: list[Candidate]
    warnings: list[str] = field(default_factory=list)

    @property
    def best(self) -> Candidate:
        """The candidate with the highest score, taken or not."""
        return self.candidates[0]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


class EntityLinker:
    """Links mentions to the entities of a knowledge base.

    ```python
    >>> linker = EntityLinker.from_pretrained("hf-mel/mimic-wikimel", kb="kb/wikimel")  # doctest: +SKIP
    >>> result = linker(text="Hiddleston at the Comic-Con.", mention="Hiddleston", image="photo.jpg")  # doctest: +SKIP
    >>> result.entity_id, result.best.name  # doctest: +SKIP
    ('Q295964', 'Tom Hiddleston')
    ```

    Args:
        model ([`~hf_mel.protocols.Retriever`]): The model; it is put in eval mode.
        processor ([`~hf_mel.protocols.MelProcessor`]): Its processor.
        kb ([`KnowledgeBase`], `str` or `os.PathLike`): The knowledge base, its folder or its Hub id, built by this model.
        nil_threshold (`float`, *optional*): A mention whose best score is below it is NIL. Default: the model's own
            (`config.nil_threshold`, set by calibration); without one, no mention is NIL.
        reranker ([`~hf_mel.protocols.Reranker`], *optional*): Puts the model's best `rerank_k` entities into a new order.
            If it can, it ranks the mentions of one context together: those that share a `context_id`, or without one
            the text and the image object. If it links documents, it reads all mentions that share a `document_id`, or
            without one a context. Nothing is known of p(e|m) here: its candidates have the prior 0.
        reranker_processor ([`~hf_mel.protocols.MelProcessor`], *optional*): The reranker's.
        rerank_k (`int`, *optional*, defaults to 16): How many.
        index (`str`, *optional*, defaults to "exact"): What finds the entities: "exact" scores all of them; an index
            that was built ([`~hf_mel.kb.indexes.build_index`]) finds `first_stage` candidates, which are scored.
        first_stage (`int`, *optional*): How many. Default: 256.

    Raises:
        KnowledgeBaseError: There is no knowledge base or index, it is damaged, or another model or processor built it.
        MissingExtraError: The index needs a package that is not installed.
    """

    def __init__(
        self,
        model: Any,
        processor: MelProcessor,
        kb: KnowledgeBase | str | os.PathLike[str],
        *,
        nil_threshold: float | None = None,
        reranker: Any = None,
        reranker_processor: MelProcessor | None = None,
        rerank_k: int = 16,
        index: str = "exact",
        first_stage: int | None = None,
    ):
        if (reranker is None) != (reranker_processor is None):
            raise ValueError("reranker and reranker_processor go together.")
        if rerank_k < 1:
            raise ValueError(f"rerank_k must be at least 1, not {rerank_k}.")
        self.reranker, self.reranker_processor, self.rerank_k = reranker, reranker_processor, rerank_k
        self.model, self.processor = model, processor
        self._inputs = ModelInputs(model, processor)
        self.kb = kb if isinstance(kb, KnowledgeBase) else KnowledgeBase.from_pretrained(kb)
        self.kb.check_made_by(model, processor)
        self.index = open_index(self.kb, index, model, first_stage=first_stage)
        if nil_threshold is None:
            nil_threshold = getattr(getattr(model, "config", None), "nil_threshold", None)
        self.nil_threshold = nil_threshold
        model.eval()
        if reranker is not None:
            reranker.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        kb: KnowledgeBase | str | os.PathLike[str] | None = None,
        *,
        nil_threshold: float | None = None,
        reranker: str | os.PathLike[str] | None = None,
        rerank_k: int = 16,
        index: str = "exact",
        first_stage: int | None = None,
        kb_revision: str | None = None,
        **kwargs: Any,
    ) -> EntityLinker:
        """A linker from a model folder (a run) or a Hub id, and a knowledge base built by that model.

        Args:
            model (`str` or `os.PathLike`): Folder or Hub id.
            kb ([`KnowledgeBase`], `str` or `os.PathLike`): The knowledge base, its folder or its Hub id.
            nil_threshold (`float`, *optional*): As in [`EntityLinker`].
            reranker (`str` or `os.PathLike`, *optional*): Folder or Hub id of a reranker.
            rerank_k, index, first_stage (*optional*): As in [`EntityLinker`].
            kb_revision (`str`, *optional*): Branch, tag or commit of a knowledge base on the Hub.
            kwargs: As in [`~hf_mel.inference.checkpoints.load_retriever`]: `revision` (of the model), `device`,
                `trust_remote_code` (of both).

        Raises:
            KnowledgeBaseError: As in [`EntityLinker`].
            HubError: As in [`~hf_mel.KnowledgeBase.from_pretrained`].
            UnknownModelError: As in [`~hf_mel.inference.checkpoints.load_retriever`].
        """
        if kb is None:
            raise KnowledgeBaseError(
                "no knowledge base was given.",
                remedy=f'Pass kb="FOLDER"; build one with: hf-mel kb build {os.fspath(model)} --dataset … --output FOLDER',
            )
        if not isinstance(kb, KnowledgeBase):
            # First, because it is where typing errors show soonest.
            kb = KnowledgeBase.from_pretrained(
                kb, revision=kb_revision, local_files_only=kwargs.get("local_files_only", False)
            )
        reranks: dict[str, Any] = {}
        if reranker is not None:
            both = {key: value for key, value in kwargs.items() if key != "revision"}
            loaded, processor = load_reranker(reranker, **both)
            reranks = {"reranker": loaded, "reranker_processor": processor, "rerank_k": rerank_k}
        return cls(
            *load_retriever(model, **kwargs),
            kb,
            nil_threshold=nil_threshold,
            index=index,
            first_stage=first_stage,
            **reranks,
        )

    @overload
    def __call__(
        self,
        mentions: MentionLike,
        *,
        top_k: int = 10,
        units: Sequence[str] | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> LinkResult: ...
    @overload
    def __call__(
        self,
        mentions: Sequence[MentionLike] | datasets.Dataset,
        *,
        top_k: int = 10,
        units: Sequence[str] | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[LinkResult]: ...
    @overload
    def __call__(
        self,
        *,
        text: str,
        mention: str | None = None,
        start: int | None = None,
        end: int | None = None,
        image: ImageSource | None = None,
        top_k: int = 10,
        units: Sequence[str] | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> LinkResult: ...

    def __call__(
        self,
        mentions: MentionLike | Sequence[MentionLike] | datasets.Dataset | None = None,
        *,
        text: str | None = None,
        mention: str | None = None,
        start: int | None = None,
        end: int | None = None,
        image: ImageSource | None = None,
        top_k: int = 10,
        units: Sequence[str] | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> LinkResult | list[LinkResult]:
        """Links one mention, or a list of them.

        Args:
            mentions (mapping, sequence of mappings or `datasets.Dataset`, *optional*): One mention, or M of them, each
                with the keys below; rows of the schema (`start` and `end` -1 where not located) fit as they are.
                In a document, textual mentions and visual ones (`modality` "image", an `image`, no text) share a
                `document_id`.
            text, mention, start, end, image (*optional*): One mention in words instead. `mention` is the surface
                form in `text`: the first occurrence, unless `start` and `end` (characters, end exclusive) say which.
                `image` is a path, bytes, or a PIL image.
            top_k (`int`): How many candidates to give; all entities if there are fewer.
            units (sequence of `str`, *optional*): Rank by the mean of only these of the model's units; nothing is NIL
                then, because a threshold is one of the whole score. The index "exact" can do that.
            batch_size (`int`): Mentions per pass over the knowledge base.
            progress (`bool`): Whether to show a progress bar.

        Returns:
            [`LinkResult`], or a list of M of them in the order of `mentions`.

        Raises:
            SpanError: A mention is empty, not in its text, or not at its offsets; names its row in the list.
            DataFormatError: A mention lacks `text`, a visual one its `image`, or a value has a wrong type; a document has
                more mentions than the reranker takes together.
            ImageError: An image is missing or damaged.
            ScoreError: The model's scores cannot be ranked.
            KnowledgeBaseError: The index cannot rank by units, or became unusable.
        """
        single = {"text": text, "mention": mention, "start": start, "end": end, "image": image}
        if (mentions is None) == all(value is None for value in single.values()):
            raise DataFormatError("give either mentions, or text= and mention=.")
        if mentions is None:
            mentions = single
        if isinstance(mentions, Mapping):
            return self._link([mentions], [_span(mentions, None)], [None], top_k, units)[0]
        # Of a data set, the images of one batch at a time are in memory.
        many: Any = LazyRows(mentions) if isinstance(mentions, datasets.Dataset) else mentions
        spans = [_span(many[k], k) for k in range(len(many))]  # all of them first: an error comes before the work
        results: list[Any] = [None] * len(spans)
        with tqdm(total=len(spans), desc="Linking", unit="mention", delay=1, disable=not progress) as bar:
            for batch in self._batches(many, batch_size):
                linked = self._link([many[k] for k in batch], [spans[k] for k in batch], batch, top_k, units)
                for k, result in zip(batch, linked, strict=True):
                    results[k] = result
                bar.update(len(batch))
        return results

    def _link(
        self,
        mentions: list[MentionLike],
        spans: list[tuple[str, int, int]],
        numbers: Sequence[int | None],
        top_k: int,
        units: Sequence[str] | None,
    ) -> list[LinkResult]:
        rows = [
            self._row(mention, span, number) for mention, span, number in zip(mentions, spans, numbers, strict=True)
        ]
        reranks = self.reranker is not None
        inputs = self._inputs.mentions(rows)
        with torch.inference_mode():
            encoded = as_float(self.model.encode_mentions(**inputs))
            kept = max(top_k, self.rerank_k) if reranks else top_k
            ranking = self.index.find(encoded, kept, units=units)
            top_rows, top_scores = ranking.top_rows.tolist(), ranking.top_scores.tolist()
            best_scores = [scores[0] for scores in top_scores]
            reranked: list[list[float | None]] = [[None] * len(scores) for scores in top_scores]
            if reranks:
                contexts = [self._example(mention) for mention in mentions]
                top_rows, top_scores, reranked = self._rerank(rows, contexts, top_rows, top_scores)
            top_rows, top_scores = [each[:top_k] for each in top_rows], [each[:top_k] for each in top_scores]
            wanted = sorted({row for each in top_rows for row in each})  # once, however many mentions share them
            entities = dict(zip(wanted, self.kb.rows(wanted), strict=True))
            return [
                self._result(
                    row,
                    slice_encodings(encoded, slice(k, k + 1)),
                    top_rows[k],
                    top_scores[k],
                    reranked[k],
                    best_scores[k],
                    entities,
                    None if units else self.nil_threshold,
                )
                for k, row in enumerate(rows)
            ]

    def _batches(self, mentions: Any, batch_size: int) -> Iterator[list[int]]:
        """Numbers of the mentions of each batch; with a reranker, contexts or documents are whole."""
        groups: dict[Any, list[int]] = {}
        for k in range(len(mentions)):
            groups.setdefault(k if self.reranker is None else self._example(mentions[k]), []).append(k)
        batch: list[int] = []
        for group in groups.values():
            if batch and len(batch) + len(group) > batch_size:
                yield batch
                batch = []
            batch = batch + group
        if batch:
            yield batch

    def _example(self, mention: MentionLike) -> Any:
        """What the mentions share that the reranker reads together."""
        if getattr(self.reranker, "example_unit", None) == "document" and mention.get("document_id"):
            return "document", mention["document_id"]
        return _context(mention)

    def _rerank(
        self,
        mentions: list[dict[str, Any]],
        contexts: list[Any],
        top_rows: list[list[int]],
        top_scores: list[list[float]],
    ) -> tuple[list[list[int]], list[list[float]], list[list[float | None]]]:
        """Rows and scores of the model in the reranker's order, and its scores."""
        number_of = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
        rows = [
            {**mention, "context_id": str(number_of[context]), "document_id": str(number_of[context])}
            for mention, context in zip(mentions, contexts, strict=True)
        ]
        first = [each[: self.rerank_k] for each in top_rows]
        wanted = sorted({row for each in first for row in each})
        place_of = {row: place for place, row in enumerate(wanted)}
        entities: list[dict[str, Any]] = []
        for row, entity in zip(wanted, self.kb.rows(wanted), strict=True):
            image = self.kb.image(row) if self._reranker_sees_images else None
            entities.append({**entity, "images": [] if image is None else [image]})
        lists = [[place_of[row] for row in each] for each in first]
        mask = torch.ones(len(first), max(map(len, first)), dtype=torch.bool)
        joint = ranks_jointly(self.reranker)
        inputs = ModelInputs(self.reranker, self.reranker_processor)
        found = score_pairs(inputs, rows, entities, lists, joint_masks=[mask] if joint else [])
        scores = (found.joint[0] if joint else found.scores).tolist()
        result: tuple[list, list, list] = ([], [], [])
        for of_rows, of_scores, own in zip(top_rows, top_scores, scores, strict=True):
            order = sorted(range(len(own)), key=lambda c: -own[c])
            order += range(len(own), len(of_rows))
            result[0].append([of_rows[c] for c in order])
            result[1].append([of_scores[c] for c in order])
            result[2].append([own[c] if c < len(own) else None for c in order])
        return result

    def _result(
        self,
        mention: dict[str, Any],
        encoded: Mapping[str, torch.Tensor],
        rows: list[int],
        scores: list[float],
        reranked: list[float | None],
        best_score: float,
        entities: Mapping[int, Mapping[str, Any]],
        nil_threshold: float | None,
    ) -> LinkResult:
        ranked = to_device(self.kb.encodings(rows), model_device(self.model))
        units = {unit: values[0].tolist() for unit, values in self.model.unit_scores(encoded, ranked).items()}
        candidates = [
            Candidate(
                rank=k + 1,
                score=score,
                unit_scores={unit: values[k] for unit, values in units.items()},
                reranker_score=reranked[k],
                **{column: entities[row][column] for column in ("entity_id", "name", "description", "attributes")},
            )
            for k, (row, score) in enumerate(zip(rows, scores, strict=True))
        ]
        is_nil = nil_threshold is not None and best_score < nil_threshold
        warnings = []
        sees_images = self._sees_images or self._reranker_sees_images
        if mention["image"] is None and sees_images:
            warnings.append("The model looks at images, and none was given: only the text decides.")
        if mention["image"] is not None and not sees_images:
            warnings.append("The image was not used: this model reads text only.")
        return LinkResult(
            mention=mention["mention"],
            start=mention["start"],
            end=mention["end"],
            entity_id=NIL if is_nil else candidates[0].entity_id,
            is_nil=is_nil,
            nil_threshold=nil_threshold,
            candidates=candidates,
            warnings=warnings,
        )

    def explain(self, mention: MentionLike, entity_id: str) -> Explanation | None:
        """Where the model looks when it scores a mention against one entity.

        Args:
            mention (mapping): As in [`EntityLinker.__call__`].
            entity_id (`str`): An entity of the knowledge base, for instance the best candidate.

        Returns:
            [`~hf_mel.linking.explaining.Explanation`], or `None` if the model has no attention to show.

        Raises:
            UnknownEntityError: The knowledge base has no such entity.
            SpanError, DataFormatError, ImageError: As in [`EntityLinker.__call__`].
        """
        row = self._row(mention, _span(mention, None), None)
        number = self.kb.row_of(entity_id)
        image = self.kb.image(number) if self._sees_images else None
        entity = {**self.kb.rows([number])[0], "images": [] if image is None else [image]}
        return explain(self._inputs, row, entity)

    @staticmethod
    def _row(mention: MentionLike, span: tuple[str, int, int], row: int | None) -> dict[str, Any]:
        """A row of the schema, its image opened."""
        surface, start, end = span
        filled = {**_DEFAULTS, "text": "", **mention, "mention": surface, "start": start, "end": end}
        if filled["image"] is not None:
            filled["image"] = open_image(filled["image"], row=row)
        return filled

    @cached_property
    def _sees_images(self) -> bool:
        return sees_images(self.processor, posts=knows_posts(self.model))

    @cached_property
    def _reranker_sees_images(self) -> bool:
        return self.reranker_processor is not None and sees_images_in_pairs(self.reranker_processor)


def _context(mention: MentionLike) -> Any:
    """What the mentions of one context share."""
    if mention.get("context_id"):
        return mention["context_id"]
    image = mention.get("image")
    return mention.get("text"), image if isinstance(image, str | os.PathLike | bytes | None) else id(image)


def _span(mention: MentionLike, row: int | None) -> tuple[str, int, int]:
    """Surface form, start and end of a mention, found or checked."""
    if not isinstance(mention, Mapping):
        raise DataFormatError(f"a mention is a {type(mention).__name__}.", row=row, remedy=f"Give {_EXAMPLE}.")
    visual = mention.get("modality") == "image"
    for key, kind in (("text", str), ("mention", str), ("start", int), ("end", int)):
        value = mention.get(key)
        if (value is None and key == "text" and not visual) or (value is not None and not isinstance(value, kind)):
            expected = "a text" if kind is str else "a whole number"
            raise DataFormatError(f"{key!r} is {value!r}, expected {expected}.", row=row, remedy=f"Give {_EXAMPLE}.")
    if visual:
        if mention.get("image") is None:
            raise DataFormatError("a visual mention has no image.", row=row, remedy="Give its 'image'.")
        return "", NO_SPAN, NO_SPAN
    text: str = mention["text"]
    surface: Any = mention.get("mention")
    start: Any = mention.get("start")
    end: Any = mention.get("end")
    if surface is None and start is None and end is None:
        raise SpanError("there is no mention.", row=row, remedy=f"Give {_EXAMPLE}, or start and end.")
    if surface is not None and not surface.strip():
        raise SpanError("the mention is empty.", row=row, remedy="Give the words of the text that name something.")
    if (start is None) != (end is None):
        raise SpanError("only one of start and end is given.", row=row, remedy="Give both, or neither.")
    if start is None:
        start = text.find(surface)
        end = start + len(surface)
        if start < 0:
            raise SpanError(
                f"the mention {_short(surface)} is not in its text.",
                row=row,
                remedy="Write it exactly as in the text (case counts); start=-1, end=-1 says that it is not there.",
            )
    elif start == end == NO_SPAN and surface is not None:
        pass  # a release that does not locate it
    elif not (0 <= start < end <= len(text)) or (surface is None and not text[start:end].strip()):
        raise SpanError(
            f"the span {start}:{end} holds no mention in a text of {len(text)} characters.",
            row=row,
            remedy="Offsets count characters from 0, end exclusive.",
        )
    elif surface is not None and text[start:end] != surface:
        raise SpanError(
            f"the text at {start}:{end} is {_short(text[start:end])}, not {_short(surface)}.",
            row=row,
            remedy="Offsets count characters from 0, end exclusive; without them the first occurrence is taken.",
        )
    return text[start:end] if surface is None else surface, start, end


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")

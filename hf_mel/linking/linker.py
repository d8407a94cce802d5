"""The entity linker: ranks the entities of a knowledge base for a mention, and decides between the best one and NIL."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast, overload

import datasets
import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_mel.candidates.name_index import NameIndex, name_weight_of
from hf_mel.data.entity_files import check_entity_rows
from hf_mel.data.images import ImageSource, open_image
from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.detection.gazetteer import Gazetteer
from hf_mel.detection.spans import MentionDetector
from hf_mel.errors import CalibrationError, DataFormatError, FilterError, KnowledgeBaseError, MelError
from hf_mel.inference.checkpoints import load_reranker, load_retriever
from hf_mel.inference.encodings import as_float, concat_encodings, row_lengths, slice_encodings, to_device
from hf_mel.inference.execution import model_device
from hf_mel.inference.fingerprint import describe_model
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.precision import native_bf16
from hf_mel.inference.prefetch import computed_ahead
from hf_mel.inference.probe import sees_images, sees_images_in_pairs, unread_columns_in_pairs
from hf_mel.inference.ranking import ProcessGroup, RankingResult
from hf_mel.inference.reranking import score_pairs
from hf_mel.inference.score_bounds import QueryCodes
from hf_mel.inference.selective import RiskCoverage, link_confidence
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.entities import EntitiesLike, is_row_file
from hf_mel.kb.indexes import open_index
from hf_mel.kb.indexes.base import ExactIndex
from hf_mel.kb.indexes.certified import bound_queries_of
from hf_mel.kb.indexes.shared_ranking import SharedExactIndex
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.annotating import annotate_batches, check_text
from hf_mel.linking.explaining import Explanation, explain
from hf_mel.linking.mentions import MENTION_DEFAULTS, MentionLike, context_key, locate_mention
from hf_mel.linking.results import Candidate, LinkResult, RankedMention, scores_equal
from hf_mel.linking.traces import LinkTrace
from hf_mel.protocols import (
    LimitsTexts,
    LocatesTokens,
    MelProcessor,
    bounds_scores,
    knows_posts,
    learns_nil,
    leaves_out_missing_images,
    ranks_jointly_by_default,
)
from hf_mel.row_columns import ColumnMapping
from hf_mel.schema import DESCRIBING_COLUMNS, NIL

logger = logging.getLogger(__name__)

#: Mentions that are encoded together, and candidates that are scored by unit together. More are no faster on a CPU.
_ENCODED_TOGETHER, _SCORED_TOGETHER = 32, 64
#: Mentions among which texts of similar length are found.
_WINDOW = 256


@dataclass
class MentionBatch:
    """M encoded mentions.

    Args:
        mentions (sequence of mappings `[M]`): The mentions as they were given.
        rows (`list[dict]` `[M]`): The mentions as rows of the schema with opened images.
        warnings (`list[list[str]]` `[M]`): Sentences on what the retriever does not read of their texts.
        encodings (`Mapping[str, torch.Tensor]`): Their encodings, tensors with first axis M.
        names, added ([`~hf_mel.inference.sparse_scores.SparseScores`], *optional*): As in [`EntityLinker.added_scores`].
    """

    mentions: Sequence[MentionLike]
    rows: list[dict[str, Any]]
    warnings: list[list[str]]
    encodings: Mapping[str, torch.Tensor]
    names: SparseScores | None
    added: SparseScores | None

    def select(self, numbers: Sequence[int]) -> MentionBatch:
        """Returns some of the mentions."""
        names, added = (None if scores is None else scores.select(numbers) for scores in (self.names, self.added))
        return MentionBatch(
            [self.mentions[number] for number in numbers],
            [self.rows[number] for number in numbers],
            [self.warnings[number] for number in numbers],
            slice_encodings(self.encodings, numbers),
            names,
            added,
        )


class _Prepared(NamedTuple):
    """M mentions as the retriever takes them.

    Args:
        mentions, rows, warnings: As in [`MentionBatch`].
        order (`list[int]` `[M]`): Their numbers in the order of `inputs`.
        inputs: The inputs of the retriever, in parts.
    """

    mentions: Sequence[MentionLike]
    rows: list[dict[str, Any]]
    warnings: list[list[str]]
    order: list[int]
    inputs: list[dict[str, torch.Tensor]]


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise DataFormatError(f"top_k must be at least 1, not {top_k}.", remedy="Give a number of candidates.")


def _windows(batches: Iterable[list[int]], mentions: Sequence[MentionLike]) -> Iterator[list[list[int]]]:
    """Puts successive batches together that are encoded at a time. A batch with an image stays alone, so that few are open."""
    window: list[list[int]] = []
    for batch in batches:
        if any(_has_image(mentions[k]) for k in batch):
            if window:
                yield window
            yield [batch]
            window = []
            continue
        window.append(batch)
        if sum(map(len, window)) >= _WINDOW:
            yield window
            window = []
    if window:
        yield window


def _has_image(mention: MentionLike) -> bool:
    """Returns whether a mention has an image, without opening it."""
    if "image" not in mention:
        return False
    return (mention.undecoded("image") if isinstance(mention, LazyRow) else mention["image"]) is not None


class EntityLinker:
    """Links mentions to the entities of a knowledge base.

    ```python
    >>> linker = EntityLinker.from_pretrained("hf-mel/mimic-wikimel", kb="kb/wikimel")  # doctest: +SKIP
    >>> result = linker(text="Hiddleston at the Comic-Con.", mention="Hiddleston", image="photo.jpg")  # doctest: +SKIP
    >>> result.entity_id, result.best.name  # doctest: +SKIP
    ('Q295964', 'Tom Hiddleston')
    ```

    Args:
        model ([`~hf_mel.protocols.Retriever`]): A retriever, which is put in evaluation mode.
        processor ([`~hf_mel.protocols.MelProcessor`]): Its processor.
        kb ([`KnowledgeBase`], `str` or `os.PathLike`): A knowledge base that this model built, its folder, or its Hub id.
        nil_threshold (`float`, *optional*): A mention is NIL if its best score is below this. Default: the threshold that
            calibration stored in the model's configuration. Without a threshold, no mention is NIL.
        precision (`float`, *optional*): A precision that the links shall have, such as 0.95. Links that are less sure than
            it asks are left to a reviewer ([`LinkResult.needs_review`]). The threshold is that of
            [`~hf_mel.inference.selective.RiskCoverage.threshold`] on the validation split that calibrated the model, so it
            holds for mentions and a knowledge base like those. Not with a reranker.
        reranker ([`~hf_mel.protocols.Reranker`], *optional*): A reranker, which reorders the best `rerank_k` entities. It
            reads or ranks mentions together as it was trained: the mentions of a document (equal `document_id`), or of a
            context (equal `context_id`, or without one equal text and image). The linker has no p(e|m), so the prior of
            every candidate is 0.
        reranker_processor ([`~hf_mel.protocols.MelProcessor`], *optional*): Processor of the reranker.
        rerank_k (`int`, *optional*, defaults to 16): Number of entities that the reranker reorders.
        index (`str`, *optional*, defaults to "exact"): "exact" scores all entities. Another kind of index, which
            [`~hf_mel.kb.indexes.build_index`] has built, finds `first_stage` entities, and only those are scored. "exact" uses
            "codes" where they are built, to prove which entities need no score.
        first_stage (`int`, *optional*, defaults to 256): Number of entities that an index finds.
        certify (`bool`, *optional*, defaults to `False`): Whether to insist on proven answers ([`LinkResult.certified`]) and on
            the codes that prove them without scoring every entity. Requires the index "exact".
        where (`str`, *optional*): A filter: only entities that pass it are ranked, such as "type = 'human' and born < 1900"
            ([`~hf_mel.kb.filters`]). It may be set later.
        soft (`str`, *optional*): A filter: entities that pass it get `soft_bonus` on the score of the retriever, and the
            others stay. It may be set later.
        soft_bonus (`float`, *optional*): The bonus, in the units of the model's scores.
        name_weight (`float`, *optional*): Weight w of the names: w times the name score of an entity
            ([`~hf_mel.candidates.name_index.NameIndex.scores`]) is added to its score. An index misses no entity with a
            name score. Default: the weight in the model's configuration, which `hf-mel evaluate --name-weight auto
            --save-name-weight` puts there, or 0.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to encode mentions in bfloat16, which is faster on a processor
            or GPU that has it natively, and slower on others. Everything else is computed in float32 as always.

    Attributes:
        link_threshold (`float`, *optional*): Confidence from which on links are made; infinite if the validation split
            shows the stated precision for no link. `None` without a stated precision.

    Raises:
        KnowledgeBaseError: The knowledge base or index is missing or damaged, or another model or processor built it; with
            `certify`, the same of the codes, or the index is not "exact".
        FilterError: A filter cannot be read, names a column that is not there, or is passed by no entity.
        CalibrationError: `precision` is given, and the model has no calibration, or there is a reranker.
        MissingExtraError: The index needs a package that is not installed.
    """

    def __init__(
        self,
        model: Any,
        processor: MelProcessor,
        kb: KnowledgeBase | str | os.PathLike[str],
        *,
        nil_threshold: float | None = None,
        precision: float | None = None,
        reranker: Any = None,
        reranker_processor: MelProcessor | None = None,
        rerank_k: int = 16,
        index: str = "exact",
        first_stage: int | None = None,
        name_weight: float | None = None,
        where: str | None = None,
        soft: str | None = None,
        soft_bonus: float | None = None,
        bf16: bool = False,
        certify: bool = False,
    ):
        if (reranker is None) != (reranker_processor is None):
            raise ValueError("Give reranker and reranker_processor together.")
        if rerank_k < 1:
            raise ValueError(f"rerank_k must be at least 1, not {rerank_k}.")
        self.reranker, self.reranker_processor, self.rerank_k = reranker, reranker_processor, rerank_k
        self.model, self.processor = model, processor
        self._inputs = ModelInputs(model, processor)
        self._reranker_inputs = ModelInputs(reranker, reranker_processor)
        self.kb = kb if isinstance(kb, KnowledgeBase) else KnowledgeBase.from_pretrained(kb)
        self.kb.check_made_by(model, processor)
        self.index = open_index(self.kb, index, model, first_stage=first_stage, certify=certify)
        if nil_threshold is None:
            nil_threshold = getattr(getattr(model, "config", None), "nil_threshold", None)
        if nil_threshold is not None and math.isnan(nil_threshold):
            raise ValueError("nil_threshold is nan, so no score is above or below it. Give a number.")
        self.nil_threshold, self.precision = nil_threshold, precision
        self.link_threshold = None if precision is None else self._link_threshold(precision)
        self._gazetteer: tuple[Any, Gazetteer] | None = (
            None  # with the state of the knowledge base that it was built of
        )
        self.name_weight = name_weight_of(model, name_weight)
        self._names: tuple[tuple[int, int], NameIndex] | None = None
        if (soft is None) != (soft_bonus is None):
            raise ValueError("Give soft and soft_bonus together.")
        if soft_bonus is not None and not math.isfinite(soft_bonus):
            raise ValueError(f"soft_bonus={soft_bonus} is no finite number.")
        self.where, self.soft, self.soft_bonus = where, soft, soft_bonus
        self._passing: dict[str, tuple[tuple[int, int], np.ndarray]] = {}
        for text in (where, soft):
            if text is not None:
                self._rows_where(text)
        self.bf16 = bf16
        if bf16:
            is_native, reason = native_bf16(model_device(model).type)
            if not is_native:
                logger.warning("Encoding in bfloat16 is slower than in float32 here: %s.", reason)
        model.eval()
        if reranker is not None:
            reranker.eval()

    def _link_threshold(self, precision: float) -> float:
        """Returns the confidence that a link needs for a stated precision."""
        if not 0 < precision < 1:
            raise ValueError(f"precision={precision} must be above 0 and below 1, such as 0.95.")
        if self.reranker is not None:
            raise CalibrationError(
                "A stated precision is calibrated for a retriever alone, not for the order of a reranker.",
                remedy="Leave out the precision or the reranker.",
            )
        content = getattr(getattr(self.model, "config", None), "link_calibration", None)
        if content is None:
            raise CalibrationError(
                "The model has no calibration of its links (config.link_calibration), from which the threshold of a stated "
                "precision follows.",
                remedy="Train it with this version, or evaluate it: hf-mel evaluate MODEL --dataset DATA --nil-from "
                "validation --precision 0.95.",
            )
        curve = RiskCoverage.from_dict(content)
        threshold = curve.threshold(precision)
        if math.isinf(threshold):
            logger.warning(
                "The %d mentions of the model's validation split show a precision of %g for no link, so all are left to a "
                "reviewer. State a lower precision.",
                curve.mentions,
                precision,
            )
        return threshold

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        kb: KnowledgeBase | str | os.PathLike[str] | None = None,
        *,
        entities: EntitiesLike | None = None,
        mapping: ColumnMapping | None = None,
        nil_threshold: float | None = None,
        precision: float | None = None,
        reranker: str | os.PathLike[str] | None = None,
        rerank_k: int = 16,
        index: str = "exact",
        first_stage: int | None = None,
        name_weight: float | None = None,
        where: str | None = None,
        soft: str | None = None,
        soft_bonus: float | None = None,
        bf16: bool = False,
        certify: bool = False,
        kb_revision: str | None = None,
        **kwargs: Any,
    ) -> EntityLinker:
        """Loads a retriever, a knowledge base that it built, and optionally a reranker.

        Args:
            model (`str` or `os.PathLike`): Folder or Hub id of the retriever.
            kb ([`KnowledgeBase`], `str` or `os.PathLike`): The knowledge base, its folder, or its Hub id.
            entities ([`~hf_mel.kb.entities.EntitiesLike`], *optional*): Entities in place of `kb`: they are encoded into a
                knowledge base that is deleted with the linker.
            mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in a file of
                `entities`.
            nil_threshold, precision, rerank_k, index, first_stage, name_weight, where, soft, soft_bonus, bf16, certify
                (*optional*): As in [`EntityLinker`].
            reranker (`str` or `os.PathLike`, *optional*): Folder or Hub id of the reranker.
            kb_revision (`str`, *optional*): Branch, tag or commit of a knowledge base on the Hub.
            kwargs: Arguments of [`~hf_mel.inference.checkpoints.load_retriever`]. `revision` applies to the retriever only,
                `device`, `trust_remote_code` and others also to the reranker.

        Raises:
            KnowledgeBaseError: As in [`EntityLinker`].
            HubError: As in [`~hf_mel.KnowledgeBase.from_pretrained`].
            UnknownModelError: As in [`~hf_mel.inference.checkpoints.load_retriever`].
        """
        if kb is not None and entities is not None:
            raise KnowledgeBaseError("Both kb= and entities= are given.", remedy="Give one of them.")
        if entities is not None and is_row_file(entities):
            check_entity_rows(entities, mapping)  # before the models, as below
        elif kb is None and entities is None:
            raise KnowledgeBaseError(
                "No knowledge base was given.",
                remedy=f'Pass kb="FOLDER". To build one, run: hf-mel kb build {os.fspath(model)} --dataset … --output FOLDER',
            )
        if kb is not None and not isinstance(kb, KnowledgeBase):
            # Before the models, because a mistyped name then fails at once.
            kb = KnowledgeBase.from_pretrained(
                kb, revision=kb_revision, local_files_only=kwargs.get("local_files_only", False)
            )
        reranker_model = reranker_processor = None
        if reranker is not None:
            shared = {key: value for key, value in kwargs.items() if key != "revision"}
            reranker_model, reranker_processor = load_reranker(reranker, **shared)
        retriever, processor = load_retriever(model, **kwargs)
        if entities is not None:
            kb = KnowledgeBase.build(entities, retriever, processor, mapping=mapping)
        assert kb is not None
        return cls(
            retriever,
            processor,
            kb,
            nil_threshold=nil_threshold,
            precision=precision,
            reranker=reranker_model,
            reranker_processor=reranker_processor,
            rerank_k=rerank_k,
            index=index,
            first_stage=first_stage,
            name_weight=name_weight,
            where=where,
            soft=soft,
            soft_bonus=soft_bonus,
            bf16=bf16,
            certify=certify,
        )

    # The overloads tell the type of the result. The implementation has the names and types of the options.
    @overload
    def __call__(self, mentions: MentionLike, **options: Any) -> LinkResult: ...
    @overload
    def __call__(self, mentions: Sequence[MentionLike] | datasets.Dataset, **options: Any) -> list[LinkResult]: ...
    @overload
    def __call__(self, *, text: str, **options: Any) -> LinkResult: ...

    def __call__(  # type: ignore[misc]
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
        """Links one mention or a list of mentions.

        Args:
            mentions (mapping, sequence of mappings or `datasets.Dataset`, *optional*): One mention or M mentions with the
                keys below. Rows of the schema can be used unchanged; a row whose `start` and `end` are -1 is not located.
                The textual and the visual mentions of a document (`modality` "image", an `image`, no text) share a
                `document_id`.
            text, mention, start, end, image (*optional*): A single mention, in place of `mentions`. `mention` is the surface
                form in `text`. Its first occurrence is linked, unless `start` and `end` (characters, end exclusive) give
                another one. `image` is a path, bytes, a PIL image or a NumPy array.
            top_k (`int`): Number of candidates to return. A smaller knowledge base gives fewer.
            units (sequence of `str`, *optional*): Interaction units of the model. The score is the mean of theirs. No
                mention is NIL then, and names do not count, because the threshold and the name weight apply to the score
                of all units. Requires the index "exact".
            batch_size (`int`): Mentions per pass over the knowledge base.
            progress (`bool`): Whether to show a progress bar.

        Returns:
            [`LinkResult`], or a list of M of them in the order of `mentions`.

        Raises:
            SpanError: A mention is empty, not in its text, or not at its offsets; names its position in the list.
            DataFormatError: A mention lacks `text`, a visual mention lacks `image`, a value has the wrong type, or a
                document has more mentions than the reranker reads together.
            ImageError: An image is missing or damaged.
            ScoreError: The model's scores cannot be ranked.
            KnowledgeBaseError: The index cannot rank by units, or has become unusable.
        """
        single = {"text": text, "mention": mention, "start": start, "end": end, "image": image}
        if (mentions is None) == all(value is None for value in single.values()):
            raise DataFormatError(
                "A call needs one input.", remedy="Give either mentions, or the text and mention of a single one."
            )
        if mentions is None:
            mentions = single
        if isinstance(mentions, Mapping):
            _check_top_k(top_k)
            encoded = self.encode_batch([mentions], [locate_mention(mentions, None)], [None], names_count=not units)
            return self.link_encoded(encoded, top_k=top_k, units=units)[0]
        # Lazy rows decode the images of one batch at a time.
        many: Any = LazyRows(mentions) if isinstance(mentions, datasets.Dataset) else mentions
        results: list[Any] = [None] * len(many)
        with tqdm(total=len(many), desc="Linking", unit="mention", delay=1, disable=not progress) as bar:
            for batch, linked in self.link_batches(many, top_k=top_k, units=units, batch_size=batch_size):
                for k, result in zip(batch, linked, strict=True):
                    results[k] = result
                bar.update(len(batch))
        return results

    def link_batches(
        self,
        mentions: Sequence[MentionLike],
        *,
        top_k: int = 10,
        units: Sequence[str] | None = None,
        batch_size: int = 32,
        done: Container[int] = (),
        traced: bool = False,
    ) -> Iterator[tuple[list[int], list[LinkResult]]]:
        """Links mentions batch by batch, so that results can be kept as they come.

        Args:
            mentions, top_k, units, batch_size: As in [`EntityLinker.__call__`]. All mentions are checked first.
            done (container of `int`, *optional*): Positions of mentions that need no result. They are linked again only
                if a reranker reads them together with one that does.
            traced (`bool`): Whether results have a `trace`, so that a change of the knowledge base can be compared with them.

        Yields:
            `tuple[list[int], list[LinkResult]]`: Positions of the mentions of a batch, and their results. With a
            reranker, the mentions of a context or document are in one batch; their positions may be out of order.

        Raises:
            As in [`EntityLinker.__call__`].
        """
        if batch_size < 1:
            raise DataFormatError(f"batch_size={batch_size} is no number of mentions.", remedy="Give at least 1.")
        _check_top_k(top_k)
        spans = [locate_mention(mentions[k], k) for k in range(len(mentions))]
        todo = (batch for batch in self.batches(mentions, batch_size) if any(k not in done for k in batch))

        def prepared() -> Iterator[tuple[list[list[int]], _Prepared]]:
            for window in _windows(todo, mentions):
                positions = [k for batch in window for k in batch]
                of_window = [mentions[k] for k in positions], [spans[k] for k in positions]
                yield window, self._prepare(*of_window, positions)

        def encoded() -> Iterator[tuple[list[list[int]], _Prepared, dict[str, torch.Tensor]]]:
            with closing(computed_ahead(prepared())) as prepared_windows:  # type: ignore[type-var]
                for window, inputs in prepared_windows:
                    yield window, inputs, self._encodings(inputs)

        # Encoding has few large operations, and ranking many small ones, which a second processor speeds up little.
        with closing(computed_ahead(encoded())) as encoded_windows:  # type: ignore[type-var]
            for window, inputs, encodings in encoded_windows:
                whole, first = self._batch(inputs, encodings, names_count=not units), 0
                for batch in window:
                    chosen = whole if len(window) == 1 else whole.select(list(range(first, first + len(batch))))
                    first += len(batch)
                    yield batch, self.link_encoded(chosen, top_k=top_k, units=units, traced=traced)

    def encode_batch(
        self,
        mentions: Sequence[MentionLike],
        spans: list[tuple[str, int, int]],
        positions: Sequence[int | None],
        *,
        names_count: bool = True,
    ) -> MentionBatch:
        """Encodes mentions, and computes what ranking adds to their scores.

        Args:
            mentions, spans: The mentions, and their surface forms with start and end.
            positions: Their positions in the list of all mentions, for error messages.
            names_count (`bool`): Whether the name weight applies.

        Raises:
            ImageError: An image is missing or damaged.
        """
        prepared = self._prepare(mentions, spans, positions)
        return self._batch(prepared, self._encodings(prepared), names_count=names_count)

    def added_scores(
        self, surfaces: Sequence[str], *, names_count: bool = True
    ) -> tuple[SparseScores | None, SparseScores | None]:
        """Returns the name scores of M surface forms, and what ranking adds to the scores of their mentions: the name scores
        times the name weight, and the bonus of `soft`. `None` if there is nothing.
        """
        names = self._name_index().scores(surfaces) if names_count and self.name_weight else None
        added = None if names is None else names * self.name_weight
        if self.soft is not None and self.soft_bonus is not None:
            bonus = np.zeros(len(self.kb), dtype=np.float32)
            bonus[self._rows_where(self.soft)] = self.soft_bonus
            nothing_added = SparseScores.of_mentions([(np.empty(0), np.empty(0))] * len(surfaces))
            added = replace(nothing_added if added is None else added, of_entities=bonus)
        return names, added

    def num_ranked(self, top_k: int) -> int:
        """Returns how many entities are ranked for `top_k` candidates: those that the reranker reads, and a second one,
        of which the confidence is made.
        """
        return max(top_k, 2) if self.reranker is None else max(top_k, self.rerank_k)

    def ranked_rows(self) -> np.ndarray | None:
        """Returns the rows of the entities that are ranked, ascending; `None` for all."""
        return None if self.where is None else self._rows_where(self.where)

    def link_encoded(
        self,
        batch: MentionBatch,
        *,
        top_k: int,
        units: Sequence[str] | None = None,
        ranking: RankingResult | None = None,
        traced: bool = False,
    ) -> list[LinkResult]:
        """Links M encoded mentions.

        Args:
            batch ([`MentionBatch`]): The mentions.
            top_k, units: As in [`EntityLinker.__call__`].
            ranking ([`~hf_mel.inference.ranking.RankingResult`], *optional*): The best [`~EntityLinker.num_ranked`] entities
                of each, if they are known. Default: those that the index finds.
            traced (`bool`): Whether results have a `trace`.
        """
        rows, encodings, names, added = batch.rows, batch.encodings, batch.names, batch.added
        chosen = self.ranked_rows()
        with torch.inference_mode():
            is_given = ranking is not None
            if ranking is None:
                ranking = self.index.find(encodings, self.num_ranked(top_k), units=units, added=added, rows=chosen)
            num_tied = self._count_ties(encodings, ranking, units, added, chosen)
            bounds = [-math.inf] * len(rows) if ranking.bounds is None else ranking.bounds.tolist()
            ranked = []
            for k, (row, scores) in enumerate(zip(rows, ranking.top_scores.tolist(), strict=True)):
                top_rows, nothing = ranking.top_rows[k].numpy(), cast("list[float | None]", [None] * len(scores))
                name_scores = nothing if names is None else names.of(k, top_rows).tolist()
                second = max(scores[1:], default=-math.inf)
                confidence = float(link_confidence(scores[0], second, learns_nil(self.model)))
                ranked.append(
                    RankedMention(
                        row,
                        top_rows.tolist(),
                        scores,
                        scores[0],
                        nothing,
                        name_scores,
                        num_tied[k],
                        confidence,
                        bounds[k],
                    )
                )
            traces = self._traces(ranked, encodings) if traced else [None] * len(ranked)
            if self.reranker is not None:
                self._rerank(ranked, [self.example_key(mention) for mention in batch.mentions])
            # Every entity is read once, however many mentions share it.
            entity_rows = sorted({row for mention in ranked for row in mention.entity_rows[:top_k]})
            entities = dict(zip(entity_rows, self.kb.rows(entity_rows), strict=True))
            nil_threshold = None if units else self.nil_threshold
            unit_scores = self._unit_scores(ranked, encodings, top_k)
            left_out = [list(sentences) for sentences in batch.warnings]
            if ranking.bounds is not None and isinstance(self.index, ExactIndex) and not is_given:
                for sentences, bound in zip(left_out, bounds, strict=True):
                    if bound == -math.inf:
                        sentences.append("Every entity was scored, because the codes do not tell the best ones apart.")
            results = [
                self._link_result(mention, scores, entities, top_k, nil_threshold, units, warnings)
                for mention, scores, warnings in zip(ranked, unit_scores, left_out, strict=True)
            ]
        for result, trace in zip(results, traces, strict=True):
            result.trace = trace
        return results

    def _traces(self, ranked: list[RankedMention], encodings: Mapping[str, torch.Tensor]) -> list[LinkTrace]:
        """Returns the trace of each of M mentions that the retriever has ranked."""
        queries = QueryCodes.of(*bound_queries_of(self.model, encodings)) if bounds_scores(self.model) else None
        return [
            LinkTrace(
                self.kb.physical_rows(np.asarray(mention.entity_rows)).tolist(),
                mention.scores,
                mention.num_tied,
                self.has_namesakes(mention.row["mention"]),
                None if queries is None else queries[number : number + 1],
            )
            for number, mention in enumerate(ranked)
        ]

    def has_namesakes(self, surface: str) -> bool:
        """Returns whether an entity has a name with all words of a surface form; `True` if names do not count."""
        return not self.name_weight or len(self._name_index().namesakes(surface)) > 0

    def _prepare(
        self, mentions: Sequence[MentionLike], spans: list[tuple[str, int, int]], positions: Sequence[int | None]
    ) -> _Prepared:
        """Opens the images of M mentions, and makes the inputs of the retriever: of texts of similar lengths together, because
        a text is padded to the longest one beside it.
        """
        rows = [
            self._mention_row(mention, span, position)
            for mention, span, position in zip(mentions, spans, positions, strict=True)
        ]
        tensors = self._inputs.mentions(rows)
        order = np.argsort(row_lengths(tensors), kind="stable")
        parts = np.split(order, range(_ENCODED_TOGETHER, len(order), _ENCODED_TOGETHER))
        inputs = [slice_encodings(tensors, part.tolist()) for part in parts]
        return _Prepared(mentions, rows, self._left_out_warnings(rows), order.tolist(), inputs)

    def _encodings(self, prepared: _Prepared) -> dict[str, torch.Tensor]:
        """Returns the encodings of mentions, in their order."""
        # One context for all parts: each converts the weights once.
        device = model_device(self.model).type
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            encoded = concat_encodings(as_float(self.model.encode_mentions(**part)) for part in prepared.inputs)
            return slice_encodings(encoded, np.argsort(prepared.order).tolist())

    def _batch(self, prepared: _Prepared, encodings: Mapping[str, torch.Tensor], *, names_count: bool) -> MentionBatch:
        """Returns encoded mentions with what ranking adds to their scores."""
        names, added = self.added_scores([row["mention"] for row in prepared.rows], names_count=names_count)
        return MentionBatch(prepared.mentions, prepared.rows, prepared.warnings, encodings, names, added)

    def _name_index(self) -> NameIndex:
        """Returns the index of the names, made again when the knowledge base has changed."""
        if self._names is None or self._names[0] != self._kb_state:
            self._names = self._kb_state, NameIndex(self.kb.names())
        return self._names[1]

    def _rows_where(self, text: str) -> np.ndarray:
        """Returns the rows of the entities that pass a filter, found again when the knowledge base has changed.

        Raises:
            FilterError: As in [`EntityLinker`].
        """
        if text not in self._passing or self._passing[text][0] != self._kb_state:
            rows = self.kb.where(text)
            if not len(rows):
                raise FilterError(
                    f"None of the {len(self.kb):,} entities passes the filter {text!r}.",
                    file=self.kb.path,
                    remedy="Widen the filter.",
                )
            self._passing = {text: found for text, found in self._passing.items() if text in (self.where, self.soft)}
            self._passing[text] = self._kb_state, rows
        return self._passing[text][1]

    @property
    def _kb_state(self) -> tuple[int, int]:
        """A value that changes when entities are added or removed."""
        return self.kb.num_physical_rows, len(self.kb)

    def _count_ties(
        self,
        encodings: Mapping[str, torch.Tensor],
        ranking: RankingResult,
        units: Sequence[str] | None,
        added: SparseScores | None,
        rows: np.ndarray | None,
    ) -> list[int]:
        """Returns how many entities have the best score, for each of M mentions."""
        counts = [sum(scores_equal(score, scores[0]) for score in scores) for scores in ranking.top_scores.tolist()]
        num_ranked = ranking.top_scores.shape[1]
        num_entities = len(self.kb) if rows is None else len(rows)
        open_counts = [number for number, count in enumerate(counts) if count == num_ranked < num_entities]
        if open_counts and isinstance(self.index, ExactIndex):
            # All entities that were returned are tied, so there may be more. This is rare: rank once more.
            tied = {name: tensor[open_counts] for name, tensor in encodings.items()}
            best = ranking.top_rows[open_counts, 0].numpy()
            added = None if added is None else added.select(open_counts)
            not_worse = self.index.count_not_worse(tied, best, units=units, added=added, rows=rows)
            for number, count in zip(open_counts, not_worse, strict=True):
                counts[number] = count
        return counts

    @contextmanager
    def sharing(self, processes: PartialState | None) -> Iterator[bool]:
        """Ranks with several processes in the block, each a part of the knowledge base, which it alone reads.

        Every process makes the same linker and enters the block. Only the first links in it; the others serve it until its
        block ends. The results are those of one process, up to rounding. Codes are not used.

        Args:
            processes (`accelerate.PartialState`, *optional*): The processes. A single one ranks as always.

        Yields:
            `bool`: Whether this process is the one that links.

        Raises:
            KnowledgeBaseError: The index is not "exact", or the processes opened other states of the knowledge base.
        """
        if processes is None or processes.num_processes == 1:
            yield True
            return
        if not isinstance(self.index, ExactIndex):
            raise KnowledgeBaseError(
                f"Several processes cannot share the index {self.index.kind!r}.",
                file=self.kb.path,
                remedy="Use the index 'exact', or start one process.",
            )
        group = ProcessGroup(processes)
        states = group.gather(json.dumps([self.kb.shards, self.kb.removed_rows, describe_model(self.model)]))
        if len(set(states)) > 1:
            raise KnowledgeBaseError(
                "The processes opened other models or other states of the knowledge base.",
                file=self.kb.path,
                remedy="Give all hosts the same files, and change the knowledge base when nobody links.",
            )
        alone, shared = self.index, SharedExactIndex(self.kb, self.model, processes)
        if not processes.is_main_process:
            shared.serve()
            yield False
            return
        self.index = shared
        try:
            yield True
        finally:
            self.index = alone
            shared.close()

    def describe(self) -> dict[str, Any]:
        """Returns what the results depend on besides the mentions: the models, the knowledge base and the settings."""
        reranker = None if self.reranker is None else describe_model(self.reranker)
        return {
            "model": describe_model(self.model),
            "kb": self.kb.shards,
            "tables": self.kb.tables,
            "removed_rows": self.kb.removed_rows,
            "reranker": reranker,
            "rerank_k": self.rerank_k,
            "nil_threshold": self.nil_threshold,
            **({} if self.precision is None else {"precision": self.precision, "link_threshold": self.link_threshold}),
            "index": self.index.kind,
            "first_stage": getattr(self.index, "first_stage", None),
            "name_weight": self.name_weight,
            **({"bf16": True} if self.bf16 else {}),
            **({} if self.where is None else {"where": self.where}),
            **({} if self.soft is None else {"soft": self.soft, "soft_bonus": self.soft_bonus}),
        }

    def batches(self, mentions: Any, batch_size: int) -> Iterator[list[int]]:
        """Yields the positions of the mentions of each batch. With a reranker, contexts or documents are not split."""
        groups: dict[Any, list[int]] = {}
        for k in range(len(mentions)):
            groups.setdefault(k if self.reranker is None else self.example_key(mentions[k]), []).append(k)
        batch: list[int] = []
        for group in groups.values():
            if batch and len(batch) + len(group) > batch_size:
                yield batch
                batch = []
            batch = batch + group
        if batch:
            yield batch

    def example_key(self, mention: MentionLike) -> Any:
        """Returns a key that is equal for mentions that the reranker reads or ranks together."""
        if getattr(self.reranker, "example_unit", None) == "document" and mention.get("document_id"):
            return "document", mention["document_id"]
        return context_key(mention)

    def _rerank(self, ranked: list[RankedMention], example_keys: list[Any]) -> None:
        """Reorders the first `rerank_k` entities of every mention."""
        number_of = {key: number for number, key in enumerate(dict.fromkeys(example_keys))}
        rows = [
            {**mention.row, "context_id": str(number_of[key]), "document_id": str(number_of[key])}
            for mention, key in zip(ranked, example_keys, strict=True)
        ]
        candidates = [mention.entity_rows[: self.rerank_k] for mention in ranked]
        kb_rows = sorted({row for entity_rows in candidates for row in entity_rows})
        position_of = {row: position for position, row in enumerate(kb_rows)}
        entities: list[dict[str, Any]] = []
        for row, entity in zip(kb_rows, self.kb.rows(kb_rows, further=True), strict=True):
            image = self.kb.image(row) if self._reranker_sees_images else None
            entities.append({**entity, "images": [] if image is None else [image]})
        self._warn_of_unread_columns(entities)
        mask = torch.ones(len(candidates), max(map(len, candidates)), dtype=torch.bool)
        joint = ranks_jointly_by_default(self.reranker)
        scored = score_pairs(
            self._reranker_inputs,
            rows,
            entities,
            [[position_of[row] for row in entity_rows] for entity_rows in candidates],
            list_scores=[
                [score - max(mention.scores) for score in mention.scores[: len(entity_rows)]]
                for mention, entity_rows in zip(ranked, candidates, strict=True)
            ],
            joint_masks=[mask] if joint else [],
        )
        scores = scored.joint[0] if joint else scored.scores
        for mention, reranker_scores in zip(ranked, scores.tolist(), strict=True):
            mention.rerank(reranker_scores)

    def _warn_of_unread_columns(self, entities: list[dict[str, Any]]) -> None:
        """Logs once which text columns of the candidates the reranker does not read."""
        filled = [column for column in self._unread_by_reranker if any(any(row[column] or ()) for row in entities)]
        if filled:
            self._unread_by_reranker = []
            logger.warning(
                "The reranker does not read all columns that the entities fill. These do not change its scores: %s.",
                ", ".join(filled),
            )

    def _unit_scores(
        self, ranked: list[RankedMention], encodings: Mapping[str, torch.Tensor], top_k: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yields, for each of M mentions, the scores of its first `top_k` entities: unit name → [k].

        Several mentions are scored with the entities of all of them, because one call costs more than a few pairs.
        """
        step, device = max(1, _SCORED_TOGETHER // top_k), model_device(self.model)
        for first in range(0, len(ranked), step):
            lists = [mention.entity_rows[:top_k] for mention in ranked[first : first + step]]
            kb_rows = np.unique(np.concatenate(lists))
            mentions = slice_encodings(encodings, slice(first, first + len(lists)))
            scores = self.model.unit_scores(mentions, to_device(self.kb.encodings(kb_rows), device))
            for number, rows in enumerate(lists):
                places = torch.from_numpy(np.searchsorted(kb_rows, rows))
                yield {unit: of_unit[number].cpu()[places] for unit, of_unit in scores.items()}

    def _link_result(
        self,
        mention: RankedMention,
        unit_scores: Mapping[str, torch.Tensor],
        entities: Mapping[int, Mapping[str, Any]],
        top_k: int,
        nil_threshold: float | None,
        chosen_units: Sequence[str] | None,
        left_out: list[str],
    ) -> LinkResult:
        """Returns the result of one mention.

        Args:
            mention ([`RankedMention`]): The mention and its entities.
            unit_scores: Unit name → scores of the first `top_k` entities.
            entities: Row in the knowledge base → entity, for the first `top_k` entities.
            top_k, nil_threshold, chosen_units: Number of candidates, and the threshold and the units that apply.
            left_out: What [`_left_out_warnings`] says of the mention.
        """
        entity_rows = mention.entity_rows[:top_k]
        units = {unit: scores.tolist() for unit, scores in unit_scores.items() if not scores.isnan().all()}
        ranks = mention.ranks()
        candidates = [
            Candidate(
                rank=ranks[k],
                score=mention.scores[k],
                unit_scores={unit: scores[k] for unit, scores in units.items()},
                reranker_score=mention.reranker_scores[k],
                name_score=mention.name_scores[k],
                **{column: entities[row][column] for column in ("entity_id", "name", "description", "attributes")},
            )
            for k, row in enumerate(entity_rows)
        ]
        is_nil = nil_threshold is not None and mention.best_score < nil_threshold
        threshold = None if chosen_units else self.link_threshold
        needs_review = threshold is not None and not is_nil and not mention.confidence >= threshold
        warnings = []
        sees_images = self._sees_images or self._reranker_sees_images
        if mention.row["image"] is None and sees_images:
            warnings.append(self._missing_image_warning(chosen_units, unit_scores, units))
            if nil_threshold is not None and len(units) < len(unit_scores):
                warnings.append(
                    "The NIL threshold may not fit: scores of a mention without an image are a mean over fewer units."
                )
            if threshold is not None and len(units) < len(unit_scores):
                warnings.append("The stated precision may not hold: it is one for mentions with and without an image.")
        if mention.row["image"] is not None and not sees_images:
            warnings.append("The image was not used, because the model reads only text.")
        warnings += left_out
        if mention.num_tied > 1 and not is_nil:
            least = "" if isinstance(self.index, ExactIndex) or self.reranker is not None else "At least "
            warnings.append(
                f"{least}{mention.num_tied:,} entities have the best score. The first of them in the knowledge base was taken."
            )
        return LinkResult(
            mention=mention.row["mention"],
            start=mention.row["start"],
            end=mention.row["end"],
            entity_id=NIL if is_nil else None if needs_review else candidates[0].entity_id,
            is_nil=is_nil,
            nil_threshold=nil_threshold,
            candidates=candidates,
            warnings=warnings,
            num_tied=mention.num_tied,
            needs_review=needs_review,
            confidence=None if threshold is None else mention.confidence,
            certified=mention.bound < math.inf,
            bound=mention.bound if math.isfinite(mention.bound) else None,
        )

    def _missing_image_warning(
        self, chosen_units: Sequence[str] | None, all_units: Iterable[str], units: Container[str]
    ) -> str:
        """Returns a sentence about a mention without an image, for which `units` of the model's `all_units` have scores."""
        needed = chosen_units or list(all_units)
        if needed and not any(unit in units for unit in needed):
            subject = "the chosen units need" if chosen_units else "every unit of the model needs"
            return f"The mention has no image, which {subject}, so all entities have the same score."
        models = [self.model, *([] if self.reranker is None else [self.reranker])]
        left_out = [leaves_out_missing_images(model) for model in models]
        if False in left_out:
            return "The mention has no image. The model reads a blank picture in its place, and its scores count."
        return "The mention has no image" + (", so only the text decides." if all(left_out) else ".")

    def _left_out_warnings(self, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Returns, for each of M mentions, a sentence if the retriever does not read its whole text."""
        is_read = self._are_read(rows)
        return [
            []
            if whole
            else ["The text is longer than the model reads, and the mention stands in the part that it left out."]
            if place is False
            else ["The text is longer than the model reads, so a part of it was left out."]
            for whole, place in is_read
        ]

    def _are_read(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[bool, bool | None]]:
        """Returns, for each of M mentions, whether the retriever reads its whole text, and whether it reads its place.

        The place is `None` if the whole text is read, and if the retriever does not locate mentions.
        """
        if not isinstance(self.processor, LimitsTexts):
            return [(True, None)] * len(rows)
        is_whole = [not count for count in self.processor.num_left_out(mentions=rows)]
        places: list[bool | None] = [None] * len(rows)
        cut = [number for number, row in enumerate(rows) if not is_whole[number] and 0 <= row["start"] < row["end"]]
        if cut and isinstance(self.processor, LocatesTokens):
            for number, spans in zip(cut, self.processor.text_spans([rows[number] for number in cut]), strict=True):
                start, end = rows[number]["start"], rows[number]["end"]
                places[number] = any(span is not None and span[0] < end and span[1] > start for span in spans)
        return list(zip(is_whole, places, strict=True))

    def reads_mentions(self, texts: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Returns whether the retriever reads mentions in their texts, or the whole texts if it does not locate mentions.

        Args:
            texts (sequence of `str` `[M]`): The text of each mention.
            spans (sequence of `tuple[int, int]` `[M]`): Start and end of each mention, end exclusive.
        """
        rows = [
            self._mention_row({"text": text}, (text[start:end], start, end), None)
            for text, (start, end) in zip(texts, spans, strict=True)
        ]
        return [whole or bool(place) for whole, place in self._are_read(rows)]

    def annotate(
        self,
        texts: Any,
        image: ImageSource | None = None,
        *,
        spans: Sequence[Any] | None = None,
        detector: MentionDetector | None = None,
        overlapping: bool = False,
        top_k: int = 5,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Finds the mentions of texts, and links them. With a reranker, the mentions of a text are ranked together.

        A text that is longer than 4,000 characters, or than the model reads, is linked in windows, which overlap by half.
        Each mention is linked in the window in whose middle it stands. Offsets are always those of the whole text.

        ```python
        >>> for mention in linker.annotate("Hiddleston met Swift in Nashville.", image="photo.jpg"):  # doctest: +SKIP
        ...     print(mention.start, mention.end, mention.mention, mention.entity_id, mention.name, mention.score)
        ```

        Args:
            texts (`str`, mapping or sequence of these): One text or T texts. A mapping has a `text`, and optionally an
                `image` and `spans`.
            image (*optional*): The image of a single text: a path, bytes, a PIL image or a NumPy array.
            spans (sequence, *optional*): The mentions of a single text, which are then not searched: `[start, end]`
                (characters, end exclusive), mappings with `start`, `end` and optionally `label`, or
                [`~hf_mel.detection.spans.MentionSpan`].
            detector ([`~hf_mel.detection.spans.MentionDetector`], *optional*): Finds the mentions of texts that have no
                `spans`. Default: [`EntityLinker.gazetteer`], the names of the knowledge base.
            overlapping (`bool`): Whether to keep mentions that overlap, instead of the longest
                ([`~hf_mel.detection.spans.resolve_overlaps`]).
            top_k (`int`): Number of candidates of each mention.
            batch_size (`int`, *optional*): Mentions per pass over the knowledge base. Default: 256, and 32 with a reranker.
            progress (`bool`): Whether to show a progress bar.

        Returns:
            [`~hf_mel.linking.annotating.AnnotatedText`], or a list of T of them. The `entity_id` of a mention is "NIL" if
            the knowledge base does not hold its entity. A text without mentions has a warning.

        Raises:
            DataFormatError: A text is missing or no string.
            SpanError: A span is outside its text or empty; says whether the detector returned it.
            ImageError, ScoreError, KnowledgeBaseError: As in [`EntityLinker.__call__`].
        """
        is_single = isinstance(texts, str | Mapping)
        if not is_single and (image is not None or spans is not None):
            raise DataFormatError(
                "image= and spans= belong to a single text.",
                remedy="Give a mapping with text, image and spans for each.",
            )
        if is_single:
            single = {"text": texts} if isinstance(texts, str) else dict(texts)
            single |= {k: v for k, v in (("image", image), ("spans", spans)) if v is not None}
            texts = [single]
        elif isinstance(texts, bytes) or not hasattr(texts, "__getitem__"):
            check_text(texts)
        if detector is not None and not callable(detector):
            raise ValueError(
                f"detector={detector!r} is no function. Open one by its name: hf_mel.detection.open_detector(name, kb=linker.kb)."
            )
        results: list[Any] = [None] * len(texts)
        options: dict[str, Any] = {"overlapping": overlapping, "top_k": top_k, "batch_size": batch_size}
        try:
            with tqdm(total=len(texts), desc="Annotating", unit="text", delay=1, disable=not progress) as bar:
                for batch, annotated in annotate_batches(self, texts, detector or self.gazetteer, **options):
                    for k, result in zip(batch, annotated, strict=True):
                        results[k] = result
                    bar.update(len(batch))
        except MelError as error:
            raise (error.changed(row=None) if is_single else error) from error
        return results[0] if is_single else results

    @property
    def gazetteer(self) -> Gazetteer:
        """The names and aliases of the knowledge base, as a detector. It is built on first use and kept."""
        state = (self.kb.num_physical_rows, len(self.kb), *self.kb.shards)
        if self._gazetteer is None or self._gazetteer[0] != state:
            self._gazetteer = (state, Gazetteer.from_kb(self.kb))
        return self._gazetteer[1]

    def explain(self, mention: MentionLike, entity_id: str) -> Explanation | None:
        """Explains the score of a mention and an entity by the model's attention.

        Args:
            mention (mapping): As in [`EntityLinker.__call__`].
            entity_id (`str`): Id of an entity of the knowledge base.

        Returns:
            [`~hf_mel.linking.explaining.Explanation`], or `None` if the model has no attention to show.

        Raises:
            UnknownEntityError: The knowledge base has no such entity.
            SpanError, DataFormatError, ImageError: As in [`EntityLinker.__call__`].
        """
        mention_row = self._mention_row(mention, locate_mention(mention, None), None)
        kb_row = self.kb.row_of(entity_id)
        image = self.kb.image(kb_row) if self._sees_images else None
        entity = {**self.kb.rows([kb_row], further=True)[0], "images": [] if image is None else [image]}
        return explain(self._inputs, mention_row, entity)

    @staticmethod
    def _mention_row(mention: MentionLike, span: tuple[str, int, int], position: int | None) -> dict[str, Any]:
        """Returns a mention as a row of the schema with an opened image."""
        surface, start, end = span
        row = {**MENTION_DEFAULTS, "text": "", **mention, "mention": surface, "start": start, "end": end}
        if row["image"] is not None:
            row["image"] = open_image(row["image"], row=position)
        return row

    @cached_property
    def _sees_images(self) -> bool:
        return sees_images(self.processor, posts=knows_posts(self.model))

    @cached_property
    def _unread_by_reranker(self) -> list[str]:
        if self.reranker_processor is None:
            return []
        return unread_columns_in_pairs(self.reranker_processor, DESCRIBING_COLUMNS)

    @cached_property
    def _reranker_sees_images(self) -> bool:
        return self.reranker_processor is not None and sees_images_in_pairs(self.reranker_processor)

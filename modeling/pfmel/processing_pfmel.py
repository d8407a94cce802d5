"""Processor of PFMEL: makes the sentences of §3.2-3.4 and the sequences "[CLS] text image [SEP] text image [SEP]"."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    ProcessorMixin,
)

#: Options for entities that are social media accounts, as in §3.2 and §3.4. The columns are `screen_name` (with or
#: without "@"), `location`, `name`, `description` and `recent_posts` (a list, of which three are read).
ACCOUNT_OPTIONS: dict[str, Any] = {
    "entity_lead": "{screen_name}. ",
    "entity_template": "the username of {screen_name} who lives in {location} is {name} and the description is "
    "{description}. some recent tweets of the user include: {recent_posts}.",
    "missing": "NA",
    "max_words": {"location": 10, "description": 30, "recent_posts": 35},
}

#: Number of posts in the context of an account.
_RECENT_POSTS = 3
#: Columns that the row of an entity may lack.
_OPTIONAL_COLUMNS = ("aliases", "description", "attributes")
#: Forms of the pre-training examples of each task: see `form_ids` of [`PfmelForPreTraining.forward`].
_FORMS = {"mixed": (0, 1), "text": (2,), "multimodal": (3,)}


@dataclass
class _Text:
    """Tokens of one sentence. The last `tail` tokens are always kept; of the others, `[start, end)` is cut last."""

    ids: list[int]
    start: int = 0
    end: int = 0
    tail: int = 0

    @property
    def num_required(self) -> int:
        """Number of tokens that must not be cut."""
        return self.end - self.start + self.tail

    def truncate(self, length: int) -> list[int]:
        """Returns at most `length` tokens: a window around `[start, end)`, then the tail."""
        if len(self.ids) <= length:
            return self.ids
        body, tail = self.ids[: len(self.ids) - self.tail], self.ids[len(self.ids) - self.tail :]
        width = max(length - len(tail), 0)
        start = self.start
        if self.end - self.start < width:
            start = min(max(self.start - (width - self.end + self.start) // 2, 0), len(body) - width)
        return (body[start : start + width] + tail)[:length]


@dataclass
class _Sentence:
    """One of the two sentences of a sequence: its text, and 0 for an image of the mention or 1 for one of the entity."""

    text: _Text
    image: int | None = None


class PfmelProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of a [`PfmelModel`], and posts with entities
    into those of a [`PfmelForPreTraining`].

    ```python
    >>> processor(pairs=[(mention_row, candidate_rows)])  # doctest: +SKIP
    ```

    A sequence that is too long is truncated on both sides: each sentence may use half of the tokens, and those that
    the other does not use. A context keeps the tokens around the mention, an entity its beginning up to the name.

    Args:
        image_processor: Image processor. Its configuration determines size, cropping and normalisation.
        tokenizer: Fast tokenizer with [CLS] and [SEP].
        max_length (`int`, *optional*, defaults to 300): Maximum number of tokens of a sequence (Table 3), images not
            counted. Sequences are padded to the longest of the batch.
        mention_tail (`str`, *optional*): Template that follows a context when linking (§3.4). It can use the columns
            of the mention.
        entity_template (`str`, *optional*): Template of the entity context (§3.2). It can use the columns of the
            entity. The default is name, aliases, description and attributes as sentences, of which a row may lack all
            but the name. For accounts see `ACCOUNT_OPTIONS`.
        entity_lead (`str`, *optional*): Template before the entity context when linking (§3.4).
        missing (`str`, *optional*): Replacement for an empty column; "NA" in the paper. Empty sentences are dropped.
        max_words (`dict`, *optional*): Maximum number of words by column; for a list, of each item.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images.
        max_entity_images (`int`, *optional*): Number of images of an entity to average, the first ones: T(e) of §3.2.
            `None` averages all images, as in the paper.
        pretraining_tasks (`list[str]`, *optional*): Some of "mixed", "text" and "multimodal" (§3.3). The default is
            all, or "text" without images.
        swap_roles (`bool`, *optional*, defaults to `True`): Whether pre-training repeats each example with its
            sentences swapped.
        mention_marks (`list[str]`, *optional*): The marks before and after the mention in its context when linking.
            `None` marks nothing, as in the paper; [`PfmelProcessor.from_parts`] sets "«" and "»".
        name_match (`bool`, *optional*, defaults to `False`): Whether to prepare `pair_name_match`, 1 if the entity's name or an
            alias has all words of the mention. A model with `name_weight` needs it.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=300,
        mention_tail=". {mention} is",
        entity_template="{name}. {aliases}. {description}. {attributes}.",
        entity_lead="",
        missing="",
        max_words=None,
        use_images=True,
        max_entity_images=None,
        pretraining_tasks=None,
        swap_roles=True,
        mention_marks=None,
        name_match=False,
    ):
        super().__init__(image_processor, tokenizer)
        if pretraining_tasks is None:
            pretraining_tasks = list(_FORMS) if use_images else ["text"]
        if not pretraining_tasks or set(pretraining_tasks) - set(_FORMS):
            raise ValueError(
                f"pretraining_tasks={pretraining_tasks!r} must be one or more of {', '.join(map(repr, _FORMS))}."
            )
        if not use_images and list(pretraining_tasks) != ["text"]:
            raise ValueError(
                f"pretraining_tasks={pretraining_tasks!r} need images. Set use_images=True, or give ['text']."
            )
        if max_entity_images is not None and max_entity_images < 1:
            raise ValueError(
                f"max_entity_images={max_entity_images} must be at least 1. Set use_images=False for none."
            )
        if max_length < 8:
            raise ValueError(f"max_length={max_length} is too short for two sentences. Give at least 8.")
        limit = getattr(tokenizer, "model_max_length", max_length + 2)
        if max_length + 2 > limit:
            raise ValueError(
                f"max_length={max_length} and two images exceed the {limit} positions of the text encoder. Give at "
                f"most {limit - 2}."
            )
        self.max_length = max_length
        self.mention_tail = mention_tail
        self.entity_template = entity_template
        self.entity_lead = entity_lead
        self.missing = missing
        self.max_words = dict(max_words or {})
        self.use_images = use_images
        self.max_entity_images = max_entity_images
        self.pretraining_tasks = list(pretraining_tasks)
        self.swap_roles = swap_roles
        self.mention_marks = None if mention_marks is None else list(mention_marks)
        self.name_match = name_match

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> PfmelProcessor:
        """Builds a processor for a model of [`PfmelModel.from_backbones`], from the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError(
                "from_backbones needs the tokenizer of a text encoder. Give the encoder's Hub id or folder."
            )
        return cls.from_parts(AutoTokenizer.from_pretrained(text), vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> PfmelProcessor:
        """Builds a processor from a tokenizer.

        Args:
            tokenizer: Fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor (for instance `{"size": {"height": 64, "width": 64}}`). With `None` the processor prepares no
                images.
            options: Options of the processor.
        """
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            settings = {"size": {"height": 224, "width": 224}, "do_center_crop": False} | dict(vision or {})
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        options.setdefault("mention_marks", ["«", "»"])
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Sequence[Mapping[str, Any]] | None = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
        posts: Sequence[Mapping[str, Any]] | None = None,
        partners: Sequence[int] | None = None,
    ) -> BatchFeature:
        """Prepares pairs of a mention and its candidates, or posts for pre-training.

        Args:
            pairs (`list[tuple[dict, list[dict]]]`, *optional*): M mention rows (`mention`, `text`, `start`, `end`,
                `image`), each with the rows of its candidates (the columns of the template, and `images`, which are
                averaged). If a row has `image_features` (a tensor [d], [k, d] to be averaged, or `None`), they replace
                its images.
            posts, entities (`list[dict]` of P rows each, *optional*): Posts (`text`, `image`; a mention row is a
                post), and the entity of each post.
            partners (`list[int]` of length P, *optional*): For each post, the post that provides the second sentence;
                its own number if that sentence is the next one.
            mentions: Not supported by a reranker.

        Returns:
            `BatchFeature` of tensors: the arguments of [`PfmelModel.forward`] for pairs, or those of
            [`PfmelForPreTraining.forward`], with `labels`, for posts.

        Raises:
            ValueError: The arguments are neither pairs nor posts with entities and partners, or a row lacks a column
                that its template needs.
        """
        if mentions is not None or (entities is not None and posts is None):
            raise ValueError("PFMEL reads a mention and its candidates together. Give pairs=.")
        if pairs is not None:
            return self._linking_batch(pairs)
        if posts is None or entities is None or partners is None:
            raise ValueError(
                "The rows are missing. Give pairs= to link, or posts=, entities= and partners= to pre-train."
            )
        return self._pretraining_batch(posts, entities, partners)

    # Copied from modeling/mmel/processing_mmel.py
    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Returns the pixel values [I, 3, H, W] of I PIL images."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def _linking_batch(self, pairs) -> BatchFeature:
        """Returns the arguments of [`PfmelModel.forward`]."""
        mentions = [mention for mention, _ in pairs]
        candidates = [entity for _, entities in pairs for entity in entities]
        columns = max([1, *(len(entities) for _, entities in pairs)])
        mask = torch.zeros(len(pairs), columns, dtype=torch.bool)
        for row, (_, entities) in enumerate(pairs):
            mask[row, : len(entities)] = True
        cells = mask.nonzero().tolist()
        contexts: dict[Any, int] = {}
        for row, mention in enumerate(mentions):
            contexts.setdefault(mention.get("context_id", ("row", row)), len(contexts))
        batch: dict[str, torch.Tensor] = {
            "pair_mask": mask,
            "pair_context": torch.tensor(
                [contexts[mention.get("context_id", ("row", row))] for row, mention in enumerate(mentions)],
                dtype=torch.long,
            ),
        }
        batch |= given_tensors(pairs, mask, self.name_match)
        mention_shown, entity_shown = [False] * len(mentions), [False] * len(candidates)
        if self.use_images:
            tensors, mention_shown = self._image_tensors("pair_mention", mentions, "image")
            batch |= tensors
            tensors, entity_shown = self._image_tensors("pair_entity", candidates, "images")
            for name, values in tensors.items():
                batch[name] = values.new_zeros(*mask.shape, *values.shape[1:])
                batch[name][mask] = values
        sequences = [
            (
                _Sentence(first, 0 if mention_shown[row] else None),
                _Sentence(second, 1 if entity_shown[cell] else None),
            )
            for cell, ((row, _), (first, second)) in enumerate(zip(cells, self._linking_texts(pairs), strict=True))
        ]
        for name, values in self._sequence_tensors(sequences).items():
            padded = values.new_full((*mask.shape, *values.shape[1:]), self._padding_values[name])
            padded[mask] = values
            batch[f"pair_{name}"] = padded
        return BatchFeature(batch)

    def _linking_texts(self, pairs) -> list[tuple[_Text, _Text]]:
        """Returns the two texts of each pair of a mention and a candidate."""
        first = self._post_texts([mention for mention, _ in pairs], self.mention_tail, self.mention_marks)
        second = iter(self._entity_texts([row for _, rows in pairs for row in rows], self.entity_lead))
        return [(text, next(second)) for text, (_, rows) in zip(first, pairs, strict=True) for _ in rows]

    def num_left_out(self, mentions=None, entities=None, pairs=()) -> list[int]:
        """Returns how many tokens of each pair are left out, because of `max_length`: of each mention's candidates."""
        return [
            len(first.ids) + len(second.ids) - sum(self._allot_tokens(first, second))
            for first, second in self._linking_texts(pairs)
        ]

    def _pretraining_batch(self, posts, entities, partners) -> BatchFeature:
        """Returns the arguments of [`PfmelForPreTraining.forward`]."""
        batch: dict[str, torch.Tensor] = {}
        post_shown = entity_shown = [False] * len(posts)
        if self.use_images:
            tensors, post_shown = self._image_tensors("post", posts, "image")
            batch |= tensors
            tensors, entity_shown = self._image_tensors("entity", entities, "images")
            batch |= tensors
        texts, contexts = self._post_texts(posts, ""), self._entity_texts(entities, "")
        empty = _Text([])
        sequences: list[tuple[_Sentence, _Sentence]] = []
        numbers: list[tuple[int, int, int, int]] = []  # form, post, entity, label
        for task in self.pretraining_tasks:
            for form in _FORMS[task]:
                for i, j in enumerate(partners):
                    post, entity = (j, i) if form == 1 else (i, j)
                    post_image = 0 if post_shown[post] and form in (1, 3) else None
                    entity_image = 1 if entity_shown[entity] and form in (0, 3) else None
                    if (form == 0 and entity_image is None) or (form == 1 and post_image is None):
                        continue  # the example is about an image that is missing
                    post_sentence = _Sentence(texts[post] if form != 1 else empty, post_image)
                    entity_sentence = _Sentence(contexts[entity] if form != 0 else empty, entity_image)
                    order = (entity_sentence, post_sentence) if form == 1 else (post_sentence, entity_sentence)
                    for pair in (order, order[::-1]) if self.swap_roles else (order,):
                        sequences.append(pair)
                        numbers.append((form, post, entity, int(i != j)))
        names = ("form_ids", "post_index", "entity_index", "labels")
        columns = torch.tensor(numbers, dtype=torch.long).reshape(-1, 4).unbind(1)
        return BatchFeature(
            {
                **batch,
                **self._sequence_tensors(sequences),
                **{n: c.clone() for n, c in zip(names, columns, strict=True)},
            }
        )

    @property
    def _padding_values(self) -> dict[str, int]:
        """Padding of the tensors of a sequence, by name."""
        pad = self.tokenizer.pad_token_id
        return {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "image_positions": -1}

    def _sequence_tensors(self, sequences: Sequence[tuple[_Sentence, _Sentence]]) -> dict[str, torch.Tensor]:
        """Returns tensors [S, L] of S sequences, and `image_positions` [S, 2]."""
        cls, sep, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad"))
        rows: list[tuple[list[int], int, list[int]]] = []
        for first, second in sequences:
            ids, positions = [cls], [-1, -1]
            split = 0
            for sentence, length in zip((first, second), self._allot_tokens(first.text, second.text), strict=True):
                ids += sentence.text.truncate(length)
                if sentence.image is not None:
                    positions[sentence.image] = len(ids)
                    ids.append(pad)  # a placeholder, which the model replaces by the image
                ids.append(sep)
                split = split or len(ids)
            rows.append((ids, split, positions))
        width = max([1, *(len(ids) for ids, _, _ in rows)])
        shape = (len(rows), width)
        out = {
            name: torch.full((len(rows), 2) if name == "image_positions" else shape, padding)
            for name, padding in self._padding_values.items()
        }
        for row, (ids, split, positions) in enumerate(rows):
            out["input_ids"][row, : len(ids)] = torch.tensor(ids)
            out["attention_mask"][row, : len(ids)] = 1
            out["token_type_ids"][row, split : len(ids)] = 1
            out["image_positions"][row] = torch.tensor(positions)
        return out

    def _allot_tokens(self, first: _Text, second: _Text) -> tuple[int, int]:
        """Decides how many tokens of each text fit.

        Each text may use half of the tokens and those that the other does not use. The required tokens of a text take
        precedence over optional tokens of the other.
        """
        total = self.max_length - 3
        half = total // 2
        a, b = len(first.ids), len(second.ids)
        if a + b <= total:
            return a, b
        at_least = min(first.num_required, max(half, total - second.num_required))
        at_most = total - min(second.num_required, total - at_least)
        share = min(max(min(a, max(half, total - b)), at_least), at_most)
        return share, total - share

    def _post_texts(self, rows, tail: str, marks: Sequence[str] | None = None) -> list[_Text]:
        """Returns the text of each mention or post, the mention between `marks`, followed by the filled `tail` (§3.4)."""
        texts, endings, spans = [], [], []
        for row in rows:
            text = row["text"] or ""
            start, end = _mention_span(row, text)
            ending = self._fill_template(tail, row)[0]
            if ending.startswith("."):
                text = text.rstrip().removesuffix(".")
            marked, span = _with_marks(text, (start, min(end, len(text))), marks)
            texts.append(marked)
            endings.append(ending)
            spans.append(span)
        tails = self._tokenize(endings)[0]
        out = []
        for ids, offsets, tail_ids, (start, end) in zip(*self._tokenize(texts), tails, spans, strict=True):
            inside = [k for k, (left, right) in enumerate(offsets) if left < end and right > start]
            span = (inside[0], inside[-1] + 1) if inside else (0, 0)
            out.append(_Text(ids + tail_ids, *span, tail=len(tail_ids)))
        return out

    def _entity_texts(self, rows, lead: str) -> list[_Text]:
        """Returns the context of each entity (§3.2), after the filled `lead` (§3.4)."""
        filled = [self._fill_template(lead + self.entity_template, row) for row in rows]
        out = []
        for ids, offsets, (_, end) in zip(*self._tokenize([text for text, _ in filled]), filled, strict=True):
            out.append(_Text(ids, 0, sum(left < end for left, _ in offsets)))
        return out

    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Returns the tokens of each text and their offsets."""
        if not texts:
            return [], []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _fill_template(self, template: str, row: Mapping[str, Any]) -> tuple[str, int]:
        """Fills a template from a row, and returns it with the position where the name ends (0 without a name)."""
        text, name_end = "", 0
        for place, (literal, column, _, _) in enumerate(Formatter().parse(template)):
            text = self._append(text, literal) if place else literal
            if column is None:
                continue
            if column not in row and column not in _OPTIONAL_COLUMNS:
                raise ValueError(
                    f"The template {template!r} needs the column {column!r}, but the row has {', '.join(row)}. Add "
                    "the column, or change the template."
                )
            value = self._column_text(column, row.get(column))
            text = self._append(text, value)
            if column == "name" and not name_end:
                name_end = len(text)
        return text, name_end

    def _column_text(self, column: str, value: Any) -> str:
        """Returns the text of a column: its first words, `missing` if it is empty, and the items of a list joined."""
        limit = self.max_words.get(column)
        if isinstance(value, str) or value is None:
            text = " ".join((value or "").split()[:limit])
            if column == "screen_name" and text:
                text = "@" + text.removeprefix("@")
            return text or self.missing
        if column != "recent_posts":
            return ", ".join(self._column_text(column, item) for item in value if item) or self.missing
        items = [self._column_text(column, item) for item in [*value, *[None] * _RECENT_POSTS][:_RECENT_POSTS]]
        return f"{', '.join(items[:-1])} and {items[-1]}"

    @staticmethod
    def _append(text: str, addition: str) -> str:
        """Appends to a text, without a full stop that would follow another one or start the text."""
        if addition.startswith(".") and (not text or re.search(r"\.\s*$", text)):
            addition = addition[1:]
            text = text.rstrip()
            return text + (addition if text else addition.lstrip())
        return text + addition

    def _image_tensors(self, side: str, rows, column: str) -> tuple[dict[str, torch.Tensor], list[bool]]:
        """Prepares the images of R rows.

        Args:
            side: Prefix of the names of the tensors.
            rows: The rows.
            column: "image" or "images".

        Returns:
            `tuple`: The tensors `<side>_image_features` [R, d] or `<side>_pixel_values` [R, 3, H, W], with zeros where
            a row has no image; if some row has several images, `<side>_pixel_values` [R, K, 3, H, W] and
            `<side>_image_counts` [R]; no tensors if no row has an image. And for each row, whether it has an image.
        """
        limit = self.max_entity_images
        if any("image_features" in row for row in rows):
            values = [row.get("image_features") for row in rows]
            values = [None if v is None else v[:limit].float().mean(0) if v.dim() == 2 else v.float() for v in values]
            shown = [value is not None for value in values]
            if not any(shown):
                return {}, shown
            present = torch.stack([value for value in values if value is not None])
            features = present.new_zeros(len(rows), present.shape[1])
            features[torch.tensor(shown)] = present
            return {f"{side}_image_features": features}, shown
        lists = [row.get(column) or () if column == "images" else [row.get(column)] for row in rows]
        lists = [[image for image in images[:limit] if image is not None] for images in lists]
        counts = torch.tensor([len(images) for images in lists], dtype=torch.long)
        if not counts.any():
            return {}, [False] * len(rows)
        pixels = self.images([image for images in lists for image in images])
        is_image = torch.arange(int(counts.max())) < counts.unsqueeze(1)
        out = pixels.new_zeros(*is_image.shape, *pixels.shape[1:])
        out[is_image] = pixels
        if is_image.shape[1] == 1:
            return {f"{side}_pixel_values": out[:, 0]}, (counts > 0).tolist()
        return {f"{side}_pixel_values": out, f"{side}_image_counts": counts}, (counts > 0).tolist()


# Copied from modeling/mmel/processing_mmel.py
def given_tensors(pairs, mask: torch.Tensor, name_match: bool) -> dict[str, torch.Tensor]:
    """Returns what a pair has before it is read, each [M, C].

    Args:
        pairs (`list[tuple[dict, list[dict]]]`): M mention rows, each with the rows of its candidates.
        mask (`torch.Tensor` [M, C]): The candidates.
        name_match (`bool`): Whether to make `pair_name_match`, 1 if a name has all words of the mention. A mention without
            a word matches nothing.

    Returns:
        `dict`: `pair_name_match` if asked, and `pair_list_score` if all candidates have a `list_score`.
    """
    values: dict[str, list[float]] = {}
    if name_match:
        values["pair_name_match"] = [
            float(any(words and words <= _words_of(name) for name in (row.get("name"), *(row.get("aliases") or ()))))
            for mention, candidates in pairs
            for words in (_words_of(mention.get("mention")),)
            for row in candidates
        ]
    scores = [row.get("list_score") for _, candidates in pairs for row in candidates]
    if None not in scores:
        values["pair_list_score"] = scores
    tensors = {}
    for name, numbers in values.items():
        tensors[name] = torch.zeros(mask.shape)
        tensors[name][mask] = torch.tensor(numbers, dtype=torch.float32)
    return tensors


# Copied from modeling/mmel/processing_mmel.py
@functools.lru_cache(maxsize=2**16)
def _words_of(name: str | None) -> frozenset[str]:
    """Returns the words of a name, regardless of case and accents."""
    letters = unicodedata.normalize("NFKD", (name or "").casefold())
    return frozenset(re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c))))


# Copied from modeling/mimic/processing_mimic.py
def _mention_span(row: Mapping[str, Any], text: str) -> tuple[int, int]:
    """Returns where the mention stands in the text: at `start` and `end`, or else where it occurs first; (0, 0) if not."""
    start, end, name = row.get("start"), row.get("end"), row.get("mention") or ""
    if start is not None and end is not None and 0 <= start < end <= len(text):
        return start, end
    first = re.search(re.escape(name), text, re.IGNORECASE) if name.strip() else None
    return first.span() if first else (0, 0)


# Copied from modeling/mimic/processing_mimic.py
def _with_marks(text: str, span: tuple[int, int], marks: Sequence[str] | None) -> tuple[str, tuple[int, int]]:
    """Puts marks around the mention at `span`, and returns the text and the span of the mention with its marks."""
    start, end = span
    if not marks or start == end:
        return text, span
    marked = f"{marks[0]} {text[start:end]} {marks[1]}"
    return f"{text[:start]}{marked}{text[end:]}", (start, start + len(marked))


__all__ = ["ACCOUNT_OPTIONS", "PfmelProcessor"]

"""Rows to tensors for PFMEL: the sentence forms of §3.2–3.4, and "[CLS] text image [SEP] text image [SEP]" of them."""

from __future__ import annotations

import re
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

#: Options for entities that are accounts of a social medium, as §3.2 and §3.4 print them. The columns are
#: `screen_name` (with or without its "@"), `location`, `name`, `description` and `recent_posts` (a list, three are read).
ACCOUNT_OPTIONS: dict[str, Any] = {
    "entity_lead": "{screen_name}. ",
    "entity_template": "the username of {screen_name} who lives in {location} is {name} and the description is "
    "{description}. some recent tweets of the user include: {recent_posts}.",
    "missing": "NA",
    "max_words": {"location": 10, "description": 30, "recent_posts": 35},
}

#: Posts of an account that its context shows.
_RECENT_POSTS = 3
_FORMS = {"mixed": (0, 1), "text": (2,), "multimodal": (3,)}


@dataclass
class _Text:
    """Tokens of one sentence, of which `[start, end)` is kept longest and the last `tail` ones always."""

    ids: list[int]
    start: int = 0
    end: int = 0
    tail: int = 0

    @property
    def needed(self) -> int:
        return self.end - self.start + self.tail

    def cut(self, length: int) -> list[int]:
        """At most `length` tokens: a window around what is kept, then the tail."""
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
    """One of the two sentences of a sequence: its text, and the number of its image's column, if it shows one."""

    text: _Text
    image: int | None = None


class PfmelProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention and its candidates into the inputs of a [`PfmelModel`], and posts with entities into those of
    a [`PfmelForPreTraining`].

    ```python
    >>> processor(pairs=[(mention_row, candidate_rows)])  # doctest: +SKIP
    ```

    A sequence that is too long is cut on both sides: each sentence may fill half of it, and what the other leaves free.
    Of a context, the tokens around the mention stay; of an entity, its beginning up to the name.

    Args:
        image_processor: Prepares images; its own configuration holds size, cropping and normalisation.
        tokenizer: Prepares text; a fast one, with [CLS] and [SEP].
        max_length (`int`, *optional*, defaults to 300): Most tokens of a sequence (Table 3), its images not counted.
            Sequences are padded to the longest of a batch.
        mention_tail (`str`, *optional*): What follows a context when linking (§3.4), over the columns of the mention.
        entity_template (`str`, *optional*): The entity context (§3.2), over the columns of the entity. Default: name,
            description and attributes as sentences. For accounts see `ACCOUNT_OPTIONS`.
        entity_lead (`str`, *optional*): What comes before the entity context when linking (§3.4).
        missing (`str`, *optional*): Stands for an empty column; "NA" in the paper. Sentences left empty are dropped.
        max_words (`dict`, *optional*): Most words of a column, by its name; of a list, of each item.
        use_images (`bool`, *optional*, defaults to `True`): Whether sentences have images at all.
        max_entity_images (`int`, *optional*): How many images of an entity are averaged, the first ones: T(e) of §3.2.
            `None`: all, as in the paper.
        pretraining_tasks (`list[str]`, *optional*): Which of "mixed", "text", "multimodal" (§3.3). Default: all, or the
            second alone without images.
        swap_roles (`bool`, *optional*, defaults to `True`): Whether pre-training has each example a second time, its
            sentences the other way round.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=300,
        mention_tail=". {mention} is",
        entity_template="{name}. {description}. {attributes}.",
        entity_lead="",
        missing="",
        max_words=None,
        use_images=True,
        max_entity_images=None,
        pretraining_tasks=None,
        swap_roles=True,
    ):
        super().__init__(image_processor, tokenizer)
        if pretraining_tasks is None:
            pretraining_tasks = list(_FORMS) if use_images else ["text"]
        if not pretraining_tasks or set(pretraining_tasks) - set(_FORMS):
            raise ValueError(
                f"pretraining_tasks={pretraining_tasks!r} must be one or more of {', '.join(map(repr, _FORMS))}."
            )
        if not use_images and list(pretraining_tasks) != ["text"]:
            raise ValueError(f"pretraining_tasks={pretraining_tasks!r} need images, and use_images is False.")
        if max_entity_images is not None and max_entity_images < 1:
            raise ValueError(f"max_entity_images={max_entity_images} must be at least 1; use_images=False shows none.")
        if max_length < 8:
            raise ValueError(f"max_length={max_length} leaves no room for two sentences; give at least 8.")
        limit = getattr(tokenizer, "model_max_length", max_length + 2)
        if max_length + 2 > limit:
            raise ValueError(
                f"max_length={max_length} and two images are more than the {limit} positions of the text encoder; give at "
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

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> PfmelProcessor:
        """A processor for [`PfmelModel.from_backbones`] with the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders.
            options: options of the processor.
        """
        if text is None:
            raise ValueError("from_backbones needs the Hub id or folder of a text encoder, whose tokenizer it takes.")
        return cls.from_parts(AutoTokenizer.from_pretrained(text), vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> PfmelProcessor:
        """A processor around a tokenizer.

        Args:
            tokenizer: a fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor (for instance `{"size": {"height": 64, "width": 64}}`). `None`: no images.
            options: options of the processor.
        """
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            settings = {"size": {"height": 224, "width": 224}, "do_center_crop": False} | dict(vision or {})
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Sequence[Mapping[str, Any]] | None = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
        posts: Sequence[Mapping[str, Any]] | None = None,
        partners: Sequence[int] | None = None,
    ) -> BatchFeature:
        """
        Args:
            pairs (M pairs, *optional*): a mention row (`mention`, `text`, `start`, `end`, `image`) and its candidate rows
                (what the template names, and `images`, which are averaged). A row with `image_features` (a tensor [d],
                [k, d] to be averaged, or `None`) gives that instead of its images.
            posts, entities (P rows each, *optional*): posts (`text`, `image`; a mention row is one too), and each one's
                own entity.
            partners (P ints, *optional*): the post whose sentence follows each; its own number if it is the next one.
            mentions: not for a reranker; raises.

        Returns:
            `BatchFeature` of tensors: the arguments of [`PfmelModel.forward`], or with `labels` those of
            [`PfmelForPreTraining.forward`].
        """
        if mentions is not None or (entities is not None and posts is None):
            raise ValueError("PFMEL reads a mention and its candidates together; give pairs= instead.")
        if pairs is not None:
            return self._pairs(pairs)
        if posts is None or entities is None or partners is None:
            raise ValueError("Give pairs= to link, or posts=, entities= and partners= to pre-train.")
        return self._pretraining(posts, entities, partners)

    # Copied from modeling/mmel/processing_mmel.py
    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Returns the pixel values [I, 3, H, W] of I PIL images."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def _pairs(self, pairs) -> BatchFeature:
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
        shows = ([False] * len(mentions), [False] * len(candidates))
        if self.use_images:
            tensors, shown = self._images("pair_mention", mentions, "image")
            batch |= tensors
            of_entities, shown_entities = self._images("pair_entity", candidates, "images")
            for name, values in of_entities.items():
                batch[name] = values.new_zeros(*mask.shape, *values.shape[1:])
                batch[name][mask] = values
            shows = (shown, shown_entities)
        first = self._contexts(mentions, self.mention_tail)
        second = self._entities(candidates, self.entity_lead)
        sequences = [
            (
                _Sentence(first[row], 0 if shows[0][row] else None),
                _Sentence(second[cell], 1 if shows[1][cell] else None),
            )
            for cell, (row, _) in enumerate(cells)
        ]
        for name, values in self._sequences(sequences).items():
            whole = values.new_full((*mask.shape, *values.shape[1:]), self._fillers[name])
            whole[mask] = values
            batch[f"pair_{name}"] = whole
        return BatchFeature(batch)

    def _pretraining(self, posts, entities, partners) -> BatchFeature:
        batch: dict[str, torch.Tensor] = {}
        post_shown = entity_shown = [False] * len(posts)
        if self.use_images:
            tensors, post_shown = self._images("post", posts, "image")
            batch |= tensors
            tensors, entity_shown = self._images("entity", entities, "images")
            batch |= tensors
        texts, contexts = self._contexts(posts, ""), self._entities(entities, "")
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
                        continue  # this example is about an image that there is not
                    of_post = _Sentence(texts[post] if form != 1 else empty, post_image)
                    of_entity = _Sentence(contexts[entity] if form != 0 else empty, entity_image)
                    order = (of_entity, of_post) if form == 1 else (of_post, of_entity)
                    for pair in (order, order[::-1]) if self.swap_roles else (order,):
                        sequences.append(pair)
                        numbers.append((form, post, entity, int(i != j)))
        names = ("form_ids", "post_index", "entity_index", "labels")
        columns = torch.tensor(numbers, dtype=torch.long).reshape(-1, 4).unbind(1)
        return BatchFeature(
            {**batch, **self._sequences(sequences), **{n: c.clone() for n, c in zip(names, columns, strict=True)}}
        )

    @property
    def _fillers(self) -> dict[str, int]:
        pad = self.tokenizer.pad_token_id
        return {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "image_positions": -1}

    def _sequences(self, sequences: Sequence[tuple[_Sentence, _Sentence]]) -> dict[str, torch.Tensor]:
        """Tensors [S, L] of S sequences, and `image_positions` [S, 2]."""
        cls, sep, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad"))
        rows: list[tuple[list[int], int, list[int]]] = []
        for first, second in sequences:
            ids, positions = [cls], [-1, -1]
            split = 0
            for sentence, length in zip((first, second), self._lengths(first.text, second.text), strict=True):
                ids += sentence.text.cut(length)
                if sentence.image is not None:
                    positions[sentence.image] = len(ids)
                    ids.append(pad)  # only holds the place; the model puts the image there
                ids.append(sep)
                split = split or len(ids)
            rows.append((ids, split, positions))
        width = max([1, *(len(ids) for ids, _, _ in rows)])
        shape = (len(rows), width)
        out = {
            name: torch.full((len(rows), 2) if name == "image_positions" else shape, filler)
            for name, filler in self._fillers.items()
        }
        for row, (ids, split, positions) in enumerate(rows):
            out["input_ids"][row, : len(ids)] = torch.tensor(ids)
            out["attention_mask"][row, : len(ids)] = 1
            out["token_type_ids"][row, split : len(ids)] = 1
            out["image_positions"][row] = torch.tensor(positions)
        return out

    def _lengths(self, first: _Text, second: _Text) -> tuple[int, int]:
        """How many tokens of each text fit: half of the room each, and what the other leaves free; what a text needs goes
        before what the other could well miss."""
        room = self.max_length - 3
        half = room // 2
        a, b = len(first.ids), len(second.ids)
        if a + b <= room:
            return a, b
        at_least = min(first.needed, max(half, room - second.needed))
        at_most = room - min(second.needed, room - at_least)
        share = min(max(min(a, max(half, room - b)), at_least), at_most)
        return share, room - share

    def _contexts(self, rows, tail: str) -> list[_Text]:
        """The text of each mention or post, and what follows it (§3.4)."""
        texts, endings, spans = [], [], []
        for row in rows:
            text, mention = row["text"] or "", row.get("mention") or ""
            start, end = row.get("start", -1), row.get("end", -1)
            if not 0 <= start < end <= len(text):
                start = text.lower().find(mention.lower())
                start, end = (start, start + len(mention)) if start >= 0 else (0, 0)
            ending = self._fill(tail, row)[0]
            if ending.startswith("."):
                text = text.rstrip().removesuffix(".")
            texts.append(text)
            endings.append(ending)
            spans.append((start, end))
        tails = self._tokenize(endings)[0]
        out = []
        for ids, offsets, last, (start, end) in zip(*self._tokenize(texts), tails, spans, strict=True):
            inside = [k for k, (left, right) in enumerate(offsets) if left < end and right > start]
            kept = (inside[0], inside[-1] + 1) if inside else (0, 0)
            out.append(_Text(ids + last, *kept, tail=len(last)))
        return out

    def _entities(self, rows, lead: str) -> list[_Text]:
        """The context of each entity (§3.2), after its lead (§3.4)."""
        filled = [self._fill(lead + self.entity_template, row) for row in rows]
        out = []
        for ids, offsets, (_, end) in zip(*self._tokenize([text for text, _ in filled]), filled, strict=True):
            out.append(_Text(ids, 0, sum(left < end for left, _ in offsets)))
        return out

    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        if not texts:
            return [], []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _fill(self, template: str, row: Mapping[str, Any]) -> tuple[str, int]:
        """A template over the columns of a row, and where in it the name ends (0 if it has none)."""
        text, name_end = "", 0
        for place, (literal, column, _, _) in enumerate(Formatter().parse(template)):
            text = self._join(text, literal) if place else literal
            if column is None:
                continue
            if column not in row:
                raise ValueError(
                    f"The template {template!r} needs the column {column!r}; the row has {', '.join(row)}."
                )
            value = self._value(column, row[column])
            text = self._join(text, value)
            if column == "name" and not name_end:
                name_end = len(text)
        return text, name_end

    def _value(self, column: str, value: Any) -> str:
        limit = self.max_words.get(column)
        if isinstance(value, str) or value is None:
            text = " ".join((value or "").split()[:limit])
            if column == "screen_name" and text:
                text = "@" + text.removeprefix("@")
            return text or self.missing
        items = [self._value(column, item) for item in [*value, *[None] * _RECENT_POSTS][:_RECENT_POSTS]]
        return f"{', '.join(items[:-1])} and {items[-1]}"

    @staticmethod
    def _join(text: str, more: str) -> str:
        """Appends to a text; a full stop that would follow another, or nothing at all, is left out."""
        if more.startswith(".") and (not text or re.search(r"\.\s*$", text)):
            more = more[1:]
            text = text.rstrip()
            return text + (more if text else more.lstrip())
        return text + more

    def _images(self, side: str, rows, column: str) -> tuple[dict[str, torch.Tensor], list[bool]]:
        """`<side>_image_features` [R, d] or `<side>_pixel_values` [R, 3, H, W] of R rows, zeros where a row has no image,
        and which have one. Where an entity has several, up to K: pixels [R, K, 3, H, W], and `<side>_image_counts` [R].
        Nothing if no row has an image."""
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
        there = torch.arange(int(counts.max())) < counts.unsqueeze(1)
        out = pixels.new_zeros(*there.shape, *pixels.shape[1:])
        out[there] = pixels
        if there.shape[1] == 1:
            return {f"{side}_pixel_values": out[:, 0]}, (counts > 0).tolist()
        return {f"{side}_pixel_values": out, f"{side}_image_counts": counts}, (counts > 0).tolist()


__all__ = ["ACCOUNT_OPTIONS", "PfmelProcessor"]

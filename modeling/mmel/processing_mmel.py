"""Processor of MMEL: fills a template with context and candidate, splits it by masks (eq. 1) and prepares images."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    ProcessorMixin,
)

#: Context templates: the words before the mention, between mention and context, and after the context.
_CONTEXT_TEMPLATES = {"mention_context": ("Mention:", ". Context:", "."), "context": ("", "Context:", ".")}
#: Entity templates: the columns that are read, in order.
_ENTITY_TEMPLATES = {
    "all": ("name", "aliases", "description", "attributes"),
    "name_attributes": ("name", "description", "attributes"),
    "attributes": ("attributes",),
}


class MmelProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of an [`MmelModel`].

    ```python
    >>> mention = {"mention": "Chaplin", "text": "Chaplin and Anderson", "start": 0, "end": 7, "context_id": "1"}
    >>> entity = {"name": "Charlie Chaplin", "description": "", "attributes": "Occupation: actor."}
    >>> processor(pairs=[(mention, [entity])])  # doctest: +SKIP
    ```

    The sequence of this pair is "Mention: Chaplin. Context: Chaplin and Anderson. Entity: Charlie Chaplin. Occupation:
    actor." A sequence that is too long loses context far from the mention and the end of the attributes. Each of the
    two keeps at least half of the space that mention and name leave. Mention and name are cut only if they alone are
    too long.

    Args:
        image_processor: Image processor. Its configuration determines size, cropping and normalisation.
        tokenizer: Fast tokenizer.
        max_length (`int`, *optional*, defaults to 128): Maximum number of tokens of a sequence. Sequences are padded
            to the longest of the batch.
        context_template (`str`, *optional*, defaults to `"mention_context"`): `"mention_context"` names the mention
            before the context, as the published network does. `"context"` is the template of the paper, "Context: x.
            Entity: y.", in which all mentions of a context read the same.
        entity_template (`str`, *optional*, defaults to `"all"`): `"all"` reads name, aliases, description and
            attributes of an entity, `"name_attributes"` the same without aliases, and `"attributes"` attributes only,
            as in the paper.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images.
        mention_marks (`list[str]`, *optional*): The marks before and after the mention in its context. `None` marks
            nothing, as in the paper; [`MmelProcessor.from_parts`] sets "«" and "»".
        name_match (`bool`, *optional*, defaults to `False`): Whether to prepare `pair_name_match`, 1 if the entity's name or an
            alias has all words of the mention. A model with `name_weight` needs it.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=128,
        context_template="mention_context",
        entity_template="all",
        use_images=True,
        mention_marks=None,
        name_match=False,
    ):
        for name, value, allowed in (
            ("context_template", context_template, tuple(_CONTEXT_TEMPLATES)),
            ("entity_template", entity_template, tuple(_ENTITY_TEMPLATES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        super().__init__(image_processor, tokenizer)
        self.max_length = max_length
        self.context_template = context_template
        self.entity_template = entity_template
        self.use_images = use_images
        self.mention_marks = None if mention_marks is None else list(mention_marks)
        self.name_match = name_match

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> MmelProcessor:
        """Builds a processor for a model of [`MmelModel.from_backbones`], from the same arguments.

        Args:
            text (`str`): Hub id or folder of the text encoder.
            vision (`str`, *optional*): Hub id or folder of the image encoder, or of a CLIP model.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError(
                "from_backbones needs the tokenizer of a text encoder. Give the encoder's Hub id or folder."
            )
        tokenizer = AutoTokenizer.from_pretrained(text)
        if vision is not None:
            config = AutoConfig.from_pretrained(vision)
            if config.model_type == "clip":
                size = config.vision_config.image_size
                return cls.from_parts(tokenizer, {"size": {"height": size, "width": size}}, **options)
        return cls.from_parts(tokenizer, vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> MmelProcessor:
        """Builds a processor around a tokenizer.

        Args:
            tokenizer: Any fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor, for instance `{"size": {"height": 64, "width": 64}}`. Default: no images.
            options: Arguments of the processor's constructor.
        """
        settings = {} if vision is None or isinstance(vision, str) else dict(vision)
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            # Stretch to a square (Lanczos) instead of cropping, so that nothing is lost.
            settings = {"size": {"height": 224, "width": 224}, "resample": 1, "do_center_crop": False} | settings
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        options.setdefault("mention_marks", ["«", "»"])
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Any = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
    ) -> BatchFeature:
        """Prepares M pairs of a mention and its candidates.

        Args:
            pairs (`list[tuple[dict, list[dict]]]`): M mention rows (`mention`, `text`, `start`, `end`, `context_id`,
                `image`), each with the rows of its candidates (`name`, `description`, `attributes`, `images`, of which
                the first is used). If images were encoded before, all rows have `image_features`, a tensor [d] or
                `None`.
            mentions, entities: Not supported by a reranker.

        Returns:
            `BatchFeature` of tensors. C is the largest number of candidates of a mention and L the length of the
            longest sequence:

            - `pair_input_ids`, `pair_attention_mask`, `pair_context_mask`, `pair_entity_mask` [M, C, L];
            - `pair_mask` [M, C]: False for padding;
            - `pair_context` [M]: number of the mention's context;
            - `pair_name_match` [M, C], with `name_match`: 1 if the entity's name or an alias has all words of the mention;
            - `pair_list_score` [M, C], if all candidates have a `list_score`;
            - `pair_entity` [M, C], if all candidates have an `entity_id`: equal for equal entities;
            - `pair_mention_image_mask` [M] and `pair_entity_image_mask` [M, C], if images are prepared: False for a
              missing image;
            - `pair_mention_image_features` [M, d] and `pair_entity_image_features` [M, C, d], if some row has
              features; or `pair_mention_pixel_values` [M, 3, H, W] and `pair_entity_pixel_values` [M, C, 3, H, W].

        Raises:
            ValueError: `pairs` is missing, `max_length` is too small for the template, or only some rows have
                `image_features`.
        """
        if mentions is not None or entities is not None or pairs is None:
            raise ValueError("MMEL reads a mention and its candidates together. Give pairs=.")
        columns = max((len(candidates) for _, candidates in pairs), default=0) or 1
        mask = torch.tensor(
            [[c < len(candidates) for c in range(columns)] for _, candidates in pairs], dtype=torch.bool
        )
        mask = mask.view(len(pairs), columns)
        contexts: dict[Any, int] = {}
        numbers = [
            contexts.setdefault(
                ("row", row) if mention.get("context_id") is None else mention["context_id"], len(contexts)
            )
            for row, (mention, _) in enumerate(pairs)
        ]
        batch = self._text_tensors(pairs, mask)
        batch |= {"pair_mask": mask, "pair_context": torch.tensor(numbers, dtype=torch.int64)}
        batch |= given_tensors(pairs, mask, self.name_match)
        ids = [row.get("entity_id") for _, candidates in pairs for row in candidates]
        if None not in ids:
            number_of = {entity_id: number for number, entity_id in enumerate(dict.fromkeys(ids))}
            batch["pair_entity"] = torch.full(mask.shape, -1)
            batch["pair_entity"][mask] = torch.tensor([number_of[entity_id] for entity_id in ids], dtype=torch.int64)
        if self.use_images:
            batch |= self._image_tensors(pairs, mask)
        return BatchFeature(batch)

    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Returns the pixel values [I, 3, H, W] of I PIL images."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    # ---- text

    def num_left_out(self, mentions=None, entities=None, pairs=()) -> list[int]:
        """Returns how many tokens of each pair are left out, because of `max_length`: of each mention's candidates."""
        return [left_out for _, _, left_out in self._sequences(pairs)]

    def _text_tensors(self, pairs, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the tokens of each pair with their masks."""
        parts = [(context, entity) for context, entity, _ in self._sequences(pairs)]
        sequences = [torch.tensor(context + entity) for context, entity in parts]
        lengths = [len(context) for context, _ in parts]
        width = max(map(len, sequences), default=1)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((*mask.shape, width), pad, dtype=torch.int64)
        context_length, length = (torch.zeros(*mask.shape, 1, dtype=torch.int64) for _ in range(2))
        if sequences:
            ids[mask] = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
            context_length[mask] = torch.tensor(lengths).unsqueeze(1)
            length[mask] = torch.tensor([len(sequence) for sequence in sequences]).unsqueeze(1)
        position = torch.arange(width)
        return {
            "pair_input_ids": ids,
            "pair_attention_mask": (position < length).long(),
            "pair_context_mask": position < context_length,
            "pair_entity_mask": (position >= context_length) & (position < length),
        }

    def _sequences(self, pairs) -> Iterator[tuple[list[int], list[int], int]]:
        """Fills the template for each pair: yields tokens of context and entity, and the number of those left out."""
        cls_token = [i for i in (self.tokenizer.cls_token_id,) if i is not None]
        sep_token = [i for i in (self.tokenizer.sep_token_id,) if i is not None]
        head, middle, end, entity_head = self._token_ids([*_CONTEXT_TEMPLATES[self.context_template], "Entity:"])
        space = self.max_length - len(cls_token + head + middle + end + entity_head + end + sep_token)
        if space < 6:
            raise ValueError(
                f"max_length={self.max_length} leaves {space} tokens for the texts. Give at least {6 - space} more."
            )
        surfaces = self._token_ids([str(mention["mention"]) if head else "" for mention, _ in pairs])
        texts = self._tokens_with_span([mention for mention, _ in pairs])
        distinct = {self._entity_texts(row): None for _, candidates in pairs for row in candidates}
        names = self._token_ids([name for name, _ in distinct])
        facts = self._token_ids([rest for _, rest in distinct])
        entities = dict(zip(distinct, zip(names, facts, strict=True), strict=True))

        for (_, candidates), surface, (text, start, stop) in zip(pairs, surfaces, texts, strict=True):
            for row in candidates:
                name, fact = entities[self._entity_texts(row)]
                s, x, n, f = self._allot_tokens(space, len(surface), (len(text), stop - start), len(name), len(fact))
                first = _window_start(len(text), start, stop, x)
                context = cls_token + head + surface[:s] + middle + text[first : first + x] + end
                entity = entity_head + name[:n] + fact[:f] + end + sep_token
                yield context, entity, len(surface) + len(text) + len(name) + len(fact) - s - x - n - f

    def _entity_texts(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Returns the name, which is cut last, and the facts, which lose their end first."""
        columns = _ENTITY_TEMPLATES[self.entity_template]
        if columns == ("attributes",):
            return "", str(row.get("attributes") or "")
        values = [row.get(column) or "" for column in columns[1:]]
        texts = [value if isinstance(value, str) else ", ".join(filter(None, value)) for value in values]
        rest = [text for text in texts if text]
        return str(row["name"] or ""), ". " + ". ".join(rest) if rest else ""

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of each text as if inside a sentence: after a space, unless it starts with "."."""
        if not texts:
            return []
        filled = [text if text.startswith(".") or not text else " " + text for text in texts]
        return self.tokenizer(filled, add_special_tokens=False, verbose=False)["input_ids"]

    def _tokens_with_span(self, mentions) -> list[tuple[list[int], int, int]]:
        """Returns the tokens of each context, and the span of the mention in them; (0, 0) if it is not there."""
        texts, places = [], []
        for mention in mentions:
            text = str(mention["text"] or "")
            marked, place = _with_marks(text, _mention_span(mention, text), self.mention_marks)
            texts.append(" " + marked)
            places.append(place)
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = []
        for (start, stop), ids, offsets in zip(places, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # Offsets are larger by one, because of the space before the text.
            inside = [i for i, (a, b) in enumerate(offsets) if start < stop and b > start + 1 and a < stop + 1]
            spans.append((ids, inside[0], inside[-1] + 1) if inside else (ids, 0, 0))
        return spans

    @staticmethod
    def _allot_tokens(
        space: int, surface: int, text: tuple[int, int], name: int, fact: int
    ) -> tuple[int, int, int, int]:
        """Decides how many tokens of mention, context, name and facts fit into `space`.

        Args:
            space: Number of tokens to fill.
            surface, name, fact: Number of tokens of the mention, the name and the facts.
            text: Number of tokens of the context, and of the mention in it.
        """
        whole, inside = text
        if surface + inside + name > space:  # mention and name alone do not fit
            third = space // 3
            surface, inside, name = min(surface, third), min(inside, third), min(name, third)
            return surface, inside, name, 0
        space -= surface + inside + name
        around = whole - inside
        fact = min(fact, max(space - around, space // 2))
        return surface, inside + min(around, space - fact), name, fact

    # ---- images

    def _image_tensors(self, pairs, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns images or image features of both sides, with the masks of those that are present."""
        mentions = [mention for mention, _ in pairs]
        candidates = [row for _, rows in pairs for row in rows]
        encoded = {"image_features" in row for row in (*mentions, *candidates)}
        if encoded == {True, False}:
            raise ValueError(
                "Some rows have image_features and others do not. Encode the images of all rows or of none."
            )
        if encoded == {True}:
            sides = ([row["image_features"] for row in mentions], [row["image_features"] for row in candidates])
            kind = "image_features"
        else:
            sides = (
                [row.get("image") for row in mentions],
                [next(iter(row.get("images") or ()), None) for row in candidates],
            )
            kind = "pixel_values"
        images = [image for side in sides for image in side if image is not None]
        values: torch.Tensor | None = None
        if kind == "pixel_values":
            values = self.images(images) if images else torch.zeros(0, *self._pixel_shape())
        elif images:
            values = torch.stack(images)
        batch: dict[str, torch.Tensor] = {}
        grids = (torch.ones(len(mentions), dtype=torch.bool), mask)
        for name, grid, side in zip(("mention", "entity"), grids, sides, strict=True):
            present = grid.clone()
            present[grid] = torch.tensor([image is not None for image in side], dtype=torch.bool)
            batch[f"pair_{name}_image_mask"] = present
            if values is not None:
                full = values.new_zeros(*grid.shape, *values.shape[1:])
                count = int(present.sum())
                full[present], values = values[:count], values[count:]
                batch[f"pair_{name}_{kind}"] = full
        return batch

    def _pixel_shape(self) -> tuple[int, int, int]:
        size = getattr(self.image_processor, "crop_size", None) if self.image_processor.do_center_crop else None
        size = size or self.image_processor.size
        return 3, size["height"], size["width"]


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


def _window_start(length: int, start: int, stop: int, size: int) -> int:
    """Returns the start of a window of `size` of `length` tokens, with `start` to `stop` in its middle if possible."""
    first = start - (size - (stop - start)) // 2
    return max(0, min(first, length - size, start))


__all__ = ["MmelProcessor"]

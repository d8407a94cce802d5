"""Processor of MIMIC: rows to tensors, with the templates of eq. 2–3, 40 tokens, and zeros for a missing image."""

from __future__ import annotations

import re
from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
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


@dataclass
class _MentionText:
    """A filled mention template, and the places of the row's text and of the marked mention in it.

    Args:
        filled (`str`): The filled template.
        start, end (`int`): Characters of the row's text, marks included.
        mention (`tuple[int, int]`): Characters of the mention with its marks.
        marks (`tuple[int, int]`): Numbers of characters of the marks.
    """

    filled: str
    start: int
    end: int
    mention: tuple[int, int]
    marks: tuple[int, int]

    def span(self, left: int, right: int) -> tuple[int, int] | None:
        """Characters of the row's text that are at `left` to `right` in the filled template; `None` if none are."""

        def place_in_text(place: int) -> int:
            opening, closing = self.marks
            inside = min(max(place - self.mention[0], 0), opening)
            return place - self.start - inside - min(max(place - self.mention[1] + closing, 0), closing)

        span = place_in_text(left), place_in_text(right)
        return span if self.start <= left and right <= self.end and span[0] < span[1] else None


class MimicProcessor(ProcessorMixin):
    r"""
    Turns rows of `mentions` and `entities` into the inputs of a [`MimicModel`].

    ```python
    >>> processor(mentions=[{"mention": "Swift", "text": "Swift on stage", "image": None}])  # doctest: +SKIP
    ```

    Args:
        image_processor: An image processor, which determines size, cropping and normalisation.
        tokenizer: A tokenizer.
        max_length (`int`, *optional*, defaults to 40): Tokens per text. Longer texts lose tokens. Shorter ones are
            padded to this length, because the published network attends to padding, and so that all batches of
            encodings have one shape.
        mention_template (`str`, *optional*): Text of a mention (eq. 3). Fields in braces are columns of its row.
            `{window}` is the text of the row with the mention between `mention_marks`; if that is too long, the tokens
            farthest from the mention are left out. `{text}` is the text without marks, and is cut at its end; the
            published network reads "{mention} [SEP] {text}".
        entity_template (`str` or `list[str]`, *optional*): Text of an entity (eq. 2). Fields in braces are columns of
            its row. A list holds parts, which are joined by " [SEP] "; a part whose columns are empty is left out. The
            published network reads "{name} [SEP] {attributes}".
        use_images (`bool`, *optional*, defaults to `True`): Whether to return images.
        use_text (`bool`, *optional*, defaults to `True`): Whether to return text.
        modality_masks (`bool`, *optional*, defaults to `False`): Whether to return which mentions have an image and a
            text, and which entities have an image. A model with `missing_images="absent"` needs it, and
            [`MimicProcessor.from_parts`] sets it if there are images. The published network does not know which images
            are missing.
        mention_marks (`list[str]`, *optional*): The marks before and after the mention in `{window}`. `None` marks
            nothing; [`MimicProcessor.from_parts`] sets "«" and "»".
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=40,
        mention_template="{mention} [SEP] {window}",
        entity_template=("{name}", "{aliases}", "{description}", "{attributes}"),
        use_images=True,
        use_text=True,
        modality_masks=False,
        mention_marks=None,
    ):
        super().__init__(image_processor, tokenizer)
        self.max_length = max_length
        self.mention_template = mention_template
        self.entity_template = entity_template if isinstance(entity_template, str) else list(entity_template)
        self.use_images = use_images
        self.use_text = use_text
        self.modality_masks = modality_masks
        self.mention_marks = None if mention_marks is None else list(mention_marks)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> MimicProcessor:
        """Builds the processor of a model built by [`MimicModel.from_backbones`] with the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders. A CLIP model provides both.
            options: Arguments of the processor's constructor.

        Raises:
            `ValueError`: `text` is not given.
        """
        if text is None:
            raise ValueError("The tokenizer is missing. Pass the Hub id or folder of a text encoder as text=.")
        tokenizer, config = AutoTokenizer.from_pretrained(text), AutoConfig.from_pretrained(text)
        if vision is None and config.model_type == "clip":
            size = config.vision_config.image_size
            return cls.from_parts(tokenizer, {"size": {"height": size, "width": size}}, **options)
        return cls.from_parts(tokenizer, vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> MimicProcessor:
        """Builds a processor around a tokenizer.

        Args:
            tokenizer: Any tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor, for instance `{"size": {"height": 64, "width": 64}}`. Default: no images.
            options: Arguments of the processor's constructor.
        """
        settings = {} if vision is None or isinstance(vision, str) else dict(vision)
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            # As the published network: stretch to a square (Lanczos) instead of cropping, so that nothing is lost.
            settings = {"size": {"height": 224, "width": 224}, "resample": 1, "do_center_crop": False} | settings
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        options.setdefault("modality_masks", vision is not None)
        options.setdefault("mention_marks", ["«", "»"])
        return cls(image_processor, tokenizer, **options)

    @classmethod
    def from_text_encoder(cls, tokenizer) -> MimicProcessor:
        """Builds the processor of a model built by [`MimicModel.from_text_encoder`]: texts of up to 128 tokens."""
        return cls.from_parts(tokenizer, max_length=min(128, tokenizer.model_max_length))

    def __call__(
        self,
        mentions: Sequence[Mapping[str, Any]] | None = None,
        entities: Sequence[Mapping[str, Any]] | None = None,
        pairs: Any = None,
    ) -> BatchFeature:
        """Prepares mentions and entities.

        Args:
            mentions (M rows, *optional*): Rows with `mention`, `text` and `image` (a PIL image or `None`). The mention
                stands at `start` and `end` of the text, or else where its words occur first.
            entities (N rows, *optional*): Rows with `name`, `aliases`, `description`, `attributes` and `images`, of
                which the first is used.
            pairs: Not supported by a retriever.

        Returns:
            `BatchFeature` of tensors: `mention_input_ids`, `mention_attention_mask` [M, L], `mention_pixel_values`
            [M, 3, H, W] (zeros for a missing image), and the same as `entity_*`. With `modality_masks`, also
            `mention_image_mask`, `mention_text_mask` [M] and `entity_image_mask` [N] (bool).

        Raises:
            `ValueError`: `pairs` is given, a row lacks a column of its template, or `{window}` is used with a tokenizer
                that gives no offsets.
        """
        if pairs is not None:
            raise ValueError(
                "MIMIC encodes mentions and entities apart. Pass mentions= and entities= instead of pairs=."
            )
        batch: dict[str, torch.Tensor] = {}
        if mentions is not None:
            images = [row.get("image") for row in mentions]
            batch |= self._side("mention", mentions, images)
        if entities is not None:
            images = [next(iter(row.get("images") or ()), None) for row in entities]
            batch |= self._side("entity", entities, images)
        return BatchFeature(batch)

    def _side(self, side: str, rows, images: list) -> dict[str, torch.Tensor]:
        """Tensors of `side`, "mention" or "entity"."""
        tensors: dict[str, torch.Tensor] = {}
        if self.use_text:
            options = {"max_length": self.max_length, "padding": "max_length", "return_tensors": "pt"}
            if side == "mention" and "{window}" in self.mention_template:
                encoded = self.tokenizer.pad({"input_ids": [ids for _, ids, _ in self._windows(rows)]}, **options)
            else:
                encoded = self.tokenizer(
                    self._texts(side, rows), truncation=True, return_attention_mask=True, **options
                )
            tensors[f"{side}_input_ids"] = encoded["input_ids"]
            tensors[f"{side}_attention_mask"] = encoded["attention_mask"]
            if self.modality_masks and side == "mention":
                filled = [any((row.get(column) or "").strip() for column in ("text", "mention")) for row in rows]
                tensors["mention_text_mask"] = torch.tensor(filled, dtype=torch.bool)
        if self.use_images:
            tensors[f"{side}_pixel_values"] = self._pixels(images)
            if self.modality_masks:
                tensors[f"{side}_image_mask"] = torch.tensor([image is not None for image in images], dtype=torch.bool)
        return tensors

    def _texts(self, side: str, rows) -> list[str]:
        """Filled templates of `side`, "mention" or "entity"."""
        if side == "mention":
            return [self._mention_text(row).filled for row in rows]
        return [self._entity_text(row) for row in rows]

    def num_left_out(self, mentions=None, entities=None, pairs=None) -> list[int]:
        """Returns how many tokens of each text exceed `max_length`. The arguments are those of `__call__`."""
        side, rows = ("entity", entities) if mentions is None else ("mention", mentions)
        if not rows or not self.use_text:
            return [0] * len(rows or ())
        lengths = map(len, self.tokenizer(self._texts(side, rows), verbose=False)["input_ids"])
        return [max(length - self.max_length, 0) for length in lengths]

    def text_spans(self, mentions: Sequence[Mapping[str, Any]]) -> list[list[tuple[int, int] | None]]:
        """Locates the L tokens of each of M mentions in the `text` of its row.

        Returns:
            M lists of L spans (start, end) in characters of `text`, end exclusive. The span is `None` for special
            tokens, padding, marks and tokens of other parts of the template.

        Raises:
            `ValueError`: The tokenizer gives no offsets.
        """
        spans = [[text.span(*offset) for offset in offsets] for text, _, offsets in self._windows(mentions)]
        return [spans_of_row + [None] * (self.max_length - len(spans_of_row)) for spans_of_row in spans]

    def _windows(self, rows) -> list[tuple[_MentionText, list[int], list[tuple[int, int]]]]:
        """The filled template of each mention, up to `max_length` of its tokens, and the characters of each in the template.

        If there are more, those of `{window}` that are farthest from the mention are left out, then the last ones.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} gives no token offsets. Use a fast tokenizer.")
        if not rows:
            return []
        texts = [self._mention_text(row) for row in rows]
        encoded = self.tokenizer(
            [text.filled for text in texts],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        windows = []
        for text, ids, offsets, special in zip(texts, *columns, strict=True):
            window = (text.start, text.end) if "{window}" in self.mention_template else (0, 0)
            kept = _kept_tokens(offsets, special, self.max_length, window, text.mention)
            windows.append((text, [ids[k] for k in kept], [offsets[k] for k in kept]))
        return windows

    def _mention_text(self, row: Mapping[str, Any]) -> _MentionText:
        """Fills the mention template."""
        field = "{window}" if "{window}" in self.mention_template else "{text}"
        before, field, after = self.mention_template.partition(field)
        before, after = (self._fill_template(part, row) for part in (before, after))
        text = (row["text"] or "") if field else ""
        span, marks = _mention_span(row, text), self.mention_marks if field == "{window}" else None
        marked, (start, end) = _with_marks(text, span, marks)
        lengths = (len(marks[0]) + 1, len(marks[1]) + 1) if marks and marked != text else (0, 0)
        first = len(before)
        return _MentionText(before + marked + after, first, first + len(marked), (first + start, first + end), lengths)

    def _entity_text(self, row: Mapping[str, Any]) -> str:
        """Fills the entity template. Of a list, parts that no column of the row fills are left out."""
        if isinstance(self.entity_template, str):
            return self._fill_template(self.entity_template, row)
        row = ChainMap(row, dict.fromkeys(("aliases", "description", "attributes"), ""))  # type: ignore[arg-type]
        filled = ((self._fill_template(part, row), part.format_map(defaultdict(str))) for part in self.entity_template)
        return " [SEP] ".join(text for text, empty in filled if text.split() != empty.split())

    @staticmethod
    def _fill_template(template: str, row: Mapping[str, Any]) -> str:
        """Fills the fields of a template with the columns of a row: `None` as an empty string, a list with commas."""
        columns = [name for _, name, _, _ in Formatter().parse(template) if name]
        try:
            values = {name: row[name] for name in columns}
        except KeyError as error:
            raise ValueError(
                f"The template {template!r} needs the column {error}, but the row has {', '.join(row)}."
            ) from None
        for name, value in values.items():
            values[name] = "" if value is None else value
            if isinstance(value, list | tuple):
                values[name] = ", ".join(str(item) for item in value if item)
        return template.format_map(values)

    def _pixels(self, images: list) -> torch.Tensor:
        """Pixel values [B, 3, H, W] of PIL images, zeros where the image is `None`."""
        present = [image.convert("RGB") for image in images if image is not None]
        if present:
            pixels = self.image_processor(present, return_tensors="pt")["pixel_values"]
            shape = pixels.shape[1:]
        else:
            size = getattr(self.image_processor, "crop_size", None) if self.image_processor.do_center_crop else None
            size = size or self.image_processor.size
            shape = (3, size["height"], size["width"])
        out = torch.zeros(len(images), *shape)
        if present:
            out[[i for i, image in enumerate(images) if image is not None]] = pixels
        return out


def _mention_span(row: Mapping[str, Any], text: str) -> tuple[int, int]:
    """Returns where the mention stands in the text: at `start` and `end`, or else where it occurs first; (0, 0) if not."""
    start, end, name = row.get("start"), row.get("end"), row.get("mention") or ""
    if start is not None and end is not None and 0 <= start < end <= len(text):
        return start, end
    first = re.search(re.escape(name), text, re.IGNORECASE) if name.strip() else None
    return first.span() if first else (0, 0)


def _with_marks(text: str, span: tuple[int, int], marks: Sequence[str] | None) -> tuple[str, tuple[int, int]]:
    """Puts marks around the mention at `span`, and returns the text and the span of the mention with its marks."""
    start, end = span
    if not marks or start == end:
        return text, span
    marked = f"{marks[0]} {text[start:end]} {marks[1]}"
    return f"{text[:start]}{marked}{text[end:]}", (start, start + len(marked))


def _kept_tokens(offsets, special, limit: int, window: tuple[int, int], mention: tuple[int, int]) -> list[int]:
    """Numbers of the tokens of a text that are kept, at most `limit`.

    Tokens in the window that are farthest from the mention are left out first, then the last ones. Special tokens stay.

    Args:
        offsets, special: First and last character of each token, and whether it is a special token.
        limit: Number of tokens.
        window, mention: Characters of the window and of the mention, end exclusive.
    """
    surplus = len(offsets) - limit
    if surplus <= 0:
        return list(range(len(offsets)))
    body = [k for k, is_special in enumerate(special) if not is_special]
    inside, named = (
        [k for k in body if offsets[k][0] < end and offsets[k][1] > start] for start, end in (window, mention)
    )
    start, stop = (inside.index(named[0]), inside.index(named[-1]) + 1) if inside and named else (0, 0)
    width = max(len(inside) - surplus, 0)
    first = _window_start(len(inside), start, stop, width)
    left_out = {*inside[:first], *inside[first + width :]}
    body = [k for k in body if k not in left_out]
    left_out.update(body[len(body) - surplus + len(left_out) :])
    return [k for k in range(len(offsets)) if k not in left_out]


# Copied from modeling/mmel/processing_mmel.py
def _window_start(length: int, start: int, stop: int, size: int) -> int:
    """Returns the start of a window of `size` of `length` tokens, with `start` to `stop` in its middle if possible."""
    first = start - (size - (stop - start)) // 2
    return max(0, min(first, length - size, start))


__all__ = ["MimicProcessor"]

"""Processor of DZMNED, JMEL and VELML: rows to tokens around mentions, tokens of entities, characters and images."""

from __future__ import annotations

import re
from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
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

from .glove_modal_fusion import glove_tokenizer


class ModalFusionProcessor(ProcessorMixin):
    r"""
    Turns rows of `mentions` and `entities` into the inputs of a [`ModalFusionModel`].

    ```python
    >>> processor(mentions=[{"mention": "Swift", "text": "Swift on stage", "image": None}])  # doctest: +SKIP
    ```

    Args:
        image_processor: An image processor, which determines size, cropping and normalisation.
        tokenizer: A fast tokenizer.
        max_length (`int`, *optional*, defaults to 64): Tokens per text. Longer texts lose tokens. Shorter ones are padded to
            the longest of the batch.
        mention_template (`str`, *optional*): Text of a mention. Fields in braces are columns of its row. `{window}` is the
            text of the row with the mention between `mention_marks`; if that is too long, the tokens farthest from the
            mention are left out. `{text}` is the text without marks, and is cut at its end.
        entity_template (`str` or `list[str]`, *optional*): Text of an entity. Fields in braces are columns of its row. A
            list holds parts, which are joined by " [SEP] "; a part whose columns are empty is left out.
        use_images (`bool`, *optional*, defaults to `True`): Whether to return images.
        mention_marks (`list[str]`, *optional*): The marks before and after the mention in `{window}`. `None` marks nothing;
            [`ModalFusionProcessor.from_parts`] sets "«" and "»".
        use_characters (`bool`, *optional*, defaults to `True`): Whether to return the characters of mentions and names.
        max_characters (`int`, *optional*, defaults to 32): Characters of a mention or name; later ones are left out.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=64,
        mention_template="{mention} [SEP] {window}",
        entity_template=("{name}", "{aliases}", "{description}", "{attributes}"),
        use_images=True,
        mention_marks=None,
        use_characters=True,
        max_characters=32,
    ):
        super().__init__(image_processor, tokenizer)
        self.max_length = max_length
        self.mention_template = mention_template
        self.entity_template = entity_template if isinstance(entity_template, str) else list(entity_template)
        self.use_images = use_images
        self.mention_marks = None if mention_marks is None else list(mention_marks)
        self.use_characters = use_characters
        self.max_characters = max_characters

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> ModalFusionProcessor:
        """Builds a processor for a model of [`ModalFusionModel.from_backbones`], from the same arguments.

        Args:
            text (`str`): Hub id or folder of the text encoder, or path of a file of word vectors in GloVe's format.
            vision (`str`, *optional*): Hub id or folder of the image encoder, or of a CLIP model.
            options: Options of the processor.
        """
        if text is None:
            raise ValueError("from_backbones needs the tokenizer of a text encoder. Give its Hub id, folder or file.")
        tokenizer = glove_tokenizer(text) if Path(text).is_file() else AutoTokenizer.from_pretrained(text)
        if vision is not None:
            config = AutoConfig.from_pretrained(vision)
            if config.model_type == "clip":
                size = config.vision_config.image_size
                return cls.from_parts(tokenizer, {"size": {"height": size, "width": size}}, **options)
        return cls.from_parts(tokenizer, vision, **options)

    # Copied from modeling/mmel/processing_mmel.py
    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> ModalFusionProcessor:
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
            `BatchFeature` of tensors: `mention_input_ids`, `mention_attention_mask` [M, L] and, with images,
            `mention_pixel_values` [M, 3, H, W] and `mention_image_mask` [M] (bool, False for a missing image, whose pixels
            are zeros); with characters, `mention_char_ids` [M, S], code points of the lower-cased mention padded with -1; and
            the same as `entity_*`, with the characters of the name.

        Raises:
            `ValueError`: `pairs` is given, a row lacks a column of its template, or the tokenizer gives no offsets.
        """
        if pairs is not None:
            raise ValueError(
                "The model encodes mentions and entities apart. Pass mentions= and entities= instead of pairs=."
            )
        batch: dict[str, torch.Tensor] = {}
        if mentions is not None:
            batch |= self._side("mention", mentions, [row.get("image") for row in mentions])
        if entities is not None:
            batch |= self._side("entity", entities, [next(iter(row.get("images") or ()), None) for row in entities])
        return BatchFeature(batch)

    def _side(self, side: str, rows, images: list) -> dict[str, torch.Tensor]:
        """Tensors of `side`, "mention" or "entity"."""
        ids = [kept for kept, _ in self._kept(side, rows)]
        width = max([1, *map(len, ids)])
        input_ids = torch.full((len(ids), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(ids), width, dtype=torch.int64)
        for k, tokens in enumerate(ids):
            input_ids[k, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[k, : len(tokens)] = 1
        tensors = {f"{side}_input_ids": input_ids, f"{side}_attention_mask": mask}
        if self.use_images:
            tensors[f"{side}_pixel_values"] = self._pixels(images)
            tensors[f"{side}_image_mask"] = torch.tensor([image is not None for image in images], dtype=torch.bool)
        if self.use_characters:
            column = "mention" if side == "mention" else "name"
            names = [(row.get(column) or "").lower()[: self.max_characters] for row in rows]
            codes = torch.full((len(names), max([1, *map(len, names)])), -1)
            for k, name in enumerate(names):
                codes[k, : len(name)] = torch.tensor([ord(character) for character in name], dtype=torch.int64)
            tensors[f"{side}_char_ids"] = codes
        return tensors

    def num_left_out(self, mentions=None, entities=None, pairs=None) -> list[int]:
        """Returns how many tokens of each text exceed `max_length`. The arguments are those of `__call__`."""
        side, rows = ("entity", entities) if mentions is None else ("mention", mentions)
        return [left_out for _, left_out in self._kept(side, rows or ())]

    def _kept(self, side: str, rows) -> list[tuple[list[int], int]]:
        """Returns up to `max_length` tokens of each text of `side`, and the number of those that are left out."""
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} gives no token offsets. Use a fast tokenizer.")
        if not rows:
            return []
        if side == "mention":
            texts = [self._mention_text(row) for row in rows]
        else:
            texts = [(self._entity_text(row), (0, 0), (0, 0)) for row in rows]
        encoded = self.tokenizer(
            [filled for filled, _, _ in texts],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        result = []
        for (_, window, mention), ids, offsets, special in zip(texts, *columns, strict=True):
            kept = _kept_tokens(offsets, special, self.max_length, window, mention)
            result.append(([ids[k] for k in kept], len(ids) - len(kept)))
        return result

    def _mention_text(self, row: Mapping[str, Any]) -> tuple[str, tuple[int, int], tuple[int, int]]:
        """Fills the mention template, and returns the places of `{window}` and of the mention in it; (0, 0) for none."""
        field = "{window}" if "{window}" in self.mention_template else "{text}"
        before, field, after = self.mention_template.partition(field)
        before, after = (self._fill_template(part, row) for part in (before, after))
        text = (row["text"] or "") if field else ""
        if field != "{window}":
            return before + text + after, (0, 0), (0, 0)
        marked, (start, end) = _with_marks(text, _mention_span(row, text), self.mention_marks)
        first = len(before)
        return before + marked + after, (first, first + len(marked)), (first + start, first + end)

    # Copied from modeling/mimic/processing_mimic.py
    def _entity_text(self, row: Mapping[str, Any]) -> str:
        """Fills the entity template. Of a list, parts that no column of the row fills are left out."""
        if isinstance(self.entity_template, str):
            return self._fill_template(self.entity_template, row)
        row = ChainMap(row, dict.fromkeys(("aliases", "description", "attributes"), ""))  # type: ignore[arg-type]
        filled = ((self._fill_template(part, row), part.format_map(defaultdict(str))) for part in self.entity_template)
        return " [SEP] ".join(text for text, empty in filled if text.split() != empty.split())

    # Copied from modeling/mimic/processing_mimic.py
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

    # Copied from modeling/mimic/processing_mimic.py
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


# Copied from modeling/mimic/processing_mimic.py
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


__all__ = ["ModalFusionProcessor"]

"""Processor of the bi-encoder: rows to tensors, by templates, with the mention between markers if asked."""

from __future__ import annotations

import re
from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    ProcessorMixin,
)

from .configuration_bi_encoder import JOINT_ENCODERS

#: Columns that the row of an entity may lack.
_OPTIONAL_COLUMNS = ("aliases", "description", "attributes")


class _FilledText(NamedTuple):
    """A filled template, and the characters (start, end) of its window and of the mention in it; (0, 0) for none."""

    filled: str
    window: tuple[int, int] = (0, 0)
    mention: tuple[int, int] = (0, 0)


class BiEncoderProcessor(ProcessorMixin):
    r"""
    Turns rows of `mentions` and `entities` into the inputs of a [`BiEncoderModel`].

    ```python
    >>> processor(mentions=[{"mention": "Swift", "text": "Swift on stage", "image": None}])  # doctest: +SKIP
    ```

    Args:
        image_processor: An image processor, which determines size, cropping and normalisation.
        tokenizer: A fast tokenizer.
        max_length (`int`, *optional*, defaults to 40): Tokens per text. Longer texts lose tokens. Shorter ones are padded
            to this length, so that all batches of encodings have one shape.
        mention_template (`str`, *optional*): Text of a mention. Fields in braces are columns of its row. `{window}` is the
            text of the row with the mention between the first two `markers`; if that is too long, the tokens farthest from
            the mention are left out. `{text}` is the text without marks, and is cut at its end. "[SEP]" is the separator
            of the tokenizer, whatever its name.
        entity_template (`str` or `list[str]`, *optional*): Text of an entity. Fields in braces are columns of its row, of
            which it may lack `aliases`, `description` and `attributes`. A list holds parts, which are joined by " [SEP] "; a
            part whose columns are empty is left out. MIMIC (eq. 2–3) reads "{mention} [SEP] {text}" and "{name} [SEP]
            {attributes}", as the recipes of its table do.
        markers (`list[str]`, *optional*): Marks before and after the mention in `{window}`, and perhaps others that the
            templates contain, such as a title marker of entities. Those that the vocabulary has, such as BERT's unused
            tokens, are read as one token, others as text. A mention that does not stand in its text is put in front of it,
            marked, unless the template has `{mention}`. `None` marks nothing; [`BiEncoderProcessor.from_parts`] sets "«" and "»".
        use_images, use_text (`bool`, *optional*, default to `True`): Whether to return images and texts.
        modality_masks (`bool`, *optional*, defaults to `False`): Whether to return which mentions have an image and a text,
            and which entities have an image. A model with `missing_images="absent"` needs it, and
            [`BiEncoderProcessor.from_parts`] sets it if there are images.
        mention_tokens (`bool`, *optional*, defaults to `False`): Whether to return which tokens belong to the mention. A
            model with `pooling="mention"` needs it.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=40,
        mention_template="{mention} [SEP] {window}",
        entity_template=("{name}", "{aliases}", "{description}", "{attributes}"),
        markers=None,
        use_images=True,
        use_text=True,
        modality_masks=False,
        mention_tokens=False,
    ):
        super().__init__(image_processor, tokenizer)
        if markers is not None and len(markers) < 2:
            raise ValueError(f"markers={markers!r} needs a marker before and one after the mention.")
        self.max_length = max_length
        self.mention_template = mention_template
        self.entity_template = entity_template if isinstance(entity_template, str) else list(entity_template)
        self.markers = None if markers is None else list(markers)
        self.use_images = use_images
        self.use_text = use_text
        self.modality_masks = modality_masks
        self.mention_tokens = mention_tokens
        if self.markers and tokenizer is not None:
            vocabulary = tokenizer.get_vocab()
            tokenizer.add_tokens([marker for marker in self.markers if marker in vocabulary])  # keeps them whole

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> BiEncoderProcessor:
        """Builds the processor of a model built by [`BiEncoderModel.from_backbones`] with the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders. A CLIP model provides both, and a joint
                encoder determines the images, too, unless there is an image encoder.
            options: Arguments of the processor's constructor.

        Raises:
            `ValueError`: `text` is not given.
        """
        if text is None:
            raise ValueError("The tokenizer is missing. Pass the Hub id or folder of a text encoder as text=.")
        tokenizer, config = AutoTokenizer.from_pretrained(text), AutoConfig.from_pretrained(text)
        images = config if vision is None else AutoConfig.from_pretrained(vision)
        if images.model_type == "clip":
            size = images.vision_config.image_size
            return cls.from_parts(tokenizer, {"size": {"height": size, "width": size}}, **options)
        if vision is None and config.model_type in JOINT_ENCODERS:
            size = getattr(config, "image_size", None) or config.vision_config.image_size
            released = AutoImageProcessor.from_pretrained(text, backend="pil")
            settings = {"image_mean": released.image_mean, "image_std": released.image_std}
            return cls.from_parts(tokenizer, {"size": {"height": size, "width": size}, **settings}, **options)
        return cls.from_parts(tokenizer, vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> BiEncoderProcessor:
        """Builds a processor around a tokenizer.

        Args:
            tokenizer: A fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor, for instance `{"size": {"height": 64, "width": 64}}`. Default: no images.
            options: Arguments of the processor's constructor.
        """
        settings = {} if vision is None or isinstance(vision, str) else dict(vision)
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            # Stretch to a square (Lanczos) instead of cropping, so that nothing is lost, as MIMIC does.
            settings = {"size": {"height": 224, "width": 224}, "resample": 1, "do_center_crop": False} | settings
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        options.setdefault("modality_masks", vision is not None)
        options.setdefault("markers", ["«", "»"])
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
            entities (N rows, *optional*): Rows with `name`, the other columns of the template, and `images`, of which the
                first is used.
            pairs: Not supported by a retriever.

        Returns:
            `BatchFeature` of tensors: `mention_input_ids`, `mention_attention_mask` [M, L], `mention_pixel_values`
            [M, 3, H, W] (zeros for a missing image), and the same as `entity_*`. With `modality_masks`, also
            `mention_image_mask`, `mention_text_mask` [M] and `entity_image_mask` [N] (bool); with `mention_tokens`, also
            `mention_token_mask` [M, L] (bool).

        Raises:
            `ValueError`: `pairs` is given, a row lacks a column of its template, or the tokenizer gives no offsets.
        """
        if pairs is not None:
            raise ValueError(
                "A bi-encoder encodes mentions and entities apart. Pass mentions= and entities= instead of pairs=."
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
            kept = self._kept(self._texts(side, rows))
            encoded = self.tokenizer.pad(
                {"input_ids": [ids for ids, _ in kept]},
                max_length=self.max_length,
                padding="max_length",
                return_tensors="pt",
            )
            tensors[f"{side}_input_ids"] = encoded["input_ids"]
            tensors[f"{side}_attention_mask"] = encoded["attention_mask"]
            if side == "mention" and self.mention_tokens:
                tensors["mention_token_mask"] = torch.zeros(len(kept), self.max_length, dtype=torch.bool)
                for row, (_, is_mention) in enumerate(kept):
                    # Padding of a tokenizer that pads on the left would move the tokens.
                    first = int(encoded["attention_mask"][row].nonzero()[0]) if len(is_mention) else 0
                    tensors["mention_token_mask"][row, first : first + len(is_mention)] = torch.tensor(is_mention)
            if self.modality_masks and side == "mention":
                filled = [any((row.get(column) or "").strip() for column in ("text", "mention")) for row in rows]
                tensors["mention_text_mask"] = torch.tensor(filled, dtype=torch.bool)
        if self.use_images:
            tensors[f"{side}_pixel_values"] = self._pixels(images)
            if self.modality_masks:
                tensors[f"{side}_image_mask"] = torch.tensor([image is not None for image in images], dtype=torch.bool)
        return tensors

    def _kept(self, texts: list[_FilledText]) -> list[tuple[list[int], list[bool]]]:
        """Up to `max_length` tokens of each text, and which of them belong to the mention."""
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} gives no token offsets. Use a fast tokenizer.")
        if not texts:
            return []
        encoded = self.tokenizer(
            [text.filled for text in texts],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        kept = []
        for text, ids, offsets, special in zip(texts, *columns, strict=True):
            start, end = text.mention
            tokens = _kept_tokens(offsets, special, self.max_length, text.window, text.mention)
            is_mention = [not special[k] and offsets[k][0] < end and offsets[k][1] > start for k in tokens]
            kept.append(([ids[k] for k in tokens], is_mention))
        return kept

    def num_left_out(self, mentions=None, entities=None, pairs=None) -> list[int]:
        """Returns how many tokens of each text exceed `max_length`. The arguments are those of `__call__`."""
        side, rows = ("entity", entities) if mentions is None else ("mention", mentions)
        if not rows or not self.use_text:
            return [0] * len(rows or ())
        texts = [text.filled for text in self._texts(side, rows)]
        return [max(len(ids) - self.max_length, 0) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def _texts(self, side: str, rows) -> list[_FilledText]:
        """Filled templates of `side`, "mention" or "entity"."""
        if side == "mention":
            return [self._mention_text(row) for row in rows]
        empty = dict.fromkeys(_OPTIONAL_COLUMNS, "")
        return [_FilledText(self._entity_text(ChainMap(row, empty))) for row in rows]  # type: ignore[arg-type]

    def _entity_text(self, row: Mapping[str, Any]) -> str:
        """Fills the entity template. Of a list, parts that no column of the row fills are left out."""
        if isinstance(self.entity_template, str):
            return self._fill_template(self._with_separator(self.entity_template), row)
        filled = ((self._fill_template(part, row), part.format_map(defaultdict(str))) for part in self.entity_template)
        return self._with_separator(" [SEP] ").join(text for text, empty in filled if text.split() != empty.split())

    def _with_separator(self, template: str) -> str:
        return template.replace("[SEP]", self.tokenizer.sep_token or "[SEP]")

    def _mention_text(self, row: Mapping[str, Any]) -> _FilledText:
        """Fills the mention template."""
        template, name = self._with_separator(self.mention_template), row.get("mention") or ""
        if "{window}" not in template:
            filled = self._fill_template(template, row)
            before, field, _ = template.partition("{mention}")
            start = len(self._fill_template(before, row)) if field else 0
            return _FilledText(filled, (0, 0), (start, start + len(name)) if field else (0, 0))
        before, after = (self._fill_template(part, row) for part in template.split("{window}", 1))
        text = row.get("text") or ""
        span, marks = _mention_span(row, text), None if self.markers is None else self.markers[:2]
        if marks and span[0] == span[1] and name.strip() and "{mention}" not in template:
            text, span = f"{name} {text}", (0, len(name))
        marked, (start, end) = _with_marks(text, span, marks)
        first = len(before)
        return _FilledText(before + marked + after, (first, first + len(marked)), (first + start, first + end))

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


__all__ = ["BiEncoderProcessor"]

"""Processor of MIMIC: rows to tensors, with the templates of eq. 2–3, 40 tokens, and zeros for a missing image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class MimicProcessor(ProcessorMixin):
    r"""
    Turns rows of `mentions` and `entities` into the inputs of a [`MimicModel`].

    ```python
    >>> processor(mentions=[{"mention": "Swift", "text": "Swift on stage", "image": None}])  # doctest: +SKIP
    ```

    Args:
        image_processor: An image processor, which determines size, cropping and normalisation.
        tokenizer: A tokenizer.
        max_length (`int`, *optional*, defaults to 40): Tokens per text. Longer texts are truncated. Shorter ones are
            padded to this length, because the published network attends to padding, and so that all batches of
            encodings have one shape.
        mention_template (`str`, *optional*): Text of a mention (eq. 3). Fields in braces are columns of its row.
        entity_template (`str`, *optional*): Text of an entity (eq. 2). Fields in braces are columns of its row.
        use_images (`bool`, *optional*, defaults to `True`): Whether to return images.
        use_text (`bool`, *optional*, defaults to `True`): Whether to return text.
        modality_masks (`bool`, *optional*, defaults to `False`): Whether to return which mentions have an image and a
            text, and which entities have an image. A model with `missing_images="absent"` needs it, and
            [`MimicProcessor.from_parts`] sets it if there are images. The published network does not know which images are missing.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=40,
        mention_template="{mention} [SEP] {text}",
        entity_template="{name} [SEP] {attributes}",
        use_images=True,
        use_text=True,
        modality_masks=False,
    ):
        super().__init__(image_processor, tokenizer)
        self.max_length = max_length
        self.mention_template = mention_template
        self.entity_template = entity_template
        self.use_images = use_images
        self.use_text = use_text
        self.modality_masks = modality_masks

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
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Sequence[Mapping[str, Any]] | None = None,
        entities: Sequence[Mapping[str, Any]] | None = None,
        pairs: Any = None,
    ) -> BatchFeature:
        """Prepares mentions and entities.

        Args:
            mentions (M rows, *optional*): Rows with `mention`, `text` and `image` (a PIL image or `None`).
            entities (N rows, *optional*): Rows with `name`, `attributes` and `images`, of which the first is used.
            pairs: Not supported by a retriever.

        Returns:
            `BatchFeature` of tensors: `mention_input_ids`, `mention_attention_mask` [M, L], `mention_pixel_values`
            [M, 3, H, W] (zeros for a missing image), and the same as `entity_*`. With `modality_masks`, also
            `mention_image_mask`, `mention_text_mask` [M] and `entity_image_mask` [N] (bool).

        Raises:
            `ValueError`: `pairs` is given, or a row lacks a column of its template.
        """
        if pairs is not None:
            raise ValueError(
                "MIMIC encodes mentions and entities apart. Pass mentions= and entities= instead of pairs=."
            )
        batch: dict[str, torch.Tensor] = {}
        if mentions is not None:
            images = [row.get("image") for row in mentions]
            batch |= self._side("mention", mentions, self.mention_template, images)
        if entities is not None:
            images = [next(iter(row.get("images") or ()), None) for row in entities]
            batch |= self._side("entity", entities, self.entity_template, images)
        return BatchFeature(batch)

    def _side(self, side: str, rows, template: str, images: list) -> dict[str, torch.Tensor]:
        """Tensors of `side`, "mention" or "entity"."""
        tensors: dict[str, torch.Tensor] = {}
        if self.use_text:
            texts = [self._fill_template(template, row) for row in rows]
            encoded = self.tokenizer(
                texts,
                max_length=self.max_length,
                padding="max_length",
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
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

    def text_spans(self, mentions: Sequence[Mapping[str, Any]]) -> list[list[tuple[int, int] | None]]:
        """Locates the L tokens of each of M mentions in the `text` of its row.

        Returns:
            M lists of L spans (start, end) in characters of `text`, end exclusive. The span is `None` for special
            tokens, padding and tokens of other parts of the template.

        Raises:
            `ValueError`: The tokenizer gives no offsets.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} gives no token offsets. Use a fast tokenizer.")
        before, text_field, _ = self.mention_template.partition("{text}")
        spans = []
        for row in mentions:
            filled = self._fill_template(self.mention_template, row)
            start = len(self._fill_template(before, row)) if text_field else len(filled)
            end = start + len(row["text"]) if text_field else start
            offsets = self.tokenizer(
                filled,
                max_length=self.max_length,
                padding="max_length",
                truncation=True,
                return_offsets_mapping=True,
            )["offset_mapping"]
            spans.append([(a - start, b - start) if start <= a < b <= end else None for a, b in offsets])
        return spans

    @staticmethod
    def _fill_template(template: str, row: Mapping[str, Any]) -> str:
        """Fills the fields of a template with the columns of a row; `None` becomes an empty string."""
        columns = [name for _, name, _, _ in Formatter().parse(template) if name]
        try:
            values = {name: row[name] for name in columns}
        except KeyError as error:
            raise ValueError(
                f"The template {template!r} needs the column {error}, but the row has {', '.join(row)}."
            ) from None
        return template.format_map({name: "" if value is None else value for name, value in values.items()})

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


__all__ = ["MimicProcessor"]

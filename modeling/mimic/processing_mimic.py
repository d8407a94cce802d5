"""Rows to tensors for MIMIC: templates of eq. 2–3, 40 tokens, 224-pixel images, zeros for a missing image."""

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
        image_processor: Prepares images; its own configuration holds size, cropping and normalisation.
        tokenizer: Prepares text.
        max_length (`int`, *optional*, defaults to 40): Tokens per text; longer ones are cut at the end, shorter ones
            padded, so that encodings of all batches have one shape (and because the published network sees padding).
        mention_template (`str`, *optional*): The text of a mention (eq. 3), over the columns of its row.
        entity_template (`str`, *optional*): The text of an entity (eq. 2), over the columns of its row.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images at all.
        use_text (`bool`, *optional*, defaults to `True`): Whether to prepare text at all.
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
    ):
        super().__init__(image_processor, tokenizer)
        self.max_length = max_length
        self.mention_template = mention_template
        self.entity_template = entity_template
        self.use_images = use_images
        self.use_text = use_text

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> MimicProcessor:
        """A processor for [`MimicModel.from_backbones`] with the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders. A CLIP model gives both.
            options: options of the processor.
        """
        if text is None:
            raise ValueError("from_backbones needs the Hub id or folder of a text encoder, whose tokenizer it takes.")
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
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Sequence[Mapping[str, Any]] | None = None,
        entities: Sequence[Mapping[str, Any]] | None = None,
        pairs: Any = None,
    ) -> BatchFeature:
        """
        Args:
            mentions (M rows, *optional*): rows with `mention`, `text`, `image` (a PIL image or `None`).
            entities (N rows, *optional*): rows with `name`, `attributes`, `images` (the first is taken; may be empty).
            pairs: not for a retriever; raises.

        Returns:
            `BatchFeature` of tensors: `mention_input_ids`, `mention_attention_mask` [M, L], `mention_pixel_values`
            [M, 3, H, W] (zeros for a missing image), and the same for `entity_*`.
        """
        if pairs is not None:
            raise ValueError(
                "MIMIC scores mentions and entities apart; give mentions= and entities= instead of pairs=."
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
        tensors: dict[str, torch.Tensor] = {}
        if self.use_text:
            texts = [self._fill(template, row) for row in rows]
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
        if self.use_images:
            tensors[f"{side}_pixel_values"] = self._pixels(images)
        return tensors

    def text_spans(self, mentions: Sequence[Mapping[str, Any]]) -> list[list[tuple[int, int] | None]]:
        """Where the L tokens of each of M mentions stand in its row's `text`.

        Returns:
            M lists of L spans (start, end) in characters of `text`, end exclusive; `None` for a token of anything else
            in the template, a special token or padding.

        Raises:
            `ValueError`: the tokenizer does not tell where its tokens stand.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} does not tell where its tokens stand in a text.")
        before, found, _ = self.mention_template.partition("{text}")
        spans = []
        for row in mentions:
            filled = self._fill(self.mention_template, row)
            start = len(self._fill(before, row)) if found else len(filled)
            end = start + len(row["text"]) if found else start
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
    def _fill(template: str, row: Mapping[str, Any]) -> str:
        columns = [name for _, name, _, _ in Formatter().parse(template) if name]
        try:
            values = {name: row[name] for name in columns}
        except KeyError as error:
            raise ValueError(
                f"The template {template!r} needs the column {error}; the row has {', '.join(row)}."
            ) from None
        return template.format_map({name: "" if value is None else value for name, value in values.items()})

    def _pixels(self, images: list) -> torch.Tensor:
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

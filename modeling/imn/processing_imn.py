"""Rows to tensors for IMN: texts, mentions and images of posts (§3.1), prototypes of entities (§3.3), hidden words (§3.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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

#: Probabilities that a token is hidden: of a mention (§3.2), and of any word as BERT has it.
_MENTION_MASKING, _WORD_MASKING = 0.85, 0.15
#: Most pieces of a mention.
_NAME_LENGTH = 16


class ImnProcessor(ProcessorMixin):
    r"""
    Turns rows of `mentions`, `posts` and `entities` into the inputs of an [`ImnModel`], and posts into those of an
    [`ImnForKnowledgePreTraining`].

    ```python
    >>> processor(mentions=[{"mention": "Swift", "text": "Swift on stage", "image": None}])  # doctest: +SKIP
    ```

    An empty text has a mask of zeros, a post without an image a False in `image_mask`.

    Args:
        image_processor: Prepares images, all to one size; its own configuration holds size and normalisation.
        tokenizer: Prepares text; a fast one, with [CLS], [SEP] and, to pre-train, [MASK].
        max_length (`int`, *optional*, defaults to 64): Most tokens of a text; longer ones are cut at the end, shorter ones
            padded to the longest of a batch.
        mention_template (`str`, *optional*): The text of a mention, over the columns of its row. The default is the
            paper's, p_t alone. Where one text has several mentions to be told apart by their text too, take
            `"{mention} [SEP] {text}"`; a row without a mention is its text in any case.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images at all.
        num_prototypes (`int`, *optional*, defaults to 10): k, as in the model's configuration.
        knowledge_guided (`bool`, *optional*, defaults to `True`): Whether pre-training hides the tokens of the mention,
            each with probability 0.85, instead of any word with 0.15 (Table 4, "- Knowledge Guided"). A post without a
            mention in its text has its words hidden at random in either case.
        mask_seed (`int`, *optional*, defaults to 0): Seed of what is hidden.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=64,
        mention_template="{text}",
        use_images=True,
        num_prototypes=10,
        knowledge_guided=True,
        mask_seed=0,
    ):
        super().__init__(image_processor, tokenizer)
        if max_length < 3:
            raise ValueError(f"max_length={max_length} leaves no room for a word; give at least 3.")
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes={num_prototypes} must be at least 1.")
        self.max_length = max_length
        self.mention_template = mention_template
        self.use_images = use_images
        self.num_prototypes = num_prototypes
        self.knowledge_guided = knowledge_guided
        self.mask_seed = mask_seed

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> ImnProcessor:
        """A processor for [`ImnModel.from_backbones`] with the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders.
            options: options of the processor.
        """
        if text is None:
            raise ValueError("from_backbones needs the Hub id or folder of a text encoder, whose tokenizer it takes.")
        return cls.from_parts(AutoTokenizer.from_pretrained(text), vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> ImnProcessor:
        """A processor around a tokenizer.

        Args:
            tokenizer: a fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor (for instance `{"size": {"height": 64, "width": 64}}`). `None`: no images.
            options: options of the processor.
        """
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
            if not image_processor.size.get("height") and not getattr(image_processor, "do_center_crop", False):
                # DETR's keeps proportions, so that images would need padding; as squares, a batch is what its images are.
                edge = image_processor.size["shortest_edge"]
                image_processor = AutoImageProcessor.from_pretrained(
                    vision, backend="pil", size={"height": edge, "width": edge}
                )
        else:
            settings = {"size": {"height": 224, "width": 224}, "do_center_crop": False} | dict(vision or {})
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Sequence[Mapping[str, Any]] | None = None,
        entities: Sequence[Mapping[str, Any]] | None = None,
        pairs: Any = None,
        posts: Sequence[Mapping[str, Any]] | None = None,
        partners: Sequence[int] | None = None,
    ) -> BatchFeature:
        """
        Args:
            mentions (M rows, *optional*): rows with what the template names, `mention`, `text`, `image` (a PIL image or
                `None`). A post is a mention that is not named: `mention` may be empty or missing. Or rows with `features`,
                a `dict` of modality → states [s, d] of [`ImnModel.mention_features`], and then nothing else of them.
            entities (N rows, *optional*): rows with `prototypes`, a `dict` of modality → vectors [k', d], k' ≤ k.
            posts (P rows, *optional*): rows with `text` and `image`; with `partners`, mention rows too.
            partners (P ints, *optional*): to pre-train, the post whose image each text is read with; its own number for
                its own image. `entities` are not looked at then.
            pairs: not for a retriever; raises.

        Returns:
            `BatchFeature` of tensors: the arguments of [`ImnModel.encode_mentions`], [`ImnModel.encode_entities`] and
            [`ImnModel.encode_posts`], or with `partners` those of [`ImnForKnowledgePreTraining.forward`].
        """
        if pairs is not None:
            raise ValueError("IMN scores mentions and entities apart; give mentions= and entities= instead of pairs=.")
        if partners is not None:
            if posts is None or mentions is not None:
                raise ValueError("partners= is for pre-training; give posts= with it, and no mentions=.")
            return self._pretraining(posts, partners)
        batch: dict[str, torch.Tensor] = {}
        if mentions is not None:
            read = [row["features"] for row in mentions if "features" in row]
            if read and len(read) < len(mentions):
                raise ValueError("Some mentions have features and others have none; give all of them, or none.")
            batch |= self._mention_features(read) if read else self._side("mention", mentions)
        if posts is not None:
            batch |= self._side("post", posts)
        if entities is not None:
            batch |= self._prototypes(entities)
        return BatchFeature(batch)

    def _side(self, side: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        named = [side == "mention" and bool((row.get("mention") or "").strip()) for row in rows]
        texts = [
            self._fill_template(self.mention_template, row) if has else self._fill_template("{text}", row)
            for row, has in zip(rows, named, strict=True)
        ]
        encoded = self._encode(texts)
        tensors = {f"{side}_{name}": self._padded(encoded[name]) for name in ("input_ids", "attention_mask")}
        names = [self._pieces(row["mention"]) if has else [] for row, has in zip(rows, named, strict=True)]
        return tensors | self._names(f"{side}_", names) | self._images(f"{side}_", rows)

    @staticmethod
    def _mention_features(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Sequences [s, d] of each modality, put into one tensor [M, S, d]."""
        tensors: dict[str, torch.Tensor] = {}
        for modality in rows[0]:
            states = [row[modality] for row in rows]
            length = max([1, *(len(each) for each in states)])
            tensors |= ImnProcessor._stacked(f"mention_features_{modality}", states, length, states[0].shape[1])
        return tensors

    @staticmethod
    def _stacked(name: str, rows: Sequence[torch.Tensor | None], length: int, width: int) -> dict[str, torch.Tensor]:
        """Vectors [s, width] of each row in one tensor [B, length, width], and which there are; `None` for none."""
        out, mask = torch.zeros(len(rows), length, width), torch.zeros(len(rows), length, dtype=torch.bool)
        for place, each in enumerate(rows):
            if each is not None:
                out[place, : len(each)], mask[place, : len(each)] = each, True
        return {name: out, f"{name}_mask": mask}

    def _prototypes(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        found: list[dict[str, torch.Tensor]] = []
        for place, row in enumerate(rows):
            name = row.get("entity_id", place)
            if "prototypes" not in row:
                raise ValueError(
                    f"entity {name}: the row has no prototypes. IMN reads an entity as vectors chosen from its posts; make "
                    "them with the model's encode_posts and give them as row['prototypes'], modality → tensor [k, d]."
                )
            found.append({m: torch.as_tensor(v, dtype=torch.float32) for m, v in row["prototypes"].items()})
            for modality, vectors in found[-1].items():
                if vectors.dim() != 2 or len(vectors) > self.num_prototypes:
                    raise ValueError(
                        f"entity {name}: {modality} prototypes of shape {tuple(vectors.shape)} are not up to "
                        f"{self.num_prototypes} vectors [k, d]."
                    )
                if not vectors.isfinite().all():
                    raise ValueError(f"entity {name}: its {modality} prototypes hold nan or infinity.")
        tensors: dict[str, torch.Tensor] = {}
        for modality in dict.fromkeys(modality for vectors in found for modality in vectors):
            widths = {vectors[modality].shape[1] for vectors in found if modality in vectors}
            if len(widths) > 1:
                raise ValueError(f"{modality} prototypes have several widths: {', '.join(map(str, sorted(widths)))}.")
            of_rows = [vectors.get(modality) for vectors in found]
            tensors |= self._stacked(f"entity_prototypes_{modality}", of_rows, self.num_prototypes, widths.pop())
        return tensors

    def _pretraining(self, posts: Sequence[Mapping[str, Any]], partners: Sequence[int]) -> BatchFeature:
        if self.tokenizer.mask_token_id is None:
            raise ValueError("Pre-training hides words: the tokenizer needs a [MASK] token.")
        texts = [row["text"] or "" for row in posts]
        mentions = [row.get("mention") or "" for row in posts]
        # A function of the batch, so that a resumed run repeats it, and a text in another batch has other words hidden.
        key = repr((self.mask_seed, texts, mentions, list(partners))).encode()
        draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        encoded = self._encode(texts)
        ids, names, labels = [], [], []
        for row, text, mention, tokens, offsets, special, used in zip(
            posts,
            texts,
            mentions,
            encoded["input_ids"],
            encoded["offset_mapping"],
            encoded["special_tokens_mask"],
            encoded["attention_mask"],
            strict=True,
        ):
            start, end = self._span(row, text, mention)
            words = [k for k, is_special in enumerate(special) if used[k] and not is_special]
            inside = [k for k in words if offsets[k][0] < end and offsets[k][1] > start]
            guided = self.knowledge_guided and inside
            chosen, probability = (inside, _MENTION_MASKING) if guided else (words, _WORD_MASKING)
            hidden, targets = list(tokens), [-100] * len(tokens)
            for k, (chance, kind, word) in zip(
                chosen, torch.rand(len(chosen), 3, generator=draw).tolist(), strict=True
            ):
                if chance < probability:
                    hidden[k], targets[k] = self._hidden(tokens[k], kind, word), tokens[k]
            ids.append(hidden)
            labels.append(targets)
            # What the text hides, the mention embedding must not tell.
            names.append([hidden[k] for k in inside][:_NAME_LENGTH] or self._pieces(mention))
        batch = {
            "input_ids": self._padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": self._padded(encoded["attention_mask"]),
            "labels": self._padded(labels, -100),
            "partners": torch.tensor(list(partners), dtype=torch.long),
            **self._names("", names),
        }
        if self.use_images:
            images = self._images("", posts)
            shown = images["image_mask"][batch["partners"]] & batch["attention_mask"].bool().any(1)
            other = batch["partners"] != torch.arange(len(posts))
            batch |= images
            batch["matching_labels"] = other.long().masked_fill(~shown, -100)
            batch["mask_seeds"] = torch.randint(2**31, (len(posts),), generator=draw)
        return BatchFeature(batch)

    def _hidden(self, token: int, kind: float, word: float) -> int:
        """BERT's replacement of a hidden word, by two draws in [0, 1): [MASK], in a tenth of cases any word, in another
        tenth itself."""
        if kind < 0.8:
            return self.tokenizer.mask_token_id
        return int(word * len(self.tokenizer)) if kind < 0.9 else token

    @staticmethod
    def _span(row: Mapping[str, Any], text: str, mention: str) -> tuple[int, int]:
        """Where the mention stands in the text, or an empty span."""
        start, end = row.get("start", -1), row.get("end", -1)
        if not mention.strip():
            return 0, 0
        if not 0 <= start < end <= len(text):
            start = text.lower().find(mention.lower())
            start, end = (start, start + len(mention)) if start >= 0 else (0, 0)
        return start, end

    def _encode(self, texts: list[str]) -> Mapping[str, list[list[Any]]]:
        """Tokens of texts, not padded; the attention mask of an empty text is zeros."""
        encoded = dict(
            self.tokenizer(
                texts,
                max_length=self.max_length,
                truncation=True,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
        )
        encoded["attention_mask"] = [
            [int(bool(text.strip()))] * len(ids) for text, ids in zip(texts, encoded["input_ids"], strict=True)
        ]
        return encoded

    def _pieces(self, mention: str) -> list[int]:
        return self.tokenizer(mention, add_special_tokens=False)["input_ids"][:_NAME_LENGTH]

    def _names(self, prefix: str, names: list[list[int]]) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}name_ids": self._padded(names, self.tokenizer.pad_token_id),
            f"{prefix}name_mask": self._padded([[1] * len(name) for name in names]),
        }

    @staticmethod
    def _padded(rows: list[list[int]], filler: int = 0) -> torch.Tensor:
        width = max([1, *(len(row) for row in rows)])
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.long).view(-1, width)

    def _images(self, prefix: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`image_mask` [B], and `pixel_values` [B, 3, H, W] if any row has an image."""
        if not self.use_images:
            return {}
        images = [row.get("image") for row in rows]
        mask = torch.tensor([image is not None for image in images], dtype=torch.bool)
        tensors = {f"{prefix}image_mask": mask}
        if mask.any():
            present = [image.convert("RGB") for image in images if image is not None]
            pixels = self.image_processor(present, return_tensors="pt")["pixel_values"]
            out = pixels.new_zeros(len(images), *pixels.shape[1:])
            out[mask] = pixels
            tensors[f"{prefix}pixel_values"] = out
        return tensors

    # Copied from modeling/mimic/processing_mimic.py
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


__all__ = ["ImnProcessor"]

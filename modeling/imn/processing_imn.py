"""Processor of IMN: posts (§3.1), prototypes of entities (§3.3) and masked words (§3.2) to tensors."""

from __future__ import annotations

import hashlib
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

#: Masking probabilities in pre-training: of the tokens of a mention (§3.2), and of any word, as in BERT.
_MENTION_MASKING, _WORD_MASKING = 0.85, 0.15
#: Maximal number of word pieces of a mention.
_MAX_NAME_LENGTH = 16


# Copied from modeling/mimic/processing_mimic.py
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


class ImnProcessor(ProcessorMixin):
    r"""
    Turns rows of `mentions`, `posts` and `entities` into the inputs of an [`ImnModel`], and posts into those of an
    [`ImnForKnowledgePreTraining`].

    ```python
    >>> processor(mentions=[{"mention": "Swift", "text": "Swift on stage", "image": None}])  # doctest: +SKIP
    ```

    An empty text has an attention mask of zeros, and a post without an image is False in `image_mask`.

    Args:
        image_processor: An image processor, which determines normalisation and the one size of all images.
        tokenizer: A fast tokenizer with [CLS], [SEP] and, for pre-training, [MASK].
        max_length (`int`, *optional*, defaults to 64): Maximal number of tokens per text. Longer texts lose tokens,
            shorter ones are padded to the longest of the batch.
        mention_template (`str`, *optional*): Text of a mention. Fields in braces are columns of its row. `{window}` is
            the text of the row with the mention between `mention_marks`; if that is too long, the tokens farthest from
            the mention are left out. `{text}`, as in the paper, is the text p_t without marks, and is cut at its end.
            Use `"{mention} [SEP] {window}"` if texts have several mentions. A row without a mention is encoded as its
            text in any case.
        use_images (`bool`, *optional*, defaults to `True`): Whether to return images.
        num_prototypes (`int`, *optional*, defaults to 10): k, as in the model's configuration.
        knowledge_guided (`bool`, *optional*, defaults to `True`): Whether pre-training masks the tokens of the mention,
            with probability 0.85, instead of any word, with probability 0.15 (Table 4, "- Knowledge Guided"). Words are
            masked at random in any case in a post whose text does not contain the mention.
        mask_seed (`int`, *optional*, defaults to 0): Seed of masking.
        mention_marks (`list[str]`, *optional*): The marks before and after the mention in `{window}`. `None` marks
            nothing; [`ImnProcessor.from_parts`] sets "«" and "»".
        entity_columns (`list[str]`, *optional*): Columns of an entity that make the text of the post about itself, in
            order; [`ImnProcessor.from_parts`] adds "aliases". The library reads this.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        max_length=64,
        mention_template="{window}",
        use_images=True,
        num_prototypes=10,
        knowledge_guided=True,
        mask_seed=0,
        mention_marks=None,
        entity_columns=("name", "description", "attributes"),
    ):
        super().__init__(image_processor, tokenizer)
        if max_length < 3:
            raise ValueError(f"max_length={max_length} leaves no room for a word. Set at least 3.")
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes={num_prototypes} must be at least 1.")
        self.max_length = max_length
        self.mention_template = mention_template
        self.use_images = use_images
        self.num_prototypes = num_prototypes
        self.knowledge_guided = knowledge_guided
        self.mask_seed = mask_seed
        self.mention_marks = None if mention_marks is None else list(mention_marks)
        self.entity_columns = list(entity_columns)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> ImnProcessor:
        """Builds the processor of a model built by [`ImnModel.from_backbones`] with the same arguments.

        Args:
            text, vision (`str`, *optional*): Hub ids or folders of the encoders.
            options: Arguments of the processor's constructor.

        Raises:
            `ValueError`: `text` is not given.
        """
        if text is None:
            raise ValueError("The tokenizer is missing. Pass the Hub id or folder of a text encoder as text=.")
        return cls.from_parts(AutoTokenizer.from_pretrained(text), vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> ImnProcessor:
        """Builds a processor around a tokenizer.

        Args:
            tokenizer: A fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor, for instance `{"size": {"height": 64, "width": 64}}`. Default: no images.
            options: Arguments of the processor's constructor.
        """
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
            if not image_processor.size.get("height") and not getattr(image_processor, "do_center_crop", False):
                # DETR's processor keeps proportions and pads, so features would depend on the batch. Squares need none.
                edge = image_processor.size["shortest_edge"]
                image_processor = AutoImageProcessor.from_pretrained(
                    vision, backend="pil", size={"height": edge, "width": edge}
                )
        else:
            settings = {"size": {"height": 224, "width": 224}, "do_center_crop": False} | dict(vision or {})
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        options.setdefault("mention_marks", ["«", "»"])
        options.setdefault("entity_columns", ["name", "aliases", "description", "attributes"])
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Sequence[Mapping[str, Any]] | None = None,
        entities: Sequence[Mapping[str, Any]] | None = None,
        pairs: Any = None,
        posts: Sequence[Mapping[str, Any]] | None = None,
        partners: Sequence[int] | None = None,
    ) -> BatchFeature:
        """Prepares mentions, entities and posts.

        Args:
            mentions (M rows, *optional*): Rows with the columns of the template, `mention`, `text` and `image` (a PIL
                image or `None`). `mention` may be empty or missing. Or rows with `features`, a `dict` of modality →
                states [s, d] from [`ImnModel.mention_features`], of which nothing else is read.
            entities (N rows, *optional*): Rows with `prototypes`, a `dict` of modality → vectors [k', d] with k' ≤ k.
            pairs: Not supported by a retriever.
            posts (P rows, *optional*): Rows with `text` and `image`. With `partners`, the columns of mentions are read
                too.
            partners (P ints, *optional*): For pre-training, the index of the post whose image each text is paired with,
                or the text's own index. `entities` are ignored then.

        Returns:
            `BatchFeature` of the arguments of [`ImnModel.encode_mentions`], [`ImnModel.encode_entities`] and
            [`ImnModel.encode_posts`], or with `partners` of [`ImnForKnowledgePreTraining.forward`].

        Raises:
            `ValueError`: The arguments do not go together, a row lacks a column, or prototypes have a wrong shape.
        """
        if pairs is not None:
            raise ValueError(
                "IMN encodes mentions and entities apart. Pass mentions= and entities= instead of pairs=."
            )
        if partners is not None:
            if posts is None or mentions is not None:
                raise ValueError("partners= is for pre-training. Pass it with posts= and without mentions=.")
            return self._pretraining(posts, partners)
        batch: dict[str, torch.Tensor] = {}
        if mentions is not None:
            features = [row["features"] for row in mentions if "features" in row]
            if features and len(features) < len(mentions):
                raise ValueError("Some mentions have features and others have none. Pass features of all or of none.")
            batch |= self._mention_features(features) if features else self._posts("mention", mentions)
        if posts is not None:
            batch |= self._posts("post", posts)
        if entities is not None:
            batch |= self._prototypes(entities)
        return BatchFeature(batch)

    def _posts(self, side: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors of mentions or posts; `side` is "mention" or "post"."""
        is_mention = [side == "mention" and bool((row.get("mention") or "").strip()) for row in rows]
        encoded = self._encode(
            [
                self._mention_text(row) if named else _post_text(row["text"] or "")
                for row, named in zip(rows, is_mention, strict=True)
            ]
        )
        tensors = {f"{side}_{name}": self._padded(encoded[name]) for name in ("input_ids", "attention_mask")}
        names = [self._pieces(row["mention"]) if named else [] for row, named in zip(rows, is_mention, strict=True)]
        return tensors | self._names(f"{side}_", names) | self._images(f"{side}_", rows)

    @staticmethod
    def _mention_features(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Stacks cached states [s, d] of each modality to one padded tensor [M, S, d]."""
        tensors: dict[str, torch.Tensor] = {}
        for modality in rows[0]:
            states = [row[modality] for row in rows]
            length = max([1, *(len(sequence) for sequence in states)])
            tensors |= ImnProcessor._stacked(f"mention_features_{modality}", states, length, states[0].shape[1])
        return tensors

    @staticmethod
    def _stacked(name: str, rows: Sequence[torch.Tensor | None], length: int, width: int) -> dict[str, torch.Tensor]:
        """Stacks vectors [s, width] per row, or `None`, to [B, length, width] and a mask [B, length]."""
        stacked, mask = torch.zeros(len(rows), length, width), torch.zeros(len(rows), length, dtype=torch.bool)
        for row, vectors in enumerate(rows):
            if vectors is not None:
                stacked[row, : len(vectors)], mask[row, : len(vectors)] = vectors, True
        return {name: stacked, f"{name}_mask": mask}

    def _prototypes(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        entities: list[dict[str, torch.Tensor]] = []
        for place, row in enumerate(rows):
            name = row.get("entity_id", place)
            if "prototypes" not in row:
                raise ValueError(
                    f"The entity {name!r} has no prototypes. IMN reads an entity as vectors chosen from its posts. "
                    "Compute them with the model's encode_posts and pass them as row['prototypes'], modality → tensor "
                    "[k, d]."
                )
            entities.append({m: torch.as_tensor(v, dtype=torch.float32) for m, v in row["prototypes"].items()})
            for modality, vectors in entities[-1].items():
                if vectors.dim() != 2 or len(vectors) > self.num_prototypes:
                    raise ValueError(
                        f"The {modality} prototypes of the entity {name!r} have the shape {tuple(vectors.shape)}. Pass "
                        f"[k, d] with up to {self.num_prototypes} vectors."
                    )
                if not vectors.isfinite().all():
                    raise ValueError(f"The {modality} prototypes of the entity {name!r} contain nan or infinity.")
        tensors: dict[str, torch.Tensor] = {}
        for modality in dict.fromkeys(modality for prototypes in entities for modality in prototypes):
            widths = {prototypes[modality].shape[1] for prototypes in entities if modality in prototypes}
            if len(widths) > 1:
                raise ValueError(
                    f"The {modality} prototypes have different widths: {', '.join(map(str, sorted(widths)))}."
                )
            vectors_by_row = [prototypes.get(modality) for prototypes in entities]
            tensors |= self._stacked(
                f"entity_prototypes_{modality}", vectors_by_row, self.num_prototypes, widths.pop()
            )
        return tensors

    def _pretraining(self, posts: Sequence[Mapping[str, Any]], partners: Sequence[int]) -> BatchFeature:
        if self.tokenizer.mask_token_id is None:
            raise ValueError("Pre-training masks words, but the tokenizer has no [MASK] token. Use one that has.")
        texts = [row["text"] or "" for row in posts]
        mentions = [row.get("mention") or "" for row in posts]
        # Seeded by the batch: a resumed run repeats the masking, and a text in another batch is masked differently.
        key = repr((self.mask_seed, texts, mentions, list(partners))).encode()
        draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        spans = [
            _mention_span(row, text) if mention.strip() else (0, 0)
            for row, text, mention in zip(posts, texts, mentions, strict=True)
        ]
        encoded = self._encode([_post_text(text, span) for text, span in zip(texts, spans, strict=True)])
        ids, names, labels = [], [], []
        for (start, end), mention, tokens, offsets, special, used in zip(
            spans,
            mentions,
            encoded["input_ids"],
            encoded["offset_mapping"],
            encoded["special_tokens_mask"],
            encoded["attention_mask"],
            strict=True,
        ):
            words = [k for k, is_special in enumerate(special) if used[k] and not is_special]
            inside = [k for k in words if offsets[k][0] < end and offsets[k][1] > start]
            guided = self.knowledge_guided and inside
            chosen, probability = (inside, _MENTION_MASKING) if guided else (words, _WORD_MASKING)
            masked, targets = list(tokens), [-100] * len(tokens)
            for k, (chance, kind, word) in zip(
                chosen, torch.rand(len(chosen), 3, generator=draw).tolist(), strict=True
            ):
                if chance < probability:
                    masked[k], targets[k] = self._masked(tokens[k], kind, word), tokens[k]
            ids.append(masked)
            labels.append(targets)
            # The mention embedding must not reveal the words that are masked in the text.
            names.append([masked[k] for k in inside][:_MAX_NAME_LENGTH] or self._pieces(mention))
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

    def _masked(self, token: int, kind: float, word: float) -> int:
        """BERT's replacement of a masked word by two draws in [0, 1): 80 % [MASK], 10 % a random word, 10 % itself."""
        if kind < 0.8:
            return self.tokenizer.mask_token_id
        return int(word * len(self.tokenizer)) if kind < 0.9 else token

    def _encode(self, texts: list[_MentionText]) -> dict[str, list[list[Any]]]:
        """Tokenizes texts without padding. The attention mask of an empty text is zeros."""
        names = ("input_ids", "offset_mapping", "special_tokens_mask")
        encoded = self.tokenizer(
            [text.filled for text in texts],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        result: dict[str, list[list[Any]]] = {name: [] for name in (*names, "attention_mask")}
        for number, text in enumerate(texts):
            window = (text.start, text.end) if "{window}" in self.mention_template else (0, 0)
            columns = {name: encoded[name][number] for name in names}
            kept = _kept_tokens(
                columns["offset_mapping"], columns["special_tokens_mask"], self.max_length, window, text.mention
            )
            for name, values in columns.items():
                result[name].append([values[k] for k in kept])
            result["attention_mask"].append([int(bool(text.filled.strip()))] * len(kept))
        return result

    def num_left_out(self, mentions=None, entities=None, pairs=None, posts=None) -> list[int]:
        """Returns how many tokens of each text exceed `max_length`. The arguments are those of `__call__`."""
        texts = [self._mention_text(row).filled for row in mentions or ()]
        texts += [row["text"] or "" for row in posts or ()]
        lengths = map(len, self.tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        return [max(length - self.max_length, 0) for length in lengths]

    def _pieces(self, mention: str) -> list[int]:
        return self.tokenizer(mention, add_special_tokens=False)["input_ids"][:_MAX_NAME_LENGTH]

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


def _post_text(text: str, mention: tuple[int, int] = (0, 0)) -> _MentionText:
    """A text without a template and marks. `mention` are its characters that should be kept if it is too long."""
    return _MentionText(text, 0, len(text), mention, (0, 0))


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


__all__ = ["ImnProcessor"]

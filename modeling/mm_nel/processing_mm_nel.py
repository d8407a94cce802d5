"""Rows to tensors for MM-nel: words around mentions, words of entities, priors, and images of visual mentions."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

#: Rows of a table of word vectors that stand for no word of the file.
SPECIAL_WORDS = ("[PAD]", "[UNK]")
_MODALITIES = ("text", "image")


class MmNelProcessor(ProcessorMixin):
    r"""
    Turns pairs of a mention row and its candidate rows into the inputs of an [`MmNelModel`].

    ```python
    >>> mention = {"mention": "Wayne", "text": "Wayne meets Gordon.", "start": 0, "end": 5, "document_id": "1"}
    >>> picture = {"modality": "image", "image": image, "document_id": "1"}  # doctest: +SKIP
    >>> entity = {"entity_id": "Q1", "name": "Bruce Wayne", "attributes": "", "images": [image], "prior": 0.3}
    >>> processor(pairs=[(mention, [entity]), (picture, [entity])])  # doctest: +SKIP
    ```

    Words without a vector are left out, as in the models that the paper follows.

    Args:
        image_processor: Prepares images; its own configuration holds size, cropping and normalisation.
        tokenizer: Turns text into numbers of word vectors; must be a fast one.
        context_words (`int`, *optional*, defaults to 100): Words of the context, half of them on either side of the
            mention.
        entity_words (`int`, *optional*, defaults to 64): Words of an entity's description and attributes; those of its
            name are all read.
        use_images (`bool`, *optional*, defaults to `True`): Whether to prepare images at all.
    """

    def __init__(self, image_processor=None, tokenizer=None, context_words=100, entity_words=64, use_images=True):
        for name, value in (("context_words", context_words), ("entity_words", entity_words)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative.")
        super().__init__(image_processor, tokenizer)
        self.context_words, self.entity_words, self.use_images = context_words, entity_words, use_images

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **options) -> MmNelProcessor:
        """A processor for [`MmNelModel.from_backbones`] with the same arguments.

        Args:
            text (`str`): A file of word vectors in GloVe's format, or the Hub id or folder of a transformers model.
            vision (`str`, *optional*): Hub id or folder of an image encoder. Without it there are no images, unless
                `use_images=True` asks for those of 64 × 64 pixels that the default configuration cuts into pieces.
            options: options of the processor.
        """
        if text is None:
            raise ValueError("from_backbones needs word vectors: a file in GloVe's format or a transformers model.")
        tokenizer = glove_tokenizer(text) if Path(text).is_file() else AutoTokenizer.from_pretrained(text)
        return cls.from_parts(tokenizer, vision, **options)

    @classmethod
    def from_parts(cls, tokenizer, vision: str | Mapping[str, Any] | None = None, **options) -> MmNelProcessor:
        """A processor around a tokenizer.

        Args:
            tokenizer: a fast tokenizer.
            vision (`str` or `dict`, *optional*): Hub id or folder of an image encoder, or settings of CLIP's image
                processor (for instance `{"size": {"height": 128, "width": 128}}`). `None`: no images.
            options: options of the processor.
        """
        if isinstance(vision, str):
            image_processor = AutoImageProcessor.from_pretrained(vision, backend="pil")
        else:
            # Stretched to a square instead of cropped, so that nothing is cut off.
            settings = {"size": {"height": 64, "width": 64}, "do_center_crop": False} | dict(vision or {})
            image_processor = CLIPImageProcessorPil(**settings)
        if vision is None:
            options.setdefault("use_images", False)
        return cls(image_processor, tokenizer, **options)

    def __call__(
        self,
        mentions: Any = None,
        entities: Any = None,
        pairs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] | None = None,
    ) -> BatchFeature:
        """
        Args:
            pairs (M pairs): a mention row and its candidates' rows. A textual mention has `text`, `mention`, `start` and
                `end`; a visual one has `modality` "image" and `image`. Both have `document_id`, or without it
                `context_id`; a row with neither is a document of its own. A candidate has `entity_id`, `name`,
                `description`, `attributes`, `images` (of which the first is taken), and `prior`, p(e|m); without it,
                the prior is 0. Rows whose images were encoded before carry `image_features`, a tensor [d] or `None`.
            mentions, entities: not for a reranker; raises.

        Returns:
            `BatchFeature` of tensors, C being the most candidates of a mention:

            - `pair_mask` [M, C]; `pair_context` [M], the number of the mention's document; `pair_visual` [M], True for a
              visual mention; `pair_prior` [M, C];
            - `pair_entity` [M, C]: which of the batch's E distinct entities; -1 for none;
            - `pair_word_ids` [M, L]: words left of the mention, its own, those to its right, -1 after the last;
              `pair_span` [M, 2]: where its own begin and end;
            - `pair_name_ids`, `pair_fact_ids` [E, ·]: words of the entities' names, and of their descriptions and
              attributes; -1 after the last;
            - with images, `pair_mention_image` [M] and `pair_entity_image` [M, C]: which of the batch's I distinct
              images, -1 for none; and these, `pair_pixel_values` [I, 3, H, W] or `pair_image_features` [I, d]. Left out
              if there is none. Only visual mentions and their candidates show their images.
        """
        if mentions is not None or entities is not None or pairs is None:
            raise ValueError("MM-nel reads a document's mentions and their candidates together; give pairs=.")
        rows = [mention for mention, _ in pairs]
        lists = [list(candidates) for _, candidates in pairs]
        shape = (len(rows), max([1, *map(len, lists)]))
        mask = torch.zeros(shape, dtype=torch.bool)
        prior = torch.zeros(shape)
        entity = torch.full(shape, -1)
        known: dict[Any, Mapping[str, Any]] = {}
        numbers: dict[Any, int] = {}
        for m, candidates in enumerate(lists):
            for c, row in enumerate(candidates):
                key = row.get("entity_id") or (row.get("name"), row.get("description"), row.get("attributes"))
                entity[m, c] = numbers.setdefault(key, len(numbers))
                known.setdefault(key, row)
                prior[m, c] = self._prior(row, rows[m])
            mask[m, : len(candidates)] = True
        visual = [self._modality(row) == "image" for row in rows]
        documents: dict[Any, int] = {}
        context = [documents.setdefault(self._document(row, m), len(documents)) for m, row in enumerate(rows)]
        words, spans = self._contexts(rows, visual)
        entities = list(known.values())
        names = self._ids([str(row.get("name") or "") for row in entities])
        facts = self._ids(
            [" ".join(str(row.get(column) or "") for column in ("description", "attributes")) for row in entities]
        )
        batch = {
            "pair_mask": mask,
            "pair_context": torch.tensor(context, dtype=torch.int64),
            "pair_visual": torch.tensor(visual, dtype=torch.bool),
            "pair_prior": prior,
            "pair_entity": entity,
            "pair_word_ids": _padded(words),
            "pair_span": torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
            "pair_name_ids": _padded(names),
            "pair_fact_ids": _padded([ids[: self.entity_words] for ids in facts]),
        }
        if self.use_images:
            batch |= self._images(rows, lists, visual, shape)
        return BatchFeature(batch)

    # Copied from modeling/mmel/processing_mmel.py
    def images(self, images: Sequence[Any]) -> torch.Tensor:
        """Returns the pixel values [I, 3, H, W] of I PIL images."""
        return self.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    @staticmethod
    def _document(row: Mapping[str, Any], place: int) -> Any:
        for column in ("document_id", "context_id"):
            if row.get(column) not in (None, ""):
                return column, row[column]
        return ("row", place)

    @staticmethod
    def _modality(row: Mapping[str, Any]) -> str:
        modality = row.get("modality") or "text"
        if modality not in _MODALITIES:
            raise ValueError(
                f"mention {row.get('mention_id')!r}: modality={modality!r} is not one of "
                f"{', '.join(map(repr, _MODALITIES))}."
            )
        return modality

    @staticmethod
    def _prior(row: Mapping[str, Any], mention: Mapping[str, Any]) -> float:
        prior = row.get("prior")
        value = 0.0 if prior is None else float(prior)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"mention {mention.get('mention_id')!r}, candidate {row.get('entity_id')!r}: prior={value} is not a "
                "probability."
            )
        return value

    def _contexts(self, rows, visual: list[bool]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Words of each textual mention and its context, and which of them are the mention's."""
        textual = [row for row, seen in zip(rows, visual, strict=True) if not seen]
        texts = list(dict.fromkeys(str(row["text"] or "") for row in textual))  # mentions of a document share its text
        encoded = dict(zip(texts, self._tokens(texts), strict=True))
        surfaces = list(dict.fromkeys(str(row.get("mention") or "") for row in textual))
        own = dict(zip(surfaces, self._ids(surfaces), strict=True))
        half = self.context_words // 2
        words: list[list[int]] = []
        spans: list[tuple[int, int]] = []
        for row, seen in zip(rows, visual, strict=True):
            if seen:
                words.append([])
                spans.append((0, 0))
                continue
            text, surface = str(row["text"] or ""), str(row.get("mention") or "")
            start, end = row.get("start", -1), row.get("end", -1)
            if start is None or end is None or not 0 <= start < end <= len(text):
                start = text.lower().find(surface.lower()) if surface else -1
                end = start + len(surface)
            ids, starts, ends = encoded[text]
            if start < 0:  # not located: the text is its context, from its beginning
                inside, first, last = own[surface], 0, 0
            else:
                first, last = bisect_right(ends, start), bisect_left(starts, end)
                inside = ids[first:last]
            left = ids[max(0, first - half) : first]
            right = ids[last : last + (self.context_words if start < 0 else half)]
            words.append([*left, *inside, *right])
            spans.append((len(left), len(left) + len(inside)))
        return words, spans

    def _tokens(self, texts: list[str]) -> list[tuple[list[int], list[int], list[int]]]:
        """Known words of each text, and where in it each begins and ends."""
        if not texts:
            return []
        unknown = self.tokenizer.unk_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found = []
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            known = [(i, start, end) for i, (start, end) in zip(ids, offsets, strict=True) if i != unknown]
            found.append(tuple([word[k] for word in known] for k in range(3)))
        return found  # type: ignore[return-value]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Known words of each text."""
        if not texts:
            return []
        unknown = self.tokenizer.unk_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [[i for i in ids if i != unknown] for ids in encoded]

    def _images(self, rows, lists, visual: list[bool], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        shown: list[tuple[int, int | None, Mapping[str, Any]]] = [
            (m, None, row) for m, row in enumerate(rows) if visual[m]
        ]
        shown += [(m, c, row) for m, each in enumerate(lists) if visual[m] for c, row in enumerate(each)]
        carried = {"image_features" in row for _, _, row in shown}
        if carried == {True, False}:
            raise ValueError("Some rows carry image_features and others do not; encode the images of all or of none.")
        of_mention, of_entity = torch.full((shape[0],), -1), torch.full(shape, -1)
        distinct: dict[Any, int] = {}
        values: list[Any] = []
        for m, c, row in shown:
            if carried == {True}:
                value = row["image_features"]
                key: Any = id(value)
            else:
                value = row.get("image") if c is None else next(iter(row.get("images") or ()), None)
                value = None if value is None else value.convert("RGB")
                key = None if value is None else (value.size, value.tobytes())
            if value is None:
                continue
            if key not in distinct:
                distinct[key] = len(values)
                values.append(value)
            (of_mention if c is None else of_entity)[m if c is None else (m, c)] = distinct[key]
        batch = {"pair_mention_image": of_mention, "pair_entity_image": of_entity}
        if values and carried == {True}:
            batch["pair_image_features"] = torch.stack(values)
        elif values:
            batch["pair_pixel_values"] = self.images(values)
        return batch


def glove_vectors(file: str) -> torch.Tensor:
    """Word vectors [V, d] of a file in GloVe's format, after those, zeros, of [`SPECIAL_WORDS`].

    A line is a word and d numbers, all separated by a space; a word may hold spaces itself. The header that word2vec's
    text format has, "V d", is passed over, and so is a word that was there before. GloVe's files have the frequent words
    first: `head -n 400000` makes a smaller one.

    Raises:
        ValueError: a line is not such; names the file and the row.
    """
    values = array("f", bytes(0))
    dim = 0
    for row, _, numbers in _glove_lines(file):
        dim = len(numbers)
        try:
            vector = [float(number) for number in numbers]
        except ValueError as error:
            raise ValueError(f"{file}, row {row}: {error}.") from None
        if not all(map(math.isfinite, vector)):
            raise ValueError(f"{file}, row {row}: a number of the word vector is nan or infinite.")
        values.extend(vector)
    table = torch.frombuffer(values, dtype=torch.float32).view(-1, dim)
    return torch.cat([torch.zeros(len(SPECIAL_WORDS), dim), table])


def glove_tokenizer(file: str) -> PreTrainedTokenizerFast:
    """Splits texts at spaces and punctuation into the words of a file in GloVe's format, numbered as [`glove_vectors`].

    Lowercases if the file has no word with a capital.
    """
    words = [*SPECIAL_WORDS, *(word for _, word, _ in _glove_lines(file))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    if all(word == word.lower() for word in words[len(SPECIAL_WORDS) :]):
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def _glove_lines(file: str) -> Iterator[tuple[int, str, list[str]]]:
    """Row, word and numbers of each line, the first of every word."""
    seen = set(SPECIAL_WORDS)
    dim = None
    with open(file, "rb") as lines:
        for row, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8").rstrip("\r\n ")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, row {row}: is not UTF-8 ({error}). Is it unpacked?") from None
            fields = text.split(" ")
            if row == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                continue
            dim = len(fields) - 1 if dim is None else dim
            if dim < 1 or len(fields) <= dim:
                raise ValueError(
                    f"{file}, row {row}: {text[:40]!r} is not a word and {max(dim, 1)} numbers, separated by spaces."
                )
            word = " ".join(fields[:-dim])
            if word not in seen:
                seen.add(word)
                yield row, word, fields[-dim:]
    if dim is None:
        raise ValueError(f"{file}: has no word vectors.")


def _padded(rows: list[list[int]]) -> torch.Tensor:
    """[R, longest] of R lists of numbers, -1 after the last of each."""
    out = torch.full((len(rows), max([1, *map(len, rows)])), -1)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return out


__all__ = ["MmNelProcessor", "glove_tokenizer", "glove_vectors"]

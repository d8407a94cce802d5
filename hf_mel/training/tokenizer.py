"""Trains a WordPiece tokenizer on the texts of a data set, for models that start from scratch."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator

import datasets
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


#: Punctuation that every tokenizer knows, also if its texts have none: marks around mentions, and texts to come.
_PUNCTUATION = [*string.punctuation, "«", "»"]


def train_wordpiece(texts: Iterable[str], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """Trains a lower-casing, BERT-style WordPiece tokenizer ("[CLS] text [SEP]").

    The same texts give the same tokenizer, in any order.

    Args:
        texts (iterable of `str`): Texts to train on.
        vocab_size (`int`): Maximum size of the vocabulary, including the five special tokens ([PAD] is 0). Every single
            character of the texts and all punctuation are in it, also if they are more.

    Returns:
        `PreTrainedTokenizerFast`: the tokenizer.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    words = (word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    inner = sorted({f"##{character}" for word in words for character in word[1:]})
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    # The trainer numbers inner characters in the order of a hash table and breaks ties by number, so its pieces would
    # change from run to run. As special tokens, these characters have fixed numbers.
    learner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*_SPECIAL.values(), *inner],
            initial_alphabet=_PUNCTUATION,
            show_progress=False,
        ),
    )
    # The returned tokenizer is a new one, because inner characters are special tokens of the first.
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def texts_of(*datasets_with_text: datasets.Dataset) -> Iterator[str]:
    """Yields every text of the string and string-list columns of some data sets, except ids."""
    for dataset in datasets_with_text:
        for column, feature in dataset.features.items():
            inner = getattr(feature, "feature", feature)
            if column.endswith("_id") or column == "candidates" or getattr(inner, "dtype", None) != "string":
                continue
            for value in dataset[column]:
                yield from [value] if isinstance(value, str) else value or ()

"""Word vectors in GloVe's text format: a table of vectors, and a tokenizer whose ids are its rows."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

#: Special tokens. They are the first rows of the table and have zero vectors.
SPECIAL_WORDS = ("[PAD]", "[UNK]")


# Copied from modeling/mm_nel/glove_mm_nel.py
def glove_vectors(file: str) -> torch.Tensor:
    """Reads the word vectors of a file in GloVe's format.

    A line is a word and d numbers, separated by spaces; the word may contain spaces. A first line "V d", the header of
    word2vec's text format, is skipped. If a word occurs twice, its first line counts. GloVe's files list frequent
    words first, so `head -n 400000` makes a smaller one.

    Args:
        file (`str`): Path of the text file.

    Returns:
        `torch.Tensor` [V, d]: Zero vectors for [`SPECIAL_WORDS`], then one vector per distinct word.

    Raises:
        ValueError: A line has another form. The message names the file and the row.
    """
    values = array("f", bytes(0))
    dim = 0
    for row, _, numbers in _read_glove_lines(file):
        dim = len(numbers)
        try:
            vector = [float(number) for number in numbers]
        except ValueError as error:
            raise ValueError(f"{file}, row {row}: The word vector has a value that is no number ({error}).") from None
        if not all(map(math.isfinite, vector)):
            raise ValueError(f"{file}, row {row}: The word vector has a value that is nan or infinite.")
        values.extend(vector)
    table = torch.frombuffer(values, dtype=torch.float32).view(-1, dim)
    return torch.cat([torch.zeros(len(SPECIAL_WORDS), dim), table])


# Copied from modeling/mm_nel/glove_mm_nel.py
def glove_tokenizer(file: str) -> PreTrainedTokenizerFast:
    """Builds a tokenizer that splits text at spaces and punctuation, with the row numbers of [`glove_vectors`] as ids.

    The tokenizer lowercases text if no word of the file has a capital letter.

    Args:
        file (`str`): Path of a file in GloVe's format.

    Raises:
        ValueError: A line has another form. The message names the file and the row.
    """
    words = [*SPECIAL_WORDS, *(word for _, word, _ in _read_glove_lines(file))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    if all(word == word.lower() for word in words[len(SPECIAL_WORDS) :]):
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


# Copied from modeling/mm_nel/glove_mm_nel.py
def _read_glove_lines(file: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yields row, word and numbers of the first line of each distinct word."""
    seen = set(SPECIAL_WORDS)
    dim = None
    with open(file, "rb") as lines:
        for row, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8").rstrip("\r\n ")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}, row {row}: The line is not UTF-8 ({error}). Decompress the file if it is an archive."
                ) from None
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
        raise ValueError(f"{file}: The file has no word vectors.")


__all__ = ["SPECIAL_WORDS", "glove_tokenizer", "glove_vectors"]

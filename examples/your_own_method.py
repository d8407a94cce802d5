"""Your own method: a bi-encoder in about sixty lines, trained, evaluated and used for linking like the shipped ones.

hf_mel asks three things of a method: a processor that turns rows into tensors, a model that encodes mentions and
entities separately and scores all pairs, and a configuration (`hf_mel.protocols` has the details).

Build the data first: hf-mel data build flags_mel --output data/flags_mel
Then: python examples/your_own_method.py [EPOCHS]
"""

import re
import sys
import zlib
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import ModelOutput

from hf_mel import EntityLinker, KnowledgeBase, MelTrainer, MelTrainingArguments
from hf_mel.data import load_entities, load_mentions


class WordsConfig(PreTrainedConfig):
    """Sizes of the model."""

    model_type = "words"
    buckets: int = 8192
    dim: int = 64


class WordsProcessor(ProcessorMixin):
    """Hashes the words of a row into numbers, padded with 0 to `length`."""

    attributes = []

    def __init__(self, length: int = 64, buckets: int = 8192):
        super().__init__()
        self.length, self.buckets = length, buckets

    def _ids(self, texts):
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())[: self.length]
            numbers = [1 + zlib.crc32(word.encode()) % (self.buckets - 1) for word in words]
            ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        return ids

    def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
        batch = {}
        if mentions is not None:
            batch["mention_ids"] = self._ids([f"{row['mention']} {row['text']}" for row in mentions])
        if entities is not None:
            columns = ([row["name"], *row["aliases"], row["description"], row["attributes"]] for row in entities)
            batch["entity_ids"] = self._ids([" ".join(texts) for texts in columns])
        return BatchFeature(batch)


@dataclass
class WordsOutput(ModelOutput):
    """`loss` [], `scores` [M, N], `unit_scores`: empty, because the score has a single part."""

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    unit_scores: dict | None = None


class WordsModel(PreTrainedModel):
    """Scores a pair by the cosine of two means of word vectors, divided by a temperature."""

    config_class = WordsConfig
    main_input_name = "mention_ids"
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.EmbeddingBag(config.buckets, config.dim, mode="mean", padding_idx=0)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.EmbeddingBag):
            nn.init.normal_(module.weight)

    def encode_mentions(self, mention_ids):
        return {"vector": nn.functional.normalize(self.words(mention_ids), dim=-1)}

    def encode_entities(self, entity_ids):
        return {"vector": nn.functional.normalize(self.words(entity_ids), dim=-1)}

    def score(self, mentions, entities):
        return mentions["vector"] @ entities["vector"].T / 0.05

    def unit_scores(self, mentions, entities):
        return {}

    def forward(self, mention_ids, entity_ids, labels=None):
        scores = self.score(self.encode_mentions(mention_ids), self.encode_entities(entity_ids))
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return WordsOutput(loss=loss, scores=scores, unit_scores={})


if __name__ == "__main__":
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    train, validation = (load_mentions("data/flags_mel", split) for split in ("train", "validation"))
    entities = load_entities("data/flags_mel")
    model, processor = WordsModel(WordsConfig()), WordsProcessor()
    arguments = MelTrainingArguments(
        "runs/words", num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=1e-2
    )
    trainer = MelTrainer(
        model, arguments, train_dataset=train, eval_dataset=validation, entities=entities, processing_class=processor
    )
    trainer.train()
    print({name: round(value, 3) for name, value in trainer.evaluate().items() if name in ("eval_hits@1", "eval_mrr")})

    kb = KnowledgeBase.build(entities, model, processor, output="kb/words")
    print(EntityLinker(model, processor, kb)(text="They met in Accra.", mention="They").best.name)

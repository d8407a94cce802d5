"""Train a small MIMIC from scratch in Python, without a recipe.

Build the data first: hf-mel data build flags_mel --output data/flags_mel
Then: python examples/train_mimic.py [EPOCHS]
"""

import sys

from transformers import AutoConfig, AutoModel

from hf_mel import MelTrainer, MelTrainingArguments
from hf_mel.data import load_entities, load_mentions
from hf_mel.modeling.mimic import MimicProcessor
from hf_mel.training import texts_of, train_wordpiece

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
train, validation = (load_mentions("data/flags_mel", split) for split in ("train", "validation"))
entities = load_entities("data/flags_mel")

# The processor turns rows into tensors: a tokenizer trained on these texts, and images of 64 × 64 pixels.
tokenizer = train_wordpiece(texts_of(train, entities), vocab_size=4000)
processor = MimicProcessor.from_parts(tokenizer, {"size": {"height": 64, "width": 64}}, max_length=56)

# The model: a BERT-like text encoder, a convolutional image encoder, and MIMIC's three units on top.
text_config = {
    "model_type": "bert",
    "vocab_size": len(tokenizer),
    "pad_token_id": tokenizer.pad_token_id,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}
vision_config = {
    "model_type": "convnext",
    "hidden_sizes": [32, 64, 128],
    "depths": [1, 1, 1],
    "num_stages": 3,
    "image_size": 64,
    "layer_scale_init_value": 1.0,
}
config = AutoConfig.for_model(
    "mimic",
    text_config=text_config,
    vision_config=vision_config,
    text_pooling="mean",
    temperature=8,
    mask_padding=True,
    missing_images="absent",
    image_dropout=0.1,
    text_dim=64,
    vision_dim=64,
    fusion_dim=64,
)
model = AutoModel.from_config(config)

# The negatives of a mention are the other entities of its batch. Every epoch ends with an evaluation over all entities.
arguments = MelTrainingArguments(
    "runs/my_mimic",
    num_train_epochs=epochs,
    per_device_train_batch_size=64,
    learning_rate=2e-3,
    warmup_steps=0.1,
    weight_decay=0.01,
)
trainer = MelTrainer(
    model, arguments, train_dataset=train, eval_dataset=validation, entities=entities, processing_class=processor
)
trainer.train()
trainer.save_model("runs/my_mimic")
print({name: round(value, 3) for name, value in trainer.evaluate().items() if name in ("eval_hits@1", "eval_mrr")})

"""Knowledge bases of any size for the benchmarks: generated people, or a trained run's encodings resampled.

[`Generated`] needs nothing but this package. N people have a name (one of 500 given names, one of 3,000 family names,
both with Zipf frequencies, so that names are shared), 6 to 33 words of attributes and a picture; a mention has the
family name, half the time the given name too, 12 to 32 words of which three in ten are the gold's, and a noisy version
of the gold's picture (somebody else's in three of ten). MIMIC is trained on them from scratch at the paper's sizes
behind its encoders: 40 tokens, 50 patches, text 512 wide, units 96 wide. The encoders themselves are small (embeddings
with positions; a one-layer ViT 64 wide), since ranking never runs them. All N encodings come from that model.

[`Resampled`] takes a run folder and its data set: the first rows are the real entities, and every further one is a copy
of a real one with Gaussian noise of `NOISE` times each dimension's standard deviation, brought back to the lengths of
the vectors it was made of.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
import torch.nn.functional as F
from transformers import BertConfig, ViTConfig

from benchmarks.harness import say
from hf_mel.data.loading import dataset_version, load_entities, load_mentions
from hf_mel.errors import MelError
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import slice_encodings
from hf_mel.inference.execution import to_model
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import rank
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.modeling.mimic import MimicConfig, MimicModel
from hf_mel.schema import entity_features

#: The sizes of the paper's runs on CLIP ViT-B/32, and the small encoders that give tensors of these sizes.
PAPER = {"length": 40, "text_width": 512, "unit_width": 96, "image_size": 56, "patch_size": 8, "vision_width": 64}

#: Of [`Resampled`], relative to the standard deviation of each dimension.
NOISE = 0.2

#: Encodings, what they were encoded from (without the prefix `mention_`), gold rows.
Mentions: TypeAlias = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]

_BLOCK = 10_000  # people are drawn in blocks of their own seed, so that a smaller world is the start of a larger one
_GIVEN, _FAMILY, _WORDS = 500, 3000, 4000
_PAD, _START, _END, _UNNAMED = 0, 1, 2, 3
_FIRST_GIVEN = 4
_FIRST_FAMILY = _FIRST_GIVEN + _GIVEN
_FIRST_WORD = _FIRST_FAMILY + _FAMILY
VOCABULARY = _FIRST_WORD + _WORDS
_LOOKS = 16


def _zipf(size: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Numbers below `size`, the k-th with a frequency in proportion to 1 / (k + 10)."""
    weights = 1 / torch.arange(10, size + 10, dtype=torch.float64)
    edges = weights.cumsum(0) / weights.sum()
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.searchsorted(edges, drawn).clamp(max=size - 1)


class People:
    """N generated people: `tokens` [N, length] (int16) and `looks` [N, 16].

    Args:
        size (`int`): N.
        seed (`int`): Of the generator.
        sizes (`dict`): As [`PAPER`].
    """

    def __init__(self, size: int, seed: int = 0, sizes: dict[str, int] = PAPER):
        self.sizes, self.seed = sizes, seed
        blocks = [self._block(number) for number in range(-(-size // _BLOCK))]
        self.tokens = torch.cat([tokens for tokens, _ in blocks])[:size]
        self.looks = torch.cat([looks for _, looks in blocks])[:size]
        generator = torch.Generator().manual_seed(seed)
        side = sizes["image_size"]
        coarse = torch.randn(_LOOKS, 3, 7, 7, generator=generator)
        self._pictures = F.interpolate(coarse, (side, side), mode="bilinear").flatten(1)

    def __len__(self) -> int:
        return len(self.tokens)

    def _block(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number + 1)
        length = self.sizes["length"]
        given = _FIRST_GIVEN + _zipf(_GIVEN, (_BLOCK, 1), generator)
        family = _FIRST_FAMILY + _zipf(_FAMILY, (_BLOCK, 1), generator)
        words = _FIRST_WORD + _zipf(_WORDS, (_BLOCK, length - 4), generator)
        counts = torch.randint(6, length - 6, (_BLOCK, 1), generator=generator)
        tokens = self._text(given, family, words, counts)
        return tokens.to(torch.int16), torch.randn(_BLOCK, _LOOKS, generator=generator)

    @staticmethod
    def _text(given, family, words, counts) -> torch.Tensor:
        """[CLS] given family [SEP] words [SEP], padded."""
        places = torch.arange(words.shape[1])
        words = torch.where(places < counts, words, torch.where(places == counts, _END, _PAD))
        ends = torch.full_like(given, _END)
        return torch.cat([torch.full_like(given, _START), given, family, ends, words], 1)

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` [n, length] and `pixel_values` [n, 3, H, W] of these people."""
        return self._inputs(self.tokens[rows].long(), self.looks[rows])

    def mention_inputs(self, golds: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
        """The same of one mention of each of these people."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + seed)
        count, length = len(golds), self.sizes["length"]
        known = self.tokens[golds].long()
        chance = torch.rand(count, 1, generator=generator)
        given = torch.where(chance < 0.5, known[:, 1:2], _UNNAMED)
        words = _FIRST_WORD + _zipf(_WORDS, (count, length - 4), generator)
        told = 4 + torch.randint(0, 6, (count, length - 4), generator=generator)
        is_told = torch.rand(count, length - 4, generator=generator) < 0.3
        words = torch.where(is_told, known.gather(1, told), words)
        counts = torch.randint(min(12, length - 8), length - 7, (count, 1), generator=generator)
        others = torch.randint(len(self), (count,), generator=generator)
        astray = torch.rand(count, generator=generator) < 0.3
        looks = self.looks[torch.where(astray, others, golds)]
        looks = looks + 0.5 * torch.randn(looks.shape, generator=generator)
        return self._inputs(self._text(given, known[:, 2:3], words, counts), looks)

    def _inputs(self, tokens: torch.Tensor, looks: torch.Tensor) -> dict[str, torch.Tensor]:
        side = self.sizes["image_size"]
        pixels = torch.tanh(looks @ self._pictures / _LOOKS**0.5 * 2).view(-1, 3, side, side)
        return {"input_ids": tokens, "attention_mask": (tokens != _PAD).long(), "pixel_values": pixels}


def mimic(sizes: dict[str, int] = PAPER, **options: Any) -> MimicModel:
    """An untrained MIMIC as published behind small encoders; see [`PAPER`]."""
    text = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes["text_width"],
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=1,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
    ).to_dict()
    vision = ViTConfig(
        hidden_size=sizes["vision_width"],
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * sizes["vision_width"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).to_dict()
    width = sizes["unit_width"]
    return MimicModel(
        MimicConfig(
            text_config=text,
            vision_config=vision,
            text_pooling="mean",
            text_dim=width,
            vision_dim=width,
            fusion_dim=width,
            temperature=8.0,
            **options,
        )
    )


def train(model: MimicModel, people: People, steps: int, batch_size: int = 64, seed: int = 0) -> list[float]:
    """Trains all of `model` on mentions of `people`, in-batch negatives, and returns the losses (eq. 22)."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    for step in range(steps):
        golds = torch.randperm(len(people))[:batch_size]
        inputs = {f"mention_{name}": x for name, x in people.mention_inputs(golds, seed=step + 1).items()}
        inputs |= {f"entity_{name}": x for name, x in people.entity_inputs(golds).items()}
        loss = model(**inputs, labels=torch.arange(len(golds))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            say(f"training, step {step + 1} of {steps}: loss {sum(losses[-50:]) / 50:.3f}")
    model.eval()
    return losses


class _RowProcessor:
    """Makes tensors of rows whose ids are Q0, Q1, …: what a knowledge base is built with."""

    def __init__(self, inputs: Any):
        self._inputs = inputs

    def __call__(self, entities: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = torch.tensor([int(row["entity_id"][1:]) for row in entities])
        return {f"entity_{name}": tensor for name, tensor in self._inputs(rows).items()}


class Source:
    """A trained model, mentions with golds, and knowledge bases of any size in a scratch folder.

    Attributes:
        name (`str`), description (`str`): For results.
        model: The retriever, in eval mode.
        num_real (`int`, *optional*): Entities beyond this number are resampled.
    """

    name: str
    description: str
    num_real: int | None = None

    def __init__(self, scratch: Path, model: Any):
        self.scratch, self.model = scratch, model

    def mentions(self, count: int) -> Mentions:
        """Encodings, the inputs they were made of, and gold rows of up to `count` mentions."""
        raise NotImplementedError

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the encoders take of (real) entities, without the prefix `entity_`."""
        raise NotImplementedError

    def knowledge_base(self, size: int, dtype: str = "bfloat16") -> KnowledgeBase:
        """Of the first `size` entities; built when it is asked for the first time."""
        folder = self.scratch / f"kb-{size}-{dtype}"
        model, processor = self.builder(size)
        try:
            kb = KnowledgeBase.from_pretrained(folder)
            kb.check_made_by(model, processor)
            if len(kb) == size and kb.dtype == dtype:
                return kb
        except MelError:
            pass
        say(f"building a knowledge base of {size:,} entities, {self.name}")
        empty = {name: [""] * size for name in ("name", "description", "attributes")}
        rows = {"entity_id": [f"Q{row}" for row in range(size)], "aliases": [[]] * size, "images": [[]] * size}
        source = datasets.Dataset.from_dict({**rows, **empty}, features=entity_features())
        return KnowledgeBase.build(
            source, model, processor, output=folder, batch_size=256, dtype=dtype, progress=False
        )

    def builder(self, size: int) -> tuple[Any, Any]:
        """Model and processor that encode entities by row."""
        raise NotImplementedError


class Generated(Source):
    """See the module.

    Args:
        scratch (`Path`): Where the model and knowledge bases are kept.
        size (`int`): The most entities that will be asked for.
        steps (`int`): Of training, batches of 64; 0 leaves the weights random.
        sizes (`dict`): As [`PAPER`].
        mask_padding (`bool`): The option of MIMIC; the published network has none.
    """

    def __init__(
        self,
        scratch: Path,
        size: int,
        *,
        steps: int = 400,
        sizes: dict[str, int] = PAPER,
        mask_padding: bool = False,
    ):
        self.name = "generated" + (", random weights" if not steps else "") + (", masked" if mask_padding else "")
        scratch = scratch / self.name.replace(", ", "-").replace(" ", "-")
        self.people = People(max(size, 1000), sizes=sizes)
        wanted = {"steps": steps, "sizes": sizes, "mask_padding": mask_padding}
        note = scratch / "training.json"
        if not note.exists() or json.loads(note.read_text())["settings"] != wanted:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            torch.manual_seed(0)
            model, trained_on = mimic(sizes, mask_padding=mask_padding), People(2 * _BLOCK, sizes=sizes)
            begin = time.perf_counter()
            losses = train(model, trained_on, steps) if steps else []
            model.save_pretrained(scratch / "model")
            record = {"settings": wanted, "seconds": round(time.perf_counter() - begin), "losses": losses[::20]}
            note.write_text(json.dumps(record))
        super().__init__(scratch, MimicModel.from_pretrained(scratch / "model").eval())
        trained = f"trained for {steps} steps of 64 mentions" if steps else "with random weights"
        self.description = f"generated people, MIMIC at the paper's sizes {trained}"

    def mentions(self, count: int) -> Mentions:
        """See [`Source`]."""
        generator = torch.Generator().manual_seed(1)
        golds = torch.randint(1000, (count,), generator=generator)  # in every knowledge base, however small
        inputs = self.people.mention_inputs(golds, seed=0)
        with torch.inference_mode():
            named = {f"mention_{name}": x for name, x in inputs.items()}
            encoded = self.model.encode_mentions(**to_model(self.model, named))
        return {name: x.to("cpu").clone() for name, x in encoded.items()}, inputs, golds

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Source`]."""
        return self.people.entity_inputs(rows)

    def builder(self, size: int) -> tuple[Any, Any]:
        """See [`Source`]."""
        return self.model, _RowProcessor(self.people.entity_inputs)

    def quality(self, mentions: int = 256, size: int = 10_000) -> dict[str, float]:
        """Shares of golds that are first, and among the first ten, of the first `size` people."""
        encoded, _, golds = self.mentions(mentions)
        ranked = rank(self.model, encoded, self.knowledge_base(size), gold_rows=golds)
        return {f"hits@{k}": (ranked.best_rank <= k).double().mean().item() for k in (1, 10)} | {"entities": size}


class Resampled(Source):
    """See the module.

    Args:
        scratch (`Path`): Where knowledge bases are kept.
        run (`str`): Run folder of a retriever.
        dataset (`str`): Folder of its data set.
        size (`int`): The fewest entities that will be asked for: the golds are among them.
        split (`str`): Where mentions come from.
    """

    def __init__(self, scratch: Path, run: str, dataset: str, size: int = 2**62, split: str = "test"):
        self.least = size
        model, self.processor = load_retriever(run)
        self.name = Path(run).resolve().name
        version = str(dataset_version(dataset).get("sha256", ""))[:8]
        super().__init__(scratch / "-".join(["resampled", self.name, version, str(NOISE)]), model.eval())
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.entities, self._mentions = load_entities(dataset), load_mentions(dataset, split)
        self.num_real = len(self.entities)
        self.description = (
            f"{self.name}, {split} of {Path(dataset).resolve().name}; beyond its {self.num_real:,} entities copies with "
            f"noise of {NOISE} standard deviations"
        )
        self._real: dict[str, torch.Tensor] | None = None

    def mentions(self, count: int) -> Mentions:
        """See [`Source`]."""
        row_of = {entity_id: row for row, entity_id in enumerate(self.entities["entity_id"])}
        golds = [row_of.get(entity_id, -1) for entity_id in self._mentions["entity_id"]]
        kept = [row for row, gold in enumerate(golds) if 0 <= gold < self.least][:count]
        chosen = self._mentions.select(kept)
        encoded = encode_rows(ModelInputs(self.model, self.processor), chosen, "mentions")
        inputs = self.processor(mentions=[chosen[row] for row in range(len(chosen))])
        inputs = {name.removeprefix("mention_"): tensor for name, tensor in inputs.items()}
        return encoded, inputs, torch.tensor([golds[row] for row in kept])

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Source`]."""
        made = self.processor(entities=[self.entities[int(row)] for row in rows])
        return {name.removeprefix("entity_"): tensor for name, tensor in made.items()}

    def builder(self, size: int) -> tuple[Any, Any]:
        """See [`Source`]."""
        if self._real is None:
            folder = self.scratch / "real"
            try:
                kb = KnowledgeBase.from_pretrained(folder)
                kb.check_made_by(self.model, self.processor)
            except MelError:
                say(f"encoding the {self.num_real:,} entities of {self.name}")
                kb = KnowledgeBase.build(self.entities, self.model, self.processor, output=folder)
            self._real = kb.encodings(range(self.num_real))
            self._deviation = {
                name: tensor.flatten(0, -2).std(0) for name, tensor in self._real.items() if tensor.is_floating_point()
            }
        return _Lookup(self.model, self.resample), _RowProcessor(lambda rows: {"rows": rows})

    def resample(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodings of these rows, real or copied with noise."""
        assert self._real is not None
        rows = rows.cpu()
        copied = torch.arange(self.num_real).roll(1)[rows % self.num_real].where(rows >= self.num_real, rows)
        encoded = slice_encodings(self._real, copied)
        made = rows >= self.num_real
        generator = torch.Generator().manual_seed(int(rows[0]))
        for name, deviation in self._deviation.items():
            tensor = encoded[name]
            noise = torch.randn(tensor.shape, generator=generator) * deviation * NOISE
            moved = tensor + noise
            moved = moved * (tensor.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp(min=1e-6))
            encoded[name] = torch.where(made.view(-1, *[1] * (tensor.dim() - 1)), moved, tensor)
        return encoded


class _Lookup:
    """A model whose encodings of entities are looked up; what identifies it is the model's."""

    def __init__(self, model: Any, encode: Any):
        self._model, self._encode = model, encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_mentions(self, **mention_inputs: Any) -> Any:
        return self._model.encode_mentions(**mention_inputs)

    def encode_entities(self, entity_rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._encode(entity_rows)

    def score(self, mentions: Any, entities: Any) -> Any:
        return self._model.score(mentions, entities)

    def unit_scores(self, mentions: Any, entities: Any) -> Any:
        return self._model.unit_scores(mentions, entities)


def open_source(
    scratch: Path | str, sizes: Sequence[int], run: str | None = None, dataset: str | None = None, steps: int = 400
) -> Source:
    """[`Resampled`] with a run and a data set, otherwise [`Generated`]; for knowledge bases of these sizes."""
    if (run is None) != (dataset is None):
        raise SystemExit("--model and --dataset belong together.")
    if run is not None and dataset is not None:
        return Resampled(Path(scratch), run, dataset, min(sizes))
    return Generated(Path(scratch), max(sizes), steps=steps)

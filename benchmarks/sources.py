"""Knowledge bases of any size for the benchmarks, from generated people or from the resampled encodings of a run.

[`Generated`] needs no download. Each of N people has a name, 6 to 33 words of attributes and a picture. Given names (500)
and family names (3,000) have Zipf frequencies, so people share names. A mention has the family name, in half of the cases
the given name, and 12 to 32 words, three in ten of them from the gold. Its picture is a noisy version of the gold's
picture, or of another person's in three of ten cases. MIMIC is trained on these mentions from scratch, at the paper's
sizes after the encoders: 40 tokens, 50 patches, text of width 512, units of width 96. The encoders are small (embeddings
with positions, and a one-layer ViT of width 64), because ranking does not run them. The model computes all N encodings.

[`Resampled`] takes a run and its data set. The first rows are the real entities. Each further row is a copy of a real
entity with Gaussian noise of `NOISE` times the standard deviation of each dimension, scaled back to the norms of the
original vectors.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from transformers import BertConfig, ViTConfig

from benchmarks.harness import say
from hf_mel.data.loading import dataset_version, load_entities, load_mentions
from hf_mel.errors import MelError
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import num_rows, slice_encodings
from hf_mel.inference.execution import to_model
from hf_mel.inference.fingerprint import describe_model, describe_processor
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.precision import native_bf16
from hf_mel.inference.ranking import rank
from hf_mel.kb.folders import install_kb, temporary_folder_beside
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.kb.manifest import FORMAT, VERSION, write_manifest
from hf_mel.kb.shards import ShardWriter, entity_schema
from hf_mel.modeling.mimic import MimicConfig, MimicModel
from hf_mel.protocols import entity_token_masks
from hf_mel.schema import entity_features

#: Sizes of the paper's runs on CLIP ViT-B/32, and of small encoders with outputs of the same shapes.
PAPER = {"length": 40, "text_width": 512, "unit_width": 96, "image_size": 56, "patch_size": 8, "vision_width": 64}

#: Noise of [`Resampled`], relative to the standard deviation of each dimension.
NOISE = 0.2

#: Encodings of mentions, the inputs of the encoders (without the prefix `mention_`), and gold rows.
Mentions: TypeAlias = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]

#: People are drawn in blocks of this size with a seed for each block. So a small world is the start of a larger one.
_BLOCK = 10_000
#: Entities that are encoded together.
_BATCH = 1024
_GIVEN, _FAMILY, _WORDS = 500, 3000, 4000
_PAD, _START, _END, _UNNAMED = 0, 1, 2, 3
_FIRST_GIVEN = 4
_FIRST_FAMILY = _FIRST_GIVEN + _GIVEN
_FIRST_WORD = _FIRST_FAMILY + _FAMILY
VOCABULARY = _FIRST_WORD + _WORDS
_LOOKS = 16


def _zipf(size: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draws numbers below `size`. The probability of k is proportional to 1 / (k + 10)."""
    weights = 1 / torch.arange(10, size + 10, dtype=torch.float64)
    edges = weights.cumsum(0) / weights.sum()
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.searchsorted(edges, drawn).clamp(max=size - 1)


class People:
    """N generated people.

    Args:
        size (`int`): Number of people, N.
        seed (`int`): Random seed.
        sizes (`dict`): Sizes of texts and pictures, as in [`PAPER`].

    Attributes:
        tokens (`torch.Tensor` of shape `[N, length]`, int16): Names and attributes.
        looks (`torch.Tensor` of shape `[N, 16]`): Coefficients of the pictures.
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
        """Joins parts to "[CLS] given family [SEP] words [SEP]", with padding."""
        positions = torch.arange(words.shape[1])
        words = torch.where(positions < counts, words, torch.where(positions == counts, _END, _PAD))
        ends = torch.full_like(given, _END)
        return torch.cat([torch.full_like(given, _START), given, family, ends, words], 1)

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` [n, length] and `pixel_values` [n, 3, H, W] of these people."""
        return self._inputs(self.tokens[rows].long(), self.looks[rows])

    def mention_inputs(self, golds: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
        """Returns the same tensors for one mention of each of these people."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + seed)
        count, length = len(golds), self.sizes["length"]
        gold_tokens = self.tokens[golds].long()
        chance = torch.rand(count, 1, generator=generator)
        given = torch.where(chance < 0.5, gold_tokens[:, 1:2], _UNNAMED)
        words = _FIRST_WORD + _zipf(_WORDS, (count, length - 4), generator)
        copied_positions = 4 + torch.randint(0, 6, (count, length - 4), generator=generator)
        is_copied = torch.rand(count, length - 4, generator=generator) < 0.3
        words = torch.where(is_copied, gold_tokens.gather(1, copied_positions), words)
        counts = torch.randint(min(12, length - 8), length - 7, (count, 1), generator=generator)
        others = torch.randint(len(self), (count,), generator=generator)
        is_other = torch.rand(count, generator=generator) < 0.3
        looks = self.looks[torch.where(is_other, others, golds)]
        looks = looks + 0.5 * torch.randn(looks.shape, generator=generator)
        return self._inputs(self._text(given, gold_tokens[:, 2:3], words, counts), looks)

    def _inputs(self, tokens: torch.Tensor, looks: torch.Tensor) -> dict[str, torch.Tensor]:
        side = self.sizes["image_size"]
        pixels = torch.tanh(looks @ self._pictures / _LOOKS**0.5 * 2).view(-1, 3, side, side)
        return {"input_ids": tokens, "attention_mask": (tokens != _PAD).long(), "pixel_values": pixels}


def untrained_mimic(sizes: dict[str, int] = PAPER, **options: Any) -> MimicModel:
    """Returns an untrained MIMIC as published, with small encoders (see [`PAPER`])."""
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
    """Trains all weights of a model on mentions of `people` with in-batch negatives. Returns the losses (eq. 22)."""
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
            say(f"training step {step + 1} of {steps}: loss {sum(losses[-50:]) / 50:.3f}")
    model.eval()
    return losses


class _RowProcessor:
    """Processor that turns entities with the ids Q0, Q1, … into tensors, by row number, and leaves mentions to another."""

    def __init__(self, inputs: Any, processor: Any = None):
        self._inputs, self._processor = inputs, processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, entities: Sequence[Any] = (), **mentions: Any) -> Any:
        if mentions:
            return self._processor(**mentions)
        rows = torch.tensor([int(row["entity_id"][1:]) for row in entities])
        return {f"entity_{name}": tensor for name, tensor in self._inputs(rows).items()}


def _numbered(size: int) -> datasets.Dataset:
    """Returns entities with the ids Q0, Q1, …, and no texts."""
    empty = {name: [""] * size for name in ("name", "description", "attributes")}
    rows = {"entity_id": [f"Q{row}" for row in range(size)], "aliases": [[]] * size, "images": [[]] * size}
    return datasets.Dataset.from_dict({**rows, **empty}, features=entity_features())


def _write_kb(folder: Path, size: int, model: Any, processor: Any, dtype: str) -> None:
    """Writes a knowledge base of `size` entities that have ids and encodings only, a batch at a time.

    [`KnowledgeBase.build`] reads, checks and hashes every row of a data set first. For blank rows that takes longer than all else.
    """
    fingerprints = {"model": describe_model(model), "processor": describe_processor(processor)}
    with temporary_folder_beside(folder) as work:
        writer = ShardWriter(work, 0, dtype, masks=entity_token_masks(model))
        for first in range(0, size, _BATCH):
            ids = [f"Q{row}" for row in range(first, min(first + _BATCH, size))]
            inputs = processor(entities=[{"entity_id": entity_id} for entity_id in ids])
            with torch.inference_mode():
                encoded = model.encode_entities(**to_model(model, inputs))
            writer.add(encoded, _blank_rows(ids))
        shards = writer.close()
        manifest = {"format": FORMAT, "version": VERSION, **fingerprints, "dtype": dtype, "encodings": writer.layout}
        write_manifest(work, manifest | {"shards": shards, "removed": []})
        install_kb(work, folder)


def _blank_rows(ids: list[str]) -> pa.Table:
    """Returns entities without texts and images as a knowledge base stores them."""
    blanks = {
        field.name: pa.repeat(pa.scalar([] if pa.types.is_list(field.type) else "", field.type), len(ids))
        for field in entity_schema()
    }
    return pa.table(blanks | {"entity_id": pa.array(ids)}, schema=entity_schema())


class Source:
    """Base of the sources: a model, mentions with golds, and knowledge bases of any size in a scratch folder.

    Attributes:
        name (`str`), description (`str`): Words for the results.
        model ([`~hf_mel.protocols.Retriever`]): The retriever, in eval mode.
        num_real (`int`, *optional*): Number of real entities. Rows beyond it are resampled.
    """

    name: str
    description: str
    num_real: int | None = None

    def __init__(self, scratch: Path, model: Any):
        self.scratch, self.model = scratch, model

    def mentions(self, count: int) -> Mentions:
        """Returns the encodings, encoder inputs and gold rows of up to `count` mentions."""
        raise NotImplementedError

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the encoder inputs of (real) entities, without the prefix `entity_`."""
        raise NotImplementedError

    def knowledge_base(self, size: int, dtype: str = "bfloat16") -> KnowledgeBase:
        """Returns the knowledge base of the first `size` entities. The first call builds it."""
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
        _write_kb(folder, size, model, processor, dtype)
        return KnowledgeBase.from_pretrained(folder)

    def builder(self, size: int) -> tuple[Any, Any]:
        """Returns a model and a processor that encode entities by row number."""
        raise NotImplementedError


class Generated(Source):
    """Generated people and a MIMIC that is trained on them (see the module).

    Args:
        scratch (`Path`): Folder of the model and the knowledge bases.
        size (`int`): Largest number of entities of a knowledge base.
        steps (`int`): Training steps with batches of 64. 0 keeps random weights.
        sizes (`dict`): Sizes of texts, pictures and model, as in [`PAPER`].
        mask_padding (`bool`): Option of MIMIC, which the published network does not have.
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
        settings = {"steps": steps, "sizes": sizes, "mask_padding": mask_padding}
        note = scratch / "training.json"
        if not note.exists() or json.loads(note.read_text())["settings"] != settings:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            torch.manual_seed(0)
            model, people = untrained_mimic(sizes, mask_padding=mask_padding), People(2 * _BLOCK, sizes=sizes)
            begin = time.perf_counter()
            losses = train(model, people, steps) if steps else []
            model.save_pretrained(scratch / "model")
            record = {"settings": settings, "seconds": round(time.perf_counter() - begin), "losses": losses[::20]}
            note.write_text(json.dumps(record))
        super().__init__(scratch, MimicModel.from_pretrained(scratch / "model").eval())
        trained = f"trained for {steps} steps of 64 mentions" if steps else "with random weights"
        self.description = f"generated people, MIMIC at the paper's sizes {trained}"

    def mentions(self, count: int) -> Mentions:
        """As in [`Source`]."""
        generator = torch.Generator().manual_seed(1)
        golds = torch.randint(1000, (count,), generator=generator)  # even the smallest knowledge base has them
        inputs = self.people.mention_inputs(golds, seed=0)
        with torch.inference_mode():
            arguments = {f"mention_{name}": x for name, x in inputs.items()}
            encoded = self.model.encode_mentions(**to_model(self.model, arguments))
        return {name: x.to("cpu").clone() for name, x in encoded.items()}, inputs, golds

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """As in [`Source`]."""
        return self.people.entity_inputs(rows)

    def builder(self, size: int) -> tuple[Any, Any]:
        """As in [`Source`]."""
        return self.model, _RowProcessor(self.people.entity_inputs)

    def quality(self, mentions: int = 256, size: int = 10_000) -> dict[str, float]:
        """Returns H@1 and H@10 of mentions ranked against the first `size` people."""
        encoded, _, golds = self.mentions(mentions)
        ranked = rank(self.model, encoded, self.knowledge_base(size), gold_rows=golds)
        return {f"hits@{k}": (ranked.best_rank <= k).double().mean().item() for k in (1, 10)} | {"entities": size}


class Resampled(Source):
    """A run, its data set, and resampled copies of its entities (see the module).

    Args:
        scratch (`Path`): Folder of the knowledge bases.
        run (`str`): Run folder of a retriever.
        dataset (`str`): Folder of its data set.
        size (`int`): Smallest number of entities of a knowledge base. Only mentions with a gold among them are used.
        split (`str`): Split of the mentions.
    """

    def __init__(self, scratch: Path, run: str, dataset: str, size: int = 2**62, split: str = "test"):
        self.min_size = size
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
        """As in [`Source`]."""
        row_of = {entity_id: row for row, entity_id in enumerate(self.entities["entity_id"])}
        golds = [row_of.get(entity_id, -1) for entity_id in self._mentions["entity_id"]]
        selected = [row for row, gold in enumerate(golds) if 0 <= gold < self.min_size][:count]
        chosen = self._mentions.select(selected)
        encoded = encode_rows(ModelInputs(self.model, self.processor), chosen, "mentions")
        inputs = self.processor(mentions=[chosen[row] for row in range(len(chosen))])
        inputs = {name.removeprefix("mention_"): tensor for name, tensor in inputs.items()}
        return encoded, inputs, torch.tensor([golds[row] for row in selected])

    def entity_inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """As in [`Source`]."""
        inputs = self.processor(entities=[self.entities[int(row)] for row in rows])
        return {name.removeprefix("entity_"): tensor for name, tensor in inputs.items()}

    def builder(self, size: int) -> tuple[Any, Any]:
        """As in [`Source`]."""
        if self._real is None:
            folder = self.scratch / "real"
            try:
                kb = KnowledgeBase.from_pretrained(folder)
                kb.check_made_by(self.model, self.processor)
            except MelError:
                say(f"encoding the {self.num_real:,} entities of {self.name}")
                device = self.model.device.type
                # Twice as fast where it is native. A knowledge base rounds what comes out to bfloat16 anyway.
                with torch.autocast(device, torch.bfloat16, enabled=native_bf16(device)[0]):
                    kb = KnowledgeBase.build(self.entities, self.model, self.processor, output=folder)
            self._real = kb.encodings(range(self.num_real))
            self._deviation = {
                name: tensor.flatten(0, -2).std(0) for name, tensor in self._real.items() if tensor.is_floating_point()
            }
        return _LookupModel(self.model, self.resample), _RowProcessor(lambda rows: {"rows": rows}, self.processor)

    def named_kb(self, size: int) -> KnowledgeBase:
        """Returns a knowledge base of `size` entities with texts. The first call builds it; a million take 18 GB on the disk.

        The first entities are the real ones. Each further one has resampled encodings, a made-up name ([`grown_names`]),
        and the texts of a real one.
        """
        model, processor = self.builder(size)
        folder = self.scratch / f"named-{size}"
        try:
            kb = KnowledgeBase.from_pretrained(folder)
            kb.check_made_by(model, processor)
            return kb
        except MelError:
            say(f"building a knowledge base of {size:,} named entities")
        originals = np.arange(size) % len(self.entities)
        texts = {
            name: np.array(list(self.entities[name]), dtype=object)[originals]
            for name in ("description", "attributes")
        }
        columns = {
            "entity_id": [f"Q{row}" for row in range(size)],
            "name": [names[0] for names in grown_names(list(self.entities["name"]), size)],
            **{name: values.tolist() for name, values in texts.items()},
            "aliases": [[]] * size,
            "images": [[]] * size,
        }
        entities = datasets.Dataset.from_dict(columns, features=entity_features())
        return KnowledgeBase.build(
            entities, model, processor, output=folder, batch_size=256, dtype="bfloat16", progress=False
        )

    def resample(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the encodings of rows: real ones, and copies with noise."""
        assert self._real is not None
        rows = rows.cpu()
        originals = torch.arange(self.num_real).roll(1)[rows % self.num_real].where(rows >= self.num_real, rows)
        encoded = slice_encodings(self._real, originals)
        is_copy = rows >= self.num_real
        generator = torch.Generator().manual_seed(int(rows[0]))
        for name, deviation in self._deviation.items():
            tensor = encoded[name]
            noise = torch.randn(tensor.shape, generator=generator) * deviation * NOISE
            noisy = tensor + noise
            noisy = noisy * (tensor.norm(dim=-1, keepdim=True) / noisy.norm(dim=-1, keepdim=True).clamp(min=1e-6))
            encoded[name] = torch.where(is_copy.view(-1, *[1] * (tensor.dim() - 1)), noisy, tensor)
        return encoded


def grown_names(names: Sequence[str], size: int, seed: int = 0) -> Iterator[list[str]]:
    """Yields the names of `size` entities: the real ones, and then made-up ones.

    A made-up name has the words before the last one of a real name, and the last word of another.
    """
    generator = np.random.default_rng(seed)
    pairs = generator.integers(len(names), size=(max(0, size - len(names)), 2)).tolist()
    yield from ([name] for name in names[:size])
    for first, last in pairs:
        yield [" ".join([*names[first].split()[:-1], names[last].split()[-1]])]


class _LookupModel:
    """Wraps a model and looks up the encodings of entities. It has the fingerprint of the model."""

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


def stored_kb(model: Any, encodings: Mapping[str, torch.Tensor], dtype: str) -> KnowledgeBase:
    """Returns a temporary knowledge base of the encodings [N, …] of a model."""
    lookup = _LookupModel(model, lambda rows: slice_encodings(encodings, rows.cpu()))
    processor = _RowProcessor(lambda rows: {"rows": rows})
    size = num_rows(encodings)
    return KnowledgeBase.build(_numbered(size), lookup, processor, batch_size=256, dtype=dtype, progress=False)


def open_source(
    scratch: Path | str, sizes: Sequence[int], run: str | None = None, dataset: str | None = None, steps: int = 400
) -> Source:
    """Opens [`Resampled`] if a run and a data set are given, otherwise [`Generated`].

    Args:
        scratch (`Path` or `str`): Folder of models and knowledge bases.
        sizes (sequence of `int`): Numbers of entities of the knowledge bases.
        run, dataset (`str`, *optional*): Run folder and data-set folder of [`Resampled`].
        steps (`int`): Training steps of [`Generated`].
    """
    if (run is None) != (dataset is None):
        raise SystemExit("--model and --dataset must be given together.")
    if run is not None and dataset is not None:
        return Resampled(Path(scratch), run, dataset, min(sizes))
    return Generated(Path(scratch), max(sizes), steps=steps)

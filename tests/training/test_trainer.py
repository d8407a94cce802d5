"""MelTrainer with a toy retriever, compared with plain loops."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time

import pytest
import torch
from torch import nn

from hf_mel.errors import DataFormatError, RecipeError, UnknownEntityError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.precision import native_bf16
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.collators import RetrieverCollator
from hf_mel.training.sampling import GroupingSampler, surface_key
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyProcessor, ToyRetriever, toy_entities, toy_mentions, toy_model

ENTITIES = toy_entities(12)


def trainer(tmp_path, model=None, train=None, validation=None, **arguments) -> MelTrainer:
    options = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "disable_tqdm": True,
        "log_level": "error",
    }
    return MelTrainer(
        model if model is not None else toy_model(),
        MelTrainingArguments(output_dir=str(tmp_path / "checkpoints"), **{**options, **arguments}),
        train_dataset=toy_mentions(16) if train is None else train,
        eval_dataset=toy_mentions(12) if validation is None else validation,
        entities=ENTITIES,
        processing_class=ToyProcessor(),
    )


class Greedy(ToyRetriever):
    """A retriever whose `forward` accepts any keyword."""

    accepts_loss_kwargs = True

    def forward(self, labels=None, num_items_in_batch=None, **inputs):
        return super().forward(labels=labels, **inputs)


@pytest.mark.parametrize("kind", [ToyRetriever, Greedy])
def test_accumulated_gradients_are_the_mean_over_the_batches(tmp_path, kind):
    mentions, start = toy_mentions(16), toy_model()
    model = kind(start.config)
    model.load_state_dict(start.state_dict())
    trained = trainer(
        tmp_path,
        model,
        mentions,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        logging_steps=1,
    )
    output = trained.train()

    collator = RetrieverCollator(ModelInputs(None, ToyProcessor()), ENTITIES)
    order = list(GroupingSampler(range(16)))
    losses = [start(**collator([mentions[i] for i in order[first : first + 4]])).loss for first in (0, 4)]
    mean = sum(losses) / 2
    mean.backward()
    assert output.training_loss == pytest.approx(mean.item(), rel=1e-5)
    for (name, before), after in zip(start.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * before.grad, msg=name)


def test_mined_negatives_are_the_best_entities_of_a_double_loop_without_the_gold(tmp_path):
    mentions, model, processor = toy_mentions(6), toy_model(), ToyProcessor()
    trained = trainer(tmp_path, model, mentions, mined_negatives=2, per_device_train_batch_size=2)
    entities = model.encode_entities(**processor(entities=list(ENTITIES)))
    mined = {}
    for mention in mentions:
        scores = model.score(model.encode_mentions(**processor(mentions=[mention])), entities)[0].tolist()
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        ids = [ENTITIES[number]["entity_id"] for number in order]
        mined[mention["mention_id"]] = [entity_id for entity_id in ids if entity_id != mention["entity_id"]][:2]
    rows = [mentions[3], mentions[0]]
    columns = list(
        dict.fromkeys([row["entity_id"] for row in rows] + [e for row in rows for e in mined[row["mention_id"]]])
    )
    assert len(columns) > 2
    batch = trained.data_collator(rows)
    by_id = {entity["entity_id"]: entity for entity in ENTITIES}
    expected = processor(entities=[by_id[entity_id] for entity_id in columns])
    assert expected
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor)
    assert [columns[label] for label in batch["labels"].tolist()] == [row["entity_id"] for row in rows]
    # More than the knowledge base has: every other entity is one.
    everything = trainer(tmp_path, model, mentions, mined_negatives=50).data_collator([mentions[0]])
    assert len(next(v for k, v in everything.items() if k.startswith("entity"))) == len(ENTITIES)


def test_every_epoch_has_a_different_order_that_groups_surfaces(tmp_path):
    mentions, seen = toy_mentions(24), []
    trained = trainer(
        tmp_path, train=mentions, num_train_epochs=2, batch_grouping="surface", group_size=2, eval_strategy="no",
        save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip
    collate = trained.data_collator
    trained.data_collator = lambda rows: seen.append([row["mention_id"] for row in rows]) or collate(rows)
    trained.train()
    sampler = GroupingSampler([surface_key(mention) for mention in mentions["mention"]], 2, seed=0)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [mentions["mention_id"][index] for index in sampler]
        expected += [order[first : first + 4] for first in range(0, 24, 4)]
    assert seen == expected
    assert seen[:6] != seen[6:]


class Named(ToyRetriever):
    """A retriever with a LayerNorm and a pretrained encoder."""

    backbone_names = ("characters",)

    def __init__(self, config):
        super().__init__(config)
        self.out_norm = nn.LayerNorm(config.dim)


def test_each_parameter_has_the_learning_rate_and_weight_decay_of_its_part(tmp_path):
    model = Named(toy_model().config)
    built = trainer(tmp_path, model, weight_decay=0.1, learning_rate=1e-3, head_learning_rate=1e-2)
    optimizer = built.create_optimizer()
    assert built.create_optimizer() is optimizer
    settings = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            (name,) = (name for name, other in model.named_parameters() if other is parameter)
            assert name not in settings
            settings[name] = (group["lr"], group["weight_decay"])
    assert settings == {
        "characters.weight": (1e-3, 0.1),
        "mention_text.weight": (1e-2, 0.1),
        "mention_text.bias": (1e-2, 0.0),
        "mention_vision.weight": (1e-2, 0.1),
        "mention_vision.bias": (1e-2, 0.0),
        "entity_vision.weight": (1e-2, 0.1),
        "entity_vision.bias": (1e-2, 0.0),
        "out_norm.weight": (1e-2, 0.0),
        "out_norm.bias": (1e-2, 0.0),
    }
    scheduler = built.create_scheduler(10)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] / group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([0.9] * 3)


def test_a_head_learning_rate_needs_a_model_that_names_its_backbones(tmp_path):
    with pytest.raises(RecipeError, match="ToyRetriever does not name its pretrained parts"):
        trainer(tmp_path, head_learning_rate=1e-2)


def test_training_learns_and_ends_with_the_best_checkpoint(tmp_path):
    trained = trainer(tmp_path, num_train_epochs=6, learning_rate=0.05)
    before = trained.evaluate()["eval_mrr"]
    trained.train()
    evaluations = [entry["eval_mrr"] for entry in trained.state.log_history if "eval_mrr" in entry]
    assert len(evaluations) == 6
    assert max(evaluations) > before + 0.05
    assert max(evaluations) > evaluations[-1]  # otherwise this test could not tell which checkpoint was kept
    again = trained.evaluate(metric_key_prefix="again")
    assert again["again_mrr"] == max(evaluations)
    assert {"again_hits@1", "again_mr", "again_num_ranked"} <= set(again)


def test_evaluation_equals_a_double_loop_and_keeps_the_mode(tmp_path):
    mentions, model = toy_mentions(12), toy_model()
    built = trainer(tmp_path, model, validation=mentions)
    model.train()
    metrics = built.evaluate()
    assert model.training
    processor, ranks = ToyProcessor(), []
    with torch.no_grad():
        entities = model.encode_entities(**processor(entities=list(ENTITIES)))
        for mention in mentions:
            scores = model.score(model.encode_mentions(**processor(mentions=[mention])), entities)[0]
            gold = scores[ENTITIES["entity_id"][:].index(mention["entity_id"])]
            ranks.append(1 + int((scores > gold + 1e-5).sum()))
    assert metrics["eval_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 12)
    assert metrics["eval_hits@1"] == pytest.approx(ranks.count(1) / 12)


def test_the_old_name_of_the_detailed_evaluation_still_works_with_a_warning(tmp_path):
    built = trainer(tmp_path)
    with pytest.warns(FutureWarning, match="evaluate_detailed"):
        metrics = built.measure(toy_mentions(12)).metrics
    assert metrics == built.evaluate_detailed(toy_mentions(12)).metrics


def test_early_stopping_counts_evaluations_without_improvement(tmp_path):
    trained = trainer(tmp_path, num_train_epochs=9, learning_rate=0.0, early_stopping_patience=2)
    trained.train()
    assert trained.state.epoch == 3  # the first is the best, the next two are no better


def test_nil_mentions_are_left_out_with_a_count(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_mel.training.trainer"):
        built = trainer(tmp_path, train=toy_mentions(16, nil_every=4))
    assert "4 mentions whose gold is NIL" in caplog.text
    assert len(built.train_dataset) == 12
    assert len(built.mentions) == 12


def test_a_model_that_learns_nil_trains_on_nil_mentions_and_on_random_negatives(tmp_path, caplog):
    model = toy_model()
    model.learns_nil = True
    with caplog.at_level(logging.INFO, logger="hf_mel.training.trainer"):
        built = trainer(tmp_path, model, toy_mentions(16, nil_every=4), random_negatives=5)
    assert "learns NIL from 4 mentions" in caplog.text
    assert len(built.train_dataset) == len(built.mentions) == 16
    batch = built.data_collator([built.train_dataset[k] for k in (0, 3)])
    assert batch["labels"].tolist() == [0, -1]
    assert len(batch["entity_input_ids"]) == 6
    assert "no training mention is NIL" not in caplog.text
    trainer(tmp_path, model, toy_mentions(8), simulated_nil=0.1)
    assert "no training mention is NIL" not in caplog.text
    with caplog.at_level(logging.INFO, logger="hf_mel.training.trainer"):
        trainer(tmp_path, model, toy_mentions(8))
    assert "no training mention is NIL" in caplog.text
    with pytest.raises(RecipeError, match="ToyRetriever does not learn NIL"):
        trainer(tmp_path, simulated_nil=0.1)
    with pytest.raises(ValueError, match="simulated_nil=1"):
        trainer(tmp_path, simulated_nil=1.0)
    with pytest.raises(ValueError, match="random_negatives=-1"):
        trainer(tmp_path, random_negatives=-1)


class TakesPriors(ToyRetriever):
    """A retriever that corrects for how often entities are golds."""

    def forward(self, entity_log_prior=None, **inputs):
        self.log_prior = entity_log_prior
        return super().forward(**inputs)


def test_the_prior_correction_counts_golds_of_the_training_mentions(tmp_path):
    train = toy_mentions(16)
    model = TakesPriors(toy_model().config)
    built = trainer(tmp_path, model, train, prior_correction=0.5, random_negatives=4)
    rows = [train[0], train[5]]
    batch = built.data_collator(rows)
    columns = {label: row["entity_id"] for label, row in zip(batch["labels"].tolist(), rows, strict=True)}
    golds = train["entity_id"][:]
    assert len(batch["entity_log_prior"]) == 6
    mean = (16 + 0.5 * 12) / 12
    for label, gold in columns.items():
        expected = 0.5 * math.log((golds.count(gold) + 0.5) / mean)
        assert batch["entity_log_prior"][label].item() == pytest.approx(expected)
    model(**batch)
    assert model.log_prior is batch["entity_log_prior"]
    with pytest.raises(RecipeError, match="prior_correction is set, but ToyRetriever takes no entity_log_prior"):
        trainer(tmp_path, prior_correction=1.0)
    assert "entity_log_prior" not in trainer(tmp_path, train=train).data_collator(rows)


def test_golds_are_checked_before_training(tmp_path):
    with pytest.raises(UnknownEntityError, match="row 2: The gold 'Q15' of mention 'm2'"):
        trainer(tmp_path, train=toy_mentions(16, entities=24))
    with pytest.raises(UnknownEntityError):
        trainer(tmp_path, validation=toy_mentions(16, entities=24))
    with pytest.raises(DataFormatError, match="every gold is NIL"):
        trainer(tmp_path, train=toy_mentions(3, nil_every=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_grouping": "name"},
        {"group_size": 0},
        {"mined_negatives": -1},
        {"early_stopping_patience": 0},
        {"remove_unused_columns": True},
    ],
)
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MelTrainingArguments(output_dir="nowhere", **wrong)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_automatic_where_the_device_has_it(monkeypatch, caplog, native):
    monkeypatch.setattr("hf_mel.training.arguments.native_bf16", native_bf16)
    monkeypatch.setattr("hf_mel.inference.precision._cpu_instructions", lambda: {"avx2", *["avx512_bf16"] * native})
    options = {"output_dir": "nowhere", "use_cpu": True}
    with caplog.at_level(logging.INFO, logger="hf_mel.training.arguments"):
        assert MelTrainingArguments(**options).bf16 is native
    reason = "bfloat16 mixed precision: the CPU has" if native else "float32: the CPU lacks"
    assert f"Training in {reason} native bfloat16" in caplog.text
    assert MelTrainingArguments(**options, bf16=True).bf16 is True
    assert MelTrainingArguments(**options, bf16=False).bf16 is False
    with pytest.raises(ValueError, match="bf16='maybe'"):
        MelTrainingArguments(**options, bf16="maybe")


def test_half_precision_training_keeps_full_weights(tmp_path):
    start = toy_model()
    trained = trainer(tmp_path, copy.deepcopy(start), bf16=True)
    trained.train()
    assert all(parameter.dtype == torch.float32 for parameter in trained.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), trained.model.parameters(), strict=True))


def test_the_trainer_adds_no_field_to_the_configuration(tmp_path):
    model = toy_model()
    before = model.config.to_dict()
    trainer(tmp_path, model)
    assert model.config.to_dict() == before


class _Watched:
    """A collator that keeps which threads called it, and whether it is being called."""

    def __init__(self, collator, seconds=0.0):
        self.collator, self.seconds = collator, seconds
        self.threads, self.inside, self.called = [], False, threading.Condition()

    def __getattr__(self, name):
        return getattr(self.collator, name)

    def __call__(self, rows):
        self.inside = True
        time.sleep(self.seconds)
        batch = self.collator(rows)
        with self.called:
            self.threads.append(threading.current_thread())
            self.called.notify_all()
        self.inside = False
        return batch


def _runs_ahead() -> bool:
    return any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_a_second_thread_prepares_the_next_batch_during_a_step(tmp_path, monkeypatch):
    trained = trainer(tmp_path, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    watched = trained.data_collator = _Watched(trained.data_collator)
    plain_step, steps = trained.training_step, []

    def step(*args, **kwargs):
        steps.append(len(steps))
        with watched.called:  # the loader itself holds the batch after this one
            assert watched.called.wait_for(lambda: len(watched.threads) >= min(len(steps) + 2, 4), timeout=60)
        return plain_step(*args, **kwargs)

    monkeypatch.setattr(trained, "training_step", step)
    trained.train()
    assert len(steps) == len(watched.threads) == 4
    assert threading.main_thread() not in watched.threads
    assert not _runs_ahead()


def test_no_batch_is_prepared_while_the_trainer_evaluates_or_saves(tmp_path, monkeypatch):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trained = trainer(tmp_path, train=toy_mentions(24), **options)
    watched = trained.data_collator = _Watched(trained.data_collator, seconds=0.1)
    seen = []
    for name in ("evaluate", "save_model"):

        def using_the_processor(*args, plain=getattr(trained, name), **kwargs):
            seen.append(watched.inside)
            return plain(*args, **kwargs)

        monkeypatch.setattr(trained, name, using_the_processor)
    trained.train()
    assert len(seen) >= 2 * 6
    assert not any(seen)


def test_training_that_stops_early_leaves_no_thread(tmp_path):
    options = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trained = trainer(tmp_path, train=toy_mentions(24), max_steps=2, **options)
    trained.train()
    assert not _runs_ahead()


def test_batches_are_those_of_a_loader_without_a_second_thread(tmp_path, monkeypatch):
    """Also those of an epoch that a checkpoint interrupts, and after an epoch whose end the thread reads late."""
    options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": False}
    options |= {"save_total_limit": None, "num_train_epochs": 2, "max_steps": 9}
    batches = {}

    def slowly(items):
        end = object()
        while (item := time.sleep(0.1) or next(items, end)) is not end:
            yield item

    for name in ("ahead", "plain"):
        if name == "plain":
            monkeypatch.setattr("hf_mel.training.base_trainer.computed_ahead", lambda items, ahead: items)
        for resume in (None, str(tmp_path / name / "checkpoints" / "checkpoint-3")):
            trained = trainer(tmp_path / name, train=toy_mentions(24), **options)
            monkeypatch.setattr(trained, "_one_by_one", slowly)
            plain_step, ids = trained.training_step, batches.setdefault((name, resume is None), [])

            def step(model, inputs, *args, plain_step=plain_step, ids=ids, **kwargs):
                ids.append(list(inputs["batch_ids"]))
                return plain_step(model, inputs, *args, **kwargs)

            monkeypatch.setattr(trained, "training_step", step)
            trained.train(resume_from_checkpoint=resume)
    assert batches["ahead", True] == batches["plain", True]
    assert batches["ahead", False] == batches["plain", False] == batches["plain", True][3:]
    assert len(batches["plain", True]) == 9

"""Losses and gradients that are not finite: the step changes nothing, its rows and module are named, the run goes on.

The faults are real ones: a weight that is not a number, a module whose gradient is 0 times infinity, a weight that
becomes infinite while the run goes on.
"""

import copy
import json
import time
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP

from config.schema import EvaluationConfig, OptimConfig, TrackingConfig, TrainingConfig
from src.bad_modules import BadModule, bad_weights, first_bad_module
from src.batches import StepSplit
from src.number_watch import OVERFLOWS_IN_A_ROW, NumberWatch
from src.packing import PackCollator, PackedRows
from src.step_guard import inner_optimizer, takes_found_inf
from src.step_rows import RecentSteps, excerpt
from src.step_sums import StepFigures
from src.streaming import StreamFeed
from src.trainer import SFTTrainer
from src.training_arguments import training_arguments
from tests.processes import launch_processes
from tests.test_streaming import stream_config, stream_of
from tests.test_trainer import LENGTH, tiny_model, tiny_tokenizer, uneven_rows
from tests.toy_tokenizer import toy_tokenizer
from utils import checkpointing
from utils.checkpoint_record import write_record
from utils.errors import UserError

POISON = 60
"""A token whose embedding is not a number in the poisoned model, and which one row alone has."""

POISONED_ROW = 5


def rows_with_one_poisoned(count=96):
    rows = uneven_rows(count).to_dict()
    ids = [[token if token != POISON else 59 for token in row] for row in rows["input_ids"]]
    ids[POISONED_ROW][0] = POISON
    return Dataset.from_dict(
        {"input_ids": ids, "labels": rows["labels"], "origin": [f"rows.jsonl line {n + 1}" for n in range(count)]}
    )


def model_with_dropout():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1  # so that a draw of a random number anywhere shows
    return model


class Poison(TrainerCallback):
    """Makes the embedding of one token NaN; earlier, the run would refuse the model."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.get_input_embeddings().weight[POISON] = float("nan")


def lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


def build(
    folder,
    model,
    rows=None,
    *,
    optimizer="adamw_torch_fused",
    steps=8,
    callbacks=(),
    accumulation=2,
    packing=True,
    **more,
):
    training = {"log_every_steps": 3, "save_every_steps": None} | more.pop("training", {})
    optim = OptimConfig(name=optimizer, learning_rate=1e-2, weight_decay=0.1)
    args = training_arguments(
        folder,
        optim,
        TrainingConfig(max_steps=steps, micro_batch_rows=2, accumulation_steps=accumulation, **training),
        EvaluationConfig(),
        TrackingConfig(),
    )
    return SFTTrainer(
        model=model,
        args=args,
        tokenizer=tiny_tokenizer(),
        train_packs=PackedRows(rows or rows_with_one_poisoned(), max_length=LENGTH, packing=packing),
        callbacks=callbacks,
        optim=optim,
        keep_checkpoints=9,
        **more,
    )


def step_of_row(trainer, row):
    """The step in which a row is trained first."""
    feed = trainer.new_feed()
    packs = [pack for pack, rows in enumerate(feed.packs.packs) if row in rows]
    return next(step for step in range(1, 99) if any(packs[0] in micro for micro in feed.packs_of(step)))


def plain(weights):
    """Weights without NaN, which equals nothing."""
    return {name: weight.detach().clone().nan_to_num(7.0) for name, weight in weights}


def state_of(optimizer):
    return copy.deepcopy(inner_optimizer(optimizer).state_dict()["state"])


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(torch.nan_to_num(one, 7.0), torch.nan_to_num(other, 7.0))
    return one == other


class Snapshots(TrainerCallback):
    """The weights and the optimizer's state before and after a step."""

    def __init__(self, step):
        self.step, self.before, self.after = step, None, None

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == self.step - 1:
            self.before = plain(model.named_parameters()), state_of(optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == self.step:
            self.after = plain(model.named_parameters()), state_of(optimizer)


class WithoutStep(TrainerCallback):
    """Takes a step's gradients away, so that its batch contributes nothing."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if state.global_step == self.step - 1:
            optimizer.zero_grad(set_to_none=True)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("optimizer", "wrap"),
    [("adamw_torch_fused", None), ("muon", None), ("adafactor", None), ("adamw_torch_fused", lora)],
    ids=["adamw", "muon", "adafactor", "lora"],
)
def test_a_bad_step_changes_nothing_and_the_run_is_that_without_its_batch(tmp_path, optimizer, wrap):
    poisoned, clean = model_with_dropout(), model_with_dropout()
    if wrap:
        poisoned, clean = wrap(poisoned), wrap(clean)
    trainer = build(tmp_path / "bad", poisoned, optimizer=optimizer, callbacks=[Poison()])
    step = step_of_row(trainer, POISONED_ROW)
    assert 1 < step < 8
    snapshots = Snapshots(step)
    trainer.add_callback(snapshots)
    trainer.train()
    assert equal(snapshots.before[0], snapshots.after[0])
    assert equal(snapshots.before[1], snapshots.after[1])
    assert takes_found_inf(inner_optimizer(trainer.optimizer)) is (optimizer != "adafactor")
    reference = build(tmp_path / "clean", clean, optimizer=optimizer, callbacks=[WithoutStep(step)])
    reference.train()
    weights, expected = (dict(model.named_parameters()) for model in (poisoned, clean))
    for name, weight in weights.items():
        rows = slice(0, POISON) if "embed_tokens" in name else slice(None)
        assert torch.equal(weight[rows], expected[name][rows]), name
    assert not (tmp_path / "clean" / "bad_batches.jsonl").exists()
    counts = [line["skipped_steps"] for line in trainer.state.log_history if "loss" in line]
    assert counts == [int(step <= logged) for logged in (1, 3, 6)]
    (line,) = lines_of(tmp_path / "bad")
    assert (line["step"], line["kind"], line["loss"], line["bad_loss"]) == (step, "skipped", None, True)
    assert line["module"].endswith("model.embed_tokens")
    assert line["place"] == "forward"
    assert [row["row"] for row in line["rows"]] == [f"rows.jsonl line {POISONED_ROW + 1}"]


class SpoilsWeight(TrainerCallback):
    """Makes a weight infinite after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")


@pytest.mark.parametrize("after", [4, 5])
def test_weights_that_are_spoiled_end_the_run_at_the_last_checkpoint_before(tmp_path, after, monkeypatch):
    def on_a_slow_disk(*args, **kwargs):
        time.sleep(0.5)
        write_record(*args, **kwargs)

    monkeypatch.setattr(checkpointing, "write_record", on_a_slow_disk)  # the steps do not wait for it
    trainer = build(
        tmp_path, tiny_model(), callbacks=[SpoilsWeight(after)], training={"save_every_steps": 2}, max_bad_steps=99
    )
    # After step 4 the checkpoint of step 4 would hold them; after step 5 that of step 6, whose line is logged first.
    with pytest.raises(
        UserError, match=r"the weights are spoiled and unsaved \(model.layers.1.mlp.down_proj.weight\)"
    ) as e:
        trainer.train()
    last = 2 if after == 4 else 4
    assert f"The last good checkpoint is checkpoint-{last}" in str(e.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in range(2, last + 1, 2)
    ]


class RootOfNothing(LlamaMLP):
    """Adds the root of 0: the output is as it was, and the gradient 0 times infinity."""

    def forward(self, hidden):
        return super().forward(hidden) + (hidden - hidden).square().sum(dim=-1, keepdim=True).sqrt()


def model_with_bad_gradient():
    model = tiny_model()
    layer = model.model.layers[0]
    mlp = RootOfNothing(model.config)
    mlp.load_state_dict(layer.mlp.state_dict())
    layer.mlp = mlp
    return model


def test_a_gradient_that_is_not_finite_ends_the_run_after_as_many_steps_as_may_be_left_out(tmp_path):
    model = model_with_bad_gradient()
    before = plain(model.named_parameters())
    trainer = build(tmp_path, model, max_bad_steps=1, packing=False, training={"log_every_steps": 1})
    with pytest.raises(
        UserError, match=r"in 2 step\(s\) in a row, up to step 2, and training.max_bad_steps=1"
    ) as error:
        trainer.train()
    assert "no weight is spoiled" in str(error.value)
    assert equal(before, plain(model.named_parameters()))
    (line,) = lines_of(tmp_path)
    assert (line["step"], line["bad_loss"], line["bad_gradient"]) == (1, False, True)
    assert (line["module"], line["place"]) == ("model.layers.0.mlp", "backward")
    assert line["loss"] > 0


def test_a_run_that_goes_on_counts_as_one_that_was_never_stopped(tmp_path):
    def run(folder, resume=None):
        trainer = build(folder, model_with_dropout(), callbacks=[Poison()], training={"save_every_steps": 1})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path)
    bad = step_of_row(whole, POISONED_ROW)
    lines = [line for line in whole.state.log_history if "loss" in line]
    (tmp_path / "bad_batches.jsonl").rename(tmp_path / "whole.jsonl")
    for checkpoint in (bad - 1, bad):
        (tmp_path / "bad_batches.jsonl").write_text((tmp_path / "whole.jsonl").read_text())
        resumed = run(tmp_path, str(tmp_path / f"checkpoint-{checkpoint}"))
        assert equal(plain(whole.model.named_parameters()), plain(resumed.model.named_parameters()))
        assert resumed.numbers.state() == whole.numbers.state()
        for line, other in zip(lines, [line for line in resumed.state.log_history if "loss" in line], strict=True):
            assert {key: line[key] for key in ("step", "loss", "skipped_steps")} == {
                key: other[key] for key in ("step", "loss", "skipped_steps")
            }
        assert (tmp_path / "bad_batches.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_the_first_module_to_go_bad_is_found_and_not_those_that_it_spoils():
    ids = torch.arange(8)[None]

    def found(model):
        return first_bad_module(model, lambda: model(input_ids=ids, labels=ids).loss)

    assert found(tiny_model()) is None
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] = float("inf")
    assert found(model) == BadModule("model.layers.1.mlp.gate_proj", "forward")
    assert bad_weights(model) == ["model.layers.1.mlp.gate_proj.weight"]
    with torch.no_grad():  # each part of the sum is finite, and the sum is not
        model = tiny_model(torch.float16)
        model.model.embed_tokens.weight.fill_(6e4)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp = _Constant(6e4)
    assert found(model) == BadModule("model.layers.0", "forward")
    assert found(model_with_bad_gradient()) == BadModule("model.layers.0.mlp", "backward")
    assert all(weight.grad is None for weight in model.parameters())


class _Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, hidden):
        return torch.full_like(hidden, self.value)


def figures(*, bad_loss=False, bad_gradient=False):
    return StepFigures(1.0, 1.0, 0.0, 100, bad_loss, bad_gradient)


def test_overflows_of_fp16_are_counted_apart_until_its_scale_cannot_be_their_cause():
    watch = NumberWatch(max_bad_steps=0, scaled=True)
    assert watch.take(3, [figures(bad_gradient=True)] * 3) == []
    assert watch.line() == {
        "loss": 1.0,
        "objective": 1.0,
        "router_aux_loss": 0.0,
        "skipped_steps": 0,
        "overflow_steps": 3,
    }
    assert [event.step for event in watch.take(4, [figures(bad_loss=True, bad_gradient=True)])] == [4]
    assert (watch.skipped, watch.too_many) == (1, True)
    steps = OVERFLOWS_IN_A_ROW + 1
    assert [event.step for event in watch.take(4 + steps, [figures(bad_gradient=True)] * steps)] == [4 + steps]
    assert not NumberWatch(max_bad_steps=0).too_many


def test_the_rows_of_a_stream_are_told_by_their_text(tmp_path):
    feed = StreamFeed(stream_of(stream_config(tmp_path)), StepSplit(rows=2, accumulation_steps=2), seed=1, steps=9)
    collate = PackCollator(0)
    recent = RecentSteps(feed, collate)
    texts = []
    for step, (packs, _) in enumerate(islice(feed.marked_steps(), 3), start=1):
        recent.keep(step, [collate(micro) for micro in packs])
        ids = [
            row
            for micro in packs
            for pack in micro
            for row in np.split(pack["input_ids"], pack["lengths"].cumsum()[:-1])
        ]
        texts.append([row.tolist() for row in ids])
    for step in (1, 2, 3):
        batches = recent.of(step)
        documents = [(batch, *document) for batch in batches for document in batch.documents()]
        assert len(documents) == len(texts[step - 1])
        for (batch, ids, labels), row in zip(documents, texts[step - 1], strict=True):
            assert ids.tolist()[: len(row)] == row
            told = excerpt(ids, labels, toy_tokenizer().decode)
            supervised = [int(i) for i, label in zip(ids, labels, strict=True) if label != -100]
            assert toy_tokenizer().decode(supervised).split()[:5] == told.split()[:5]
            assert set(batch.names) == {"a streamed row"}
    assert recent.of(4) == []


def train_poisoned(folder):
    trainer = build(folder, tiny_model(), accumulation=1, callbacks=[Poison()])
    trainer.train()
    weights = plain(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    torch.save((trainer.numbers.skipped, weights), folder / f"rank{trainer.args.process_index}.pt")


def test_a_batch_that_is_bad_in_one_process_is_left_out_by_both(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    launch_processes(train_poisoned, folder)
    model = tiny_model()
    build(tmp_path / "one", model, accumulation=2, callbacks=[Poison()]).train()
    expected = plain(model.named_parameters())
    for rank in (0, 1):
        skipped, weights = torch.load(folder / f"rank{rank}.pt")
        assert skipped == 1
        for name, weight in weights.items():  # sums in another order, over eight steps of Adam
            assert torch.allclose(weight, expected[name], atol=1e-5), name
    (line,), (other,) = lines_of(folder), lines_of(tmp_path / "one")
    assert {key: line[key] for key in ("step", "module", "place", "rows")} == {
        key: other[key] for key in ("step", "module", "place", "rows")
    }
    assert [row["row"] for row in line["rows"]] == [f"rows.jsonl line {POISONED_ROW + 1}"]

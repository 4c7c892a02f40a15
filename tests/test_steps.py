"""Steps are ready when they are asked for, are those of the feed, and leave no thread; none waits for the device."""

import json
import threading
import time
import traceback
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, TrainerCallback

from src.attention import attend_documents, tell_borders
from src.batches import PackFeed, StepSplit
from src.loss import SupervisedLoss
from src.noise import noisy_embeddings
from src.packing import PackCollator, PackedRows
from src.steps import STEPS_AHEAD, ReadySteps
from src.trainer import SFTTrainer
from tests.test_ahead import threads_of_ahead
from tests.test_trainer import (
    LENGTH,
    EvaluationConfig,
    OptimConfig,
    TrackingConfig,
    TrainingConfig,
    tiny_model,
    tiny_tokenizer,
    training_arguments,
    uneven_rows,
)
from utils.errors import UserError
from utils.metrics import Meter

PACKAGES = ("src", "utils", "transformers", "accelerate", "peft", "optim")


def feed_of(split, steps=8):
    return PackFeed(PackedRows(uneven_rows(), max_length=LENGTH, packing=True), split, seed=3, max_steps=steps)


def ready_steps(feed, collate):
    meter = Meter(None, None)
    return ReadySteps(feed, collate, lambda batch: meter.count(batch, 0), device=torch.device("cpu"), pins=False)


def build(folder, model=None, *, steps=6, log_every=1, save_every=None, callbacks=(), optimizer="sgd", **more):
    args = training_arguments(
        folder,
        OptimConfig(name=optimizer, learning_rate=1e-3, schedule="cosine"),
        TrainingConfig(
            max_steps=steps,
            micro_batch_rows=2,
            accumulation_steps=2,
            log_every_steps=log_every,
            save_every_steps=save_every,
            precision="float32",
        ),
        EvaluationConfig(),
        TrackingConfig(),
    )
    packs = PackedRows(uneven_rows(), max_length=LENGTH, packing=True)
    return SFTTrainer(
        model=model or tiny_model(),
        args=args,
        tokenizer=tiny_tokenizer(),
        train_packs=packs,
        callbacks=callbacks,
        **more,
    )


@pytest.mark.parametrize("limit", [{"rows": 3}, {"tokens": 96}])
@pytest.mark.parametrize("first", [0, 5])
def test_steps_are_those_of_the_feed_with_their_counts_and_then_end(limit, first):
    split = StepSplit(**limit, accumulation_steps=2, processes=2, process=1)
    feed, collate = feed_of(split), PackCollator(0)
    feed.go_to(first)
    expected = [collate(packs) for packs in islice(feed, 2 * (8 - first))]
    steps = ready_steps(feed, collate)
    for number, step in enumerate(steps, start=first):
        assert step.mark.step == number + 1
        for batch in step.batches:
            wanted = expected.pop(0)
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted)
        supervised = sum(int((batch["labels"] != -100).sum()) for batch in step.batches)
        assert step.counts.tolist() == [supervised, sum(int((b["input_ids"] != 0).sum()) for b in step.batches)]
    assert expected == []
    steps.close()
    assert threads_of_ahead() == []


def test_making_and_training_a_step_overlap():
    making, training = [], []

    def work(seconds):
        """Seconds that a busy machine made of a tenth."""
        started = time.perf_counter()
        time.sleep(0.1)
        seconds.append(time.perf_counter() - started)

    def slow(packs):
        work(making)
        return PackCollator(0)(packs)

    steps = ready_steps(feed_of(StepSplit(rows=2), steps=8), slow)
    started = time.perf_counter()
    for _ in steps:
        work(training)
    taken = time.perf_counter() - started
    steps.close()
    assert len(making) == len(training) == 8
    # One after the other they take 1.6 s; together 0.9 s, the first step's making being the only one waited for.
    assert taken < 0.8 * (sum(making) + sum(training))


def test_no_more_steps_are_made_than_may_be_held():
    made = []

    def collate(packs):
        made.append(len(made))
        return PackCollator(0)(packs)

    steps = ready_steps(feed_of(StepSplit(rows=2)), collate)
    for taken, _ in enumerate(steps, start=1):
        time.sleep(0.02)
        assert len(made) <= taken + STEPS_AHEAD
    steps.close()


class Stop(TrainerCallback):
    def __init__(self, error=None):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            if self.error:
                raise self.error
            control.should_training_stop = True


def test_no_thread_is_left_after_the_end_an_early_stop_or_an_error(tmp_path):
    before = set(threading.enumerate())
    build(tmp_path, steps=3).train()
    assert threads_of_ahead() == []
    trainer = build(tmp_path, callbacks=[Stop()])
    trainer.train()
    assert trainer.state.global_step == 2
    assert threads_of_ahead() == []
    for error in (UserError("stop here"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            build(tmp_path, callbacks=[Stop(error)]).train()
        assert threads_of_ahead() == []
    assert set(threading.enumerate()) <= before


def test_an_error_of_the_collator_reaches_the_caller_of_train(tmp_path):
    trainer = build(tmp_path)
    collate, made = trainer.data_collator, []

    class Failing(PackCollator):
        def __call__(self, packs):
            made.append(1)
            if len(made) == 7:
                raise UserError("pack 7 cannot be read; remove it")
            return collate(packs)

    trainer.data_collator = Failing(0)
    with pytest.raises(UserError, match="pack 7 cannot be read; remove it"):
        trainer.train()
    assert trainer.state.global_step == 3, "the steps before the error were taken"
    assert threads_of_ahead() == []


def test_tokens_seen_are_exact_in_every_line_every_checkpoint_and_after_a_resume(tmp_path):
    trainer = build(tmp_path, steps=7, log_every=3, save_every=2, keep_checkpoints=9)
    trainer.train()
    feed = PackFeed(trainer.train_dataset, StepSplit(rows=2, accumulation_steps=2), seed=42, max_steps=7)
    # The one token of a pack that fills an epoch's last step is padding.
    micro = [sum(np.count_nonzero(pack["input_ids"]) for pack in packs) for packs in islice(feed, 14)]
    seen = np.cumsum(np.array(micro).reshape(7, 2).sum(axis=1)).tolist()
    lines = {line["step"]: line["tokens"] for line in trainer.state.log_history if "loss" in line}
    assert lines == {step: seen[step - 1] for step in lines}
    assert {1, 3, 6} <= lines.keys()
    for step in (4, 6):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["num_input_tokens_seen"] == seen[step - 1]
    assert trainer.state.num_input_tokens_seen == seen[6]
    resumed = build(tmp_path, steps=7, log_every=3, save_every=5, keep_checkpoints=9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.num_input_tokens_seen == seen[6]


# No step waits for the device


class HostReads(TorchDispatchMode):
    """Records where numbers are read from tensors, or shapes made of what is in them: on a GPU each waits for it.

    What it stands on is half public: `torch.utils._python_dispatch` is documented by torch, and named as private.
    """

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.places = set()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            tensor is not None and tensor.dtype == torch.bool for tensor in args[1]
        )
        if name in self.READS or by_mask:
            frames = [Path(frame.filename) for frame in traceback.extract_stack()]
            stack = zip(frames, traceback.extract_stack(), strict=False)
            places = [f"{path.parent.name}/{path.name}:{frame.name}" for path, frame in stack if _is_of_a_step(path)]
            self.places.add(places[-1] if places else "elsewhere")
        return func(*args, **(kwargs or {}))


def _is_of_a_step(path):
    return any(part in PACKAGES for part in path.parts)


class Recorder(TrainerCallback):
    """Looks at steps 3 to 6 of a run that logs at the first and the eighth, from the end of one to that of another."""

    def __init__(self):
        self.reads = HostReads()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.reads.__enter__()
        if state.global_step == 6:
            self.reads.__exit__(None, None, None)


IN_LIBRARIES = {"transformers/masking_utils.py:find_packed_sequence_indices"}
"""Places outside the project that wait for the device and that no public setting avoids; the list may only shrink. This
one looks, once for each micro-batch, whether some row holds two documents; a compiled model does not."""


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "muon"])
@pytest.mark.parametrize("attention", ["documents", "sdpa"])
def test_a_step_between_two_lines_of_the_log_reads_nothing_from_the_device(tmp_path, optimizer, attention):
    recorder = Recorder()
    score = SupervisedLoss(plain_elements=0, z_loss=1e-4)
    options = {"optimizer": optimizer, "steps": 8, "log_every": 8, "score": score, "neftune_alpha": 5.0}
    options["optim"] = OptimConfig(name=optimizer, learning_rate=1e-3)
    build(tmp_path, tiny_model(attention=attention), callbacks=[recorder], **options).train()
    assert recorder.reads.operations > 1000, "the steps were looked at"
    assert recorder.reads.places == IN_LIBRARIES


def test_the_recorder_sees_what_it_is_to_find():
    values = torch.arange(4)
    for read in (lambda: values[0].item(), lambda: bool(values[0] > 1), values.nonzero, lambda: values[values > 1]):
        with HostReads() as reads:
            read()
        assert reads.places
    with HostReads() as reads:
        values[torch.tensor([1, 2])] + 1
    assert not reads.places


def test_loss_attention_and_noise_read_nothing_where_tensors_have_no_numbers():
    # On the device `meta` reading is an error, and what goes by the kind of device does not take a CPU's way. Under a
    # name without a mask, transformers does not look at positions (IN_LIBRARIES). Torch has no autocast there, which is
    # asked for in float32 and in chunks; the test above looks at these.
    AttentionInterface.register("documents_without_mask", attend_documents)
    model = tiny_model(torch.float64, attention="documents_without_mask")
    host = PackCollator(0, tells_longest=True)([PackedRows(uneven_rows(), max_length=LENGTH, packing=True)[0]])
    score = SupervisedLoss()
    score(model, host)  # learns what the model does to its logits, once a run
    model = model.to("meta")
    batch = {name: part.to("meta") if isinstance(part, torch.Tensor) else part for name, part in host.items()}
    tell_borders(batch["document_borders"], host["document_borders"].tolist())
    with noisy_embeddings(model, batch, 5.0):
        scored = score(model, batch)
    scored.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert scored.nll.shape == host["supervised_places"].shape
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        score(model, batch | {"document_borders": batch["document_borders"].clone()})

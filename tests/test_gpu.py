"""What the other tests show on a CPU holds on a GPU, in float32 and under bf16 autocast, with its kernels.

pytest -m gpu tests/test_gpu.py                       on a machine with a CUDA device
GPU_TESTS_ON_CPU=1 pytest -m gpu tests/test_gpu.py    the same checks on a CPU, but for those of GPU memory
"""

import contextlib
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from config.schema import AdapterConfig
from src.activations import offload_activations, recompute_activations
from src.adapters import add_adapter
from src.attention_choice import check_documents_apart
from src.loss import SupervisedLoss, supervised_nll
from src.packing import IGNORED, PackCollator, PackedRows
from tests.gpu_runs import (
    DEVICE,
    HAS_GPU,
    LENGTH,
    ON_GPU,
    Steps,
    autocast,
    build,
    difference,
    full_float32,  # noqa: F401  pytest finds it here
    launch,
    losses_of,
    nf4_model,
    peak_memory,
    reference,
    run,
    small_model,
    uneven_rows,
    weights_of,
)

pytestmark = ON_GPU


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rows_by_accumulation_changes_neither_losses_nor_weights(tmp_path, precision):
    # With SGD a step is the gradient itself. Six steps change the weights by 1.6e-2 of their norm. In bf16 a product of
    # another shape rounds sums in another order: losses differed by 1e-3 and weights by 3e-4 on a CPU.
    bound, loss_bound = {"float32": (1e-5, 1e-5), "bf16": (1e-3, 4e-3)}[precision]
    options = {"packing": False, "optimizer": "sgd", "rate": 0.1, "precision": precision}
    runs = [run(tmp_path, small_model(), micro=m, accumulation=8 // m, **options) for m in (8, 4, 1)]
    for (trainer, losses), (other, other_losses) in itertools.pairwise(runs):
        assert len(losses) == 6
        np.testing.assert_allclose(losses, other_losses, rtol=loss_bound)
        assert difference(weights_of(trainer.model), weights_of(other.model)) <= bound
    assert difference(weights_of(runs[0][0].model), weights_of(small_model())) > 10 * bound


def test_bf16_autocast_multiplies_in_bf16_and_keeps_weights_and_state_in_float32(tmp_path):
    seen = []
    model = small_model()
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    trainer = build(tmp_path, model, precision="bf16", steps=30)
    trainer.train()
    # The probe of packs and 30 steps of 2 micro-batches: none in another format.
    assert len(seen) >= 60
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    assert len(states) == 2 * len(list(model.parameters()))
    assert {(value.dtype, value.device.type) for value in states} == {(torch.float32, DEVICE.type)}
    losses = losses_of(trainer)
    assert losses[0] > 5
    assert losses[-1] < 0.8 * losses[0]


def test_adamw_is_fused_and_steps_as_written_out_by_hand(tmp_path):
    model = small_model()
    before = [parameter.detach().double().clone() for parameter in model.parameters()]
    rows = uneven_rows(8)
    _, gradient = reference(rows)
    trainer = build(tmp_path, model, rows=rows, packing=False, micro=4, steps=1)
    trainer.train()
    options = trainer.optimizer.param_groups[0]
    assert options["fused"] is True
    # Adam's first step from zero state is the gradient over its absolute value, but for eps: arXiv:1412.6980.
    start = 0
    for parameter, old in zip(model.parameters(), before, strict=True):
        own = gradient[start : start + old.numel()].view_as(old)
        start += old.numel()
        clear = own.abs() > 1e-4  # where float32's error of the gradient is far below it
        expected = old - 1e-3 * own / (own.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double().cpu()[clear], expected[clear], rtol=0, atol=1e-6)
        assert clear.any()


def test_gradient_checkpointing_computes_twice_and_changes_nothing(tmp_path):
    found = {}
    for kind in ("none", "full", "selective"):
        calls = []
        model = small_model(num_hidden_layers=6)
        if kind != "none":
            recompute_activations(model, kind)
        trainer = build(tmp_path, model, packing=False, optimizer="sgd", rate=0.1, steps=3, micro=4)
        # On entry: what is computed again ends with the last number that the backward pass needs, before the exit.
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda layer, _, calls=calls: calls.append(1) if layer.training else None  # not when the loss is proved
        )
        trainer.train()
        found[kind] = (len(calls), losses_of(trainer), weights_of(model))
    calls, losses, weights = found.pop("none")
    assert calls == 3 * 2
    for again_calls, again_losses, again_weights in found.values():
        assert again_calls == 2 * calls
        np.testing.assert_allclose(again_losses, losses, rtol=1e-6)
        assert difference(again_weights, weights) <= 1e-6


def activation_peak(kind, *, offload=False):
    """Most bytes that a forward and a backward pass take beside weights and gradients."""
    # Of each token and layer some 3,000 numbers are kept: 4,096 x 6 x 3,000 x 4 bytes = 295 MB, or those of one layer,
    # 49 MB, with the 6 x 2 MB that enter the layers.
    model = small_model(num_hidden_layers=6, max_position_embeddings=1024).to(DEVICE)
    if kind != "none":
        recompute_activations(model, kind)
    waiting = offload_activations(model) if offload else contextlib.nullcontext()
    ids = torch.randint(3, 256, (4, 1024), device=DEVICE)
    places = torch.arange(1024, device=DEVICE).expand_as(ids)
    batch = {"input_ids": ids, "labels": ids, "position_ids": places}

    def work():
        with waiting:
            supervised_nll(model, batch)[0].sum().backward()

    work()  # gradients exist, and kernels have their workspaces
    return peak_memory(work)


@pytest.mark.skipif(not HAS_GPU, reason="memory is counted by the CUDA allocator")
def test_gradient_checkpointing_keeps_a_fraction_of_the_activations():
    peaks = {kind: activation_peak(kind) for kind in ("none", "selective", "full")}
    assert peaks["none"] > 100 * 2**20
    assert peaks["full"] < 0.5 * peaks["none"]
    assert peaks["full"] < peaks["selective"] < peaks["none"]


@pytest.mark.skipif(not HAS_GPU, reason="memory is counted by the CUDA allocator")
def test_offloaded_activations_leave_the_device():
    # The five tensors that were copied last may still be there; one of 4,096 x 256 numbers is 4 MB.
    assert activation_peak("none", offload=True) < 0.5 * activation_peak("none")
    assert activation_peak("full", offload=True) < activation_peak("full")


@pytest.mark.skipif(not HAS_GPU, reason="activations are offloaded from a GPU")
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
def test_offloaded_activations_come_back_as_they_were(tmp_path, kind, precision, lora):
    # Copies change no bit; backward passes add up with atomics, in an order of their own.
    bound = {"float32": 1e-5, "bf16": 1e-3}[precision]
    found = []
    for offload in (False, True):
        model = small_model(attention="documents", attention_dropout=0.1)
        if kind != "none":
            recompute_activations(model, kind)
        if lora:
            torch.manual_seed(4)
            model = add_adapter(model, AdapterConfig(kind="lora", rank=8, dropout=0.1))
        torch.manual_seed(5)
        options = {"optimizer": "sgd", "rate": 0.1, "precision": precision, "offload": offload}
        trainer, losses = run(tmp_path, model, **options)
        found.append((losses, weights_of(trainer.model)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=bound)
    assert difference(found[1][1], found[0][1]) <= bound


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_attention_in_documents_is_kept_or_computed_again_under_bf16(tmp_path, kind):
    # Its kernel adds up the gradients of queries with atomics, at bf16's 8 bits.
    found = []
    for recomputes in (False, True):
        model = small_model(attention="documents")
        if recomputes:
            recompute_activations(model, kind)
        trainer, losses = run(tmp_path, model, optimizer="sgd", rate=0.1, precision="bf16")
        found.append((losses, weights_of(trainer.model)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-3)
    assert difference(found[1][1], found[0][1]) <= 1e-3


def adapter_weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "lora_" in name}


def base_weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "lora_" not in name}


def check_only_the_adapter_learns(trainer):
    """Train, and see which weights changed; the last loss is far below the first."""
    base, adapter = base_weights(trainer.model), adapter_weights(trainer.model)
    assert len(adapter) == 2 * 7 * 3  # A and B, beside seven products, in three layers
    trainer.train()
    losses = losses_of(trainer)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_weights(trainer.model).items())
    changed = [
        name for name, tensor in adapter_weights(trainer.model).items() if not torch.equal(tensor, adapter[name])
    ]
    assert changed == list(adapter)
    assert {tensor.device.type for tensor in trainer.model.parameters()} == {DEVICE.type}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_lora_changes_its_own_weights_alone(tmp_path, precision):
    model = add_adapter(small_model(), AdapterConfig(kind="lora", rank=8))
    check_only_the_adapter_learns(build(tmp_path, model, precision=precision, rate=1e-2, steps=30))


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
def test_lora_beside_nf4_weights_changes_its_own_weights_alone(tmp_path, kind):
    model = nf4_model(tmp_path, pytest.importorskip("bitsandbytes"))
    if kind != "none":
        recompute_activations(model, kind)
    model = add_adapter(model, AdapterConfig(kind="lora", rank=8))
    check_only_the_adapter_learns(build(tmp_path, model, precision="bf16", rate=1e-2, steps=30))


def adapter_gradient(model, batch):
    """Gradient of the summed loss for LoRA matrices that are all drawn anew, so that none is zero."""
    model = add_adapter(model, AdapterConfig(kind="lora", rank=8))
    torch.manual_seed(1)
    for parameter in adapter_weights_of(model):
        parameter.data.copy_(0.05 * torch.randn(parameter.shape))
    model.train()
    with autocast("bf16"):
        nll, _ = supervised_nll(model, batch)
    nll.sum().backward()
    return torch.cat([parameter.grad.flatten().double().cpu() for parameter in adapter_weights_of(model)])


def adapter_weights_of(model):
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def test_the_gradient_through_nf4_weights_is_that_through_the_numbers_they_stand_for(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = nf4_model(tmp_path, bitsandbytes)
    plain = small_model().to(device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weight)
    check_documents_apart(quantized)  # as in a run: a forward pass that trains nothing comes first
    packs = PackedRows(uneven_rows(), max_length=LENGTH, packing=True)
    batch = {name: tensor.to(DEVICE) for name, tensor in PackCollator(0)([packs[0], packs[1]]).items()}
    expected = adapter_gradient(plain, batch)
    # Equal numbers in equal products; kernels that unpack as they go round sums in another order, at bf16's 8 bits.
    assert difference(adapter_gradient(quantized, batch), expected) <= 0.05
    assert expected.norm() > 0


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(tmp_path):
    # Attention's dropout draws from the device's random state, which a checkpoint must bring back. Backward passes add
    # up with atomics, in an order of their own: float32's rounding, some 1e-7 a step.
    def model():
        return small_model(attention_dropout=0.2)

    whole, losses = run(tmp_path / "run", model(), steps=10, save_every=5)
    steps = Steps()
    resumed = build(tmp_path / "run", model(), steps=10, save_every=5, callbacks=[steps])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert (steps.taken, resumed.state.global_step) == (5, 10)
    np.testing.assert_allclose(losses_of(resumed), losses, rtol=1e-5)
    assert difference(weights_of(resumed.model), weights_of(whole.model)) <= 1e-5
    # Another random state, and nothing else, is enough to be told apart.
    other = build(tmp_path / "other", model(), steps=10)
    torch.manual_seed(1)
    other.train()
    assert difference(weights_of(other.model), weights_of(whole.model)) > 1e-4


@pytest.mark.parametrize("supervised_share", [1.0, 0.05])
def test_logits_are_never_stored_whole(supervised_share):
    # All logits in float32: 4,096 x 64,000 x 4 bytes = 1,049 MB, several of which a plain backward holds.
    length, vocabulary = 4096, 64000
    model = small_model(vocab_size=vocabulary, num_hidden_layers=1, max_position_embeddings=length).to(DEVICE)
    ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    labels = torch.where(
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < supervised_share, ids, IGNORED
    )
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None]}
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    peaks = {}
    for elements in (0, 2**40):
        score = SupervisedLoss(plain_elements=elements)

        def work(score=score):
            with autocast("bf16"):
                scored = score(model, batch)
            scored.total.backward()
            assert bool(torch.isfinite(scored.nll).all())

        model.zero_grad(set_to_none=False)
        work()  # gradients exist, and kernels have their workspaces
        peaks[elements] = peak_memory(work)
    if HAS_GPU and supervised_share == 1.0:
        logits = 4 * length * vocabulary
        assert peaks[2**40] > 1.5 * logits  # so that the comparison is about logits
        assert peaks[0] < peaks[2**40] - logits


class WarnOfWaits(TrainerCallback):
    """From the end of step 2 to that of step 6, has torch warn where the process waits for the device."""

    def on_step_end(self, args, state, control, **kwargs):
        if HAS_GPU and state.global_step in (2, 6):
            torch.cuda.set_sync_debug_mode("warn" if state.global_step == 2 else "default")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_step_between_two_lines_of_the_log_waits_for_the_device_in_transformers_alone(tmp_path, precision, adapter):
    model = add_adapter(small_model(attention="documents"), AdapterConfig(kind=adapter, rank=8))
    options = {"precision": precision, "steps": 8, "log_every": 8}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer, losses = run(tmp_path, model, callbacks=[WarnOfWaits()], **options)
        finally:
            if HAS_GPU:
                torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 2
    assert trainer.state.num_input_tokens_seen > 0
    # Whether rows hold several documents, once a micro-batch: IN_LIBRARIES of tests/test_steps.py.
    waits = {Path(one.filename).name for one in told if "synchroniz" in str(one.message)}
    assert waits <= {"masking_utils.py"}


def test_a_run_from_scratch_learns_under_bf16_autocast(tmp_path):
    losses, folder = launch(tmp_path / "gpu", "--training.max_steps", "60", "--training.precision", "bf16")
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert (folder / "model" / "model.safetensors").is_file()
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 60
    if HAS_GPU:
        assert result["peak_memory"]["cuda_mib"] > 1
        assert json.loads((folder / "environment.json").read_text(encoding="utf-8"))["hardware"]["gpus"]


def test_a_float32_run_has_the_losses_that_it_has_on_the_cpu(tmp_path):
    options = ("--training.max_steps", "12", "--training.precision", "float32")
    losses, folder = launch(tmp_path / "gpu", *options)
    cpu_losses, cpu_folder = launch(tmp_path / "cpu", *options, CUDA_VISIBLE_DEVICES="")
    assert len(losses) == 12
    # Adam divides by the gradient's own size, so that rounding of small ones grows from 1e-7 over the steps.
    np.testing.assert_allclose(losses, cpu_losses, rtol=1e-4)
    gpus = [
        "gpus" in json.loads((path / "environment.json").read_text(encoding="utf-8"))["hardware"]
        for path in (folder, cpu_folder)
    ]
    assert gpus == [HAS_GPU, False]

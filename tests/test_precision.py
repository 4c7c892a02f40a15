import json
import logging

import pytest
import torch
from transformers import TrainerCallback

from config.schema import AdapterConfig, OptimConfig
from src.adapters import add_adapter
from src.precision import Precision, lost_share, warn_of_lost_updates
from tests.gpu_runs import build, small_model
from tests.tiny_run import from_checkpoint, run_train, weights_of, write_checkpoint, write_recipe


class Formats(TrainerCallback):
    """Formats of the gradients that each step is taken with."""

    def __init__(self):
        self.gradients = set()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients |= {weight.grad.dtype for weight in model.parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("dtype", "precision", "whole"),
    [
        (torch.bfloat16, "float32", "8 bytes a trained parameter: weight 2 + gradient 2 + optimizer state 4"),
        (torch.float32, "bf16", "16 bytes a trained parameter: weight 4 + gradient 4 + optimizer state 8"),
    ],
)
def test_weights_gradients_and_state_are_held_in_the_stated_format(tmp_path, dtype, precision, whole):
    model, formats = small_model().to(dtype), Formats()
    autocast = torch.bfloat16 if precision == "bf16" else None
    said = Precision.of(model, autocast=autocast, optim=OptimConfig()).told()
    name = str(dtype).removeprefix("torch.")
    products = "bfloat16 (autocast)" if autocast else "the format of their weights"
    assert said == f"{name} weights train, matrix products in {products}; {whole}"
    trainer = build(tmp_path, model, precision=precision, steps=3, callbacks=[formats])
    trainer.train()
    assert formats.gradients == {parameter.dtype for parameter in model.parameters()} == {dtype}
    state = [value for own in trainer.optimizer.state.values() for value in own.values() if value.dim()]
    assert {value.dtype for value in state} == {dtype}
    numbers = sum(parameter.numel() for parameter in model.parameters())
    taken = sum(2 * parameter.nbytes for parameter in model.parameters()) + sum(value.nbytes for value in state)
    assert f"{taken / numbers:g} bytes" in said


def test_an_adapter_beside_bfloat16_weights_trains_in_float32_and_is_not_warned_of(caplog):
    model = add_adapter(small_model().to(torch.bfloat16), AdapterConfig(kind="lora", rank=4))
    optim = OptimConfig(name="adamw_8bit", learning_rate=1e-6)
    said = Precision.of(model, autocast=torch.bfloat16, optim=optim).told()
    assert said == (
        "float32 weights train, matrix products in bfloat16 (autocast); bytes a trained parameter: weight 4 + gradient "
        "4 + the state of adamw_8bit; frozen weights in bfloat16, 2 bytes each"
    )
    warn_of_lost_updates(model, optim)
    assert lost_share(model, 1e-6) == 0
    assert caplog.text == ""


def test_four_bit_weights_take_half_a_byte():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    model = torch.nn.Sequential(layer, torch.nn.Linear(64, 1))
    precision = Precision.of(model, autocast=None, optim=OptimConfig())
    assert (precision.frozen, precision.frozen_bytes, precision.trained) == ("nf4", 0.5, "float32")


def test_a_change_of_half_a_spacing_is_rounded_away():
    # Between 1 and 2 bfloat16's numbers are 2^-7 apart; a tie goes to the even one, which 1 is.
    model = torch.nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    model.weight.data = torch.tensor([[1.0, 1.5, 0.25, 0.0]], dtype=torch.bfloat16)
    assert lost_share(model, 2**-8) == 0.5
    assert lost_share(model, 1.01 * 2**-8) == 0
    assert lost_share(model, 2**-10) == 0.75
    assert lost_share(model.float(), 2**-10) == 0


def test_a_small_rate_is_warned_of_in_bfloat16_alone(caplog):
    # Weights of a normal distribution of 0.1: at 1e-5 all above 512e-5 = 0.0051 stay as they are, which 95.9 % are, and
    # none below 256e-5 = 0.0026, above which 98.0 % are.
    model = small_model()
    optim = OptimConfig(learning_rate=1e-5)
    warn_of_lost_updates(model, optim)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        warn_of_lost_updates(model.to(torch.bfloat16), optim)
    assert 0.959 < lost_share(model, 1e-5) < 0.98
    assert "updates of 97 % of the trained weights are rounded away" in caplog.text
    assert "0.0051 (512 x the rate)" in caplog.text
    assert "model.dtype=float32 with training.precision=bf16" in caplog.text


def test_a_run_in_bfloat16_says_so_at_its_start_and_in_its_card(tmp_path):
    model = from_checkpoint(write_checkpoint(tmp_path / "base"), dtype="bfloat16")
    done = run_train("--config", write_recipe(tmp_path, model=model, optim={"learning_rate": 1e-5}))
    assert done.code == 0, done.stderr
    said = "bfloat16 weights train, matrix products in the format of their weights; 8 bytes a trained parameter"
    assert f"precision: {said}" in done.stderr
    assert "are rounded away: bfloat16 keeps 8 bits" in done.stderr
    run = tmp_path / "outputs" / "run"
    assert json.loads((run / "result.json").read_text())["precision"].startswith(said)
    assert f"| precision | {said}: weight 2" in (run / "README.md").read_text()
    assert {tensor.dtype for tensor in weights_of(run / "model").values()} == {torch.bfloat16}

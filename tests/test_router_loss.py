"""The routers' auxiliary loss is what transformers' own models add; padding and empty micro-batches are not in it."""

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from src.activations import recompute_activations
from src.compilation import compile_layers
from src.loss import SupervisedLoss
from src.packing import PackCollator
from src.router_loss import RouterLoss
from tests.gpu_runs import DEVICE, ON_GPU, autocast
from tests.processes import start_processes
from tests.test_loss import VOCABULARY, assert_equal_gradients, batch_of, gradients, wrapped
from tests.test_trainer import train, uneven_rows
from tests.tiny_run import ARCHITECTURE, metrics_of, run_train, write_recipe
from utils.distributed import leave_group
from utils.errors import UserError

ROUTED = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "jamba": {
        "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
        "attn_layer_offset": 0, "use_mamba_kernels": False, "mamba_dt_rank": 4, "mamba_d_state": 4,
    },
}  # fmt: skip
WEIGHT = 0.5


def routed(name="mixtral", **changes):
    """A tiny model of experts, some of whose layers may have none."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
        "router_aux_loss_coef": WEIGHT,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(sizes | ROUTED.get(name, {}) | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def own_loss(model, batch, **more):
    """Of transformers: mean negative log-likelihood and the auxiliary loss, weighted as the config says."""
    given = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    return model(**given, **more, use_cache=False, output_router_logits=True)


@pytest.mark.parametrize("plain_elements", [0, 2**30])
@pytest.mark.parametrize("name", ROUTED)
def test_a_micro_batch_has_the_loss_and_gradient_of_transformers(name, plain_elements):
    model, batch = routed(name), batch_of()
    if not own_loss(model, batch | {"labels": None}).router_logits:  # with labels, the model itself would fail
        pytest.skip(f"this version of transformers tells no router logits of {name}, and adds no such loss itself")
    own = own_loss(model, batch)
    score = SupervisedLoss(plain_elements=plain_elements)
    scored = score(model, batch)
    assert score.chunks
    assert score.router.weight == WEIGHT
    torch.testing.assert_close(scored.router, own.aux_loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(scored.total / len(scored.nll), own.loss, rtol=1e-5, atol=0)
    found = gradients(model, scored.total / len(scored.nll))
    # Float32, whose sums run in another order.
    assert_equal_gradients(found, gradients(model, own_loss(model, batch).loss), 5e-5)
    router = next(tensor for key, tensor in found.items() if "gate.weight" in key or "router" in key)
    assert router.abs().max() > 0


def packs(*lengths):
    random = np.random.default_rng(0)
    for length in lengths:
        ids = random.integers(3, VOCABULARY, size=length)
        yield {"input_ids": ids, "labels": np.where(np.arange(length) > 0, ids, -100), "lengths": np.array([length])}


def test_padding_is_not_routed_for():
    model, lengths = routed(), (20, 5, 9)
    batch = PackCollator(0)(list(packs(*lengths)))
    scored = SupervisedLoss()(model, batch)
    mask = torch.tensor([[1] * length + [0] * (20 - length) for length in lengths])
    own = own_loss(model, batch, attention_mask=mask)
    torch.testing.assert_close(scored.router, own.aux_loss.detach(), rtol=1e-5, atol=0)
    assert abs(scored.router - own_loss(model, batch).aux_loss) > 1e-3  # padding would be seen


def test_a_micro_batch_of_nothing_supervised_adds_nothing():
    model = routed()
    scored = SupervisedLoss()(model, batch_of(supervised=0.0))
    assert scored.total.item() == 0
    assert all(tensor.abs().max() == 0 for tensor in gradients(model, scored.total).values())


@pytest.mark.parametrize("plain_elements", [0, 2**30])
def test_a_weight_of_zero_changes_nothing(plain_elements):
    model, batch = routed(), batch_of()
    plain = routed(router_aux_loss_coef=0.0)
    scored = SupervisedLoss(router_aux_loss=0.0, plain_elements=plain_elements)(model, batch)
    other = SupervisedLoss(plain_elements=plain_elements)(plain, batch)
    assert (scored.router, other.router) == (None, None)
    assert scored.total.equal(other.total)
    assert scored.total.detach().isclose(scored.nll.sum())
    found, expected = gradients(model, scored.total), gradients(plain, other.total)
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())


def test_a_given_weight_takes_the_place_of_the_models_own():
    model, batch = routed(), batch_of()
    scored = SupervisedLoss(router_aux_loss=2.0)(model, batch)
    expected = scored.nll.sum() + 2.0 * scored.router * len(scored.nll)
    torch.testing.assert_close(scored.total.detach(), expected, rtol=1e-6, atol=0)


def test_nothing_is_added_where_no_gradient_is_asked_for():
    model, batch = routed(), batch_of()
    with torch.no_grad():
        scored = SupervisedLoss()(model, batch)
    assert scored.router is None
    torch.testing.assert_close(scored.total, scored.nll.sum())


def test_a_model_whose_own_loss_is_another_one_is_refused(monkeypatch):
    model = routed()
    monkeypatch.setattr(RouterLoss, "of_output", lambda *_: torch.tensor(7.0))
    with pytest.raises(UserError, match=r"computes another auxiliary loss of its routers .*router_aux_loss=0"):
        SupervisedLoss()(model, batch_of())


@ON_GPU[0]
@ON_GPU[1]
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_micro_batch_has_the_loss_of_transformers_on_a_gpu(name, precision):
    model, batch = routed(name).to(DEVICE), {key: tensor.to(DEVICE) for key, tensor in batch_of().items()}
    with autocast(precision):
        scored, own = SupervisedLoss()(model, batch), own_loss(model, batch)
    # Both have the routers' logits of one computation, and sum in float32; other products have 8 bits in bf16.
    torch.testing.assert_close(scored.router, own.aux_loss.detach(), rtol=1e-4, atol=0)
    bound = {"float32": 1e-4, "bf16": 1e-2}[precision]
    torch.testing.assert_close(scored.total / len(scored.nll), own.loss, rtol=bound, atol=0, check_dtype=False)
    scored.total.backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in model.parameters() if tensor.grad is not None)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradients(kind):
    model, batch = routed(), batch_of()
    expected = gradients(model, own_loss(model, batch).loss)
    recompute_activations(model, kind)
    scored = SupervisedLoss(plain_elements=0)(model, batch)
    assert_equal_gradients(gradients(model, scored.total / len(scored.nll)), expected, 5e-5)


@pytest.mark.slow
def test_compiled_layers_tell_their_routers_too():
    model, batch = routed(), batch_of()
    expected = gradients(model, own_loss(model, batch).loss)
    score = SupervisedLoss(plain_elements=0)
    compile_layers(model, backend="eager")
    scored = score(model, batch)
    assert_equal_gradients(gradients(model, scored.total / len(scored.nll)), expected, 5e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_micro_batches_count_by_their_supervised_tokens_and_are_logged_apart(tmp_path, accumulation):
    rows, model = uneven_rows(accumulation), routed()
    reference = routed()
    losses = torch.zeros(3, dtype=torch.float64)
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        tokens = int((labels != -100).sum())
        own = reference(input_ids=ids, labels=labels, output_router_logits=True)
        own.loss.mul(tokens).backward()
        losses += torch.tensor([own.loss.item() * tokens, own.aux_loss.item() * tokens, tokens])
    objective, auxiliary = (losses[:2] / losses[2]).tolist()
    trainer, told = train(tmp_path, model, rows, accumulation=accumulation, steps=1)
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["objective"] == pytest.approx(objective, rel=1e-5)
    assert line["router_aux_loss"] == pytest.approx(auxiliary, rel=1e-5)
    assert line["loss"] == told[0] == pytest.approx(objective - WEIGHT * auxiliary, rel=1e-5)
    steps = {name: tensor.detach() for name, tensor in trainer.model.named_parameters()}
    for name, tensor in reference.named_parameters():  # one step of plain gradient descent at a rate of 0.1
        expected = tensor.detach() - 0.1 * tensor.grad / losses[2].item()
        torch.testing.assert_close(steps[name], expected, rtol=1e-4, atol=1e-5)


def test_a_run_with_a_weight_for_routers_that_are_not_there_does_not_start(tmp_path):
    recipe = write_recipe(tmp_path, training={"router_aux_loss": 0.01})
    done = run_train("--config", recipe)
    assert done.code == 2
    assert "training.router_aux_loss=0.01 is given, and LlamaForCausalLM has no routers" in done.stderr


class Untold(MixtralForCausalLM):
    """Collects no router logits, as Granite's models of experts in transformers 5.17."""

    def forward(self, *args, output_router_logits=None, **kwargs):
        return super().forward(*args, output_router_logits=False, **kwargs)


def test_a_weight_for_routers_whose_logits_are_not_told_is_refused():
    model, batch = Untold(routed().config), batch_of()
    assert SupervisedLoss()(model, batch).router is None
    with pytest.raises(UserError, match=r"router_aux_loss=0.01 is given, and Untold tells no router logits.*leave it"):
        SupervisedLoss(router_aux_loss=0.01)(model, batch)


def test_a_run_tells_the_routers_loss(tmp_path):
    architecture = ARCHITECTURE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    recipe = write_recipe(
        tmp_path, model={"architecture": architecture}, training={"max_steps": 2, "router_aux_loss": 0.25}
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    lines = [line for line in metrics_of(tmp_path / "outputs" / "run") if "loss" in line]
    for line in lines:
        assert 2 <= line["router_aux_loss"] <= 4  # between even shares, which give K, and the same K for all tokens
        assert line["objective"] == pytest.approx(line["loss"] + 0.25 * line["router_aux_loss"], rel=1e-6)
    assert "the routers' auxiliary loss is added 0.25 times" in done.stderr


# Wrapped models: each of two processes scores a row of its own.


def process_of_two(rank, address):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    rows = [batch_of(rows=1), batch_of(rows=1, seed=1, supervised=0.2)]
    tokens = [int((row["labels"] != -100).sum()) for row in rows]
    for kind in ("ddp", "head alone"):
        model = routed().eval()
        own = sum(own_loss(model, row).loss * count for row, count in zip(rows, tokens, strict=True))
        expected = gradients(model, own)
        model.zero_grad()
        score, outer = SupervisedLoss(plain_elements=0), wrapped(kind, model, mesh)
        (2 * score(outer, rows[rank]).total).backward()  # their gradients are averaged
        found = {
            name.removeprefix("module."): tensor.grad.full_tensor() if isinstance(tensor.grad, DTensor) else tensor.grad
            for name, tensor in model.named_parameters()
        }
        try:
            assert_equal_gradients(found, expected, 5e-5)
        except AssertionError as error:
            raise AssertionError(kind) from error
    leave_group()


def test_wrapped_and_sharded_models_get_the_gradients_of_one_process(tmp_path):
    start_processes(process_of_two, f"file://{tmp_path}/meeting")

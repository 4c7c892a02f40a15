"""What does not train costs a step nothing that it need not: no product, no second computation, no cast.

Shapes: N tokens in a batch, all but the first supervised; H the model's width, M that within its MLP, V tokens in the
vocabulary, R the adapter's rank.
"""

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from config.schema import AdapterConfig
from src.activations import recompute_activations
from src.adapters import add_adapter, casts_left_to_autocast, layers_without_dropout
from src.loss import SupervisedLoss
from src.noise import noisy_embeddings
from tests.gpu_runs import build, small_model
from utils.distributed import leave_group

N, H, M, V, R, LAYERS, KEYS = 24, 32, 96, 80, 4, 4, 16
LAST_DOWN = ("layers.3.mlp.down_proj",)
SUPERVISED = N - 1


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=M, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # its products are counted as any
    return model


def adapted(targets, *, recompute=False):
    model = llama()
    if recompute:
        recompute_activations(model)
    model = add_adapter(model, AdapterConfig(kind="lora", rank=R, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch():
    ids = torch.randint(3, V, (1, N), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100
    places = torch.arange(N)[None]
    return {
        "input_ids": ids, "labels": labels, "position_ids": places, "document_borders": torch.tensor([0, N]),
    }  # fmt: skip


def weight_products(counter):
    """Operations of products with weights; attention's own are batched."""
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def backward_operations(model, *, alpha=None, elements=2**40):
    """Operations of products with weights in the backward pass of a step; with whole logits, the head's too."""
    score, rows = SupervisedLoss(plain_elements=elements), batch()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    score(model, rows)  # asks the model
    with noisy_embeddings(inner, rows, alpha):
        total = score(model, rows).total
    with FlopCounterMode(display=False) as counter:
        total.backward()
    return weight_products(counter)


# By hand, 2 operations a token and weight: through the head to the hidden states, then the two gradients of B (its
# weight's and its input's) and that of A's weight. Nothing else asks: not the head's weight, nor A's input.
HEAD = 2 * SUPERVISED * V * H
BY_HAND = HEAD + 4 * N * R * H + 2 * N * M * R


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_the_backward_pass_ends_at_the_lowest_layer_that_trains(alpha):
    assert backward_operations(adapted(LAST_DOWN), alpha=alpha) == BY_HAND


def test_it_ends_there_also_when_the_loss_is_made_in_chunks():
    assert backward_operations(adapted(LAST_DOWN), elements=0) == BY_HAND - HEAD  # done with the loss


def test_it_ends_there_also_when_a_head_trains_with_the_layer():
    # The head's own adapter: the two of its B and A, of which A's input leads to the layer below, as the base does.
    head = 4 * SUPERVISED * R * V + 4 * SUPERVISED * R * H
    assert backward_operations(adapted((*LAST_DOWN, "lm_head"))) == BY_HAND + head


def test_it_ends_there_also_in_a_process_of_several(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert backward_operations(DistributedDataParallel(adapted(LAST_DOWN))) == BY_HAND
    finally:
        leave_group()


def test_recomputing_leaves_out_the_layers_below_the_lowest_that_trains():
    # The last layer again, up to the last number that its backward pass needs, A's product: q and o are H x H, k and v
    # H x KEYS, gate and up H x I; the base's product beside A comes before it.
    again = 2 * N * (2 * H * H + 2 * H * KEYS + 3 * H * M) + 2 * N * M * R
    assert backward_operations(adapted(LAST_DOWN, recompute=True)) == BY_HAND + again


def test_frozen_weights_get_no_gradient_and_no_product_for_one():
    model = adapted(("all-linear",))
    linear = LAYERS * (2 * H * H + 2 * H * KEYS + 3 * H * M)
    ranks = LAYERS * R * (2 * (H + H) + 2 * (H + KEYS) + 3 * (H + M))
    # Below the first layer nothing trains: its q, k and v pass no gradient on, nor do the A beside them.
    first = H * H + 2 * H * KEYS + 3 * H * R
    found = backward_operations(model)
    assert found == HEAD + 2 * N * linear + 4 * N * ranks - 2 * N * first
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora_" not in name)


COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten.contiguous}


class Copies(TorchDispatchMode):
    """Counts casts and copies, and the numbers in them."""

    def __init__(self):
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in COPIES:
            self.calls += 1
            self.numbers += out.numel()
        return out


def step_of(model, *, spared=True):
    """Casts and copies of a micro-batch's two passes under bf16 autocast; the loss and every gradient."""
    score, rows = SupervisedLoss(plain_elements=0), batch()
    left = casts_left_to_autocast(layers_without_dropout(model)) if spared else contextlib.nullcontext()
    with left:
        with torch.autocast("cpu", torch.bfloat16):
            score(model, rows)  # asks the model
        with Copies() as copies:
            with torch.autocast("cpu", torch.bfloat16):
                total = score(model, rows).total
            total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return copies, [total.detach(), *gradients]


def half_adapted(*, recompute=False, dropout=0.0):
    """Every linear layer with an adapter, beside weights in bfloat16."""
    model = llama().to(torch.bfloat16)
    if recompute:
        recompute_activations(model)
    model = add_adapter(model, AdapterConfig(kind="lora", rank=R, dropout=dropout)).train()
    torch.manual_seed(1)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("recompute", [False, True])
def test_an_adapters_input_is_not_cast_there_and_back_and_no_number_changes(recompute):
    found = {spared: step_of(half_adapted(recompute=recompute), spared=spared) for spared in (False, True)}
    assert all(torch.equal(one, other) for one, other in zip(found[True][1], found[False][1], strict=True))
    # Up and down again for each of 7 layers forward; as many backward, but for q, k and v of the first layer, below
    # which nothing trains.
    least = 2 * 7 * LAYERS + 2 * (7 * LAYERS - 3)
    assert found[False][0].calls - found[True][0].calls >= least


def test_dropout_stays_in_the_format_of_the_adapter():
    model = half_adapted(dropout=0.3)
    assert layers_without_dropout(model) == []
    assert len(layers_without_dropout(half_adapted())) == 7 * LAYERS


def test_peft_casts_again_after_a_step_also_after_an_error():
    model = half_adapted()
    layers = layers_without_dropout(model)

    def fail():
        with casts_left_to_autocast(layers):
            assert not any(layer.cast_input_dtype_enabled for layer in layers)
            raise KeyError("step")

    with pytest.raises(KeyError, match="step"):
        fail()
    assert all(layer.cast_input_dtype_enabled for layer in layers)


def test_casts_and_copies_of_an_adapters_step_only_become_fewer():
    copies, _ = step_of(half_adapted())
    # A and B of each layer, and their gradients: float32 weights in bfloat16 products.
    weights = 4 * 7 * LAYERS
    # Each norm computes in float32, with bfloat16 before it and after it; below the first nothing trains.
    norms = 2 * (2 * LAYERS + 1) + 2 * 2 * LAYERS
    rest = 51  # attention's softmax and layouts, rotary angles, the loss in float32
    assert copies.calls <= weights + norms + rest


@pytest.mark.parametrize(("precision", "casts"), [("bf16", False), ("float32", True)])
def test_a_run_leaves_casts_to_autocast_where_there_is_one(tmp_path, precision, casts):
    model, seen = small_model(), []
    recompute_activations(model)
    model = add_adapter(model, AdapterConfig(kind="lora", rank=R))
    trainer = build(tmp_path, model, precision=precision, steps=1)
    layer = layers_without_dropout(model)[0]
    # In training mode, and so in the step's two passes alone.
    layer.register_forward_pre_hook(
        lambda module, args: seen.append(module.cast_input_dtype_enabled) if module.training else None
    )
    trainer.train()
    assert len(seen) >= 2  # micro-batches
    assert set(seen) == {casts}
    assert layer.cast_input_dtype_enabled

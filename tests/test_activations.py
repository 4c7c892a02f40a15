import collections

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from config.schema import AdapterConfig
from src.activations import _keeps, recompute_activations
from src.adapters import add_adapter
from src.attention_choice import takes_borders, use_attention
from src.loss import SupervisedLoss
from src.noise import noisy_embeddings
from src.packing import PackCollator
from tests.test_launch import launch
from tests.tiny_run import ARCHITECTURE, assert_same_run, metrics_of, run_train, weights_of, write_recipe

LENGTHS = (7, 20, 3, 18)  # of the documents in each of two packs
TOKENS, LAYERS = 2 * sum(LENGTHS), 3
HIDDEN, INNER, HEADS, KV_HEADS, SIZE = 32, 48, 4, 2, 8
KINDS = ("none", "full", "selective")


def tiny(family, *, dropout=0.0, layers=LAYERS):
    """A model with large random weights, in training mode, whose attention keeps the documents of a pack apart."""
    shape = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": SIZE,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "attention_dropout": dropout,
    }
    rates = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**shape, sliding_window=8))
    else:
        config = GPT2Config(vocab_size=64, n_embd=HIDDEN, n_layer=layers, n_head=HEADS, n_positions=64, **rates)
        model = GPT2LMHeadModel(config)
    use_attention(model, "auto")
    return model.train()


def batch_for(model):
    """Two packs of the same lengths, every token supervised."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (2, sum(LENGTHS)), generator=draw).tolist()
    told = takes_borders(model)
    packs = [{"input_ids": row, "labels": row, "lengths": list(LENGTHS)} for row in ids]
    return PackCollator(0, flat=told, tells_longest=told)(packs)


def forward(model, batch, *, autocast=False, noise=None):
    """Summed loss of the batch, drawn from the same seed each time."""
    torch.manual_seed(2)
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with cast, noisy_embeddings(model, batch, noise):
        # Whether chunks serve is learned within the same autocast, which leaves cast weights in its memory.
        return SupervisedLoss(plain_elements=0)(model, batch).total


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_computed_again_changes_no_bit_of_loss_and_gradients(family, autocast, dropout, lora):
    # The second computation runs the same kernels on the same numbers, and dropout draws from a generator that is set
    # back, so that bits may be asked for.
    found = {}
    for kind in KINDS:
        model = tiny(family, dropout=dropout)
        batch = batch_for(model)
        if kind != "none":
            recompute_activations(model, kind)
        if lora:
            targets = ("c_attn", "c_proj") if family == "gpt2" else ("all-linear",)
            model = add_adapter(model, AdapterConfig(kind="lora", rank=4, dropout=dropout, target_modules=targets))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
        losses = []
        for _ in range(2):  # gradients of two micro-batches add up
            losses.append(forward(model, batch, autocast=autocast, noise=5.0))
            losses[-1].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found[kind] = torch.stack(losses).detach(), gradients
    losses, gradients = found["none"]
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for kind in ("full", "selective"):
        assert torch.equal(found[kind][0], losses)
        assert [name for name in gradients if not torch.equal(found[kind][1][name], gradients[name])] == []


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_operations(query, key, value, *args, **kwargs):
    """Scores and weighted values: two for each head's number and pair of tokens of a document, each."""
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3]


def operations(family, kind):
    """Multiplications and additions of a forward and a backward pass, by the kernel that does them."""
    model = tiny(family)
    batch = batch_for(model)
    if kind != "none":
        recompute_activations(model, kind)
    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_operations}) as counter:
        forward(model, batch).backward()
    counts = counter.get_flop_counts()["Global"]
    return collections.Counter({str(op).removeprefix("aten."): number for op, number in counts.items()})


def test_selective_computes_no_product_twice_and_full_those_of_every_layer():
    plain = operations("llama", "none")
    assert operations("llama", "selective") == plain
    # Two for each weight and token. What is computed again ends with the input of the last product, down_proj.
    products = HIDDEN * SIZE * (HEADS + 2 * KV_HEADS) + SIZE * HEADS * HIDDEN + 2 * HIDDEN * INNER
    pairs = 2 * sum(length**2 for length in LENGTHS)
    again = operations("llama", "full") - plain
    assert again == {
        "mm": 2 * TOKENS * LAYERS * products,
        "_scaled_dot_product_flash_attention_for_cpu": 4 * HEADS * SIZE * pairs * LAYERS,
    }


@pytest.mark.parametrize(("family", "kernels"), [("gemma2", {"bmm"}), ("gpt2", set())])
def test_selective_computes_again_only_the_attention_that_is_written_out(family, kernels):
    # Gemma-2 bends its scores, which no fused kernel does; kept, they would grow with the square of the length.
    again = operations(family, "selective") - operations(family, "none")
    assert set(again) == kernels


class Living(TorchDispatchMode):
    """Bytes of the tensors that were made within it and are still held, each storage once and weights left out."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if storage.data_ptr() not in self.weights:
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return out

    def bytes(self):
        return sum(number for reference, number in self.storages.values() if not reference.expired())


def waiting_bytes(kind, layers):
    """Bytes that wait for the backward pass, and those of them that autograd was given, each storage once."""
    model = tiny("llama", layers=layers)
    batch = batch_for(model)
    if kind != "none":
        recompute_activations(model, kind)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Living(weights) as living, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, batch)
    held = living.bytes()
    loss.backward()
    return held, sum(saved.values())


def test_what_waits_for_the_backward_pass_is_a_layers_input_or_its_products_too():
    # Of two models that differ by two layers, so that what is outside of layers cancels out.
    held, saved = {}, {}
    for kind in KINDS:
        deep, shallow = waiting_bytes(kind, 4), waiting_bytes(kind, 2)
        held[kind], saved[kind] = ((more - less) / 2 for more, less in zip(deep, shallow, strict=True))
    token = 4 * TOKENS  # float32
    heads = SIZE * HEADS
    assert held["full"] == saved["full"] == token * HIDDEN
    # What enters; queries, keys and values; attention with its log of sums; o_proj, gate, up, down_proj.
    products = (heads + 2 * SIZE * KV_HEADS) + (heads + HEADS) + (HIDDEN + INNER + INNER + HIDDEN)
    assert held["selective"] == token * (HIDDEN + products)
    assert saved["selective"] == token * HIDDEN  # the rest waits with the layer, not with autograd
    # Without, three tensors of each norm and four of the gated product, at least.
    assert held["none"] >= saved["none"] >= token * (6 * HIDDEN + 4 * INNER + 2 * heads + 2 * SIZE * KV_HEADS)
    assert held["full"] < held["selective"] < held["none"]


KERNEL = torch.ops.aten._scaled_dot_product_flash_attention.default
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "kept"),
    [
        (KERNEL, (), {}, True),
        (KERNEL, (0.0, True), {}, True),
        (KERNEL, (0.1, True), {}, False),
        (KERNEL, (), {"dropout_p": 0.1}, False),
        (EFFICIENT, (None, True), {}, True),
        (EFFICIENT, (None, True, 0.1), {}, False),
        (torch.ops.aten.mm.default, (), {}, True),
        (torch.ops.aten.bmm.default, (), {}, False),
        (torch.ops.aten.silu.default, (), {}, False),
    ],
)
def test_a_kernel_that_draws_random_numbers_is_called_again(op, args, kwargs, kept):
    tensors = (torch.ones(1),) * 3
    policy = _keeps(SelectiveCheckpointContext(is_recompute=False), op, *tensors, *args, **kwargs)
    assert policy == (CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE)


def test_attention_in_documents_on_a_gpu_is_kept():
    pytest.importorskip("torch.nn.attention.varlen")
    op = torch.ops.torch_attn._varlen_attn.default
    assert _keeps(SelectiveCheckpointContext(is_recompute=False), op) == CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_a_run_that_computes_again_is_the_run_that_does_not(tmp_path, kind):
    model = {"architecture": ARCHITECTURE | {"attention_dropout": 0.1}}
    for name in ("none", kind):
        training = {"gradient_checkpointing": name, "neftune_alpha": 5.0, "accumulation_steps": 2}
        done = run_train("--config", write_recipe(tmp_path / name, model=model, training=training))
        assert done.code == 0, done.stderr
    folders = [tmp_path / name / "outputs" / "run" for name in ("none", kind)]
    assert_same_run(*folders)
    assert len(metrics_of(folders[0])) > 4


@pytest.mark.slow
def test_two_launched_processes_that_compute_again_end_with_the_weights_of_one_that_does_not(tmp_path):
    recipe = write_recipe(tmp_path, training={"micro_batch_rows": 2, "accumulation_steps": 2})
    done = run_train("--config", recipe, "--output.name", "one")
    assert done.code == 0, done.stderr
    more = ("--training.accumulation_steps", "1", "--training.gradient_checkpointing", "selective")
    launched = launch("--config", recipe, "--output.name", "two", *more)
    assert launched.returncode == 0, launched.stderr[-3000:]
    one, two = (weights_of(tmp_path / "outputs" / name / "model") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():  # float32 sums in another order
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU can")
def test_a_machine_without_a_gpu_refuses_the_offload_before_anything_is_loaded(tmp_path):
    done = run_train("--config", write_recipe(tmp_path, training={"activation_offload": True}))
    assert done.code == 2
    assert "training.activation_offload=true" in done.stderr
    assert "leave it out" in done.stderr
    assert not (tmp_path / "outputs").exists()

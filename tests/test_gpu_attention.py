"""Attention on a GPU: its kernels keep documents apart, and are eager attention in float32 but for rounding.

pytest -m gpu tests/test_gpu_attention.py                       on a machine with a CUDA device
GPU_TESTS_ON_CPU=1 pytest -m gpu tests/test_gpu_attention.py    on a CPU, but for what needs CUDA's own kernels
"""

import copy

import pytest
import torch
from accelerate.utils import send_to_device
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM

from src.attention import DOCUMENTS, attend_documents, border_arguments
from src.attention_choice import check_documents_apart, prove_attention, takes_borders, use_attention
from src.kernels import VARLEN_OPTIONS, attend_fused, attend_varlen, varlen_serves
from src.loss import SupervisedLoss
from src.packing import PackCollator, PackedRows
from tests.gpu_runs import (
    BOUNDS,
    DEVICE,
    HAS_GPU,
    LENGTH,
    ON_GPU,
    autocast,
    difference,
    full_float32,  # noqa: F401  pytest finds it here
    gradient_of,
    reference,
    small_model,
    uneven_rows,
)
from tests.test_attention import HEADS, LENGTHS, VOCABULARY, alone, documents_of, every_architecture, packed
from utils.errors import UserError

pytestmark = ON_GPU
needs_varlen = pytest.mark.skipif(
    not HAS_GPU or not VARLEN_OPTIONS or torch.cuda.get_device_capability() < (8, 0),
    reason="torch's variable-length kernel needs a GPU of compute capability 8.0",
)


def loss_and_gradient(rows, *, precision, attention="sdpa", packing=True, flat=False, at_once=3, apart=True):
    """The same on the device, from batches of packs; with `apart` false, packed documents run into each other."""
    model = small_model(attention=attention).to(DEVICE)
    packs = PackedRows(rows, max_length=LENGTH, packing=packing)
    total, tokens, score = torch.zeros((), dtype=torch.float64), 0, SupervisedLoss(plain_elements=0)
    collator = PackCollator(0, flat=flat, tells_longest=apart and takes_borders(model))
    for start in range(0, len(packs), at_once):
        items = [packs[index] for index in range(start, min(start + at_once, len(packs)))]
        batch = send_to_device(collator(items), DEVICE)
        if not apart:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1], device=DEVICE).expand_as(batch["labels"])
        with autocast(precision):
            scored = score(model, batch)
        scored.total.backward()
        total, tokens = total + scored.nll.double().sum().cpu(), tokens + len(scored.nll)
    return (total / tokens).item(), gradient_of(model) / tokens


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("attention", [DOCUMENTS, "sdpa", "eager"])
def test_packed_padded_and_single_rows_give_one_loss_and_gradient(precision, attention):
    rows = uneven_rows()
    loss, gradient = reference(rows)
    loss_bound, gradient_bound = BOUNDS[precision]
    layouts = {
        "packed": {},
        "packed, flat": {"flat": True},
        "padded": {"packing": False},
        "alone": {"packing": False, "at_once": 1},
    }
    for name, layout in layouts.items():
        found, found_gradient = loss_and_gradient(rows, precision=precision, attention=attention, **layout)
        assert found == pytest.approx(loss, rel=loss_bound), name
        assert difference(found_gradient, gradient) <= gradient_bound, name
    wrong, wrong_gradient = loss_and_gradient(rows, precision=precision, attention=attention, apart=False)
    if precision == "float32":  # the loss of a random model moves by 5e-4, within what bf16 rounds
        assert abs(wrong - loss) > 2 * loss_bound * loss
    assert difference(wrong_gradient, gradient) > 2 * gradient_bound


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("attention", [DOCUMENTS, "sdpa", "eager"])
def test_the_probe_passes_models_that_keep_documents_apart(precision, attention):
    with autocast(precision):
        check_documents_apart(small_model(attention=attention).to(DEVICE), lengths=(40, 60))


def unmasked_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(
        1, 2
    ), None


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_probe_refuses_a_model_whose_documents_see_each_other(precision):
    AttentionInterface.register("unmasked", unmasked_attention)
    model = small_model().to(DEVICE)
    model.config._attn_implementation = "unmasked"
    with autocast(precision), pytest.raises(UserError, match="documents of a pack see each other"):
        check_documents_apart(model, lengths=(40, 60))


def test_the_choice_on_this_device_is_told_and_proven(caplog):
    model = small_model()
    use_attention(model, "auto")
    assert model.config._attn_implementation == DOCUMENTS
    assert prove_attention(model, "auto", packing=True, device=DEVICE, autocast=torch.bfloat16)
    assert (model.config._attn_implementation, model.device.type) == (DOCUMENTS, DEVICE.type)


@every_architecture
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_each_architecture_is_proven_and_computes_what_eager_attention_does(config, precision):
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.load_state_dict(eager.state_dict())
    half = torch.bfloat16 if precision == "bf16" else None
    use_attention(model, "auto", autocasts=half is not None)
    assert prove_attention(model, "auto", packing=True, device=DEVICE, autocast=half)
    documents = documents_of(LENGTHS)
    weights = torch.randn(sum(LENGTHS), VOCABULARY, generator=torch.Generator().manual_seed(1))
    expected = alone(eager, documents)
    batch = send_to_device(packed(documents), DEVICE)
    if not takes_borders(model):
        batch = {name: batch[name] for name in ("input_ids", "position_ids", "use_cache")}
    with autocast(precision):
        found = model(**batch).logits[0].float().cpu()
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    # Products of 8 bits over two layers: a few of 4e-3 each. A wrong border gives more than 0.2 (tests/test_attention).
    bound = {"float32": 1e-5, "bf16": 5e-2}[precision]
    assert difference(found, expected) <= bound
    assert difference(gradient_of(model), gradient_of(eager)) <= 2 * bound


@needs_varlen
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("window", [None, 1, 16, 300])
@pytest.mark.parametrize("size", [64, 80, 256])
def test_the_variable_length_kernel_is_attention_in_each_document(dtype, kv_heads, window, size):
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 37, 200, 18)
    inputs = [torch.randn(1, number, sum(lengths), size, generator=generator) for number in (4, kv_heads, kv_heads)]
    inputs = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in inputs]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    weight = torch.randn(1, sum(lengths), 4, size, generator=generator).to(DEVICE)
    options = {"causal": True, "window": window, "dropout": 0.0, "scale": 0.3}
    if window is not None and "window_size" not in VARLEN_OPTIONS:
        pytest.skip("this torch's kernel takes no window")
    assert varlen_serves(*inputs, **options)
    borders = torch.tensor([0, 1, 38, 238, 256], dtype=torch.int32, device=DEVICE)
    found = attend_varlen(*inputs, borders=borders, longest=200, **options)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in wide), strict=True)
    expected = torch.cat([attend_fused(*part, **options).transpose(1, 2) for part in parts], dim=1)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    # Probabilities and gradients are rounded to 8 bits (bf16) in between.
    assert difference(found.float(), expected) <= 1e-2
    for tensor, exact in zip(inputs, wide, strict=True):
        assert difference(tensor.grad.float(), exact.grad) <= 2e-2


@needs_varlen
def test_attention_in_documents_does_not_wait_for_the_device():
    query, key, value = (torch.randn(1, heads, 256, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2, 2))
    told = border_arguments(torch.tensor([0, 100, 256], dtype=torch.int32, device=DEVICE), 156)
    attend_documents(torch.nn.Module(), query, key, value, **told)  # loads what the first call loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend_documents(torch.nn.Module(), query, key, value, **told)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not HAS_GPU, reason="on a CPU every architecture takes attention in documents")
def test_soft_capped_scores_take_a_kernel_that_knows_them():
    from transformers import Gemma2Config

    config = Gemma2Config(**HEADS, attn_logit_softcapping=5.0)
    model = AutoModelForCausalLM.from_config(config)
    use_attention(model, "auto")
    assert model.config._attn_implementation in ("flash_attention_2", "flex_attention")

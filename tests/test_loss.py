"""Every model's loss from chunks is that of its own full logits in float64, also with adapters and in wrappers."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from src import loss as loss_module
from src.chunked_loss import LogitTransform
from src.loss import SupervisedLoss, next_token_targets, supervised_nll
from src.packing import IGNORED
from tests.processes import start_processes
from tests.written_out_loss import FLOAT32, error, written_out
from utils.distributed import leave_group

VOCABULARY = 301

ARCHITECTURES = {
    "llama": {},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "phi": {},  # a head with a bias
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "gemma3_text": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "falcon_h1": {
        "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 8,
    },
    "recurrent_gemma": {"logits_soft_cap": 3.0, "lru_width": 32, "block_types": ["recurrent", "attention"]},
}  # fmt: skip


def tiny(name, **changes):
    given = dict(ARCHITECTURES.get(name, {}))
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(given.pop("model_type", name), **(sizes | given | changes))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def batch_of(rows=2, length=20, supervised=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < supervised, ids, IGNORED)
    labels[:, 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(rows, length)}


def plain_loss(model, batch, **settings):
    """From the model's full logits, at supervised positions, in float64."""
    arguments = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**arguments, use_cache=False).logits[:, :-1].double()
    targets = batch["labels"][:, 1:]
    return written_out(logits[targets != IGNORED], targets[targets != IGNORED], **settings)


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


def assert_equal_gradients(found, expected, bound):
    assert found.keys() == expected.keys()
    # Those that are zero but for rounding are compared with the largest.
    largest = max(tensor.norm() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= bound * max(tensor.norm(), 1e-3 * largest), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_are_scored_in_chunks_as_their_own_logits_are(name):
    model, batch = tiny(name), batch_of()
    score = SupervisedLoss(label_smoothing=0.1, z_loss=1e-3, plain_elements=0)
    scored = score(model, batch)
    assert score.chunks
    expected, expected_nll = plain_loss(model, batch, smoothing=0.1, z_loss=1e-3)
    # What the model did to its logits in float32 stands in the expected values.
    assert error(scored.total, expected) <= 3e-6
    assert error(scored.nll, expected_nll) <= 3e-6
    assert scored.row.tolist() == (next_token_targets(batch["labels"]) != IGNORED).nonzero()[:, 0].tolist()
    # Both go through the layers' backward pass in float32, whose sums run in another order.
    assert_equal_gradients(gradients(model, scored.total), gradients(model, expected), 2e-5)


LORA_HEADS = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "frozen head": {"target_modules": ["q_proj"]},
    "trained copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", LORA_HEADS)
def test_an_adapter_beside_or_on_the_head_gets_its_exact_gradient(kind):
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **LORA_HEADS[kind])
    model, batch = get_peft_model(tiny("llama"), settings).eval(), batch_of()
    score = SupervisedLoss(label_smoothing=0.1, z_loss=1e-3, plain_elements=0)
    scored = score(model, batch)
    assert score.chunks
    found = gradients(model, scored.total)
    expected = gradients(model, plain_loss(model, batch, smoothing=0.1, z_loss=1e-3)[0])
    assert any("lm_head" in name for name in found) == (kind != "frozen head")
    assert_equal_gradients(found, expected, 2e-5)


def test_a_transform_that_no_number_of_the_config_explains_is_left_to_the_model(monkeypatch, caplog):
    model, batch = tiny("granite"), batch_of()
    monkeypatch.setattr(loss_module, "transforms_named_in", lambda settings: [LogitTransform()])
    score = SupervisedLoss(plain_elements=0)
    scored = score(model, batch)
    assert not score.chunks
    assert "GraniteForCausalLM does to its logits is unknown" in caplog.text
    assert error(scored.total, plain_loss(model, batch)[0].detach()) <= 3e-6


def test_a_scale_near_one_is_not_taken_for_its_inverse_in_bfloat16():
    # The configuration's number may multiply or divide, and 8 roundings in bfloat16 are more than these differ by.
    model, score = tiny("granite", logits_scaling=1.02).to(torch.bfloat16), SupervisedLoss(plain_elements=0)
    score(model, batch_of())
    assert score.chunks
    assert score.objective.transform == LogitTransform(scale=1 / 1.02)


def test_a_model_that_names_no_head_is_scored_from_its_own_logits(monkeypatch, caplog):
    model, batch = tiny("llama"), batch_of()
    expected = gradients(model, plain_loss(model, batch)[0])
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    scored = SupervisedLoss(plain_elements=0)(model, batch)
    assert "LlamaForCausalLM does to its logits is unknown" in caplog.text
    assert_equal_gradients(gradients(model, scored.total), expected, 2e-5)


@pytest.mark.parametrize("name", ["llama tied", "gemma2"])
def test_recomputed_activations_give_the_same_gradients(name):
    model, batch = tiny(name).train(), batch_of()
    expected = gradients(model, plain_loss(model, batch)[0])
    model.gradient_checkpointing_enable()
    scored = SupervisedLoss(plain_elements=0)(model, batch)
    assert_equal_gradients(gradients(model, scored.total), expected, 2e-5)


@pytest.mark.parametrize("plain_elements", [0, 2**30])
def test_a_batch_with_nothing_supervised_has_a_zero_loss_with_a_graph(plain_elements):
    model, batch = tiny("llama"), batch_of(supervised=0.0)
    scored = SupervisedLoss(z_loss=1e-3, plain_elements=plain_elements)(model, batch)
    assert (scored.total.item(), len(scored.nll), len(scored.row)) == (0.0, 0, 0)
    found = gradients(model, scored.total)
    # A wrapper waits for the gradient of every weight.
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(tensor.abs().max() == 0 for tensor in found.values())


def test_asking_a_model_leaves_its_mode_and_the_random_state():
    model = tiny("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with torch.no_grad():
        score = SupervisedLoss()
        score._learn(model, batch_of())
    assert score.chunks
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(state)


def test_a_model_that_fails_when_it_is_asked_is_left_as_it_was():
    model, score = tiny("llama").train(), SupervisedLoss()
    handle = model.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(model, batch_of())
    handle.remove()
    assert all(module.training for module in model.modules())
    assert score.chunks is None


def test_each_token_is_scored_alike_with_and_without_chunks():
    model, batch = tiny("gemma2"), batch_of()
    with torch.no_grad():
        nll, row = supervised_nll(model, batch)
        for elements in (0, 2**30):
            scored = SupervisedLoss(label_smoothing=0.3, plain_elements=elements)(model, batch)
            assert error(scored.nll, nll) <= FLOAT32
            assert scored.row.equal(row)


def test_hooks_are_gone_after_a_batch_and_after_an_error():
    model, batch = tiny("llama"), batch_of()
    score, head = SupervisedLoss(plain_elements=0), model.get_output_embeddings()
    score(model, batch)
    with pytest.raises((IndexError, RuntimeError)):
        score(model, batch | {"supervised_places": torch.tensor([10**6])})
    assert not list(itertools.chain(head._forward_hooks, head._forward_pre_hooks))
    assert functional.linear(torch.ones(1, 32), head.weight).equal(head(torch.ones(1, 32)))


# Wrapped models: each of two processes scores a row of its own, and one of them has nothing supervised.


def wrapped(kind, model, mesh):
    if kind == "ddp":
        return DistributedDataParallel(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    if kind == "head apart":
        fully_shard([base.model.norm, base.lm_head], mesh=mesh, reshard_after_forward=False)
    elif kind == "head alone":
        fully_shard(base.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_cases():
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    cases = itertools.product(("ddp", "head in root", "head apart", "head alone"), ("llama", "granite", "lora"))
    for kind, name in (*cases, ("ddp", "llama tied"), ("head in root", "llama tied")):
        yield kind, name, get_peft_model(tiny("llama"), lora).eval() if name == "lora" else tiny(name)


def process_of_two(rank, address):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    score_in_one_of_two(rank)
    leave_group()


def score_in_one_of_two(rank):
    mesh = init_device_mesh("cpu", (2,))
    rows = [batch_of(rows=1), batch_of(rows=1, seed=1, supervised=0.0)]
    for kind, name, model in sharded_cases():
        expected = gradients(model, plain_loss(model, rows[0])[0])
        model.zero_grad()
        score, outer = SupervisedLoss(plain_elements=0), wrapped(kind, model, mesh)
        scored = score(outer, rows[rank])
        assert score.chunks, (kind, name)
        (2 * scored.total).backward()  # their gradients are averaged
        found = {
            name.removeprefix("module."): tensor.grad.full_tensor() if isinstance(tensor.grad, DTensor) else tensor.grad
            for name, tensor in model.named_parameters()
            if tensor.grad is not None
        }
        try:
            assert_equal_gradients(found, expected, 2e-5)
        except AssertionError as error:
            raise AssertionError(f"{kind}, {name}") from error


def test_wrapped_and_sharded_models_get_the_gradients_of_one_process(tmp_path):
    start_processes(process_of_two, f"file://{tmp_path}/meeting")

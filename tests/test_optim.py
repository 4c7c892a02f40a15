"""How weights are updated: who decays, what Muon and LoRA+ do, and the learning rate of every step."""

import copy
import importlib.util
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)
from transformers.training_args import TrainingArguments

from config.schema import OptimConfig
from src.optim import (
    OptimizerHooks,
    check_installed,
    decayed_names,
    muon_with_adamw,
    optimizer_arguments,
    raise_rate_of_lora_b,
)
from tests.tiny_run import run_train, weights_of, write_recipe
from utils.errors import UserError

PEAK = 3e-3


def tiny_llama(**settings):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **shape, **settings))


def tiny_gpt2(**settings):
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, **settings))


def tiny_gemma(**settings):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return GemmaForCausalLM(GemmaConfig(vocab_size=32, num_key_value_heads=1, head_dim=8, **shape, **settings))


def tiny_lora(model=None):
    return get_peft_model(model or tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))


class PlainTrainer(OptimizerHooks, Trainer):
    """transformers' Trainer with the hooks and nothing else of this project."""


def trainer_of(folder, optim, model=None):
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **optimizer_arguments(optim))
    trainer = PlainTrainer(model=model or tiny_llama(), args=args)
    trainer.optim = optim
    return trainer


def rates(folder, optim, *, steps):
    """The learning rate of each step, and the one after the last."""
    trainer = trainer_of(folder, optim)
    trainer.create_optimizer_and_scheduler(steps)
    found = []
    for _ in range(steps + 1):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


# schedules

STEPS, WARMUP, FLOOR = 20, 4, 0.1


def falling(step):
    """Progress from 0 after the warmup to 1 at the end."""
    return (step - WARMUP) / (STEPS - WARMUP)


def stable_then_decayed(step, start):
    return 1.0 if step < start else 1 - math.sqrt((step - start) / (STEPS - start))


COURSES = {
    "constant": lambda step: 1.0,
    "linear": lambda step: 1 - falling(step),
    "cosine": lambda step: (1 + math.cos(math.pi * falling(step))) / 2,
    "warmup_stable_decay": lambda step: stable_then_decayed(step, start=14),  # 0.3 x 20 steps decay
}


@pytest.mark.parametrize("warmup", [{"warmup_steps": WARMUP}, {"warmup_fraction": WARMUP / STEPS}], ids=str)
@pytest.mark.parametrize("floor", [0.0, FLOOR])
@pytest.mark.parametrize("schedule", COURSES)
def test_each_schedule_is_its_formula(tmp_path, schedule, floor, warmup):
    floor = 0.0 if schedule == "constant" else floor
    decay = {"decay_fraction": 0.3} if schedule == "warmup_stable_decay" else {}
    optim = OptimConfig(learning_rate=PEAK, schedule=schedule, min_lr_fraction=floor, **warmup, **decay)
    start = floor if schedule == "warmup_stable_decay" else 0.0
    rising = [start + (1 - start) * step / WARMUP for step in range(WARMUP)]
    lowered = [floor + (1 - floor) * COURSES[schedule](step) for step in range(WARMUP, STEPS + 1)]
    expected = [PEAK * share for share in rising + lowered]
    assert rates(tmp_path, optim, steps=STEPS) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_decay_never_reaches_into_the_warmup(tmp_path):
    # Of 5 steps, 0.3 round up to 2 of warmup, and 0.7 to 4 of decay, for which 3 are left.
    optim = OptimConfig(learning_rate=1.0, schedule="warmup_stable_decay", warmup_fraction=0.3, decay_fraction=0.7)
    expected = [0.0, 0.5, 1.0, 1 - math.sqrt(1 / 3), 1 - math.sqrt(2 / 3), 0.0]
    assert rates(tmp_path, optim, steps=5) == pytest.approx(expected)


# who decays

LLAMA_MATRICES = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
GPT2_MATRICES = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("build", "layer", "matrices"),
    [
        (lambda **more: tiny_llama(attention_bias=True, **more), "model.layers.0.", LLAMA_MATRICES),
        (tiny_gpt2, "transformer.h.0.", GPT2_MATRICES),
        (tiny_gemma, "model.layers.0.", LLAMA_MATRICES),
    ],
    ids=["llama", "gpt2", "gemma"],
)
def test_matrices_of_layers_and_an_untied_head_decay_and_nothing_else(build, layer, matrices, tied):
    expected = {f"{layer}{name}.weight" for name in matrices} | (set() if tied else {"lm_head.weight"})
    names = decayed_names(build(tie_word_embeddings=tied))
    assert sorted(names) == sorted(expected)


def test_adapters_of_layers_decay_and_those_of_embeddings_do_not():
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "q_proj"])
    names = decayed_names(get_peft_model(tiny_llama(), config))
    assert [name.split(".")[-3] for name in names if "lora" in name] == ["lora_A", "lora_B"]


def test_vectors_outside_norms_do_not_decay():
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(tiny_llama(), config)
    vectors = [name for name, weight in model.named_parameters() if weight.ndim == 1 and "magnitude" in name]
    assert len(vectors) == 1
    assert set(vectors).isdisjoint(decayed_names(model))


def test_weights_that_deepspeed_has_parted_decay_by_their_whole_shape():
    model = tiny_llama()
    expected = decayed_names(model)
    for weight in model.parameters():
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # what ZeRO-3 leaves of a weight
    assert decayed_names(model) == expected


def test_trainer_decays_what_is_named(tmp_path):
    trainer = trainer_of(tmp_path, OptimConfig(weight_decay=0.1))
    decayed, spared = trainer.create_optimizer().param_groups
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [names[id(weight)] for weight in decayed["params"]] == decayed_names(trainer.model)
    assert "model.embed_tokens.weight" in {names[id(weight)] for weight in spared["params"]}


# Muon


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("build", "matrices"),
    [(tiny_llama, LLAMA_MATRICES), (tiny_gpt2, GPT2_MATRICES), (tiny_gemma, LLAMA_MATRICES)],
    ids=["llama", "gpt2", "gemma"],
)
def test_muon_has_the_matrices_of_layers_and_adamw_the_rest(build, matrices, tied):
    model = build(tie_word_embeddings=tied)
    optimizer = muon_with_adamw(model, OptimConfig(name="muon", weight_decay=0.1))
    names = {id(weight): name for name, weight in model.named_parameters()}
    muon, decayed, spared = ([names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups)
    assert {name.split(".0.", 1)[1].removesuffix(".weight") for name in muon} == matrices
    assert decayed == ([] if tied else ["lm_head.weight"])
    assert sorted([*muon, *decayed, *spared]) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def newton_schulz(matrix):
    """Five steps of x <- a x + b (x x') x + c (x x')^2 x, in bfloat16 (Jordan 2024)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.bfloat16() / wide.bfloat16().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide is matrix else x.T).float()


def even_gradient(weight):
    """A gradient with singular values from 0.3 to 1, which bfloat16's rounding cannot swamp."""
    if weight.ndim < 2:
        return torch.randn_like(weight)
    u, values, v = torch.linalg.svd(torch.randn_like(weight), full_matrices=False)
    return u @ torch.diag(torch.linspace(0.3, 1, len(values))) @ v


def test_a_muon_step_is_that_of_the_paper_and_adamw_does_the_rest():
    rate, decay = 0.01, 10.0  # 1 - 0.01 x 10 takes a tenth of each weight, about as much as the update changes it
    model, reference = tiny_llama(), tiny_llama()
    for name, weight in model.named_parameters():
        weight.grad = even_gradient(weight)
        reference.get_parameter(name).grad = weight.grad.clone()
    optimizer = muon_with_adamw(model, OptimConfig(name="muon", learning_rate=rate, weight_decay=decay, beta2=0.95))
    optimizer.step()

    matrices = [name for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
    assert len(matrices) == 7
    adamw = [
        {"params": [weight], "weight_decay": decay if name == "lm_head.weight" else 0.0}
        for name, weight in reference.named_parameters()
        if name not in matrices
    ]
    torch.optim.AdamW(adamw, lr=rate, betas=(0.9, 0.95)).step()
    for name, weight in model.named_parameters():
        other = reference.get_parameter(name).detach()
        if name not in matrices:
            torch.testing.assert_close(weight.detach(), other, rtol=1e-6, atol=1e-8)
            continue
        # The first momentum is a multiple of the gradient, whose length the iterations divide out.
        update = -rate * 0.2 * math.sqrt(max(other.shape)) * newton_schulz(reference.get_parameter(name).grad)
        error = weight.detach() - (other * (1 - rate * decay) + update)
        # Both iterate in bfloat16 and round in another order: up to 0.05 apart, where four iterations are 0.35.
        assert error.norm() < 0.1 * update.norm(), name


def test_muon_keeps_its_state_through_a_checkpoint():
    """With LoRA+ too, whose groups come last: a step after loading is the step that was not interrupted."""
    models = [tiny_lora(), tiny_lora()]
    optimizers = []
    for model in models:
        optimizers.append(muon_with_adamw(model, OptimConfig(name="muon", learning_rate=0.01)))
        raise_rate_of_lora_b(optimizers[-1], model, 4.0)

    def step(model, optimizer):
        ids = torch.arange(12).view(1, 12)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    for _ in range(2):
        step(models[0], optimizers[0])
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # else both share tensors
    before = {name: weight.clone() for name, weight in models[1].named_parameters() if weight.requires_grad}
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    others = dict(models[0].named_parameters())
    for name, weight in models[1].named_parameters():
        assert torch.equal(weight, others[name]), name
        assert name not in before or not torch.equal(weight, before[name]), f"{name} has not moved"


def test_muon_without_a_matrix_is_refused():
    model = tiny_llama()
    for name, weight in model.named_parameters():
        weight.requires_grad = "norm" in name
    with pytest.raises(UserError, match=r"optim\.name=muon found no matrix .* LlamaForCausalLM .*adamw_torch_fused"):
        muon_with_adamw(model, OptimConfig(name="muon"))


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_muon_is_refused_where_matrices_are_sharded(monkeypatch, flag):
    optimizer_arguments(OptimConfig(name="muon"))
    monkeypatch.setenv(flag, "true")
    with pytest.raises(UserError, match=r"optim\.name=muon needs whole matrices.*ddp\.yaml"):
        optimizer_arguments(OptimConfig(name="muon"))
    optimizer_arguments(OptimConfig())


# LoRA+


@pytest.mark.parametrize("name", ["adamw_torch_fused", "sgd", "adafactor", "muon"])
def test_lora_b_has_the_ratio_of_the_rate_at_every_step(tmp_path, name):
    optim = OptimConfig(name=name, learning_rate=PEAK, lora_plus_ratio=16.0, schedule="linear", warmup_steps=2)
    trainer = trainer_of(tmp_path, optim, tiny_lora())
    trainer.create_optimizer_and_scheduler(6)
    names = {id(weight): name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for share in (0, 0.5, 1, 0.75, 0.5, 0.25):
        pairs = [
            (names[id(weight)], group["lr"]) for group in trainer.optimizer.param_groups for weight in group["params"]
        ]
        assert sorted(name for name, _ in pairs) == sorted(names.values())
        for weight, rate in pairs:
            assert rate == pytest.approx(PEAK * share * (16 if "lora_B" in weight else 1)), weight
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


# names and packages


@pytest.mark.parametrize(
    ("given", "meant"),
    [("adamw_torch_fuse", "adamw_torch_fused"), ("moun", "muon"), ("paged_adam_8bit", "paged_adamw_8bit")],
)
def test_a_misspelt_optimizer_names_the_nearest(given, meant):
    with pytest.raises(UserError, match=rf"optim\.name={given} is no optimizer .*did you mean {meant}\?"):
        optimizer_arguments(OptimConfig(name=given))


def test_a_name_like_no_other_gets_them_all():
    with pytest.raises(UserError, match=r"it has adafactor, .*muon.*sgd"):
        optimizer_arguments(OptimConfig(name="zzzzzzzz"))


PACKAGES = {
    "adamw_8bit": "bitsandbytes",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_npu_fused": "torch_npu",
    "apollo_adamw": "apollo_torch",
    "galore_adamw": "galore_torch",
    "grokadamw": "grokadamw",
    "lomo": "lomo_optim",
    "schedule_free_adamw": "schedulefree",
    "stable_adamw": "optimi",
}


@pytest.mark.parametrize("name", PACKAGES)
def test_an_optimizer_is_refused_if_and_only_if_its_package_is_missing(tmp_path, name):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **optimizer_arguments(OptimConfig(name=name)))
    if importlib.util.find_spec(PACKAGES[name]) is not None:
        check_installed(args)
    else:
        with pytest.raises(UserError, match=rf"optim\.name={name} cannot be used here: .*{PACKAGES[name]}"):
            check_installed(args)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_of_torch_and_transformers_need_no_package(tmp_path, name):
    check_installed(TrainingArguments(str(tmp_path), use_cpu=True, **optimizer_arguments(OptimConfig(name=name))))


def test_a_run_with_an_optimizer_that_is_not_installed_ends_before_its_data(tmp_path):
    if importlib.util.find_spec("grokadamw") is not None:
        pytest.skip("grokadamw is installed")
    done = run_train("--config", write_recipe(tmp_path, optim={"name": "grokadamw"}))
    assert done.code == 2
    assert "error: optim.name=grokadamw cannot be used here: " in done.stderr
    assert "pip install grokadamw" in done.stderr
    assert "rows kept" not in done.stderr


def test_a_schedule_free_run_ends_with_the_averaged_weights(tmp_path):
    pytest.importorskip("schedulefree", reason="pip install schedulefree")
    optim = {"name": "schedule_free_adamw", "schedule": "constant", "warmup_steps": 2}
    done = run_train("--config", write_recipe(tmp_path, data={"eval": None}, optim=optim))
    assert done.code == 0, done.stderr
    run = tmp_path / "outputs" / "run"
    trained, result = weights_of(run / "checkpoint-4"), weights_of(run / "model")
    state = torch.load(run / "checkpoint-4" / "optimizer.pt")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    decayed = decayed_names(model)
    order = decayed + [name for name, _ in model.named_parameters() if name not in decayed]
    for index, name in enumerate(order):
        # y = 0.9 x + 0.1 z, where training is at y and x is the average (arXiv:2405.15682).
        average = (trained[name] - 0.1 * state["state"][index]["z"]) / 0.9
        torch.testing.assert_close(result[name], average, rtol=1e-5, atol=1e-6)
        assert not torch.equal(result[name], trained[name])


# the table


def test_the_table_of_groups_is_logged_once(tmp_path):
    done = run_train(
        "--config", write_recipe(tmp_path, optim={"name": "muon", "weight_decay": 0.1}, training={"max_steps": 1})
    )
    assert done.code == 0, done.stderr
    head = "optimizer  tensors  parameters  learning rate  weight decay  first tensor"
    assert done.stderr.count(head) == 1
    lines = done.stderr[done.stderr.index(head) :].splitlines()[1:4]
    # Muon: 2 layers x (2 x 32 x 32 + 2 x 16 x 32 + 3 x 64 x 32); AdamW: 290 x 32, and as many with 5 norms of 32.
    assert [line.split() for line in lines] == [
        ["Muon", "14", "18,432", "0.003", "0.1", "model.layers.0.self_attn.q_proj.weight"],
        ["AdamW", "1", "9,280", "0.003", "0.1", "lm_head.weight"],
        ["AdamW", "6", "9,440", "0.003", "0", "model.embed_tokens.weight"],
    ]

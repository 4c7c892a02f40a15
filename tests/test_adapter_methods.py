"""PEFT's methods by name: each trains and loads again beside its plain base, or is refused with its reason."""

import importlib.util
import logging
import re
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from config.schema import AdapterConfig, ModelConfig
from src.adapter_export import save_adapter, starting_weights
from src.adapter_methods import check_method, method_names
from src.adapter_probe import probe_adapter
from src.adapters import add_adapter
from src.optim import decayed_names
from tests.tiny_run import (
    assert_same_run,
    from_checkpoint,
    run_train,
    stop_after,
    weights_of,
    write_checkpoint,
    write_recipe,
)
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

VIRTUAL = "virtual tokens"
REFUSED = {
    "adalora": "adds a term to the model's own loss",
    "adaption_prompt": VIRTUAL,
    "cartridge": VIRTUAL,
    "cpt": VIRTUAL,
    "multitask_prompt_tuning": VIRTUAL,
    "p_tuning": VIRTUAL,
    "poly": "the tasks it belongs to",
    "prefix_tuning": VIRTUAL,
    "prompt_tuning": VIRTUAL,
    "shadow": "a second model",
    "xlora": "trained already",
}
NEEDS = {"adamss": "sklearn"}
"""Packages that PEFT itself asks for."""

IDS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of one layer, as wide as the blocks that methods cut weights into."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def train(model, steps=3, rate=1e-2):
    """Losses of steps on one batch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    losses = []
    for _ in range(steps):
        logits = model.train()(input_ids=IDS, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", sorted(method_names()))
def test_every_method_of_peft_trains_and_loads_beside_its_base_or_says_why_not(base, tmp_path, kind):
    config = AdapterConfig(kind=kind, trainable_tokens=("the",) if kind == "trainable_tokens" else ())
    if kind in REFUSED:
        with pytest.raises(UserError, match=f"adapter.kind={kind} does not train here: .*{REFUSED[kind]}"):
            check_method(config)
        return
    if kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        with pytest.raises(UserError, match="scikit-learn"):
            add_adapter(load(base), config)
        return
    torch.manual_seed(1)
    words = toy_tokenizer()
    if kind == "trainable_tokens":
        config = AdapterConfig(kind=kind, trainable_tokens=tuple(words.convert_ids_to_tokens([10, 11])))
    model = add_adapter(load(base), config, tokenizer=words)
    before = {name: values.detach().clone() for name, values in model.named_parameters()}
    trained = {name for name, values in model.named_parameters() if values.requires_grad}
    losses = train(model, steps=4, rate=5e-2 if kind in ("unilora", "trainable_tokens") else 1e-2)
    assert min(losses[1:]) < losses[0]
    changed = {name for name, values in model.named_parameters() if not torch.equal(values, before[name])}
    assert changed
    assert changed <= trained
    save_adapter(model, tmp_path, config)
    torch.manual_seed(2)  # what a method draws at random must be saved, or drawn with a seed of its own
    loaded = PeftModel.from_pretrained(load(base), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_an_unknown_method_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"adapter.kind=lorra is no method of PEFT; did you mean lora.* oft, "):
        check_method(AdapterConfig(kind="lorra"))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"kind": "vera", "alpha": 3.0}, "adapter.alpha=3.0 .* has no such field"),
        ({"kind": "oft", "dropout": 0.1}, "adapter.dropout=0.1 .*such as module_dropout"),
        ({"kind": "oft", "trainable_tokens": ("a",)}, "adapter.trainable_tokens"),
        ({"kind": "lora", "settings": {"r": 4}}, "settings.r is what adapter.rank stands for"),
        ({"kind": "oft", "settings": {"oft_blok_size": 4}}, "oft_blok_size .*did you mean oft_block_size"),
        ({"kind": "lora", "settings": {"arrow_config": {}}}, "arrow_config does not work here"),
    ],
)
def test_fields_that_a_method_lacks_are_refused(config, told):
    with pytest.raises(UserError, match=told):
        check_method(AdapterConfig(**config))


def test_typed_fields_and_settings_reach_the_method(base):
    config = AdapterConfig(kind="loha", rank=3, alpha=5.0, settings={"rank_dropout": 0.2})
    settings = add_adapter(load(base), config).peft_config["default"]
    assert (settings.r, settings.alpha, settings.rank_dropout) == (3, 5.0, 0.2)
    settings = add_adapter(load(base), AdapterConfig(kind="lora")).peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (16, 32.0, 0.0)
    assert add_adapter(load(base), AdapterConfig(kind="oft", rank=8)).peft_config["default"].r == 8


# What LoRA starts from


@pytest.mark.parametrize(
    "config",
    [
        {"init": "gaussian"},
        {"init": "orthogonal"},
        {"init": "olora"},
        {"init": "pissa"},
        {"init": "pissa_niter_4"},
        {"init": "pissa", "rank": 300, "target_modules": ("q_proj", "lm_head")},  # of 256 directions
        {"init": "pissa", "rslora": True, "modules_to_save": ("lm_head",)},
        {"init": "olora", "settings": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}}},
        {"dora": True},
    ],
)
def test_whatever_lora_starts_from_it_is_saved_for_the_plain_base(base, tmp_path, config):
    config = AdapterConfig(**{"kind": "lora", "rank": 4} | config)
    torch.manual_seed(1)
    plain = load(base)
    first = logits_of(plain)
    model = add_adapter(plain, config)
    # The start is taken out of the weight and put beside it: the same sum in another order.
    torch.testing.assert_close(logits_of(model), first, rtol=1e-3, atol=1e-4)
    start = starting_weights(model, config)
    losses = train(model)
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path, config, start=start)
    loaded = PeftModel.from_pretrained(load(base), tmp_path)
    difference = (logits_of(loaded) - logits_of(model)).abs().max() / logits_of(model).abs().max()
    assert difference < 1e-5 if start else difference == 0


@pytest.mark.parametrize(
    ("kind", "more"),
    [("lora", {"init": "pissa"}), ("lora", {"init": "pissa_niter_2"}), ("lora", {"init": "eva"}), ("oft", {})],
)
def test_a_resumed_run_of_an_adapter_ends_as_one_never_stopped_and_loads_beside_its_base(tmp_path, kind, more):
    size = {"rank": 2} if kind == "lora" else {"settings": {"oft_block_size": 8}}
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320)
    recipe = write_recipe(
        tmp_path, model=from_checkpoint(checkpoint), adapter={"kind": kind, **size, **more}, training={"max_steps": 3}
    )
    run, whole = tmp_path / "outputs" / "run", tmp_path / "whole"
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    shutil.copytree(run, whole)
    stop_after(run, 2)
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    assert_same_run(run, whole)
    learned = AutoPeftModelForCausalLM.from_pretrained(run / "model")
    # As it was in the run: the last checkpoint's weights in an adapter made as the run's was.
    config = AdapterConfig(kind=kind, **size, **more)
    torch.manual_seed(42)  # training.seed, of which the fast SVD draws
    inner = add_adapter(load(checkpoint), config, checkpoint=run / "checkpoint-3")
    if more.get("init") != "pissa_niter_2":  # whose draws come after those that load the run's model
        inner.load_adapter(run / "checkpoint-3", "default")
        torch.testing.assert_close(logits_of(learned), logits_of(inner), rtol=1e-4, atol=1e-4)
    assert (logits_of(learned) - logits_of(load(checkpoint))).abs().max() > 1e-3


def test_an_adapter_of_another_method_is_saved_as_lora(base, tmp_path):
    config = AdapterConfig(kind="loha", rank=2, export_as_lora=True)
    model = add_adapter(load(base), config)
    train(model)
    save_adapter(model, tmp_path, config)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.peft_config["default"].peft_type == "LORA"
    # At most 0.1% of an update's norm is lost, and the updates are a part of the output.
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=2e-3, atol=2e-3)
    with pytest.raises(UserError, match=r"adapter.kind=oft adds nothing to a weight that LoRA"):
        add_adapter(load(base), AdapterConfig(kind="oft", export_as_lora=True))


def test_weight_decay_spares_rows_of_tokens(base):
    words = toy_tokenizer()
    config = AdapterConfig(kind="lora", rank=2, trainable_tokens=tuple(words.convert_ids_to_tokens([10])))
    model = add_adapter(load(base), config, tokenizer=words)
    trained = [name for name, values in model.named_parameters() if values.requires_grad]
    assert sum("trainable_tokens" in name for name in trained) == 2  # of the embeddings, and of the head
    assert not [name for name in decayed_names(model) if "trainable_tokens" in name]


def test_what_cannot_train_ends_the_run_before_its_model_loads(tmp_path):
    broken = write_checkpoint(tmp_path / "broken")  # whose weights cannot be loaded
    tensors = weights_of(broken)
    tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, model=from_checkpoint(broken), adapter={"kind": "lora"})
    assert "is incomplete: 1 weights are missing" in run_train("--config", recipe).stderr
    for options, told in (
        (("--adapter.kind", "lorra"), "did you mean lora?"),
        (("--adapter.kind", "p_tuning"), "adapter.kind=p_tuning does not train here: it puts virtual tokens"),
        (
            ("--adapter.kind", "hra", "--model.quantization", "int8"),
            "hra does not train beside model.quantization=int8",
        ),
    ):
        done = run_train("--config", recipe, *options)
        assert done.code == 2
        assert told in done.stderr
        assert "incomplete" not in done.stderr


@pytest.mark.parametrize(("target", "row"), [("embed_tokens", None), ("lm_head", 318)])
def test_a_start_that_could_not_be_put_back_is_refused(base, target, row):
    config = AdapterConfig(kind="lora", rank=2, init="pissa", target_modules=("q_proj", target))
    with pytest.raises(UserError, match=f"adapter.init=pissa cannot start beside .*{target}"):
        add_adapter(load(base), config, first_new_row=row)


# Adapters that were trained before


def trained_adapter(base, folder, seed, **more):
    torch.manual_seed(seed)
    config = AdapterConfig(kind="lora", rank=2, **more)
    model = add_adapter(load(base), config)
    for name, values in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(values, std=0.1)
    save_adapter(model, folder, config)
    return folder


def test_an_adapter_beside_another_starts_as_beside_the_merged_base_and_leaves_it_as_it_was(base, tmp_path):
    first = trained_adapter(base, tmp_path / "first", 1)
    config = AdapterConfig(kind="lora", rank=3, beside=(str(first),))
    model = add_adapter(load(base), config)
    merged = PeftModel.from_pretrained(load(base), first).merge_and_unload()
    torch.testing.assert_close(logits_of(model), logits_of(merged), rtol=1e-4, atol=1e-4)  # sums in another order
    before = get_peft_model_state_dict(model, adapter_name="beside_0")
    before = {name: values.clone() for name, values in before.items()}
    losses = train(model)
    torch.manual_seed(0)
    assert losses[-1] < losses[0]
    after = get_peft_model_state_dict(model, adapter_name="beside_0")
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_adapter(model, tmp_path / "second", config)
    assert {path.name for path in (tmp_path / "second").iterdir()} >= {"adapter_config.json", "beside.json"}
    assert all(".beside" not in name for name in weights_of(tmp_path / "second"))


def test_a_run_beside_another_adapter_resumes_and_its_card_and_generation_load_both(tmp_path):
    from src.generation import load_for_generation

    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320)
    first = trained_adapter(checkpoint, tmp_path / "first", 1)
    adapter = {"kind": "lora", "rank": 2, "beside": [str(first)]}
    recipe = write_recipe(tmp_path, model=from_checkpoint(checkpoint), adapter=adapter, training={"max_steps": 3})
    run, whole = tmp_path / "outputs" / "run", tmp_path / "whole"
    assert run_train("--config", recipe).code == 0
    shutil.copytree(run, whole)
    stop_after(run, 2)
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    assert_same_run(run, whole)
    card = (run / "README.md").read_text()
    assert "to be used with the adapters `first`" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = (
        code[: code.index("messages =")].replace('"base"', repr(str(checkpoint))).replace('"first"', repr(str(first)))
    )
    code = re.sub(r'location = ".*"', f"location = {str(run / 'model')!r}", code)
    names: dict = {}
    exec(code, names)  # what a reader of the card runs
    both, _ = load_for_generation(str(run / "model"))
    assert torch.equal(logits_of(both.cpu()), logits_of(names["model"]))
    alone = AutoPeftModelForCausalLM.from_pretrained(run / "model")
    assert not torch.allclose(logits_of(alone), logits_of(both), atol=1e-2)


def test_an_adapter_goes_on_with_its_own_settings(base, tmp_path, caplog, monkeypatch):
    first = trained_adapter(base, tmp_path / "first", 1, target_modules=("q_proj",))
    model = add_adapter(load(base), AdapterConfig(kind="lora", path=str(first)))
    assert torch.equal(logits_of(model), logits_of(PeftModel.from_pretrained(load(base), first)))
    losses = train(model)
    assert losses[-1] < losses[0]
    for more, told in (
        ({"rank": 5}, "adapter.rank=5 contradicts adapter.path=.*r=2"),
        ({"target_modules": ("k_proj",)}, "adapter.target_modules=.*contradicts.*q_proj"),
        ({"settings": {"bias": "all"}}, "adapter.settings.bias=all contradicts.*bias=none"),
    ):
        with pytest.raises(UserError, match=told):
            add_adapter(load(base), AdapterConfig(kind="lora", path=str(first), **more))
    with pytest.raises(UserError, match=r"is of kind lora, and adapter.kind=oft"):
        add_adapter(load(base), AdapterConfig(kind="oft", path=str(first)))
    monkeypatch.setattr(logging.getLogger("smolfactory"), "propagate", True)
    tail = add_adapter(load(base), AdapterConfig(kind="lora", path=str(first)), first_new_row=318)
    assert "tokens that are new to the base do not train" in caplog.text
    assert tail.peft_config["default"].r == 2
    other = write_checkpoint(tmp_path / "other", vocabulary=320)
    with pytest.raises(UserError, match=f"was trained beside {base}, and model.path={other}"):
        add_adapter(load(other), AdapterConfig(kind="lora", path=str(first)))


# Quantized bases


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"kind": "lora"}, ()),
        ({"kind": "lora", "dora": True}, ("int8",)),
        ({"kind": "lora", "init": "loftq"}, ("nf4",)),
        ({"kind": "oft"}, ()),
        ({"kind": "loha"}, ("nf4",)),
        ({"kind": "hra"}, ("nf4", "int8")),  # beside int8 it reads the bytes as weights, and says nothing
    ],
    ids=["lora", "dora", "loftq", "oft", "loha", "hra"],
)
def test_what_does_not_train_beside_quantized_weights_is_refused_before_the_model_loads(config, refused, quantization):
    if torch.accelerator.is_available():
        pytest.skip("what bitsandbytes lacks differs between a CPU and a GPU")
    if config.get("init") == "loftq" and quantization == "int8":
        return  # the config refuses it
    model = ModelConfig(path="nowhere", quantization=quantization)
    if quantization not in refused:
        probe_adapter(AdapterConfig(**config), model, toy_tokenizer())
        return
    with pytest.raises(UserError, match=f"does not train beside model.quantization={quantization} on this cpu"):
        probe_adapter(AdapterConfig(**config), model, toy_tokenizer())

"""What a base's weights are held in: what trains on it, what is refused, and what is written."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, GptOssForCausalLM, TorchAoConfig

from config.schema import AdapterConfig, ModelConfig, OptimConfig
from src.adapters import add_adapter, count_parameters
from src.generation import load_for_generation
from src.model import load_model, load_settings, load_tokenizer
from src.precision import Precision
from src.quantization import check_base, held_bytes
from tests.tiny_run import (
    ARCHITECTURE,
    from_checkpoint,
    metrics_of,
    run_train,
    stop_after,
    weights_of,
    without_timings,
    write_checkpoint,
    write_recipe,
)
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

SIZES = {"vocabulary": 320, "hidden_size": 64, "intermediate_size": 128}
TORCHAO = ("torchao_int8", "torchao_int4", "torchao_float8")


def base_of(folder, *, trains_all=False, **fields):
    config = ModelConfig(path=str(folder), **fields)
    tokenizer = load_tokenizer(config)
    settings = load_settings(config, tokenizer)
    check_base(config, settings, trains_all=trains_all)
    return load_model(config, settings, tokenizer, trains_all=trains_all)


def plain_twin(folder, kind):
    """The base with the numbers that its quantized weights stand for, in float32."""
    quantized, plain = base_of(folder, quantization=kind), base_of(folder)
    if kind in TORCHAO:
        modules = dict(quantized.named_modules())
        values = {
            f"{name}.weight": modules[name].weight.dequantize()
            for name, module in plain.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        assert len(values) == 2 * 7
    else:
        values = quantized.dequantize().state_dict()
    plain.load_state_dict(values, strict=kind not in TORCHAO)
    return plain


def losses_of_lora(model, steps=10):
    """Losses of some steps of AdamW on one batch, from the same matrices each time."""
    torch.manual_seed(0)
    model = add_adapter(model, AdapterConfig(kind="lora", rank=4)).train()
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", *TORCHAO])
def test_lora_beside_quantized_weights_learns_as_beside_the_values_that_they_stand_for(tmp_path, kind):
    if kind in TORCHAO:
        pytest.importorskip("torchao")
    write_checkpoint(tmp_path, **SIZES)
    # bitsandbytes computes 4-bit products in bfloat16, which has 8 bits: 0.4 % each, in 14 layers and 10 steps. The
    # others round the weights alone, and differ from a product with the same numbers in the order of its sums.
    allowed = 3e-2 if kind in ("nf4", "fp4") else 1e-5
    found = losses_of_lora(base_of(tmp_path, quantization=kind))
    expected = losses_of_lora(plain_twin(tmp_path, kind))
    assert found[-1] < found[0] / 2
    torch.testing.assert_close(found, expected, rtol=allowed, atol=0.0)


@pytest.mark.parametrize("nested", [True, False])
def test_scales_are_quantized_unless_told_otherwise(tmp_path, nested):
    write_checkpoint(tmp_path, **SIZES)
    model = base_of(tmp_path, quantization="nf4", double_quant=nested)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested is nested


def test_four_bit_weights_are_stored_as_the_others_where_fsdp_shards_them(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, **SIZES)
    numbers = count_parameters(base_of(tmp_path))["total"]
    assert base_of(tmp_path, quantization="nf4").model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for dtype in ("auto", "bfloat16"):
        model = base_of(tmp_path, quantization="nf4", dtype=dtype)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32 if dtype == "auto" else torch.bfloat16}
        assert count_parameters(model)["total"] == numbers


def test_bytes_of_torchaos_formats_are_those_of_their_parts(tmp_path):
    pytest.importorskip("torchao")
    write_checkpoint(tmp_path, **SIZES)
    # up_proj is 128 x 64 weights. A scale is float32, one a row in 8 bits, one for 32 weights in 4, for integers with a
    # zero point of a byte; torchao holds 4-bit numbers in a byte each.
    expected = {"torchao_int8": 8192 + 5 * 128, "torchao_float8": 8192 + 4 * 128, "torchao_int4": 8192 + 5 * 256}
    for kind, size in expected.items():
        assert held_bytes(base_of(tmp_path, quantization=kind).model.layers[0].mlp.up_proj.weight) == size, kind
    precision = Precision.of(base_of(tmp_path, quantization="torchao_int4"), autocast=None, optim=OptimConfig())
    assert precision.frozen == "torchao int4"  # the rest is frozen by the adapter only


@pytest.mark.parametrize("kind", TORCHAO)
def test_an_adapter_trains_beside_torchaos_formats(tmp_path, kind):
    pytest.importorskip("torchao")
    model = from_checkpoint(write_checkpoint(tmp_path / "base", **SIZES), quantization=kind)
    recipe = write_recipe(tmp_path, model=model, adapter={"kind": "lora", "rank": 2}, optim={"learning_rate": 1e-2})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    losses = [line["eval_loss"] for line in metrics_of(tmp_path / "outputs" / "run") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    assert all("lora_" in name for name in weights_of(tmp_path / "outputs" / "run" / "model"))


def settings_with(folder, own, **fields):
    """A checkpoint's settings that name a format of its own, and the model section that starts from it."""
    write_checkpoint(folder, **SIZES)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": own}))
    config = ModelConfig(path=str(folder), **fields)
    return config, load_settings(config, load_tokenizer(config))


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
INT8_INT4 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationIntxWeightConfig"}}}


@pytest.mark.parametrize(
    ("own", "fields", "trains_all", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, {}, False, ["gptq", "optimum and gptqmodel", "pip install"]),
        ({"quant_method": "awq", "bits": 4}, {}, False, ["awq", "pip install gptqmodel"]),
        ({"quant_method": "hqq"}, {}, False, ["hqq", "cannot train on"]),
        (NF4, {"quantization": "fp4"}, False, ["in nf4", "model.quantization=fp4"]),
        (NF4, {}, True, ["in nf4", "adapter.kind=none"]),
        (NF4, {"qat": "int4"}, True, ["in nf4", "model.qat=int4"]),
        ({"quant_method": "fp8"}, {"quantization": "int8"}, False, ["in fp8", "model.quantization=int8"]),
        (INT8_INT4, {}, False, ["Int8DynamicActivationIntxWeightConfig", "no adapter trains"]),
    ],
)
def test_what_no_run_can_train_on_is_refused_before_it_loads(tmp_path, own, fields, trains_all, words):
    if own["quant_method"] == "torchao":
        pytest.importorskip("torchao")
    config, settings = settings_with(tmp_path, own, **fields)
    with pytest.raises(UserError) as caught:
        check_base(config, settings, trains_all=trains_all)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(("name", "flows"), [("IntxWeightOnly", True), ("Int8DynamicActivationIntx", False)])
def test_rounded_activations_let_no_gradient_through_to_adapters(tmp_path, name, flows):
    torchao = pytest.importorskip("torchao.quantization")
    write_checkpoint(tmp_path, **SIZES)
    granularity = {"granularity" if flows else "weight_granularity": torchao.PerGroup(32)}
    rounding = getattr(torchao, f"{name}{'' if flows else 'Weight'}Config")(weight_dtype=torch.int4, **granularity)
    gradients = []
    for plain_activations in (False, True):
        model = base_of(tmp_path)
        torchao.quantize_(
            model, rounding, lambda module, name: isinstance(module, torch.nn.Linear) and "lm_" not in name
        )
        if plain_activations:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize"):
                    module.weight = torch.nn.Parameter(module.weight.dequantize())
        model = add_adapter(model, AdapterConfig(kind="lora", rank=2)).train()
        torch.manual_seed(1)
        matrices = [weight for name, weight in model.named_parameters() if "lora_" in name]
        for weight in matrices:
            torch.nn.init.normal_(weight, std=0.1)
        ids = torch.arange(3, 40)[None]
        model(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in matrices]))
    likeness = torch.cosine_similarity(*gradients, dim=0)
    # Where this fails for the second, torchao has learned to pass a gradient, and `check_base` may let it in.
    assert likeness > 0.9999 if flows else likeness < 0.5


def test_a_missing_torchao_is_an_error_that_names_the_file(tmp_path):
    write_checkpoint(tmp_path, **SIZES)
    with mock.patch("importlib.util.find_spec", return_value=None):
        for fields in ({"quantization": "torchao_int8"}, {"qat": "int4"}):
            with pytest.raises(UserError, match=r"requirements/quantization\.txt"):
                base_of(tmp_path, **fields)


def test_torchaos_weights_are_refused_in_several_processes(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    write_checkpoint(tmp_path, **SIZES)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchao_int8 cannot be sent between the 2 processes"):
        base_of(tmp_path, quantization="torchao_int8")
    base_of(tmp_path, trains_all=True, qat="int4")  # trains plain weights


def test_rows_that_do_not_part_into_groups_are_an_error_before_the_model_loads(tmp_path):
    pytest.importorskip("torchao")
    write_checkpoint(tmp_path, vocabulary=320, hidden_size=48)
    with pytest.raises(UserError, match=r"model.qat=int4 rounds .*q_proj has rows of 48"):
        base_of(tmp_path, trains_all=True, qat="int4")


def test_a_checkpoint_in_four_bits_is_loaded_as_it_is(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", **SIZES)
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=own).save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    recipe = write_recipe(tmp_path, model=from_checkpoint(tmp_path / "base"), adapter={"kind": "lora", "rank": 2})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert "frozen weights in float32 and nf4" in done.stderr
    held, made = (
        base.model.layers[0].mlp.up_proj.weight
        for base in (base_of(tmp_path / "base"), base_of(plain, quantization="nf4", double_quant=False))
    )
    assert held.quant_type == "nf4"
    assert torch.equal(held.data, made.data)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_checkpoint_of_torchaos_is_loaded_as_it_is(tmp_path, name):
    torchao = pytest.importorskip("torchao.quantization")
    plain = write_checkpoint(tmp_path / "plain", **SIZES)
    rounding = TorchAoConfig(getattr(torchao, name)())
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=rounding).save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    recipe = write_recipe(tmp_path, model=from_checkpoint(tmp_path / "base"), adapter={"kind": "lora", "rank": 2})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    kind = {"Int8WeightOnlyConfig": "torchao_int8", "Float8WeightOnlyConfig": "torchao_float8"}[name]
    held, made = (
        base.model.layers[0].mlp.up_proj.weight
        for base in (base_of(tmp_path / "base"), base_of(plain, quantization=kind))
    )
    assert type(held) is type(made)
    assert torch.equal(held.dequantize(), made.dequantize())


def test_fp8_is_dequantized_where_every_weight_trains(tmp_path):
    write_checkpoint(tmp_path, vocabulary=320, hidden_size=128, intermediate_size=128, num_attention_heads=1,
                     num_key_value_heads=1)  # fmt: skip
    file, expected = tmp_path / "model.safetensors", {}
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448  # the largest number of float8_e4m3fn
        rounded = (tensors[name] / scale).to(torch.float8_e4m3fn)
        expected[name] = rounded.float() * scale
        tensors |= {name: rounded, f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(tensors, file, metadata={"format": "pt"})
    own = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": own}))
    model = base_of(tmp_path, trains_all=True)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).data, weight)
    assert all(weight.requires_grad for weight in model.parameters())


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""What the 16 numbers of four bits stand for, by the OCP's specification of microscaling formats, 5.3.3."""


def test_mxfp4_is_dequantized(tmp_path):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, expected = load_file(file), {}
    for part, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        name = f"model.layers.0.mlp.experts.{part}"
        del tensors[name]
        blocks = torch.randint(0, 256, (2, rows, 2, 16), dtype=torch.uint8)  # pairs, the lower half byte first
        scales = torch.randint(120, 130, (2, rows, 2), dtype=torch.uint8)
        pairs = torch.stack((FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]), dim=-1)
        values = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
        expected[name] = values.reshape(2, rows, 64).transpose(1, 2)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, file, metadata={"format": "pt"})
    path = tmp_path / "config.json"
    own = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": own}))
    model = base_of(tmp_path, trains_all=True)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).data, weight)
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize("kind", ["int4", "int8_int4"])
def test_a_run_that_rounds_is_written_as_what_it_trained_for(tmp_path, kind):
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.qat import QATConfig  # once torchao is known to be there

    architecture = ARCHITECTURE | {"hidden_size": 64}
    recipe = write_recipe(
        tmp_path, model={"architecture": architecture, "qat": kind}, training={"save_every_steps": 2, "max_steps": 4}
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    run = tmp_path / "outputs" / "run"
    assert f"rounded ({kind}), and need torchao" in (run / "README.md").read_text()
    result = AutoModelForCausalLM.from_pretrained(run / "model")
    assert type(result.model.layers[0].mlp.up_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"
    # The last checkpoint's plain weights, converted by torchao's own second step.
    plain = AutoModelForCausalLM.from_pretrained(run / "checkpoint-4")
    granularity = torchao.PerGroup(32)
    rounding = (
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
        if kind == "int4"
        else torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=granularity)
    )
    chosen = {"filter_fn": lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head"}
    torchao.quantize_(plain, QATConfig(rounding, step="prepare"), **chosen)
    torchao.quantize_(plain, QATConfig(rounding, step="convert"))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(result(ids).logits, plain(ids).logits)
    assert type(load_for_generation(str(run / "model"))[0]) is type(result)
    before = without_timings(metrics_of(run))
    stop_after(run, 2)
    done = run_train("--config", recipe, "--resume")
    assert done.code == 0, done.stderr
    after = without_timings(metrics_of(run))
    assert [line["loss"] for line in after if "loss" in line] == [line["loss"] for line in before if "loss" in line]

"""An adapter merged into its base does what the two did, or the merge is refused and nothing is written."""

import copy
import json
import sys
from unittest import mock

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from config.schema import ModelConfig
from scripts import convert_checkpoint
from src.checkpoints import hf
from src.checkpoints.certificate import CertificateError
from src.checkpoints.checkpoint import ReadOptions
from src.merging.adapter import AdapterOptions, read_adapter
from src.merging.merge import MergeOptions, merge
from src.merging.proof import compare_logits, kept_change, prove
from src.merging.rows import Rows
from src.merging.trained import open_trained
from src.model import load_model
from tests.tiny_run import from_checkpoint, run_train, weights_of, write_checkpoint, write_recipe
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    # Wide enough that each row of a weight holds several of nf4's blocks of 64.
    "wide": LlamaConfig(**SHAPE | {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}),
}
LORA = {"task_type": "CAUSAL_LM", "r": 4}
LINEAR = LoraConfig(**LORA, target_modules="all-linear")
KINDS = {
    "all linear": ("llama", LINEAR),
    "dora": ("llama", LoraConfig(**LORA, target_modules="all-linear", use_dora=True)),
    "ranks and scales by module": (
        "llama",
        LoraConfig(
            **LORA,
            target_modules=["q_proj", "down_proj"],
            use_rslora=True,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"down_proj": 3},
        ),
    ),
    "embedding, and a head trained whole": (
        "llama",
        LoraConfig(**LORA, target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
    ),
    "biases": ("qwen2", LoraConfig(**LORA, target_modules=["q_proj"], lora_bias=True)),
    "a tied head alone": ("qwen2", LoraConfig(**LORA, target_modules=["lm_head"])),
    "a tied embedding alone": ("qwen2", LoraConfig(**LORA, target_modules=["embed_tokens"])),
    "tokens": ("qwen2", LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[5, 6])),
    "conv1d": ("gpt2", LoraConfig(**LORA, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "experts": ("mixtral", LoraConfig(**LORA, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}
FLOAT = AdapterOptions(quantization="none")
IDS = torch.arange(3, 60)[None]


def write_base(folder, family, dtype=torch.float32):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def write_adapter(folder, config, base):
    """An adapter with random weights."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), copy.deepcopy(config))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def write_change(folder, relative, dtype=torch.bfloat16):
    """A wide base, and an adapter whose change of each weight has a norm of `relative` times the weight's."""
    base = write_base(folder / "base", "wide", dtype)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), copy.deepcopy(LINEAR))
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "get_delta_weight"):
                half = module.lora_B["default"].weight.normal_()
                half *= relative * module.base_layer.weight.norm() / module.get_delta_weight("default").norm()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def random_rows():
    torch.manual_seed(2)
    return Rows(tuple(map(tuple, torch.randint(320, (6, 60)).tolist())), "random ids")


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_gives_the_logits_of_the_base_with_the_adapter(kind, tmp_path):
    family, config = KINDS[kind]
    base = write_base(tmp_path / "base", family)
    adapter = write_adapter(tmp_path / "adapter", config, base)
    record = merge(adapter, tmp_path / "merged", MergeOptions(FLOAT))
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter)(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (expected - AutoModelForCausalLM.from_pretrained(base)(IDS).logits).abs().max() > 0.05
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-4)  # sums run in another order
    assert record["kept"]["tensors_changed"] > 0
    assert record["kept"]["least_cosine"] > 0.9999
    # A head that comes apart from its embedding is written; else the same tensors are as before.
    apart = kind in ("a tied head alone", "a tied embedding alone")
    assert record["unties_embeddings"] == apart
    assert weights_of(tmp_path / "merged").keys() == weights_of(base).keys() | ({"lm_head.weight"} if apart else set())
    assert merged.config.tie_word_embeddings == (FAMILIES[family].tie_word_embeddings and not apart)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("family", ["wide", "gpt2"])
def test_the_base_of_a_quantized_run_is_taken_as_its_products_see_it(quantization, family, tmp_path):
    base = write_base(tmp_path / "base", family, torch.bfloat16)
    target = LoraConfig(**LORA, target_modules=["c_attn"] if family == "gpt2" else ["down_proj"])
    adapter = write_adapter(tmp_path / "adapter", target, base)
    trained = open_trained(read_adapter(adapter, AdapterOptions(quantization=quantization)))
    model = load_model(
        ModelConfig(path=str(base), quantization=quantization),
        AutoModelForCausalLM.from_pretrained(base).config,
        toy_tokenizer(),
        trains_all=False,
    )
    name = "transformer.h.1.attn.c_attn" if family == "gpt2" else "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    # The products of unit vectors are the weight's rows; int8 products round those vectors to themselves too.
    identity = torch.eye(layer.in_features, dtype=torch.bfloat16, device=model.device)
    layer.bias = None
    seen = layer(identity).float().cpu()
    found = trained.base[f"{name}.weight"].load()
    found = found if family == "gpt2" else found.T
    if quantization == "int8":  # whose product is rounded to bfloat16 once more
        torch.testing.assert_close(found, seen, rtol=2**-8, atol=0)
    else:
        assert torch.equal(found, seen)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantized_bases_adapter_keeps_its_change_of_a_hundredth_in_16_bit(quantization, tmp_path):
    adapter = write_change(tmp_path, 0.01)
    record = merge(adapter, tmp_path / "merged", MergeOptions(AdapterOptions(quantization=quantization)))
    assert record["dtype"] == "bfloat16"
    assert record["kept"]["least_cosine"] > 0.98
    quantized = record["kept"]["as_quantized"]
    assert quantized["kl_nats_per_token"] < quantized["kl_allowed"]
    assert not any("quantization_config" in text for text in (tmp_path / "merged" / "config.json").read_text().split())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_change_of_a_thousandth_needs_float32_and_gets_it(quantization, tmp_path):
    adapter = write_change(tmp_path, 0.001)
    options = AdapterOptions(quantization=quantization)
    with pytest.raises(CertificateError, match=r"kept with a cosine of 0\.[3-7].*--dtype float32, or keep the adapter"):
        merge(adapter, tmp_path / "merged", MergeOptions(options, dtype="bfloat16"))
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []
    record = merge(adapter, tmp_path / "merged", MergeOptions(options))
    assert record["dtype"] == "float32"
    assert record["kept"]["least_cosine"] > 0.9999


def test_the_16_bit_original_under_a_4_bit_runs_adapter_is_refused(tmp_path):
    adapter = write_change(tmp_path, 0.01)
    trained = open_trained(read_adapter(adapter, AdapterOptions(quantization="nf4")))
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload()
    merged.save_pretrained(tmp_path / "folded")
    folded = hf.read(tmp_path / "folded", ReadOptions(tokenizer=tmp_path / "base"))
    with pytest.raises(CertificateError, match="lost part of what was learned"):
        prove(trained, folded, random_rows())
    name = "model.layers.1.mlp.down_proj.weight"
    change = trained.merged[name].load() - trained.base[name].load()
    error = folded.tensors[name].load() - trained.merged[name].load()
    assert error.norm() > 6 * change.norm()  # nf4 moves a normal weight by about 9 % of itself


def test_merged_weights_that_are_quantized_again_are_refused(tmp_path):
    adapter = write_change(tmp_path, 0.01)
    options = AdapterOptions(quantization="nf4")
    merge(adapter, tmp_path / "merged", MergeOptions(options))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", quantization_config=nf4).dequantize()
    again.save_pretrained(tmp_path / "again")
    trained = open_trained(read_adapter(adapter, options))
    written = hf.read(tmp_path / "again", ReadOptions(tokenizer=tmp_path / "base"))
    with pytest.raises(CertificateError, match="lost part of what was learned"):
        prove(trained, written, random_rows())
    assert kept_change(trained, written.tensors).least_cosine < 0.2


def test_divergence_and_agreement_are_those_of_a_hand_computation():
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    divergence, agreement = compare_logits([half, quarter], [quarter, quarter])
    # KL((1/2, 1/2), (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3 = 0.14384, over two tokens
    assert divergence == pytest.approx(0.143841 / 2, abs=1e-6)
    assert agreement == 0.5


def test_a_run_of_a_quantized_base_tells_all_that_its_merge_needs(tmp_path):
    base = write_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=128)  # the pad token is new to it
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(base, quantization="nf4"),
        adapter={"kind": "lora", "rank": 2},
        optim={"learning_rate": 0.02},
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    run = tmp_path / "outputs" / "run"
    record = merge(run, tmp_path / "merged")
    assert (record["base_quantization"], record["base_quantization_told_by"]) == ("nf4", "the run's config.json")
    assert record["kept"]["rows_from"] == "the run's evaluation rows and fixed texts"
    assert json.loads((tmp_path / "merged" / "conversion.json").read_text()) == record
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) > len(toy_tokenizer())
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run / "model").chat_template
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    with pytest.raises(UserError, match=r"model.quantization=nf4; leave the option out"):
        merge(run, tmp_path / "other", MergeOptions(FLOAT))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    base = write_base(folder / "base", "llama")
    return folder, write_adapter(folder / "adapter", LINEAR, base)


def changed_copy(finished, tmp_path, change):
    """The adapter with other tensors."""
    for path in finished[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(change(tensors), tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_an_adapter_whose_bases_format_nothing_tells_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match=r"nothing beside .* tells .* --base-quantization none\|nf4\|fp4\|int8"):
        merge(finished[1], tmp_path / "merged")


@pytest.mark.parametrize("family", ["wide", "gpt2"])
def test_an_adapter_of_another_base_is_refused_with_the_names_of_both(family, finished, tmp_path):
    other = write_base(tmp_path / "other", family)
    with pytest.raises(UserError) as refusal:
        merge(finished[1], tmp_path / "merged", MergeOptions(AdapterOptions(base=other, quantization="none")))
    assert str(other) in str(refusal.value)
    assert str(finished[0] / "base") in str(refusal.value)


def test_an_adapter_that_is_cut_short_is_refused(finished, tmp_path):
    adapter = changed_copy(finished, tmp_path, dict)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged or cut short"):
        merge(adapter, tmp_path / "merged", MergeOptions(FLOAT))


def test_a_tensor_that_is_missing_is_named(finished, tmp_path):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    adapter = changed_copy(finished, tmp_path, lambda found: {key: found[key] for key in found if key != name})
    with pytest.raises(UserError, match=rf"adapter_model.safetensors .* lacks 1 \({name}\)"):
        merge(adapter, tmp_path / "merged", MergeOptions(FLOAT))


def test_a_rank_that_is_not_the_configs_is_refused(finished, tmp_path):
    adapter = changed_copy(finished, tmp_path, dict)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(UserError, match=r"lora_A.weight has shape \(4, 32\), while adapter_config.json .* \(8, 32\)"):
        merge(adapter, tmp_path / "merged", MergeOptions(FLOAT))


def test_an_adapter_that_moved_part_of_its_base_is_refused(finished, tmp_path):
    adapter = changed_copy(finished, tmp_path, dict)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="init_lora_weights=pissa, which moves part of the base into the adapter"):
        merge(adapter, tmp_path / "merged", MergeOptions(FLOAT))


def test_the_command_merges_and_says_what_is_left(finished, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "please count to seven"}\n{"text": "and back to zero again"}\n', encoding="utf-8")

    def command(*arguments):
        with mock.patch.object(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)]):
            return convert_checkpoint.main()

    asked = ("--merge", finished[1], tmp_path / "merged", "--rows", rows)
    assert command(*asked) == 2
    assert "--base-quantization" in capsys.readouterr().err
    assert command(*asked, "--base-quantization", "none") == 0
    told = capsys.readouterr().out
    assert "the change is kept with a cosine of at least 1.0000" in told
    assert f"tokens of {rows}" in told
    with pytest.raises(SystemExit, match="2"):
        command(*asked, "--to", "hf")

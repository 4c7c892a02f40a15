"""Every family of models trains, in full and with LoRA, and its result is what plain transformers and PEFT load.

Each is a model of random weights of some thousand parameters, run by `train.py` itself. What is no causal language
model of text is refused, and so is code that nobody has vouched for.
"""

import json
import math
import re
from unittest import mock

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForConditionalGeneration,
    Llama4ForConditionalGeneration,
    Qwen2Tokenizer,
)

from config.constraints import ConfigError, check_constraints
from config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from src.model import load_settings, load_tokenizer
from src.run import Run
from tests.tiny_run import ARCHITECTURE, from_checkpoint, metrics_of, run_train, write_checkpoint, write_recipe
from tests.toy_tokenizer import CHATML, toy_tokenizer
from utils.errors import UserError

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES = {
    "llama": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 8, **WINDOW},
    "gemma3_text": {"head_dim": 8, **WINDOW},
    "phi3": {},
    "gpt2": GPT2,
    "gpt_neox": {"num_key_value_heads": None},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "olmo2": {},
    "cohere2": {"logit_scale": 0.25, **WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **EXPERTS},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
}


def architecture_of(family):
    if family == "gpt2":
        return {"model_type": "gpt2", **GPT2}
    # A setting of None is left out: its name is not one of this family's.
    settings = ARCHITECTURE | {"model_type": family} | FAMILIES[family]
    return {name: value for name, value in settings.items() if value is not None}


def train_family(folder, **sections):
    """Three steps of `train.py`: the run's directory, and the logits of the trained model as it stood in memory."""
    in_memory, export = [], Run.export

    def keep(run, trainer, *given, **named):
        in_memory.append(logits_of(trainer.model))
        export(run, trainer, *given, **named)

    recipe = write_recipe(
        folder, training={"max_steps": 3, "accumulation_steps": 2, "save_every_steps": None}, **sections
    )
    with mock.patch.object(Run, "export", keep):
        done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    return folder / "outputs" / "run", in_memory[0], done


@torch.no_grad()
def logits_of(model):
    ids = torch.arange(1, 41)[None]
    return model.eval()(input_ids=ids, use_cache=False).logits


def assert_learned_as_loaded(run, in_memory, loaded, *, routed):
    """The metrics are those of a training, of a model of experts if `routed`, and the loaded model computes what the
    trained one did."""
    lines = [line for line in metrics_of(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert all(("router_aux_loss" in line) == routed for line in lines)
    # Attention of plain transformers sums in another order.
    torch.testing.assert_close(logits_of(loaded), in_memory, rtol=1e-4, atol=1e-4)


def qwen2_tokenizer(folder):
    """The toy tokenizer's vocabulary, split as transformers splits for every model of this kind."""
    model = json.loads(toy_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(model["vocab"], merges, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return {"tokenizer": str(folder), "chat_template": None, "special_tokens": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_its_result_loads_as_it_was(tmp_path, family):
    tokenizer = qwen2_tokenizer(tmp_path / "tokenizer") if family == "qwen2" else {}
    architecture = {"architecture": architecture_of(family)}
    run, in_memory, done = train_family(tmp_path / "full", model=architecture | tokenizer)
    base, routed = run / "model", family in ("mixtral", "qwen3_moe", "gpt_oss")
    assert_learned_as_loaded(run, in_memory, AutoModelForCausalLM.from_pretrained(base), routed=routed)
    assert "is unknown, so those of a whole batch's" not in done.stderr
    assert json.loads((run / "result.json").read_text())["packing"]

    run, in_memory, done = train_family(
        tmp_path / "lora",
        model=from_checkpoint(base),
        adapter={"kind": "lora", "rank": 2},
    )
    assert_learned_as_loaded(run, in_memory, AutoPeftModelForCausalLM.from_pretrained(run / "model"), routed=routed)
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


def test_a_tokenizer_that_is_loaded_as_another_one_beside_the_model_is_refused(tmp_path):
    recipe = write_recipe(tmp_path, model={"architecture": architecture_of("qwen2")})
    done = run_train("--config", recipe)
    assert done.code == 2
    assert "the tokenizer of a 'qwen2' is loaded as Qwen2Tokenizer by transformers" in done.stderr
    write_config(tmp_path / "base", "qwen2")
    assert "is loaded as Qwen2Tokenizer" in refusal_of(tmp_path / "base", tokenizer=str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"num_experts": 4}, True),  # Qwen3-MoE's own name in published configs
        ({"head_dim": 8}, True),  # read by its code, and declared nowhere
        ({"head_dims": 8}, False),
        ({"num_expert": 4}, False),
    ],
)
def test_settings_are_known_by_all_names_that_a_family_reads(tmp_path, settings, known):
    toy_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = ModelConfig(
        architecture=ARCHITECTURE | {"model_type": "qwen3_moe"} | settings, tokenizer=str(tmp_path / "tokenizer.json")
    )
    tokenizer = load_tokenizer(config)
    if known:
        found = load_settings(config, tokenizer)
        assert {name: getattr(found, name) for name in settings} == settings
        return
    with pytest.raises(UserError, match=rf"settings that 'qwen3_moe' does not know: {next(iter(settings))}"):
        load_settings(config, tokenizer)


# What is no causal language model of text.

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def write_config(folder, kind, **settings):
    """A checkpoint's folder with its config and tokenizer, and without weights: none may be looked for."""
    config = AutoConfig.for_model(kind, **settings)
    config.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return config


def refusal_of(folder, **fields):
    config = ModelConfig(path=str(folder), **fields)
    with pytest.raises(UserError) as caught:
        load_settings(config, toy_tokenizer())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "is a 't5', an encoder with a decoder"),
        ("whisper", "is a 'whisper', an encoder with a decoder"),
        ("bert", "is a 'bert', an encoder, in which each token sees those after it"),
        ("roberta", "is a 'roberta', an encoder, in which each token sees those after it"),
        ("vit", "is a 'vit', of which transformers has no causal language model"),
        ("distilbert", "is a 'distilbert', of which transformers has no causal language model"),
        ("qwen2_vl", "is a 'qwen2_vl' with vision_config, and only models of text alone are trained"),
        ("llava", "is a 'llava' with vision_config"),
        ("qwen2_audio", "is a 'qwen2_audio' with audio_config"),
    ],
)
def test_what_is_no_causal_language_model_of_text_is_refused_before_weights_load(tmp_path, kind, reason):
    write_config(tmp_path, kind)
    assert f"model.path={tmp_path} {reason}" in refusal_of(tmp_path)


def test_encoders_are_refused_as_architectures_too(tmp_path):
    recipe = write_recipe(tmp_path, model={"architecture": {"model_type": "bert", "hidden_size": 24}})
    done = run_train("--config", recipe)
    assert done.code == 2
    assert "model.architecture.model_type=bert is a 'bert', an encoder" in done.stderr


def test_a_bert_that_is_a_decoder_is_taken(tmp_path):
    config = write_config(tmp_path, "bert", is_decoder=True, vocab_size=400)
    AutoModelForCausalLM.from_config(config)
    assert load_settings(ModelConfig(path=str(tmp_path)), toy_tokenizer()).is_decoder


@pytest.mark.parametrize(
    ("kind", "whole", "text"),
    [
        ("gemma3", Gemma3ForConditionalGeneration, SIZES),
        ("llama4", Llama4ForConditionalGeneration, SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 64}),
    ],
)
def test_the_text_part_of_a_checkpoint_that_sees_is_saved_as_the_refusal_says(tmp_path, monkeypatch, kind, whole, text):
    eyes = EYES | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=EYES if kind == "gemma3" else eyes)
    torch.manual_seed(0)
    model = whole(config).eval()
    model.save_pretrained(tmp_path / "whole")
    toy_tokenizer().save_pretrained(tmp_path / "whole")
    told = refusal_of(tmp_path / "whole")
    assert f"its text part alone is a '{kind}_text'" in told
    [command] = re.findall(r'`python -c "(.*)"`', told)
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text-only")
    assert alone.config.model_type == f"{kind}_text"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)) if kind == "gemma3" else model(ids)
        torch.testing.assert_close(alone.eval()(ids).logits, expected.logits, rtol=1e-5, atol=1e-5)
    load_settings(ModelConfig(path=str(tmp_path / "text-only"), tokenizer=str(tmp_path / "whole")), toy_tokenizer())


# Code that ships with a checkpoint.

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write_own_code(folder, mark, *, known=False, prefix=""):
    """A checkpoint whose config names classes in a file beside it, which leaves a mark when it runs.

    Args:
        known: whether transformers has a class of its own for the checkpoint's kind.
    """
    write_checkpoint(folder)
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(mark)), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    config["auto_map"] = {name: f"{prefix}modeling_own.{value}" for name, value in own.items()}
    config["model_type"] = "llama" if known else "own"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_own_code_of_a_checkpoint_does_not_run_unless_it_is_trusted(tmp_path):
    mark = tmp_path / "ran"
    folder = write_own_code(tmp_path / "base", mark)
    model = from_checkpoint(folder)
    done = run_train("--config", write_recipe(tmp_path, model=model))
    assert done.code == 2
    assert "brings code of its own for 'own', which transformers does not have" in done.stderr
    assert "set model.trust_remote_code=true" in done.stderr
    assert not mark.exists()

    recipe = write_recipe(tmp_path, model=model | {"trust_remote_code": True}, training={"max_steps": 1})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert mark.exists()
    result = tmp_path / "outputs" / "run" / "model"
    loaded = AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"


def test_own_code_of_a_kind_that_transformers_has_is_left_alone(tmp_path):
    mark = tmp_path / "ran"
    folder = write_own_code(tmp_path / "base", mark, known=True)
    config = ModelConfig(path=str(folder))
    assert load_settings(config, load_tokenizer(config)).model_type == "llama"
    assert not mark.exists()


def test_trusted_code_that_stands_in_another_repository_is_refused(tmp_path):
    folder = write_own_code(tmp_path / "base", tmp_path / "ran", prefix="someone/else--")
    assert "takes its code from another repository, someone/else" in refusal_of(folder, trust_remote_code=True)
    with pytest.raises(UserError, match="another repository, someone/else"):
        load_tokenizer(ModelConfig(path=str(folder), trust_remote_code=True))


def run_of(**model):
    return RunConfig(model=ModelConfig(**model), data=DataConfig(train=(SourceConfig(path="rows.jsonl"),)))


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc1234", "A" * 40])
def test_code_of_a_hub_checkpoint_is_trusted_at_a_whole_commit_only(revision):
    with pytest.raises(ConfigError, match=r"give as model\.revision the full hash"):
        check_constraints(run_of(path="owner/name", revision=revision, trust_remote_code=True))
    check_constraints(run_of(path="owner/name", revision="0123456789" * 4, trust_remote_code=True))


def test_trust_needs_a_checkpoint_and_a_folder_is_trusted_as_it_stands(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true is given with no model\.path"):
        check_constraints(run_of(architecture=ARCHITECTURE, tokenizer="tokenizer.json", trust_remote_code=True))
    check_constraints(run_of(path=str(tmp_path), trust_remote_code=True))

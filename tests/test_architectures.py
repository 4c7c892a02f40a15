"""Models from random weights: named sizes, the rule that draws weights, and tokenizers from a run's own data."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from config.architectures import ARCHITECTURES
from config.schema import DataConfig, ModelConfig, SourceConfig, TokenizerConfig
from src.architectures import settings_from
from src.model import load_model, load_settings, load_tokenizer
from src.new_tokenizer import train_tokenizer, with_tokenizer
from tests.test_launch import launch
from tests.tiny_run import (
    ARCHITECTURE,
    ROOT,
    assert_same_run,
    chat_rows,
    run_train,
    stop_after,
    weights_of,
    write_recipe,
    write_rows,
)
from tests.toy_tokenizer import shared_file, toy_tokenizer
from utils.errors import UserError

PUBLISHED = {  # from the makers' model cards and papers
    "gpt2-124m": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}

FROM_DATA = {"tokenizer": "train", "new_tokenizer": {"vocab_size": 320}, "chat_template": None, "special_tokens": None}


def parameters_of(settings):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(settings).parameters())


def test_every_named_size_has_a_published_count():
    assert PUBLISHED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_named_size_has_the_published_number_of_parameters(size):
    assert parameters_of(settings_from({"size": size}, toy_tokenizer())) == PUBLISHED[size]


def test_fields_beside_a_size_take_the_place_of_its_own():
    settings = settings_from({"size": "gpt2-124m", "n_layer": 6, "n_positions": 512}, toy_tokenizer())
    # 6 of 12 layers less, of 12 d^2 + 13 d numbers each; 512 of 1024 positions less, of d each; d = 768
    assert parameters_of(settings) == 124_439_808 - 6 * (12 * 768**2 + 13 * 768) - 512 * 768


def test_a_vocabulary_that_is_left_out_holds_every_token(caplog):
    tokenizer = toy_tokenizer()
    assert settings_from({"size": "gpt2-124m", "vocab_size": 320}, tokenizer).vocab_size == 320
    assert settings_from({"size": "gpt2-124m"}, tokenizer).vocab_size == 50_257
    assert f"of which the tokenizer uses {len(tokenizer)}; model.architecture.vocab_size=320 makes" in caplog.text
    tokenizer.add_tokens([f"<{number}>" for number in range(50_257 - len(tokenizer) + 1)])
    assert len(tokenizer) == 50_258
    assert settings_from({"size": "gpt2-124m"}, tokenizer).vocab_size == 50_304  # the next multiple of 64
    with pytest.raises(UserError, match=r"vocab_size=320 is below the 50258 tokens"):
        settings_from({"size": "gpt2-124m", "vocab_size": 320}, tokenizer)


@pytest.mark.parametrize(
    ("changes", "spread"),
    [
        ({"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}, 0.02),
        ({"size": "smollm2-135m", "vocab_size": 2000}, 1 / 24),
    ],
)
def test_llama_weights_are_drawn_with_the_configs_spread(changes, spread):
    settings = settings_from({**changes, "num_hidden_layers": 2}, toy_tokenizer())
    set_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:  # of n draws, the standard deviation's own error is spread / sqrt(2 n); five of them
            assert weight.std().item() == pytest.approx(spread, abs=5 * spread / (2 * weight.numel()) ** 0.5), name
            assert abs(weight.mean().item()) < 5 * spread / weight.numel() ** 0.5, name


def test_gpt2_weights_are_drawn_as_its_paper_says():
    # Radford et al. 2019, section 2.3: weights of residual layers are scaled by 1 / sqrt(N), N residual layers.
    settings = settings_from({"size": "gpt2-124m", "n_embd": 128, "n_layer": 8, "n_head": 4}, toy_tokenizer())
    set_seed(0)
    for name, weight in AutoModelForCausalLM.from_config(settings).named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif ".ln_" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            spread = 0.02 / (2 * 8) ** 0.5 if "c_proj" in name else 0.02
            assert weight.std().item() == pytest.approx(spread, abs=5 * spread / (2 * weight.numel()) ** 0.5), name


@pytest.mark.slow
def test_a_seed_gives_the_same_weights_and_tokenizer_on_one_process_and_two(tmp_path):
    # Steps of 1e-30 are lost in the rounding of float32, so that the result is what the run started from.
    recipe = write_recipe(
        tmp_path, model=FROM_DATA, optim={"learning_rate": 1e-30}, training={"max_steps": 1, "seed": 7}
    )
    one = run_train("--config", recipe, "--output.name", "one")
    assert one.code == 0, one.stderr
    two = launch("--config", recipe, "--output.name", "two", "--data.cache_folder", tmp_path / "other")
    assert two.returncode == 0, two.stderr[-3000:]
    runs = [tmp_path / "outputs" / name for name in ("one", "two")]
    first, second = (weights_of(run / "model") for run in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    texts = [(run / "tokenizer" / "tokenizer.json").read_bytes() for run in runs]
    assert texts[0] == texts[1]
    tokenizer = load_tokenizer(ModelConfig(tokenizer=str(runs[0] / "model")))
    config = ModelConfig(architecture=ARCHITECTURE, tokenizer=str(runs[0] / "model"))
    set_seed(7)
    model = load_model(config, load_settings(config, tokenizer), tokenizer, trains_all=True)
    assert torch.equal(model.get_input_embeddings().weight, first["model.embed_tokens.weight"])


@pytest.mark.slow
def test_a_new_tokenizer_is_the_same_in_every_process(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows())
    code = (
        "import sys; from config.schema import TokenizerConfig; from src.new_tokenizer import train_tokenizer; "
        f"text = open({str(rows)!r}).read().splitlines(); "
        "print(train_tokenizer(text, TokenizerConfig(vocab_size=400)).to_str())"
    )
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for parallel, threads in (("false", "1"), ("true", "3"))
    ]
    assert made[0] == made[1]


def test_a_new_tokenizer_gives_any_text_back_and_knows_its_special_tokens():
    settings = TokenizerConfig(vocab_size=300, special_tokens=("<|endoftext|>", "<|pad|>"))
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, settings)
    assert [tokenizer.id_to_token(index) for index in (0, 1)] == ["<|endoftext|>", "<|pad|>"]
    assert tokenizer.encode("a<|endoftext|>").ids[-1] == 0
    for text in (" two  spaces\n\ttabs\r\n", "naïve 日本語 🙂👩‍👩‍👧", "\x00\x7f\u200b", "I'll 3333"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    # "the" (2 of 6 words, in 3 rows) is one token: t h, th e and the space before it were the most frequent pairs.
    assert tokenizer.encode("on the").tokens[-1] == "Ġthe"


def test_merges_are_those_of_bpe_by_hand():
    # Sennrich et al. 2016: "ab" stands 6 times, then "ab"+"c" 4 times, then "d" "e" twice; "f" "g" once is below 2.
    texts = ["abc", "abc", "abc", "abc", "ab", "ab", "de", "de", "fg"]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=400, min_count=2))
    assert json.loads(tokenizer.to_str())["model"]["merges"] == [["a", "b"], ["ab", "c"], ["d", "e"]]


def test_a_run_makes_its_tokenizer_keeps_it_and_goes_on_with_it(tmp_path):
    recipe = write_recipe(tmp_path, model=FROM_DATA)
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    run = tmp_path / "outputs" / "run"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    kept = (run / "tokenizer" / "tokenizer.json").read_bytes()
    assert len(tokenizer) == Tokenizer.from_str(kept.decode()).get_vocab_size() == 320
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert "<|im_start|>" in tokenizer.chat_template
    assert json.loads((run / "model" / "config.json").read_text())["vocab_size"] == 320
    # Another tokenizer than the one kept would be made of what the file holds now.
    other = run_train("--config", recipe, "--output.name", "other")
    assert other.code == 0, other.stderr
    assert "a tokenizer of 320 tokens was made" in done.stderr
    assert "a tokenizer of" not in other.stderr  # found in the cache
    stop_after(run, 2)
    (tmp_path / "outputs" / ".data" / "tokenizers").rename(tmp_path / "gone")
    again = run_train("--config", recipe, "--resume")
    assert again.code == 0, again.stderr
    assert "a tokenizer of" not in again.stderr
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == kept
    assert_same_run(run, tmp_path / "outputs" / "other")


def test_a_run_of_a_named_size_with_smaller_fields_says_what_it_is(tmp_path):
    small = {key: value for key, value in ARCHITECTURE.items() if key not in ("model_type", "initializer_range")}
    recipe = write_recipe(
        tmp_path,
        model={"architecture": {"size": "smollm2-135m", "vocab_size": 384, **small}},
        training={"max_steps": 1},
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    run = tmp_path / "outputs" / "run"
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("llama", 32, 384)
    assert config["rope_parameters"]["rope_theta"] == 100_000.0  # SmolLM2's own
    assert "A language model (llama) trained from random weights" in (run / "README.md").read_text()


def test_a_resumed_run_without_its_tokenizer_is_refused(tmp_path):
    recipe = write_recipe(tmp_path, model=FROM_DATA)
    assert run_train("--config", recipe).code == 0
    (tmp_path / "outputs" / "run" / "tokenizer").rename(tmp_path / "gone")
    done = run_train("--config", recipe, "--resume")
    assert done.code == 2
    assert "tokenizer is gone, with which the run to be resumed was trained" in done.stderr


def made_from(tmp_path, rows, **fields):
    """The tokenizer that a run on these rows makes."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    model = ModelConfig(architecture={"size": "smollm2-135m"}, tokenizer="train", **fields)
    data = DataConfig(train=(SourceConfig(path=str(path)),))
    return with_tokenizer(model, data, cache_folder=tmp_path / "cache")


def test_texts_end_with_endoftext_and_ask_for_no_chat_template(tmp_path):
    model = made_from(tmp_path, [{"text": "one two three"}] * 5)
    tokenizer = load_tokenizer(model)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|endoftext|>", "<|pad|>", None)
    assert load_settings(model, tokenizer).vocab_size == len(tokenizer)  # and not the 49,152 of the named size


def test_other_rows_or_settings_make_another_tokenizer_and_the_same_ones_none(tmp_path):
    def path(rows, **fields):
        return made_from(tmp_path, rows, **fields).tokenizer

    first = path([{"text": "one two three"}] * 5)
    assert path([{"text": "one two three"}] * 5) == first
    assert path([{"text": "one two four"}] * 5) != first
    assert path([{"text": "one two three"}] * 5, new_tokenizer=TokenizerConfig(vocab_size=300)) != first


def test_rows_without_text_make_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"data.train.0: .* holds token ids, and model.tokenizer=train wants texts"):
        made_from(tmp_path, [{"input_ids": [1, 2, 3]}])
    with pytest.raises(UserError, match=r"found no tokens that stand together .*min_count=2 times"):
        made_from(tmp_path, [{"text": "ab"}])


def test_a_folder_with_gpt2s_tokenizer_gives_the_ids_of_tiktokens_gpt2_encoding():
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken to compare with")
    load = pytest.importorskip("tiktoken.load")
    folder = shared_file("tokenizers/gpt2")
    # As tiktoken's own gpt2() makes it from OpenAI's two files, of which these are copies.
    ranks = load.data_gym_to_mergeable_bpe_ranks(str(folder / "merges.txt"), str(folder / "vocab.json"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257
    )
    tokenizer = load_tokenizer(ModelConfig(tokenizer=str(folder)))
    assert tokenizer.eos_token_id == encoding.eot_token
    text = shared_file("datasets/tinyshakespeare").glob("*.txt")
    texts = [
        next(text).read_text()[:200_000],
        "I'll  say\n\n 3333 naïve 日本語 🙂\t<|endoftext|> end ",
        " ",
        "\r\n\n x",
    ]
    for text in texts:
        assert tokenizer(text)["input_ids"] == encoding.encode(text, allowed_special="all")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--model.architecture.size gpt2-125m", r"size=gpt2-125m is not known; did you mean gpt2-124m\?"),
        (
            "--model.architecture.size gpt2-124m",
            r"size=gpt2-124m is a gpt2, and model.architecture.model_type=llama",
        ),
        ("--model.tokenizer train --model.architecture.vocab_size 500", r"vocab_size=500 and model.tokenizer=train"),
        ("--model.new_tokenizer.vocab_size 400", r"model.new_tokenizer is given with model.tokenizer="),
    ],
)
def test_contradictions_of_sizes_and_tokenizers_are_named(tmp_path, options, told):
    done = run_train("--config", write_recipe(tmp_path), *options.split())
    assert done.code == 2
    assert re.search(told, done.stderr), done.stderr

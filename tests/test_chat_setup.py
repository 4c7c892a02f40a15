"""Base models made into chat models: a template, its tokens and rows, where answers stop, and what is saved of it."""

import re

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config.schema import AdapterConfig, DataConfig, ModelConfig, SourceConfig
from src.chat_setup import check_stop_trains
from src.data import build_datasets
from src.generation import load_for_generation, render_prompt
from src.model import PAD_TOKEN, load_model, load_settings, load_tokenizer
from tests.tiny_run import (
    chat_rows,
    conversation,
    from_checkpoint,
    run_train,
    weights_of,
    write_checkpoint,
    write_recipe,
    write_rows,
)
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

START, STOP = "<|im_start|>", "<|im_end|>"
MESSAGES = conversation("a question?", "an answer.")["messages"]
AS_CHATML = (  # https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
    f"{START}user\na question?{STOP}\n{START}assistant\nan answer.{STOP}\n"
)


def base_tokenizer(**arguments):
    """A base model's: it ends texts, and knows no chat."""
    return toy_tokenizer(None, **{"eos": "<|endoftext|>", "special": ()} | arguments)


def load(path, *, trains_all=True, **fields):
    config = ModelConfig(path=str(path), chat_template="chatml", **fields)
    tokenizer = load_tokenizer(config)
    return load_model(config, load_settings(config, tokenizer), tokenizer, trains_all=trains_all), tokenizer


def test_chatml_writes_what_its_makers_document(tmp_path):
    base_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="chatml"))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == AS_CHATML
    asked = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert asked == f"{START}user\na question?{STOP}\n{START}assistant\n"


def test_its_tokens_are_whole_special_and_one_ends_turns(tmp_path):
    before = base_tokenizer()
    before.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="chatml"))
    assert tokenizer.convert_tokens_to_ids([START, STOP, PAD_TOKEN]) == [len(before), len(before) + 1, len(before) + 2]
    assert tokenizer(f"{START}x{STOP}")["input_ids"][::2] == [len(before), len(before) + 1]
    assert tokenizer.decode([len(before), len(before) + 1], skip_special_tokens=True) == ""
    assert (tokenizer.eos_token, tokenizer.pad_token) == (STOP, PAD_TOKEN)


def test_tokens_that_are_there_are_not_added_and_a_chosen_eos_is_kept(tmp_path):
    before = toy_tokenizer(None)
    before.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="chatml"))
    assert len(tokenizer) == len(before) + 1  # for padding
    roles = {"eos_token": START}
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="chatml", special_tokens=roles))
    assert tokenizer.eos_token == START


@pytest.mark.parametrize("puts_it", [True, False])
def test_chats_begin_with_bos_where_texts_do(tmp_path, puts_it):
    tokenizer = base_tokenizer(bos="<s>")
    if puts_it:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="chatml"))
    assert loaded.apply_chat_template(MESSAGES, tokenize=False) == "<s>" * puts_it + AS_CHATML


def test_an_unknown_template_is_refused_with_the_names_there_are(tmp_path):
    base_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.chat_template=chatlm does not exist; .*chatml, plain"):
        load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="chatlm"))


def test_a_base_model_without_a_template_is_refused_with_the_line_to_add(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", tokenizer=base_tokenizer())
    recipe = write_recipe(tmp_path, model=from_checkpoint(checkpoint), training={"max_steps": 1})
    done = run_train("--config", recipe)
    assert done.code == 2
    assert "for a base model add --model.chat_template chatml" in done.stderr
    done = run_train("--config", recipe, "--model.chat_template", "chatml")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_in_a_multiple_of_64(tmp_path, tied):
    checkpoint = write_checkpoint(tmp_path, tokenizer=base_tokenizer(), tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    model, tokenizer = load(checkpoint)
    assert before.config.vocab_size < len(tokenizer) <= 320
    assert model.config.vocab_size == 320
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for mine, theirs in (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        assert len(mine) == 320
        assert torch.equal(mine[: len(theirs)], theirs)
        # Noise of sqrt(1e-9) times the spread of 0.2, five times that in each of 1,000 numbers.
        torch.testing.assert_close(mine[len(theirs) :], theirs.mean(0).expand(320 - len(theirs), -1), rtol=0, atol=4e-5)


def test_rows_that_pad_win_nowhere_and_lose_weight_in_training(tmp_path):
    # Their logit is the mean of the others', so not above the largest; and as exp of a mean is not above the mean of
    # exp, their share of the probability is at most that of the rows.
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows())
    checkpoint = write_checkpoint(tmp_path / "base", tokenizer=base_tokenizer())
    model, tokenizer = load(checkpoint)
    table = build_datasets(DataConfig(train=(SourceConfig(path=str(rows)),), max_length=128), tokenizer).train
    ids = [torch.tensor([row["input_ids"]]) for row in table]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shares = []
    for step in range(8):
        with torch.no_grad():
            logits = torch.cat([model(row).logits[0] for row in ids])
        assert logits.argmax(-1).max() < len(tokenizer), step
        shares.append(logits.softmax(-1)[:, len(tokenizer) :].sum(-1))
        batch = ids[step % len(ids)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert shares[0].max() <= (320 - len(tokenizer)) / 320
    assert shares[-1].mean() < 0.8 * shares[0].mean()


def test_what_a_run_saves_serves_in_plain_transformers_as_it_was_trained(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", tokenizer=base_tokenizer(), initializer_range=0.02)
    rows = [conversation("count to three", "one two three")] * 4
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(checkpoint, chat_template="chatml"),
        data={
            "train": [{"path": str(write_rows(tmp_path / "one.jsonl", rows))}],
            "contract": {"duplicates": 1.0},
        },
        optim={"learning_rate": 1e-2},
        training={"max_steps": 60, "save_every_steps": None, "log_every_steps": 60},
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    folder = tmp_path / "outputs" / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids(STOP)
    assert tokenizer.eos_token_id == stop
    assert sorted(GenerationConfig.from_pretrained(folder).eos_token_id) == [base_tokenizer().eos_token_id, stop]
    assert len(weights_of(folder)["lm_head.weight"]) == model.config.vocab_size == 320
    trained = load_tokenizer(ModelConfig(path=str(checkpoint), chat_template="chatml"))
    data = DataConfig(train=(SourceConfig(path=str(tmp_path / "one.jsonl")),), max_length=128)
    [row] = build_datasets(data, trained).train["input_ids"][:1]
    assert tokenizer.apply_chat_template(rows[0]["messages"])["input_ids"] == row
    asked = tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == f"one two three{STOP}"


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_could_never_say_the_new_stop_token_is_refused(tmp_path, tied):
    checkpoint = write_checkpoint(tmp_path, tokenizer=base_tokenizer(), tie_word_embeddings=tied)
    model, tokenizer = load(checkpoint, trains_all=False)
    known = AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size
    advice = "Either use adapter.kind=lora" if tied else "Add --adapter.modules_to_save lm_head embed_tokens, or use"
    with pytest.raises(UserError, match=f"im_end.* is new to the checkpoint.*{advice}"):
        check_stop_trains(model, tokenizer, known, AdapterConfig(kind="oft"))
    check_stop_trains(model, tokenizer, known, AdapterConfig(kind="oft", modules_to_save=("lm_head",)))
    check_stop_trains(model, tokenizer, known, AdapterConfig(kind="oft", target_modules=("q_proj", "lm_head")))
    check_stop_trains(model, tokenizer, known, AdapterConfig(kind="lora"))
    check_stop_trains(model, tokenizer, known, AdapterConfig())
    check_stop_trains(model, tokenizer, len(tokenizer), AdapterConfig(kind="lora"))
    embeddings = AdapterConfig(kind="oft", modules_to_save=("embed_tokens",))
    if tied:
        check_stop_trains(model, tokenizer, known, embeddings)
    else:
        with pytest.raises(UserError, match="is new to the checkpoint"):
            check_stop_trains(model, tokenizer, known, embeddings)


@pytest.mark.parametrize(("kind", "tied"), [("lora", True), ("lora", False), ("hra", False)])
def test_an_adapter_learns_a_new_stop_token_and_loads_again(tmp_path, kind, tied):
    checkpoint = write_checkpoint(tmp_path / "base", tokenizer=base_tokenizer(), tie_word_embeddings=tied)
    rows = [conversation("count to three", "one two three")] * 4
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(checkpoint, chat_template="chatml"),
        adapter={"kind": kind, "rank": 4},
        data={"train": [{"path": str(write_rows(tmp_path / "one.jsonl", rows))}], "contract": {"duplicates": 1.0}},
        optim={"learning_rate": 3e-2},
        training={"max_steps": 60, "save_every_steps": None, "log_every_steps": 60},
    )
    done = run_train("--config", recipe)
    if kind != "lora":
        assert done.code == 2
        advised = re.search(r"Add (--adapter\.modules_to_save [\w ]+),", done.stderr)[1].split()
        done = run_train("--config", recipe, *advised)
    assert done.code == 0, done.stderr
    model, tokenizer = load_for_generation(str(tmp_path / "outputs" / "run" / "model"))
    prompt = render_prompt(tokenizer, rows[0]["messages"][:1])
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == f"one two three{STOP}"

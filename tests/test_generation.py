"""Answers: batched as alone, ended where they should, drawn by the seed."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from src.evaluation import answer_conversations
from src.formats import Conversation
from src.generation import generate, load_for_generation, render_prompt, set_stops
from src.refusal import Refusal
from src.tokenization import IGNORED, RowEncoder
from tests.test_served import SERVED, tokenizer_and_rows
from tests.tiny_run import conversation, from_checkpoint, run_train, write_checkpoint, write_recipe, write_rows
from tests.toy_tokenizer import CHATML, toy_tokenizer
from utils.errors import UserError

QUESTIONS = ["one", "count to seven from one please", "two?", "hello world, the cat sat on the mat", "a"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"), vocabulary=320)


def prompts_for(tokenizer):
    return [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]


def greedy_by_hand(model, tokenizer, prompt, tokens):
    """The most likely token, one at a time, from a whole forward pass each: no cache, no padding, no generate."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    stops = model.generation_config.eos_token_id
    while len(ids) < start + tokens:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ([stops] if isinstance(stops, int) else stops):
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_batch_answers_as_each_prompt_alone(checkpoint):
    model, tokenizer = load_for_generation(str(checkpoint))
    model = model.cpu()
    prompts = prompts_for(tokenizer)
    together = generate(model, tokenizer, prompts, max_new_tokens=16)
    assert together == generate(model, tokenizer, prompts, max_new_tokens=16, batch_rows=2)
    assert together == [generate(model, tokenizer, [prompt], max_new_tokens=16)[0] for prompt in prompts]
    assert together == [greedy_by_hand(model, tokenizer, prompt, 16) for prompt in prompts]
    assert len(set(together)) == len(together)


def test_generation_leaves_the_models_mode_and_training_state(checkpoint):
    model, tokenizer = load_for_generation(str(checkpoint))
    model.train()
    generate(model, tokenizer, ["a"], max_new_tokens=2)
    assert model.training


def test_an_answer_ends_at_a_stop_token(checkpoint):
    model, tokenizer = load_for_generation(str(checkpoint))
    model = model.cpu()
    prompt = prompts_for(tokenizer)[0]
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    second = model.generate(ids, max_new_tokens=2, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, second]
    [answer] = generate(model, tokenizer, [prompt], max_new_tokens=16)
    assert answer == greedy_by_hand(model, tokenizer, prompt, 16)
    assert len(tokenizer(answer)["input_ids"]) <= 2


def test_an_adapters_answers_stop_where_its_own_template_does(tmp_path):
    # The base knows nothing of the template that its adapter was trained with.
    base = toy_tokenizer(None, eos="<|end_of_text|>", special=("<|im_start|>", "<|im_end|>"))
    checkpoint = write_checkpoint(tmp_path / "base", tokenizer=base, vocabulary=320)
    model = from_checkpoint(checkpoint, chat_template=str(tmp_path / "template.jinja"))
    done = run_train("--config", write_recipe(tmp_path, model=model, adapter={"kind": "lora", "rank": 2}))
    assert done.code == 0, done.stderr
    model, tokenizer = load_for_generation(str(tmp_path / "outputs" / "run" / "model"))
    assert tokenizer.chat_template == CHATML
    assert set(model.generation_config.eos_token_id) == set(
        base.convert_tokens_to_ids(["<|end_of_text|>", "<|im_end|>"])
    )


@pytest.mark.parametrize("name", SERVED)
def test_generation_stops_at_every_token_that_a_turn_is_trained_to_end_with(checkpoint, name):
    tokenizer, conversations = tokenizer_and_rows(name)
    trained = set()
    encoder = RowEncoder.of(tokenizer, allow_special_tokens_in_content=True)
    for row in encoder.encode_conversations(list(conversations.values())):
        if not isinstance(row, Refusal):
            supervised = row.labels != IGNORED
            ends = supervised & ~np.append(supervised[1:], False)
            trained |= set(row.input_ids[ends].tolist())
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = None
    set_stops(model, tokenizer)
    stops = model.generation_config.eos_token_id
    assert trained
    assert trained <= {stops} if isinstance(stops, int) else trained <= set(stops)


def test_generation_stops_after_calls_as_their_templates_end_them(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, expected in (("gptoss", {"<|return|>", "<|call|>"}), ("llama3_1", {"<|eot_id|>", "<|eom_id|>"})):
        tokenizer, _ = tokenizer_and_rows(name)
        model.generation_config.eos_token_id = None
        set_stops(model, tokenizer)
        assert set(tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)) == expected


def test_drawn_answers_depend_on_the_seed_and_greedy_ones_do_not(checkpoint):
    model, tokenizer = load_for_generation(str(checkpoint))
    drawn, greedy = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate(model, tokenizer, ["hello"], max_new_tokens=12, temperature=1.0, top_p=0.9))
        greedy.append(generate(model, tokenizer, ["hello"], max_new_tokens=12))
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy[0] == greedy[1] == greedy[2]


def test_a_memorised_answer_is_counted_as_exact_and_another_is_not(tmp_path):
    held_out = [conversation("name?", "Ada"), conversation("sum of 1 and 2?", "three")]
    longer = [{"messages": row["messages"] + conversation("and?", "none")["messages"]} for row in held_out]
    train, rows = write_rows(tmp_path / "longer.jsonl", longer), write_rows(tmp_path / "rows.jsonl", held_out)
    recipe = write_recipe(
        tmp_path,
        data={"train": [{"path": str(train)}], "eval": [{"path": str(rows)}]},
        optim={"learning_rate": 1e-2, "schedule": "constant"},
        training={"max_steps": 40, "save_every_steps": None, "log_every_steps": 40},
        evaluation={"exact_match": True, "max_new_tokens": 12},
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert "exact match 0.000 of 2 answers" in done.stderr
    assert "exact match 1.000 of 2 answers" in done.stderr
    model, tokenizer = load_for_generation(str(tmp_path / "outputs" / "run" / "model"))
    wrong = Conversation(
        messages=({"role": "user", "content": "name?"}, {"role": "assistant", "content": "Bob"}), origin="here"
    )
    [answer] = answer_conversations(model, tokenizer, [wrong], max_new_tokens=12)
    assert (answer.prompt, answer.reference, answer.answer, answer.is_exact) == ("name?", "Bob", "Ada", False)
    assert answer_conversations(model, tokenizer, [], max_new_tokens=12) == []


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model could be loaded from"):
        load_for_generation(str(tmp_path))
    with pytest.raises(UserError, match="no chat template"):
        render_prompt(toy_tokenizer(None), [{"role": "user", "content": "hello"}])

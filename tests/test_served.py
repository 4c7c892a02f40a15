"""What stands before each supervised turn is what a server would give, on stock templates."""

import pytest
from transformers import PreTrainedTokenizerFast

from src.formats import Conversation
from src.refusal import Refusal
from src.tokenization import IGNORED, RowEncoder, TokenRow
from tests.chat_battery import battery, template_tokenizer
from tests.test_chat import talk
from tests.test_stock_templates import BATTERY, SHARED_REFUSALS, VISION, stops_of, trl_templates
from tests.test_token_bytes import tokenizer_of
from tests.test_tokenization import prompt_and_turn, served_prompt, supervised_runs
from tests.toy_tokenizer import family_tokenizer, toy_tokenizer

UNMERGED = "the cat sat on the mat"
"""Text that gives the toy tokenizer no token of several line feeds, so that none stands across a prompt's end."""

# name: turns whose prompts are the served ones, conversations trained turn by turn, turns whose prompts are others
SERVED = {
    "cohere": (51, 0, 0),
    "cohere2": (51, 0, 0),
    "deepseek_r1_distill": (0, 0, 51),
    "deepseekv3": (0, 0, 51),
    "diffusion_gemma": (51, 1, 0),
    "gemma": (44, 0, 0),
    "gemma3": (51, 0, 0),
    "gemma4": (51, 0, 0),
    "gemma4_v2": (56, 0, 0),
    "gemma4_v3": (51, 0, 0),
    "gemma4_v4": (51, 0, 0),
    "gemma4_v5": (51, 1, 0),
    "gptoss": (54, 18, 0),
    "idefics3": (51, 0, 0),
    "lfm2": (51, 0, 0),
    "lfm2_2_5": (56, 2, 0),
    "lfm2_2_5_v2": (56, 2, 0),
    "lfm2_2_5_vl": (56, 2, 0),
    "lfm2_v2": (56, 0, 0),
    "llama3": (51, 0, 0),
    "llama3_1": (54, 0, 0),
    "llama3_2": (54, 0, 0),
    "llava_next": (51, 0, 0),
    "muse_glimmer": (54, 0, 0),
    "nemotron_3_5_lightning": (6, 2, 50),
    "nemotron_3_nano": (6, 2, 50),
    "nemotron_3_super": (6, 2, 50),
    "nemotron_3_ultra": (6, 2, 50),
    "phi3": (51, 0, 0),
    "phi3_5": (51, 0, 0),
    "qwen2_5": (56, 0, 0),
    "qwen2_5_vl": (51, 0, 0),
    "qwen3": (56, 20, 0),
    "qwen3_5_nothink": (50, 18, 6),
    "qwen3_5_think": (56, 18, 0),
    "qwen3_6": (56, 18, 0),
    "qwen3_8": (56, 0, 0),
    "qwen3_instruct_2507": (56, 0, 0),
    "qwen3_vl": (56, 0, 0),
    "smolvlm": (51, 0, 0),
    "HuggingFaceTB-SmolLM3-3B": (51, 0, 0),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": (2, 0, 1),
    "Qwen-Qwen2.5-7B-Instruct": (56, 0, 0),
    "Qwen-Qwen3-0.6B": (56, 20, 0),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (0, 0, 51),
    "google-gemma-2-2b-it": (44, 0, 0),
    "meta-llama-Llama-3.1-8B-Instruct": (54, 0, 0),
    "meta-llama-Llama-3.2-3B-Instruct": (54, 0, 0),
    "microsoft-Phi-3.5-mini-instruct": (51, 0, 0),
    "mistralai-Mistral-Nemo-Instruct-2407": (47, 0, 0),
    "openai-gpt-oss-120b": (54, 18, 0),
}
# Where an older transformers leaves the reasoning of one conversation out, no turn of it has another form as the last.
WITHOUT_THINKING = {"lfm2_2_5": (56, 1, 0)}
OPENED_REASONING = "<think>"  # the prompt opens reasoning, or closes it, and the row has it otherwise
UNLIKE = {
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "esponse>",  # a tool's result is closed otherwise before an answer
}


def tokenizer_and_rows(name):
    if name in SHARED_REFUSALS:
        tokenizer = family_tokenizer(name, merges_from=UNMERGED)
        return tokenizer, battery(tokenizer.eos_token)
    stops = stops_of(name)
    source = (trl_templates() / f"{name}.jinja").read_text(encoding="utf-8")
    return template_tokenizer(source, stops[0], merges_from=UNMERGED), battery(stops[-1], parts=name in VISION)


def gives_thinking(tokenizer) -> bool:
    """Whether the installed transformers gives reasoning to templates that read it under another name than a row's."""
    message = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    read = "{{ messages[0].thinking | default('') }}"
    return tokenizer.apply_chat_template([message], chat_template=read, tokenize=False) == "hm"


def prompts(row: TokenRow) -> list[list[int]]:
    """The ids before each run of supervised tokens."""
    at = range(1, len(row.labels))
    return [row.input_ids[:i].tolist() for i in at if row.labels[i] != IGNORED and row.labels[i - 1] == IGNORED]


def served(tokenizer, conversation: Conversation, turn: int) -> list[int]:
    """The ids that a server feeds the model to get a turn."""
    return tokenizer.apply_chat_template(
        list(conversation.messages[:turn]),
        tools=list(conversation.tools) or None,
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]


@pytest.mark.parametrize("name", SERVED)
def test_the_ids_before_every_supervised_turn_are_those_of_the_served_prompt_or_told_to_be_unlike(name):
    tokenizer, conversations = tokenizer_and_rows(name)
    encoder = RowEncoder.of(tokenizer, template_date=None, allow_special_tokens_in_content=True)
    equal, turn_by_turn, unlike = 0, 0, 0
    for conversation in conversations.values():
        rows = encoder.encode_conversations([conversation])
        if isinstance(rows[0], Refusal):
            assert len(rows) == 1
            continue
        turns = conversation.assistant_turns()
        assert [row.piece for row in rows] == list(range(len(rows)))
        assert {row.turn_rows for row in rows} == {0 if len(rows) == 1 else len(turns)}
        turn_by_turn += len(rows) > 1
        found = [(row, prompt) for row in rows for prompt in prompts(row)]
        for turn, (row, prompt) in zip(turns, found, strict=True):
            if prompt == served(tokenizer, conversation, turn):
                equal += 1
            else:
                unlike += 1
                assert UNLIKE.get(name, OPENED_REASONING) in row.unlike_served
        whole = all(
            prompt == served(tokenizer, conversation, turn) for turn, (_, prompt) in zip(turns, found, strict=True)
        )
        assert whole == (not any(row.unlike_served for row in rows))
    known = SERVED if gives_thinking(tokenizer) else SERVED | WITHOUT_THINKING
    assert (equal, turn_by_turn, unlike) == known[name]


def test_every_stock_template_is_compared():
    assert SERVED.keys() == BATTERY.keys() | SHARED_REFUSALS.keys()


def test_every_turn_is_trained_as_the_template_writes_a_last_one():
    thought = "<think>\nhm\n</think>\n\n"
    conversation = talk("a", f"{thought}One.", "b", "Two.", "c", f"{thought}Three.", ("user", "bye"))
    qwen = family_tokenizer("Qwen-Qwen3-0.6B")
    rows = RowEncoder.of(qwen).encode_conversations([conversation, talk("x", "y")])
    empty = "<think>\n\n</think>\n\n"
    answers = [f"{thought}One.", f"{empty}Two.", f"{thought}Three.", f"{empty}y"]
    assert [supervised_runs(qwen, row) for row in rows] == [[f"{answer}<|im_end|>"] for answer in answers]
    assert [(row.piece, row.turn_rows, row.origin) for row in rows[:3]] == [
        (n, 3, conversation.origin) for n in range(3)
    ]
    assert [(row.unlike_served, row.lost_reasoning) for row in rows] == [("", 0)] * 4
    assert (rows[3].piece, rows[3].turn_rows) == (0, 0)
    gpt = family_tokenizer("openai-gpt-oss-120b")
    rows = RowEncoder.of(gpt).encode_conversations([talk("a", "One.", "b", "Two.")])
    assert [gpt.decode(row.input_ids[-1]) for row in rows] == ["<|return|>", "<|return|>"]


def test_only_what_is_supervised_is_trained_turn_by_turn():
    tokenizer = family_tokenizer("Qwen-Qwen3-0.6B")
    conversation = talk("a", "One.", "b", "Two.", "c", "Three.")

    def answers(supervise="assistant", untrained=()):
        row = Conversation(conversation.messages, "row", untrained=untrained)
        rows = RowEncoder.of(tokenizer, supervise).encode_conversations([row])
        return [[run.split("\n")[-1].removesuffix("<|im_end|>") for run in supervised_runs(tokenizer, r)] for r in rows]

    assert answers() == [["One."], ["Two."], ["Three."]]
    assert answers(untrained=(1,)) == [["Two."], ["Three."]]
    assert answers("last_turn") == [["Three."]]
    assert answers("completion") == [["Three."]]


@pytest.mark.parametrize("unlike_served", ["drop", "error"])
def test_a_conversation_that_is_not_to_be_trained_where_it_is_unlike_served_stays_whole_there(unlike_served):
    conversation = talk("a", "One.", "b", "Two.")
    for name, rows_as_served, rows_else in (("qwen3", 2, 2), ("qwen3_5_think", 2, 1)):
        tokenizer, _ = tokenizer_and_rows(name)
        assert len(RowEncoder.of(tokenizer).encode_conversations([conversation])) == rows_as_served
        rows = RowEncoder.of(tokenizer, unlike_served=unlike_served).encode_conversations([conversation])
        assert len(rows) == rows_else
        assert all(bool(row.unlike_served) == (rows_else == 1) for row in rows)


def test_a_conversation_is_one_row_where_the_template_writes_every_turn_as_a_last_one():
    conversation = talk("a", "One.", "b", "Two.", ("user", "bye"))
    for tokenizer in (toy_tokenizer(), family_tokenizer("deepseek-ai-DeepSeek-R1-Distill-Llama-8B")):
        [row] = RowEncoder.of(tokenizer).encode_conversations([conversation])
        assert (row.piece, row.turn_rows, len(prompts(row))) == (0, 0, 2)


def test_a_conversation_of_which_a_turn_is_refused_has_one_refusal():
    # The template writes reasoning in the last answer alone, and refuses one that says "no" there.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}END{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    conversation = talk("a", "One.", "b", "no", "c", "Three.")
    encoder = RowEncoder.of(toy_tokenizer(template.replace("END", "")))
    assert [row.turn_rows for row in encoder.encode_conversations([conversation])] == [3, 3, 3]
    refusing = "{% if m['content'] == 'no' %}{{ raise_exception('says no') }}{% endif %}"
    encoder = RowEncoder.of(toy_tokenizer(template.replace("END", refusing)))
    [row] = encoder.encode_conversations([conversation])  # whole, as none of its beginnings may be missing
    assert (row.turn_rows, len(prompts(row))) == (0, 3)


# what a template writes before each content, and for how many of ANSWERS its tokens depend on what follows
ENDS = {"line feed": "\n", "two line feeds": ":\n\n", "two spaces": ":  ", "letters": "says"}
ANSWERS = ("Yes.", "\nYes.", "\n\n\nYes.", " Yes.", "   Yes.", "\tYes.", "1 or 2", "'s", "é", "日本", "🙂", "", "#!")
APART = {
    "gpt2": (1, 7, 7, 0),
    "llama2": (0, 0, 5, 0),
    "llama2, first": (0, 0, 5, 0),
    "llama3": (2, 2, 5, 0),
    "qwen2": (2, 2, 10, 0),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", APART)
def test_every_prompt_has_the_tokens_that_a_server_gives_it(name, end):
    backend, _, _ = tokenizer_of(name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + 'END' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistantEND' }}{% endif %}"
    ).replace("END", ENDS[end].replace("\n", "\\n"))
    encoder = RowEncoder.of(tokenizer)
    apart = 0
    for answer in ANSWERS:
        conversation = talk("one", answer, "two", answer)
        rows = encoder.encode_conversations([conversation])
        assert [row.unlike_served for row in rows] == [""] * len(rows)
        prompts = [prompt_and_turn(row)[0] for row in rows]
        turns = (3,) if len(rows) == 1 else (1, 3)
        assert prompts == [served_prompt(tokenizer, conversation, turn) for turn in turns]
        for row in rows:
            labels = row.labels != IGNORED
            bare, stop = len(prompts[-1 if row is rows[-1] else 0]), row.input_ids[labels][-1]
            assert labels[bare:].all()
            assert stop == tokenizer.eos_token_id
            assert tokenizer.decode(row.input_ids).endswith(f"{ENDS[end]}{answer}<|im_end|>")
        apart += rows[-1].prompt_apart
    assert apart == APART[name][list(ENDS).index(end)]

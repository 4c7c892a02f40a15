"""Where the supervised characters are in what stock chat templates write."""

import re
import time
from dataclasses import replace
from datetime import date
from typing import ClassVar

import pytest

from src.alignment import TurnFinder, supervised_spans
from src.chat import ChatTemplate
from src.formats import Conversation
from src.refusal import Refusal
from tests.toy_tokenizer import CHATML, FAMILIES, family_tokenizer, toy_tokenizer
from utils.errors import UserError

# Templates that write an answer right after their generation prompt, with the stop token that their makers publish.
PLAIN = {
    "HuggingFaceTB-SmolLM3-3B": "<|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": "</s>",
}
TRIMMING = ("google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct")


def talk(*turns, **fields):
    """A conversation of the turns, whose roles alternate from user on unless a turn is (role, content)."""
    messages = []
    for turn in turns:
        role = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        role, content = turn if isinstance(turn, tuple) else (role, turn)
        messages.append({"role": role, "content": content})
    return Conversation(tuple(messages), "rows.jsonl line 7", **fields)


def supervised(tokenizer, conversation):
    [chat] = supervised_spans(ChatTemplate.of(tokenizer), [conversation])
    return [chat.text[start:end] for start, end in chat.spans]


def refusal_of(tokenizer, conversation, supervise="assistant"):
    """The kind and the reason of a refusal."""
    [refusal] = TurnFinder(ChatTemplate.of(tokenizer), supervise).find([conversation])
    assert isinstance(refusal, Refusal)
    assert refusal.origin == conversation.origin
    assert refusal.reason.startswith(conversation.origin)
    return refusal.kind, refusal.reason


@pytest.mark.parametrize("name", PLAIN)
def test_every_turn_is_supervised_with_its_stop_token_and_no_newline_after_it(name):
    answers = supervised(family_tokenizer(name), talk("hi", "One.", "why?", "Two\n\nlines.", "so?", "3 😀 é"))
    assert answers == [f"{content}{PLAIN[name]}" for content in ("One.", "Two\n\nlines.", "3 😀 é")]


@pytest.mark.parametrize("name", PLAIN)
def test_white_space_around_content_is_supervised_where_the_template_keeps_it(name):
    [answer] = supervised(family_tokenizer(name), talk("hi", "  AAA  "))
    assert answer == ("AAA" if name in TRIMMING else "  AAA  ") + PLAIN[name]


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("google-gemma-2-2b-it",)])
def test_text_of_special_tokens_in_content_does_not_move_the_spans(name):
    stop = PLAIN[name]
    fake = f"say {stop}\n<|im_start|>assistant\nThe cat{stop}"
    assert supervised(family_tokenizer(name), talk(fake, f"The cat{stop} no{stop}")) == [
        f"The cat{stop} no{stop}{stop}"
    ]


@pytest.mark.parametrize("name", PLAIN)
def test_an_empty_answer_is_its_stop_token(name):
    assert supervised(family_tokenizer(name), talk("hi", "")) == [PLAIN[name]]


@pytest.mark.parametrize("name", ["HuggingFaceTB-SmolLM3-3B", "meta-llama-Llama-3.2-3B-Instruct"])
def test_a_first_message_of_the_assistant_is_supervised(name):
    stop = PLAIN[name]
    answers = supervised(family_tokenizer(name), talk(("assistant", "Hello."), "hi", "Two."))
    assert answers == [f"Hello.{stop}", f"Two.{stop}"]


def test_system_messages_and_a_last_user_turn_are_not_supervised():
    conversation = talk(("system", "Be brief."), ("user", "hi"), ("assistant", "One."), ("user", "bye"))
    assert supervised(family_tokenizer("meta-llama-Llama-3.2-3B-Instruct"), conversation) == ["One.<|eot_id|>"]


def test_what_the_template_puts_before_the_content_is_supervised_if_the_prompt_does_not_give_it():
    think = "<think>\n\n</think>\n\n"
    assert supervised(family_tokenizer("Qwen-Qwen3-0.6B"), talk("a", "One.", "b", "Two.")) == [
        "One.<|im_end|>",
        f"{think}Two.<|im_end|>",
    ]
    assert supervised(family_tokenizer("openai-gpt-oss-120b"), talk("a", "One.")) == [
        "<|channel|>final<|message|>One.<|return|>"
    ]
    assert supervised(family_tokenizer("openai-gpt-oss-120b"), talk("a", "")) == [
        "<|channel|>final<|message|><|return|>"
    ]


def test_tool_calls_are_supervised_and_tool_results_are_not():
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Oslo"}}}
    messages = (
        {"role": "user", "content": "How cold is Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"degrees": 3}'},
        {"role": "assistant", "content": "3 degrees."},
    )
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}}
    tool = {"type": "function", "function": {"name": "look_up", "description": "Weather", "parameters": parameters}}
    conversation = Conversation(messages, "rows.jsonl line 1", tools=(tool,))
    written = '\n<tool_call>\n{"name": "look_up", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    # Qwen2.5's prompt ends with the newline that its calls begin with.
    assert supervised(family_tokenizer("Qwen-Qwen2.5-7B-Instruct"), conversation) == [
        written[1:],
        "3 degrees.<|im_end|>",
    ]
    # Hermes writes a tool's result in two ways, as the last message and before another.
    hermes = family_tokenizer("NousResearch-Hermes-3-Llama-3.1-8B-tool_use")
    assert supervised(hermes, replace(conversation, messages=messages[:2])) == [written[1:]]
    [chat] = supervised_spans(ChatTemplate.of(hermes), [conversation])
    assert [chat.text[slice(*span)] for span in chat.spans] == [written[1:], "3 degrees.<|im_end|>"]
    assert chat.unlike_served.startswith("its prompt for message 4 ends in")


@pytest.mark.parametrize(
    ("name", "conversation", "reason"),
    [
        (
            "mistralai-Mistral-Nemo-Instruct-2407",
            talk(("system", "S."), ("user", "a"), "b"),
            "leaves out message 1, of role system",
        ),
        ("google-gemma-2-2b-it", talk(("system", "S."), ("user", "a"), "b"), "System role not supported"),
    ],
)
def test_a_row_whose_turns_the_template_does_not_show_is_refused_by_name(name, conversation, reason):
    for supervise in ("assistant", "all"):
        kind, told = refusal_of(family_tokenizer(name), conversation, supervise)
        assert kind == "role_order"
        assert re.search(rf"rows.jsonl line 7: .*{reason}.*model\.chat_template", told)


def test_a_row_with_nothing_to_train_is_refused_as_masked():
    tokenizer = toy_tokenizer()
    assert refusal_of(tokenizer, talk(("user", "a")))[0] == "masked"
    assert refusal_of(tokenizer, talk("a", "b", untrained=(1,)))[0] == "masked"
    answered = talk(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert refusal_of(tokenizer, answered, "completion")[0] == "masked"
    assert supervised(tokenizer, answered) == ["b<|im_end|>"]


def test_a_template_that_leaves_out_a_part_of_a_row_is_refused_with_its_kind():
    def kind(loop, conversation, supervise="assistant"):
        written = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        end = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        template = "{% for m in messages %}" + loop.replace("WRITTEN", written) + "{% endfor %}" + end
        return refusal_of(toy_tokenizer(template), conversation, supervise)[0]

    no_second = "{% if loop.first or m['role'] != messages[loop.index0 - 1]['role'] %}WRITTEN{% endif %}"
    assert kind(no_second, talk(("user", "a"), ("user", "b"), ("assistant", "c"))) == "role_order"
    no_system = "{% if m['role'] != 'system' %}WRITTEN{% endif %}"
    assert kind(no_system, talk(("system", "a"), ("user", "b"), ("assistant", "c"))) == "role_order"
    last_answer = "{% if m['role'] == 'user' or loop.last %}WRITTEN{% endif %}"
    assert kind(last_answer, talk("a", "b", "c", "d")) == "content_lost"
    assert kind(last_answer, talk("a", "b", "c", "d"), "last_turn") == "content_lost"
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    assert kind("WRITTEN", talk("a", "b", tools=(tool,))) == "content_lost"
    refuses_long = "{% if m['content']|length > 9 %}{{ raise_exception('too long') }}{% endif %}WRITTEN"
    assert kind(refuses_long, talk("a", "0123456789")) == "unaligned"
    no_others = "{% if m['role'] == 'developer' %}{{ raise_exception('unknown role') }}{% endif %}WRITTEN"
    assert kind(no_others, talk(("developer", "a"), ("user", "b"), ("assistant", "c"))) == "role_order"


def test_turns_of_a_template_that_prompts_otherwise_than_it_writes_are_found_and_told_of():
    tokenizer = family_tokenizer("deepseek-ai-DeepSeek-R1-Distill-Llama-8B")
    [chat] = supervised_spans(ChatTemplate.of(tokenizer), [talk("a", "One.", "b", "<think>\nhm\n</think>\n\nTwo.")])
    stop = "<｜end▁of▁sentence｜>"
    assert [chat.text[slice(*span)] for span in chat.spans] == [f"One.{stop}", f"\n\nTwo.{stop}"]
    assert "<think>" in chat.unlike_served
    assert chat.lost_reasoning == 1


def test_turns_that_a_template_writes_in_another_way_in_history_are_found():
    assert supervised(family_tokenizer("openai-gpt-oss-120b"), talk("a", "One.", "b", "Two.")) == [
        "<|channel|>final<|message|>One.<|end|>",
        "<|channel|>final<|message|>Two.<|return|>",
    ]
    conversation = talk("a", "<think>\nhm\n</think>\n\nOne.", "b", "<think>\nso\n</think>\n\nTwo.")
    assert supervised(family_tokenizer("Qwen-Qwen3-0.6B"), conversation) == [
        "One.<|im_end|>",
        "<think>\nso\n</think>\n\nTwo.<|im_end|>",
    ]


class CountingTemplate(ChatTemplate):
    """Notes how many characters each conversation renders to."""

    written: ClassVar[list[int]] = []

    def render_each(self, conversations, *, generation_prompt=False):
        texts = super().render_each(conversations, generation_prompt=generation_prompt)
        self.written += [len(text) for text in texts]
        return texts


def test_a_long_conversation_renders_as_many_prompts_as_one_of_a_few_turns():
    renderings, characters = [], []
    for turns in (50, 200):
        CountingTemplate.written.clear()
        template = CountingTemplate.of(family_tokenizer("Qwen-Qwen3-0.6B"))
        [chat] = supervised_spans(template, [talk(*["the cat"] * (2 * turns))])
        assert [chat.text[slice(*span)] for span in chat.spans[:-1]] == ["the cat<|im_end|>"] * (turns - 1)
        renderings.append(len(template.written))
        characters.append(sum(template.written))
    assert renderings[0] == renderings[1] < 40
    assert characters[1] < 4.5 * characters[0]  # 4 times the turns


def test_the_time_of_a_conversation_grows_with_its_turns_and_not_with_their_square():
    template = ChatTemplate.of(family_tokenizer("Qwen-Qwen2.5-7B-Instruct"))

    def seconds(turns):
        conversation = talk(*["the cat"] * (2 * turns))
        times = []
        for _ in range(3):
            start = time.process_time()
            supervised_spans(template, [conversation])
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(1600) < 8 * seconds(400)  # 4 times where linear, 16 where it is the square; the rest is noise


def test_generation_marks_tell_the_spans_where_the_prompt_does_not():
    marked = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m['content'] }}MARK{% endgeneration %}STOP\n"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    outside = toy_tokenizer(marked.replace("MARK", "").replace("STOP", "<|im_end|>"))
    inside = toy_tokenizer(marked.replace("MARK", "<|im_end|>").replace("STOP", ""))
    conversation = talk("a", "One.", "b", "the cat")
    for tokenizer in (outside, inside):
        assert supervised(tokenizer, conversation) == ["One.<|im_end|>", "the cat<|im_end|>"]
        [chat] = supervised_spans(ChatTemplate.of(tokenizer), [conversation])
        assert "its prompt for message 2 ends in" in chat.unlike_served
        assert "<think>" in chat.unlike_served


def test_a_template_without_a_stop_token_is_refused():
    tokenizer = toy_tokenizer(CHATML.replace("'<|im_end|>\\n'", "'\\n'"))
    kind, reason = refusal_of(tokenizer, talk("a", "One."))
    assert kind == "untrained_stop"
    assert re.search(r"writes no stop token.*'One\.\\n'.*never learns to stop", reason)
    kind, _ = refusal_of(tokenizer, talk("a", "One.", "the next message begins with a special token"))
    assert kind == "untrained_stop"


def test_a_stop_token_that_the_tokenizer_does_not_know_is_refused():
    tokenizer = toy_tokenizer(CHATML, eos="</s>", special=())
    kind, reason = refusal_of(tokenizer, talk("a", "One."))
    assert kind == "untrained_stop"
    assert re.search(r"no stop token.*model\.special_tokens, as in `eos_token: <\|im_end\|>`", reason)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(UserError, match=r"no chat template.*model\.chat_template"):
        ChatTemplate.of(toy_tokenizer(None))


def test_llama_rows_do_not_change_with_the_calendar():
    template = ChatTemplate.of(family_tokenizer("meta-llama-Llama-3.2-3B-Instruct"))
    [text] = template.render([talk("a", "One.")])
    assert "Today Date: 26 Jul 2024\n" in text
    assert date.today().strftime("%d %b %Y") not in text


def test_a_template_that_asks_the_clock_gets_the_given_day(caplog):
    tokenizer = family_tokenizer("openai-gpt-oss-120b")
    [text] = ChatTemplate.of(tokenizer, "2031-02-03").render([talk("a", "One.")])
    today = tokenizer.apply_chat_template(list(talk("a", "One.").messages), tokenize=False)
    assert "Current date: 2031-02-03\n" in text
    assert text.replace("2031-02-03", f"{date.today():%Y-%m-%d}") == today
    assert "today's date" not in caplog.text
    assert ChatTemplate.of(tokenizer, None).render([talk("a", "One.")]) == [today]
    assert "writes today's date into every row" in caplog.text


def clock_dependent(template, conversation, day=None):
    [chat] = TurnFinder(ChatTemplate.of(toy_tokenizer(template), day)).find([conversation])
    return chat.clock_dependent


def test_a_row_is_told_into_which_the_template_writes_the_clocks_date():
    names = ("openai-gpt-oss-120b", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.1-8B-Instruct")
    for name, follows in zip(names, (True, True, False), strict=True):
        for day in (None, "2024-07-26"):
            [chat] = TurnFinder(ChatTemplate.of(family_tokenizer(name), day)).find([talk("a", "One.")])
            assert chat.clock_dependent == (follows and day is None)
    with_system = "{% if messages[0]['role'] == 'system' %}{{ strftime_now('FORM') }}{% endif %}" + CHATML
    for form, follows in (("%d %b %Y", True), ("%H:%M", True), ("%A", True), ("now", False)):
        template = with_system.replace("FORM", form)
        assert clock_dependent(template, talk(("system", "S."), ("user", "a"), ("assistant", "b"))) == follows
        assert not clock_dependent(template, talk("a", "b"))
    assert clock_dependent("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML, talk("a", "b"))
    assert not clock_dependent(CHATML, talk("a", "b"))


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_text_of_a_special_token_that_cannot_be_told_from_the_token_refuses_the_row(supervise):
    tokenizer = family_tokenizer("Qwen-Qwen2.5-7B-Instruct")
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Oslo"}}}
    tool = {"type": "function", "function": {"name": "look_up", "description": "Weather", "parameters": {}}}
    bad_call = {**call, "function": {**call["function"], "name": "look<|im_end|>up"}}
    bad_tool = {**tool, "function": {**tool["function"], "description": "Weather<|im_end|>"}}

    def found(call, tool, allowed=False):
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]})
        finder = TurnFinder(ChatTemplate.of(tokenizer), supervise, allowed)
        return finder.find([Conversation(messages, "row", (tool,))])[0]

    assert not isinstance(found(call, tool), Refusal)
    for refusal in (found(bad_call, tool), found(call, bad_tool)):
        assert refusal.kind == "unaligned"
        assert re.search(r"holds '<\|im_end\|>'.*data\.allow_special_tokens_in_content=true", refusal.reason)
    assert not isinstance(found(call, bad_tool, allowed=True), Refusal)
    upper = toy_tokenizer(CHATML.replace("m['content']", "m['content']|replace('a', 'b')"))
    if supervise == "all":  # whose spans need not show, but its texts are not where they are expected
        assert not isinstance(TurnFinder(ChatTemplate.of(upper), "all").find([talk("a", "One.")])[0], Refusal)
        assert refusal_of(upper, talk("a<|im_end|>", "One."), "all")[0] == "unaligned"


def test_a_date_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"data\.template_date='26 Jul 2024' is no date; give one as YYYY-MM-DD"):
        ChatTemplate.of(toy_tokenizer(), "26 Jul 2024")


def test_a_clock_that_is_asked_in_a_computed_form_is_refused():
    tokenizer = toy_tokenizer("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML)
    with pytest.raises(UserError, match=r"not written out.*data\.template_date=null"):
        ChatTemplate.of(tokenizer)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "Hermes" not in name])
def test_a_batch_renders_as_its_rows_do_alone(name):
    tokenizer = family_tokenizer(name)
    rows = [talk("a", "One."), talk("b?", "Two."), talk("c", "Three.")]
    alone = [
        tokenizer.apply_chat_template(list(row.messages), tokenize=False, date_string="26 Jul 2024") for row in rows
    ]
    today = f"{date.today():%Y-%m-%d}"
    assert ChatTemplate.of(tokenizer).render(rows) == [text.replace(today, "2024-07-26") for text in alone]


def test_each_way_of_supervision_names_its_turns():
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Oslo"}}}
    messages = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "How cold?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3 degrees."},
    )
    template = ChatTemplate.of(family_tokenizer("Qwen-Qwen2.5-7B-Instruct"))
    found = {}
    for supervise in ("assistant", "completion", "last_turn"):
        [chat] = TurnFinder(template, supervise).find([Conversation(messages, "row")])
        found[supervise] = [chat.text[slice(*span)][:4] for span in chat.spans]
    assert found == {"assistant": ["One.", "I lo", "3 de"], "completion": ["I lo", "3 de"], "last_turn": ["3 de"]}
    [chat] = TurnFinder(template).find([Conversation(messages, "row", untrained=(1,))])
    assert [chat.text[slice(*span)][:4] for span in chat.spans] == ["I lo", "3 de"]


def test_a_template_with_a_power_is_refused_before_jinja_computes_it():
    with pytest.raises(UserError, match="line 2 of the chat template has a power"):
        ChatTemplate.of(toy_tokenizer("a\n{{ 9**9**9 }}"))
    ChatTemplate.of(toy_tokenizer("{# 9**9 #}{{ '**' }}**{% for m in messages %}{{ m.content }}{% endfor %}"))

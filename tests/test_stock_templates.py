"""Masks on stock chat templates against those of TRL's marked twins, and against masks written by hand.

TRL ships, beside a stock template, a twin of it with {% generation %} marks. Where both write the same text, the marked
tokens are what is supervised, but for two things: a twin may also mark what the served prompt gives already, and what
stands after the stop token; both are taken off before masks are compared.
"""

from functools import cache
from pathlib import Path

import pytest

from src.alignment import TurnFinder
from src.chat import ChatTemplate
from src.formats import Conversation
from src.refusal import Refusal
from src.served import as_whole
from src.tokenization import IGNORED, RowEncoder
from tests.chat_battery import battery, template_tokenizer
from tests.toy_tokenizer import family_tokenizer
from utils.errors import UserError

VISION = ("idefics3", "llava_next", "smolvlm", "qwen2_5_vl")
# eos, then other tokens that end an assistant's turn in the family
STOPS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>",),
    "gemma4": ("<turn|>",),
    "gemma": ("<end_of_turn>",),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|end|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "smolvlm": ("<end_of_utterance>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "llava_next": ("</s>",),
    "muse": ("<|eot|>", "<|eom|>"),
    "phi3": ("<|endoftext|>", "<|end|>"),
}


def stops_of(name: str) -> tuple[str, ...]:
    return next((stops for start, stops in STOPS.items() if name.startswith(start)), ("<|im_end|>",))


def trl_templates() -> Path:
    trl = pytest.importorskip("trl", reason="needs the templates that trl ships")
    return Path(trl.__file__).parent / "chat_templates"


def twin_mask(
    twin: ChatTemplate, stock: ChatTemplate, conversation: Conversation, stops: tuple[str, ...]
) -> list[bool]:
    """The tokens that a twin marks, without those of the served prompt and those after the stop token."""
    encoded = twin.tokenizer.apply_chat_template(
        list(conversation.messages),
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **twin.variables(conversation),
    )
    [text] = stock.render([conversation])
    mask = [bool(marked) for marked in encoded["assistant_masks"]]
    starts = [start for start, _ in encoded["offset_mapping"]]
    runs = [at for at, marked in enumerate(mask) if marked and (at == 0 or not mask[at - 1])]
    turns = conversation.assistant_turns()
    stop_ids = set(twin.tokenizer.convert_tokens_to_ids(list(stops)))
    if len(runs) == len(turns):
        for turn, at in zip(turns, list(runs), strict=True):
            before = Conversation(conversation.messages[:turn], "prompt", conversation.tools)
            [prompt] = stock.render([before], generation_prompt=True)
            if text.startswith(prompt):
                while mask[at] and starts[at] < len(prompt):
                    mask[at], at = False, at + 1
            elif "<｜Assistant｜>" in prompt:  # DeepSeek's prompt opens reasoning after this header, its answers do not
                mask[at] = False
    for at in range(len(mask) - 1, -1, -1):
        last_of_run = mask[at] and (at + 1 == len(mask) or not mask[at + 1])
        if last_of_run:
            end = at
            while encoded["input_ids"][end] not in stop_ids and mask[end]:
                mask[end], end = False, end - 1
            if "<|end|>" in stops and "<|endoftext|>" in stops:  # Phi closes the row, not the turn, with its eos
                tail = twin.tokenizer.convert_tokens_to_ids("<|endoftext|>")
                while mask[end] and (encoded["input_ids"][end] == tail or encoded["input_ids"][end] not in stop_ids):
                    mask[end], end = False, end - 1
    return mask


@cache
def outcome(name: str) -> tuple[int, dict[str, Refusal], list[str]]:
    """Masks compared with the twin's, refusals by row, and rows whose masks differ."""
    folder, stops = trl_templates(), stops_of(name)
    source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    marked = folder / f"{name}_training.jinja"
    tokenizer = template_tokenizer(source, stops[0])
    encoder = RowEncoder.of(tokenizer, allow_special_tokens_in_content=True, unlike_served="drop")
    twin = None
    if marked.is_file():
        other = template_tokenizer(source, stops[0])
        other.chat_template = marked.read_text(encoding="utf-8")
        twin = ChatTemplate.of(other)
    compared, refused, different = 0, {}, []
    for row, conversation in battery(stops[-1] if name != "glm4moe" else "<|user|>", parts=name in VISION).items():
        [own] = encoder.encode_parts(as_whole(encoder.finder, [conversation]))
        if isinstance(own, Refusal):
            refused[row] = own
            continue
        mask = [label != IGNORED for label in own.labels]
        try:
            same = twin is not None and twin.render([conversation]) == encoder.template.render([conversation])
        except UserError:
            continue
        if same:
            compared += 1
            if mask != twin_mask(twin, encoder.template, conversation, stops):
                different.append(row)
    return compared, refused, different


def unexpected(refused: dict[str, Refusal], reasons: dict[str, tuple[str, str]]) -> dict[str, Refusal | None]:
    """The rows that are not refused as they should be, or that should not be refused."""
    right = {row for row, (kind, text) in reasons.items() if row in refused and refused[row].kind == kind}
    right -= {row for row in right if reasons[row][1] not in refused[row].reason or refused[row].origin != row}
    return {row: refused.get(row) for row in (refused.keys() | reasons.keys()) - right}


ROLES = ("role_order", "must alternate")
NO_CALL = ("content_lost", "leaves out the call of look_up in message 2")
ALTERNATING = {"call": NO_CALL, "call and result": ROLES, "text and call": ROLES}
NO_CALLS = dict.fromkeys(("call", "call and result", "text and call"), NO_CALL)
NO_CONTENT_BESIDE_CALL = {"text and call": ("content_lost", "leaves out the content of message 2")}
# The model's turn goes on after a call, and is closed by the token that opens the result: no turn ends there.
NO_STOP = ("untrained_stop", "no stop token")
OPEN_CALL = {
    "call": NO_STOP,
    "call and result": NO_STOP,
    "text and call": ("unaligned", "once more messages follow"),
}
SYSTEM_ROWS = ("system, 1 turns", "system, 2 turns", "system, special text", "system, spaces")
NO_SYSTEM = dict.fromkeys(SYSTEM_ROWS, ("role_order", "System role not supported"))
NONE: dict[str, tuple[str, str]] = {}
# name: masks equal to the twin's, and the rows that are refused with their reasons
BATTERY = {
    "cohere": (23, ALTERNATING),
    "cohere2": (23, ALTERNATING),
    "deepseek_r1_distill": (21, NO_CALLS),
    "deepseekv3": (23, dict.fromkeys(NO_CALLS, ("unaligned", 'can only concatenate str (not "dict")'))),
    "diffusion_gemma": (23, OPEN_CALL),
    "gemma": (19, ALTERNATING | NO_SYSTEM),
    "gemma3": (23, ALTERNATING),
    "gemma4": (0, OPEN_CALL),
    "gemma4_v2": (0, NONE),
    "gemma4_v3": (0, OPEN_CALL),
    "gemma4_v4": (0, OPEN_CALL),
    "gemma4_v5": (0, OPEN_CALL),
    "gptoss": (25, NO_CONTENT_BESIDE_CALL),
    "idefics3": (23, NONE),
    "lfm2": (23, NO_CALLS),
    "lfm2_2_5": (0, NONE),
    "lfm2_2_5_v2": (0, NONE),
    "lfm2_2_5_vl": (0, NONE),
    "lfm2_v2": (26, NONE),
    "llama3": (23, NO_CALLS),
    "llama3_1": (0, NO_CONTENT_BESIDE_CALL),
    "llama3_2": (0, NO_CONTENT_BESIDE_CALL),
    "llava_next": (23, NONE),
    "muse_glimmer": (25, NO_CONTENT_BESIDE_CALL),
    "nemotron_3_5_lightning": (26, NONE),
    "nemotron_3_nano": (26, NONE),
    "nemotron_3_super": (26, NONE),
    "nemotron_3_ultra": (26, NONE),
    "phi3": (23, NO_CALLS),
    "phi3_5": (23, NO_CALLS),
    "qwen2_5": (26, NONE),
    "qwen2_5_vl": (23, NONE),
    "qwen3": (6, NONE),
    "qwen3_5_nothink": (8, NONE),
    "qwen3_5_think": (8, NONE),
    "qwen3_6": (8, NONE),
    "qwen3_8": (26, NONE),
    "qwen3_instruct_2507": (26, NONE),
    "qwen3_vl": (26, NONE),
    "smolvlm": (23, NONE),
}


@pytest.mark.parametrize("name", BATTERY)
def test_masks_equal_those_of_the_marked_twin_or_the_row_is_refused_with_its_cause(name):
    compared, refused, different = outcome(name)
    equal, reasons = BATTERY[name]
    assert different == []
    assert compared == equal
    assert unexpected(refused, reasons) == {}


def test_every_template_that_trl_ships_is_in_the_battery_and_those_with_a_usable_twin_are_compared():
    stock = {path.stem for path in trl_templates().glob("*.jinja") if not path.stem.endswith("_training")}
    assert stock - BATTERY.keys() == {"glm4moe"}
    without = {name for name, (equal, _) in BATTERY.items() if equal == 0}
    assert not [name for name in without if (trl_templates() / f"{name}_training.jinja").is_file()]


def test_a_template_that_ends_no_turn_is_refused_whole():
    compared, refused, _ = outcome("glm4moe")  # its models stop at the header of the next message
    assert compared == 0
    assert refused.keys() == battery("x").keys()
    others = {row for row, refusal in refused.items() if refusal.kind != "untrained_stop"}
    assert others == {"thinking twice", "reasoning field twice"}  # reasoning in history is left out as well


CALLED = {
    "llama3_1": '{"name": "look_up", "parameters": {"city": "Oslo"}}<|eot_id|>',
    "llama3_2": '{"name": "look_up", "parameters": {"city": "Oslo"}}<|eot_id|>',
    "lfm2_2_5": "<|tool_call_start|>[look_up(city='Oslo')]<|tool_call_end|><|im_end|>",
}
# What the makers' models write in their turns, by hand: stop token, and whether white space around content is cut.
WRITTEN = {
    "llama3_1": ("<|eot_id|>", True),
    "llama3_2": ("<|eot_id|>", True),
    "gemma4": ("<turn|>", True),
    "gemma4_v2": ("<turn|>", True),
    "gemma4_v3": ("<turn|>", True),
    "gemma4_v4": ("<turn|>", True),
    "gemma4_v5": ("<turn|>", True),
    "lfm2_2_5": ("<|im_end|>", False),
    "lfm2_2_5_v2": ("<|im_end|>", False),
    "lfm2_2_5_vl": ("<|im_end|>", False),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_masks_of_templates_without_a_twin_are_those_written_by_hand(name):
    stop, trims = WRITTEN[name]
    tokenizer = template_tokenizer((trl_templates() / f"{name}.jinja").read_text(encoding="utf-8"), stop)
    rows = battery(stop)
    plain = ("1 turns", "6 turns", "system, 2 turns", "unicode", "repeated", "special text", "spaces", "empty")
    for row in plain:
        [chat] = TurnFinder(ChatTemplate.of(tokenizer)).find([rows[row]])
        texts = [message["content"] for message in rows[row].messages if message["role"] == "assistant"]
        assert [chat.text[slice(*span)] for span in chat.spans] == [
            (text.strip() if trims else text) + stop for text in texts
        ]
    if name in CALLED:
        [chat] = TurnFinder(ChatTemplate.of(tokenizer)).find([rows["call and result"]])
        assert [chat.text[slice(*span)] for span in chat.spans] == [CALLED[name], f"3 degrees.{stop}"]


# The templates of shared/data/chat_templates: rows that are refused, with their reasons.
SHARED_REFUSALS = {
    "HuggingFaceTB-SmolLM3-3B": NO_CALLS,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": NONE,
    "Qwen-Qwen2.5-7B-Instruct": NONE,
    "Qwen-Qwen3-0.6B": NONE,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": NO_CALLS,
    "google-gemma-2-2b-it": ALTERNATING | NO_SYSTEM,
    "meta-llama-Llama-3.1-8B-Instruct": NO_CONTENT_BESIDE_CALL,
    "meta-llama-Llama-3.2-3B-Instruct": NO_CONTENT_BESIDE_CALL,
    "microsoft-Phi-3.5-mini-instruct": NO_CALLS,
    "mistralai-Mistral-Nemo-Instruct-2407": dict.fromkeys(
        SYSTEM_ROWS, ("role_order", "leaves out message 1, of role system")
    )
    | NO_CONTENT_BESIDE_CALL,
    "openai-gpt-oss-120b": NO_CONTENT_BESIDE_CALL,
}


@pytest.mark.parametrize("name", SHARED_REFUSALS)
def test_shared_templates_show_every_turn_or_refuse_the_row_with_its_cause(name):
    tokenizer = family_tokenizer(name)
    refused = {}
    for row, conversation in battery(tokenizer.eos_token).items():
        [chat] = TurnFinder(ChatTemplate.of(tokenizer)).find([conversation])
        if isinstance(chat, Refusal):
            refused[row] = chat
            continue
        assert len(chat.spans) == len(conversation.assistant_turns())
        for turn, span in zip(conversation.assistant_turns(), chat.spans, strict=True):
            content = conversation.messages[turn]["content"].split("</think>")[-1].strip()
            assert content in chat.text[slice(*span)]
    reasons = SHARED_REFUSALS[name]
    if "tool_use" in name:  # a template for rows with tools alone
        plain = {row: ("unaligned", "object is not iterable") for row, each in battery("x").items() if not each.tools}
        reasons = plain | NO_CONTENT_BESIDE_CALL
    assert unexpected(refused, reasons) == {}

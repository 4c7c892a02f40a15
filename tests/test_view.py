"""Rows as pieces of text: every id once, whole characters, and the turns of stock templates."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from src.formats import Conversation
from src.served import as_whole
from src.tokenization import IGNORED, RowEncoder
from src.view import Piece, RowViewer, Turn
from tests.toy_tokenizer import FAMILIES, family_tokenizer, toy_tokenizer

WORDS = "naïve 日本語 🙂🚀 a\ufffdb\ttab\n  two e\u0301 \u200d👩\u200d💻"


def viewed(tokenizer, text, supervised=()):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [number if at in supervised else IGNORED for at, number in enumerate(ids)]
    return ids, RowViewer(tokenizer).view(ids, labels).pieces


def byte_fallback_tokenizer():
    """A vocabulary as SentencePiece makes it: a few words, and a token for each byte."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "a", "▁", "b", "\ufffd"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokens_that_are_parts_of_a_character_stand_together_and_nothing_else_does():
    tokenizer = toy_tokenizer(merges_from="x")  # a token a byte
    ids, pieces = viewed(tokenizer, WORDS)
    assert [piece.text for piece in pieces] == list(WORDS)
    assert [len(piece.ids) for piece in pieces] == [len(character.encode()) for character in WORDS]
    assert [number for piece in pieces for number in piece.ids] == ids


def test_bytes_of_a_sentencepiece_vocabulary_are_joined_and_its_first_space_is_kept():
    tokenizer = byte_fallback_tokenizer()
    ids = [
        tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "▁a", "<0xE6>", "<0x97>", "<0xA5>", "\ufffd", "b")
    ]
    pieces = RowViewer(tokenizer).view(ids, [IGNORED] * len(ids)).pieces
    assert [(piece.text, piece.kind) for piece in pieces] == [
        ("<s>", "special"),
        (" a", "text"),
        ("日", "text"),
        ("\ufffd", "text"),
        ("b", "text"),
    ]


def test_a_row_cut_within_a_character_shows_the_bytes():
    tokenizer = toy_tokenizer(merges_from="x")
    ids = tokenizer("a日b", add_special_tokens=False)["input_ids"]
    viewer = RowViewer(tokenizer)
    shown = [viewer.view(part, [IGNORED] * len(part)).pieces for part in (ids[:3], ids[2:], [*ids[:2], *ids[1:]])]
    assert [[(piece.text, piece.kind) for piece in pieces] for pieces in shown] == [
        [("a", "text"), ("\\xe6\\x97", "bytes")],
        [("\\x97", "bytes"), ("\\xa5", "bytes"), ("b", "text")],
        [("a", "text"), ("\\xe6", "bytes"), ("日", "text"), ("b", "text")],
    ]


def test_a_character_that_is_supervised_in_part_is_shown_as_what_is_and_what_is_not():
    _, pieces = viewed(toy_tokenizer(merges_from="x"), "日", supervised=range(1, 3))
    assert [(piece.text, piece.supervised) for piece in pieces] == [("\\xe6", False), ("\\x97", True), ("\\xa5", True)]


def test_a_special_token_differs_from_text_that_spells_it():
    tokenizer = toy_tokenizer()
    stop = tokenizer.eos_token_id
    spelled = tokenizer("<|im_end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(spelled) > 1
    pieces = RowViewer(tokenizer).view([stop, *spelled], [IGNORED, *spelled]).pieces
    assert pieces[0] == Piece("<|im_end|>", (stop,), False, "special")
    assert "".join(piece.text for piece in pieces[1:]) == "<|im_end|>"
    assert {piece.kind for piece in pieces[1:]} == {"text"}


# The roles as each template writes them, and what stands where it writes none. Mistral's has no role for the system.
ROLES = {
    "HuggingFaceTB-SmolLM3-3B": ["system", "user", "assistant", "user", "assistant"],
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ["system", "user", "assistant", "user", "assistant"],
    "Qwen-Qwen2.5-7B-Instruct": ["system", "user", "assistant", "user", "assistant"],
    "Qwen-Qwen3-0.6B": ["user", "assistant", "user", "assistant"],
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ["user", "assistant", "user", "assistant"],
    "google-gemma-2-2b-it": ["user", "model", "user", "model"],
    "meta-llama-Llama-3.1-8B-Instruct": ["system", "user", "assistant", "user", "assistant"],
    "meta-llama-Llama-3.2-3B-Instruct": ["system", "user", "assistant", "user", "assistant"],
    "microsoft-Phi-3.5-mini-instruct": ["user", "assistant", "user", "assistant"],
    "mistralai-Mistral-Nemo-Instruct-2407": ["user", "assistant", "user", "assistant"],
    "openai-gpt-oss-120b": ["system", "user", "assistant", "user", "assistant"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_stock_templates_are_told_from_ids_alone(family):
    tokenizer = family_tokenizer(family)
    messages = (
        {"role": "user", "content": "user asks"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "assistant\nor model"},
        {"role": "assistant", "content": "user\nTwo."},
    )
    tools = ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}},)
    rows = [Conversation(messages, "rows line 1", tools if "Hermes" in family else ())]  # which cannot do without
    encoder = RowEncoder.of(tokenizer, unlike_served="drop")
    [row] = encoder.encode_parts(as_whole(encoder.finder, rows))  # one row, also where turns are served otherwise
    view = RowViewer(tokenizer).view(row.input_ids, row.labels)
    assert [turn.role for turn in view.turns] == ROLES[family]
    firsts = [turn.first for turn in view.turns]
    turns = [view.pieces[start:end] for start, end in zip(firsts, [*firsts[1:], None], strict=True)]
    text = ["".join(piece.text for piece in turn if piece.supervised) for turn in turns]
    assert [bool(found) for found in text] == [role in ("assistant", "model") for role in ROLES[family]]
    assert ("One." in text[-3], "user\nTwo." in text[-1]) == (True, True)


def test_without_roles_the_supervised_runs_are_the_turns():
    _, pieces = viewed(toy_tokenizer(None, merges_from="x"), "Q: a A: b", supervised=range(8, 9))
    view = RowViewer(toy_tokenizer(None, merges_from="x")).view(
        [number for piece in pieces for number in piece.ids],
        [piece.ids[0] if piece.supervised else IGNORED for piece in pieces],
    )
    assert view.turns == [Turn(0, "not supervised"), Turn(8, "supervised")]
    assert (view.tokens(), view.supervised_tokens()) == (9, 1)

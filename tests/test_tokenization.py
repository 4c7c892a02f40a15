"""Token rows: which tokens of a row are supervised, and the checks that a row passes."""

import json
from datetime import date

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from src.chat import ChatTemplate
from src.formats import TextRow
from src.refusal import Refusal
from src.token_spans import OffsetTokens
from src.tokenization import IGNORED, RowEncoder
from tests.test_chat import PLAIN, talk
from tests.toy_tokenizer import CHATML, FAMILIES, family_tokenizer, shared_file, toy_tokenizer


def supervised_runs(tokenizer, row):
    """The text of each run of supervised tokens."""
    runs, run = [], []
    for token, label in zip([*row.input_ids.tolist(), 0], [*row.labels.tolist(), IGNORED], strict=True):
        if label != IGNORED:
            assert label == token
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("name", PLAIN)
def test_supervised_tokens_read_as_the_answers_with_their_stop_tokens(name):
    tokenizer = family_tokenizer(name)
    conversation = talk("hi there", "The cat.", "why?", "Two\n\nlines 😀 日本 é")
    rows = RowEncoder.of(tokenizer, "assistant").encode_conversations([conversation])
    runs = [run for row in rows for run in supervised_runs(tokenizer, row)]
    assert runs == [f"The cat.{PLAIN[name]}", f"Two\n\nlines 😀 日本 é{PLAIN[name]}"]
    assert len(rows) == (2 if "Llama-3" in name else 1)  # "\n\n" before a word is not the one token of the prompt's end
    for row in rows:
        assert row.labels[0] == IGNORED
        assert row.supervised_tokens() == sum(label != IGNORED for label in row.labels)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "Hermes" not in name])
def test_ids_are_those_of_apply_chat_template_with_bos_once(name):
    tokenizer = family_tokenizer(name)
    conversation = talk("hi there", "The cat.")
    [row] = RowEncoder.of(tokenizer, "all").encode_conversations([conversation])
    text = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False, date_string="26 Jul 2024")
    text = text.replace(f"{date.today():%Y-%m-%d}", "2024-07-26")
    assert row.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.labels.tolist() == [IGNORED, *row.input_ids[1:]]
    if "bos_token" in tokenizer.chat_template:  # the others' templates write none
        assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        assert row.input_ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_adds_bos_itself_does_not_double_the_templates_bos():
    tokenizer = toy_tokenizer("{{ bos_token }}" + CHATML, bos="<s>", adds_bos=True)
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id
    [row] = RowEncoder.of(tokenizer, "assistant").encode_conversations([talk("a", "b")])
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_template_that_writes_bos_twice_is_refused():
    tokenizer = toy_tokenizer("{{ bos_token + bos_token }}" + CHATML, bos="<s>")
    [refusal] = RowEncoder.of(tokenizer, "assistant").encode_conversations([talk("a", "b")])
    assert refusal.kind == "doubled_bos"
    assert "line 7: the chat template writes <s> twice at the start" in refusal.reason


def test_a_template_without_the_bos_that_the_tokenizer_puts_before_text_is_refused():
    tokenizer = toy_tokenizer(CHATML, bos="<s>", adds_bos=True)
    [refusal] = RowEncoder.of(tokenizer, "assistant").encode_conversations([talk("a", "b")])
    assert refusal.kind == "missing_bos"
    assert "line 7: the chat template writes no <s> at the start" in refusal.reason
    [row] = RowEncoder.of(toy_tokenizer(CHATML, bos="<s>"), "assistant").encode_conversations([talk("a", "b")])
    assert supervised_runs(tokenizer, row) == ["b<|im_end|>"]


def test_a_refused_row_leaves_the_others_of_its_batch_as_they_are():
    encoder = RowEncoder.of(family_tokenizer("google-gemma-2-2b-it"))
    good = [talk("a", "One."), talk("b", "Two.")]
    found = encoder.encode_conversations(
        [good[0], talk(("user", "a"), ("user", "b")), talk("a", ("user", "b"), "c"), good[1]]
    )
    assert [row.kind if isinstance(row, Refusal) else "" for row in found] == ["", "masked", "role_order", ""]
    for row, alone in zip((found[0], found[3]), encoder.encode_conversations(good), strict=True):
        assert (row.input_ids.tolist(), row.labels.tolist()) == (alone.input_ids.tolist(), alone.labels.tolist())
    assert encoder.encode_conversations([]) == []


def prompt_and_turn(row):
    """The ids of a row before its last supervised turn, and those from there on."""
    start = max(at for at in range(1, len(row.labels)) if row.labels[at] != IGNORED and row.labels[at - 1] == IGNORED)
    return row.input_ids[:start].tolist(), row.input_ids[start:].tolist()


def served_prompt(tokenizer, conversation, turn):
    messages = list(conversation.messages[:turn])
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def test_white_space_that_joins_the_templates_own_is_tokenized_as_a_server_would():
    tokenizer = toy_tokenizer(merges_from="\n\n")  # a token of two newlines, across the prompt's end
    conversation = talk("a", "\n\nOne.")
    [row] = RowEncoder.of(tokenizer, "assistant").encode_conversations([conversation])
    assert supervised_runs(tokenizer, row) == ["\n\nOne.<|im_end|>"]
    assert (row.unlike_served, row.prompt_apart) == ("", True)
    assert prompt_and_turn(row)[0] == served_prompt(tokenizer, conversation, 1)
    [row] = RowEncoder.of(tokenizer, unlike_served="drop").encode_conversations([conversation])
    assert supervised_runs(tokenizer, row) == ["\nOne.<|im_end|>"]
    assert "end of the prompt" in row.unlike_served


def test_supervise_all_needs_no_visible_turns_but_a_last_stop_token():
    encoder = RowEncoder.of(family_tokenizer("deepseek-ai-DeepSeek-R1-Distill-Llama-8B"), "all")
    [row] = encoder.encode_conversations([talk("a", "One.")])
    assert row.supervised_tokens() == len(row.input_ids) - 1
    unstopped = RowEncoder.of(toy_tokenizer(CHATML, eos="</s>", special=()), "all")
    [refusal] = unstopped.encode_conversations([talk("a", "One.")])
    assert refusal.kind == "untrained_stop"
    assert "writes no stop token" in refusal.reason


def test_text_that_the_tokenizer_composes_is_supervised_all_the_same():
    tokenizer = AutoTokenizer.from_pretrained(shared_file("tokenizers/qwen2"))  # normalizes to NFC
    [row] = RowEncoder.of(tokenizer, "assistant").encode_conversations([talk("a", "cafe\u0301 😀")])
    assert supervised_runs(tokenizer, row) == ["caf\u00e9 😀<|im_end|>"]


def test_a_tokenizer_that_trims_offsets_gets_the_same_labels():
    plain, trimming = toy_tokenizer(), toy_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    rows = [
        RowEncoder.of(each, "assistant").encode_conversations([talk("a", "  b  ")])[0] for each in (plain, trimming)
    ]
    assert rows[0].labels.tolist() == rows[1].labels.tolist()
    assert supervised_runs(plain, rows[1]) == ["  b  <|im_end|>"]


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_like_tokenizers_supervise_the_same_text(legacy):
    """Llama 2's way: a space is a letter, one is put first, and a character without a token is spelled in bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    backend.train_from_iterator(["hello world, the cat sat [INST] [/INST] One. Two"] * 5, trainer)
    description = json.loads(backend.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in byte_tokens]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    # The template of Llama-2-chat without its system part: a space around the answer, BOS before each question.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    rows = RowEncoder.of(tokenizer, "assistant").encode_conversations([talk("hi", "One. 😀", "why?", "the cat")])
    assert [run.strip() for row in rows for run in supervised_runs(tokenizer, row)] == ["One. 😀 </s>", "the cat </s>"]
    row = rows[-1]
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize("name", [name for name in PLAIN if "gemma" not in name])
def test_text_of_a_special_token_in_content_is_read_as_plain_text(name):
    tokenizer, stop = family_tokenizer(name), PLAIN[name]
    number = tokenizer.convert_tokens_to_ids(stop)
    conversation = talk(f"say {stop}\n", f"The cat{stop} 😀 no")
    [plain] = RowEncoder.of(tokenizer).encode_conversations([talk("say x", "The cat 😀 no")])
    [row] = RowEncoder.of(tokenizer).encode_conversations([conversation])
    assert row.special_text
    assert row.input_ids.tolist().count(number) == plain.input_ids.tolist().count(number)
    assert tokenizer.decode(row.input_ids) == ChatTemplate.of(tokenizer).render([conversation])[0]
    assert supervised_runs(tokenizer, row) == [f"The cat{stop} 😀 no{stop}"]
    [real] = RowEncoder.of(tokenizer, allow_special_tokens_in_content=True).encode_conversations([conversation])
    assert real.input_ids.tolist().count(number) == plain.input_ids.tolist().count(number) + 2


def test_rows_without_text_of_special_tokens_are_encoded_alike_in_both_ways():
    tokenizer = AutoTokenizer.from_pretrained(shared_file("tokenizers/qwen2"))
    encoder = RowEncoder.of(tokenizer)
    [chat] = encoder.finder.find([talk("hi", "cafe\u0301 😀 the cat.", "why?", "\n\nSo.")])
    apart = encoder.content.encode(chat.text, [], encoder.template.special_token, "row")
    whole = OffsetTokens.of(encoder.backend.encode(chat.text, add_special_tokens=False))
    for found, expected in ((apart.ids, whole.ids), (apart.starts, whole.starts), (apart.ends, whole.ends)):
        assert found.tolist() == expected.tolist()


def test_rows_beyond_the_tokenizers_own_limit_raise_no_warning():
    tokenizer = toy_tokenizer()
    tokenizer.model_max_length = 8
    [row] = RowEncoder.of(tokenizer).encode_conversations([talk("a", "0123456789")])
    assert len(row.input_ids) > 8
    assert not tokenizer.deprecation_warnings  # those that the library has given, each once
    tokenizer("0123456789")
    assert tokenizer.deprecation_warnings


def test_a_text_is_bos_text_eos_with_all_but_its_first_token_supervised():
    tokenizer = toy_tokenizer(None, bos="<s>", eos="</s>", adds_bos=True)
    [row] = RowEncoder.of(tokenizer, "assistant", chat=False).encode_texts([TextRow("abc", "f")], 64)
    body = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert row.input_ids.tolist() == [tokenizer.bos_token_id, *body, tokenizer.eos_token_id]
    assert row.labels.tolist() == [IGNORED, *body, tokenizer.eos_token_id]


def test_a_tokenizer_that_adds_no_bos_gets_none_before_a_text():
    tokenizer = toy_tokenizer(None, bos="<s>", eos="</s>")
    [row] = RowEncoder.of(tokenizer, "assistant", chat=False).encode_texts([TextRow("abc", "f")], 64)
    assert tokenizer.bos_token_id not in row.input_ids


@pytest.mark.parametrize(("letters", "pieces"), [(6, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
def test_a_long_text_is_cut_into_pieces_that_lose_no_token_and_end_once(letters, pieces):
    tokenizer = toy_tokenizer(None, bos="<s>", eos="</s>", adds_bos=True, merges_from="x")
    text = "abcdefghijklmno"[:letters]  # a token a letter, 7 a piece after BOS
    rows = RowEncoder.of(tokenizer, "assistant", chat=False).encode_texts([TextRow(text, "f")], 8)
    assert len(rows) == pieces
    assert all(len(row.input_ids) <= 8 and row.input_ids[0] == tokenizer.bos_token_id for row in rows)
    read = "".join(tokenizer.decode(row.input_ids[1:]) for row in rows)
    assert read == text + ("</s>" if letters % 7 else "")
    assert [row.piece for row in rows] == list(range(pieces))

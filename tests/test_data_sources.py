"""Sources in the pipeline: apart from the evaluation rows, repeated, mixed, tokenized already."""

from dataclasses import replace

import pytest

from config.schema import DataConfig
from src.data import build_datasets
from src.tokenization import IGNORED
from tests.test_data import dialogs, rows_of, write
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError


@pytest.fixture
def tokenizer():
    return toy_tokenizer(merges_from="x")  # a token a letter


def answers_of(table, tokenizer):
    return [tokenizer.decode([label for label in labels if label != IGNORED])[:1] for labels in table["labels"]]


def test_a_row_of_the_eval_sources_is_left_out_of_training_and_told(tmp_path, tokenizer, caplog):
    train = write(tmp_path / "a.jsonl", dialogs("abcb"))
    held_out = write(tmp_path / "b.jsonl", [{"messages": [*chat("a", "b")]}])
    data = build_datasets(DataConfig(train=(train,), eval=(held_out,), max_length=64), tokenizer)
    assert answers_of(data.train, tokenizer) == ["a", "c"]
    assert data.report["train"]["sources"][0]["rows_in_train_and_eval"] == 2
    assert "2 left out that stand in data.eval too" in caplog.text
    [found] = data.findings
    assert (found.check, found.rows, found.of_rows) == ("leak", 2, 4)
    assert found.named() == "line 2, line 4"


def chat(question, answer):
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


@pytest.mark.parametrize(
    ("supervise", "expected"), [("assistant", "pr"), ("last_turn", "r"), ("completion", "pr"), ("all", None)]
)
def test_a_turn_marked_as_not_to_be_trained_is_left_out_of_the_loss(tmp_path, tokenizer, supervise, expected):
    completion = [*chat("a", "p"), *chat("b", "q"), *chat("c", "r")][1:]
    row = {"prompt": [*chat("x", "y"), {"role": "user", "content": "a"}], "completion": completion}
    marked = [{**turn, "train": turn["content"] != "q"} if turn["role"] == "assistant" else turn for turn in completion]
    source = write(tmp_path / "a.jsonl", [{**row, "completion": marked}])
    data = build_datasets(DataConfig(train=(source,), max_length=128, supervise=supervise), tokenizer)
    labels = data.train["labels"][0]
    if expected is None:
        assert IGNORED not in labels[1:]
        return
    trained = tokenizer.decode([label for label in labels if label != IGNORED])
    before = "y<|im_end|>" if supervise == "assistant" else ""
    assert trained == before + "".join(f"{letter}<|im_end|>" for letter in expected)


def test_sources_repeat_and_mix_by_weight(tmp_path, tokenizer):
    first, second = (write(tmp_path / f"{name}.jsonl", dialogs(text)) for name, text in (("a", "pq"), ("b", "rstuvw")))
    data = build_datasets(DataConfig(train=(replace(first, epochs=2), second), max_length=64), tokenizer)
    assert "".join(answers_of(data.train, tokenizer)) == "pqpqrstuvw"
    weighted = (replace(first, weight=2.0), replace(second, weight=1.0))
    data = build_datasets(DataConfig(train=weighted, max_length=64), tokenizer)
    answers = answers_of(data.train, tokenizer)
    assert len(answers) == 3
    assert {"p", "q"} < set(answers)
    assert [account["rows_a_pass"] for account in data.report["train"]["sources"]] == [2, 1]


def test_tokenized_rows_are_taken_as_they_are(tmp_path, tokenizer, caplog):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    source = write(tmp_path / "a.jsonl", rows)
    data = build_datasets(DataConfig(train=(source,), max_length=64), tokenizer)
    assert rows_of(data.train) == [([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9])]
    assert "1 rows of" in caplog.text
    assert "its label is taken as -100" in caplog.text
    source = write(tmp_path / "b.jsonl", [{"input_ids": [5, len(tokenizer)]}])
    with pytest.raises(UserError, match=rf"line 1 has id {len(tokenizer)}, and the tokenizer's are 0 to"):
        build_datasets(DataConfig(train=(source,), max_length=64), tokenizer)


def test_the_log_names_the_columns_that_are_left_out(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO")
    source = write(tmp_path / "a.jsonl", [{**dialogs("b")[0], "id": 7, "url": "x"}])
    build_datasets(DataConfig(train=(source,), max_length=64), tokenizer)
    assert "taken as prompt_completion (columns prompt, completion; id, url left out)" in caplog.text

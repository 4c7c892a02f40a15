"""scripts/inspect_data.py: which rows it shows, and that what it shows is what training gets."""

import contextlib
import io
import itertools
import logging
import os
import pty
import re
import sys
from unittest import mock

import pytest

from config.loader import read_command_line
from scripts import inspect_data
from scripts.inspecting.terminal import DIM, GREEN, REVERSE, coloured
from src.data import build_datasets
from src.model import load_tokenizer
from src.tokenization import IGNORED
from src.view import RowViewer
from tests.tiny_run import Finished, conversation, write_recipe, write_rows

LONG = "very " * 80


@pytest.fixture
def recipe(tmp_path):
    """Two rows for each side, one of training too long, and one that stands on both sides."""
    path = write_recipe(tmp_path)
    shared = conversation("both?", "Yes.")
    train = [conversation("hi", "Hello."), conversation("long", LONG), shared, conversation("日?", "\tno\n  way ")]
    write_rows(tmp_path / "train.jsonl", train)
    write_rows(tmp_path / "eval.jsonl", [shared, conversation("longer?", "It is longer.")])
    return path


def inspected(*arguments):
    """What the command prints and exits with, run within this process, where nothing is a terminal."""
    logging.getLogger("smolfactory").handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["inspect_data.py", "--config", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = inspect_data.main()
    return Finished(code, out.getvalue(), err.getvalue())


def shown_rows(text):
    return re.findall(r"^--- (\w+) row (\d+)", text, re.MULTILINE)


def tables(recipe):
    config = read_command_line(["--config", str(recipe)]).config
    tokenizer = load_tokenizer(config.model)
    return tokenizer, build_datasets(config.data, tokenizer)


def test_without_a_choice_the_first_rows_of_both_sides_and_the_account_are_shown(recipe):
    done = inspected(recipe)
    assert done.code == 0, done.stderr
    assert shown_rows(done.stdout) == [("train", "0"), ("train", "1"), ("eval", "0"), ("eval", "1")]
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[Hello.<|im_end|>]]" in done.stdout
    assert "train.jsonl line 1\n" in done.stdout
    assert "train.jsonl as messages: 2 of 3 rows" in done.stdout
    assert shown_rows(inspected(recipe, "--rows", "1").stdout) == [("train", "0"), ("eval", "0")]


def test_the_text_in_brackets_is_that_of_the_labels(recipe):
    tokenizer, data = tables(recipe)
    expected = [
        tokenizer.decode([label for label in labels if label != IGNORED])
        for table in (data.train, data.eval)
        for labels in table["labels"]
    ]
    assert re.findall(r"\[\[(.*?)\]\]", inspected(recipe).stdout, re.DOTALL) == expected


def test_one_row_is_shown_by_its_number_of_a_side(recipe):
    assert shown_rows(inspected(recipe, "--row", "1").stdout) == [("train", "1")]
    done = inspected(recipe, "--row", "1", "--side", "eval")
    assert shown_rows(done.stdout) == [("eval", "1")]
    assert "[[It is longer.<|im_end|>]]" in done.stdout
    beyond = inspected(recipe, "--row", "2")
    assert (beyond.code, beyond.stdout) == (2, "")
    assert "error: --row 2 is beyond the train rows, which are 0 to 1" in beyond.stderr


def test_a_side_without_rows_is_a_mistake(recipe):
    done = inspected(recipe, "--side", "eval", "--data.eval", "[]")
    assert done.code == 2
    assert "error: --side eval: the recipe has no eval rows" in done.stderr


def test_rows_left_out_are_shown_with_place_and_reason(recipe, tmp_path):
    with open(tmp_path / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "never answered"}]}\n')
    *lines, count, account, _ = inspected(recipe, "--refused").stdout.splitlines()
    leaked, refused, too_long = sorted(lines)
    assert re.fullmatch(r"train: in train and eval: \S+train\.jsonl line 3", leaked)
    assert re.match(r"train: refused: masked: \S+train\.jsonl line 5 \w", refused)
    assert re.fullmatch(r"train: too long \(\d+ tokens\): \S+train\.jsonl line 2", too_long)
    assert count == "3 rows are left out or cut"
    assert "2 of 4 rows" in account
    assert ", 1 refused (masked), 1 dropped (too long), " in account
    assert inspected(recipe, "--refused", "--side", "eval").stdout.startswith("0 rows are left out or cut\n")


def test_the_longest_rows_come_longest_first(tmp_path):
    recipe = write_recipe(tmp_path)
    _, data = tables(recipe)
    lengths = [len(ids) for ids in data.train["input_ids"]]
    expected = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))[:5]
    done = inspected(recipe, "--longest", "--rows", "5", "--side", "train")
    assert [int(number) for _, number in shown_rows(done.stdout)] == expected


def test_a_sample_is_the_same_for_the_same_seed_and_another_for_another(tmp_path):
    recipe = write_recipe(tmp_path)

    def sample(seed):
        return shown_rows(inspected(recipe, "--sample", "6", "--side", "train", "--data.seed", seed).stdout)

    assert sample(1) == sample(1)
    assert len(set(sample(1))) == 6
    assert sample(1) != sample(2)
    assert len(shown_rows(inspected(recipe, "--sample", "99", "--side", "eval").stdout)) == 4


def test_a_mistake_in_the_recipe_exits_with_2(recipe):
    failed = inspected(recipe, "--data.train.0.path", "no.jsonl")
    assert failed.code == 2
    assert "error: data.train.0.path='no.jsonl' does not exist" in failed.stderr


def test_no_row_can_steer_the_terminal(recipe, tmp_path):
    write_rows(tmp_path / "train.jsonl", [conversation("\x1b[2Jhi\u202e", "a\x07b")])
    shown = inspected(recipe, "--side", "train").stdout
    assert "␛[2Jhi<U+202E>" in shown
    assert "[[a␇b<|im_end|>]]" in shown
    assert "\x1b" not in shown


def colours_of(text):
    """Each stretch of text with the codes of its colour, as (codes, text); a code 0 ends a stretch."""
    parts = re.split(r"\x1b\[([\d;]*)m", text)
    codes = ["0", *parts[1::2]]
    return [(set(code.split(";")), part) for code, part in zip(codes, parts[::2], strict=True) if part]


def test_colours_tell_what_is_supervised_and_marks_tell_white_space(recipe):
    tokenizer, data = tables(recipe)
    row = data.train[1]
    view = RowViewer(tokenizer).view(row["input_ids"], row["labels"])
    stretches = colours_of(coloured(view))
    green = "".join(text for codes, text in stretches if GREEN in codes)
    assert green == "⇥\tno↵··way·<|im_end|>"
    assert {text for codes, text in stretches if REVERSE in codes} == {"<|im_start|>", "<|im_end|>"}
    rules = [text.split()[1] for _, text in stretches if text.startswith("──")]
    assert rules == ["user", "assistant"]
    # Each token has another shade than its neighbours, rules aside.
    tokens = [codes for codes, text in stretches if text.strip("\n") and not text.startswith("──")]
    assert all((DIM in left) != (DIM in right) for left, right in itertools.pairwise(tokens))


def on_a_terminal(*arguments):
    """What the command writes to a terminal, which holds a few thousand characters until they are read."""
    logging.getLogger("smolfactory").handlers.clear()
    ours, theirs = pty.openpty()
    with (
        open(theirs, "w") as terminal,
        mock.patch.object(sys, "argv", ["inspect_data.py", "--config", *map(str, arguments)]),
        contextlib.redirect_stdout(terminal),
    ):
        assert inspect_data.main() == 0
        terminal.flush()
        written = os.read(ours, 65536)
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


def test_colours_are_for_terminals_without_no_color(recipe, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[32" in on_a_terminal(recipe, "--row", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = on_a_terminal(recipe, "--row", "1")
    assert "[[\tno\n  way <|im_end|>]]" in plain
    assert "\x1b" not in plain

"""Planted defects, each found by scripts/prepare_data.py with the numbers of its rows."""

import contextlib
import importlib.util
import io
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from config.schema import ContractConfig, DataConfig, SourceConfig
from scripts.prepare_data import main
from src.accounting import Tally
from src.contract import CHECKS, ContractError, enforce, findings
from src.data import build_datasets
from src.pack_report import pack_report
from src.packing import PackedRows
from src.refusal import Refusal
from tests.tiny_run import ARCHITECTURE, Finished, conversation, run_train, write_rows
from tests.toy_tokenizer import CHATML, FAMILIES, toy_tokenizer

BOS = "<|bos|>"
WITH_SYSTEM = "messages[0].role == 'system'"


def stock_tokenizer(template: str, family: str) -> PreTrainedTokenizerBase:
    """The toy tokenizer with a stock template that TRL ships, and its family's special tokens."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("needs the stock templates that trl ships")
    bos, eos, special = FAMILIES[family]
    text = (Path(spec.origin).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return toy_tokenizer(text, bos=bos, eos=eos, special=special)


def plain(number: int) -> dict[str, Any]:
    return conversation(f"what is {number}?", f"the answer {number}")


def with_system(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Be brief."}, *plain(number)["messages"]]}


def with_call(number: int) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"n": number}}}
    question, answer = plain(number)["messages"]
    return {"messages": [question, {"role": "assistant", "content": "", "tool_calls": [call]}, question, answer]}


def with_two_systems(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Be kind."}, *with_system(number)["messages"]]}


def with_tool(number: int, argument: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": properties}}}
    return {**plain(number), "tools": [tool]}


@dataclass(frozen=True)
class Planted:
    """A set of twelve rows or more in which the lines `places` have the defect that `check` counts."""

    check: str
    rows: list[dict[str, Any]]
    places: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase = field(default_factory=toy_tokenizer)
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    ending: str = "jsonl"


def twelve(make: Any = plain, *, odd: Any, at: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows 1 to 12 by `make`, those at `at` by `odd`."""
    return [(odd if number in at else make)(number) for number in range(1, 13)]


def untrained_stop_token() -> Planted:
    tokenizer = toy_tokenizer()
    stop = tokenizer.eos_token_id

    def row(number: int) -> dict[str, Any]:
        return {"input_ids": [7, 8, number + 20, stop], "labels": [-100, -100, number + 20, stop]}

    def unended(number: int) -> dict[str, Any]:
        return {**row(number), "labels": [-100, -100, number + 20, -100]}

    return Planted("untrained_stop", twelve(row, odd=unended, at=(3, 8)), (3, 8), tokenizer)


def doubled_bos() -> Planted:
    template = f"{BOS}{{% if {WITH_SYSTEM} %}}{BOS}{{% endif %}}{CHATML}"
    return Planted("doubled_bos", twelve(odd=with_system, at=(2, 12)), (2, 12), toy_tokenizer(template, bos=BOS))


def missing_bos() -> Planted:
    template = f"{{% if not {WITH_SYSTEM} %}}{BOS}{{% endif %}}{CHATML}"
    tokenizer = toy_tokenizer(template, bos=BOS, adds_bos=True)
    return Planted("missing_bos", twelve(odd=with_system, at=(1, 5)), (1, 5), tokenizer)


def answer_truncated_away() -> Planted:
    def long_question(number: int) -> dict[str, Any]:
        return conversation(f"{number} " * 200, "yes")

    rows = twelve(odd=long_question, at=(4, 9))
    return Planted("answer_truncated", rows, (4, 9), data={"too_long": "truncate"})


def every_token_masked() -> Planted:
    def untrained(number: int) -> dict[str, Any]:
        question, answer = plain(number)["messages"]
        return {"messages": [question, {**answer, "train": False}]}

    return Planted("masked", twelve(odd=untrained, at=(6, 7)), (6, 7))


def every_label_masked() -> Planted:
    tokenizer = toy_tokenizer()
    stop = tokenizer.eos_token_id
    rows = twelve(
        lambda number: {"input_ids": [7, number + 20, stop], "labels": [-100, number + 20, stop]},
        odd=lambda number: {"input_ids": [7, number + 20, stop], "labels": [-100, -100, -100]},
        at=(10,),
    )
    return Planted("masked", rows, (10,), tokenizer)


def prompt_not_prefix() -> Planted:
    opened = f"{{% if add_generation_prompt and {WITH_SYSTEM} %}}{{{{ '<think>\\n' }}}}{{% endif %}}"
    rows = twelve(odd=with_system, at=(2, 11))
    return Planted("prompt_not_prefix", rows, (2, 11), toy_tokenizer(CHATML + opened))


def null_padded_tools() -> Planted:
    rows = [{**plain(number), "tools": []} for number in range(1, 13)]
    rows[4], rows[9] = with_tool(5, "city"), with_tool(10, "day")
    tokenizer = stock_tokenizer("qwen2_5", "Qwen-Qwen2.5-7B-Instruct")
    return Planted("null_padded_tools", rows, (5, 10), tokenizer, {"max_length": 1024}, ending="parquet")


def train_eval_leak() -> Planted:
    evaluation = [plain(4), plain(50), plain(9)]
    return Planted("leak", [plain(number) for number in range(1, 13)], (4, 9), evaluation=evaluation)


def duplicate_rows() -> Planted:
    return Planted("duplicates", twelve(odd=lambda number: plain(number - 1), at=(3, 8)), (3, 8))


def date_drift() -> Planted:
    rows = [plain(number) for number in range(1, 13)]
    tokenizer = stock_tokenizer("llama3_2", "meta-llama-Llama-3.2-3B-Instruct")
    return Planted("date_drift", rows, tuple(range(1, 13)), tokenizer, {"template_date": None, "max_length": 512})


def role_order_that_is_dropped() -> Planted:
    tokenizer = stock_tokenizer("deepseek_r1_distill", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B")
    # Every prompt of this family opens the reasoning, which none of these rows has.
    data = {"contract": {"prompt_not_prefix": 1.0}}
    return Planted("role_order", twelve(odd=with_two_systems, at=(2, 6)), (2, 6), tokenizer, data)


def role_order_that_is_refused() -> Planted:
    tokenizer = stock_tokenizer("gemma", "google-gemma-2-2b-it")
    return Planted("role_order", twelve(odd=with_system, at=(8,)), (8,), tokenizer)


def content_lost() -> Planted:
    tokenizer = stock_tokenizer("llama3", "meta-llama-Llama-3.1-8B-Instruct")
    return Planted("content_lost", twelve(odd=with_call, at=(1, 12)), (1, 12), tokenizer)


def unaligned() -> Planted:
    template = CHATML.replace("m['content']", "m['content'] | replace('@', 'at')")
    rows = twelve(odd=lambda number: conversation("where?", f"me@home{number}"), at=(3, 4))
    return Planted("unaligned", rows, (3, 4), toy_tokenizer(template))


def malformed() -> Planted:
    odd = {
        4: {"messages": "none"},
        5: {"messages": [{"role": "robot", "content": "x"}]},
        6: conversation("\ud83d", "x"),
    }
    return Planted("malformed", twelve(odd=odd.__getitem__, at=(4, 5, 6)), (4, 5, 6))


def too_long() -> Planted:
    rows = twelve(odd=lambda number: conversation("hi", f"{number} " * 200), at=(7, 8))
    return Planted("too_long", rows, (7, 8))


CASES = (
    untrained_stop_token,
    doubled_bos,
    missing_bos,
    answer_truncated_away,
    every_token_masked,
    every_label_masked,
    prompt_not_prefix,
    null_padded_tools,
    train_eval_leak,
    duplicate_rows,
    date_drift,
    role_order_that_is_dropped,
    role_order_that_is_refused,
    content_lost,
    unaligned,
    malformed,
    too_long,
)


def write_planted(folder: Path, planted: Planted) -> Path:
    """A recipe of the planted rows, with their tokenizer."""
    planted.tokenizer.save_pretrained(folder / "tokenizer")
    rows = folder / f"rows.{planted.ending}"
    if planted.ending == "parquet":
        datasets.Dataset.from_list(planted.rows).to_parquet(rows)
    else:
        write_rows(rows, planted.rows)
    data = {"train": [{"path": str(rows)}], "max_length": 256} | planted.data
    if planted.evaluation:
        data["eval"] = [{"path": str(write_rows(folder / "held_out.jsonl", planted.evaluation))}]
    model = {"architecture": ARCHITECTURE | {"max_position_embeddings": 1024}, "tokenizer": str(folder / "tokenizer")}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": model, "data": data, "output": {"folder": str(folder / "outputs")}}))
    return recipe


def prepare(*arguments: str | Path) -> Finished:
    """What `python scripts/prepare_data.py --config ARGUMENTS` prints and exits with."""
    logging.getLogger("smolfactory").handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--config", *map(str, arguments)])
    return Finished(code, out.getvalue(), err.getvalue())


def told(printed: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Whether each check of the printed table holds, and the numbers of the rows that it names."""
    lines = [re.split(r" {2,}", line) for line in printed.splitlines() if line.startswith(("FAILS  ", "holds  "))]
    return {cells[1]: (cells[0], tuple(map(int, re.findall(r"(?:line|row) (\d+)", cells[6])))) for cells in lines}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_planted_defect_is_found_with_its_rows_and_passes_once_it_is_allowed(tmp_path, case):
    planted = case()
    recipe = write_planted(tmp_path, planted)
    found = prepare(recipe)
    assert found.code == 1, found.stdout + found.stderr
    failing = {check: places for check, (verdict, places) in told(found.stdout).items() if verdict == "FAILS"}
    # ten places are named, and how many more there are
    assert failing == {planted.check: planted.places[:10]}
    assert ("and 2 more" in found.stdout) == (len(planted.places) == 12)
    allowed = prepare(recipe, f"--data.contract.{planted.check}", "1.0")
    assert allowed.code == 0, allowed.stdout + allowed.stderr
    assert told(allowed.stdout)[planted.check] == ("holds", planted.places[:10])


def test_a_clean_set_passes_in_silence(tmp_path):
    rows = [make(number) for number in range(1, 13) for make in (plain, with_system)]
    recipe = write_planted(tmp_path, Planted("", rows, (), evaluation=[plain(50)]))
    done = prepare(recipe)
    assert done.code == 0, done.stderr
    assert "contract: every check holds, no row has a defect" in done.stdout
    assert "rows        24 read, 24 kept\n" in done.stdout
    assert "warning" not in done.stderr
    assert told(done.stdout) == {}


def test_a_share_at_the_threshold_holds_and_one_above_fails(tmp_path):
    recipe = write_planted(tmp_path, duplicate_rows())  # 2 of 12 rows
    assert prepare(recipe, "--data.contract.duplicates", str(2 / 12)).code == 0
    assert prepare(recipe, "--data.contract.duplicates", "0.1666").code == 1


def test_a_mistake_in_the_recipe_or_a_file_exits_with_2(tmp_path):
    recipe = write_planted(tmp_path, duplicate_rows())
    for option, value, message in (
        ("--data.train.0.path", tmp_path / "no.jsonl", "does not exist"),
        ("--data.contract.leak", "1.5", "data.contract.leak"),
        ("--data.max_length", "2048", "exceeds model.architecture.max_position_embeddings=1024"),
    ):
        done = prepare(recipe, option, value)
        assert done.code == 2
        assert f"error: {message}" in done.stderr or message in done.stderr


def test_a_run_does_not_start_above_a_threshold_and_warns_below(tmp_path):
    planted = every_token_masked()
    rows = [*planted.rows, plain(1), plain(1)]
    recipe = write_planted(tmp_path, Planted("", rows, ()))
    done = run_train("--config", recipe)
    assert done.code == 2
    assert "error: the data fails 2 checks of data.contract:\n- masked: 2 of 14 rows of" in done.stderr
    assert "allows 0%: line 6, line 7. " in done.stderr
    assert "\n- duplicates: 2 of 14 rows" in done.stderr
    assert not (tmp_path / "outputs" / "run").exists()
    options = ("--data.contract.masked", "0.5", "--data.contract.duplicates", "0.5")
    done = run_train("--config", recipe, *options, "--training.max_steps", "1")
    assert done.code == 0, done.stderr
    assert "warning: masked: 2 of 14 rows" in done.stderr
    report = json.loads((tmp_path / "outputs" / "run" / "data.json").read_text())
    assert [(found["check"], found["rows"], found["broken"]) for found in report["findings"]] == [
        ("masked", 2, False),
        ("duplicates", 2, False),
    ]
    # nine rows of 28 tokens and three, whose numbers have two digits, of 30
    fill = round((9 * 28 + 3 * 30) / 512, 4)
    assert report["train_packs"]["sources"] == [{"path": f"{tmp_path}/rows.jsonl", "packs": 2, "fill": fill}]
    [account] = report["train"]["sources"]
    assert (account["rows_read"], account["rows_kept"], account["refused"]) == (14, 12, {"masked": 2})
    assert account["examples"]["masked"] == [f"{tmp_path}/rows.jsonl line {line}" for line in (6, 7)]


def test_a_run_finds_the_rows_that_were_prepared(tmp_path):
    recipe = write_planted(tmp_path, Planted("", [plain(number) for number in range(12)], ()))
    assert prepare(recipe).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs" / ".data").glob("*/*/*/*.arrow")}
    assert before
    assert run_train("--config", recipe, "--training.max_steps", "1").code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs" / ".data").glob("*/*/*/*.arrow")} == before


def test_every_check_has_a_threshold_and_every_refusal_a_check():
    assert set(CHECKS) == set(ContractConfig.__dataclass_fields__)
    tally = Tally()
    for check in CHECKS:
        tally.defect(check, "a.jsonl line 1")
    found = findings([("a.jsonl", 4, tally)], DataConfig().contract)
    assert [(finding.check, finding.share) for finding in found] == [(check, 0.25) for check in CHECKS]
    with pytest.raises(ContractError, match="the data fails 15 checks"):
        enforce(found)


def test_token_rows_of_one_row_count_as_one_defect():
    tally = Tally()
    for _ in range(3):
        tally.defect("prompt_not_prefix", "a.jsonl line 7", "why")
    tally.refuse(Refusal("a.jsonl line 8", "malformed", "a.jsonl line 8 is odd"))
    again = Tally.of_json(json.loads(json.dumps(tally.as_json())))
    assert again.defects == {"prompt_not_prefix": 1, "malformed": 1}
    assert again.examples["prompt_not_prefix"] == ["a.jsonl line 7"]
    assert again.reasons["malformed"] == "a.jsonl line 8 is odd"


def test_packs_and_fill_are_told_of_each_source(tmp_path):
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    write_rows(short, [{"input_ids": [7, 8, number, 9]} for number in range(20, 28)])
    write_rows(long, [{"input_ids": [7, number] * 30} for number in range(20, 23)])
    config = DataConfig(train=(SourceConfig(str(short)), SourceConfig(str(long), epochs=2)), max_length=64)
    data = build_datasets(config, toy_tokenizer())
    packed = pack_report(config, data.report, train=PackedRows.of(data.train, config), eval=None)
    assert list(packed) == ["train_packs"]
    assert packed["train_packs"]["packs"] == 7  # 3 long rows, twice, each with one of the 8 short ones; 2 are left
    assert packed["train_packs"]["sources"] == [
        {"path": str(short), "packs": 7, "fill": round((6 * 64 + 8) / (7 * 64), 4)},
        {"path": str(long), "packs": 6, "fill": 1.0},
    ]

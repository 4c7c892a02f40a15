"""The pipeline from sources to token rows: lengths, splits, counts and errors."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from config.schema import DataConfig, SourceConfig
from src.data import build_datasets, content_hash
from src.formats import Conversation
from src.tokenization import IGNORED
from tests.toy_tokenizer import SHARED, shared_file, toy_tokenizer
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def dialogs(answers, question="a"):
    return [{"prompt": question, "completion": answer} for answer in answers]


def rows_of(table):
    return list(zip(table["input_ids"], table["labels"], strict=True))


@pytest.fixture
def tokenizer():
    return toy_tokenizer(merges_from="x")  # a token a letter


def test_rows_keep_the_order_of_sources_and_files(tmp_path, tokenizer):
    sources = (write(tmp_path / "a.jsonl", dialogs("pq")), write(tmp_path / "b.jsonl", dialogs("r")))
    data = build_datasets(DataConfig(train=sources, max_length=64), tokenizer)
    answers = [tokenizer.decode([label for label in labels if label != IGNORED]) for labels in data.train["labels"]]
    assert answers == ["p<|im_end|>", "q<|im_end|>", "r<|im_end|>"]
    assert data.eval is None
    assert data.eval_conversations == []


def test_the_report_accounts_for_every_row(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs(["one", "b" * 100, "three"]))
    data = build_datasets(DataConfig(train=(source,), max_length=64), tokenizer)
    [account] = data.report["train"]["sources"]
    assert account["sha256"] == {source.path: hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()}
    assert account["format"] == "prompt_completion"
    assert (account["rows_read"], account["rows_kept"], account["dropped"]) == (3, 2, {"too long": 1})
    assert data.report["train"]["tokens"] == sum(len(ids) for ids in data.train["input_ids"])
    # "one" and "three" are 3 and 5 letters, a token each, and each answer has a stop token
    assert data.report["train"]["supervised_tokens"] == 3 + 1 + 5 + 1
    assert data.report["chat_template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert json.loads(json.dumps(data.report)) == data.report


def test_a_truncated_row_is_a_prefix_and_trains_no_stop_token(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs(["b" * 100]))
    whole = build_datasets(DataConfig(train=(source,), max_length=256), tokenizer)
    cut = build_datasets(DataConfig(train=(source,), max_length=64, too_long="truncate"), tokenizer)
    [(ids, labels)] = rows_of(cut.train)
    assert (ids, labels) == (whole.train[0]["input_ids"][:64], whole.train[0]["labels"][:64])
    assert tokenizer.eos_token_id not in labels
    assert cut.report["train"]["truncated"] == 1


def test_a_row_truncated_before_its_answer_is_dropped_with_its_reason(tmp_path, tokenizer, caplog):
    rows = [*dialogs(["fine"]), *dialogs(["never seen"], question="q" * 100)]
    config = DataConfig(train=(write(tmp_path / "a.jsonl", rows),), max_length=64, too_long="truncate")
    data = build_datasets(config, tokenizer)
    assert len(data.train) == 1
    assert data.report["train"]["dropped"] == {"nothing supervised after truncation": 1}
    assert "1 dropped (nothing supervised after truncation)" in caplog.text


def test_too_long_error_names_the_longest_row(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs(["b" * 80, "c", "d" * 100]))
    with pytest.raises(UserError, match=r"2 rows have more than data\.max_length=64 tokens; the longest.*line 3"):
        build_datasets(DataConfig(train=(source,), max_length=64, too_long="error"), tokenizer)


def test_no_row_left_is_an_error_with_the_reasons(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs(["b"], question="q" * 100))
    with pytest.raises(UserError, match=r"no train row is left: \{'too long': 1\}; raise data\.max_length=64"):
        build_datasets(DataConfig(train=(source,), max_length=64), tokenizer)
    with pytest.raises(UserError, match=r"no train row is left: \{'nothing supervised after truncation': 1\}"):
        build_datasets(DataConfig(train=(source,), max_length=64, too_long="truncate"), tokenizer)


def test_supervise_all_labels_everything_but_a_rows_first_token(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs("bc"))
    data = build_datasets(DataConfig(train=(source,), max_length=64, supervise="all"), tokenizer)
    assert all(labels == [IGNORED, *ids[1:]] for ids, labels in rows_of(data.train))


def test_texts_need_no_template_and_are_split_into_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrst\n<|endoftext|>\nxyz\n")
    tokenizer = toy_tokenizer(None, eos="</s>", merges_from="x")
    data = build_datasets(DataConfig(train=(SourceConfig(path=str(tmp_path / "a.txt")),), max_length=8), tokenizer)
    assert [tokenizer.decode(ids) for ids in data.train["input_ids"]] == ["abcdefgh", "ijklmnop", "qrst</s>", "xyz</s>"]
    assert data.report["train"]["texts_split"] == 1
    assert data.report["train"]["dropped"] == {}


def test_conversations_need_a_template(tmp_path):
    source = write(tmp_path / "a.jsonl", dialogs("b"))
    with pytest.raises(UserError, match=r"no chat template.*model\.chat_template"):
        build_datasets(DataConfig(train=(source,)), toy_tokenizer(None))


def test_eval_sources_give_eval_rows_and_their_conversations(tmp_path, tokenizer):
    train, held_out = write(tmp_path / "a.jsonl", dialogs("b")), write(tmp_path / "b.jsonl", dialogs(["c", "d" * 99]))
    data = build_datasets(DataConfig(train=(train,), eval=(held_out,), max_length=64), tokenizer)
    assert len(data.eval) == 1
    assert [row.messages[-1]["content"] for row in data.eval_conversations] == ["c"]
    assert data.report["eval"]["dropped"] == {"too long": 1}


def test_the_split_depends_on_content_alone(tmp_path, tokenizer):
    answers = [str(n) for n in range(200)]
    first = write(tmp_path / "a.jsonl", dialogs(answers + answers[:50]))
    second = write(tmp_path / "b.jsonl", dialogs(answers[::-1]))
    sides = []
    for source in (first, second):
        data = build_datasets(DataConfig(train=(source,), eval_fraction=0.2, max_length=64), tokenizer)
        sides.append([{tuple(ids) for ids in table["input_ids"]} for table in (data.train, data.eval)])
        assert data.report["train"]["rows_kept"] + data.report["eval"]["rows_kept"] == len(
            (tmp_path / Path(source.path).name).read_text().splitlines()
        )
    assert sides[0] == sides[1]
    assert not sides[0][0] & sides[0][1]
    # 200 rows at 0.2: 40 expected, standard deviation 5.7; five of them either way
    assert 12 <= len(sides[0][1]) <= 68


def test_the_content_hash_ignores_where_a_row_was_read_and_the_order_of_keys():
    one = Conversation(({"role": "user", "content": "é"},), "a line 1")
    other = Conversation(({"content": "é", "role": "user"},), "b line 9")
    text = '{"messages":[{"content":"é","role":"user"}],"tools":[]}'
    assert content_hash(one) == content_hash(other) == hashlib.sha256(text.encode()).hexdigest()


def test_a_split_with_an_empty_side_is_an_error(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs(["b"] * 20))
    with pytest.raises(
        UserError, match=r"data\.eval_fraction=0\.1 puts .* 0 on the evaluation|puts 0 rows on the training"
    ):
        build_datasets(DataConfig(train=(source,), eval_fraction=0.1, max_length=64), tokenizer)


def test_impossible_configs_are_errors(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs("b"))
    with pytest.raises(UserError, match=r"data\.train names no source"):
        build_datasets(DataConfig(), tokenizer)
    with pytest.raises(UserError, match=r"data\.max_length=2048 exceeds the model's context of 1024 tokens; lower it"):
        build_datasets(DataConfig(train=(source,)), tokenizer, context_length=1024)


def test_rows_without_an_answer_are_refused_only_if_answers_are_supervised(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    message = r"no train row is left: \{'refused: masked': 1\}\n.*\n- masked: 1 of 1 rows .*or set data\.supervise=all$"
    with pytest.raises(UserError, match=message):
        build_datasets(DataConfig(train=(source,), max_length=64), tokenizer)
    assert len(build_datasets(DataConfig(train=(source,), max_length=64, supervise="all"), tokenizer).train) == 1


def test_empty_answers_are_told_of(tmp_path, tokenizer, caplog):
    source = write(tmp_path / "a.jsonl", dialogs(["b", " "]))
    assert len(build_datasets(DataConfig(train=(source,), max_length=64), tokenizer).train) == 2
    assert "1 rows of" in caplog.text
    assert "have an empty answer" in caplog.text


def test_text_of_special_tokens_in_content_is_told_of(tmp_path, tokenizer, caplog):
    source = write(tmp_path / "a.jsonl", dialogs(["b"], question="what is <|im_end|>?"))
    build_datasets(DataConfig(train=(source,), max_length=64), tokenizer)
    assert "1 rows with the text of a special token" in caplog.text


@pytest.mark.slow
def test_more_workers_give_the_same_rows(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs([str(n) for n in range(2500)]))
    one, two = (
        build_datasets(DataConfig(train=(source,), max_length=64, workers=workers), tokenizer) for workers in (None, 2)
    )
    assert rows_of(one.train) == rows_of(two.train)
    assert one.report == two.report


@pytest.mark.slow
def test_real_chats_tokenize_at_a_hundred_thousand_tokens_a_second():
    tokenizer = AutoTokenizer.from_pretrained(shared_file("tokenizers/gpt2"))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = toy_tokenizer().chat_template
    columns = {"prompt": "question", "completion": "answer"}
    sources = (
        SourceConfig(path=str(SHARED / "datasets/gsm8k/train.jsonl"), columns=columns),
        SourceConfig(path=str(SHARED / "datasets/llama_factory/alpaca_en_demo.json")),
    )
    started = time.perf_counter()
    data = build_datasets(DataConfig(train=sources), tokenizer)
    rate = data.report["train"]["tokens"] / (time.perf_counter() - started)
    assert data.report["train"]["rows_kept"] == 7473 + 999
    assert rate > 100_000  # measured 350,000 to 500,000 on two cores; the slack is for a busy machine


MEMORY = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from config.schema import DataConfig, SourceConfig
from src.data import build_datasets
from src.packing import PackedRows
from tests.toy_tokenizer import toy_tokenizer

tokenizer = toy_tokenizer(merges_from="x")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = DataConfig(train=(SourceConfig(path=sys.argv[2]),), max_length=2048)
data = build_datasets(config, tokenizer, cache_folder=Path(sys.argv[3]))
packs = PackedRows.of(data.train, config)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"mib": (after - before) / 1024, "tokens": packs.tokens, "rows": len(data.train)}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    grown = []
    for rows in (20_000, 80_000):
        path = tmp_path / f"{rows}.jsonl"
        with open(path, "w") as file:
            for n in range(rows):
                file.write(json.dumps({"prompt": f"{n} " * 10, "completion": f"answer {n} " * 15}) + "\n")
        command = [sys.executable, "-c", MEMORY, str(ROOT), str(path), str(tmp_path / f"cache-{rows}")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        grown.append(json.loads(done.stdout.splitlines()[-1]))
    assert [found["rows"] for found in grown] == [20_000, 80_000]
    # Four times the rows are 60,000 more: Python lists of their 13 million tokens would be over 200 MB, their texts
    # 20 MB; a hash a row and the rows' numbers in packs are about 15 MB.
    assert grown[1]["mib"] - grown[0]["mib"] < 100, grown


def test_what_is_too_long_is_split_cut_left_out_or_refused_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrst\n<|endoftext|>\nxyz\n")
    tokenizer = toy_tokenizer(None, eos="</s>", merges_from="x")
    source = SourceConfig(path=str(tmp_path / "a.txt"))

    def told(too_long):
        data = build_datasets(DataConfig(train=(source,), max_length=8, too_long=too_long), tokenizer)
        rows = [tokenizer.decode(ids) for ids in data.train["input_ids"]]
        return rows, data.report["train"]["supervised_tokens_lost"]

    assert told("split") == told("auto") == (["abcdefgh", "ijklmnop", "qrst</s>", "xyz</s>"], 0)
    assert told("truncate") == (["abcdefgh", "xyz</s>"], len("ijklmnopqrst") + 1)
    assert told("drop") == (["xyz</s>"], len("bcdefghijklmnopqrst") + 1)
    with pytest.raises(UserError, match="the longest has 21"):
        told("error")


def test_only_texts_are_split(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs("b"))
    with pytest.raises(UserError, match=r"data\.too_long=split is for texts, and .*a\.jsonl holds prompt_completion"):
        build_datasets(DataConfig(train=(source,), max_length=64, too_long="split"), tokenizer)


def test_equal_rows_are_counted(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", dialogs("bcbb"))
    report = build_datasets(DataConfig(train=(source,), max_length=64), tokenizer).report["train"]
    assert report["duplicated"] == 2
    assert [place.rsplit("/")[-1] for place in report["sources"][0]["examples"]["duplicates"]] == [
        "a.jsonl line 3",
        "a.jsonl line 4",
    ]


def test_every_row_names_its_place_and_every_row_left_out_its_reason(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [*dialogs(["one", "b" * 100]), *dialogs(["c"], question="q" * 100)])
    held_out = write(tmp_path / "b.jsonl", dialogs(["one", "d" * 100]))
    config = DataConfig(train=(source,), eval=(held_out,), max_length=64, too_long="truncate")
    data = build_datasets(config, tokenizer, cache_folder=tmp_path / "cache")
    assert data.train["origin"][:] == [f"{source.path} line 2"]
    assert data.eval["origin"][:] == [f"{held_out.path} line 1", f"{held_out.path} line 2"]
    again = build_datasets(config, tokenizer, cache_folder=tmp_path / "cache")
    # 100 letters, a letter on the other side, and 21 tokens of the template: <|im_start|>, user or assistant, the line
    # feed and <|im_end|> for each of two turns, and the line feed after each
    for found in (data, again):
        rows = [(row.origin.rsplit(" ")[-1], row.reason, row.tokens) for row in found.left_out("train")]
        assert rows == [
            ("1", "in train and eval", None),
            ("2", "truncated", 122),
            ("3", "nothing supervised after truncation", 122),
        ]
        assert [(row.origin, row.reason) for row in found.left_out("eval")] == [
            (f"{held_out.path} line 2", "truncated")
        ]

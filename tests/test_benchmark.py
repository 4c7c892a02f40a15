"""The benchmark counts what was really trained on, sees who computes something else, and says what failed."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from config.benchmark import PRESETS, SHAPES, peak_tflops
from scripts.benchmark import main
from scripts.benchmarking import chart, floor, preparation, stages, step
from scripts.benchmarking.agreement import compare, disagreements
from scripts.benchmarking.case import Case
from scripts.benchmarking.clock import BatchCounts
from scripts.benchmarking.layout import Layout
from scripts.benchmarking.measure import matrix_rate, measure
from scripts.benchmarking.report import markdown
from scripts.benchmarking.rows import row_lengths, supervise_spans, synthetic_rows, token_rows
from scripts.benchmarking.variants import VARIANTS
from src.batches import PackFeed, StepSplit
from src.packing import IGNORED, PackCollator, PackedRows
from tests.toy_tokenizer import SHARED, shared_file
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
NONE = Path("no weights")
TINY = Case(max_length=256, median_length=60, micro_batch_rows=2, accumulation_steps=2, steps=2, warmup_steps=1)


@pytest.fixture(scope="module")
def layout():
    return Layout.of(TINY, token_rows(TINY, SHARED))


@pytest.fixture(scope="module")
def figures(layout, tmp_path_factory):
    """What each contender measures on the same layout, by name; trained in this process."""
    folder, names = (
        tmp_path_factory.mktemp("contenders"),
        ("floor", "smolfactory", "trl packed", "trl padded", "trainer"),
    )
    return {name: measure(name, layout, folder, weights=NONE, attention="sdpa", started=time.time()) for name in names}


def test_batch_counts_are_those_of_the_rows_in_it():
    rows = synthetic_rows(TINY, 512, 12)
    documents = [len(ids) for ids in rows["input_ids"]]
    supervised = sum(label != IGNORED for labels in rows["labels"] for label in labels)
    for packing in (True, False):
        packs = PackedRows(rows, max_length=256, packing=packing)
        batch = PackCollator(0)([packs[index] for index in range(len(packs))])
        counts = BatchCounts.of(batch, 0)
        assert counts.tokens == sum(documents)
        assert counts.supervised == supervised
        assert counts.pairs == sum(length * (length + 1) // 2 for length in documents)
        assert counts.positions == batch["input_ids"].numel() > counts.tokens
    del batch["position_ids"]  # the plain trainer's batches have none
    assert BatchCounts.of(batch, 0) == counts


def test_rows_have_the_lengths_and_supervision_that_the_report_states():
    case = Case(model="llama-1b", max_length=100_000)
    lengths = row_lengths(case, 4000)
    assert np.median(lengths) == pytest.approx(300, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(0.8, rel=0.05)
    rows = synthetic_rows(replace(case, max_length=1024), 512, 400)
    shares = [np.mean(np.array(labels) != IGNORED) for labels in rows["labels"]]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert all(labels[0] == IGNORED for labels in rows["labels"])
    assert max(len(ids) for ids in rows["input_ids"]) <= 1024
    assert min(min(ids) for ids in rows["input_ids"]) >= 3
    assert max(max(ids) for ids in rows["input_ids"]) <= 511
    assert rows["input_ids"] == synthetic_rows(replace(case, max_length=1024), 512, 400)["input_ids"]


def test_spans_have_the_share_asked_for_in_short_rows_too():
    rows = synthetic_rows(Case(model="llama-1b", max_length=4096, median_length=100), 512, 600)
    for share in (0.3, 0.85):
        found = supervise_spans(rows, share, seed=0)
        assert found["input_ids"] == rows["input_ids"]
        supervised = [np.array(labels) != IGNORED for labels in found["labels"]]
        assert np.concatenate(supervised).mean() == pytest.approx(share, abs=0.03)
        short = [row for row in supervised if len(row) < 50]
        assert np.concatenate(short).mean() == pytest.approx(share, abs=0.06)
        assert all(row.any() and not row[0] for row in supervised)
        pairs = list(zip(found["input_ids"], found["labels"], strict=True))
        assert all(label in (token, IGNORED) for ids, labels in pairs for token, label in zip(ids, labels, strict=True))
        assert found["labels"] == supervise_spans(rows, share, seed=0)["labels"]


def test_all_take_the_rows_that_the_projects_own_feed_gives(layout):
    split = StepSplit(rows=2, accumulation_steps=2)
    fed = [pack for packs in PackFeed(layout.packs, split, seed=0, max_steps=3).epoch(0) for pack in packs]
    assert layout.order == fed[: len(layout.order)]
    assert len(layout.order) == 3 * 2 * 2
    table, rows = layout.packs_table(), layout.rows_table()
    assert [token for ids in table["input_ids"] for token in ids] == [t for ids in rows["input_ids"] for t in ids]
    assert [length for lengths in table["seq_lengths"] for length in lengths] == [len(ids) for ids in rows["input_ids"]]
    assert layout.padded_rows * max(map(len, rows["input_ids"])) <= 2 * 256
    step_rows = layout.padded_rows * layout.padded_accumulation_steps
    assert len(rows) - 3 * layout.padded_rows < 3 * step_rows <= len(rows)


def test_too_few_packs_are_refused():
    with pytest.raises(UserError, match="3 steps need 12 packs and the rows make 1; give less --steps"):
        Layout.of(TINY, token_rows(TINY, SHARED).select(range(3)))


def test_figures_are_those_of_the_measured_steps(figures, layout):
    tokens = sum(len(layout.packs[index]["input_ids"]) for index in layout.order[4:])
    for name, found in figures.items():
        assert found["steps"] == TINY.steps
        assert found["seconds_per_step_min"] <= found["seconds_per_step"] <= found["seconds_per_step_max"]
        seconds = TINY.steps * found["tokens_per_step"] / found["tokens_per_second"]
        assert TINY.steps * found["seconds_per_step_min"] <= seconds <= TINY.steps * found["seconds_per_step_max"]
        assert 0 < found["seconds_to_first_step"] < 600
        assert found["peak_memory_mib"] > 100
        if name in ("trl padded", "trainer"):
            assert found["padding_share"] > 0
            assert found["tokens_per_step"] == pytest.approx(tokens / 2, rel=0.3)
        else:
            assert found["tokens_per_step"] == tokens / 2
            assert found["first_losses"][0] == pytest.approx(np.log(512), rel=0.05)


def test_contenders_compute_the_same(figures):
    found = compare(figures, exact=True)
    assert found["reference"] == "floor"
    assert set(found["contenders"]) == {"smolfactory", "trl packed", "trl padded", "trainer"}
    assert disagreements(found) == []


def test_the_trainer_computes_the_same_without_each_of_its_gains(tmp_path):
    # More than 2^20 supervised logits in a micro-batch, so that the trainer scores them in chunks.
    case = Case(max_length=2048, micro_batch_rows=2, supervised=0.85, steps=1, warmup_steps=1)
    layout = Layout.of(case, token_rows(case, SHARED))
    found = {
        name: measure(name, layout, tmp_path, weights=NONE, attention="sdpa", started=time.time())
        for name in ("floor", *VARIANTS)
    }
    assert found["floor"]["first_supervised_tokens"][0] * 512 > 2**20
    compared = compare(found, exact=True)
    assert (compared["reference"], set(compared["contenders"])) == ("floor", set(VARIANTS))
    assert disagreements(compared) == []
    assert {name for name in VARIANTS if found[name]["attention"] == "sdpa"} == {"dense mask", "none of them"}


def test_gains_are_ratios_to_the_same_turn(tmp_path, capsys, monkeypatch):
    def answer(folder, task, *, timeout_s):
        if task["name"] == step.MATRIX:
            return {"matrix_dtype": "float32", "error": "none"}
        spent = 3.0 if task["name"] == "dense mask" else 2.0
        return figures_of(1.0) | {"seconds_per_step": spent, "peak_memory_mib": 512 * spent}

    monkeypatch.setattr(step, "run_worker", answer)
    words = ["gains", "--preset", "tiny", "--contenders", "smolfactory", "dense mask", "--repeats", "1"]
    assert main([*words, "--output", str(tmp_path / "gains")]) == 0
    page = (tmp_path / "gains.md").read_text()
    assert page in capsys.readouterr().out
    meaning = "attention over the whole pack, with a mask between documents"
    assert f"| dense mask | {meaning} | 3.00 | 1.50 x | 1.50 GiB | 1.50 x |" in page
    assert "| smolfactory | nothing is taken away | 2.00 | 1.00 x | 1.00 GiB | 1.00 x |" in page


def test_a_contender_that_lets_documents_see_each_other_is_found(figures, layout, tmp_path, monkeypatch):
    apart = floor.attend_floor

    def attend_across(*tensors, documents, **options):
        return apart(*tensors, documents=[sum(documents)], **options)

    monkeypatch.setattr(floor, "attend_floor", attend_across)
    leaking = measure("floor", layout, tmp_path, weights=NONE, attention="sdpa", started=time.time())
    for exact in (True, False):
        [line] = disagreements(compare(figures | {"leaking": leaking}, exact=exact))
        assert line.startswith("leaking: ")
        assert "grad_norm differs from that of floor by 0.0" in line


def test_a_contender_that_supervises_other_tokens_is_found(figures, tmp_path):
    less = Layout.of(TINY, token_rows(replace(TINY, supervised=0.3), SHARED))
    for name, said in (("smolfactory", "supervised tokens of the first steps are"), ("trainer", "loss differs from")):
        other = measure(name, less, tmp_path, weights=NONE, attention="sdpa", started=time.time())
        [line] = disagreements(compare(figures | {"other": other}, exact=True))
        assert line.startswith(f"other: {said}")


@pytest.mark.slow
def test_the_command_measures_and_compares_in_processes_of_their_own(tmp_path, capsys):
    output = tmp_path / "docs" / "record"
    words = ["step", "--preset", "tiny", "--contenders", "smolfactory", "trl packed", "--supervised", "0.5"]
    assert main([*words, "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    [entry] = record["cases"]
    assert entry["case"]["supervised"] == 0.5
    assert {name: len(results) for name, results in entry["contenders"].items()} == {"smolfactory": 1, "trl packed": 1}
    [own], [other] = entry["contenders"].values()
    assert own["supervised_share"] == other["supervised_share"]
    assert entry["agreement"][0]["contenders"]["trl packed"]["faults"] == []
    assert entry["matrix"][0]["matrix_dtype"] == "float32"
    page = output.with_suffix(".md").read_text()
    assert page == markdown(record)
    assert page in capsys.readouterr().out
    assert "| trl packed | " in page
    for text in (page, output.with_suffix(".json").read_text()):
        assert str(ROOT) not in text
        assert str(tmp_path) not in text
    assert output.with_suffix(".png").is_file() == (importlib.util.find_spec("matplotlib") is not None)


def test_the_command_stops_where_a_contender_computes_something_else(tmp_path, capsys, monkeypatch):
    def answer(folder, task, *, timeout_s):
        norm = 2.0 if task["name"] == "smolfactory" else 1.0
        return figures_of(norm) if task["name"] != step.MATRIX else {"matrix_dtype": "float32", "error": "none"}

    monkeypatch.setattr(step, "run_worker", answer)
    words = ["step", "--preset", "tiny", "--contenders", "floor", "smolfactory", "--repeats", "2"]
    assert main([*words, "--output", str(tmp_path / "record")]) == 1
    said = capsys.readouterr()
    assert "it does not compute what the others do: smolfactory: grad_norm differs from that of floor by 1" in said.err
    assert "IT COMPUTES SOMETHING ELSE" in said.out
    [entry] = json.loads((tmp_path / "record.json").read_text())["cases"]
    assert [len(results) for results in entry["contenders"].values()] == [1, 1]  # no second turn


def figures_of(norm):
    """What a contender might return."""
    names = ("supervised_tokens_per_second", "tflops_per_second", "peak_memory_mib", "seconds_to_first_step")
    return dict.fromkeys(names, 1.0) | {
        "tokens_per_second": 1000 * norm,
        "padding_share": 0.0,
        "attention": "sdpa",
        "micro_batches_per_step": 1,
        "rows_at_once": 1,
        "first_losses": [6.0],
        "first_grad_norms": [norm],
        "first_supervised_tokens": [10],
    }


def test_a_contender_that_takes_too_long_is_reported_as_failed(tmp_path, capsys):
    words = ["step", "--preset", "tiny", "--timeout_s", "0.1", "--contenders", "floor"]
    assert main([*words, "--output", str(tmp_path / "record")]) == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["command"] == "python scripts/benchmark.py step --preset tiny --timeout_s 0.1 --contenders floor"
    assert record["cases"][0]["contenders"] == {"floor": [{"error": "not done after 0.1 s"}]}
    assert "| floor | failed: not done after 0.1 s |" in capsys.readouterr().out


def test_the_chart_has_a_bar_for_every_contender(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, which requirements/dev.txt names")
    results = {"floor": [figures_of(2.0), figures_of(3.0)], "smolfactory": [{"error": "no"}]}
    (tmp_path / "record.json").write_text(json.dumps({"cases": [{"title": "a case", "contenders": results}]}))
    assert main(["step", "--draw", str(tmp_path / "record.json")]) == 0
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_chart_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the chart needs matplotlib: pip install -r requirements/dev.txt"):
        chart.draw({"cases": []}, tmp_path / "record.png")


def test_what_the_command_gives_takes_the_place_of_what_the_preset_has():
    words = ["--preset", "gpu-8b-lora", "--supervised", "0.85", "0.3", "--steps", "5"]
    cases = step.cases_of(step.parse_arguments(words))
    assert [(case.max_length, case.supervised, case.steps) for case in cases] == [
        (4096, 0.85, 5),
        (4096, 0.3, 5),
        (16384, 0.85, 5),
        (16384, 0.3, 5),
    ]
    assert {case.micro_batch_rows * case.max_length for case in cases} == {16384}
    for name, fields in PRESETS.items():
        assert [Case(**own).model in SHAPES for own in fields], name


def test_a_command_or_case_that_cannot_be_is_refused(capsys):
    with pytest.raises(UserError, match=r"model=huge is no shape of config/benchmark.py; give one of tiny, llama-15m"):
        Case(model="huge")
    with pytest.raises(
        UserError, match="max_length=4096 must be from 300, the median_length of synthetic rows, to the"
    ):
        Case(max_length=4096)
    with pytest.raises(UserError, match="supervised=1 must be above 0 and below 1"):
        Case(supervised=1.0)
    assert main(["step", "--preset", "tiny", "--contenders", "nobody"]) == 2
    assert "--contenders nobody: not to be had here; give some of floor, smolfactory" in capsys.readouterr().err
    assert main(["--preset", "tiny"]) == 2
    assert "benchmark.py step --preset" in capsys.readouterr().out


def test_the_matrix_rate_is_in_the_format_that_the_case_computes_with():
    found = matrix_rate(replace(TINY, precision="bf16"))
    assert found["matrix_dtype"] == "bfloat16"
    # A core does at least a billion operations a second, and no machine a million billion.
    assert 1e-3 < found["matrix_tflops"] < 1e3


def test_peaks_are_told_by_the_names_that_devices_give():
    named = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA L40S": 362}
    assert {name: peak_tflops(name) for name in named} == named
    assert peak_tflops("an unknown device") is None


def test_shapes_have_the_published_numbers_of_parameters():
    # Counts that the models' cards give; SmolLM2-135M's and Llama-3's by their safetensors metadata.
    # stories15M's by hand: 32,000 x 288, then 6 layers of 4 x 288 x 288 + 3 x 288 x 768 + 2 x 288, and a norm of 288;
    # in the same way 5M's, stories42M's and stories110M's.
    published = {
        "llama-5m": 4_899_968,
        "llama-15m": 15_191_712,
        "llama-42m": 41_689_600,
        "llama-110m": 109_529_856,
        "llama-135m": 134_515_008,
        "llama-1b": 1_235_814_400,
        "llama-3b": 3_212_749_824,
        "llama-8b": 8_030_261_248,
    }
    for name, count in published.items():
        settings = {key: value for key, value in SHAPES[name].items() if key != "model_type"}
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**settings))
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_data_is_prepared_alike_by_all_contenders(tmp_path):
    shared_file("tokenizers/llama2/tokenizer.bin")
    rows = tmp_path / "rows.jsonl"
    assert preparation.write_rows(SHARED, rows, copies=1) == 7473 + 4535 + 1923
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:300]))
    floor = preparation.contend("floor", few, SHARED)
    ours = preparation.contend("smolfactory", few, SHARED)
    assert ours["tokens"] == floor["tokens"] > 30_000
    assert 0 < ours["supervised_tokens"] < ours["tokens"]
    theirs = preparation.contend("trl 1", few, SHARED)
    assert [theirs[name] for name in ("tokens", "supervised_tokens")] == [
        ours[name] for name in ("tokens", "supervised_tokens")
    ]
    masks = preparation.compare_masks(few, SHARED)
    assert masks == {
        "rows": 300,
        "tokens": ours["tokens"],
        "supervised_tokens": ours["supervised_tokens"],
        "rows_that_differ": 0,
    }


def test_stages_take_the_time_that_the_record_shares_out(tmp_path):
    shared_file("tokenizers/llama2/tokenizer.bin")
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": role, "content": "one two three " * 20} for role in ("user", "assistant")]
    rows.write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in range(600)))
    tokenizer = preparation.llama2_tokenizer(SHARED)
    found = stages.shares(tokenizer, preparation.data_config(rows))
    assert {"read", "render", "tokenize", "prove the bytes", "write", "pack"} < set(found)
    assert max(found, key=found.get) in ("tokenize", "look at the tokenizer")
    record = {
        "command": "x",
        "rows": 600,
        "repeats": 1,
        "cores": 2,
        "load": [0.5],
        "contenders": {"floor": [{"tokens": 10, "seconds": 2.0, "cpu_seconds": 4.0, "peak_mib": 7}]},
        "closer": {
            "masks_beside_trl": {"rows": 5, "tokens": 9, "supervised_tokens": 4, "rows_that_differ": 0},
            "cpu_seconds_by_stage": {"read": 1.0, "tokenize": 3.0},
            "cpu_seconds_by_turns": {"25": 0.001},
        },
    }
    page = preparation.markdown(record)
    assert "| floor | 5 | 2 | 2.0 | 4.0 |" in page
    assert "| tokenize | 3.00 | 75.0% |" in page
    assert "| 25 | 1.00 | 40 |" in page


def test_a_turn_of_a_long_conversation_costs_what_one_of_a_short_one_costs():
    shared_file("tokenizers/llama2/tokenizer.bin")
    found = stages.by_turns(preparation.llama2_tokenizer(SHARED), (25, 200))
    # A cost that grows with the square would be 64 times as much; linear is 8, and the rest is for a busy machine.
    assert found[200] < 20 * found[25]

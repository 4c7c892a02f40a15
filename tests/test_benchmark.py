"""The benchmark counts what was really trained on, and says what failed."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from config.benchmark import SHAPES, peak_tflops
from config.schema import AdapterConfig
from scripts.benchmark import case_of, main, parse_arguments, variants
from scripts.benchmarking import preparation, stages
from scripts.benchmarking.case import Case
from scripts.benchmarking.flops import Work
from scripts.benchmarking.measure import BatchCounts, build_model, build_trainer, measure
from scripts.benchmarking.report import markdown
from scripts.benchmarking.rows import row_lengths, rows_needed, rows_per_pack, synthetic_rows
from src.adapters import add_adapter
from src.loss import supervised_nll
from src.packing import IGNORED, PackCollator, PackedRows
from tests.toy_tokenizer import SHARED, shared_file
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = Case(max_length=256, median_length=60, micro_batch_rows=2, steps=2, warmup_steps=1)


def flops_counted_by_torch(model, batch):
    with FlopCounterMode(display=False) as counter:
        supervised_nll(model, batch)[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(kind="lora", rank=4)])
def test_operations_are_those_that_torch_counts(tied, adapter):
    shape = SHAPES["tiny"] | {"tie_word_embeddings": tied, "num_hidden_layers": 12}
    settings = {key: value for key, value in shape.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))
    model = add_adapter(model, adapter)
    length, supervised = 48, 20
    ids = torch.randint(3, 512, (1, length))
    labels = ids.clone()
    labels[0, :-supervised] = IGNORED
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None]}
    work = Work.of(model)
    # torch counts the masked half of attention as well: length x length pairs for eager attention.
    ours = work.of_batch(tokens=length, supervised=supervised, pairs=length * length)
    # Norm weights are in no matrix product (0.3 % here); an adapter needs no gradient of the first layer's input.
    bound = 0.005 if adapter.kind == "none" else 0.04
    assert flops_counted_by_torch(model, batch) == pytest.approx(ours, rel=bound)


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


@pytest.mark.parametrize("trainer", ["smolfactory", "plain"])
def test_figures_are_those_of_the_measured_steps(tmp_path, trainer):
    case = replace(TINY, accumulation_steps=2, packing=trainer == "smolfactory", trainer=trainer)
    figures = measure(case, tmp_path, peak=0.001)
    assert figures["steps"] == case.steps
    assert figures["seconds_per_step_min"] <= figures["seconds_per_step"] <= figures["seconds_per_step_max"]
    seconds = case.steps * figures["tokens_per_step"] / figures["tokens_per_second"]
    assert case.steps * figures["seconds_per_step_min"] <= seconds <= case.steps * figures["seconds_per_step_max"]
    most = case.micro_batch_rows * case.accumulation_steps * case.max_length
    least = 0.9 * most if trainer == "smolfactory" else 8 * 4
    assert least <= figures["tokens_per_step"] <= most
    shares = figures["supervised_tokens_per_second"] / figures["tokens_per_second"], figures["supervised_share"]
    assert shares[0] == pytest.approx(shares[1])
    assert figures["mfu"] == pytest.approx(figures["tflops_per_second"] / 0.001)
    assert figures["first_loss"] == pytest.approx(np.log(512), rel=0.05)
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["peak_memory_mib"] > 100


def test_the_baseline_computes_the_same_loss_of_the_same_rows(tmp_path):
    # One step over all rows, in whatever order, has one loss.
    case = replace(
        TINY, micro_batch_rows=3, accumulation_steps=2, packing=False, steps=1, warmup_steps=1, precision="float32"
    )
    losses = []
    for trainer in ("smolfactory", "plain"):
        built, counts = build_trainer(replace(case, trainer=trainer), build_model(case, tmp_path), tmp_path)
        rows = synthetic_rows(case, 512, 6)
        built.train_dataset = rows if trainer == "plain" else PackedRows(rows, max_length=256, packing=False)
        built.train()
        assert sum(batch.tokens for batch in counts.counts[:2]) == sum(map(len, rows["input_ids"]))
        losses.append(built.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_unpacked_steps_take_about_the_tokens_of_packed_ones():
    case = case_of(parse_arguments(["--model", "llama-1b", "--micro_batch_rows", "4"]), "max_length=4096 method=lora")
    packed, unpacked, plain = variants(case, compare=True, baseline=True)
    assert (packed, unpacked.packing, plain.trainer) == (case, False, "plain")
    assert asdict(plain) == asdict(unpacked) | {"trainer": "plain"}
    rows = row_lengths(unpacked, rows_needed(unpacked))
    steps = unpacked.steps + unpacked.warmup_steps
    assert rows.sum() / steps == pytest.approx(4 * 4096, rel=0.1)
    assert rows_per_pack(case) == pytest.approx(4096 / rows.mean(), rel=0.1)


def test_a_case_that_takes_too_long_is_reported_as_failed(tmp_path, capsys):
    assert main(["--timeout_s", "0.1", "--output", str(tmp_path / "record"), "--compare", "--case", "steps=2"]) == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["command"] == "python scripts/benchmark.py --timeout_s 0.1 --compare --case steps=2"
    assert [entry["case"]["layout"] for entry in record["cases"]] == ["packed", "unpacked"]
    assert [entry["results"] for entry in record["cases"]] == [[{"error": "not done after 0.1 s"}]] * 2
    assert capsys.readouterr().out.count("failed: not done after 0.1 s") == 2


@pytest.mark.slow
def test_the_command_measures_every_case_that_works(tmp_path):
    output = tmp_path / "docs" / "record"
    options = ["--max_length", "256", "--median_length", "60", "--steps", "1", "--warmup_steps", "1", "--output"]
    cases = ["--case", "attention=nonsense", "--case", "seed=1", "--case", "method=qlora"]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *options, str(output), *cases]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    record = json.loads(output.with_suffix(".json").read_text())
    failed, *worked = record["cases"]
    assert "nonsense" in failed["results"][0]["error"]
    assert [entry["results"][0]["tokens_per_second"] > 0 for entry in worked] == [True, True]
    total = [entry["results"][0]["parameters"]["total"] for entry in worked]
    assert total[0] < total[1] < 2 * total[0]  # a 4-bit weight counts once, beside its adapter
    page = output.with_suffix(".md").read_text()
    assert page == markdown(record)
    assert page in done.stdout
    assert "| tiny full, packed, 256 tokens, documents, float32 weights" in page
    assert "| tiny qlora, packed, 256 tokens, documents, bfloat16 weights" in page
    assert "| failed: " in page
    for text in (page, output.with_suffix(".json").read_text()):
        assert str(ROOT) not in text
        assert str(tmp_path) not in text


def test_a_case_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"model=huge is no shape of config/benchmark.py; give one of tiny, llama-135m"):
        Case(model="huge")
    with pytest.raises(UserError, match="max_length=4096 must be from median_length=300 to the 2048 tokens"):
        Case(max_length=4096)


def test_peaks_are_told_by_the_names_that_devices_give():
    named = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA L40S": 362}
    assert {name: peak_tflops(name) for name in named} == named
    assert peak_tflops("an unknown device") is None


def test_shapes_have_the_published_numbers_of_parameters():
    # Counts that the models' cards give; SmolLM2-135M's and Llama-3's by their safetensors metadata.
    published = {
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

"""Times that are projected, memory that is there, and changes that are tried, against what is reckoned by hand."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import train
from config.constraints import check_constraints
from config.schema import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from src.costs import Costs
from src.proposals import candidates, options_of, propose
from src.trial_parts import Part
from utils.logging import set_up_logging
from utils.memory import _group_bytes, available_bytes

MIB = 2**20


def phase(name, seconds, mib, **more):
    return {"name": name, "seconds": seconds, "resident_bytes": mib * MIB, **more}


REPORT = {
    "phases": [
        phase("start", 5.0, 500),
        phase("warm-up", 9.0, 700),
        phase("most tokens", 3.0, 800),
        phase("ordinary step", 1.0, 790),
        phase("ordinary step", 3.0, 790),
        phase("checkpoint", 0.5, 900, bytes=MIB),
        phase("evaluation", 2.0, 700),
        phase("answers", 4.0, 750),
        phase("result", 1.0, 760, bytes=MIB),
    ],
    "steps": 10,
    "tokens": 10_000,
    "ordinary_tokens": [500, 1000],
    "evaluation_tokens": [100, 300],
    "answers": {"tried": 32, "at_ends": 64, "between": 3},
    "mapped_bytes": 100 * MIB,
}


def config_of(**training):
    return RunConfig(
        model=ModelConfig(path="base"),
        data=DataConfig(train=(SourceConfig(path="rows.jsonl"),), eval_fraction=0.1, max_length=512),
        training=TrainingConfig(**({"save_every_steps": 4} | training)),
        evaluation=EvaluationConfig(every_steps=5),
    )


def costs_of(report, config, *available_mib):
    """Of as many processes on one machine as there are sizes, which all have found the same."""
    return Costs.of_parts(
        [Part("measured", "", report, "here", size and size * MIB) for size in available_mib or (None,)], config
    )


def test_the_time_of_a_run_is_its_steps_evaluations_answers_and_saves():
    costs = costs_of(REPORT, config_of(), 810)
    one = costs.projection
    assert one.step_s * one.steps == pytest.approx(4.0 / 1500 * 10_000)
    # evaluations before, at step 5 and at the end, each of three times what was tried; two batches of questions at
    # either end and one between; checkpoints at steps 4, 8 and 10
    other = 5.0 + 3 * 6.0 + 4.0 * (2 + 2 + 1) + 3 * 0.5 + 1.0
    assert one.run_s == pytest.approx(4.0 / 1500 * 10_000 + other)
    assert one.low_s == pytest.approx(1.0 / 500 * 10_000 + other)
    assert one.high_s == pytest.approx(3.0 / 1000 * 10_000 + other)
    assert costs.fits  # 900 MiB, of which 100 are the data's
    assert costs.to_dict()["peak_mib"] == {"resident": 900}
    assert not costs_of(REPORT, config_of(), 790).fits
    assert not costs_of(REPORT, config_of(), 810, 810).fits


@pytest.mark.parametrize(("grace_s", "said"), [(5.0, True), (30.0, False)])
def test_a_plan_says_that_a_step_and_a_save_outlast_the_grace_period(grace_s, said, tmp_path, monkeypatch, capsys):
    costs = costs_of(REPORT, config_of(), 810)
    monkeypatch.setattr("src.trial_process.measure_costs", lambda config, entry: costs)
    config = replace(config_of(grace_period_s=grace_s), output=OutputConfig(folder=str(tmp_path)))
    logging.getLogger("smolfactory").handlers.clear()  # so that the log goes to the stream of this test
    set_up_logging()
    train._show_costs(config)
    found = capsys.readouterr()
    logging.getLogger("smolfactory").handlers.clear()  # that stream is closed now
    assert ("than training.grace_period_s=5: it may be killed before it has saved" in found.err) == said
    assert "checkpoint" in found.out


def test_processes_share_tokens_evaluations_and_answers_and_each_has_its_peak():
    other = REPORT | {
        "phases": [
            one | {"seconds": 2 * one["seconds"], "resident_bytes": one["resident_bytes"] - 8 * MIB}
            for one in REPORT["phases"]
        ],
        "ordinary_tokens": [700, 1000],
    }
    parts = [Part("measured", "", report, "here", 3000 * MIB, held=100 * MIB) for report in (REPORT, other)]
    costs = Costs.of_parts(parts, config_of())
    one = costs.projection
    # The slower of both in each step, for the mean of their tokens; half of all tokens is each one's.
    assert one.step_s * one.steps == pytest.approx(8.0 / 1600 * 5_000)
    # 64 questions are one batch of both, and those that were tried, too.
    assert one.answers_s == pytest.approx(8.0 * (1 + 1 + 1))
    assert one.evaluation_s == pytest.approx(4.0 * 3)
    assert costs.by_process == ({"resident": 900 * MIB}, {"resident": 892 * MIB})
    assert costs.needed == (800 + 792) * MIB
    assert costs.available == {"resident": 3200 * MIB}  # what both plans take is gone by then
    assert "MiB of host by process: 900, 892" in "\n".join(costs.lines())


def test_the_machine_that_has_least_left_decides_whether_a_run_fits():
    parts = [Part("measured", "", REPORT, machine, size * MIB) for machine, size in (("one", 9000), ("two", 700))]
    costs = Costs.of_parts(parts, config_of())
    assert (costs.fits, costs.needed, costs.available) == (False, 800 * MIB, {"resident": 700 * MIB})


def test_a_trial_ends_as_the_process_that_failed_first():
    lost = Part("failed", "another process of this run has ended (exit code 2)", {}, "here", None)
    killed = Part("out of memory", "CUDA out of memory", REPORT, "here", None)
    stopped = Part(None, "", REPORT, "here", None)
    costs = Costs.of_parts([lost, killed, stopped], config_of())
    assert (costs.outcome, costs.reason, costs.fits) == ("out of memory", "CUDA out of memory", False)
    wrong = Part("failed", "no such column (exit code 2)", {}, "here", None)
    costs = Costs.of_parts([stopped, lost, wrong], config_of())
    assert (costs.outcome, costs.reason, costs.fits) == ("failed", wrong.reason, None)
    assert costs.lines()[-1] == f"  the trial did not come to its end: {wrong.reason}"


def test_what_a_trial_says_is_no_wider_than_a_terminal():
    most = {"tokens": 131_072, "supervised": 131_000, "longest": 131_072, "packs": 8}
    worst = {"most supervised tokens": most, "most tokens": most}
    report = REPORT | {"worst": worst, "phases": [*REPORT["phases"], phase("most supervised tokens", 1.0, 880)]}
    lines = costs_of(report, config_of(), 2**14).lines()
    assert max(map(len, lines)) <= 100, lines
    assert any("900 MiB of host at most" in line for line in lines)


def write_group(folder, limit, used, inactive, names=("memory.max", "memory.current"), stat="inactive_file"):
    folder.mkdir(parents=True)
    for name, value in zip((*names, "memory.stat"), (limit, used, f"anon 1\n{stat} {inactive}"), strict=True):
        (folder / name).write_text(f"{value}\n", encoding="utf-8")


def test_control_groups_of_both_versions_limit_what_is_available(tmp_path):
    root, member = tmp_path / "cgroup", tmp_path / "member"
    write_group(root / "jobs", 1000, 700, 50)
    write_group(root / "jobs" / "one", "max", 600, 10)
    member.write_text("0::/jobs/one\n", encoding="utf-8")
    assert list(_group_bytes(member, root)) == [350]
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_group(root / "memory" / "job", 900, 100, 20, first, "total_inactive_file")
    member.write_text("4:cpu,memory:/job\n1:cpu:/\n", encoding="utf-8")
    assert list(_group_bytes(member, root)) == [820]
    # In a container the path is the host's, and the mount's top is the container's own group.
    write_group(tmp_path / "inner", 500, 400, 0)
    member.write_text("0::/host/path\n", encoding="utf-8")
    assert list(_group_bytes(member, tmp_path / "inner")) == [100]


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="the system tells no memory in /proc/meminfo")
def test_available_memory_is_at_most_what_the_machine_has():
    total = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]) * 1024
    assert 0 < available_bytes() <= total


def test_smaller_settings_keep_the_global_batch_and_are_valid():
    config = config_of(micro_batch_rows=12, accumulation_steps=3)
    found = [candidate.config for candidate in candidates(config, device="cpu")]
    tried = [options_of(config, candidate) for candidate in found]
    assert tried[0] == "--training.micro_batch_rows 6 --training.accumulation_steps 6"
    products = {one.training.micro_batch_rows * one.training.accumulation_steps for one in found}
    assert products == {36}
    # At most half as many each time, and a divisor of 12.
    assert [one.training.micro_batch_rows for one in found[:3]] == [6, 3, 1]
    assert [one.training.gradient_checkpointing for one in found[3:5]] == ["selective", "full"]
    assert not any(one.training.activation_offload or "8bit" in one.optim.name for one in found)
    for one in found:
        check_constraints(one)


def test_what_changes_the_result_says_so():
    whole = list(candidates(config_of(gradient_checkpointing="full"), device="cpu"))
    assert "an adapter trains in place of all weights" in whole[-1].note
    lora = replace(config_of(gradient_checkpointing="full"), adapter=AdapterConfig(kind="lora"))
    [four_bit] = candidates(lora, device="cpu")
    assert options_of(lora, four_bit.config) == "--model.quantization nf4"
    assert "rounded to 4 bits" in four_bit.note
    by_tokens = config_of(tokens_per_micro_batch=2048)
    [first, second, *_] = candidates(by_tokens, device="cpu")
    assert first.config.training.tokens_per_micro_batch == 1024
    assert second.config.training.tokens_per_micro_batch == 512
    assert "about the same" in first.note


def test_trying_ends_with_the_first_that_fits():
    def measure(config):
        big = config.training.micro_batch_rows > 2
        return costs_of(REPORT, config, 100 if big else 2000)

    tried = propose(config_of(micro_batch_rows=8), measure)
    assert [one.fits for one in tried] == [False, True]
    assert tried[-1].options == "--training.micro_batch_rows 2 --training.accumulation_steps 4"
    assert tried[-1].peak_mib == {"resident": 900}

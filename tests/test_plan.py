"""What a plan tells of a run is what the run then does, and planning disturbs nothing."""

import json
import math
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from config.constraints import ConfigError
from config.schema import OptimConfig
from src import optim
from src.plan_report import curve
from tests.test_config import read
from tests.test_launch import launch
from tests.test_optim import trainer_of
from tests.tiny_run import (
    ARCHITECTURE,
    chat_rows,
    from_checkpoint,
    metrics_of,
    run_train,
    weights_of,
    write_checkpoint,
    write_recipe,
    write_rows,
)
from utils.checkpoint_record import size_of

Usage = namedtuple("Usage", "total used free")

WIDER = ARCHITECTURE | {"hidden_size": 128, "intermediate_size": 256}
"""Weights of 1.2 MB, beside which the small files of a checkpoint are 1 % and less off."""


@pytest.fixture(autouse=True)
def without_costs(monkeypatch):
    """A plan ends with a trial, which starts a process of its own and is the subject of tests/test_trial.py."""
    monkeypatch.setattr("train._show_costs", lambda config: None)


def plan_of(folder):
    return json.loads((folder / "outputs" / "run" / "plan.json").read_text(encoding="utf-8"))


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_case(folder, case):
    """Recipes of which the last step of an epoch is not full."""
    if case == "packed":  # 20 rows of two sources' epochs, more than a pass, several packs a step
        return write_recipe(
            folder,
            model={"architecture": WIDER},
            data={"max_length": 100},
            optim={"warmup_steps": 2, "min_lr_fraction": 0.1},
            training={"max_steps": None, "epochs": 2.5, "accumulation_steps": 2, "micro_batch_rows": 1},
        )
    if case == "by tokens":
        return write_recipe(
            folder,
            model={"architecture": WIDER},
            data={"packing": False, "max_length": 100},
            optim={"schedule": "warmup_stable_decay", "decay_fraction": 0.5, "warmup_fraction": 0.2},
            training={"max_steps": 7, "tokens_per_micro_batch": 200, "micro_batch_rows": None},
        )
    base = write_checkpoint(folder / "base", hidden_size=128, intermediate_size=256)
    return write_recipe(
        folder,
        model=from_checkpoint(base),
        adapter={"kind": "lora", "rank": 32},
        optim={"schedule": "linear", "lora_plus_ratio": 4.0},
        training={"max_steps": None, "epochs": 1.0, "micro_batch_rows": 3},
    )


@pytest.mark.parametrize("case", ["packed", "by tokens", "lora"])
def test_a_plan_tells_what_the_run_then_does(tmp_path, case):
    recipe, run = write_case(tmp_path, case), tmp_path / "outputs" / "run"
    done = run_train("--config", recipe, "--plan")
    assert done.code == 0, done.stderr
    assert [path.name for path in run.iterdir()] == ["plan.json"]
    plan, printed = plan_of(tmp_path), done.stdout
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    lines = [line for line in metrics_of(run) if "loss" in line]
    result = json.loads((run / "result.json").read_text())
    assert plan["steps"] == result["steps"] == len(lines)
    tokens = np.diff([0, *(line["tokens"] for line in lines)])
    shares = [line["supervised_tokens_per_second"] / line["tokens_per_second"] for line in lines]
    supervised = np.rint(tokens * shares).astype(int)  # of one step, so the quotient of two speeds tells it exactly
    for name, values in (("tokens", tokens), ("supervised_tokens", supervised)):
        told = {"total": values.sum(), "least": values.min(), "mean": values.mean(), "most": values.max()}
        assert plan[name] == pytest.approx(told, rel=1e-12), name
    assert plan["tokens"]["total"] == result["tokens"]
    positions = tokens / [1 - line["padding_share"] for line in lines]
    assert plan["padding_share"] == pytest.approx(1 - tokens.sum() / positions.sum(), abs=1e-9)
    rates = {str(line["step"]): line["learning_rate"] for line in lines}
    assert plan["learning_rate"] == pytest.approx(rates, rel=1e-12, abs=1e-20)
    assert {"trainable": 0, "total": 0} | {
        "trainable": sum(part["trained"] for part in plan["weights"].values()),
        "total": sum(part["trained"] + part["frozen"] for part in plan["weights"].values()),
    } == result["parameters"]
    written = size_of([sorted(run.glob("checkpoint-*"))[-1]])
    assert plan["bytes"]["checkpoint"] == pytest.approx(written, rel=0.01)
    assert plan["bytes"]["result"] == pytest.approx(size_of([run / "model"]), rel=0.01)
    assert plan["bytes"]["kept"] == len(list(run.glob("checkpoint-*")))
    text = " ".join(printed[printed.index("config.json") :].split("findings")[0].split())
    told = sorted(name.strip().rstrip("/") for name in text.split(",") if "checkpoint-N" not in name)
    assert told == sorted(path.name for path in run.iterdir() if not path.name.startswith("checkpoint-"))


def test_a_run_that_was_planned_ends_with_the_weights_of_one_that_was_not(tmp_path):
    weights, dropout = [], {"architecture": ARCHITECTURE | {"attention_dropout": 0.1}}  # which draws random numbers
    for name in ("planned", "plain"):
        recipe = write_recipe(tmp_path / name, model=dropout, training={"max_steps": 2})
        if name == "planned":
            assert run_train("--config", recipe, "--plan").code == 0
        done = run_train("--config", recipe)
        assert done.code == 0, done.stderr
        weights.append(weights_of(tmp_path / name / "outputs" / "run" / "model"))
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_a_plan_of_a_run_that_is_there_changes_no_file_of_it(tmp_path):
    recipe, run = write_recipe(tmp_path, training={"max_steps": None}), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    before = contents(run)
    again = run_train("--config", recipe, "--plan")
    assert again.code == 0, again.stderr
    assert f"warning: {run} holds a run already; go on with it by --resume" in again.stderr
    resumed = run_train("--config", recipe, "--resume", "--plan", "--training.epochs", "3")
    assert resumed.code == 0, resumed.stderr
    steps = json.loads(before[run / "result.json"])["steps"]
    assert f"{3 * steps}, 3 epochs" in resumed.stdout
    assert f"goes on from step {steps}: {2 * steps} are left" in resumed.stdout
    assert contents(run) == before


def test_every_start_records_its_plan_and_a_resumed_one_says_from_which_step(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    assert plan_of(tmp_path)["first_step"] == 0
    assert plan_of(tmp_path)["start_loss"]["tokens"] > 0
    shutil.rmtree(run / "checkpoint-4")
    assert run_train("--config", recipe, "--resume").code == 0
    assert plan_of(tmp_path)["first_step"] == 2
    assert plan_of(tmp_path)["start_loss"] is None, "the checkpoint's weights load only later"


def test_a_plan_of_a_stream_tells_what_its_first_micro_batches_hold(tmp_path):
    recipe = write_recipe(tmp_path, data={"streaming": True, "stream_window_rows": 8, "packing": False})
    done = run_train("--config", recipe, "--plan")
    assert done.code == 0, done.stderr
    plan = plan_of(tmp_path)
    assert plan["steps"] == 4
    assert (plan["tokens"], plan["epochs"]) == (None, None)
    assert run_train("--config", recipe).code == 0
    lines = [line for line in metrics_of(tmp_path / "outputs" / "run") if "loss" in line]
    assert plan["streamed_step"]["tokens"] == pytest.approx(lines[-1]["tokens"] / 4, rel=0.5)  # of 16, and not of 4
    assert "about " in done.stdout


def test_the_curve_has_a_column_for_each_step_of_a_short_run():
    lines = curve(np.array([0.25, 0.5, 0.75, 1.0]) * 1e-3)
    assert [line.split("|")[1] for line in lines[:-1]] == ["   █", "  ▄█", "  ██", " ███", "▄███", "████"]
    assert lines[0].startswith("  1.0e-03 |")


@pytest.mark.parametrize("steps", [1, 2, 88, 1000, 123_456])
def test_the_curve_fits_eight_lines_of_a_hundred_columns(steps):
    lines = curve(np.linspace(3e-4, 0, steps))
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 100


def test_a_terminal_without_blocks_gets_plain_characters(monkeypatch):
    class Latin:
        encoding = "latin-1"

    monkeypatch.setattr("sys.stdout", Latin())
    assert "".join(curve(np.linspace(1e-3, 0, 50))).isascii()


@pytest.mark.parametrize("options", ["--force start_loss,disk_space", "--force=start-loss --force disk_space"])
def test_forced_checks_are_named_together_or_each(tmp_path, options):
    assert read(tmp_path, options).force == ("start_loss", "disk_space")
    assert read(tmp_path, options).plan is False


def test_a_plan_is_asked_for_by_a_flag(tmp_path):
    assert read(tmp_path, "--plan --optim.learning_rate 1e-4").plan is True


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--force start_los", "--force start_los names no check; did you mean start_loss? There are data_contract, "),
        ("--force everything", "--force everything names no check; there are data_contract, eval_rows_seen, "),
        ("--force", "--force (nothing) names no check; there are data_contract"),
        ("--force start_loss,", "--force start_loss, names no check"),
    ],
)
def test_a_check_that_is_none_is_refused_with_those_there_are(tmp_path, options, told):
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, options)
    assert told in str(refusal.value)


def test_all_findings_of_a_plan_are_told_at_once_and_the_command_fails(tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "bad.jsonl", [*chat_rows(), {"messages": "nothing"}])
    recipe = write_recipe(tmp_path, data={"train": [{"path": str(rows)}]})
    tree = yaml.safe_load(recipe.read_text())
    tree["data"]["eval"] = [{"path": str(write_rows(tmp_path / "seen.jsonl", chat_rows()[:2]))}]
    recipe.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1000))
    done = run_train("--config", recipe, "--plan", "--force", "eval_rows_seen")
    assert done.code == 2
    assert "[stops the run] data_contract: malformed: 1 of 21 rows" in " ".join(done.stdout.split())
    assert "[forced] eval_rows_seen: leak: 2 of 21 rows" in " ".join(done.stdout.split())
    assert "[stops the run] disk_space" in done.stdout
    assert "error: 2 findings stop the run:" in done.stderr
    assert "`--force data_contract,disk_space` starts it as it is" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_tell_one_plan_of_the_steps_that_one_process_would_take(tmp_path):
    recipe = write_recipe(tmp_path, training={"accumulation_steps": 2, "max_steps": None, "epochs": 1.5})
    one = run_train("--config", recipe, "--plan")
    assert one.code == 0, one.stderr
    alone = plan_of(tmp_path)
    two = launch("--config", recipe, "--plan", "--training.accumulation_steps", "1")
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("learning rate ") == 1
    together = plan_of(tmp_path)
    for name in ("steps", "tokens", "supervised_tokens", "padding_share", "learning_rate", "weights"):
        assert together[name] == alone[name], name
    assert together["processes"] == 2
    assert together["bytes"]["checkpoint"] > alone["bytes"]["checkpoint"], "each process has random states"


@pytest.mark.slow
def test_a_finding_ends_all_processes_of_a_run(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(base)
    done = launch("--config", write_recipe(tmp_path, model=from_checkpoint(base)))
    assert done.returncode != 0
    assert "error: start_loss: the loss of the first micro-batch is nan before any step" in done.stderr
    assert "step 1/" not in done.stderr
    assert not (tmp_path / "outputs" / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_plan_of_a_quantized_base_tells_the_parameters_and_sizes_of_its_run(tmp_path, kind):
    base = write_checkpoint(tmp_path / "base", vocabulary=320, hidden_size=64, intermediate_size=128)
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(base, quantization=kind),
        adapter={"kind": "lora", "rank": 64},
    )
    done = run_train("--config", recipe, "--plan")
    assert done.code == 0, done.stderr
    plan, run = plan_of(tmp_path), tmp_path / "outputs" / "run"
    assert run_train("--config", recipe).code == 0
    parameters = json.loads((run / "result.json").read_text())["parameters"]
    assert parameters["trainable"] == plan["weights"]["adapter"]["trained"]
    assert parameters["total"] == sum(part["trained"] + part["frozen"] for part in plan["weights"].values())
    assert plan["weights"]["embeddings"] == {"trained": 0, "frozen": 320 * 64}
    assert plan["weights"]["MLP"] == {"trained": 0, "frozen": 2 * 3 * 64 * 128}, "as many numbers as 4-bit ones are"
    assert plan["bytes"]["checkpoint"] == pytest.approx(size_of([run / "checkpoint-4"]), rel=0.01)
    assert plan["start_loss"]["tokens"] > 0


def test_rates_of_a_long_run_are_those_of_each_step_between_which_few_are_asked(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, OptimConfig(learning_rate=1e-3, warmup_steps=100))
    exact = trainer.learning_rates(30_000)
    monkeypatch.setattr(optim, "RATES_ASKED", 30_000)
    each = trainer.learning_rates(30_000)
    assert exact.shape == each.shape == (30_000,)
    assert not np.array_equal(exact, each)
    np.testing.assert_allclose(exact, each, atol=1e-3 * 0.01)  # a rate is off by a step of the warmup at most

"""A run that goes on under other settings: they are taken, or refused with what does not fit."""

import json
import shutil

import pytest
import torch

from src.run import Run
from tests.tiny_run import metrics_of, run_train, stop_after, write_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a recipe of six steps, with its run kept in `whole` beside it."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_train("--config", write_recipe(folder, training={"max_steps": 6}))
    assert done.code == 0, done.stderr
    shutil.copytree(folder / "outputs" / "run", folder / "whole")
    return folder


@pytest.fixture
def run(whole):
    """The run's directory as it was just after step 4."""
    path = whole / "outputs" / "run"
    shutil.rmtree(path)
    shutil.copytree(whole / "whole", path)
    stop_after(path, 4)
    return path


def resume(run, *arguments):
    return run_train("--config", run.parents[1] / "recipe.yaml", "--resume", *arguments)


def rates(run):
    return {line["step"]: line["learning_rate"] for line in metrics_of(run) if "learning_rate" in line}


def test_another_learning_rate_is_taken_from_the_first_step_on(run):
    before = rates(run)
    done = resume(run, "--optim.learning_rate=1e-4")
    assert done.code == 0, done.stderr
    # The half cosine of six steps, (1 + cos(pi * step / 6)) / 2, after four and five of them.
    assert rates(run) == pytest.approx({**before, 5: 1e-4 * 0.25, 6: 1e-4 * 0.0669872981}, rel=1e-6)


def test_the_rates_that_a_longer_run_goes_on_with_are_those_of_its_plan(run):
    done = resume(run, "--training.max_steps=8")
    assert done.code == 0, done.stderr
    planned = json.loads((run / "plan.json").read_text())["learning_rate"]
    assert {step: rate for step, rate in rates(run).items() if step > 4} == {n: planned[str(n)] for n in (5, 6, 7, 8)}


def test_other_decay_and_betas_are_taken(run):
    done = resume(run, "--optim.weight_decay=0.5", "--optim.beta1=0.5", "--optim.beta2=0.6", "--optim.eps=1e-3")
    assert done.code == 0, done.stderr
    groups = torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]  # the second spares embeddings and norms
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.5, 0.6, 1e-3)}


def test_other_intervals_are_taken(run):
    done = resume(run, "--training.save_every_steps=1", "--evaluation.every_steps=1", "--training.log_every_steps=2")
    assert done.code == 0, done.stderr
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert [line["step"] for line in metrics_of(run) if "eval_loss" in line] == [0, 5, 6]
    assert list(rates(run)) == [1, 2, 3, 4, 6]


@pytest.mark.parametrize(
    "change",
    [
        "optim.name=sgd",  # torch alone fails in its first step, for want of an option
        "optim.name=muon",
        "model.architecture.hidden_size=64",
        "model.architecture.num_hidden_layers=1",
        "model.architecture.num_hidden_layers=3",
    ],
)
def test_a_checkpoint_of_another_optimizer_or_other_weights_is_refused(run, change):
    done = resume(run, f"--{change}")
    assert done.code == 2
    assert "error: checkpoint-4 was written with another optimizer, or other weights in training" in done.stderr
    assert f"{change.partition('=')[0]} was" in done.stderr
    assert resume(run).code == 0, "the run goes on once the setting is back"
    assert not (run / "changes.json").exists() or json.loads((run / "changes.json").read_text()) == []


def test_a_run_that_would_end_before_its_checkpoint_is_refused(run):
    for more in ([], ["--plan"]):
        done = resume(run, "--training.max_steps=3", *more)
        assert done.code == 2
        assert "checkpoint-4 stands behind the end of the run, which has 3 step(s)" in done.stderr


def test_rows_that_were_not_streamed_cannot_be_streamed_on(run):
    done = resume(run, "--data.streaming=True")
    assert done.code == 2
    assert "checkpoint-4 has no stream.json, as its rows were not streamed; give data.streaming=False" in done.stderr


def test_what_a_resume_changed_and_the_next_takes_back_is_no_change(tmp_path):
    def goes_on(step, rate):
        Run(tmp_path, tmp_path / f"checkpoint-{step}").record("config.json", {"rate": rate}, matters=("",))
        path = tmp_path / "changes.json"
        changes = json.loads(path.read_text()) if path.exists() else []
        return [(one["step"], one["before"], one["after"]) for one in changes]

    Run(tmp_path, None).record("config.json", {"rate": 1})
    assert goes_on(2, 1) == []
    assert goes_on(4, 2) == [(4, 1, 2)]
    assert goes_on(4, 1) == [], "no step was taken under the other one"
    assert goes_on(4, 2) == [(4, 1, 2)]
    assert goes_on(6, 3) == [(4, 1, 2), (6, 2, 3)]
    assert goes_on(6, 3) == [(4, 1, 2), (6, 2, 3)]
    assert goes_on(2, 1) == [], "all steps under others are behind where it goes on"
    assert goes_on(2, 4) == [(2, 1, 4)]


def test_the_model_card_of_a_resumed_run_has_the_command_that_started_it(run):
    started = json.loads((run / "environment.json").read_text())["command"]
    done = resume(run, "--force", "start_loss")
    assert done.code == 0, done.stderr
    assert json.loads((run / "environment.json").read_text())["command"] == started
    card = (run / "README.md").read_text()
    assert "--resume" not in card
    assert "seconds since step 4." in card
    assert "6 steps in" in done.stderr
    assert "(since step 4)" in done.stderr


def test_a_finished_run_that_lost_its_metrics_ends_all_the_same(run):
    assert resume(run).code == 0
    (run / "metrics.jsonl").unlink()
    done = resume(run)
    assert done.code == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["first_loss"] is None

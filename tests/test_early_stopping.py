"""A run whose evaluation gets worse stops if asked to, keeps its best checkpoint, and gives the weights of that."""

import json
import math
import shutil

import pytest
import torch
from transformers import TrainerControl, TrainerState

from src.best_evaluation import BestEvaluation
from tests.tiny_run import metrics_of, run_train, stop_after, weights_of, without_timings, write_recipe
from utils.checkpointing import CheckpointWriter

PATIENCE = 2


def result_of(run):
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A recipe's folder, whose run in `whole` was to take 40 steps; evaluation contradicts what it learns."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(
        folder,
        optim={"learning_rate": 1e-2},
        training={"max_steps": 40, "save_every_steps": 40, "keep_checkpoints": 1},
        evaluation={"every_steps": 1, "patience": PATIENCE, "exact_match": True},
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    shutil.copytree(folder / "outputs" / "run", folder / "whole")
    (folder / "log").write_text(done.stderr)
    return folder


def evaluations(run):
    return [(line["step"], line["eval_loss"]) for line in metrics_of(run) if "eval_loss" in line]


def expected_stop(found):
    """The best step and the last one, told by hand from the losses of evaluations after the first step."""
    best, best_loss, after = 0, float("inf"), 0
    for step, loss in found:
        if step and loss < best_loss:
            best, best_loss, after = step, loss, 0
        elif step:
            after += 1
        if after == PATIENCE:
            return best, step
    raise AssertionError("the case needs an evaluation that gets worse")


def test_the_run_stops_after_as_many_worse_evaluations_as_asked_and_gives_the_best_weights(stopped):
    run = stopped / "whole"
    found = evaluations(run)
    best, last = expected_stop(found)
    assert last < 40
    result = result_of(run)
    losses = dict(reversed(found))
    assert result["steps"] == last
    assert result["best"] == {"step": best, "eval_loss": losses[best]}
    # What is exported was measured again, after the last step: it is the best evaluation's loss, bit for bit.
    assert found[-1] == (last, losses[best])
    assert result["after"]["loss"] == losses[best]
    assert "exact_match" in result["after"]
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{last}"}
    model, checkpoint = weights_of(run / "model"), weights_of(run / f"checkpoint-{best}")
    assert all(torch.equal(model[name], checkpoint[name]) for name in model)
    assert f"the result has the weights of step {best}" in (stopped / "log").read_text()


def test_a_run_that_goes_on_stops_where_one_that_was_never_stopped_does(stopped):
    run = stopped / "outputs" / "run"
    best, last = expected_stop(evaluations(stopped / "whole"))
    for step in (best, last):
        shutil.rmtree(run)
        shutil.copytree(stopped / "whole", run)
        stop_after(run, step)
        done = run_train("--config", stopped / "recipe.yaml", "--resume")
        assert done.code == 0, done.stderr
        weights, expected = weights_of(run / "model"), weights_of(stopped / "whole" / "model")
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert result_of(run)["best"] == result_of(stopped / "whole")["best"]

        def lines(folder):
            return [line for line in without_timings(metrics_of(folder)) if "train_loss" not in line]

        assert lines(run) == lines(stopped / "whole")


def test_a_run_that_goes_on_without_patience_gives_its_last_weights(stopped):
    run = stopped / "outputs" / "run"
    best, last = expected_stop(evaluations(stopped / "whole"))
    shutil.rmtree(run)
    shutil.copytree(stopped / "whole", run)
    shutil.rmtree(run / f"checkpoint-{best}")  # as the message of a damaged one advises
    more = ("--evaluation.patience=None", f"--training.max_steps={last}")
    done = run_train("--config", stopped / "recipe.yaml", "--resume", *more)
    assert done.code == 0, done.stderr
    model, checkpoint = weights_of(run / "model"), weights_of(run / f"checkpoint-{last}")
    assert all(torch.equal(model[name], checkpoint[name]) for name in model)
    assert result_of(run)["best"] is None


def test_a_last_evaluation_that_is_not_finite_is_told_as_such(tmp_path):
    recipe = write_recipe(tmp_path, optim={"learning_rate": 1e30, "max_grad_norm": None}, training={"max_steps": 2})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert "before, not finite after" in done.stderr
    assert "Logging error" not in done.stderr


def test_an_evaluation_that_is_not_finite_is_told_and_is_never_the_best(tmp_path, caplog):
    best, state, control = BestEvaluation(1, CheckpointWriter(tmp_path, keep=1)), TrainerState(), TrainerControl()
    for step, loss in ((1, 3.0), (2, math.nan)):
        state.global_step = step
        best.on_evaluate(None, state, control, metrics={"eval_loss": loss})
    assert "the evaluation loss of step 2 is not finite" in caplog.text
    assert best.record() == {"step": 1, "eval_loss": 3.0}
    assert control.should_training_stop


def test_the_best_checkpoint_stays_however_many_are_newer(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.spared = 2
    for step in (1, 2, 3, 4):
        with writer.writing(step, main=True):
            folder = writer.staging / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "weights").write_text(str(step))
    writer.finish()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

"""Checkpoints that are damaged, moved or too large, and settings that change: what a run goes on from and says."""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections import namedtuple

import pytest
import torch

from config.effects import NO_EFFECT, ROUNDING_ONLY
from config.loader import to_dict
from config.schema import RunConfig
from tests.tiny_run import (
    ARCHITECTURE,
    assert_same_run,
    metrics_of,
    run_train,
    stop_after,
    two_epochs,
    weights_of,
    write_recipe,
)
from utils.checkpoint_record import write_record
from utils.checkpointing import CheckpointWriter, state_bytes
from utils.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a recipe of six steps, with a run that was never stopped in `whole` beside it."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_train("--config", two_epochs(folder, "full"))
    assert done.code == 0, done.stderr
    shutil.copytree(folder / "outputs" / "run", folder / "whole")
    return folder


@pytest.fixture
def stopped(whole):
    """The run's directory as it was just after step 4."""
    run = whole / "outputs" / "run"
    shutil.rmtree(run)
    shutil.copytree(whole / "whole", run)
    stop_after(run, 4)
    return run


def resume(folder, *arguments):
    return run_train("--config", folder / "recipe.yaml", "--resume", *arguments)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_records_every_file_of_it(whole):
    checkpoint = whole / "whole" / "checkpoint-4"
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    contents = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "checkpoint.json"}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} < contents.keys()
    assert record["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    assert record["step"] == 4
    assert record["config_sha256"] == hashlib.sha256((whole / "whole" / "config.json").read_bytes()).hexdigest()
    # PyPI's own build is `2.11.0` as a package, and `2.11.0+cu130` as a module.
    assert record["versions"]["packages"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])


def test_a_run_whose_newest_checkpoint_lost_any_file_to_a_power_loss_ends_as_one_never_stopped(whole, stopped):
    names = sorted(path.name for path in (stopped / "checkpoint-4").iterdir())
    assert len(names) > 8
    for name in names:
        shutil.rmtree(stopped)
        shutil.copytree(whole / "whole", stopped)
        stop_after(stopped, 4)
        truncate(stopped / "checkpoint-4" / name)
        done = resume(whole)
        assert done.code == 0, done.stderr
        assert f"warning: {stopped / 'checkpoint-4'} is damaged and passed over: " in done.stderr
        assert name in done.stderr.split("passed over: ")[1].splitlines()[0]
        assert "step 3/6  loss" in done.stderr
        assert_same_run(stopped, whole / "whole")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, "optimizer.pt holds other bytes than were written"),
        (lambda path: path.unlink(), "optimizer.pt is missing"),
        (truncate, "optimizer.pt has "),
    ],
    ids=["flipped", "missing", "truncated"],
)
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(whole, stopped, harm, said):
    harm(stopped / "checkpoint-4" / "optimizer.pt")
    done = resume(whole, stopped / "checkpoint-4")
    assert done.code == 2
    assert f"error: --resume {stopped / 'checkpoint-4'} is damaged: {said}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (stopped / "model").exists()


def test_a_run_goes_on_from_the_checkpoint_that_was_asked_for(whole, stopped):
    for arguments in ([stopped / "checkpoint-2"], []):  # the second time from the last
        done = resume(whole, *arguments)
        assert done.code == 0, done.stderr
        assert ("step 3/6  loss" in done.stderr) is bool(arguments)
        assert_same_run(stopped, whole / "whole")


def test_a_checkpoint_of_another_run_is_refused_with_those_of_this_one(whole, stopped):
    for other in (whole / "whole" / "checkpoint-4", stopped, stopped / "checkpoint-5"):
        done = resume(whole, other)
        assert done.code == 2
        assert f"error: --resume {other} is no checkpoint of the run {stopped}" in done.stderr
        assert f"has {stopped / 'checkpoint-2'}, {stopped / 'checkpoint-4'}; give one of these" in done.stderr


def test_a_run_without_a_whole_checkpoint_is_refused_with_what_is_wrong_with_each(whole, stopped):
    flip(stopped / "checkpoint-2" / "model.safetensors")
    (stopped / "checkpoint-4" / "scheduler.pt").unlink()
    done = resume(whole)
    assert done.code == 2
    error = done.stderr.partition("error: ")[2]
    assert "checkpoint-4: scheduler.pt is missing" in error
    assert "checkpoint-2: model.safetensors holds other bytes than were written" in error
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_an_older_run_is_taken_and_said_to_be_unchecked(whole, stopped):
    (stopped / "checkpoint-4" / "checkpoint.json").unlink()
    done = resume(whole)
    assert done.code == 0, done.stderr
    assert f"warning: {stopped / 'checkpoint-4'} has no checkpoint.json" in done.stderr
    assert "step 5/6  loss" in done.stderr
    assert_same_run(stopped, whole / "whole")


def test_a_folder_that_only_has_the_name_of_a_checkpoint_is_passed_over(whole, stopped):
    (stopped / "checkpoint-5").mkdir()
    done = resume(whole)
    assert done.code == 0, done.stderr
    assert "checkpoint-5 is damaged and passed over: trainer_state.json is missing" in done.stderr
    assert_same_run(stopped, whole / "whole")


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(whole, stopped):
    (stopped / "checkpoint-4").rename(stopped / "checkpoint-5")
    done = resume(whole)
    assert done.code == 0, done.stderr
    assert "checkpoint-5 is damaged and passed over: its checkpoint.json is that of step 4" in done.stderr
    assert not (stopped / "checkpoint-5").exists(), "it was behind the run when that wrote checkpoint-4"
    assert_same_run(stopped, whole / "whole")


def test_lines_that_a_power_loss_left_empty_are_written_again(whole, stopped):
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines]
    after = steps.index(5)
    (stopped / "metrics.jsonl").write_text("".join(lines[:after]) + "\0" * 40 + "\n" + "".join(lines[after + 1 :]))
    done = resume(whole)
    assert done.code == 0, done.stderr
    assert [line["step"] for line in metrics_of(stopped) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert_same_run(stopped, whole / "whole")


# Room on the disk, and rotation

Usage = namedtuple("Usage", "total used free")


def written(writer, step, size=1000, **arguments):
    with writer.writing(step, main=True, **arguments):
        folder = writer.staging / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.bin").write_bytes(bytes(size))
    writer.finish()


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=3)
    for step in (8, 9, 10):
        written(writer, step, size=3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 20))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = (
        r"checkpoint-11 could not be written: it needs about 3\.0 MiB, and 1\.0 MiB are free there; checkpoint-8, "
        r"checkpoint-9 may be deleted \(6\.0 MiB\), as the run goes on from checkpoint-10\. The last complete "
        r"checkpoint is checkpoint-10; free some space, then use --resume"
    )
    with pytest.raises(UserError, match=message):
        written(writer, 11)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_first_checkpoint_needs_the_size_of_weights_and_state(tmp_path, monkeypatch):
    model = torch.nn.Linear(1000, 100, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    assert state_bytes(model, optimizer) == 400_000
    model(torch.ones(1000)).sum().backward()
    optimizer.step()
    assert state_bytes(model, optimizer) == 1_200_004, "the weights, two moments and a count of steps"
    writer = CheckpointWriter(tmp_path, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1_200_003))
    with pytest.raises(UserError, match=r"it needs about 1\.1 MiB, .* The last complete checkpoint is none"):
        written(writer, 1, expected_bytes=1_200_004)
    assert names(tmp_path) == []
    written(writer, 1, expected_bytes=1_200_003)


def test_a_checkpoint_that_cannot_be_put_in_its_place_ends_the_run_at_a_next_step(tmp_path, monkeypatch):
    def record(folder, *, step, config):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_record(folder, step=step, config=config)

    monkeypatch.setattr("utils.checkpointing.write_record", record)
    done = run_train("--config", write_recipe(tmp_path, training={"max_steps": 40}))
    run = tmp_path / "outputs" / "run"
    assert done.code == 2
    assert f"error: checkpoint {run / 'checkpoint-4'} could not be written ([Errno 28] No space left" in done.stderr
    assert "The last complete checkpoint is checkpoint-2; free some space, then use --resume" in done.stderr
    assert "step 7/40" not in done.stderr, "the next checkpoint waits for this one"
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-2"]


def test_a_checkpoint_is_absent_until_a_thread_has_recorded_it(tmp_path, monkeypatch):
    may_go_on = threading.Event()

    def record(folder, *, step, config):
        assert may_go_on.wait(60)
        write_record(folder, step=step, config=config)

    monkeypatch.setattr("utils.checkpointing.write_record", record)
    writer = CheckpointWriter(tmp_path, keep=2)
    with writer.writing(2, main=True):
        folder = writer.staging / "checkpoint-2"
        folder.mkdir(parents=True)
        (folder / "state.bin").write_bytes(bytes(1000))
    assert names(tmp_path) == [".checkpoint"], "the caller has gone on"
    assert writer.seconds is None
    may_go_on.set()
    writer.finish()
    assert names(tmp_path) == ["checkpoint-2"]
    assert writer.seconds > 0


def test_rotation_goes_by_step_and_not_by_the_clock(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (9, 10, 100):
        written(writer, step)
        for age, path in enumerate(sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))):
            os.utime(path, (1e9 - age, 1e9 - age))  # the newest step has the oldest time
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]


def test_a_run_that_went_back_keeps_no_checkpoint_of_a_later_step(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (2, 4, 6):
        written(writer, step)
    written(writer, 5)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


# Settings that change


def test_each_changed_setting_is_told_with_what_it_does(whole, stopped):
    done = resume(
        whole, "--optim.learning_rate=1e-3", "--training.log_every_steps=2", "--training.gradient_checkpointing=full"
    )
    assert done.code == 0, done.stderr
    now = "when this run started and is"
    assert f"optim.learning_rate was 0.003 {now} 0.001 now; the result may differ" in done.stderr
    assert f"training.log_every_steps was 1 {now} 2 now; the weights do not depend on it" in done.stderr
    checkpointing = f"training.gradient_checkpointing was 'none' {now} 'full' now; the weights may be rounded otherwise"
    assert checkpointing in done.stderr
    assert done.stderr.count(now) == 3
    done = resume(whole, stopped / "checkpoint-2")
    assert f"warning: {stopped / 'config.json'} has changed since checkpoint-2 was written" in done.stderr


def test_settings_that_are_said_to_do_nothing_are_settings():
    tree = to_dict(RunConfig())
    for name in (*NO_EFFECT, *ROUNDING_ONLY):
        section, _, field = name.partition(".")
        assert section in tree
        assert not field or field in tree[section]


def test_the_weights_do_not_depend_on_what_is_said_to_do_nothing(tmp_path):
    # With dropout, so that a draw of a random number anywhere shows.
    model = {"architecture": ARCHITECTURE | {"attention_dropout": 0.1}}
    recipe = write_recipe(tmp_path, model=model, training={"max_steps": 6})
    assert run_train("--config", recipe).code == 0
    done = run_train(
        *("--config", recipe, "--output.name", "other", "--output.folder", tmp_path / "elsewhere"),
        *("--evaluation.every_steps", "2", "--evaluation.exact_match", "True", "--evaluation.samples", "2"),
        *("--evaluation.micro_batch_rows", "3", "--evaluation.max_new_tokens", "7"),
        *("--training.log_every_steps", "4", "--training.save_every_steps", "3", "--training.keep_checkpoints", "1"),
        *("--data.cache_folder", tmp_path / "cache", "--data.cache_gib", "1", "--data.workers", "1"),
        *("--hub.private", "False", "--hub.license", "mit"),
    )
    assert done.code == 0, done.stderr
    weights, other = (weights_of(tmp_path / folder / "model") for folder in ("outputs/run", "elsewhere/other"))
    assert [name for name in weights if not torch.equal(weights[name], other[name])] == []


def test_a_damaged_record_is_told_with_what_it_costs(whole, stopped):
    lines = (stopped / "metrics.jsonl").read_bytes().split(b"\n")
    (stopped / "metrics.jsonl").write_bytes(b"\n".join([lines[0], b"\xff" + lines[1][1:], *lines[2:]]))
    (stopped / "plan.json").write_text('{"forced": ')
    done = resume(whole)
    assert done.code == 2
    assert f"{stopped / 'plan.json'} is no JSON" in done.stderr
    assert "bring it back, or remove it to go on" in done.stderr
    (stopped / "plan.json").unlink()
    done = resume(whole)
    assert done.code == 0, done.stderr
    told = f"{stopped / 'metrics.jsonl'}: line 2 cannot be read, and is removed with"
    assert told in done.stderr

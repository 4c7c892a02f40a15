"""Trials of runs: what they predict against what runs take, and what is left of those that are killed."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from config.loader import read_command_line
from src import trial_process
from src.trial import trial_config
from src.trial_process import measure_costs
from tests.tiny_run import (
    ARCHITECTURE,
    ROOT,
    assert_same_run,
    chat_rows,
    conversation,
    from_checkpoint,
    run_train,
    write_checkpoint,
    write_recipe,
    write_rows,
)

WITHIN = 0.05
"""The share by which a run's later peak may differ from the trial's, on a CPU."""

DEEP = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "max_position_embeddings": 2048}
"""A model whose activations of 4,096 tokens take some 300 MiB, in a third of a second on a core."""

needs_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system keeps no peak of memory that can start anew"
)


def measured(recipe, *options):
    return measure_costs(read_command_line(["--config", str(recipe), *options]).config, ROOT / "train.py")


def result_of_run(recipe, *options):
    """The result.json of a run in a process of its own."""
    command = [sys.executable, "train.py", "--config", str(recipe), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((recipe.parent / "outputs" / "run" / "result.json").read_text())


def peak_of_run(recipe, *options):
    """What a run says that it took at most, in MiB."""
    return result_of_run(recipe, *options)["peak_memory"]["resident_mib"]


def assert_predicted(run, costs):
    """What a run took at most, in MiB, is what its trial took; with `pytest -s` both are shown.

    The second ratio leaves out what libraries, data and model take before the first step, which no trial can get wrong.
    """
    assert costs.outcome == "measured", costs.lines()
    told = costs.to_dict()
    peak, start = told["peak_mib"]["resident"], told["phases"][0]["resident_mib"]
    print(f"\n{run} of {peak} MiB: {run / peak:.3f}; above {start} MiB: {(run - start) / (peak - start):.3f}")
    assert peak - start > 150  # the bound is no matter of the interpreter alone
    assert run == pytest.approx(peak, rel=WITHIN)


def files_below(folder):
    return {
        path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if ".data" not in path.parts
    }


def long_rows(count):
    """Questions of 20 to about 1,700 tokens."""
    return [conversation("on " * (10 + (index * index * 7) % 1650), "one two") for index in range(count)]


def recipe_of(folder, shape):
    """A recipe of each shape, whose activations or states take far more than what can be mistaken for noise."""
    folder.mkdir(exist_ok=True)
    training = {"max_steps": 4, "save_every_steps": 2}
    packed = {"train": [{"path": str(write_rows(folder / "many.jsonl", chat_rows(1500)))}], "max_length": 512}
    if shape == "packed, all weights":
        wide = ARCHITECTURE | DEEP | {"vocab_size": 50_000}
        return write_recipe(
            folder, model={"architecture": wide}, data=packed, training=training | {"micro_batch_rows": 8}
        )
    if shape == "LoRA":
        base = write_checkpoint(folder / "base", vocabulary=50_000, **DEEP)
        return write_recipe(
            folder,
            model=from_checkpoint(base, dtype="float32"),
            adapter={"kind": "lora"},
            data=packed,
            training=training | {"micro_batch_rows": 4, "accumulation_steps": 2},
        )
    rows = {"train": [{"path": str(write_rows(folder / "long.jsonl", long_rows(100)))}]}
    return write_recipe(
        folder,
        model={"architecture": ARCHITECTURE | DEEP},
        data=rows
        | {"max_length": 2048, "packing": False, "eval": [{"path": str(folder / "long.jsonl"), "max_rows": 20}]}
        | {"contract": {"leak": 1.0, "duplicates": 1.0}},
        training=training | {"micro_batch_rows": None, "tokens_per_micro_batch": 4096},
    )


@needs_peaks
def test_a_run_takes_the_memory_that_its_trial_took_and_is_not_changed_by_it(tmp_path):
    recipe = recipe_of(tmp_path, "packed, all weights")
    short = ("--training.micro_batch_rows", "4", "--training.max_steps", "2", "--training.save_every_steps", "1")
    before = peak_of_run(recipe, *short)  # this prepares the data too, in processes of its own
    folder = tmp_path / "outputs"
    (folder / "run").rename(folder / "before")
    there = files_below(folder)
    costs = measured(recipe, *short)
    assert costs.outcome == "measured", costs.lines()
    assert files_below(folder) == there
    assert costs.fits
    assert_predicted(before, costs)
    done = run_train("--config", recipe, *short)
    assert done.code == 0, done.stderr
    assert_same_run(folder / "run", folder / "before")


@pytest.mark.slow
@needs_peaks
@pytest.mark.parametrize("shape", ["packed, all weights", "LoRA", "long documents, padded"])
def test_a_peak_is_within_five_percent_of_its_prediction(tmp_path, shape):
    recipe = recipe_of(tmp_path, shape)
    prepared = run_train("--config", recipe, "--output.name", "first", "--training.max_steps", "1")
    assert prepared.code == 0, prepared.stderr
    assert_predicted(peak_of_run(recipe), measured(recipe))


def test_a_trial_that_is_killed_leaves_nothing_and_the_plan_goes_on(tmp_path):
    # No micro-batch is smaller, and nothing is computed again that is not: nothing else is to be tried.
    recipe = write_recipe(tmp_path, training={"micro_batch_rows": 1, "gradient_checkpointing": "full"})
    with on_child(lambda child: child.send_signal(signal.SIGKILL)):
        costs = measured(recipe)
    assert costs.outcome == "out of memory"
    assert costs.fits is False
    assert "killed (SIGKILL)" in costs.reason
    assert not (tmp_path / "outputs").exists()
    assert costs.lines()[-1] == (
        "  nothing that was tried fits; take a smaller model or data.max_length, or a larger machine"
    )


def test_a_trial_that_does_nothing_any_more_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_process, "STALL_S", 1.5)
    with on_child(lambda child: child.send_signal(signal.SIGSTOP)):
        costs = measured(write_recipe(tmp_path))
    assert (costs.outcome, costs.reason) == ("failed", "it did nothing for 2 s")
    assert costs.fits is None
    assert not (tmp_path / "outputs").exists()


def test_a_trial_neither_pushes_nor_tracks_and_writes_to_its_own_folder(tmp_path):
    given = ["--hub.repo_id", "me/model", "--tracking.report_to", "tensorboard", "--tracking.project", "mine"]
    run = read_command_line(["--config", str(write_recipe(tmp_path)), *given]).config
    config = trial_config(run, tmp_path / "trial")
    assert config.hub.repo_id is None
    assert config.tracking.report_to == ()
    assert Path(config.output.folder) == tmp_path / "trial"
    assert Path(config.data.cache_folder) == tmp_path / "outputs" / ".data"  # the run's, where its rows are prepared
    assert (config.model, config.adapter, config.optim) == (run.model, run.adapter, run.optim)


def test_a_folder_that_holds_something_is_not_taken_for_a_trial(tmp_path):
    recipe = write_recipe(tmp_path)
    there = files_below(tmp_path)
    done = run_train("--config", recipe, "--trial", tmp_path)
    assert done.code == 2
    assert f"error: --trial {tmp_path} holds eval.jsonl" in done.stderr
    assert files_below(tmp_path) == there


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="the system sets no limits of other processes")
def test_a_trial_that_gets_no_more_memory_says_so(tmp_path):
    recipe = write_recipe(tmp_path, training={"micro_batch_rows": 1, "gradient_checkpointing": "full"})
    with on_child(lambda child: limit(child, tmp_path / "outputs")):
        costs = measured(recipe, "--model.architecture.hidden_size", "1024")
    assert costs.outcome == "out of memory", costs.reason
    assert [phase["name"] for phase in costs.phases] == ["start"]
    assert re.search("allocate memory|MemoryError", costs.reason)


def limit(child, outputs):
    """Let a trial, once it has built the run, take 16 MiB more: enough for a thread and its stack, and no gradients."""
    while not list(outputs.glob(".trial-*/report-0.json")):
        time.sleep(0.01)
    status = Path(f"/proc/{child.pid}/status").read_text().split("VmData:")[1]
    most = 1024 * int(status.split()[0]) + 2**24
    resource.prlimit(child.pid, resource.RLIMIT_DATA, (most, most))


@contextlib.contextmanager
def on_child(act):
    """Do something with the next process that this one starts for a trial."""
    here = psutil.Process()

    def watch():
        while True:
            for child in here.children():
                with contextlib.suppress(psutil.Error):
                    if "--trial" in child.cmdline():
                        return act(child)
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join()


@pytest.mark.slow
def test_a_trial_ends_with_the_process_that_started_it(tmp_path):
    recipe = write_recipe(tmp_path)
    code = (
        "import sys; from pathlib import Path; from config.loader import read_command_line\n"
        "from src.trial_process import measure_costs\n"
        "measure_costs(read_command_line(['--config', sys.argv[1]]).config, Path('train.py'))"
    )
    plan = subprocess.Popen([sys.executable, "-c", code, str(recipe)], cwd=ROOT)
    report = None
    while report is None:
        assert plan.poll() is None
        report = next((tmp_path / "outputs").glob(".trial-*/report-0.json"), None)
        time.sleep(0.01)
    [child] = psutil.Process(plan.pid).children()
    plan.kill()
    plan.wait()
    child.wait(timeout=60)
    assert not report.parent.exists()


LIMITED = """
import json, resource, sys
from pathlib import Path
from config.loader import read_command_line
from src import trial_process
from src.trial import trial_config
from src.trial_process import measure_costs

config = read_command_line(["--config", sys.argv[1]]).config
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)
costs = measure_costs(config, Path("train.py"))
print(json.dumps(costs.to_dict() | {"lines": costs.lines()}))
"""


@pytest.mark.slow
def test_a_smaller_micro_batch_is_proposed_where_the_recipe_has_no_memory(tmp_path):
    recipe = recipe_of(tmp_path, "packed, all weights")
    needed = writable_bytes_of(recipe)
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(recipe), str(needed)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    costs = json.loads(found.stdout.splitlines()[-1])
    assert costs["outcome"] == "out of memory"
    assert [one["fits"] for one in costs["tried"]][-1]
    rows = [int(one["options"].split()[1]) for one in costs["tried"]]
    assert rows == [4, 2, 1][: len(rows)]
    assert costs["options"] == f"--training.micro_batch_rows {rows[-1]} --training.accumulation_steps {8 // rows[-1]}"
    assert costs["lines"][-1] == f"  add: {costs['options']}"


def writable_bytes_of(recipe):
    """What a trial may write to at the end of its building, and 60 % of what its steps take above that."""
    seen = {}

    def watch(child):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            while True:
                status = Path(f"/proc/{child.pid}/status").read_text()
                now = 1024 * int(status.split("VmData:")[1].split()[0])
                building = not list((recipe.parent / "outputs").glob(".trial-*/report-0.json"))
                seen["start" if building else "most"] = max(now, seen.get("start" if building else "most", 0))
                time.sleep(0.01)

    with on_child(watch):
        measured(recipe)
    return seen["start"] + int(0.6 * (seen["most"] - seen["start"]))


MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access(MEMORY_GROUPS / "cgroup.procs", os.W_OK) or not (MEMORY_GROUPS / "memory.limit_in_bytes").exists(),
    reason="this user makes no control groups of version 1",
)
def test_a_trial_that_the_system_kills_for_its_memory_does_not_end_the_plan(tmp_path):
    recipe = write_recipe(tmp_path, training={"micro_batch_rows": 1, "gradient_checkpointing": "full"})
    group = MEMORY_GROUPS / f"trial-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(200 * 2**20))  # less than the libraries take

        def move(child):
            (group / "cgroup.procs").write_text(str(child.pid))

        with on_child(move):
            costs = measured(recipe)
    finally:
        group.rmdir()
    assert costs.outcome == "out of memory"
    assert "killed (SIGKILL)" in costs.reason
    assert not list((tmp_path / "outputs").glob(".trial-*"))

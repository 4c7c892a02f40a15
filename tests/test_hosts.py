"""One training on two machines, and what is left of it when one dies or the cable is taken out.

pytest -m slow tests/test_hosts.py      as root, for the network namespaces that stand for the machines
"""

import re
import time

import pytest
import torch

from tests.hosts import launcher, obstacle, two_hosts
from tests.tiny_run import assert_same_run, metrics_of, run_train, weights_of, write_recipe
from utils.checkpointing import checkpoints, step_of

OBSTACLE = obstacle()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))]

TIMEOUT_S = 10
"""Seconds that processes wait for each other here, in place of ten minutes."""

LEAVING_S = 60
"""Seconds within which all is over after that: the end of interpreters and launchers on a machine with other work."""

LONG = {"max_steps": 300, "save_every_steps": 20, "log_every_steps": 1, "keep_checkpoints": 99}


@pytest.fixture
def hosts():
    with two_hosts() as pair:
        yield pair


def impatient(folder, **sections):
    """A recipe of a run whose processes give each other up after TIMEOUT_S."""
    plain = write_recipe(folder, **sections)
    recipe = folder / "recipe.py"
    recipe.write_text(
        "import datetime, os, pathlib, torch\n"
        "from config.loader import load_recipe\n"
        "if 'RANK' in os.environ:\n"
        f"    torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds={TIMEOUT_S}))\n"
        f"config = load_recipe(pathlib.Path({str(plain)!r}))\n"
    )
    return recipe


def start(hosts, folder, *arguments, kind="torchrun", **options):
    """Both launchers; their output goes to log-0 and log-1."""
    return [
        hosts.start(number, launcher(kind, hosts, number, *arguments), folder / f"log-{number}", **options)
        for number in (0, 1)
    ]


def said(folder, number):
    return (folder / f"log-{number}").read_text(encoding="utf-8", errors="replace")


def finish(hosts, folder, *arguments, **options):
    codes = [process.wait(300) for process in start(hosts, folder, *arguments, **options)]
    assert codes == [0, 0], said(folder, 0)[-3000:] + said(folder, 1)[-3000:]


def wait_for_checkpoint(run, folder, processes):
    until = time.monotonic() + 240
    while not checkpoints(run):
        ended = [process.poll() for process in processes]
        assert ended == [None, None], said(folder, 0)[-3000:]
        assert time.monotonic() < until, said(folder, 0)[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["torchrun", "accelerate"])
def test_two_machines_end_with_the_weights_of_one_process(tmp_path, hosts, kind):
    recipe = write_recipe(tmp_path, training={"max_steps": 6, "save_every_steps": 3}, evaluation={"samples": 0})
    finish(hosts, tmp_path, "--config", recipe, "--output.name", "two", kind=kind)
    assert said(tmp_path, 0).count("2 process(es) on cpu") == 1
    assert "step" not in said(tmp_path, 1), "only the first process tells how the run goes"
    done = run_train("--config", recipe, "--output.name", "one", "--training.accumulation_steps", "2")
    assert done.code == 0, done.stderr
    one, two = tmp_path / "outputs" / "one", tmp_path / "outputs" / "two"
    weights, other = weights_of(one / "model"), weights_of(two / "model")
    assert weights.keys() == other.keys()
    for name in weights:  # float32 sums in another order: a few roundings of 6e-8 in six steps
        torch.testing.assert_close(other[name], weights[name], rtol=1e-5, atol=1e-6)
    losses, others = ([line["loss"] for line in metrics_of(run) if "loss" in line] for run in (one, two))
    assert len(losses) == 6
    assert others == pytest.approx(losses, rel=1e-5)


FAILURES = {
    "the second is killed": (lambda hosts: hosts.kill(1), (0,), "has ended, or its machine has"),
    "the first is killed": (lambda hosts: hosts.kill(0), (1,), "has ended, or its machine has"),
    "the cable is cut": (lambda hosts: hosts.cut(), (0, 1), "does not answer: it hangs, or the link to its machine is"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two machines that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with two_hosts() as pair:
        finish(pair, folder, "--config", impatient(folder, training=LONG))
    return folder / "outputs" / "run"


@pytest.mark.parametrize("failure", FAILURES)
def test_the_other_machine_says_what_happened_in_time_and_the_run_goes_on(tmp_path, hosts, whole, failure):
    strike, left, happened = FAILURES[failure]
    recipe, run = impatient(tmp_path, training=LONG), tmp_path / "outputs" / "run"
    processes = start(hosts, tmp_path, "--config", recipe)
    wait_for_checkpoint(run, tmp_path, processes)
    strike(hosts)
    began = time.monotonic()
    for number in left:
        assert processes[number].wait(TIMEOUT_S + LEAVING_S) != 0
    assert time.monotonic() - began < TIMEOUT_S + LEAVING_S
    last = checkpoints(run)[-1]
    assert step_of(last) < LONG["max_steps"], "it was too late to show anything"
    for number in left:
        error = next(line for line in said(tmp_path, number).splitlines() if line.startswith("error: "))
        assert happened in error
        step = int(re.search(r"\(in step (\d+); .*gloo", error)[1])
        assert step_of(last) < step <= step_of(last) + LONG["save_every_steps"] + 1
        assert f"The last complete checkpoint is {last}; start all processes again with --resume" in error
        assert 'train.py", line' not in said(tmp_path, number)
    for number in (0, 1):
        hosts.kill(number)
        processes[number].wait(60)
    hosts.mend()
    finish(hosts, tmp_path, "--config", recipe, "--resume")
    assert_same_run(run, whole)


def test_machines_whose_names_lead_nowhere_are_told_which_setting_says_where(tmp_path, hosts):
    # As on many a Debian, where the machine's own name stands for 127.0.1.1.
    processes = start(hosts, tmp_path, "--config", write_recipe(tmp_path), interface=None)
    until = time.monotonic() + 240
    while all(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.5)
    ended = next(number for number in (0, 1) if processes[number].poll() is not None)
    assert processes[ended].returncode != 0
    error = next(line for line in said(tmp_path, ended).splitlines() if line.startswith("error: "))
    assert "cannot connect to each other" in error
    assert "GLOO_SOCKET_IFNAME" in error

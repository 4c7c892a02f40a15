"""A run that is killed anywhere, again and again, ends as one that was never stopped, bit for bit.

pytest -m slow tests/test_kills.py      36 kills
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.fork_server import Child, ForkServer
from tests.tiny_run import assert_same_run, two_epochs

STEPS = 9
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATE = (
    "model.safetensors",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "numbers.json",
)
"""Files of the last checkpoint that two equal runs write byte for byte."""


class Killed:
    """A run in which every process but the last is killed, and the run beside it that is not."""

    def __init__(self, server: ForkServer, folder: Path, kind: str, seed: int) -> None:
        self.server = server
        self.folder = folder
        self.random = random.Random(seed)
        self.kills: list[str] = []
        training = {"epochs": 3.0, "log_every_steps": 2, "save_every_steps": 3, "keep_checkpoints": 2}
        sections = {}
        if kind == "stream":
            training |= {"max_steps": STEPS, "accumulation_steps": 1}
            sections = {"data": {"streaming": True, "stream_window_rows": 8}}
        self.recipe = two_epochs(folder, "lora" if kind == "lora" else "full", training=training, **sections)
        die = {"at": 0, "by": 0, "below": str(self.run("whole"))}
        whole = self.start("whole", die=die)
        self.wait_for_a_step()
        started = time.monotonic()
        assert whole.wait() == 0, self.said()
        self.seconds = time.monotonic() - started  # from the first line of a step to the end
        self.events = int(re.findall(r"^(\d+) events", self.said(), re.MULTILINE)[-1])

    def run(self, name: str) -> Path:
        return self.folder / "outputs" / name

    def said(self) -> str:
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def start(self, name: str, *arguments: str, **more) -> Child:
        (self.folder / "log").unlink(missing_ok=True)
        arguments = ("--config", self.recipe, "--output.name", name, *arguments)
        return self.server.start(arguments, log=self.folder / "log", **more)

    def wait_for_a_step(self) -> None:
        """Wait until the process that was started last has said what came of a step, or of the whole run."""
        deadline = time.monotonic() + 120
        while not re.search(r"/9  (eval )?loss |result is in|error: ", self.said()) and time.monotonic() < deadline:
            time.sleep(0.001)

    def resume(self, name: str, **more) -> Child:
        """Go on with a run as its user would: anew, where there is no checkpoint yet."""
        run = self.run(name)
        goes_on = any(run.glob("checkpoint-*"))
        if not goes_on:
            shutil.rmtree(run, ignore_errors=True)
        return self.start(name, *(["--resume"] if goes_on else []), **more)

    def die_once(self, name: str) -> bool:
        """Start a process of a run, and kill it at a random file operation or at a random time.

        Returns:
            Whether it was killed; else it had ended, or was about to.
        """
        number = self.random.choice(SIGNALS)
        run = self.run(name)
        shutil.rmtree(run / ".checkpoint", ignore_errors=True)  # so that one is of this process
        kind = self.random.random()
        if kind < 0.3:  # among the first operations of a save that Python does, of which each has more than 20
            number = signal.SIGKILL
            die = {"at": self.random.randint(1, 20), "by": number, "below": str(run / ".checkpoint")}
            code = self.resume(name, die=die).wait()
        elif kind < 0.7:
            die = {"at": self.random.randint(1, self.events // 3), "by": number, "below": str(run)}
            code = self.resume(name, die=die).wait()
        else:
            child = self.resume(name)
            self.wait_for_a_step()
            time.sleep(self.random.uniform(0, self.seconds / 4))
            os.kill(child.pid, number)
            code = child.wait()
        if code == 0:
            return False
        assert code in {-number, 128 + number}, self.said()
        saved = re.search(rf"stopped by {number.name} after step (\d+), which is saved", self.said())
        if saved:
            assert code == 128 + number
            assert (run / f"checkpoint-{saved[1]}").is_dir()
            assert not (run / ".checkpoint").exists()
        self.kills.append(f"{number.name} {self.where(run, saved and saved[1])}")
        return True

    def where(self, run: Path, saved: str | None) -> str:
        """What a process was at when it was killed."""
        if saved:
            return f"after step {saved}"
        if (run / ".checkpoint").exists():
            return "saving"
        return "training" if "/9  loss " in self.said() else "before the first line, or after the last step"

    def live(self, name: str, kills: int) -> None:
        """Kill a run so often, unless it ends before; let it end, and compare it with the one never stopped."""
        for _ in range(kills):
            if not self.die_once(name):
                break
        assert self.resume(name).wait() == 0, self.said()
        run, whole = self.run(name), self.run("whole")
        assert_same_run(run, whole)
        last, last_of_whole = run / f"checkpoint-{STEPS}", whole / f"checkpoint-{STEPS}"
        names = [name for name in STATE if (last_of_whole / name).exists()]
        assert len(names) == 5
        for name in names:
            assert (last / name).read_bytes() == (last_of_whole / name).read_bytes(), name
        assert sorted(path.name for path in run.glob(".*")) == []


def test_a_run_killed_four_times_ends_as_one_never_stopped(fork_server, tmp_path):
    killed = Killed(fork_server, tmp_path, "full", seed=int(os.environ.get("KILL_SEED", "4")))
    killed.live("run", 4)
    assert len(killed.kills) >= 2, killed.kills


@pytest.mark.slow
def test_thirty_kills_change_nothing(fork_server, tmp_path):
    kills = []
    for kind in ("full", "lora", "stream"):
        killed = Killed(fork_server, tmp_path / kind, kind, seed=int(os.environ.get("KILL_SEED", "0")))
        for life in range(10):
            if len(killed.kills) < 12:
                killed.live(f"run{life}", 4)
        print(kind, killed.kills)
        kills += killed.kills
    assert len(kills) >= 30, kills
    assert sum("saving" in kill for kill in kills) >= 3, kills
    assert {kill.split()[0] for kill in kills} == {"SIGKILL", "SIGTERM", "SIGINT"}

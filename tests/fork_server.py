"""Real processes of `train.py` that start at once: a server imports everything, and forks one for each run.

with ForkServer() as server:              # in tests: the fixture `fork_server`
    child = server.start(["--config", "recipe.yaml"], log=Path("log"))
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL

The server has no thread of its own, so that a fork is like a fresh start of the program.
"""

import atexit
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Child:
    """A process of `train.py`."""

    pid: int
    _server: "ForkServer"

    def wait(self) -> int:
        """Its exit code; that of a process which a signal has ended is the signal's number below 0."""
        answer = self._server.ask({"wait": self.pid})
        return os.waitstatus_to_exitcode(answer)


class ForkServer:
    """Starts processes of `train.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )

    def __enter__(self) -> "ForkServer":
        assert self.ask({"threads": True}) == 0
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def start(
        self, arguments, *, log: Path, environment: dict[str, str] | None = None, die: dict | None = None
    ) -> Child:
        """Run `train.py` with arguments.

        Args:
            log: file that gets what it prints.
            die: `{"at": n, "by": signal, "below": folder}`: it sends itself the signal at the n-th time that it opens,
                renames or removes a file, or makes or removes a folder, below that folder. It prints in the end how
                often it did.
        """
        asked = {"argv": list(map(str, arguments)), "log": str(log), "environment": environment or {}, "die": die}
        return Child(self.ask(asked), self)

    def start_all(self, arguments, *, processes: int, log: Path) -> list[Child]:
        """Run `train.py` as a launcher starts it, in so many processes; each writes to `log` with its rank added."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "ACCELERATE_MIXED_PRECISION": "no",
        }
        return [
            self.start(
                arguments,
                log=log.with_name(f"{log.name}{rank}"),
                environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]

    def ask(self, asked: dict) -> int:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
"""Audit events of Python that tell of a file: https://docs.python.org/3/library/audit_events.html. Python's functions
raise them before they act."""


def _die(at: int, by: int, below: str) -> None:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(below):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), by)

    sys.addaudithook(hook)
    atexit.register(lambda: print(f"{seen} events", file=sys.stderr))


def _run(asked: dict) -> None:
    """What the child does; it never returns."""
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(asked["environment"])
    if asked["die"]:
        _die(**asked["die"])
    sys.argv = ["train.py", *asked["argv"]]
    runpy.run_path("train.py", run_name="__main__")


MODULES = ("train", "src.run", "src.stopping", "src.trainer", "src.streaming", "src.adapters", "src.new_tokenizer")


def _serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        if "threads" in asked:
            answer = len(_threads())
        elif "wait" in asked:
            answer = os.waitpid(asked["wait"], 0)[1]
        elif (answer := os.fork()) == 0:
            code = 1
            try:
                _run(asked)
            except SystemExit as end:
                code = end.code
            except KeyboardInterrupt:  # before `main` or after it
                code = 130
            except BaseException:  # noqa: BLE001  a child must not go on as a server
                traceback.print_exc()
            finally:
                _leave(code)
        print(answer, flush=True)


def _threads() -> list[str]:
    """The threads beside the main one and that of pyarrow's allocator, jemalloc, which minds a fork."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names[1:] if name != "jemalloc_bg_thd"]


def _leave(code: int) -> None:
    """End as the interpreter does, after the threads that it would wait for, and with what was registered."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()

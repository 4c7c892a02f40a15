"""Two machines: network namespaces with a cable between them, in which launchers are started as on two hosts.

with two_hosts() as hosts:
    processes = [hosts.start(number, command, log) for number, command, log in ...]
    hosts.cut()
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.tiny_run import ROOT

INTERFACE = "cable"
PORT = "29511"


def obstacle() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if shutil.which("ip") is None:
        return "needs the command ip (Debian: apt-get install iproute2)"
    name = f"probe-{os.getpid()}"
    made = _ip("netns", "add", name, check=False)
    if made.returncode:
        return f"needs the privilege to make network namespaces (ip netns add: {made.stderr.strip()})"
    _ip("netns", "del", name)
    return None


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


class Hosts:
    """Two namespaces, 0 and 1, each with one end of a cable."""

    def __init__(self) -> None:
        self.names = [f"host{number}-{os.getpid()}" for number in (0, 1)]

    def address(self, number: int) -> str:
        return f"10.231.7.{number + 1}"

    def start(
        self, number: int, command: list[str], log: Path, *, interface: str | None = INTERFACE
    ) -> subprocess.Popen:
        """Start a launcher on a host, in the repository's root.

        Args:
            log: gets its output.
            interface: which gloo is told to use. None: that of the machine's name.
        """
        told = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
        with open(log, "w", encoding="utf-8") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *command],
                cwd=ROOT, stdout=output, stderr=output, env=os.environ | told,
            )  # fmt: skip

    def kill(self, number: int) -> None:
        """End every process of a host, without a word."""
        for pid in _ip("netns", "pids", self.names[number], check=False).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """Take the cable out: nothing arrives any more, and nobody is told."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        _ip("-n", self.names[1], "link", "set", INTERFACE, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Both with their cable; in the end their processes are killed and they go."""
    hosts = Hosts()
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        ends = [f"end{number}-{os.getpid()}" for number in (0, 1)]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(hosts.names, ends, strict=True)):
            _ip("link", "set", end, "netns", name, "name", INTERFACE)
            _ip("-n", name, "addr", "add", f"{hosts.address(number)}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
        yield hosts
    finally:
        for number, name in enumerate(hosts.names):
            hosts.kill(number)
            _ip("netns", "del", name, check=False)


def launcher(kind: str, hosts: Hosts, number: int, *arguments: str | Path) -> list[str]:
    """What a user types on a host to start its share of a run of two processes.

    Args:
        kind: `torchrun` or `accelerate`.
    """
    words = [str(argument) for argument in arguments]
    if kind == "torchrun":
        place = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number)]
        meeting = ["--master_addr", hosts.address(0), "--master_port", PORT]
        return [sys.executable, "-m", "torch.distributed.run", *place, *meeting, "train.py", *words]
    place = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(number)]
    meeting = ["--main_process_ip", hosts.address(0), "--main_process_port", PORT, "--mixed_precision", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *place, *meeting, "train.py", *words]

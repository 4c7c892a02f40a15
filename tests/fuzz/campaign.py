"""Many inputs through one reader, in a process that may crash, hang or fill its memory without harm.

    outcome = run(reader, count=1000, seed=7, keep=Path("finds"))
    outcome.inputs, outcome.finds

A parent that has imported everything forks a process, which reads input after input until the count is reached or it
dies; what it was reading then lies in its folder, and the next process goes on behind it.
"""

import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.reader import BATCH, MEMORY_MIB, SECONDS, Files, Reader, batch, fault, files_of, write_files

ROOT = Path(__file__).resolve().parents[2]
SPACE_MIB = 3072
"""Address space beyond what the imports took: less than one absurd allocation, more than any sound one."""
FAULTY = 99
"""Exit code of a process in which this program itself failed."""
DEATHS = 20
"""Of a reader's processes, after which it is left: what kills them is to be mended first."""
WALL_S = 120
"""After which a process that computes nothing counts as hung."""


@dataclass
class Find:
    """What was found first at one place."""

    what: str
    where: str
    said: str
    input: Files
    count: int = 1


@dataclass
class Outcome:
    """What came of a reader's inputs; `refused` of them met with a clear error."""

    reader: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    largest_mib: float = 0.0
    finds: dict[str, Find] = field(default_factory=dict)
    deaths: int = 0
    """Processes that ended in mid-work."""

    def add(self, what: str, where: str, said: str, files: Files) -> None:
        """Count a find; the input is kept of the first at a place."""
        known = self.finds.setdefault(f"{what} {where}", Find(what, where, said, files, 0))
        known.count += 1


def run(reader: Reader, count: int, seed: int) -> Outcome:
    """Put `count` inputs through a reader."""
    outcome, started = Outcome(reader.name), time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        folder = Path(place)
        seeds = _seeds(reader, folder / "seeds")
        while outcome.inputs < count and outcome.deaths < DEATHS:
            _one_process(reader, seeds, outcome, count, seed, folder)
    outcome.seconds = time.monotonic() - started
    return outcome


def _seeds(reader: Reader, folder: Path) -> list[Files]:
    """The valid inputs, made in a process of their own: what makes them starts threads, and forks must not."""
    folder.mkdir()
    child = os.fork()
    if not child:
        try:
            reader.seeds(folder)
            for made in sorted(folder.iterdir()):
                reader.read(_copied(made, folder.parent / "sound"))
        except BaseException:  # noqa: BLE001 - told, then the process ends
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{reader.name}: its valid inputs are not read")
    return [files_of(made) for made in sorted(folder.iterdir())]


def _copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def _one_process(reader: Reader, seeds: list[Files], outcome: Outcome, count: int, seed: int, folder: Path) -> None:
    """Fork a process that reads on behind `outcome.inputs`, and take down what it says until it ends."""
    reading, writing = os.pipe()
    original = os.dup(2)
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            _child(reader, seeds, outcome.inputs, count, seed, folder / "input", writing)
        except BaseException:  # noqa: BLE001 - a fault of this program, not of a reader: told, then the process ends
            os.write(original, traceback.format_exc().encode())
        os._exit(FAULTY)
    os.close(writing)
    first = outcome.inputs
    with open(reading, encoding="utf-8", errors="backslashreplace") as lines:
        for line in lines:
            kind, *values = line.rstrip("\n").split("\t")
            if kind == "find":
                outcome.add(*values[:3], files_of(folder / "kept" / values[3]))
                shutil.rmtree(folder / "kept" / values[3])
            else:
                outcome.inputs = first + int(values[0])
                outcome.refused += int(values[1])
                outcome.slowest_s = max(outcome.slowest_s, float(values[2]))
                outcome.largest_mib = max(outcome.largest_mib, float(values[3]))
    _, status = os.waitpid(child, 0)
    os.close(original)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == FAULTY:
        raise RuntimeError(f"the inputs of {reader.name} could not be made; the lines above say why")
    if status:
        died = (
            signal.Signals(os.WTERMSIG(status)).name
            if os.WIFSIGNALED(status)
            else f"exit {os.waitstatus_to_exitcode(status)}"
        )
        what = {"SIGPROF": f"over {SECONDS} s", "SIGALRM": "waits without end"}.get(died, died)
        outcome.add(what, "its process ended", "", files_of(folder / "input"))
        outcome.inputs += 1
        outcome.deaths += 1


def _child(reader: Reader, seeds: list[Files], first: int, count: int, seed: int, folder: Path, writing: int) -> None:
    """Read inputs `first` to `count`, and leave the process."""
    os.chdir(ROOT)
    _limit_memory()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if "FUZZ_VERBOSE" not in os.environ:
        os.dup2(null, 2)
    pipe = os.fdopen(writing, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    kept = folder.parent / "kept"
    refused, at, number = 0, first, first // BATCH
    while at < count:
        for place, files in enumerate(batch(reader, seeds, f"{seed} {reader.name} {number}"), start=number * BATCH):
            if place < at or place >= count:
                continue
            at = place + 1
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_files(files, folder)
            what, where, said, seconds, mib, was_refused = _read(reader, folder)
            refused += was_refused
            if what:
                shutil.rmtree(kept / str(at), ignore_errors=True)
                write_files(files, kept / str(at))
                print("find", what, where, said, at, sep="\t", file=pipe)
            print("read", at - first, refused, f"{seconds:.3f}", f"{mib:.1f}", sep="\t", file=pipe)
            refused = 0
        number += 1
        at = max(at, min(count, number * BATCH))
    print("read", at - first, refused, 0.0, 0.0, sep="\t", file=pipe)
    os._exit(0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPACE_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))


def _read(reader: Reader, folder: Path) -> tuple[str | None, str, str, float, float, bool]:
    """What is wrong with how an input was read, where, what was said, seconds, MiB, and whether it was refused."""
    what, where, said, refused = None, "", "", False
    before = _resident_mib(peak=False)
    Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WALL_S)
    try:
        reader.read(folder)
    except BaseException as error:  # noqa: BLE001 - what is raised is what is asked for
        what, refused = fault(error), True
        if what:
            where, said = _place(error), " ".join(str(error).split())[:160]
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    seconds, mib = time.process_time() - started, _resident_mib(peak=True) - before
    if not what and mib > MEMORY_MIB:
        what, where = f"over {MEMORY_MIB} MiB", reader.name
    return what, where, said, seconds, mib, refused


def _resident_mib(*, peak: bool) -> float:
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _place(error: BaseException) -> str:
    """The last line of the project that an error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    frames = [frame for frame in frames if ".venv" not in frame.filename and "/tests/fuzz/" not in frame.filename]
    if not frames:
        return "outside of the project"
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno} {frames[-1].name}"

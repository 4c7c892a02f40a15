"""What a run costs, as its trial measured it: memory of each phase, seconds of a step, and the run's whole time.

costs = Costs.of_parts([Part("measured", "", report, machine="one", available=24 * 2**30)], config)
costs.fits                              # True
for line in costs.lines():
    ...
"""

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from config.schema import RunConfig
from src.callbacks import clock
from src.proposals import Outcome, Tried
from src.trial import ANSWERED_AT_ONCE, ORDINARY, WARM_UP
from src.trial_parts import DEVICES, Part, ending, joined_report, peaks_by_process, tightest_machine

MIB = 2**20

WIDTH = 100
"""Columns of a terminal."""

PLACES = {"resident": "host", "cuda": "GPU"}
"""Where memory is, in words."""


@dataclass(frozen=True)
class Projection:
    """The time of a whole run, in seconds, and how it comes about."""

    steps: int
    step_s: float
    """Mean of the run's steps, by the tokens that they have."""

    start_s: float
    evaluations: int
    evaluation_s: float
    """Of one, without answers."""

    answers_s: float
    """Of all answers in the run."""

    checkpoints: int
    checkpoint_s: float
    result_s: float
    low_s: float
    high_s: float
    """The run's time, if every step took as long for its tokens as the fastest or the slowest that was timed."""

    @property
    def run_s(self) -> float:
        """The run's time."""
        return self.steps * self.step_s + self.other_s

    @property
    def other_s(self) -> float:
        """All but the steps."""
        return (
            self.start_s
            + self.evaluations * self.evaluation_s
            + self.answers_s
            + self.checkpoints * self.checkpoint_s
            + self.result_s
        )


@dataclass(frozen=True)
class Costs:
    """What a trial found."""

    outcome: Outcome
    reason: str
    """Why it is not measured; empty if it is."""

    phases: tuple[dict[str, Any], ...] = ()
    """Each with `name`, `seconds`, `resident_bytes`, on a GPU `cuda_bytes`, and what it wrote in `bytes`; those that
    ended before a trial did."""

    worst: dict[str, dict[str, int]] | None = None
    """What the worst micro-batches of the run ask for, by kind."""

    mapped_bytes: int = 0
    """Part of the resident memory: pages of the prepared data, which the system lets go of when it needs them."""

    available: dict[str, int] | None = None
    """Bytes that there are, by device: `resident`, and on a GPU `cuda`; on the machine and GPU that have least left."""

    needed: int = 0
    """Bytes of host memory that the processes of one machine need together, the mapped pages left out."""

    by_process: tuple[dict[str, int], ...] = ()
    """Most bytes of each process in any phase, by device."""

    projection: Projection | None = None
    tried: tuple[Tried, ...] = ()

    @classmethod
    def of_parts(cls, parts: Sequence[Part], config: RunConfig) -> "Costs":
        """
        Args:
            parts: what each process found, by rank.
        """
        (outcome, reason), report, room = ending(parts), joined_report(parts), tightest_machine(parts)
        available = {} if room.available is None else {"resident": room.available}
        if "cuda_available_bytes" in report:
            available["cuda"] = report["cuda_available_bytes"]
        return cls(
            outcome,
            reason,
            tuple(report["phases"]),
            report.get("worst"),
            report.get("mapped_bytes", 0),
            available,
            room.needed,
            peaks_by_process(parts),
            project(report, config, len(parts)) if outcome == "measured" else None,
        )

    @property
    def peaks(self) -> dict[str, int]:
        """Most bytes of one process in any phase, by device."""
        devices = [device for device in DEVICES if any(device in peaks for peaks in self.by_process)]
        return {device: max(peaks.get(device, 0) for peaks in self.by_process) for device in devices}

    @property
    def fits(self) -> bool | None:
        """Whether the run has the memory that it needs; None where that is not known."""
        if self.outcome != "measured":
            return False if self.outcome == "out of memory" else None
        return (self.available or {}).get("resident", self.needed) >= self.needed

    @property
    def options(self) -> str | None:
        """What to add to the command line so that the run fits; None if nothing is needed, or nothing helped."""
        return next((one.options for one in self.tried if one.fits), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON, in MiB and seconds."""
        projection = self.projection
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "fits": self.fits,
            "peak_mib": _mib_of(self.peaks),
            "available_mib": _mib_of(self.available or {}),
            "mapped_data_mib": round(self.mapped_bytes / MIB),
            "peak_mib_by_process": [_mib_of(peaks) for peaks in self.by_process],
            "phases": [_phase(phase) for phase in self.phases],
            "worst_micro_batches": self.worst,
            "projection": None
            if projection is None
            else {name: round(value, 4) for name, value in vars(projection).items()}
            | {"run_s": round(projection.run_s, 1)},
            "tried": [vars(one) for one in self.tried],
            "options": self.options,
        }

    def lines(self) -> list[str]:
        """The same for people, of at most 100 columns but for what others have said."""
        where = "a process of its own" if len(self.by_process) < 2 else f"{len(self.by_process)} processes of their own"
        told = [f"costs, measured by a trial in {where}", *self._table(), *self._memory()]
        if self.projection:
            told += _times(self.projection)
        return told + self._ways_out()

    def _table(self) -> list[str]:
        rows = [("phase", "seconds", *(f"MiB {PLACES[name]}" for name in self.peaks))]
        ordinary = [phase for phase in self.phases if phase["name"] == ORDINARY]
        for phase in self.phases:
            name, seconds = phase["name"], phase["seconds"]
            if name == WARM_UP or (name == ORDINARY and phase is not ordinary[0]):
                continue
            same = ordinary if name == ORDINARY else [phase]
            if name == ORDINARY:
                seconds = statistics.median(one["seconds"] for one in ordinary)
            peaks = [f"{max(one[f'{device}_bytes'] for one in same) / MIB:,.0f}" for device in self.peaks]
            rows.append((self._label(phase, len(same)), f"{seconds:.3g}", *peaks))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]

    def _label(self, phase: dict[str, Any], count: int) -> str:
        name = phase["name"]
        if self.worst and name in self.worst:
            one = self.worst[name]
            return f"step, {name}: {one['tokens']:,}, {one['supervised']:,} supervised, longest {one['longest']:,}"
        if name == ORDINARY:
            return f"step, median of the run's first {count}"
        if "bytes" in phase:
            return f"{name} of {phase['bytes'] / MIB:,.1f} MiB"
        return name

    def _memory(self) -> list[str]:
        parts = []
        for name, peak in self.peaks.items():
            there = (self.available or {}).get(name)
            parts.append(
                f"{peak / MIB:,.0f} MiB of {PLACES[name]} at most"
                + (f", {there / MIB:,.0f} MiB are available" if there is not None else "")
            )
        told = ["  memory: " + ("; ".join(parts) or "nothing measured")]
        if self.mapped_bytes > 64 * MIB:
            size = f"{self.mapped_bytes / MIB:,.0f} MiB"
            told += _wrapped(
                f"{size} of it are pages of the prepared data, which the system drops when it needs them", " " * 10
            )
        if len(self.by_process) > 1:
            for name in self.peaks:
                each = ", ".join(f"{peaks.get(name, 0) / MIB:,.0f}" for peaks in self.by_process)
                told += _wrapped(f"MiB of {PLACES[name]} by process: {each}", " " * 10)
            told += _wrapped(f"those of one machine need {self.needed / MIB:,.0f} MiB of its memory together", " " * 10)
        return told

    def _ways_out(self) -> list[str]:
        if self.fits is None:
            return [f"  the trial did not come to its end: {self.reason}"]
        if self.fits:
            return []
        last = self.phases[-1]["name"] if self.phases else None
        where = f", after {last}" if last else ", before anything was measured"
        told = [
            f"  it does not fit: {self.reason}{where}"
            if self.reason
            else f"  it does not fit: a machine's process(es) need {self.needed / MIB:,.0f} MiB, more than is available"
        ]
        for one in self.tried:
            need = ", ".join(f"{mib:,} MiB of {PLACES[name]}" for name, mib in one.peak_mib.items())
            result = f"fits with {need}, {one.step_s:.3g} s a step" if one.fits else (one.reason or f"needs {need}")
            told.append(f"  tried {one.options}: {result}")
            if one.fits and one.note:
                told.append(f"        {one.note}")
        if self.options:
            return [*told, f"  add: {self.options}"]
        return [*told, "  nothing that was tried fits; take a smaller model or data.max_length, or a larger machine"]


def project(report: dict[str, Any], config: RunConfig, processes: int) -> Projection:
    """The time of a run from what its trial measured.

    Args:
        report: of a trial that came to its end.
        processes: of the run and of the trial, which share each step's tokens.
    """
    seconds: dict[str, list[float]] = {}
    for phase in report["phases"]:
        seconds.setdefault(phase["name"], []).append(phase["seconds"])
    steps, tokens = report["steps"], report["tokens"] / processes
    timed = [
        (spent, tokens) for spent, tokens in zip(seconds[ORDINARY], report["ordinary_tokens"], strict=True) if tokens
    ]
    rate = sum(spent for spent, _ in timed) / sum(count for _, count in timed)
    rates = [spent / count for spent, count in timed]
    saves, every = config.training.save_every_steps, config.evaluation.every_steps
    measures = "evaluation_tokens" in report
    tried, all_of_them = report.get("evaluation_tokens", (1, 0))
    evaluations = measures * (2 + _between(steps, every))
    found = Projection(
        steps=steps,
        step_s=rate * tokens / steps,
        start_s=seconds["start"][0],
        evaluations=evaluations,
        evaluation_s=sum(seconds.get("evaluation", ())) * all_of_them / tried,
        answers_s=_answers_s(report, sum(seconds.get("answers", ())), evaluations, processes),
        checkpoints=0 if saves is None else 1 + _between(steps, saves),
        checkpoint_s=sum(seconds.get("checkpoint", ())),
        result_s=sum(seconds.get("result", ())),
        low_s=0.0,
        high_s=0.0,
    )
    bounds = {f"{name}_s": found.other_s + one * tokens for name, one in (("low", min(rates)), ("high", max(rates)))}
    return Projection(**(vars(found) | bounds))


def _between(steps: int, every: int | None) -> int:
    """Times that something is done every so many steps, the last step left out."""
    return (steps - 1) // every if every else 0


def _answers_s(report: dict[str, Any], spent: float, evaluations: int, processes: int) -> float:
    """Seconds of all answers of a run, which the processes share: those at both ends, and fewer between."""
    told = report.get("answers")
    if not told or not told["tried"]:
        return 0.0
    at_once = ANSWERED_AT_ONCE * processes
    batch_s = spent / -(-told["tried"] // at_once)
    batches = [-(-told[name] // at_once) for name in ("at_ends", "between")]
    return batch_s * (2 * batches[0] + (evaluations - 2) * batches[1])


def _times(one: Projection) -> list[str]:
    parts = [f"{one.start_s:.3g} s to start", f"{one.steps:,} steps of {one.step_s:.3g} s"]
    if one.evaluations:
        parts.append(f"{one.evaluations} evaluations of {one.evaluation_s:.3g} s")
    if one.answers_s:
        parts.append(f"{one.answers_s:.3g} s of answers")
    if one.checkpoints:
        parts.append(f"{one.checkpoints} checkpoint(s) of {one.checkpoint_s:.2g} s")
    told = f"time: {clock(one.run_s)}; from {clock(one.low_s)} to {clock(one.high_s)} by the fastest and slowest step"
    return [f"  {told}", *_wrapped(f"{', '.join(parts)}, {one.result_s:.2g} s to write the result", " " * 8)]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _mib_of(sizes: dict[str, int]) -> dict[str, int]:
    return {name: round(size / MIB) for name, size in sizes.items()}


def _phase(phase: dict[str, Any]) -> dict[str, Any]:
    told = {"name": phase["name"], "seconds": round(phase["seconds"], 4)}
    for key, value in phase.items():
        if key.endswith("_bytes"):
            told[key.replace("_bytes", "_mib")] = round(value / MIB)
        elif key == "bytes":
            told[key] = value
    return told

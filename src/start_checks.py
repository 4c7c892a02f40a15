"""What a start of a run found that would go wrong, under the names of `config.checks`.

    checks = StartChecks(forced=("disk_space",))
    checks.look_at_rows(data.findings)                  # raises where the data contract is broken
    checks.attempt("hub_access", lambda: check_access(...))
    checks.add([StartFinding("start_loss", True, found="...", why="...", change="...")])
    checks.enforce()                                    # raises if one of all must stop the run

A finding that stops the run, and that `--force` names, warns and is recorded. A plan makes all checks to the end, so
that it tells all findings at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import gather_object

from config.checks import CHECKS
from src.contract import ContractError, Finding, enforce, percent
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class StartFinding:
    """What a check found, why it matters, and what to change; each a clause without a full stop.

    `stops`: the run must not start; else it may be meant. `why` and `change` are empty where `found` says them.
    """

    check: str
    stops: bool
    found: str
    why: str = ""
    change: str = ""

    def sentence(self) -> str:
        """All of it in one line."""
        told = f"{self.check}: {self.found}"
        return f"{told}. {self.why[0].upper()}{self.why[1:]}; {self.change}" if self.why else told


class StartChecks:
    """The findings of one start, in the order in which they were made."""

    def __init__(self, forced: Sequence[str] = (), *, plans: bool = False) -> None:
        """
        Args:
            forced: checks that do not stop the run.
            plans: whether nothing stops before all checks are made.
        """
        self.forced = tuple(forced)
        self.plans = plans
        self.findings: list[StartFinding] = []

    def add(self, found: Sequence[StartFinding]) -> None:
        """Take in findings, each once."""
        for finding in found:
            assert finding.check in CHECKS, "a check without a name could not be forced"
            if finding not in self.findings:
                self.findings.append(finding)
                if not finding.stops:
                    log.warning("%s", finding.sentence())
                elif finding.check in self.forced:
                    log.warning("%s (--force %s)", finding.sentence(), finding.check)

    def stopping(self) -> list[StartFinding]:
        """The findings with which the run does not start."""
        return [finding for finding in self.findings if finding.stops and finding.check not in self.forced]

    def overridden(self) -> list[str]:
        """The checks that would have stopped the run and were forced."""
        return sorted({finding.check for finding in self.findings if finding.stops} & set(self.forced))

    def enforce(self) -> None:
        """
        Raises:
            UserError: a finding stops the run; it tells all of those. Never while a run is only planned.
        """
        if self.plans or not (found := self.stopping()):
            return
        raise UserError(told_together(found))

    def attempt(self, check: str, action: Callable[[], Any]) -> None:
        """Do what raises where a check fails.

        Raises:
            UserError: it did, and the check is not forced; never while a run is only planned.
        """
        try:
            action()
        except UserError as error:
            self.add([StartFinding(check, stops=True, found=str(error))])
            self.enforce()

    def look_at_rows(self, found: Sequence[Finding]) -> None:
        """Hold the defects of rows against the data contract.

        Raises:
            ContractError: one is above its threshold, and its check is not forced; never while a run is only planned.
        """
        let = [finding for finding in found if finding.broken and (self.plans or _check_of(finding) in self.forced)]
        new = [_of_rows(finding) for finding in found if finding in let]
        rest = [finding for finding in found if finding not in let]
        try:
            enforce([finding for finding in rest if _of_rows(finding) not in self.findings])  # each is told once
        except ContractError as error:
            checks = ",".join(dict.fromkeys(_check_of(finding) for finding in rest if finding.broken))
            error.args = (f"{error}\n`--force {checks}` starts the run as it is",)
            raise
        self.findings += [_of_rows(finding) for finding in rest if _of_rows(finding) not in self.findings]
        self.add(new)

    def agree(self) -> None:
        """Bring the findings of all processes together, so that all stop or none; every process calls this."""
        together = gather_object([self.findings])
        self.add([finding for findings in together for finding in findings])

    def as_json(self) -> list[dict[str, Any]]:
        """The findings as plain JSON."""
        return [
            asdict(finding) | {"forced": finding.stops and finding.check in self.forced} for finding in self.findings
        ]


def told_together(found: Sequence[StartFinding]) -> str:
    """The findings that stop a run as one message, with the way to start it all the same."""
    names = ",".join(dict.fromkeys(finding.check for finding in found))
    if len(found) == 1:
        return f"{found[0].sentence()}. `--force {names}` starts the run as it is"
    lines = "".join(f"\n- {finding.sentence()}" for finding in found)
    return f"{len(found)} findings stop the run:{lines}\n`--force {names}` starts it as it is"


def _check_of(finding: Finding) -> str:
    return "eval_rows_seen" if finding.check == "leak" else "data_contract"


def _of_rows(finding: Finding) -> StartFinding:
    allowed = f"data.contract.{finding.check} allows {percent(finding.threshold)}"
    count = f"{finding.rows:,} of {finding.of_rows:,} rows of {finding.source}, {percent(finding.share)}"
    detail = f" ({finding.detail})" if finding.detail else ""
    return StartFinding(
        _check_of(finding),
        stops=finding.broken,
        found=f"{finding.check}: {count}, and {allowed}: {finding.named()}{detail}",
        why=finding.why,
        change=finding.change,
    )

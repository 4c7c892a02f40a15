"""What must hold for the rows of every source before a step is taken.

    found = findings([("rows.jsonl", 1000, tally)], config.contract)
    enforce(found)    # warns of defects that few enough rows have, and raises where too many have one

Which rows have a defect is counted where rows are prepared; here the counts are held against `data.contract`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from config.schema import ContractConfig
from src.accounting import EXAMPLES, Tally
from src.refusal import Kind
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

CHECKS = {
    "malformed": (
        "they do not hold what their format says",
        "mend them, or give the source another format, columns or roles",
    ),
    "masked": ("nothing in them would be trained", "remove them, or set data.supervise=all"),
    "untrained_stop": (
        "a model that is trained on turns without a stop token does not learn to stop",
        "name the stop token in model.special_tokens, or give a template that writes it as model.chat_template",
    ),
    "doubled_bos": (
        "no prompt of a server begins with BOS twice",
        "take one of the two out of model.chat_template, or of the rows",
    ),
    "missing_bos": (
        "the model knows no text that does not begin with BOS",
        "give a template that begins with {{ bos_token }} as model.chat_template, or put it into the rows",
    ),
    "role_order": (
        "the chat template has no place for messages of these roles in this order",
        "change the order or the roles, or give another model.chat_template",
    ),
    "content_lost": (
        "the chat template does not write all that they hold",
        "take that out of the rows, or give a template that writes it as model.chat_template",
    ),
    "unaligned": (
        "the chat template does not show which part of its output is the assistant's",
        "change the rows, give another model.chat_template, or set data.supervise=all",
    ),
    "answer_truncated": (
        "the cut leaves nothing of them that would be trained",
        "raise data.max_length, or shorten their prompts",
    ),
    "too_long": ("nothing is learned from rows that are left out", "raise data.max_length, or shorten them"),
    "leak": (
        "a model that was trained on what it is measured on looks better than it is",
        "remove them from data.train or from data.eval",
    ),
    "duplicates": ("rows that repeat are learned by heart", "remove the copies"),
    "prompt_not_prefix": (
        "a server would give the model another prompt than it is trained on",
        "change the rows or model.chat_template, or set data.unlike_served=drop",
    ),
    "null_padded_tools": (
        "a table does not tell a key that was null from one that was not there; such keys were taken out",
        "give the rows as jsonl, or their tools and messages as JSON text",
    ),
    "date_drift": (
        "the chat template writes the day's date, so that rows and prompts differ from day to day",
        "set data.template_date to a day",
    ),
}
"""For each check, why it matters and what to change."""


@dataclass(frozen=True)
class Finding:
    """A defect that rows of a source have.

    `rows` of `of_rows` rows have it, a share that may be `threshold` at most; `places` are those of the first of them,
    and `detail` says of the first one what was found, or is empty.
    """

    check: str
    source: str
    rows: int
    of_rows: int
    share: float
    threshold: float
    places: tuple[str, ...]
    detail: str
    why: str
    change: str

    @property
    def broken(self) -> bool:
        """Whether more rows have the defect than may have it."""
        return self.share > self.threshold

    def named(self) -> str:
        """The places, without the name of the source, and how many are not among them."""
        shown = ", ".join(place.removeprefix(self.source).lstrip(" /") for place in self.places)
        return shown + (f" and {self.rows - len(self.places):,} more" if self.rows > len(self.places) else "")

    def sentence(self) -> str:
        """All of it in one line."""
        return (
            f"{self.check}: {self.rows:,} of {self.of_rows:,} rows of {self.source}, {percent(self.share)}, and "
            f"data.contract.{self.check} allows {percent(self.threshold)}: {self.named()}. {self.advice()}"
        )

    def advice(self) -> str:
        """What was found and what to change; most refusals say both of the first row themselves."""
        if self.check in get_args(Kind) and self.check != "malformed" and self.detail:
            return self.detail
        return f"{self.detail}; {self.change}" if self.detail else f"{self.why[0].upper()}{self.why[1:]}; {self.change}"

    def as_json(self) -> dict[str, Any]:
        """The finding as plain JSON."""
        return asdict(self) | {"places": list(self.places), "broken": self.broken}


class ContractError(UserError):
    """More rows have a defect than `data.contract` allows; `findings` are all that the rows have."""

    def __init__(self, findings: Sequence[Finding], cause: str = "") -> None:
        """Join the findings that are above their thresholds into one message, after `cause` if it is given."""
        broken = [finding.sentence() for finding in findings if finding.broken]
        count = "a check" if len(broken) == 1 else f"{len(broken)} checks"
        begin = f"{cause}\n" if cause else ""
        super().__init__(f"{begin}the data fails {count} of data.contract:" + "".join(f"\n- {text}" for text in broken))
        self.findings = tuple(findings)


def findings(sources: Iterable[tuple[str, int, Tally]], contract: ContractConfig) -> list[Finding]:
    """What the rows of all sources have against the contract, in the order of sources and CHECKS.

    Args:
        sources: the name of each, the rows that were read of it, and the counts of these rows on all sides.
    """
    thresholds = _thresholds(contract)
    return [
        Finding(
            check=check,
            source=source,
            rows=tally.defects[check],
            of_rows=of_rows,
            share=tally.defects[check] / of_rows,
            threshold=thresholds[check],
            places=tuple(tally.examples[check][:EXAMPLES]),
            detail=tally.reasons.get(check, ""),
            why=why,
            change=change,
        )
        for source, of_rows, tally in sources
        for check, (why, change) in CHECKS.items()
        if tally.defects[check]
    ]


def enforce(found: Sequence[Finding]) -> None:
    """Warn of each finding within its threshold.

    Raises:
        ContractError: one is above its threshold; it tells all of those.
    """
    if any(finding.broken for finding in found):
        raise ContractError(found)
    for finding in found:
        log.warning("%s", finding.sentence())


def percent(share: float) -> str:
    """A share in percent, with as many digits as tell it from none."""
    return f"{100 * share:.3g}%"


def _thresholds(contract: ContractConfig) -> dict[str, float]:
    return {
        "malformed": contract.malformed,
        "masked": contract.masked,
        "untrained_stop": contract.untrained_stop,
        "doubled_bos": contract.doubled_bos,
        "missing_bos": contract.missing_bos,
        "role_order": contract.role_order,
        "content_lost": contract.content_lost,
        "unaligned": contract.unaligned,
        "answer_truncated": contract.answer_truncated,
        "too_long": contract.too_long,
        "leak": contract.leak,
        "duplicates": contract.duplicates,
        "prompt_not_prefix": contract.prompt_not_prefix,
        "null_padded_tools": contract.null_padded_tools,
        "date_drift": contract.date_drift,
    }

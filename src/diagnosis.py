"""Why a step's numbers went bad: its batch computed again, its rows and the module named.

    diagnosis = Diagnosis(model, score, recent, collate, decode, processes=1, sharded=False)
    record = diagnosis.of(event)             # every process together; a line of bad_batches.jsonl

Weights, gradients, training modes and random numbers stay as they are. What is computed is what the model makes of the
batch now: if good steps came after the bad one, it may make no trouble any more, and that is said.
"""

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from src.bad_modules import BadModule, bad_weights, first_bad_module, first_bad_output
from src.loss import Scored
from src.number_watch import Event
from src.packing import PackCollator
from src.step_rows import NamedBatch, RecentSteps, excerpt, row_losses
from src.steps import Batch
from utils.logging import get_logger

log = get_logger(__name__)

ROWS_NAMED = 8
"""Most rows that are named of a step."""

ROWS_TRIED = 64
"""Most rows that are computed one by one, to find which of them makes a batch bad."""


class Diagnosis:
    """Looks into steps that were taken a short while ago."""

    def __init__(
        self,
        model: torch.nn.Module,
        score: Callable[[Batch], Scored],
        recent: RecentSteps,
        collate: PackCollator,
        decode: Callable[[list[int]], str],
        *,
        processes: int,
        sharded: bool,
    ) -> None:
        """
        Args:
            model: not wrapped by DDP or its like.
            score: scores a batch of the host with that model, as training does.
            decode: the text of ids.
            processes: of the run, which each have their share of a step.
            sharded: whether each of them has a part of every weight, so that all compute together or none can.
        """
        self.model = model
        self.score = score
        self.recent = recent
        self.collate = collate
        self.decode = decode
        self.processes = processes
        self.sharded = sharded

    def of(self, event: Event) -> dict[str, Any]:
        """What is found of a step, as plain JSON; every process calls this together and gets the same."""
        found: dict[str, Any] = {"rows": [], "of_rows": 0, "module": None, "place": None, "weights": []}
        batches = self.recent.of(event.step)
        found["of_rows"] = sum(bool(name) for batch in batches for name in batch.names)
        look = self._spike if event.spike else self._skipped_together if self.sharded else self._skipped
        with self._undisturbed():
            found |= look(batches, event)
        return self._joined([found] if self.processes == 1 else gather_object([found]), event)

    def _joined(self, parts: list[dict[str, Any]], event: Event) -> dict[str, Any]:
        """What all processes found together, first what an event is."""
        showing = [part for part in parts if part["place"]] or parts
        rows = [row for part in showing for row in part["rows"]]
        common = {
            "step": event.step,
            "kind": "spike" if event.spike else "skipped",
            "loss": event.figures.nll if math.isfinite(event.figures.nll) else None,
        }
        told = {"rows": rows, "of_rows": sum(part["of_rows"] for part in parts)}
        if event.spike:
            told["rows"] = sorted(rows, key=lambda row: -row["excess"])[:ROWS_NAMED]
            return common | {"usual": event.spike.usual, "deviations": event.spike.deviations} | told
        bad = {"bad_loss": event.figures.bad_loss, "bad_gradient": event.figures.bad_gradient}
        named = {name: showing[0][name] for name in ("module", "place", "weights")}
        return common | bad | named | told | {"rows": rows[:ROWS_NAMED]}

    def _spike(self, batches: list[NamedBatch], event: Event) -> dict[str, Any]:
        """The rows that raise the loss most above what is usual, without dropout."""
        rows = []
        self.model.eval()
        for batch in batches:
            with torch.no_grad():
                nll_D, tokens_D = row_losses(batch, self.score)
            for document, (nll, tokens) in enumerate(zip(nll_D.tolist(), tokens_D.tolist(), strict=True)):
                if tokens:
                    figures = {"loss": nll / tokens, "tokens": tokens, "excess": nll - event.spike.usual * tokens}
                    rows.append(self._row(batch, document) | figures)
        return {"rows": sorted(rows, key=lambda row: -row["excess"])[:ROWS_NAMED]}

    def _skipped(self, batches: list[NamedBatch], event: Event) -> dict[str, Any]:
        """The first bad module, and the rows of the micro-batch that shows it; all rows if none does any more."""
        found: dict[str, Any] = {"weights": bad_weights(self.model)[:ROWS_NAMED]}
        share = self.processes / max(1, event.figures.supervised)
        for batch in batches:
            if module := self._searched(batch, share):
                documents = self._culprits(batch, share)
                rows = [self._row(batch, document) for document in documents]
                return found | {"module": module.module, "place": module.place, "rows": rows}
        return found | {"rows": self._all_rows(batches)}

    def _skipped_together(self, batches: list[NamedBatch], event: Event) -> dict[str, Any]:
        """As `_skipped`, by the same forward passes in each process, which waits for the others' parts of weights in
        each; a backward pass would add up gradients, so one that is not finite has the step's rows and no module."""
        found: dict[str, Any] = {"weights": bad_weights(self.model)[:ROWS_NAMED], "rows": self._all_rows(batches)}
        for batch in batches:
            bad = first_bad_output(self.model, lambda batch=batch: self.score(batch.batch).total)
            with torch.no_grad():
                nll_D, _ = row_losses(batch, self.score)
            if bad and not found.get("place"):
                documents = [document for document, nll in enumerate(nll_D.tolist()) if not math.isfinite(nll)]
                rows = [self._row(batch, document) for document in documents] or self._all_rows([batch])
                found |= {"module": bad.module, "place": bad.place, "rows": rows}
        return found

    def _all_rows(self, batches: list[NamedBatch]) -> list[dict[str, Any]]:
        return [self._row(batch, index) for batch in batches for index, name in enumerate(batch.names) if name]

    def _searched(self, batch: NamedBatch, share: float) -> BadModule | None:
        return first_bad_module(self.model, lambda: self.score(batch.batch).total * share)

    def _culprits(self, batch: NamedBatch, share: float) -> list[int]:
        """The documents of a bad micro-batch that are bad by themselves; or those whose loss is not finite, or all."""
        with torch.no_grad():
            nll_D, tokens_D = row_losses(batch, self.score)
        trained = [document for document, tokens in enumerate(tokens_D.tolist()) if tokens]
        suspects = [document for document in trained if not math.isfinite(nll_D[document])] or trained
        if not 1 < len(suspects) <= ROWS_TRIED:
            return suspects
        alone = [document for document in suspects if self._searched(batch.alone(document, self.collate), share)]
        return alone or suspects

    def _row(self, batch: NamedBatch, document: int) -> dict[str, Any]:
        return {"row": batch.names[document], "text": excerpt(*batch.documents()[document], self.decode)}

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Put back what computing changes: random states, and which modules train. Compiled layers take no hooks, so
        they run as they are written."""
        training = [module for module in self.model.modules() if module.training]
        states = random.getstate(), np.random.get_state()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        plain = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        try:
            with torch.random.fork_rng(devices=devices), plain:
                yield
        except torch.OutOfMemoryError:
            log.warning("there is no memory to compute a bad batch again; its rows and its module stay unknown")
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            self.model.eval()
            for module in training:
                module.training = True


def sentence(record: dict[str, Any]) -> str:
    """A record in words: what was found, why it matters, what to change."""
    rows = "; ".join(f"{row['row']} ({row['text']!r})" for row in record["rows"][:3]) or "unknown"
    more = f" and more of {record['of_rows']} rows" if len(record["rows"]) > 3 else f", of {record['of_rows']} rows"
    if record["kind"] == "spike":
        return (
            f"step {record['step']}: the loss of {record['loss']:.4f} is a spike, {record['deviations']:.1f} deviations"
            f" above the usual {record['usual']:.4f}; most of it is from {rows}{more}. Look at these rows; if they are "
            "right and spikes come often, lower optim.learning_rate or optim.max_grad_norm"
        )
    what = "the loss" if record["bad_loss"] else "the gradient"
    places = {
        "forward": f"first in the output of {record['module']}",
        "loss": "while the outputs of all modules are finite",
        "backward": f"first in the gradients that {record['module']} makes",
        None: "in a module that is not known, as its batch shows it no more or the weights are sharded",
    }
    text = (
        f"step {record['step']}: {what} is not finite, {places[record['place']]}; the step was left out. Rows: "
        f"{rows}{more}. "
    )
    if record["weights"]:
        return f"{text}Weights that are not finite: {', '.join(record['weights'])}; go back to a checkpoint without"
    return f"{text}Look at these rows; if they are right, lower optim.learning_rate, or set training.precision=float32"

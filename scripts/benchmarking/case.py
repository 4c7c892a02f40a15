"""One configuration of the training benchmark: what its presets name and its command line changes.

case = Case(model="llama-1b", method="lora", max_length=4096)
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from config.benchmark import SHAPES
from utils.errors import UserError


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Case:
    """What is trained, and how. Each field is an option of the command."""

    model: str = _option("tiny", "shape of the model: a name of config/benchmark.py")
    method: Literal["full", "lora", "qlora"] = _option("full", "what trains; qlora is LoRA beside nf4 weights")
    rows: Literal["synthetic", "instruction", "document"] = _option(
        "synthetic",
        "synthetic: random tokens; document: those, every row of max_length; instruction: alpaca_en_demo of --data, in "
        "Llama 2's tokens",
    )
    median_length: int = _option(
        300, "median tokens of a synthetic row; lengths are log-normal, sigma 0.8, none above max_length"
    )
    supervised: float | None = _option(
        None, "share of tokens that are supervised, in spans that the seed places; above 0, below 1 (None: as rows are)"
    )
    max_length: int = _option(2048, "tokens in a pack, and most tokens in a row")
    micro_batch_rows: int = _option(1, "packs that the device takes at once")
    padded_rows: int = _option(
        0, "rows that are padded together (0: as many as never take more positions than a micro-batch of packs)"
    )
    accumulation_steps: int = _option(1, "micro-batches to an optimizer step")
    steps: int = _option(10, "optimizer steps that are measured")
    warmup_steps: int = _option(3, "optimizer steps before those, which are not")
    gradient_checkpointing: Literal["none", "full", "selective"] = _option(
        "none", "what is computed again in the backward pass, as in training.gradient_checkpointing"
    )
    compile: Literal["on", "off"] = _option(
        "off", "whether `smolfactory` compiles its layers, as training.compile does"
    )
    dtype: str = _option("auto", "format the weights are held in; auto: float32 for full, bfloat16 for the others")
    precision: str = _option("auto", "format of the matrix products, as in training.precision")
    rank: int = _option(16, "rank of the LoRA matrices, on every linear layer but the head")
    seed: int = _option(0, "seed of weights, rows and order")

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: a value that no case can have.
        """
        if self.model not in SHAPES:
            raise UserError(f"model={self.model} is no shape of config/benchmark.py; give one of {', '.join(SHAPES)}")
        for name in ("micro_batch_rows", "accumulation_steps", "steps", "warmup_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.supervised is not None and not 0 < self.supervised < 1:
            raise UserError(f"supervised={self.supervised:g} must be above 0 and below 1")
        longest = SHAPES[self.model]["max_position_embeddings"]
        shortest = self.median_length if self.rows == "synthetic" else 8
        if not shortest <= self.max_length <= longest:
            raise UserError(
                f"max_length={self.max_length} must be from {shortest}, the median_length of synthetic rows, to the "
                f"{longest} tokens that {self.model} takes; change one of them"
            )

    @property
    def all_steps(self) -> int:
        """Optimizer steps, warmup among them."""
        return self.warmup_steps + self.steps

    @property
    def packs_needed(self) -> int:
        """Packs for all steps."""
        return self.all_steps * self.micro_batch_rows * self.accumulation_steps

    @property
    def title(self) -> str:
        """What tells a case from the others, in words."""
        batch = f"{self.accumulation_steps} x {self.micro_batch_rows} packs of {self.max_length:,} tokens a step"
        parts = [f"{self.model} {self.method}", batch, f"{self.rows} rows"]
        if self.supervised is not None:
            parts.append(f"{self.supervised:.0%} supervised")
        if self.gradient_checkpointing != "none":
            parts.append(f"{self.gradient_checkpointing} gradient checkpointing")
        if self.compile == "on":
            parts.append("compiled layers")
        return ", ".join(parts)

"""One configuration of the benchmark: what `scripts/benchmark.py` takes on its command line.

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
    max_length: int = _option(2048, "tokens in a pack, and most tokens in a row")
    micro_batch_rows: int = _option(1, "packs (rows, without packing) that the device takes at once")
    accumulation_steps: int = _option(1, "micro-batches to an optimizer step")
    steps: int = _option(10, "optimizer steps that are measured")
    warmup_steps: int = _option(3, "optimizer steps before those, which are not")
    packing: bool = _option(True, "whether rows share packs")
    gradient_checkpointing: bool = _option(False, "whether activations are computed again in the backward pass")
    attention: str = _option("auto", "attention implementation, as in model.attention")
    dtype: str = _option("auto", "format the weights are held in; auto: float32 for full, bfloat16 for the others")
    precision: str = _option("auto", "format of the matrix products, as in training.precision")
    optimizer: str = _option("adamw_torch_fused", "optimizer, as in optim.name")
    rank: int = _option(16, "rank of the LoRA matrices, on every linear layer but the head")
    median_length: int = _option(
        300, "median tokens of a row; lengths are log-normal, sigma 0.8, none above max_length"
    )
    seed: int = _option(0, "seed of weights, rows and order")
    trainer: Literal["smolfactory", "plain"] = _option(
        "smolfactory", "plain: transformers' Trainer on padded rows with an attention mask, instead of this project's"
    )

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
        longest = SHAPES[self.model]["max_position_embeddings"]
        if not self.median_length <= self.max_length <= longest:
            raise UserError(
                f"max_length={self.max_length} must be from median_length={self.median_length} to the {longest} tokens "
                f"that {self.model} takes; change one of them"
            )

    @property
    def layout(self) -> str:
        """How rows are put into batches, in a word or two."""
        if self.trainer == "plain":
            return "plain Trainer"
        return "packed" if self.packing else "unpacked"

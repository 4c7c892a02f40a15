"""What a training step computes and takes: operations, tokens, padding, memory, and the share of the device's rate.

    work = Work.of(model, count_parameters(model))
    meter = Meter(work, rate=matrix_rate("cpu", torch.float32))
    meter.add(meter.count(batch, pad_id))        # a micro-batch on the host
    meter.figures(seconds=2.5)                   # {"mfu": 0.61, "padding_share": 0.0}

The convention: a multiplication and an addition are two operations. A weight of a matrix product that trains takes 6
for each token (forward, gradient of its input, gradient of itself), a frozen one 4. The output head's weights count at
supervised tokens only, since no other position needs them; a looked-up embedding counts nothing. Attention takes
12 x heads x head size for each layer and each pair of a token and one that it sees: itself and those before it in its
own document, within the layer's window. What is computed again, for gradient checkpointing, or computed in vain, for
padding and masked pairs, counts nothing.
Source: arXiv:2204.02311, appendix B, whose 6N + 12LHQT counts each token as seeing the whole row, and the head at every
token.
"""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from utils.memory import resident_peak_bytes

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as configurations name them, that attention is counted for."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of forward and backward, by what they depend on."""

    per_token: int
    """In every layer, for one token."""

    per_supervised_token: int
    """In the output head."""

    per_pair: int
    """In attention of the layers that see whole documents, for one token and one that it sees."""

    per_pair_in_window: int = 0
    """The same in the layers that see a window."""

    window: int | None = None
    """Tokens that a token sees there at most, itself among them."""

    @classmethod
    def of(cls, model: torch.nn.Module, parameters: Mapping[str, int]) -> "Work":
        """The work of a dense causal language model as it stands, with its adapter and its frozen weights.

        Args:
            parameters: its numbers of weights, `total` and `trainable`, a 4-bit one counted once.
        """
        lookup, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        outside = {id(weight): weight for weight in (lookup, head)}.values()
        body = parameters["total"] - sum(weight.numel() for weight in outside)
        training = parameters["trainable"] - sum(weight.numel() for weight in outside if weight.requires_grad)
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        window = getattr(config, "sliding_window", None)
        usual = SLIDING if window else FULL
        kinds = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
        return cls(
            per_token=6 * training + 4 * (body - training),
            per_supervised_token=(6 if head.requires_grad else 4) * head.numel(),
            per_pair=12 * kinds.count(FULL) * heads * width,
            per_pair_in_window=12 * kinds.count(SLIDING) * heads * width,
            window=window,
        )

    def of_batch(self, *, tokens: int, supervised: int, pairs: int, pairs_in_window: int | None = None) -> int:
        """
        Args:
            tokens: without padding.
            supervised: tokens that the loss counts.
            pairs: of a token and one that it sees, n (n + 1) / 2 for a document of n tokens.
            pairs_in_window: those where a token sees a window. None: as many.
        """
        near = pairs if pairs_in_window is None else pairs_in_window
        pairs_work = self.per_pair * pairs + self.per_pair_in_window * near
        return self.per_token * tokens + self.per_supervised_token * supervised + pairs_work

    def of_documents(self, lengths: np.ndarray, *, tokens: int, supervised: int) -> int:
        """The work of a batch of documents of so many tokens each, int64 (documents,), padding after them included."""
        pairs = lengths * (lengths + 1) // 2
        near = pairs
        if self.window:
            beyond = np.maximum(lengths - self.window, 0)
            near = pairs - beyond * (beyond + 1) // 2
        return self.of_batch(
            tokens=tokens,
            supervised=supervised,
            pairs=int(pairs.sum()),
            pairs_in_window=int(near.sum()),
        )


def work_of(model: torch.nn.Module, parameters: Mapping[str, int]) -> Work | None:
    """The work of a model; None for one of which not every weight works for every token, or that is not told."""
    settings = model.config.get_text_config().to_dict()
    experts = any(settings.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    kinds = set(settings.get("layer_types") or ()) - {FULL, SLIDING}
    if experts or kinds or not settings.get("num_attention_heads") or model.get_output_embeddings() is None:
        return None
    return Work.of(model, parameters)


@dataclass(frozen=True)
class Counted:
    """What is in a micro-batch."""

    supervised: int
    """Tokens that the loss counts."""

    tokens: int
    """Without padding."""

    positions: int
    """With it."""

    operations: int
    """Of forward and backward; 0 where the model's work is not known."""


class Meter:
    """Sums over the micro-batches of this process since the last figures."""

    def __init__(self, work: Work | None, rate: float | None) -> None:
        """
        Args:
            work: that of the model. None: not known.
            rate: operations a second that the device's matrix products reach. None: not known.
        """
        self.work = work
        self.rate = rate
        self.clear()

    def count(self, batch: Mapping[str, torch.Tensor], pad_id: int) -> Counted:
        """What is in a micro-batch; the sums stay as they are. By numpy, as threads of torch's would take cores from
        the step that trains meanwhile.

        Args:
            batch: as the collator gives it, on the host.
            pad_id: what stands where a row has no token.
        """
        supervised = len(batch["supervised_places"])
        tokens = int(np.count_nonzero(batch["input_ids"].numpy() != pad_id))
        operations = 0
        if self.work:
            lengths = np.diff(batch["document_borders"].numpy().astype(np.int64))
            operations = self.work.of_documents(lengths, tokens=tokens, supervised=supervised)
        return Counted(supervised, tokens, batch["input_ids"].numel(), operations)

    def add(self, counted: Counted) -> None:
        """Add a micro-batch to the sums."""
        self.tokens += counted.tokens
        self.positions += counted.positions
        self.operations += counted.operations

    def figures(self, seconds: float) -> dict[str, float]:
        """`padding_share`, and `mfu`: the share of the matrix rate that the work was done at, if both are known."""
        found = {"padding_share": 1 - self.tokens / max(1, self.positions)}
        if self.work and self.rate:
            found["mfu"] = self.operations / seconds / self.rate
        return found

    def clear(self) -> None:
        """Start the sums again."""
        self.tokens = self.positions = self.operations = 0


@functools.cache
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the median of a few; measured once in a process."""
    size, times = (8192, 20) if device == "cuda" else (1024, 7)
    generator = torch.Generator().manual_seed(0)  # a run's own random numbers stay as they are
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / float(np.median(seconds[2:]))


def peak_memory() -> dict[str, int]:
    """Most memory in use so far, in MiB: `resident_mib` of this process, and `cuda_mib` that torch held on the GPU."""
    found = {"resident_mib": round(resident_peak_bytes() / 2**20)}
    if torch.cuda.is_available():
        found["cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found

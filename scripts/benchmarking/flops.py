"""What a training step has to compute, so that a speed can be told as a share of what the device can do.

    work = Work.of(model)
    flops = work.of_batch(tokens=8192, supervised=4096, pairs=2_500_000)

The convention: a multiplication and an addition are two operations. A weight of a matrix product that trains takes 6
for each token (forward, gradient of its input, gradient of itself), a frozen one 4. The output head's weights count at
supervised tokens only, since no other position needs them; a looked-up embedding counts nothing. Attention takes
12 x heads x head size for each layer and each pair of a token and one that it sees: itself and those before it in its
own document. What is computed again, for gradient checkpointing, or computed in vain, for padding and masked pairs,
counts nothing.
Source: arXiv:2204.02311, appendix B, whose 6N + 12LHQT counts each token as seeing the whole row, and the head at every
token.
"""

from dataclasses import dataclass

import torch

from src.adapters import count_parameters


@dataclass(frozen=True)
class Work:
    """Floating-point operations of forward and backward, by what they depend on."""

    per_token: int
    """In every layer, for one token."""

    per_supervised_token: int
    """In the output head."""

    per_pair: int
    """In attention, for one token and one that it sees."""

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Work":
        """The work of a causal language model as it stands, with its adapter and its frozen weights."""
        numbers = count_parameters(model)
        lookup, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        outside = {id(weight): weight for weight in (lookup, head)}.values()
        body = numbers["total"] - sum(weight.numel() for weight in outside)
        training = numbers["trainable"] - sum(weight.numel() for weight in outside if weight.requires_grad)
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            per_token=6 * training + 4 * (body - training),
            per_supervised_token=(6 if head.requires_grad else 4) * head.numel(),
            per_pair=12 * config.num_hidden_layers * heads * width,
        )

    def of_batch(self, *, tokens: int, supervised: int, pairs: int) -> int:
        """
        Args:
            tokens: without padding.
            supervised: tokens that the loss counts.
            pairs: of a token and one that it sees, n (n + 1) / 2 for a document of n tokens.
        """
        return self.per_token * tokens + self.per_supervised_token * supervised + self.per_pair * pairs

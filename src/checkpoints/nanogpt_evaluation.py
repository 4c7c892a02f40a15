"""nanoGPT's forward pass written out, from tensors by its own names, one layer in memory at a time.

    NanoGPT(layers=6, heads=6, exact_gelu=True, tensors=tensors).logits([[5, 9, 200]])

It shares no code with transformers and reads the file's own orientation, so agreement with a converted model speaks for
names, transposition, biases, norms and the activation alike.

Shapes: T tokens, V vocabulary, C width, H heads, D head size.

Source: https://github.com/karpathy/nanoGPT/blob/master/model.py
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import layer_norm

from src.checkpoints.checkpoint import LazyTensor, Rounding, rounded

NORM_EPS = 1e-5
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Endings of the weights that Hugging Face's GPT-2 stores as (inputs, outputs), nanoGPT as (outputs, inputs)."""


@dataclass(frozen=True)
class NanoGPT:
    """A model whose weights are loaded when they are used."""

    layers: int
    heads: int
    exact_gelu: bool
    """False: the tanh approximation."""
    tensors: Mapping[str, LazyTensor]

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], rounding: Rounding | None = None) -> list[torch.Tensor]:
        """For each row float32 logits (T, V); weights are rounded, if at all, in Hugging Face's orientation."""
        weights = _Weights(rounded(self.tensors, None if rounding is None else _turned(rounding)))
        embedding_VC, positions_TC = weights("transformer.wte.weight"), weights("transformer.wpe.weight")
        states = [embedding_VC[torch.tensor(row)] + positions_TC[: len(row)] for row in rows]
        for layer in range(self.layers):
            states = self._layer(weights, f"transformer.h.{layer}", states)
        head_VC = weights("lm_head.weight") if "lm_head.weight" in self.tensors else embedding_VC
        norm = weights.norm("transformer.ln_f")
        return [norm(states_TC) @ head_VC.T for states_TC in states]

    def _layer(self, weights: "_Weights", prefix: str, states: list[torch.Tensor]) -> list[torch.Tensor]:
        norm, inner = weights.norm(f"{prefix}.ln_1"), weights.linear(f"{prefix}.attn.c_attn")
        outer = weights.linear(f"{prefix}.attn.c_proj")
        states = [row_TC + outer(self._attention(inner(norm(row_TC)))) for row_TC in states]
        norm, inner = weights.norm(f"{prefix}.ln_2"), weights.linear(f"{prefix}.mlp.c_fc")
        outer = weights.linear(f"{prefix}.mlp.c_proj")
        return [row_TC + outer(self._gelu(inner(norm(row_TC)))) for row_TC in states]

    def _attention(self, projected: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values side by side, (T, 3C) -> what each token attends to, (T, C)."""
        length, width = len(projected), projected.shape[1] // 3
        queries_THD, keys_THD, values_THD = (
            part.unflatten(1, (self.heads, -1)) for part in projected.split(width, dim=1)
        )
        scores_HTT = torch.einsum("qhd,khd->hqk", queries_THD, keys_THD) / math.sqrt(width // self.heads)
        future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares_HTT = scores_HTT.masked_fill(future_TT, -math.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", shares_HTT, values_THD).flatten(1)

    def _gelu(self, x: torch.Tensor) -> torch.Tensor:
        if self.exact_gelu:
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _turned(rounding: Rounding) -> Rounding:
    """The rounding of tensors in nanoGPT's orientation."""
    return lambda name, tensor: rounding(name, tensor.T).T if name.endswith(TRANSPOSED) else rounding(name, tensor)


@dataclass(frozen=True)
class _Weights:
    """Tensors in float32, and the maps that they make."""

    tensors: Mapping[str, LazyTensor]

    def __call__(self, name: str) -> torch.Tensor:
        return self.tensors[name].load().float()

    def _bias(self, name: str) -> torch.Tensor | None:
        return self(f"{name}.bias") if f"{name}.bias" in self.tensors else None

    def linear(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, bias = self(f"{name}.weight"), self._bias(name)
        return lambda x: x @ weight.T if bias is None else x @ weight.T + bias

    def norm(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, bias = self(f"{name}.weight"), self._bias(name)
        return lambda x: layer_norm(x, weight.shape, weight, bias, NORM_EPS)

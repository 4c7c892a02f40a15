"""The objective as its definition is written, in any width: what the tests of the loss compare with.

    total, nll_T = written_out(logits_TV.double(), targets_T, smoothing=0.1)
    assert error(found, total) <= FLOAT32

Shapes: T supervised tokens, V tokens in the vocabulary.
"""

import torch

FLOAT32 = 1e-6
"""Relative error of sums of some hundred products of float32's 24 bits."""


def written_out(logits, targets, *, smoothing=0.0, z_loss=0.0, scale=1.0, softcap=None):
    """The objective's sum and each token's negative log-likelihood, as their definitions are written."""
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_z = logits.exp().sum(dim=-1).log()
    log_p = logits - log_z[:, None]
    chosen = log_p[torch.arange(len(targets)), targets]
    loss = -(1 - smoothing) * chosen - smoothing * log_p.mean(dim=-1) + z_loss * log_z**2
    return loss.sum(), -chosen


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()

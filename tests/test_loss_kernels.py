"""Implementations of the head's loss are timed where they agree, and not where one computes something else."""

import json

import pytest
import torch

from scripts.benchmark import main
from scripts.benchmarking import loss_kernels
from utils.errors import UserError


def test_losses_of_a_head_are_measured_where_they_agree(tmp_path, capsys):
    words = ["loss", "--sizes", "300x16", "--tokens", "8", "600", "--repeats", "2", "--max_product", "2000000"]
    assert main([*words, "--output", str(tmp_path / "loss")]) == 0
    (case,) = json.loads((tmp_path / "loss.json").read_text())["cases"]  # the other has 2,880,000
    assert (case["vocabulary"], case["width"], case["tokens"], case["trains_head"]) == (300, 16, 8, True)
    assert {"chunks", "whole logits"} <= case["seconds"].keys()
    assert all(len(turns) == 2 and min(turns) >= 0 for turns in case["seconds"].values())
    assert "| 300 | 16 | 8 | float32 | trains |" in (tmp_path / "loss.md").read_text()
    assert main(["loss", "--sizes", "300"]) == 2
    assert "--sizes has '300'; give vocabulary x width" in capsys.readouterr().err


def test_a_loss_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(loss_kernels, "in_chunks", lambda *given: 1.01 * loss_kernels.whole(*given))
    with pytest.raises(UserError, match=r"chunks computes something else: it differs by 0\.01 from"):
        loss_kernels.measure(300, 16, 8, dtype=torch.float32, trains_head=True, repeats=1)

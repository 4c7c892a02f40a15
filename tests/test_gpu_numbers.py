"""On a GPU: a bad step is left out by the device, which nobody waits for."""

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from config.schema import OptimConfig
from src.optim import muon_with_adamw
from src.step_guard import StepGuard
from tests.gpu_runs import ON_GPU
from tests.test_trainer import tiny_model

pytestmark = ON_GPU


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_bad_step_is_left_out_without_a_wait(name, tmp_path):
    model = tiny_model().cuda()
    if name == "muon":
        optimizer = muon_with_adamw(model, OptimConfig(name="muon", learning_rate=1e-2, weight_decay=0.1))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    guard = StepGuard(torch.device("cuda"))
    common = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    seen = []
    for factor in (1.0, float("nan"), 1.0):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, factor)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = guard.marked(model.lm_head.weight.sum() * factor)
            guard.see_gradient(torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]))
            guard.on_pre_optimizer_step(*common, optimizer=optimizer)
            optimizer.step()
            guard.on_optimizer_step(*common, optimizer=optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(loss.isfinite()) is (factor == 1.0)
        seen.append([weight.detach().clone() for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(seen[0], seen[1], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(seen[1], seen[2], strict=True))
    assert guard.take().tolist() == [[False, False], [True, True], [False, False]]

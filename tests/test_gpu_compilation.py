"""Compiled layers on a GPU learn what layers learn that are not compiled."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from config.schema import TrainingConfig
from src.activations import recompute_activations
from src.compilation import CompiledLayers, check_compilation
from tests.gpu_runs import (
    DEVICE,
    ON_GPU,
    build,
    full_float32,  # noqa: F401  pytest finds it here
    losses_of,
    small_model,
)

pytestmark = ON_GPU


class NoCompilation(TrainerCallback):
    """Fails a run that compiles after training has begun."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_layers_learn_the_same_and_are_compiled_for_no_step_alone(tmp_path, precision, recomputes):
    # With SGD a step is the gradient itself; roundings are those of other orders of sums, as above.
    check_compilation(TrainingConfig(compile="on"), DEVICE.type)
    losses = []
    for compiled in (True, False):
        torch.compiler.reset()
        model = small_model(attention="documents")
        if recomputes:
            recompute_activations(model)
        trainer = build(tmp_path, model, precision=precision, optimizer="sgd", rate=0.1)
        if compiled:
            trainer.add_callback(CompiledLayers("on", trainer.score, trainer.data_collator))
            trainer.add_callback(NoCompilation())
        trainer.train()
        torch.compiler.set_stance("default")
        losses.append(losses_of(trainer))
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol={"float32": 1e-5, "bf16": 4e-3}[precision])

"""Trials of runs on a GPU: what they predict against what runs take.

pytest -m gpu tests/test_gpu_trial.py
"""

import pytest
import torch

from tests.gpu_runs import HAS_GPU, ON_GPU
from tests.test_trial import measured, recipe_of, result_of_run

pytestmark = [*ON_GPU, pytest.mark.skipif(not HAS_GPU, reason="the memory of a GPU is measured")]


@pytest.mark.parametrize("shape", ["packed, all weights", "LoRA", "long documents, padded"])
def test_the_peak_on_a_gpu_is_within_two_percent_of_its_prediction(tmp_path, shape):
    recipe = recipe_of(tmp_path, shape)
    costs = measured(recipe)
    assert costs.outcome == "measured", costs.lines()
    assert costs.available["cuda"] > costs.peaks["cuda"]
    assert result_of_run(recipe)["peak_memory"]["cuda_mib"] == pytest.approx(costs.peaks["cuda"] / 2**20, rel=0.02)


def test_what_a_gpu_has_no_memory_for_is_out_of_memory(tmp_path):
    recipe = recipe_of(tmp_path, "packed, all weights")
    # All that is free but 1 GiB, most of which CUDA itself takes for another process.
    held = torch.empty(torch.cuda.mem_get_info()[0] - 2**30, dtype=torch.uint8, device="cuda")
    costs = measured(recipe, "--training.micro_batch_rows", "64")
    del held
    torch.cuda.empty_cache()
    assert costs.outcome == "out of memory", costs.lines()
    assert costs.tried[0].options == "--training.micro_batch_rows 32 --training.accumulation_steps 2"

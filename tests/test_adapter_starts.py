"""EVA's start: from the batches where it can, and an error that says why where it cannot."""

import ast
import re
from functools import partial

import torch

from tests.tiny_run import from_checkpoint, run_train, weights_of, write_checkpoint, write_recipe


def test_eva_starts_from_the_directions_of_the_first_batches(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320)
    adapter = {"kind": "lora", "rank": 2, "init": "eva", "target_modules": ["q_proj", "k_proj"]}
    recipe = write_recipe(tmp_path, model=from_checkpoint(checkpoint), adapter=adapter, optim={"learning_rate": 1e-9})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    weights = weights_of(tmp_path / "outputs" / "run" / "model")
    for name in [name for name in weights if "lora_A" in name]:
        rows = weights[name]
        # Right singular vectors, which no other start gives; and one input has one set of them, for q as for k.
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
        twin = weights[name.replace("q_proj", "k_proj")]
        shared = min(len(rows), len(twin))
        torch.testing.assert_close(
            (rows[:shared] * twin[:shared]).sum(1).abs(), torch.ones(shared), rtol=1e-3, atol=1e-3
        )


def test_eva_beside_rows_of_new_tokens_is_refused_with_what_trains_them(tmp_path):
    recipe = partial(write_recipe, tmp_path, model=from_checkpoint(write_checkpoint(tmp_path / "base")))  # none is left
    done = run_train("--config", recipe(adapter={"kind": "lora", "init": "eva", "rank": 2}))
    assert done.code == 2
    assert "adapter.init=eva cannot start beside single rows of model.embed_tokens, lm_head" in done.stderr
    told = re.search(r"give adapter.modules_to_save (\[.*?\])", done.stderr).group(1)
    adapter = {"kind": "lora", "init": "eva", "rank": 2, "modules_to_save": ast.literal_eval(told)}
    done = run_train("--config", recipe(adapter=adapter))
    assert done.code == 0, done.stderr


def test_eva_ends_where_batches_have_too_few_tokens_for_its_rank(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320)
    recipe = write_recipe(
        tmp_path, model=from_checkpoint(checkpoint), adapter={"kind": "lora", "init": "eva", "rank": 64}
    )
    done = run_train("--config", recipe)
    assert done.code == 2
    assert "directions have not settled in 16 rounds of" in done.stderr
    assert "or a lower adapter.rank" in done.stderr

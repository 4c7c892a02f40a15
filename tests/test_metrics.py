"""What a step computes, as a formula, as torch counts it, and as a run logs it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from config.benchmark import SHAPES
from config.schema import AdapterConfig
from src.adapters import add_adapter, count_parameters
from src.loss import supervised_nll
from src.packing import IGNORED
from tests.tiny_run import metrics_of, run_train, write_recipe
from utils.metrics import Counted, Meter, Work, matrix_rate, peak_memory, work_of


def flops_counted_by_torch(model, batch):
    with FlopCounterMode(display=False) as counter:
        supervised_nll(model, batch)[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(kind="lora", rank=4)])
def test_operations_are_those_that_torch_counts(tied, adapter):
    shape = SHAPES["tiny"] | {"tie_word_embeddings": tied, "num_hidden_layers": 12}
    settings = {key: value for key, value in shape.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))
    model = add_adapter(model, adapter)
    length, supervised = 48, 20
    ids = torch.randint(3, 512, (1, length))
    labels = ids.clone()
    labels[0, :-supervised] = IGNORED
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None]}
    work = Work.of(model, count_parameters(model))
    # torch counts the masked half of attention as well: length x length pairs for eager attention.
    ours = work.of_batch(tokens=length, supervised=supervised, pairs=length * length)
    # Norm weights are in no matrix product (0.3 % here); an adapter needs no gradient of the first layer's input.
    bound = 0.005 if adapter.kind == "none" else 0.04
    assert flops_counted_by_torch(model, batch) == pytest.approx(ours, rel=bound)


TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 128}


def tiny(model_type, **settings):
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0} | TINY
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | settings))


@pytest.mark.parametrize(
    ("model", "layers_in_window"),
    [
        (("mistral", {"sliding_window": 8}), 4),
        (("gemma2", {"sliding_window": 8}), 2),
        (("llama", {}), 0),
    ],
)
def test_pairs_of_a_token_and_one_that_it_sees_are_counted_by_kind_of_layer(model, layers_in_window):
    work = work_of(built := tiny(model[0], **model[1]), count_parameters(built))
    lengths = np.array([3, 20, 8])
    whole = sum(at + 1 for length in lengths for at in range(length))
    near = sum(min(at + 1, 8) for length in lengths for at in range(length))
    expected = 12 * 32 * (layers_in_window * near + (4 - layers_in_window) * whole)
    assert work.of_documents(lengths, tokens=0, supervised=0) == expected


def test_a_model_of_experts_is_not_guessed_at():
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert work_of(model, count_parameters(model)) is None


def test_figures_are_sums_over_micro_batches():
    meter = Meter(Work(per_token=10, per_supervised_token=100, per_pair=1000), rate=1e6)
    batch = {
        "input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 5]]),
        "supervised_places": torch.tensor([0, 4, 5]),
        "document_borders": torch.tensor([0, 4, 8], dtype=torch.int32),
    }
    operations = 6 * 10 + 3 * 100 + 20 * 1000
    counted = meter.count(batch, 0)
    assert counted == Counted(supervised=3, tokens=6, positions=8, operations=operations)
    assert meter.figures(2.0)["mfu"] == 0, "counting alone adds nothing"
    meter.add(counted)
    assert meter.figures(2.0) == {"padding_share": 0.25, "mfu": operations / 2.0 / 1e6}
    meter.add(counted)
    assert meter.figures(4.0) == {"padding_share": 0.25, "mfu": operations / 2.0 / 1e6}
    meter.clear()
    assert meter.figures(1.0)["mfu"] == 0


def test_a_run_logs_its_share_of_the_matrix_rate_and_of_padding(tmp_path):
    done = run_train("--config", write_recipe(tmp_path))
    assert done.code == 0, done.stderr
    lines = [line for line in metrics_of(tmp_path / "outputs" / "run") if "loss" in line]
    assert all(0 < line["mfu"] < 1.5 and line["padding_share"] == 0 for line in lines)
    assert "; mfu " in done.stderr


def test_the_rate_is_one_that_a_machine_has_and_the_random_numbers_stay():
    state = torch.get_rng_state()
    assert 1e9 < matrix_rate("cpu", torch.float32) < 1e14
    assert torch.equal(torch.get_rng_state(), state)
    assert peak_memory()["resident_mib"] > 100


def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    held_mib = 1200
    held = b"x" * (held_mib * 2**20)  # getrusage of the child would begin with these
    code = "from utils.metrics import peak_memory; print(peak_memory()['resident_mib'])"
    child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, check=True)
    del held
    assert 100 < int(child.stdout) < held_mib

"""Weights that are sharded, and ways to split a run over processes that are refused."""

import pytest
import torch
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_run import ARCHITECTURE, run_train, write_recipe
from utils.engines import check_engine, check_parallelism, is_sharded
from utils.errors import UserError


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_sharded_weights_are_told_from_whole_ones():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    assert not is_sharded(torch.nn.parallel.DistributedDataParallel(model))
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert is_sharded(model)


def test_a_run_that_asked_for_fsdp_and_has_whole_weights_stops_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("src.assembly.check_engine", lambda device: None)  # as where there is an accelerator
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    done = run_train("--config", write_recipe(tmp_path))
    assert done.code == 2
    assert "error: FSDP is asked for (ACCELERATE_USE_FSDP=true), and no weight is sharded" in done.stderr
    assert "step 1/" not in done.stderr


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_needs_an_accelerator_is_refused_without_one(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"{engine} is asked for and there is no accelerator"):
        check_engine("cpu")
    check_engine("cuda")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "false")
    check_engine("cpu")


@pytest.mark.parametrize(("name", "what"), [("cp", "context"), ("tp", "tensor"), ("sp", "sequence")])
def test_processes_that_would_share_rows_are_refused(name, what, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    check_parallelism(packing=True)
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "4")
    with pytest.raises(UserError, match=rf"parallelism_config_{name}_size=4 asks for {what} parallel.*wrong\. Launch"):
        check_parallelism(packing=False)
    with pytest.raises(UserError, match="would see each other, too"):
        check_parallelism(packing=True)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "false")
    check_parallelism(packing=True)


def test_a_run_under_context_parallel_is_refused_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    done = run_train("--config", write_recipe(tmp_path))
    assert done.code == 2
    assert "error: parallelism_config_cp_size=2 asks for context parallel" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_documents_of_a_pack_see_each_other_under_accelerates_context_parallel():
    # Why it is refused with packing: the mask between documents, which transformers makes of the positions, is dropped.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURE, "vocab_size": 32})).eval()
    assert model.config._attn_implementation == "sdpa"
    places = torch.arange(8).repeat(2)[None]
    packs = torch.randint(0, 32, (1, 16)).repeat(2, 1)
    packs[1, :8] = torch.randint(0, 32, (8,))  # another first document before the same second one

    def second_documents():
        with torch.no_grad():
            return [model(input_ids=pack[None], position_ids=places, use_cache=False).logits[0, 8:] for pack in packs]

    apart = second_documents()
    torch.testing.assert_close(apart[0], apart[1])
    _attach_context_parallel_hooks(model)
    together = second_documents()
    assert (together[0] - together[1]).abs().max() > 0.1

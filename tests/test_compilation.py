"""Compiled layers compute what they computed, are compiled once for all packs and layers, and leave no trace in files.

Most of these compile with backends that need no compiler: dynamo's tracing, which decides what is compiled again, is
the same for all.
"""

import logging
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from config.schema import TrainingConfig
from src import compilation
from src.activations import recompute_activations
from src.compilation import (
    PAYING_MICRO_BATCHES,
    check_compilation,
    compile_layers,
    compiles,
    decoder_layers,
    prove_compiled,
)
from src.generation import generate
from src.loss import SupervisedLoss
from src.packing import PackCollator
from tests.gpu_runs import BOUNDS, VOCABULARY, small_model, small_tokenizer
from utils.errors import UserError

FLAT = PackCollator(pad_token_id=0, flat=True, tells_longest=True)
PADDED = PackCollator(pad_token_id=0)
LENGTHS = ((7, 6), (50,), (29, 5, 3), (11, 13, 17, 19), (90, 2), (1, 2, 3, 4, 5), (31, 37), (64, 8, 24))
"""Tokens in the documents of packs: eight lengths, one to five documents, and longest ones of seven lengths."""
WARM_UP = 2
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++, which is not installed")


@pytest.fixture(autouse=True)
def fresh_compiler(caplog):
    """What another test compiled would serve this one, and what it set would hold."""
    caplog.set_level(logging.WARNING, "torch.__trace")  # else dynamo writes a record of all that it does for pytest
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def shallow(**settings):
    return small_model(num_hidden_layers=2, **settings)


def counting():
    """A backend that computes what it is given as it stands, and counts how often that was."""

    def compiled(graph, inputs):
        compiled.graphs += 1
        return graph.forward

    compiled.graphs = 0
    return compiled


def batches(collator=FLAT, rows=1):
    random = np.random.default_rng(1)
    for lengths in LENGTHS:
        ids = random.integers(3, VOCABULARY, size=sum(lengths))
        labels = np.where(np.arange(len(ids)) > 0, ids, -100)
        yield collator([{"input_ids": ids, "labels": labels, "lengths": np.array(lengths)}] * rows)


def loss_and_gradients(model, batch):
    """In one vector: the sum of the losses, and the gradient of all that trains."""
    model.zero_grad()
    total = SupervisedLoss(plain_elements=0)(model, batch).total
    total.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    return total.detach(), torch.cat(gradients)


def train_on(model, given, score=None):
    score = score or SupervisedLoss()
    for batch in given:
        score(model, batch).total.backward()


def check_once(model, backend, given):
    """Packs after the first two compile nothing."""
    given = list(given)
    train_on(model, given[:WARM_UP])
    graphs = backend.graphs
    assert graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        train_on(model, given[WARM_UP:])
    assert backend.graphs == graphs


@pytest.mark.parametrize(
    ("attention", "collator", "rows"), [("documents", FLAT, 1), ("documents", PADDED, 2), ("sdpa", PADDED, 3)]
)
def test_packs_of_other_lengths_and_numbers_of_documents_compile_nothing_more(attention, collator, rows):
    model, backend = shallow(attention=attention).train(), counting()
    compile_layers(model, backend=backend)
    check_once(model, backend, batches(collator, rows))


def test_layers_with_fixed_sizes_would_be_compiled_for_each_pack():
    model, backend = shallow(attention="documents").train(), counting()
    for layer in decoder_layers(model):
        layer.compile(backend=backend, dynamic=False)
    with pytest.raises(RuntimeError, match="recompile"):
        check_once(model, backend, batches())


@pytest.mark.slow
def test_all_layers_share_one_compilation():
    graphs = []
    for layers in (2, 5):
        torch.compiler.reset()
        model, backend = small_model(attention="documents", num_hidden_layers=layers).train(), counting()
        assert compile_layers(model, backend=backend) == layers
        train_on(model, batches())
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[1]


def test_layers_with_whole_attention_are_one_graph_also_where_activations_are_computed_again():
    for recomputes in (False, True):
        torch.compiler.reset()
        model, backend = shallow(attention="sdpa").train(), counting()
        if recomputes:
            recompute_activations(model)
        score, [first, *_] = SupervisedLoss(), list(batches(PADDED, 2))
        with torch.compiler.set_stance("force_eager"):
            score(model, first)  # the loss learns what the model does to logits, in evaluation mode
        compile_layers(model, backend=backend)
        score(model, first).total.backward()
        assert backend.graphs == 1


@pytest.mark.parametrize(
    "backend", [pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=NEEDS_COMPILER)]
)
def test_losses_and_gradients_are_those_of_layers_that_are_not_compiled(backend):
    model = shallow(attention="documents").train()
    given = list(batches())[:3]
    expected = [loss_and_gradients(model, batch) for batch in given]
    keys = list(model.state_dict())
    compile_layers(model, backend=backend)
    assert list(model.state_dict()) == keys
    for batch, (loss, gradient) in zip(given, expected, strict=True):
        own_loss, own_gradient = loss_and_gradients(model, batch)
        # Fused sums run in another order: 24 bits leave 1e-6 after some hundred terms. A gradient was off by 1.7e-6.
        bound, gradient_bound = BOUNDS["float32"]
        assert abs(own_loss / loss - 1) <= bound
        assert (own_gradient - gradient).norm() <= gradient_bound * gradient.norm()


def test_a_saved_model_loads_as_if_it_had_not_been_compiled(tmp_path):
    model, backend = shallow(attention="documents").train(), counting()
    compile_layers(model, backend=backend)
    train_on(model, list(batches())[:1])
    assert backend.graphs
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.slow
def test_an_adapter_trains_through_compiled_layers_and_is_saved_under_its_own_names(tmp_path):
    settings = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    model = get_peft_model(shallow(attention="documents"), settings).train()
    names, backend = list(model.state_dict()), counting()
    [batch] = list(batches())[:1]
    loss, gradient = loss_and_gradients(model, batch)
    compile_layers(model, backend=backend)
    check_once(model, backend, batches())
    own_loss, own_gradient = loss_and_gradients(model, batch)
    torch.testing.assert_close(own_loss, loss)
    assert (own_gradient - gradient).norm() <= 1e-6 * gradient.norm()  # the same sums in the same order
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_generation_between_steps_compiles_nothing():
    model, backend = shallow(attention="documents").train(), counting()
    prompts = ["t5 t6 t7", "t9", "t11 t12 t13 t14 t15"]
    options = {"max_new_tokens": 6, "special_tokens_in_prompts": True}
    model.generation_config.eos_token_id = 2
    expected = generate(model, small_tokenizer(), prompts, **options)
    compile_layers(model, backend=backend)
    assert generate(model, small_tokenizer(), prompts, **options) == expected
    assert backend.graphs == 0
    train_on(model, list(batches())[:1])
    assert backend.graphs > 0


@pytest.mark.slow
def test_evaluation_compiles_once_more_and_not_for_each_length():
    model, backend = shallow(attention="documents").train(), counting()
    compile_layers(model, backend=backend)
    train_on(model, list(batches())[:WARM_UP])
    model.eval()
    score, given = SupervisedLoss(), list(batches(PADDED, 4))
    with torch.no_grad():
        for batch in given[:WARM_UP]:
            score(model, batch)
        graphs = backend.graphs
        for batch in given[WARM_UP:]:
            score(model, batch)
    assert backend.graphs == graphs


def test_the_proof_finds_layers_that_compute_something_else():
    model = shallow(attention="sdpa").train()
    compile_layers(model, backend=lambda graph, inputs: lambda *args: [1.01 * out for out in graph.forward(*args)])
    with pytest.raises(UserError, match=r"compute something else.*training.compile=off"):
        prove_compiled(model, SupervisedLoss(), PADDED)


def test_the_proof_finds_layers_that_are_compiled_for_each_pack():
    model = shallow(attention="documents").train()
    for layer in decoder_layers(model):
        layer.compile(backend=counting(), dynamic=False)
    with pytest.raises(UserError, match=r"once for all packs.*training.compile=off"):
        prove_compiled(model, SupervisedLoss(), FLAT)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_proof_leaves_mode_gradients_and_random_state_as_they_are(dropout):
    model, backend = shallow(attention="documents", attention_dropout=dropout).train(), counting()
    compile_layers(model, backend=backend)
    state, score = torch.random.get_rng_state(), SupervisedLoss()
    prove_compiled(model, score, FLAT)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    if dropout == 0:
        with torch.compiler.set_stance("fail_on_recompile"):
            train_on(model, batches(), score)


def test_a_model_without_layers_of_transformers_is_refused():
    with pytest.raises(UserError, match="no layers in Linear"):
        compile_layers(torch.nn.Linear(2, 2))


def test_on_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler no-such-compiler; install it .*training.compile=off"):
        check_compilation(TrainingConfig(compile="on"), "cpu")
    check_compilation(TrainingConfig(compile="auto"), "cpu")


def test_on_needs_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton is not installed"):
        check_compilation(TrainingConfig(compile="on"), "cuda")
    assert not compiles("auto", "cuda", micro_batches=PAYING_MICRO_BATCHES)


def test_on_is_refused_where_it_would_do_nothing():
    with pytest.raises(UserError, match=r"no effect on a CPU with training.gradient_checkpointing"):
        check_compilation(TrainingConfig(compile="on", gradient_checkpointing="full"), "cpu")
    with pytest.raises(UserError, match=r"does not go with training.gradient_checkpointing=selective"):
        check_compilation(TrainingConfig(compile="on", gradient_checkpointing="selective"), "cuda")


def test_on_is_refused_for_sharded_weights(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="sharded over processes"):
        check_compilation(TrainingConfig(compile="on"), "cpu")


def test_auto_compiles_long_runs_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(compilation, "_obstacle", lambda device: None)
    assert compiles("auto", "cuda", micro_batches=PAYING_MICRO_BATCHES)
    assert not compiles("auto", "cuda", micro_batches=PAYING_MICRO_BATCHES - 1)
    assert not compiles("auto", "cpu", micro_batches=10**6)
    assert compiles("on", "cpu", micro_batches=1)
    assert not compiles("off", "cuda", micro_batches=10**6)

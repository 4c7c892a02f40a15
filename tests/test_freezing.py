"""What trains of a model's own weights, and what that spares.

Shapes, as in `tests.test_frozen_weights`: N tokens, H the width, M within an MLP, V tokens in the vocabulary.
"""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from config.schema import FreezeConfig, OptimConfig
from src.activations import recompute_activations
from src.freezing import KINDS, freeze_table, freeze_weights, kinds_of_weights, state_bytes, weights_to_train
from src.optim import MuonWithAdamW, muon_with_adamw
from tests.test_frozen_weights import HEAD, KEYS, LAYERS, H, M, N, V, backward_operations, llama
from tests.tiny_run import assert_same_run, run_train, stop_after, two_epochs, weights_of
from utils.distributed import leave_group
from utils.errors import UserError

OPTIM = OptimConfig()
LAST = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip


def frozen_llama(**freeze):
    model = llama()
    freeze_weights(model, FreezeConfig(**freeze), OPTIM)
    return model.train()


def trained(model, **freeze):
    freeze_weights(model, FreezeConfig(**freeze), OPTIM)
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_by_default_everything_trains():
    model = llama()
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_each_choice_trains_the_weights_that_it_names():
    everything = {name for name, _ in llama().named_parameters()}
    norms = {"model.norm.weight"} | {
        f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in LAST if name.endswith("norm")
    }
    assert trained(llama(), train=("norms",)) == norms
    assert trained(llama(), train=("all_but_embeddings",)) == everything - {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    last = {f"model.layers.{LAYERS - 1}.{name}.weight" for name in LAST} | {"model.norm.weight"}
    assert trained(llama(), last_layers=1) == last
    assert trained(llama(), last_layers=1, train=("lm_head.*",)) == last | {"lm_head.weight"}
    first = {f"model.layers.0.{name}.weight" for name in LAST if not name.startswith("mlp")}
    assert trained(llama(), train=("lm_head.*", "*.layers.0.*"), frozen=("*.layers.0.mlp.*",)) == first | {
        "lm_head.weight"
    }


def test_a_tied_head_goes_by_either_name_and_trains_with_the_embeddings_alone():
    settings = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tied = GPT2LMHeadModel(GPT2Config(**settings))
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert weights_to_train(tied, FreezeConfig(train=(name,))) == {"transformer.wte.weight"}
    # GPT-2 has learned places too, and norms with biases; its layers are named otherwise.
    rest = weights_to_train(tied, FreezeConfig(train=("all_but_embeddings",)))
    everything = {name for name, _ in tied.named_parameters()}
    assert everything - rest == {"transformer.wte.weight", "transformer.wpe.weight"}
    last = weights_to_train(tied, FreezeConfig(last_layers=1))
    assert {name for name in everything if "h.1." in name or "ln_f" in name} == last


def test_norms_within_attention_count_as_norms():
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, head_dim=8)
    )  # fmt: skip
    kinds = kinds_of_weights(model)
    assert kinds["model.layers.0.self_attn.q_norm.weight"] == "norms"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "attention"
    assert kinds["lm_head.weight"] == "head"
    assert set(kinds.values()) <= set(KINDS)


def test_a_pattern_that_matches_nothing_is_an_error_with_names_near_it():
    with pytest.raises(UserError, match=r"freeze.train has 'lm_haed.weight'.*lm_head.weight"):
        frozen_llama(train=("lm_haed.weight",))
    with pytest.raises(UserError, match=r"freeze.train has 'norm', .* norms"):
        frozen_llama(train=("norm",))
    with pytest.raises(UserError, match=r"freeze.frozen has 'layers.0', which matches no parameter"):
        frozen_llama(frozen=("layers.0",))
    with pytest.raises(UserError, match=f"freeze.last_layers=9 exceeds the {LAYERS} layers"):
        frozen_llama(train="last_layers", last_layers=9)
    with pytest.raises(UserError, match="leaves nothing"):
        frozen_llama(frozen=("*",))


# By hand, 2 operations a token and weight. q and o are H x H, k and v H x KEYS, gate, up and down H x M; each of the
# last layer's weights gets its gradient, and all but q, k and v, below which nothing trains but the layer's own first
# norm, lead on to it. The head's weight gets none.
LAYER = 2 * H * H + 2 * H * KEYS + 3 * H * M
LAST_LAYER = HEAD + 2 * N * LAYER * 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_backward_pass_ends_at_the_lowest_layer_that_trains(wrapped, tmp_path):
    model = frozen_llama(last_layers=1)
    if not wrapped:
        assert backward_operations(model) == LAST_LAYER
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert backward_operations(DistributedDataParallel(model)) == LAST_LAYER
    finally:
        leave_group()


def test_a_frozen_heads_weight_gets_no_product_in_chunks_either():
    model = frozen_llama(last_layers=1)
    assert backward_operations(model, elements=0) == LAST_LAYER - HEAD  # done with the loss
    assert model.lm_head.weight.grad is None


def test_recomputing_leaves_out_frozen_layers_below():
    model = llama()
    recompute_activations(model)
    freeze_weights(model, FreezeConfig(last_layers=1), OPTIM)
    # The last layer again, but for its last product, whose result nothing in the backward pass needs.
    again = 2 * N * (LAYER - H * M)
    assert backward_operations(model.train()) == LAST_LAYER + again


def test_the_table_counts_by_kind_and_says_what_is_saved():
    # float32 and AdamW: 4 bytes of gradient and 8 of state for each weight that does not train.
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4)
    )
    freeze_weights(model, FreezeConfig(train=("norms",)), OPTIM)
    rows = {line.split()[0]: line.split()[1:] for line in freeze_table(model, OPTIM)[1:]}
    assert rows["embeddings"] == rows["head"] == ["0", "262,144", "3.0"]
    assert rows["attention"] == ["0", "262,144", "3.0"]
    assert rows["MLP"] == ["0", "393,216", "4.5"]
    assert rows["norms"] == ["768", "0", "0.0"]
    assert rows["all"] == ["768", "1,179,648", "13.5"]
    lines = freeze_table(model, OptimConfig(name="adafactor"))
    assert "without the state of adafactor" in lines[0]
    assert lines[-1].split()[-1] == "4.5"  # gradients


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "rmsprop", "adagrad", "muon"])
def test_state_is_as_large_as_the_optimizer_makes_it(name):
    model = llama()
    if name == "muon":
        optimizer = muon_with_adamw(model, OptimConfig(name="muon"))
    else:
        kind = {"adamw_torch": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad"}[name]
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    model(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    optimizer.step()
    kinds = kinds_of_weights(model)
    for parameter, weight in model.named_parameters():
        kept = [part for part in optimizer.state[weight].values() if isinstance(part, torch.Tensor) and part.ndim]
        found = sum(part.numel() * part.element_size() for part in kept)
        assert state_bytes(weight, name, kind=kinds[parameter]) == found, parameter


def test_muon_trains_the_matrices_that_are_left():
    optimizer = muon_with_adamw(frozen_llama(last_layers=1), OptimConfig(name="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    assert [len(group["params"]) for group in optimizer.param_groups] == [7, 0, 3]


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "muon"])
def test_a_run_changes_what_trains_alone_and_goes_on_exactly(tmp_path, optimizer):
    freeze = {"last_layers": 1, "train": ["lm_head.weight"]}
    optim = {"name": optimizer, "learning_rate": 3e-3}
    recipe = two_epochs(tmp_path, "full", freeze=freeze, optim=optim, training={"gradient_checkpointing": "full"})
    for name in ("whole", "cut"):
        done = run_train("--config", recipe, "--output.name", name)
        assert done.code == 0, done.stderr
    assert "MiB saved" in done.stderr
    outputs = tmp_path / "outputs"
    card = (outputs / "whole" / "README.md").read_text()
    assert "of the weights, the last 1 layers, lm_head.weight train" in card
    before, after = (weights_of(outputs / "whole" / part) for part in ("checkpoint-2", "model"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.1.{name}.weight" for name in LAST} | {"model.norm.weight", "lm_head.weight"}
    stop_after(outputs / "cut", 4)
    done = run_train("--config", recipe, "--output.name", "cut", "--resume")
    assert done.code == 0, done.stderr
    assert_same_run(outputs / "whole", outputs / "cut")

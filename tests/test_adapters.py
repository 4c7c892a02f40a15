"""What trains beside frozen weights, and that it loads again."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from config.schema import AdapterConfig, ModelConfig
from src.adapters import add_adapter, count_parameters
from src.generation import load_for_generation
from src.model import load_model, load_settings, load_tokenizer
from tests.tiny_run import ARCHITECTURE, from_checkpoint, run_train, weights_of, write_checkpoint, write_recipe
from utils.errors import UserError

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def tiny_llama():
    torch.manual_seed(0)
    shape = {key: value for key, value in ARCHITECTURE.items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))


def trained_modules(model):
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}


def test_without_an_adapter_every_weight_trains():
    model = tiny_llama()
    assert add_adapter(model, AdapterConfig()) is model
    counts = count_parameters(model)
    assert counts["trainable"] == counts["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_all_linear_takes_every_linear_layer_but_the_head():
    assert trained_modules(add_adapter(tiny_llama(), AdapterConfig(kind="lora"))) == LINEAR


@pytest.mark.parametrize(
    "name", ["lm_head", "embed_tokens", "q_proj", "self_attn.q_proj", "model.layers.1.mlp.up_proj"]
)
def test_any_module_can_be_named_by_the_end_of_its_name(name):
    model = add_adapter(tiny_llama(), AdapterConfig(kind="lora", target_modules=(name,)))
    trained = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(name in parameter for parameter in trained)


def test_parameters_are_counted_by_hand():
    # q and o: 32 x 32; k and v: 16 x 32; gate, up and down: 64 x 32; rank 4 takes 4 x (inputs + outputs) each.
    per_layer = 4 * (2 * 64 + 2 * 48 + 3 * 96)
    model = tiny_llama()
    before = sum(parameter.numel() for parameter in model.parameters())
    counts = count_parameters(add_adapter(model, AdapterConfig(kind="lora", rank=4)))
    assert counts == {"trainable": 2 * per_layer, "total": before + 2 * per_layer}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_the_update_is_scaled_by_alpha_and_rank(rslora, scale):
    config = AdapterConfig(kind="lora", rank=4, alpha=8.0, rslora=rslora, target_modules=("q_proj",))
    model = add_adapter(tiny_llama(), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    inputs = torch.randn(3, 32)
    update = inputs @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(inputs) - layer.base_layer(inputs), scale * update, rtol=1e-4, atol=1e-4)


def test_a_name_that_is_only_part_of_one_does_not_match():
    with pytest.raises(UserError, match="'proj', which matches no module"):
        add_adapter(tiny_llama(), AdapterConfig(kind="lora", target_modules=("proj",)))
    with pytest.raises(UserError, match="'head', which matches no module"):
        add_adapter(tiny_llama(), AdapterConfig(kind="lora", modules_to_save=("head",)))


def test_modules_to_save_are_trained_and_saved_whole(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320)
    adapter = {"kind": "lora", "rank": 2, "modules_to_save": ["lm_head"]}
    done = run_train("--config", write_recipe(tmp_path, model=from_checkpoint(checkpoint), adapter=adapter))
    assert done.code == 0, done.stderr
    folder = tmp_path / "outputs" / "run" / "model"
    head = next(tensor for name, tensor in weights_of(folder).items() if "lm_head" in name)
    base = weights_of(checkpoint)["lm_head.weight"]
    assert head.shape == base.shape
    assert not torch.equal(head, base)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, head)


def test_an_adapter_leaves_its_base_as_it_was_and_loads_in_any_way(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320)  # room for a padding token
    recipe = write_recipe(tmp_path, model=from_checkpoint(checkpoint), adapter={"kind": "lora", "rank": 2})
    before = weights_of(checkpoint)
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert "grow" not in done.stderr
    folder = tmp_path / "outputs" / "run" / "model"
    assert all("lora_" in name for name in weights_of(folder))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(checkpoint).items())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [
            model(ids).logits
            for model in (
                AutoPeftModelForCausalLM.from_pretrained(folder),
                AutoModelForCausalLM.from_pretrained(folder),
                load_for_generation(str(folder))[0].cpu(),
                AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload(),
            )
        ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    torch.testing.assert_close(logits[0], logits[3], rtol=1e-4, atol=1e-4)  # merged, sums run in another order


def test_an_adapter_with_tokens_new_to_its_base_loads_and_tells_its_cost(tmp_path):
    recipe = write_recipe(
        tmp_path, model=from_checkpoint(write_checkpoint(tmp_path / "base")), adapter={"kind": "lora", "rank": 2}
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert "warning: the adapter will hold the grown embeddings whole" in done.stderr
    folder = tmp_path / "outputs" / "run" / "model"
    model, tokenizer = load_for_generation(str(folder))
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    saved = weights_of(folder)
    loaded = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(loaded[name].cpu(), tensor) for name, tensor in saved.items())


def lora_gradients(model, ids):
    """The gradients of all LoRA matrices as one vector, with B drawn so that those of A are not zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.zero_grad()
    model.train()
    model(ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten().float() for name, p in model.named_parameters() if "lora_" in name])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_gradients_beside_quantized_weights_are_those_of_their_values_even_after_an_evaluation(tmp_path, kind):
    checkpoint = write_checkpoint(tmp_path, vocabulary=320, hidden_size=64, intermediate_size=128)
    config = ModelConfig(path=str(checkpoint), quantization=kind)
    tokenizer = load_tokenizer(config)
    models = [load_model(config, load_settings(config, tokenizer), tokenizer, trains_all=False) for _ in range(2)]
    models[1] = models[1].dequantize().float()
    quantized, plain = (add_adapter(model, AdapterConfig(kind="lora", rank=2)) for model in models)
    ids = torch.arange(3, 40)[None].to(quantized.device)
    expected = lora_gradients(plain, ids.to(plain.device)).to(ids.device)
    quantized.eval()
    with torch.no_grad():
        quantized(ids)
    # Products in bfloat16 keep 8 bits; a gradient that is lost on its way leaves a similarity below 0.3.
    assert torch.cosine_similarity(lora_gradients(quantized, ids), expected, dim=0) > 0.99


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_adapter_trains_beside_four_bit_weights_without_a_gpu(tmp_path, kind):
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320, hidden_size=64, intermediate_size=128)
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(checkpoint, quantization=kind),
        adapter={"kind": "lora", "rank": 2},
        evaluation={"samples": 0},
    )
    done = run_train("--config", recipe, "--optim.learning_rate", "1e-2")
    assert done.code == 0, done.stderr
    result = tmp_path / "outputs" / "run"
    lines = [line for line in (result / "metrics.jsonl").read_text().splitlines() if '"eval_loss"' in line]
    assert len(lines) == 2
    model = AutoPeftModelForCausalLM.from_pretrained(result / "model")
    learned = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert all(parameter.abs().max() > 0 for parameter in learned)

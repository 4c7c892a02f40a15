"""What trains beside frozen weights, and that it loads again."""

import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

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


def test_a_method_without_rows_that_train_tells_what_tokens_new_to_its_base_cost(tmp_path):
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(write_checkpoint(tmp_path / "base")),
        adapter={"kind": "oft", "settings": {"oft_block_size": 8}},
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


# Where an adapter goes


def target_layers(model):
    found = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in found}


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        (("layers.*.mlp.*_proj",), None, {
            f"model.layers.{n}.mlp.{m}_proj" for n in (0, 1) for m in ("gate", "up", "down")}),
        (("self_attn.[qv]_proj",), None, None),
        (("*.1.*.q_proj",), None, {"model.layers.1.self_attn.q_proj"}),
        (("q_proj", "lm_head"), "last 1", {"model.layers.1.self_attn.q_proj", "lm_head"}),
        (("q_proj",), "0", {"model.layers.0.self_attn.q_proj"}),
        (("q_proj",), "1-", {"model.layers.1.self_attn.q_proj"}),
        (("all-linear",), "0-0", {f"model.layers.0.{part}" for part in (
            *(f"self_attn.{m}_proj" for m in "qkvo"), *(f"mlp.{m}_proj" for m in ("gate", "up", "down")))}),
    ],
)  # fmt: skip
def test_patterns_and_layers_choose_the_modules(targets, layers, expected):
    config = AdapterConfig(kind="lora", rank=2, target_modules=targets, layers=layers)
    if expected is None:  # brackets are no pattern
        with pytest.raises(UserError, match="which matches no module"):
            add_adapter(tiny_llama(), config)
        return
    assert target_layers(add_adapter(tiny_llama(), config)) == expected


@pytest.mark.parametrize(
    ("targets", "layers", "told"),
    [
        (("q_proj",), "2", "adapter.layers=2 does not suit a model of 2 layers, 0 to 1"),
        (("q_proj",), "last 3", "last 3 does not suit a model of 2 layers"),
        (("layers.1.mlp.up_proj",), "0", "but none in adapter.layers=0; it stands in layers 1"),
    ],
)
def test_layers_that_are_not_there_are_named(targets, layers, told):
    with pytest.raises(UserError, match=told):
        add_adapter(tiny_llama(), AdapterConfig(kind="lora", target_modules=targets, layers=layers))


def test_experts_that_are_one_parameter_get_lora_matrices(tmp_path):
    torch.manual_seed(0)
    settings = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(settings)
    model.save_pretrained(tmp_path / "base")
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    config = AdapterConfig(kind="lora", rank=2, target_modules=("q_proj",), target_parameters=names)
    adapted = add_adapter(MixtralForCausalLM.from_pretrained(tmp_path / "base"), config)
    assert any("experts" in name for name in target_layers(adapted))
    ids = torch.arange(20)[None]
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, adapted.eval()(ids).logits)
        assert not torch.allclose(adapted(ids).logits, model.eval()(ids).logits, atol=1e-2)
    with pytest.raises(UserError, match=r"has 'experts.gate', which matches no parameter"):
        add_adapter(model, AdapterConfig(kind="lora", target_parameters=("experts.gate",)))


def tied_checkpoint(folder):
    return write_checkpoint(folder, vocabulary=320, tie_word_embeddings=True)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_one_side_of_a_tie_trains_with_the_other_or_not_at_all(tmp_path, name):
    checkpoint = tied_checkpoint(tmp_path / "base")
    with pytest.raises(UserError, match=f"adapter.target_modules has {name}, and LlamaForCausalLM uses one weight"):
        add_adapter(
            AutoModelForCausalLM.from_pretrained(checkpoint), AdapterConfig(kind="lora", target_modules=(name,))
        )
    adapter = {"kind": "lora", "rank": 2, "modules_to_save": [name]}
    done = run_train("--config", write_recipe(tmp_path, model=from_checkpoint(checkpoint), adapter=adapter))
    assert done.code == 0, done.stderr
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "outputs" / "run" / "model")
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = inputs.modules_to_save["default"].weight
    assert torch.equal(trained, head.modules_to_save["default"].weight)
    assert not torch.equal(trained, weights_of(checkpoint)["model.embed_tokens.weight"])


# Rows of tokens


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_named_tokens_train_and_no_others(tmp_path, tied):
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320, tie_word_embeddings=tied)
    words = load_tokenizer(ModelConfig(path=str(checkpoint)))
    token = words.convert_ids_to_tokens(words("count", add_special_tokens=False)["input_ids"][0])
    adapter = {"kind": "lora", "rank": 2, "trainable_tokens": [token]}
    done = run_train("--config", write_recipe(tmp_path, model=from_checkpoint(checkpoint), adapter=adapter))
    assert done.code == 0, done.stderr
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "outputs" / "run" / "model").merge_and_unload()
    before, row = weights_of(checkpoint), words.convert_tokens_to_ids(token)
    for name, after in (
        ("model.embed_tokens.weight", model.get_input_embeddings().weight),
        ("lm_head.weight", model.get_output_embeddings().weight),
    ):
        old = before["model.embed_tokens.weight" if tied else name]
        assert (after != old).any(dim=1).nonzero()[:, 0].tolist() == [row]
    with pytest.raises(UserError, match="'no such', which is no token of the tokenizer"):
        add_adapter(tiny_llama(), AdapterConfig(kind="lora", trainable_tokens=("no such",)), tokenizer=words)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_a_run_adds_train_and_its_adapter_loads_as_its_card_says(tmp_path, tied):
    checkpoint = write_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(checkpoint, special_tokens={"eos_token": "<|done|>"}),
        adapter={"kind": "lora", "rank": 2},
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert "do not train" not in done.stderr
    run = tmp_path / "outputs" / "run"
    rows = weights_of(checkpoint)["model.embed_tokens.weight"].shape[0]
    saved = weights_of(run / "model")
    assert all("lora_" in name or "trainable_tokens" in name for name in saved)  # no embeddings as a whole
    deltas = {name: tensor for name, tensor in saved.items() if "trainable_tokens" in name}
    assert [len(tensor) for tensor in deltas.values()] == [2] * (1 if tied else 2)  # the padding and the new eos token
    code = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)[1]
    code = code[: code.index("inputs =")].replace('"base"', repr(str(checkpoint)))
    names = {}
    exec(re.sub(r'location = ".*"', f"location = {str(run / 'model')!r}", code), names)  # what a reader of it runs
    model, tokenizer = load_for_generation(str(run / "model"))
    assert len(tokenizer) == rows + 2
    ids = torch.arange(rows + 2)[None]  # the new rows too
    with torch.no_grad():
        logits = model.cpu().eval()(ids).logits
        assert torch.equal(names["model"].eval()(ids).logits, logits)
    # Its last checkpoint holds what the run had in memory, the grown embeddings whole.
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    base.resize_token_embeddings(rows + 2)
    whole = PeftModel.from_pretrained(base, run / "checkpoint-4").eval()
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, logits)

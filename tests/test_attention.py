"""Attention keeps documents apart, and is what eager attention computes for each document alone."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
    SmolLM3Config,
)

from src import kernels
from src.activations import recompute_activations
from src.attention import DOCUMENTS, UnknownArgumentError, attend_documents, border_arguments, register_documents
from src.attention_choice import check_documents_apart, prove_attention, takes_borders, use_attention
from src.kernels import attend_fused, attend_plainly
from tests.tiny_run import ARCHITECTURE, run_train, write_recipe
from utils.errors import UserError

VOCABULARY, WINDOW = 97, 8
LENGTHS = (19, 5, 30, 1)
CPU = torch.device("cpu")

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that attention matters
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = SHAPE | {"head_dim": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE),
    "smollm3": SmolLM3Config(**SHAPE),
    "qwen3": Qwen3Config(**HEADS),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2, soft-capped, window": Gemma2Config(**HEADS, sliding_window=WINDOW, attn_logit_softcapping=5.0),
    "gemma3, window": Gemma3TextConfig(**HEADS, sliding_window=WINDOW),
    "gpt-oss, sinks, window": GptOssConfig(**HEADS, **EXPERTS, sliding_window=WINDOW),
    "gpt2": GPT2Config(**GPT2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
every_architecture = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)


class Warnings(logging.Handler):
    """Messages of the module that chooses attention, whatever other tests have done to logging."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.told = []

    def emit(self, record):
        self.told.append(record.getMessage())


@pytest.fixture
def told():
    handler, logger = Warnings(), logging.getLogger("smolfactory.src.attention_choice")
    logger.addHandler(handler)
    yield handler.told
    logger.removeHandler(handler)


def eager_and_documents(config):
    """One model twice: with eager attention on a config of its own, and with attention in documents."""
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    model.load_state_dict(eager.state_dict())
    use_attention(model, "auto")
    assert (eager.config._attn_implementation, model.config._attn_implementation) == ("eager", DOCUMENTS)
    return eager, model


def documents_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in lengths]


def packed(documents, lengths=None):
    """A model's arguments for documents end to end, with the borders of `lengths`, by default their own."""
    own = [document.shape[1] for document in documents]
    lengths = lengths or own
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in own])[None]
    return {"input_ids": torch.cat(documents, dim=1), "position_ids": places, "use_cache": False} | border_arguments(
        borders, max(lengths)
    )


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def gradient_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def alone(model, documents):
    return torch.cat([model(input_ids=document, use_cache=False).logits[0] for document in documents])


@every_architecture
def test_a_pack_has_the_logits_and_gradients_of_each_document_alone(config):
    eager, model = eager_and_documents(config)
    documents = documents_of(LENGTHS)
    weights = torch.randn(sum(LENGTHS), VOCABULARY, generator=torch.Generator().manual_seed(1))
    expected, found = alone(eager, documents), model(**packed(documents)).logits[0]
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert difference(found, expected) <= 1e-5
    assert difference(gradient_of(model), gradient_of(eager)) <= 1e-5
    with torch.no_grad():
        wrong = model(**packed(documents, lengths=(24, 31))).logits[0]
    assert difference(wrong, expected) > 1e-2, "a border in a wrong place must be seen"


@every_architecture
def test_documents_inside_padded_rows_are_kept_apart(config):
    eager, model = eager_and_documents(config)
    rows = [documents_of((19, 5), seed=1), documents_of((30,), seed=2)]  # 24 tokens, padded to 30, and 30
    ids = torch.zeros(2, 30, dtype=torch.int64)
    ids[0, :24], ids[1] = torch.cat(rows[0], dim=1)[0], rows[1][0][0]
    places = torch.stack([torch.cat([torch.arange(19), torch.arange(11)]), torch.arange(30)])
    borders = border_arguments(torch.tensor([0, 19, 30, 60], dtype=torch.int32), 30)
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=places, use_cache=False, **borders).logits
        assert difference(found[0, :24], alone(eager, rows[0])) <= 1e-5
        assert difference(found[1], alone(eager, rows[1])) <= 1e-5


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_with_a_mask_are_those_of_eager_attention(config, side):
    eager, model = eager_and_documents(config)
    ids = torch.cat(documents_of((20, 20)))
    mask = torch.ones_like(ids)
    mask[0, slice(None, 9) if side == "left" else slice(-9, None)] = 0
    with torch.no_grad():
        found, expected = (each(input_ids=ids, attention_mask=mask).logits for each in (model, eager))
    assert difference(found[mask.bool()], expected[mask.bool()]) <= 1e-5


@every_architecture
@pytest.mark.parametrize("padded", [True, False])
def test_greedy_generation_is_that_of_eager_attention(config, padded):
    eager, model = eager_and_documents(config)
    ids = torch.cat(documents_of((12, 12)))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :5], mask[0, :5] = 0, 0
    # Past the window of 8, so that the cache drops what a token no longer sees.
    settings = GenerationConfig(max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
    outs = [
        each.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            output_scores=True,
            return_dict_in_generate=1,
        )
        for each in (model, eager)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    # Equal tokens of a random model might repeat one token whatever attention does; scores do not.
    torch.testing.assert_close(torch.stack(outs[0].scores), torch.stack(outs[1].scores), rtol=1e-3, atol=1e-3)


def test_borders_come_from_positions_where_none_are_given():
    eager, model = eager_and_documents(ARCHITECTURES["llama"])
    documents = documents_of(LENGTHS)
    arguments = {name: value for name, value in packed(documents).items() if name in ("input_ids", "position_ids")}
    with torch.no_grad():
        assert difference(model(**arguments, use_cache=False).logits[0], alone(eager, documents)) <= 1e-5


def test_borders_that_are_not_those_of_the_rows_are_refused():
    _, model = eager_and_documents(ARCHITECTURES["llama"])
    for lengths in ((19, 5), (55, 55)):
        with pytest.raises(ValueError, match="do not part 1 rows of 55 tokens"):
            model(**packed(documents_of(LENGTHS), lengths=lengths))


def test_chunks_that_no_kernel_knows_are_left_to_a_mask():
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1}
    config = Llama4TextConfig(**HEADS, **experts, attention_chunk_size=WINDOW)
    eager, model = eager_and_documents(config)
    documents = documents_of((19,))
    with torch.no_grad():
        assert difference(model(**packed(documents)).logits[0], alone(eager, documents)) <= 1e-5


def attention_inputs(tokens=12, heads=4, kv_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, number, tokens, size, generator=generator) for number in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("argument", [{"position_bias": torch.zeros(1)}, {"output_attentions": True}, {"sinks": 1.0}])
def test_an_argument_that_no_kernel_knows_is_an_error(argument):
    module = torch.nn.Module()
    attend_documents(module, *attention_inputs(), **dict.fromkeys(argument), use_cache=False)
    with pytest.raises(UnknownArgumentError, match=f"gives its attention {next(iter(argument))}"):
        attend_documents(module, *attention_inputs(), **argument)


@pytest.mark.parametrize("window", [None, 1, 7, 700])
@pytest.mark.parametrize("length", [513, 1100])
def test_long_documents_in_blocks_are_those_of_one_mask(length, window):
    query, key, value = (tensor.double() for tensor in attention_inputs(length))
    ages = torch.arange(length)[:, None] - torch.arange(length)
    sees = (ages >= 0) & (ages < (window or length))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1), attn_mask=sees, scale=0.3
    )
    for attend in (attend_fused, attend_plainly):
        found = attend(query, key, value, causal=True, window=window, dropout=0.0, scale=0.3)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_drops_weights_and_keeps_their_mean(softcap):
    query, key, value = attention_inputs()
    options = {"causal": True, "window": None, "scale": 0.3} | ({"softcap": softcap} if softcap else {})
    attend = attend_plainly if softcap else attend_fused
    torch.manual_seed(0)
    found = torch.stack([attend(query, key, value, dropout=0.5, **options) for _ in range(4000)])
    assert difference(found[0], found[1]) > 0.1
    # 4,000 draws leave 1/63 of the deviation of a single one, which is about that of the values.
    torch.testing.assert_close(found.mean(dim=0), attend(query, key, value, dropout=0.0, **options), rtol=0, atol=0.15)


def test_sinks_take_probability():
    query, key, value = attention_inputs()
    options = {"causal": True, "dropout": 0.0, "scale": 0.3}
    plain = attend_plainly(query, key, value, **options)
    none, all_of_it = (
        attend_plainly(query, key, value, sinks=torch.full((4,), logit), **options) for logit in (-1e4, 1e4)
    )
    torch.testing.assert_close(none, plain)
    assert all_of_it.abs().max() == 0


def test_the_borders_of_a_pack_are_told_by_the_trainer_where_they_are_taken():
    _, model = eager_and_documents(ARCHITECTURES["llama"])
    assert takes_borders(model)
    model.set_attn_implementation("sdpa")
    assert not takes_borders(model)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_recomputed_activations_and_lora_change_nothing(checkpointing):
    eager, model = eager_and_documents(ARCHITECTURES["llama"])
    documents = documents_of(LENGTHS)
    gradients = []
    for each in (eager, model):
        if checkpointing and each is model:
            recompute_activations(each)
        torch.manual_seed(3)
        adapted = get_peft_model(each, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
        batches = [packed(documents)] if each is model else [{"input_ids": document} for document in documents]
        for batch in batches:
            adapted(**batch).logits.square().sum().backward()
        gradients.append(gradient_of(adapted))
    assert difference(gradients[1], gradients[0]) <= 1e-5


def short_convolutions(spread=0.2):
    config = Lfm2Config(**(SHAPE | {"initializer_range": spread}), layer_types=["conv", "full_attention"])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("spread", [0.2, 0.01])  # small weights carry little, which rounding would explain
def test_an_architecture_that_carries_documents_into_each_other_is_not_packed(told, spread):
    model = short_convolutions(spread)
    use_attention(model, "auto")
    assert not prove_attention(model, "auto", packing=True, device=CPU, autocast=None)
    [warning] = told
    assert "rows do not share packs: documents of a pack see each other in Lfm2ForCausalLM" in warning
    assert "padded to its longest row" in warning
    assert model.training


def test_a_run_of_such_an_architecture_trains_one_document_a_row(tmp_path):
    own = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
    recipe = write_recipe(tmp_path, model={"architecture": ARCHITECTURE | own}, training={"max_steps": 1})
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    assert "warning: rows do not share packs" in done.stderr
    run = tmp_path / "outputs" / "run"
    assert json.loads((run / "result.json").read_text())["packing"] is False
    packs = json.loads((run / "data.json").read_text())["train_packs"]
    assert packs["packs"] == packs["rows"] > 1
    assert "| packing | no |" in (run / "README.md").read_text()


def test_an_attention_asked_for_by_name_that_cannot_keep_documents_apart_is_an_error():
    model = short_convolutions()
    use_attention(model, DOCUMENTS)
    with pytest.raises(UserError, match="documents of a pack see each other in Lfm2ForCausalLM with attention 'docum"):
        prove_attention(model, DOCUMENTS, packing=True, device=CPU, autocast=None)


def test_weights_that_are_not_finite_are_not_taken_for_documents_that_see_each_other():
    _, model = eager_and_documents(LlamaConfig(**SHAPE))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"are not finite, as \['model.layers.1.mlp.up_proj.weight'\] are not; load a"):
        check_documents_apart(model)


@every_architecture
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_probe_passes_what_keeps_documents_apart(config, autocast, told):
    _, model = eager_and_documents(config)
    assert prove_attention(model, "auto", packing=True, device=CPU, autocast=autocast)
    assert not prove_attention(model, "auto", packing=False, device=CPU, autocast=autocast)
    assert (model.config._attn_implementation, told) == (DOCUMENTS, [])


@pytest.mark.parametrize("attention", ["eager", "sdpa", DOCUMENTS])
def test_the_probe_passes_each_attention_of_llama(attention):
    _, model = eager_and_documents(ARCHITECTURES["llama"])
    model.set_attn_implementation(attention)
    check_documents_apart(model.train(), lengths=(40, 60))
    assert model.training


def test_an_attention_that_is_not_what_the_model_means_is_replaced(told, monkeypatch):
    # A kernel that loses the window, as one would that is never told of it.
    real = kernels.attend_fused
    monkeypatch.setattr(
        "src.attention.attend_fused", lambda *parts, window, **options: real(*parts, window=None, **options)
    )
    _, model = eager_and_documents(ARCHITECTURES["mistral, window"])
    assert prove_attention(model, "auto", packing=True, device=CPU, autocast=None)
    assert model.config._attn_implementation == "sdpa"
    [warning] = told
    assert "attention: sdpa instead of documents: attention 'documents' is not what MistralForCausalLM means" in warning


def test_an_attention_that_lets_documents_see_each_other_gives_way_to_one_that_does_not(told):
    # transformers gives the mask of gpt-oss no positions, so that only attention which is told borders keeps to them.
    _, model = eager_and_documents(ARCHITECTURES["gpt-oss, sinks, window"])
    model.set_attn_implementation("eager")
    assert prove_attention(model, "auto", packing=True, device=CPU, autocast=None)
    [warning] = told
    assert model.config._attn_implementation == DOCUMENTS
    assert "attention: documents instead of eager: documents of a pack see each other" in warning


def test_an_architecture_that_tells_its_attention_more_takes_transformers_own_choice(told):
    class Biased(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, position_bias=None if self.training else 0)

    torch.manual_seed(0)
    model = Biased(copy.deepcopy(ARCHITECTURES["llama"]))
    use_attention(model, "auto")
    assert prove_attention(model, "auto", packing=True, device=CPU, autocast=None)
    [warning] = told
    assert model.config._attn_implementation == "sdpa"
    assert "this model gives its attention position_bias" in warning


def test_the_saved_model_names_no_attention_of_this_project(tmp_path):
    _, model = eager_and_documents(ARCHITECTURES["llama"])
    model.save_pretrained(tmp_path)
    assert DOCUMENTS not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_registering_twice_does_no_harm():
    register_documents()
    register_documents()

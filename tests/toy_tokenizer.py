"""A small byte-level BPE tokenizer, trained in a blink, with the special tokens of a model family."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# bos, eos, other special tokens: from each model's published tokenizer_config.json
FAMILIES = {
    "HuggingFaceTB-SmolLM3-3B": (None, "<|im_end|>", ("<|im_start|>",)),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("<|begin_of_text|>", "<|im_end|>", ("<|im_start|>",)),
    "Qwen-Qwen2.5-7B-Instruct": (None, "<|im_end|>", ("<|im_start|>",)),
    "Qwen-Qwen3-0.6B": (None, "<|im_end|>", ("<|im_start|>",)),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "google-gemma-2-2b-it": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "meta-llama-Llama-3.1-8B-Instruct": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "meta-llama-Llama-3.2-3B-Instruct": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "microsoft-Phi-3.5-mini-instruct": ("<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    "mistralai-Mistral-Nemo-Instruct-2407": ("<s>", "</s>", ("[INST]", "[/INST]")),
    "openai-gpt-oss-120b": (
        "<|startoftext|>",
        "<|return|>",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
    ),
}


def toy_tokenizer(
    template: str | None = CHATML,
    *,
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    special: tuple[str, ...] = ("<|im_start|>",),
    adds_bos: bool = False,
    merges_from: str = "hello world, the cat sat on the mat\n\n what is the answer?",
) -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text survives; some merges come from `merges_from`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[token for token in dict.fromkeys((bos, eos, *special)) if token],
        show_progress=False,
    )
    backend.train_from_iterator([merges_from] * 3, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def family_tokenizer(name: str, **settings: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer with a model family's own stock template and special tokens; skips where that is absent."""
    path = SHARED / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"needs the stock template {path.name} of shared/data/chat_templates")
    bos, eos, special = FAMILIES[name]
    return toy_tokenizer(path.read_text(encoding="utf-8"), bos=bos, eos=eos, special=special, **settings)


def shared_file(name: str) -> Path:
    """A file of shared/data; skips where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs shared/data/{name}")
    return path

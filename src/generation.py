"""Text from a model.

answers = generate(model, tokenizer, ["<|im_start|>user\\nWhat is LoRA?<|im_end|>\\n..."], max_new_tokens=64)
"""

from collections.abc import Iterator, Sequence

import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from src.adapter_export import needed_beside
from src.adapter_paths import activate, put_beside
from src.alignment import supervised_spans
from src.chat import CALL_STOPS, ChatTemplate
from src.context import generation_length
from src.formats import Conversation
from src.refusal import Refusal
from src.tokenizer_check import check_ids
from utils.distributed import accelerator_name
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

QUESTION = {"role": "user", "content": "question"}
ANSWER = {"role": "assistant", "content": "answer"}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Oslo"}}, "id": "abcdefghi"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "result", "name": "look_up", "tool_call_id": "abcdefghi"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "city"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "weather", "parameters": CITY}}
PROBES = (
    Conversation((QUESTION, ANSWER), "answer"),
    Conversation((QUESTION, CALLING), "call", (TOOL,)),
    Conversation((QUESTION, {**CALLING, "content": "answer"}), "answer and call", (TOOL,)),
    Conversation((QUESTION, CALLING, RESULT, ANSWER), "answer to a result", (TOOL,)),
)
"""Conversations that end with each kind of turn."""


def load_for_generation(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model or adapter, and its tokenizer, on the device that this machine computes with.

    Args:
        source: a folder or a Hub id.
    Raises:
        UserError: there is no such model, or its tokenizer's class gives other ids than its file.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # peft, unlike transformers, also loads an adapter whose tokenizer has more tokens than its base.
        loader = AutoModelForCausalLM if find_adapter_config_file(source) is None else AutoPeftModelForCausalLM
        model = loader.from_pretrained(source, dtype="auto")
        if loader is AutoPeftModelForCausalLM:
            put_beside(model, needed_beside(source))
            activate(model)
    except (OSError, ValueError) as error:
        raise UserError(f"no model could be loaded from {source}: {error}") from error
    check_ids(tokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_stops(model, tokenizer)
    return model.to(accelerator_name()), tokenizer


def set_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation stop where it did, at the tokenizer's eos token and wherever its chat template ends a turn of the
    assistant, be it an answer or a call; and pad as the tokenizer does.
    """
    generation = model.generation_config or GenerationConfig()
    given = generation.eos_token_id
    stops = list(given) if isinstance(given, list) else [] if given is None else [given]
    if not all(type(stop) is int for stop in stops):
        raise UserError(f"the model's generation_config.json has eos_token_id={given!r}; give an id, or a list of some")
    stops += [tokenizer.eos_token_id, *_template_stops(tokenizer)]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    generation.pad_token_id = tokenizer.pad_token_id
    model.generation_config = generation
    settings = model.config.get_text_config()
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        settings.eos_token_id = tokenizer.eos_token_id  # else some Trainers do, and add it to `stops` once more


def _template_stops(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template ends the assistant's turns with, each turn the last message, as it is trained.

    A template also names tokens that it writes for tools of its own only; those that are known as such count too.
    """
    try:
        template = ChatTemplate.of(tokenizer)
    except UserError:
        return []
    stops = []
    for chat in supervised_spans(template, PROBES):
        if not isinstance(chat, Refusal):
            stops.append(tokenizer(chat.text[slice(*chat.spans[-1])], add_special_tokens=False)["input_ids"][-1])
    named = sorted(token for token in CALL_STOPS if any(token in source for source in template.sources))
    ids = tokenizer.convert_tokens_to_ids(named)
    return stops + [number for number in ids if number in template.stop_ids]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """The text that asks for the turn after `messages`, by the tokenizer's chat template.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    conversation = Conversation(messages=tuple(messages), origin="prompt")
    return ChatTemplate.of(tokenizer).render([conversation], generation_prompt=True)[0]


def _batches(
    lengths: Sequence[int], batch_rows: int, max_new_tokens: int, context: int | None
) -> Iterator[tuple[list[int], int]]:
    """Which prompts are continued together, shortest first, and by how many tokens at most.

    Prompts whose answers the context cuts short stand with others of their length alone, so that each gets all the room
    that it has; one that fills the context stands in no batch.

    Args:
        lengths: tokens of each prompt.
        context: of the model, in tokens; None: not known.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = [(order, max_new_tokens)]
    if context is not None:
        whole = context - max_new_tokens
        groups = [([index for index in order if lengths[index] <= whole], max_new_tokens)]
        tight = sorted({length for length in lengths if whole < length < context})
        groups += [([index for index in order if lengths[index] == length], context - length) for length in tight]
        if (longest := lengths[order[-1]]) > whole:
            log.warning(
                "the model's context of %d tokens ends the answers to prompts of more than %d early, and those of %d "
                "or more have none; the longest has %d",
                context,
                max(whole, 0),
                context,
                longest,
            )
    for group, room in groups:
        for start in range(0, len(group), batch_rows):
            yield group[start : start + batch_rows], room


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_rows: int = 32,
    special_tokens_in_prompts: bool = True,
) -> list[str]:
    """Continue each prompt until a stop token.

    Prompts of like length are generated together, so that little is padded.

    Args:
        prompts: texts; none is empty of tokens.
        max_new_tokens: most tokens in an answer.
        temperature: 0 takes the most likely token each time; above 0, tokens are drawn.
        top_p: share of the probability that tokens are drawn from, above 0 to 1.
        batch_rows: prompts generated at once.
        special_tokens_in_prompts: whether the prompts hold their special tokens already, as a chat template writes
            them; if not, the tokenizer adds its own.
    Returns:
        An answer for each prompt, without special tokens; one ends where the model's context does, and is empty if
        the prompt fills that.
    """
    if not prompts:
        return []
    encoded = tokenizer(list(prompts), add_special_tokens=not special_tokens_in_prompts)["input_ids"]
    drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        bos_token_id=model.generation_config.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **({"do_sample": False} | drawing),
    )
    answers = [""] * len(prompts)
    training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    context = generation_length(model.config)
    for batch, room in _batches([len(ids) for ids in encoded], batch_rows, max_new_tokens, context):
        longest = max(len(encoded[index]) for index in batch)
        ids_BL = torch.full((len(batch), longest), tokenizer.pad_token_id, device=device)
        mask_BL = torch.zeros_like(ids_BL)
        for row, index in enumerate(batch):  # padding on the left, so that every answer starts at the same place
            ids_BL[row, longest - len(encoded[index]) :] = torch.tensor(encoded[index], device=device)
            mask_BL[row, longest - len(encoded[index]) :] = 1
        settings.max_new_tokens = room
        with torch.compiler.set_stance("force_eager"):  # layers that a run has compiled know no cache
            out_BL = model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=settings)
        texts = tokenizer.batch_decode(out_BL[:, longest:], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    model.train(training)
    return answers

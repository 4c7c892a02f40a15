"""What makes a base model a chat model: a template, its special tokens, rows for them, and where answers stop.

    set_chat_template(tokenizer, config.chat_template, keeps_eos=False)   # the template, its tokens, the eos token
    grow_embeddings(model, tokenizer, trains_all=True, becomes_chat=True)  # rows for tokens that are new to the model
    set_stops(model, tokenizer)                                            # src.generation: generation_config
    check_stop_trains(model, tokenizer, known_rows, config.adapter)

All of it is in what `save_pretrained` of the model and the tokenizer writes, so that transformers alone serves the chat
model as it was trained.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from config.schema import AdapterConfig
from config.templates import TEMPLATES
from src.adapter_methods import peft_fields
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

ROWS_MULTIPLE = 64
"""Embeddings that grow get a multiple of these rows, which matrix products on GPUs want."""


def template_tokens(chat_template: str | None) -> tuple[str, ...]:
    """The special tokens that `model.chat_template` adds to a tokenizer that lacks them."""
    return TEMPLATES[chat_template].tokens if chat_template in TEMPLATES else ()


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str, *, keeps_eos: bool) -> None:
    """Give a tokenizer the chat template that `model.chat_template` names or whose file it is.

    A named one brings its special tokens, and begins with the BOS token where the tokenizer puts that before texts.

    Args:
        keeps_eos: whether the eos token is chosen already, and not by the template.
    Raises:
        UserError: there is no such name and no such file.
    """
    if chat_template not in TEMPLATES:
        path = Path(chat_template)
        if not path.is_file():
            raise UserError(
                f"model.chat_template={path} does not exist; give a file with a Jinja chat template, or one of "
                f"{', '.join(TEMPLATES)}"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        return
    named = TEMPLATES[chat_template]
    known, special = tokenizer.get_vocab(), {*tokenizer.all_special_tokens, *_special(tokenizer)}
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in named.tokens if token not in special],
        special_tokens=True,
    )
    new = [token for token in named.tokens if token not in known]
    text = named.path.read_text(encoding="utf-8")
    if named.tokens and tokenizer.bos_token_id is not None and _begins_with_bos(tokenizer):
        text = "{{- bos_token -}}\n" + text
    tokenizer.chat_template = text
    if named.stop and not keeps_eos:
        tokenizer.eos_token = named.stop
    log.info(
        "the chat template is %s, whose turns end with %s%s",
        chat_template,
        named.stop or tokenizer.eos_token,
        f"; {', '.join(new)} are new to the tokenizer" if new else "",
    )


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every id of the tokenizer: its largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def in_multiples(count: int, of: int) -> int:
    """The smallest multiple of `of` that is not below `count`."""
    return -(-count // of) * of


def grow_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, trains_all: bool, becomes_chat: bool
) -> None:
    """Give a model a row for every token of its tokenizer, in the embeddings and in the head; none is ever taken away.

    New rows are the mean of the old ones (with noise of 3e-5 of their spread), so that a new token's logit begins as
    the mean of all logits, which is below the largest: neither a new token nor a row that only pads the table is the
    most likely one before training makes it so. Of a row that pads nothing does: it is never a target, and the loss
    lowers its logit wherever it is trained. That is no proof for every text; a sampler can still draw such a row, by
    its small share, and it decodes to nothing.

    Args:
        trains_all: whether every weight trains. Beside an adapter the rows are as many as the tokens, as programs that
            load one take it.
        becomes_chat: whether the recipe gives the chat template: the rows then become a multiple of 64. Else, as for a
            padding token alone, the checkpoint's shape changes by no more than it must.
    Source: https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    needed, rows = vocabulary_size(tokenizer), model.get_input_embeddings().weight.shape[0]
    if needed <= rows:
        return
    multiple = ROWS_MULTIPLE if trains_all and becomes_chat else None
    model.resize_token_embeddings(needed, pad_to_multiple_of=multiple, mean_resizing=True)
    grown = model.get_input_embeddings().weight.shape[0]
    log.info("embeddings grow from %d to %d rows for tokens that are new to the checkpoint", rows, grown)


def check_stop_trains(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known_rows: int, adapter: AdapterConfig
) -> None:
    """Make sure that a stop token which is new to a checkpoint can come to be the most likely one.

    Its row is the mean of the others, so its logit is the mean of theirs, whatever an adapter makes of the layers
    below: unless the head itself trains, the model would never stop.

    Args:
        known_rows: rows of the checkpoint's embeddings.
    Raises:
        UserError: the head is frozen.
    """
    stop = tokenizer.eos_token_id
    if adapter.kind == "none" or stop is None or stop < known_rows:
        return
    if "trainable_tokens" in peft_fields(adapter.kind):
        return  # its own rows of embeddings and head train by themselves
    heads = _names_of_head(model)
    patterns = (*adapter.modules_to_save, *adapter.target_modules)
    if any(head == pattern or head.endswith(f".{pattern}") for head in heads for pattern in patterns):
        return
    added = "" if len(heads) > 1 else f"Add --adapter.modules_to_save {_endings(model)}, or "
    raise UserError(
        f"{tokenizer.eos_token}, which ends the turns, is new to the checkpoint, and adapter.kind={adapter.kind} does "
        f"not train its row: the model could never say it. {added or 'Either '}use adapter.kind=lora, which trains the "
        "rows of new tokens, train all weights with adapter.kind=none, or name a token that the tokenizer has in "
        "model.special_tokens and a template that writes it"
    )


def _endings(model: PreTrainedModel) -> str:
    """The last names of the head and the embeddings, as options take them."""
    wanted = (model.get_output_embeddings(), model.get_input_embeddings())
    names = [name for part in wanted for name, module in model.named_modules() if module is part]
    return " ".join(name.rsplit(".", 1)[-1] for name in names)


def _names_of_head(model: PreTrainedModel) -> Sequence[str]:
    """Full names of the modules that hold the head's weight: its own first, then the embeddings, if they are tied."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    shared = [module for module in (head, table) if module is not None and module.weight is (head or table).weight]
    return [name for wanted in shared for name, module in model.named_modules() if module is wanted]

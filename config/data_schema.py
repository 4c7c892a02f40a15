"""What a run learns from: its sources, what must hold for them, and how rows become packs.

    data = DataConfig(train=(SourceConfig(path="rows.jsonl"),), max_length=1024)

Part of the tree in `config.schema`, which says how fields are written, and from which all is imported.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from config.fields import limited


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows."""

    path: str = ""
    """A json, jsonl, csv, parquet, arrow or txt file, which may be packed as .gz or .zst; a folder or a glob of them,
    such as `logs/*.jsonl`; a folder that `save_to_disk` wrote; or a Hub data set's id."""

    format: Literal[
        "auto", "messages", "prompt_completion", "question_answer", "alpaca", "sharegpt", "text", "tokenized"
    ] = "auto"
    """What a row holds. `auto`: told from the column names; a doubtful case is an error that lists them."""

    columns: dict[str, str] = field(default_factory=dict)
    """New names of columns, as expected name: name in the file, such as `prompt: question`. Empty: the file's own."""

    roles: dict[str, str] = field(default_factory=dict)
    """Roles of the speakers, as name in the file: role, such as `bot: assistant`. A role is `system`, `developer`,
    `user`, `assistant`, `tool`, or `function_call` for a tool call of the assistant as JSON. Empty: the usual ones."""

    subset: str | None = None
    """Configuration of a Hub data set. None: its default one."""

    split: str = "train"
    """Split of a Hub data set, such as `train` or `test[:10%]`; or of a folder, whose files' names say theirs. Of no
    meaning for a file."""

    revision: str | None = None
    """Branch, tag or commit of a Hub data set. None: its default branch."""

    max_rows: int | None = limited(None, ge=1)
    """Most rows taken, from the start, at least 1. None: all."""

    epochs: int = limited(1, ge=1)
    """Times that a row of this source may stand in one pass over the training rows, at least 1: each does, or with
    weights, each of the source that runs out first."""

    weight: float | None = limited(None, gt=0)
    """Share of this source in the rows of a pass, over the sum of all weights; above 0, for all of data.train or none.
    The pass ends where the first source has given all its rows `epochs` times; of the others a choice by `data.seed`
    is taken. None: all rows of every source are taken."""


def _share(default: float = 0.0) -> Any:
    """A field that is a share of rows, from 0 to 1."""
    return limited(default, ge=0, le=1)


@dataclass(frozen=True)
class ContractConfig:
    """The largest share of a source's rows, from 0 to 1, that may have each defect. With more a run does not start."""

    malformed: float = _share()
    """Rows that are not what their format says. Such rows are left out, as are those of the next eight kinds."""

    masked: float = _share()
    """Rows in which nothing would be trained."""

    untrained_stop: float = _share()
    """Rows with a trained turn that no stop token ends, from which a model does not learn to stop."""

    doubled_bos: float = _share()
    """Rows that begin with two BOS tokens."""

    missing_bos: float = _share()
    """Rows without the BOS token that their tokenizer puts first."""

    role_order: float = _share()
    """Rows of which the chat template refuses or leaves out a message because of its role or place."""

    content_lost: float = _share()
    """Rows of which the chat template leaves out a part of a message, or the tools."""

    unaligned: float = _share()
    """Rows of which the chat template's output does not show where a turn is."""

    answer_truncated: float = _share()
    """Rows of which nothing that is trained is left once they are cut to `data.max_length`."""

    too_long: float = _share(0.1)
    """Rows left out because they have more than `data.max_length` tokens."""

    leak: float = _share()
    """Rows of data.train that stand in data.eval too. They are left out of training."""

    duplicates: float = _share(0.05)
    """Rows that are equal to one before them."""

    prompt_not_prefix: float = _share()
    """Rows with a trained turn before which the chat template writes other text than a server would; with
    `data.unlike_served=drop` they are not counted."""

    null_padded_tools: float = _share()
    """Rows whose tools or tool calls held keys without a value, as a table writes them; such keys are taken out."""

    date_drift: float = _share()
    """Rows into which the chat template may write the clock's date, so that they differ from day to day."""


@dataclass(frozen=True)
class DataConfig:
    """What the model learns from, and what is measured on."""

    train: tuple[SourceConfig, ...] = ()
    """Sources of the training rows, one after the other. At least one is needed to train."""

    eval: tuple[SourceConfig, ...] = ()
    """Sources of the evaluation rows. Empty: `eval_fraction` of the training rows, or no evaluation."""

    eval_fraction: float = limited(0.0, ge=0, le=0.5)
    """Share of the training rows set aside for evaluation, from 0 to 0.5; chosen by each row's content, so that equal
    rows always fall on the same side."""

    seed: int = limited(42, ge=0)
    """Seed of what is chosen from sources with a weight, and of their order, 0 or above."""

    max_length: int = limited(2048, ge=8)
    """Most tokens in a row and in a pack of rows, at least 8 and at most the model's context."""

    too_long: Literal["auto", "drop", "truncate", "split", "error"] = "auto"
    """What happens to a row of more than `max_length` tokens: left out, cut at the end (where no EOS is put), split
    into pieces (texts only), or an error. `auto`: texts are split, other rows left out. The number of rows and of
    supervised tokens lost is always told."""

    streaming: bool = False
    """Whether the training rows are read while the run goes on and kept nowhere, as sources larger than the disk need:
    files are read line by line, Hub data sets from the Hub. Needs `training.max_steps`, and `data.eval` in place of
    `eval_fraction`. Rows are packed and shuffled within windows of `stream_window_rows`, and equal ones are not found.
    Weights are then shares of the rows that are read, and each epoch reads the same ones."""

    stream_window_rows: int = limited(10_000, ge=1)
    """Rows of a stream that are read, packed and shuffled together, at least 1; so many are held in memory, and read
    before the first step."""

    packing: bool = True
    """Whether rows share packs of `max_length` tokens. Attention never crosses from one row to another, so the loss is
    the same; only padding is saved."""

    supervise: Literal["assistant", "last_turn", "completion", "all"] = "assistant"
    """Tokens that the loss counts. `assistant`: the assistant's turns with the token that ends each; `last_turn`: only
    the last of them; `completion`: those of the completion (the answer, the output), or where the format does not part
    it from the prompt, those after the last user message, with their tool calls; `all`: all tokens but a row's
    first."""

    template_date: str | None = "2024-07-26"
    """Date that a chat template gets which writes one, as YYYY-MM-DD, so that a row is the same on every day. None:
    the clock's."""

    unlike_served: Literal["train_as_served", "drop", "error"] = "train_as_served"
    """What happens to a conversation in which the chat template writes other text before a supervised turn than a
    server would. `train_as_served`: trained, each turn with what a server gives before it, if need be as a row of its
    own; what is unlike all the same, such as a prompt that opens reasoning which the row has not, is trained as it is
    written. `drop`: left out; `error`: the run ends. Their number is always told. Apart from that, a conversation is
    trained as a row for each turn wherever the template writes an answer in another way once more messages follow it,
    such as without its reasoning."""

    allow_special_tokens_in_content: bool = False
    """Whether a special token's text inside a message, such as `<|im_end|>` in a question, becomes that token. Else it
    is read as plain text."""

    contract: ContractConfig = field(default_factory=ContractConfig)
    """What must hold for the rows of every source before a step is taken."""

    cache_folder: str | None = None
    """Folder where prepared token rows are kept, for runs with the same rows, tokenizer and settings. None: `.data` in
    output.folder. It can be deleted at any time between runs."""

    cache_gib: float | None = limited(32.0, gt=0)
    """Most GiB that prepared token rows may take in the cache folder, above 0. Where there are more, those not used for
    the longest time are removed, but never this run's own, nor any that another run reads. None: no limit."""

    workers: int | None = limited(None, ge=1)
    """Processes that tokenize, at least 1. None: one, whose threads use two to four cores."""

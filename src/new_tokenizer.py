"""A tokenizer made from a run's own data: byte-level BPE, the same for the same data, settings and libraries.

    model = with_tokenizer(config.model, config.data, cache_folder=token_folder(config.data, config.output))
    tokenizer = load_tokenizer(model)              # model.tokenizer is a tokenizer.json now
    keep_tokenizer(model, run.path)

It is written to the run directory, from where a run that is resumed takes it; other runs with the same data and
settings find it in the cache folder.
"""

import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from config.architectures import expanded
from config.model_schema import TRAIN
from config.schema import DataConfig, ModelConfig, TokenizerConfig
from config.templates import TEMPLATES
from src.cache import content_of, prepared
from src.chat_setup import template_tokens
from src.data import known_digests
from src.formats import Conversation, RowConverter, Sample, TextRow, row_converter
from src.refusal import Refusal
from src.sources import SourceRows, open_source
from utils.checkpointing import writing_to
from utils.errors import UserError
from utils.files import whole_folder
from utils.logging import get_logger

log = get_logger(__name__)

FILE = "tokenizer.json"
FOLDER = "tokenizer"
"""Folder of a run directory that holds the tokenizer that it made."""

DEFAULT_TEMPLATE = "chatml"
ROLES = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
"""Special tokens of a new tokenizer that have a role, unless `model.special_tokens` says otherwise."""


def with_tokenizer(
    model: ModelConfig, data: DataConfig, *, cache_folder: Path, kept: Path | None = None
) -> ModelConfig:
    """The part of a recipe about its model, with a tokenizer made from the data where it says `tokenizer=train`.

    Every process may call this: one makes the tokenizer, and the others wait for it.

    Args:
        kept: the directory of a run that goes on, whose own tokenizer is taken; None: the run starts.
    Returns:
        `model`, whose `tokenizer` names a file; whose architecture has no vocabulary of a named size, so that the
        tokenizer's counts; and whose chat template is `chatml` if it has none and the data are conversations. `model`
        as it is where it names a tokenizer.
    Raises:
        UserError: a source cannot be read, or has no text to make a tokenizer from; or the run that goes on has lost
            its tokenizer.
    """
    if model.tokenizer != TRAIN:
        return model
    digests = known_digests(cache_folder)
    found = [
        open_source(source, f"data.train.{i}", digests, streams=data.streaming) for i, source in enumerate(data.train)
    ]
    converters = [row_converter(rows, source.format) for rows, source in zip(found, data.train, strict=True)]
    _check_formats(found, converters)
    template = model.chat_template
    if template is None and any(convert.format != "text" for convert in converters):
        template = DEFAULT_TEMPLATE
    if kept is None:
        settings = _with_tokens_of(template, model.new_tokenizer)
        # Not among the entries that data.cache_gib limits: a tokenizer is small, and a run reads it at its end too.
        folder = cache_folder / "tokenizers" / _key(settings, data, found)
        make = functools.partial(_make, settings=settings, found=found, converters=converters)
        prepared(folder, make).release()
        digests.save()
    elif not (folder := kept / FOLDER).is_dir():
        raise UserError(f"{folder} is gone, with which the run to be resumed was trained; bring it back, or start anew")
    fields = expanded(model.architecture)
    fields.pop("vocab_size", None)
    return replace(
        model,
        tokenizer=str(folder / FILE),
        new_tokenizer=TokenizerConfig(),
        architecture=fields,
        chat_template=template,
        special_tokens=_roles(model, template),
    )


def keep_tokenizer(model: ModelConfig, run_folder: Path) -> None:
    """Write the tokenizer that `with_tokenizer` made to the run directory, for the run to go on with."""
    with writing_to(run_folder / FOLDER), whole_folder(run_folder / FOLDER) as folder:
        shutil.copy(model.tokenizer, folder / FILE)


def _check_formats(found: Sequence[SourceRows], converters: Sequence[RowConverter]) -> None:
    for rows, convert in zip(found, converters, strict=True):
        if convert.format == "tokenized":
            raise UserError(
                f"{rows.name}: {rows.path} holds token ids, and model.tokenizer=train wants texts; give the tokenizer "
                "that made them as model.tokenizer"
            )


def _with_tokens_of(template: str | None, config: TokenizerConfig) -> TokenizerConfig:
    """The settings with the special tokens of a named chat template among theirs."""
    return replace(config, special_tokens=tuple(dict.fromkeys((*config.special_tokens, *template_tokens(template)))))


def _roles(model: ModelConfig, template: str | None) -> dict[str, str]:
    """The tokens with a role; the one that ends texts leaves that to the token which ends a named template's turns."""
    roles = {role: token for role, token in ROLES.items() if token in model.new_tokenizer.special_tokens}
    if template in TEMPLATES and TEMPLATES[template].stop:
        roles.pop("eos_token", None)
    return roles | model.special_tokens


def _key(settings: TokenizerConfig, data: DataConfig, found: Sequence[SourceRows]) -> str:
    """32 hexadecimal digits that change with anything which may change the tokenizer."""
    own = ("format", "columns", "roles", "split", "subset", "max_rows")
    parts = {
        "settings": asdict(settings),
        "sources": [content_of(rows) for rows in found],
        "read": [{name: getattr(source, name) for name in own} for source in data.train],
        "tokenizers": importlib.metadata.version("tokenizers"),
        "code": Path(__file__).read_text(encoding="utf-8"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _make(
    folder: Path, *, settings: TokenizerConfig, found: Sequence[SourceRows], converters: Sequence[RowConverter]
) -> None:
    """Write the tokenizer.json of the first rows of all sources.

    Raises:
        UserError: none of them has a text.
    """
    tokenizer = train_tokenizer(_texts(found, converters, settings.max_rows), settings)
    made = tokenizer.get_vocab_size()
    if made <= len(pre_tokenizers.ByteLevel.alphabet()) + len(settings.special_tokens):
        raise UserError(
            "model.tokenizer=train found no tokens that stand together model.new_tokenizer.min_count="
            f"{settings.min_count} times in data.train; give more rows, or a tokenizer as model.tokenizer"
        )
    if made < settings.vocab_size:
        log.warning(
            "the data give %d tokens of the %d of model.new_tokenizer.vocab_size: no more of them stand together %d "
            "times",
            made,
            settings.vocab_size,
            settings.min_count,
        )
    tokenizer.save(str(folder / FILE))
    log.info("a tokenizer of %d tokens was made from data.train: %s", made, folder / FILE)


def train_tokenizer(texts: Iterable[str], settings: TokenizerConfig) -> Tokenizer:
    """Byte-level BPE with GPT-2's division into words, its special tokens first and then the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_count,
        special_tokens=list(settings.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(found: Sequence[SourceRows], converters: Sequence[RowConverter], max_rows: int | None) -> Iterator[str]:
    """The texts of each source's first rows; rows that are malformed give none."""
    for rows, convert in zip(found, converters, strict=True):
        for row in islice(rows, max_rows):
            yield from _texts_of(convert.checked(row))
        rows.check_unchanged()


def _texts_of(sample: Sample | Refusal) -> Iterator[str]:
    """What a model would read of a row."""
    if isinstance(sample, TextRow):
        yield sample.text
    elif isinstance(sample, Conversation):
        for message in sample.messages:
            yield f"{message['role']}\n{message['content']}"
            if calls := message.get("tool_calls"):
                yield json.dumps(calls, ensure_ascii=False)

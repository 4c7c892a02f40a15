"""The files of config/data: rows for the two recipes and the tokenizer, from the schema and the glossary."""

import json
from collections.abc import Iterable

from config.schema import RunConfig
from scripts.smol_data.assistant import declined_facts, setting_facts, term_facts
from scripts.smol_data.cluster import cluster_facts
from scripts.smol_data.facts import Fact, Row, evaluation_rows, questions, training_rows
from scripts.smol_data.glossary import GLOSSARY
from scripts.smol_data.settings import read_settings
from scripts.smol_data.tokenizer import SPECIAL_TOKENS, tokenizer_text, train_tokenizer

EVALUATION_ROWS_PER_KIND = 24
VOCABULARY = 2048


def assistant_facts() -> list[Fact]:
    """All that the embedded default teaches, without what a special token's own text stands in."""
    settings = read_settings(RunConfig)
    facts = [*setting_facts(settings, GLOSSARY), *term_facts(GLOSSARY), *declined_facts(settings)]
    return [fact for fact in facts if not any(token in f"{fact.answer}{fact.keys}" for token in SPECIAL_TOKENS)]


def build_files() -> dict[str, str]:
    """Each generated file's name in config/data, with its text."""
    facts = assistant_facts()
    train = training_rows(facts)
    new_facts = list(cluster_facts())
    new_train = training_rows(new_facts)
    return {
        "smol_train.jsonl": _json_lines(train),
        "smol_eval.jsonl": _json_lines(evaluation_rows(facts, EVALUATION_ROWS_PER_KIND, questions(train))),
        "smol_lora_train.jsonl": _json_lines(new_train),
        "smol_lora_eval.jsonl": _json_lines(
            evaluation_rows(new_facts, EVALUATION_ROWS_PER_KIND, questions([*train, *new_train]))
        ),
        "smol_tokenizer.json": tokenizer_text(train_tokenizer(train, VOCABULARY)),
    }


def _json_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)

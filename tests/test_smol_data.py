"""The embedded default's data: reproducible, true to the schema, and evaluated with questions that train never asks."""

import ast
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from config.recipe import load_recipe
from config.schema import RunConfig, SourceConfig
from scripts.smol_data import cluster, strangers, wordings
from scripts.smol_data.assistant import setting_facts
from scripts.smol_data.facts import Fact, evaluation_rows, politely, questions, training_rows
from scripts.smol_data.glossary import GLOSSARY
from scripts.smol_data.settings import read_settings
from scripts.smol_data.strangers import DECLINE, NO_SUCH_SETTING
from scripts.smol_data.wordings import Wordings

ROOT = Path(__file__).parents[1]
DATA = ROOT / "config" / "data"
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
PARTS = [("smol_train", "smol_eval"), ("smol_lora_train", "smol_lora_eval")]


def conversations(name):
    return [json.loads(line)["messages"] for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


def exchanges(name):
    """(question, answer) of every user turn and the turn after it."""
    return [
        (turn["content"], after["content"])
        for messages in conversations(name)
        for turn, after in itertools.pairwise(messages)
        if turn["role"] == "user"
    ]


def words(text):
    """Words, dotted names whole, without case, marks and quotes."""
    return re.findall(r"\w+(?:\.\w+)*", text.lower())


def test_generator_reproduces_the_files_byte_for_byte(tmp_path):
    for name in ("config", "scripts", "utils"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.json*"))
    assert not list((tmp_path / "config/data").glob("smol_*.json*"))
    script = tmp_path / "scripts/make_smol_data.py"
    subprocess.run([sys.executable, str(script)], cwd=tmp_path.parent, check=True, capture_output=True)
    made = sorted((tmp_path / "config/data").glob("smol_*.json*"))
    assert [path.name for path in made] == sorted(path.name for path in DATA.glob("smol_*.json*"))
    stale = [path.name for path in made if path.read_bytes() != (DATA / path.name).read_bytes()]
    assert not stale, f"{stale} are not what the schema and the glossary give; run python scripts/make_smol_data.py"


def test_files_are_large_enough_to_teach_and_small_enough_to_ship():
    assert len(conversations("smol_train")) >= 1500
    assert len(conversations("smol_eval")) >= 150
    assert sum(path.stat().st_size for path in DATA.glob("smol_*")) < 1_750_000


@pytest.mark.parametrize(("train", "evaluation"), PARTS)
def test_no_evaluation_question_stands_in_train(train, evaluation):
    trained = {tuple(words(question)) for question, _ in exchanges(train) + exchanges("smol_train")}
    assert [question for question, _ in exchanges(evaluation) if tuple(words(question)) in trained] == []


def test_no_wording_serves_both_train_and_evaluation():
    ways = [
        way for module in (wordings, cluster, strangers) for way in vars(module).values() if isinstance(way, Wordings)
    ]
    assert len(ways) > 12
    trained = {tuple(words(text)) for way in ways for wording in way.train for text in (wording, *politely(wording))}
    asked = [text for way in ways for wording in way.eval for text in (wording, *politely(wording))]
    assert [text for text in asked if tuple(words(text)) in trained] == []


@pytest.mark.parametrize(("train", "evaluation"), PARTS)
def test_each_question_has_one_answer(train, evaluation):
    answers = defaultdict(set)
    for question, answer in exchanges(train) + exchanges(evaluation):
        answers[question].add(answer)
    assert [question for question, given in answers.items() if len(given) > 1] == []


@pytest.mark.parametrize(("train", "evaluation"), PARTS)
def test_every_evaluation_answer_was_trained_on(train, evaluation):
    """Only then is a wrong answer the model's failure."""
    trained = {answer for _, answer in exchanges(train)}
    assert [answer for _, answer in exchanges(evaluation) if answer not in trained] == []


def test_no_shortcut_answers_the_evaluation():
    """One constant answer, the best answer to a question's wording whatever its key, the best answer to its key
    whatever the wording, and the answer of the most similar training question."""
    pairs, trained = exchanges("smol_eval"), [(set(words(q)), a) for q, a in exchanges("smol_train")]
    ways = {name: way.eval for name, way in vars(wordings).items() if isinstance(way, Wordings)}
    by_wording, by_key = defaultdict(Counter), defaultdict(Counter)
    for question, answer in pairs:
        for name, texts in ways.items():
            for text in texts:
                pattern = re.sub(r"\\{\w+\\}", "(.+)", re.escape(text))
                if match := re.search(pattern, question):
                    by_wording[name][answer] += 1
                    by_key[match[1].strip("`")][answer] += 1

    def share(table):
        return sum(counts.most_common(1)[0][1] for counts in table.values()) / len(pairs)

    def nearest(question):
        asked = set(words(question))
        return max(trained, key=lambda row: len(asked & row[0]) / len(asked | row[0]))[1]

    assert share({"all": Counter(answer for _, answer in pairs)}) < 0.15
    assert share(by_wording) < 0.3
    assert sum(counts.total() for counts in by_key.values()) > 0.8 * len(pairs)
    assert sum(counts.most_common(1)[0][1] for counts in by_key.values() if counts.total() > 1) < 0.5 * len(pairs)
    some = pairs[::4]
    assert sum(nearest(question) == answer for question, answer in some) < 0.75 * len(some)


def test_same_wording_with_the_key_swapped_has_another_answer():
    facts = [fact for fact in setting_facts(read_settings(RunConfig), GLOSSARY) if "default" in fact.kind]
    asked = {keys[0]: fact.answer for fact in facts for keys in [fact.keys]}
    assert asked["training.micro_batch_rows"] == "The default of training.micro_batch_rows is 1."
    assert asked["evaluation.micro_batch_rows"] == "The default of evaluation.micro_batch_rows is 8."
    assert len(set(asked.values())) == len(asked)


def test_some_questions_are_declined_and_train_declines_others():
    for refusal, least in ((DECLINE, 20), (NO_SUCH_SETTING, 10)):
        assert sum(answer == refusal for _, answer in exchanges("smol_eval")) >= least
        assert sum(answer == refusal for _, answer in exchanges("smol_train")) >= 5 * least


def test_defaults_are_those_of_the_schema():
    told = {}
    for _, answer in exchanges("smol_train") + exchanges("smol_eval"):
        if match := re.fullmatch(r"The default of ([\w.]+) is (.+)\.", answer):
            told[match[1]] = match[2]
    assert len(told) > 60
    for path, default in told.items():
        section, _, name = path.partition(".")
        value = getattr(SourceConfig(), name) if section == "SourceConfig" else attrgetter(path)(RunConfig())
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        if value in ("", (), {}):
            assert default == "empty", path
        else:
            assert default == value if isinstance(value, str) else ast.literal_eval(default) == value, path


def test_every_setting_is_asked_about():
    asked = " ".join(question for question, _ in exchanges("smol_train"))
    missing = [setting.path for setting in read_settings(RunConfig) if setting.path not in asked]
    assert missing == []


def test_no_text_holds_a_special_token():
    texts = [turn["content"] for part in PARTS for name in part for row in conversations(name) for turn in row]
    assert [text for text in texts if any(token in text for token in SPECIAL)] == []


def test_field_new_to_the_schema_gets_rows():
    @dataclass(frozen=True)
    class Oven:
        heat_c: float = dataclasses.field(default=180.0, metadata={"gt": 0, "le": 300})
        """Heat in degrees. Measured in the middle. None: off."""

    @dataclass(frozen=True)
    class Kitchen:
        oven: Oven = dataclasses.field(default_factory=Oven)
        """What bakes."""

    by_kind = {fact.kind: fact for fact in setting_facts(read_settings(Kitchen), ()) if "heat_c" in str(fact)}
    assert by_kind["meaning of a setting"].answer == "Heat in degrees."
    assert by_kind["meaning of a setting"].keys == ("oven.heat_c", "`oven.heat_c`", "heat_c")
    assert by_kind["default of a setting"].answer == "The default of oven.heat_c is 180.0."
    assert by_kind["range of a setting"].answer == "The range of oven.heat_c is above 0 and at most 300."
    assert by_kind["type of a setting"].answer == "The type of oven.heat_c is float."
    assert by_kind["section of a setting"].answer == "The section of heat_c is oven."
    assert by_kind["value of a setting"].answer == "For oven.heat_c, None means: off."


def test_field_without_a_docstring_is_an_error():
    @dataclass
    class Bare:
        size: int = 1

    with pytest.raises(ValueError, match=r"Bare\.size has no docstring"):
        read_settings(Bare)


def test_rows_of_a_fact_do_not_depend_on_other_facts():
    ways = Wordings(tuple(f"Ask {n} about {{key}}?" for n in range(9)), ("Now {key}?",))
    first, second = (Fact("kind", (key,), ways, f"Answer {key}.") for key in "ab")
    alone = {turn["content"] for row in training_rows([first]) for turn in row["messages"]}
    both = {turn["content"] for row in training_rows([second, first]) for turn in row["messages"]}
    assert alone <= both
    (asked,) = questions(evaluation_rows([first], 5, avoid=()))
    assert evaluation_rows([first], 5, avoid={asked}) == []


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DATA / "smol_tokenizer.json"))


@pytest.fixture(scope="module")
def template():
    text = (DATA / "smol_chat_template.jinja").read_text("utf-8")
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)


def test_tokenizer_spells_any_text(tokenizer):
    for text in ("Peak rate, 2e-5!", "naïve Größe 模型 🦙", "\x00\t \n  x", " lead", "q" * 50):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1


def test_every_row_fits_its_recipe(tokenizer, template):
    for recipe, names in zip(("smol.py", "smol_lora.py"), PARTS, strict=True):
        capacity = load_recipe(ROOT / "config" / recipe).data.max_length
        texts = [template.render(messages=messages) for name in names for messages in conversations(name)]
        assert max(len(encoding.ids) for encoding in tokenizer.encode_batch(texts)) <= capacity


def test_template_writes_chatml_with_or_without_a_system_message(template):
    turns = [{"role": "user", "content": " Hi? "}, {"role": "assistant", "content": "No."}]
    system = {"role": "system", "content": "Be brief."}
    chatml = "<|im_start|>user\n Hi? <|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    assert template.render(messages=turns) == chatml
    assert template.render(messages=[system, *turns]) == f"<|im_start|>system\nBe brief.<|im_end|>\n{chatml}"


def test_training_text_starts_with_the_served_prompt(template):
    for messages in conversations("smol_eval"):
        prompt = template.render(messages=messages[:-1], add_generation_prompt=True)
        assert template.render(messages=messages) == f"{prompt}{messages[-1]['content']}<|im_end|>\n"


def test_yaml_recipe_equals_the_python_recipe():
    assert load_recipe(ROOT / "config/smol.yaml") == load_recipe(ROOT / "config/smol.py")


def test_recipes_name_the_generated_files():
    for recipe, (train, evaluation) in zip(("smol.py", "smol_lora.py"), PARTS, strict=True):
        data = load_recipe(ROOT / "config" / recipe).data
        assert data.train[0].path == f"config/data/{train}.jsonl"
        assert [source.path for source in data.eval] == [f"config/data/{evaluation}.jsonl"]

"""What the embedded default's assistant knows: the schema's settings, the glossary, and what it must decline."""

from collections import Counter
from collections.abc import Iterator, Sequence

from scripts.smol_data import strangers, wordings
from scripts.smol_data.facts import Fact
from scripts.smol_data.glossary import Term
from scripts.smol_data.settings import Setting, listed
from scripts.smol_data.wordings import Wordings

# Characters. A small model learns a sentence of this length by heart in a few passes; longer ones cost more.
_LONGEST_ANSWER = 150


def setting_facts(settings: Sequence[Setting], terms: Sequence[Term]) -> list[Fact]:
    """What can be asked of each setting, short of what is ambiguous or too long to answer in a sentence."""
    names = Counter(setting.name for setting in settings)
    names.update(term.name.lower() for term in terms)
    meanings = Counter(setting.meaning for setting in settings)
    facts = [
        fact
        for setting in settings
        for fact in _facts_of(setting, short=names[setting.name] == 1, unique=meanings[setting.meaning] == 1)
    ]
    return [fact for fact in facts if len(fact.answer) <= _LONGEST_ANSWER]


def _facts_of(setting: Setting, short: bool, unique: bool) -> Iterator[Fact]:
    path = setting.path
    if not setting.type_words:  # a section, not a value
        yield Fact("meaning of a section", (path, f"`{path}`"), wordings.SECTION_MEANING, setting.meaning)
        return
    names = (path, f"`{path}`")
    if short and "_" in setting.name:  # a bare word such as `rank` may be meant as a term
        names += (setting.name,)
    yield Fact("meaning of a setting", names, wordings.SETTING_MEANING, setting.meaning)
    if unique:
        yield Fact("search for a setting", (setting.meaning,), wordings.SETTING_SEARCH, f"That is {path}.", asks=7)
    if short:
        answer = f"The section of {setting.name} is {setting.section}."
        yield Fact("section of a setting", (setting.name,), wordings.SETTING_SECTION, answer, asks=5)
    answer = f"The default of {path} is {setting.default}."
    yield Fact("default of a setting", names, wordings.SETTING_DEFAULT, answer, asks=7)
    answer = f"The type of {path} is {setting.type_words}."
    yield Fact("type of a setting", names, wordings.SETTING_TYPE, answer, asks=5)
    if setting.limits:
        yield Fact("range of a setting", names, wordings.SETTING_RANGE, f"The range of {path} is {setting.limits}.")
    if setting.choices:
        answer = f"The choices for {path} are {listed(setting.choices, 'and')}."
        yield Fact("choices of a setting", names, wordings.SETTING_CHOICES, answer)
    for value, text in setting.meanings_of_values():
        named = value.lower() if value == "Empty" else value
        answer = f"For {path}, {named} means: {text}"
        yield Fact("value of a setting", names, wordings.SETTING_VALUE, answer, {"value": named})


def term_facts(terms: Sequence[Term]) -> Iterator[Fact]:
    """What can be asked of each term."""
    for term in terms:
        parts = {"name": term.name}
        yield Fact("meaning of a term", (term.phrase,), wordings.TERM_MEANING, term.meaning, parts)
        yield Fact("search for a term", (term.meaning,), wordings.TERM_SEARCH, f"That is {term.phrase}.", parts)
        if term.stands_for:
            answer = f"The letters {term.name} stand for {term.stands_for}."
            yield Fact("letters of a term", (term.phrase,), wordings.TERM_LETTERS, answer, parts)


def declined_facts(settings: Sequence[Setting]) -> Iterator[Fact]:
    """Questions that get no answer, those of training and those of evaluation apart."""
    real = {setting.path for setting in settings}
    topics = Wordings(strangers.TOPIC_WORDINGS.train, ()), Wordings((), strangers.TOPIC_WORDINGS.eval)
    for ways, keys in zip(topics, (strangers.TRAIN_TOPICS, strangers.EVAL_TOPICS), strict=True):
        for key in keys:
            yield Fact("topic to decline", (key,), ways, strangers.DECLINE, asks=4)
    for request in strangers.TRAIN_REQUESTS:
        yield Fact("request to decline", (request,), Wordings(("{key}",), ()), strangers.DECLINE)
    for request in strangers.EVAL_REQUESTS:
        yield Fact("request to decline", (request,), Wordings((), ("{key}",)), strangers.DECLINE)
    asked = (wordings.SETTING_MEANING, wordings.SETTING_DEFAULT, wordings.SETTING_TYPE, wordings.SETTING_RANGE)
    train = Wordings(tuple(wording for ways in asked for wording in ways.train), ())
    evaluation = Wordings((), tuple(wording for ways in asked for wording in ways.eval))
    for ways, paths in ((train, strangers.TRAIN_MADE_UP), (evaluation, strangers.EVAL_MADE_UP)):
        for path in paths:
            if path not in real:
                yield Fact("setting that does not exist", (path, f"`{path}`"), ways, strangers.NO_SUCH_SETTING, asks=6)

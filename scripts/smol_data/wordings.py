"""How each kind of fact is asked for. The evaluation's wordings are never trained on; a test holds the two apart.

`{key}` is what the question is about: a setting, a term with its article, a description. `{name}` is a term without its
article, and `{value}` a value of a setting.
"""

from typing import NamedTuple


class Wordings(NamedTuple):
    """Ways to ask for one kind of fact."""

    train: tuple[str, ...]
    eval: tuple[str, ...]


SETTING_MEANING = Wordings(
    train=(
        "What does {key} do?",
        "What is {key}?",
        "What is {key} for?",
        "Explain {key}.",
        "Describe {key}.",
        "Define {key}.",
        "What does {key} mean?",
        "What does the setting {key} mean?",
        "What does {key} control?",
        "Tell me about {key}.",
        "Tell me what {key} does.",
        "What is the meaning of {key}?",
        "I do not understand {key}.",
        "About {key}: what is it?",
        "Explain what {key} does.",
        "Tell me the meaning of {key}.",
        "Describe the setting {key}.",
        "What is the use of {key}?",
        "How do you explain {key}?",
        "Tell me what the setting {key} is for.",
    ),
    eval=(
        "What is the setting {key} for?",
        "Please explain the meaning of {key}.",
        "Could you tell me what {key} means?",
        "Describe what {key} controls.",
    ),
)

SETTING_DEFAULT = Wordings(
    train=(
        "What is the default of {key}?",
        "What is the default value of {key}?",
        "What is {key} by default?",
        "What does {key} default to?",
        "Which value does {key} have by default?",
        "What value does {key} take when I do not set it?",
        "What is {key} when it is not set?",
        "If I leave {key} out, what is it?",
        "Tell me the default of {key}.",
        "Give me the default value for {key}.",
        "About {key}: what is the default?",
        "Does {key} have a default?",
        "My recipe does not set {key}. What is it then?",
        "How is {key} set by default?",
        "Tell me what {key} is by default.",
        "Which value is the default of {key}?",
        "When my recipe leaves {key} out, what is it?",
        "Name the default of {key}.",
    ),
    eval=(
        "Which value does {key} default to?",
        "Please tell me the default value of {key}.",
        "What value does {key} have when I leave it out?",
        "If my recipe does not set {key}, what is its default?",
    ),
)

SETTING_TYPE = Wordings(
    train=(
        "What type is {key}?",
        "What type does {key} have?",
        "What is the type of {key}?",
        "Which type of value does {key} take?",
        "What kind of value is {key}?",
        "Tell me the type of {key}.",
        "Is {key} a number or a string?",
        "About {key}: what type is it?",
        "Give me the type for {key}.",
        "Of which type is {key}?",
        "What kind of value does {key} want?",
        "Name the type of {key}.",
        "Tell me which type {key} has.",
        "Which type does {key} take?",
        "Give me the kind of value for {key}.",
    ),
    eval=(
        "Which type is {key}?",
        "Please give the type of {key}.",
        "Which kind of value does {key} have?",
    ),
)

SETTING_RANGE = Wordings(
    train=(
        "What is the range of {key}?",
        "What range does {key} have?",
        "Which numbers are allowed for {key}?",
        "Which range may {key} be in?",
        "What are the limits of {key}?",
        "How large or small may {key} be?",
        "Tell me the range of {key}.",
        "Give me the limits for {key}.",
        "About {key}: what is the range?",
        "Does {key} have limits?",
        "Between which limits must {key} be?",
        "What number may {key} be?",
        "Tell me which range {key} has.",
        "Name the limits of {key}.",
        "Which range is allowed for {key}?",
        "In what range is {key}?",
    ),
    eval=(
        "Which limits does {key} have?",
        "Please tell me the range for {key}.",
        "In which range must {key} be?",
    ),
)

SETTING_CHOICES = Wordings(
    train=(
        "Which values are allowed for {key}?",
        "What values can {key} take?",
        "Which values can {key} have?",
        "What are the choices for {key}?",
        "What are the options of {key}?",
        "List the values of {key}.",
        "Tell me the allowed values of {key}.",
        "What can I set {key} to?",
        "What can {key} be?",
        "Which names does {key} take?",
        "Give me the choices for {key}.",
        "About {key}: what are the options?",
        "List the choices for {key}.",
        "Name the options of {key}.",
        "Which options does {key} have?",
        "Tell me what {key} can be.",
    ),
    eval=(
        "What are the allowed values of {key}?",
        "Please list the options for {key}.",
        "Which choices does {key} have?",
    ),
)

SETTING_SECTION = Wordings(
    train=(
        "Which section is {key} in?",
        "Where does {key} belong?",
        "Which section does {key} belong to?",
        "In which section do I set {key}?",
        "Where in a recipe do I write {key}?",
        "Tell me the section of {key}.",
        "What section has {key}?",
        "About {key}: which section?",
        "Where is {key} set?",
        "Which part of the config holds {key}?",
        "Name the section of {key}.",
        "Tell me which section has {key}.",
        "Which section holds {key}?",
        "In what section does {key} belong?",
        "What is the section of {key}?",
    ),
    eval=(
        "In which section is {key}?",
        "Please tell me which section {key} belongs to.",
        "What section does {key} belong in?",
    ),
)

SETTING_VALUE = Wordings(
    train=(
        "What does {value} mean for {key}?",
        "What happens if {key} is {value}?",
        "What if {key} is {value}?",
        "What does {key} do when it is {value}?",
        "What is meant by {value} in {key}?",
        "Explain {value} for {key}.",
        "I set {key} to {value}. What does that mean?",
        "In my recipe, {key} is {value}. What does that mean?",
        "Tell me what {value} means for {key}.",
        "If I set {key} to {value}, what happens?",
        "Describe {value} as the value of {key}.",
        "Explain what happens when {key} is {value}.",
        "What does it do to set {key} to {value}?",
        "Tell me what happens if {key} is {value}.",
        "When {key} is {value}, what does that mean?",
    ),
    eval=(
        "What happens when {key} is {value}?",
        "Please explain what {value} means for {key}.",
        "What does it mean to set {key} to {value}?",
    ),
)

SETTING_SEARCH = Wordings(
    train=(
        "Which setting is this: {key}",
        "Name the setting: {key}",
        "What is this setting called: {key}",
        "Which setting has this meaning: {key}",
        "I am looking for a setting. {key}",
        "Which setting does this: {key}",
        "What setting do I need for this: {key}",
        "Find the setting: {key}",
        "{key} Which setting is that?",
        "{key} What is the name of that setting?",
        "{key} What setting is that?",
        "{key} Which setting do I need?",
        "{key} Name that setting.",
        "{key} What is this setting called?",
    ),
    eval=(
        "Tell me the name of this setting: {key}",
        "What setting has the meaning: {key}",
        "{key} What is that setting called?",
    ),
)

TERM_MEANING = Wordings(
    train=(
        "What is {key}?",
        "What does {key} mean?",
        "Define {key}.",
        "Explain {key}.",
        "Describe {key}.",
        "Explain the term {name}.",
        "What is meant by {key}?",
        "Tell me about {key}.",
        "Tell me what {key} is.",
        "What is the meaning of {key}?",
        "Give me a definition of {key}.",
        "I do not understand {key}.",
        "What do people mean by {key}?",
        "About {key}: what is it?",
        "Explain what {key} means.",
        "Tell me the meaning of {key}.",
        "Define the term {name}.",
        "Describe the term {name}.",
        "What is the term {name} used for?",
        "Tell me what the term {name} means.",
        "How do you define {key}?",
    ),
    eval=(
        "What does the term {name} mean?",
        "Give me a definition of the term {name}.",
        "Could you tell me what {key} means?",
        "Give me the meaning of {key}.",
    ),
)

TERM_LETTERS = Wordings(
    train=(
        "What does {name} stand for?",
        "What is {name} short for?",
        "Spell out {name}.",
        "What do the letters {name} stand for?",
        "Give me the long form of {name}.",
        "What is the full name of {name}?",
        "What words is {name} short for?",
        "Tell me what {name} stands for.",
        "Which words does {name} stand for?",
        "Write {name} out in full.",
        "Name the words that {name} stands for.",
        "Tell me the long form of {name}.",
        "What are the words behind the letters {name}?",
        "Which words is {name} short for?",
    ),
    eval=(
        "What are the letters {name} short for?",
        "Please tell me the full name of {name}.",
        "Which words do the letters {name} stand for?",
    ),
)

TERM_SEARCH = Wordings(
    train=(
        "Which term is this: {key}",
        "Name the term: {key}",
        "What is this called: {key}",
        "Which term has this meaning: {key}",
        "I am looking for a term. {key}",
        "What is the word for this: {key}",
        "Find the term: {key}",
        "{key} Which term is that?",
        "{key} What is that called?",
        "What do people call this: {key}",
        "{key} What term is that?",
        "{key} Name that term.",
        "{key} What is the term for this?",
        "{key} Which word is that?",
    ),
    eval=(
        "Tell me the term for this: {key}",
        "What term has the meaning: {key}",
        "{key} What is the word for that?",
    ),
)

VERBS = ("Define", "Describe", "Explain", "Find", "Give", "List", "Name", "Spell", "Tell", "Write")

OPENINGS_TRAIN = (
    "Hello. {question}",
    "Hi, I have a question. {question}",
    "I am new to this. {question}",
    "I am writing a recipe. {question}",
    "Quick question: {question}",
    "Please help me. {question}",
    "{question} Thank you.",
    "{question} Please be brief.",
)
OPENINGS_EVAL = ("Hi. {question}", "I have a quick question. {question}", "{question} Thanks.")

SYSTEM_PROMPTS = (
    "You are SmolFactory's assistant.",
    "You answer questions about SmolFactory.",
    "You help people to fine-tune language models. Be brief.",
)

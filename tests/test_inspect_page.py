"""The page of scripts/inspect_data.py --html: what it holds is the token table, and what a browser makes of it."""

import html.parser
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from config.loader import read_command_line
from scripts.inspecting.page import histogram, page
from src.data import build_datasets
from src.model import load_tokenizer
from src.tokenization import IGNORED
from tests.test_inspect_data import inspected
from tests.tiny_run import conversation, write_recipe, write_rows

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- ' & \u2028"

WORDS = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe, its page, and its data; one row is too long."""
    folder = tmp_path_factory.mktemp("page")
    recipe = write_recipe(folder)
    rows = [conversation(f"question {word}", f"Answer {word}.\n\tIndented 日本🙂") for word in WORDS]
    write_rows(folder / "train.jsonl", [*rows, conversation("long", "very " * 80)])
    target = folder / "data.html"
    done = inspected(recipe, "--html", target, "--data.max_length", "256")
    assert done.code == 0, done.stderr
    config = read_command_line(["--config", str(recipe), "--data.max_length", "256"]).config
    tokenizer = load_tokenizer(config.model)
    return target, tokenizer, build_datasets(config.data, tokenizer), done


def content_of(text):
    """The data in a page, as a browser finds it: up to the first end of the element."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script', text, re.DOTALL)[1])


def test_the_page_holds_every_row_of_the_token_table(made):
    target, tokenizer, data, done = made
    content = content_of(target.read_text(encoding="utf-8"))
    assert f"{target}: {len(content['rows'])} rows" in done.stdout
    expected = [(side, row) for side, table in (("train", data.train), ("eval", data.eval)) for row in table]
    assert len(expected) == len(content["rows"]) == 4 + 4
    for row, (side, own) in zip(content["rows"], expected, strict=True):
        pieces = [content["pieces"][place] for place in row["pieces"]]
        states = itertools.chain.from_iterable([at % 2 == 1] * length for at, length in enumerate(row["runs"]))
        found = [(number, state) for piece, state in zip(pieces, states, strict=True) for number in piece[2]]
        assert [number for number, _ in found] == own["input_ids"]
        assert [number if state else IGNORED for number, state in found] == own["labels"]
        assert "".join(piece[0] for piece in pieces) == tokenizer.decode(own["input_ids"])
        assert (row["side"], row["origin"], row["tokens"]) == (side, own["origin"], len(own["input_ids"]))
        assert row["supervised"] == len(own["labels"]) - own["labels"].count(IGNORED)
    assert content["reasons"] == {"too long": 1}
    assert [(row["reason"], row["origin"][-6:]) for row in content["left_out"]] == [("too long", "line 5")]
    assert content["account"] == done.stdout.splitlines()[1:]


def test_the_histogram_counts_every_row(made):
    target, _, data, _ = made
    found = content_of(target.read_text(encoding="utf-8"))["histogram"]
    lengths = [len(ids) for table in (data.train, data.eval) for ids in table["input_ids"]]
    assert Counter(length // found["width"] for length in lengths) == {
        bar: count for bar, count in enumerate(found["kept"]) if count
    }
    assert sum(found["left_out"]) == 1


def test_bars_reach_to_max_length_and_gather_what_is_far_beyond_it():
    near = histogram(np.array([10, 99, 100]), np.array([130]), max_length=100)
    assert (near["width"], len(near["kept"]), near["open"]) == (5, 27, False)  # the last from 130 to 134
    assert near["kept"][2] == near["kept"][19] == near["kept"][20] == near["left_out"][26] == 1
    far = histogram(np.array([10]), np.array([5000, 210]), max_length=100)
    assert (far["width"], len(far["kept"]), far["left_out"][-1], far["open"]) == (5, 41, 2, True)
    assert len(histogram(np.array([90]), np.zeros(0, int), max_length=100)["kept"]) == 51  # 2 wide, to 100
    assert len(histogram(np.array([9]), np.zeros(0, int), max_length=100)["kept"]) == 10  # 1 wide: none comes near


def attacked():
    """What a page holds, with an attack wherever a text of the data's maker can stand."""
    row = {"side": "train", "number": 0, "origin": EVIL, "tokens": 1, "supervised": 1}
    return {
        "recipe": EVIL,
        "max_length": 8,
        "account": [EVIL],
        "sides": {"train": {"rows": 1, "tokens": 1, "supervised_tokens": 1}},
        "histogram": {"width": 1, "kept": [0, 1], "left_out": [0, 0], "open": False},
        "pieces": [[EVIL, 0, [7]]],
        "rows": [row | {"pieces": [0], "runs": [0, 1], "turns": [[0, EVIL]]}],
        "reasons": {EVIL: 1},
        "left_out": [{"side": "train", "origin": EVIL, "reason": EVIL, "detail": EVIL, "tokens": None}],
    }


def test_a_page_loads_nothing_and_no_text_of_the_data_is_html():
    content = attacked()
    text = page(content)
    assert content_of(text) == content
    assert re.findall(r"<script[^>]*>", text) == ['<script id="data" type="application/json">', "<script>"]
    assert "<img" not in text
    assert not re.search(r"\b(src|href)=[^x]|@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML", text)


def test_a_choice_limits_the_page(made, tmp_path):
    recipe = made[0].parent / "recipe.yaml"
    target = tmp_path / "chosen.html"
    for choice, expected in (("--row 2", ["train-2"]), ("--rows 1", ["train-0", "eval-0"]), ("--refused", [])):
        assert inspected(recipe, *choice.split(), "--html", target, "--data.max_length", "256").code == 0
        content = content_of(target.read_text(encoding="utf-8"))
        assert [f"{row['side']}-{row['number']}" for row in content["rows"]] == expected
        assert content["sides"]["train"]["rows"] == 4
        assert len(content["left_out"]) == 1


def test_a_page_that_cannot_be_written_is_a_mistake(made, tmp_path):
    done = inspected(made[0].parent / "recipe.yaml", "--html", tmp_path / "no" / "data.html")
    assert done.code == 2
    assert "give a file in a folder that exists" in done.stderr


class Elements(html.parser.HTMLParser):
    """`texts` are (id, classes, text) of every element, its inner ones' text included; `tags` counts elements."""

    VOID = frozenset(("meta", "input", "br", "img", "link"))

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags, self.title = [], [], Counter(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append((given.get("id", ""), set((given.get("class") or "").split()), []))

    def handle_endtag(self, tag):
        name, classes, parts = self.open.pop()
        self.title = "".join(parts) if tag == "title" and not self.title else self.title
        self.texts.append((name, classes, "".join(parts)))

    def handle_data(self, text):
        for _, _, parts in self.open:
            parts.append(text)

    def by_id(self, name):
        return next(text for found, _, text in self.texts if found == name)

    def by_class(self, name):
        return [text for _, classes, text in self.texts if name in classes]


@pytest.fixture
def browse(tmp_path):
    """What a browser makes of a page, given what follows # in its address; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs Chromium, to run the page's script")

    def run(page, fragment=""):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
        address = f"{page.as_uri()}#{fragment}"
        done = subprocess.run(
            [browser, *options, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=60
        )
        return Elements(done.stdout)

    return run


def test_a_search_in_the_address_lists_the_rows_that_have_it_and_shows_the_first(made, browse):
    target, tokenizer, data, _ = made
    page = browse(target, "q=QUESTION+three")
    assert page.by_id("count") == "1 of 9 rows"
    assert page.by_class("name") == ["train 2"]
    row = data.train[2]
    assert "".join(page.by_class("text")) == tokenizer.decode(row["input_ids"])
    supervised = [label for label in row["labels"] if label != IGNORED]
    assert "".join(page.by_class("trained-text")) == tokenizer.decode(supervised)
    assert "".join(page.by_class("special")) == "<|im_start|><|im_end|>" * 2
    left_out = browse(target, "q=too+long&theme=dark")
    assert left_out.by_class("name") == ["too long"]
    assert "more than max_length 256" in left_out.by_class("reason")[0]


def test_what_attacks_the_page_is_shown_as_text(browse, tmp_path):
    path = tmp_path / "attacked.html"
    # The page must hold without its policy, too.
    path.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page(attacked())), encoding="utf-8")
    for fragment in ("row=train-0", "side=out&row=out-0&q=%3Cscript%3E"):
        shown = browse(path, fragment)
        assert shown.title == f"{EVIL}: the data"
        assert shown.by_id("recipe") == EVIL
        assert EVIL in shown.by_id("sources")
        assert EVIL in shown.by_class("facts")[0]
        assert shown.tags["img"] == 0
        assert shown.tags["script"] == 2
    # The line separator is shown as U+2028, by a mark that is no text.
    assert browse(path).by_class("text") == [EVIL.replace("\u2028", "")]


KEYS = """
const key = (name) => document.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
const told = {};
key("ArrowDown"); key("j"); key("k");
told.address = location.hash;
told.title = document.querySelector("#row h2").textContent;
document.querySelector("#switches [data-name=context]").click();
told.trained = document.querySelector("#row").innerText;
const token = document.querySelector(".trained-text");
token.dispatchEvent(new PointerEvent("pointerover", {bubbles: true, clientX: 5, clientY: 5}));
told.tip = document.getElementById("tip").textContent;
const bars = [...document.querySelectorAll("svg .hit")];
bars.find((bar) => bar.told().includes("1 left out")).dispatchEvent(new MouseEvent("click"));
told.count = document.getElementById("count").textContent;
key("/");
told.focus = document.activeElement.id;
key("Escape");
told.after = document.getElementById("count").textContent;
document.title = JSON.stringify(told);
"""


def test_keys_switches_and_bars_do_what_they_say(made, browse, tmp_path):
    target, tokenizer, data, _ = made
    text = target.read_text(encoding="utf-8")
    # The page's policy would forbid this script too.
    text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{KEYS}</script></body>")
    driven = tmp_path / "driven.html"
    driven.write_text(text, encoding="utf-8")
    page = browse(driven)
    told = json.loads(next(text for _, _, text in page.texts if text.startswith('{"address"')))
    assert (told["address"], told["title"]) == ("#row=train-1", "train row 1")
    row = data.train[1]
    first = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
    assert told["tip"] == (
        f'id {row["input_ids"][first]}   "{tokenizer.decode(row["input_ids"][first])}"\n'
        f"token {first + 1} of {len(row['input_ids'])}, supervised"
    )
    hidden = re.findall(r"⋯ (\d+) tokens?", told["trained"])
    assert sum(map(int, hidden)) == row["labels"].count(IGNORED)
    assert "Answer two." in told["trained"]
    assert "question" not in told["trained"]
    assert told["count"] == "1 of 9 rows"
    assert told["focus"] == "search"
    assert told["after"] == "9 rows"

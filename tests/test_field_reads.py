import itertools
import re
from pathlib import Path

import pytest

from tests.field_reads import all_fields, fields_read

ROOT = Path(__file__).parents[1]


def planted(folder, text):
    path = folder / "planted.py"
    path.write_text(text, encoding="utf-8")
    return [path]


PLANTED = {
    "annotated parameter": ("def f(optim: OptimConfig) -> float:\n    return optim.beta1\n", ("OptimConfig", "beta1")),
    "chain": ("def f(config: RunConfig) -> int:\n    return config.training.seed\n", ("TrainingConfig", "seed")),
    "variable": (
        "def f(config: RunConfig):\n    data = config.data\n    return data.workers\n",
        ("DataConfig", "workers"),
    ),
    "loop": (
        "def f(config: DataConfig):\n    for n, s in enumerate((*config.train, *config.eval)):\n        s.subset\n",
        ("SourceConfig", "subset"),
    ),
    "comprehension": ("def f(d: DataConfig):\n    return [s.split for s in d.train]\n", ("SourceConfig", "split")),
    "attribute of self": (
        "class A:\n    def __init__(self, hub: HubConfig | None):\n        self.hub = hub\n"
        "    def f(self):\n        return self.hub.private\n",
        ("HubConfig", "private"),
    ),
    "field of another dataclass": (
        "@dataclass\nclass A:\n    o: OutputConfig\ndef f(a: A):\n    return a.o.folder\n",
        ("OutputConfig", "folder"),
    ),
    "result of a function": (
        "def g() -> CommandLine: ...\ndef f():\n    return g().config.hub.license\n",
        ("HubConfig", "license"),
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_read_is_seen(tmp_path, case):
    text, field = PLANTED[case]
    assert field in fields_read(planted(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "def f(t: Tensor):\n    return t.dtype, t.path, t.name\n",
        "def f(config):\n    return config.optim.learning_rate\n",
        "def f(settings: dict):\n    return settings['dtype'], 'model.dtype'\n",
        "def f(config: RunConfig):\n    config = other()\n    return config.optim.eps\n",
        "def f(config: RunConfig):\n    return config.beta1\n",
    ],
)
def test_a_name_that_only_looks_like_a_field_is_no_read(tmp_path, text):
    assert fields_read(planted(tmp_path, text)) == set()


def test_equal_names_in_two_sections_are_told_apart(tmp_path):
    text = "def f(evaluation: EvaluationConfig):\n    return evaluation.micro_batch_rows\n"
    assert fields_read(planted(tmp_path, text)) == {("EvaluationConfig", "micro_batch_rows")}


def test_a_field_that_the_program_stops_reading_is_found(tmp_path):
    """Drop each access to one field from the real program's text: that field, and no other, becomes unread."""
    files = program_files()
    before = fields_read(files)
    copies = []
    for path in files:
        text = path.read_text("utf-8")
        copies.append(tmp_path / f"{len(copies)}.py")
        copies[-1].write_text(re.sub(r"\.weight_decay\b", ".other", text), encoding="utf-8")
    assert before - fields_read(copies) == {("OptimConfig", "weight_decay")}


def program_files():
    folders = [ROOT / name for name in ("src", "utils", "scripts")]
    return [ROOT / "train.py", *itertools.chain.from_iterable(sorted(folder.rglob("*.py")) for folder in folders)]


def test_the_program_reads_every_field():
    unread = sorted(set(all_fields()) - fields_read(program_files()))
    assert unread == [], "fields of the schema that train.py, src, utils and scripts never read"

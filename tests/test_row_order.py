"""The chain of a run's rows: the same for every split of a step, another for other rows, checked when a run goes on."""

import json
from itertools import islice

import pytest
from datasets import Dataset

from config.effects import row_order_settings
from config.loader import to_dict
from config.schema import RunConfig
from src.batches import PackFeed, PackMark, StepSplit
from src.packing import PackedRows
from src.streaming import StreamFeed
from tests.test_batches import many_packs
from tests.test_streaming import stream_config, stream_of
from tests.tiny_run import (
    chat_rows,
    conversation,
    metrics_of,
    run_train,
    stop_after,
    two_epochs,
    write_rows,
)
from utils.hash_chain import START, extended

STEPS = 9


def chains(feed):
    return [mark.chain for _, mark in islice(feed.marked_steps(), STEPS)]


def rows_of_steps(feeds):
    """The rows that all processes together learn in each step, in their order, without what fills a step up."""
    steps = zip(*(islice(feed.marked_steps(), STEPS) for feed in feeds), strict=True)
    for shares in steps:
        batches = [batch for each in zip(*(share for share, _ in shares), strict=True) for batch in each]
        yield [pack["input_ids"].tolist() for batch in batches for pack in batch if len(pack["input_ids"]) > 1]


@pytest.mark.parametrize("limit", ["rows", "tokens"])
@pytest.mark.parametrize("streams", [False, True])
def test_the_chain_is_that_of_the_rows_however_a_step_is_split(tmp_path, streams, limit):
    config = stream_config(tmp_path, packing=False)

    def feed(rows, accumulation, processes=1, process=0, seed=3):
        size = {"rows": rows} if limit == "rows" else {"tokens": 130}
        split = StepSplit(**size, accumulation_steps=accumulation, processes=processes, process=process)
        if streams:
            return StreamFeed(stream_of(config), split, seed=seed, steps=STEPS)
        return PackFeed(many_packs(30), split, seed=seed, max_steps=STEPS)

    expected = chains(feed(1, 8))
    assert len(set(expected)) == STEPS
    layouts = [(1, 4, 2), (1, 2, 4), (1, 1, 8)]  # rows, accumulation steps, processes
    if limit == "rows":
        layouts += [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
    rows = list(rows_of_steps([feed(1, 8)]))
    for size, accumulation, processes in layouts:
        feeds = [feed(size, accumulation, processes, process) for process in range(processes)]
        assert list(rows_of_steps(feeds)) == rows
        assert [chains(one) for one in feeds] == [expected] * processes
    assert chains(feed(1, 8, seed=4))[0] != expected[0]


def test_the_chain_tells_which_step_a_row_is_in_and_how_long_it_is():
    def chain(*lengths, accumulation=2, packing=False):
        rows = [[5] * length for length in lengths]
        packs = PackedRows(Dataset.from_dict({"input_ids": rows, "labels": rows}), max_length=64, packing=packing)
        return PackFeed(packs, StepSplit(accumulation_steps=accumulation), seed=0, epochs=1).chain_at(4 // accumulation)

    assert chain(3, 4, 5, 6) == chain(3, 4, 5, 6) != START
    assert len({chain(3, 4, 5, 6), chain(3, 4, 5, 7), chain(3, 4, 5, 6, accumulation=1), chain(3, 4, 5, 6, 7)}) == 4


def test_a_chain_that_is_computed_again_is_that_of_the_steps_that_were_fed():
    feed = PackFeed(many_packs(), StepSplit(rows=3, accumulation_steps=4), seed=3, epochs=2)
    marks = [PackMark()]
    for _, mark in islice(feed.marked_steps(), feed.steps):
        marks.append(mark)
    assert [mark.step for mark in marks] == list(range(19))  # 100 packs are 8 steps of 12 and one of 4
    for mark in marks:
        assert feed.chain_at(mark.step) == mark.chain
        assert feed.chain_at(18, since=mark) == marks[-1].chain
    feed.go_to(11)
    assert feed.mark == marks[11]


def test_parts_of_a_link_do_not_run_into_one_another():
    one, two = (many_packs(count).lengths for count in (4, 5))
    assert extended(START, one, two) != extended(START, two, one)
    assert extended(START, two) != extended(START, two[:2], two[2:])


def test_settings_of_the_order_are_settings():
    names = row_order_settings(to_dict(RunConfig())).keys()
    assert {"data.seed", "data.max_length", "model.tokenizer", "training.seed", "training.micro_batch_rows"} <= names
    assert not {"data.workers", "data.cache_folder", "optim.learning_rate", "training.max_steps"} & names


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """The folder of a recipe of six steps, once run."""
    folder = tmp_path_factory.mktemp("order")
    done = run_train("--config", two_epochs(folder, "plain"))
    assert done.code == 0, done.stderr
    return folder


def go_back(run, step):
    """As `stop_after`, of a run that may not have come to its end."""
    (run / "model").mkdir(exist_ok=True)
    for name in ("result.json", "README.md"):
        (run / name).touch()
    stop_after(run, step)


def resume(folder, *arguments):
    go_back(folder / "outputs" / "run", 4)
    return run_train("--config", folder / "recipe.yaml", "--resume", *arguments)


def logged(run):
    return {line["step"]: line["batches"] for line in metrics_of(run) if "loss" in line}


def test_a_run_goes_on_with_other_data_only_where_a_setting_explains_it(six_steps):
    run, train_file = six_steps / "outputs" / "run", six_steps / "train.jsonl"
    before, text = logged(run), train_file.read_text()
    assert list(before) == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "checkpoint-4" / "order.json").read_text())["chain"] == before[4]
    write_rows(train_file, [conversation("count to one and then more", "one two three"), *chat_rows()[1:]])
    record = (run / "data.json").read_text()
    done = resume(six_steps)
    assert done.code == 2
    assert (run / "data.json").read_text() == record, "the digests of the data that was trained on stay"
    assert "error: the rows up to step 4 (chain" in done.stderr
    assert "are not those that checkpoint-4 was trained on, and no setting that orders them has changed" in done.stderr
    train_file.write_text(text)
    done = resume(six_steps, "--training.seed", "7")
    assert done.code == 0, done.stderr
    assert "was trained on, as training.seed (42 -> 7) changed" in done.stderr
    after = logged(run)
    assert {step: after[step] for step in range(1, 5)} == {step: before[step] for step in range(1, 5)}
    assert after[5] != before[5]
    done = run_train("--config", six_steps / "recipe.yaml", "--resume", "--training.seed", "7")
    assert done.code == 0, done.stderr
    assert "was trained on" not in done.stderr, "the new order was taken up at step 4"
    done = resume(six_steps, "--training.seed", "7")
    assert "as training.seed (42 -> 7) changed" in done.stderr, "checkpoint-4 is still of the first order"
    assert logged(run) == after


def test_another_split_of_the_same_steps_goes_on_without_a_word(six_steps):
    resume(six_steps)
    run = six_steps / "outputs" / "run"
    before = logged(run)
    done = resume(six_steps, "--training.micro_batch_rows", "4", "--training.accumulation_steps", "1")
    assert done.code == 0, done.stderr
    assert "was trained on" not in done.stderr
    assert logged(run) == before


def test_rows_of_a_stream_that_were_read_before_are_compared(tmp_path):
    recipe = two_epochs(
        tmp_path,
        "plain",
        data={"streaming": True, "stream_window_rows": 8},
        training={"max_steps": 6, "epochs": 1.0, "save_every_steps": 1, "accumulation_steps": 1},
    )
    run, train_file = tmp_path / "outputs" / "run", tmp_path / "train.jsonl"
    assert run_train("--config", recipe).code == 0
    state = json.loads((run / "checkpoint-3" / "stream.json").read_text())
    assert state["place"]["rows_read"] == [8], "the checkpoint is to stand in the second window"
    assert state["given"] > 0
    rows, text = chat_rows(), train_file.read_text()
    # A row of the window before, and one of the window that the step is in; both keep their length.
    for index, said in ((2, "the first 8 rows of"), (12, "the rows of window 1 of epoch 0 of the stream")):
        changed = list(rows)
        words = rows[index]["messages"][1]["content"].split()
        changed[index] = conversation(rows[index]["messages"][0]["content"], " ".join(["nine", *words[1:]]))
        write_rows(train_file, changed)
        go_back(run, 3)
        done = run_train("--config", recipe, "--resume")
        assert done.code == 2
        assert f"error: {said}" in done.stderr
        assert "are not those that checkpoint-3 was trained on" in done.stderr
    train_file.write_text(text)
    assert run_train("--config", recipe, "--resume").code == 0

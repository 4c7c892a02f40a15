"""A run goes on with other processes, micro-batches and accumulation through the same global batches."""

import shutil

import pytest

from tests.tiny_run import metrics_of, stop_after, two_epochs, weights_of

# Processes, rows of a micro-batch, accumulation steps: each is a global batch of eight rows.
LAYOUTS = [
    ((1, 1, 8), (2, 1, 4)),
    pytest.param((2, 1, 4), (1, 1, 8), marks=pytest.mark.slow),
    pytest.param((1, 2, 4), (2, 4, 1), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def finish(fork_server, folder):
    """Train with a layout, once, and give the run's folder."""
    recipe = two_epochs(
        folder, "plain", data={"packing": False}, training={"log_every_steps": 2, "save_every_steps": 1}
    )

    def finish(name, layout, *arguments):
        processes, rows, accumulation = layout
        options = ["--training.micro_batch_rows", str(rows), "--training.accumulation_steps", str(accumulation)]
        command = ["--config", recipe, "--output.name", name, *options, *arguments]
        children = fork_server.start_all(command, processes=processes, log=folder / f"log-{name}")
        assert [child.wait() for child in children] == [0] * processes, (folder / f"log-{name}0").read_text()
        return folder / "outputs" / name

    return finish


def logged(run, figure):
    return {line["step"]: line[figure] for line in metrics_of(run) if "loss" in line}


@pytest.mark.parametrize(("before", "after"), LAYOUTS, ids=str)
def test_another_layout_goes_on_with_the_same_batches(finish, folder, before, after):
    whole = folder / "outputs" / str(before[:2]).strip("()").replace(", ", "x")
    if not whole.exists():
        finish(whole.name, before)
    run = folder / "outputs" / f"{whole.name}-resumed-{after[0]}"
    shutil.copytree(whole, run)
    stop_after(run, 5)  # within the second epoch, of 20 rows in steps of 8, 8 and 4, and between two logged lines
    finish(run.name, after, "--resume")
    assert logged(run, "batches") == logged(whole, "batches")
    assert list(logged(run, "batches")) == [1, 2, 4, 6]
    assert logged(run, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
    weights, expected = weights_of(run / "model"), weights_of(whole / "model")
    difference = sum(((weights[name] - expected[name]).double() ** 2).sum() for name in expected) ** 0.5
    # float32 sums in another order: a rounding or two of 6e-8 a step, over six steps.
    assert difference / sum((tensor.double() ** 2).sum() for tensor in expected.values()) ** 0.5 <= 1e-6
    said = (folder / f"log-{run.name}0").read_text()
    assert "was trained on" not in said

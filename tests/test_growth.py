"""Growth is measured within limits that are told, and its laws are those of the figures."""

import importlib.util
import json

import numpy as np
import pytest

from scripts.benchmark import main
from scripts.benchmarking import growth
from scripts.benchmarking.growth_page import markdown
from scripts.benchmarking.laws import fit_line, fit_power
from scripts.benchmarking.process import over_limit, run_worker
from utils.errors import UserError

LENGTHS = [512, 1024, 2048, 4096]


def test_a_line_is_found_again_with_its_coefficients():
    x = np.array([512, 1024, 4096, 16384])
    found = fit_line(x, 7e-4 + 3e-8 * x)
    assert [found.intercept, found.slope] == pytest.approx([7e-4, 3e-8], rel=1e-9)
    assert found.residual < 1e-9
    assert found.at(1000) == pytest.approx(7e-4 + 3e-5)
    assert fit_line([1, 2], [1, 2]) is None


def test_a_power_is_found_again_with_its_exponent():
    x = np.array([5e6, 15e6, 42e6, 135e6])
    found = fit_power(x, 2e-10 * x**0.93)
    assert [found.factor, found.exponent] == pytest.approx([2e-10, 0.93], rel=1e-9)
    assert found.residual < 1e-9
    assert fit_power([1, 2], [1, 2]) is None


def test_the_residual_is_the_relative_noise_of_the_figures():
    x = np.linspace(100, 10_000, 2000)
    noise = 1 + 0.05 * np.random.default_rng(0).standard_normal(len(x))
    # A standard deviation of 2,000 draws is known to 2 %, and least squares of two terms takes next to none of it.
    assert fit_line(x, (2.0 + 0.01 * x) * noise).residual == pytest.approx(0.05, rel=0.05)
    assert fit_power(x, x**0.9 * noise).residual == pytest.approx(0.05, rel=0.05)


def figures_at(tokens, seconds, mib):
    return {
        "tokens_per_second": 1 / seconds,
        "tokens_per_step": tokens,
        "peak_memory_mib": mib,
        "first_losses": [6.0],
        "first_grad_norms": [1.0],
        "first_supervised_tokens": [10],
    }


def known_worker(folder, task, *, timeout_s, memory_gib):
    """Ours: 1 ms and 50 ns for each token before it, 500 MiB and 0.25 a token. The other's memory grows faster."""
    case = task["case"]
    if case["model"] != "tiny":
        return figures_at(128, 1e-9 * growth.parameters_of(case["model"]) ** 0.8, 900)
    length = case["max_length"]
    ours = task["name"] == "smolfactory"
    seconds = 1e-3 + (5e-8 * length if case["rows"] == "document" else 0)
    return figures_at(length, seconds, 500 + (0.25 if ours else 2.0) * length)


def grow(monkeypatch, tmp_path, *words):
    shapes = {"llama-5m": 4_899_968, "llama-15m": 15_191_712, "llama-42m": 41_689_600}
    monkeypatch.setattr(growth, "run_worker", known_worker)
    monkeypatch.setitem(growth.SHAPES, "tiny", growth.SHAPES["tiny"] | {"max_position_embeddings": 8192})
    assert all(growth.parameters_of(name) == count for name, count in shapes.items())
    command = ["growth", "--model", "tiny", "--rows", "synthetic", "--size_length", "128", "--tokens", "1"]
    lengths = [str(length) for length in LENGTHS]
    code = main([*command, "--lengths", *lengths, "--sizes", *shapes, *words, "--output", str(tmp_path / "g")])
    return code, json.loads((tmp_path / "g.json").read_text())


def test_laws_and_files_are_those_of_the_figures(monkeypatch, tmp_path, capsys):
    code, record = grow(monkeypatch, tmp_path, "--contenders", "smolfactory")
    assert code == 0
    laws = {name: found["smolfactory"] for name, found in record["laws"].items()}
    assert laws["document"]["time"]["intercept"] == pytest.approx(1e-3)
    assert laws["document"]["time"]["slope"] == pytest.approx(5e-8)
    assert laws["packs"]["time"]["slope"] == pytest.approx(0, abs=1e-12)
    assert laws["packs"]["memory"]["slope"] == pytest.approx(0.25)
    assert laws["size"]["time by size"]["exponent"] == pytest.approx(0.8)
    page = (tmp_path / "g.md").read_text()
    assert page == markdown(record)
    assert page in capsys.readouterr().out
    # 50 ns x 4,096 beside 1 ms: 0.2048 of 1.2048.
    assert "ms a token = 1.0000 +0.0500 x length / 1,000 (residual 0.0%; the second term is 17% at 4,096)" in page
    assert "MiB = 500 +250.0 x tokens / 1,000" in page
    assert "time a token grows as parameters^0.80" in page
    assert str(tmp_path) not in page
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "g.png").unlink()
        assert main(["growth", "--draw", str(tmp_path / "g.json")]) == 0
        assert (tmp_path / "g.png").is_file()


def test_a_contender_over_a_limit_is_named_and_not_tried_further(monkeypatch, tmp_path):
    # 2 MiB a token: 1,524, 2,548 and 4,596 MiB, so 4,096 tokens would take 8,692, which is 8.5 GiB.
    words = ["--contenders", "smolfactory", "trl packed", "--memory_gib", "6"]
    code, record = grow(monkeypatch, tmp_path, *words)
    assert code == 0
    points = record["series"]["document"]["points"]
    errors = [point["contenders"]["trl packed"][0].get("error") for point in points]
    line = "takes more memory than 6 GiB: the line through the two points before says 8.5"
    assert errors == [None, None, None, line]
    page = (tmp_path / "g.md").read_text()
    assert f"| over a limit: {line} |" in page
    # A peak above the limit that no look at the process saw counts too, and longer packs are not tried.
    code, record = grow(monkeypatch, tmp_path, *words[:-1], "2")
    points = record["series"]["packs"]["points"]
    errors = [point["contenders"]["trl packed"][0].get("error") for point in points]
    over = "takes more memory than 2 GiB"
    assert errors == [None, over, f"{over}, at 1,024 already", f"{over}, at 1,024 already"]


def test_a_contender_that_fails_is_no_case_of_a_limit(monkeypatch, tmp_path):
    def fail(folder, task, *, timeout_s, memory_gib):
        return {"error": "RuntimeError: no (exit code 1)"}

    monkeypatch.setattr(growth, "run_worker", fail)
    words = ["growth", "--model", "tiny", "--rows", "synthetic", "--lengths", "64", "--sizes", "--tokens", "64"]
    assert main([*words, "--contenders", "smolfactory", "--output", str(tmp_path / "g")]) == 1
    assert "| failed: RuntimeError: no (exit code 1) |" in (tmp_path / "g.md").read_text()


@pytest.mark.slow
def test_real_points_agree_and_a_process_over_its_memory_is_ended(tmp_path):
    words = ["growth", "--model", "tiny", "--rows", "synthetic", "--lengths", "64", "--sizes", "--tokens", "128"]
    assert main([*words, "--contenders", "smolfactory", "floor", "--output", str(tmp_path / "g")]) == 0
    record = json.loads((tmp_path / "g.json").read_text())
    document, packs = (record["series"][name]["points"][0] for name in ("document", "packs"))
    for point in (document, packs):
        assert set(point["contenders"]) == {"smolfactory", "floor"}
        assert point["agreement"][0]["contenders"]["floor"]["faults"] == []
    [found] = document["contenders"]["smolfactory"]
    assert found["tokens_per_step"] == 64
    assert found["steps"] == 2
    # The interpreter with torch takes more than that.
    task = {"name": "smolfactory", "case": document["case"], "attention": "sdpa"}
    result = run_worker(tmp_path, task, timeout_s=100, memory_gib=0.05)
    assert result == {"error": "takes more memory than 0.05 GiB"}
    assert over_limit(result)


def test_a_command_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="--tokens 0 must be 1 or more"):
        growth.series_of(growth.parse_arguments(["--tokens", "0"]))
    with pytest.raises(UserError, match="max_length=4096 must be from"):
        growth.series_of(growth.parse_arguments(["--model", "tiny"]))
    assert main(["growth", "--contenders", "nobody", "--lengths", "64", "--sizes", "--rows", "synthetic"]) == 2


def test_points_have_the_tokens_and_lengths_that_were_asked_for():
    found = growth.series_of(growth.parse_arguments(["--tokens", "4096"]))
    assert [case.max_length for case in found["document"]] == [512, 1024, 2048, 4096, 8192, 16384]
    assert [case.steps for case in found["document"]] == [8, 4, 2, 1, 1, 1]
    assert {case.rows for case in found["packs"]} == {"instruction"}
    assert [case.model for case in found["size"]] == ["llama-5m", "llama-15m", "llama-42m", "llama-110m", "llama-135m"]

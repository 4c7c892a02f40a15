import contextlib
import dataclasses
import io
import json
import re

import pytest
from huggingface_hub import ModelCard

from config.schema import HubConfig, ModelConfig, RunConfig
from src.model_card import model_card
from tests.finished_run import HOME, write_model, write_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's folder, in a folder that must not be named."""
    folder = tmp_path_factory.mktemp("secret client") / "base"
    write_model(folder)
    return folder


def metadata(text):
    """What the Hub reads of a card."""
    return ModelCard(text).data.to_dict()


def run_snippet(text, replaced):
    """Run the card's Python with paths put in the place of ids; give its variables and what it printed."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name, path in replaced.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(path)))
    variables, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), variables)
    return variables, printed.getvalue()


def change(path, **settings):
    """Replace entries of a JSON file, by the dotted names of their places with `__` for a dot."""
    content = json.loads(path.read_text())
    for name, value in settings.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


def test_a_model_from_random_weights_has_no_base(tmp_path):
    text = model_card(write_run(tmp_path / "outputs" / "tiny", hub=HubConfig(license="apache-2.0")))
    data = metadata(text)
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    assert {"sft", "smolfactory"} == set(data["tags"])
    assert data["datasets"] == ["me/questions"]
    assert "trained from random weights" in text


def test_a_fine_tuned_hub_model_names_its_base(tmp_path):
    data = metadata(model_card(write_run(tmp_path / "outputs" / "tiny", base="me/base")))
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "finetune")
    assert data["library_name"] == "transformers"


def test_an_adapter_is_of_peft_and_says_so(tmp_path, base):
    data = metadata(model_card(write_run(tmp_path / "outputs" / "tiny", base="me/base", base_folder=base)))
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "adapter")
    assert data["library_name"] == "peft"
    assert {"sft", "lora"} < set(data["tags"])


def test_a_local_base_is_in_prose_and_not_in_the_metadata(tmp_path, base):
    run = write_run(tmp_path / "outputs" / "tiny", base=str(base), base_folder=base)
    text = model_card(run)
    assert "base_model" not in metadata(text)
    assert "`base`, a local folder" in text
    assert "secret client" not in text
    (tmp_path / "models" / "base").mkdir(parents=True)
    change(run / "config.json", model__path="models/base")
    assert "base_model" not in metadata(model_card(run))


def test_results_are_the_record_s(tmp_path):
    text = model_card(write_run(tmp_path / "outputs" / "tiny"))
    (results,) = metadata(text)["model-index"]
    assert results["name"] == "tiny"
    (entry,) = results["results"]
    assert entry["dataset"] == {"name": "held_out.jsonl", "type": "json"}
    assert {metric["type"]: metric["value"] for metric in entry["metrics"]} == {"loss": 0.3125, "exact_match": 0.875}
    assert "| Loss | 5.5625 | 0.3125 |" in text
    assert "| Exact match | 0.0000 | 0.8750 |" in text
    assert "Training loss, first and last logged: 5.5000 and 0.2500." in text


def test_settings_and_data_are_the_record_s(tmp_path):
    text = model_card(write_run(tmp_path / "outputs" / "tiny"))
    assert "micro-batch 1 x length 512 x accumulation 1 x processes 2 = 1,024 at most" in text
    assert "| learning rate | 2e-05 at its peak, cosine, warmup: none |" in text
    digest = "bc51e9e65d79e1c90ba544ab2eae1044ccdf8c1af7a559ba375cba4276f7d99e"  # printf rows | sha256sum
    assert f"| `train.jsonl` | train | messages | 88 | sha256 `{digest}` |" in text
    link = "[me/questions](https://huggingface.co/datasets/me/questions)"
    assert f"| {link} train | train | alpaca | 30 | revision `{'ab' * 20}` |" in text
    assert "Trained on 118 rows, 9,000 tokens, 4,000 supervised tokens. Left out: 2 rows (too long)." in text
    assert "python train.py --config mine.py --optim.learning_rate 2e-5" in text
    assert "Versions: python 3.11.7, torch 2.13.0." in text


def test_no_folder_of_the_machine_is_named(tmp_path):
    run = write_run(tmp_path / "a private place" / "tiny")
    change(run / "config.json", output__folder=str(run.parent))
    text = model_card(run)
    for word in (HOME, "alice", "secret client", "a private place", str(tmp_path)):
        assert word not in text, word
    assert 'location = "tiny/model"' in text


def test_an_uncommitted_change_is_told(tmp_path):
    run = write_run(tmp_path / "outputs" / "tiny")
    assert "changes that are in no commit" not in model_card(run)
    change(run / "environment.json", git_commit="c0ffee-dirty")
    assert "git checkout c0ffee\n" in model_card(run)
    assert "changes that are in no commit" in model_card(run)


def test_a_share_held_out_of_the_training_rows_is_named_as_one(tmp_path):
    run = write_run(tmp_path / "outputs" / "tiny")
    change(run / "config.json", data__eval=[], data__eval_fraction=0.05)
    change(run / "data.json", eval__sources=[{"path": "me/questions", "revision": "ab" * 20}])
    text = model_card(run)
    assert "On me/questions (a held-out share of 0.05):" in text
    (entry,) = metadata(text)["model-index"][0]["results"]
    assert (entry["dataset"]["type"], entry["dataset"]["revision"]) == ("me/questions", "ab" * 20)


def test_a_run_without_a_record_has_a_card_that_claims_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(RunConfig(model=ModelConfig(path="me/base")))))
    text = model_card(tmp_path)
    assert "model-index" not in metadata(text)
    assert "It was not evaluated" in text
    assert "None were recorded." in text


def test_the_snippet_of_a_chat_model_runs(tmp_path):
    run = write_run(tmp_path / "outputs" / "tiny")
    variables, printed = run_snippet(model_card(run), {"outputs/tiny/model": run / "model"})
    prompt = variables["tokenizer"].decode(variables["inputs"].input_ids[0])
    assert prompt == "<s>user: What can you do?</s><s>assistant: "
    assert printed.strip("\n") == variables["tokenizer"].decode(variables["answer"], skip_special_tokens=True).strip(
        "\n"
    )


def test_the_snippet_of_a_model_without_a_chat_template_runs(tmp_path):
    run = write_run(tmp_path / "outputs" / "tiny", base="me/base", chat_template=None)
    text = model_card(run, repo_id="me/tiny")
    variables, _ = run_snippet(text, {"me/tiny": run / "model"})
    assert variables["tokenizer"].decode(variables["inputs"].input_ids[0]) == "Once upon a time"
    assert "It has no chat template" in text


@pytest.mark.parametrize("revision", [None, "main"])
def test_the_snippet_of_an_adapter_loads_its_weights(tmp_path, base, revision):
    local = str(base) if revision is None else "me/base"
    run = write_run(tmp_path / "outputs" / "tiny", base=local, base_folder=base)
    change(run / "config.json", model__revision=revision)
    text = model_card(run)
    assert ('revision="main"' in text) == (revision is not None)
    variables, _ = run_snippet(text, {local if revision else "base": base, "outputs/tiny/model": run / "model"})
    weights = [value for name, value in variables["model"].named_parameters() if "lora_B" in name]
    assert len(weights) == 7  # q, k, v, o, gate, up and down of one layer
    assert all(weight.abs().sum() > 0 for weight in weights)

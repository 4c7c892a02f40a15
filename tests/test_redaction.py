from pathlib import Path

import pytest

from utils.redaction import public_record, redact, without_folders


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/alice/client/rows.jsonl", "rows.jsonl"),
        ("/home/alice/a client/rows.jsonl", "rows.jsonl"),
        (str(Path.home() / "a client" / "rows.csv"), "rows.csv"),
        ("C:\\Users\\alice\\rows.parquet", "rows.parquet"),
        ("client/rows.jsonl", "rows.jsonl"),
        ("../client/recipe.py", "recipe.py"),
        ("--data=/mnt/client/rows.jsonl", "--data=rows.jsonl"),
        ("/home/alice", "~"),
        ("failed in /opt/client/code.py, line 3", "failed in code.py, line 3"),
        ("file:///mnt/client/base", "base"),
    ],
)
def test_a_published_string_names_no_folder_of_this_machine(text, public):
    assert public_record({"key": [text]}) == {"key": [public]}


@pytest.mark.parametrize(
    "text",
    [
        "config/smol.py",
        "meta-llama/Llama-3.2-1B",
        "https://huggingface.co/datasets/openai/gsm8k",
        "hf://datasets/me/rows/train.parquet",
        "</s>",
        "/no_think",
        "tokens / step, 1/2, and/or",
        "hf_hub_download",
    ],
)
def test_a_published_string_keeps_what_is_no_path_or_secret(text):
    assert public_record(text) == redact(text) == without_folders(text) == text


def test_paths_that_are_keys_are_reduced_too():
    assert public_record({"/home/alice/rows.jsonl": "ab" * 32}) == {"rows.jsonl": "ab" * 32}


def test_numbers_and_null_stay_as_they_are():
    assert public_record([1, 2.5, True, None]) == [1, 2.5, True, None]


@pytest.mark.parametrize("prefix", ["hf_", "hf_oauth_", "hf_jwt_", "api_org_"])
def test_every_kind_of_hub_token_is_redacted(prefix):
    assert redact(f"at {prefix}{'aB3' * 11}: no") == "at ***: no"


def test_authorization_headers_and_secrets_of_the_environment_are_redacted(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert redact("Illegal header value b'Bearer some\\x01thing'") == "Illegal header value b'Bearer ***'"
    assert public_record(["--key=0123456789abcdef"]) == ["--key=***"]

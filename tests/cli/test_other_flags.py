"""Flags as users of other tools write them: understood where the meaning is the same, else with what to write."""

from __future__ import annotations

import re

import pytest

from spp.cli.entry_point import main
from spp.cli.parser import build_parser


def parse(*words: str) -> dict:
    return {
        name: value
        for name, value in vars(build_parser().parse_args(words)).items()
        if name not in ("command", "json", "dry_run")
    }


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max_steps", "3"], {"max_steps": "3"}),
        (["--max_steps=3"], {"max_steps": "3"}),
        (["--num-train-epochs", "3"], {"epochs": "3"}),
        (["--num_train_epochs=3"], {"epochs": "3"}),
        (["--max-length", "64"], {"window": "64"}),
        (["--max-seq-length", "64"], {"window": "64"}),
        (["--lr-scheduler-type", "cosine"], {"schedule": "cosine"}),
        (["--lr", "1e-3"], {"learning_rate": "1e-3"}),
        (["--completion-only-loss"], {"completion_only": True}),
        (["--max-tokens", "9"], {"max_tokens": "9"}),  # an option of its own here
        (["--per-device-train-batch-size", "4"], {"device_batch_size": "4", "batch_size": "4"}),
        (
            ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8"],
            {"device_batch_size": "4", "batch_size": "32"},
        ),
        (
            ["--device-batch-size", "2", "--gradient-accumulation-steps", "3"],
            {"device_batch_size": "2", "batch_size": "6"},
        ),
        (
            ["--per-device-train-batch-size", "4", "--batch-size", "8"],
            {"device_batch_size": "4", "batch_size": "8"},
        ),
    ],
)  # fmt: skip
def test_other_names_are_ours(words, expected, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parse("train", "model", "out", *words) == {"model": "model", "out": "out", **expected}


def test_the_batch_is_over_all_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "8"]
    assert parse("run", *words)["batch_size"] == "64"
    assert "4 x --gradient-accumulation-steps 8 x 2 processes is --batch-size 64" in capsys.readouterr().err


def test_places_of_model_and_output_have_other_names():
    expected = {"model": "m", "out": "o", "data": "d"}
    assert parse("train", "--model_name_or_path", "m", "--output_dir", "o", "--data", "d") == expected
    assert parse("train", "m", "--data", "d", "--output-dir", "o") == expected
    assert parse("run", "--output-dir", "o") == {"out": "o"}
    assert parse("generate", "m", "--max-tokens", "3", "--prompt=--a_b")["max_new_tokens"] == "3"
    assert parse("generate", "m", "--prompt=--a_b")["prompt"] == "--a_b"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "m", "o", "--epoch", "3"], "for --epoch, did you mean --epochs?"),
        (["train", "m", "o", "--bf16"], "for --bf16, write --dtype bfloat16"),
        (["train", "m", "o", "--load_in_4bit"], "write --quantize nf4"),
        (["prune", "m", "o", "--sparsity-ratio", "0.5"], "write --pattern, such as 50%"),
        (["eval", "m", "--max_length", "9", "--stride", "3"], "unrecognized arguments: --stride"),
        (["train", "m", "o", "--gradient-accumulation-steps", "3"], "needs --device-batch-size N here"),
        (["train", "m", "o", "--per-device-train-batch-size", "many"], "must be a whole number.*'many'"),
        (
            ["train", "m", "o", "--device-batch-size", "2", "--gradient-accumulation-steps", "3", "--batch-size", "8"],
            "--batch-size 8 is not",
        ),
    ],
)  # fmt: skip
def test_a_wrong_flag_gets_help_of_its_own_command(words, said, capsys):
    message = refused(capsys, *words)
    assert re.search(re.escape(said) if ".*" not in said else said, message)
    assert f"`spp {words[0]} --help` lists its options" in message and "cache-teacher" not in message


def test_a_wrong_command_gets_the_one_that_was_meant(capsys):
    assert "there is no command 'trian'; did you mean spp train?" in refused(capsys, "trian", "m")

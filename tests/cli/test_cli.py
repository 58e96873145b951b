"""The command line: help for newcomers, quick start, exit codes, one clear message for a mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from spp.cli import entry_point as cli
from spp.errors import UsageError
from spp.options import Options
from spp.training.options import TrainOptions


def test_help_needs_no_torch():
    code = (
        "import sys, spp.cli.entry_point\n"
        "try: spp.cli.entry_point.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_is_in_the_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options: type[Options] = cli.COMMANDS[command].options
    for name, field in options.model_fields.items():
        shown = name.upper().removesuffix("S") if name in cli.COMMANDS[command].positional else f"--{name}"
        assert shown.replace("_", "-") in text, name
        assert field.description, name
    # Wrapped at spaces and hyphens.
    assert "".join(f"example: {cli.COMMANDS[command].example}".split()) in "".join(text.split())


def test_the_help_shows_defaults_of_zero(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "always takes the likeliest token (default: 0.0)" in text and "rounding (default: 0)" in text
    assert "(default: False)" not in text and "(default: None)" not in text


def test_choices_that_depend_on_the_data_can_be_turned_off():
    parse = cli.build_parser().parse_args
    assert parse(["run", "--no-join-documents", "--per-document"]).join_documents is False
    assert not hasattr(parse(["run"]), "join_documents")
    with pytest.raises(SystemExit):
        parse(["run", "--no-overwrite"])


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prune", "dense", "out", "--crit", "wanda"])
    assert "unrecognized arguments: --crit wanda" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), [("--packing", "--join-documents"), ("--no-packing", "--no-join-documents")])
def test_a_flag_that_was_renamed_is_refused_with_its_new_name(capsys, old, new):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "model", "out", old])
    assert stopped.value.code == 2 and f"{old} (it is called {new} now)" in capsys.readouterr().err


def test_an_option_that_was_renamed_is_refused_with_its_new_name():
    with pytest.raises(UsageError, match="packing: no such option; it is called join-documents now"):
        TrainOptions.build({"model": "model", "out": "out", "packing": True})


def test_the_help_says_what_a_text_is_of():
    for command in cli.COMMANDS.values():
        for name, field in command.options.model_fields.items():
            if field.annotation in (str, str | None) and name not in command.positional:
                extra = field.json_schema_extra
                assert isinstance(extra, dict) and extra.get("metavar"), f"{name}: give its Field a metavar"


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def fails(capsys, code: int, *words: object) -> str:
    """Run a command that must fail with `code`, one message and nothing on standard output; the message."""
    assert run(*words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    [message] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return message


def test_prune_merge_verify_inspect_from_the_command_line(tmp_path, tiny_checkpoint, capsys):
    pruned = tmp_path / "pruned"
    assert run("prune", tiny_checkpoint, pruned, "--pattern", "2:4", "--criterion", "magnitude") == 0
    capsys.readouterr()
    assert run("verify", pruned, pruned, "--pattern", "2:4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] is True and report["zeros"] > 0
    assert run("inspect", pruned) == 0
    assert "2:4" in capsys.readouterr().out


def test_verify_names_the_tensor_and_exits_1(tmp_path, tiny_checkpoint, capsys):
    pruned, other = tmp_path / "pruned", tmp_path / "other"
    run("prune", tiny_checkpoint, pruned, "--criterion", "magnitude")
    shutil.copytree(pruned, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    row, column = (tensors[name] == 0).nonzero()[0].tolist()
    tensors[name][row, column] = 1e-8
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run("verify", pruned, other) == 1
    assert f"{name}: 1 of" in capsys.readouterr().out


def test_wrong_words_are_argparse_errors(capsys):
    for words in (["fly"], ["prune"], ["run", "--colour", "red"]):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2
    assert "usage: spp" in capsys.readouterr().err


def test_a_value_that_a_user_pasted_does_not_fill_the_screen(tmp_path, capsys):
    text = "x" * 100_000
    for words in (["inspect", text], ["prune", "m", tmp_path, "--calibration", text], ["report", text]):
        assert run(*words) in (1, 2)
    with pytest.raises(SystemExit):
        run("inspect", "m", text)
    assert len(capsys.readouterr().err) < 8000


def test_one_model_is_verified_with_a_record_only(capsys):
    assert run("verify", "a") == 2
    assert "give two models, or one model and --record" in capsys.readouterr().err


def test_several_wrong_values_are_reported_together(tmp_path, capsys):
    assert run("prune", "m", tmp_path, "--pattern", "4:2", "--samples", "0", "--criterion", "luck") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: 3 problems")
    for part in ("'4:2'", "samples", "'0'", "criterion", "'luck'"):
        assert part in message


def test_a_missing_model(tmp_path, capsys):
    out = tmp_path / "out"
    for words in (["prune", "./nowhere", out], ["train", "./nowhere", out], ["inspect", "./nowhere"]):
        assert "no such folder" in fails(capsys, 2, *words)
    assert not out.exists()


def test_m_does_not_divide(tmp_path, tiny_model, tiny_tokenizer, capsys):
    folder = tmp_path / "odd"
    tiny_model("llama", intermediate_size=44).save_pretrained(folder)
    words = ["prune", folder, tmp_path / "out", "--pattern", "2:8", "--criterion", "magnitude"]
    message = fails(capsys, 2, *words)
    assert "44" in message and "--skip-indivisible" in message
    assert not (tmp_path / "out").exists()
    assert run(*words, "--skip-indivisible") == 0
    assert "down_proj" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ('{"text": "a"}\n{"text": ', "line 2"), ('{"a": 1}\n', "text")]
)
def test_bad_data_files(tmp_path, tiny_checkpoint, capsys, text, words):
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    assert words in fails(capsys, 2, "train", tiny_checkpoint, tmp_path / "out", "--data", data)
    assert words in fails(capsys, 2, "eval", tiny_checkpoint, "--text", data)
    assert "no such file" in fails(capsys, 2, "eval", tiny_checkpoint, "--text", tmp_path / "missing.txt")
    assert not (tmp_path / "out").exists()


def test_truncated_weights(tmp_path, tiny_checkpoint, stories, capsys):
    weights = tiny_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "out"
    for words in (
        ["prune", tiny_checkpoint, out, "--criterion", "magnitude"],
        ["train", tiny_checkpoint, out, "--data", stories],
        ["eval", tiny_checkpoint, "--text", stories],
        ["inspect", tiny_checkpoint],
        ["verify", tiny_checkpoint, tiny_checkpoint],
    ):
        message = fails(capsys, 1, *words)
        assert "model.safetensors" in message and "truncated" in message
    assert not out.exists()


def test_a_full_output_folder(tmp_path, tiny_checkpoint, stories, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for words in (
        ["prune", tiny_checkpoint, out],
        ["train", tiny_checkpoint, out, "--data", stories],
        ["run", "--model", tiny_checkpoint, "--out", out],
    ):
        message = fails(capsys, 2, *words)
        assert "not empty" in message and "--overwrite" in message
    assert (out / "thesis.tex").read_text() == "years of work"


def test_an_unknown_recipe(capsys):
    assert "demo, paper" in fails(capsys, 2, "run", "nowhere.yaml")


def test_doctor(capsys):
    assert run("doctor", "--json") == 0
    assert "torch" in capsys.readouterr().out
    assert run("doctor") == 0


def test_a_reader_that_stops_reading_gets_no_traceback(tiny_checkpoint):
    command = f"{sys.executable} -m spp inspect {tiny_checkpoint} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "error" not in done.stderr.lower()


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "spp", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "spp")

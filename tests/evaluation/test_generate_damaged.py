"""Generation from what is damaged: one error, and never an empty text with exit code 0."""

from __future__ import annotations

import json
import math

import pytest
from families import tiny_model_of
from safetensors.torch import load_file, save_file

from spp.cli.entry_point import main


def fails(capsys, code, *words):
    capsys.readouterr()
    assert main(["generate", *map(str, words), "--max-new-tokens", "4"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    [message] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return message


def poison(path, end):
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith(end)).fill_(math.nan)
    save_file(tensors, path, {"format": "pt"})


def test_factors_that_are_not_finite(tmp_path, tiny_checkpoint, stories, capsys):
    adapter = tmp_path / "adapter"
    assert (
        main(
            ["train", str(tiny_checkpoint), str(adapter), "--data", str(stories), "--max-steps", "1", "--window", "32"]
        )
        == 0
    )
    poison(adapter / "adapter_model.safetensors", "spp_B.weight")
    assert "NaN or infinite" in fails(
        capsys, 1, tiny_checkpoint, "--adapter", adapter, "--prompt", "The", "--dtype", "float32"
    )


@pytest.mark.parametrize("temperature", ["0", "1", "1e-300"])
def test_weights_that_are_not_finite(tiny_checkpoint, capsys, temperature):
    poison(tiny_checkpoint / "model.safetensors", "norm.weight")
    words = [tiny_checkpoint, "--prompt", "The", "--temperature", temperature]
    assert "NaN or infinite" in fails(capsys, 1, *words)


def test_a_model_without_a_limit_of_positions(tmp_path, tiny_tokenizer, capsys):
    """XLNet says that it has -1."""
    tiny_model_of("xlnet").save_pretrained(tmp_path / "xlnet")
    tiny_tokenizer.save_pretrained(tmp_path / "xlnet")
    assert main(["generate", str(tmp_path / "xlnet"), "--prompt", "The", "--max-new-tokens", "2"]) == 0


def test_a_quantized_model_is_not_packed_besides(tiny_checkpoint, capsys):
    """The message is about its quantization, and not about ours."""
    settings = json.loads((tiny_checkpoint / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tiny_checkpoint / "config.json").write_text(json.dumps(settings))
    main(["generate", str(tiny_checkpoint), "--prompt", "The", "--max-new-tokens", "2"])
    assert "PackOnLoad" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [{"temperature": "hot", "do_sample": True}, {"top_k": -1}, {"num_beams": "many"}, {"eos_token_id": "x"}, [1]],
)
def test_wrong_types_in_generation_config(tiny_checkpoint, capsys, settings):
    (tiny_checkpoint / "generation_config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    code = main(["generate", str(tiny_checkpoint), "--prompt", "The", "--max-new-tokens", "2"])
    message = capsys.readouterr().err
    assert code in (0, 1) and "Traceback" not in message
    assert code == 0 or [line for line in message.splitlines() if line.startswith("error: ")]


def test_tokens_above_the_vocabulary(tmp_path, tiny_model, tiny_tokenizer, capsys):
    tiny_model("llama", vocab_size=20).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    assert "the model knows 20 tokens" in fails(capsys, 2, tmp_path / "small", "--prompt", "zzz")

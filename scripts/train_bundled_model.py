"""Train the small Llama that `spp` carries, from scratch, on Python source found where this runs.

    python scripts/train_bundled_model.py --work build/bundled --out src/spp/pipeline/bundled_model

Data: the standard library's `train` part (twice) and installed packages up to `--package-bytes`, in a seeded
order. The standard library's evaluation and calibration parts are held out, and package files that repeat the
lines of a held-out file (vendored copies, back-ports) are dropped. The text itself is never written to `--out`.

Stages, each kept in `--work` and skipped when it is already there: tokenizer (byte-level BPE), token windows,
training (AdamW, warm-up then constant then linear decay, checkpoints every `--save-steps`; run the same
command again to resume), export (bf16 safetensors, tokenizer, `training.json` with the figures of the card).
Because the rate is constant until the decay, a resumed run may change `--steps`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from spp.data.python_source import read_source, source_files, standard_library

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 4096
WINDOW = 512
DECAY_FRACTION = 0.25
LONG_LINE = 40  # characters from which a repeated line says that a file is a copy
COPIED_SHARE = 0.2

ARCHITECTURE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}


def package_documents(byte_budget: int, rng: random.Random) -> Iterator[str]:
    """Installed packages' source in a seeded order, without copies of held-out files, up to a budget."""
    held_out: set[str] = set()
    for part in ("evaluation", "calibration"):
        for text in standard_library(part):
            held_out |= long_lines(text)
    files = source_files(Path(sysconfig.get_path("purelib")))
    rng.shuffle(files)
    for path in files:
        text = read_source(path)
        if text is None:
            continue
        lines = long_lines(text)
        if len(lines & held_out) > COPIED_SHARE * max(len(lines), 1):
            continue
        byte_budget -= len(text.encode())
        if byte_budget < 0:
            return
        yield text


def training_documents(package_bytes: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    documents = 2 * standard_library("train") + list(package_documents(package_bytes, rng))
    rng.shuffle(documents)
    return documents


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=WINDOW
    )


def token_windows(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Dataset:
    """Documents with BOS and EOS, one after the other, cut into windows without overlap, shuffled once."""
    stream: list[int] = []
    for document in documents:
        stream.extend(tokenizer(document, verbose=False)["input_ids"])
        stream.append(tokenizer.eos_token_id)
    windows = [stream[start : start + WINDOW] for start in range(0, len(stream) - WINDOW + 1, WINDOW)]
    random.Random(seed).shuffle(windows)
    return Dataset.from_dict({"input_ids": windows, "labels": windows})


def held_out_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Windows without overlap over the evaluation part joined with blank lines, tail dropped."""
    text = "\n\n".join(standard_library("evaluation"))
    stream = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


def prepare(work: Path, package_bytes: int, seed: int) -> tuple[PreTrainedTokenizerFast, Dataset]:
    """The tokenizer and the windows in `work`, made where they are not there yet."""
    tokenizer_folder, windows_folder = work / "tokenizer", work / "windows"
    if not (tokenizer_folder.exists() and windows_folder.exists()):
        documents = training_documents(package_bytes, seed)
        tokenizer = train_tokenizer(documents)
        tokenizer.save_pretrained(tokenizer_folder)
        token_windows(documents, tokenizer, seed).save_to_disk(windows_folder)
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder), Dataset.load_from_disk(windows_folder)


def train(tokenizer: PreTrainedTokenizerFast, windows: Dataset, args: argparse.Namespace) -> LlamaForCausalLM:
    """A model trained from scratch, or on from the last checkpoint in `args.work`."""
    torch.manual_seed(args.seed)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, **tokens))
    checkpoints = args.work / "checkpoints"
    trainer = Trainer(
        model=model,
        args=training_arguments(checkpoints, args),
        train_dataset=windows,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")) or None)
    return model


def training_arguments(checkpoints: Path, args: argparse.Namespace) -> TrainingArguments:
    """AdamW; the rate rises, stays, and falls over the last quarter."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(args.steps * DECAY_FRACTION), "decay_type": "linear"},
        warmup_steps=min(200, args.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )


def card(model: LlamaForCausalLM, perplexity: float, windows: Dataset, args: argparse.Namespace) -> dict[str, object]:
    """What `training.json` says of a finished model."""
    return {
        "parameters": model.num_parameters(),
        "tokens_seen": args.steps * args.batch * WINDOW,
        "tokens_distinct": len(windows) * WINDOW,
        "held_out_perplexity": perplexity,
        "protocol": f"standard library, evaluation part, window {WINDOW}, stride {WINDOW}, tail dropped, bf16 weights",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arguments": {key: value for key, value in vars(args).items() if key not in {"work", "out"}},
    }


def main() -> None:
    args = parser().parse_args()
    tokenizer, windows = prepare(args.work, args.package_bytes, args.seed)
    model = train(tokenizer, windows, args)
    model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # Measured on the rounded weights that are shipped, computed in fp32.
    perplexity = held_out_perplexity(model.to(torch.float32), tokenizer)
    text = json.dumps(card(model, perplexity, windows, args), indent=2)
    (args.out / "training.json").write_text(text + "\n")
    print(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder for the stages' results and checkpoints")
    made.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    made.add_argument("--steps", type=int, default=3000)
    made.add_argument("--batch", type=int, default=8, help="windows per step")
    made.add_argument("--learning-rate", type=float, default=3e-3)
    made.add_argument("--package-bytes", type=int, default=30_000_000)
    made.add_argument("--save-steps", type=int, default=100)
    made.add_argument("--seed", type=int, default=0)
    return made


if __name__ == "__main__":
    main()

"""Write a Llama of any size with random weights, to try out on a small machine what a large model will take.

    python scripts/make_synthetic_model.py --gigabytes 13.5 --sparse 2:4 --adapter /tmp/adapter /tmp/model

The folder is what transformers saves: bf16 weights in shards with an index, configuration, and a tokenizer (one token
per byte). From 4 GB on, the geometry is that of LLaMA-2-7B with as many layers as make the size; below, all of it is
smaller. Weights are normal with a standard deviation of 0.02 and norms are one, as in a model before training.

One tensor is in memory at a time, and making it costs no more than copying it: a block of random rows is drawn once
for each row length (and pruned once, with `--sparse`), and every matrix is made of copies of it, each of them rolled
along both dimensions by another distance. So no two matrices are equal, and all of them have the pattern, but there is
less randomness in the model than there are weights: it is for measuring time and memory, and not quality.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from spp.checkpoints.atomic_folder import check_output, new_folder
from spp.checkpoints.checkpoint import INDEX
from spp.checkpoints.json_files import write_json
from spp.checkpoints.safetensors_file import Layout, TensorFile
from spp.errors import SppError, UsageError, raise_problems
from spp.patterns import Pattern, parse_pattern

GIGABYTE = 10**9
CONTEXT = 2048
RANK = 16
LARGE_FROM = 4.0  # gigabytes
FEWEST_LAYERS = 4
_BYTES = 2  # of a bf16 number
_STD = 0.02
_FACTOR_STD = 0.2  # of an adapter: W changes by about 5 %, which bf16 can tell
_DRAWN = 2**23  # random numbers per block
_STEP = 32  # intermediate sizes are multiples of it, so that every usual N:M fits

UNK, BOS, EOS = "<unk>", "<s>", "</s>"


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a Llama whose heads all have their own keys and values, and whose embeddings are not tied."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything in the checkpoint, in the order of the model."""
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in self._block.items()}
        return tensors | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def _block(self) -> dict[str, tuple[int, ...]]:
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        return {
            "input_layernorm": (self.hidden,),
            **{f"self_attn.{name}_proj": square for name in "qkvo"},
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": wide,
            "mlp.up_proj": wide,
            "mlp.down_proj": wide[::-1],
        }

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """Module name -> shape (O, I) of the decoder's linears."""
        found = {name: shape for name, shape in self.tensors.items() if name.endswith("_proj.weight")}
        return {name.removesuffix(".weight"): shape for name, shape in found.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        outside = 2 * self.vocabulary * self.hidden + self.hidden
        return _BYTES * (outside + self.layers * sum(map(math.prod, self._block.values())))

    def config(self) -> LlamaConfig:
        """As transformers has it."""
        heads = max(4, self.hidden // 128)
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=CONTEXT,
            bos_token_id=1,
            eos_token_id=2,
        )


def geometry(gigabytes: float) -> Geometry:
    """The model of this size.

    From 4 GB on, it is a LLaMA-2-7B with another number of layers; below, the widest with four layers or more that
    fits, with an intermediate size that makes up for the rest.

    Raises:
        UsageError: not even the smallest has four layers.
    """
    wanted = gigabytes * GIGABYTE
    if gigabytes >= LARGE_FROM:
        return _deep(4096, wanted, round)
    for hidden in (2048, 1024, 512, 256, 128, 64, 32):
        found = _deep(hidden, wanted, math.floor)
        if found.layers >= FEWEST_LAYERS:
            per_column = 3 * hidden * found.layers * _BYTES
            spare = round((wanted - found.nbytes) / per_column / _STEP) * _STEP
            return Geometry(**(vars(found) | {"intermediate": found.intermediate + spare}))
    least = Geometry(**(vars(found) | {"layers": FEWEST_LAYERS})).nbytes / GIGABYTE
    raise UsageError(f"--gigabytes {gigabytes:g} is too little for a Llama; give at least {least:.1g}")


def _deep(hidden: int, wanted: float, rounding: Callable[[float], int]) -> Geometry:
    """As many layers with LLaMA-2-7B's proportions as make so many bytes, rounded."""
    sizes = {
        "hidden": hidden,
        "intermediate": round(hidden * 11008 / 4096 / _STEP) * _STEP,
        "vocabulary": 32000 if hidden >= 512 else 512,
    }
    none, one = (Geometry(layers=layers, **sizes).nbytes for layers in (0, 1))
    return Geometry(layers=max(rounding((wanted - none) / (one - none)), 0), **sizes)


class Rows:
    """An endless supply of different random rows of one length.

    Args:
        width: numbers per row.
        most: rows of the largest matrix.
        seed: of the random numbers.
        pattern: what every row has; None leaves it dense.
    """

    def __init__(self, width: int, most: int, seed: int, pattern: Pattern | None) -> None:
        count = min(max(_DRAWN // width, 1), most)
        generator = torch.Generator().manual_seed(seed)
        block = torch.empty(count, width, dtype=torch.bfloat16)
        for rows in block.split(256):  # fp32 numbers and the sorting of scores take many times the block's memory
            rows.copy_(torch.randn(rows.shape, generator=generator) * _STD)
            if pattern is not None:
                rows.masked_fill_(~pattern.keep_mask(rows.float().abs()), 0.0)
        self._block = block
        self._rolled = 0
        # A roll by whole groups keeps N:M, and every roll keeps the number of zeros in a row.
        self._group = getattr(pattern, "m", 1)

    def matrix(self, out_features: int) -> Tensor:
        """The next so many rows."""
        weight = torch.empty(out_features, self._block.shape[1], dtype=torch.bfloat16)
        for part in weight.split(len(self._block)):
            self._rolled += 1
            distances = (self._rolled, self._rolled * self._group)
            part.copy_(torch.roll(self._block, distances, (0, 1))[: len(part)])
        return weight


class Weights:
    """The tensors of a model, made one by one."""

    def __init__(self, geometry: Geometry, seed: int, pattern: Pattern | None) -> None:
        most = max(geometry.hidden, geometry.intermediate)
        self._linears = {f"{name}.weight" for name in geometry.linears}
        self._in_blocks = {
            width: Rows(width, most, seed + index, pattern)
            for index, width in enumerate(sorted({geometry.hidden, geometry.intermediate}))
        }
        self._outside = Rows(geometry.hidden, geometry.vocabulary, seed + len(self._in_blocks), None)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm of ones, a linear with the pattern, or a dense embedding or head."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        rows = self._in_blocks[shape[1]] if name in self._linears else self._outside
        return rows.matrix(shape[0])


def make_model(out: Path, sizes: Geometry, *, pattern: Pattern | None, shard_bytes: float, seed: int) -> int:
    """Write the model's folder, and return the number of shards.

    Raises:
        UsageError: there is something in `out`, or the disk has no room for it.
    """
    with new_folder(out, overwrite=False) as folder:
        if (free := shutil.disk_usage(folder).free) < sizes.nbytes:
            need, have = sizes.nbytes / GIGABYTE, free / GIGABYTE
            raise UsageError(f"{out}: the disk has {have:.3g} GB left, and the weights need {need:.3g} GB")
        weights = Weights(sizes, seed, pattern)
        shards = list(_shards(sizes.tensors, shard_bytes))
        weight_map: dict[str, str] = {}
        for number, shapes in enumerate(shards, 1):
            path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = TensorFile(path, {name: _layout(shape) for name, shape in shapes.items()})
            for name, shape in shapes.items():
                file.write(name, weights.tensor(name, shape))
            weight_map |= dict.fromkeys(shapes, path.name)
        write_json(folder / INDEX, {"metadata": {"total_size": sizes.nbytes}, "weight_map": weight_map})
        sizes.config().save_pretrained(folder)
        GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return len(shards)


def _layout(shape: tuple[int, ...]) -> Layout:
    return Layout("BF16", shape, _BYTES * math.prod(shape))


def _shards(tensors: dict[str, tuple[int, ...]], limit: float) -> Iterator[dict[str, tuple[int, ...]]]:
    """Consecutive tensors of at most `limit` bytes together; one that is larger is alone."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        nbytes = _BYTES * math.prod(shape)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield shard


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, so that it knows every text; BOS comes first."""
    tokens = [UNK, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    )


def make_adapter(out: Path, base: Path, sizes: Geometry, *, seed: int) -> None:
    """Write an SPP adapter on all linears of the decoder, as PEFT saves it, with small random factors in fp32.

    Raises:
        UsageError: there is something in `out`.
    """
    from spp import SppConfig  # and with it PEFT

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (out_features, in_features) in sizes.linears.items():
        for factor, shape in (("A", (RANK, in_features)), ("B", (out_features, 1))):
            key = f"base_model.model.{name}.spp_{factor}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * _FACTOR_STD
    config = SppConfig(
        r=RANK,
        directions=1,
        target_modules=sorted({name.rpartition(".")[2] for name in sizes.linears}),
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with new_folder(out, overwrite=False) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(folder))


def make(arguments: argparse.Namespace) -> str:
    """Do what the command line says, and return a line about it.

    Raises:
        UsageError: it asks for what cannot be, or there is something in an output folder.
    """
    sizes_given = {"--gigabytes": arguments.gigabytes, "--shard-gigabytes": arguments.shard_gigabytes}
    wrong = {name: value for name, value in sizes_given.items() if not 0 < value < math.inf}
    raise_problems([f"{name} must be a number above 0, but it is {value:g}" for name, value in wrong.items()])
    sizes = geometry(arguments.gigabytes)
    pattern = parse_pattern(arguments.sparse) if arguments.sparse else None
    for width in (sizes.hidden, sizes.intermediate):
        if pattern is not None and not pattern.fits(width):
            raise UsageError(f"--sparse {pattern} does not fit matrices of {width} columns, which this model has")
    check_output(arguments.out, False)
    if arguments.adapter:
        check_output(arguments.adapter, False, inputs=[arguments.out])
    shard_bytes = arguments.shard_gigabytes * GIGABYTE
    count = make_model(arguments.out, sizes, pattern=pattern, shard_bytes=shard_bytes, seed=arguments.seed)
    if arguments.adapter:
        make_adapter(arguments.adapter, arguments.out, sizes, seed=arguments.seed)
    return (
        f"{arguments.out}: {sizes.nbytes / GIGABYTE:.4g} GB in {count} files, {sizes.layers} layers "
        f"(hidden {sizes.hidden}, intermediate {sizes.intermediate}), {pattern or 'dense'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--gigabytes", type=float, required=True, help="size of the weights, in units of 10^9 bytes")
    parser.add_argument("--sparse", help="pattern of the decoder's linears: 2:4, 50%% (default: dense)")
    parser.add_argument("--adapter", type=Path, help="also write a random SPP adapter for the model into this folder")
    parser.add_argument("--shard-gigabytes", type=float, default=1.0, help="most of a file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    try:
        print(make(parser.parse_args(argv)))
    except SppError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

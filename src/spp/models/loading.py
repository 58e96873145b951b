"""Load models and tokenizers with transformers; every problem is one clear error."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as version

from spp.checkpoints.checkpoint import Checkpoint, is_plain
from spp.checkpoints.json_files import read_object
from spp.errors import SppError, UsageError, brief, shown
from spp.models.architecture import AutoClass, auto_class
from spp.models.completeness import check_size, require_floats, require_used
from spp.models.few_bit_linear import FewBitLinear
from spp.models.pack_model import pack_, unpack_
from spp.models.packed_loading import load_packed, stored_dtype
from spp.models.processor_template import take_processor_template
from spp.ops import packs_well
from spp.options import LoadingOptions
from spp.runtime.devices import compute_dtype, pick_device

logger = logging.getLogger("spp")

_DEFAULT_WINDOW = 2048


def load_model(
    folder: Path,
    options: LoadingOptions,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    pack: bool = False,
    few_bits: bool = False,
) -> PreTrainedModel:
    """Load a causal LM, or a language model that also takes images, in eval mode.

    Sparse layers of a packed archive stay packed.

    Args:
        folder: the model's folder, with safetensors weights (see `resolve_model`).
        options: device, dtype, trust_remote_code.
        dtype: overrides the options' dtype; "auto" keeps the checkpoint's own.
        device: overrides the options' device.
        pack: pack each sparse layer when it is read, so that the dense model is never in memory.
        few_bits: see `load_packed`.

    Raises:
        UsageError: no such model, no weights, or not a causal LM.
        SppError: damaged or incomplete weights.
    """
    checkpoint = Checkpoint.open(folder)  # its error names a truncated shard; transformers' does not
    target = pick_device(device or options.device)
    config = load_config(folder, options)
    check_size(config, checkpoint)
    require_floats(config, checkpoint)
    kind = kind_of(folder, config)
    quantized = getattr(config, "quantization_config", None) is not None  # transformers takes one quantizer only
    wanted: dict[str, Any] = {
        "dtype": dtype or compute_dtype(options.dtype, target),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported below, with names
    }
    trust: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    with building(folder, config):
        loading: Any = (
            load_packed(kind, checkpoint, config, wanted, trust, few_bits=few_bits)
            if (pack and not quantized) or checkpoint.packed
            else kind.from_pretrained(folder, config=config, **wanted, **trust)
        )
    loaded, info = loading
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise SppError(
            f"model {str(folder)!r} does not fit its config.json: {len(mismatched)} weights have another shape, "
            f"e.g. {name} with {tuple(stored)} instead of {tuple(wanted)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise SppError(
            f"model {str(folder)!r} lacks {len(missing)} weights, e.g. {missing[0]}; the checkpoint is incomplete"
        )
    require_used(loaded, info["unexpected_keys"], checkpoint)
    return loaded.to(target).eval()


def skeleton(folder: Path, options: LoadingOptions, dtype: str | torch.dtype) -> PreTrainedModel:
    """A model like that of `load_model`, but with its parameters on the meta device, so that they take no memory.

    Buffers have memory and values, except those that are stored in the files. Experts are computed one after the other,
    with `linear` (see `spp.models.architecture.prunable_matrices`).

    Args:
        folder: the model's folder, with safetensors weights (see `resolve_model`).
        options: trust_remote_code.
        dtype: dtype to compute in; "auto" is the checkpoint's own.

    Raises:
        UsageError: no such model, no weights, or not a causal LM.
        SppError: transformers cannot build it.
    """
    checkpoint = Checkpoint.open(folder)
    config = load_config(folder, options)
    check_size(config, checkpoint)
    require_floats(config, checkpoint)
    kind = kind_of(folder, config)
    wanted: dict[str, Any] = {
        "dtype": stored_dtype(checkpoint, config) if dtype == "auto" else dtype,
        "experts_implementation": "eager",
        "trust_remote_code": options.trust_remote_code,
    }
    with building(folder, config), init_empty_weights(include_buffers=False):
        built = kind.from_config(config, **wanted)
    built.tie_weights()  # moving a parameter to the meta device replaces it, which unties it
    _compute_buffers(built)
    _keep_in_fp32(built, wanted["dtype"])
    built.name_or_path = built.config.name_or_path = str(checkpoint.folder)
    return built.eval()


@contextmanager
def building(model: str | Path, config: Any) -> Iterator[None]:
    """Context manager that turns what transformers raises, while it makes a model of `config`, into one clear error.

    Raises:
        SppError: says which field of config.json is at fault, where that is known.
    """
    try:
        yield
    except SppError:
        raise
    except Exception as error:  # transformers, its back-ends and the model's own code may raise anything
        reason = brief(error)
        if isinstance(error, KeyError) and error.args and (fields := _fields(config.to_dict(), error.args[0])):
            reason = f"transformers {version} knows no {' or '.join(fields)} {error.args[0]!r}"
        raise SppError(f"model {str(model)!r} cannot be built from its config.json and weights: {reason}") from error


def _fields(config: Mapping[str, Any], value: Any) -> list[str]:
    """The fields of a configuration that have this value, `outer.inner` for one inside another."""
    own = [name for name, one in config.items() if type(one) is type(value) and one == value]
    inner = ((name, one) for name, one in config.items() if isinstance(one, Mapping))
    return own + [f"{name}.{field}" for name, one in inner for field in _fields(one, value)]


def kind_of(model: str | Path, config: Any) -> AutoClass:
    """The class that loads a model; a UsageError if it is not a causal LM."""
    kind = auto_class(config)
    if kind is None:
        raise UsageError(f"model {str(model)!r} is of type {config.model_type!r}, which is no causal language model")
    return kind


def _compute_buffers(model: PreTrainedModel) -> None:
    """Recompute the buffers without the model's dtype as torch's default, as `from_pretrained` does.

    With it, the sines and cosines of some families would be rounded before they are multiplied.
    """
    for module in model.modules():
        module._is_hf_initialized = False  # pyright: ignore[reportArgumentType]
    model.initialize_weights()  # does nothing to parameters on the meta device


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast to fp32 the parameters that a family always keeps in it, as `from_pretrained` does."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.float()


def load_base(
    folder: Path,
    options: LoadingOptions,
    *,
    dtype: str | torch.dtype,
    pack: bool | None,
    on: torch.device,
    few_bits: bool = False,
) -> PreTrainedModel:
    """Load a model into CPU memory, packed or not, to be used on the device `on`.

    Args:
        folder, options, dtype: as for `load_model`.
        pack: whether to pack its sparse layers; None packs them if packed weights are fast on `on`.
        on: the device that the model will be used on.
        few_bits: whether survivors that are in few bits may stay so; they do on a CPU, unless `pack` is False.

    Raises:
        UsageError, SppError: as `load_model`; or packing was asked for, and no layer is sparse enough.
    """
    wanted = packs_well(on) if pack is None else pack
    few_bits = few_bits and pack is not False and on.type == "cpu"
    loaded = load_model(folder, options, dtype=dtype, device="cpu", pack=wanted, few_bits=few_bits)
    if pack is False:
        unpack_(loaded, loaded.dtype)  # an archive's layers come packed
    elif pack and not any(isinstance(module, FewBitLinear) for module in loaded.modules()):
        pack_(loaded)  # all are packed already; raises if no layer is sparse
    return loaded


def load_tokenizer(folder: Path, options: LoadingOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UsageError(f"model {str(folder)!r} has no usable tokenizer: {_with_remedy(error)}") from error
    if not isinstance(limit := tokenizer.model_max_length, int | float):
        raise UsageError(
            f"model {str(folder)!r} has no usable tokenizer: its model_max_length is {shown(limit)}, and not a number"
        )
    # For some families, transformers returns an empty tokenizer if the files are missing.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise UsageError(f"model {str(folder)!r} has no usable tokenizer: no vocabulary is in {folder}")
    take_processor_template(tokenizer, folder)
    return tokenizer


def load_config(folder: Path, options: LoadingOptions) -> Any:
    """Load a model's configuration alone.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    try:
        _require_object_or_none("quantization_config", folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # families check their values, with various exceptions
        raise UsageError(f"model {str(folder)!r} has no usable config.json: {_with_remedy(error)}") from error
    announced = getattr(config, "quantization_config", None)
    if hasattr(config, "quantization_config") and is_plain(announced):
        delattr(config, "quantization_config")  # or transformers would ask for the library that it names
        if announced:
            logger.info("the quantization_config in config.json quantizes nothing, and is ignored")
    return config


def _require_object_or_none(name: str, folder: Path) -> None:
    """Check an entry of config.json that transformers takes for an object wherever it is there."""
    found = read_object(path).get(name) if (path := folder / "config.json").is_file() else None
    if not isinstance(found, dict | None):
        raise ValueError(f"its {name} is {shown(found)}, and has to be an object; remove it if nothing is quantized")


def _with_remedy(error: Exception) -> str:
    """An error of transformers in short, and the option for a model that brings code of its own."""
    remedy = "; pass --trust-remote-code if you trust it" if "trust_remote_code" in str(error) else ""
    return brief(error) + remedy


def context_of(config: Any) -> int | None:
    """The number of a model's positions; None if it has no limit, for which XLNet says -1."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def context_window(config: Any, asked: int | None) -> int:
    """Tokens per window: `asked`, else 2048, or the model's context if that is shorter.

    Raises:
        UsageError: `asked` is above the number of the model's positions.
    """
    positions = context_of(config)
    if asked is not None and positions is not None and asked > positions:
        raise UsageError(f"window {asked} is longer than the model's context of {positions} tokens; pass --window")
    return asked or min(_DEFAULT_WINDOW, positions or _DEFAULT_WINDOW)

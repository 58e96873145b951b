"""Load a model and pack each sparse layer when it is read, so that the dense model is never in memory.

transformers lets a quantizer replace a weight between the file and the model. So packing is a quantizer here, for the
duration of a load; no trace of it stays in the model or its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from spp.checkpoints.checkpoint import Checkpoint
from spp.errors import SppError
from spp.models.architecture import AutoClass, prunable_linears
from spp.models.dense_saving import save_dense_
from spp.models.few_bit_linear import FewBitLinear
from spp.models.pack_model import packed_layer
from spp.models.packed_linear import PackedLinear
from spp.ops.dtypes import FLOATS
from spp.ops.few_bits import FewBitWeight
from spp.ops.packed import WORTH_PACKING, zero_share

_METHOD = "spp_packed"


def load_packed(
    kind: AutoClass,
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    wanted: dict[str, Any],
    trust: dict[str, Any],
    *,
    few_bits: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a checkpoint or an archive with its sparse layers packed, and transformers' loading info.

    Args:
        kind: the class that loads the model.
        checkpoint: dense or packed.
        config: the model's configuration.
        wanted: arguments for `from_pretrained`, output_loading_info among them.
        trust: further arguments, about the model's own code.
        few_bits: whether layers of an archive whose survivors are in few bits stay so (`FewBitLinear`); else they are
            expanded, and packed in the dtype that they had.

    Raises:
        SppError: a tensor's shape differs from the configuration's, or a packed weight is damaged.
    """
    with torch.device("meta"):
        empty = kind.from_config(config, **trust)
    own = type(empty)
    dtype = stored_dtype(checkpoint, config)
    if wanted["dtype"] == "auto":
        wanted = {**wanted, "dtype": dtype}
    if not isinstance(config, own.config_class or object):
        config = empty.config  # of the language model alone, where the files are of a model that also takes images
    model, info = own.from_pretrained(
        None,
        config=config,
        state_dict={name: _LazyTensor(checkpoint, name) for name in checkpoint.names},
        quantization_config=PackOnLoad(WORTH_PACKING, dtype, checkpoint if few_bits else None),
        **wanted,
    )
    # The folder of the model. transformers sets it itself when it reads a folder; PEFT uses it.
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model, info


def stored_dtype(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint says it has, or that of its first tensor of floats."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = {one.safetensors: dtype for dtype, one in FLOATS.items()}
    stored = (layout.dtype for layout in checkpoint.layouts.values())
    return next((floats[dtype] for dtype in stored if dtype in floats), torch.float32)


class _LazyTensor:
    """A tensor that is read from the checkpoint when the loader needs it, and is not kept."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._checkpoint.tensor(self._name)[index]


class PackOnLoad(QuantizationConfigMixin):
    """The `quantization_config` that makes `from_pretrained` pack.

    Args:
        min_sparsity: least sparsity of a layer that is packed; see `spp.models.pack_model.pack_`.
        dtype: the checkpoint's dtype; packed values keep it if the model computes in a wider one.
        few_bits: an archive whose weights in few bits are to stay so.
    """

    def __init__(self, min_sparsity: float, dtype: torch.dtype, few_bits: Checkpoint | None = None) -> None:
        super().__init__(_METHOD)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.min_sparsity, self.dtype, self.few_bits = min_sparsity, dtype, few_bits


class _Packer(HfQuantizer):
    """Packs linear layers of the decoder blocks, and removes itself from the model after the load."""

    quantization_config: PackOnLoad

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self._targets = {f"{name}.weight" for name in prunable_linears(model)}
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.quantization_config)

    def postprocess_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        self.remove_quantization_config(model)
        del model.is_quantized
        if any(isinstance(module, PackedLinear) for module in model.modules()):
            save_dense_(model)
        # transformers leaves the check of shapes to the quantizer.
        for name, parameter in model.named_parameters():
            if name in self._shapes and parameter.shape != self._shapes[name]:
                raise SppError(
                    f"{name} is {tuple(parameter.shape)}, and config.json says {tuple(self._shapes[name])}; they do "
                    "not belong together"
                )

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


register_quantization_config(_METHOD)(PackOnLoad)
register_quantizer(_METHOD)(_Packer)


class _Pack(ConversionOps):
    """Replace the layer whose weight was read by a packed one, if it is sparse enough."""

    def __init__(self, config: PackOnLoad) -> None:
        self._config = config

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_dict: Mapping[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        ((key, given),) = input_dict.items()
        weight = given[0] if isinstance(given, list) else given
        name = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(name)
        fits = weight.shape == layer.get_parameter("weight").shape
        if not fits or zero_share(weight) < self._config.min_sparsity:
            return {key: weight}
        model.set_submodule(name, packed := self._packed(full_layer_name, layer, weight))
        missing_keys.discard(full_layer_name)
        for parameter in packed.parameters(recurse=False):
            parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return {}

    def _packed(self, full_name: str, layer: nn.Module, weight: Tensor) -> nn.Module:
        archive = self._config.few_bits
        if archive and isinstance(found := archive.packed_weight(full_name), FewBitWeight):
            return FewBitLinear(found, layer._parameters.get("bias")).train(layer.training)
        packed = packed_layer(_with_weight(layer, weight))
        packed.values = nn.Parameter(_narrowed(packed.values, self._config.dtype), requires_grad=False)
        return packed


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return layer


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, which were read in the dtype that the model computes in, in `dtype` if that loses nothing."""
    narrow = values.detach().to(dtype)
    return narrow if narrow.to(values.dtype).equal(values) else values.detach()

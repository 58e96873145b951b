"""Convert adapters: SPP to stock PEFT's HiRA, which loads without spp; HiRA or the published code's format to SPP.

The result merges to the same weights, bit for bit (see `spp.adapters.hira_format`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import HiraConfig
from torch import Tensor

from spp._version import __version__
from spp.adapters.attach import check_adapter
from spp.adapters.factors import (
    KEY_PREFIX,
    SETTINGS,
    WEIGHTS,
    Factors,
    check_factors,
    read_settings,
    read_tensors,
)
from spp.adapters.hira_format import factors_of_hira, hira_rank, hira_tensors, read_hira
from spp.adapters.matching import match_adapter
from spp.adapters.options import ConvertOptions
from spp.adapters.published_format import read_published
from spp.adapters.spp_format import Adapter, read_adapter, tensors_of
from spp.adapters.trained_whole import Whole, split_whole
from spp.adapters.tuner import SppConfig
from spp.adapters.tuner.ranks import rank_of
from spp.checkpoints.atomic_folder import check_output, new_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.fingerprint import base_fingerprint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import read_object, write_json
from spp.checkpoints.safetensors_file import save_tensors
from spp.errors import SppError, UsageError, brief
from spp.ops.reference import fitting_groups
from spp.ops.zeros import all_finite
from spp.runtime.files import writing

Layout = Literal["SPP", "HiRA", "published"]

_LAYOUTS: dict[str, Layout] = {"SPP": "SPP", "HIRA": "HiRA", "LORA": "published"}  # by PEFT's type
_TARGETS: dict[str, Layout] = {"spp": "SPP", "hira": "HiRA"}
_SHARED = ("task_type", "base_model_name_or_path", "revision", "modules_to_save")
_ORIGINAL = "spp_settings"
"""Key in the manifest of a HiRA adapter for the settings of the SPP adapter that it was converted from."""


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """The result of `convert`.

    Attributes:
        source, target: the layouts: SPP, HiRA or published (never a target).
        modules: number of adapted modules.
        rank: the most rows that any module's A has.
    """

    out: Path
    source: Layout
    target: Layout
    modules: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class _Source:
    """An adapter as read from disk.

    Attributes:
        manifest: the content of spp.json; empty if there is none.
        original: the settings of the SPP adapter, also of one that was converted to HiRA; None for all others.
        whole: weights that were trained whole, which every layout has in the same form.
    """

    layout: Layout
    settings: dict[str, Any]
    manifest: dict[str, Any]
    original: SppConfig | None
    factors: dict[str, Factors]
    whole: dict[str, Whole] = field(default_factory=dict)


def convert(options: ConvertOptions) -> ConvertReport:
    """Write the adapter in another layout to `options.out`.

    Raises:
        UsageError: there is no adapter, it is in the target layout already, or that layout cannot express it.
        SppError: a file is damaged or asks for code to be run, or the adapter does not fit `options.base`.
    """
    check_output(options.out, options.overwrite, inputs=(options.adapter,))
    settings = read_settings(options.adapter)
    layout = _layout(settings, options.adapter)
    target = _target(layout, settings, options)
    source = _read(options.adapter, layout, settings)
    base = _fitting_base(source, options)

    try:
        config: Any = _hira_config(source, base) if target == "HiRA" else _spp_config(source)
    except (TypeError, ValueError, OverflowError) as error:  # a dropout of 2, a task that PEFT does not know
        raise SppError(f"{options.adapter / SETTINGS}: {error}") from error
    if options.base:
        config.base_model_name_or_path, config.revision = options.base, None
    tensors = hira_tensors(source.factors) if target == "HiRA" else tensors_of(source.factors)
    tensors |= {f"{KEY_PREFIX}{name}": one.values.contiguous() for name, one in source.whole.items()}
    if overflown := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
        raise SppError(
            f"adapter {options.adapter}: its scale is so large that {overflown[0]} overflows; nothing was written"
        )
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        with writing(folder):
            config.save_pretrained(str(folder))
        save_tensors(folder / WEIGHTS, tensors)
        write_json(folder / MANIFEST, _manifest(source, target, options, base))
    return ConvertReport(
        out=options.out,
        source=layout,
        target=target,
        modules=len(source.factors),
        rank=hira_rank(source.factors),
    )


def _layout(settings: Mapping[str, Any], folder: Path) -> Layout:
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in _LAYOUTS:
        raise UsageError(
            f"adapter {folder} is of type {kind!r}; only SPP adapters, HiRA adapters, and those of the published SPP "
            "code (which call themselves LORA) can be converted"
        )
    return _LAYOUTS[kind]


def _target(layout: Layout, settings: Mapping[str, Any], options: ConvertOptions) -> Layout:
    target = _TARGETS[options.to] if options.to else ("HiRA" if layout == "SPP" else "SPP")
    # Adapters from before there were several directions lack the setting; PEFT loads them once it is added.
    if layout == target and not (layout == "SPP" and "directions" not in settings):
        raise UsageError(f"adapter {options.adapter} is in the {target} layout already; there is nothing to convert")
    return target


def _read(folder: Path, layout: Layout, settings: dict[str, Any]) -> _Source:
    manifest = read_object(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    original = None
    whole: dict[str, Whole] = {}
    if layout == "SPP":
        adapter = read_adapter(folder)
        factors, whole = adapter.factors, adapter.whole
        _require_linear(adapter, folder)
        settings = {"directions": 1, **settings}
        original = _spp_settings(settings, folder / SETTINGS)
    elif layout == "published":
        factors = read_published(folder, settings)
    else:
        original = _spp_settings(manifest[_ORIGINAL], folder / MANIFEST) if _ORIGINAL in manifest else None
        tensors, whole = split_whole(read_tensors(folder), settings, folder)
        factors = check_factors(_read_hira(tensors, folder, original), folder)
    return _Source(layout=layout, settings=settings, manifest=manifest, original=original, factors=factors, whole=whole)


def _require_linear(adapter: Adapter, folder: Path) -> None:
    """Refuse what no other layout has a place for."""
    if stacks := [name for name, one in adapter.factors.items() if one.of_experts]:
        raise UsageError(
            f"adapter {folder} has factors of stacked experts, e.g. {stacks[0]}, and HiRA is of linear layers alone; "
            "merge the adapter instead (spp merge)"
        )
    if rows := [name for name, one in adapter.whole.items() if one.rows is not None]:
        raise UsageError(
            f"adapter {folder} has trained rows of {rows[0]}, and HiRA has no trainable_token_indices; merge the "
            "adapter instead (spp merge)"
        )


def _read_hira(tensors: Mapping[str, Tensor], folder: Path, original: SppConfig | None) -> dict[str, Factors]:
    pairs = read_hira(tensors, folder)
    try:
        if original is None:
            return factors_of_hira(pairs)
        shapes = {module: _shape(original, module, A, B) for module, (A, B) in pairs.items()}
        return factors_of_hira(pairs, shapes=shapes, scale=original.scale)
    except UsageError as error:
        raise UsageError(f"adapter {folder} has no SPP form: {error}") from None


def _spp_settings(settings: Mapping[str, Any], path: Path) -> SppConfig:
    """The settings of an SPP adapter, as they were read from `path`."""
    known = {one.name for one in fields(SppConfig)}
    try:
        return SppConfig(**{name: value for name, value in settings.items() if name in known})
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise SppError(f"{path}: no settings of an SPP adapter ({brief(error)})") from error


def _shape(config: SppConfig, module: str, A: Tensor, B: Tensor) -> tuple[int, int]:
    """R and K that the tuner gives a module of the size that these factors have."""
    return fitting_groups(len(B), rank_of(config, module, len(B), A.shape[1]), config.directions)


def _made_by(config: SppConfig, module: str, factors: Factors) -> bool:
    shape = (factors.groups, factors.directions)
    return config.scale == factors.scale and _shape(config, module, factors.A, factors.B) == shape


def _fitting_base(source: _Source, options: ConvertOptions) -> Checkpoint | None:
    """The base model's checkpoint, which the adapter must fit; None if no base is named."""
    if options.base is None:
        return None
    base = Checkpoint.open(resolve_model(options.base))
    match_adapter(base, Adapter(source.factors, source.whole), options.adapter)
    check_adapter(options.adapter, options.base, base.folder)
    return base


def _hira_config(source: _Source, base: Checkpoint | None) -> HiraConfig:
    config = HiraConfig(
        r=hira_rank(source.factors),
        hira_dropout=_dropout(source),
        # PEFT would correct a wrong value for each layer, but with a warning.
        fan_in_fan_out=base is not None and any(base.transposed(module) for module in source.factors),
        inference_mode=True,
        **_shared(source),
    )
    config.target_modules = sorted(source.factors)
    return config


def _spp_config(source: _Source) -> SppConfig:
    """The settings of the original SPP adapter if they fit the factors; else settings made from the factors."""
    if source.original and all(_made_by(source.original, module, one) for module, one in source.factors.items()):
        return source.original
    groups = Counter(one.groups for one in source.factors.values())
    ((most, _),) = groups.most_common(1)
    config = SppConfig(
        r=most,
        directions=max(one.directions for one in source.factors.values()),
        rank_pattern={f"^{module}": one.groups for module, one in source.factors.items() if one.groups != most},
        scale=next(iter(source.factors.values())).scale,
        dropout=_dropout(source),
        inference_mode=True,
        **_shared(source),
    )
    config.target_modules = sorted(source.factors)
    return config


def _shared(source: _Source) -> dict[str, Any]:
    return {name: source.settings.get(name) for name in _SHARED}


def _dropout(source: _Source) -> float:
    name = {"SPP": "dropout", "HiRA": "hira_dropout", "published": "lora_dropout"}[source.layout]
    return source.settings.get(name) or 0.0


def _manifest(source: _Source, target: Layout, options: ConvertOptions, base: Checkpoint | None) -> dict[str, Any]:
    kept = {name: value for name, value in source.manifest.items() if name != _ORIGINAL}
    return {
        **kept,
        "tool": "spp",
        "version": __version__,
        "kind": "adapter",
        "converted": {"adapter": str(options.adapter), "from": source.layout, "to": target},
        **({"base": {"model": options.base, "fingerprint": base_fingerprint(base.folder)}} if base else {}),
        **({_ORIGINAL: source.settings} if (source.layout, target) == ("SPP", "HiRA") else {}),
    }

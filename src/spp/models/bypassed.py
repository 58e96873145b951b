"""Linear layers whose own forward is not what uses their weight, found in the code of the model.

An adapter or a packed weight takes effect where the layer is called. So neither is put on

- a layer whose weight the model reads itself (`self.out_proj.weight`), to multiply by it or to hand it to a kernel, in
  whatever case: Mamba's kernels on CUDA do in training, and its code without kernels does not;
- a layer of a class with a forward of its own that computes something else than x W^T + b.

The code of the model is read, and not run, because which of its ways are taken depends on the device, on installed
kernels, and on whether it is trained.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp.ops.zeros import is_float

# What is asked of a weight without multiplying by it.
_ASKED = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "element_size", "is_meta", "requires_grad"}
_SETUP = re.compile("init|reset|repr")
"""In the name of a function that runs before the model does."""


def read_directly(block: nn.Module) -> set[nn.Module]:
    """The modules in a block whose weight a module around them reads, instead of calling them or beside it."""
    found: set[nn.Module] = set()
    for module in block.modules():
        for path in _paths(type(module)):
            inner: nn.Module | None = module
            for name in path:
                inner = inner._modules.get(name) if inner is not None else None
            if inner is not None:
                found.add(inner)
    return found


def bypassed(block: nn.Module) -> dict[nn.Module, str]:
    """Module -> why neither an adapter nor a packed weight suits it."""
    found = {module: "the model reads its weight without calling it" for module in read_directly(block)}
    kinds = {module: type(module).__name__ for module in block.modules() if computes_otherwise(module)}
    return found | {module: f"its class, {kind}, has a forward of its own" for module, kind in kinds.items()}


def is_for_images(block: nn.Module) -> bool:
    """Whether a block's forward cannot do without an image, so that the model does not call it on text.

    Llama 3.2 Vision's cross attention is such a block. Packed weights suit it; text would not train an adapter there.
    """
    states = inspect.signature(block.forward).parameters.get("cross_attention_states")
    return states is not None and states.default is inspect.Parameter.empty


def computes_otherwise(layer: nn.Module) -> bool:
    """Whether a linear layer's class has a forward of its own that is not x W^T + b; a subclass may only rewrite it.

    Not asked of quantized layers, whose forward is written for their weights.
    """
    kind = type(layer)
    if not isinstance(layer, nn.Linear) or kind.forward is nn.Linear.forward or not is_float(layer.weight):
        return False
    if kind not in _OTHERWISE:
        _OTHERWISE[kind] = not _is_plain(layer)
    return _OTHERWISE[kind]


_OTHERWISE: dict[type[nn.Module], bool] = {}


def _is_plain(layer: nn.Linear) -> bool:
    """Whether the forward of a layer's class is x W^T + b, on a small weight and x."""
    with torch.device("cpu"):  # a model may be built on the meta device just now
        chance = torch.Generator().manual_seed(0)
        weight, x = torch.randn(6, 4, generator=chance), torch.randn(2, 3, 4, generator=chance)
        bias = None if layer.bias is None else torch.randn(6, generator=chance)
        small = copy.copy(layer)  # so that neither hooks nor the layer's own weight play a part
        small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
        try:
            with torch.no_grad():
                output = type(layer).forward(small, x)
        except Exception:  # anything: it is written for other inputs
            return False
        expected = F.linear(x, weight, bias)
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, atol=1e-5)


@cache
def _paths(kind: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Names of the modules inside one of this class whose weight its code reads: `self.a.b.weight` is ("a", "b")."""
    own = (one for one in kind.__mro__ if issubclass(one, nn.Module) and one is not nn.Module)
    return frozenset(path for one in own for path in _read_in_file(one.__module__).get(one.__qualname__, ()))


@cache
def _read_in_file(module: str) -> dict[str, set[tuple[str, ...]]]:
    """Class in a Python module -> `_paths` of its own code."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):  # there is no source
        return {}
    return {
        node.name: {
            path
            for function in node.body
            if isinstance(function, ast.FunctionDef) and not _SETUP.search(function.name)
            for path in _reads(function)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _reads(function: ast.FunctionDef) -> Iterator[tuple[str, ...]]:
    """The paths of `self.PATH.weight` where that is a value, and not only asked for its dtype or cut into slices."""
    asked = {
        id(part)
        for node in ast.walk(function)
        for part in ast.iter_child_nodes(node)
        if (isinstance(node, ast.Attribute) and node.attr in _ASKED)
        or isinstance(node, ast.Subscript)  # BLOOM's, in a mode that its published models do not use
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance")
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in asked:
            names = _names(node.value)
            if len(names) > 1 and names[0] == "self":
                yield names[1:]


def _names(node: ast.expr) -> tuple[str, ...]:
    """`self.a.b` as its names; empty for other expressions."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (before := _names(node.value)):
        return (*before, node.attr)
    return ()

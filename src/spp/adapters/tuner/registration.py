"""Make PEFT know the adapter type SPP.

PEFT's own function for this accepts only members of its enum `PeftType`, and Python does not let an enum be extended.
So a member is inserted into the enum in place, checked, and removed again if a check fails.
"""

from __future__ import annotations

from enum import Enum

from peft.utils import PeftType, register_peft_method

from spp.adapters.tuner.config import SppConfig
from spp.adapters.tuner.model import SppModel

NAME = "SPP"


def register() -> None:
    """Add SPP to PEFT's types, configurations and tuners, unless it is there already.

    Raises:
        ImportError: this version of Python or PEFT does not allow it.
    """
    if NAME in PeftType.__members__:
        return
    _add_member(PeftType, NAME)
    register_peft_method(name=NAME.lower(), config_cls=SppConfig, model_cls=SppModel)


def _add_member(enum: type[PeftType], name: str) -> None:
    """Add a member with value `name` to a string enum, in place."""
    member = str.__new__(enum, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(enum)  # pyright: ignore[reportAttributeAccessIssue]
    member.__objclass__ = enum  # pyright: ignore[reportAttributeAccessIssue]
    type.__setattr__(enum, name, member)  # before the member map, with which the enum would refuse it
    enum._member_map_[name] = enum._value2member_map_[name] = member  # pyright: ignore[reportArgumentType]
    enum._member_names_.append(name)
    if not _is_member(enum, name):
        enum._member_names_.remove(name)
        del enum._member_map_[name], enum._value2member_map_[name]
        type.__delattr__(enum, name)
        raise ImportError(f"{enum.__name__} of this PEFT cannot be extended by {name}; install peft>=0.20,<0.22")


def _is_member(enum: type[Enum], name: str) -> bool:
    member = getattr(enum, name)
    ways = (enum(name), enum[name], list(enum)[-1])
    return all(way is member for way in ways) and member == name and member.value == name and member.name == name

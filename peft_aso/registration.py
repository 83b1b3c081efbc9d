"""Register the tuner type "ASO_LORA" with PEFT, in memory.

PEFT's tuner types are the members of the enum `PeftType`, and it has no plug-in mechanism (PEFT issue 2273).
`register` adds one member to that enum, and the config and the model class to PEFT's mappings.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .tuner import ASOLoraConfig, ASOLoraModel
from .tuner.config import PEFT_TYPE_NAME


def extend_enum(name: str) -> PeftType:
    """Add the member `name` (its value is its name) to `PeftType`, or return it if it exists.

    `PeftType(name)`, `PeftType.NAME`, iteration, copying, pickling and JSON work as for PEFT's own members.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # EnumType itself forbids assigning to members
    return member


def register() -> PeftType:
    """Register ASO_LORA with PEFT. Calling it again changes nothing.

    Raises:
        RuntimeError: another package has registered a different method under the same name.
    """
    member = extend_enum(PEFT_TYPE_NAME)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is None:
        # LoRA's prefix: the weights are LoRA weights, and PEFT's checks on the prefix apply unchanged
        register_peft_method(
            name=PEFT_TYPE_NAME.lower(), config_cls=ASOLoraConfig, model_cls=ASOLoraModel, prefix=ASOLoraModel.prefix
        )
    elif registered is not ASOLoraConfig:
        if registered.__module__ != ASOLoraConfig.__module__:
            raise RuntimeError(
                f"PEFT already has a method called {PEFT_TYPE_NAME} ({registered.__module__}."
                f"{registered.__qualname__}). Uninstall one of the two packages."
            )
        # this package's modules were imported again (a notebook's autoreload does that): use the new classes
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = ASOLoraConfig
        PEFT_TYPE_TO_TUNER_MAPPING[member] = ASOLoraModel
    return member

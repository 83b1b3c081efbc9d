"""Make PEFT know the tuner type "ASO_LORA", in memory, without touching any file of PEFT's.

PEFT keeps its tuner types in the enum `PeftType` and has no door for types that live outside of it.
`register` adds one member to that enum and enters the config and the model class in PEFT's mappings, once a
process.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .tuner import ASOLoraConfig, ASOLoraModel
from .tuner.config import PEFT_TYPE_NAME


def extend_enum(name: str) -> PeftType:
    """Add the member `name` (its value is its name) to `PeftType`, or return it if it is there.

    The member is a full one: `PeftType(name)`, `PeftType.NAME`, iteration, `copy.deepcopy`, pickling and JSON
    all treat it as they treat PEFT's own.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumType forbids assigning to members; at this point the name is a new class attribute like any other
    type.__setattr__(PeftType, name, member)
    return member


def register() -> PeftType:
    """Register ASO_LORA with PEFT. Calling it again changes nothing.

    Raises:
        RuntimeError: another package has registered a different method under the same name.
    """
    member = extend_enum(PEFT_TYPE_NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is None:
        # LoRA's prefix: the weights are LoRA weights, and PEFT's checks on the prefix apply as they stand
        register_peft_method(
            name=PEFT_TYPE_NAME.lower(),
            config_cls=ASOLoraConfig,
            model_cls=ASOLoraModel,
            prefix=ASOLoraModel.prefix,
        )
    elif known is not ASOLoraConfig:
        if known.__module__ != ASOLoraConfig.__module__:
            raise RuntimeError(
                f"PEFT already has a method called {PEFT_TYPE_NAME} "
                f"({known.__module__}.{known.__qualname__}). Uninstall one of the two packages, or import "
                "only one of them in a process."
            )
        # this package's modules were imported anew (a notebook's autoreload does that): the new classes hold
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = ASOLoraConfig
        PEFT_TYPE_TO_TUNER_MAPPING[member] = ASOLoraModel
    return member

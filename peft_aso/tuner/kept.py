"""A value that is kept until what it was made from changes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, getitem, is_
from typing import Any, Generic, TypeVar

import torch

from .sharding_shim import here

T = TypeVar("T")

# Weights of one layer that a pass in training looks at. With up to 16 earlier tasks these are all of them.
GLANCE = 32
_version = attrgetter("_version")
_address = torch.Tensor.data_ptr


class NotCopied:
    """What can be made anew: copies and pickles of it are empty, and so stay small. Made without arguments."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), ())


class Kept(NotCopied, Generic[T]):
    """One value with the key that it was made for."""

    def __init__(self) -> None:
        self._held: tuple[Any, T] | None = None

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """The value for `key`: the one that is held if the key is the same, else a new one from `make`."""
        held = self._held
        if held is None or held[0] != key:
            self._held = held = None  # the old value is gone before there is a new one
            # tensors made in inference mode could not be used in training afterwards
            with torch.inference_mode(False), torch.no_grad():
                held = (key, make())
            self._held = held
        return held[1]

    def clear(self) -> None:
        """Forget the value."""
        self._held = None


def tensor_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal as long as `tensor` holds the same values at the same place.

    The storage itself is in it and not its address: as long as somebody keeps this, the address cannot be
    given to another tensor. Writes through `tensor.data` are not seen, as autograd does not see them.
    """
    tensor = here(tensor)
    version = -1 if tensor.is_inference() else tensor._version
    return (tensor.untyped_storage(), tensor.storage_offset(), version, tensor.dtype, tuple(tensor.shape))


class Watch:
    """Whether tensors have stayed the same, found out in a microsecond or two a tensor.

    Built and asked often: a layer with 99 frozen adapters asks about 198 tensors in each forward pass, so the
    loops run inside of `map`. Nearly all of the time goes into waiting for memory, since a tensor is six objects in
    as many places.

    Args:
        slots: where each tensor lies, as (mapping, key), such as (module._parameters, "weight").
        tables: where each mapping lies that has to stay equal, such as (layer.__dict__, "scaling").
    """

    def __init__(
        self, slots: Sequence[tuple[Mapping[str, Any], str]], tables: Sequence[tuple[Mapping[str, Any], str]]
    ) -> None:
        self._places = [place for place, _ in slots]
        self._names = [name for _, name in slots]
        self._tables = [(place, name, dict(place[name])) for place, name in tables]
        self._tensors = list(map(getitem, self._places, self._names))
        self._blind = any(tensor.is_inference() for tensor in self._tensors)  # these have no version
        if not self._blind:
            self._versions = list(map(_version, self._tensors))
            # as in tensor_state: while the storages are held, nothing else can get their addresses
            self._storages = [tensor.untyped_storage() for tensor in self._tensors]
            self._addresses = list(map(_address, self._tensors))
        self._next = 0

    def unchanged(self, glance: int | None = None) -> bool:
        """True if all tensors are the same objects, at the same place, not written to, and all tables equal.

        Args:
            glance: look at so many tensors only (and all tables), and go on with the next ones in the next such call.
        """
        if self._blind or any(place[name] != content for place, name, content in self._tables):
            return False
        part = slice(None)
        if glance is not None and glance < len(self._tensors):
            part = slice(self._next, self._next + glance)
            self._next = part.stop if part.stop < len(self._tensors) else 0
        try:
            tensors = list(map(getitem, self._places[part], self._names[part]))
        except KeyError:
            return False
        return (
            all(map(is_, tensors, self._tensors[part]))
            and list(map(_version, tensors)) == self._versions[part]
            and list(map(_address, tensors)) == self._addresses[part]
        )


def give_back() -> None:
    """Let the C library return freed pages to the system, where it can (glibc).

    Thousands of small matrices that were freed leave holes that large tensors never fill.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

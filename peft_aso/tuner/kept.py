"""A value that is kept until what it was made from changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Kept(Generic[T]):
    """One value with the key that it was made for. Copies and pickles of it are empty, and so stay small."""

    def __init__(self) -> None:
        self._held: tuple[Any, T] | None = None

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """The value for `key`: the one that is held if the key is the same, else a new one from `make`."""
        held = self._held
        if held is None or held[0] != key:
            # tensors made in inference mode could not be used in training afterwards
            with torch.inference_mode(False), torch.no_grad():
                held = (key, make())
            self._held = held
        return held[1]

    def clear(self) -> None:
        """Forget the value."""
        self._held = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[T]:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Kept, ())


def tensor_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal as long as `tensor` holds the same values at the same place.

    The storage itself is in it and not its address: as long as somebody keeps this, the address cannot be
    given to another tensor. Writes through `tensor.data` are not seen, as autograd does not see them.
    """
    version = -1 if tensor.is_inference() else tensor._version
    return (tensor.untyped_storage(), tensor.storage_offset(), version, tensor.dtype, tuple(tensor.shape))

"""Wrap a method of one instance, and remove the wrapper again without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Bindings", "MethodWrapper", "Removable"]


class Removable(Protocol):
    """What was bound to a run and is to be taken off again."""

    def remove(self) -> None:
        """Undo the binding."""


class Bindings:
    """What a callback has bound to a run: hooks, wrappers; all of it is released at once.

    A deep copy holds nothing: what is bound belongs to the original.
    """

    def __init__(self) -> None:
        self._bound: list[Removable] = []

    def add(self, *bound: Removable) -> None:
        """Keep what is to be removed when the run is released."""
        self._bound += bound

    def release(self) -> None:
        """Remove everything, the last first; a second time there is nothing to remove."""
        while self._bound:
            self._bound.pop().remove()

    def __bool__(self) -> bool:
        """Whether anything is bound."""
        return bool(self._bound)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bindings:
        return Bindings()


class MethodWrapper:
    """Stands in an instance's ``__dict__`` for one of its methods until :meth:`remove`.

    ``around(method, *args, **kwargs)`` is called in the method's place. Wrappers of the same method
    nest, and may be removed in any order. A deep copy of the instance has its own method, not the
    wrapper, so that copies taken in mid-fit do not reach back into the original.

    Args:
        instance: The object whose method is wrapped.
        name: The method's name.
        around: What to call instead; it receives the wrapped method first.
    """

    def __init__(self, instance: object, name: str, around: Callable[..., Any]) -> None:
        self._instance = instance
        self._name = name
        self._around = around
        self._was_instance_attribute = name in vars(instance)
        self._method: Callable[..., Any] = getattr(instance, name)
        # Lightning looks through one `__wrapped__` for the step's signature.
        self.__wrapped__ = getattr(self._method, "__wrapped__", self._method)
        setattr(instance, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function that stands around the method."""
        return self._around(self._method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        method: Callable[..., Any] = copy.deepcopy(self._method, memo)
        return method

    def remove(self) -> None:
        """Give the instance its method back, or the wrapper around this one its inner method."""
        outer = vars(self._instance).get(self._name)
        if outer is self:
            if self._was_instance_attribute:
                setattr(self._instance, self._name, self._method)
            else:
                delattr(self._instance, self._name)
            return
        while isinstance(outer, MethodWrapper):
            if outer._method is self:
                outer._method = self._method
                outer._was_instance_attribute = self._was_instance_attribute
                return
            outer = outer._method

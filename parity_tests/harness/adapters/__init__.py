"""Adapters: one face for a torch module, an NNX or Linen module and a function over named arrays. Each framework is imported when it is met."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..case import Case, CaseError, make, missing, raised
from .base import Adapter


def kind_of(model: Any) -> str:
    """"torch", "nnx", "linen" or "callable", from the classes a model derives from; nothing is imported for the question."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("torch.nn") and cls.__name__ == "Module":
            return "torch"
        if cls.__module__.startswith("flax.nnx") and cls.__name__ == "Module":
            return "nnx"
        if cls.__module__.startswith("flax.linen") and cls.__name__ == "Module":
            return "linen"
    from .callable_adapter import Engine

    if isinstance(model, Engine):
        return "callable"
    found = f"{type(model).__module__}.{type(model).__qualname__}"
    raise CaseError(f"expected a torch.nn.Module, an nnx.Module, a flax.linen.Module or an Engine, found {found}")


def opened(case: Case, role: str, dtype: str) -> Adapter:
    """The adapter over a fresh reference or candidate (`role`) of a case in a precision.

    Raises CaseError for a factory that raises and for an unknown kind of model.
    """
    return opened_from(getattr(case, role), case, 0 if role == "reference" else 1, dtype, role)


def opened_from(factory: Callable[..., Any], case: Case, position: int, dtype: str, role: str) -> Adapter:
    """`opened` for any factory, which errors call `role`; `position` says whether the case's pairs of functions are used as the reference
    (0) or the candidate (1)."""
    known = "flax.nnx" in sys.modules
    try:
        model = _made_wide(factory) if known and dtype == "float64" else make(factory, dtype)
        kind = kind_of(model)
        if kind == "nnx" and dtype == "float64" and not known:  # the factory was what imported flax
            model = _made_wide(factory)
    except CaseError:
        raise
    except (Exception, SystemExit) as error:
        raise CaseError(f"the {role} of case {case.name!r} cannot be made: {raised(error)}{missing(error)}") from error
    if kind == "torch":
        from .torch_adapter import TorchAdapter

        return TorchAdapter(model, dtype, case, position)
    if kind == "nnx":
        from .nnx_adapter import NNXAdapter

        return NNXAdapter(model, dtype, case, position)
    if kind == "linen":
        from .linen_adapter import LinenAdapter

        return LinenAdapter(model, dtype, case, position)
    from .callable_adapter import CallableAdapter

    return CallableAdapter(model, dtype, case, position)


def _made_wide(factory: Callable[..., Any]) -> Any:
    from .jax_shared import wide

    with wide(True):
        return make(factory, "float64")

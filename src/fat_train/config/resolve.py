"""A yaml node becomes a typed, checked dataclass: the only bridge between Hydra's tree and the code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fat_train.types import UserError, nearest


def resolve(node: Mapping[str, Any] | DictConfig, cls: type | None = None, *, where: str) -> Any:
    """Build the dataclass that `node` describes.

    Args:
        node: a mapping; its `_target_` names the dataclass ("package.module.Class") unless `cls` is given.
        cls: the dataclass, for nodes that have only one possible class.
        where: the node's path on the command line ("model", "trainer"); every message starts with it.

    Returns:
        A frozen instance; nested dataclass fields are instances too, and each `__post_init__` has run.

    Raises:
        UserError: an unknown key (with the nearest right one), a wrong type, a missing or an impossible value.
    """
    values = OmegaConf.to_container(OmegaConf.create(dict(node)), resolve=True)
    assert isinstance(values, dict)
    target = values.pop("_target_", None)
    if cls is None:
        if not isinstance(target, str):
            raise UserError(f"{where}: its yaml names no _target_; choose one of the files under conf/{where}/")
        cls = load_class(target, where)
    return _build(cls, values, where)


def load_class(target: str, where: str) -> type:
    """The dataclass behind a dotted path.

    Raises:
        UserError: no such module or class.
    """
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}._target_={target}: no such class ({error})") from error
    if not dataclasses.is_dataclass(cls):
        raise UserError(f"{where}._target_={target} is not a config dataclass")
    assert isinstance(cls, type)
    return cls


def _build(cls: type, values: Mapping[Any, Any], where: str) -> Any:
    """Nested dataclasses are built first, so that the innermost wrong value is the one that is reported."""
    fields = dataclasses.fields(cls)
    refuse_unknown(values, [field.name for field in fields], where)
    arguments: dict[str, Any] = {}
    leaves: dict[Any, Any] = {}
    for field in fields:
        default = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(default):
            nested = values.get(field.name, {})
            if not isinstance(nested, Mapping):
                keys = ", ".join(dotted(where, field.name, inner.name) for inner in dataclasses.fields(default))
                raise UserError(
                    f"{dotted(where, field.name)} is a group of settings; got {nested!r}. Set one of: {keys}"
                )
            arguments[field.name] = _build(type(default), nested, dotted(where, field.name))
        elif field.name in values and values[field.name] != MISSING:
            leaves[field.name] = values[field.name]
        elif default is dataclasses.MISSING:
            name = dotted(where, field.name)
            raise UserError(f"{name} is missing: give it as {name}=<{field.type}>")
    return cls(**arguments, **_typed(cls, leaves, where))


def _typed(cls: type, leaves: dict[Any, Any], where: str) -> dict[str, Any]:
    """Convert the given values to the fields' types, by OmegaConf's rules ("3" is an int, 3 is a float)."""
    for name, value in leaves.items():
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, float)]
        if not all(math.isfinite(number) for number in numbers):
            raise UserError(f"{dotted(where, name)} must be finite; got {value}")
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)  # OmegaConf takes `frozen=True` for "no merging"
    try:
        typed = OmegaConf.merge(schema, leaves)
        return {name: OmegaConf.to_container(typed[name]) if OmegaConf.is_config(typed[name]) else typed[name]
                for name in leaves}  # fmt: skip
    except OmegaConfBaseException as error:
        name = (getattr(error, "full_key", None) or "").partition("[")[0].partition(".")[0]
        wanted = next((field.type for field in dataclasses.fields(cls) if field.name == name), "another type")
        got = f"{leaves[name]!r}" if name in leaves else str(error).splitlines()[0]
        raise UserError(f"{dotted(where, name)} must be {wanted}; got {got}") from error


def refuse_unknown(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse the first key that is not known, and say which key is nearest.

    Raises:
        UserError: with the nearest right key and all allowed ones.
    """
    known = sorted(known)
    for key in values:
        if key not in known:
            under = f" under {where}" if where else ""
            raise UserError(
                f"unknown key {dotted(where, key)}{nearest(str(key), known)}\nAllowed{under}: {', '.join(known)}"
            )


def dotted(*parts: str) -> str:
    """The path of a setting as it is typed on the command line; empty parts (the root's) vanish."""
    return ".".join(str(part) for part in parts if part)

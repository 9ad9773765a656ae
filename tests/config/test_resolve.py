"""A yaml node becomes a checked dataclass, or one message that says what to write instead."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from fat_train.config.resolve import resolve
from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    gate: str = "released"

    def __post_init__(self) -> None:
        if self.gate not in ("released", "paper"):
            raise UserError(f"model.inner.gate must be released or paper; got {self.gate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    widths: list[int]
    rate: float = 0.1
    root: str | None = None
    inner: Inner = field(default_factory=Inner)


def test_values_are_converted_and_nested_nodes_become_dataclasses() -> None:
    built = resolve({"widths": ["1", 2], "rate": 1, "inner": {"gate": "paper"}}, Outer, where="model")
    assert built == Outer(widths=[1, 2], rate=1.0, inner=Inner(gate="paper"))


def test_the_class_is_named_by_target() -> None:
    built = resolve({"_target_": "fat_train.optim.adamw.AdamWConfig", "base_lr": 1}, where="optim")
    assert built.base_lr == 1.0


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"widths": [1], "rte": 1}, r"unknown key model\.rte; did you mean rate\?\nAllowed under model: inner, rate"),
        ({"widths": [1], "inner": {"gat": "x"}}, r"unknown key model\.inner\.gat; did you mean gate\?"),
        ({"widths": [1], "inner": {"gate": "x"}}, r"model\.inner\.gate must be released or paper; got x"),
        ({"widths": [1], "inner": 3}, r"model\.inner is a group of settings; got 3\. Set one of: model\.inner\.gate"),
        ({"rate": 1}, r"model\.widths is missing: give it as model\.widths=<list\[int\]>"),
        ({"widths": "???"}, r"model\.widths is missing"),
        ({"widths": 3}, r"model\.widths must be list\[int\]; got 3"),
        ({"widths": ["a"]}, r"model\.widths must be list\[int\]; got \['a'\]"),
        ({"widths": [1], "rate": "fast"}, r"model\.rate must be float; got 'fast'"),
        ({"widths": [1], "rate": None}, r"model\.rate must be float; got None"),
    ],
)
def test_a_wrong_node_is_refused_with_the_way_to_mend_it(node: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve(node, Outer, where="model")


@pytest.mark.parametrize("target", ["fat_train.optim.adamw.Adam", "nowhere.at.All", "os.getcwd", "plain"])
def test_a_wrong_target_is_refused_by_name(target: str) -> None:
    with pytest.raises(UserError, match=r"optim\._target_="):
        resolve({"_target_": target}, where="optim")

"""Who computes an operation: the way that was asked for where it can, else what was measured, else the definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fat_train.__main__ import main
from fat_train.op import choice
from fat_train.op.choice import REFERENCE, WAYS, OpConfig, compute_dtype, key_of, prefer, using, way_of
from fat_train.op.pointwise import pointwise_conv
from fat_train.types import UserError

X = torch.zeros(2, 4, 3, 3)


@pytest.fixture(autouse=True)
def as_installed() -> Iterator[None]:
    before = dict(choice._fastest)
    with using(OpConfig()):
        prefer({})
        yield
    prefer(before)


def way(operation: str = "depthwise", x: Tensor = X, *, can: bool = True, unmeasured: str = "native", **more) -> str:
    return way_of(operation, x, tuple(x.shape), lambda _: can, unmeasured, **more)


def test_auto_takes_what_this_kind_of_device_is_known_to_do_best():
    assert way(unmeasured="native") == "native"
    assert way(unmeasured="triton") == "torch", "a CPU has no Triton kernels"


@pytest.mark.parametrize("operation", WAYS)
def test_the_reference_is_the_definition_for_every_operation(operation):
    with using(REFERENCE):
        assert way(operation, unmeasured=WAYS[operation][-1]) == "torch"


def test_a_way_that_was_asked_for_is_taken():
    with using(OpConfig(attention="native")):
        assert way("attention", unmeasured="sdpa") == "native"
    with using(OpConfig(depthwise="torch")):
        assert way() == "torch"


def test_what_cannot_handle_a_case_makes_room_for_another():
    assert way(can=False) == "torch"
    assert way("attention", can=False, otherwise="sdpa") == "sdpa"
    with using(OpConfig(depthwise="triton")):
        assert way() == "torch"


@pytest.mark.parametrize("config", [OpConfig(), OpConfig(depthwise="native"), OpConfig(depthwise="triton")])
def test_where_nothing_is_computed_the_definition_tells_the_shapes(config):
    with using(config):
        assert way(x=X.to("meta"), otherwise="native") == "torch"


def test_a_measurement_wins_at_its_own_sizes_and_type_alone():
    prefer({key_of("depthwise", X.dtype, tuple(X.shape)): "torch"})
    assert way() == "torch"
    assert way(x=X[:1]) == "native"
    assert way(x=X.bfloat16()) == "native"
    assert way("attention") == "native"
    with using(OpConfig(depthwise="native")):
        assert way() == "native", "what was asked for wins over what was measured"
    prefer({})
    assert way() == "native"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_comes_out_as_it_came_in(layout):
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=layout)
    for wanted in ("torch", "gemm"):
        with using(OpConfig(pointwise=wanted)):
            assert pointwise_conv(x, torch.randn(6, 4, 1, 1), None).is_contiguous(memory_format=layout)


def test_autocasts_type_is_the_one_to_compute_in_but_for_float64():
    assert compute_dtype(X) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(X) == torch.bfloat16
        assert compute_dtype(X.double()) == torch.float64
        assert compute_dtype(X.to("meta")) == torch.float32


def test_a_choice_for_a_while_ends_even_with_an_error():
    outer, inner = OpConfig(norm="torch"), OpConfig(norm="triton")

    def fail() -> None:
        with using(inner):
            assert choice._config is inner
            raise KeyError

    with using(outer):
        with pytest.raises(KeyError):
            fail()
        assert choice._config is outer
    assert choice._config == OpConfig()


@pytest.mark.parametrize("operation", WAYS)
def test_an_unknown_way_is_refused_with_the_nearest_and_all_others(operation):
    last = WAYS[operation][-1]
    allowed = ", ".join(("auto", *WAYS[operation]))
    with pytest.raises(UserError) as error:
        replace(OpConfig(), **{operation: last + "x"})
    assert str(error.value) == f"op.{operation}={last}x is not known; did you mean {last}? (allowed: {allowed})"


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        (OpConfig(norm="triton"), "cpu", "op.norm=triton runs on cuda devices, and this run is on cpu"),
        (OpConfig(depthwise="native"), "cuda", "op.depthwise=native runs on cpu devices, and this run is on cuda"),
        (OpConfig(attention="native"), "mps", "op.attention=native runs on cpu devices, and this run is on mps"),
    ],
)
def test_a_way_that_the_runs_device_does_not_have_is_refused(config, device, message):
    with pytest.raises(UserError) as error:
        config.refuse_impossible(device)
    assert str(error.value) == message


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_auto_and_the_reference_are_possible_everywhere(device):
    OpConfig().refuse_impossible(device)
    REFERENCE.refuse_impossible(device)
    OpConfig(pointwise="gemm", attention="sdpa").refuse_impossible(device)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("op=refrence", "reference"),
        ("op.depthwize=torch", "did you mean depthwise"),
        ("op.depthwise=nativ", "did you mean native?"),
        ("op.norm=triton", "op.norm=triton runs on cuda devices, and this run is on cpu"),
    ],
)
def test_a_wrong_word_is_answered_before_anything_runs(word, message, tiny, tmp_path, capsys):
    assert main([*tiny, f"folder={tmp_path}", "trainer.accelerator=cpu", word]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

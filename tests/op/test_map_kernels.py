"""The Triton kernels of the norm and the interaction compute what the definitions say, and compile for a Hopper GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fat_train.op import choice, group_norm, interaction
from fat_train.op.choice import OpConfig

triton = pytest.importorskip("triton")
ROUNDING = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}
"""Of a result, relative to its largest number."""
Errors = dict[str, list[float]]


@pytest.fixture(scope="module")
def errors() -> Errors:
    script = Path(__file__).with_name("interpreted_maps.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: Errors = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", ROUNDING)
def test_values_and_gradients_are_those_of_float64_up_to_rounding(errors: Errors, dtype: str) -> None:
    own = {name: found for name, found in errors.items() if dtype in name.split() and "mean" not in name}
    assert len(own) >= 3
    for name, found in own.items():
        assert max(found) < ROUNDING[dtype], name


def test_moments_and_the_gradients_of_weight_and_bias_are_float32_whatever_the_maps(errors: Errors) -> None:
    own = [
        found for name, found in errors.items() if name.startswith("norm") and len(found) == 6 and "mean" not in name
    ]
    assert len(own) >= 8
    assert max(max(mean, rstd, weight, bias) for _, mean, rstd, _, weight, bias in own) < 1e-6


def test_a_mean_of_100_costs_no_more_than_the_rounding_of_the_numbers_themselves(errors: Errors) -> None:
    assert max(errors["norm float32 mean 100"]) < 2e-5  # float32 gives 100 to within 4e-6


def test_the_same_gradient_comes_twice_to_the_bit(errors: Errors) -> None:
    assert max(errors["norm float32 twice"]) == 0


@pytest.mark.parametrize("gate", ["released", "paper"])
def test_a_network_with_these_kernels_has_the_definitions_logits_and_gradients(errors: Errors, gate: str) -> None:
    assert max(errors[f"network {gate}"]) < 1e-3


MAPS = {"x_ptr", "y_ptr", "grad_ptr", "out_ptr", "q_ptr", "g_ptr", "of_q_ptr", "of_g_ptr"}
"""Arguments in the maps' type; other pointers are to float32."""
SIXTEENS = {"numel", "channels", "step"}
"""Numbers that 16 divides where it divides C, which Triton looks at."""
CONSTANTS = {"BLOCK": 2048, "SPLITS": 8, "POWER": 16, "BOTH_WAYS": True}


def compiled(kernel: Any, dtype: str) -> Any:
    """The kernel for a device of compute capability 9.0, which need not be there."""
    constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
    types = {name: f"*{dtype if name in MAPS else 'fp32'}" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "fp32" if name == "eps" else "i32" for name in kernel.arg_names if name not in {*types, *constants}}
    source = triton.compiler.ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name.endswith("_ptr") or name in SIXTEENS
        },
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """What the machine code takes a thread: REG registers, STACK and LOCAL bytes of memory for what does not fit."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    told = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_kernel_compiles_for_hopper_without_spills_and_moves_16_bytes_at_a_time(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fat_train.op.triton import group_norm as norm  # noqa: PLC0415
    from fat_train.op.triton import interaction as product  # noqa: PLC0415

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernels = [norm.moments_kernel, norm.normalise_kernel, norm.sums_kernel, norm.grad_kernel]
    for kernel in (*kernels, product.product_kernel, product.product_grad_kernel):
        made = compiled(kernel, dtype)
        takes = resources(made.asm["cubin"], tmp_path)
        assert takes["STACK"] == takes["LOCAL"] == 0, kernel
        assert takes["REG"] <= 80, f"{kernel}: six programs of four warps fit on a processor"
        code = made.asm["ptx"]
        assert "ld.global.v4.b32" in code, kernel
        assert not re.search(r"(ld|st)\.global\.(v\d\.)?b(8|16)\b", code), f"{kernel}: no map is read number by number"
        assert not re.search(r"\b(atom|red)\.", code), f"{kernel}: sums keep their order"


def test_on_the_cpu_a_request_for_triton_comes_to_the_definition() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 8)
    with choice.using(OpConfig(norm="triton", interaction="triton")):
        assert torch.equal(group_norm.whole_map_norm(x, weight, bias, 1e-5), group_norm.plain(x, weight, bias, 1e-5))
        assert torch.equal(interaction.interaction(x, x, True), interaction.plain(x, x, True))


# What follows runs on a CUDA device alone.

REAL = [(128, 32, 56, 56), (16, 64, 112, 112), (128, 80, 28, 28), (128, 160, 14, 14), (128, 256, 7, 7), (3, 7, 5, 9)]
"""Of B0, of B3 at 448 px, and an odd one."""
TRITON = OpConfig(norm="triton", interaction="triton")


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    made = torch.randn(shape, device="cuda").to(dtype)
    return made.contiguous(memory_format=torch.channels_last).requires_grad_()


def wide(*given: Tensor) -> list[Tensor]:
    return [one.detach().double().requires_grad_() for one in given]


def assert_close(got: tuple[Tensor, ...], right: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(got, right, strict=True):
        error = (one.detach().double() - other.detach()).abs().max() / other.detach().abs().max()
        assert float(error) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_on_a_gpu_both_are_float64s_up_to_rounding_at_real_sizes(shape: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    x, g, grad = (on_gpu(shape, getattr(torch, name)) for _ in range(3))
    weight, bias = (torch.randn(shape[1], device="cuda").requires_grad_() for _ in range(2))
    tolerance = max(ROUNDING[name], 1e-5)  # channels are sums of up to 400,000 numbers
    for compute, definition, inputs, words in (
        (group_norm.whole_map_norm, group_norm.plain, (x, weight, bias), (1e-5,)),
        (interaction.interaction, interaction.plain, (x, g), (False,)),
        (interaction.interaction, interaction.plain, (x, g), (True,)),
    ):
        with choice.using(TRITON), choice.recording() as seen:
            y = compute(*inputs, *words)
        assert [one.way for one in seen] == ["triton"]
        right_inputs = wide(*inputs)
        right = definition(*right_inputs, *words)
        gradients = torch.autograd.grad(y, inputs, grad)
        assert_close((y, *gradients), (right, *torch.autograd.grad(right, right_inputs, grad.double())), tolerance)


@pytest.mark.gpu
def test_on_a_gpu_the_operations_keep_torchs_rules_for_operations() -> None:
    x = on_gpu((2, 48, 14, 14), torch.float32)
    weight, bias = (torch.randn(48, device="cuda").requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.fat_train.whole_map_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.fat_train.interaction.default, (x, x.detach().clone().requires_grad_(), True))


@pytest.mark.gpu
@pytest.mark.compile
def test_on_a_gpu_autocast_and_compile_leave_no_break_in_the_graph() -> None:
    def both(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = group_norm.whole_map_norm(x, weight, bias, 1e-5)
        return interaction.interaction(y, x, True)

    torch.manual_seed(0)
    x = on_gpu((8, 64, 28, 28), torch.float32)
    weight, bias = (torch.randn(64, device="cuda").requires_grad_() for _ in range(2))
    with choice.using(TRITON), torch.autocast("cuda", torch.bfloat16):
        eager = both(x, weight, bias)
        fast = torch.compile(both, fullgraph=True)(x, weight, bias)
    assert eager.dtype == fast.dtype == torch.bfloat16
    inputs = (x, weight, bias)
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), inputs) for y in (fast, eager))
    assert_close((fast, *ours), (eager, *theirs), 1e-2)

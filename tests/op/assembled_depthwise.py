"""The depth-wise kernels as machine code for a GPU that is not here: registers, spills, shared memory.

    python tests/op/assembled_depthwise.py [candidates]

prints them for the tiles that B0 of FAT takes, or for all that `tune` would measure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fat_train.op.triton import depthwise
from fat_train.op.triton.depthwise_tile import (
    Shape,
    Strip,
    Tile,
    candidates,
    input_grad_tile,
    output_tile,
    weight_grad_tile,
)

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DEFAULT = {"forward": output_tile, "input_grad": input_grad_tile, "weight_grad": weight_grad_tile}
CONVOLUTIONS = (  # output, kernel size, stride: of FAT-B0 at 224 px
    ((64, 32, 56, 56), 3, 1),
    ((64, 128, 56, 56), 5, 1),
    ((64, 128, 28, 28), 5, 2),
    ((64, 32, 7, 7), 5, 2),
    ((64, 80, 28, 28), 5, 1),
    ((64, 320, 28, 28), 5, 1),
    ((64, 160, 14, 14), 7, 1),
    ((64, 640, 14, 14), 5, 1),
    ((64, 256, 7, 7), 9, 1),
    ((64, 1024, 7, 7), 5, 1),
)


class Resources(NamedTuple):
    """Of a compiled kernel."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that are kept in memory for want of registers."""
    shared: int
    """Bytes of a program."""


def assemble(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int, capability: int = 90) -> Resources:
    """Compile a kernel for `sm_<capability>`: maps of `dtype`, weights and sums of float32, C a multiple of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (TYPES[dtype] if name in ("x_ptr", "y_ptr", "grad_ptr", "dx_ptr") else "fp32")
        else:
            signature[name] = "i32"
        if name.endswith("_ptr") or name == "channels":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def assemble_tile(
    name: str, tile: Tile | Strip, dtype: torch.dtype, kernel_size: int, stride: int, capability: int = 90
) -> Resources:
    """One of the three kernels with a tile."""
    constants: dict[str, Any] = {"K": kernel_size, "STRIDE": stride, **tile.constants}
    if name != "weight_grad":
        constants["RESIDUAL"] = stride == 1
    if name == "forward":
        constants["HAS_BIAS"] = True
    return assemble(getattr(depthwise, f"{name}_kernel"), dtype, constants, tile.warps, capability)


def cases(all_candidates: bool) -> Iterator[tuple[str, Tile | Strip, torch.dtype, Shape, int, int]]:
    """Kernel, tile, type, output, kernel size, stride: each of them once."""
    seen = set()
    for shape, kernel_size, stride in CONVOLUTIONS:
        for dtype in TYPES:
            for name, default in DEFAULT.items():
                tiles = [default(dtype, shape, kernel_size, stride)]
                if all_candidates:
                    tiles = candidates(name, dtype, shape, kernel_size, stride)
                for tile in tiles:
                    key = (name, tile, dtype, kernel_size, stride)
                    if key not in seen:
                        seen.add(key)
                        yield name, tile, dtype, shape, kernel_size, stride


def main() -> None:
    """Print the table."""
    print("kernel       type  k stride  rows columns channels warps  registers spilled shared")
    for name, tile, dtype, _, kernel_size, stride in cases("candidates" in sys.argv[1:]):
        got = assemble_tile(name, tile, dtype, kernel_size, stride)
        left = f"{name:12} {TYPES[dtype]:5} {kernel_size} {stride:6}"
        print(f"{left} {tile[0]:5} {tile[1]:7} {tile[2]:8} {tile[3]:5} {got[0]:10} {got[1]:7} {got[2]:6}", flush=True)


if __name__ == "__main__":
    main()

"""The C++ beside this file, compiled for this very processor on first use, and kept for the next process.

Plain C functions called through ctypes rather than a torch extension: ten seconds to compile once, and nothing of
torch's headers, so the same file serves every torch. OpenMP's threads are torch's own, whose library has been loaded by
then.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fat_train.cache import cache_folder

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# The first that the compiler takes: not every one knows every processor, or has OpenMP.
FITTINGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels, or None with one warning where they cannot be compiled; torch's own then do the work."""
    compiler = _compiler()
    if compiler is None:
        warnings.warn("no C++ compiler (c++, g++, clang++ or $CXX): FAT is slower on the CPU without it", stacklevel=2)
        return None
    name = f"kernels-{_key(compiler)}.so"
    for open_folder in (_kept, _scratch):
        try:
            file = open_folder() / name
            if not file.is_file():
                _build(compiler, file)
            return ctypes.CDLL(str(file))
        except OSError:  # nobody may write here, or nothing from here may run
            continue
        except subprocess.CalledProcessError as error:
            warnings.warn(f"{compiler} cannot compile our kernels; torch's do the work:\n{error.stderr}", stacklevel=2)
            return None
    warnings.warn("no folder for compiled kernels; torch's do the work: set FAT_TRAIN_CACHE", stacklevel=2)
    return None


@torch.compiler.assume_constant_result
def is_there() -> bool:
    """Whether there is a `library`: to torch.compile a constant, or it would trace the search for a compiler."""
    return library() is not None


def _kept() -> Path:
    folder = cache_folder() / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _scratch() -> Path:
    """This process's own: a name that others can guess is a way to have their code loaded here."""
    folder = tempfile.mkdtemp(prefix="fat_train_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, filter(None, names)) if found), None)


def _key(compiler: str) -> str:
    """Of everything that the machine code depends on: a home folder may be shared by many kinds of machines."""
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (*(file.read_bytes() for file in _files()), version, _processor().encode(), repr(FLAGS).encode()):
        digest.update(part)
    return digest.hexdigest()[:16]


def _files() -> list[Path]:
    return [*SOURCES, *sorted(Path(__file__).parent.glob("*.h"))]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return platform.machine() + platform.processor() + "".join(sorted(set(about)))


def _build(compiler: str, file: Path) -> None:
    """Beside the place and then into it, so that no other process ever loads half a file."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}.") as scratch:
        made = Path(scratch) / file.name
        for attempt, fitting in enumerate(FITTINGS, 1):
            words = [compiler, *FLAGS, *fitting, *map(str, SOURCES), "-o", str(made)]
            try:
                subprocess.run(words, check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError:
                if attempt == len(FITTINGS):
                    raise
                continue
            made.replace(file)
            return


def call(function: str, *arguments: Tensor | int | bool | list[int] | None) -> None:
    """Call a kernel: tensors as pointers to their float32 numbers, lists as arrays, then torch's number of threads."""
    kernels = library()
    assert kernels is not None
    status = getattr(kernels, function)(*map(_as_c, arguments), ctypes.c_int(torch.get_num_threads()))
    assert status == 0, f"{function} has no such case"


def _as_c(value: Tensor | int | bool | list[int] | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, list):
        return (ctypes.c_int64 * len(value))(*value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)

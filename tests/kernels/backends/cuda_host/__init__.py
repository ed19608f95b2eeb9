"""The CUDA kernels of probkit, compiled for the host and run without a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from probkit.kernels.backends.cuda_source import source

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


class HostLauncher:
    """Takes the place of the CuPy launcher: compiles each kernel instance once, for the host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known, self.numbers = folder, {}, itertools.count()

    def __call__(
        self, kernel: str, grid: tuple[int, int], arguments: Sequence[Tensor | int | None]
    ) -> None:
        given = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                assert argument.is_contiguous()
                given.append(argument.data_ptr())
            else:
                given.append(0 if argument is None else argument)
        if kernel not in self.known:
            self.known[kernel] = self.compile(kernel)
        values = (ctypes.c_longlong * len(given))(*given)
        self.known[kernel](values, *grid)

    def compile(self, kernel: str):
        """Build a library with one instance behind a C function (values, across, down)."""
        kinds = parameters(kernel)
        casts = ", ".join(
            f"reinterpret_cast<{kind}>(values[{k}])" if "*" in kind else f"values[{k}]"
            for k, kind in enumerate(kinds)
        )
        text = f"""
#include "block.hpp"
{source()}
extern "C" void run(const long long* values, unsigned across, unsigned down) {{
    run_grid(across, down, [=] {{ {kernel}({casts}); }});
}}
"""
        return build(self.folder / f"kernel{next(self.numbers)}", text).run


def parameters(kernel: str) -> list[str]:
    """Types of the parameters of one instance, T filled in."""
    template, precision = re.match(r"probkit::(\w+)<(\w+)", kernel).groups()
    found = re.search(rf"__global__ void {template}\((.*?)\) {{", source(), re.S).group(1)
    kinds = [re.sub(r"\s*\w+$", "", one.strip()) for one in found.split(",")]
    return [re.sub(r"\bT\b", precision, kind) for kind in kinds]


def build(stem: Path, text: str) -> ctypes.CDLL:
    """Compile a text for the host and load it."""
    file, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    file.write_text(text)
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command = [COMPILER, *options, "-I", str(HERE), "-o", str(library), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Address of the first entry."""
    assert tensor.is_contiguous() and tensor.dtype == torch.float64
    return ctypes.c_void_p(tensor.data_ptr())

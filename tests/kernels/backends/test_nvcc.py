"""Every CUDA kernel compiles: by nvcc, where it is installed."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess

import pytest
import torch

from probkit.kernels.backends.cuda_source import ACTIVATIONS, FAMILIES, name_of, source

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

NETWORKS = ("network_matrix", "network_product", "network_map")
STATIONARY = ("stationary_matrix", "stationary_product", "stationary_backward")
PRECISIONS = (torch.float64, torch.float32)


def instances():
    """Every instance that the library can ask for."""
    for dtype, activation, residual in itertools.product(PRECISIONS, ACTIVATIONS, (False, True)):
        for kernel, tangent in itertools.product(NETWORKS, (False, True)):
            yield name_of(kernel, dtype, activation, tangent, residual)
        yield name_of("network_backward", dtype, activation, residual)
    for dtype, family, kernel in itertools.product(PRECISIONS, FAMILIES, STATIONARY):
        yield name_of(kernel, dtype, family)


def compiled(names, folder, *options):
    """Compile instances into one file of machine or intermediate code; return what nvcc said."""
    uses = "".join(f"template __global__ void {declaration(name)};" for name in names)
    text, out = folder / "kernels.cu", folder / "kernels.out"
    text.write_text(f"{source()}\n{uses}\n")
    command = [NVCC, "-std=c++17", *options, "-o", str(out), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 0
    return done.stderr


def declaration(name):
    """An explicit instantiation needs the parameters, too."""
    template, first = re.match(r"probkit::(\w+)<(\w+)", name).groups()
    found = re.search(rf"__global__ void {template}\((.*?)\) {{", source(), re.S).group(1)
    kinds = re.sub(r"\bT\b", first, " ".join(found.split()))
    return f"{name}({kinds})"


def test_every_kernel_compiles(tmp_path):
    names = [
        *(name_of(kernel, torch.float64, "relu", True, False) for kernel in NETWORKS),
        name_of("network_backward", torch.float32, "erf", True),
        *(name_of(kernel, torch.float32, "matern52") for kernel in STATIONARY),
    ]
    said = compiled(names, tmp_path, "-ptx", "-arch=compute_80")
    assert "warning" not in said


@pytest.mark.slow
def test_every_instance_becomes_machine_code(tmp_path):
    said = compiled(list(instances()), tmp_path, "-cubin", "-arch=sm_90", "-Xptxas=-v")
    used = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(used) == len(list(instances())) == 80
    # 256 threads of a block fit the 65536 registers of a multiprocessor at least once
    assert max(used) <= 255
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", said)]
    assert max(shared) <= 48 * 1024  # what a block may have without asking for more

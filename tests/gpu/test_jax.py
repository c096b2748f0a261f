"""JAX on a GPU: XLA's stream, memory and CUDA graphs; the numbers are those of torch tensors."""

import functools
from pathlib import Path

import pytest
from conftest import needs, python

import gpu
from gpu import torch

pytestmark = [*gpu.marks, needs("jax")]

PROGRAMS = Path(__file__).with_name("jax_programs.py")
GRAPHS = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"


def run(*arguments, **environment):
    return python(*arguments, XLA_PYTHON_CLIENT_PREALLOCATE="false", **environment)


@functools.cache
def jax_platform():
    return run("-c", "import jax; print(jax.default_backend())").split()[-1]


@pytest.mark.parametrize(
    "name",
    [
        "features",
        "gradients",
        "packed_and_merged",
        "vmapped",
        "other_streams",
        "command_buffer",
        "refusals",
    ],
)
def test_programs(name):
    if jax_platform() != "gpu":
        pytest.skip("JAX is installed without CUDA")
    run(PROGRAMS, name, XLA_FLAGS=GRAPHS if name == "command_buffer" else "")


def test_second_device():
    if torch.cuda.device_count() < 2 or jax_platform() != "gpu":
        pytest.skip("needs JAX with CUDA and two GPUs")
    run(PROGRAMS, "second_device")

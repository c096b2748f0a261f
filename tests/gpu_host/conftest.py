"""The libraries, compiled once."""

import ctypes
import shutil
from pathlib import Path

import pytest

from gpu_host import library

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    made = library(HERE / "shim.c", tmp_path_factory.mktemp("host"))
    made.variant_name.restype = made.sentence.restype = ctypes.c_char_p
    return made


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    made = library(HERE / "packed_shim.cpp", tmp_path_factory.mktemp("packed"))
    made.list.restype = ctypes.c_int64
    return made


@pytest.fixture(scope="session")
def merging(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("merging")
    return library(HERE / "merge_shim.cpp", folder, "-Wno-missing-field-initializers")

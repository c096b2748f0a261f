"""The CPU backend called from C, through the contract alone, at every vector level."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree"),
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"),
]


def test_the_contract_from_c(tmp_path, cpu_levels):
    driver = tmp_path / "driver"
    sources = [ROOT / "tests" / "cpu_driver.c", *(ROOT / "csrc" / "cpu").glob("*.c")]
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror"]
    command = ["cc", *flags, f"-I{ROOT / 'csrc'}", *sources, "-lm", "-lpthread", "-o", driver]
    subprocess.run(command, check=True)
    for level in cpu_levels:
        environment = {**os.environ, "FASTATTN_CPU_LEVEL": level}
        done = subprocess.run([driver], env=environment, capture_output=True, text=True)
        assert f"level {level}: 160 passed, 0 failed\n" in done.stdout, done.stdout + done.stderr

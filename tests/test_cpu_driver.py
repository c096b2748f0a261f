"""The CPU backend called from C, through the contract alone, at every vector level."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT, python

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree"),
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"),
]


def test_the_contract_from_c(tmp_path, cpu_levels):
    driver = tmp_path / "driver"
    sources = [ROOT / "tests" / "cpu_driver.c", ROOT / "csrc" / "cpu.c"]
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror"]
    command = ["cc", *flags, f"-I{ROOT / 'csrc'}", *sources, "-lm", "-lpthread", "-o", driver]
    subprocess.run(command, check=True)
    run = f"import subprocess; print(subprocess.run([{str(driver)!r}], capture_output=True).stdout)"
    for level in cpu_levels:
        said = python("-c", run, FASTATTN_CPU_LEVEL=level)
        assert re.search(rf"level {level}: \d+ passed, 0 failed", said), said

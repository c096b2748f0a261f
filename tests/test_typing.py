"""The types that a user's checker sees: typed_user.py under mypy and pyright, both strict."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fastattn
import pytest
from conftest import ROOT, needs, python
from fastattn import _attention

USER = ROOT / "tests" / "typed_user.py"


@needs("mypy")
def test_a_users_script_under_mypy(tmp_path):
    said = python("-m", "mypy", "--strict", "--cache-dir", tmp_path, USER, timeout=600)
    assert "no issues found in 1 source file" in said


@needs("pyright")
def test_a_users_script_under_pyright(tmp_path):
    """In a folder of its own: the settings of ours are not the user's."""
    shutil.copy(USER, tmp_path)
    settings = {
        "strict": [USER.name],
        "extraPaths": [str(Path(fastattn.__file__).parent.parent)],
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "0 errors, 0 warnings" in done.stdout, done.stdout


@needs("typing_extensions")
def test_a_users_script_runs():
    assert float(python(USER)) > 0


@pytest.mark.parametrize(
    "function, options",
    [(fastattn.attention, _attention._Padded), (fastattn.attention_varlen, _attention._Packed)],
)
def test_the_overloads_have_every_keyword(function, options):
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert options.__optional_keys__ == keywords - {"return_lse"}
    assert not options.__required_keys__

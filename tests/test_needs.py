"""Modules that serve a framework, where it is missing or too old; `import fastattn` as before."""

import re
import sys

import pytest
from conftest import python
from fastattn import _needs

MODULES = {  # module: what it needs
    "flash_attn": "torch",
    "flash_attn.bert_padding": "torch",
    "flash_attn_interface": "torch",
    "jax": "jax",
    "torch": "torch",
    "transformers": "transformers",
    "xformers": "torch",
}


@pytest.mark.parametrize("module", MODULES)
def test_one_sentence_says_what_to_install(module):
    program = (
        f"import sys, fastattn\nsys.modules[{MODULES[module]!r}] = None\n"
        f"try: import fastattn.{module}\n"
        "except ModuleNotFoundError as error: print(error.name, error)\n"
    )
    said = python("-c", program).splitlines()
    assert len(said) == 1
    name, _, sentence = said[0].partition(" ")
    assert name == MODULES[module]
    of, called = module.partition(".")[0], _needs.NAMES[name]
    want = rf"fastattn\.{of} needs {called} ([\d.]+) or newer: pip install '{name}>=\1'"
    assert re.fullmatch(want, sentence)


def test_a_framework_that_is_too_old(monkeypatch):
    old = type(sys)("a_framework")
    monkeypatch.setitem(sys.modules, old.__name__, old)
    for version in ("2.9.1", "1.12.0+cpu"):
        old.__version__ = version
        with pytest.raises(ImportError) as error:
            _needs.need("fastattn.x", "a_framework", "2.10")
        assert str(error.value) == (
            f"fastattn.x needs a_framework 2.10 or newer, found {version}: pip install -U "
            "'a_framework>=2.10'"
        )
    for version in ("2.10.0", "2.13.0+cpu", "3.0a0"):
        old.__version__ = version
        _needs.need("fastattn.x", old.__name__, "2.10")


def test_what_a_framework_itself_misses_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "half_a_framework.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        _needs.need("fastattn.x", "half_a_framework", "1.0")


def test_fastattn_alone_imports_none_of_them():
    ask = "import sys, fastattn; print([n for n in sys.modules if n.startswith('fastattn.')])"
    loaded = python("-c", ask)
    assert not [name for name in MODULES if f"'fastattn.{name}'" in loaded]
    assert "'fastattn._needs'" not in loaded

"""The planted faults follow the code, and what plants them does what it says."""

from types import SimpleNamespace

import mutants
import mutants_list
import pytest

marked = pytest.mark.skipif(not (mutants.ROOT / "csrc").exists(), reason="needs the sources")


@marked
def test_the_list_follows_the_code():
    """Its rules, and each line is there."""
    faults = mutants.all_faults()
    assert len(set(map(str, faults))) == len(faults)
    for fault in [mutants.Fault(*f) for f in mutants_list.GPU_FAULTS] + faults:
        text = (mutants.ROOT / fault.file).read_text()
        assert fault.planted(text) != text
        for word in fault.tests.split():
            if word.startswith("tests/"):
                assert (mutants.ROOT / word).exists(), fault


@marked
def test_a_line_that_is_gone_is_said():
    fault = mutants.Fault("csrc/mask.h", "no such line", "", "tests/test_mask_h.py")
    with pytest.raises(SystemExit, match="must follow the code: in "):
        fault.planted("something else")


CODE = """#define LIMIT 7
/* a < b and 3 */
static const char *text = "a < 3";
    char buffer[64];
    if (a < b && i + 1 == n) return 0;
    if (a > b) a = b;
    snprintf(buffer, 64, "x");
"""


def test_what_is_turned(tmp_path, monkeypatch):
    """No comment, text or macro; of a lesser or greater not the comparison; 0 and 1 each other."""
    (tmp_path / "x.c").write_text(CODE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    place = SimpleNamespace(file="x.c", tests="", builds=False)
    line = "    if (a < b && i + 1 == n) return 0;"
    monkeypatch.setattr(mutants, "is_listed", lambda fault: True)  # then a line has several
    assert {fault.planted(CODE).splitlines()[4] for fault in mutants.sites(place)} == {
        line.replace("<", "<="),
        line.replace("&&", "||"),
        line.replace("+", "-"),
        line.replace("1", "0"),
        line.replace("==", "!="),
        line.replace("0", "1"),
    }
    monkeypatch.setattr(mutants, "is_listed", lambda fault: False)
    assert len(list(mutants.sites(place))) == 1

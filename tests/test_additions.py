"""What CONTRIBUTING's table asks of an addition, where forgetting it would go unnoticed."""

import re

import pytest
from conftest import LEVELS, ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="no source tree")


def text(name):
    """Without comments."""
    return re.sub(r"/\*.*?\*/", " ", (ROOT / name).read_text(), flags=re.S)


def forgotten(contract, choice, cpu):
    """(what changes scores, backend) for each that a backend would silently compute without: the
    fields of fa_scores, but for what describes another field."""
    (fields,) = re.findall(r"typedef struct fa_scores \{(.*?)\} fa_scores;", contract, re.S)
    names = [name for name in re.findall(r"(\w+)(?:\[\d\])?;", fields)]
    changes = [name for name in names if not name.endswith(("_dtype", "_stride"))]
    assert {"softcap", "mask", "alibi_slopes", "sink"} <= set(changes)
    changes.remove("sink")  # it joins a row's sum at the end, in every kernel
    (general,) = re.findall(r"fa_needs_general\(const fa_params \*p\) \{(.*?)\n\}", choice, re.S)
    (changed,) = re.findall(r"open_scores\(context \*c\) \{.*?c->changed = (.*?);", cpu, re.S)
    (one_key,) = re.findall(r"static int has_one_key\(.*?\n\}", cpu, re.S)
    (backward,) = re.findall(r"c->rounds = (.*?);", cpu, re.S)
    switches = {"cpu": changed, "cpu, one key": one_key, "cpu, backward": backward}
    switches |= {"sm90": general}
    return [
        (name, backend)
        for name in changes
        for backend, switch in switches.items()
        if not re.search(rf"\b{name}\b", switch)
    ]


def test_a_change_of_the_scores_is_switched_on_in_every_backend():
    contract, choice = text("csrc/forward.h"), text("kernels/common/general.h")
    cpu = "".join(
        text(f"csrc/cpu/{x}.h") for x in ("forward_rows", "forward_kernel", "backward_kernel")
    )
    assert not forgotten(contract, choice, cpu)
    more = contract.replace("} fa_scores;", "float temperature; } fa_scores;")
    switches = ("cpu", "cpu, one key", "cpu, backward", "sm90")
    assert forgotten(more, choice, cpu) == [("temperature", name) for name in switches]
    assert forgotten(contract, choice.replace("s->softcap", "0"), cpu) == [("softcap", "sm90")]
    assert forgotten(contract, choice, cpu.replace("c->mask &&", "0 &&")) == [("mask", "cpu")]
    hasty = cpu.replace("scores->softcap > 0) return 0;", "0) return 0;")
    assert forgotten(contract, choice, hasty) == [("softcap", "cpu, one key")]


def test_every_cpu_level_is_tested():
    assert tuple(re.findall(r"^ *LEVEL\((\w+)\)", text("csrc/cpu/cpu.c"), re.M)) == LEVELS
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{level}`" in readme for level in LEVELS)

"""benchmarks/results: what a file's name says, and that each still counts."""

import json
import re

import pytest
from conftest import ROOT

FOLDER = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="no source tree")


def results():
    """(date, card, name, result) of each result file."""
    found = []
    for path in sorted(FOLDER.iterdir()):
        name = re.fullmatch(r"(\d{4}-\d\d-\d\d)-([a-z0-9]+)-[a-z0-9-]+\.(json|txt)", path.name)
        assert name, f"{path.name} is not DATE-CARD-PART.json"
        if path.suffix == ".json":
            found.append((name[1], name[2], path.name, json.loads(path.read_text())))
    assert found
    return found


def test_names_tell_date_and_card():
    for date, card, name, result in results():
        header = result["header"]
        assert header["date"].startswith(date), name
        assert card in (header.get("gpu") or header["cpu"]).lower().split(), name


def test_one_result_for_each_card_and_suite():
    """The latest: what a newer file of the same card measures again is taken out of the older."""
    seen = {}
    for _, card, name, result in results():
        header = result["header"]
        level = "" if header.get("gpu") else header.get("cpu_level") or header["level"]
        suites = {row.get("suite", "beside torch") for row in result["rows"]}
        assert suites, name
        for suite in suites:
            other = seen.setdefault((card, level, suite), name)
            assert other == name, f"{suite} of {card} is in {other} and in {name}"


def test_what_is_written_of_a_result_is_there():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("benchmarks/*.md")]
    named = {x for text in texts for x in re.findall(r"results/(\d[\w.-]+\.\w+)", text.read_text())}
    assert named and named <= {path.name for path in FOLDER.iterdir()}

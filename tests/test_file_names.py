"""Comments and papers name files that are there: what is moved is found by its name."""

import re

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")

FOLDERS = ("csrc", "kernels", "python", "tests", "benchmarks", "findings", ".github")
SUFFIXES = ("c", "h", "cu", "cuh", "cpp", "def", "py", "md")
NAME = re.compile(rf"(?<![\w*/.<>-])((?:[\w.-]+/)*[a-z_0-9]+\.(?:{'|'.join(SUFFIXES)}))\b(?![.(])")
PAPERS = ("README.md", ".github/CONTRIBUTING.md", ".github/RECIPES.md", "kernels/README.md")


def there():
    """All files of the tree, by their names and by each end of their paths."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    parts = [p.relative_to(ROOT).parts for p in (*paths, *ROOT.iterdir()) if p.is_file()]
    return {"/".join(path[i:]) for path in parts for i in range(len(path))}


def missing(text, files):
    return {name for name in NAME.findall(text) if name.removeprefix("../") not in files}


def comments(source):
    """What C's comments say; of them, what names a file and not a member."""
    found = re.findall(r"/\*.*?\*/|//[^\n]*", source, re.S)
    return " ".join(re.sub(r"\b[a-z]\w?\.[ch]\b", "", text) for text in found)


SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("csrc", "kernels")
    for path in (ROOT / folder).rglob("*")
    if path.suffix[1:] in ("c", "h", "cu", "cuh", "def")
)


@pytest.mark.parametrize("folder", ["csrc/", "kernels/"])
def test_comments_name_files_that_are_there(folder):
    files = there()
    wrong = {
        name: found
        for name in SOURCES
        if name.startswith(folder)
        and (found := missing(comments((ROOT / name).read_text()), files))
    }
    assert not wrong


@pytest.mark.parametrize("name", PAPERS)
def test_papers_name_files_that_are_there(name):
    assert not missing(re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S), there())


def test_a_name_that_is_gone_is_seen():
    files = there()
    assert missing(comments("/* as gone.cuh says, and mask.h; t.h is a head */"), files) == {
        "gone.cuh"
    }
    assert missing("`kernels/sm90/gone.cuh` and `fwd.def`", files) == {"kernels/sm90/gone.cuh"}
    assert missing("`tests/mask.h` and `csrc/mask.h`", files) == {"tests/mask.h"}


PLACE = re.compile(rf"\b(\w+)(?:\(\))?`? in `?((?:[\w-]+/)*\w+\.(?:{'|'.join(SUFFIXES)}))\b")


def misplaced(text):
    """Each NAME in FILE (a constant, or of more words than one) that the file does not have."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for name, file in PLACE.findall(" ".join(text.replace("\n * ", " ").split())):
        if name.isupper() or "_" in name:
            found = [p for p in paths if f"/{p.relative_to(ROOT).as_posix()}".endswith(f"/{file}")]
            if not any(name in p.read_text() for p in found):
                yield f"{name} in {file}"


def test_names_are_in_the_files_that_are_said_to_have_them():
    texts = [comments((ROOT / name).read_text()) for name in SOURCES]
    texts += [(ROOT / name).read_text() for name in PAPERS]
    assert not [found for text in texts for found in misplaced(text)]
    wrong = "/* `DELAYED` in `fwd.cu`, DELAYED in\n * fwd_variant.h, fa_run() in csrc/mask.h */"
    assert list(misplaced(wrong)) == ["DELAYED in fwd.cu", "fa_run in csrc/mask.h"]

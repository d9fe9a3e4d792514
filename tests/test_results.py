"""`perf/results/` is alive: each file backs a claim of a document and says what it was measured on, and each name exists."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
FILES = sorted(path.name for path in RESULTS.iterdir())
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LARGEST_SUM = 300_000  # bytes: what is quoted, not samples

NAME = re.compile(r"(?<![\w:])\w+_(?:h100|h200|cpu|counts|tiles|groups)\.(?:json|txt)\b")
OLD_NAME = re.compile(r"\b([0-9a-f]{7,12}):(?:perf/results/)?(\w+\.(?:json|txt))\b")
COMMITS = re.compile(r"\b[0-9a-f]{7,12}\b(\+changes)?")

NOT_CLEAN = {
    "peers_h100.json": "neither commit nor command was recorded",
    "peers_h200.json": "neither commit nor command was recorded",
    "peers_h200_groups.json": "neither commit nor command was recorded",
}
"""Files without a clean commit, and why: results of before the rule. New ones don't come here; measure them again instead."""


def text_of_documents():
    """All documents as one text, by name."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}


def described(name):
    """The GPU, commit and command that a result names: of the entry `run` in JSON, of the first three lines of text."""
    text = (RESULTS / name).read_text()
    if name.endswith(".json"):
        run = json.loads(text)["run"]
        return {
            "device": run["device"] or "a CPU",
            "commit": run["commit"],
            "command": run["command"],
        }  # the sweep: None without a GPU
    lines = [line.partition(": ") for line in text.splitlines()[:3]]
    assert [line[0] for line in lines] == ["GPU", "Commit", "Command"], name
    return dict(zip(("device", "commit", "command"), (line[2] for line in lines), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_a_document_names_each_file(name):
    """A file that no document names backs no claim: delete it, git keeps it."""
    assert any(name in NAME.findall(text) for text in text_of_documents().values())


def test_each_name_exists():
    """No document names a result that is not there."""
    missing = {where: [n for n in NAME.findall(text) if n not in FILES] for where, text in text_of_documents().items()}
    assert {where: names for where, names in missing.items() if names} == {}


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_they_measured(name):
    """Each names the GPU or CPU, the command, and a commit without changes."""
    found = described(name)
    assert found["device"] and found["command"]
    assert ("NVIDIA" in found["device"]) == ("_h100" in name or "_h200" in name)
    commits = [match.group(1) for match in COMMITS.finditer(found["commit"])]
    clean = bool(commits) and not any(commits) and "unknown" not in found["commit"]
    assert clean == (name not in NOT_CLEAN), f"{found['commit']}; {NOT_CLEAN.get(name, 'measure it at a clean commit')}"
    assert ("unknown" not in found["command"]) or name in NOT_CLEAN


def test_sum_of_sizes():
    """Results are rounded to what is quoted: all of them together stay small."""
    assert sum((RESULTS / name).stat().st_size for name in FILES) < LARGEST_SUM
    assert set(FILES) >= NOT_CLEAN.keys()


def test_names_of_the_history():
    """`COMMIT:NAME` in a document is a file of that commit (skipped where the history is not there)."""
    found = {match for text in text_of_documents().values() for match in OLD_NAME.findall(text)}
    assert found
    for commit in sorted({commit for commit, _ in found}):
        try:
            command = ["git", "-C", str(ROOT), "ls-tree", "--name-only", commit, "perf/results/"]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(f"no commit {commit} here")
        names = {Path(line).name for line in listing.splitlines()}
        assert [name for where, name in sorted(found) if where == commit and name not in names] == []


def test_links():
    """Links between documents lead to files and headings that are there."""
    headings = {}
    for path in DOCUMENTS:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        headings[path] = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    wrong = []
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", path.read_text())):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            found = (path.parent / file).resolve() if file else path
            if not found.exists() or (anchor and anchor not in headings[found]):
                wrong.append(f"{path.name}: {target}")
    assert wrong == []

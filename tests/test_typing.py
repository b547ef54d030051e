"""What a type checker makes of users' code: `tests/typing/` through pyright, in one run.

Each line there has exactly the errors that its comment `# error: rule, rule` names. Files without such a comment are
run as well, so that what passes is code that works.
"""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "typing"
FILES = sorted(FOLDER.glob("*.py"))

Error = tuple[str, int, str]  # file, line, rule


def expected(file: Path) -> Iterator[Error]:
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if marked := re.search(r"  # error: (.+)$", line):
            yield from ((file.name, number, rule) for rule in marked[1].split(", "))


def reported() -> dict[Error, str]:
    """The message of each error."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", *map(str, FILES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(FILES)
    found = report["generalDiagnostics"]
    return {(Path(d["file"]).name, d["range"]["start"]["line"] + 1, d.get("rule", "")): d["message"] for d in found}


def test_pyright_finds_the_mistakes_and_nothing_else() -> None:
    found, wanted = reported(), {error for file in FILES for error in expected(file)}
    unexpected = [f"{file}:{line} {rule}: {found[file, line, rule]}" for file, line, rule in sorted({*found} - wanted)]
    assert not unexpected, "\n".join(unexpected)
    assert wanted == {*found}, f"not found by pyright: {sorted(wanted - {*found})}"


@pytest.mark.parametrize("file", [file for file in FILES if not any(expected(file))], ids=lambda file: file.name)
def test_what_passes_also_runs(file: Path) -> None:
    runpy.run_path(str(file))["main"]()

"""Imports point downwards, files stay small, and the public names are those in `fluxpy.__all__`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fluxpy
from fluxpy import Rule

ROOT = Path(fluxpy.__file__).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))
LEARNER = [file for file in FILES if file.startswith("learner/")]
CORE = [file for file in FILES if file not in LEARNER]


def imports(file: str, *, lazy: bool = False) -> Iterator[str]:
    """The modules that a file imports, in full: `fluxpy.rule`, `torch.nn`; with `lazy` also those inside functions."""
    path = ROOT / file
    package = ["fluxpy", *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1] if node.level else [])
            module = ".".join(filter(None, (base, node.module)))
            # `from . import schedules` imports a module, `from .rule import Rule` a name of one.
            yield from (f"{module}.{alias.name}" if node.module is None else module for alias in node.names)


def ours(file: str) -> set[str]:
    return {name for name in imports(file, lazy=True) if name.split(".")[0] == "fluxpy"}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("rules/")])
def test_rules_know_one_tensor_and_no_tree(file: str) -> None:
    assert {name for name in ours(file) if not name.startswith("fluxpy.rules.")} <= {"fluxpy.fields", "fluxpy.rule"}


@pytest.mark.parametrize("file", ["fields.py", "rule.py", "schedules.py", "data.py", "text.py", "pytree.py"])
def test_the_ground_floor_knows_no_model(file: str) -> None:
    assert ours(file) <= {"fluxpy.fields", "fluxpy.text"}


def test_the_tree_knows_no_rules() -> None:
    assert ours("tree.py") <= {"fluxpy.text", "fluxpy.pytree"}


def test_one_file_imports_optree() -> None:
    assert [file for file in FILES if any(name.split(".")[0] == "optree" for name in imports(file))] == ["pytree.py"]


@pytest.mark.parametrize("file", [file for file in CORE if file != "__init__.py"])
def test_the_core_knows_no_learner(file: str) -> None:
    assert not {name for name in ours(file) if name.startswith("fluxpy.learner")}


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_long(file: str) -> None:
    lines = (ROOT / file).read_text().count("\n")
    assert lines <= 300, "split it by what changes together"


def test_import_is_light() -> None:
    heavy = ["fluxpy.learner", "tensorboard", "torch.utils.tensorboard", "sklearn", "matplotlib", "tqdm.notebook"]
    code = f"import sys, fluxpy; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    names = fluxpy.__all__
    assert len(names) == len(set(names))
    assert not [name for name in names if not hasattr(fluxpy, name)]
    public = {name for name, value in vars(fluxpy).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public <= set(names)


def test_each_public_name_is_listed_once_and_in_order() -> None:
    exported = fluxpy.rules.__all__
    assert exported == sorted(exported)
    own = [name for name in fluxpy.__all__ if name not in exported]
    assert own == sorted(own)
    rules = {name for name, value in vars(fluxpy).items() if isinstance(value, type) and issubclass(value, Rule)}
    assert rules == set(exported)
    source = (ROOT / "__init__.py").read_text()
    assert not [name for name in rules if f'"{name}"' in source], "a rule is exported in fluxpy/rules/__init__.py alone"


def test_dir_shows_the_public_names_and_no_inner_modules() -> None:
    shown = {*fluxpy.__all__, "__version__", "learner", "rules", "testing"}
    assert set(dir(fluxpy)) == shown
    modules = {name for name in shown if isinstance(getattr(fluxpy, name), ModuleType)}
    assert modules == {"learner", "rules", "schedules", "testing"}


def test_a_misspelt_name_is_answered_by_the_right_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fluxpy; fluxpy.setupp"], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert "module 'fluxpy' has no attribute 'setupp'. Did you mean: 'setup'?" in done.stderr
    with pytest.raises(ImportError, match="setupp"):
        exec("from fluxpy import setupp")

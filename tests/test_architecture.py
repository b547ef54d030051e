"""Imports point downwards, functions are short, insides stay inside, and the public names are those in `__all__`."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import fluxpy
import fluxpy.rules
from fluxpy import Rule

ROOT = Path(fluxpy.__file__).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))
LEARNER = [file for file in FILES if file.startswith("learner/")]
ENGINE = [file for file in FILES if file.startswith("engine/")]
CORE = [file for file in FILES if file not in LEARNER]
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def syntax(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


# --- Imports ------------------------------------------------------------------------------------------------------


def statements(tree: ast.AST, *, types: bool = False) -> Iterator[ast.AST]:
    """All that is in a file, functions too; without what is there for type checkers alone, unless `types`."""
    for node in ast.iter_child_nodes(tree):
        if types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from statements(node, types=types)


def imported(file: str, *, types: bool = False) -> set[tuple[str, str | None]]:
    """(module, name) of each import, the module in full: ("fluxpy.rule", "Rule"), ("torch", None)."""
    package = ["fluxpy", *Path(file).parent.parts]
    found: set[tuple[str, str | None]] = set()
    for node in statements(syntax(file), types=types):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {(module, alias.name) for alias in node.names}
    return found


def ours(file: str) -> set[str]:
    """The files of this package that a file imports."""
    found = {file_of(module, name) for module, name in imported(file) if module.split(".")[0] == "fluxpy"}
    return found - {file}


def file_of(module: str, name: str | None) -> str:
    """`from . import schedules` imports a module, `from .rule import Rule` a name of one."""
    path = module.split(".")[1:]
    places = [*([[*path, name]] if name else []), path]
    files = [file for place in places for file in ("/".join(place) + ".py", "/".join([*place, "__init__.py"]))]
    return next(file for file in files if file in FILES)


def reached(file: str, below: dict[str, set[str]]) -> set[str]:
    """All that a file imports, by way of others too."""
    seen: set[str] = set()
    todo = [*below[file]]
    while todo:
        other = todo.pop()
        if other not in seen:
            seen.add(other)
            todo += below[other]
    return seen


def circles(below: dict[str, set[str]]) -> list[str]:
    """The files that import themselves by way of others."""
    return [file for file in below if file in reached(file, below)]


def test_no_circles() -> None:
    assert circles({file: ours(file) for file in FILES}) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == ["a", "b", "c"]


def test_few_imports_are_for_types_alone() -> None:
    """The parts of a Learner name it in annotations; the package names what it imports when it is first used."""
    lazy = [file for file in FILES if imported(file, types=True) != imported(file)]
    parts = ["callbacks/progress_bar.py", "dispatcher.py", "loop.py", "resume.py"]
    assert set(lazy) <= {"__init__.py", "learner/callbacks/lr_find.py", *(f"learner/{part}" for part in parts)}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("rules/")])
def test_rules_know_one_tensor_and_no_tree(file: str) -> None:
    known = {"rule.py", "fields.py", "text.py"}
    if file in ("rules/lowered.py", "rules/average.py"):
        known |= {"pytree.py"}  # the tensors of another's state; whether a transform is at work
    assert {name for name in ours(file) if not name.startswith("rules/")} <= known


@pytest.mark.parametrize("file", ["rule.py", "fields.py", "schedules.py", "data.py", "text.py", "pytree.py"])
def test_the_ground_floor_knows_no_model(file: str) -> None:
    allowed = {"cached.py", "fields.py", "text.py"} | (
        {"pytree.py"} if file == "rule.py" else set()
    )  # a rule's state is a pytree
    assert ours(file) <= allowed


def test_the_tree_knows_no_rules() -> None:
    assert ours("tree.py") <= {"cached.py", "text.py", "pytree.py"}


def test_one_file_imports_optree() -> None:
    users = [file for file in FILES if any(module.split(".")[0] == "optree" for module, _ in imported(file))]
    assert users == ["pytree.py"]


@pytest.mark.parametrize("file", CORE)
def test_the_core_knows_no_learner(file: str) -> None:
    assert not {name for name in ours(file) if name.startswith("learner/")}


@pytest.mark.parametrize("file", [file for file in LEARNER if file != "learner/core.py"])
def test_the_learner_uses_the_public_names(file: str) -> None:
    """What it uses besides stands in its core.py."""
    public = {("fluxpy", name) for name in fluxpy.__all__}
    outside = {(module, name) for module, name in imported(file) if module.split(".")[0] == "fluxpy"}
    outside = {(module, name) for module, name in outside if not module.startswith("fluxpy.learner")}
    assert {(module, name) for module, name in outside if module != "fluxpy.schedules"} <= public


@pytest.mark.parametrize("file", [file for file in ENGINE if file != "engine/fused_kernels.py"])
def test_the_engine_knows_no_rule_by_its_class(file: str) -> None:
    """Of those that are known, only the kernels' table may speak."""
    public = {name: getattr(fluxpy.rules, name) for name in fluxpy.rules.__all__}
    names = {name for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, fluxpy.Rule)}
    names -= {"Rule", "ReducingRule"}
    words = {node.id for node in ast.walk(syntax(file)) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(syntax(file)) if isinstance(node, ast.Attribute)}
    words |= {node.value for node in ast.walk(syntax(file)) if isinstance(node, ast.Constant)}
    assert "Adam" in names
    assert not {name for name in ours(file) if name.startswith("rules/")}
    assert not words & names


# --- Private attributes -------------------------------------------------------------------------------------------

# Of PyTorch's, what is used: it may change with any version, so this list stays short.
PYTORCH = {
    "_C": "whether a torch.func transform runs",
    "_buffers": "a module's own",
    "_current_level": "whether forward-mode derivatives are taken",
    "_debug_has_internal_overlap": "what cannot be written in place",
    "_foreach_copy_": "many copies in one call",
    "_functorch": "whether a torch.func transform runs",
    "_fused_adagrad_": "kernel",
    "_fused_adam_": "kernel",
    "_fused_adamw_": "kernel",
    "_fused_sgd_": "kernel",
    "_get_ddp_logging_data": "how many gradients DDP averages",
    "_get_zeros_like_grad_buckets": "whose gradients DDP averages",
    "_is_view": "what an update would change",
    "_local_tensor": "what this process holds of a DTensor; to_local() costs 300 times as much",
    "_make_subclass": "a parameter of a plain tensor, as its constructor makes it",
    "_modules": "a module's own",
    "_non_persistent_buffers_set": "what is not saved",
    "_orig_mod": "inside torch.compile's module",
    "_parameters": "a module's own",
    "_spec": "whether a DTensor is laid out as the one before",
    "_version": "whether a tensor was written to",
}
PYTORCH_MODULES = {"torch._C._dynamo.guards", "torch._inductor", "torch._inductor.compile_fx"}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, in spite of their names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(file: str) -> set[str]:
    """Names that a file gives to functions, classes, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(syntax(file)):
        if isinstance(node, FUNCTION | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def foreign(file: str) -> list[str]:
    """The private attributes of objects whose class or module is in another file, and private names imported."""
    known, found = defined(file), []
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and node.attr not in known:
                found.append(node.attr)
    names = [name or "" for module, name in imported(file) if module.startswith("fluxpy")]
    return [*found, *filter(is_private, names)]


def test_private_attributes_stay_in_their_file() -> None:
    uses = {file: [name for name in foreign(file) if name not in {*PYTORCH, *NAMED_TUPLE}] for file in FILES}
    assert {file: names for file, names in uses.items() if names} == {}


def test_few_private_names_of_pytorch() -> None:
    used = [name for file in FILES for name in foreign(file) if name in PYTORCH]
    modules = {module for file in FILES for module, _ in imported(file) if module.startswith("torch._")}
    assert set(used) == PYTORCH.keys(), "the list above is of those that are used"
    spread = [name for file in FILES if file.startswith("distributed/") for name in foreign(file) if name in PYTORCH]
    assert len(used) - len(spread) <= 40
    assert modules == PYTORCH_MODULES


# --- Sizes --------------------------------------------------------------------------------------------------------

LONG: dict[str, str] = {}  # functions that may have more than 40 lines: "file:name" -> why


def code(file: str) -> set[int]:
    """The numbers of the lines that are neither empty nor comment nor docstring."""
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO((ROOT / file).read_text()).readline):
        if token.type not in blank:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(syntax(file)):
        if isinstance(node, FUNCTION | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            lines -= span(node.body[0])
    return lines


def span(node: ast.stmt) -> set[int]:
    return {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file: str) -> None:
    lines = code(file)
    sizes = {f"{file}:{f.name}": len(lines & span(f)) for f in ast.walk(syntax(file)) if isinstance(f, FUNCTION)}
    assert {name: size for name, size in sizes.items() if size > 40 and name not in LONG} == {}


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_long(file: str) -> None:
    lines = (ROOT / file).read_text().count("\n")
    assert lines <= 480, "split it by what changes together"


def test_the_core_does_not_grow() -> None:
    """What `update` and the verbs are made of besides the rules and what is for several processes, with comments and
    docstrings."""
    below = {file: ours(file) for file in FILES}
    core = set().union(*({file, *reached(file, below)} for file in ("update.py", "adjust.py", "gradient.py")))
    core -= {"show.py", "text.py"}  # what is shown and said
    own = [file for file in core if not file.startswith(("rules/", "distributed/"))]
    assert sum((ROOT / file).read_text().count("\n") for file in own) <= 7_450


# --- The package --------------------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    heavy = ["fluxpy.interop", "fluxpy.learner", "tensorboard", "torch.utils.tensorboard", "sklearn", "matplotlib"]
    heavy += ["tqdm.notebook", "fluxpy.testing", "pytest"]
    there = f"print([name for name in {heavy} if name in sys.modules])"
    code = f"import sys, fluxpy; {there}; import fluxpy.testing; {there}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split("\n") == ["[]", "['fluxpy.testing']", ""]  # which needs no test framework


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
    shown = {*fluxpy.__all__, "__version__", "interop", "learner", "rules", "surgery", "testing"}
    assert set(dir(fluxpy)) == shown
    modules = {name for name in shown if isinstance(getattr(fluxpy, name), ModuleType)}
    assert modules == {"interop", "learner", "rules", "schedules", "surgery", "testing"}


def test_a_misspelt_name_is_answered_by_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AttributeError) as error:
        eval("fluxpy.setupp")
    sys.__excepthook__(error.type, error.value, error.tb)  # as Python shows an error that nobody caught
    assert "module 'fluxpy' has no attribute 'setupp'. Did you mean: 'setup'?" in capsys.readouterr().err
    with pytest.raises(ImportError, match="setupp"):
        exec("from fluxpy import setupp")

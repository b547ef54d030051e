"""Every Python example of the README and the docs runs, page by page, and prints what the page says it prints."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fluxpy
from fluxpy import interop, learner, rules, schedules, surgery, testing

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block of Python, and the block of text right after it, if any, that is its output.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


ALONE = {"recipes.md"}  # where no block needs the first one of the page
WIDTH = 80  # what fits into the column


@pytest.fixture
def _no_group_stays() -> Iterator[None]:
    """The page on several processes starts a group of one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_no_group_stays")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    """Each by itself after the first of its page, whatever stands between them."""
    text = page.read_text("utf-8")
    examples = list(EXAMPLE.finditer(text))
    for example in examples:
        torch.manual_seed(0)
        names = {"__name__": "__main__"}
        if example is not examples[0] and page.name not in ALONE:
            run(page, text, examples[0], names)
        line, printed = run(page, text, example, names)
        if example[2] is not None:
            assert printed == example[2], f"{page.name}: the example at line {line} prints something else"


def run(page: Path, text: str, example: re.Match[str], names: dict[str, object]) -> tuple[int, str]:
    line = text.count("\n", 0, example.start(1))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n" * line + example[1], page, "exec"), names)  # a traceback shows the line of the page
    return line, printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_fits_its_column(page: Path) -> None:
    """Of output, tables do; messages wrap."""
    text = page.read_text("utf-8")
    lines = [line for example in EXAMPLE.finditer(text) for line in example[1].splitlines()]
    tables = re.findall(r"^path  .*\n(?:.*\n)*?(?=```|\n)", text, re.MULTILINE)
    lines += [line for table in tables for line in table.splitlines()]
    assert [line for line in lines if len(line) > WIDTH] == []


def test_every_page_is_listed() -> None:
    """In the navigation, and in the table of the first page."""
    pages = {page.name for page in PAGES} - {"README.md", "index.md"}
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    table = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert {name for name in pages if f": {name}\n" not in navigation or f"({name})" not in table} == set()


def test_every_public_name_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert "\n::: fluxpy.rules\n    options:\n      members: null" in page  # each rule, by its export alone
    listed = [*re.findall(r"^::: fluxpy\.(?:\w+\.)?(\w+)$", page, re.MULTILINE), *rules.__all__]
    of_schedules = [n for n, x in vars(schedules).items() if getattr(x, "__module__", "") == schedules.__name__]
    of_learner = [name for name in learner.__all__ if name != "Learner"]
    for_rule_writers = ["Assign", "Reduce", "ReducingRule", "Rule", "hyper"]
    own_modules = [*interop.__all__, *surgery.__all__, *testing.__all__]
    public = [*fluxpy.__all__, *own_modules, *of_learner, *for_rule_writers, "rules"]
    assert sorted(listed) == sorted([*public, *(name for name in of_schedules if name[0] != "_")])

"""Every Python example of the README and the docs runs, page by page, and prints what the page says it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import fluxpy
from fluxpy import interop, learner, rules, schedules, surgery, testing

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block of Python, and the block of text right after it, if any, that is its output.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    torch.manual_seed(0)
    text = page.read_text("utf-8")
    names = {"__name__": "__main__"}
    for example in EXAMPLE.finditer(text):
        line = text.count("\n", 0, example.start(1))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * line + example[1], page, "exec"), names)  # a traceback shows the line of the page
        if example[2] is not None:
            assert printed.getvalue() == example[2], f"{page.name}: the example at line {line} prints something else"


def test_every_public_name_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert "\n::: fluxpy.rules\n    options:\n      members: null" in page  # each rule, by its export alone
    listed = [*re.findall(r"^::: fluxpy\.(?:\w+\.)?(\w+)$", page, re.MULTILINE), *rules.__all__]
    of_schedules = [n for n, x in vars(schedules).items() if getattr(x, "__module__", "") == schedules.__name__]
    of_learner = [name for name in learner.__all__ if name != "Learner"]
    for_rule_writers = ["Assign", "Reduce", "ReducingRule", "Rule", "hyper"]
    extra = [*interop.__all__, *surgery.__all__, *testing.__all__]
    public = [*fluxpy.__all__, *extra, *of_learner, *for_rule_writers, "rules"]
    assert sorted(listed) == sorted([*public, *(name for name in of_schedules if name[0] != "_")])

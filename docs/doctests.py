"""For the API page: doctests become code blocks, since Markdown reads their >>> as quotations."""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value + "\n"
            obj.docstring.value = re.sub(r"(?m)^>>> (?:.+\n)+", r"```pycon\n\g<0>```\n", text)

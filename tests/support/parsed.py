"""A page as a browser reads it, without one."""

import json
from html.parser import HTMLParser
from typing import Any


class Parsed(HTMLParser):
    """A page as a browser reads it: its elements, its text, its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.comments: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads; JSON as browsers know it, without NaN."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        found: dict[str, Any] = json.loads(self.scripts[0], parse_constant=refuse)
        return found

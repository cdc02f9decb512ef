"""A page as plain blocks, written as Markdown or as one self-contained HTML file.

The blocks say what is shown, the two writers how; whatever a user wrote (names, labels, paths) is
escaped here and nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

Tone = Literal["", "good", "bad", "quiet", "strong"]

_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ?(%|µs|ms|s|min|h|B|[KMGT]iB))?")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    note: small print below the text; href: a path relative to the page; tone: how the text is coloured;
    bar, shade: 0..1, the length of a bar beside the text or the depth of the background, both left out in
    Markdown.
    """

    text: str
    note: str = ""
    href: str = ""
    tone: Tone = ""
    bar: float | None = None
    shade: float | None = None

    @property
    def url(self) -> str:
        """``href`` percent-encoded, so that it can only ever be a relative path."""
        return quote(self.href)

    @property
    def long(self) -> bool:
        """Whether a word of it, such as a digest or a path, may have to be broken on a narrow page."""
        return any(len(word) > 40 for word in self.text.split())

    @property
    def numeric(self) -> bool:
        return bool(_NUMBER.fullmatch(self.text))


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first column names the rows. ``header`` may be empty."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    heat: bool = False

    @classmethod
    def of(
        cls,
        header: Sequence[str],
        rows: Sequence[Sequence[str | Cell]],
        caption: str = "",
        heat: bool = False,
    ) -> Table:
        """A table whose rows may hold plain strings."""
        cells = tuple(tuple(c if isinstance(c, Cell) else Cell(c) for c in row) for row in rows)
        return cls(tuple(header), cells, caption, heat)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column whether it holds numbers alone (and absent ones), to be set flush right."""
        columns = zip(*self.rows, strict=True)
        return tuple(
            all(c.numeric or c.text in ("–", "") for c in column) and any(c.numeric for c in column)
            for column in columns
        )


@dataclass(frozen=True)
class Text:
    """A paragraph; a ``warning`` stands out, a ``note`` stands back."""

    text: str
    tone: Literal["plain", "note", "warning"] = "plain"


@dataclass(frozen=True)
class Figure:
    """An inline SVG drawing, made by this program (it is not escaped), with what it shows in words."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Text shown as it is."""

    text: str
    language: str = ""


Block = Table | Text | Figure | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A title, one sentence that a newcomer understands, warnings, sections, and a foot line."""

    title: str
    summary: str
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]
    foot: str


def write(page: Page, folder: Path) -> Path:
    """Write ``report.md`` and ``report.html`` into ``folder``, each replaced whole; returns the HTML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.md", to_markdown(page)), ("report.html", to_html(page))):
        unfinished = folder / f".{name}.{os.getpid()}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
    return folder / "report.html"


def to_html(page: Page) -> str:
    """``page`` as one HTML file without external resources."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(page=page, kind=lambda block: type(block).__name__)


def to_markdown(page: Page) -> str:
    """``page`` as Markdown (CommonMark with pipe tables); figures are named, not drawn."""
    return "\n\n".join(_markdown_page(page)) + "\n"


def _markdown_page(page: Page) -> Iterator[str]:
    yield f"# {_escape(page.title)}"
    yield _escape(page.summary)
    for warning in page.warnings:
        yield f"> **Warning.** {_escape(warning)}"
    for section in page.sections:
        yield f"## {_escape(section.title)}"
        for block in section.blocks:
            yield _markdown_block(block)
    yield f"*{_escape(page.foot)}*"


def _markdown_block(block: Block) -> str:
    match block:
        case Text(text, "warning"):
            return f"> **Warning.** {_escape(text)}"
        case Text(text):
            return _escape(text)
        case Figure(_, caption):
            return f"*Figure in the HTML page: {_escape(caption)}*"
        case Code(text, language):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}{language}\n{text.rstrip()}\n{fence}"
        case Table():
            return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    width = len(table.rows[0]) if table.rows else len(table.header)
    header = table.header or ("",) * width
    rule = ["---:" if numeric else "---" for numeric in table.numeric or (False,) * width]
    lines = [[_escape(text) for text in header], rule]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{_escape(table.caption)}" if table.caption else text


def _markdown_cell(cell: Cell) -> str:
    text = _escape(cell.text)
    if cell.href:
        text = f"[{text}]({cell.url})"
    elif cell.tone in ("bad", "strong"):
        text = f"**{text}**"
    return f"{text} ({_escape(cell.note)})" if cell.note else text


def _escape(text: str) -> str:
    """``text`` on one line, with every character that Markdown or HTML gives a meaning to escaped."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))

"""A report as sections of words, a table and a picture: written as Markdown with the pictures beside it, and as one HTML file with
everything in it, which opens offline and fits a phone (page.html). No text of a user's is markup in either.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from redheart.console import literal
from redheart.version import VERSION

ROWS = Sequence[Sequence[str]]


class Picture(NamedTuple):
    """`panels` draw on axes of `size` inches each; `file`: its name beside the Markdown."""

    file: str
    alt: str
    panels: Sequence[Callable[[Any], None]]
    size: tuple[float, float] = (3.4, 2.7)

    def png(self, directory: Path) -> None:
        """All panels on one sheet, three in a row."""
        across = min(3, len(self.panels))
        down = -(-len(self.panels) // across)
        sheet = figure(self.size[0] * across, self.size[1] * down)
        for number, panel in enumerate(self.panels, 1):
            panel(sheet.add_subplot(down, across, number))
        sheet.savefig(directory / self.file, dpi=120)

    def svgs(self) -> list[str]:
        """A drawing of its own for every panel, so that a narrow screen puts them below one another."""
        from matplotlib import rc_context

        drawings = []
        for number, panel in enumerate(self.panels):
            # letters stay letters, and ids depend on what is drawn and where it stands alone
            with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{self.file} {number}", "font.size": 9}):
                sheet, text = figure(*self.size), io.StringIO()
                panel(sheet.subplots())
                sheet.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            drawings.append(text.getvalue().partition("<svg")[2])
        return [f"<svg{drawing}" for drawing in drawings]


@dataclass(frozen=True)
class Section:
    """`first`: sentences before the table, `notes` after it; `commands`: to be pasted."""

    title: str
    first: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: ROWS = ()
    notes: Sequence[str] = ()
    picture: Picture | None = None
    commands: Sequence[str] = ()


def figure(width: float, height: float) -> Any:
    """An empty picture of so many inches, drawn without a screen; axes of it are made with `subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def to_markdown(title: str, sections: Sequence[Section], directory: Path) -> str:
    """Writes the pictures into `directory`."""
    lines = [f"# {plain(title)}"]
    for one in sections:
        lines += ["", f"## {plain(one.title)}", *(f"\n{plain(text)}" for text in one.first)]
        if one.columns:
            rows = [one.columns, ["---"] * len(one.columns), *one.rows]
            lines += ["", *("| " + " | ".join(map(plain, row)) + " |" for row in rows)]
        lines += [f"\n{plain(text)}" for text in one.notes]
        lines += ["", "```", *one.commands, "```"] if one.commands else []
        if one.picture:
            one.picture.png(directory)
            lines += ["", f"![{one.picture.alt}]({one.picture.file})"]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """On one line of Markdown, in which nothing is markup; an underscore between letters is none."""
    escaped = re.sub(r"([\\`*\[\]#|~]|\b_|_\b|(?<!\w)_)", r"\\\1", " ".join(literal(str(text)).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def to_html(title: str, sections: Sequence[Section], refresh_s: int | None = None) -> str:
    """`refresh_s`: after so many seconds a browser reads the page again."""
    return _template().render(title=title, sections=sections, refresh_s=refresh_s, version=VERSION)


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("redheart.evaluation", "")
    strict = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return strict.get_template("page.html")

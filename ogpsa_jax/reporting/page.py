"""One self-contained HTML page: no script, no style sheet, font or image from elsewhere."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ogpsa_jax.reporting.palette import DARK, LIGHT, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure that carries its PNGs in itself.

    Attributes:
      light: PNG in base64.
      dark: the same for readers who prefer a dark page.
      description: what it shows, for those who do not see it.
      caption: how to read it.
    """

    light: str
    dark: str
    description: str
    caption: str

    @classmethod
    def of(
        cls, draw: "Callable[[Palette], Figure]", description: str, caption: str = ""
    ) -> "Picture":
        """The picture of a figure that is drawn once in light and once in dark."""
        return cls(_png(draw(LIGHT)), _png(draw(DARK)), description, caption)


@dataclass(frozen=True)
class Table:
    """Rows of plain cells.

    Attributes:
      cells: rows of equal length, headings first.
      hints: by heading, a few words that stand under it.
      text: all columns contain text; otherwise the first two do, and the others numbers.
    """

    cells: Sequence[Sequence[str]]
    hints: Mapping[str, str] = field(default_factory=dict)
    text: bool = False


@dataclass(frozen=True)
class PageSection:
    """A part of a page; what it contains is shown in the order of the attributes.

    Attributes:
      heading: of the part.
      paragraphs: of plain text.
      picture: with its caption.
      terms: what each term means.
      table: in a box of its own that scrolls sideways.
      note: in small letters.
      folded: opened by a click alone.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    picture: Picture | None = None
    terms: Mapping[str, str] = field(default_factory=dict)
    table: Table | None = None
    note: str = ""
    folded: bool = False


def html_page(title: str, finding: str, context: str, sections: Sequence[PageSection]) -> str:
    """A whole page; every text is plain and is escaped.

    Args:
      title: of the page.
      finding: what it shows, in a sentence.
      context: what the finding is measured against.
      sections: its parts.

    Returns:
      The document.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ogpsa_jax.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(title=title, finding=finding, context=context, sections=sections) + "\n"


def _png(figure: "Figure") -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return base64.b64encode(png.getvalue()).decode("ascii")

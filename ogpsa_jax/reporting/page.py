"""One self-contained HTML page: no script, no style sheet, font or image from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ogpsa_jax.evaluation.records import Record
from ogpsa_jax.reporting.tables import SPREAD_NOTE, table_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; background: #fff;
       max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
p { max-width: 52rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid #e2e2e2; text-align: right;
         vertical-align: top; }
th { border-bottom: 2px solid #999; }
th:nth-child(-n+2), td:nth-child(-n+2), table.text th, table.text td { text-align: left; }
table:not(.text) td { white-space: nowrap; }
tbody tr:hover { background: #f6f6f6; }
.note { color: #555; font-size: .88rem; }
pre, code { font-size: .88rem; } pre { overflow-x: auto; background: #f6f6f6; padding: .7rem; }
"""


def figure_html(figure: "Figure", description: str) -> str:
    """A figure as an ``<img>`` that carries its PNG in itself.

    Args:
      figure: of matplotlib.
      description: what it shows, for those who do not see it.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png")
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'


def cells_html(cells: Sequence[Sequence[str]], text: bool = False) -> str:
    """A table from rows of plain cells, headings first; everything is escaped.

    Args:
      cells: rows of equal length.
      text: all columns hold text and are aligned to the left; otherwise the first two only.
    """

    def row(items: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in items) + "</tr>"

    head, body = row(cells[0], "th"), "\n".join(row(items, "td") for items in cells[1:])
    kind = ' class="text"' if text else ""
    table = f"<table{kind}><thead>{head}</thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def table_html(
    records: Sequence[Record],
    matched_safety: float | None = None,
    every_score: bool = False,
) -> str:
    """The safety–utility table and what its ± means; arguments as for ``table_cells``."""
    note = f'<p class="note">{html.escape(SPREAD_NOTE)}</p>'
    return cells_html(table_cells(records, matched_safety, every_score)) + note


def html_page(title: str, sections: Sequence[tuple[str, str]], introduction: str = "") -> str:
    """A whole page.

    Args:
      title: plain text.
      sections: heading (plain text) and body (HTML, as the functions here make it) of each part.
      introduction: HTML between the title and the first section.

    Returns:
      The document.
    """
    parts = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{body}" for heading, body in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{introduction}\n{parts}\n</body>\n</html>\n"
    )

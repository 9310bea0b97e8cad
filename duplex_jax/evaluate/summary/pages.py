"""A page as one self-contained HTML file, and as Markdown with its pictures beside it."""

import base64
import html
import urllib.parse
from pathlib import Path

from duplex_jax.evaluate.summary.tables import Cell, Figure, Page, Section, Table
from duplex_jax.files import atomic_write

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --faint: #666; --warn: #a33; --page: #fff; --text: #111; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --faint: #aaa; --warn: #f99; --page: #161616; --text: #eee; }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem;
       background: var(--page); color: var(--text); }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: .4rem; min-width: 16rem; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
         min-width: 4rem; max-width: 24rem; }
td { overflow-wrap: anywhere; min-width: 6rem; }
thead th { border-bottom-width: 2px; } tbody th { font-weight: normal; }
.best { font-weight: bold; } .warning { color: var(--warn); overflow-wrap: anywhere; }
.note, figcaption { color: var(--faint); font-size: .85rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def write_page(page: Page, folder: Path) -> list[str]:
    """Writes `report.html`, `report.md` and the pictures; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
    figures = [figure for section in page.sections for figure in section.figures]
    for figure in figures:
        with atomic_write(folder / figure.name, "wb") as f:
            f.write(figure.png)
    for name, text in (("report.html", as_html(page)), ("report.md", as_markdown(page))):
        with atomic_write(folder / name) as f:
            f.write(text)
    return ["report.html", "report.md", *(figure.name for figure in figures)]


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _html_notes(numbers: list[int]) -> str:
    return "".join(f' <sup><a href="#source-{n}">[{n}]</a></sup>' for n in numbers)


def as_html(page: Page) -> str:
    """The page in one file: style inside, pictures as data, readable on a phone, light and dark."""
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escaped(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{_escaped(page.title)}</h1>",
    ]
    for section in page.sections:
        lines += _html_section(section)
    return "\n".join([*lines, "</body>\n</html>\n"])


def _html_section(section: Section) -> list[str]:
    lines = [f"<section>\n<h2>{_escaped(section.title)}</h2>"]
    for table in section.tables:
        lines += _html_table(table)
    lines += [_html_figure(figure) for figure in section.figures]
    if section.text:
        lines.append(f"<pre>{_escaped(chr(10).join(section.text))}</pre>")
    return [*lines, "</section>"]


def _html_table(table: Table) -> list[str]:
    lines = [f'<p class="warning" role="note">{_escaped(warning)}</p>' for warning in table.warnings]
    # One that is wider than the screen is scrolled by itself, with the keyboard too.
    lines.append(f'<div class="wide" tabindex="0">\n<table>\n<caption>{_escaped(table.caption)}'
                 f"{_html_notes(table.sources)}</caption>")  # fmt: skip
    heads = "".join(f'<th scope="col">{_escaped(header)}</th>' for header in table.headers)
    lines.append(f"<thead><tr>{heads}</tr></thead>\n<tbody>")
    for row in table.rows:
        place = f' id="source-{row.name[1:-1]}"' if row.name.startswith("[") and not table.sources else ""
        cells = "".join(map(_html_cell, row.cells))
        lines.append(f'<tr{place}><th scope="row">{_escaped(row.name)}</th>{cells}</tr>')
    lines.append("</tbody>\n</table>\n</div>")
    return lines + [f'<p class="note">{_escaped(note)}</p>' for note in table.notes]


def _html_cell(cell: Cell) -> str:
    best = ' class="best"' if cell.best else ""
    text = _escaped(cell.text)
    if cell.value is not None:
        text = f'<data value="{cell.value!r}">{text}</data>'
    return f"<td{best}>{text}</td>"


def _html_figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = _escaped(figure.caption)
    return (f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}{_html_notes(figure.sources)}</figcaption></figure>")  # fmt: skip


def as_markdown(page: Page) -> str:
    """The same in Markdown, pictures by the names of their files."""
    lines = [f"# {_plain(page.title)}", ""]
    for section in page.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for table in section.tables:
            lines += [line for warning in table.warnings for line in (f"**{_plain(warning)}**", "")]
            lines += [f"{_plain(table.caption)}{_numbers(table.sources)}", ""]
            lines.append(_line(table.headers))
            lines.append("|" + "---|" * len(table.headers))
            for row in table.rows:
                lines.append(_line([row.name, *(c.text for c in row.cells)], [False, *(c.best for c in row.cells)]))
            lines.append("")
            lines += [line for note in table.notes for line in (_plain(note), "")]
        for figure in section.figures:
            caption = _plain(figure.caption)
            lines += [
                f"![{caption}]({urllib.parse.quote(figure.name)})",
                "",
                f"{caption}{_numbers(figure.sources)}",
                "",
            ]
        # Indented text is shown as it is, whatever it holds.
        lines += [*(f"    {line}" for line in section.text), ""] if section.text else []
    return "\n".join(lines).rstrip() + "\n"


def _numbers(numbers: list[int]) -> str:
    return "".join(f" \\[{n}\\]" for n in numbers)


def _line(texts: list[str], best: list[bool] | None = None) -> str:
    marks = ["**" if b else "" for b in best or [False] * len(texts)]
    return "| " + " | ".join(f"{m}{_plain(t)}{m}" for m, t in zip(marks, texts, strict=True)) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]|#$~" else html.escape(c, quote=False) if c in "<>&" else c for c in text)

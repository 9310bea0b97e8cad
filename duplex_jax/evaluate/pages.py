"""Sections as one self-contained HTML file, and as Markdown with its pictures beside it."""

import base64
import html
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path

from duplex_jax.evaluate.reports import Cell, Figure, Section, Table
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
"""


def write_page(title: str, sections: Sequence[Section], folder: Path) -> list[str]:
    """Writes `report.html`, `report.md` and the pictures; gives what was written.

    Raises:
        UserError: the place cannot be written.
    """
    figures = [figure for section in sections for figure in section.figures]
    for figure in figures:
        with atomic_write(folder / figure.name, "wb") as f:
            f.write(figure.png)
    for name, text in (("report.html", as_html(title, sections)), ("report.md", as_markdown(title, sections))):
        with atomic_write(folder / name) as f:
            f.write(text)
    return ["report.html", "report.md", *(figure.name for figure in figures)]


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _html_sources(numbers: Iterable[int]) -> str:
    return "".join(f' <sup><a href="#source-{n}">[{n}]</a></sup>' for n in numbers)


def _html_lines(kind: str, lines: Iterable[str]) -> list[str]:
    role = ' role="note"' if kind == "warning" else ""
    return [f'<p class="{kind}"{role}>{_escaped(line)}</p>' for line in lines]


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The page in one file: style inside, pictures as data, readable on a phone, light and dark."""
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_escaped(title)}</h1>",
    ]
    for section in sections:
        lines += [f"<section>\n<h2>{_escaped(section.title)}</h2>", *_html_lines("note", section.notes)]
        for table in section.tables:
            lines += _html_table(table)
        lines += [*map(_html_figure, section.figures), "</section>"]
    return "\n".join([*lines, "</body>\n</html>\n"])


def _html_table(table: Table) -> list[str]:
    # One that is wider than the screen is scrolled by itself, with the keyboard too.
    lines = [
        *_html_lines("warning", table.warnings),
        f'<div class="wide" tabindex="0">\n<table>\n<caption>{_escaped(table.title)}'
        f"{_html_sources(table.sources)}</caption>",
    ]
    heads = "".join(f'<th scope="col">{_escaped(header)}</th>' for header in (table.first, *table.columns))
    lines.append(f"<thead><tr>{heads}</tr></thead>\n<tbody>")
    for name, cells in table.lines():
        place = f' id="source-{name[1:-1]}"' if name.startswith("[") and not table.sources else ""
        lines.append(f'<tr{place}><th scope="row">{_escaped(name)}</th>{"".join(map(_html_cell, cells))}</tr>')
    return [*lines, "</tbody>\n</table>\n</div>", *_html_lines("note", table.notes)]


def _html_cell(cell: Cell) -> str:
    best = ' class="best"' if cell.best else ""
    text = _escaped(cell.text)
    if cell.value is not None:
        text = f'<data value="{cell.value!r}">{text}</data>'
    return f"<td{best}>{text}</td>"


def _html_figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = _escaped(figure.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}{_html_sources(figure.sources)}</figcaption></figure>"
    )


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same in Markdown, pictures by the names of their files."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts += [f"## {_plain(section.title)}", *map(_plain, section.notes)]
        for table in section.tables:
            parts += [f"**{_plain(warning)}**" for warning in table.warnings]
            parts.append(_plain(table.title) + _numbers(table.sources))
            rows = [_line([table.first, *table.columns]), "|" + "---|" * (1 + len(table.columns))]
            rows += [
                _line([name, *(c.text for c in cells)], [False, *(c.best for c in cells)])
                for name, cells in table.lines()
            ]
            parts += ["\n".join(rows), *map(_plain, table.notes)]
        for figure in section.figures:
            caption = _plain(figure.caption)
            parts += [f"![{caption}]({urllib.parse.quote(figure.name)})", caption + _numbers(figure.sources)]
    return "\n\n".join(parts) + "\n"


def _numbers(numbers: Iterable[int]) -> str:
    return "".join(f" \\[{n}\\]" for n in numbers)


def _line(texts: Sequence[str], best: Sequence[bool] = ()) -> str:
    marks = ["**" if b else "" for b in best or [False] * len(texts)]
    return "| " + " | ".join(f"{m}{_plain(t)}{m}" for m, t in zip(marks, texts, strict=True)) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]|#$~" else html.escape(c, quote=False) if c in "<>&" else c for c in text)

"""`duplex-jax evaluate report DIR... --out=OUT`: one page of the measurements of two or more models.

Each DIR is the --out of an evaluation, or a folder of such folders. `report.html` is self-contained; `report.md` has
the same content with its pictures next to it. Models appear in the order of the folders.
"""

from pathlib import Path

from duplex_jax.errors import UserError
from duplex_jax.evaluate.pages import write_page
from duplex_jax.evaluate.plots import NEED, can_draw
from duplex_jax.evaluate.summary import make_page, read_sources
from duplex_jax.files import check_writable, local_path
from launch import app

_OUT = app.path_flag("out", None, "Output folder of the report.")


def main(argv: list[str]) -> None:
    """Reads the reports, merges them, and writes the page."""
    if not argv or not _OUT.value:
        raise UserError("evaluate report needs the folders of evaluations and --out=FOLDER")
    out = Path(_OUT.value)
    sources = read_sources([local_path(folder) for folder in argv])
    title, sections = make_page(sources)
    check_writable(out / "report.html")
    app.claim(out)
    written = write_page(title, sections, out)
    for warning in dict.fromkeys(w for section in sections for table in section.tables for w in table.warnings):
        print(warning)
    print(f"{len(sources)} reports; wrote {', '.join(written)} in {out}")
    if not can_draw():
        print(NEED)


def start() -> None:
    """Entry point."""
    app.run(main)


if __name__ == "__main__":
    start()

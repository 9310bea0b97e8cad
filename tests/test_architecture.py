"""docs/files.md is made of the files' own first lines: `python -m tests.test_architecture` writes it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "files.md"
PACKAGES = ("duplex_jax", "data_gen", "configs", "launch", "benchmarks")


def page() -> str:
    """The page: of each file its first line, up to the end of the sentence or to its colon."""
    lines = [
        "# What each file is for",
        "",
        "Made from the first lines of the files by `python -m tests.test_architecture`.",
    ]
    for package in PACKAGES:
        folder = None
        for file in sorted((ROOT / package).rglob("*.py"), key=lambda f: (f.parent, f.name != "__init__.py", f.name)):
            said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            if not said:
                continue
            first = " ".join(said.split("\n\n")[0].split())
            where = file.parent.relative_to(ROOT)
            if file.name == "__init__.py":
                folder = where
                lines += ["", f"## `{where}/`", "", first, ""]
                continue
            if where != folder:
                folder = where
                lines += ["", f"## `{where}/`", ""]
            lines.append(f"- `{file.name}`: {first}")
    return "\n".join(lines) + "\n"


def test_every_file_says_what_it_is_for():
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert ast.get_docstring(ast.parse(text)) or not text.strip(), f"{file.relative_to(ROOT)}: no docstring"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.test_architecture"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

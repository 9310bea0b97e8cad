"""The import direction of the house, read off the source: nothing reaches up, and nothing imports launch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("duplex_jax", "data_gen", "configs", "launch")

# Lower floors first; a file may import its own floor and those below it.
FLOORS = (
    {
        "duplex_jax.errors",
        "duplex_jax.files",
        "duplex_jax.processes",
        "duplex_jax.records",
        "duplex_jax.schema",
        "duplex_jax.sources",
    },
    {
        "duplex_jax.tokenizer",
        "duplex_jax.gguf_vocabulary",
        "duplex_jax.chat",
        "duplex_jax.timeline",
        "duplex_jax.conversations",
        "duplex_jax.template",
        "duplex_jax.slicing",
        "duplex_jax.llm",
    },
    {"duplex_jax.native"},
    {"duplex_jax.model"},
    {"duplex_jax.parallel", "duplex_jax.checkpoint"},
    {"duplex_jax.data", "duplex_jax.decode"},
    {"duplex_jax.train", "duplex_jax.evaluate", "duplex_jax.serve"},
    {"configs"},
    {"launch"},
)
# Rooms of one floor that do not see each other.
APART = (("duplex_jax.data", "duplex_jax.decode"),)
# data_gen stands beside the house: it makes timelines, and knows no model.
DATA_GEN_MAY = FLOORS[0] | FLOORS[1] | {"data_gen"}


def room(module: str) -> str:
    """`duplex_jax.model` of `duplex_jax.model.rope`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "duplex_jax" else parts[0]


def floor(name: str) -> int | None:
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Our own modules that a file imports anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import; write the full name"
            module = node.module or ""
            names = [module]
            if module == "duplex_jax":  # `from duplex_jax import model` imports a room, not the package
                rooms = {name_of(p) for p in FILES}
                names = [f"{module}.{a.name}" if f"{module}.{a.name}" in rooms else module for a in node.names]
        else:
            continue
        yield from ((node.lineno, n) for n in names if n.split(".")[0] in PACKAGES)


FILES = sorted(p for package in PACKAGES for p in (REPOSITORY / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def violation(importer: str, imported: str) -> str | None:
    """Why one module may not import another, or None."""
    here, there = room(importer), room(imported)
    if here == there or there == "duplex_jax":
        return None
    if there == "launch":
        return "nothing imports launch"
    if here == "data_gen":
        return None if there in DATA_GEN_MAY else "data_gen knows timelines, templates and tokenizers only"
    if there == "data_gen":
        return None if here == "launch" else "only launch uses data_gen"
    if floor(there) is None:
        return f"{there} stands on no floor; say in this test where it belongs"
    if any({here, there} == set(pair) for pair in APART):
        return f"{here} and {there} do not see each other"
    return None if floor(there) <= (floor(here) or 0) else f"{there} is above {here}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path):
    module = name_of(path)
    assert module in PACKAGES or room(module) == "data_gen" or floor(room(module)) is not None, (
        f"{path}: stands on no floor; say in this test where it belongs"
    )
    for line, imported in imports(path):
        reason = violation(module, imported)
        assert reason is None, f"{path}:{line}: imports {imported}: {reason}"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("duplex_jax.decode.engine", "duplex_jax.model.minicpm", True),
        ("duplex_jax.model.minicpm", "duplex_jax.decode.engine", False),
        ("duplex_jax.tokenizer", "duplex_jax.sources", True),
        ("duplex_jax.sources", "duplex_jax.tokenizer", False),
        ("duplex_jax.template", "duplex_jax.model", False),
        ("duplex_jax.decode.step", "duplex_jax.data.rows", False),
        ("duplex_jax.train.loop", "launch.app", False),
        ("data_gen.pipeline", "duplex_jax.timeline", True),
        ("data_gen.pipeline", "duplex_jax.model.config", False),
        ("data_gen.pipeline", "duplex_jax.checkpoint.registry", False),
        ("launch.generate", "data_gen.pipeline", True),
        ("duplex_jax.train.loop", "data_gen.pipeline", False),
        ("data_gen.batch", "duplex_jax.llm.client", True),
        ("duplex_jax.evaluate.judge.judging", "duplex_jax.llm.client", True),
        ("duplex_jax.serve.live", "duplex_jax.llm.client", True),
        ("duplex_jax.llm.client", "data_gen.rewriter", False),
        ("duplex_jax.llm.client", "duplex_jax.decode.engine", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool):
    assert (violation(importer, imported) is None) == allowed


def test_every_file_says_what_it_is_for():
    for path in FILES:
        if path.read_text(encoding="utf-8").strip():
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path}: no first line"

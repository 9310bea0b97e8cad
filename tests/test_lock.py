"""requirements.lock: all that the package and its tests need, each with hashes, and from no particular index."""

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def canonical(requirement: str) -> str:
    """The name of a requirement, as indexes spell it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_the_lock_holds_every_dependency_with_hashes():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted, todo = set(), [*project["dependencies"], *extras["dev"]]
    while todo:
        requirement = todo.pop()
        if canonical(requirement) == "duplex-jax":
            todo += [r for extra in re.findall(r"[a-z0-9_]+", requirement.partition("[")[2]) for r in extras[extra]]
        else:
            wanted.add(canonical(requirement))
    text = (REPOSITORY / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert not [
        e for e in entries if not re.fullmatch(r"\S+==\S+( ; [^\n]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", e)
    ]
    assert wanted <= {canonical(e) for e in entries}
    assert "://" not in text

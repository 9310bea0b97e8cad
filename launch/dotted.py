"""Dotted flags such as `--config.a.b=value`, which absl does not support."""

from launch import app


def take_dotted(argv: list[str], prefix: str = "config") -> tuple[list[str], list[tuple[str, str]]]:
    """Splits off the arguments of the form `--config.a.b=value` (or `--config.a.b value`)."""
    rest, dotted = [], []
    words = iter(argv)
    for word in words:
        name = word.lstrip("-")
        if not word.startswith("-") or not name.startswith(prefix + "."):
            rest.append(word)
            continue
        name, equals, value = name.removeprefix(prefix + ".").partition("=")
        if not equals:
            value = next(words, None)  # type: ignore[assignment]
            if value is None or value.startswith("--"):
                app.fail(f"--{prefix}.{name}: needs a value, as in --{prefix}.{name}=VALUE")
        dotted.append((name, value))
    return rest, dotted

"""`duplex-jax evaluate harness`: EleutherAI's lm-evaluation-harness with our models, under its own flags.

duplex-jax evaluate harness --model_args=model=M,way=plain --tasks=arc_easy,gsm8k --output_path=OUT
"""

import importlib.util
import sys
from pathlib import Path

from duplex_jax.errors import UserError
from launch import app

COMMANDS = ("run", "ls", "validate")


def start() -> None:
    """Registers the model and passes the arguments to the harness, with `--model duplex_jax` if none is named."""
    if importlib.util.find_spec("lm_eval") is None:
        app.fail("evaluate harness runs EleutherAI's lm-evaluation-harness: pip install 'duplex-jax[harness]'")
    given = sys.argv[1:]
    if given[:1] not in ([c] for c in COMMANDS) and given not in (["--help"], ["-h"]):
        given = ["run", *given]
    if given[0] == "run" and not any(a == "--model" or a.startswith("--model=") for a in given):
        given = ["run", "--model", "duplex_jax", *given[1:]]
    if given[0] in COMMANDS and not any(a.startswith("--include_path") for a in given):
        given += ["--include_path", str(Path(__file__).parents[1] / "duplex_jax" / "evaluate" / "tasks")]
    sys.argv = ["duplex-jax evaluate harness", *given]
    try:
        from lm_eval.__main__ import cli_evaluate

        import duplex_jax.evaluate.harness  # noqa: F401 - registers the model

        app.use_compilation_cache()
        cli_evaluate()
    except UserError as e:
        app.fail(e)
    except ValueError as e:
        if not str(e).startswith("Tasks not found"):  # the harness's message for an unknown name
            raise
        app.fail(f"{e}; duplex-jax evaluate harness ls tasks lists all")
    except KeyboardInterrupt:
        app.fail("interrupted", app.EXIT_INTERRUPTED)


if __name__ == "__main__":
    start()

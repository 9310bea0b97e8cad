"""`duplex-jax evaluate PART --flags`: behaviour, benchmarks, judged dialogue, the user study, and a report of them."""

import difflib
import importlib
import importlib.util
import sys

from launch import app

PARTS = {
    "behaviour": "when it speaks and when it is silent, on held-out timelines",
    "yardsticks": "turn-taking on FLEXI's and TurnSense's sentences, as written and bare",
    "benchmark": "standard benchmarks, by likelihood or generation",
    "fetch": "the benchmarks' files, from the Hugging Face hub",
    "harness": "any task of EleutherAI's lm-evaluation-harness",
    "judge": "MT-Bench and MT-Eval, judged by a model",
    "study": "two anonymous models in the demo, a questionnaire, and its statistics",
    "report": "one page of what the others have measured",
}


def start() -> None:
    """Runs the part named by the first argument with the rest; without one lists the parts."""
    parts = {part: text for part, text in PARTS.items() if importlib.util.find_spec(f"launch.evaluate_{part}")}
    given = sys.argv[1:]
    if not given or given[0] in ("--help", "-h", "help"):
        print("usage: duplex-jax evaluate PART [--flags]\n")
        for part, text in parts.items():
            print(f"  {part:11}{text}")
        print("\nduplex-jax evaluate PART --help lists a part's flags.")
        raise SystemExit(0)
    part = given[0]
    if part.startswith("-"):
        app.fail(f"{part} comes behind the part: duplex-jax evaluate {'|'.join(parts)} --flags")
    if part not in parts:
        near = difflib.get_close_matches(part, parts, 1)
        app.fail(f"evaluate has no part {part!r}; " + (f"did you mean {near[0]!r}?" if near else
                                                      f"the parts are {', '.join(parts)}"))  # fmt: skip
    sys.argv = [f"duplex-jax evaluate {part}", *given[1:]]
    importlib.import_module(f"launch.evaluate_{part}").start()


if __name__ == "__main__":
    start()

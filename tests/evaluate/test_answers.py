"""Answers of programs, compared outside of their process: as Python compares them, and not as a program says."""

import pytest

from duplex_jax.evaluate.sandbox import run_program, with_tests
from tests.evaluate.conftest import held

TESTS = """
def check(f):
    assert f(2) == [3, 'b', (1.5, None)]
    assert f(3) == [4, 'b', (1.5, None)]

check(f)
"""
ANSWER = "return [x + 1, 'b', (1.5, None)]"
LIAR = """
class Liar{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __hash__(self): return 0
"""
FORGED = {
    "equal to all": LIAR.format(base="") + "def f(x): return Liar()",
    "a list equal to all": LIAR.format(base="(list)") + "def f(x): return Liar([0])",
    "a list that shows another": LIAR.format(base="(list)")
    + "    def __repr__(self): return \"[3, 'b', (1.5, None)]\"\n"
    "    def __iter__(self): return iter([3, 'b', (1.5, None)])\ndef f(x): return Liar([0])",
    "an int equal to all": LIAR.format(base="(int)") + "def f(x): return [Liar(7), 'b', (1.5, None)]",
    "a float equal to all": LIAR.format(base="(float)") + "def f(x): return [x + 1, 'b', (Liar(7), None)]",
    "a str equal to all": LIAR.format(base="(str)") + "def f(x): return [x + 1, Liar('c'), (1.5, None)]",
    "a tuple equal to all": LIAR.format(base="(tuple)") + "def f(x): return [x + 1, 'b', Liar((7,))]",
    "a class of its own": LIAR.format(base="") + "    __class__ = list\ndef f(x): return Liar()",
    "None's place": LIAR.format(base="") + "def f(x): return [x + 1, 'b', (1.5, Liar())]",
    "an error passed over by tracing": "import sys\ndef f(x): return 0\ndef trace(frame, event, arg):\n"
    "    if frame.f_code.co_name == 'check':\n        try: frame.f_lineno = frame.f_code.co_firstlineno + 2\n"
    "        except ValueError: pass\n    return trace\nsys.settrace(trace)",
    "the caller's variables": "import sys\ndef f(x):\n    frame = sys._getframe(1)\n"
    "    return [v for v in frame.f_code.co_consts if v is not None] + list(frame.f_locals.values())",
    "constants of the tests": "import sys\ndef f(x):\n    found = [c for c in sys._getframe(1).f_code.co_consts "
    "if isinstance(c, (list, tuple))]\n    return found[0] if found else None",
    "another check": "def f(x): pass\nimport builtins\nbuild = builtins.__build_class__\n"
    "import sys\nsys.modules['__main__'].__dict__['check'] = lambda f: None\nglobals()['__answer__'] = lambda *a: None",
    "answers that are given twice": "import os\ndef f(x):\n    os.write(3, b'0 0\\n1 0\\n')\n    return 0",
    "assertions that do not count": "import ast, builtins\nbuiltins.AssertionError = type('No', (Exception,), {})\n"
    "def f(x): return None",
    "the token, found in memory": "import gc, os\ndef f(x): return 0\n"
    "def walk(o, seen):\n    if id(o) in seen or len(seen) > 200000: return\n    seen.add(id(o))\n"
    "    if isinstance(o, bytes) and len(o) == 32: os.write(3, o); os._exit(0)\n"
    "    for r in gc.get_referents(o): walk(r, seen)\n"
    "import sys\nsys.setrecursionlimit(10000)\n[walk(o, set()) for o in gc.get_objects() if callable(o)]",
    "expectations, found in memory": "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
    "        if type(o) is list and len(o) == 3 and o[1:2] == ['b']: return o\n    return 0",
}


@held
@pytest.mark.parametrize("kind", FORGED)
def test_forged_answers_do_not_pass(kind: str):
    outcome = run_program(with_tests(FORGED[kind], TESTS), seconds=5, wall_seconds=30)
    assert not outcome.passed, outcome


@held
@pytest.mark.parametrize(
    ("code", "tests", "passes"),
    [
        (f"def f(x): {ANSWER}", TESTS, True),
        ("def f(x): return [3, 'b', (1.5, None)]", TESTS, False),
        ("def f(x): return x", "assert f(1) == 1.0\nassert f(True) == 1\nassert f(1e999) == 1e999", True),
        ("def f(x): return x", "assert f((1,)) == [1]", False),
        ("def f(x): return x", "assert f(float('nan')) == 0.5", False),
        ("import collections\ndef f(x): return collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", True),
        (
            "import collections\nP = collections.namedtuple('P', 'x')\ndef f(x): return P(x)",
            "assert f(1) == (1,)",
            True,
        ),
        ("def f(x): return {x: 1}.keys()", "assert f(1) == {1}", True),
        ("def f(x): return frozenset()", "assert f(1) == set()", True),
        ("import decimal\ndef f(x): return decimal.Decimal(x)", "assert f('1.5') == 1.5", True),
        ("def f(x): return x", "assert f(b'\\n') == b'\\n'\nassert f('\\ud83d') == 'a'", False),
        ("def f(x): return x", "assert abs(f(1.5) - 1.5) < 1e-6\nassert f(1) == 1", True),
        ("def f(x): return x", "for i in range(3):\n    assert f(i) == 1", False),
        ("def f(x): return print", "assert f(1) == 1", False),
        ("def f(x):\n  x = []\n  x.append(x)\n  return x", "assert f(1) == [1]", False),
        ("def f(x): return 'a' * (2 << 20)", "assert f(1) == 'a'", False),
        ("def f(x): return x", "assert f(", False),
    ],
)
def test_answers_are_compared_as_python_does(code: str, tests: str, passes: bool):
    assert run_program(with_tests(code, tests), wall_seconds=20).passed == passes

"""The unit tests of a data set as one program for the sandbox: plain asserts, or functions and classes in the form of pytest.

The program takes from solution.py what the tests do not define, says which values a failing assert saw, and calls each test. It
needs no pytest, unless the tests import it; tests with fixtures or parameters are refused.
"""

import ast
import builtins
import importlib.util
import sys
from functools import lru_cache

from t2g import sandbox

TIMEOUT_S, MEMORY_MB = 10, 1024
HEAD = """
__name__ = "test_solution"  # not "__main__", for then tests would start pytest

def _shown(value):
    try:
        text = repr(value)
    except Exception:
        text = object.__repr__(value)
    return text if len(text) <= 200 else text[:100] + " ... " + text[-100:]
"""
CALLS = """
for _name, _test in list(globals().items()):
    if getattr(_test, "__module__", None) != "test_solution":
        continue
    if isinstance(_test, type) and _name.startswith("Test"):
        for _method in dir(_test):
            if _method.startswith("test") and hasattr(_test, "debug"):  # a unittest.TestCase
                _test(_method).debug()
            elif _method.startswith("test"):
                _case = _test()
                if hasattr(_case, "setup_method"):
                    _case.setup_method(*[_method] * (_test.setup_method.__code__.co_argcount - 1))
                getattr(_case, _method)()
    elif _name.startswith("test"):
        _test()
"""
SETUPS = ("setup_class", "setup_module", "setup_function", "setUpClass", "setUpModule")
IMPORTS = ast.Import | ast.ImportFrom


@lru_cache(maxsize=512)  # critique, kinds, score and log of a response ask for the same run
def run(tests: str, code: str) -> sandbox.Result:
    """How the tests end with this code as solution.py."""
    return sandbox.run(as_program(tests), TIMEOUT_S, MEMORY_MB, {"solution.py": code})


def obstacle(tests: str) -> str:
    """Why tests cannot be run here, "" if they can."""
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except (SyntaxError, ValueError):
        return "their tests are no Python"
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("test", *SETUPS)):
            asked = [arg.arg for arg in node.args.args if arg.arg != "self"]
            if len(asked) > len(node.args.defaults) or node.decorator_list or node.name in SETUPS:
                return "their tests need fixtures or parameters of pytest"
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    for name in (module.partition(".")[0] for module in modules):
        if name not in ("solution", "__main__") and not importlib.util.find_spec(name):
            return f"their tests need the package {name}"
    return ""


@lru_cache(maxsize=512)
def as_program(tests: str) -> str:
    """Raises: SyntaxError or ValueError for tests that are no Python.

    >>> "from solution import f" in as_program("assert f(2) == 4")
    True
    """
    tree = Telling().visit(ast.parse(tests))
    nodes = list(ast.walk(tree))
    known = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)}
    known |= {alias.asname or alias.name.partition(".")[0] for node in nodes if isinstance(node, IMPORTS) for alias in node.names}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)} | {*dir(builtins), "_shown"}
    missing = sorted({node.id for node in nodes if isinstance(node, ast.Name)} - known) if "*" not in known else []
    imports = [f"import {name}" if name in sys.stdlib_module_names else f"from solution import {name}" for name in missing]
    futures = sum(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    tree.body[futures:futures] = ast.parse(HEAD + "\n".join(imports)).body
    return ast.unparse(ast.fix_missing_locations(tree)) + CALLS


class Telling(ast.NodeTransformer):
    """assert f(2) == 4  ->  the same assert, with the message "f(2) is 5, not 4". And no name comes in unseen."""

    def visit_ImportFrom(self, node):
        return None if node.module == "solution" and node.names[0].name == "*" else node

    def visit_Assert(self, node):
        sides = [node.test]
        if isinstance(node.test, ast.Compare) and len(node.test.ops) == 1:
            sides = [node.test.left, *node.test.comparators]
        named = [ast.NamedExpr(ast.Name(name, ast.Store()), side) for name, side in zip(("_left", "_right"), sides)]
        said = f"{cut(ast.unparse(sides[0])) + ' is '!r} + _shown(_left)"
        if len(sides) == 2:
            equal = isinstance(node.test.ops[0], ast.Eq)
            said += " + ', not ' + _shown(_right)" if equal else f" + {', against ' + cut(ast.unparse(node.test))!r}"
        test = ast.Compare(named[0], node.test.ops, named[1:]) if len(sides) == 2 else named[0]
        return ast.Assert(test, ast.parse(said, mode="eval").body)


def cut(text: str, length=200) -> str:
    """A text without its middle, if it is longer than that."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def parsed(text: str) -> ast.Module:
    """Its syntax tree, an empty one if it is no Python."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])

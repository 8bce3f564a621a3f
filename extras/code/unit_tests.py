"""The unit tests of a data set as one program for the sandbox: plain asserts, or functions and classes in the form of pytest.

The program takes from solution.py what the tests do not define, says which values a failing assert saw, and calls each test. It
needs no pytest, unless the tests import it. Refused are tests with fixtures or parameters, async ones, and a text without any.
"""

import ast
import builtins
import importlib.util
import sys
from functools import lru_cache

from extras.code import sandbox

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
for _test, _code in [{functions}]:
    if _test.__code__ is not _code:
        raise RuntimeError("it changed " + _code.co_name)
    _test()
"""  # the list is where no program can reach it
SETUPS = ("setup_class", "setup_module", "setup_function", "setUpClass", "setUpModule")
IMPORTS = ast.Import | ast.ImportFrom
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = FUNCTIONS | ast.ClassDef | ast.Lambda


@lru_cache(maxsize=512)  # critique, kinds, score and log of a response ask for the same run
def run(tests: str, code: str) -> sandbox.Result:
    """How the tests end with this code as solution.py."""
    return sandbox.run(as_program(tests), TIMEOUT_S, MEMORY_MB, {"solution.py": code})


def obstacle(tests: str) -> str:
    """Why tests cannot be run here, "" if they can."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError):
        return "their tests are no Python"
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, FUNCTIONS) and node.name.startswith(("test", *SETUPS)):
            asked = [arg.arg for arg in node.args.args if arg.arg != "self"]
            if len(asked) > len(node.args.defaults) or node.decorator_list or node.name in SETUPS:
                return "their tests need fixtures or parameters of pytest"
            if isinstance(node, ast.AsyncFunctionDef) or any(
                isinstance(part, ast.Yield | ast.YieldFrom) for part in reached(node.body)
            ):
                return "their tests are async or generators, whose calls run nothing"
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    for name in (module.partition(".")[0] for module in modules):
        if name not in ("solution", "__main__") and not importlib.util.find_spec(name):
            return f"their tests need the package {name}"
    return "" if calls(tree) or checks(tree) else "they hold no test"


def uses(tests: str, solution: str) -> bool:
    """Whether tests use a name of the solution, one that they do not define again: else every program passes them.

    >>> uses("def f(x): return x\\nassert f(2) == 2", "def f(x): return x")
    False
    """
    tree = parsed(tests)
    nodes = list(ast.walk(tree))
    imports = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "solution"
    ]
    theirs = {alias.asname or alias.name for node in imports for alias in node.names} | names(
        parsed(solution)
    )
    read = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    whole = any(
        alias.name == "solution"
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
    )
    return whole or bool(theirs & read - names(tree))


def names(tree: ast.Module) -> set[str]:
    """What a file defines at its top: functions, classes, variables."""
    nodes = list(reached(tree.body))
    defined = {node.name for node in nodes if isinstance(node, FUNCTIONS | ast.ClassDef)}
    return defined | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def reached(nodes):
    """What runs of these nodes when the tests are imported: not what is in functions, nor under if __name__ == "__main__"."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            yield from reached(node.orelse)
        elif not isinstance(node, SCOPES):
            yield from reached(ast.iter_child_nodes(node))


def checks(tree) -> bool:
    """Whether tests check something without being called: by an assert, or by calling a function of theirs or one named so."""
    own = {node.name for node in tree.body if isinstance(node, FUNCTIONS)}
    called = [
        getattr(node.func, "id", getattr(node.func, "attr", ""))
        for node in reached(tree.body)
        if isinstance(node, ast.Call)
    ]
    asserts = any(isinstance(node, ast.Assert | ast.Raise) for node in reached(tree.body))
    return asserts or any(name in own or name.startswith(("assert", "raises")) for name in called)


def calls(tree) -> str:
    """The lines that call each test function and each test method; "" if there is none."""
    found = {
        node.name: node
        for node in reached(tree.body)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    imports = [
        alias for node in ast.walk(tree) if isinstance(node, IMPORTS) for alias in node.names
    ]
    imported = {alias.asname: alias.name for alias in imports if alias.asname}
    functions = [
        name
        for name, node in found.items()
        if isinstance(node, ast.FunctionDef) and name.startswith("test")
    ]
    lines = (
        [CALLS.format(functions=", ".join(f"({name}, {name}.__code__)" for name in functions))]
        if functions
        else []
    )
    for name in (name for name, node in found.items() if isinstance(node, ast.ClassDef)):
        bases, methods = lineage(name, dict(found))
        tests = [method for method in methods if method.startswith("test")]
        if any(imported.get(base, base).endswith("TestCase") for base in bases):
            lines += [f"{name}({test!r}).debug()" for test in tests]
        elif name.startswith("Test"):
            setup = methods.get("setup_method")
            for test in tests:
                asked = repr(test) if setup and len(setup.args.args) > 1 else ""
                lines += [
                    f"_case = {name}()",
                    *([f"_case.setup_method({asked})"] if setup else []),
                    f"_case.{test}()",
                ]
    return "\n".join(lines)


def lineage(name, found) -> tuple[set[str], dict]:
    """The bases that a class takes from elsewhere, as they are written, and its methods with those that it inherits."""
    bases, methods = {name} - set(found), {}
    if isinstance(node := found.pop(name, None), ast.ClassDef):
        for base in map(ast.unparse, node.bases):
            theirs = lineage(base, dict(found))
            bases, methods = bases | theirs[0], theirs[1] | methods
        methods |= {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    return bases, methods


@lru_cache(maxsize=512)
def as_program(tests: str) -> str:
    """Raises: SyntaxError or ValueError for tests that are no Python.

    >>> "from solution import f" in as_program("assert f(2) == 4")
    True
    """
    tree = ast.parse(tests)
    called = calls(tree) or ("" if checks(tree) else "raise RuntimeError('no test was run')")
    tree = Telling().visit(tree)
    nodes = list(ast.walk(tree))
    known = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    known |= {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)
    }
    known |= {
        alias.asname or alias.name.partition(".")[0]
        for node in nodes
        if isinstance(node, IMPORTS)
        for alias in node.names
    }
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)} | {*dir(builtins), "_shown"}
    missing = (
        sorted({node.id for node in nodes if isinstance(node, ast.Name)} - known)
        if "*" not in known
        else []
    )
    imports = [
        f"import {name}" if name in sys.stdlib_module_names else f"from solution import {name}"
        for name in missing
    ]
    futures = sum(
        isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body
    )
    tree.body[futures:futures] = ast.parse(HEAD + "\n".join(imports)).body
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n" + called


class Telling(ast.NodeTransformer):
    """assert f(2) == 4  ->  the same assert, with the message "f(2) is 5, not 4". And no name comes in unseen."""

    def visit_ImportFrom(self, node):
        return None if node.module == "solution" and node.names[0].name == "*" else node

    def visit_Assert(self, node):
        sides = [node.test]
        if isinstance(node.test, ast.Compare) and len(node.test.ops) == 1:
            sides = [node.test.left, *node.test.comparators]
        named = [
            ast.NamedExpr(ast.Name(name, ast.Store()), side)
            for name, side in zip(("_left", "_right"), sides)
        ]
        said = f"{cut(ast.unparse(sides[0])) + ' is '!r} + _shown(_left)"
        if len(sides) == 2:
            equal = isinstance(node.test.ops[0], ast.Eq)
            said += (
                " + ', not ' + _shown(_right)"
                if equal
                else f" + {', against ' + cut(ast.unparse(node.test))!r}"
            )
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

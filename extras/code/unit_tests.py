"""Turns the unit tests of a data set into one program for the sandbox.

The tests are plain asserts, test functions as pytest knows them, or classes of test methods. The
program imports from solution.py what the tests do not define, shows the values that a failing
assert saw, and calls each test. It needs no pytest unless the tests import it. Left out: tests with
fixtures or parameters, test classes that inherit from one another, and async tests.
"""

import ast
import builtins
import importlib.util
import sys
from functools import lru_cache

from extras.code import sandbox
from extras.code.witness import DEFINITIONS, FUNCTIONS, aliases, defined, imported, parsed

TIMEOUT_S, MEMORY_MB = 10, 1024
SCOPES = DEFINITIONS | ast.Lambda
YIELDS = ast.Yield | ast.YieldFrom
HEAD = """
__name__ = "test_solution"  # not "__main__", because tests would then start pytest

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
"""  # the list is on the stack of this loop, so the tested program cannot change it
FIXTURES = "setup_class setup_method setup_module setup_function setUpClass setUpModule".split()
TEST_CASE = {"TestCase", "unittest.TestCase"}


@lru_cache(maxsize=512)  # critique, kinds, score and log of a response need the same run
def run(tests: str, code: str) -> sandbox.Result:
    """Runs the tests with this code as solution.py."""
    return sandbox.run(as_program(tests), TIMEOUT_S, MEMORY_MB, {"solution.py": code})


def obstacle(tests: str, solution=None) -> str:
    """Returns why these tests cannot judge programs here, "" if they can."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError):
        return "their tests are not Python"
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            bases = set(map(ast.unparse, node.bases)) - TEST_CASE
            if bases and "test" in ast.unparse(node).lower():
                return "their test classes inherit from other classes than TestCase"
        elif isinstance(node, FUNCTIONS) and node.name.startswith(("test", *FIXTURES)):
            needed = [arg.arg for arg in node.args.args if arg.arg != "self"]
            given = len(node.args.defaults)
            if len(needed) > given or node.decorator_list or node.name in FIXTURES:
                return "their tests need fixtures or parameters of pytest"
            yields = [part for part in reached(node.body) if isinstance(part, YIELDS)]
            if isinstance(node, ast.AsyncFunctionDef) or yields:
                return "their tests are async or generators, whose calls run nothing"
    for name in sorted(module.partition(".")[0] for module in imported(nodes)):
        if name not in ("solution", "__main__") and not importlib.util.find_spec(name):
            return f"their tests need the package {name}"
    if not (calls(tree) or checks(tree)):
        return "they hold no test"
    return "" if uses_solution(tests, solution) else "they test nothing of the solution"


def uses_solution(tests: str, solution=None) -> bool:
    """Returns True if tests read a name of the solution that they do not define again.

    >>> uses_solution("def f(x): return x\\nassert f(2) == 2")
    False
    """
    tree = tree_of(tests)
    nodes = list(ast.walk(tree))
    if "solution" in {a.name for a in aliases(n for n in nodes if isinstance(n, ast.Import))}:
        return True
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = aliases(node for node in imports if node.module == "solution")
    names = {alias.asname or alias.name: alias.name for alias in names}
    own, theirs = (defined(list(reached(code.body))) for code in (tree, parsed(solution or "")))
    read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    used = [names[name] for name in read & names.keys() - own]
    return bool(used if solution is None else theirs.intersection(used))


def reached(nodes):
    """Yields what runs of these nodes on import: no function bodies, no __main__ block."""
    nodes = list(nodes)
    while nodes:  # no recursion, for programs may be nested as deep as their sampling is long
        node = nodes.pop(0)
        yield node
        names = ast.walk(node.test) if isinstance(node, ast.If) else ()
        if any(getattr(name, "id", "") == "__name__" for name in names):
            nodes[:0] = node.orelse
        elif not isinstance(node, SCOPES):
            nodes[:0] = ast.iter_child_nodes(node)


def checks(tree) -> bool:
    """Returns True if importing the tests asserts, raises or calls a function of theirs."""
    nodes = list(reached(tree.body))
    if any(isinstance(node, ast.Assert | ast.Raise) for node in nodes):
        return True
    own = {node.name for node in tree.body if isinstance(node, FUNCTIONS)}
    called = [called_name(node) for node in nodes if isinstance(node, ast.Call)]
    return any(name in own or name.startswith(("assert", "raises")) for name in called)


def called_name(call: ast.Call) -> str:
    """Returns f of f(x) and of a.f(x), "" of anything else."""
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def calls(tree) -> str:
    """Returns the lines that call each test function and each test method, "" without any."""
    definitions = [node for node in reached(tree.body) if isinstance(node, DEFINITIONS)]
    functions, lines = [], []
    for name, node in {node.name: node for node in definitions}.items():
        if isinstance(node, FUNCTIONS):
            functions += [f"({name}, {name}.__code__)"] if name.startswith("test") else []
            continue
        is_case = TEST_CASE & set(map(ast.unparse, node.bases))
        call = "{}({!r}).debug()" if is_case else "{}().{}()"
        if is_case or name.startswith("Test"):
            methods = [part.name for part in node.body if isinstance(part, FUNCTIONS)]
            lines += [call.format(name, test) for test in methods if test.startswith("test")]
    first = [CALLS.format(functions=", ".join(functions))] if functions else []
    return "\n".join(first + lines)


@lru_cache(maxsize=512)
def as_program(tests: str) -> str:
    """Returns the program for the sandbox. Raises SyntaxError or ValueError for other text.

    >>> "from solution import f" in as_program("assert f(2) == 4")
    True
    """
    tree = ast.parse(tests)
    called = calls(tree) or ("" if checks(tree) else "raise RuntimeError('no test was run')")
    tree = ShowValues().visit(tree)
    nodes = list(ast.walk(tree))
    known = defined(nodes) | {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler)}
    known |= {alias.asname or alias.name.partition(".")[0] for alias in aliases(nodes)}
    missing = {node.id for node in nodes if isinstance(node, ast.Name)}
    missing = set() if "*" in known else missing - known - {*dir(builtins), "_shown"}
    head = HEAD
    for name in sorted(missing):
        source = "import" if name in sys.stdlib_module_names else "from solution import"
        head += f"{source} {name}\n"
    modules = [getattr(node, "module", "") for node in tree.body]
    futures = modules.count("__future__")  # they must stay first
    tree.body[futures:futures] = ast.parse(head).body
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n" + called


@lru_cache(maxsize=512)
def tree_of(tests: str) -> ast.Module:
    """Returns the tree of as_program(tests), whose lines are those of a traceback."""
    return ast.parse(as_program(tests))


class ShowValues(ast.NodeTransformer):
    """Gives assert f(2) == 4 the message "f(2) is 5, not 4"; drops imports of all of solution."""

    def visit_ImportFrom(self, node):
        everything = node.module == "solution" and node.names[0].name == "*"
        return ast.Pass() if everything else node  # not None, because a block must not be empty

    def visit_Assert(self, node):
        compared = isinstance(node.test, ast.Compare) and len(node.test.ops) == 1
        left = node.test.left if compared else node.test
        message = f"{cut(ast.unparse(left)) + ' is '!r} + _shown(_left)"
        test = ast.NamedExpr(ast.Name("_left", ast.Store()), left)
        if compared:
            if isinstance(node.test.ops[0], ast.Eq):
                message += " + ', not ' + _shown(_right)"
            else:
                message += f" + {', against ' + cut(ast.unparse(node.test))!r}"
            right = ast.NamedExpr(ast.Name("_right", ast.Store()), node.test.comparators[0])
            test = ast.Compare(test, node.test.ops, [right])
        return ast.Assert(test, ast.parse(message, mode="eval").body)


def cut(text: str, length=200) -> str:
    """Shortens a long text in its middle."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"

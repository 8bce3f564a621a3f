"""Runs a program so that it cannot fake having reached its end. See sandbox.py.

A program shares its interpreter with whatever watches it. The token that proves its end is
therefore held where no Python code can reach: in C iterators on the stack of the program's thread.
No Python frame on the stack holds the token. What could find the iterators or jump over
lines (the garbage collector's lists, frames of other threads, tracing) ends the process. What
ctypes can read is not covered.
"""

import _thread
import ast
import builtins
import importlib
import linecache
import os
import sys
import threading  # noqa: F401  it takes the thread that imports it for the main one
import traceback
import types
from itertools import chain

FORBIDDEN = frozenset(
    "gc.get_objects gc.get_referrers gc.get_referents sys._current_frames sys._current_exceptions "
    "sys.settrace sys.setprofile sys.monitoring.register_callback".split()
)
CHANGEABLE = ("print", "input", "_")  # builtins that programs rightly replace
HEAP_TYPE = 512  # the flag of classes made in Python, whose members can be replaced


def start(program, files):
    """Runs the program in a thread that sends the token on file descriptor 3 at the end."""
    token = os.urandom(16)
    os.write(3, token)  # for the guard, which compares
    module = types.ModuleType("__main__")
    module.__file__ = "program.py"
    sys.modules["__main__"] = module

    def attempt(action):
        try:
            action()
        except BaseException as error:
            fail(error, program)
            raise  # the program may have changed fail()

    def run():
        exec(compile(program, module.__file__, "exec"), module.__dict__)

    actions = run, snapshot(program, files, module.__dict__)
    forbid()
    send = map(os.write, (3,), (token,))
    steps = chain(map(attempt, actions), send, map(os._exit, (0,)))
    _thread.start_new_thread(list, (steps,))


def fail(error, program):
    """Sends what stopped the program, and ends the process."""
    try:
        text = f"exit({error.code!r})" if isinstance(error, SystemExit) else str(error)
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
        os.write(3, text[:2000].encode(errors="replace"))
        linecache.cache["program.py"] = (len(program), None, program.splitlines(True), "program.py")
        frames = error.__traceback__.tb_next.tb_next  # without attempt() and run()
        traceback.print_exception(type(error), error, frames)
    finally:
        os._exit(1)


def forbid():
    """Ends the process on any event in FORBIDDEN, with a hook that looks up no changeable name."""

    def watch(event, args, forbidden=FORBIDDEN, write=os.write, stop=os._exit):
        if event in forbidden:
            write(3, b"forbidden: " + event.encode())
            stop(1)

    sys.addaudithook(watch)


def snapshot(program, files, namespace):
    """Returns a function that raises RuntimeError if the program changed what it builds on.

    That is the builtins, and the public names of imported modules with the members of their
    classes: it finds a patched pytest.raises or TestCase.assertEqual, and a builtin that another
    file hides behind a name of its own. sys is left out, because programs rightly change it.
    """
    nodes = list(ast.walk(parsed(program)))
    namespace["__builtins__"] = builtins
    own = defined(nodes) | {alias.asname or alias.name for alias in aliases(nodes)}
    known = [("builtins", namespace, "__builtins__", builtins)]  # label, dict, key, value
    if "*" not in own:
        public = [name for name in dir(builtins) if name not in own and name[0] != "_"]
        known += [(name, namespace, name, None) for name in public]
    skipped = {"sys", "__main__", "__future__", *(name.removesuffix(".py") for name in files)}
    for name in {"builtins"} | imported(nodes):
        if name.partition(".")[0] not in skipped:
            known += members(name)
    error = RuntimeError

    def check_unchanged():  # it calls no function, because any may have been replaced by now
        for label, place, key, value in known:
            if place.get(key) is not value:
                raise error(f"it changed {label}")

    return check_unchanged


def members(name) -> list:
    """Returns (label, dict, key, value) of a module, its public names and its classes' members."""
    try:
        module = importlib.import_module(name)
    except Exception:  # whatever it is, the program meets it, too
        return []
    known = [(name, sys.modules, name, module)]
    for key, value in list(vars(module).items()):
        if key in CHANGEABLE or (key.startswith("_") and module is not builtins):
            continue
        if value is None:  # a module may fill it later, as tempfile does its tempdir
            continue
        label = f"{name}.{key}"
        known.append((label, vars(module), key, value))
        if isinstance(value, type) and value.__flags__ & HEAP_TYPE:
            fields = value.__dict__
            known += [(f"{label}.{field}", fields, field, was) for field, was in fields.items()]
    return known


# ---- names in code, also for unit_tests.py -------------------------------------------------------

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = FUNCTIONS | ast.ClassDef


def parsed(text: str) -> ast.Module:
    """Returns the syntax tree of a text, an empty one if it is not Python."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def defined(nodes) -> set[str]:
    """Returns the functions, classes and variables that nodes define."""
    names = {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    variables = [node for node in nodes if isinstance(node, ast.Name)]
    return names | {node.id for node in variables if isinstance(node.ctx, ast.Store)}


def aliases(nodes) -> list[ast.alias]:
    """Returns what nodes import: names of modules, or names from modules."""
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return [alias for node in imports for alias in node.names]


def imported(nodes) -> set[str]:
    """Returns the modules that nodes import, or import from."""
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for alias in aliases(n for n in nodes if isinstance(n, ast.Import))}

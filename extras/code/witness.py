"""Runs a program so that it cannot fake having come to its end. Part of the sandbox: see t2g/sandbox.py.

A program shares its interpreter with whatever watches it there. So the token that says "it came to its end" is held where no
Python code can reach: in C iterators, on the stack of the thread that runs the program. Below the program there is one frame, of
body(), which knows nothing; and what could reach the iterators or jump over lines (the garbage collector's lists, frames of other
threads, tracing) ends the process. What ctypes can read is not covered.
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
    "gc.get_objects gc.get_referrers gc.get_referents sys._current_frames sys._current_exceptions sys.settrace sys.setprofile "
    "sys.monitoring.register_callback".split()
)


def start(program, files):
    """Runs the program in a thread that ends the process, having sent the token on file descriptor 3 if it got there."""
    token = os.urandom(16)
    os.write(3, token)  # what the guard will compare with
    module = types.ModuleType("__main__")
    module.__file__ = "program.py"
    sys.modules["__main__"] = module
    intact = untouched(program, files, module.__dict__)

    def body(_):
        try:
            exec(compile(program, module.__file__, "exec"), module.__dict__)
        except BaseException as error:
            fail(error, program)
            raise  # the program may have changed fail()

    def check(_):
        try:
            intact()
        except RuntimeError as error:
            fail(error, program)
            raise

    forbid()
    steps = chain(
        map(body, (0,)), map(check, (0,)), map(os.write, (3,), (token,)), map(os._exit, (0,))
    )
    _thread.start_new_thread(list, (steps,))


def fail(error, program):
    """Says what stopped the program and ends the process."""
    try:
        said = f"exit({error.code!r})" if isinstance(error, SystemExit) else str(error)
        os.write(
            3, f"{type(error).__name__}: {said}".removesuffix(": ")[:2000].encode(errors="replace")
        )
        linecache.cache["program.py"] = (len(program), None, program.splitlines(True), "program.py")
        traceback.print_exception(type(error), error, error.__traceback__.tb_next)
    finally:
        os._exit(1)


def forbid():
    """From now on what is FORBIDDEN ends the process, whoever does it. The hook asks nothing that a program could have changed."""

    def watch(event, args, forbidden=FORBIDDEN, write=os.write, stop=os._exit):
        if event in forbidden:
            write(3, b"forbidden: " + event.encode())
            stop(1)

    sys.addaudithook(watch)


def untouched(program, files, namespace):
    """A function that raises RuntimeError if what the program builds on is not what it was: builtins, and what it imports.

    Compared are public names of modules and members of their classes: a patched pytest.raises or TestCase.assertEqual is found,
    and so is a builtin that another file hides behind a name of its own. sys, which programs rightly change, is left out, and so
    are print() and input().
    """
    try:
        nodes = list(ast.walk(ast.parse(program)))
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # the program will fail by itself
        nodes = []
    aliases = [
        alias
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    own = {alias.asname or alias.name for alias in aliases}
    own |= {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    own |= {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    names = {"builtins"} | {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}

    namespace["__builtins__"] = builtins
    known = [
        ("builtins", namespace, "__builtins__", builtins)
    ]  # label, where it lies, under which name, what it was
    known += [
        (name, namespace, name, None)
        for name in dir(builtins)
        if name not in own and name[0] != "_" and "*" not in own
    ]
    for name in names:
        if f"{name.partition('.')[0]}.py" in files or name in ("sys", "__main__", "__future__"):
            continue
        try:
            module = importlib.import_module(name)
        except Exception:  # whatever it is, the program will meet it too
            continue
        known.append((name, sys.modules, name, module))
        for key, value in list(vars(module).items()):
            if (module is builtins or not key.startswith("_")) and key not in (
                "print",
                "input",
                "_",
            ):
                known.append((f"{name}.{key}", vars(module), key, value))
                if (
                    isinstance(value, type) and value.__flags__ & 512
                ):  # made in Python, so it can be changed
                    known += [
                        (f"{name}.{key}.{member}", value.__dict__, member, was)
                        for member, was in vars(value).items()
                    ]
    error = RuntimeError

    def intact():  # it calls nothing, for any function could be another one by now
        for label, place, key, was in known:
            if place.get(key) is not was:
                raise error(f"it changed {label}")

    return intact

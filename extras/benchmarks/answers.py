"""Does a function answer as the data set's own solution does? For HumanEval+ and MBPP+, whose rows have inputs and no asserts.

The program under test never shares a process with what it should answer. It tells its answers, a line of JSON an input, and they
are compared here, as plain values: frames, patched libraries and objects that are equal to everything gain nothing. What is left
to a cheat is to know the answers by heart. An input that is not answered, for whatever reason, is answered wrong.

What is right, by evalplus's rules (Liu et al. 2023, its version 0.3.1): an equal value; for a row with a tolerance, or where a
float or a list of floats is due (then 1e-6), a value of the same type and shape within atol + 1e-7 |expected|; and what ORACLES
say of tasks with several right answers. Objects that are no plain values are compared by their type, and answers of more than
LONGEST characters by a digest. JSON has no tuples, sets or complex numbers: where MBPP+ means them is read off each row's asserts.
"""

import ast
import json
import math
import re
import sys
from typing import NamedTuple

import numpy as np

from extras.code import sandbox

TIMEOUT_S, REFERENCE_TIMEOUT_S, MEMORY_MB = 10, 180, 4096
PATIENCE = 6  # a program may take so many times the seconds of the data set's own solution
LONGEST, ROOM = (
    4000,
    50_000,
)  # characters of one answer, and of all that one run tells: the sandbox keeps 64 KiB
TELL = """
import hashlib, json, sys
sys.set_int_max_str_digits(0)
first, entry_point, longest, room = {settings}
inputs = eval(open("inputs.txt").read(), {{"inf": float("inf"), "nan": float("nan")}})
out = sys.stdout

class Nowhere:
    def write(self, text): return len(text)
    def flush(self): pass

def plain(value):
    if isinstance(value, (list, tuple)) and len(value) > longest:
        try:
            return {{"digest": f"{{type(value).__name__}} {{len(value)}} {{hash(tuple(value))}}"}}  # the seed of hashes is fixed
        except TypeError:
            pass
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int) and value.bit_length() > 3 * longest:
        return {{"digest": f"int {{hash(value)}}"}}
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, tuple):
        return {{"tuple": list(map(plain, value))}}
    if isinstance(value, (set, frozenset)):
        return {{"set": sorted(map(plain, value), key=json.dumps)}}
    if isinstance(value, dict):
        return {{"dict": sorted(([plain(key), plain(item)] for key, item in value.items()), key=json.dumps)}}
    if isinstance(value, complex):
        return {{"complex": [value.real, value.imag]}}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of numpy
        return plain(value.item())
    return {{"object": type(value).__name__}}

sys.stdout = Nowhere()
import solution
answer = getattr(solution, entry_point)
for number, args in list(enumerate(inputs))[first:]:
    if room < 0:
        break
    try:
        text = json.dumps(plain(answer(*args)))
        if len(text) > longest:
            text = json.dumps({{"digest": hashlib.sha256(text.encode()).hexdigest()}})
    except BaseException as error:
        text = json.dumps({{"error": type(error).__name__}})
    room -= len(text)
    out.write(f"{{number}}\\t{{text}}\\n")
    out.flush()
"""  # it goes on where an earlier run of it had told as much as it may


NUMBER = r"[-+.\dej()]*\d[-+.\dej()]*"  # as a text, for JSON has no complex ones


class Odd(NamedTuple):
    """An answer that is no plain value."""

    kind: str  # "error", "object" or "digest"
    text: str


def is_error(answer) -> bool:
    return isinstance(answer, Odd) and answer.kind == "error"


class Unit(NamedTuple):
    """A function to write, and what it is tested with."""

    entry_point: str
    inputs: list  # of lists of arguments
    atol: float = 0.0


class Answers(NamedTuple):
    values: list  # an answer to each input, as far as it got
    reason: str  # why there are no more, "" if there are all
    seconds: float


def of(program: str, unit: Unit, timeout_s: float) -> Answers:
    """What a program answers to the inputs of a unit. Runs it in the sandbox, mostly once."""
    values, seconds = [], 0.0
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # there are inputs of many thousand digits
    files = {"solution.py": program, "inputs.txt": repr(unit.inputs)}
    sys.set_int_max_str_digits(digits)
    while len(values) < len(unit.inputs) and seconds < timeout_s:
        settings = (len(values), unit.entry_point, LONGEST, ROOM)
        result = sandbox.run(TELL.format(settings=settings), timeout_s - seconds, MEMORY_MB, files)
        told, before = dict(re.findall(r"^(\d+)\t(.*)$", result.stdout, re.MULTILINE)), len(values)
        while (text := told.get(str(len(values)))) and len(values) < len(unit.inputs):
            values.append(value_of(text))
        seconds += result.seconds
        if len(values) == before:
            return Answers(values, result.reason or "it tells no answer", seconds)
    return Answers(
        values, "" if len(values) == len(unit.inputs) else f"timeout after {timeout_s:g} s", seconds
    )


def value_of(text):
    """The value that a line tells. Text that no honest run writes is an error.

    >>> value_of('[{"tuple": [1, {"set": [2]}]}]')
    [(1, frozenset({2}))]
    """
    kinds = {
        "tuple": tuple,
        "set": frozenset,
        "dict": dict,
        "complex": lambda parts: complex(*parts),
    }

    def hook(found):
        ((kind, content),) = found.items()
        return kinds[kind](content) if kind in kinds else Odd(kind, content)

    try:
        return json.loads(text, object_hook=hook)
    except (ValueError, TypeError, RecursionError):
        return Odd("error", "no JSON")


# ---- what is right -------------------------------------------------------------------------------------------------------


def is_right(unit, arguments, answer, expected) -> bool:
    """Whether an answer is right, by the rules at the head of this file."""
    if is_error(answer):
        return False
    try:
        if answer == expected:
            return True
        if unit.entry_point in ORACLES:
            return ORACLES[unit.entry_point](arguments, answer, expected, unit.atol)
        atol = unit.atol or (1e-6 if is_floats(expected) else 0)
        if not atol or type(answer) is not type(expected) or np.shape(answer) != np.shape(expected):
            return False
        return bool(np.allclose(answer, expected, rtol=1e-7, atol=atol))
    except (
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ):  # what cannot be compared is not the same
        return False


def is_floats(value) -> bool:
    parts = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(part, float) for part in parts)


def same_elements(arguments, answer, expected, atol):
    return set(answer) == set(expected)


def found_or_not(arguments, answer, expected, atol):
    """A match of the solution stands for True."""
    return (answer if isinstance(answer, bool) else answer is not None) == (expected is not None)


def slanted(arguments, answer, expected, atol):
    """Its text leaves open whether the height is that of the pyramid or of its sides."""
    base, height = arguments
    return answer == round(base**2 + 2 * base * math.hypot(base / 2, height))


def digits_apart(arguments, answer, expected, atol):
    """Its text leaves open whether it is about the digits of the difference, or the differences of the digits."""
    a, b = map(str, arguments)
    width = max(len(a), len(b))
    return answer == sum(abs(int(x) - int(y)) for x, y in zip(a.zfill(width), b.zfill(width)))


def is_root(arguments, answer, expected, atol):
    return abs(sum(c * math.pow(answer, i) for i, c in enumerate(arguments[0]))) <= atol


IN_ANY_ORDER = "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array find_dissimilar Diff"
ORACLES = {
    **dict.fromkeys(IN_ANY_ORDER.split(), same_elements),
    **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), found_or_not),
    "are_equivalent": lambda *_: (
        True
    ),  # the solution of the data set is wrong, and so evalplus asks for no more than an answer
    "sum_div": lambda arguments, answer, *_: answer == 0,
    "surface_Area": slanted,
    "digit_distance_nums": digits_apart,
    "find_zero": is_root,
}


# ---- the types that JSON lost --------------------------------------------------------------------------------------------


def examples_of(asserts: str, entry_point: str) -> list[list]:
    """The arguments of each call of a function in asserts, as far as they are literals.

    >>> examples_of("assert f((1, 2), [3]) == 4", "f")
    [[(1, 2), [3]]]
    """
    calls = [node for node in ast.walk(ast.parse(asserts)) if isinstance(node, ast.Call)]
    return [
        list(map(literal, call.args))
        for call in calls
        if getattr(call.func, "id", "") == entry_point
    ]


def literal(node):
    try:
        return ast.literal_eval(node)
    except ValueError:  # 10 ** -2, say
        return None


def restored(value, examples, default=None):
    """An argument from JSON with the types that examples have at the same depth.

    Lists that lie deeper than those of the examples stay lists, or are tuples if the examples have tuples in tuples.

    >>> restored([[1, 2], []], [[(3, 4)]]), restored([[1, [2]]], [(5,)]), restored([[1, [2]]], [((5,),)]), restored("1j", [2j])
    ([(1, 2), ()], ([1, [2]],), ((1, (2,)),), 1j)
    """
    kinds = {type(example) for example in examples}
    if isinstance(value, dict):
        inner = [
            item for example in examples if isinstance(example, dict) for item in example.values()
        ]
        return {key: restored(item, inner, default or list) for key, item in value.items()}
    if isinstance(value, list):
        inner = [
            item
            for example in examples
            if isinstance(example, list | tuple | set)
            for item in example
        ]
        kind = next((kind for kind in (list, tuple, set) if kind in kinds), default or list)
        deeper = (
            tuple
            if kind is tuple and any(isinstance(item, tuple) for item in inner)
            else default or list
        )
        items = [restored(item, inner, deeper) for item in value]
        return (
            {} if kind is set and not items else kind(items)
        )  # where MBPP+ means an empty set it writes {}
    is_number = (
        kinds
        and kinds <= {int, float, complex}
        and isinstance(value, str)
        and re.fullmatch(NUMBER, value)
    )
    if is_number and not default:
        return complex(value) if "j" in value else float(value)
    return value

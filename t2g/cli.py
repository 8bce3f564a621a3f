"""Command-line helpers: flags, one-sentence errors, users' .py files, output folders and locks."""

import argparse
import errno
import fcntl
import functools
import importlib.util
import inspect
import itertools
import re
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
MEMORY_FULL = (torch.OutOfMemoryError, MemoryError)
MEMORY_FULL_TEXT = "allocate memory|CUDA error: out of memory"  # of a RuntimeError
FAILURES = (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError)
FAILURES += (OSError, RuntimeError, TypeError, ValueError)  # of other people's code, at bad input
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)


def fail(sentence: str):
    """Prints one sentence that says what is wrong and what to do, and exits with code 2."""
    for bar in list(tqdm._instances):
        bar.close()  # it has left the cursor in the middle of a line
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parser(doc: str) -> argparse.ArgumentParser:
    """Returns a parser whose help starts with doc, and silences the messages of transformers."""
    for word in sys.argv:
        if word != word.encode(errors="replace").decode():
            fail(f"the argument {word!r} is not UTF-8; rename the file")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    form = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of doc
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)


def flags(parser):
    """Returns add(name, default, help, kind), which adds a flag to the parser in one line.

    kind is a tuple of choices or a function from a string to a value. By default it follows from
    the default value: False is a switch, an int or a float must be positive, the rest are strings.

    >>> parser = argparse.ArgumentParser()
    >>> add = flags(parser)
    >>> add("--max_steps", 100, "number of rollouts; each is followed by one PPO update")
    >>> add("--bf16", False, "matrix products in bf16")
    >>> parser.parse_args(["--max_steps", "5", "--bf16"])
    Namespace(max_steps=5, bf16=True)
    """

    def add(name, default, help, kind=None):
        if default is False:
            parser.add_argument(name, action="store_true", help=help)
            return
        help += "" if default is None else " (default: %(default)s)"
        if isinstance(kind, tuple):
            parser.add_argument(name, default=default, choices=kind, help=help)
        else:
            kind = kind or (positive(type(default)) if isinstance(default, int | float) else str)
            parser.add_argument(name, default=default, type=kind, help=help)

    return add


def keep_input(out, source, flag):
    """Fails if the file that a flag names to be written is the one that is read."""
    if Path(out).resolve() == Path(source).resolve():
        fail(f"{flag} is the file that is read; choose another {flag}, so that nothing is lost")


def positive(kind):
    """An argument type: a number of this kind above 0."""

    def number(text):
        if not kind(text) > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return kind(text)

    number.__name__ = kind.__name__  # for argparse's own message
    return number


def between(low, high, kind=float):
    """An argument type: a number of this kind in [low, high]."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


@functools.cache
def load_file(path, flag: str, built_in, required, optional=()):
    """Imports the .py file that a user names with flag, beside the built-in names.

    required, optional: names or calls, such as "load(args)", that it must or may define.
    """
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{flag} {path}: give a path of a .py file or one of {', '.join(built_in)}")
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        fail(f"{flag} {path} cannot be imported: {error}")
    for hook in (*required, *optional):
        name, _, arguments = hook.partition("(")
        if hook in optional and not hasattr(module, name):
            continue
        try:
            value = getattr(module, name)
            if arguments:
                inspect.signature(value).bind(*arguments.split(","))
        except (AttributeError, TypeError, ValueError):
            fail(f"{flag} {path} must define {hook}; docs/TASKS.md shows an example")
    return module


def needed(module: str, what: str):
    """Imports an optional package, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        fail(f"{what} needs the package {package}: pip install {package}")


def first_unused(paths) -> Path:
    return next(path for path in paths if not path.exists())


def fresh_folder(path) -> Path:
    """Creates an empty folder. Moves an earlier run aside and refuses a folder of anything else."""
    path = Path(path).resolve()
    if (path / "metrics.jsonl").is_file():
        aside = first_unused(path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
        path.rename(aside)
        print(f"the earlier run in {path} was moved to {aside}", flush=True)
    path.mkdir(parents=True, exist_ok=True)
    if any(file.suffix != ".unfinished" for file in path.iterdir()):
        fail(f"{path} holds something that is not a run; choose another --output_dir")
    return path


def try_lock(file) -> bool:
    """Locks an open file or folder until it is closed; False if another process has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn_unsupported("locks: let no second process write there", error)
    return True


def warn_unsupported(what, error):
    """Warns once if the file system lacks a feature, as on some clusters; raises other errors."""
    if error.errno not in UNSUPPORTED:
        raise error
    warnings.warn(f"this file system has no {what} ({error.strerror})", stacklevel=2)


@contextmanager
def friendly_errors():
    """Ends a script with one clear line for out of memory, a bad path, a full disk and Ctrl-C.

    It is also a decorator: @friendly_errors() stands above the main() of each script.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has ended, as in | head
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.raise_signal(signal.SIGPIPE)
    except KeyboardInterrupt:
        resume = "the same command resumes from what was saved last, if anything was"
        print(f"\ninterrupted; {resume}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except Exception as error:
        if is_disk_full(error):
            remedy = "free some space or choose a writable folder, and run the command again"
            fail(f"cannot write to the disk ({error}); {remedy}")
        if isinstance(error, MEMORY_FULL) or re.search(MEMORY_FULL_TEXT, str(error)):
            shorter = "lower --max_prompt_length or --response_length"
            remedy = "halve --per_device_train_batch_size and double --gradient_accumulation_steps"
            remedy += ", or use --gradient_checkpointing, --lora_r or --bf16"
            fail(f"out of memory; {shorter} or, in training, {remedy}")
        if isinstance(error, OSError) and error.filename:
            fail(f"{error.filename} cannot be used ({error.strerror}); choose another path")
        raise


def is_disk_full(error) -> bool:
    in_text = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors and tokenizers write it
    number = int(in_text[1]) if in_text else getattr(error, "errno", None)
    return number in DISK_FULL

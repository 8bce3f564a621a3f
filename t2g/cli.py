"""What the scripts share: their command line, one clear sentence for bad input, a folder for their output."""

import argparse
import errno
import functools
import importlib.util
import itertools
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers


def fail(sentence: str):
    """Ends the program with one sentence that says what is wrong and what to do, and exit code 2."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help opens with the script's own docstring and shows every default. The console is for our own lines."""

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return (
                action.help
                if action.default is None or action.default is False
                else super()._get_help_string(action)
            )

    return argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)


def flags(parser):
    """add(name, default, help, kind) adds a flag to a parser, in one line.

    kind: a function from a text to a value, or a tuple of choices. If it is not given, it follows
    from the default: False makes a switch, an int or a float must be above 0, all else is a text.

    >>> parser = argparse.ArgumentParser()
    >>> add = flags(parser)
    >>> add("--max_steps", 100, "number of rollouts; each is followed by one PPO update")
    >>> add("--reward", "span", "where rewards are placed", ("span", "scalar"))
    >>> add("--bf16", False, "matrix products in bf16")
    >>> parser.parse_args(["--max_steps", "5", "--bf16"])
    Namespace(max_steps=5, reward='span', bf16=True)
    """

    def add(name, default, help, kind=None):
        if default is False and kind is None:
            parser.add_argument(name, action="store_true", help=help)
        elif isinstance(kind, tuple):
            parser.add_argument(name, default=default, choices=kind, help=help)
        else:
            kind = kind or (positive(type(default)) if isinstance(default, int | float) else str)
            parser.add_argument(name, default=default, type=kind, help=help)

    return add


@functools.cache
def load_file(path, flag: str, built_in):
    """The module in a .py file of the user's own; `flag` named it, beside the names built in."""
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"{flag} {path}: give a path of a .py file or one of {', '.join(built_in)}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def positive(kind):
    """An argument type: a number of this kind above zero."""

    def convert(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def between(low, high):
    """An argument type: a number in [low, high]."""

    def convert(text):
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return float(text)

    convert.__name__ = "number"
    return convert


def make_folder(path, flag: str):
    """The folder and those above it, unless they are there; flag is the one to change if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"the folder {path} cannot be made ({error.strerror}); choose another {flag}")


def fresh_folder(path) -> Path:
    """An empty folder at path. An earlier run that stands there is moved aside; a folder of anything else is left alone."""
    path = Path(path).resolve()
    try:
        if (
            path.exists()
            and not (path / "metrics.jsonl").is_file()
            and (not path.is_dir() or any(path.iterdir()))
        ):
            fail(f"{path} holds something that is no run of ours; choose another --output_dir")
        if (path / "metrics.jsonl").is_file():
            aside = next(
                p
                for n in itertools.count(1)
                if not (p := path.with_name(f"{path.name}.{n}")).exists()
            )
            path.rename(aside)
            print(f"{path} held an earlier run: moved to {aside}", flush=True)
    except OSError as error:
        fail(f"the folder {path} cannot be used ({error.strerror}); choose another --output_dir")
    make_folder(path, "--output_dir")
    return path


@contextmanager
def advice():
    """Where memory or the disk runs out, or somebody presses Ctrl-C, the program ends with a sentence that says what to do."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            "\nInterrupted; the same command goes on from the last checkpoint, if there is one",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        fail(
            f"No room is left to write ({error}); make some and start again. Earlier checkpoints stay"
        )
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        fail(
            "out of memory. Lower --per_device_train_batch_size and raise --gradient_accumulation_steps by as much, or lower "
            "--response_length; --gradient_checkpointing, --lora_r, --bf16 and more processes save memory too. Earlier checkpoints "
            "stay, and the same command with another batch split or --gradient_checkpointing goes on from them"
        )

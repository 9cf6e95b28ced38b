"""What every command in this folder shares: errors of one line with exit code 2, and files that are whole or not there.

Used by train.py, evaluate.py and merge_labels.py; nothing here knows about models or data.
"""

import argparse
import contextlib
import functools
import os
import shutil
import sys
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message is one line: what, where, and what to do."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that fails in one line and does not guess at abbreviated options."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see python {self.prog} --help\n")


def one_line_errors(main):
    """Decorate a command's `main(argv)`: returns 0, 2 after a `UserError` (one line on stderr), or 130 after Ctrl-C."""

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            main(argv)
        except UserError as error:
            program = Path(main.__code__.co_filename).name
            print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{Path(main.__code__.co_filename).name}: interrupted", file=sys.stderr)
            return 130
        return 0

    return guarded


@contextlib.contextmanager
def replacing(target):
    """Yield a path beside `target` to write a file or a folder to; it takes `target`'s place only when all is written.

    After an error (or an interrupt) inside the block `target` is what it was and the temporary path is gone.
    """
    target = Path(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if part.is_dir() and target.is_dir():  # a folder cannot replace a folder that is not empty in one step
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            os.replace(target, old)
            os.replace(part, target)
            shutil.rmtree(old)
        else:
            os.replace(part, target)
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError):  # these are not about files
            raise
        raise UserError(f"{target}: cannot write it ({error.strerror or error}); choose another place") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def hub_errors(name, kind):
    """Turn what the Hugging Face Hub answers for `name` (a "model", "data set" or "adapter") into one-line errors.

    No network, no token, a token without access and an unknown repository look alike to a user who is shown the
    libraries' exceptions (huggingface/transformers#28894), so each gets a sentence of its own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _hub_reason(error)
        if reason is None:
            raise
        raise UserError(f"{kind} {name}: {reason}") from error


def _hub_reason(error):
    """Return what went wrong at the Hub and what to do, or None where `error` is about something else."""
    from huggingface_hub import get_token

    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    status = {getattr(getattr(cause, "response", None), "status_code", None) for cause in chain}
    names = {base.__name__ for cause in chain for base in type(cause).__mro__}
    # datasets drops the HTTP error and leaves a sentence of its own
    unknown_data = "".join(str(cause) for cause in chain if type(cause).__name__ == "DatasetNotFoundError")
    if "GatedRepoError" in names or "gated dataset" in unknown_data:
        if get_token():
            return "your token has no access; ask for it on its page, then try again"
        return "it is gated and no token is set; ask for access on its page, then run: hf auth login"
    if "HFValidationError" in names:
        return "this is neither a path that exists here nor a Hub name of the form owner/name"
    if "RepositoryNotFoundError" in names or unknown_data:
        return "the Hub knows no such repository, or it is private; check the name and run: hf auth login"
    if 401 in status:
        return f"{'the token is not valid' if get_token() else 'no token is set'}; run: hf auth login"
    if 403 in status:
        return "your token does not allow this; check the owner's name and what the token may do"
    if any(code == 429 or code >= 500 for code in status - {None}):
        return "the Hub is overloaded or out of order; try again later"
    offline = {"ConnectionError", "TimeoutError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
    if names & offline:
        return "the Hub cannot be reached; check the network, or name a local path"
    if names & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return "it holds no data files, such as train.jsonl"
    return None


def positive_int(text):
    """Read a whole number above 0 for argparse."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def positive_float(text):
    """Read a finite number above 0 for argparse."""
    value = _number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def seed(text):
    """Read a seed that torch and numpy both take (0 to 2**32 - 1) for argparse."""
    value = _number(int, text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**32 - 1}, not {text}")
    return value


def _number(kind, text):
    try:
        return kind(text)
    except ValueError:
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {name}, not {text!r}") from None

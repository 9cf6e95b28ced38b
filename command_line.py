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
    from huggingface_hub import errors, get_token

    try:
        yield
    except (OSError, ValueError) as error:
        chain, cause = [], error
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        status = {getattr(getattr(cause, "response", None), "status_code", None) for cause in chain}
        if any(isinstance(cause, errors.GatedRepoError) for cause in chain) or 403 in status:
            if get_token():
                reason = f"your token has no access; ask for it on the page of {name}, then try again"
            else:
                reason = "it is gated and no token is set; ask for access on its page, then run: hf auth login"
        elif any(isinstance(cause, errors.HFValidationError) for cause in chain):
            reason = "this is neither a path that exists here nor a Hub name of the form owner/name"
        elif any(isinstance(cause, errors.RepositoryNotFoundError) for cause in chain) or status & {401, 404}:
            reason = "the Hub knows no such repository, or it is private; check the name and run: hf auth login"
        elif _is_network_error(chain):
            reason = "the Hub cannot be reached; check the network, or name a local path"
        else:
            raise
        raise UserError(f"{kind} {name}: {reason}") from error


def _is_network_error(chain):
    from huggingface_hub import errors

    names = {base.__name__ for cause in chain for base in type(cause).__mro__}
    offline = (ConnectionError, TimeoutError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    return any(isinstance(cause, offline) for cause in chain) or bool(names & {"TransportError", "NetworkError"})


def positive_int(text):
    """Read a whole number above 0 for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def positive_float(text):
    """Read a finite number above 0 for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def seed(text):
    """Read a seed that torch and numpy both take (0 to 2**32 - 1) for argparse."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**32 - 1}, not {text}")
    return value

"""What every command in this folder shares: errors of one line with exit code 2, and files that are whole or not there.

Used by all of them; nothing here knows about models or data.
"""

import argparse
import contextlib
import errno
import functools
import glob
import io
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil


class UserError(Exception):
    """Something the user can put right. The message is one line: what, where, and what to do."""


class CutOff(UserError):
    """A UserError that is about the machine, such as a full disk: the same run can go on once that is put right.

    It then goes on without the options `leave_out`.
    """

    leave_out = ()


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it before it kills: handled as Ctrl-C is, but with exit code 143."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that fails in one line and does not guess at abbreviated options."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        _let_the_first_speak()
        self.exit(2, f"{self.prog}: error: {_one_line(message)}; see python {self.prog} --help\n")


def one_line_errors(main):
    """Decorate a command's `main(argv)`: it returns 0, or after one line on stderr 2, 130 (Ctrl-C) or 143 (SIGTERM).

    Of several processes that a launcher has started the first alone prints; an error of another one is said where the
    first goes on.
    """

    @functools.wraps(main)
    def guarded(argv=None):
        program = Path(main.__code__.co_filename).name
        first = _process_number() == 0
        silence = contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO())
        try:
            with _stopped_by_signals(for_good=main.__module__ == "__main__"), silence:
                try:
                    main(argv)
                except (UserError, OSError):
                    _let_the_first_speak()
                    raise
        except UserError as error:
            print(f"{program}: error: {_one_line(error)}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.filename is None:
                raise
            print(f"{program}: error: {_one_line(error.filename)}: {error.strerror}; name another", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            if first:
                print(f"{program}: {_one_line(stop) or 'interrupted'}", file=sys.stderr)
            return 143 if isinstance(stop, Terminated) else 130
        return 0

    return guarded


def _process_number():
    """Return this process's number among those that a launcher has started, 0 without one."""
    return int(os.environ.get("RANK", 0))


def _let_the_first_speak():
    """Wait in all processes but the first one: a launcher ends all with the first that ends, before it has spoken."""
    if _process_number():
        time.sleep(5)


def _one_line(message):
    """Return a message without line breaks and with control characters as escapes: a terminal would obey them."""
    return printable(" ".join(str(message).split()))


def printable(text):
    """Return `text` with characters that a terminal would obey, line breaks too, as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


@contextlib.contextmanager
def _stopped_by_signals(for_good):
    """Let SIGINT and SIGTERM stop the block, once; with `for_good` a second one is ignored until the process ends."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return

    def stop(number, frame):
        for each in before:  # a second one must not cut off what the first one has the program say and tidy up
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not (for_good and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN):
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def replacing(target):
    """Yield a path beside `target` to write a file or a folder to; it takes `target`'s place only when all is written.

    After an error (or an interrupt) inside the block `target` is what it was and the temporary path is gone. What a
    killed process left beside `target` goes first. Raises UserError where `target` cannot be written.
    """
    target = Path(target)
    part = _beside(target, "part")
    try:
        with writing_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            yield part
            sync_all(part)
            if part.is_dir() and target.is_dir():  # a folder cannot replace a folder that is not empty in one step
                old = _beside(target, "old")
                try:
                    os.replace(target, old)
                    os.replace(part, target)
                finally:
                    if not target.exists():
                        os.replace(old, target)
                shutil.rmtree(old)
            else:
                os.replace(part, target)
            sync(target.parent)
    finally:
        remove(part)


def _beside(target, ending):
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{ending}")


def _remove_leftovers(target):
    """Remove the temporary files beside `target` of processes of this machine that are no longer there."""
    host = socket.gethostname()
    for path in target.parent.glob(f".{glob.escape(target.name)}.{glob.escape(host)}.*.*"):
        pid = path.name.split(".")[-2]
        # A process of this one's number is this one, or in a container the one that was killed before it.
        gone = pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid)))
        if path.name.endswith((".part", ".old")) and gone:
            if path.name.endswith(".old") and not target.exists():  # killed between the two renames
                os.replace(path, target)
            remove(path)


def remove(path):
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(NotADirectoryError):  # it cannot be there
            path.unlink(missing_ok=True)


def sync(path):
    """Return when a file, or a folder's list of what is in it, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(path):
    """Sync a file, or a folder with all that is in it."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync(each)


@contextlib.contextmanager
def writing_errors(target):
    """Turn what goes wrong in writing `target` into a UserError that names it, and says where the disk is full.

    torch and safetensors raise their own exceptions there, some of them without the system's error number.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ConnectionError | TimeoutError):  # OSErrors, but not about files
            raise
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or _looks_full(error):
            raise CutOff(f"{target}: the disk is full, it was not written; free space there and try again") from error
        if isinstance(error, OSError):
            raise UserError(f"{target}: cannot write it ({error.strerror or error}); choose another place") from error
        raise


def _looks_full(error):
    text = str(error)
    torchs_own = any(words in text for words in ("PytorchStreamWriter", "file write failed", "unexpected pos"))
    return isinstance(error, RuntimeError) and torchs_own or "os error 28" in text or "No space left" in text


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
    if names & offline or any("CAS service error" in str(cause) for cause in chain):  # hf_xet's, a bare RuntimeError
        return "the Hub cannot be reached; check the network, or name a local path"
    if names & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return "it holds no data files, such as train.jsonl"
    return None


def read_json(text):
    """Return what the JSON `text` holds; raises ValueError, with a short reason, where it cannot be relied on.

    That is what is no JSON, and what json.loads lets pass: NaN and numbers too large for a float, a key that stands
    twice in an object (the last one would win), and half a surrogate pair, which no file can hold.
    """

    def finite(number):
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number} is not a finite number")
        return value

    def distinct(pairs):
        fields = dict(pairs)
        if len(fields) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {key!r} stands twice in an object")
        return fields

    try:
        value = json.loads(text, parse_constant=finite, parse_float=finite, object_pairs_hook=distinct)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise ValueError(f"{error.msg}: {line}column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def not_empty(text):
    """Read a text for argparse; an empty one is most often a shell variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def positive_int(text):
    """Read a whole number from 1 to 2**31 - 1 for argparse."""
    value = number(int, text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be {'1 or more' if value < 1 else 'below 2147483648'}, not {text}")
    return value


def positive_float(text):
    """Read a finite number above 0 for argparse."""
    value = number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def seed(text):
    """Read a seed that torch and numpy both take (0 to 2**32 - 1) for argparse."""
    value = number(int, text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**32 - 1}, not {text}")
    return value


def number(kind, text):
    """Read an int or a float, which `kind` is, for argparse."""
    try:
        return kind(text)
    except ValueError:
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {name}, not {text!r}") from None

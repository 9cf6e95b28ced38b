"""Several processes of one command, one a GPU, as `accelerate launch` and torchrun start them.

Every process loads the model and does its share; what is shared out is gathered in all of them, so that they go the
same way. The first one alone prints (command_line.py sees to that) and writes. With one process nothing is different.
"""

import contextlib
import datetime
import os
import shlex
import warnings

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils.logging import disable_progress_bar

from command_line import CutOff, UserError

PATIENCE = datetime.timedelta(days=1)  # of processes that wait for the first one to read or write a large file


@contextlib.contextmanager
def joined():
    """Meet the other processes that the launcher has started, and leave them at the end.

    Raises UserError where they are more than there are GPUs, or are to share one model among them.
    """
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise UserError(f"{here} processes on a host with {gpus} GPU{'s' if gpus > 1 else ''}; start one for each GPU")
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UserError(f"accelerate is set to {kind}; every process holds the whole model here: pass --multi_gpu")
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if not state.is_main_process:
        disable_progress_bar()
        warnings.simplefilter("ignore")
    if state.num_processes > 1:
        print(f"{state.num_processes} processes")
    yield
    PartialState().destroy_process_group()  # not after an error: it would wait for the others


def refuse_several(program):
    """Raise UserError where a launcher has started several processes of a `program` that is made for one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"runs in one process, not in several; start it with: python {program}")


def count():
    """Return the number of processes."""
    return PartialState().num_processes


def is_first():
    """Return whether this is the process that prints and writes."""
    return PartialState().is_main_process


def on_first(function, *args):
    """Return what `function(*args)` returns in the first process, in all of them; an error there is one in all."""
    answer = [None, None]
    if is_first():
        try:
            answer[0] = function(*args)
        except (UserError, OSError) as error:
            if count() == 1:
                raise
            answer[1] = error
    if count() > 1:
        with lost_peers():
            broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def first_enters(stack, context):
    """Enter the context manager `context` on the ExitStack `stack` in the first process alone.

    An error on entering it is one in all processes.
    """

    def enter():
        stack.enter_context(context)

    on_first(enter)


def gathered(value):
    """Return the list of what `value` is in each of the processes, in all of them."""
    with lost_peers():
        return gather_object([value])


def own_share(items):
    """Return this process's part of the list `items`."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def share_out(items, work):
    """Return [work(item) for each of `items`], each done by one of the processes; all of them get all results.

    Which process does an item changes nothing but the time. What one of them cannot do ends all.
    """
    mine, failure = [], None
    try:
        mine = [work(item) for item in own_share(items)]
    except (UserError, RuntimeError, MemoryError) as error:
        if count() == 1:
            raise
        failure = error
    shares = gathered((mine, failure))
    if failure := failure or next((of for _, of in shares if of is not None), None):
        raise failure
    return [shares[place % len(shares)][0][place // len(shares)] for place in range(len(items))]


@contextlib.contextmanager
def saying_how_to_resume(program, argv, kept):
    """Add to the message of a run that was cut off what is kept, and how to go on from it.

    `kept()` returns words for it, empty ones where nothing is; `argv` are the options that `program` was given.
    """
    try:
        yield
    except (KeyboardInterrupt, CutOff) as error:
        message = str(error) or "interrupted"
        if what := kept():
            message += f"; kept: {what}; to go on: {_command_to_resume(program, argv, error)}"
        raise type(error)(message) from error


def _command_to_resume(program, argv, error):
    left_out = ("--overwrite", "--resume", *getattr(error, "leave_out", ()))
    options = [option for option in argv if option not in left_out]
    if count() > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return "start it on all hosts as before, with --resume"
    launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(count())] if count() > 1 else ["python"]
    return shlex.join([*launcher, program, *options, "--resume"])


@contextlib.contextmanager
def lost_peers():
    """Turn the end of another process, on which this one waited, into a CutOff."""
    try:
        yield
    except RuntimeError as error:  # gloo has no kind of its own
        texts = ("gloo", "Connection closed by peer", "Connection reset")
        if count() == 1 or not (
            isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in texts)
        ):
            raise
        raise CutOff("another process of this run has ended, so this one cannot go on") from error

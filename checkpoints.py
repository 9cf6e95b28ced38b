"""The folder of a training run: one run at a time, checkpoints that are whole or do not count, the same run resumed.

    models/<adapters_name>/                 the finished adapter; run.json is written last
    models/<adapters_name>/checkpoints/     of the run in progress: run.json, checkpoint-<step>/

Nothing here knows about models; train.py says what goes into a checkpoint.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path

from command_line import UserError, remove, replacing, sync, sync_all, writing_errors

KEPT = 2  # checkpoints: should the newest be found broken, there is one more
CONTENTS = "contents.json"  # size and SHA-256 of a checkpoint's files, written last


def check_folder(folder, resume, overwrite):
    """Raise UserError where a run cannot write to `folder`, would replace another unasked, or has none to resume."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, and the adapter's folder {folder} is to be there; move it away")
    if resume and not folder.exists():
        raise UserError(f"{folder}: does not exist, so there is no run to resume; leave out --resume")
    if folder.exists() and not (resume or overwrite):
        unfinished = (folder / "checkpoints" / "run.json").exists()
        choice = " and holds a run that is not finished; pass --resume to go on with it," if unfinished else "; pass"
        raise UserError(f"{folder}: exists{choice} --overwrite to replace it, or name another --adapters_name")
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot write there ({nearest} is not writable); run from another folder")


def is_finished(folder):
    """Return whether `folder` holds a finished run and none that came after it."""
    return (folder / "run.json").is_file() and not (folder / "checkpoints" / "run.json").exists()


@contextlib.contextmanager
def locked(folder):
    """Hold `folder`, made if it is not there, for this run alone; raise UserError where another run holds it.

    The system lets go of the lock when the process ends, however it ends. A folder that was made here and stayed empty
    is removed again.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - it stays open, which is the lock
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{folder}: another run is writing there; wait for it, or name another --adapters_name"
                ) from error
            print(f"{folder}: this file system knows no locks ({error.strerror}); start no second run there")
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            for path in made:
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()


@contextlib.contextmanager
def checkpoint(folder, step):
    """Yield a folder to write the checkpoint of `step` to; `folder` then holds it whole and the one before, no others.

    Its files are on the disk before it gets its name, so that a name stands for a whole checkpoint.
    """
    with replacing(folder / "checkpoints" / f"checkpoint-{step}") as part:
        part.mkdir()
        yield part
        contents = {file.name: [file.stat().st_size, _digest(file)] for file in sorted(part.iterdir())}
        (part / CONTENTS).write_text(json.dumps(contents, indent=2), encoding="utf-8")
    whole, _ = find_checkpoints(folder, read=False)
    for old in whole[:-KEPT]:
        remove(old)


def find_checkpoints(folder, read=True):
    """Return (whole checkpoints, oldest first; paths of incomplete ones) in the run `folder`.

    With `read` the files' contents are compared with what was written, else their sizes only.
    """
    whole, incomplete = [], []
    for path in sorted((folder / "checkpoints").glob("*checkpoint-*"), key=_step):
        is_one = re.fullmatch(r"checkpoint-\d+", path.name) and _is_whole(path, read)
        (whole if is_one else incomplete).append(path)
    return whole, incomplete


def newest_checkpoint(folder):
    """Return the newest whole checkpoint; prints the incomplete ones. Raises UserError where there is none."""
    whole, incomplete = find_checkpoints(folder)
    for path in incomplete:
        print(f"{path}: incomplete, skipped")
    if not whole:
        raise UserError(f"{folder / 'checkpoints'}: no complete checkpoint to resume from; start anew with --overwrite")
    return whole[-1]


def _step(path):
    number = re.search(r"\d+", path.name)
    return int(number[0]) if number else -1


def _digest(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_whole(path, read):
    try:
        contents = json.loads((path / CONTENTS).read_text(encoding="utf-8"))
        return all(
            (path / name).stat().st_size == size and (not read or _digest(path / name) == digest)
            for name, (size, digest) in contents.items()
        )
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def in_progress(folder, run):
    """Wrap the training of the run described by the dict `run`, or with None of the one resumed.

    A new one starts without an earlier one's checkpoints, and is forgotten if it fails before its first checkpoint.
    """
    if run is not None:
        remove(folder / "checkpoints")
        remove(folder / "runs")
        with replacing(folder / "checkpoints" / "run.json") as part:
            part.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    try:
        yield
    except BaseException:
        if run is not None and not find_checkpoints(folder, read=False)[0]:
            remove(folder / "checkpoints")
            remove(folder / "runs")
        raise


@contextlib.contextmanager
def result(folder):
    """Yield a folder to write a run's result to, run.json among it; `folder` then holds it in place of an older one.

    While files change places there is no run.json, so a folder that has one holds one run's files. Killed in between,
    the run can still be resumed from its last checkpoint.
    """
    part = folder / ".result.part"
    try:
        with writing_errors(folder):
            remove(part)
            part.mkdir()
            yield part
            sync_all(part)
            for old in ("run.json", "evaluation"):
                remove(folder / old)
            for file in sorted(part.iterdir(), key=lambda file: file.name == "run.json"):
                remove(folder / file.name)
                os.replace(file, folder / file.name)
            remove(folder / "checkpoints" / "run.json")
            sync(folder)
    finally:
        remove(part)


def read_run(folder):
    """Return run.json's dict of the run in `folder`: of the one in progress, else of the finished one."""
    file = folder / "run.json" if is_finished(folder) else folder / "checkpoints" / "run.json"
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read, so the run cannot be resumed; start anew with --overwrite") from error


def check_same(before, now, free):
    """Raise UserError where the run described by `now` would not give the result of the one resumed, `before`.

    Both are dicts as run.json holds them; `free` names the options that change no result. Prints what else differs.
    """
    for name in now["options"]:
        old, new = before["options"].get(name, now["options"][name]), now["options"][name]
        if name not in free and old != new:
            raise UserError(
                f"--{name}: was {old} when the run was started and is {new} now; resume with the same value, or start "
                "anew with --overwrite"
            )
    if before["task"] != now["task"]:
        changed = next(field for field in now["task"] if before["task"].get(field) != now["task"][field])
        raise UserError(
            f"--task: its {changed} was {before['task'].get(changed)!r} when the run was started and is "
            f"{now['task'][changed]!r} now; resume with the same task, or start anew with --overwrite"
        )
    old, new = before["data"], now["data"]
    if old["fingerprint"] != new["fingerprint"]:
        raise UserError(
            f"--dataset_name: the rows were others when the run was started ({old['dataset_name']}, fingerprint "
            f"{old['fingerprint'][:12]}) than now ({new['dataset_name']}, {new['fingerprint'][:12]}); restore them, or "
            "start anew with --overwrite"
        )
    for name in ("device", "compute_dtype", "versions"):
        if before[name] != now[name]:
            print(f"Note: {name} was {before[name]} and is {now[name]}: results may differ in their last digits")

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

from command_line import UserError, read_json, remove, replacing, sync, sync_all, writing_errors

RUN_FORMAT = 1  # of run.json; raise it when an older evaluate.py would misread what train.py writes
KEPT = 2  # checkpoints: should the newest be found broken, there is one more
CONTENTS = "contents.json"  # size and SHA-256 of a checkpoint's files, written last


def check_folder(folder, resume, overwrite):
    """Raise UserError where a run cannot write to `folder`, would replace another unasked, or has none to resume."""
    check_writable(folder, "run from another folder")
    used = folder.exists() and any(path.name != ".lock" for path in folder.iterdir())
    if resume and not used:
        raise UserError(f"{folder}: does not exist, so there is no run to resume; leave out --resume")
    if used and not (resume or overwrite):
        unfinished = (folder / "checkpoints" / "run.json").exists()
        choice = " and holds a run that is not finished; pass --resume to go on with it," if unfinished else "; pass"
        raise UserError(f"{folder}: exists{choice} --overwrite to replace it, or name another --adapters_name")


def check_writable(folder, or_else):
    """Raise UserError where `folder` cannot be made or written to; `or_else` says what else could be done."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest}: is a file, and the folder {folder} is to be there; move it away")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot write there ({nearest} is not writable); make it so, or {or_else}")


def is_finished(folder):
    """Return whether `folder` holds a finished run and none that came after it."""
    return (folder / "run.json").is_file() and not (folder / "checkpoints" / "run.json").exists()


@contextlib.contextmanager
def locked(folder, resume, overwrite):
    """Hold `folder`, made if it is not there, for this run alone; raise UserError where another run holds it.

    Looks again whether the folder can be used (`check_folder`): a short run may have ended there since.
    """
    with held(folder, "name another --adapters_name"):
        _settle(folder)
        check_folder(folder, resume, overwrite)
        yield


@contextlib.contextmanager
def held(folder, or_else):
    """Hold `folder`, made if it is not there, for this process alone; raise UserError where another holds it.

    `or_else` says what to do but wait. The system lets go of the lock when the process ends, however it ends. A folder
    that was made here and stayed empty is removed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - it stays open, which is the lock
    with file:
        busy = UserError(f"{folder}: another run is writing there; wait for it, or {or_else}")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise busy from error
            print(f"{folder}: this file system knows no locks ({error.strerror}); start no second run there")
        try:
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / ".lock")):
                raise FileNotFoundError
        except FileNotFoundError:  # the run that held it ended, and removed it, between the opening and the locking
            raise busy from None
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

    Its files are on the disk before it gets its name, so that a name stands for a whole checkpoint. Incomplete ones and
    those of later steps, from before the run was resumed, are removed.
    """
    with replacing(folder / "checkpoints" / f"checkpoint-{step}") as part:
        part.mkdir()
        yield part
        contents = {file.name: [file.stat().st_size, _digest(file)] for file in sorted(part.iterdir())}
        (part / CONTENTS).write_text(json.dumps(contents, indent=2), encoding="utf-8")
    whole, incomplete = find_checkpoints(folder, read=False)
    later = [path for path in whole if step_of(path) > step]
    for old in [*incomplete, *later, *whole[: -KEPT - len(later)]]:
        remove(old)
    _settle(folder)


def find_checkpoints(folder, read=True):
    """Return (whole checkpoints, oldest first; paths of incomplete ones) in the run `folder`.

    With `read` the files' contents are compared with what was written, else their sizes only.
    """
    whole, incomplete = [], []
    for path in sorted((folder / "checkpoints").glob("*checkpoint-*"), key=step_of):
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


def newest_kept(folder):
    """Return the path of the newest whole checkpoint in words, empty ones where there is none."""
    whole, _ = find_checkpoints(folder)
    return str(whole[-1]) if whole else ""


def step_of(path):
    """Return the step in a checkpoint's name, -1 where it has none."""
    number = re.search(r"\d+", path.name)
    return int(number[0]) if number else -1


def _digest(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_whole(path, read):
    try:
        contents = json.loads((path / CONTENTS).read_text(encoding="utf-8"))
        return bool(contents) and all(
            (path / name).stat().st_size == size and (not read or _digest(path / name) == digest)
            for name, (size, digest) in contents.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def in_progress(folder, run):
    """Wrap the training of the run described by the dict `run`, or with None of the one resumed.

    A new one starts without an earlier one's checkpoints and logs, which are put aside and gone with its own first
    checkpoint. If it fails before, it is forgotten and they are back.
    """
    if run is not None:
        for name in ("checkpoints", "runs"):
            if (folder / name).exists():
                os.replace(folder / name, folder / f".{name}.replaced")
        with replacing(folder / "checkpoints" / "run.json") as part:
            part.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    try:
        yield
    except BaseException:
        if run is not None and not find_checkpoints(folder, read=False)[0]:
            remove(folder / "checkpoints")
            remove(folder / "runs")
            _settle(folder)
        raise


def _settle(folder):
    """Remove what `in_progress` put aside, or put it back where the run that replaces it has no whole checkpoint."""
    asides = list(folder.glob(".*.replaced"))
    replaced = asides and find_checkpoints(folder, read=False)[0]
    for aside in asides:
        if not replaced:
            remove(folder / aside.name.split(".")[1])
            os.replace(aside, folder / aside.name.split(".")[1])
        remove(aside)


@contextlib.contextmanager
def result(folder):
    """Yield a folder to write a run's result to, run.json among it; `folder` then holds it in place of an older one.

    While files change places there is no run.json, so a folder that has one holds one run's files. Killed in between,
    the run can still be resumed from its last checkpoint. Of the older result goes what its run.json lists as its
    files; what a user has put beside them stays.
    """
    part = folder / ".result.part"
    try:
        with writing_errors(folder):
            remove(part)
            part.mkdir()
            yield part
            sync_all(part)
            if (folder / "run.json").exists():
                os.replace(folder / "run.json", folder / ".replaced.json")
            for old in (*result_files(folder / ".replaced.json"), "evaluation", ".replaced.json"):
                remove(folder / old)
            for file in sorted(part.iterdir(), key=lambda file: file.name == "run.json"):
                remove(folder / file.name)
                os.replace(file, folder / file.name)
            remove(folder / "checkpoints" / "run.json")
            sync(folder)
    finally:
        remove(part)


def result_files(run_json):
    """Return the names of the files of the result that a run.json belongs to; none where it cannot be read."""
    try:
        names = read_json(run_json.read_text(encoding="utf-8"))["files"]
        return [name for name in names if name == os.path.basename(name) and name not in ("", ".", "..")]
    except (OSError, ValueError, TypeError, KeyError):
        return []


_FIELDS = {  # what other scripts read from run.json
    "options": {"max_seq_length": int},
    "task": {},
    "data": {"dataset_name": str, "fingerprint": str},
    "base_model": {"name": str, "revision": str | None},
}


def read_run(file, advice):
    """Return the dict of a run.json; raise UserError, with `advice` on what to do, where it is not as train.py's."""
    try:
        run = read_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; without it the data and the prompt are not known; {advice}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {advice}") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); {advice}") from error
    for name, fields in _FIELDS.items():
        value = run.get(name) if isinstance(run, dict) else None
        if not isinstance(value, dict):
            raise UserError(f"{file}: has no {name}; it is not what train.py wrote; {advice}")
        for field, kind in fields.items():
            if not isinstance(value.get(field, ...), kind):
                raise UserError(f"{file}: has no {field} in {name}; it is not what train.py wrote; {advice}")
    if run.get("format", 0) not in range(RUN_FORMAT + 1):
        raise UserError(
            f"{file}: written by a newer version of this toolkit (format {run['format']}, here up to "
            f"{RUN_FORMAT}); update this toolkit, or {advice}"
        )
    return run


def run_to_resume(folder):
    """Return run.json's dict of the run in `folder`: of the one in progress, else of the finished one."""
    file = folder / "run.json" if is_finished(folder) else folder / "checkpoints" / "run.json"
    return read_run(file, "the run cannot be resumed, start anew with --overwrite")


def find_resumable(folder, run, free):
    """Return (dict of the earlier run in `folder`, the checkpoint to go on from, or None where it is finished).

    Prints which. Raises UserError where `run`, this one's dict, would not give its result; `free` as in `check_same`.
    """
    earlier = run_to_resume(folder)
    check_same(earlier, run, free)
    if is_finished(folder):
        print(f"{folder}: this run is finished")
        return earlier, None
    checkpoint = newest_checkpoint(folder)
    print(f"Resuming from {checkpoint}")
    return earlier, checkpoint


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
        fields = now["task"] | before["task"]
        changed = next(name for name in fields if before["task"].get(name) != now["task"].get(name))
        raise UserError(
            f"--task: its {changed} was {before['task'].get(changed)!r} when the run was started and is "
            f"{now['task'].get(changed)!r} now; resume with the same task, or start anew with --overwrite"
        )
    old, new = before["data"], now["data"]
    if old["fingerprint"] != new["fingerprint"]:
        raise UserError(
            f"--dataset_name: the rows were others when the run was started ({old['dataset_name']}, fingerprint "
            f"{old['fingerprint'][:12]}) than now ({new['dataset_name']}, {new['fingerprint'][:12]}); restore them, or "
            "start anew with --overwrite"
        )
    if old.get("tokens") != new["tokens"]:
        raise UserError(
            f"--base_model_name {now['options']['base_model_name']}: its tokenizer gives other tokens than when the "
            "run was started; restore it, or start anew with --overwrite"
        )
    for name in ("device", "processes", "compute_dtype", "versions"):
        if name in before and before[name] != now[name]:
            effect = "dropout draws other numbers" if name == "processes" else "results may differ in their last digits"
            print(f"Note: {name} was {before[name]} and is {now[name]}: {effect}")

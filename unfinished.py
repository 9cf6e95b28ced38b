"""The output of a long run while it is not finished: pieces that are whole or not there, and the run's settings.

    .<name>.part/settings.json              what the output depends on, to compare when the run goes on
    .<name>.part/piece-00000000.jsonl       one for each window of rows, in order

Killed at any moment, the run goes on behind the last piece; when all are there, they become the output. The name is the
output's without its ending: outputs that would share a summary share this folder and its lock, too.
"""

import contextlib
import json
from pathlib import Path

from command_line import UserError, read_json, remove, replacing
from table_files import piece_ending, stem, write_piece


class Unfinished:
    """The unfinished output of the table `output`, and the names of what belongs to the finished one."""

    def __init__(self, output):
        self.output = Path(output)
        self.folder = self.output.with_name(f".{stem(self.output)}.part")
        self.summary = self.output.with_name(f"{stem(self.output)}.summary.json")
        self.picture = self.output.with_name(f"{stem(self.output)}.label_counts.png")

    def check(self, resume, overwrite):
        """Raise UserError where a run may not write the output, or would replace something unasked."""
        if self.output.is_dir():
            raise UserError(f"--output {self.output}: is a folder; name a file")
        if overwrite:
            return
        if resume:
            before, _ = self.settings()
            if before is not None:
                check_same(before, {"output": self.output.name})
                return
        elif (self.folder / "settings.json").exists() and any(self.folder.glob("piece-*")):
            before, _ = self.settings()
            what, advice = "it", "pass --resume to go on with it, or --overwrite to start anew"
            if before["output"] != self.output.name:
                what = f"{before['output']}, with the same summary,"
                advice = "go on with that one, name another --output, or pass --overwrite to drop it"
            raise UserError(f"--output {self.output}: a run that writes {what} is not finished; {advice}")
        for path in (self.output, self.summary, self.picture):
            if path.exists():
                what = "exists" if path == self.output or self.output.exists() else "exists, of another output so named"
                raise UserError(f"{path}: {what}; pass --overwrite to replace it, or name another --output")

    def pieces(self):
        """Return the paths of the pieces that are there, in order, without a gap."""
        if not (self.folder / "settings.json").exists():
            return []
        found = []
        while (path := self._piece(len(found))).exists():
            found.append(path)
        return found

    def _piece(self, number):
        return self.folder / f"piece-{number:08d}{piece_ending(self.output)}"

    def settings(self):
        """Return (settings of the run to resume or None where there is none, whether it is finished)."""
        if (file := self.folder / "settings.json").exists():
            return _read(file), False
        if self.summary.exists() and self.output.exists():
            return _read(self.summary, "settings"), True
        return None, False

    @contextlib.contextmanager
    def started(self, settings, resumed=False):
        """Wrap a run with `settings`, a new one or one that goes on; one that fails at once leaves nothing.

        A new one removes the pieces of an earlier one.
        """
        if not resumed:
            self._clear()
        with replacing(self.folder / "settings.json") as part:
            part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        try:
            yield
        except BaseException:
            if not self.pieces():
                self.remove()
            raise

    def add(self, number, records, schema, added):
        """Write the piece of that number; it is on the disk, whole, when this returns."""
        with replacing(self._piece(number)) as part:
            write_piece(part, self.output, records, schema, added)

    def _clear(self):
        """Remove all but the lock. The settings go first: without them, pieces do not count."""
        remove(self.folder / "settings.json")
        for path in self.folder.iterdir():
            if path.name != ".lock":
                remove(path)

    def remove(self):
        """Remove the folder, the lock of this process with it."""
        self._clear()
        remove(self.folder)


def _read(file, *keys):
    """Return the settings in a JSON file, behind `keys`; raise UserError where there are none."""
    try:
        found = read_json(file.read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        if not isinstance(found, dict) or "output" not in found:
            raise ValueError("no settings")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not what predict.py wrote; start anew with --overwrite") from error
    return found


def check_same(before, now, free=()):
    """Raise UserError where a run with the settings `now` would not go on as the one with `before` began.

    A setting is a value, or a dict of value and sha256, of which the second counts. `free` names those that may differ.
    """
    for name, new in now.items():
        old = before.get(name)
        same = old == new
        if isinstance(new, dict) and isinstance(old, dict) and "sha256" in new:
            same = old.get("sha256") == new["sha256"]
        if name not in free and not same:
            raise UserError(
                f"--{name}: was {_shown(old)} when the run was started and is {_shown(new)} now; resume with the same, "
                "or start anew with --overwrite"
            )


def _shown(value):
    if isinstance(value, dict) and "sha256" in value:
        return f"{value.get('value')} (fingerprint {str(value['sha256'])[:12]})"
    return str(value)

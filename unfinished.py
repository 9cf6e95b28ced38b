"""The output of a long run while it is not finished: pieces that are whole or not there, and the run's settings.

    .<output>.part/settings.json            what the output depends on, to compare when the run goes on
    .<output>.part/piece-00000000.jsonl     one for each window of rows, in order

Killed at any moment, the run goes on behind the last piece; when all are there, they become the output.
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
        self.folder = self.output.with_name(f".{self.output.name}.part")
        self.summary = self.output.with_name(f"{stem(self.output)}.summary.json")
        self.picture = self.output.with_name(f"{stem(self.output)}.label_counts.png")

    def check(self, resume, overwrite):
        """Raise UserError where a run may not write the output, or would replace something unasked."""
        if self.output.is_dir():
            raise UserError(f"--output {self.output}: is a folder; name a file")
        if resume or overwrite:
            return
        if self.pieces():
            raise UserError(
                f"--output {self.output}: a run that writes it is not finished; pass --resume to go on with it, or "
                "--overwrite to start anew"
            )
        for path in (self.output, self.summary, self.picture):
            if path.exists():
                raise UserError(f"{path}: exists; pass --overwrite to replace it, or name another --output")

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
        for file, finished in ((self.folder / "settings.json", False), (self.summary, True)):
            if not file.exists() or (finished and not self.output.exists()):
                continue
            try:
                found = read_json(file.read_text(encoding="utf-8"))
                found = found["settings"] if finished else found
                return dict(found), finished
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file}: not what predict.py wrote; start anew with --overwrite") from error
        if self.output.exists():
            raise UserError(f"{self.output}: exists, and no run that could go on; pass --overwrite to replace it")
        return None, False

    @contextlib.contextmanager
    def started(self, settings):
        """Wrap a new run with `settings`, or with None one that goes on; a new one that fails at once leaves nothing.

        The pieces of an earlier one are removed.
        """
        if settings is not None:
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


def check_same(before, now, free):
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

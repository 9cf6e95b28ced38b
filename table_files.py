"""Tables of any size in JSON lines, CSV or Parquet, compressed or not: read row by row, written piece by piece.

    Source("comments.jsonl.gz").rows()     every row as a dict, with the file and the line it stands in
    ColumnTypes                            the types of the columns where the output is Parquet
    write_piece, write_table               pieces of the output, and the pieces put together

Only a few rows are in memory at any time. Values are kept: those of JSON as they are, those of CSV as text, those of
Parquet with their types where the output is Parquet, too.
"""

import base64
import bisect
import bz2
import contextlib
import csv
import datetime
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import zlib
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from command_line import UserError, hub_errors
from rows import looks_local, read_object

SPLIT = "train"  # that is read of a Hub data set
CHANGED = "has changed while it was read; go on with --resume once it is what it was, or start anew with --overwrite"
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
_NO_ARRAY = (pa.ArrowException, OverflowError, UnicodeError)  # what Arrow says of values that no type or this one holds
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # that CSV files have instead of commas
_KNOWN = "JSON lines (.jsonl, .ndjson, .json), CSV (.csv), both also as .gz, .bz2, .xz or .zst, or Parquet (.parquet)"
_READ_AT_ONCE, _READ_BUFFER = 1024, 1 << 20  # rows of a Parquet file, bytes of each of its columns
_UNREADABLE = (ValueError, OverflowError, KeyError, pa.ArrowException)  # text that is no UTF-8, years after 9999


def file_format(path):
    """Return ("jsonl", "csv" or "parquet"; ".gz", ".bz2", ".xz", ".zst" or "") by a file's name, or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    return None if kind is None or (packed and kind == "parquet") else (kind, packed)


def stem(path):
    """Return a file's name without the endings of its format and compression."""
    kind, packed = file_format(path)
    name = path.name[: len(path.name) - len(packed)]
    return name.removesuffix(Path(name).suffix)


def check_format(option, path):
    """Raise UserError, which names `option`, where a file's name says no format that can be read and written."""
    if file_format(path) is None:
        raise UserError(f"{option} {path}: its name says no known format; known are {_KNOWN}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Source:
    """The rows of a file, of all files of a folder that can be read, by name, or of a split of a Hub data set.

    `left_out` lists what is not read of a folder, but for hidden files.
    """

    def __init__(self, name, split=None):
        self.name, self.split, self.files, self.revision = str(name), split or SPLIT, [], None
        self.left_out, self._seen = [], {}
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name[0] != ".")
            self.files = [file for file in found if file.is_file() and file_format(file)]
            self.left_out = [file.name + "/" * file.is_dir() for file in found if file not in self.files]
            if not self.files:
                raise UserError(f"--input {name}: has no file in a known format; known are {_KNOWN}")
        elif path.exists():
            check_format("--input", path)
            if not path.is_file():
                raise UserError(f"--input {name}: is a pipe or a device, which is read once; save its rows to a file")
            self.files = [path]
        elif looks_local(self.name) or file_format(path):
            raise UserError(f"--input {name}: no such file or folder")
        else:
            with hub_errors(self.name, "data set"):
                self.revision = HfApi().dataset_info(self.name).sha
        if split is not None and self.revision is None:
            raise UserError(f"--split {split}: {name} is no data set of the Hub; leave out --split")

    def rows(self, skip=0):
        """Yield (place, record) for every row after the first `skip`; a place is "file line 3".

        Raises UserError for the first line that holds no row, and for a file that is damaged.
        """
        if self.revision is None:
            yield from itertools.islice(itertools.chain.from_iterable(map(read_file, self.files)), skip, None)
            return
        with _hub_data_errors(self.name):
            stream = datasets.load_dataset(self.name, split=self.split, revision=self.revision, streaming=True)
            for number, record in enumerate(stream.skip(skip), start=skip):
                yield f"{self.name} {self.split} row {number}", record

    def is_parquet(self):
        """Return whether all files are Parquet, which says the types of its columns."""
        return bool(self.files) and all(file_format(file)[0] == "parquet" for file in self.files)

    def size(self):
        """Return the number of bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def remember(self):
        """Take note of the files' sizes and times, for `check_unchanged`."""
        self._seen = {file: _state(file) for file in self.files}

    def check_unchanged(self):
        """Raise UserError where a file is no longer what it was when `remember` was called."""
        for file, seen in self._seen.items():
            if _state(file) != seen:
                raise UserError(f"{file}: {CHANGED}")

    def fingerprint(self):
        """Return a SHA-256 over the files' names and contents, or the commit of a Hub data set and the split."""
        if self.revision is not None:
            return hashlib.sha256(f"{self.name} {self.split} {self.revision}".encode()).hexdigest()
        digests = []
        for file in self.files:
            with _reading_errors(file), open(file, "rb") as stream:
                digests.append([file.name, hashlib.file_digest(stream, "sha256").hexdigest()])
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _state(file):
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _hub_data_errors(name):
    """Turn what goes wrong in streaming a data set of the Hub into a one-line error."""
    try:
        with hub_errors(name, "data set"):
            yield
    except (datasets.exceptions.DatasetsError, StopIteration, ValueError) as error:
        raise UserError(f"data set {name}: cannot be read ({error.__cause__ or error}); name other data") from error


def read_file(path):
    """Yield (place, record) for every row of a file; raises UserError for what is none."""
    kind, packed = file_format(path)
    with _reading_errors(path):
        if kind == "parquet":
            yield from _parquet_rows(path)
            return
        with _OPENERS.get(packed, lambda path: open(path, "rb"))(path) as stream:
            yield from (_json_lines if kind == "jsonl" else _csv_rows)(path, stream)


@contextlib.contextmanager
def _reading_errors(path):
    """Turn what goes wrong in reading a file into a UserError that names it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            reason = error.strerror or error
            raise UserError(f"{path}: cannot read it ({reason}); make it readable, or name another --input") from error
        advice = ", or unpack it first if it was packed with zstd --long" if str(path).endswith(".zst") else ""
        raise UserError(
            f"{path}: damaged, cut short or not what its name says ({error}); make it anew{advice}"
        ) from error


def _parquet_rows(path):
    # Without these options Arrow reads the columns of a whole row group, often the whole file, into memory at once.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BUFFER) as file:
        _refuse_twice(file.schema_arrow.names, path)
        number = 0
        for batch in file.iter_batches(batch_size=_READ_AT_ONCE):
            try:
                records = batch.to_pylist()
            except _UNREADABLE as error:
                raise _unreadable(path, batch, number) from error
            for record in records:
                yield f"{path} row {number}", record
                number += 1


def _unreadable(path, batch, start):
    """Return the UserError for the first value of `batch`, from row `start` on, that Python cannot hold."""
    for row, name in itertools.product(range(batch.num_rows), batch.schema.names):
        try:
            batch[name][row].as_py()
        except _UNREADABLE as error:
            return UserError(f"{path} row {start + row}: the value of {name!r} cannot be read ({error}); correct it")
    return UserError(f"{path}: rows {start} to {start + batch.num_rows - 1} cannot be read; correct them")


def _refuse_twice(columns, path):
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} stands twice in it; rename one")


def _json_lines(path, stream):
    for number, line in enumerate(stream, start=1):
        if number == 1:
            encoding = json.detect_encoding(line)
            if not encoding.startswith("utf-8"):
                raise UserError(f"{path}: is {encoding[:6].upper()} text; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record = read_object(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}; each line must be one JSON object") from error
        yield f"{path} line {number}", record


def _csv_rows(path, stream):
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131,072 characters that are usual
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    columns, line, blank = None, 1, []
    try:
        for values in reader:
            if columns is None:
                if values:
                    columns = _csv_header(path, values)
            elif not values:
                blank.append(line)
            else:
                if len(columns) == 1:  # where a blank line is a row with an empty value, unless the file ends there
                    for number in blank:
                        yield f"{path} line {number}", {columns[0]: ""}
                blank.clear()
                if len(values) != len(columns):
                    raise UserError(
                        f"{path} line {line}: has {len(values)} values for {len(columns)} columns; a value with a "
                        "comma or a line break must stand in quotes"
                    )
                yield f"{path} line {line}", dict(zip(columns, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {line}: not CSV ({error}); correct it there") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} after line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _csv_header(path, columns):
    """Return the columns' names, once they look like those of a CSV file with commas."""
    if columns[0].lstrip().startswith("{"):
        raise UserError(f"{path}: holds JSON lines; give it a name that ends in .jsonl")
    if len(columns) == 1 and (found := [name for mark, name in _SEPARATORS.items() if mark in columns[0]]):
        raise UserError(f"{path}: its values are separated by {found[0]}; save it with commas")
    _refuse_twice(columns, path)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# The types of Parquet's columns


class ColumnTypes:
    """The types of a Parquet table's columns, `types`, by all rows that are to stand in it.

    `widened` says that a column's type is not that of all of its values: `check` finds those that do not fit.
    """

    def __init__(self):
        self.types, self.widened = {}, False

    def schema(self):
        """Return the Arrow schema."""
        return pa.schema(self.types.items())

    def add_file(self, path):
        """Take in the columns of a Parquet file; raise UserError where their types do not go with those before."""
        with _reading_errors(path):
            schema = pq.read_schema(path)
        _refuse_twice(schema.names, path)
        self.add_schema(schema, path)

    def add_schema(self, schema, path):
        """Take in the columns of a schema, the one of `path`."""
        for field in schema:
            try:
                self._add(field.name, field.type)
            except pa.ArrowException as error:
                raise _mixed(f"{path}: column {field.name!r}", error) from error

    def add(self, window):
        """Take in the columns of `window`, a list of (place, record); raise UserError, with the row, as above."""
        for name in dict.fromkeys(name for _, record in window for name in record):
            values = [record.get(name) for _, record in window]
            try:
                self._add(name, pa.array(values).type)
            except _NO_ARRAY as error:
                raise _mixed(f"{window[self._first_misfit(name, values)][0]}: column {name!r}", error) from error

    def _add(self, name, kind):
        known = self.types.get(name, kind)
        self.types[name] = wider = _wider_type(known, kind)
        self.widened |= any(wider != of and not pa.types.is_null(of) for of in (known, kind))

    def _first_misfit(self, name, values):
        """Return the first row whose value is of no type that goes with those of the rows before it."""

        def misfits(count):
            try:
                kind = pa.array(values[:count]).type
                _wider_type(self.types.get(name, kind), kind)
            except _NO_ARRAY:
                return True
            return False

        return bisect.bisect_left(range(1, len(values)), True, key=misfits)

    def check(self, window):
        """Raise UserError for a row of `window` with a value that the types do not hold, such as a too large number."""
        try:
            pa.table([[record.get(name) for _, record in window] for name in self.types], schema=self.schema())
        except _NO_ARRAY:
            for (place, record), (name, kind) in itertools.product(window, self.types.items()):
                try:
                    pa.array([record.get(name)], type=kind)
                except _NO_ARRAY as error:
                    raise _mixed(f"{place}: column {name!r}", error) from error
            raise


def _wider_type(one, other):
    """Return the Arrow type that holds the values of both types; raises ArrowException where there is none."""
    if one == other:
        return one
    schemas = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, other)]
        if plain == [one, other]:
            raise
    return _wider_type(*plain)


def _array(values, kind=None):
    """Return the Arrow array of `values`, of type `kind` or the one that fits; an empty struct in it becomes null."""
    array = pa.array(values, type=kind)
    known = _without_empty_structs(array.type)
    if known == array.type:
        return array
    return pa.array([_without_empty_dicts(value, array.type) for value in values], type=known)


def _without_empty_structs(kind):
    """Return an Arrow type with null for structs without fields, which Parquet does not know."""
    if pa.types.is_struct(kind):
        fields = [field.with_type(_without_empty_structs(field.type)) for field in kind]
        return pa.struct(fields) if fields else pa.null()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_empty_structs(kind.value_type)))
    return kind


def _without_empty_dicts(value, kind):
    """Return a value of the Arrow type `kind` as `_without_empty_structs` makes that."""
    if value is not None and pa.types.is_struct(kind):
        return {field.name: _without_empty_dicts(value.get(field.name), field.type) for field in kind} or None
    if value is not None and pa.types.is_list(kind):
        return [_without_empty_dicts(part, kind.value_type) for part in value]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def piece_ending(output):
    """Return the ending of the names of the files that `write_piece` writes for the table `output`."""
    return ".parquet" if file_format(output)[0] == "parquet" else ".jsonl"


def write_piece(path, output, records, schema, added):
    """Write `records` (dicts) to a file that `write_table` reads for the table `output`: Parquet or JSON lines.

    The Arrow schemas `schema` (of the input, None where not known) and `added` (of the columns beside the input's) give
    the types of Parquet's columns; others get that of their values. Raises UserError where these do not agree.
    """
    if piece_ending(output) == ".parquet":
        table = _table(records, schema, added)
        with _parquet_errors(output):
            pq.write_table(table, path)
        return
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(_json(record) + "\n" for record in records)


def _json(record):
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)


def _plain(value):
    """Return what JSON has for a value of Parquet: null for NaN and infinity, texts for all that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int) else str(value)


def _table(records, schema, added):
    """Return `records` as an Arrow table; see `write_piece`."""
    types = {field.name: field.type for field in (*(schema or []), *added)}
    names = dict.fromkeys(name for record in records for name in record) if schema is None else types
    arrays = {}
    for name in names:
        try:
            arrays[name] = _array([record.get(name) for record in records], types.get(name))
        except _NO_ARRAY as error:
            raise _mixed(f"column {name!r}", error) from error
    return pa.table(arrays)


def _mixed(what, error):
    return UserError(
        f"{what}: its values are of kinds that one Parquet column cannot hold ({str(error).splitlines()[0]}); name an "
        "--output that ends in .jsonl"
    )


@contextlib.contextmanager
def _parquet_errors(output):
    """Turn what Arrow says of values or types that Parquet does not know into a UserError."""
    try:
        yield
    except pa.ArrowException as error:
        raise UserError(
            f"{output}: Parquet cannot hold these rows ({str(error).splitlines()[0]}); name an --output that ends in "
            ".jsonl"
        ) from error


def write_table(path, output, pieces, last, read=lambda record: None):
    """Write the rows of `pieces`, files of `write_piece`, to `path` in the format that the name of `output` says.

    The columns stand in the order in which they are met, those of the list `last` behind all others. `read(record)` is
    called for every row. The same pieces give the same bytes.
    """
    kind, packed = file_format(output)
    if kind == "parquet":
        _write_parquet(path, output, pieces, last, read)
        return
    with _packed_stream(path, packed) as stream:
        if kind == "jsonl":
            for line, record in _records(pieces):
                read(record)
                stream.write(line)
            return
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        columns = _ordered((name for _, record in _records(pieces) for name in record), last)
        writer = csv.writer(text)
        writer.writerow(columns)
        for _, record in _records(pieces):
            read(record)
            writer.writerow([_cell(record.get(name)) for name in columns])
        text.detach()


def _ordered(names, last):
    names = dict.fromkeys(names)
    return [*(name for name in names if name not in last), *last]


@contextlib.contextmanager
def _piece_errors(piece):
    """Turn what a damaged piece brings about into a UserError that names it."""
    try:
        yield
    except (ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{piece}: damaged ({reason}); start anew with --overwrite") from error


def _records(pieces):
    """Yield (line, record) of JSON-lines pieces."""
    for piece in pieces:
        with _piece_errors(piece), open(piece, "rb") as file:
            for line in file:
                yield line, json.loads(line)


def _cell(value):
    """Return a value as CSV has it: texts as they are, nothing for null, all else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _write_parquet(path, output, pieces, last, read):
    types = ColumnTypes()
    for piece in pieces:
        with _piece_errors(piece):
            piece_schema = pq.read_schema(piece)
        types.add_schema(piece_schema, output)
    schema = pa.schema([(name, types.types[name]) for name in _ordered(types.types, last) if name in types.types])
    with _parquet_errors(output), pq.ParquetWriter(path, schema) as writer:
        for piece in pieces:
            with _piece_errors(piece):
                table = pq.read_table(piece)
            for record in table.to_pylist():
                read(record)
            whole = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
            writer.write_table(whole.select(schema.names).cast(schema))


@contextlib.contextmanager
def _packed_stream(path, packed):
    """Yield a binary stream to write to, packed as `packed` says; nothing in it depends on the time or the name."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "wb"))
        if packed == ".gz":
            file = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))
        elif packed == ".zst":
            file = stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(file), "zstd"))
        elif packed:
            file = stack.enter_context({".bz2": bz2, ".xz": lzma}[packed].open(file, "wb"))
        yield file
        file.flush()

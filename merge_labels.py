"""Merge the labels of a JSON-lines file into fewer ones.

python merge_labels.py daccord_yifei_v2_leo.json --scheme supp-anti-oth
python merge_labels.py comments.json --merge '{"for": ["strongly for", "for"], "rest": ["unsure", "off topic"]}'
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from command_line import CommandParser, UserError, one_line_errors, read_json, replacing
from prompts import fold_label
from rows import refuse_rows, scan_json_lines, shown

_OTHER = ["Not Relevant", "Not Sure"]
_FOUR = {
    "support gun polarized": ["Support Gun Polarized"],
    "support gun non-polarized": ["Support Gun non-Polarized"],
    "anti gun polarized": ["Anti Gun Polarized"],
    "anti gun non-polarized": ["Anti Gun non-Polarized"],
}

SCHEMES = {
    "supp-anti-oth": {
        "support gun": ["Support Gun Polarized", "Support Gun non-Polarized"],
        "anti gun": ["Anti Gun Polarized", "Anti Gun non-Polarized"],
        "other": [*_OTHER, "Neutral"],
    },
    "pol-unpol-oth": {
        "polarized": ["Support Gun Polarized", "Anti Gun Polarized"],
        "unpolarized": ["Support Gun non-Polarized", "Anti Gun non-Polarized"],
        "other": [*_OTHER, "Neutral"],
    },
    "5labels-oth": {**_FOUR, "other": [*_OTHER, "Neutral"]},
    "6labels-keep-neu": {**_FOUR, "neutral": ["Neutral"], "other": _OTHER},
}


def build_parser():
    parser = CommandParser(prog="merge_labels.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="a JSON-lines file: one object a line")
    groups = parser.add_mutually_exclusive_group(required=True)
    groups.add_argument("--scheme", choices=SCHEMES, help="a merge of the published study")
    groups.add_argument("--merge", metavar="JSON", help='your own: \'{"new label": ["old label", ...], ...}\'')
    parser.add_argument("--field", default="User label", help="the field that holds the label")
    parser.add_argument("--output", help="where to write (default: FILE's name with the scheme's, or _merged, added)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists; never FILE itself")
    return parser


def parse_merge(text):
    """Return the groups {new label: [old labels]} of a --merge option; raises UserError where it is not that."""
    try:
        groups = read_json(text)
    except ValueError as error:
        raise UserError(f"--merge: not JSON ({error})") from error
    if not isinstance(groups, dict) or not groups:
        raise UserError('--merge: must be an object like {"new label": ["old label", "old label"]}')
    for label, members in groups.items():
        texts = [label, *members] if isinstance(members, list) else [None]
        if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"--merge: the group {label!r} must be a list of old labels, each a text that is not empty")
    return groups


def new_labels(groups):
    """Return {old label, as `fold_label` gives it: new label} for groups {new label: [old labels]}.

    Raises UserError where the groups contradict each other: an old label in two of them, two new labels that are
    spellings of one, or a new label that another group replaces, since no row is merged twice.
    """
    names, new_label = {}, {}
    for label, members in groups.items():
        other = names.setdefault(fold_label(label), label)
        if other != label:
            raise UserError(
                f"--merge: the groups {other!r} and {label!r} are spellings of one label; make them one group"
            )
        for member in members:
            if new_label.setdefault(fold_label(member), label) != label:
                other = new_label[fold_label(member)]
                raise UserError(
                    f"--merge: label {member!r} is in two groups, {other!r} and {label!r}; take it out of one"
                )
    for folded, label in names.items():
        other = new_label.get(folded, label)
        if other != label:
            raise UserError(
                f"--merge: {label!r} is a group and an old label of the group {other!r}, but no row is merged twice; "
                f"rename the group {label!r}, or merge in two runs"
            )
    return new_label


def merge_records(records, groups, field, source):
    """Return copies of `records` with `field` replaced by the name of its group; other fields and the order stay.

    `records` are pairs of a place, which names the row in errors, and a dict, or the ValueError that says why there is
    none; `groups` is {new label: [old labels]}. Raises UserError for groups that contradict each other, for all rows
    without a label of a group at once, and for a group's labels that no row has.
    """
    new_label = new_labels(groups)
    merged, seen, problems = [], set(), []
    for place, record in records:
        value = record.get(field) if isinstance(record, dict) else None
        if isinstance(record, ValueError):
            problems.append(f"{place}: {record}")
        elif not isinstance(value, str):
            problems.append(f"{place}: no text in the field {field!r}")
        elif fold_label(value) not in new_label:
            problems.append(f"{place}: label {shown(value)} is in no group")
        else:
            seen.add(fold_label(value))
            merged.append({**record, field: new_label[fold_label(value)]})
    refuse_rows(
        problems, "correct the rows, name the label's field with --field, or name all labels in the groups of --merge"
    )
    missing = [repr(member) for members in groups.values() for member in members if fold_label(member) not in seen]
    if missing:
        raise UserError(
            f"{source}: no row has the label {' or '.join(missing)}; name the labels that it has with --merge"
        )
    return merged


def default_output(file, scheme):
    """Return the original's file name: daccord_yifei_v2_leo.json -> daccord_yifei_v2_leo_supp_anti_oth.json."""
    file = Path(file)
    return file.with_name(f"{file.stem}_{(scheme or 'merged').replace('-', '_')}{file.suffix}")


def check_output(file, output, overwrite):
    """Raise UserError where `output` is the input under any spelling, is a folder, or exists without --overwrite."""
    if output.exists() and output.samefile(file):
        raise UserError(f"--output {output}: is the input; the input is never overwritten")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists; pass --overwrite to replace it, or name another --output")


def format_counts(labels):
    """Return label counts as text, most frequent first: 'other 62, support gun 27'."""
    return ", ".join(f"{label} {count}" for label, count in Counter(labels).most_common())


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    groups = SCHEMES[args.scheme] if args.scheme else parse_merge(args.merge)
    lines = scan_json_lines(args.file)
    if not lines:
        raise UserError(f"{args.file}: has no rows; name another file")
    output = Path(args.output or default_output(args.file, args.scheme))
    check_output(args.file, output, args.overwrite)
    records = [(f"{args.file} line {number}", record) for number, record, _ in lines]
    merged = merge_records(records, groups, args.field, args.file)
    with replacing(output) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for record, (_, _, line) in zip(merged, lines, strict=True):
            # Letters beyond ASCII stay escaped or plain, as the line had them.
            file.write(json.dumps(record, ensure_ascii=line.isascii()) + "\n")
        shutil.copymode(args.file, part)  # who may not read the one may not read the other
    print(f"before: {format_counts(record[args.field] for _, record in records)}")
    print(f"after:  {format_counts(record[args.field] for record in merged)}")
    print(f"{len(merged)} rows written to {output}")


if __name__ == "__main__":
    raise SystemExit(main())

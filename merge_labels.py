"""Merge the labels of a JSON-lines file into fewer ones.

python merge_labels.py daccord_yifei_v2_leo.json --scheme supp-anti-oth
python merge_labels.py comments.json --merge '{"for": ["strongly for", "for"], "rest": ["unsure", "off topic"]}'
"""

import json
from collections import Counter
from pathlib import Path

from command_line import CommandParser, UserError, one_line_errors, replacing
from rows import read_json_lines

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
        groups = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise UserError(f"--merge: not JSON ({error})") from error
    if not isinstance(groups, dict) or not groups:
        raise UserError('--merge: must be an object like {"new label": ["old label", "old label"]}')
    for label, members in groups.items():
        texts = [label, *members] if isinstance(members, list) else [None]
        if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"--merge: the group {label!r} must be a list of old labels, each a text that is not empty")
    return groups


def _distinct(pairs):
    if len(dict(pairs)) < len(pairs):
        raise UserError("--merge: names a group twice")
    return dict(pairs)


def merge_records(records, groups, field, source):
    """Return copies of `records` with `field` replaced by the name of its group; other fields and the order stay.

    `records` are (place, dict) pairs, the place naming the row in errors; `groups` is {new label: [old labels]}, old
    labels compared after strip() and casefold(). Raises UserError for a label in two groups, a row whose label is in
    none, and a group's label that no row has.
    """
    new_label, spelled = {}, {}
    for label, members in groups.items():
        for member in members:
            key = member.strip().casefold()
            if new_label.setdefault(key, label) != label:
                raise UserError(f"label {member!r} is in two groups, {new_label[key]!r} and {label!r}")
            spelled[key] = member
    merged, seen = [], set()
    for place, record in records:
        value = record.get(field)
        if not isinstance(value, str):
            raise UserError(f"{place}: no text in the field {field!r}; name the label's field with --field")
        key = value.strip().casefold()
        if key not in new_label:
            raise UserError(f"{place}: label {value!r} is in no group")
        seen.add(key)
        merged.append({**record, field: new_label[key]})
    missing = [spelled[key] for key in new_label if key not in seen]
    if missing:
        raise UserError(f"{source}: no row has the label {missing[0]!r} that the merge names")
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
    lines = read_json_lines(args.file)
    if not lines:
        raise UserError(f"{args.file}: has no rows")
    output = Path(args.output or default_output(args.file, args.scheme))
    check_output(args.file, output, args.overwrite)
    records = [(f"{args.file} line {number}", record) for number, record, _ in lines]
    merged = merge_records(records, groups, args.field, args.file)
    with replacing(output) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for record, (_, _, line) in zip(merged, lines, strict=True):
            # Letters beyond ASCII stay escaped or plain, as the line had them.
            file.write(json.dumps(record, ensure_ascii=line.isascii()) + "\n")
    print(f"before: {format_counts(record[args.field] for _, record in records)}")
    print(f"after:  {format_counts(record[args.field] for record in merged)}")
    print(f"{len(merged)} rows written to {output}")


if __name__ == "__main__":
    raise SystemExit(main())

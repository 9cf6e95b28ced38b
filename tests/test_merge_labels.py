"""merge_labels.py on the published data, and its refusals."""

import json
from collections import Counter

import pytest
from conftest import shared, write_json_lines

import merge_labels

SCHEME_COUNTS = {
    "supp-anti-oth": {"support gun": 27, "anti gun": 24, "other": 62},
    "pol-unpol-oth": {"polarized": 35, "unpolarized": 16, "other": 62},
    "5labels-oth": {
        "support gun polarized": 16,
        "support gun non-polarized": 11,
        "anti gun polarized": 19,
        "anti gun non-polarized": 5,
        "other": 62,
    },
    "6labels-keep-neu": {
        "support gun polarized": 16,
        "support gun non-polarized": 11,
        "anti gun polarized": 19,
        "anti gun non-polarized": 5,
        "neutral": 8,
        "other": 54,
    },
}
RAW = "data/politosphere/daccord_yifei_v2_leo.json"


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("scheme", SCHEME_COUNTS)
def test_schemes_give_the_published_counts_and_touch_nothing_else(scheme, tmp_path, capsys):
    raw = shared(RAW)
    output = tmp_path / "merged.json"
    assert merge_labels.main([str(raw), "--scheme", scheme, "--output", str(output)]) == 0
    before, after = read(raw), read(output)
    assert Counter(record["User label"] for record in after) == SCHEME_COUNTS[scheme]
    for old, new in zip(before, after, strict=True):
        assert {**old, "User label": None} == {**new, "User label": None}
        assert list(old) == list(new)
    printed = capsys.readouterr().out
    assert "before: Not Relevant 34, Not Sure 20, Anti Gun Polarized 19" in printed
    assert all(f"{label} {count}" in printed.split("after:")[1] for label, count in SCHEME_COUNTS[scheme].items())


def test_supp_anti_oth_is_the_published_merge_byte_for_byte(tmp_path):
    output = tmp_path / "merged.json"
    merge_labels.main([str(shared(RAW)), "--scheme", "supp-anti-oth", "--output", str(output)])
    published = shared("data/politosphere/daccord_yifei_v2_leo_supp_anti_oth.json")
    assert output.read_bytes() == published.read_bytes()


@pytest.mark.parametrize("scheme", SCHEME_COUNTS)
def test_schemes_take_every_spelling_of_the_seven_labels(scheme, tmp_path):
    labels = ("Polarized", "non-Polarized", "Neutral", "Not Relevant", "not Sure")
    sides = [f"{side} Gun {label}" for side in ("Support", "ANTI") for label in labels[:2]]
    file = write_json_lines(tmp_path / "raw.json", [{"User label": f" {label}"} for label in (*sides, *labels[2:])])
    assert merge_labels.main([str(file), "--scheme", scheme]) == 0
    merged = read(merge_labels.default_output(file, scheme))
    assert {record["User label"] for record in merged} == set(SCHEME_COUNTS[scheme])


@pytest.fixture
def stances(tmp_path):
    records = [
        {"id": 1, "stance": "For ", "text": "ü"},
        {"id": 2, "stance": "against", "text": "\u2028"},
        {"id": 3, "stance": "unsure", "text": "x"},
    ]
    return write_json_lines(tmp_path / "stances.json", records)


def merge(file, groups, *options):
    return merge_labels.main([str(file), "--merge", json.dumps(groups), "--field", "stance", *map(str, options)])


GROUPS = {"clear": ["for", "Against"], "rest": ["unsure"]}


def test_own_merge_goes_to_a_file_beside_the_input(stances):
    assert merge(stances, GROUPS) == 0
    output = stances.with_name("stances_merged.json")
    assert [record["stance"] for record in read(output)] == ["clear", "clear", "rest"]


def test_default_output_is_named_as_the_original_did():
    name = merge_labels.default_output("data/daccord_yifei_v2_leo.json", "supp-anti-oth").as_posix()
    assert name == "data/daccord_yifei_v2_leo_supp_anti_oth.json"


def test_letters_beyond_ascii_keep_their_form(tmp_path):
    file = tmp_path / "stances.json"
    file.write_text('{"stance": "for", "t": "ü"}\n{"stance": "against", "t": "\\u00fc"}\n', encoding="utf-8")
    assert merge(file, {"clear": ["for", "against"]}) == 0
    merged = file.with_name("stances_merged.json").read_text(encoding="utf-8")
    assert merged == '{"stance": "clear", "t": "ü"}\n{"stance": "clear", "t": "\\u00fc"}\n'


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["for", "against"], "b": ["FOR", "unsure"]}, "label 'FOR' is in two groups, 'a' and 'b'"),
        ({"a": ["for", "against"]}, "stances.json line 3: label 'unsure' is in no group"),
        ({**GROUPS, "c": ["neutral"]}, "stances.json: no row has the label 'neutral'"),
        ({"clear": ["for", "against"], "for": ["unsure"]}, "'for' is a group and an old label of the group 'clear'"),
        ({"clear": ["for", "against"], "Clear": ["unsure"]}, "the groups 'clear' and 'Clear' are spellings of one"),
        ({"a": "for"}, "--merge: the group 'a' must be a list"),
        ({"a": []}, "--merge: the group 'a' must be a list"),
        ([], "--merge: must be an object"),
    ],
)
def test_wrong_merges_are_refused_in_one_line(stances, groups, message, capsys):
    before = stances.read_bytes()
    assert merge(stances, groups) == 2
    error = capsys.readouterr().err
    assert error.startswith("merge_labels.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert stances.read_bytes() == before
    assert [path.name for path in stances.parent.iterdir()] == ["stances.json"]


def test_the_input_is_never_overwritten_under_any_spelling(stances, capsys):
    before = stances.read_bytes()
    link = stances.with_name("link.json")
    link.symlink_to(stances)
    (stances.parent / "folder").symlink_to(stances.parent)
    hard_link = stances.with_name("hard.json")
    hard_link.hardlink_to(stances)
    through_folder = stances.parent / "folder" / stances.name
    for output in (
        stances,
        f"{stances.parent}/./../{stances.parent.name}/{stances.name}",
        link,
        hard_link,
        through_folder,
    ):
        assert merge(stances, GROUPS, "--output", output, "--overwrite") == 2
        assert "the input is never overwritten" in capsys.readouterr().err
        assert merge(output, GROUPS, "--output", stances, "--overwrite") == 2
        assert "the input is never overwritten" in capsys.readouterr().err
    assert stances.read_bytes() == before


def test_an_output_is_replaced_only_with_overwrite(stances, capsys):
    output = stances.with_name("out.json")
    output.write_text("mine")
    assert merge(stances, GROUPS, "--output", output) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert merge(stances, GROUPS, "--output", output, "--overwrite") == 0
    assert len(read(output)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b'{"stance": "for"}\n{"stance"\n', "line 2: not one JSON object"),
        (b"\n[1]\n", "line 2: not one JSON object"),
        (b'{"stance": "f\xfcr"}\n', "not UTF-8"),
        (b'{"label": "for"}\n', "line 1: no text in the field 'stance'"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, content, message, capsys):
    file = tmp_path / "stances.json"
    file.write_bytes(content)
    assert merge(file, GROUPS) == 2
    assert message in capsys.readouterr().err
    assert not file.with_name("stances_merged.json").exists()


def test_a_missing_file_and_a_missing_choice_are_said(tmp_path, capsys):
    assert merge(tmp_path / "none.json", GROUPS) == 2
    assert "none.json: cannot read it (No such file or directory)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        merge_labels.main([str(tmp_path / "none.json")])
    assert stop.value.code == 2
    assert "one of the arguments --scheme --merge is required" in capsys.readouterr().err


def test_a_private_file_stays_private(stances):
    stances.chmod(0o600)
    assert merge(stances, GROUPS) == 0
    assert stances.with_name("stances_merged.json").stat().st_mode & 0o777 == 0o600


def test_an_output_below_a_file_is_refused(stances, capsys):
    assert merge(stances, GROUPS, "--output", stances / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert "stances.json" in error and error.count("\n") == 1

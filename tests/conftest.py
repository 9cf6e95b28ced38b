"""What several test files use: the shared data where it exists, tokenizers, a tiny base model, a labelled file."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import modeling
import train

TOKEN = re.compile("hf_[A-Za-z0-9]{34}")
REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"


def shared(path):
    """Return a file of the shared material; skip where it is not at hand, as on a user's machine."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of the shared material, which is not part of the project")
    return SHARED / path


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return modeling.load_tokenizer("smollm2")


@pytest.fixture(scope="session")
def llama2_tokenizer():
    return AutoTokenizer.from_pretrained(shared("tokenizers/llama-2"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, smollm2_tokenizer):
    """A folder with a random Llama of 2 layers, with grouped-query attention, and SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(smollm2_tokenizer),
        bos_token_id=smollm2_tokenizer.bos_token_id,
        eos_token_id=smollm2_tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


def snapshot(folder):
    """Return {path: bytes, or None for a folder} of all that is in `folder`."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
        if path.name != ".lock"  # an empty file that says nothing
    }


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """A function that runs a command's main(argv), checks that it refuses as it should, and returns the line it said.

    It ends with 2 and one line, no traceback, no token, and leaves every file as it was.
    """
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 34)

    def run_refused(main, *argv, folder=tmp_path):
        before = snapshot(folder)
        capfd.readouterr()
        try:
            code = main([str(part) for part in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
        output = capfd.readouterr()
        lines = [line for line in output.err.splitlines() if ": error: " in line]
        assert code == 2, output
        assert len(lines) == 1 and output.err.splitlines()[-1] == lines[0], output.err
        assert lines[0].startswith(f"{main.__module__}.py: error: ")
        assert "Traceback" not in output.err
        assert not TOKEN.search(output.out + output.err)
        assert snapshot(folder) == before
        run_refused.printed = output.out + output.err
        return lines[0]

    return run_refused


def write_json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def train_on_words(folder, base, *options):
    """Write words.jsonl, 30 rows for the task sst2, to `folder` and train models/tiny on it there."""
    records = [
        {"sentence": f"{word} " * (1 + number % 7) + str(number), "label_text": label}
        for number in range(15)
        for word, label in (("good", "positive"), ("bad", "negative"))
    ]
    write_json_lines(folder / "words.jsonl", records)
    data = ["--base_model_name", str(base), "--task", "sst2", "--dataset_name", "words.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*data, "--adapters_name", "tiny", "--train_batch_size", "8", *options]) == 0


@pytest.fixture
def comments(tmp_path):
    """A JSON-lines file of 20 distinct sentences for the task sst2; the words give the label away."""
    words = ("fine", "great", "warm", "funny", "bright"), ("dull", "flat", "weak", "stale", "grim")
    records = [
        {"sentence": f"a {word} film , number {number} of its kind", "label_text": label}
        for number in range(2)
        for label, group in zip(("positive", "negative"), words, strict=True)
        for word in group
    ]
    return write_json_lines(tmp_path / "comments.jsonl", records)

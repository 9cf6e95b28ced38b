"""A trained adapter: where it is, whether it can be relied on, loading it on its base model.

Used by evaluate.py and predict.py; how models are loaded at all is modeling.py's.
"""

import argparse
import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download

import modeling
from command_line import UserError, hub_errors, not_empty


def add_adapter_options(parser):
    """Add the options that say which adapter a command uses, and whatever base model it may stand on."""
    parser.add_argument(
        "--adapters_name",
        type=not_empty,
        required=True,
        default=argparse.SUPPRESS,
        help="a name under models/, an adapter's folder, or an adapter on the Hub",
    )
    parser.add_argument(
        "--force", action="store_true", help="go on although the base model is not the one the adapter was trained on"
    )


def find_adapter(adapters_name):
    """Return (the adapter's folder, where its evaluation goes) for a name under models/, a folder or a Hub adapter."""
    parts = Path(adapters_name).parts
    if not adapters_name.isprintable() or not parts or Path(adapters_name).is_absolute() or ".." in parts:
        raise UserError(
            f"--adapters_name {adapters_name!r}: must be a name under models/, a folder below the current one (without "
            "'..'), or a Hub adapter; to use another folder, make a link to it in models/"
        )
    tried = [modeling.MODELS / adapters_name, Path(adapters_name)]
    for folder in tried:
        if (folder / "checkpoints" / "run.json").exists() and not (folder / "run.json").exists():
            raise UserError(f"{folder}: its training is not finished; go on with it: python train.py ... --resume")
        if (folder / "adapter_config.json").is_file():
            return check_files(folder), folder / "evaluation"
    if adapters_name.count("/") != 1 or Path(parts[0]).is_dir() or adapters_name.startswith("."):
        found = modeling.MODELS.glob("[!.]*/adapter_config.json")
        names = sorted(path.parent.name for path in found if (path.parent / "run.json").is_file())
        known = f"models/ has {', '.join(names)}" if names else "models/ has none"
        places = " and ".join(f"{folder}/" for folder in dict.fromkeys(tried))
        raise UserError(f"--adapters_name {adapters_name}: no adapter in {places} of {Path.cwd()}; {known}")
    with hub_errors(adapters_name, "adapter"):
        folder = Path(snapshot_download(adapters_name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.pkl", "*.py"]))
    return check_files(folder), modeling.MODELS / adapters_name / "evaluation"


def check_files(folder):
    """Return `folder`; raise UserError where it holds no adapter in safetensors."""
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").exists()
        what = ", only adapter_model.bin, a pickle, which could run code and is never loaded" if pickled else ""
        raise UserError(f"{folder}: has no adapter_model.safetensors{what}; train again or copy the whole folder")
    return folder


_GO_ON = "train it again on this one, or go on all the same with --force"


def check_base_name(folder, base_model):
    """Raise UserError where the adapter's own configuration names another base model than run.json (`base_model`)."""
    trained_on = modeling.read_adapter_config(folder).get("base_model_name_or_path")
    if trained_on != base_model["name"]:
        raise UserError(
            f"{folder}: the adapter was trained on {trained_on}, but run.json names {base_model['name']}; {_GO_ON}"
        )


def check_base_weights(folder, base_model):
    """Raise UserError where the base model, loaded before, has other weights than the adapter was trained on.

    An adapter fits any base model of the same shapes. Adapters of older versions have no fingerprint to compare.
    """
    trained_on = base_model.get("fingerprint")
    if trained_on is None:
        print(f"Note: {folder / 'run.json'} has no fingerprint of the base model, so its weights were not compared")
        return
    found = modeling.base_fingerprint(base_model["name"], base_model["revision"])
    if found != trained_on:
        raise UserError(
            f"{folder}: the adapter was trained on other weights or another config.json of {base_model['name']} "
            f"(fingerprint {trained_on[:12]}, here {found[:12]}); {_GO_ON}"
        )


def load_model(folder, run, *, force=False, base_only=False):
    """Return (model, tokenizer) of the adapter in `folder`, or with `base_only` of its base model alone.

    `run` is its run.json's dict. Raises UserError where the base model is not the one that it was trained on, which
    `force` does not look at.
    """
    base_model = run["base_model"]
    if not force:
        check_base_name(folder, base_model)
    modeling.check_memory(base_model["name"])
    tokenizer = modeling.load_tokenizer(str(folder))
    model = modeling.load_base_model(base_model["name"], base_model["revision"])
    if not force:
        check_base_weights(folder, base_model)
    return (model if base_only else modeling.load_adapter(model, folder)), tokenizer


def fingerprint(folder, run):
    """Return a SHA-256 over what the adapter in `folder` answers with: its weights, base model, task and row length."""
    with open(folder / "adapter_model.safetensors", "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256")
    base_model = {name: run["base_model"].get(name) for name in ("name", "revision", "fingerprint")}
    more = [base_model, run["task"], run["options"]["max_seq_length"]]
    digest.update(json.dumps(more, sort_keys=True).encode())
    return digest.hexdigest()


def probability_columns(task):
    """Return the names of the columns that hold the labels' probabilities, in the order of the labels."""
    return [f"p_{label}" for label in task.labels]

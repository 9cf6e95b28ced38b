"""Time and memory of the published job at Llama-2-13b's shape, with random weights, through train.py and evaluate.py.

Speed and memory do not depend on the values of the weights. Needs a GPU, 27 GB of disk, Llama 2's tokenizer and the
labelled file daccord_yifei_v2_leo.json:

python benchmarks/llama2_13b_job.py --tokenizer FOLDER --data daccord_yifei_v2_leo.json --work llama13b
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "llama2_13b_job.json"
SHAPE = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
TASK = ["--task", "politosphere-definitions"]


def make_model(folder, tokenizer_folder):
    """Save a model of the shape with random weights and Llama 2's tokenizer to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(**SHAPE, max_position_embeddings=4096, vocab_size=32000, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(script, *options, work):
    subprocess.run([sys.executable, str(ROOT / script), *options], cwd=work, check=True)


def train(name, options, base, data, work, epochs):
    """Train once and return the numbers of run.json that matter here."""
    fixed = ["--base_model_name", str(base), "--dataset_name", str(data), *TASK, "--epoch", str(epochs), "--overwrite"]
    run("train.py", *fixed, "--adapters_name", name, *options, work=work)
    result = json.loads((work / "models" / name / "run.json").read_text())
    seconds = result["seconds"] / epochs
    numbers = {key: result[key] for key in ("device", "versions", "compute_dtype", "peak_memory_gb")}
    return {"command": "train.py", "options": options, "seconds_per_epoch": round(seconds, 1), **numbers}


def evaluate(name, options, work):
    """Evaluate once and return the numbers of settings.json that matter here."""
    run("evaluate.py", "--adapters_name", name, *options, work=work)
    result = json.loads((work / "models" / name / "evaluation" / "sample" / "settings.json").read_text())
    return {"command": "evaluate.py", "options": options} | {
        key: result[key] for key in ("seconds", "peak_memory_gb", "device", "versions")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder of Llama 2's tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="daccord_yifei_v2_leo.json")
    parser.add_argument("--work", required=True, type=Path, help="an empty folder for the model and the adapters")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = work / "Llama-2-13b-shape"
    if not base.exists():
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, llama2_13b_job as job; job.make_model(*sys.argv[1:])",
                base,
                args.tokenizer.resolve(),
            ],
            cwd=Path(__file__).parent,
            check=True,
        )
    data = args.data.resolve()
    results = [
        train("plain", [], base, data, work, args.epochs),
        train("checkpointing", ["--gradient_checkpointing"], base, data, work, args.epochs),
        train(
            "batch-4", ["--train_batch_size", "4", "--gradient_accumulation_steps", "4"], base, data, work, args.epochs
        ),
        evaluate("plain", [], work),
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for result in results:
        print(json.dumps({key: value for key, value in result.items() if key != "versions"}))


if __name__ == "__main__":
    main()

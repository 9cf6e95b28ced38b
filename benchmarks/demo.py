"""Collect what `make demo` measured into benchmarks/results/demo.json.

make demo && .venv/bin/python benchmarks/demo.py
"""

import argparse
import json
from pathlib import Path

ADAPTER = Path("models/smollm2-demo")
RESULTS = Path(__file__).resolve().parent / "results" / "demo.json"


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    run = json.loads((ADAPTER / "run.json").read_text())
    evaluations = {}
    for folder in sorted((ADAPTER / "evaluation").iterdir()):
        metrics = json.loads((folder / "metrics.json").read_text())
        scores = {
            split: {key: values[key] for key in ("n", "accuracy", "macro_f1", "invalid")}
            for split, values in metrics.items()
        }
        evaluations[folder.name] = scores | {"seconds": json.loads((folder / "settings.json").read_text())["seconds"]}
    kept = ("options", "data", "device", "versions", "steps", "seconds", "peak_memory_gb")
    result = {key: run[key] for key in kept} | {"evaluation": evaluations}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["evaluation"], indent=2))


if __name__ == "__main__":
    main()

"""Collect what a cross-validation measured into benchmarks/results/: its numbers without sentences, and two pictures.

python benchmarks/cross_validation.py cross_validation/smollm2-supp-anti-oth-epoch20
"""

import argparse
import json
import shutil
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what cross_validate.py wrote")
    parser.add_argument(
        "--time_only", action="store_true", help="of a model with random weights, whose scores say nothing"
    )
    args = parser.parse_args()
    folder = args.folder
    if not (folder / "run.json").is_file():
        parser.error(f"{folder}: holds no finished cross-validation")
    run, metrics = (json.loads((folder / name).read_text()) for name in ("run.json", "metrics.json"))
    for option in ("base_model_name", "dataset_name"):  # not where they lie on this machine
        run["options"][option] = Path(run["options"][option]).name
    kept = ("options", "device", "compute_dtype", "versions", "seconds", "peak_memory_gb")
    name = f"cross-validation-{run['adapters_name']}"
    result = {key: run[key] for key in kept} | ({} if args.time_only else metrics)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.time_only:
        return
    for picture in ("scores_over_epochs", "comparison"):
        shutil.copy(folder / f"{picture}.png", RESULTS / f"{name}-{picture.replace('_', '-')}.png")


if __name__ == "__main__":
    main()

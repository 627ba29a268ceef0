"""Ships the last policy of the seed with the median score of each task, as `pretrained/<environment>`.

    python benchmarks/pretrained.py [--results benchmarks/learning] [--root runs/benchmark]

Takes what `python scripts/benchmark.py learn` left: results under `--results`, runs under `--root`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from trpo.benchmark.learning_results import load_results

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "learning")
    parser.add_argument("--root", type=Path, default=HERE.parent / "runs" / "benchmark")
    parser.add_argument("--out", type=Path, default=HERE.parent / "pretrained")
    args = parser.parse_args()
    shipped, missing = {}, []
    for task, runs in load_results(args.results).items():
        runs = sorted(runs, key=lambda run: float(np.mean(run["returns"])))
        median = runs[(len(runs) - 1) // 2]  # the lower one of two
        found = list(args.root.glob(f"{task}-{median['fingerprint']}/*/*/final"))
        if not found:
            missing.append(f"{task}: no finished run {median['fingerprint']} under {args.root}")
            continue
        target = args.out / median["environment"]
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(found[0], target)
        score = {"mean": round(float(np.mean(median["returns"])), 1), "std": round(float(np.std(median["returns"])), 1)}
        shipped[median["environment"]] = {
            "seed": median["seed"], "of_seeds": len(runs), **score, "episodes": len(median["returns"])
        }  # fmt: skip
        print(f"{target}: seed {median['seed']} of {len(runs)}, {score['mean']}")
    index = args.out / "index.json"
    if index.exists():
        shipped = json.loads(index.read_text()) | shipped
    index.write_text(json.dumps(dict(sorted(shipped.items())), indent=1) + "\n")
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

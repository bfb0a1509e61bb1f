"""
Give the checkpoints that the exercises start from short names, in the folder of distill.py:

    python exercises/start.py                  # those of python sweep.py, which are in out/laptop: seed 71
    python exercises/start.py out/second 72    # those of a sweep with another seed and another --out
"""
import shutil
import sys
from pathlib import Path

folder = sys.argv[1] if len(sys.argv) > 1 else "out/laptop"
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 71
student = f"s@1.5M_seed_{seed}"
runs = {"alone": student, "twice": f"s@3M_seed_{seed}", "bigram": "bigram@8M_seed_2000",
        "weak": "xs@2M_seed_2000", "strong": "s@8M_seed_2000"}
for teacher in ("bigram", "weak", "strong"):
    for alpha in ("0.1", "0.25", "0.5", "1"):
        runs[f"from_{teacher}_{alpha}"] = f"{student}_from_{runs[teacher]}_alpha_{alpha}"
paths = {name: Path(folder, "runs", run, "ckpt.pt") for name, run in runs.items()}
paths["other"] = Path("out/laptop/runs", f"s@1.5M_seed_{71 if seed == 72 else 72}", "ckpt.pt")

missing = 0
for name, path in paths.items():
    if path.exists():
        shutil.copy(path, f"out/{name}.pt")
    else:
        missing += 1
        print(f"not there: {path}")
print(f"{len(paths) - missing} of {len(paths)} checkpoints are in out/."
      + (" A sweep makes the others: run it to its end in this folder." if missing else ""))

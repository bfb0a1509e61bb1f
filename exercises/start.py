"""
Give the checkpoints that the exercises start from short names:

    python exercises/start.py          # in the folder of distill.py, after python sweep.py
    python exercises/start.py 52       # the same, for the students of another seed
"""
import shutil
import sys

seed = int(sys.argv[1]) if len(sys.argv) > 1 else 51
student = f"s@1.5M_seed_{seed}"
names = {"alone": student, "twice": f"s@3M_seed_{seed}", "other": f"s@1.5M_seed_{52 if seed == 51 else 51}",
         "bigram": "bigram@8M_seed_1000", "weak": "xs@2M_seed_1000", "strong": "s@8M_seed_1000"}
for teacher in ("bigram", "weak", "strong"):
    for alpha in ("0.1", "0.25", "0.5", "1"):
        names[f"from_{teacher}_{alpha}"] = f"{student}_from_{names[teacher]}/alpha_{alpha}"
missing = 0
for name, run in names.items():
    try:
        shutil.copy(f"out/laptop/runs/{run}/ckpt.pt", f"out/{name}.pt")
    except FileNotFoundError as e:
        missing += 1
        print(f"not there: {e.filename}")
print(f"{len(names) - missing} of {len(names)} checkpoints are in out/."
      + (" python sweep.py, run to its end in this folder, makes the others." if missing else ""))

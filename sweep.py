"""
Teachers x alphas x seeds -> the three findings, with intervals, one table, one figure.

    python sweep.py                                    # --scale laptop: the main job, 15 to 30 minutes
    python sweep.py --scale smoke                      # the same path in under a minute: too small to find
    python sweep.py --student xs:1.5M --seeds 1,2,3,4  # another student, more seeds
    python sweep.py --scale full --dry_run             # every run with its FLOPs, and nothing done
    python sweep.py --report results/full              # table, verdicts, figure from a results.jsonl alone

Prepares the corpus; trains every teacher once, the student alone on half, once and twice its tokens, and a
student for each teacher, alpha and seed; evaluates each. Writes below --out: results.jsonl (a line a model),
report.md and findings_STUDENT.png, anew after each seed, and runs/ with the checkpoints. Interrupt it when
you like: the same command goes on. Models are named size@tokens. `outside` is the mean over the ood sets; a
gain is how much lower a loss is than that of the student alone of the same seed, in nats per token.

Follows "Strong Teacher Not Needed? On Distillation in LLM Pretraining", arXiv 2605.23857.
"""
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, count, load_meta, make_parser, prepare, run
from distill import Config, checkpoint_path, flops_of, train
from eval import evaluate
from model import SIZES, GPTConfig, flops_per_token, load_checkpoint, pick_device

K, M, BILLION = 2**10, 2**20, 10**9
TIMES = (0.5, 1, 2)                  # the student alone is trained on so many times its tokens
KNOWS_NOTHING = 4 * K                # tokens up to which a teacher is a control, that counts in no rule
ONE_GPU = dict(batch_size=8, accumulate=16, block_size=1024, lr=1e-3, warmup=0.05)
PAPER = dict(batch_size=8, accumulate=16, block_size=8192, lr=3e-4, warmup=0.05)


@dataclass
class Scale:
    """One experiment."""
    student: tuple                   # (size, tokens)
    teachers: tuple                  # of (size, tokens)
    alphas: tuple = (0.25, 0.5, 1.0)
    seeds: tuple = (1, 2, 3)         # of a student's weights and data order
    teacher_sets: int = 1            # seed n learns from the teachers of seed 1000 + n % teacher_sets
    vocab_size: int = 512
    corpus: str = "python"           # a folder of data/
    training: dict = field(default_factory=dict)       # what differs from Config's defaults
    windows: int = 256               # evaluated in each half of a set
    items: int = 500                 # and of the task


SCALES = {
    "smoke": Scale(("s", 32 * K), (("xs", 8 * K), ("xs", 64 * K), ("s", 64 * K), ("m", 64 * K)), (0.25, 1.0),
                   training={"compile": False}, windows=16, items=50),
    "laptop": Scale(("s", 3 * M // 2),
                    (("xs", 2 * M), ("s", 1 * M), ("xs", 8 * M), ("s", 8 * M), ("m", 8 * M))),
    # xs at 1K is a control: one step of training, a teacher that knows nothing
    "full": Scale(("s", 3 * M // 2),
                  (("xs", 1 * K), *((size, n * M) for size in ("xs", "s") for n in (1, 2, 8)), ("m", 8 * M),
                   ("l", 8 * M)), seeds=tuple(range(11, 19)), teacher_sets=2),
    "gpu": Scale(("124M", 256 * M),
                 (("30M", 512 * M), ("124M", 64 * M), ("124M", 512 * M), ("350M", 512 * M)),
                 vocab_size=50_304, corpus="fineweb-edu", training=ONE_GPU),
    "paper": Scale(("1.7B", 50 * BILLION),
                   tuple((size, n * BILLION) for size in ("0.7B", "1.7B", "3.8B", "8B")
                         for n in (10, 30, 50, 80, 100, 300)),
                   (0.2, 0.4, 0.5, 0.6, 0.8, 1.0), vocab_size=128_256, corpus="fineweb-edu", training=PAPER),
}


def name(model):
    """(size, tokens) -> 'm@1.5M'."""
    size, tokens = model
    for unit, n in (("B", 2**30), ("M", M), ("K", K)):
        if tokens >= n:
            return f"{size}@{tokens / n:.4g}{unit}"
    return f"{size}@{tokens}"


# ------------------------------------------------------------------------------
# the runs

@dataclass(frozen=True)
class Run:
    """One call of train(): a model alone, or a student for each alpha from one teacher."""
    kind: str                        # "teacher" or "student"
    size: str
    tokens: int
    seed: int
    teacher: "Run" = None
    alphas: tuple = (0.0,)

    def __str__(self):
        taught = f"_from_{name((self.teacher.size, self.teacher.tokens))}" if self.teacher else ""
        return f"{self.kind}_{name((self.size, self.tokens))}{taught}_seed_{self.seed}"

    def config(self, scale, data, out, **how):
        """The Config that trains it; its teacher's checkpoint is found by the name of that run."""
        teacher = checkpoint_path(self.teacher.config(scale, data, out), 0.0) if self.teacher else ""
        return Config(data=data, out=f"{out}/runs/{self}", size=self.size, tokens=self.tokens, seed=self.seed,
                      teacher=teacher, alpha=self.alphas, **scale.training, **how)

    def cost(self, scale):
        """FLOPs of its training."""
        shapes = [GPTConfig(scale.vocab_size, Config(**scale.training).block_size, **SIZES[r.size])
                  for r in (self, self.teacher) if r]
        return self.tokens * flops_of(shapes[0], self.alphas, shapes[1] if self.teacher else None)

    def keys(self):
        """The rows of results.jsonl that it makes, without what is measured."""
        t = self.teacher
        taught_by = {"size": t.size, "tokens": t.tokens, "seed": t.seed} if t else None
        return [{"kind": self.kind, "size": self.size, "tokens": self.tokens, "seed": self.seed,
                 "teacher": taught_by, "alpha": alpha} for alpha in self.alphas]


def plan(scale):
    """-> two stages of runs: teachers and students alone, costliest first; then students, seed by seed."""
    size, tokens = scale.student
    sets = sorted({seed % scale.teacher_sets for seed in scale.seeds})
    teachers = {(t, n): Run("teacher", *t, 1000 + n) for t in scale.teachers for n in sets}
    alone = [Run("student", size, int(tokens * times), seed) for seed in scale.seeds for times in TIMES]
    taught = [Run("student", size, tokens, seed, teachers[t, seed % scale.teacher_sets], scale.alphas)
              for seed in scale.seeds for t in scale.teachers]
    return sorted([*teachers.values(), *alone], key=lambda r: -r.cost(scale)), taught


def start_worker(threads, flops_done):
    """Set a worker process up: it shares the cores, and ends with the sweep, even where that was killed."""
    global progress                                          # of all workers, for the bar
    progress = flops_done
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the sweep
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_one(a_run, scale, config, corpus):
    """
    In a worker: train and evaluate -> rows of results.jsonl, one for each alpha: {"kind": "student", "size":
    "s", "tokens": 1572864, "seed": 1, "teacher": {"size": "xs", "tokens": 2097152, "seed": 1000},
    "alpha": 0.25, "corpus": fingerprint, "metrics": what evaluate() returns, "seconds": 40.2}.
    """
    start, rows, flops = time.time(), [], a_run.cost(scale) / a_run.tokens  # a token
    left = a_run.tokens

    def on_step(tokens):
        nonlocal left
        left -= tokens
        with progress.get_lock():
            progress.value += tokens * flops
    paths = train(config, on_step)
    on_step(left)                                            # what an earlier start has done counts as well
    for key, path in zip(a_run.keys(), paths):
        model, _ = load_checkpoint(path, pick_device(config.device)[0])
        metrics = evaluate(model, config.data, scale.windows, scale.items)
        rows.append({**key, "corpus": corpus, "metrics": metrics})
    return [{**row, "seconds": round((time.time() - start) / len(rows), 1)} for row in rows]


KEYS = ("kind", "size", "tokens", "seed", "teacher", "alpha")                # which model a row is of


def read_rows(path):
    """The rows of a results.jsonl but for half a last line, which a kill may leave. Raises UserError."""
    rows = []
    lines = Path(path).read_text(errors="replace").split("\n")[:-1] if os.path.exists(path) else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            figures = [half[part] for half in row["metrics"].values() for part in ("select", "report")]
            for model in (row, row["teacher"] or row):
                SIZES[model["size"]]
                figures += [model["tokens"], model["seed"]]
            if (row.keys() != {*KEYS, "corpus", "metrics", "seconds"}
                    or not all(math.isfinite(x) for x in (*figures, row["alpha"], row["seconds"]))
                    or rows and row["metrics"].keys() != rows[0]["metrics"].keys()):
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is no result, or one of other sets: delete it") from None
    return rows


def sweep(scale, data, out, jobs, device):
    """Run what is not in results.jsonl yet, `jobs` runs at a time, and report after each seed -> all rows."""
    corpus, results = load_meta(data)["fingerprint"], f"{out}/results.jsonl"
    rows = read_rows(results)
    if any(row["corpus"] != corpus for row in rows):
        raise UserError(f"{results} comes from another corpus than {data}: choose another --out")
    os.makedirs(out, exist_ok=True)
    with open(results, "ab") as f:                           # half a last line goes
        f.truncate(Path(results).read_bytes().rfind(b"\n") + 1)

    def is_there(key):
        return any(key.items() <= row.items() for row in rows)

    def missing(a_run):
        return not all(map(is_there, a_run.keys()))
    first, second = plan(scale)
    todo = [a_run for a_run in second if missing(a_run)]
    needed = {a_run.teacher for a_run in todo}               # trained again where only its row is left
    first = [a_run for a_run in first if missing(a_run) or a_run in needed]
    threads = max(1, torch.get_num_threads() // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)             # read by the workers when their torch starts
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")       # its complaint after Ctrl-C
    spawn = multiprocessing.get_context("spawn")
    flops_done = spawn.Value("d")
    pool = ProcessPoolExecutor(jobs, spawn, start_worker, (threads, flops_done))
    bar = tqdm(total=sum(r.cost(scale) for r in first + todo), unit="FLOP", unit_scale=True)
    try:
        for stage in (first, todo):                          # a barrier: the teachers are there
            futures = {pool.submit(run_one, r, scale, r.config(scale, data, out, device=device), corpus): r
                       for r in stage}
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                bar.update(flops_done.value - bar.n)
                for future in ended:
                    # a teacher trained again, because only its row was left, has its row already
                    new = [row for row in future.result() if not is_there({key: row[key] for key in KEYS})]
                    rows += new
                    with open(results, "a") as f:
                        f.write("".join(json.dumps(row) + "\n" for row in new))
                    done = futures[future]
                    bar.write(f"  {done}")
                    if done.teacher and not any(missing(r) for r in second if r.seed == done.seed):
                        verdicts = [line for line in report(rows, out).splitlines() if "**" in line]
                        bar.write("\n".join([f"\nafter seed {done.seed}, {out}/report.md:", *verdicts, ""]))
    except BaseException:                                    # Ctrl-C, or a worker's exception: all stop
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    return rows


# ------------------------------------------------------------------------------
# the findings: from here on everything is a function of the rows of results.jsonl

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last, a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def interval(values):
    """-> mean, half-width of its 95 % t-interval (infinite for a single value)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, math.inf
    return mean, T_975[min(n - 1, len(T_975)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)


def show(values):
    """'+0.012 ± 0.003', or the mean alone for a single value."""
    mean, half = interval(values)
    return "none" if math.isnan(mean) else f"{mean:+.3f}" + (f" ± {half:.3f}" if half < math.inf else "")


def judge(values):
    """The verdict, which takes three seeds, on a claim that holds where values, one a seed, are above 0."""
    mean, half = interval(values)
    if len(values) < 3:
        return "seen, too few seeds" if mean > 0 else "not seen, too few seeds"
    return "reproduced" if mean > half else "not reproduced" if mean < -half else "undecided"


def losses(rows, where, half="report"):
    """An array, a value a row: nats per token "in" domain or "out" (mean over sets); "task": in percent."""
    prefix, unit = {"in": ("in_domain", 1), "out": ("ood/", 1), "task": ("task/next_line", -100)}[where]
    if where == "task" and "task/next_line" not in rows[0]["metrics"]:       # a corpus too small for it
        return np.full(len(rows), np.nan)
    return unit * np.array([np.mean([values[half] for key, values in row["metrics"].items()
                                     if key.startswith(prefix)]) for row in rows])


def by_seed(rows, kind, model, teacher=None, alpha=0.0):
    """-> {seed: row} of such models; model and teacher are (size, tokens)."""
    found = {}
    for row in rows:
        mine, taught_by = (r and (r["size"], r["tokens"]) for r in (row, row["teacher"]))
        if (row["kind"], mine, taught_by, row["alpha"]) == (kind, model, teacher, alpha):
            found[row["seed"]] = row
    return found


class Study:
    """
    The rows of one student, (size, tokens), at the seeds that are complete, always in the order of the seeds.
    alone[n]: of the student alone on n times its tokens; cells[teacher, alpha]: of the students taught;
    own[teacher]: of their teachers. A teacher is (size, tokens); the weakest comes first.
    """

    def __init__(self, rows, student):
        self.student = size, tokens = student
        taught = [row for row in rows if row["teacher"] and (row["size"], row["tokens"]) == student]
        self.alphas = sorted({row["alpha"] for row in taught})
        teachers = {(row["teacher"]["size"], row["teacher"]["tokens"]) for row in taught}
        alone = {n: by_seed(rows, "student", (size, int(n * tokens))) for n in TIMES}
        cells = {(t, a): by_seed(rows, "student", student, t, a) for t in teachers for a in self.alphas}
        own = {t: {} for t in teachers}                      # the teacher of each student's seed
        for t in teachers:
            models = by_seed(rows, "teacher", t)
            for seed, row in cells[t, self.alphas[0]].items():
                if row["teacher"]["seed"] in models:
                    own[t][seed] = models[row["teacher"]["seed"]]
        everything = [*alone.values(), *cells.values(), *own.values()]
        self.seeds = sorted(set.intersection(*map(set, everything)))
        self.alone, self.cells, self.own = (
            {key: [found[seed] for seed in self.seeds] for key, found in group.items()}
            for group in (alone, cells, own))
        ranked = sorted(teachers, key=self.weakness, reverse=True) if self.seeds else []
        self.controls = [t for t in ranked if t[1] <= KNOWS_NOTHING]
        self.teachers = [t for t in ranked if t[1] > KNOWS_NOTHING]

    def weakness(self, teacher):
        """How much worse a teacher is in domain than the student alone: mean over seeds."""
        return np.mean(losses(self.own[teacher], "in") - losses(self.alone[1], "in"))

    def gain(self, teacher, alpha, where="out", half="report"):
        """How much lower the loss is than that of the student alone."""
        return losses(self.alone[1], where, half) - losses(self.cells[teacher, alpha], where, half)

    def best_alpha(self, teacher):
        """The alpha with the largest mean gain outside on the select halves."""
        return max(self.alphas, key=lambda alpha: self.gain(teacher, alpha, "out", "select").mean())

    def best(self, teacher, where="out"):
        """The gain at that alpha, on the report halves."""
        return self.gain(teacher, self.best_alpha(teacher), where)

    def robustness(self, teacher, alpha):
        """
        Effective robustness (Taori et al., arXiv 2007.00644): how far the loss outside lies below the
        parabola through (loss in domain, loss outside) of the student alone at its three budgets. None where
        the student lies beyond their span at any seed: nothing is extrapolated.
        """
        x, y = (np.array([losses(rows, where) for rows in self.alone.values()]) for where in ("in", "out"))
        inside, outside = (losses(self.cells[teacher, alpha], where) for where in ("in", "out"))
        if (inside < x.min(0)).any() or (inside > x.max(0)).any():
            return None
        on_curve = [np.polyval(np.polyfit(x[:, i], y[:, i], 2), inside[i]) for i in range(len(inside))]
        return on_curve - outside

    def same_compute(self, teacher):
        """
        What the compute of the teacher's forward passes gains outside as more tokens for the student alone:
        by a parabola in ln(tokens) through its three budgets, and never beyond the largest.
        """
        student_flops = flops_per_token(shape_of(self.student[0]), backward=True)
        times = min(1 + flops_per_token(shape_of(teacher[0])) / student_flops, 2)
        y = np.array([losses(rows, "out") for rows in self.alone.values()])  # (3, seeds)
        curve = np.polyfit(np.log(list(self.alone)), y, 2)                   # (3, seeds)
        return y[1] - np.log(times) ** np.arange(2, -1, -1) @ curve


def shape_of(size):
    """The GPTConfig of a size at the vocabulary and context that its scale has."""
    vocab_size, block_size = {"M": (50_304, 1024), "B": (128_256, 8192)}.get(size[-1], (512, 128))
    return GPTConfig(vocab_size, block_size, **SIZES[size])


def weak_teacher_helps(study):
    """
    Rule 1: of the teachers worse in domain than the student alone, the mean gain outside lies above zero.
    -> verdict, what was seen.
    """
    weak = [t for t in study.teachers if study.weakness(t) > 0]
    if not weak:
        return "not tested", "No teacher is weaker than the student alone."
    gains, largest = np.mean([study.best(t) for t in weak], 0), study.alphas[-1]
    pure = np.mean([study.gain(t, largest) for t in weak], 0)
    each = ", ".join(f"{name(t)} {show(study.best(t))}" for t in weak)
    return judge(gains), (f"Weak teachers bring {show(gains)} outside ({each}); at alpha {largest:g} they "
                          f"bring {show(pure)}.")


def paths_of(study):
    """
    -> {"size" or "tokens of SIZE": teachers}: by size at the largest budget, and by tokens at each size;
    three or more, each better than all before it at every seed (others are left out).
    """
    most, sizes = max((tokens for _, tokens in study.teachers), default=0), list(SIZES)
    paths = {"size": sorted((t for t in study.teachers if t[1] == most), key=lambda t: sizes.index(t[0]))}
    for size in sizes:
        paths[f"tokens of {size}"] = sorted(t for t in study.teachers if t[0] == size)
    found = {}
    for along, path in paths.items():
        own = {t: losses(study.own[t], "in") for t in path}
        best = [t for i, t in enumerate(path) if all((own[t] < own[u]).all() for u in path[:i])]
        if len(best) >= 3:
            found[along] = best
    return found


def stronger_teacher_saturates(study):
    """
    Rule 2, along teacher size, or where there are no three sizes along tokens: the gain outside per nat by
    which the teacher improves is lower on the last step than on the first. -> verdict, what was seen.
    """
    verdicts, texts = [], []
    for along, path in paths_of(study).items():
        gains, nats = ([f(t) for t in path] for f in (study.best, lambda t: -losses(study.own[t], "in")))
        first = (gains[1] - gains[0]) / (nats[1] - nats[0])
        last = (gains[-1] - gains[-2]) / (nats[-1] - nats[-2])
        mean, half = interval(last)
        verdict = judge(first - last)
        if verdict == "reproduced":
            verdict += ", reverses" if mean < -half else ", saturates"
        verdicts.append(verdict)
        texts.append(f"Along {along} ({', '.join(map(name, path))}) a nat of teacher buys {show(first)} "
                     f"outside on the first step, {show(last)} on the last, {show(first - last)} less: "
                     f"{verdict}.")
    if not texts:
        return "not tested", "There are no three teachers, each better than the one before."
    return verdicts[0], " ".join(texts)


def generalisation_first(study):
    """
    Rule 3: the mean effective robustness of all cells within the span of the student alone lies above zero.
    -> verdict, what was seen.
    """
    cells = {(t, a): study.robustness(t, a) for t in study.teachers for a in study.alphas}
    inside = {cell: values for cell, values in cells.items() if values is not None}
    if not inside:
        return "not tested", "No cell lies within the span of the student alone."
    groups = {"at the chosen alphas": [v for (t, a), v in inside.items() if a == study.best_alpha(t)],
              "from weak teachers": [v for (t, _), v in inside.items() if study.weakness(t) > 0],
              "from strong ones": [v for (t, _), v in inside.items() if study.weakness(t) <= 0]}
    means = {label: np.mean(group, 0) for label, group in groups.items() if group}
    if "from weak teachers" in means and "from strong ones" in means:
        means["weak minus strong"] = means["from weak teachers"] - means["from strong ones"]
    everything = np.mean(list(inside.values()), 0)
    seen = "; ".join(f"{label} {show(mean)}" for label, mean in means.items())
    return judge(everything), (f"Effective robustness of {len(inside)} of {len(cells)} cells "
                               f"{show(everything)}; {seen}.")


FINDINGS = {"A weak teacher helps": weak_teacher_helps,
            "A stronger teacher saturates or reverses the gain": stronger_teacher_saturates,
            "Generalisation comes first": generalisation_first}


def report(rows, out):
    """Write report.md and, with matplotlib, a figure for each student -> the report, in Markdown."""
    minutes = sum(row["seconds"] for row in rows) / 60
    text = (f"{len(rows)} models, {minutes:.0f} minutes of one worker, corpus {rows[0]['corpus']}; made from "
            "results.jsonl by `python sweep.py --report`. ± is a 95 % t-interval over seeds of the student, "
            "given these teachers; alpha is chosen on select halves, figures are of the report halves.\n")
    for student in sorted({(row["size"], row["tokens"]) for row in rows if row["teacher"]}):
        study = Study(rows, student)
        seeds = ", ".join(map(str, study.seeds)) or "none complete yet"
        text += f"\n## Student {name(student)}, seeds {seeds}\n\n"
        if not study.seeds or not study.teachers:
            continue
        for i, (claim, rule) in enumerate(FINDINGS.items(), 1):
            verdict, seen = rule(study)
            text += f"{i}. **{claim}: {verdict}.** {seen}\n"
        inside, outside = (losses(study.alone[1], where).mean() for where in ("in", "out"))
        text += (f"\nAlone it reaches {inside:.3f} in domain and {outside:.3f} outside. Weakness is a "
                 "teacher's own loss in domain minus that of the student alone.\n\n")
        text += ("| teacher | weakness | best alpha | gain in domain | gain outside | effective robustness | "
                 f"outside at alpha {study.alphas[-1]:g} | same compute, no teacher | task, points |\n")
        text += "|---" * 9 + "|\n"
        for t in study.controls + study.teachers:
            robust = study.robustness(t, study.best_alpha(t))
            columns = [name(t) + " (control)" * (t in study.controls), f"{study.weakness(t):+.3f}",
                       f"{study.best_alpha(t):g}", show(study.best(t, "in")), show(study.best(t)),
                       "beyond the span" if robust is None else show(robust),
                       show(study.gain(t, study.alphas[-1])), show(study.same_compute(t)),
                       show(study.best(t, "task"))]
            text += f"| {' | '.join(columns)} |\n"
        try:
            draw(study, f"{out}/findings_{name(student)}.png")
            text += f"\n![the three findings](findings_{name(student)}.png)\n"
        except ImportError:
            text += "\nFor the figure: pip install matplotlib\n"
    Path(out, "report.md").write_text(text, encoding="utf-8")
    return text


def draw(study, path):
    """The three findings as three panels; readable in grey. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    def line(axis, teachers, gains, **style):
        means, halves = zip(*map(interval, gains))
        axis.errorbar([study.weakness(t) for t in teachers], means, halves if len(study.seeds) > 2 else None,
                      capsize=3, elinewidth=0.8, markersize=5, **style)
    for i, alpha in enumerate(study.alphas):
        line(left, study.teachers, [study.gain(t, alpha) for t in study.teachers], label=f"alpha {alpha:g}",
             marker="os^Dv"[i % 5], color=str(0.7 - 0.7 * i / len(study.alphas)), ls=("-", "--", ":")[i % 3])
    for i, (along, teachers) in enumerate(paths_of(study).items()):
        line(middle, teachers, [study.best(t) for t in teachers], label=f"along {along}",
             marker="os^D"[i % 4], color="0.5" if i else "black", ls="--" if i else "-")
    for i, t in enumerate(study.teachers):
        at = study.weakness(t), study.best(t).mean()
        middle.plot(*at, ".", color="black")
        middle.annotate(name(t), at, fontsize=8, textcoords="offset points", xytext=(4, -12 if i % 2 else 6))
    line(middle, study.teachers, [study.same_compute(t) for t in study.teachers],
         label="same compute, no teacher", marker="x", color="0.7", ls="none")
    middle.margins(x=0.15)                                   # room for the names
    for axis in (left, middle):
        axis.axhline(0, color="0.6", lw=0.8)
        axis.axvline(0, color="0.6", lw=0.8)
        axis.invert_xaxis()                                  # weak teachers on the left
        axis.set(xlabel="teacher's loss in domain minus the student's alone (nats)",
                 ylabel="gain outside (nats/token)")

    x, y = ([losses(rows, where).mean() for rows in study.alone.values()] for where in ("in", "out"))
    curve = np.linspace(min(x), max(x), 50)
    right.plot(curve, np.polyval(np.polyfit(x, y, 2), curve), color="black")
    right.plot(x, y, "s", color="black", label="alone: half, once, twice the tokens")
    for weak, label in ((True, "from weak teachers"), (False, "from strong ones")):
        cells = [study.cells[t, a] for t in study.teachers for a in study.alphas
                 if (study.weakness(t) > 0) == weak and study.robustness(t, a) is not None]
        x, y = ([losses(rows, where).mean() for rows in cells] for where in ("in", "out"))
        right.plot(x, y, "o", color="0.4", fillstyle="none" if weak else "full", label=label)
    right.set(xlabel="loss in domain (nats/token)", ylabel="loss outside (nats/token)")
    for axis, (claim, rule) in zip((left, middle, right), FINDINGS.items()):
        axis.set_title(f"{claim}:\n{rule(study)[0]}", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    figure.suptitle(f"Student {name(study.student)}, {len(study.seeds)} seeds")
    figure.savefig(path, dpi=100)


# ------------------------------------------------------------------------------
# the command line

def dry_run(scale, jobs):
    """Print every run with its FLOPs, and how long all would take."""
    runs = [a_run for stage in plan(scale) for a_run in stage]
    for r in runs:
        print(f"{str(r):44} {','.join(f'{a:g}' for a in r.alphas):24} {r.cost(scale):9.2e} FLOPs")
    flops = sum(r.cost(scale) for r in runs)
    print(f"{len(runs)} runs, {flops:.2e} FLOPs: {flops / 5e10 / jobs / 60:,.0f} minutes for {jobs} CPU "
          f"cores of 50 GFLOP/s, {flops / 4e14 / 3600:,.2f} hours on an H100 at 40 % of its peak (computed)")


def main():
    """Run the sweep that the command line asks for and report, or only report, or only print its cost."""
    parser = make_parser(__doc__)
    parser.add_argument("--scale", default="laptop", choices=SCALES, help="the experiment (default: laptop)")
    parser.add_argument("--student", metavar="SIZE:TOKENS", help="student in place of the scale's, as s:1.5M")
    parser.add_argument("--teachers", metavar="SIZE:TOKENS,...", help="teachers in place of the scale's")
    parser.add_argument("--seeds", metavar="N,N", help="seeds in place of the scale's, as 1,2,3")
    parser.add_argument("--out", metavar="DIR", help="results and checkpoints (default: out/SCALE)")
    parser.add_argument("--data", metavar="DIR", help="corpus folder of data.py (default: data/ and the "
                        "scale's corpus, of which python is made if it is not there)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: cores; on a GPU 1)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    parser.add_argument("--dry_run", action="store_true", help="print every run with its FLOPs, run nothing")
    parser.add_argument("--report", metavar="DIR", help="only report on DIR/results.jsonl")
    args = parser.parse_args()
    if args.report:
        rows = read_rows(f"{args.report}/results.jsonl")
        if not rows:
            raise UserError(f"{args.report} has no results.jsonl with results")
        return print(report(rows, args.report))
    scale = SCALES[args.scale]

    def model(word):
        size, tokens = word.split(":")
        SIZES[size]
        return size, count(tokens)
    try:
        if args.student:
            scale = replace(scale, student=model(args.student))
        if args.teachers:
            scale = replace(scale, teachers=tuple(map(model, args.teachers.split(","))))
        if args.seeds:
            scale = replace(scale, seeds=tuple(sorted({abs(int(n)) for n in args.seeds.split(",")})))
    except Exception:
        parser.error("--student takes SIZE:TOKENS such as s:1.5M, --teachers several with commas between, "
                     "--seeds numbers such as 1,2,3")
    device = pick_device(args.device)[0]
    jobs = max(1, args.jobs or (torch.get_num_threads() if device.type == "cpu" else 1))
    if args.dry_run:
        return dry_run(scale, jobs)
    start, out, data = time.time(), args.out or f"out/{args.scale}", args.data or f"data/{scale.corpus}"
    if not args.data and scale.corpus == "python":
        prepare("python", data, scale.vocab_size)
    meta = load_meta(data)
    if not any(name.startswith("ood_") for name in meta["sets"]):
        raise UserError(f"{data} has no out-of-distribution set, which the findings need: data.py --ood ...")
    rows = sweep(replace(scale, vocab_size=meta["vocab_size"]), data, out, jobs, args.device)
    print(f"\n{report(rows, out)}\n{out}: report.md, figures, results.jsonl; "
          f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main)

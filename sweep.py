"""
Teachers x students x alphas x seeds -> the three findings, with intervals and a figure.

    python sweep.py                          # --scale laptop: the main job, a quarter of an hour on two cores
    python sweep.py --scale smoke            # the same path in under a minute, too small to find anything
    python sweep.py --scale full --dry_run   # every run with its cost, and nothing done

Prepares the corpus, trains every teacher (checkpoints on the way are the teachers at smaller budgets), a
baseline and one student for each teacher and alpha, evaluates each, and writes below --out: results.jsonl
(one line a run), report.md, findings_STUDENT.png and .svg, and runs/ with the checkpoints. Interrupt it when
you like: the same command goes on.

Follows "Strong Teacher Not Needed? On Distillation in LLM Pretraining", arXiv 2605.23857.
"""
import itertools
import json
import math
import multiprocessing
import os
import platform
import queue
import re
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from data import (DataError, Parser, load_meta, load_shards, load_tokenizer, load_tokens, lock, prepare,
                  read_lines, run, write)
from distill import (Config, ConfigError, bytes_of, check_room, checkpoint_path, disk_needed, distill_loss,
                     memory_needed, pick_device, several, short, switch, train)
from eval import evaluate, evaluation_sets, read_windows, sample, token_gains
from model import GPT, SIZES, CheckpointError, GPTConfig, count_parameters, flops_per_token, load_checkpoint

K, M, B = 2**10, 2**20, 2**30


@dataclass
class Ablation:
    """A doubt about the findings, and a cell of the main student that may settle it."""
    name: str
    teacher: str                     # size
    tokens: int                      # on which it was trained
    alphas: tuple
    same_order: bool = False         # the teacher sees the batches that the student will see
    temperature: float = 1.0


@dataclass
class Scale:
    """One experiment. A teacher's last budget is the length of its run, others are checkpoints on the way."""
    teachers: dict                   # size -> token budgets
    students: dict                   # size -> tokens; the first is the main student
    alphas: tuple = (0.25, 0.5, 0.75, 1.0)
    seeds: tuple = (1,)              # of a student's weights and data; its teachers have 1000 + seed
    vocab_size: int = 512
    corpus: str = "python"           # a folder of data/
    windows: int = 256               # evaluated in each half of a set
    items: int = 500                 # evaluated in each half of a task
    alone: tuple = (0.5, 1, 2)       # budgets of students without a teacher, as multiples: 1 is the baseline
    reduced: dict = field(default_factory=dict)  # student size -> (teacher budgets, alphas), fewer than all
    ablations: tuple = ()
    training: dict = field(default_factory=lambda: dict(batch_size=8, block_size=128, lr=3e-3))   # of Config


SCALES = {
    "smoke": Scale({"xs": (32 * K, 64 * K), "s": (64 * K,), "m": (64 * K,)}, {"s": 32 * K, "xs": 16 * K},
                   (0.25, 1.0), windows=16, items=50,
                   ablations=(Ablation("temperature 2", "s", 64 * K, (0.25,), temperature=2.0),
                              Ablation("same order", "s", 64 * K, (0.25,), same_order=True))),
    "laptop": Scale({"xs": (3 * M,), "s": (3 * M // 4, 3 * M), "m": (3 * M,)},
                    {"s": 3 * M // 2, "xs": 3 * M // 4}, (0.25, 0.5, 1.0)),
    "full": Scale({size: (1 * M, 2 * M, 4 * M, 8 * M) for size in ("xs", "s", "m", "l")},
                  {"s": 3 * M, "xs": 3 * M}, (0.1, 0.25, 0.5, 0.75, 1.0), seeds=(1, 2, 3),
                  reduced={"xs": ((1 * M, 8 * M), (0.25, 0.5, 1.0))},
                  ablations=(
                      Ablation("temperature 2", "xs", 8 * M, (0.25,), temperature=2.0),
                      Ablation("temperature 2", "m", 8 * M, (0.5, 0.75), temperature=2.0),
                      Ablation("same data order", "s", 8 * M, (0.25, 0.5), same_order=True),
                      Ablation("annealed", "m", 3 * M, (0.5, 0.75)),
                      Ablation("annealed, the student's tokens only", "m", 3 * M, (0.5, 0.75),
                               same_order=True),
                      # after one step a teacher is all but uniform, and teaching from it label smoothing
                      Ablation("label smoothing", "xs", 1 * K, (0.05, 0.1, 0.25)))),
    "gpu": Scale({"30M": (128 * M, 512 * M), "124M": (512 * M,), "350M": (512 * M,)}, {"124M": 256 * M},
                 (0.25, 0.5, 1.0), vocab_size=50_304, corpus="fineweb-edu",
                 training=dict(batch_size=8, accumulate=16, block_size=1024, lr=1e-3)),
    "paper": Scale({size: tuple(n * 10**9 for n in (10, 30, 50, 80, 100, 300))
                    for size in ("0.7B", "1.7B", "3.8B", "8B")},
                   {"1.7B": 50 * 10**9}, (0.2, 0.4, 0.5, 0.6, 0.8, 1.0), vocab_size=128_256,
                   corpus="fineweb-edu",
                   training=dict(batch_size=8, accumulate=16, block_size=8192, lr=3e-4)),
}


# ------------------------------------------------------------------------------
# the runs

@dataclass(frozen=True)
class Task:
    """One call of train(): a teacher with all its budgets, or a student for each alpha of a cell."""
    kind: str                        # "teacher" or "student"
    size: str
    budgets: tuple                   # token counts that are evaluated
    seed: int
    teacher: "Task" = None           # it teaches as it is after
    at: int = 0                      # so many tokens
    alphas: tuple = (0.0,)
    ablation: str = ""               # the doubt that it is for
    temperature: float = 1.0

    def __str__(self):
        taught = f" from {name((self.teacher.size, self.at))}" if self.teacher else ""
        doubt = f" ({self.ablation})" if self.ablation else ""
        return f"{self.kind} {name((self.size, self.budgets[-1]))}{taught}{doubt} seed {self.seed}"


def name(teacher):
    """(size, tokens) -> 'm@4M'."""
    return f"{teacher[0]}@{short(teacher[1])}"


def plan(scale):
    """Every task of a scale."""
    tasks = []
    for seed in scale.seeds:
        teachers = {size: Task("teacher", size, budgets, 1000 + seed)
                    for size, budgets in scale.teachers.items()}
        tasks += teachers.values()
        for size, n in scale.students.items():
            tasks += [Task("student", size, (int(n * multiple),), seed) for multiple in scale.alone]
            kept, alphas = scale.reduced.get(size, (None, scale.alphas))
            tasks += [Task("student", size, (n,), seed, teacher, budget, alphas)
                      for teacher in teachers.values() for budget in teacher.budgets
                      if kept is None or budget in kept]
        main, n = next(iter(scale.students.items()))
        for a in scale.ablations:
            teacher = teachers.get(a.teacher)
            if a.same_order or teacher is None or a.tokens != teacher.budgets[-1]:
                teacher = Task("teacher", a.teacher, (a.tokens,), seed if a.same_order else 1000 + seed,
                               ablation=a.name)
                tasks.append(teacher)
            tasks.append(Task("student", main, (n,), seed, teacher, a.tokens, a.alphas, a.name,
                              a.temperature))
    return tasks


def config_of(task, scale, data, out, **how):
    """The Config that trains a task; its folder and its teacher's checkpoint follow from their names."""
    teacher = ""
    if task.teacher:
        teacher = checkpoint_path(config_of(task.teacher, scale, data, out), 0.0, task.at)
    folder = re.sub(r"[^\w@.]+", "_", str(task))
    return Config(data=data, out=os.path.join(out, "runs", folder), size=task.size, tokens=task.budgets[-1],
                  checkpoints=task.budgets[:-1], seed=task.seed, teacher=teacher, alpha=task.alphas,
                  temperature=task.temperature, **scale.training, **how)


KEYS = ("kind", "size", "tokens", "seed", "teacher", "alpha", "temperature", "corpus", "training", "windows",
        "items", "ablation")         # of a line of results.jsonl, that tell which run it is


def rows_of(task, scale, corpus):
    """The lines of results.jsonl a task gives, without what is measured: what tells if they are there."""
    return [{"kind": task.kind, "size": task.size, "tokens": tokens, "seed": task.seed,
             "teacher": task.teacher and {"size": task.teacher.size, "tokens": task.at}, "alpha": alpha,
             "temperature": task.temperature, "corpus": corpus, "training": scale.training,
             "windows": scale.windows, "items": scale.items,
             **({"ablation": task.ablation} if task.ablation else {})}
            for tokens in task.budgets for alpha in task.alphas]


def shape_of(size, scale):
    """The GPTConfig of a size at this scale's vocabulary and context."""
    return GPTConfig(scale.vocab_size, scale.training["block_size"], **SIZES[size])


def small(scale):
    """Whether CPU cores can run it."""
    return all(SIZES[size]["n_embd"] < 256 for size in {**scale.teachers, **scale.students})


def cost_of(task, scale):
    """Training FLOPs: the students' forward and backward passes, and one teacher forward for all of them."""
    flops = len(task.alphas) * flops_per_token(shape_of(task.size, scale), backward=True)
    if task.teacher:
        flops += flops_per_token(shape_of(task.teacher.size, scale))
    return flops * task.budgets[-1]


PROGRAM = 2**29                      # bytes of memory of a process that has loaded torch and done nothing yet


def room_of(tasks, scale, jobs, low):
    """Bytes of memory of the `jobs` largest tasks at once, and of disk for all; low: autocast to 16 bits."""
    memory, disk = [], 0
    for task in tasks:
        config, shape = config_of(task, scale, "", ""), shape_of(task.size, scale)
        taught_by = shape_of(task.teacher.size, scale) if task.teacher else None
        memory.append(PROGRAM + memory_needed(config, shape, taught_by, low))
        disk += disk_needed(config, shape)
    return sum(sorted(memory)[-jobs:]), disk


def start_worker(threads, counter, parent):
    """Set a worker process up: its threads, and where it reports the tokens it has trained on."""
    global report_flops
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C reaches all processes; train() catches it
    torch.set_num_threads(threads)
    report_flops = counter.put
    counter.cancel_join_thread()                             # what nobody reads must not keep it alive

    def follow():                                            # a killed sweep takes its workers with it
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def run_task(task, scale, config, corpus):
    """In a worker: train, evaluate every checkpoint -> lines of results.jsonl."""
    flops_a_token, start = cost_of(task, scale) / task.budgets[-1], time.time()
    kept = train(config, lambda n: report_flops(n * flops_a_token))
    seconds = round((time.time() - start) / len(kept), 1)
    models = (load_checkpoint(c["path"], pick_device(config)[0])[0] for c in kept)
    return [{**row, "metrics": evaluate(model, config.data, scale.windows, scale.items), "seconds": seconds}
            for row, model in zip(rows_of(task, scale, corpus), models)]


def read_rows(path):
    """The lines of results.jsonl, none if there is no such file. Raises DataError."""
    rows = read_lines(path) if os.path.exists(path) else []
    for number, row in enumerate(rows, 1):
        try:
            values = [half[part] for half in row["metrics"].values() for part in ("select", "report")]
            if not all(type(v) in (int, float) and abs(v) < math.inf for v in (*values, row["seconds"])):
                raise ValueError
            row["metrics"]["in_domain"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: result {number} is none: mend or delete that line") from None
    return rows


def sweep(scale, data, out, jobs, how):
    """Run what is not in results.jsonl yet, `jobs` tasks at a time -> all rows of this scale."""
    corpus, results = load_meta(data)["fingerprint"], os.path.join(out, "results.jsonl")
    configs = {task: config_of(task, scale, data, out, **how) for task in plan(scale)}
    rows = {task: rows_of(task, scale, corpus) for task in configs}

    def key(row):
        return json.dumps([row.get(k) for k in KEYS], sort_keys=True)
    done = {key(row) for row in read_rows(results)}
    todo = [task for task in configs if not all(key(row) in done for row in rows[task])]
    missing = {configs[t].teacher for t in todo if not os.path.exists(configs[t].teacher)}
    for task in configs:                                     # a teacher's result may be there, the file not
        if task not in todo and missing & {checkpoint_path(configs[task], 0.0, n) for n in task.budgets}:
            todo.append(task)

    todo.sort(key=lambda task: (task.kind == "student", -cost_of(task, scale)))  # teachers, costliest first

    def save(new):                                            # a row that is there already stays as it is
        known = {key(row): row for row in read_rows(results)}
        known |= {key(row): row for row in new if key(row) not in known}
        write(out, "results.jsonl", "".join(json.dumps(row) + "\n" for row in known.values()).encode())
    if todo:
        device, dtype = pick_device(configs[todo[0]])
        memory, disk = room_of(todo, scale, jobs, dtype != torch.float32)
        check_room(memory, disk - bytes_of(out), device, out)
        print(f"{len(todo)} tasks, {jobs} at a time; stop it when you like, the same command goes on")
        run_tasks(todo, scale, configs, corpus, jobs, save)
    wanted = {key(row) for task in rows for row in rows[task]}
    found = [row for row in read_rows(results) if key(row) in wanted]
    if len({tuple(sorted(row["metrics"])) for row in found}) > 1:
        raise DataError(f"{results} mixes evaluations on different sets: move it away, or choose another "
                        "--out")
    return found


def run_tasks(todo, scale, configs, corpus, jobs, save):
    """Run tasks in worker processes, `jobs` at a time, in order as far as teachers are there."""
    jobs = min(jobs, len(todo))
    threads = max(1, torch.get_num_threads() // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)              # read by the workers when their torch starts
    context, start, running = multiprocessing.get_context("spawn"), time.time(), {}
    counter = context.Queue()
    pool = ProcessPoolExecutor(jobs, context, start_worker, (threads, counter, os.getpid()))
    bar = tqdm(total=sum(cost_of(t, scale) for t in todo), unit="FLOP", unit_scale=True, smoothing=0.02,
               mininterval=1 if sys.stderr.isatty() else 30)
    try:
        while todo or running:
            for task in [t for t in todo if not configs[t].teacher or os.path.exists(configs[t].teacher)]:
                if len(running) < jobs:
                    todo.remove(task)
                    running[pool.submit(run_task, task, scale, configs[task], corpus)] = task
            if not running:
                raise DataError(f"{configs[todo[0]].teacher} is missing, and no task makes it")
            ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            try:
                while True:
                    bar.update(counter.get_nowait())
            except queue.Empty:
                pass
            for future in ended:
                save(future.result())
                bar.write(f"  {time.time() - start:5.0f} s: {running.pop(future)}")
    except BrokenProcessPool:
        raise ConfigError("a worker was killed, perhaps for its memory: try fewer --jobs") from None
    except BaseException:
        workers, until = multiprocessing.active_children(), time.time() + 20
        for worker in workers:                                # they save their state on SIGTERM
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:                                # one that died with a lock blocks others
            worker.join(max(0, until - time.time()))
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()
    used, wall = os.times().children_user + os.times().children_system, time.time() - start
    print(f"all done: {wall / 60:.1f} minutes, {used / wall / torch.get_num_threads():.0%} of the cores busy")


def dry_run(scale_name, scale, jobs):
    """Print every run with its FLOPs and how long it may take."""
    sizes = {**scale.teachers, **scale.students}
    here = small(scale)
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))

    def flops_per_second(size):
        if not here:
            return 0.4 * 989e12                               # 40 % of an H100's peak in dense bf16
        model, c = GPT(shape_of(size, scale)), scale.training
        x = torch.randint(scale.vocab_size, (c["batch_size"], c["block_size"]))
        for _ in range(2):                                    # the first round warms up
            start = time.perf_counter()
            for _ in range(5):
                distill_loss(model.hidden(x), model.lm_head.weight, x, 0.0)[0].backward()
        return 5 * x.numel() * flops_per_token(model.config, backward=True) / (time.perf_counter() - start)

    speed = {size: flops_per_second(size) for size in sizes}
    tasks = plan(scale)
    print(f"{'run':50} {'alphas':>26} {'FLOPs':>10} {'time':>10}")
    for task in tasks:
        alphas, seconds = ", ".join(f"{a:g}" for a in task.alphas), cost_of(task, scale) / speed[task.size]
        shown = f"{seconds:8.0f} s" if here else f"{seconds / 3600:8,.1f} h"
        print(f"{str(task):50} {alphas:>26} {cost_of(task, scale):10.2e} {shown}")
    memory, disk = (size / 2**30 for size in room_of(tasks, scale, jobs, not here))
    print(f"\nmemory about {memory:,.1f} GiB with {jobs} jobs; disk at most {disk:,.1f} GiB (estimated)")
    flops = sum(cost_of(t, scale) for t in tasks)
    seconds = sum(cost_of(t, scale) / speed[t.size] for t in tasks)
    small_card = f", {flops / (0.4 * 165e12) / 3600:,.0f} on a 24 GB RTX 4090 (of 165)"
    print(f"{scale_name}: {flops:.2e} FLOPs, " + (
        f"about {seconds / jobs / 60:.0f} minutes on this machine with {jobs} jobs, by uncompiled steps "
        "timed just now\n(preparing, compiling and evaluating come on top)" if here else
        f"{seconds / 3600:,.0f} hours on an H100 (at 40 % of 989 TFLOP/s in bf16)"
        f"{small_card if memory < 24 else ''}; computed"))


# ------------------------------------------------------------------------------
# the findings: from here on everything is a function of the rows of results.jsonl

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last, a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def interval(values):
    """-> mean, half-width of its 95 % t-interval (infinite for a single value)."""
    values = list(values)
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T_975[min(n - 1, len(T_975)) - 1] * deviation / math.sqrt(n)


def show(values, digits=3):
    """'+0.012 ± 0.003', or the mean alone for a single value."""
    mean, half = interval(values)
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if half < math.inf else "")


def lower(values, sign=1):
    """The lower end of the interval (sign -1: the upper); below 3 values the mean stands for both."""
    values = list(values)
    mean, half = interval(values)
    return mean - sign * (half if len(values) > 2 else 0)


def level(row, where, half="report"):
    """
    A number of which less is better: nats per token "in" domain or "out" (mean over the sets), the mean error
    of the "tasks" (a fraction), or the mean calibration error "ece". None where there are no such metrics.
    """
    prefix = {"in": "in_domain", "out": "ood/", "tasks": "task/", "ece": "ece/"}[where]
    values = [v[half] for k, v in row["metrics"].items() if k.startswith(prefix)]
    mean = sum(values) / len(values) if values else None
    return 1 - mean if where == "tasks" and values else mean


class Gains:
    """What students of one size gained over the alpha = 0 baseline of the same seed."""

    def __init__(self, rows, size, scale):
        self.size, self.scale, self.tokens = size, scale, scale.students[size]
        self.ablated = [r for r in rows if r.get("ablation")]
        rows = [r for r in rows if not r.get("ablation")]
        students = [r for r in rows if r["kind"] == "student" and r["size"] == size]
        self.alone = [r for r in students if not r["teacher"]]
        self.base = {r["seed"]: r for r in self.alone if r["tokens"] == self.tokens}
        self.cells = {}                                      # teacher (size, tokens) -> alpha -> seed -> row
        for r in students:
            if r["teacher"]:
                by_alpha = self.cells.setdefault((r["teacher"]["size"], r["teacher"]["tokens"]), {})
                by_alpha.setdefault(r["alpha"], {})[r["seed"]] = r
        self.teachers = sorted(self.cells, key=lambda t: (list(SIZES).index(t[0]), t[1]))
        self.own = {t: [r for r in rows if r["kind"] == "teacher" and (r["size"], r["tokens"]) == t]
                    for t in self.teachers}
        self.weakness = {t: self.mean(self.own[t], "in") - self.mean(self.base.values(), "in")
                         for t in self.teachers}
        self.weak = [t for t in self.teachers if self.weaker(t)]
        self.most = max(r["tokens"] for r in self.alone) / self.tokens      # of the student alone
        self.wheres = [w for w in ("in", "out", "tasks") if level(self.alone[0], w) is not None]

    def mean(self, rows, where):
        """Mean level of some rows on the report halves."""
        return interval([level(r, where) for r in rows])[0]

    def gain(self, teacher, alpha, where, half="report", percent=False):
        """seed -> how much lower than the baseline's the level is; percent: of the baseline's."""
        gains = {}
        for seed, row in sorted(self.cells[teacher][alpha].items()):
            base = level(self.base[seed], where, half)
            gains[seed] = (base - level(row, where, half)) * (100 / base if percent else 1)
        return gains

    def best_alpha(self, teacher):
        """The alpha with the largest gain out of distribution on the select halves, over all seeds."""
        return max(self.cells[teacher], key=lambda a: sum(self.gain(teacher, a, "out", "select").values()))

    def best(self, teacher, where, half="report", percent=False):
        """seed -> the gain at that alpha."""
        return self.gain(teacher, self.best_alpha(teacher), where, half, percent)

    def compute(self, teacher):
        """Training FLOPs of a student with this teacher's forward passes over those of a student alone."""
        forward = flops_per_token(shape_of(teacher[0], self.scale))
        return 1 + forward / flops_per_token(shape_of(self.size, self.scale), backward=True)

    def plain_gain(self, ratio, where):
        """
        seed -> what plain pretraining gains from `ratio` times the tokens: read off a parabola in ln(tokens)
        through the student alone at its budgets, and never beyond the largest.
        """
        gains = {}
        for seed, base in self.base.items():
            rows = [r for r in self.alone if r["seed"] == seed]
            x = [math.log(r["tokens"] / self.tokens) for r in rows]
            curve = np.polyfit(x, [level(r, where) for r in rows], min(2, len(rows) - 1))
            gains[seed] = level(base, where) - float(np.polyval(curve, math.log(min(ratio, self.most))))
        return gains

    def weaker(self, teacher):
        """Whether a teacher is worse than the student alone, in domain and out of distribution, beyond the
        interval."""
        own = {r["seed"] - 1000: r for r in self.own[teacher]}
        return all(lower(level(own[seed], w) - level(base, w) for seed, base in self.base.items()) > 0
                   for w in ("in", "out"))


def ranks_of(values):
    """The rank of each value, equal ones sharing the mean of theirs."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def alpha_trend(g):
    """
    seed -> Spearman's rank correlation, over the teachers, of their strength (the negative of their own
    in-domain loss) with the alpha that is best with them (out of distribution, select half, of this seed
    alone); nothing below three teachers.
    """
    found = {}
    for seed in g.base if len(g.teachers) > 2 else ():
        own = [-level(next(r for r in g.own[t] if r["seed"] == 1000 + seed), "in") for t in g.teachers]
        best = [max(g.cells[t], key=lambda a: g.gain(t, a, "out", "select")[seed]) for t in g.teachers]
        x, y = ranks_of(own), ranks_of(best)
        dx, dy = ([v - sum(values) / len(values) for v in values] for values in (x, y))
        size = math.sqrt(sum(v * v for v in dx) * sum(v * v for v in dy))
        found[seed] = sum(a * b for a, b in zip(dx, dy)) / size if size else 0.0
    return found


def above_zero(values):
    """Whether the interval lies above zero (True), below it (False) or across (None)."""
    return True if lower(values) > 0 else False if lower(values, -1) < 0 else None


def verdict(claim, values, seen):
    """The claim with its verdict, which takes three seeds; seen: True, False, or None for undecided."""
    if len(values) >= 3:
        return f"**{claim}: {'undecided' if seen is None else 'reproduced' if seen else 'not reproduced'}.**"
    return f"**{claim}: too few seeds ({len(values)}), {'seen' if seen else 'not seen'}.**"


def strongest_weak(g):
    """Of the teachers weaker than the student alone the most helpful on the select halves, or None."""
    return max(g.weak, key=lambda t: sum(g.best(t, "out", "select").values()), default=None)


def findings(g):
    """The paper's three claims, each judged on the rows of one student size -> three paragraphs."""
    sure = len(g.base) > 2
    claim, t = "A weak teacher helps a stronger student", strongest_weak(g)
    if t:
        best = {w: list(g.best(t, w).values()) for w in g.wheres}
        points = [100 * v for v in best.get("tasks", ())]
        tasks = f", {show(points, 1)} points on the tasks" if points else ""
        helpful = [t for t in g.weak if lower(g.best(t, "out").values()) > 0]
        first = (f"{verdict(claim, best['in'], above_zero(best['out']))} {name(t)}, whose own loss is "
                 f"{g.weakness[t]:.3f} above what the student reaches alone, gives it {show(best['out'])} "
                 f"nats out of distribution, {show(best['in'])} in domain{tasks}, at alpha "
                 f"{g.best_alpha(t):g}. "
                 f"Weaker teachers that help out of distribution{', beyond their interval' * sure}: "
                 f"{len(helpful)} of {len(g.weak)}")
        if helpful:
            weakest = max(helpful, key=g.weakness.get)
            first += (f"; the weakest of these is {name(weakest)}, {g.weakness[weakest]:.3f} above "
                      f"({show(g.best(weakest, 'out').values())})")
        mean = [sum(g.best(t, "out")[seed] for t in g.weak) / len(g.weak) for seed in g.base]
        first += f". On average the weaker ones give {show(mean)}."
    else:
        first = f"**{claim}: not tested**, for no teacher here is weaker than the student alone."

    claim = "A stronger teacher saturates or reverses the gain"
    most = max(n for _, n in g.teachers)                     # along size at the most tokens, and along tokens
    paths = [[t for t in g.teachers if t[1] == most]] + [[t for t in g.teachers if t[0] == s] for s in SIZES]
    steps, skipped, seen = [], set(), None
    for i, everyone in enumerate(paths):
        path = []                                            # only teachers stronger than those before them
        for t in everyone:
            if path and g.weakness[t] >= g.weakness[path[-1]]:
                skipped.add(name(t))
            else:
                path.append(t)
        if len(path) < 2:
            continue
        best = [g.best(t, "out") for t in path]
        last = [best[-1][seed] - best[-2][seed] for seed in g.base]
        top = path[max(range(len(path)), key=lambda i: sum(best[i].values()))]
        word = {True: "rises", False: "falls"}.get(above_zero(last)) or (
            "saturates" if lower(last, -1) < interval(best[-2].values())[0] / 4 else "is undecided")
        if i == 0:
            seen = None if word == "is undecided" else word != "rises"
        steps.append(f"from {name(path[-2])} to {name(path[-1])} it {word} ({show(last)}; largest "
                     f"with {name(top)})")
    second = (f"{verdict(claim, list(g.base), seen)} The best gain out of distribution, along size and then "
              f"along tokens: {'; '.join(steps) or 'teachers of one size and budget only'}.")
    if skipped:
        second += (" Left out, no stronger than one of fewer parameters or tokens: "
                   f"{', '.join(sorted(skipped))}.")

    claim = "Generalisation improves before in-domain fit"
    cells = [(t, alpha) for t in g.teachers for alpha in g.cells[t]]
    inside, outside = ([g.gain(*cell, where) for cell in cells] for where in ("in", "out"))
    shares = [[g.gain(*cell, where, percent=True) for cell in cells] for where in ("in", "out")]
    ahead = [sum(o[s] - i[s] for i, o in zip(*shares)) / len(cells) for s in g.base]
    doubled = {where: g.plain_gain(2, where) for where in ("in", "out")}
    rate = {s: doubled["out"][s] / doubled["in"][s] for s in g.base}
    beyond = [sum(o[s] - rate[s] * i[s] for i, o in zip(inside, outside)) / len(cells) for s in g.base]
    mixed = sum(sum(i.values()) < 0 < sum(o.values()) for i, o in zip(inside, outside))
    clearly = sum(lower(i.values(), -1) < 0 < lower(o.values()) for i, o in zip(inside, outside))
    third = (f"{verdict(claim, ahead, above_zero(ahead))} Over all {len(cells)} cells, no alpha chosen, the "
             f"gain out of distribution is {show(ahead, 2)} percent of the loss ahead of that in domain. "
             f"Cells that lose in domain and gain outside: {mixed}"
             f"{f', both beyond their interval: {clearly}' * sure}. Doubling the tokens of the student alone "
             f"brings {interval(rate.values())[0]:.2f} nats outside for each in domain; at that rate, the "
             f"cells gain {show(beyond)} nats more outside than their change in domain would bring.")
    return [first, second, third]


DEFINITIONS = """
# How the verdicts are reached

A gain is how much lower the loss of a student is than that of the alpha = 0 student of the same seed, in nats
per token; ± is a 95 % t-interval over seeds, paired by seed, for each figure alone. Every evaluation set and
task has two disjoint halves: alpha is chosen for each teacher by the mean loss out of distribution on the
`select` halves, and every gain shown is of the `report` halves, but of the same trained students, so choosing
flatters the best. Tasks are made from held-out documents of the corpus. A claim is undecided where its
interval lies on both sides of zero. Below three seeds there is no verdict, only what was seen.

1. Of the teachers whose own loss is above the baseline's beyond the interval, in domain and out of
   distribution, the one most helpful on the select halves gives a gain out of distribution whose interval
   lies above zero.
2. Along teacher size at the largest budget, leaving out teachers that are no stronger than one before, the
   last step of the best gain falls (its interval lies below zero) or saturates (it does not rise, and its
   upper end is below a quarter of the gain before it). Along tokens the last teacher's learning rate has come
   down and that of those before has not, so these steps are shown and not judged.
3. The relative gain out of distribution, averaged over all cells, exceeds that in domain, and the interval of
   the difference lies above zero. Plain pretraining, too, moves the two losses at different rates, so cells
   that lose count as ahead; the last figure of the finding takes that rate out, and is not judged.
"""


def table(head, rows):
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def report(g):
    """The findings and all cells of one student size, in Markdown."""
    base, has_tasks = list(g.base.values()), "tasks" in g.wheres
    sets = ", ".join(k[4:] for k in base[0]["metrics"] if k.startswith("ood/"))
    budgets = ", ".join(short(n) for n in sorted({r["tokens"] for r in g.alone}))
    rows, unsure, pays, costs = [], [], [], []
    for t in g.teachers:
        best = {w: g.best(t, w).values() for w in g.wheres}
        percent = [show(g.best(t, w, percent=True).values(), 1) for w in g.wheres]
        ratio = g.compute(t)
        plain = {w: g.plain_gain(ratio, w) for w in ("in", "out")}
        net = [g.best(t, "out")[seed] - plain["out"][seed] for seed in g.base]
        at_least, at_most = (sign * (ratio > g.most) for sign in (">= ", "<= "))
        rows.append([name(t), f"{g.weakness[t]:+.3f}", f"{g.best_alpha(t):g}",
                     show(best["in"]), show(best["out"]), *percent, f"{ratio:.2f}",
                     " / ".join(f"{at_least}{interval(v.values())[0]:+.3f}" for v in plain.values()),
                     f"{at_most}{show(net)}"])
        unsure += [name(t)] * (interval(best["out"])[1] >= abs(interval(best["out"])[0]))
        pays += [name(t)] * (lower(net) > 0 and ratio <= g.most)
        costs += [name(t)] * (lower(net, -1) < 0)
    text = [f"# Distilling into the {g.size} student, {short(g.tokens)} tokens", "", "## Findings", ""]
    text += [f"{i}. {paragraph}" for i, paragraph in enumerate(findings(g), 1)]
    text += ["", "## The best alpha for each teacher", "",
             f"Alone, the student reaches {g.mean(base, 'in'):.3f} nats per token in domain and "
             f"{g.mean(base, 'out'):.3f} out of distribution (the mean of {sets}). A teacher's weakness is "
             "its own in-domain loss minus the student's. Compute is that of a step with the teacher's "
             "forward pass over that of one without; plain is what pretraining alone gains from that many "
             f"times the tokens, read off a parabola through the student alone at {budgets} tokens, seed "
             "by seed, and for more compute than that what it gains from the most tokens. Net is the gain "
             "outside minus the plain one.", ""]
    text += table(["teacher", "weakness", "best alpha", "gain in domain", "gain outside", "in, % of loss",
                   "outside, % of loss", *["fewer task errors, %"] * has_tasks, "compute",
                   "plain, in / outside", "net outside"], rows)
    if trend := alpha_trend(g).values():
        text += ["Does the best alpha rise with the teacher's strength? The rank correlation of the two, "
                 f"alpha chosen for each seed by itself, is {show(trend, 2)}.", ""]
    sure = ", beyond the interval of the net" * (len(base) > 2)
    text += [f"Out of distribution{sure}, distillation gains more than the same compute spent on plain "
             f"pretraining with {', '.join(pays) or 'no teacher'}, and less with "
             f"{', '.join(costs) or 'no teacher'}. The teachers' training is not counted.", "",
             *[f"Undecided: {', '.join(unsure)}, whose gain outside has an interval that includes zero.",
               ""] * bool(unsure),
             "## Every cell: gain in domain / outside", ""]
    alphas = sorted({a for t in g.teachers for a in g.cells[t]})
    text += table(["teacher", *(f"alpha {a:g}" for a in alphas)], [
        [name(t), *(" / ".join(show(g.gain(t, a, w).values()) for w in ("in", "out")) for a in alphas)]
        for t in g.teachers])
    if has_tasks:
        text += ["## Tasks and calibration", "",
                 "Accuracy on the report halves (chance: next_line 0.25, minimal_pair 0.5, recall 0) and "
                 "expected calibration error, the mean over all sets; students at their best alpha.", ""]
        names = [k for k in base[0]["metrics"] if k.startswith("task/")]
        groups = [("student alone", base), *((f"teacher {name(t)}", g.own[t]) for t in g.teachers)]
        groups += [(f"student from {name(t)}", list(g.cells[t][g.best_alpha(t)].values()))
                   for t in g.teachers]
        text += table(["model", "loss in domain", *(k[5:] for k in names), "calibration error"], [
            [who, f"{g.mean(rows, 'in'):.3f}",
             *(f"{interval(r['metrics'][k]['report'] for r in rows)[0]:.3f}" for k in names),
             f"{g.mean(rows, 'ece'):.3f}"] for who, rows in groups])
    return "\n".join(text)


def ablation_report(g):
    """The ablations and what to compare them with, in Markdown; nothing for a student without any."""
    if not g.ablated or g.size != next(iter(g.scale.students)):
        return ""

    def gains_from(a, alpha):
        taught = [r for r in g.ablated if r["ablation"] == a.name and r["kind"] == "student"
                  and r["alpha"] == alpha and r["teacher"] == {"size": a.teacher, "tokens": a.tokens}]
        return " / ".join(show(level(g.base[r["seed"]], w) - level(r, w) for r in taught)
                          for w in ("in", "out"))

    rows = []
    for a in g.scale.ablations:
        same = [r for r in g.ablated if r["ablation"] == a.name]
        t = (a.teacher, a.tokens)
        other_order = [b for b in g.scale.ablations
                       if (b.teacher, b.tokens) == t and a.same_order > b.same_order]
        own = [r for r in same if r["kind"] == "teacher"] or g.own[t]
        loss, like = g.mean(own, "in"), t                    # the same cell of the main runs, if it is one
        if t not in g.cells:
            like = min(g.own, key=lambda u: (u[0] != t[0], abs(g.mean(g.own[u], "in") - loss)))
        for alpha in a.alphas:
            plain = "-"
            if other_order and alpha in other_order[0].alphas:
                plain = f"{gains_from(other_order[0], alpha)} ({other_order[0].name})"
            elif alpha in g.cells[like] and abs(g.mean(g.own[like], "in") - loss) < 0.1:
                plain = " / ".join(show(g.gain(like, alpha, w).values()) for w in ("in", "out"))
                if like != t:
                    plain += f" ({name(like)}, {g.mean(g.own[like], 'in'):.3f})"
            rows.append([a.name, name(t), f"{loss:.3f}", f"{alpha:g}", gains_from(a, alpha), plain])
    return "\n".join([
        "## Controls", "",
        "Gain in domain / out of distribution with a change, and the cell to compare it with. A teacher with "
        "the student's data order and of its size also starts from its weights. An annealed teacher is one "
        "whose learning rate came down; beside it stands the checkpoint on the way of a longer run that has "
        "about its loss. Label smoothing is a teacher after one step, all but uniform.", "",
        *table(["change", "teacher", "its loss", "alpha", "gain", "compare"], rows)])


def tokens_report(g, data, config):
    """
    Which tokens gain, for the most helpful weak (without one the first) and the strongest teacher ->
    (Markdown, {who: [token_gains() out of distribution of each seed]}), empty where the checkpoints are not
    on this machine. config(task) is the Config of a task.
    """
    def model(seed, teacher=None, alpha=0.0):
        taught = {}
        if teacher:
            taught = dict(teacher=by(seed, teacher), at=teacher[1], alphas=tuple(g.cells[teacher]))
        return load(Task("student", g.size, (g.tokens,), seed, **taught), alpha)

    def by(seed, teacher):
        return Task("teacher", teacher[0], g.scale.teachers[teacher[0]], 1000 + seed)

    def load(task, alpha=0.0, tokens=None):
        return load_checkpoint(checkpoint_path(config(task), alpha, tokens), device)[0]
    device, seeds, found = pick_device(config(by(0, g.teachers[0])))[0], sorted(g.base), {}
    weak, strongest = strongest_weak(g) or g.teachers[0], min(g.teachers, key=g.weakness.get)
    try:
        for i, seed in enumerate(seeds):
            base = model(seed)
            for t in dict.fromkeys([weak, strongest]):
                teacher = load(by(seed, t), tokens=t[1])
                pairs = {f"from {name(t)}, alpha {g.best_alpha(t):g}": model(seed, t, g.best_alpha(t))}
                if t == strongest and len(seeds) > 1:        # what differs without any teaching
                    pairs["no teacher, another seed"] = model(seeds[i - 1])
                for who, student in pairs.items():
                    gains = token_gains(base, student, teacher, data, g.scale.windows)["out"]
                    found.setdefault(who, []).append(gains)
    except CheckpointError:
        return "", {}
    rows = []
    for who, all_seeds in found.items():
        shown = show if who.startswith("from") else lambda values: f"{interval(values)[0]:+.3f}"
        parts = []
        for group in all_seeds[0]["groups"]:
            shares, gains = zip(*(x["groups"][group] for x in all_seeds))
            parts.append(f"{shown(a * b for a, b in zip(shares, gains))} ({interval(shares)[0]:.0%})")
        ends = (shown(x["deciles"][i][1] for x in all_seeds) for i in (0, -1))
        rows.append([who, shown(x["gain"] for x in all_seeds), *parts, *ends])
    text = ["## Which tokens gain", "",
            "Out of distribution: the whole gain and its four parts by who predicts the token right "
            "(argmax), with their shares of the tokens; then the mean gain on the easiest and the hardest "
            "tenth of the tokens, by the baseline's loss. That sorting alone makes any second model look "
            "better on the hard ones: compare with another seed, where there is one (each seed against the "
            "one before, so that its whole gain is 0; its groups are by the strongest teacher).", ""]
    text += table(["student", "gain", *all_seeds[0]["groups"], "easiest", "hardest"], rows)
    encoding, seed = load_tokenizer(data), seeds[0]
    writers = {f"the strongest teacher, {name(strongest)}":
               load(by(seed, strongest), tokens=strongest[1]),
               "the student alone": model(seed),
               f"the student from {name(strongest)}": model(seed, strongest, g.best_alpha(strongest))}
    ids = load_tokens(evaluation_sets(data)["in_domain"])[:2000].tolist()    # a line of a held-out document
    prompt = next((line for line in encoding.decode(ids).split("\n") if len(line) > 20), "")[:20]
    text += ["## What they write", "", "After the first 20 characters of a held-out line, one draw each, at "
             f"temperature 0.8 among the 50 likeliest tokens (seed {seed}):", ""]
    for who, writer in writers.items():
        text += [f"{who}:", "", *(f"    {line}" for line in sample(writer, encoding, prompt).split("\n")), ""]
    return "\n".join(text), found


def draw(g, path):
    """The findings as a figure of four panels, PNG and SVG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    by_strength, by_size, by_tokens, both = axes.flat
    sizes, budgets = list(g.scale.teachers), sorted({n for _, n in g.teachers}, reverse=True)
    shade = {s: plt.cm.viridis(0.85 * i / max(1, len(sizes) - 1)) for i, s in enumerate(sizes)}
    marker = dict(zip(sizes, "os^DvP"))
    dash = dict(zip(budgets, itertools.cycle(("-", "--", "-.", ":"))))
    parameters = {s: count_parameters(shape_of(s, g.scale)) for s in sizes}

    def line(axis, x, groups, label, **style):
        points = [interval(v.values()) for v in groups]
        error = [half for _, half in points] if len(g.base) > 2 else None
        axis.errorbar(x, [mean for mean, _ in points], error, label=label, capsize=3, elinewidth=0.8,
                      markersize=5, **style)

    alphas = sorted({a for t in g.teachers for a in g.cells[t]})
    by_loss = sorted(g.teachers, key=g.weakness.get)
    for i, alpha in enumerate(alphas):
        taught = [t for t in by_loss if alpha in g.cells[t]]
        line(by_strength, [g.weakness[t] for t in taught], [g.gain(t, alpha, "out") for t in taught],
             f"{alpha:g}", marker="os^DvP"[i % 6], color=plt.cm.plasma(0.85 * i / max(1, len(alphas) - 1)))
    by_strength.plot([g.weakness[t] for t in by_loss],
                     [interval(g.best(t, "out").values())[0] for t in by_loss], "o", markersize=11,
                     fillstyle="none", color="black", label="chosen")
    for t in g.teachers:
        x, y = ([interval(g.gain(t, a, w).values())[0] for a in g.cells[t]] for w in ("in", "out"))
        longest = t[1] == g.scale.teachers[t[0]][-1]
        both.plot(x, y, label=t[0] if longest else None, ls="none", fillstyle="full" if longest else "none",
                  color=shade[t[0]], marker=marker[t[0]])
    for n in budgets:
        path_ = [t for t in g.teachers if t[1] == n]
        x = [parameters[size] for size, _ in path_]
        line(by_size, x, [g.best(t, "out") for t in path_], f"{short(n)} tokens", ls=dash[n], color="black",
             marker="o")
    plain = [interval(g.plain_gain(g.compute((size, 0)), "out").values())[0] for size in sizes]
    by_size.plot(list(parameters.values()), plain, "--", color="tab:red",
                 label=f"no teacher, same compute (at most {g.most:g}x)")
    for s in sizes:
        path_ = [t for t in g.teachers if t[0] == s]
        line(by_tokens, [n for _, n in path_], [g.best(t, "out") for t in path_], s, color=shade[s],
             marker=marker[s])
    labels = [f"{s}\n{n / 1e6:.2f}M" for s, n in parameters.items()]
    for axis, ticks, labels in ((by_size, list(parameters.values()), labels),
                                (by_tokens, budgets, [short(n) for n in budgets])):
        axis.set_xscale("log")
        axis.set_xticks(ticks, labels)
        axis.xaxis.set_minor_locator(NullLocator())
    outside = "gain out of distribution (nats/token)"
    by_size.margins(y=0.3)                                   # room for the legend
    by_strength.set(title="Gain against the teacher's own loss, for each alpha", ylabel=outside,
                    xlabel="teacher's loss minus the student's alone (nats); stronger: to the right")
    by_strength.invert_xaxis()
    by_strength.axvline(0, color="grey", lw=0.8)
    by_size.set(title="Best gain against teacher size", xlabel="teacher (parameters)", ylabel=outside)
    by_tokens.set(title="Best gain against teacher tokens", xlabel="teacher (tokens)", ylabel=outside)
    both.set(title="Every cell: above the dotted line, more is gained outside", ylabel=outside,
             xlabel="gain in domain (nats/token)")
    both.axline((0, 0), slope=1, color="grey", lw=0.8, ls=":")
    both.axvline(0, color="grey", lw=0.8)
    for axis in axes.flat:
        axis.axhline(0, color="grey", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    by_strength.legend(fontsize=8, title="alpha", title_fontsize=8)
    both.legend(fontsize=8, title="filled: its last budget", title_fontsize=8)
    seeds = f"{len(g.base)} seed{'s' * (len(g.base) > 1)}"
    figure.suptitle(f"Distilling into the {g.size} student: gain over training alone, {seeds}")
    for ending in ("png", "svg"):
        figure.savefig(f"{path}.{ending}", dpi=120)
    plt.close(figure)


def draw_tokens(found, size, path):
    """Gain by the baseline's loss, and by who is right."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (tenths, groups) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    width = 0.8 / len(found)
    for k, (who, seeds) in enumerate(found.items()):
        look = dict(color=plt.cm.viridis(0.85 * k / max(1, len(found) - 1)), label=who)
        curve = [interval(x["deciles"][i][1] for x in seeds) for i in range(10)]
        parts = [interval(math.prod(x["groups"][group]) for x in seeds)
                 for group in seeds[0]["groups"]]
        (means, errors), (sizes, bars) = (zip(*points) for points in (curve, parts))
        if len(seeds) < 3 or not who.startswith("from"):
            errors = bars = None
        tenths.errorbar(range(1, 11), means, errors, ls="-", marker="os^"[k], capsize=3, **look)
        groups.bar([i + k * width for i in range(4)], sizes, width, yerr=bars, capsize=3, edgecolor="black",
                   hatch=("", "//", "..")[k], **look)
    tenths.set(title="Gain by difficulty", xlabel="tokens in tenths, by the baseline's loss",
               xticks=range(1, 11), ylabel="mean gain (nats/token)")
    groups.set(title="Gain by who predicts the token right", ylabel="part of the whole gain (nats/token)")
    groups.set_xticks([i + 0.4 - width / 2 for i in range(4)],
                      ["both", "teacher\nonly", "baseline\nonly", "neither"])
    for axis in (tenths, groups):
        axis.axhline(0, color="grey", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="upper left")
    figure.suptitle(f"Which tokens gain, out of distribution: the {size} student against itself alone")
    for ending in ("png", "svg"):
        figure.savefig(f"{path}.{ending}", dpi=120)
    plt.close(figure)


def chart(g):
    """The best gain of each teacher as bars of text."""
    best = {t: interval(g.best(t, "out").values())[0] for t in g.teachers}
    unit = max(1e-9, *map(abs, best.values())) / 40
    return "\n".join(f"{name(t):>10} {v:+.3f} {'-#'[v > 0] * round(abs(v) / unit)}" for t, v in best.items())


def main():
    """Run the sweep that the command line asks for and write its report, or only print what it would cost."""
    parser = Parser(__doc__)
    parser.add_argument("--scale", default="laptop", choices=SCALES,
                        help="the experiment, see SCALES (default: laptop)")
    parser.add_argument("--out", metavar="DIR", help="results and checkpoints (default: out/SCALE)")
    parser.add_argument("--data", metavar="DIR", help="corpus folder of data.py (default: the scale's "
                        "below data/; the python corpus is made if needed)")
    parser.add_argument("--seeds", type=several(int), metavar="N,N",
                        help="seeds in place of the scale's, such as 1,2,3")
    parser.add_argument("--jobs", type=int, metavar="N", help="tasks at a time; on CPU they share the cores "
                        "(default: as many as cores, on a GPU 1)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    parser.add_argument("--compile", type=switch, help="as in distill.py (default: true, for smoke false)")
    parser.add_argument("--dry_run", action="store_true",
                        help="print every run with its FLOPs and time, do nothing else")
    args = parser.parse_args()
    scale, start = SCALES[args.scale], time.time()
    pick_device(Config(device=args.device))                  # a wrong one is told before anything is done
    if args.seeds:
        scale = replace(scale, seeds=args.seeds)
    on_gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    jobs = args.jobs
    if jobs is None:
        jobs = 1 if on_gpu or not small(scale) else torch.get_num_threads()
    if jobs < 1 or len(set(scale.seeds)) < len(scale.seeds) or min(scale.seeds) < 0:
        parser.error("--jobs must be at least 1, and --seeds different and not negative")
    if args.dry_run:
        return dry_run(args.scale, scale, jobs)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with it ignored
    out, data = args.out or f"out/{args.scale}", args.data or f"data/{scale.corpus}"
    if not args.data and scale.corpus == "python":
        prepare("python", data, scale.vocab_size)
    meta = load_meta(data)
    for set_name in meta["sets"]:                            # damage is told now, not in an hour
        load_shards(os.path.join(data, f"{set_name}.bin"))
    for path in evaluation_sets(data).values():
        read_windows(path, scale.training["block_size"], 1)
    if not any(set_name.startswith("ood_") for set_name in meta["sets"]):
        raise DataError(f"{data} has no out-of-distribution set, which the findings need: data.py --ood "
                        "NAME=FILE")
    scale = replace(scale, vocab_size=meta["vocab_size"])
    read_rows(os.path.join(out, "results.jsonl"))
    os.makedirs(out, exist_ok=True)
    claim = lock(out, wait=0)                                # one sweep at a time in a folder
    how = {"device": args.device, "compile": args.scale != "smoke" if args.compile is None else args.compile}
    rows = sweep(scale, data, out, jobs, how)

    minutes = sum(r["seconds"] for r in rows) / 60
    text = (f"`python sweep.py --scale {args.scale}`, seeds {','.join(map(str, scale.seeds))}; corpus "
            f"{rows[0]['corpus']}; {minutes:.0f} minutes of training, {jobs} runs at a time, on "
            f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}. "
            "Models are named size@tokens: s@4M is of size s, trained on 4M tokens; K is 2^10 and M 2^20.\n")
    for size in scale.students:
        g = Gains(rows, size, scale)
        tokens_text, found = tokens_report(g, data, lambda task: config_of(task, scale, data, out, **how))
        text += f"\n{report(g)}\n{ablation_report(g)}\n{tokens_text}"
        try:
            draw(g, os.path.join(out, f"findings_{size}"))
            text += f"\n![the findings](findings_{size}.png)\n"
            if found:
                draw_tokens(found, size, os.path.join(out, f"tokens_{size}"))
                text += f"\n![which tokens gain](tokens_{size}.png)\n"
        except ImportError:
            print(f"best gain out of distribution; for the figure: pip install matplotlib\n{chart(g)}")
    text += DEFINITIONS
    write(out, "report.md", text.encode())
    print(f"\n{text}\n{out}: report.md, figures, results.jsonl; {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main, ConfigError, CheckpointError)

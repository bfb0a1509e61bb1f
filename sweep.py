"""
Teachers x alphas x seeds -> results.jsonl, a report with the findings, and a picture: the study of "Strong
Teacher Not Needed? On Distillation in LLM Pretraining" (arXiv 2605.23857), at a scale of your choice.

    python sweep.py                                    # --scale laptop: half an hour on two cores
    python sweep.py --scale smoke                      # the same path in a minute or two, no findings
    python sweep.py --student xs@1.5M --teachers xs@1M,m@8M --alphas 0.25,1 --seeds 1,2,3,4 --out out/mine
    python sweep.py --scale full --dry_run             # every run with its FLOPs; nothing is trained
    python sweep.py --report results/full              # table, verdicts, picture from a results.jsonl alone

A model is named size@tokens. The first seed trains a student from each teacher at every alpha; the others
only at the alpha that gained most there. Writes below --out: results.jsonl (one line per model), report.md
and gains_STUDENT.png, rewritten after each seed, and runs/ with the checkpoints. If interrupted, rerun the
same command to resume. What a gain is, and how findings are judged: eval.py.
"""
import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent import futures
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from data import UserError, load_meta, load_windows, make_parser, note_repeats, prepare, run_main
from distill import Config, check, recipe, train
from eval import (IN, KEYS, OUT, choose, evaluate, evaluation_sets, metric, model_name, parse_model,
                  read_rows, write_report)
from model import SIZES, GPTConfig, flops_per_token, load_checkpoint, pick_device


@dataclass
class Scale:
    """One experiment. A model is named size@tokens."""
    student: str
    teachers: tuple                  # trained in this order
    alphas: tuple
    seeds: tuple                     # of a student's weights and data order; the first chooses alpha
    teacher_sets: int = 1            # seed n learns from the teachers of seed 2000 + n % teacher_sets
    vocab_size: int = 512
    data: str = "data/python"        # corpus folder of data.py
    training: dict = field(default_factory=dict)       # what differs from Config's defaults
    windows: int = 512               # of each set, for evaluate()
    speed: float = 9.5e10            # FLOP/s of the machine, for --dry_run; here two slow CPU cores


SCALES = {
    "smoke": Scale("s@32K", ("bigram@64K", "xs@8K", "xs@64K", "s@64K", "m@64K"), (0.25, 1.0), range(1, 5),
                   windows=32, training={"compile": False}),
    "laptop": Scale("s@1.5M", ("xs@2M", "bigram@8M", "xs@8M", "s@8M", "l@8M"), (0.1, 0.25, 0.5, 1.0),
                    range(71, 77)),
    "full": Scale("s@1.5M", ("bigram@8M", "xs@2M", "l@500K", "xs@8M", "s@1.5M", "l@2M", "s@8M", "l@8M"),
                  (0.1, 0.25, 0.5, 1.0), range(81, 87), teacher_sets=6),     # each seed has its own
    "gpu": Scale("5M@8M", ("bigram@32M", "l@8M", "m@32M", "5M@32M", "20M@32M"), (0.25, 1.0), range(1, 7),
                 training=dict(batch_size=32, block_size=256), speed=1e13),
    "fineweb": Scale("124M@256M", ("124M@64M", "30M@512M", "124M@512M", "350M@512M"), (0.25, 1.0),
                     range(1, 5), vocab_size=50_304, data="data/fineweb", speed=2.7e14,
                     training=dict(batch_size=32, accumulate=4, block_size=1024, warmup=0.05)),
}


@dataclass(frozen=True)
class Run:
    """One call of train(), one row of results.jsonl: a model alone, or a student of a teacher."""
    model: str
    seed: int
    teacher: "Run" = None
    alpha: float = 0.0               # None: not chosen yet

    @property
    def name(self):
        taught = f"_from_{self.teacher.name}_alpha_{self.alpha:.15g}" if self.teacher else ""
        return f"{self.model}_seed_{self.seed}{taught}"

    @property
    def key(self):
        """The KEYS of its row."""
        teacher, teacher_seed = (self.teacher.model, self.teacher.seed) if self.teacher else (None, None)
        return self.model, self.seed, teacher, teacher_seed, self.alpha

    @property
    def alone(self):
        """The same student without a teacher, against which its gain is measured."""
        return Run(self.model, self.seed)

    def config(self, scale, out, device="auto"):
        """-> the Config of its training."""
        size, tokens = parse_model(self.model)
        teacher = f"{out}/runs/{self.teacher.name}/ckpt.pt" if self.teacher else ""
        return Config(data=scale.data, out=f"{out}/runs/{self.name}", size=size, tokens=tokens,
                      seed=self.seed, teacher=teacher, alpha=self.alpha, device=device, **scale.training)

    def flops(self, scale):
        """-> FLOPs of its training, and of its teacher's forward passes over the same tokens."""
        def forward(model):
            block_size = Config(**scale.training).block_size
            shape = GPTConfig(scale.vocab_size, block_size, **SIZES[parse_model(model)[0]])
            return parse_model(self.model)[1] * flops_per_token(shape)
        return 3 * forward(self.model), forward(self.teacher.model) if self.teacher else 0

    def work(self, scale):
        """FLOPs with 400,000 a token for overhead, and those of evaluation: roughly in proportion to time."""
        student, teacher = self.flops(scale)
        tokens = parse_model(self.model)[1]
        if student:                                          # a table only counts
            student += 400_000 * tokens
        return (student + teacher) * (1 + 2 * scale.windows * Config(**scale.training).block_size / tokens)


def plan(scale, rows):
    """
    -> every run, after those it needs. The seed that chooses alpha comes first, and what it has tried before
    counts; on the others alpha is None until it is chosen.
    """
    chooser, alphas, _, best = choose(rows, scale.student, scale.alphas)
    chooser = scale.seeds[0] if chooser is None else chooser
    size, tokens = parse_model(scale.student)
    runs = []
    for seed in dict.fromkeys([chooser, *scale.seeds]):
        runs += [Run(model_name(size, n * tokens), seed) for n in (1, 2)]    # on the text, and on twice
        for name in scale.teachers:
            teacher = Run(name, 2000 + seed % scale.teacher_sets)
            tried = alphas if seed == chooser else [best.get(name)]
            runs += [teacher, *(Run(scale.student, seed, teacher, alpha) for alpha in tried)]
    return [*dict.fromkeys(runs)]                            # seeds may share teachers


def start_worker(threads):
    """Set up a worker: it shares the cores, and exits when its parent does, even if that is killed."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train_and_evaluate(run, scale, out, device, show_progress):
    """In a worker -> a row of results.jsonl."""
    start = time.perf_counter()
    path = train(run.config(scale, out, device), show_progress)
    model, _ = load_checkpoint(path, device)
    metrics = evaluate(model, scale.data, scale.windows)
    flops, teacher_flops = run.flops(scale)
    return {**dict(zip(KEYS, run.key)), "setup": setup(scale, device),
            "flops": flops, "teacher_flops": teacher_flops,
            "seconds": round(time.perf_counter() - start, 1), "metrics": metrics}


def setup(scale, device):
    """What determines a row's metrics, apart from which model it is; rows of two setups are not compared."""
    meta, config = load_meta(scale.data), Config(**scale.training)
    _, dtype = pick_device(device, config.dtype)
    return {**recipe(config, meta, dtype), "windows": scale.windows, "vocab_size": scale.vocab_size,
            "text": meta["sets"]["train"]["tokens"]}


def line_of(run, rows):
    """
    's@1.5M alone, seed 71: loss 2.947 in domain, 3.477 outside', or, for a run with a teacher,
    'xs@2M (0.27 nats worse) -> s@1.5M, seed 71, alpha 0.1: outside +0.045, in domain +0.012'
    """
    mine = rows[run.key]["metrics"]
    inside, outside = mine[IN], metric(mine, OUT)
    if not run.teacher:
        return f"{run.model} alone, seed {run.seed}: loss {inside:.3f} in domain, {outside:.3f} outside"
    alone, teacher = rows[run.alone.key]["metrics"], rows[run.teacher.key]["metrics"]
    worse = teacher[IN] - alone[IN]
    compared = f"{abs(worse):.2f} nats {'worse' if worse > 0 else 'better'}"
    return (f"{run.teacher.model} ({compared}) -> {run.model}, seed {run.seed}, alpha {run.alpha:g}: "
            f"outside {metric(alone, OUT) - outside:+.3f}, in domain {alone[IN] - inside:+.3f}")


def missing(scale, rows, out):
    """The runs without a row, and the teachers that they need but whose checkpoints are lost."""
    runs = plan(scale, rows.values())
    needed = {run.teacher for run in runs if run.key not in rows and run.alpha is not None}
    return [run for run in runs if run.key not in rows
            or run in needed and not os.path.exists(f"{out}/runs/{run.name}/ckpt.pt")]


def sweep(scale, out, jobs, device):
    """Run what is not in results.jsonl yet, `jobs` runs at a time -> all of its rows."""
    path = f"{out}/results.jsonl"
    rows = {tuple(row[name] for name in KEYS): row for row in read_rows(path, setup(scale, device))}
    threads = max(1, torch.get_num_threads() // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")   # which complains after Ctrl-C
    vars(sys.modules["__main__"]).setdefault("__spec__", None)           # spawning needs it; %run drops it
    pool = futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (threads,))
    todo = missing(scale, rows, out)
    running = {}                                             # future -> its run, still in todo
    total = sum(run.work(scale) for run in todo)
    bar = tqdm(total=total, bar_format="{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
               smoothing=0, miniters=0, mininterval=1 if os.isatty(2) else 60)
    try:
        while todo or running:
            unfinished = {*todo}
            for run in todo:
                waits = run.alpha is None or run.teacher and {run.teacher, run.alone} & unfinished
                if not waits and run not in running.values() and len(running) < jobs:
                    running[pool.submit(train_and_evaluate, run, scale, out, device, jobs == 1)] = run
            finished, _ = futures.wait(running, timeout=1, return_when=futures.FIRST_COMPLETED)
            for future in finished:
                run = running.pop(future)
                try:
                    rows.setdefault(run.key, future.result())                # a lost teacher keeps its row
                except UserError as e:
                    raise UserError(f"{run.name}: {e}") from None
                todo = missing(scale, rows, out)
                save_rows(path, rows)
                bar.update(run.work(scale))
                bar.write(line_of(run, rows))
                if run.teacher and run.seed not in {other.seed for other in todo}:
                    lines = write_report(read_rows(path), out).splitlines()
                    bar.write("\n".join(["", *(x for x in lines if "**" in x or x.startswith("## ")), ""]))
            bar.update(0)                                    # the clock
    except futures.process.BrokenProcessPool:
        raise UserError("a worker died (out of memory? try --jobs 1); rerun the same command to "
                        "resume") from None
    finally:
        for worker in multiprocessing.active_children():     # after Ctrl-C or a failure
            worker.kill()
        bar.close()
        pool.shutdown(cancel_futures=True)
    return read_rows(path)


def save_rows(path, rows):
    """Replace the file as a whole; rows that another sweep has added to it meanwhile stay."""
    merged = {tuple(row[name] for name in KEYS): row for row in read_rows(path)} | rows
    aside = f"{path}.{os.getpid()}.tmp"
    with open(aside, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in merged.values())
    os.replace(aside, path)


def list_of(kind):
    """-> a parser of lists: for kind float '0.25,1' -> (0.25, 1.0)."""
    def values(text):
        parts = tuple(kind(part) for part in text.split(","))
        if len({*parts}) < len(parts):
            raise argparse.ArgumentTypeError(f"{text} names one twice")
        return parts
    return values


def main():
    """Run the sweep that the command line asks for and report, or only report, or only print its cost."""
    parser = make_parser(__doc__)
    folder = dict(metavar="DIR", type=os.path.expanduser)
    parser.add_argument("--scale", default="laptop", choices=SCALES, help="the experiment (default: laptop)")
    parser.add_argument("--student", metavar="MODEL", help="instead of the scale's, such as s@1.5M")
    parser.add_argument("--teachers", metavar="MODEL,MODEL", type=list_of(str),
                        help="instead of the scale's, in this order")
    parser.add_argument("--alphas", metavar="A,A", type=list_of(float),
                        help="instead of the scale's, such as 0.25,1")
    parser.add_argument("--seeds", metavar="N,N", type=list_of(int),
                        help="instead of the scale's, such as 1,2,3,4; the first chooses alpha")
    parser.add_argument("--out", **folder, help="results and checkpoints (default: out/SCALE)")
    parser.add_argument("--data", **folder, help="corpus folder of data.py (default: the scale's)")
    parser.add_argument("--jobs", type=int, metavar="N", help="parallel runs (default: cores; on a GPU, 1)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    parser.add_argument("--dry_run", action="store_true", help="only print every run, with its FLOPs at the "
                        "scale's vocabulary")
    parser.add_argument("--report", **folder, help="only rewrite report and picture of DIR/results.jsonl")
    args = parser.parse_args()
    if args.report:
        return print(write_report(read_rows(f"{args.report}/results.jsonl"), args.report))
    scale = SCALES[args.scale]
    for name in ("student", "teachers", "alphas", "seeds", "data"):
        scale = replace(scale, **{name: getattr(args, name) or getattr(scale, name)})
    canonical = [model_name(*parse_model(model)) for model in (scale.student, *scale.teachers)]  # 2000K: 2M
    scale = replace(scale, student=canonical[0], teachers=canonical[1:])
    start, out = time.perf_counter(), args.out or f"out/{args.scale}"
    if args.dry_run:
        return dry_run(scale)

    if not args.data and scale.data == "data/python":
        prepare("python", scale.data, scale.vocab_size)
    scale = replace(scale, vocab_size=load_meta(scale.data)["vocab_size"])
    device, _ = pick_device(args.device)
    runs = plan(scale, read_rows(f"{out}/results.jsonl"))
    refuse_early(scale, runs, out)
    jobs = args.jobs or (torch.get_num_threads() if device.type == "cpu" else 1)
    jobs = max(1, min(jobs, len(runs), 61))                  # 61: what Windows allows
    print(f"{len(runs)} runs on {device}, {jobs} at a time, into {out}")
    os.makedirs(out, exist_ok=True)
    report = write_report(sweep(scale, out, jobs, str(device)), out)
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{report}\n{out}: report.md, picture, results.jsonl; {minutes:.1f} minutes")


def dry_run(scale):
    """Print every run, and what all cost."""
    runs = plan(scale, [])
    for run in runs:
        alpha = "as chosen" if run.alpha is None else f"{run.alpha:g}"
        taught = f"from {run.teacher.model}, alpha {alpha}" if run.teacher else "alone"
        print(f"{run.model:10} seed {run.seed:4} {taught:32} {sum(run.flops(scale)):9.2e} FLOPs")
    flops = sum(sum(run.flops(scale)) for run in runs)
    hours = sum(run.work(scale) for run in runs) / scale.speed / 3600
    print(f"{len(runs)} runs, {flops:.2e} FLOPs; with overhead about {hours:,.1f} hours at "
          f"{scale.speed:.1e} FLOP/s")


def refuse_early(scale, runs, out):
    """Refuse bad settings and evaluation sets before anything is trained."""
    sets = evaluation_sets(scale.data)
    if len(sets) < 2:
        raise UserError(f"{scale.data} has no out-of-distribution set: make it again with data.py --ood")
    for path in sets.values():
        load_windows(path, Config(**scale.training).block_size)
    for run in runs:
        if run.alpha is not None:
            check(run.config(scale, out), scale.vocab_size)
    note_repeats(scale.data, max(parse_model(run.model)[1] for run in runs))


if __name__ == "__main__":
    run_main(main)

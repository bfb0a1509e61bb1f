"""
Teachers x alphas x seeds -> results.jsonl, a report with the findings, and a figure: the study of "Strong
Teacher Not Needed? On Distillation in LLM Pretraining" (arXiv 2605.23857), at a scale of your choice.

    python sweep.py                                    # --scale laptop: 52 minutes on two slow cores
    python sweep.py --scale smoke                      # the same path in a minute, too small for findings
    python sweep.py --student xs@1.5M --teachers xs@1M,m@8M --alphas 0.25,1 --seeds 1,2,3 --out out/mine
    python sweep.py --scale full --dry_run             # every run with its FLOPs; nothing is trained
    python sweep.py --report results/full              # table, verdicts, figure from a results.jsonl alone

A model is named size@tokens. Writes below --out: results.jsonl (one line per model), report.md and
findings_STUDENT.png, rewritten after each seed, and runs/ with the checkpoints. If interrupted, rerun the
same command to resume. What a gain is, and how findings are judged: eval.py.
"""
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

from data import UserError, load_meta, make_parser, note_repeats, prepare, run_main
from distill import Config, list_of_numbers, settings_of, train
from eval import (IN, KEYS, OUT, evaluate, evaluation_sets, metric, model_name, parse_model, read_rows,
                  write_report)
from model import SIZES, GPTConfig, flops_per_token, load_checkpoint, pick_device


@dataclass
class Scale:
    """One experiment. A model is named size@tokens."""
    student: str
    teachers: str                    # trained in this order
    alphas: tuple = (0.25, 0.5, 1.0)
    seeds: tuple = (1, 2, 3)         # of a student's weights and data order
    teacher_sets: int = 1            # seed n learns from the teachers of seed 1000 + n % teacher_sets
    vocab_size: int = 512
    corpus: str = "python"           # of data.py, in the folder data/CORPUS
    training: dict = field(default_factory=dict)       # what differs from Config's defaults
    windows: int = 512               # of each set, for evaluate()
    items: int = 500                 # of the task
    speed: float = 9.5e10            # FLOP/s of the machine, for --dry_run; here two slow CPU cores


SCALES = {
    "smoke": Scale("s@32K", "bigram@64K xs@8K xs@64K s@64K m@64K", (0.25, 1.0), windows=32, items=32,
                   training={"compile": False}),
    "laptop": Scale("s@1.5M", "xs@2M bigram@8M xs@8M s@8M l@8M", (0.1, 0.25, 0.5, 1.0), range(51, 55)),
    "full": Scale("s@1.5M", "unigram@8M bigram@8M xs@1M xs@2M s@1M xs@8M s@8M m@8M l@8M",
                  (0.1, 0.25, 0.5, 1.0), range(21, 27), teacher_sets=8),     # each seed has its own
    "gpu": Scale("5M@8M", "bigram@32M l@8M m@32M 5M@32M 20M@32M", (0.25, 1.0), range(1, 6),
                 training=dict(batch_size=32, block_size=256), speed=1e13),
    "fineweb": Scale("124M@256M", "124M@64M 30M@512M 124M@512M 350M@512M", (0.25, 1.0), corpus="fineweb-edu",
                     vocab_size=50_304, speed=2.7e14,
                     training=dict(batch_size=32, accumulate=4, block_size=1024, lr=1e-3, warmup=0.05)),
}


@dataclass(frozen=True)
class Run:
    """One call of train(): a model alone, or a student for each alpha from one teacher."""
    model: str
    seed: int
    alphas: tuple = (0.0,)
    teacher: "Run" = None
    alone: "Run" = None              # what a student's gains are measured against

    @property
    def name(self):
        return f"{self.model}_seed_{self.seed}" + (f"_from_{self.teacher.name}" if self.teacher else "")

    @property
    def keys(self):
        """The KEYS of the rows it makes."""
        teacher, teacher_seed = (self.teacher.model, self.teacher.seed) if self.teacher else (None, None)
        return [(self.model, self.seed, teacher, teacher_seed, alpha) for alpha in self.alphas]

    def checkpoint(self, out):
        """Where a model alone is saved."""
        return f"{out}/runs/{self.name}/ckpt.pt"

    @property
    def tokens(self):
        return parse_model(self.model)[1]

    def flops(self, scale):
        """-> FLOPs of training one student, and of its teacher's forward passes over the same tokens."""
        def forward(run):
            shape = SIZES[parse_model(run.model)[0]]
            config = GPTConfig(scale.vocab_size, Config(**scale.training).block_size, **shape)
            return self.tokens * flops_per_token(config)
        return 3 * forward(self), forward(self.teacher) if self.teacher else 0

    def evaluation(self, scale):
        """How many training tokens take as long as its evaluation, roughly."""
        return 3 * scale.windows * Config(**scale.training).block_size

    def work(self, scale):
        """FLOPs, plus 400,000 a token for overhead, with evaluation: roughly in proportion to time."""
        student, teacher = self.flops(scale)
        if student:                                          # a table only counts
            student += 400_000 * self.tokens
        return (len(self.alphas) * student + teacher) * (1 + self.evaluation(scale) / self.tokens)

    def fraction_done(self, scale, out):
        """How much of its work is in its log."""
        try:
            with open(f"{out}/runs/{self.name}/log.jsonl") as f:
                steps = 1 + json.loads(f.readlines()[-1])["step"]
        except (OSError, IndexError, ValueError):            # not begun, or a line half written
            return 0
        return steps * Config(**scale.training).tokens_per_step / (self.tokens + self.evaluation(scale))


def plan(scale):
    """All runs in an order in which each follows those it needs: seed by seed, teacher by teacher."""
    runs, (size, tokens) = [], parse_model(scale.student)
    for seed in scale.seeds:
        alone, twice = (Run(model_name(size, n * tokens), seed) for n in (1, 2))
        runs.append(alone)
        for model in scale.teachers.replace(",", " ").split():
            teacher = Run(model_name(*parse_model(model)), 1000 + seed % scale.teacher_sets)
            runs += [teacher, Run(alone.model, seed, scale.alphas, teacher, alone)]
        runs.append(twice)
    return list(dict.fromkeys(runs))                         # without repeats: students share teachers


def start_worker(threads):
    """Set up a worker: it shares the cores, and exits when its parent does, even if that is killed."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train_and_evaluate(run, scale, data, out, device):
    """In a worker -> rows of results.jsonl, one for each alpha."""
    start, rows = time.perf_counter(), []
    config = Config(data=data, out=f"{out}/runs/{run.name}", size=parse_model(run.model)[0], seed=run.seed,
                    tokens=run.tokens, teacher=run.teacher.checkpoint(out) if run.teacher else "",
                    alpha=run.alphas, device=device, **scale.training)
    student_flops, teacher_flops = run.flops(scale)
    of_all = {"setup": setup(scale, data, device), "flops": student_flops, "teacher_flops": teacher_flops}
    for key, path in zip(run.keys, train(config, show_progress=False)):
        model, _ = load_checkpoint(path, device)
        metrics = evaluate(model, data, scale.windows, scale.items)
        rows.append({**dict(zip(KEYS, key)), **of_all, "metrics": metrics})
    return [{**row, "seconds": round((time.perf_counter() - start) / len(rows), 1)} for row in rows]


def setup(scale, data, device):
    """What determines a row's metrics, apart from which model it is; rows of two setups are not compared."""
    config = Config(**scale.training)
    settings = settings_of(config, load_meta(data), pick_device(device, config.dtype)[1], None)
    of_the_row = "size", "tokens", "seed", "teacher", "alpha"
    return {**{name: value for name, value in settings.items() if name not in of_the_row},
            "windows": scale.windows, "items": scale.items}


def line_of(run, rows):
    """
    's@1.5M alone, seed 1: loss 2.947 in domain, 3.477 outside', or, for a run with a teacher,
    'xs@2M (0.27 nats worse) -> s@1.5M, seed 1: outside +0.045 at alpha 0.25, -0.186 at alpha 1'
    """
    inside, outside = ([metric(rows[key]["metrics"], where) for key in run.keys] for where in (IN, OUT))
    if not run.teacher:
        return f"{run.model} alone, seed {run.seed}: loss {inside[0]:.3f} in domain, {outside[0]:.3f} outside"
    teacher, alone = (rows[other.keys[0]]["metrics"] for other in (run.teacher, run.alone))
    worse = teacher[IN] - alone[IN]
    gains = (f"{metric(alone, OUT) - x:+.3f} at alpha {alpha:g}" for x, alpha in zip(outside, run.alphas))
    compared = f"{abs(worse):.2f} nats {'worse' if worse > 0 else 'better'}"
    return f"{run.teacher.model} ({compared}) -> {run.model}, seed {run.seed}: outside {', '.join(gains)}"


def sweep(scale, data, out, jobs, device):
    """Run what is not in results.jsonl yet, `jobs` runs at a time -> all rows."""
    path = f"{out}/results.jsonl"
    rows = {tuple(row[name] for name in KEYS): row for row in read_rows(path, setup(scale, data, device))}
    runs = plan(scale)
    missing = [run for run in runs if not rows.keys() >= set(run.keys)]
    # a teacher whose row is there, but not its checkpoint, is trained again
    lost = {run.teacher for run in missing if run.teacher and not os.path.exists(run.teacher.checkpoint(out))}
    todo = [run for run in runs if run in missing or run in lost]
    done, running = {None, *runs} - set(todo), {}            # None, "no teacher", is always there
    threads = max(1, torch.get_num_threads() // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")   # which complains after Ctrl-C
    vars(sys.modules["__main__"]).setdefault("__spec__", None)           # spawning needs it; %run drops it
    pool = futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (threads,))
    left = sum(run.work(scale) for run in todo)
    bar = tqdm(total=left, bar_format="{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
               smoothing=0, miniters=0, mininterval=1 if os.isatty(2) else 60)
    try:
        while todo or running:
            ready = [run for run in todo if {run.teacher, run.alone} <= done]
            for run in ready[:jobs - len(running)]:
                todo.remove(run)
                running[pool.submit(train_and_evaluate, run, scale, data, out, device)] = run
            finished, _ = futures.wait(running, timeout=1, return_when=futures.FIRST_COMPLETED)
            for future in finished:
                run = running.pop(future)
                for key, row in zip(run.keys, future.result()):
                    rows.setdefault(key, row)
                with open(f"{path}.tmp", "w") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows.values())
                os.replace(f"{path}.tmp", path)
                done.add(run)
                left -= run.work(scale)
                bar.write(line_of(run, rows))
                if run.seed in scale.seeds and done >= {r for r in runs if r.seed == run.seed}:
                    lines = write_report([*rows.values()], out).splitlines()
                    bar.write("\n".join(["", *(x for x in lines if "**" in x or x.startswith("## ")), ""]))
            partial = sum(run.work(scale) * run.fraction_done(scale, out) for run in running.values())
            bar.update(bar.total - left + partial - bar.n)
    except futures.process.BrokenProcessPool:
        raise UserError("a worker died (out of memory? try --jobs 1); rerun the same command to "
                        "resume") from None
    except UserError as e:
        raise UserError(f"{run.name}: {e}") from None
    finally:
        for worker in multiprocessing.active_children() if running else ():      # after Ctrl-C or a failure
            worker.kill()
        bar.close()
        pool.shutdown(cancel_futures=True)
    return [*rows.values()]


def main():
    """Run the sweep that the command line asks for and report, or only report, or only print its cost."""
    parser = make_parser(__doc__)
    parser.add_argument("--scale", default="laptop", choices=SCALES, help="the experiment (default: laptop)")
    parser.add_argument("--student", metavar="MODEL", help="instead of the scale's, such as s@1.5M")
    parser.add_argument("--teachers", metavar="MODEL,MODEL", help="instead of the scale's, in this order")
    parser.add_argument("--alphas", metavar="A,A", type=list_of_numbers,
                        help="instead of the scale's, such as 0.25,1")
    parser.add_argument("--seeds", metavar="N,N", type=list_of_numbers,
                        help="instead of the scale's, such as 1,2,3")
    parser.add_argument("--out", metavar="DIR", help="results and checkpoints (default: out/SCALE)")
    parser.add_argument("--data", metavar="DIR", help="corpus folder of data.py (default: data/CORPUS)")
    parser.add_argument("--jobs", type=int, metavar="N", help="parallel runs (default: cores; on a GPU, 1)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    parser.add_argument("--dry_run", action="store_true", help="only print every run, with its FLOPs at the "
                        "scale's vocabulary")
    parser.add_argument("--report", metavar="DIR", help="only rewrite report and figure of DIR/results.jsonl")
    args = parser.parse_args()
    if args.report:
        return print(write_report(read_rows(f"{args.report}/results.jsonl"), args.report))
    scale = SCALES[args.scale]
    scale = replace(scale, student=args.student or scale.student, teachers=args.teachers or scale.teachers,
                    alphas=args.alphas or scale.alphas, seeds=[*map(int, args.seeds or scale.seeds)])
    runs = plan(scale)
    device, _ = pick_device(args.device)
    jobs = max(1, args.jobs or (torch.get_num_threads() if device.type == "cpu" else 1))
    if args.dry_run:
        total = 0
        for run in runs:
            student, teacher = run.flops(scale)
            flops = len(run.alphas) * student + teacher
            total += flops
            print(f"{run.name:48} {len(run.alphas)} x {run.model:12} {flops:9.2e} FLOPs")
        hours = sum(run.work(scale) for run in runs) / scale.speed / 3600
        return print(f"{len(runs)} runs, {total:.2e} FLOPs; with overhead about {hours:,.1f} hours at "
                     f"{scale.speed:.1e} FLOP/s")
    start, out = time.perf_counter(), args.out or f"out/{args.scale}"
    data = args.data or f"data/{scale.corpus}"
    if not args.data and scale.corpus == "python":
        prepare("python", data, scale.vocab_size)
    if len(evaluation_sets(data)) < 2:
        raise UserError(f"{data} has no out-of-distribution set: make it again with data.py --ood")
    note_repeats(data, max(run.tokens for run in runs))
    scale = replace(scale, vocab_size=load_meta(data)["vocab_size"])
    print(f"{len(runs)} runs on {device}, {jobs} at a time, into {out}")
    os.makedirs(out, exist_ok=True)
    report = write_report(sweep(scale, data, out, jobs, str(device)), out)
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{report}\n{out}: report.md, figures, results.jsonl; {minutes:.1f} minutes")


if __name__ == "__main__":
    run_main(main)

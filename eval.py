"""
What is a model worth? Its loss in and out of distribution, and a task. What does a study show? The second
half turns the results.jsonl of a sweep into four findings.

    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt                  # a table of both
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --sample "def "  # what they write
    python sweep.py --report results/full                                # the findings of a study

Loss is in nats per token; perplexity is its exponential. Each loss is given twice: as it is, and calibrated,
with the logits divided by the temperature, from 0.8 to 1.4, that suits the model and the set best. That takes
away what a model gains from smoothing alone. (One number fitted to 65,000 tokens cannot overfit.)
"""
import json
import math
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import (UNITS, UserError, evenly_spaced, load_meta, load_tokenizer, load_windows, make_parser,
                  run_main, whole_number)
from model import SIZES, autocast, load_checkpoint, pick_device


# ---- one model ---------------------------------------------------------------

IN, OUT = "in_domain", "ood/"            # how names of metrics begin; "outside" is the mean of the ood sets
KINDS = PLAIN, CALIBRATED = "", "calibrated/"                # a prefix: losses as they are, or calibrated
TEMPERATURES = (0.8, 0.87, 1.0, 1.2, 1.4)


def evaluate(model, data_dir, windows=512, items=500):
    """
    -> {name: x}, over at most `windows` windows of each set and `items` items of the task:
    in_domain, ood/SET                     loss in nats per token
    calibrated/in_domain, calibrated/...   the same, calibrated
    accuracy/brackets                      share of the items, where the corpus has the task

    The model runs in the dtype that training has by default on its device, even if it was trained in another.
    """
    metrics = {}
    for name, path in evaluation_sets(data_dir).items():
        rows = read_windows(path, model.config.block_size, windows)
        losses = token_losses(model, rows, TEMPERATURES).double().mean((1, 2)).tolist()
        metrics[name], metrics[f"calibrated/{name}"] = losses[TEMPERATURES.index(1.0)], calibrated(losses)
    for name in load_meta(data_dir)["tasks"]:
        lines = Path(data_dir, f"task_{name}.jsonl").read_text().splitlines()
        some = [json.loads(line) for line in evenly_spaced(lines, items)]
        metrics[f"accuracy/{name}"] = accuracy(model, load_tokenizer(data_dir), some)
    return {name: round(float(x), 6) for name, x in metrics.items()}


def evaluation_sets(data_dir):
    """-> {"in_domain": path, "ood/NAME": path ...} of a corpus folder."""
    names = {"in_domain": "val"} | {f"ood/{name[4:]}": name for name in load_meta(data_dir)["sets"]
                                    if name.startswith("ood_")}
    return {name: f"{data_dir}/{file}.bin" for name, file in names.items()}


def read_windows(path, block_size, most):
    """-> ids (<= most, block_size + 1): windows evenly spaced over a set."""
    tokens, n = load_windows(path, block_size)
    starts = evenly_spaced(range(n), most)
    rows = np.stack([tokens[s * block_size:(s + 1) * block_size + 1] for s in starts])
    return torch.from_numpy(rows.astype(np.int64))


@torch.no_grad()
def token_losses(model, rows, temperatures=(1.0,)):
    """Rows of ids (N, T + 1) -> each token's loss in nats, at K temperatures: (K, N, T)."""
    device, losses = next(model.buffers()).device, []        # a Table has no parameters
    _, dtype = pick_device(str(device))
    for part in rows.split(max(1, 2**19 // (rows.size(1) * model.config.vocab_size))):   # logits fit a cache
        x, y = part[:, :-1].to(device), part[:, 1:].to(device)
        with autocast(device, dtype):
            logits = model(x).flatten(0, 1)                                  # (B T, V)
        at_each = [F.cross_entropy(logits.float() / t, y.flatten(), reduction="none") for t in temperatures]
        losses.append(torch.stack(at_each).view(-1, *y.shape).cpu())
    return torch.cat(losses, dim=1)


def calibrated(losses):
    """
    A model's mean losses at TEMPERATURES -> the least at any temperature between. As a function of
    1 / temperature the loss is smooth and convex: the polynomial through the five points stands for it.
    """
    polynomial = np.polynomial.Polynomial.fit(1 / np.array(TEMPERATURES), losses, 4)
    return polynomial(1 / np.arange(0.8, 1.4, 0.001)).min()


def accuracy(model, encoding, items):
    """The share of items whose right choice is the likeliest after the context."""
    rows, lengths = [], []
    for item in items:
        context = [encoding.eot_token, *encoding.encode_ordinary(item["context"])]
        for choice in map(encoding.encode_ordinary, item["choices"]):
            rows.append(torch.tensor([*context, *choice][-model.config.block_size - 1:]))
            lengths.append(len(choice))
    losses, = token_losses(model, pad_sequence(rows, batch_first=True))      # padding is on the right, unseen
    scores = [loss[len(row) - 1 - n:len(row) - 1].sum() for loss, row, n in zip(losses, rows, lengths)]
    likeliest = torch.stack(scores).view(len(items), -1).argmin(1).tolist()
    return np.mean([choice == item["label"] for choice, item in zip(likeliest, items)])


def metric(metrics, beginning):
    """The mean of the metrics whose names start with `beginning`; nan if there is none."""
    return np.mean([x for name, x in metrics.items() if name.startswith(beginning)] or [math.nan])


def print_table(models, data_dir, windows):
    """Models side by side: a line per measure, a column each, in brackets the gain over the first."""
    columns = [evaluate(model, data_dir, windows) for model in models]
    for column in columns:
        for kind in KINDS:
            column[f"{kind}ood, mean"] = metric(column, kind + OUT)
    print("\nloss in nats per token; accuracy; in brackets: gain over [0]")
    print(f"{'':30}[0]" + "".join(f"{f'[{i}]':>9}{'':10}" for i in range(1, len(models))).rstrip())
    for name in columns[0]:
        first, *others = (column[name] for column in columns)
        sign = 1 if name.startswith("accuracy") else -1      # a loss is better if it is lower
        print(f"{name:26}{first:7.4f}"
              + "".join(f"{x:9.4f} ({sign * (x - first):+.4f})" for x in others))


# ------------------------------------------------------------------------------
# What does a study show? From here on all is a function of the rows of results.jsonl, one per model:
# {"model": "s@1.5M", "seed": 1, "teacher": null or "xs@2M", "teacher_seed": null or 1001, "alpha": 0.25,
#  "setup": {what else determines the metrics: the corpus, windows, settings of training}, "flops": of its
#  training, "teacher_flops": of its teacher's forward passes, "seconds": 39.8, "metrics": {of evaluate()}}

KEYS = ("model", "seed", "teacher", "teacher_seed", "alpha")                 # which model a row is of
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last, a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def parse_model(model):
    """'s@1.5M' -> ('s', 1500000)."""
    size, _, tokens = model.partition("@")
    try:
        SIZES[size]
        return size, whole_number(tokens)
    except (KeyError, ValueError):
        raise UserError(f"{model!r} is not a model such as s@1.5M, of size {' '.join(SIZES)}") from None


def model_name(size, tokens):
    """('s', 1500000) -> 's@1.5M'; different token counts give different names."""
    unit = next((u for u in ("B", "M", "K") if tokens >= UNITS[u]), "")
    return f"{size}@{tokens / UNITS.get(unit, 1):.15g}{unit}"


def read_rows(path, setup=None):
    """The rows of a results.jsonl, which must share `setup` (default: the first row's); [] without a file."""
    rows = []
    lines = Path(path).read_bytes().splitlines() if os.path.exists(path) else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            numbers = [*row["metrics"].values(), row["flops"], row["teacher_flops"], row["seconds"]]
            if not np.isfinite(numbers).all() or not row.keys() >= {*KEYS}:
                raise ValueError
            setup, mine = setup or row["setup"], row["setup"]
            different = [name for name in {**setup, **mine} if setup.get(name) != mine.get(name)]
        except Exception:                                    # edited by hand, or of another version
            raise UserError(f"{path}: line {number} is not a result of this version") from None
        for name in different:
            raise UserError(f"{path}: line {number} was made with {name} {mine.get(name)}, not with "
                            f"{setup.get(name)}: choose another --out")
        rows.append(row)
    return rows


def interval(x):
    """One value a seed -> their mean, and the margin of its 95 % t-interval."""
    if len(x) == 1:
        return x[0], math.nan
    return np.mean(x), T_975[min(len(x) - 1, len(T_975)) - 1] * np.std(x, ddof=1) / math.sqrt(len(x))


def show(x, digits=3):
    """One value a seed -> '+0.012 ± 0.003', the mean alone for a single seed."""
    center, margin = interval(x)
    return f"{round(center, digits) + 0.0:+.{digits}f}" + (f" ± {margin:.{digits}f}" if len(x) > 1 else "")


def judge(x):
    """One value a seed -> the verdict: is their 95 % interval above 0, below it, or across it?"""
    center, margin = interval(x)
    if len(x) < 3:
        return "too few seeds"
    return "reproduced" if center > margin else "not reproduced" if center < -margin else "undecided"


def best_alpha(gains):
    """Gains (alphas, seeds) -> for each seed the index of the alpha that gains most on the other seeds."""
    others = gains.sum(1, keepdims=True) - gains if gains.shape[1] > 1 else gains
    return others.argmax(0)


def study(rows, student):
    """
    One student's rows -> its seeds that have every row of the grid, and what each teacher, weakest first,
    brought it; None without such a seed. A gain is an array of one value a seed: how many nats per token less
    than the student alone of that seed.
    """
    by_key = {tuple(row[key] for key in KEYS): row for row in rows}
    taught = [row for row in rows if row["model"] == student and row["teacher"]]
    names, alphas, seeds = (sorted({row[key] for row in taught}) for key in ("teacher", "alpha", "seed"))
    teacher_seed = {row["seed"]: row["teacher_seed"] for row in taught}
    size, tokens = parse_model(student)
    complete = {}                                            # seed -> {which model: its row}
    for seed in seeds:
        grid = {"alone": (student, seed, None, None, 0.0),
                "twice": (model_name(size, 2 * tokens), seed, None, None, 0.0),          # the tokens
                **{name: (name, teacher_seed[seed], None, None, 0.0) for name in names},
                **{(name, alpha): (student, seed, name, teacher_seed[seed], alpha)
                   for name in names for alpha in alphas}}
        if by_key.keys() >= set(grid.values()):
            complete[seed] = {which: by_key[key] for which, key in grid.items()}
    if not complete:
        return None

    def losses(which, name):
        return np.array([metric(models[which]["metrics"], name) for models in complete.values()])

    def gain(which, name):
        return losses("alone", name) - losses(which, name)
    # what text gives outside for each nat in domain
    rate = {kind: gain("twice", kind + OUT).mean() / gain("twice", kind + IN).mean() for kind in KINDS}
    first, teachers = next(iter(complete.values())), []

    def by_alpha(teacher, name):                             # -> (alphas, seeds)
        return np.array([gain((teacher, alpha), name) for alpha in alphas])
    for name in names:
        best = {kind: (best_alpha(by_alpha(name, kind + OUT)), range(len(complete))) for kind in KINDS}
        t = SimpleNamespace(
            name=name, size=parse_model(name)[0], tokens=parse_model(name)[1],
            worse=-gain(name, IN).mean(),                    # than the student alone, in domain
            at=dict(zip(alphas, by_alpha(name, OUT))),       # gain outside at each alpha; at the best one:
            inside={kind: by_alpha(name, kind + IN)[best[kind]] for kind in KINDS},
            outside={kind: by_alpha(name, kind + OUT)[best[kind]] for kind in KINDS},
            accuracy=-100 * by_alpha(name, "accuracy/")[best[PLAIN]],        # points gained in the task
            alpha=", ".join(f"{alphas[a]:g}" for a in sorted({*best[PLAIN][0]})))
        # more outside than text that gains as much in domain
        t.beyond = {kind: t.outside[kind] - rate[kind] * t.inside[kind] for kind in KINDS}
        # if its FLOPs bought text: r times the text, at most twice, gains log2(r) of what twice gains
        forward, training = first[name, alphas[0]]["teacher_flops"], first[name]["flops"]
        t.as_text = [gain("twice", OUT) * math.log2(min(1 + flops / first["alone"]["flops"], 2))
                     for flops in (forward, forward + training)]
        teachers.append(t)
    teachers.sort(key=lambda t: -t.worse)
    tables = [t for t in teachers if "counts" in SIZES[t.size]]
    weak = [t for t in teachers if t not in tables and t.worse > 0]
    strong = [t for t in teachers if t not in tables and t.worse <= 0]
    return SimpleNamespace(
        student=student, seeds=list(complete), left_out=[seed for seed in seeds if seed not in complete],
        alphas=alphas, rate=rate, teachers=teachers,
        weak=weak, strong=strong, tables=tables, alone=[losses("alone", where).mean() for where in (IN, OUT)],
        groups=[(name, group) for name, group in (
            ("weak networks", weak), ("strong networks", strong), ("tables", tables)) if group],
        own_teachers=len({teacher_seed[seed] for seed in complete}) == len(complete) > 1)


# ---- the four rules: study -> what is above 0 if the claim holds, and the evidence; or None ---

def weak_teacher_helps(s):
    """Networks worse in domain than the student alone: their mean gain outside is above 0."""
    if not s.weak:
        return None
    gain = np.mean([t.outside[PLAIN] for t in s.weak], 0)
    pure = np.mean([t.at[s.alphas[-1]] for t in s.weak], 0)
    return gain, (f"Weak networks bring {show(gain)} outside at their best alpha, {show(pure)} at alpha "
                  f"{s.alphas[-1]:g}.")


def stronger_teacher_saturates(s):
    """Along size at the largest budget, the gain outside grows less on the last step than on the first."""
    networks = s.weak + s.strong
    path = sorted((t for t in networks if t.tokens == max(t.tokens for t in networks)),
                  key=lambda t: list(SIZES).index(t.size))
    if len(path) < 3:
        return None
    steps = [b.outside[PLAIN] - a.outside[PLAIN] for a, b in zip(path, path[1:])]
    less = steps[0] - steps[-1]
    return less, (f"From {' to '.join(t.name for t in path)} the gain outside changes by "
                  f"{', '.join(map(show, steps))}; first step minus last: {show(less)}.")


def generalisation_first(s):
    """Students of weak networks gain more outside than from text that gains as much in domain."""
    if not s.weak:
        return None
    beyond = [[np.mean([t.beyond[kind] for t in group], 0) for kind in KINDS] for _, group in s.groups]
    seen = (f"{name} {show(plain)} (calibrated {show(calibrated)})"
            for (name, _), (plain, calibrated) in zip(s.groups, beyond))
    return beyond[0][0], (f"More text brings {s.rate[PLAIN]:.2f} nats outside for each nat in domain. Beyond "
                          f"that: {', '.join(seen)}.")


def more_than_smoothing(s):
    """Calibrated, weak networks gain more outside than the best table, or than nothing if that harms."""
    if not s.weak or not s.tables:
        return None
    gain = np.mean([t.outside[CALIBRATED] for t in s.weak], 0)
    table = max((t.outside[CALIBRATED] for t in s.tables), key=np.mean)      # chosen in favour of the tables
    more, rival = (gain - table, "the table") if table.mean() > 0 else (gain, "no teacher")
    return more, (f"Calibrated, weak networks bring {show(gain)} outside, the best table {show(table)}: "
                  f"{show(more)} more than {rival}.")


CLAIMS = {"A weak teacher helps": weak_teacher_helps,
          "A stronger teacher saturates or reverses the gain": stronger_teacher_saturates,
          "Generalisation comes first": generalisation_first,
          "A weak teacher gives more than smoothing": more_than_smoothing}


def findings(s):
    """study -> [(claim, verdict, evidence)]."""
    found = {claim: rule(s) for claim, rule in CLAIMS.items()}
    return [(claim, judge(seen[0]), seen[1]) if seen else (claim, "not tested", "These teachers cannot.")
            for claim, seen in found.items()]


# ---- the report --------------------------------------------------------------

def write_report(rows, out):
    """Write report.md and a figure for each student into out -> the report."""
    if not rows:
        raise UserError(f"{out} has no results.jsonl, or it is empty")
    text = f"{len(rows)} models, {sum(row['seconds'] for row in rows) / 60:.0f} worker-minutes.\n"
    for student in sorted({row["model"] for row in rows if row["teacher"]}):
        s = study(rows, student)
        if not s:
            text += f"\n## Student {student}\n\nNo seed is complete: it needs all teachers at all alphas.\n"
            continue
        text += report(s)
        try:
            draw(s, f"{out}/findings_{student}.png")
            text += f"\n![the findings](findings_{student}.png)\n"
        except Exception as e:                               # no matplotlib, or one that is set up wrong
            text += f"\nNo figure ({type(e).__name__}: {e}). It needs pip install matplotlib.\n"
    Path(out, "report.md").write_text(text, encoding="utf-8")
    return text


def report(s):
    """study -> Markdown."""
    text, (inside, outside) = f"\n## Student {s.student}, seeds {', '.join(map(str, s.seeds))}\n\n", s.alone
    for i, (claim, verdict, seen) in enumerate(findings(s), 1):
        text += f"{i}. **{claim}: {verdict}.** {seen}\n"
    if s.left_out:
        text += f"\nLeft out, without all teachers at all alphas: seed {', '.join(map(str, s.left_out))}.\n"
    text += f"""
Alone the student reaches {inside:.3f} nats per token in domain, {outside:.3f} outside. Gains are over the
student alone of the same seed, at the alpha that gains most outside (calibrated: most once calibrated) on
{"the other seeds" if s.seeds[1:] else "that seed, which flatters it"}. ± is a 95 % t-interval over seeds,
{"each with its own" if s.own_teachers else "given these"} teachers; what text brings is taken as known.
As text: what the student alone would gain outside if that compute bought more text, at most twice as much.

| teacher | worse in domain | best alpha | gain in domain | gain outside | calibrated \
| forward passes as text | training included |
|---|---|---|---|---|---|---|---|
"""
    for t in s.teachers:
        gains = t.inside[PLAIN], t.outside[PLAIN], t.outside[CALIBRATED], *t.as_text
        text += f"| {t.name} | {t.worse:+.3f} | {t.alpha} | {' | '.join(map(show, gains))} |\n"
    if not np.isnan(s.teachers[0].accuracy).any():           # a corpus with a task
        points = (f"{name} {show(np.mean([t.accuracy for t in group], 0), 1)}" for name, group in s.groups)
        text += f"\nPoints of accuracy in the task: {', '.join(points)}.\n"
    return text


def draw(s, file):
    """Three panels: gains by teacher and alpha; in domain against outside; as they are and calibrated."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    first, second, third = axes = figure.subplots(1, 3, width_ratios=(1.3, 1.1, 0.8))

    def points(axis, at, gains, **style):                    # a point for each gain, with its interval
        axis.errorbar(at, *np.transpose([interval(gain) for gain in gains]), capsize=2, ms=5, **style)

    # by teacher, a line for each alpha; what lies far below is off the scale
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(s.alphas)))
    for alpha, color, marker in zip(s.alphas, colors, "osD^v<>" * 9):
        points(first, range(len(s.teachers)), [t.at[alpha] for t in s.teachers], label=f"alpha {alpha:g}",
               marker=marker, color=color)
    top = max(0.01, *(gain.mean() for t in s.teachers for gain in t.at.values()))
    first.set_ylim(-2.2 * top, 1.5 * top)
    boundary = sum(t.worse > 0 for t in s.teachers) - 0.5
    first.axvline(boundary, color="0.7", lw=0.8)
    first.text(boundary, 1.35 * top, "worse ", ha="right", fontsize=8)
    first.text(boundary, 1.35 * top, " better", fontsize=8)
    first.set_xlabel("teacher, worse or better than the student in domain")

    # each teacher at its best alpha, and the line of what text gives
    styles = {"weak networks": ("o", "tab:blue"), "strong networks": ("s", "tab:red"), "tables": ("^", "0.5")}
    for name, group in s.groups:
        points(second, [t.inside[PLAIN].mean() for t in group], [t.outside[PLAIN] for t in group], ls="none",
               xerr=[interval(t.inside[PLAIN])[1] for t in group], label=name, marker=styles[name][0],
               color=styles[name][1])
    second.margins(0.12)
    for i, t in enumerate(sorted(s.teachers, key=lambda t: t.inside[PLAIN].mean())):     # below, then above
        center, margin = np.nan_to_num(interval(t.outside[PLAIN]))
        y, ha, va = (center + margin, "right", "bottom") if i % 2 else (center - margin, "left", "top")
        second.text(t.inside[PLAIN].mean(), y, f" {t.name} ", ha=ha, va=va, fontsize=8, zorder=9)
    second.axline((0, 0), slope=s.rate[PLAIN], color="0.7", label="what more text gives")
    second.set_xlabel("gain in domain, nats per token")
    second.locator_params(nbins=5)

    controls = s.tables + s.weak
    third.margins(x=0.2)
    for kind, shift, color, marker in ((PLAIN, 0, "black", "o"), (CALIBRATED, 0.15, "tab:orange", "s")):
        if controls:
            points(third, np.arange(len(controls)) + shift, [t.outside[kind] for t in controls], ls="none",
                   label=kind.strip("/") or "as it is", color=color, marker=marker)

    titles = [f"{claim}: {verdict}" for claim, verdict, _ in findings(s)]
    titles = ["\n".join(titles[:2]), *("\n".join(textwrap.wrap(title, 33)) for title in titles[2:])]
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=8.5)
        axis.set_ylabel("gain outside, nats per token")
        axis.axhline(0, color="0.7", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="lower right")
    for axis, teachers in ((first, s.teachers), (third, controls)):
        axis.set_xticks(range(len(teachers)), [t.name for t in teachers], rotation=30, ha="right")
    figure.savefig(file, dpi=100)


# ---- the command line --------------------------------------------------------

def main():
    """Evaluate the checkpoints of the command line, or let them write."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="distill.py checkpoints")
    parser.add_argument("--sample", metavar="TEXT", help="print each checkpoint's continuation of this text")
    parser.add_argument("--data", default="data/python", help="corpus folder (default: data/python)")
    parser.add_argument("--windows", type=int, default=512, help="of each set, at most (default: 512)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    args = parser.parse_intermixed_args()                    # CKPT --data DIR CKPT too
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    (device, _), meta, encoding = pick_device(args.device), load_meta(args.data), load_tokenizer(args.data)
    models = []
    for i, path in enumerate(args.checkpoints):
        model, extra = load_checkpoint(path, device, meta["tokenizer"])
        models.append(model)
        of, alpha = extra["settings"], extra["alpha"]
        taught = f", alpha {alpha:g} from {of['teacher']['name']}" if alpha else ""
        print(f"[{i}] {path}: {of['size']}, {of['tokens']:,} tokens, seed {of['seed']}{taught}")
        if args.sample is not None:
            torch.manual_seed(1)
            idx = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(args.sample)]], device=device)
            ids = [k for k in model.generate(idx, 200, 0.8, 50)[0].tolist() if k < encoding.eot_token]
            print(f"{encoding.decode(ids)}\n")
    if args.sample is None:
        if len({model.config.block_size for model in models}) > 1:
            raise UserError("these models have different context lengths: evaluate one at a time")
        print_table(models, args.data, args.windows)


if __name__ == "__main__":
    run_main(main)

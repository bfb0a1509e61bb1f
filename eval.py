"""
What is a model worth? Its loss and accuracy, in and out of distribution. What does a study show? The second
half turns the results.jsonl of a sweep into five findings.

    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt                  # a table of both
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --sample "def "  # what they write
    python sweep.py --report results/full                                # the findings of a study

Loss is in nats per token; perplexity is its exponential. Accuracy is the share of tokens that the model ranks
first: unlike the loss, it does not change when all probabilities are smoothed or sharpened.
"""
import json
import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import (UNITS, UserError, evenly_spaced, load_meta, load_tokenizer, load_windows, make_parser,
                  run_main, whole_number)
from model import SIZES, GPTConfig, autocast, load_checkpoint, n_weights, pick_device


# ---- one model ---------------------------------------------------------------

IN, OUT = "in_domain", "ood/"            # how names of metrics begin; "outside" is the mean of the ood sets
ACCURACY = "accuracy/"                   # before either: accuracy in place of loss


def evaluate(model, data_dir, windows=512):
    """
    -> {name: x}, over at most `windows` windows of each set:
    in_domain, ood/SET                         loss in nats per token
    accuracy/in_domain, accuracy/ood/SET       share of tokens that are the likeliest

    The model runs in the dtype that training has by default on its device, even if it was trained in another.
    """
    metrics = {}
    for name, path in evaluation_sets(data_dir).items():
        losses, hits = token_losses(model, read_windows(path, model.config.block_size, windows))
        metrics[name] = round(losses.double().mean().item(), 6)
        metrics[ACCURACY + name] = round(hits.double().mean().item(), 6)
    return metrics


def evaluation_sets(data_dir):
    """-> {"in_domain": path, "ood/NAME": path ...} of a corpus folder."""
    sets = {"in_domain": f"{data_dir}/val.bin"}
    for name in load_meta(data_dir)["sets"]:
        if name.startswith("ood_"):
            sets["ood/" + name.removeprefix("ood_")] = f"{data_dir}/{name}.bin"
    return sets


def read_windows(path, block_size, most):
    """-> ids (<= most, block_size + 1): windows evenly spaced over a set."""
    tokens, n = load_windows(path, block_size)
    starts = evenly_spaced(range(n), most)
    rows = np.stack([tokens[s * block_size:(s + 1) * block_size + 1] for s in starts])
    return torch.from_numpy(rows.astype(np.int64))


@torch.no_grad()
def token_losses(model, rows):
    """
    Rows of ids (N, T + 1) -> losses (N, T), of each token in nats, and hits (N, T): is it the likeliest? If
    several are equally likely, each counts.
    """
    device = next(model.buffers()).device                    # a Table has no parameters
    _, dtype = pick_device(str(device))
    logits_at_once = 2**19 if device.type == "cpu" else 2**28        # fits a CPU's cache; 1 GB on a GPU
    losses, hits = [], []
    for part in rows.split(max(1, logits_at_once // (rows.size(1) * model.config.vocab_size))):
        x, y = part[:, :-1].to(device), part[:, 1:].to(device)               # (B, T) each
        with autocast(device, dtype):
            z = model(x).float()                                             # (B, T, V)
        label, top = z.gather(-1, y[..., None])[..., 0], z.amax(-1)          # (B, T) each
        log_sum_exp = z.sub_(top[..., None]).exp_().sum(-1).log() + top      # in place: less time than a copy
        losses.append((log_sum_exp - label).cpu())
        hits.append((label >= top).cpu())
    return torch.cat(losses), torch.cat(hits)


def metric(metrics, beginning):
    """The mean of the metrics whose names start with `beginning`; nan if there is none."""
    return np.mean([x for name, x in metrics.items() if name.startswith(beginning)] or [math.nan])


def print_table(models, data_dir, windows):
    """Models side by side: a line per measure, a column each, in brackets the gain over the first."""
    columns = [evaluate(model, data_dir, windows) for model in models]
    for column in columns:
        column["ood, mean"] = metric(column, OUT)
        column["accuracy/ood, mean"] = metric(column, ACCURACY + OUT)
    print("\nloss in nats per token; accuracy; in brackets: gain over [0]")
    print(f"{'':30}[0]" + "".join(f"{f'[{i}]':>9}{'':10}" for i in range(1, len(models))).rstrip())
    for name in columns[0]:
        first, *others = (column[name] for column in columns)
        sign = 1 if name.startswith(ACCURACY) else -1        # a loss is better if it is lower
        print(f"{name:26}{first:7.4f}"
              + "".join(f"{x:9.4f} ({sign * (x - first):+.4f})" for x in others))


# ------------------------------------------------------------------------------
# What does a study show? From here on all is a function of the rows of results.jsonl, one per model:
# {"model": "s@1.5M", "seed": 71, "teacher": null or "xs@2M", "teacher_seed": null or 2000, "alpha": 0.25,
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
            row["metrics"][ACCURACY + IN]                    # which earlier versions did not have
            mine = {**row["setup"]}
        except Exception:                                    # edited by hand, or of another version
            raise UserError(f"{path}: line {number} is not a result of this version") from None
        setup = setup or mine
        for name in setup | mine:
            if setup.get(name) != mine.get(name):
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
    """One value a seed -> '+0.012 ± 0.003', the mean alone for a single seed, '-' for nan."""
    center, margin = interval(x)
    if math.isnan(center):
        return "-"
    return f"{round(center, digits) + 0.0:+.{digits}f}" + (f" ± {margin:.{digits}f}" if len(x) > 1 else "")


def judge(x):
    """One value a seed -> the verdict: is their 95 % interval above 0, below it, or across it?"""
    center, margin = interval(x)
    if len(x) < 3:
        return "too few seeds"
    return "reproduced" if center > margin else "not reproduced" if center < -margin else "undecided"


# ---- one seed chooses alpha, the others test it -------------------------------

def choose(rows, student, alphas=()):
    """
    -> the seed that chooses (None without students), the alphas to try (these and all that it tried),
    {teacher: {alpha: gain outside on that seed}}, and {teacher: the best alpha} of those that tried them all.

    It is the seed with most students, as only one tries every alpha; of equals the first in the file. So what
    is added later changes nothing that is decided.
    """
    taught = [row for row in rows if row["model"] == student and row["teacher"]]
    students = Counter(row["seed"] for row in taught)
    chooser, gains = max(students, key=students.get, default=None), {}
    alone = [row for row in rows if row["model"] == student and row["seed"] == chooser and not row["teacher"]]
    for row in taught:
        if alone and row["seed"] == chooser:
            gain = metric(alone[0]["metrics"], OUT) - metric(row["metrics"], OUT)
            gains.setdefault(row["teacher"], {})[row["alpha"]] = gain
    alphas = sorted({*alphas}.union(*gains.values()))
    best = {name: max(curve, key=curve.get) for name, curve in gains.items() if len(curve) == len(alphas)}
    return chooser, alphas, gains, best


def study(rows, student):
    """
    One student's rows -> what each teacher brought it, weakest first; None before a test seed is complete.

    The chooser's alphas are tested on the other seeds; with a single alpha, or a single seed, every seed
    tests. A gain is an array of one value a test seed: how much lower the loss (or how many points higher the
    accuracy) is than that of the student alone.
    """
    by_key = {tuple(row[key] for key in KEYS): row for row in rows}
    taught = [row for row in rows if row["model"] == student and row["teacher"]]
    teacher_seed = {row["seed"]: row["teacher_seed"] for row in taught}      # seeds in the order of the file
    chooser, alphas, curves, alpha = choose(rows, student)
    tests = [seed for seed in teacher_seed
             if seed != chooser or len(alphas) == 1 or len(teacher_seed) == 1]
    names = sorted({row["teacher"] for row in taught         # some test seed has it, at the chosen alpha
                    if row["seed"] in tests and row["alpha"] == alpha.get(row["teacher"])})
    size, tokens = parse_model(student)
    models = {}                                              # complete test seed -> {which model: its row}
    for seed in tests:
        keys = {"alone": (student, seed, None, None, 0.0),
                "twice": (model_name(size, 2 * tokens), seed, None, None, 0.0)}      # the text
        for name in names:
            keys[name] = (name, teacher_seed[seed], None, None, 0.0)
            keys["from " + name] = (student, seed, name, teacher_seed[seed], alpha[name])
        if by_key.keys() >= {*keys.values()}:
            models[seed] = {which: by_key[key] for which, key in keys.items()}
    if not names or not models:
        return None

    def level(which, beginning):
        return np.array([metric(m[which]["metrics"], beginning) for m in models.values()])

    def gain(which, beginning):
        more = level(which, beginning) - level("alone", beginning)
        return 100 * more if beginning.startswith(ACCURACY) else -more       # points; nats

    def worth(which, beginning):                             # in per cent more text; nan if that is no help
        center, margin = interval(gain("twice", beginning))
        if center <= np.nan_to_num(margin):
            return np.full(len(models), math.nan)
        return 100 * (2 ** (gain(which, beginning) / center) - 1)

    first, teachers = next(iter(models.values())), []
    for name in names:
        which, training = "from " + name, first[name]["flops"]
        passes, own = first[which]["teacher_flops"], first["alone"]["flops"]
        t = SimpleNamespace(
            name=name, size=parse_model(name)[0], tokens=parse_model(name)[1], flops=training,
            alpha=alpha[name], curve=[curves[name][a] for a in alphas],      # the chooser's
            worse=-gain(name, IN).mean(),                    # than the student alone, in domain
            inside=gain(which, IN), outside=gain(which, OUT), accuracy=gain(which, ACCURACY + OUT),
            worth_inside=worth(which, IN), worth_outside=worth(which, OUT),
            worth_accuracy=worth(which, ACCURACY + OUT),
            costs=100 * passes / own, costs_trained=100 * (passes + training) / own)         # per cent
        t.worth_more = t.worth_outside - t.worth_inside
        t.group = ("tables" if "counts" in SIZES[t.size] else "same level" if name == student
                   else "weak networks" if t.worse > 0 else "strong networks")
        teachers.append(t)
    return SimpleNamespace(
        student=student, size=size, tokens=tokens, setup=first["alone"]["setup"], seeds=[*models],
        chooser=chooser, alphas=alphas, teachers=sorted(teachers, key=lambda t: -t.worse),
        alone=[level("alone", where).mean() for where in (IN, OUT)],
        twice=[gain("twice", where) for where in (IN, OUT, ACCURACY + OUT)],
        left_out=[f"seed {seed}" for seed in tests if seed not in models]
        + sorted({row["teacher"] for row in taught} - {*names}))


# ---- the rules: study -> what is above 0 if the claim holds, and the evidence; or None ---

def mean(s, group, quantity):
    """The mean of a quantity over the teachers of a group, one value a seed; None without any."""
    values = [getattr(t, quantity) for t in s.teachers if t.group == group]
    return np.mean(values, axis=0) if values else None


def best_table(s):
    """The table with the largest gain outside, or None. It smooths and sees one token: it is the control."""
    tables = [t for t in s.teachers if t.group == "tables"]
    return max(tables, key=lambda t: t.outside.mean(), default=None)


def weak_teacher_helps(s):
    """Weak networks: their mean gain outside is above 0."""
    gain = mean(s, "weak networks", "outside")
    if gain is None:
        return None
    each = ", ".join(f"{t.name} {show(t.outside)}" for t in s.teachers if t.group == "weak networks")
    last = mean(s, "weak networks", "curve")[-1]
    same = "".join(f" The same level: {show(t.outside)}." for t in s.teachers if t.group == "same level")
    return gain, (f"Weak networks bring {show(gain)} outside ({each}); on seed {s.chooser} at alpha "
                  f"{s.alphas[-1]:g} {last:+.3f}.{same}")


def saturates(s, same):
    """
    Networks of the same budget (or size), that with most networks, of equals the largest: on the last step a
    doubling of training FLOPs brings less outside than half of what it brings on the first step, or than 0.
    """
    networks = [t for t in s.teachers if t.group != "tables"]
    count = Counter(map(same, networks))
    most = max(count, key=lambda value: (count[value], value), default=None)
    line = [t for t in networks if same(t) == most]
    if len(line) < 3:
        return None
    line.sort(key=lambda t: t.flops)
    steps = [(b.outside - a.outside) / math.log2(b.flops / a.flops) for a, b in zip(line, line[1:])]
    less = (steps[0] / 2 if steps[0].mean() > 0 else 0) - steps[-1]
    names = " to ".join(t.name for t in line)
    return less, (f"From {names} a doubling of the teacher's training FLOPs brings "
                  f"{', '.join(map(show, steps))} outside; half the first minus the last: {show(less)}.")


def generalisation_first(s):
    """Weak networks are worth more text outside than in domain, by more than the best table is."""
    more, table, worths = mean(s, "weak networks", "worth_more"), best_table(s), []
    if more is None:
        return None
    for group in dict.fromkeys(t.group for t in s.teachers):                 # the weakest first
        inside, outside = mean(s, group, "worth_inside"), mean(s, group, "worth_outside")
        worths.append(f"{group} {show(inside, 0)} % in domain and {show(outside, 0)} % outside")
    by_accuracy = show(mean(s, "weak networks", "worth_accuracy"), 0)
    seen = (f"Worth in per cent more text: {', '.join(worths)} (weak networks by accuracy {by_accuracy} %). "
            f"The difference is {show(more, 0)} points for weak networks")
    if table and table.worth_more.mean() > 0:                # otherwise the table is no rival
        more = more - table.worth_more
        seen += f", {show(more, 0)} more than for the best table"
    return more, seen + "."


def more_than_smoothing(s):
    """Weak networks bring more accuracy outside than the best table, or than nothing if that harms."""
    gain, table = mean(s, "weak networks", "accuracy"), best_table(s)
    if gain is None or not table:
        return None
    seen = (f"Weak networks bring {show(gain, 2)} points of accuracy outside, the best table "
            f"{show(table.accuracy, 2)}")
    if table.accuracy.mean() > 0:
        gain = gain - table.accuracy
        seen += f": {show(gain, 2)} more"
    return gain, seen + "."


CLAIMS = {"A weak teacher helps": weak_teacher_helps,
          "More parameters saturate": lambda s: saturates(s, lambda t: t.tokens),
          "More training tokens saturate": lambda s: saturates(s, lambda t: list(SIZES).index(t.size)),
          "Generalisation comes first": generalisation_first,
          "A weak teacher gives more than smoothing": more_than_smoothing}


def findings(s):
    """study -> [(claim, verdict, evidence)]."""
    found = []
    for claim, rule in CLAIMS.items():
        values, seen = rule(s) or (None, "Needs other teachers.")
        if values is not None and np.isnan(values).any():
            values, seen = None, "Twice the text does not help here, so nothing is worth text."
        found.append((claim, "not tested" if values is None else judge(values), seen))
    return found


# ---- the report --------------------------------------------------------------

def write_report(rows, out):
    """Write report.md and a picture for each student into out -> the report."""
    if not rows:
        raise UserError(f"{out} has no results.jsonl, or it is empty")
    text = f"{len(rows)} models, {sum(row['seconds'] for row in rows) / 60:.0f} worker-minutes.\n"
    for student in sorted({row["model"] for row in rows if row["teacher"]}):
        s = study(rows, student)
        if not s:
            text += f"\n## Student {student}\n\nNo seed has all models yet.\n"
            continue
        text += report(s)
        try:
            draw(s, f"{out}/gains_{student}.png")
            text += f"\n![gains by teacher](gains_{student}.png)\n"
        except ModuleNotFoundError as e:
            text += f"\nNo picture ({e}): pip install matplotlib.\n"
    Path(out, "report.md").write_text(text, encoding="utf-8")
    return text


def report(s):
    """study -> Markdown."""
    seeds = ", ".join(map(str, s.seeds))
    chose = f"seed {s.chooser} chose alpha, " if len(s.alphas) > 1 else ""
    flatters = " itself, which flatters" if chose and s.chooser in s.seeds else ""
    text = f"\n## Student {s.student}: {chose}tested on {seeds}{flatters}\n\n"
    for i, (claim, verdict, seen) in enumerate(findings(s), 1):
        text += f"{i}. **{claim}: {verdict}.** {seen}\n"
    if s.left_out:
        text += f"\nLeft out, because some of their models are missing: {', '.join(s.left_out)}.\n"
    inside, outside, accuracy = s.twice
    text += f"""
Alone the student reaches {s.alone[0]:.3f} nats per token in domain, {s.alone[1]:.3f} outside. Twice the text
gains {show(inside)} and {show(outside)}, and {show(accuracy, 2)} points of accuracy outside. The student
reads its text {s.tokens / s.setup["text"]:.3g} times: {s.tokens:,} of {s.setup["text"]:,} tokens.

A gain is over the student alone of the same seed: how much lower the loss is in nats per token, how many
points higher the accuracy. Its worth is the extra text, in per cent, that would gain as much (above 100:
extrapolated). A teacher costs its forward passes, and with them its training, in per cent of the student's
own FLOPs. ± is a 95 % t-interval over seeds.

"""
    table = [("teacher", "group", "worse in domain", "alpha", "gain in domain", "gain outside",
              "accuracy outside", "worth in domain, %", "worth outside, %", "costs, %", "with training, %"),
             ["---"] * 11]
    table += [(t.name, t.group, f"{t.worse:+.3f}", f"{t.alpha:g}", show(t.inside), show(t.outside),
               show(t.accuracy, 2), show(t.worth_inside, 0), show(t.worth_outside, 0), f"{t.costs:.0f}",
               f"{t.costs_trained:.0f}") for t in s.teachers]
    return text + "".join(f"| {' | '.join(line)} |\n" for line in table)


def in_words(t, s):
    """A teacher beside the student: xs@2M -> 'a third of the size,\n2M tokens'."""
    tokens = t.name.partition("@")[2] + " tokens"
    if t.group == "tables":
        return f"a {t.size} table,\n{tokens}"
    mine, own = (n_weights(GPTConfig(s.setup["vocab_size"], **SIZES[size])) for size in (t.size, s.size))
    words = {1: "the same", 2: "half the", 3: "a third of the", 4: "a quarter of the"}
    part = next((words[n] for n in words if abs(own / mine - n) < 0.2), f"{mine / own:.2g} times the")
    return f"{part} size,\n{tokens}"


def draw(s, file):
    """Gains outside by teacher: at each alpha on the seed that chose, at the best on those that tested."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(max(11, 3 + 1.6 * len(s.teachers)), 4.8), layout="constrained")
    axis, at = figure.subplots(), range(len(s.teachers))
    color = dict(zip(s.alphas, colormaps["viridis"](np.linspace(0, 0.85, len(s.alphas)))))
    centers, margins = np.nan_to_num([interval(t.outside) for t in s.teachers]).T
    axis.errorbar(at, centers, margins, fmt="none", capsize=4, color="black", zorder=3)
    axis.scatter(at, centers, 80, [color[t.alpha] for t in s.teachers], edgecolor="black", zorder=4)
    axis.plot([], [], "o", ms=9, mfc="none", mec="black",
              label=f"at the best alpha, mean\nof {len(s.seeds)} seeds (95 % interval)")
    for i, alpha in enumerate(s.alphas):
        axis.plot(at, [t.curve[i] for t in s.teachers], "o-", ms=3, lw=0.8, color=color[alpha],
                  label=f"alpha {alpha:g}, seed {s.chooser}" + " (only the teacher)" * (alpha == 1))
    text = s.twice[1].mean()
    top = 1.7 * max(0.01, text, *centers)
    axis.axhline(text, color="0.5", ls="--", label="no teacher, twice the text")
    axis.axhline(0, color="black", lw=0.8)
    axis.set_ylim(-top, top)                                 # what lies far below is off the scale
    axis.set_xlim(-0.5, len(at) - 0.5)
    boundary = sum(t.worse > 0 for t in s.teachers) - 0.5
    axis.axvspan(-0.5, boundary, color="0.94", zorder=0)
    for left, right, word in (-0.5, boundary, "worse"), (boundary, len(at) - 0.5, "better"):
        if right > left:
            axis.text((left + right) / 2, 0.83 * top, f"teachers {word} than\nthe student alone", ha="center")
    axis.set_xticks(at, [in_words(t, s) for t in s.teachers])
    axis.set_xlabel("teacher: its size beside the student's, and the text it was trained on")
    axis.set_ylabel("how much lower the student's loss is\nthan without a teacher (nats per token)")
    tokens = s.student.partition("@")[2]
    axis.set_title(f"What each teacher brings a student of {tokens} tokens, on other kinds of text")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(file, dpi=100)


# ---- the command line --------------------------------------------------------

def main():
    """Evaluate the checkpoints of the command line, or let them write."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="distill.py checkpoints")
    parser.add_argument("--sample", metavar="TEXT", help="print each checkpoint's continuation of this text")
    parser.add_argument("--data", default="data/python", metavar="DIR", type=os.path.expanduser,
                        help="corpus folder (default: data/python)")
    parser.add_argument("--windows", type=int, default=512, help="of each set, at most (default: 512)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    args = parser.parse_intermixed_args()                    # CKPT --data DIR CKPT too
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    device, _ = pick_device(args.device)
    tokenizer, encoding = load_meta(args.data)["tokenizer"], load_tokenizer(args.data)
    models = []
    for i, path in enumerate(args.checkpoints):
        model, extra = load_checkpoint(path, device, tokenizer)
        models.append(model)
        of = extra["settings"]
        taught = f", alpha {of['alpha']:g} from {of['teacher']['name']}" if of["teacher"] else ""
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

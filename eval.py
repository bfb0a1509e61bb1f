"""
What is a model worth? Its loss in and out of distribution, downstream tasks, and where its gain lies.
What does a study show? The second half turns a sweep's results.jsonl into four findings.

    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt                  # a table of both
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --sample "def "  # what they write
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --teacher out/xs/ckpt.pt out/alone_2/ckpt.pt
                                                                         # on which tokens the student gains

Windows (the same for all models of one block_size) and items are split in half, earlier and later held-out
documents: choose on `select`, quote from `report`. Loss is in nats per token; perplexity is its exponential.
Each loss is given twice, as it is and calibrated: with the logits divided by a temperature, fitted for each
model and each set on the select half. That removes gains from smoothing alone.
"""
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import (UNITS, UserError, evenly_spaced, load_meta, load_tokenizer, load_tokens, make_parser,
                  read_items, run_main, whole_number)
from model import SIZES, autocast, load_checkpoint, pick_device


# ---- token by token, over fixed windows --------------------------------------

def evaluation_sets(data_dir):
    """-> {"in_domain": path, "ood/NAME": path ...} of a corpus folder."""
    names = {"in_domain": "val"} | {f"ood/{name[4:]}": name for name in load_meta(data_dir)["sets"]
                                    if name.startswith("ood_")}
    return {name: f"{data_dir}/{file}.bin" for name, file in names.items()}


def read_windows(path, block_size, most):
    """-> {"select": ids (<= most, block_size + 1), "report": the same}, evenly spaced over either half."""
    tokens = load_tokens(path)
    total = (len(tokens) - 1) // block_size
    if total < 2:
        raise UserError(f"{path} has {len(tokens):,} tokens: evaluation needs two windows of {block_size}")
    halves = {}
    for half, first, last in (("select", 0, total // 2), ("report", total // 2, total)):
        starts = evenly_spaced(range(first, last), most)
        rows = np.stack([tokens[s * block_size:(s + 1) * block_size + 1] for s in starts])
        halves[half] = torch.from_numpy(rows.astype(np.int64))
    return halves


@torch.no_grad()
def logits_of(model, rows):
    """
    Rows of ids (N, T + 1) -> by batches, logits (B, T, V) in float32 and targets (B, T), under the autocast
    that training has by default.
    """
    device = next(model.buffers()).device
    at_once = max(1, min(32, 2**28 // (rows.size(1) * model.config.vocab_size)))     # logits below a GiB
    for part in rows.split(at_once):
        part = part.to(device)
        with autocast(device, pick_device(device.type)[1]):
            logits = model(part[:, :-1])
        yield logits.float(), part[:, 1:]


def token_scores(model, rows):
    """Rows of ids (N, T + 1) -> two of (N, T): each token's loss in nats, whether it was the likeliest."""
    scores = []
    for logits, targets in logits_of(model, rows):
        log_p = logits.log_softmax(-1)                                       # (B, T, V)
        loss = -log_p.gather(-1, targets[..., None])[..., 0]
        scores.append((loss.cpu(), (logits.argmax(-1) == targets).cpu()))
    return tuple(torch.cat(s) for s in zip(*scores))


def mean_losses(model, rows, temperatures):
    """Rows of ids (N, T + 1) -> the mean loss, in nats, with the logits divided by each temperature."""
    losses = torch.zeros(len(temperatures), dtype=torch.float64)
    for logits, targets in logits_of(model, rows):
        for z, y in zip(logits, targets):                    # (T, V) and (T,): a window fits the cache
            sums = [F.cross_entropy(z / t, y, reduction="sum") for t in temperatures]
            losses += torch.stack(sums).cpu() / rows[:, 1:].numel()
    return losses.tolist()


TEMPERATURES = (0.8, 0.87, 1.0, 1.2, 1.4)


def best_temperature(losses):
    """
    Losses at TEMPERATURES -> the temperature with the least, and that loss. As a function of 1 / temperature
    the loss is smooth and convex: the polynomial through the five points stands for it. A best temperature
    outside their range is cut to it.
    """
    temperatures = np.arange(0.8, 1.4, 0.001)
    polynomial = np.polynomial.Polynomial.fit(1 / np.array(TEMPERATURES), losses, 4)
    losses = polynomial(1 / temperatures)
    return temperatures[losses.argmin()], losses.min()


# ---- downstream tasks --------------------------------------------------------

def score_item(model, encoding, item):
    """
    -> the probability of the right choice (softmax over the choices' log-likelihoods), and 1.0 or 0.0 for
    whether it is the likeliest by log-likelihood per character.
    """
    T = model.config.block_size
    context = [encoding.eot_token, *encoding.encode_ordinary(item["context"])]
    choices = [encoding.encode_ordinary(choice)[:T] for choice in item["choices"]]
    # what does not fit is cut on the left; padding, on the right, is never looked at
    rows = [torch.tensor([*context, *choice][-T - 1:]) for choice in choices]
    losses, _ = token_scores(model, pad_sequence(rows, batch_first=True))    # (choices, longest - 1)
    likelihoods = torch.stack([-loss[len(row) - 1 - len(choice):len(row) - 1].sum()
                               for loss, row, choice in zip(losses, rows, choices)])
    characters = torch.tensor([len(encoding.decode(choice)) for choice in choices])
    likeliest = (likelihoods / characters).argmax()
    return likelihoods.softmax(0)[item["label"]].item(), float(likeliest == item["label"])


# ---- everything about one model, and where a student gains -------------------

def evaluate(model, data_dir, windows=256, items=500):
    """
    -> {name: {"select": x, "report": x}}, over at most `windows` windows and `items` items in each half:
    in_domain, ood/SET          loss in nats per token
    calibrated/in_domain, ...   the same, with the logits divided by
    temperature/in_domain, ...  this
    task/NAME, accuracy/NAME    the probability of the right choice, and the accuracy
    """
    metrics = {}
    for name, path in evaluation_sets(data_dir).items():
        rows = read_windows(path, model.config.block_size, windows)
        select = mean_losses(model, rows["select"], TEMPERATURES)
        temperature, least = best_temperature(select)
        report = mean_losses(model, rows["report"], (1.0, temperature))
        metrics[name] = {"select": select[TEMPERATURES.index(1.0)], "report": report[0]}
        metrics[f"calibrated/{name}"] = {"select": least, "report": report[1]}
        metrics[f"temperature/{name}"] = {"select": temperature, "report": temperature}
    encoding = load_tokenizer(data_dir)
    for name in load_meta(data_dir)["tasks"]:
        found = read_items(f"{data_dir}/task_{name}.jsonl")
        for half, part in (("select", found[:len(found) // 2]), ("report", found[len(found) // 2:])):
            scores = [score_item(model, encoding, item) for item in evenly_spaced(part, items)]
            probability, accuracy = np.mean(scores, axis=0)
            metrics.setdefault(f"task/{name}", {})[half] = probability
            metrics.setdefault(f"accuracy/{name}", {})[half] = accuracy
    return {name: {half: round(float(x), 6) for half, x in halves.items()}
            for name, halves in metrics.items()}


def token_gains(base, student, teacher, other, data_dir, windows=256):
    """
    Where does the student gain over the base, on the report halves? -> {"in_domain": x, "outside": x}, x =
    {group: (share, gain in nats per token)}; shares times gains add up to the gain over all tokens, those of
    the ood sets taken together. Groups are by who predicts the token right (argmax): the teacher, and a
    student alone of another seed. (Base itself will not do: some of its errors are bad luck, and any other
    model gains there.)
    """
    gains, found = {}, {}
    for name, path in evaluation_sets(data_dir).items():
        rows = read_windows(path, base.config.block_size, windows)["report"]
        losses, right = zip(*(token_scores(model, rows) for model in (base, student, teacher, other)))
        where = "in_domain" if name == "in_domain" else "outside"
        gains.setdefault(where, []).append((losses[0] - losses[1], right[2], right[3]))
    for where, sets in gains.items():
        gain, t, o = (torch.cat(parts) for parts in zip(*sets))
        groups = {"all tokens": torch.ones_like(t), "both right": t & o, "only the teacher": t & ~o,
                  "only the other student": ~t & o, "neither": ~t & ~o}
        found[where] = {name: (group.double().mean().item(), gain[group].double().mean().nan_to_num().item())
                        for name, group in groups.items()}
    return found


def print_token_gains(models, data_dir, windows):
    """The table of token_gains."""
    print(f"{'who is right (argmax)':35}  share  gain of [1] over [0], nats per token")
    for where, groups in token_gains(*models, data_dir, windows).items():
        for name, (share, gain) in groups.items():
            print(f"{where:10} {name:22} {share:8.1%}  {gain:+.3f}")


def print_table(models, data_dir, windows):
    """Models side by side: a line per measure, a column each, in brackets the gain over the first."""
    columns = [{name: x["report"] for name, x in evaluate(model, data_dir, windows).items()}
               for model in models]
    for column in columns:
        for kind in ("", "calibrated/"):
            outside = [x for name, x in column.items() if name.startswith(f"{kind}ood/")]
            if outside:
                column[f"{kind}ood, mean"] = np.mean(outside)
    print("\nreport half: loss in nats per token; task: probability of the right choice; accuracy")
    others = "".join(f"{f'[{i}]':>9}{'':10}" for i in range(1, len(models)))
    print(f"{'in brackets: gain over [0]':30}[0]{others}".rstrip())
    for kind in ("in_domain", "ood/", "ood, mean", "calibrated/", "task/", "accuracy/"):
        sign = 1 if kind in ("task/", "accuracy/") else -1   # a loss is better if it is lower
        for name in (name for name in columns[0] if name.startswith(kind)):
            first, *others = (column[name] for column in columns)
            print(f"{name:26}{first:7.4f}" + "".join(f"{x:9.4f} ({sign * (x - first):+.4f})" for x in others))


# ------------------------------------------------------------------------------
# What does a study show? From here on all is a function of the rows of results.jsonl, one per model:
# {"model": "s@1.5M", "seed": 1, "teacher": null or "xs@2M", "teacher_seed": null or 1001, "alpha": 0.25,
#  "corpus": fingerprint, "flops": of its training, "teacher_flops": of its teacher's forward passes,
#  "seconds": 39.8, "metrics": what evaluate() returns}

KEYS = ("model", "seed", "teacher", "teacher_seed", "alpha")                 # which model a row is of
IN, OUT = "in_domain", "ood/"            # prefixes of metrics; "outside" is the mean of the ood sets
KINDS = PLAIN, CALIBRATED = "", "calibrated/"                                # prefixes before those
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last, a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def parse_model(model):
    """'s@1.5M' -> ('s', 1500000)."""
    size, _, tokens = model.partition("@")
    if size not in SIZES or not tokens:
        raise UserError(f"{model!r} is not a model, such as s@1.5M; the sizes are {' '.join(SIZES)}")
    return size, whole_number(tokens)


def model_name(size, tokens):
    """('s', 1500000) -> 's@1.5M'; different token counts give different names."""
    unit = next((u for u in ("B", "M", "K") if tokens >= UNITS[u]), "")
    return f"{size}@{tokens / UNITS.get(unit, 1):.15g}{unit}"


def read_rows(path):
    """The rows of a results.jsonl; [] without one. Half a last line, which a kill may leave, is dropped."""
    rows, lines = {}, []
    if os.path.exists(path):
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            numbers = [x[half] for x in row["metrics"].values() for half in ("select", "report")]
            if not np.isfinite([*numbers, row["flops"], row["teacher_flops"], row["seconds"]]).all():
                raise ValueError
            rows.setdefault(tuple(row[name] for name in (*KEYS, "corpus")), row)
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not a valid result: delete it") from None
        first = next(iter(rows.values()))
        if (row["corpus"], row["metrics"].keys()) != (first["corpus"], first["metrics"].keys()):
            raise UserError(f"{path}: line {number} comes from a different corpus than line 1: delete one")
    return list(rows.values())


def metric(row, prefix, half="report"):
    """A row's mean of the metrics whose names begin with prefix; 0 if it has none."""
    found = [x[half] for name, x in row["metrics"].items() if name.startswith(prefix)]
    return sum(found) / max(1, len(found))


def interval(x):
    """One value a seed -> their mean, and the margin of its 95 % t-interval."""
    n = len(x)
    if n == 1:
        return x[0], math.nan
    return np.mean(x), T_975[min(n - 1, len(T_975)) - 1] * np.std(x, ddof=1) / math.sqrt(n)


def show(x, digits=3):
    """One value a seed -> '+0.012 ± 0.003', the mean alone for a single seed."""
    center, margin = interval(x)
    return f"{center:+.{digits}f}" + (f" ± {margin:.{digits}f}" if len(x) > 1 else "")


def judge(x):
    """The verdict on a claim that holds where x, one value a seed, is above 0."""
    center, margin = interval(x)
    if len(x) < 3:
        return "too few seeds"
    return "reproduced" if center > margin else "not reproduced" if center < -margin else "undecided"


def mean(values):
    """The mean of numbers, or of arrays of one shape."""
    return np.mean(list(values), axis=0)


def study(rows, student):
    """
    One student's rows -> its seeds that have every row of the grid, and what each teacher, weakest first,
    brought it; None without such a seed. A gain is an array of one value a seed: how many nats per token less
    than the student alone of that seed. Alpha is chosen on the select halves, all else is of the report ones.
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

    def gain(which, prefix, half="report"):
        return np.array([metric(models["alone"], prefix, half) - metric(models[which], prefix, half)
                         for models in complete.values()])
    rate = {kind: gain("twice", kind + OUT).mean() / gain("twice", kind + IN).mean() for kind in KINDS}
    flops = {row["model"]: row["flops"] for row in rows}
    forward = {row["teacher"]: row["teacher_flops"] for row in taught}
    teachers = []
    for name in names:
        best = {kind: (name, max(alphas, key=lambda a: gain((name, a), kind + OUT, "select").mean()))
                for kind in KINDS}                           # (teacher, its best alpha)
        size, tokens = parse_model(name)
        costs = forward[name], forward[name] + flops[name]
        teachers.append(SimpleNamespace(
            name=name, size=size, tokens=tokens, table="counts" in SIZES[size], alpha=best[PLAIN][1],
            worse=-gain(name, IN).mean(),                    # than the student alone, in domain
            at={alpha: gain((name, alpha), OUT) for alpha in alphas},
            inside=gain(best[PLAIN], IN), outside={kind: gain(best[kind], kind + OUT) for kind in KINDS},
            # how much more outside than text that gains as much in domain
            beyond={kind: gain(best[kind], kind + OUT) - rate[kind] * gain(best[kind], kind + IN)
                    for kind in KINDS},
            # the gain of more text instead, for the teacher's forward passes; for its training too. A
            # doubling gains `twice`; less, in proportion to the logarithm
            as_text=[gain("twice", OUT) * math.log2(min(1 + cost / flops[student], 2)) for cost in costs],
            accuracy=-100 * gain(best[PLAIN], "accuracy/")))             # points gained in the tasks
    teachers.sort(key=lambda t: -t.worse)
    tables = [t for t in teachers if t.table]
    weak = [t for t in teachers if not t.table and t.worse > 0]
    strong = [t for t in teachers if not t.table and t.worse <= 0]
    groups = ("weak ones", weak), ("strong ones", strong), ("tables", tables)
    return SimpleNamespace(
        student=student, seeds=list(complete), alphas=alphas, rate=rate, teachers=teachers,
        weak=weak, strong=strong, tables=tables, groups=[group for group in groups if group[1]],
        alone=[mean(metric(models["alone"], x) for models in complete.values()) for x in (IN, OUT)],
        own_teachers=len({teacher_seed[seed] for seed in complete}) == len(complete) > 1)


# ---- the four rules: study -> verdict, what was seen -------------------------

def weak_teacher_helps(s):
    """Averaged over networks worse in domain than the student alone, the gain outside is above 0."""
    if not s.weak:
        return "not tested", "No network is weaker than the student."
    gain, pure = mean(t.outside[PLAIN] for t in s.weak), mean(t.at[s.alphas[-1]] for t in s.weak)
    return judge(gain), (f"Weak teachers bring {show(gain)} outside at their best alpha, {show(pure)} at "
                         f"alpha {s.alphas[-1]:g}.")


def by_size(s):
    """The networks with the largest budget, smallest first."""
    networks = s.weak + s.strong
    most = max((t.tokens for t in networks), default=0)
    return sorted((t for t in networks if t.tokens == most), key=lambda t: list(SIZES).index(t.size))


def stronger_teacher_saturates(s):
    """Along size at the largest budget, the gain outside grows less on the last step than on the first."""
    path = by_size(s)
    if len(path) < 3:
        return "not tested", "This needs three networks of one budget."
    steps = [b.outside[PLAIN] - a.outside[PLAIN] for a, b in zip(path, path[1:])]
    less, (last, margin) = steps[0] - steps[-1], interval(steps[-1])
    verdict = judge(less)
    if verdict == "reproduced":
        verdict += ", reverses" if last < -margin else ", diminishes" if last > margin else ", saturates"
    return verdict, (f"From {' to '.join(t.name for t in path)} the gain outside changes by "
                     f"{', '.join(map(show, steps))}; first step minus last: {show(less)}.")


def generalisation_first(s):
    """Students of weak teachers gain more outside than from text that gains as much in domain."""
    if not s.weak:
        return "not tested", "No network is weaker than the student."
    seen = (f"{name} {show(mean(t.beyond[PLAIN] for t in group))} (calibrated "
            f"{show(mean(t.beyond[CALIBRATED] for t in group))})" for name, group in s.groups)
    return judge(mean(t.beyond[PLAIN] for t in s.weak)), (
        f"More text brings {s.rate[PLAIN]:.2f} nats outside for each nat in domain. Beyond that, teachers "
        f"bring: {', '.join(seen)}.")


def more_than_smoothing(s):
    """Calibrated, weak networks' mean gain outside lies above 0, and above that of the best table."""
    if not s.weak or not s.tables:
        return "not tested", "This needs a weak network and a table."
    gain = mean(t.outside[CALIBRATED] for t in s.weak)
    table = max((t.outside[CALIBRATED] for t in s.tables), key=np.mean)      # chosen in favour of the tables
    worst_first = ["too few seeds", "not reproduced", "undecided", "reproduced"]
    return min(judge(gain), judge(gain - table), key=worst_first.index), (
        f"Calibrated, weak teachers bring {show(gain)} outside, the best table {show(table)}; difference "
        f"{show(gain - table)}.")


FINDINGS = {"A weak teacher helps": weak_teacher_helps,
            "A stronger teacher saturates or reverses the gain": stronger_teacher_saturates,
            "Generalisation comes first": generalisation_first,
            "A weak teacher gives more than smoothing": more_than_smoothing}


# ---- the report --------------------------------------------------------------

def write_report(rows, out):
    """Write report.md and a figure for each student into out -> the report."""
    if not rows:
        raise UserError(f"{out} has no results.jsonl, or it is empty")
    text = (f"{len(rows)} models, {sum(row['seconds'] for row in rows) / 60:.0f} worker-minutes, corpus "
            f"{rows[0]['corpus']}; made from results.jsonl by `python sweep.py --report`.\n")
    for student in sorted({row["model"] for row in rows if row["teacher"]}):
        s = study(rows, student)
        if not s:
            text += f"\n## Student {student}\n\nNo seed is complete yet.\n"
            continue
        text += report(s)
        try:
            draw(s, f"{out}/findings_{student}.png")
            text += f"\n![the findings](findings_{student}.png)\n"
        except Exception as e:                               # no matplotlib, or one that is set up wrong
            text += f"\nNo figure ({type(e).__name__}: {e}); it takes pip install matplotlib.\n"
    Path(out, "report.md").write_text(text, encoding="utf-8")
    return text


def report(s):
    """study -> Markdown."""
    text, (inside, outside) = f"\n## Student {s.student}, seeds {', '.join(map(str, s.seeds))}\n\n", s.alone
    for i, (claim, rule) in enumerate(FINDINGS.items(), 1):
        verdict, seen = rule(s)
        text += f"{i}. **{claim}: {verdict}.** {seen}\n"
    text += f"""
Alone the student reaches {inside:.3f} nats per token in domain, {outside:.3f} outside. Gains are over the
student alone of the same seed. Alpha is chosen on the select halves; all figures are of the report halves.
± is a 95 % t-interval over seeds, {"each with its own" if s.own_teachers else "given these"} teachers.
As text: the gain outside if the teacher's compute bought the student alone more text (at most twice) instead.

| teacher | worse in domain | best alpha | gain in domain | gain outside | calibrated \
| its forward passes as text | its training too |
|---|---|---|---|---|---|---|---|
"""
    for t in s.teachers:
        gains = t.inside, t.outside[PLAIN], t.outside[CALIBRATED], *t.as_text
        text += f"| {t.name} | {t.worse:+.3f} | {t.alpha:g} | {' | '.join(map(show, gains))} |\n"
    if any(t.accuracy.any() for t in s.teachers):
        gains = (f"{name} {show(mean(t.accuracy for t in group), 1)}" for name, group in s.groups)
        text += f"\nPoints of accuracy in the task: {', '.join(gains)}.\n"
    return text


def draw(s, file):
    """The four findings as four panels, one question each."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    (first, second), (third, fourth) = axes = figure.subplots(2, 2)

    def points(axis, at, gains, **style):                    # a point for each gain, with its interval
        if gains:
            axis.errorbar(at, *np.transpose([interval(gain) for gain in gains]), capsize=3, **style)

    # 1: a low alpha against the highest, over all teachers; what lies far below is off the scale
    names, low = [t.name for t in s.teachers], s.alphas[(len(s.alphas) - 1) // 2]
    for alpha, style in ((low, dict(color="tab:blue", marker="o")),
                         (s.alphas[-1], dict(color="tab:red", marker="^"))):
        points(first, names, [t.at[alpha] for t in s.teachers], label=f"alpha {alpha:g}", **style)
    top = abs(max(gain.mean() for t in s.teachers for gain in t.at.values()))
    first.set_ylim(-2 * top, 1.6 * top)
    boundary = sum(t.worse > 0 for t in s.teachers) - 0.5
    first.axvline(boundary, color="0.7")
    first.text(boundary, 1.4 * top, "weaker than the student ", ha="right", fontsize=8)
    first.text(boundary, 1.4 * top, " stronger", fontsize=8)

    # 2: along size; 3: groups of teachers; 4: tables and weak networks
    path = by_size(s)
    points(second, [-t.worse for t in path], [t.outside[PLAIN] for t in path], color="black", marker="o")
    for t in path:
        second.annotate(t.name, (-t.worse, t.outside[PLAIN].mean()), (5, -12), textcoords="offset points",
                        fontsize=8)
    second.set_xlabel("the teacher predicts better than the student by, nats")
    second.margins(x=0.15)
    third.set_xticks(range(len(s.groups)), [f"from {name}" for name, _ in s.groups])
    controls = [t for t in s.teachers if t.table or t.worse > 0]
    fourth.set_xticks(range(len(controls)), [t.name for t in controls])
    for kind, shift, style in (
            (PLAIN, 0, dict(label="as it is", color="black", marker="o", ls="none")),
            (CALIBRATED, 0.15, dict(label="calibrated", color="orange", marker="s", ls="none"))):
        beyond = [mean(t.beyond[kind] for t in group) for _, group in s.groups]
        points(third, np.arange(len(beyond)) + shift, beyond, **style)
        points(fourth, np.arange(len(controls)) + shift, [t.outside[kind] for t in controls], **style)

    for axis, (claim, rule) in zip(axes.flat, FINDINGS.items()):
        axis.set_title(f"{claim}:\n{rule(s)[0]}", fontsize=10)
        axis.set_ylabel("gain outside, nats per token")
        axis.axhline(0, color="0.7", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not second:
            axis.legend(fontsize=8, loc="lower right")
    third.set_ylabel("gain outside, less what text gives\nwith the same gain in domain, nats")
    for axis in (first, fourth):
        axis.tick_params("x", rotation=45, labelsize=8)
    figure.savefig(file, dpi=100)


# ---- the command line --------------------------------------------------------

def main():
    """Evaluate the checkpoints of the command line and print what it asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="distill.py checkpoints")
    parser.add_argument("--teacher", nargs=2, default=[], metavar=("TEACHER", "OTHER"),
                        help="after a student alone and a taught one: where the gain lies, by whether "
                        "TEACHER and OTHER, a student alone of another seed, are right")
    parser.add_argument("--json", action="store_true", help="print what evaluate() returns, as JSON")
    parser.add_argument("--sample", metavar="TEXT", help="print each checkpoint's continuation of this text")
    parser.add_argument("--data", default="data/python", help="corpus folder (default: data/python)")
    parser.add_argument("--windows", type=int, default=256, help="windows per half of a set (default: 256)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    args = parser.parse_args()
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    if args.teacher and len(args.checkpoints) != 2:
        parser.error("--teacher takes two checkpoints before it: a student alone and a taught one")
    device, encoding = pick_device(args.device)[0], load_tokenizer(args.data)
    tokenizer, paths = load_meta(args.data)["tokenizer"], args.checkpoints + args.teacher
    models, extras = zip(*(load_checkpoint(path, device, tokenizer) for path in paths))
    if args.json:
        return print(json.dumps({path: evaluate(model, args.data, args.windows)
                                 for path, model in zip(paths, models)}, indent=1))
    if len({model.config.block_size for model in models}) > 1:
        raise UserError("these models have different context lengths: evaluate one at a time, or use --json")
    for i, (path, extra) in enumerate(zip(paths, extras)):
        settings, alpha = extra["settings"], extra["alpha"]
        taught = f", alpha {alpha:g} from {settings['teacher']['name']}" if alpha else ""
        print(f"[{i}] {path}: {settings['size']}, {settings['tokens']:,} tokens, seed {settings['seed']}"
              f"{taught}")
    if args.teacher:
        print_token_gains(models, args.data, args.windows)
    elif args.sample is not None:
        for i, model in enumerate(models):
            torch.manual_seed(1)
            idx = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(args.sample)]], device=device)
            ids = [k for k in model.generate(idx, 200, 0.8, 50)[0].tolist() if k < encoding.eot_token]
            print(f"\n--- [{i}]\n{encoding.decode(ids)}")
    else:
        print_table(models, args.data, args.windows)


if __name__ == "__main__":
    run_main(main)

"""
How good is a model: loss in domain and out of distribution, one downstream task, and which tokens gain.

    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt                           # a table of both
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --teacher out/xs/ckpt.pt  # which tokens gain
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --sample "def "           # what they write
    python eval.py out/124M/ckpt.pt --data data/fineweb-edu --items hellaswag_val.jsonl

Models of one block_size see the same windows and items. Both are cut in two halves, from the first and from
the later held-out documents: choose on `select`, quote from `report`. Loss is in nats per token. The second
half of the file turns a sweep's results.jsonl into a report.

The task, next_line, is made from held-out documents: which of four lines of a file comes next (after
HellaSwag, arXiv 1905.07830)? Its score is the probability that the model gives to the right one of the four,
by their log-likelihoods per character; the usual accuracy of the likeliest stands beside it, and is noisier.
"""
import functools
import json
import math
import os
import random
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import (END_OF_TEXT, UNITS, UserError, load_meta, load_tokenizer, load_tokens, make_parser,
                  run_main, whole_number)
from model import SIZES, autocast, load_checkpoint, pick_device


# ---- token by token, over fixed windows --------------------------------------

def evenly_spaced(items, most):
    """At most so many of the items."""
    n = min(len(items), most)
    return [items[k * len(items) // n] for k in range(n)]


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
def token_scores(model, rows):
    """
    Rows of ids (N, T + 1) -> two of (N, T): every token's loss in nats, and whether it was the likeliest,
    under the autocast that training has by default.
    """
    device, scores = model.lm_head.weight.device, []
    at_once = max(1, min(32, 2**28 // (rows.size(1) * model.config.vocab_size)))     # logits below a GiB
    for part in rows.split(at_once):
        part = part.to(device)
        with autocast(device, pick_device(device.type)[1]):
            logits = model(part[:, :-1])
        logp = F.log_softmax(logits.float(), dim=-1)                         # (B, T, V)
        loss = -logp.gather(-1, part[:, 1:, None])[..., 0]
        scores.append((loss.cpu(), (-loss == logp.amax(-1)).cpu()))
    return tuple(torch.cat(s) for s in zip(*scores))


def evaluation_sets(data_dir):
    """-> {"in_domain": path, "ood/NAME": path ...} of a corpus folder."""
    names = {"in_domain": "val"} | {f"ood/{name[4:]}": name for name in load_meta(data_dir)["sets"]
                                    if name.startswith("ood_")}
    return {name: f"{data_dir}/{file}.bin" for name, file in names.items()}


# ---- the task: an item is {"context", "choices", "label"} --------------------

MOST_CHARACTERS = 100_000                # of an item: tiktoken fails on a million spaces
CONTEXT, LINE = 160, 60                  # characters of context and of a line: an item fits 128 tokens


@functools.cache
def next_line(data_dir):
    """Items from the held-out documents of a corpus folder, always the same; [] if there are too few."""
    items, draw, ids = [], random.Random(0), load_tokens(f"{data_dir}/val.bin").tolist()
    for text in load_tokenizer(data_dir).decode(ids).split(END_OF_TEXT)[:-1]:
        lines = [line.rstrip() for line in text.split("\n")]
        fit = [i for i in range(1, len(lines))
               if lines[i - 1] and len(lines[i].strip()) >= 10 and len(lines[i]) <= LINE]
        for i in draw.sample(fit, min(len(fit), 40)):
            context = "\n".join(lines[max(0, i - 20):i])
            if len(context) > CONTEXT:                       # whole lines only
                context = context[-CONTEXT:].partition("\n")[2]
            # distractors from the same document with the same indentation, or it would be easy
            indent = re.match(r"\s*", lines[i])[0]
            others = sorted({lines[j] for j in fit if re.match(r"\s*", lines[j])[0] == indent} - {lines[i]})
            others = [other for other in others if other.strip() not in context]
            if len(context) >= CONTEXT / 4 and len(others) >= 3:
                choices, label = draw.sample(others, 3), draw.randrange(4)
                choices.insert(label, lines[i])
                items.append({"context": context, "choices": [f"\n{c}" for c in choices], "label": label})
    return items if len(items) >= 100 else []


def read_items(path):
    """
    Items from a file of JSON lines, {"context", "choices", "label"} or HellaSwag's {"ctx", "endings",
    "label"}, whose endings follow after a space. Raises OSError, or UserError with the line that is none.
    """
    items = []
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if "ctx" in item:
                endings = [f" {ending}" for ending in item["endings"]]
                item = {"context": item["ctx"], "choices": endings, "label": item["label"]}
            label, choices = int(item["label"]), item["choices"]
            if str(label) != str(item["label"]) or not 0 <= label < len(choices):
                raise ValueError
            if not all(isinstance(text, str) for text in (item["context"], *choices)) or "" in choices:
                raise ValueError
            if isinstance(choices, str) or len(line) > MOST_CHARACTERS:
                raise ValueError
            items.append({"context": item["context"], "choices": list(choices), "label": label})
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}: line {number} is not an item: "context", "choices", "label" (or "ctx", '
                            f'"endings", "label"), at most {MOST_CHARACTERS:,} characters') from None
    if not items:
        raise UserError(f"{path} holds no items")
    return items


def score_items(model, encoding, items):
    """
    -> for each item the probability of the right choice (softmax over the choices' log-likelihoods per
    character), and 1 or 0 for whether it is the largest. What does not fit the context is cut on the left.
    """
    T, rows, spans = model.config.block_size, [], []
    for item in items:
        context = encoding.encode_ordinary(item["context"])
        for choice in item["choices"]:
            ids = encoding.encode_ordinary(choice)[:T]       # of a longer choice, so much is scored
            row = [encoding.eot_token, *context, *ids][-T - 1:]
            spans.append((len(row) - 1 - len(ids), len(row) - 1, len(encoding.decode(ids))))
            rows.append(row)
    likelihoods = torch.empty(len(rows))
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))         # so that little is padding
    for start in range(0, len(rows), 32):
        group = by_length[start:start + 32]
        # padding, on the right, is never looked at
        loss, _ = token_scores(model, pad_sequence([torch.tensor(rows[i]) for i in group], batch_first=True))
        for i, row in zip(group, loss):
            first, last, characters = spans[i]
            likelihoods[i] = -row[first:last].sum() / characters
    scores = []
    for item, per_character in zip(items, likelihoods.split([len(item["choices"]) for item in items])):
        right = per_character.softmax(0)[item["label"]].item()
        scores.append((right, float(per_character.argmax() == item["label"])))
    return scores


# ---- everything about one model, and about three -----------------------------

def evaluate(model, data_dir, windows=256, items=500):
    """
    -> {"in_domain": half, "ood/NAME": half ..., "task/next_line": half, "task/accuracy": half}, half =
    {"select": x, "report": x}: nats per token over at most `windows` windows of the model's block_size; the
    task's probability of the right choice and its accuracy over at most `items` items. Raises UserError.
    """
    metrics = {}
    for name, path in evaluation_sets(data_dir).items():
        halves = read_windows(path, model.config.block_size, windows)
        metrics[name] = {half: token_scores(model, rows)[0].mean().item() for half, rows in halves.items()}
    made = next_line(data_dir)
    for half, part in (("select", made[:len(made) // 2]), ("report", made[len(made) // 2:])):
        if made:
            scores = score_items(model, load_tokenizer(data_dir), evenly_spaced(part, items))
            for name, column in zip(("task/next_line", "task/accuracy"), zip(*scores)):
                metrics.setdefault(name, {})[half] = sum(column) / len(column)
    return {name: {half: round(x, 6) for half, x in halves.items()} for name, halves in metrics.items()}


def token_gains(base, student, teacher, data_dir, windows=256):
    """
    Where does the student gain on the baseline, on the report halves? -> {"in_domain": x, "out": x}, x =
    {"gain": nats per token, "groups": {name: (share, gain)}}, the groups by who predicts the token right
    (argmax). Shares times gains add up to the gain. Where a baseline was unlucky any other model gains: so
    compare with a baseline of another seed in the student's place.
    """
    found, sets = {}, evaluation_sets(data_dir)
    inside, outside = [sets["in_domain"]], [path for name, path in sets.items() if name != "in_domain"]
    for where, paths in (("in_domain", inside), ("out", outside)):
        if not paths:
            continue
        rows = torch.cat([read_windows(path, base.config.block_size, windows)["report"] for path in paths])
        (b, b_right), (s, _), (_, t_right) = (token_scores(model, rows) for model in (base, student, teacher))
        gain = (b - s).double()
        groups = {"teacher and baseline": t_right & b_right, "teacher only": t_right & ~b_right,
                  "baseline only": ~t_right & b_right, "neither": ~t_right & ~b_right}
        found[where] = {"gain": gain.mean().item(), "groups": {
            name: (mask.double().mean().item(), gain[mask].mean().item() if mask.any() else 0.0)
            for name, mask in groups.items()}}
    return found


def print_table(paths, models, data_dir, windows):
    """Checkpoints side by side: a line a set, a column a checkpoint, in brackets the gain on the first."""
    for i, (path, (_, extra)) in enumerate(zip(paths, models)):
        settings, alpha = extra["settings"], extra["alpha"]
        taught = f", alpha {alpha:g} from {settings['teacher']['size']}" if alpha else ""
        print(f"[{i}] {path}: {settings['size']}, {settings['tokens']:,} tokens, seed {settings['seed']}"
              f"{taught}")
    print("\nreport halves: nats per token and perplexity; of the task the probability of the right line of "
          "four\nand how often it is the likeliest (chance is 0.25); in brackets the gain on [0]")
    print(" " * 15 + "".join(f"{f'[{i}]':30}" for i in range(len(paths))))
    metrics = [evaluate(model, data_dir, windows) for model, _ in models]
    for m in metrics:
        outside = [half["report"] for name, half in m.items() if name.startswith("ood/")]
        if outside:
            m["ood, mean"] = {"report": np.mean(outside)}
    for name, first in metrics[0].items():
        line = f"{name:15}"
        for i, m in enumerate(metrics):
            x, is_task = m[name]["report"], name.startswith("task/")
            gain = (x - first["report"]) * (1 if is_task else -1)
            perplexity = "" if is_task else f"{torch.tensor(x).exp():.2f}"   # inf where it is too large
            shown = f"({gain:+.4f})" if i else ""
            line += f"{x:7.4f} {perplexity:>9} {shown:12}"
        print(line.rstrip())


# ------------------------------------------------------------------------------
# What does a study show? From here on everything is a function of the rows of results.jsonl, one a model:
# {"model": "s@1.5M", "seed": 1, "teacher": null or "xs@2M", "teacher_seed": null or 1001, "alpha": 0.25,
#  "corpus": fingerprint, "flops": of its training, "teacher_flops": of its teacher's forward passes,
#  "seconds": 39.8, "metrics": what evaluate() returns}

KEYS = ("model", "seed", "teacher", "teacher_seed", "alpha")                 # which model a row is of
TIMES = (0.5, 1, 2)                      # the student alone is trained on so many times its tokens
CONTROL_TOKENS = 4096                    # tokens up to which a teacher is a control, which counts in no rule
SELECT, REPORT = range(2)                # the halves: to choose on, to quote from
IN, OUT, TASK = range(3)                 # what is measured: loss in domain, mean loss outside, task
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last, a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def parse_model(model):
    """'s@1.5M' -> ('s', 1500000). Raises UserError."""
    size, _, tokens = model.partition("@")
    if size not in SIZES or not tokens:
        raise UserError(f"{model!r} is not a model such as s@1.5M; sizes are {' '.join(SIZES)}")
    return size, whole_number(tokens)


def model_name(size, tokens):
    """('s', 1500000) -> 's@1.5M'; other tokens, another name."""
    unit = next((u for u in ("B", "M", "K") if tokens >= UNITS[u]), "")
    return f"{size}@{tokens / UNITS.get(unit, 1):.15g}{unit}"


def read_rows(path):
    """
    The rows of a results.jsonl, each model once; [] if there is no file. Half a last line, which a kill may
    leave, is dropped. Raises UserError.
    """
    rows, lines = {}, []
    if os.path.exists(path):
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key = tuple(row[name] for name in KEYS)
            numbers = [row[name] for name in ("seed", "alpha", "flops", "teacher_flops", "seconds")]
            parse_model(row["model"]), parse_model(row["teacher"] or row["model"])
            if not np.isfinite([*measures(row)[:, :TASK].flat, *numbers]).all():
                raise ValueError
        except Exception:                                    # of many kinds, all for the same reason
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not a result: delete it") from None
        first, same = next(iter(rows.values()), row), rows.setdefault(key, row)
        if (row["corpus"], row["metrics"].keys()) != (first["corpus"], first["metrics"].keys()):
            raise UserError(f"{path}: line {number} is of another corpus than line 1: delete one of them")
        if row["metrics"] != same["metrics"]:
            raise UserError(f"{path}: line {number} has other numbers for a model that is there: delete one")
    return list(rows.values())


def measures(row):
    """-> array (2 halves, 3): loss in domain, mean loss outside, the task in percent."""
    halves = []
    for half in ("select", "report"):
        m = {name: values[half] for name, values in row["metrics"].items()}
        outside = np.mean([x for name, x in m.items() if name.startswith("ood/")])
        halves.append([m["in_domain"], outside, 100 * m.get("task/next_line", math.nan)])
    return np.array(halves)


def interval(x):
    """Values, one a seed, nan where there is none -> mean, half-width of its 95 % t-interval, how many."""
    x = np.asarray(x)[~np.isnan(x)]
    n = len(x)
    if n < 2:
        return (x[0] if n else math.nan), math.inf, n
    return x.mean(), T_975[min(n - 1, len(T_975)) - 1] * x.std(ddof=1) / math.sqrt(n), n


def show(x):
    """'+0.012 ± 0.003', or the mean alone for a single value."""
    mean, half, n = interval(x)
    return "none" if not n else f"{mean:+.3f}" + (f" ± {half:.3f}" if n > 1 else "")


def judge(x):
    """The verdict, which takes three seeds, on a claim that holds where x is above 0."""
    mean, half, n = interval(x)
    if n < 3:
        return "not tested" if not n else "seen, too few seeds" if mean > 0 else "not seen, too few seeds"
    return "reproduced" if mean > half else "not reproduced" if mean < -half else "undecided"


def parabola(x, y, at):
    """The parabola through three points (x[i], y[i]), Lagrange's form, at `at`; all broadcast."""
    return sum(y[i] * (at - x[j]) / (x[i] - x[j]) * (at - x[k]) / (x[i] - x[k])
               for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)))


def mean_over(cells):
    """Cells (N, S) -> (S,), the mean of those that have at least half as many seeds as the fullest."""
    seeds = (~np.isnan(cells)).sum(-1)
    if not seeds.any():
        return np.full(cells.shape[-1], np.nan)
    return cells[2 * seeds >= seeds.max()].mean(0)


def study(rows, student):
    """
    The rows of one student as arrays with the axes T teachers (weakest first), A alphas, S seeds, measures;
    nan where there is no row, the mean where a seed learned from teachers of several seeds.
    """
    taught_rows = [row for row in rows if row["model"] == student and row["teacher"]]
    teachers, alphas, seeds = (sorted({row[k] for row in taught_rows}) for k in ("teacher", "alpha", "seed"))
    found = defaultdict(list)
    for row in rows:
        found[row["model"], row["seed"], row["teacher"], row["alpha"]].append(measures(row))
    teacher_seeds = {(row["teacher"], row["seed"], row["teacher_seed"]) for row in taught_rows}

    def mean_of(several):
        return np.mean(several, axis=0) if several else np.full((2, 3), np.nan)
    size, tokens = parse_model(student)
    budgets = [model_name(size, round(n * tokens)) for n in TIMES]
    alone = np.array([[mean_of(found[model, s, None, 0.0]) for s in seeds] for model in budgets])
    own = np.array([[mean_of([m for t2, s2, teacher_seed in teacher_seeds if (t, s) == (t2, s2)
                              for m in found[t, teacher_seed, None, 0.0]]) for s in seeds] for t in teachers])
    taught = np.array([[[mean_of(found[student, s, t, a]) for s in seeds] for a in alphas] for t in teachers])
    gain = (taught - alone[1]) * [-1, -1, 1]                 # (T, A, S, halves, measures): loss down, task up

    # alpha is chosen on the select halves, among those with most seeds; all else is of the report halves
    pick = []
    for by_alpha in gain[..., SELECT, OUT]:                  # (A, S)
        mean, n = np.array([interval(x) for x in by_alpha]).T[[0, 2]]
        pick.append(np.where(n == n.max(), mean, -np.inf).argmax())
    alone, own, taught, gain = (x[..., REPORT, :] for x in (alone, own, taught, gain))
    weakness = np.array([interval(x)[0] for x in own[..., IN] - alone[1, :, IN]])

    # effective robustness (Taori et al., arXiv 2007.00644): how far below the student alone's curve of loss
    # outside against loss in domain; nan where it lies beyond the curve's ends at any seed: no extrapolation
    x, y, inside = alone[..., IN], alone[..., OUT], taught[..., IN]
    beyond = ((inside < x.min(0)) | (inside > x.max(0))).any(-1, keepdims=True)
    robustness = np.where(beyond, np.nan, parabola(x, y, inside) - taught[..., OUT])         # (T, A, S)

    # the compute of the teacher's forward passes as more tokens for the student alone, at most twice its own
    more = {row["teacher"]: 1 + row["teacher_flops"] / row["flops"] for row in taught_rows}
    times = np.array([[min(more[t], TIMES[-1])] for t in teachers])
    same_compute = y[1] - parabola(np.log(TIMES), y, np.log(times))          # (T, S)

    order = np.argsort(-weakness)
    pick = [(i, pick[i]) for i in order]
    return SimpleNamespace(
        student=student, teachers=[teachers[i] for i in order], alphas=alphas, seeds=seeds, alone=alone,
        own=own[order, :, IN], weakness=weakness[order], taught=taught[order], gain=gain[order],
        best_alpha=[alphas[a] for _, a in pick], best=np.array([gain[cell] for cell in pick]),
        robustness=robustness[order], best_robustness=np.array([robustness[cell] for cell in pick]),
        same_compute=same_compute[order],
        counts=np.array([parse_model(teachers[i])[1] > CONTROL_TOKENS for i in order]))


def weak_teacher_helps(s):
    """Rule 1: of teachers worse in domain than the student alone, the mean gain outside lies above zero."""
    weak = s.counts & (s.weakness > 0)
    if not weak.any():
        return "not tested", "No teacher is weaker than the student alone."
    gain, pure = mean_over(s.best[weak, :, OUT]), mean_over(s.gain[weak, -1, :, OUT])
    each = ", ".join(f"{s.teachers[i]} {show(s.best[i, :, OUT])}" for i in np.flatnonzero(weak))
    return judge(gain), (f"Weak teachers bring {show(gain)} outside ({each}); at alpha {s.alphas[-1]:g} they "
                         f"bring {show(pure)}.")


def teachers_by_size(s):
    """Indices of the teachers of the largest budget, by size, each better than all before at every seed."""
    sizes, tokens = zip(*map(parse_model, s.teachers))
    path, most = [], max(tokens)
    for i in sorted(range(len(sizes)), key=lambda i: list(SIZES).index(sizes[i])):
        if s.counts[i] and tokens[i] == most and not any((s.own[i] >= s.own[j]).any() for j in path):
            path.append(i)
    return path


def stronger_teacher_saturates(s):
    """Rule 2: by size, the gain outside per nat of teacher is lower on the last step than on the first."""
    path = teachers_by_size(s)
    if len(path) < 3:
        return "not tested", "There are no three teachers of one budget, each better than the smaller one."
    slopes = np.diff(s.best[path, :, OUT], axis=0) / -np.diff(s.own[path], axis=0)     # (steps, S)
    verdict, (mean, half, _) = judge(slopes[0] - slopes[-1]), interval(slopes[-1])
    if verdict == "reproduced":
        verdict += ", reverses" if mean < -half else ", diminishes" if mean > half else ", saturates"
    return verdict, (f"Along size ({', '.join(s.teachers[i] for i in path)}) a nat of teacher buys "
                     f"{show(slopes[0])} outside on the first step, {show(slopes[-1])} on the last, "
                     f"{show(slopes[0] - slopes[-1])} less.")


def generalisation_first(s):
    """Rule 3: the mean effective robustness of all cells within the student's own curve lies above zero."""
    def mean_of(robustness):
        return mean_over(robustness.reshape(-1, len(s.seeds)))
    weak, strong = (mean_of(s.robustness[s.counts & kind]) for kind in (s.weakness > 0, s.weakness <= 0))
    everything, chosen = mean_of(s.robustness[s.counts]), mean_of(s.best_robustness[s.counts])
    within = ~np.isnan(s.robustness[s.counts]).all(-1)       # (T, A)
    return judge(everything), (
        f"Effective robustness of {within.sum()} of {within.size} cells {show(everything)}; at the chosen "
        f"alphas {show(chosen)}; from weak teachers {show(weak)}; from strong ones {show(strong)}; "
        f"weak minus strong {show(weak - strong)}.")


FINDINGS = {"A weak teacher helps": weak_teacher_helps,
            "A stronger teacher saturates or reverses the gain": stronger_teacher_saturates,
            "Generalisation comes first": generalisation_first}


def write_report(rows, out):
    """Write report.md and, with matplotlib, a figure for each student -> the report. Raises UserError."""
    if not rows:
        raise UserError(f"{out} has no results.jsonl with results")
    minutes = sum(row["seconds"] for row in rows) / 60
    text = (f"{len(rows)} models, {minutes:.0f} minutes of one worker, corpus {rows[0]['corpus']}; made from "
            "results.jsonl by `python sweep.py --report`. ± is a 95 % t-interval over seeds of the student, "
            "given these teachers; alpha is chosen on select halves, figures are of the report halves.\n")
    for student in sorted({row["model"] for row in rows if row["teacher"]}):
        s = study(rows, student)
        text += f"\n## Student {student}, seeds {', '.join(map(str, s.seeds))}\n\n"
        for i, (claim, rule) in enumerate(FINDINGS.items(), 1):
            verdict, seen = rule(s)
            text += f"{i}. **{claim}: {verdict}.** {seen}\n"
        inside, outside = (interval(s.alone[1, :, where])[0] for where in (IN, OUT))
        text += (f"\nAlone it reaches {inside:.3f} in domain and {outside:.3f} outside. Weakness is a "
                 "teacher's own loss in domain minus that of the student alone.\n\n")
        text += ("| teacher | weakness | best alpha | gain in domain | gain outside | effective robustness | "
                 f"outside at alpha {s.alphas[-1]:g} | same compute, no teacher | task, points |\n")
        text += "|---" * 9 + "|\n"
        for i, t in enumerate(s.teachers):
            figures = (s.best[i, :, IN], s.best[i, :, OUT], s.best_robustness[i], s.gain[i, -1, :, OUT],
                       s.same_compute[i], s.best[i, :, TASK])
            name = t if s.counts[i] else f"{t} (control)"
            figures = " | ".join(map(show, figures))
            text += f"| {name} | {s.weakness[i]:+.3f} | {s.best_alpha[i]:g} | {figures} |\n"
        try:
            draw(s, f"{out}/findings_{student}.png")
            text += f"\n![the three findings](findings_{student}.png)\n"
        except ImportError:
            text += "\nFor the figure: pip install matplotlib\n"
    Path(out, "report.md").write_text(text, encoding="utf-8")
    return text


def draw(s, path):
    """The three findings as three panels; readable in grey. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    axes = left, middle, right = figure.subplots(1, 3)
    networks, by_size = np.flatnonzero(s.counts), teachers_by_size(s)

    def line(axis, teachers, gains, **style):                # gains (T, S)
        means, halves, n = np.array([interval(gains[i]) for i in teachers]).T
        axis.errorbar(s.weakness[teachers], means, halves if n.min() > 2 else None, capsize=3, **style)
    for a, alpha in enumerate(s.alphas):
        line(left, networks, s.gain[:, a, :, OUT], label=f"alpha {alpha:g}", marker="os^Dv"[a % 5],
             color=str(0.7 - 0.7 * a / len(s.alphas)), ls=("-", "--", ":")[a % 3])
    line(middle, networks, s.best[..., OUT], label="at its best alpha", marker="o", color="0.5", ls="none")
    line(middle, by_size, s.best[..., OUT], label="along size", marker="s", color="black")
    line(middle, networks, s.same_compute, label="same compute, no teacher", marker="x", color="0.7", ls="")
    for i in networks:
        middle.annotate(s.teachers[i], (s.weakness[i], interval(s.best[i, :, OUT])[0]), fontsize=8,
                        textcoords="offset points", xytext=(4, -12 if i % 2 else 6))
    middle.margins(x=0.15)                                   # room for the names
    for axis in (left, middle):
        axis.axhline(0, color="0.6", lw=0.8)
        axis.axvline(0, color="0.6", lw=0.8)
        axis.invert_xaxis()                                  # weak teachers on the left
        axis.set(xlabel="teacher's loss in domain minus the student's alone (nats)",
                 ylabel="gain outside (nats/token)")
    x, y = np.nanmean(s.alone[..., IN], 1), np.nanmean(s.alone[..., OUT], 1)
    curve = np.linspace(x.min(), x.max(), 50)
    right.plot(curve, parabola(x, y, curve), color="black")
    right.plot(x, y, "s", color="black", label="alone: half, once, twice the tokens")
    for kind, label, fill in ((s.weakness > 0, "weak teachers", "none"), (s.weakness <= 0, "strong", "full")):
        within = (s.counts & kind)[:, None] & ~np.isnan(s.robustness).all(-1)            # (T, A)
        cells = np.nanmean(s.taught[within][..., :TASK], axis=1)             # (cells, 2)
        right.plot(cells[:, IN], cells[:, OUT], "o", color="0.4", fillstyle=fill, label=f"from {label}")
    right.set(xlabel="loss in domain (nats/token)", ylabel="loss outside (nats/token)")
    for axis, (claim, rule) in zip(axes, FINDINGS.items()):
        axis.set_title(f"{claim}:\n{rule(s)[0]}", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    figure.suptitle(f"Student {s.student}, {len(s.seeds)} seeds")
    figure.savefig(path, dpi=100)


# ---- the command line --------------------------------------------------------

def main():
    """Evaluate the checkpoints of the command line and print what it asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of distill.py")
    parser.add_argument("--teacher", metavar="CKPT", help="with two checkpoints, a baseline and a student: "
                        "which tokens gain, and whether this teacher knew them")
    parser.add_argument("--items", metavar="FILE", help="score these items instead, JSON lines in HellaSwag's"
                        ' form or with "context", "choices", "label"')
    parser.add_argument("--json", action="store_true", help="print what evaluate() returns, for programs")
    parser.add_argument("--sample", metavar="TEXT", help="print what each checkpoint writes after this")
    parser.add_argument("--data", default="data/python", help="folder of data.py (default: data/python)")
    parser.add_argument("--windows", type=int, default=256, help="in each half of a set (default: 256)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    args = parser.parse_args()
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    if args.teacher and len(args.checkpoints) != 2:
        parser.error("--teacher needs two checkpoints, a baseline and a student")
    device, encoding = pick_device(args.device)[0], load_tokenizer(args.data)
    tokenizer = load_meta(args.data)["tokenizer"]
    items = read_items(args.items) if args.items else []
    models = [load_checkpoint(path, device, tokenizer) for path in args.checkpoints]
    teacher = load_checkpoint(args.teacher, device, tokenizer)[0] if args.teacher else None
    sizes = {model.config.block_size for model, _ in models}
    if not args.json and (len(sizes) > 1 or teacher and teacher.config.block_size < max(sizes)):
        raise UserError("these models have contexts of different lengths: evaluate one at a time, or --json")
    if teacher:
        for where, x in token_gains(models[0][0], models[1][0], teacher, args.data, args.windows).items():
            print(f"\n{where}: the student gains {x['gain']:+.4f} nats per token on the baseline")
            print(f"{'right (argmax)':24} {'share':>7} {'mean gain':>10} {'share x gain':>13}")
            for name, (share, gain) in x["groups"].items():
                print(f"{name:24} {share:7.1%} {gain:+10.4f} {share * gain:+13.4f}")
    elif args.json:
        print(json.dumps({path: evaluate(model, args.data, args.windows)
                          for path, (model, _) in zip(args.checkpoints, models)}, indent=1))
    elif not args.items and args.sample is None:
        print_table(args.checkpoints, models, args.data, args.windows)
    for path, (model, _) in zip(args.checkpoints, models):
        if items:
            right, accuracy = np.mean(score_items(model, encoding, items), axis=0)
            print(f"{path}: {len(items)} items, probability of the right choice {right:.4f}, accuracy "
                  f"{accuracy:.4f}")
        if args.sample is not None:
            torch.manual_seed(1)
            idx = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(args.sample)]], device=device)
            ids = [i for i in model.generate(idx, 200, 0.8, 50)[0].tolist() if i < encoding.eot_token]
            print(f"--- {path}\n{encoding.decode(ids)}")


if __name__ == "__main__":
    run_main(main)

"""
What a model is worth: its loss in and out of distribution, downstream tasks, and where its gain lies.

    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt                           # a table of both
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --teacher out/xs/ckpt.pt  # on which tokens
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --sample "def "           # what they write

Models of one block_size see the same windows and items. Both are split in half, earlier and later held-out
documents: choose on `select`, quote from `report`. Loss is in nats per token. Each loss is given twice, as it
is and calibrated: with the logits divided by a temperature, fitted for each model and each set on the select
half. That removes gains from smoothing alone. The second half of the file turns a sweep's results.jsonl into
a report.
"""
import json
import math
import os
from collections import defaultdict
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
        logp = F.log_softmax(logits, dim=-1)                                 # (B, T, V)
        loss = -logp.gather(-1, targets[..., None])[..., 0]
        scores.append((loss.cpu(), (-loss == logp.amax(-1)).cpu()))
    return tuple(torch.cat(s) for s in zip(*scores))


TEMPERATURES = [n / 100 for n in range(80, 142, 2)]


def mean_losses(model, rows, temperatures):
    """Rows of ids (N, T + 1) -> the mean loss, in nats, with the logits divided by each temperature."""
    losses = torch.zeros(len(temperatures))
    for logits, targets in logits_of(model, rows):
        for z, y in zip(logits, targets):                    # (T, V) and (T,): a window fits the cache
            sums = [F.cross_entropy(z / t, y, reduction="sum") for t in temperatures]
            losses += torch.stack(sums).cpu() / rows[:, 1:].numel()
    return losses


def evaluation_sets(data_dir):
    """-> {"in_domain": path, "ood/NAME": path ...} of a corpus folder."""
    names = {"in_domain": "val"} | {f"ood/{name[4:]}": name for name in load_meta(data_dir)["sets"]
                                    if name.startswith("ood_")}
    return {name: f"{data_dir}/{file}.bin" for name, file in names.items()}


# ---- downstream tasks ---------------------------------------------------------

def score_items(model, encoding, items):
    """
    -> for each item the probability of the right choice (softmax over the choices' log-likelihoods), and 1 or
    0 for whether it is the likeliest by log-likelihood per character. What does not fit is cut on the left.
    """
    T, rows, spans = model.config.block_size, [], []
    for item in items:
        context = encoding.encode_ordinary(item["context"])
        for choice in item["choices"]:
            ids = encoding.encode_ordinary(choice)[:T]       # a longer choice is scored this far
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
            first, last, _ = spans[i]
            likelihoods[i] = -row[first:last].sum()
    characters = torch.tensor([characters for _, _, characters in spans])
    n, scores = [len(item["choices"]) for item in items], []
    for item, sums, means in zip(items, likelihoods.split(n), (likelihoods / characters).split(n)):
        scores.append((sums.softmax(0)[item["label"]].item(), float(means.argmax() == item["label"])))
    return scores


# ---- everything about one model, and about three -----------------------------

def evaluate(model, data_dir, windows=256, items=500):
    """
    -> {name: {"select": x, "report": x}} for the names "in_domain", "ood/SET", "calibrated/in_domain",
    "calibrated/ood/SET": nats per token over at most `windows` windows of the model's block_size;
    "temperature/in_domain", "temperature/ood/SET": what divides the calibrated logits; "task/NAME",
    "accuracy/NAME": the probability of the right choice and the accuracy over at most `items` items. Raises
    UserError.
    """
    metrics = {}
    for name, path in evaluation_sets(data_dir).items():
        rows = read_windows(path, model.config.block_size, windows)
        select = mean_losses(model, rows["select"], TEMPERATURES)
        t = TEMPERATURES[select.argmin()]
        report = mean_losses(model, rows["report"], [1.0, t])
        metrics[name] = {"select": select[TEMPERATURES.index(1.0)].item(), "report": report[0].item()}
        metrics[f"calibrated/{name}"] = {"select": select.min().item(), "report": report[1].item()}
        metrics[f"temperature/{name}"] = {"select": t, "report": t}
    encoding = load_tokenizer(data_dir)
    for path in sorted(Path(data_dir).glob("task_*.jsonl")):
        name, made = path.stem.removeprefix("task_"), read_items(path)
        for half, part in (("select", made[:len(made) // 2]), ("report", made[len(made) // 2:])):
            probability, accuracy = np.mean(score_items(model, encoding, evenly_spaced(part, items)), axis=0)
            metrics.setdefault(f"task/{name}", {})[half] = float(probability)
            metrics.setdefault(f"accuracy/{name}", {})[half] = float(accuracy)
    return {name: {half: round(x, 6) for half, x in halves.items()} for name, halves in metrics.items()}


def token_gains(base, student, teacher, data_dir, windows=256):
    """
    Where does the student gain over the baseline, on the report halves? -> {"in_domain": x, "out": x}, x =
    {"gain": nats per token, "groups": {name: (share, gain)}}, the groups by who predicts the token right
    (argmax). Shares times gains add up to the gain.
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


def print_token_gains(models, teachers, data_dir, windows):
    """
    token_gains of each student over the student alone of its seed, mean over seeds. Where a model was
    unlucky any other model gains: so beside it the gain less that of the student alone of another seed.
    """
    alone = {extra["settings"]["seed"]: model for model, extra in models if not extra["alpha"]}
    taught = [(model, extra["settings"]) for model, extra in models if extra["alpha"]]
    if not taught or not {settings["seed"] for _, settings in taught} <= alone.keys():
        raise UserError("--teacher needs distilled students and, for each, the student alone of its seed")
    found, seeds = defaultdict(list), sorted(alone)
    for student, settings in taught:
        own = [model for model, extra in teachers if extra["settings"] == settings["teacher"]]
        teacher, base = (own or [teachers[0][0]])[0], alone[settings["seed"]]
        other = alone[seeds[(seeds.index(settings["seed"]) + 1) % len(seeds)]]
        luck = token_gains(base, other, teacher, data_dir, windows)
        for where, x in token_gains(base, student, teacher, data_dir, windows).items():
            found[where, "all tokens"].append((1, x["gain"], x["gain"] - luck[where]["gain"]))
            for group, (share, gain) in x["groups"].items():
                found[where, group].append((share, gain, gain - luck[where]["groups"][group][1]))
    print(f"gain over the student alone, nats per token, {len(taught)} students; by who is right (argmax)")
    print(f"{'':33} {'share':>7}   {'gain':18}" + "net of another seed" * (len(alone) > 1))
    for (where, group), values in found.items():
        share, gain, net = np.array(values).T
        net = show(net) if len(alone) > 1 else ""
        print(f"{where:10} {group:22} {share.mean():7.1%}   {show(gain):18} {net}".rstrip())


def print_table(paths, models, data_dir, windows):
    """Checkpoints side by side: a line per measure, a column each, in brackets the gain over the first."""
    for i, (path, (_, extra)) in enumerate(zip(paths, models)):
        settings, alpha = extra["settings"], extra["alpha"]
        taught = f", alpha {alpha:g} from {settings['teacher']['size']}" if alpha else ""
        print(f"[{i}] {path}: {settings['size']}, {settings['tokens']:,} tokens, seed {settings['seed']}"
              f"{taught}")
    metrics = [evaluate(model, data_dir, windows) for model, _ in models]
    for m in metrics:
        for kind in ("", "calibrated/"):
            outside = [half["report"] for name, half in m.items() if name.startswith(f"{kind}ood/")]
            if outside:
                m[f"{kind}ood, mean"] = {"report": np.mean(outside)}
    columns = "".join(f"{f'[{i}]':30}" for i in range(len(paths)))
    print("\nreport half: nats per token, perplexity; task: probability of the right choice; accuracy")
    print(f"{'in brackets: gain over [0]':28}{columns}".rstrip())
    kinds = "in_domain", "ood/", "ood, mean", "calibrated/", "task/", "accuracy/"
    names = [name for kind in kinds for name in metrics[0] if name.startswith(kind)]
    for name in names:
        line, is_loss = f"{name:26}", not name.startswith(kinds[-2:])
        for i, m in enumerate(metrics):
            x = m[name]["report"]
            gain = (x - metrics[0][name]["report"]) * (-1 if is_loss else 1)
            perplexity = f"{torch.tensor(x).exp():.2f}" if is_loss else ""       # inf where too large
            line += f"{x:7.4f} {perplexity:>9} {f'({gain:+.4f})' if i else '':12}"
        print(line.rstrip())


# ------------------------------------------------------------------------------
# What does a study show? From here on all is a function of the rows of results.jsonl, one per model:
# {"model": "s@1.5M", "seed": 1, "teacher": null or "xs@2M", "teacher_seed": null or 1001, "alpha": 0.25,
#  "corpus": fingerprint, "flops": of its training, "teacher_flops": of its teacher's forward passes,
#  "seconds": 39.8, "metrics": what evaluate() returns}

KEYS = ("model", "seed", "teacher", "teacher_seed", "alpha")                 # which model a row is of
TIMES = (0.5, 1, 2)                      # the student alone is trained on these multiples of its tokens
SELECT, REPORT = range(2)                # the halves: to choose on, to quote from
IN, OUT, CALIBRATED_IN, CALIBRATED_OUT, TASK = range(5)      # what measures() gives
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last, a little too wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def parse_model(model):
    """'s@1.5M' -> ('s', 1500000). Raises UserError."""
    size, _, tokens = model.partition("@")
    if size not in SIZES or not tokens:
        raise UserError(f"{model!r} is not a model, such as s@1.5M; the sizes are {' '.join(SIZES)}")
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
            raise UserError(f"{path}: line {number} is not a valid result: delete it") from None
        first, same = next(iter(rows.values()), row), rows.setdefault(key, row)
        if (row["corpus"], row["metrics"].keys()) != (first["corpus"], first["metrics"].keys()):
            raise UserError(f"{path}: line {number} comes from a different corpus than line 1: delete one")
        if row["metrics"] != same["metrics"]:
            raise UserError(f"{path}: line {number} repeats a model with different numbers: delete one")
    return list(rows.values())


def measures(row):
    """
    -> array (2 halves, 5): loss in domain, mean loss outside, the same two calibrated, and the mean accuracy
    in the tasks, in percent (nan without a task).
    """
    halves = []
    for half in ("select", "report"):
        m = {name: values[half] for name, values in row["metrics"].items()}
        tasks = [x for name, x in m.items() if name.startswith("accuracy/")]
        halves.append([m["in_domain"], np.mean([x for name, x in m.items() if name.startswith("ood/")]),
                       m["calibrated/in_domain"],
                       np.mean([x for name, x in m.items() if name.startswith("calibrated/ood/")]),
                       100 * np.mean(tasks) if tasks else math.nan])
    return np.array(halves)


def interval(x):
    """Values, one a seed, nan where there is none -> mean, half-width of its 95 % t-interval, how many."""
    x = np.asarray(x)[~np.isnan(x)]
    n = len(x)
    if n < 2:
        return (x[0] if n else math.nan), math.inf, n
    return x.mean(), T_975[min(n - 1, len(T_975)) - 1] * x.std(ddof=1) / math.sqrt(n), n


def show(x, digits=3):
    """'+0.012 ± 0.003', the mean alone for a single value; '(n = 4)' where seeds are missing."""
    mean, half, n = interval(x)
    missing = f" (n = {n})" if n < len(x) else ""
    return "none" if not n else f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if n > 1 else "") + missing


def judge(x):
    """The verdict (it takes three seeds) on a claim that holds where x is above 0."""
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


def choose(gains):
    """Gains of the select halves (N, S) -> index of the largest mean, among those with the most seeds."""
    mean, n = np.array([interval(x) for x in gains]).T[[0, 2]]
    return np.where(n == n.max(), mean, -np.inf).argmax()


def effective_robustness(alone, taught):
    """
    How far a student lies below the curve of loss outside (y) against loss in domain (x) of the student alone
    on half, once and twice the tokens (Taori et al., arXiv 2007.00644). alone = x, y, each (3, S); taught =
    x, y, each (T, A, S) -> (T, A, S), nan where a cell lies beyond the curve's ends at any seed.
    """
    (x, y), (inside, outside) = alone, taught
    beyond = ((inside < x.min(0)) | (inside > x.max(0))).any(-1, keepdims=True)
    return np.where(beyond, np.nan, parabola(x, y, inside) - outside)


def study(rows, student):
    """
    The rows of one student as arrays with the axes T teachers (weakest first), A alphas, S seeds, and what
    measures() gives; nan where there is no row, the mean where a seed learned from teachers of several seeds.
    """
    taught_rows = [row for row in rows if row["model"] == student and row["teacher"]]
    teachers, alphas, seeds = (sorted({row[k] for row in taught_rows}) for k in ("teacher", "alpha", "seed"))
    found, teacher_seeds = defaultdict(list), defaultdict(set)
    for row in rows:
        found[row["model"], row["seed"], row["teacher"], row["alpha"]].append(measures(row))
    for row in taught_rows:
        teacher_seeds[row["teacher"], row["seed"]].add(row["teacher_seed"])

    def mean_of(several):
        return np.mean(several, axis=0) if several else np.full((2, 5), np.nan)
    size, tokens = parse_model(student)
    budgets = [model_name(size, round(n * tokens)) for n in TIMES]
    alone = np.array([[mean_of(found[model, s, None, 0.0]) for s in seeds] for model in budgets])
    own = np.array([[mean_of([m for teacher_seed in sorted(teacher_seeds[t, s])
                              for m in found[t, teacher_seed, None, 0.0]]) for s in seeds] for t in teachers])
    taught = np.array([[[mean_of(found[student, s, t, a]) for s in seeds] for a in alphas] for t in teachers])

    weakness = own[:, :, REPORT, IN] - alone[1, :, REPORT, IN]               # (T, S)
    order = np.argsort([-interval(x)[0] for x in weakness])
    teachers, weakness, own, taught = [teachers[i] for i in order], weakness[order], own[order], taught[order]
    gain = (taught - alone[1]) * [-1, -1, -1, -1, 1]         # (T, A, S, halves, 5): loss down, accuracy up

    # alpha is chosen on the select halves; all else is of the report halves
    every = np.arange(len(teachers))
    pick, pick_calibrated = (np.array([choose(by_alpha) for by_alpha in gain[..., SELECT, what]])
                             for what in (OUT, CALIBRATED_OUT))
    select_calibrated = gain[every, pick_calibrated, :, SELECT, CALIBRATED_OUT]              # (T, S)
    alone, own, taught, gain = (x[..., REPORT, :] for x in (alone, own, taught, gain))
    robustness, robustness_calibrated = (
        effective_robustness((alone[..., i], alone[..., o]), (taught[..., i], taught[..., o]))
        for i, o in ((IN, OUT), (CALIBRATED_IN, CALIBRATED_OUT)))            # (T, A, S) each

    # the compute of the teacher's forward passes, or of these and its training, as tokens for the student
    training, more = {row["model"]: row["flops"] for row in rows if not row["teacher"]}, {}
    for row in taught_rows:
        forward, t = row["teacher_flops"], row["teacher"]
        more[t] = [1 + forward / row["flops"], 1 + (forward + training.get(t, math.nan)) / row["flops"]]
    times = np.array([more[t] for t in teachers])[..., None].clip(max=TIMES[-1])           # (T, 2, 1)
    y = alone[..., OUT]
    same_compute = y[1] - parabola(np.log(TIMES), y, np.log(times))          # (T, 2, S)

    sets = {frozenset(row["teacher_seed"] for row in taught_rows if row["seed"] == s) for s in seeds}
    weakness = np.array([interval(x)[0] for x in weakness])                  # (T,)
    network = np.array([not SIZES[parse_model(t)[0]].get("counts") for t in teachers])
    return SimpleNamespace(
        student=student, teachers=teachers, alphas=alphas, seeds=seeds, alone=alone, own=own[..., IN],
        weakness=weakness, network=network, weak=network & (weakness > 0), strong=network & (weakness <= 0),
        taught=taught, gain=gain,
        best_alpha=[alphas[a] for a in pick], best=gain[every, pick],
        best_alpha_calibrated=[alphas[a] for a in pick_calibrated], select_calibrated=select_calibrated,
        best_calibrated=gain[every, pick_calibrated, :, CALIBRATED_OUT],
        robustness=robustness, best_robustness=robustness[every, pick],
        robustness_calibrated=robustness_calibrated,
        best_robustness_calibrated=robustness_calibrated[every, pick_calibrated], same_compute=same_compute,
        own_teachers=len(sets) == len(seeds))                # every seed has its own


def weak_teacher_helps(s):
    """Rule 1: of networks worse in domain than the student alone, the mean gain outside lies above zero."""
    weak = s.weak
    if not weak.any():
        return "not tested", "No network is weaker than the student alone."
    gain, pure = mean_over(s.best[weak, :, OUT]), mean_over(s.gain[weak, -1, :, OUT])
    each = ", ".join(f"{s.teachers[i]} {show(s.best[i, :, OUT])}" for i in np.flatnonzero(weak))
    return judge(gain), (f"Weak teachers bring {show(gain)} outside ({each}); at alpha {s.alphas[-1]:g} they "
                         f"bring {show(pure)}.")


def teachers_by_size(s):
    """Indices of the teachers of the largest budget, by size, each better than all before at every seed."""
    sizes, tokens = zip(*map(parse_model, s.teachers))
    networks = np.flatnonzero(s.network)
    path, most = [], max((tokens[i] for i in networks), default=0)
    for i in sorted(networks, key=lambda i: list(SIZES).index(sizes[i])):
        if tokens[i] == most and not any((s.own[i] >= s.own[j]).any() for j in path):
            path.append(i)
    return path


def stronger_teacher_saturates(s):
    """Rule 2: by size, the gain outside per nat of teacher is lower on the last step than on the first."""
    path = teachers_by_size(s)
    if len(path) < 3:
        return "not tested", "It takes three teachers of one budget, each better than the smaller one."
    slopes = np.diff(s.best[path, :, OUT], axis=0) / -np.diff(s.own[path], axis=0)     # (steps, S)
    verdict, (mean, half, _) = judge(slopes[0] - slopes[-1]), interval(slopes[-1])
    if verdict == "reproduced":
        verdict += ", reverses" if mean < -half else ", diminishes" if mean > half else ", saturates"
    return verdict, (f"Along size ({', '.join(s.teachers[i] for i in path)}) a nat of teacher buys "
                     f"{show(slopes[0])} outside on the first step, {show(slopes[-1])} on the last, "
                     f"{show(slopes[0] - slopes[-1])} less.")


def generalisation_first(s):
    """Rule 3: the mean effective robustness of networks' cells within the curve's span lies above zero."""
    def mean_of(kind, robustness=s.robustness):
        return mean_over(robustness[kind].reshape(-1, len(s.seeds)))
    everything, weak, strong, tables = (mean_of(kind) for kind in (
        s.network, s.weak, s.strong, ~s.network))
    calibrated, calibrated_tables = (
        mean_of(kind, s.robustness_calibrated) for kind in (s.network, ~s.network))
    within = ~np.isnan(s.robustness[s.network]).all(-1)      # (T, A)
    return judge(everything), (
        f"Effective robustness of {within.sum()} of {within.size} students is {show(everything)}; from weak "
        f"teachers {show(weak)}, from strong ones {show(strong)}, weak minus strong {show(weak - strong)}; "
        f"from tables that count {show(tables)}. Calibrated: from networks {show(calibrated)}, from tables "
        f"{show(calibrated_tables)}.")


def more_than_smoothing(s):
    """Rule 4: calibrated, weak networks' mean gain outside lies above zero and above the best table's."""
    weak, tables = s.weak, np.flatnonzero(~s.network)
    if not weak.any() or not len(tables):
        return "not tested", "It takes a weak network and a table that counts."
    best = tables[choose(s.select_calibrated[tables])]
    gain, table = mean_over(s.best_calibrated[weak]), s.best_calibrated[best]
    verdicts = {judge(gain), judge(gain - table)}            # the worse of the two
    verdict = next(word for word in ("not tested", "not seen, too few seeds", "seen, too few seeds",
                                     "not reproduced", "undecided", "reproduced") if word in verdicts)
    raw = show(mean_over(s.best[weak, :, OUT]))
    return verdict, (f"Calibrated, weak teachers bring {show(gain)} outside (as it is {raw}), the best table "
                     f"({s.teachers[best]} at alpha {s.best_alpha_calibrated[best]:g}) {show(table)} "
                     f"(as it is {show(s.best[best, :, OUT])}), a difference of {show(gain - table)}.")


FINDINGS = {"A weak teacher helps": weak_teacher_helps,
            "A stronger teacher saturates or reverses the gain": stronger_teacher_saturates,
            "Generalisation comes first": generalisation_first,
            "A weak teacher gives more than smoothing": more_than_smoothing}


def write_report(rows, out):
    """Write report.md and, with matplotlib, a figure for each student -> the report. Raises UserError."""
    if not rows:
        raise UserError(f"{out} has no results.jsonl, or it is empty")
    minutes = sum(row["seconds"] for row in rows) / 60
    text = (f"{len(rows)} models, {minutes:.0f} worker-minutes, corpus {rows[0]['corpus']}; made from "
            "results.jsonl by `python sweep.py --report`. Gains are in nats per token, over the student "
            "alone of the same seed. Alpha is chosen on the select halves; all figures are of the report "
            "halves. Same compute as tokens: the student alone on more tokens, worth the teacher's forward "
            "passes, or these and its training; at most twice its own.\n")
    for student in sorted({row["model"] for row in rows if row["teacher"]}):
        s = study(rows, student)
        covers = "each with its own teachers" if s.own_teachers else "given these teachers"
        text += (f"\n## Student {student}, seeds {', '.join(map(str, s.seeds))}\n\n"
                 f"± is a 95 % t-interval over seeds, {covers}.\n\n")
        for i, (claim, rule) in enumerate(FINDINGS.items(), 1):
            verdict, seen = rule(s)
            text += f"{i}. **{claim}: {verdict}.** {seen}\n"
        inside, outside, task = (interval(s.alone[1, :, where])[0] for where in (IN, OUT, TASK))
        text += (f"\nAlone it reaches {inside:.3f} nats in domain, {outside:.3f} outside"
                 f"{f', {task:.1f} % in the task' if task > 0 else ''}. A teacher is weak if its own loss in "
                 "domain is worse. Calibrated columns: at the alpha that is best after calibration.\n\n")
        columns = ("teacher", "worse in domain", "best alpha", "gain in domain", "gain outside",
                   "outside, calibrated", "effective robustness", "the same, calibrated",
                   f"outside at alpha {s.alphas[-1]:g}", "same compute as tokens",
                   "training too", "task, points")
        text += f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        for i, teacher in enumerate(s.teachers):
            gains = (s.best[i, :, IN], s.best[i, :, OUT], s.best_calibrated[i], s.best_robustness[i],
                     s.best_robustness_calibrated[i], s.gain[i, -1, :, OUT], *s.same_compute[i])
            text += (f"| {teacher} | {s.weakness[i]:+.3f} | {s.best_alpha[i]:g} | "
                     f"{' | '.join(map(show, gains))} | {show(s.best[i, :, TASK], 1)} |\n")
        try:
            draw(s, f"{out}/findings_{student}.png")
            text += f"\n![the findings](findings_{student}.png)\n"
        except ImportError:
            text += "\nFor the figure: pip install matplotlib\n"
    Path(out, "report.md").write_text(text, encoding="utf-8")
    return text


def draw(s, path):
    """The four findings as four panels; readable in grey. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 8.6), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    every = np.arange(len(s.teachers))

    def line(axis, gains, shift=0.0, **style):               # gains (T, S), a point a teacher
        means, halves, n = np.array([interval(x) for x in gains]).T
        axis.errorbar(every + shift, means, halves if n.min() > 2 else None, capsize=2, markersize=4, **style)
    for a, alpha in enumerate(s.alphas):
        line(first, s.gain[:, a, :, OUT], label=f"alpha {alpha:g}", marker="os^D"[a % 4], lw=1,
             color=str(0.7 - 0.7 * a / len(s.alphas)), ls=("-", "--", "-.", ":")[a % 4])
    line(second, s.best[..., OUT], -0.1, label="at its best alpha", marker="o", color="black", ls="none")
    line(second, s.same_compute[:, 0], 0.1, label="same compute as tokens", marker="x", color=".6", ls="none")
    line(fourth, s.best[..., OUT], -0.1, label="as it is", marker="o", color="0.6", ls="none")
    line(fourth, s.best_calibrated, 0.1, label="calibrated", marker="s", color="black", mfc="w", ls="none")
    names = [f"{t.replace('@', chr(10) + '@')}\n{w:+.2f}" for t, w in zip(s.teachers, s.weakness)]
    for axis in (first, second, fourth):
        axis.axhline(0, color="0.6", lw=0.8)
        axis.axvline((s.weakness > 0).sum() - 0.5, color="0.6", lw=0.8, ls=":")      # weak | strong
        for i in np.flatnonzero(~s.network):                 # tables that count
            axis.axvspan(i - 0.5, i + 0.5, color="0.93", zorder=0)
        axis.set_xticks(every, names, fontsize=7)
        axis.set_xlim(-0.6, len(every) - 0.4)
        axis.set_ylabel("gain outside, nats per token")
    lowest = np.nanmin(s.gain[s.network][..., OUT]) if s.network.any() else -1
    first.set_ylim(bottom=1.2 * min(lowest, -0.01))          # or a table at alpha 1 would hide the rest
    x, y = np.nanmean(s.alone[..., IN], 1), np.nanmean(s.alone[..., OUT], 1)
    curve = np.linspace(x.min(), x.max(), 50)
    third.plot(curve, parabola(x, y, curve), color="black", lw=1)
    third.plot(x, y, "s", color="black", label="alone: half, once, twice the tokens")
    for kind, label, marker in ((s.weak, "from weak networks", "o"), (s.strong, "from strong ones", "^"),
                                (~s.network, "from tables that count", "x")):
        within = kind[:, None] & ~np.isnan(s.robustness).all(-1)             # (T, A)
        cells = np.nanmean(s.taught[within][..., :TASK], axis=1)             # (cells, 4)
        third.plot(cells[:, IN], cells[:, OUT], marker, color="0.4", mfc="white", label=label)
    third.set(xlabel="loss in domain, nats per token", ylabel="loss outside, nats per token")
    for axis, (claim, rule) in zip((first, second, third, fourth), FINDINGS.items()):
        axis.set_title(f"{claim}:\n{rule(s)[0]}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)


# ---- the command line --------------------------------------------------------

def main():
    """Evaluate the checkpoints of the command line and print what it asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="distill.py checkpoints")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="CKPT", help="on which tokens "
                        "students gain over students alone, by whether the teacher is right")
    parser.add_argument("--json", action="store_true", help="print what evaluate() returns, as JSON")
    parser.add_argument("--sample", metavar="TEXT", help="print each checkpoint's continuation of this text")
    parser.add_argument("--data", default="data/python", help="corpus folder (default: data/python)")
    parser.add_argument("--windows", type=int, default=256, help="windows per half of a set (default: 256)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    args = parser.parse_args()
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    device, encoding = pick_device(args.device)[0], load_tokenizer(args.data)
    tokenizer = load_meta(args.data)["tokenizer"]
    models = [load_checkpoint(path, device, tokenizer) for path in args.checkpoints]
    teachers = [load_checkpoint(path, device, tokenizer) for path in args.teacher]
    if (teachers or not args.json) and len({model.config.block_size for model, _ in models + teachers}) > 1:
        raise UserError("these models have different context lengths: evaluate one at a time, or use --json")
    if teachers:
        print_token_gains(models, teachers, args.data, args.windows)
    elif args.json:
        print(json.dumps({path: evaluate(model, args.data, args.windows)
                          for path, (model, _) in zip(args.checkpoints, models)}, indent=1))
    elif args.sample is None:
        print_table(args.checkpoints, models, args.data, args.windows)
    for path, (model, _) in zip(args.checkpoints, models) if args.sample is not None else ():
        torch.manual_seed(1)
        idx = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(args.sample)]], device=device)
        ids = [i for i in model.generate(idx, 200, 0.8, 50)[0].tolist() if i < encoding.eot_token]
        print(f"--- {path}\n{encoding.decode(ids)}")


if __name__ == "__main__":
    run_main(main)

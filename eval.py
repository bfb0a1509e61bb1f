"""
How good is a model: loss in domain and out of distribution, one downstream task, and which tokens gain.

    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt                           # a table of both
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --teacher out/xs/ckpt.pt  # which tokens gain
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --sample "def "           # what they write
    python eval.py out/124M/ckpt.pt --data data/fineweb-edu --items hellaswag_val.jsonl

Reads checkpoints of distill.py and the corpus folder of data.py. Models of one block_size see the same
windows and items. Both are cut in two halves, from the first and from the later held-out documents: choose on
`select`, quote from `report`. Loss is in nats per token.

The task, next_line, is made from held-out documents: which of four lines of a file comes next (after
HellaSwag, arXiv 1905.07830)? Its score is the probability that the model gives to the right one of the four,
by their log-likelihoods per character; the usual accuracy of the likeliest stands beside it, and is noisier.
"""
import functools
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import END_OF_TEXT, UserError, load_meta, load_tokenizer, load_tokens, make_parser, run
from model import autocast, load_checkpoint, pick_device


# ------------------------------------------------------------------------------
# token by token, over fixed windows

def thin(items, most):
    """At most so many of them, evenly spaced."""
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
        starts = thin(range(first, last), most)
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


# ------------------------------------------------------------------------------
# the task: an item is {"context", "choices", "label"}

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
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            item = json.loads(line)
            if "ctx" in item:
                endings = [f" {ending}" for ending in item["endings"]]
                item = {"context": item["ctx"], "choices": endings, "label": int(item["label"])}
            item["context"] + item["choices"][item["label"]]
            items.append(item)
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f'{path}: line {number} has no "ctx", "endings", "label", nor "context", '
                            '"choices", "label"') from None
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
            ids = encoding.encode_ordinary(choice)[:T]
            row = [encoding.eot_token, *context, *ids][-T - 1:]
            spans.append((len(row) - 1 - len(ids), len(row) - 1, len(choice)))
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


# ------------------------------------------------------------------------------
# everything about one model, and about three

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
            scores = score_items(model, load_tokenizer(data_dir), thin(part, items))
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
        rows = torch.cat([read_windows(path, base.config.block_size, windows)["report"] for path in paths])
        (b, b_right), (s, _), (_, t_right) = (token_scores(model, rows) for model in (base, student, teacher))
        gain = (b - s).double()
        groups = {"teacher and baseline": t_right & b_right, "teacher only": t_right & ~b_right,
                  "baseline only": ~t_right & b_right, "neither": ~t_right & ~b_right}
        found[where] = {"gain": gain.mean().item(), "groups": {
            name: (mask.double().mean().item(), gain[mask].mean().item() if mask.any() else 0.0)
            for name, mask in groups.items()}}
    return found


def open_model(path, data_dir, device):
    """load_checkpoint, to evaluate here. Raises OSError; UserError if the tokenizer is another."""
    model, about = load_checkpoint(path, device)
    if about.get("tokenizer") != load_meta(data_dir)["tokenizer"]:
        raise UserError(f"{path} has another tokenizer than {data_dir}: give its own corpus with --data")
    return model, about


def print_table(paths, models, data_dir, windows):
    """Checkpoints side by side: a line a set, a column a checkpoint, in brackets the gain on the first."""
    for i, (path, (_, a)) in enumerate(zip(paths, models)):
        taught = f", alpha {a['alpha']:g} from {a['teacher']['size']}" if a["alpha"] else ""
        print(f"[{i}] {path}: {a['size']}, {a['tokens']:,} tokens, seed {a['seed']}{taught}")
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
            perplexity, shown = "" if is_task else f"{math.exp(x):.2f}", f"({gain:+.4f})" if i else ""
            line += f"{x:7.4f} {perplexity:>9} {shown:12}"
        print(line.rstrip())


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
    parser.add_argument("--data", default="data/python", metavar="DIR",
                        help="corpus folder of data.py (default: data/python)")
    parser.add_argument("--windows", type=int, default=256, metavar="N",
                        help="windows evaluated in each half of a set, at most (default: 256)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    args = parser.parse_args()
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    if args.teacher and len(args.checkpoints) != 2:
        parser.error("--teacher needs two checkpoints, a baseline and a student")
    device, encoding = pick_device(args.device)[0], load_tokenizer(args.data)
    items = read_items(args.items) if args.items else []
    models = [open_model(path, args.data, device) for path in args.checkpoints]
    if args.teacher:
        teacher = open_model(args.teacher, args.data, device)[0]
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
    run(main)

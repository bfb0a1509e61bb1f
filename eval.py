"""
How good is a model: loss in domain and out of distribution, downstream tasks, calibration, tokens.

    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt                            # a table, or --json
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --teacher out/xs/ckpt.pt   # which tokens gain
    python eval.py --write_tasks tasks                                             # the items as JSON lines
    python eval.py out/alone/ckpt.pt --tasks tasks/recall.jsonl                    # score these, or your own
    python eval.py out/124M/ckpt.pt --data data/fineweb-edu --tasks hellaswag arc_easy piqa lambada
    python eval.py out/alone/ckpt.pt out/taught/ckpt.pt --sample "def "            # what they write

Reads checkpoints of distill.py and the corpus folder of data.py. Models of one block_size see the same
windows of each set, and all the same task items. Both are cut in two halves, the first and the second half of
the held-out documents: choose on `select`, quote from `report`.

The tasks are made from held-out documents. Of next_line (four choices, after HellaSwag, arXiv 1905.07830) the
accuracy normalised by length is quoted, of minimal_pair (two, after BLiMP, 1912.00582) the plain one, of
recall (after LAMBADA, 1606.06031) the exact match of greedy decoding; scored as in EleutherAI's
lm-evaluation-harness, from whose prompts those of the four downloaded tasks come.
"""
import ast
import builtins
import functools
import json
import keyword
import math
import os
import random
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (END_OF_TEXT, DataError, Parser, download, load_meta, load_tokenizer, load_tokens, lock,
                  read_lines, read_member, run, write)
from model import CheckpointError, load_checkpoint


# ------------------------------------------------------------------------------
# token by token, over fixed windows

def read_windows(path, block_size, n):
    """-> {"select": ids (<= n, block_size + 1), "report": the same}, evenly spaced over either half."""
    tokens = load_tokens(path)
    total = (len(tokens) - 1) // block_size
    if total < 2:
        raise DataError(f"{path} has {len(tokens):,} tokens: evaluation needs two windows of {block_size}")
    halves = {}
    for half, first, last in (("select", 0, total // 2), ("report", total // 2, total)):
        starts = first + np.arange(min(n, last - first)) * (last - first) // min(n, last - first)
        rows = np.stack([tokens[s * block_size:(s + 1) * block_size + 1] for s in starts])
        halves[half] = torch.from_numpy(rows.astype(np.int64))
    return halves


def batch_of(model, most):
    """How many full contexts to evaluate at once: their logits stay below a GiB."""
    return max(1, min(most, 2**28 // (model.config.block_size * model.config.vocab_size)))


@torch.no_grad()
def token_scores(model, rows):
    """
    Rows (N, T + 1) -> three of (N, T), for every token but a row's first: its loss in nats, whether the
    likeliest token was right, and the probability of the likeliest.
    """
    device, scores = next(model.parameters()).device, []
    for part in rows.split(batch_of(model, 32)):
        part = part.to(device)
        logp = F.log_softmax(model(part[:, :-1]).float(), dim=-1)            # (B, T, V)
        top, guess = logp.max(-1)
        loss = -logp.gather(-1, part[:, 1:, None])[..., 0]
        scores.append((loss.cpu(), (guess == part[:, 1:]).cpu(), top.exp().cpu()))
    return tuple(torch.cat(s) for s in zip(*scores))


def calibration_error(right, confidence, bins=15):
    """Expected calibration error of top-1 predictions: mean |accuracy - confidence| over equal-width bins of
    confidence, weighted by their size (Guo et al., arXiv 1706.04599). 0 is perfect."""
    right, confidence = right.flatten().double(), confidence.flatten().double()
    index = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right - confidence)
    return gap.abs().sum().item() / len(right)


def evaluation_sets(data_dir):
    """-> {"in_domain": path, "ood/NAME": path ...} of a corpus folder."""
    sets = load_meta(data_dir)["sets"]
    names = {"in_domain": "val"} | {f"ood/{s[4:]}": s for s in sets if s.startswith("ood_")}
    return {name: os.path.join(data_dir, f"{file}.bin") for name, file in names.items()}


# ------------------------------------------------------------------------------
# downstream tasks: an item is {"task", "context", "choices", "label"}; one choice alone means exact match

CONTEXT, LINE = 160, 60                  # characters of context and of a line: an item fits 128 tokens
MOST = 2000                              # items of a task


def with_body(line):
    """A stripped line as code that can stand alone."""
    return line + " pass" if line.endswith(":") else line


def parse(line):
    """The syntax tree of a stripped line as text; None if it has none."""
    try:
        return ast.dump(ast.parse(with_body(line)))
    except (SyntaxError, ValueError):
        return None


def words_of(text):
    """The identifiers in a text, in order, keywords left out."""
    return [w for w in re.findall(r"[A-Za-z_]\w*", text) if not keyword.iskeyword(w)]


# Each rule gives every way in which it can break a line, seen below some lines that come before.

def wrong_bracket(line, before):
    """A closing bracket dropped, or of another kind."""
    return [line[:m.start()] + other + line[m.end():]
            for m in re.finditer(r"[)\]}]", line) for other in ("", ")", "]", "}")]


def wrong_colon(line, before):
    """The colon that opens a block dropped, or another sign in its place."""
    return [line[:-1] + other for other in ("", ",", ";", ".")] if line.endswith(":") else []


def wrong_keyword(line, before):
    """A keyword in another's place."""
    return [line[:m.start()] + other + line[m.end():] for m in re.finditer(r"[a-z]+", line)
            if keyword.iskeyword(m[0]) for other in keyword.kwlist if other.islower()]


def swapped_operands(line, before):
    """The two sides of an operator exchanged, for operators to which that matters."""
    matters = (ast.Sub, ast.Div, ast.Mod, ast.Pow, ast.In, ast.NotIn, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
    pairs = []
    for node in ast.walk(ast.parse(with_body(line))):
        if isinstance(node, ast.BinOp) and isinstance(node.op, matters):
            pairs.append((node.left, node.right))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], matters):
            pairs.append((node.left, node.comparators[0]))
    spans = [(a.col_offset, a.end_col_offset, b.col_offset, b.end_col_offset) for a, b in pairs]
    return [line[:a] + line[c:d] + line[b:c] + line[a:b] + line[d:] for a, b, c, d in spans]


def wrong_name(line, before):
    """A name of the lines before in another such name's place."""
    known = {w for w in words_of(before) if len(w) > 2}
    return [line[:m.start()] + other + line[m.end():] for m in re.finditer(r"[A-Za-z_]\w*", line)
            if m[0] in known for other in sorted(known - set(words_of(line)))]


# rule -> its function, and whether the broken line must not parse (True) or must parse to another tree
# (False)
RULES = {"bracket": (wrong_bracket, True), "colon": (wrong_colon, True), "keyword": (wrong_keyword, True),
         "operand": (swapped_operands, False), "name": (wrong_name, False)}


def break_line(rule, line, before, draw, length):
    """
    The line broken by a rule, or None. length(line), its number of tokens, stays the same, so that neither
    line is the likelier one for being shorter.
    """
    tree, (ways, must_fail) = parse(line), RULES[rule]
    broken = ways(line, before) if tree and line.isascii() else []
    for other in draw.sample(broken, min(len(broken), 10)):
        new = parse(other)
        if length(other) == length(line) and (new is None if must_fail else new not in (None, tree)):
            return other


def thin(items, most):
    """At most so many of them, evenly spaced."""
    return [items[k * len(items) // most] for k in range(most)] if len(items) > most else items


def make_tasks(documents, encoding):
    """Documents (any text for next_line, Python for the others) -> {task: items}, always the same."""
    draw, found = random.Random(0), {"next_line": [], "recall": []} | {rule: [] for rule in RULES}
    spread = Counter(w for text in documents for w in set(words_of(text)))    # name -> documents that have it
    for d, text in enumerate(documents):
        lines = [line.rstrip() for line in text.split("\n")]
        fit = [i for i in range(1, len(lines))
               if lines[i - 1] and len(lines[i].strip()) >= 10 and len(lines[i]) <= LINE]

        def before(i):                                       # whole lines of context
            text = "\n".join(lines[max(0, i - 20):i])
            return text if len(text) <= CONTEXT else text[-CONTEXT:].partition("\n")[2]

        def add(where, context, choices, label, **more):
            item = {"task": where, **more, "context": context, "choices": choices, "label": label}
            found[more.get("rule", where)].append((d, item))

        for i in draw.sample(fit, min(len(fit), 40)):
            line, context = lines[i].strip(), before(i)
            indent = lines[i][:len(lines[i]) - len(line)]
            if len(context) < CONTEXT / 4:
                continue
            # distractors with the same indentation, or telling the lines apart would be easy
            others = sorted({lines[j] for j in fit if re.match(r"\s*", lines[j])[0] == indent} - {lines[i]})
            others = [other for other in others if other.strip() not in context]
            if len(others) >= 3:
                choices, label = draw.sample(others, 3), draw.randrange(4)
                choices.insert(label, lines[i])
                add("next_line", context, ["\n" + choice for choice in choices], label)
            for rule in RULES:
                broken = break_line(rule, line, context, draw,
                                    lambda text: len(encoding.encode_ordinary(f"\n{indent}{text}")))
                if broken:
                    choices, label = [f"\n{indent}{line}"], draw.randrange(2)
                    choices.insert(1 - label, f"\n{indent}{broken}")
                    add("minimal_pair", context, choices, label, rule=rule)
        for i in fit:
            # a name seen in the context, rare elsewhere, not yet in this line: only the context can tell it
            m = re.search(r"(?<!\w)[A-Za-z]\w{3,}(?=\W*$)", lines[i])
            start = lines[i][:m.start()] if m else ""
            if (start.strip() and spread[m[0]] <= 3 and not hasattr(builtins, m[0])
                    and m[0] in words_of(before(i)) and m[0] not in words_of(start)
                    and parse(lines[i].strip())):
                context = f"{before(i)}\n{start}"
                space = len(context) - len(context.rstrip())
                add("recall", context.rstrip(), [" " * space + m[0]], 0)

    pairs = [pair for rule in RULES for pair in thin(found[rule], MOST // len(RULES))]
    found = {"next_line": found["next_line"], "minimal_pair": sorted(pairs, key=lambda pair: pair[0]),
             "recall": found["recall"]}
    return {task: [item for _, item in thin(items, MOST)] for task, items in found.items()}


@functools.cache
def load_tasks(data_dir):
    """{task: items} of a corpus folder's held-out documents; tasks of fewer than 100 items are left out."""
    encoding = load_tokenizer(data_dir)
    text = encoding.decode(load_tokens(os.path.join(data_dir, "val.bin")).tolist())
    with warnings.catch_warnings():                          # of odd escapes in the lines that are parsed
        warnings.simplefilter("ignore")
        tasks = make_tasks(text.split(END_OF_TEXT)[:-1], encoding)
    return {task: items for task, items in tasks.items() if len(items) >= 100}


PUBLIC = {                               # name -> address, and the file inside or the labels beside
    "hellaswag": ("https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl", ""),
    "arc_easy": ("https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip",
                 "ARC-Easy-Test.jsonl"),
    "piqa": ("https://yonatanbisk.com/piqa/data/valid.jsonl",
             "https://yonatanbisk.com/piqa/data/valid-labels.lst"),
    "lambada": ("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl", ""),
}


def fetch_task(name, folder):
    """The file of a public task, downloaded if it is not there -> its path. Raises DataError."""
    (url, more), path = PUBLIC[name], os.path.join(folder, f"{name}.jsonl")
    os.makedirs(folder, exist_ok=True)
    with lock(folder, wait=600):
        if os.path.exists(path):
            return path
        raw, labels = os.path.join(folder, f"{name}.raw"), os.path.join(folder, f"{name}.labels")
        try:
            download(url, raw)
            found = read_member(raw, more, 2**27) if more.endswith(".jsonl") else Path(raw).read_bytes()
            if more.startswith("http"):                      # the labels are a file of their own
                download(more, labels)
                both = read_lines(raw), read_lines(labels)
                if len(both[0]) != len(both[1]):
                    raise DataError(f"{url} has {len(both[0])} items and {len(both[1])} labels: try again "
                                    "later")
                found = "".join(json.dumps({**item, "label": k}) + "\n" for item, k in zip(*both)).encode()
            write(folder, f"{name}.new", found)
            read_items(os.path.join(folder, f"{name}.new"))  # what is no task never gets its name
            os.replace(os.path.join(folder, f"{name}.new"), path)
        finally:
            for left in (raw, labels, os.path.join(folder, f"{name}.new")):
                Path(left).unlink(missing_ok=True)
    return path


def item_of(line):
    """
    A line of HellaSwag, ARC, PIQA or LAMBADA, known by its keys, as an item; one that is an item stays.
    Raises KeyError, ValueError, TypeError or AttributeError where it is neither.
    """
    def clean(text):                                         # HellaSwag has marks of WikiHow's
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    if "endings" in line:
        context = clean(f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'].capitalize()}")
        choices = [clean(x) for x in line["endings"]]
        return {"context": context, "space": " ", "choices": choices, "label": int(line["label"])}
    if "answerKey" in line:
        choices = line["question"]["choices"]
        label = [c["label"] for c in choices].index(line["answerKey"])
        context = f"Question: {line['question']['stem']}\nAnswer:"
        return {"context": context, "space": " ", "choices": [c["text"] for c in choices], "label": label}
    if "goal" in line:
        choices, context = [line["sol1"], line["sol2"]], f"Question: {line['goal']}\nAnswer:"
        return {"context": context, "space": " ", "choices": choices, "label": int(line["label"])}
    if "text" in line and "choices" not in line:
        context, _, word = line["text"].rpartition(" ")
        return {"context": context, "space": " ", "choices": [word], "label": 0}
    return line


def read_items(path):
    """Items from a file of JSON lines, ours or a public task's. Raises OSError or DataError."""
    items = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            item = item_of(line)
            texts = [item["context"], item.get("space", ""), *item["choices"]]
            if not (all(isinstance(text, str) for text in texts)
                    and (item is not line or all(item["choices"]))
                    and type(item["label"]) is int and 0 <= item["label"] < len(item["choices"])):
                raise ValueError
            items.append(item)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: item {number} is none with context, choices and label, nor a line of "
                            "HellaSwag, ARC, PIQA or LAMBADA") from None
    if not items:
        raise DataError(f"{path} holds no task items")
    return items


@torch.no_grad()
def score_items(model, encoding, items):
    """
    -> for each item (acc, acc_norm), 0 or 1: whether the right choice has the largest log-probability given
    the context, in sum and per character. With one choice both say whether greedy decoding gives it.

    The continuation's tokens are those of context + choice after the context's, as in lm-evaluation-harness;
    what does not fit the model's context is cut off on the left.
    """
    device, T, requests = next(model.parameters()).device, model.config.block_size, []
    for n, item in enumerate(items):
        context = item["context"].rstrip()                   # white space at its end belongs to the choice
        space = item["context"][len(context):] + item.get("space", "")
        start = len(encoding.encode_ordinary(context))
        for c, choice in enumerate(item["choices"]):
            ids = encoding.encode_ordinary(context + space + choice)
            if len(ids) <= start:
                raise DataError(f"choice {choice!r} adds no token to its context")
            if start == 0:                                   # something to predict the first token from
                ids = [encoding.eot_token, *ids]
            requests.append((ids[-T - 1:], min(T, len(ids) - max(start, 1)), n, c))
    requests.sort(key=lambda request: len(request[0]))
    total = [[0.0] * len(item["choices"]) for item in items]
    exact = [False] * len(items)
    at_once = batch_of(model, 64)
    for i in range(0, len(requests), at_once):
        part = requests[i:i + at_once]
        rows = torch.zeros(len(part), max(len(ids) for ids, *_ in part), dtype=torch.long)
        for row, (ids, *_) in zip(rows, part):
            row[:len(ids)] = torch.tensor(ids)               # padding on the right is never looked at
        rows = rows.to(device)
        logp = F.log_softmax(model(rows[:, :-1]).float(), dim=-1)
        guess, logp = logp.argmax(-1).cpu(), logp.gather(-1, rows[:, 1:, None])[..., 0].cpu()
        for row, g, p, (ids, k, n, c) in zip(rows.cpu(), guess, logp, part):
            span = slice(len(ids) - 1 - k, len(ids) - 1)
            total[n][c] = p[span].sum().item()
            exact[n] = exact[n] or (len(items[n]["choices"]) == 1 and torch.equal(g[span], row[1:][span]))
    results = []
    for item, sums, greedy in zip(items, total, exact):
        per_character = [x / max(1, len(choice)) for x, choice in zip(sums, item["choices"])]
        right = tuple(int(s.index(max(s)) == item["label"]) for s in (sums, per_character))
        results.append(right if len(sums) > 1 else (int(greedy), int(greedy)))
    return results


def half_items(items, most):
    """-> {"select": items, "report": items}, of the first and of the second half, `most` of each."""
    middle = len(items) // 2
    return {"select": thin(items[:middle], most), "report": thin(items[middle:], most)}


# ------------------------------------------------------------------------------
# everything about one model, and about three

NORMED = ("next_line",)                  # tasks of which the accuracy normalised by length is quoted


def evaluate(model, data_dir, windows=256, items=500):
    """
    -> {"in_domain": half, "ood/NAME": half ...} loss in nats per token over at most `windows` windows of the
    model's block_size a half; "ece/SET": its calibration error; "task/NAME": accuracy, a fraction, over at
    most `items` items a half. half = {"select": x, "report": x}. Raises DataError.
    """
    metrics = {}
    for name, path in evaluation_sets(data_dir).items():
        for half, rows in read_windows(path, model.config.block_size, windows).items():
            loss, right, confidence = token_scores(model, rows)
            metrics.setdefault(name, {})[half] = loss.mean().item()
            metrics.setdefault(f"ece/{name}", {})[half] = calibration_error(right, confidence)
    for task, all_items in load_tasks(data_dir).items():
        halves = metrics[f"task/{task}"] = {}
        for half, part in half_items(all_items, items).items():
            scores = score_items(model, load_tokenizer(data_dir), part)
            halves[half] = sum(s[task in NORMED] for s in scores) / len(scores)
    return {name: {half: round(x, 6) for half, x in halves.items()} for name, halves in metrics.items()}


def bytes_per_token(data_dir, block_size, windows):
    """-> {set: mean UTF-8 bytes of the tokens of the report half}; end-of-text counts as none."""
    encoding = load_tokenizer(data_dir)
    length = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)] + [0]
    length = torch.tensor(length, dtype=torch.float32)
    sizes = {}
    for name, path in evaluation_sets(data_dir).items():
        sizes[name] = length[read_windows(path, block_size, windows)["report"][:, 1:]].mean().item()
    return sizes


def token_gains(base, student, teacher, data_dir, windows=256):
    """
    Where does the student gain on the baseline, on the report halves? -> {"in_domain": x, "out": x}, x =
    {"gain": nats per token, "deciles": [(mean baseline loss, gain)], of tokens sorted by the baseline's loss,
    "groups": {name: (share, gain)}}, the groups by who predicts the token right (argmax). shares times gains
    add up to the whole gain.

    Sorting by the baseline's own loss makes any second model, as good but different, look better on the hard
    tokens and worse on the easy ones: compare with a baseline of another seed in the student's place.
    """
    found, sets = {}, evaluation_sets(data_dir)
    for where in ("in_domain", "out"):
        names = [name for name in sets if (name == "in_domain") == (where == "in_domain")]
        if not names:
            continue
        size = min(model.config.block_size for model in (base, student, teacher))
        rows = torch.cat([read_windows(sets[name], size, windows)["report"] for name in names])
        scores = [token_scores(model, rows) for model in (base, student, teacher)]
        (b, b_right, _), (s, _, _), (_, t_right, _) = scores
        gain, order = (b - s).flatten().double(), b.flatten().argsort()
        groups = {"teacher and baseline": t_right & b_right, "teacher only": t_right & ~b_right,
                  "baseline only": ~t_right & b_right, "neither": ~t_right & ~b_right}
        b = b.flatten()
        deciles = [(b[part].mean().item(), gain[part].mean().item()) for part in order.chunk(10)]
        found[where] = {"gain": gain.mean().item(), "deciles": deciles, "groups": {}}
        for name, mask in groups.items():
            mean = gain[mask.flatten()].mean().item() if mask.any() else 0.0
            found[where]["groups"][name] = (mask.double().mean().item(), mean)
    return found


def open_model(path, data_dir, device):
    """load_checkpoint, to evaluate here. Raises CheckpointError; DataError if the tokenizer is another."""
    model, about = load_checkpoint(path, device)
    if about.get("tokenizer") != load_meta(data_dir)["tokenizer"]:
        raise DataError(f"{path} has another tokenizer than {data_dir}: give its own corpus with --data")
    return model, about


def sample(model, encoding, prompt, tokens=100, seed=1):
    """What a model writes after a prompt, at temperature 0.8 among the 50 likeliest tokens: text."""
    torch.manual_seed(seed)
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    idx = torch.tensor([ids], device=next(model.parameters()).device)
    out = [i for i in model.generate(idx, tokens, 0.8, 50)[0, len(ids):].tolist() if i < encoding.n_vocab]
    return prompt + encoding.decode(out[:out.index(encoding.eot_token)] if encoding.eot_token in out else out)


def describe(path, data_dir, windows, items, device):
    """Evaluate one checkpoint -> what --json prints of it: both halves, and figures of the report half."""
    model, about = open_model(path, data_dir, device)
    metrics = evaluate(model, data_dir, windows, items)
    sizes = bytes_per_token(data_dir, model.config.block_size, windows)
    found = {k: about.get(k) for k in ("size", "tokens", "seed", "alpha", "teacher", "corpus")}
    found |= {"path": path, "sets": {}, "tasks": {}}
    for name, half in metrics.items():
        x, kind = half["report"], name.split("/")[0]
        if kind == "task":
            found["tasks"][name[5:]] = {**half, "accuracy": x}
        elif kind != "ece":
            found["sets"][name] = {**half, "loss": x, "perplexity": math.exp(min(x, 700)),
                                   "bits_per_byte": x / math.log(2) / sizes[name],
                                   "calibration_error": metrics[f"ece/{name}"]["report"]}
    pairs = half_items(load_tasks(data_dir).get("minimal_pair", []), items)["report"]
    by_rule = {}
    for item, (acc, _) in zip(pairs, score_items(model, load_tokenizer(data_dir), pairs)):
        by_rule.setdefault(item["rule"], []).append(acc)
    for rule, right in sorted(by_rule.items()):
        found["tasks"][f"  {rule}"] = {"accuracy": sum(right) / len(right), "items": len(right)}
    return found


def print_table(found):
    """Checkpoints side by side."""
    for i, c in enumerate(found):
        taught = f", alpha {c['alpha']:g} from {c['teacher']}" if c["alpha"] else ""
        print(f"[{i}] {c['path']}: {c['size']}, {c['tokens'] or 0:,} tokens, seed {c['seed']}{taught}")
    print("\nreport halves: nats per token, perplexity, bits per byte, calibration error"
          + "; in brackets the gain on [0]" * (len(found) > 1))
    print(f"{'':18}" + "".join(f"{f'[{i}]':<42}" for i in range(len(found))).rstrip())
    for name, first in found[0]["sets"].items():
        cells = ""
        for c in found:
            s = c["sets"][name]
            gain = "" if c is found[0] else f"({first['loss'] - s['loss']:+.3f})"
            cells += (f"{s['loss']:7.3f} {s['perplexity']:8.2f} {s['bits_per_byte']:6.3f} "
                      f"{s['calibration_error']:6.3f} {gain:<10} ")
        print(f"{name:17}{cells.rstrip()}")
    if found[0]["tasks"]:
        print("\naccuracy; chance is 0.25 for next_line, 0.5 for minimal_pair and its rules, 0 for recall")
    for task, first in found[0]["tasks"].items():
        cells = ""
        for c in found:
            accuracy = c["tasks"][task]["accuracy"]
            gain = "" if c is found[0] else f"({accuracy - first['accuracy']:+.3f})"
            cells += f"{accuracy:7.3f} {gain:<34} "
        print(f"{task:17}{cells.rstrip()}")


def print_token_gains(found):
    """The tables of token_gains()."""
    for where, x in found.items():
        print(f"\n{where}: the student gains {x['gain']:+.4f} nats per token on the baseline")
        print("tenths, baseline's loss " + " ".join(f"{loss:7.2f}" for loss, _ in x["deciles"]))
        print("mean gain               " + " ".join(f"{gain:+7.3f}" for _, gain in x["deciles"]))
        print(f"{'right (argmax)':24} {'share':>7} {'mean gain':>10} {'share x gain':>13}")
        for name, (share, gain) in x["groups"].items():
            print(f"{name:24} {share:7.1%} {gain:+10.4f} {share * gain:+13.4f}")
    print("\nA baseline of another seed in the student's place shows what the sorting does by itself.")


def main():
    """Evaluate the checkpoints of the command line and print what it asks for, as tables or JSON."""
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CKPT", help="checkpoints of distill.py")
    parser.add_argument("--teacher", metavar="CKPT", help="with two checkpoints, a baseline and a student: "
                        "which tokens gain, and whether this teacher knew them")
    parser.add_argument("--data", default="data/python", metavar="DIR",
                        help="corpus folder of data.py (default: data/python)")
    parser.add_argument("--windows", type=int, default=256, metavar="N",
                        help="windows evaluated in each half of a set, at most (default: 256)")
    parser.add_argument("--items", type=int, default=1000, metavar="N",
                        help="items evaluated in each half of a task, at most (default: 1000)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="score these instead: "
                        f"{', '.join(PUBLIC)}, downloaded to DATA/tasks if needed, or files of JSON lines in "
                        "one of their formats or with context, choices and label")
    parser.add_argument("--sample", metavar="TEXT", help="print what each checkpoint writes after this")
    parser.add_argument("--write_tasks", metavar="DIR", help="write the corpus's items as DIR/TASK.jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON, with both halves of every set")
    args = parser.parse_args()
    if args.windows < 1 or args.items < 1:
        parser.error("--windows and --items must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here")
    if bool(args.teacher) + bool(args.tasks) + bool(args.write_tasks) + (args.sample is not None) > 1:
        parser.error("--teacher, --tasks, --write_tasks and --sample exclude each other")
    if args.teacher and len(args.checkpoints) != 2:
        parser.error("--teacher needs two checkpoints, a baseline and a student")
    if not args.checkpoints and not args.write_tasks:
        parser.error("give at least one CKPT")
    if args.write_tasks:
        tasks = load_tasks(args.data)
        if not tasks:
            raise DataError(f"{args.data} has too few held-out documents for 100 items of any task")
        os.makedirs(args.write_tasks, exist_ok=True)
        for task, items in tasks.items():
            lines = "".join(json.dumps(item) + "\n" for item in items)
            write(args.write_tasks, f"{task}.jsonl", lines.encode())
            print(f"{args.write_tasks}/{task}.jsonl: {len(items)} items")
        return
    found = []
    if args.sample is not None:
        for path in args.checkpoints:
            text = sample(open_model(path, args.data, args.device)[0], load_tokenizer(args.data), args.sample)
            found.append({"path": path, "text": text})
            if not args.json:
                print(f"--- {path}\n{text}")
    elif args.tasks:
        load_meta(args.data)
        folder = os.path.join(args.data, "tasks")
        files = {task: read_items(fetch_task(task, folder) if task in PUBLIC else task)
                 for task in args.tasks}
        for checkpoint in args.checkpoints:
            model, _ = open_model(checkpoint, args.data, args.device)
            for path, items in files.items():
                scores = score_items(model, load_tokenizer(args.data), items)
                acc, acc_norm = (sum(column) / len(items) for column in zip(*scores))
                found.append({"path": checkpoint, "tasks": path, "items": len(items), "acc": acc,
                              "acc_norm": acc_norm})
                if not args.json:
                    print(f"{checkpoint} {path}: acc {acc:.4f}, acc_norm {acc_norm:.4f}, {len(items)} items")
    elif args.teacher:
        models = [open_model(path, args.data, args.device)[0] for path in (*args.checkpoints, args.teacher)]
        found = token_gains(*models, args.data, args.windows)
        if not args.json:
            print_token_gains(found)
    else:
        found = [describe(path, args.data, args.windows, args.items, args.device)
                 for path in args.checkpoints]
        if not args.json:
            print_table(found)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main, CheckpointError)

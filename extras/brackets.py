"""
A downstream task: which bracket closes here?

    python extras/brackets.py out/alone/ckpt.pt out/taught/ckpt.pt
    python extras/brackets.py out/alone/ckpt.pt --data data/python --items 200

A file of Python is cut before a ) or ], right after a letter or a digit, where the tokenizer cuts as
well. Both continuations are scored by their log-probability; a model is right if the true one is the
likelier. The files are those of the sets val, sympy, numpy and networkx of the `python` corpus.

Prints a line for each checkpoint: its accuracy and, after the first, how many points it gains over the first.
The downstream gains that the paper reports did not come out here: students of weak teachers are worse at
this task than the student alone (results/README.md).
"""
import os
import random
import sys

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, ".")
from data import (END_OF_TEXT, UserError, evenly_spaced, load_meta, load_tokenizer, load_tokens, make_parser,
                  run_main, sha)
from eval import token_losses
from model import load_checkpoint, pick_device

SETS = "val", "ood_sympy", "ood_numpy", "ood_networkx"


def bracket_items(texts, most):
    """Texts -> at most `most` items {"context", "choices", "label"}, half of them of each label."""
    pairs = [pair for text in texts for pair in bracket_pairs(text)]
    return [item for pair in evenly_spaced(pairs, most // 2) for item in pair]


def bracket_pairs(text):
    """A text -> at most six pairs of items, one that goes on with a ) and one that goes on with a ]."""
    cuts, stack = {")": [], "]": []}, []                     # the stack: positions of open brackets
    for i, character in enumerate(text):
        if character in "([{":
            stack.append(i)
        elif character in ")]}":
            start = stack.pop() if stack else i
            if text[start] + character not in ("()", "[]", "{}"):
                stack = []                                   # one of them stood in a string: start over
            elif character in cuts and 8 <= i - start <= 200 and text[i - 1].isalnum():
                first = max(0, i - 280)                      # at most 280 characters of context,
                if first:                                    # in whole lines, but not without its opener
                    first = max(first, text.find("\n", first, start) + 1)
                rest = text[i + 1:i + 31].partition("\n")[0]
                cuts[character].append({"context": text[first:i], "choices": [f"){rest}", f"]{rest}"],
                                        "label": ")]".index(character)})
    n = min(6, len(cuts[")"]), len(cuts["]"]))
    draw = random.Random(sha(text))                          # the same for the same text
    return list(zip(draw.sample(cuts[")"], n), draw.sample(cuts["]"], n)))


def corpus_items(data_dir, most):
    """-> at most `most` items, as many of each of the four sets, where they have that many."""
    encoding, items = load_tokenizer(data_dir), []
    missing = set(SETS) - set(load_meta(data_dir)["sets"])
    if missing:
        raise UserError(f"{data_dir} lacks {', '.join(sorted(missing))}: the task needs the python corpus")
    for name in SETS:
        texts = encoding.decode(load_tokens(f"{data_dir}/{name}.bin").tolist()).split(END_OF_TEXT)
        items += bracket_items(texts, most // len(SETS))
    if not items:
        raise UserError(f"no item: {data_dir} has too few brackets, or --items is less than {2 * len(SETS)}")
    return items


def accuracy(model, encoding, items):
    """The share of items whose right choice is the likeliest after the context."""
    rows, lengths = [], []
    for item in items:
        context = [encoding.eot_token, *encoding.encode_ordinary(item["context"])]
        for choice in map(encoding.encode_ordinary, item["choices"]):
            row = [*context, *choice][-model.config.block_size - 1:]         # what fits, from the end
            rows.append(torch.tensor(row))
            lengths.append(min(len(choice), len(row) - 1))                   # the first token has no loss
    losses, _ = token_losses(model, pad_sequence(rows, batch_first=True))    # padding is on the right, unseen
    scores = [loss[len(row) - 1 - n:len(row) - 1].sum() for loss, row, n in zip(losses, rows, lengths)]
    likeliest = torch.stack(scores).view(len(items), -1).argmin(1).tolist()  # the lowest loss
    return np.mean([choice == item["label"] for choice, item in zip(likeliest, items)])


def main():
    """Score the checkpoints of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=os.path.expanduser, metavar="CKPT",
                        help="distill.py checkpoints")
    parser.add_argument("--data", default="data/python", type=os.path.expanduser, metavar="DIR",
                        help="corpus folder (default: data/python)")
    parser.add_argument("--items", type=int, default=1000, help="of the task, at most (default: 1000)")
    parser.add_argument("--device", default="auto", help="as in distill.py (default: auto)")
    args = parser.parse_intermixed_args()                    # CKPT --data DIR CKPT too
    items, encoding = corpus_items(args.data, args.items), load_tokenizer(args.data)
    tokenizer, (device, _) = load_meta(args.data)["tokenizer"], pick_device(args.device)
    first = None
    for path in args.checkpoints:
        model, _ = load_checkpoint(path, device, tokenizer)
        percent = 100 * accuracy(model, encoding, items)
        gain = "" if first is None else f", {percent - first:+.1f} points"
        print(f"{path}: {percent:.1f} % of {len(items)} items{gain}")
        first = percent if first is None else first


if __name__ == "__main__":
    run_main(main)

"""
How good is a model: loss, perplexity and bits per byte, in domain and on every out-of-distribution set.

    python eval.py out/alone/ckpt.pt                                      # a table
    python eval.py out/alone/ckpt.pt out/taught/alpha_0.25/ckpt.pt        # side by side
    python eval.py out/alone/ckpt.pt --json                               # for another program

Reads checkpoints of distill.py and the corpus folder of data.py; writes nothing. Every model sees the same
windows of each set, and each set is cut in two halves from different documents: choose on `select`, quote
from `report`.
"""
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from data import DataError, Parser, load_meta, load_tokenizer, load_tokens, run
from model import CheckpointError, load_checkpoint


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


@torch.no_grad()
def token_losses(model, rows, batch_size=32):
    """Loss in nats of every token but each row's first: rows (N, T + 1) -> (N, T), in float32."""
    device = next(model.parameters()).device
    losses = []
    for part in rows.split(batch_size):
        part = part.to(device)
        logits = model(part[:, :-1]).float()                                 # (B, T, V)
        losses.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").cpu())
    return torch.cat(losses)


def evaluation_sets(data_dir):
    """-> {"in_domain": path, "ood/NAME": path ...} of a corpus folder."""
    sets = load_meta(data_dir)["sets"]
    names = {"in_domain": "val"} | {f"ood/{s[4:]}": s for s in sets if s.startswith("ood_")}
    return {name: os.path.join(data_dir, f"{file}.bin") for name, file in names.items()}


def evaluate(model, data_dir, windows=256):
    """
    Loss in nats per token -> {"in_domain": half, "ood/NAME": half ...}, half = {"select": x, "report": x},
    over `windows` windows of the model's block_size a half, at most. Raises DataError.
    """
    return {name: {half: token_losses(model, rows).mean().item()
                   for half, rows in read_windows(path, model.config.block_size, windows).items()}
            for name, path in evaluation_sets(data_dir).items()}


def bytes_per_token(data_dir, block_size, windows):
    """-> {set: {half: mean UTF-8 bytes of the tokens that evaluate() scores}}; end-of-text counts as none."""
    encoding = load_tokenizer(data_dir)
    length = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)] + [0]
    length = torch.tensor(length, dtype=torch.float32)
    return {name: {half: length[rows[:, 1:]].mean().item()
                   for half, rows in read_windows(path, block_size, windows).items()}
            for name, path in evaluation_sets(data_dir).items()}


def describe(path, data_dir, windows, device):
    """Evaluate one checkpoint -> what --json prints of it. Raises CheckpointError, DataError."""
    model, about = load_checkpoint(path, device)
    if about.get("tokenizer") != load_meta(data_dir)["tokenizer"]:
        raise DataError(f"{path} has another tokenizer than {data_dir}: give its own corpus with --data")
    sizes = bytes_per_token(data_dir, model.config.block_size, windows)
    sets = {}
    for name, half in evaluate(model, data_dir, windows).items():
        loss = sum(half.values()) / 2
        sets[name] = {**half, "loss": loss, "perplexity": math.exp(loss),
                      "bits_per_byte": loss / math.log(2) / (sum(sizes[name].values()) / 2)}
    named = {k: about.get(k) for k in ("size", "tokens", "seed", "alpha", "teacher", "corpus")}
    return {"path": path, **named, "sets": sets}


def main():
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of distill.py")
    parser.add_argument("--data", default="data/python", metavar="DIR",
                        help="corpus folder of data.py (default: data/python)")
    parser.add_argument("--windows", type=int, default=256, metavar="N",
                        help="windows evaluated in each half of a set, at most (default: 256)")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON, with both halves of every set")
    args = parser.parse_args()
    if args.windows < 1:
        parser.error("--windows must be at least 1")
    found = [describe(path, args.data, args.windows, args.device) for path in args.checkpoints]
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for i, c in enumerate(found):
        taught = f", alpha {c['alpha']:g} from {c['teacher']}" if c["alpha"] else ""
        print(f"[{i}] {c['path']}: {c['size']}, {c['tokens']:,} tokens, seed {c['seed']}{taught}")
    print("\nnats per token, perplexity, bits per byte" + "; in brackets the gain on [0]" * (len(found) > 1))
    print(f"{'':16}" + "".join(f"{f'[{i}]':<35}" for i in range(len(found))).rstrip())
    for name, first in found[0]["sets"].items():
        cells = ""
        for c in found:
            s = c["sets"][name]
            gain = "" if c is found[0] else f"({first['loss'] - s['loss']:+.3f})"
            cells += f"{s['loss']:7.3f} {s['perplexity']:8.2f} {s['bits_per_byte']:6.3f} {gain:<10} "
        print(f"{name:15}{cells.rstrip()}")


if __name__ == "__main__":
    run(main, CheckpointError)

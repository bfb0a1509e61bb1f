"""
Exercise 14: on which tokens does a student gain?

    python exercises/token_gains.py out/alone.pt out/from_weak_0.25.pt out/weak.pt out/other.pt

ALONE STUDENT TEACHER OTHER: a student alone, the same student taught, its teacher, and a student alone of
another seed. Tokens are grouped by who predicts them right, that is, gives them the highest probability: the
teacher, and the other student. (ALONE itself will not do: some of its errors are bad luck, and any other model
gains there.)
"""
import sys

import torch

sys.path.insert(0, ".")
from data import UserError, run_main
from eval import evaluation_sets, read_windows, token_losses
from model import load_checkpoint

DATA = "data/python"


def token_gains(models, data_dir, windows=512):
    """-> {"in_domain" or "outside": {group: (share of tokens, gain in nats per token)}}."""
    gains, found = {"in_domain": [], "outside": []}, {}
    for name, path in evaluation_sets(data_dir).items():
        rows = read_windows(path, models[0].config.block_size, windows)
        losses, hits = zip(*(token_losses(model, rows) for model in models))
        where = "in_domain" if name == "in_domain" else "outside"
        gains[where].append((losses[0] - losses[1], hits[2], hits[3]))
    for where, sets in gains.items():
        gain, t, o = (torch.cat(parts) for parts in zip(*sets))
        groups = {"all tokens": t | True, "both right": t & o, "only the teacher": t & ~o,
                  "only the other student": ~t & o, "neither": ~t & ~o}
        found[where] = {name: (group.double().mean().item(), gain[group].double().mean().nan_to_num().item())
                        for name, group in groups.items()}
    return found


def main():
    if len(sys.argv) != 5:
        raise UserError("give four checkpoints: ALONE STUDENT TEACHER OTHER")
    models = [load_checkpoint(path)[0] for path in sys.argv[1:]]
    print(f"{'who is right':33} share of tokens  gain per token  share of the gain")
    for where, groups in token_gains(models, DATA).items():
        _, total = groups["all tokens"]
        for name, (share, gain) in groups.items():
            print(f"{where:10} {name:22} {share:15.1%} {gain:+15.3f} {share * gain / total:18.0%}")


if __name__ == "__main__":
    run_main(main)

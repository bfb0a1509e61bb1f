"""
The loss and the training loop. With alpha = 0 this is plain pretraining, which is how teachers are made; with
alpha above 0 a student learns from --teacher as well. eval.py measures the losses on held-out text.

    python data.py                                                     # once: text -> data/python
    python distill.py --size xs --tokens 2M --seed 2000 --out out/xs   # a (weak) teacher, with another seed
    python distill.py --size s --teacher out/xs/ckpt.pt --alpha 0.25 --out out/taught
    torchrun --nproc_per_node=8 distill.py --data data/fineweb --size 350M ...         # 8 GPUs share a batch

For a token with label y, student logits z, teacher logits t, temperature tau (reportedly 1 in the paper)

    loss = (1 - alpha) * CE(z, y)  +  alpha * tau^2 * KL( softmax(t/tau) || softmax(z/tau) )

If interrupted, rerun the same command to resume. Reads the corpus folder of data.py. Writes below --out:
ckpt.pt, log.jsonl, settings.json (what made them), and state.pt while the run is unfinished.

"Strong Teacher Not Needed? On Distillation in LLM Pretraining", arXiv 2605.23857; Hinton et al., 1503.02531.
"""
import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import Batches, UserError, load_meta, make_parser, note_repeats, run_main, whole_number
from model import (GPT, SIZES, GPTConfig, Table, autocast, load_checkpoint, pick_device, save_checkpoint,
                   save_file)


@dataclass
class Config:
    """Every knob; each is a --flag of the same name."""
    data: str = "data/python"     # corpus folder made by data.py
    out: str = "out/run"          # folder for checkpoints and the log
    size: str = "s"               # shape of the model, a name in model.SIZES
    tokens: int = 1_500_000       # training tokens, rounded down to whole steps; 1.5M is 1,500,000
    seed: int = 1                 # of the initial weights and of the order of the data
    teacher: str = ""             # a ckpt.pt, or a Hugging Face folder or name; empty: plain pretraining
    alpha: float = 0.0            # weight of distillation, from 0 (the text alone) to 1 (the teacher alone)
    temperature: float = 1.0      # of both distributions in the distillation term
    top_k: int = 0                # keep the teacher's k likeliest tokens (1: hard labels); 0: all of them
    batch_size: int = 8           # sequences in a batch, over all GPUs
    block_size: int = 128         # tokens in a sequence
    accumulate: int = 1           # batches whose gradients add up to one step
    lr: float = 0.0               # peak learning rate; 0: 0.384 / width, found on the laptop sizes
    min_lr: float = 0.1           # a fraction of the peak: the final learning rate
    warmup: float = 0.4           # fraction of the steps in which the rate rises; a cosine follows
    weight_decay: float = 0.1     # of matrices only
    grad_clip: float = 1.0        # clip the gradient's norm to this; 0: off
    device: str = "auto"          # cpu, cuda, cuda:1, mps ...; auto: cuda where there is one, else cpu
    dtype: str = "auto"           # of autocast: float32, bfloat16 or float16; auto: on CUDA a low precision
    fused: bool = True            # the fused loss; false: distill_loss_reference, the one to edit
    compile: bool = True          # torch.compile; false: eager mode, which needs no C++ compiler
    log_every: int = 50           # steps between lines of log.jsonl
    save_every: float = 120.0     # seconds between saved states, from which an interrupted run resumes

    @property
    def tokens_per_step(self):
        return self.batch_size * self.block_size * self.accumulate

    @property
    def steps(self):
        return self.tokens // self.tokens_per_step


# ---- the loss, in its plain form ---------------------------------------------

def keep_top_k(logits, k):
    """Teacher logits (N, V) with all but the k largest at -1e9 (-inf would give 0 * inf); k = 0: all."""
    if not k:
        return logits
    kept = logits.float().topk(min(k, logits.size(-1)), dim=-1)
    return torch.full_like(logits, -1e9, dtype=torch.float32).scatter(-1, kept.indices, kept.values)


def distill_loss_reference(hidden, weight, targets, alpha, teacher_logits=None, temperature=1.0, top_k=0):
    """
    The objective at the top of this file, a mean over tokens, in nats.

    hidden (B, T, C), weight (V, C)     the student's final states and output head
    targets (B, T)                      the labels
    teacher_logits (B, T, V)            get no gradient; without them the loss is plain cross-entropy
    -> loss, ce, kl with loss = (1 - alpha) ce + alpha temperature^2 kl; only loss carries a gradient
    """
    logits = (hidden @ weight.T).float().flatten(0, -2)                      # (B*T, V)
    ce = F.cross_entropy(logits, targets.flatten())
    if teacher_logits is None:
        return ce, ce.detach(), torch.zeros_like(ce)
    teacher_logits = keep_top_k(teacher_logits.detach().flatten(0, -2), top_k).float()       # (B*T, V)
    log_q = F.log_softmax(teacher_logits / temperature, dim=-1)              # teacher
    log_r = F.log_softmax(logits / temperature, dim=-1)                      # student
    kl = (log_q.exp() * (log_q - log_r)).sum(-1).mean()
    loss = (1 - alpha) * ce + alpha * temperature**2 * kl
    return loss, ce.detach(), kl.detach()


# ---- the training loop -------------------------------------------------------

def train(config, show_progress=True):
    """
    Train one model -> the path of its checkpoint.

    Deterministic for a given CPU and thread count, interrupted or not. Raises UserError.
    """
    meta = load_meta(config.data)
    check(config, meta["vocab_size"])
    device, dtype = pick_device(config.device, config.dtype)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # set by torchrun
    batches = Batches(f"{config.data}/train.bin", config.batch_size, config.block_size, config.seed)
    teacher, teacher_id = load_teacher(config, meta, device)                 # None, None without one
    settings = {**recipe(config, meta, dtype), "size": config.size, "tokens": config.tokens,
                "seed": config.seed, "alpha": config.alpha, "teacher": teacher_id}
    path = open_folder(config.out, settings)
    if os.path.exists(path):                                 # finished before
        return path
    show_progress = show_progress and rank == 0
    if show_progress:
        note_repeats(config.data, config.tokens)
    shape = GPTConfig(meta["vocab_size"], config.block_size, **SIZES[config.size])
    if shape.counts:                                         # a table counts in place of training
        model = Table(shape)
        model.count(torch.from_numpy(batches.tokens[:config.tokens].astype("int64")))
        save_checkpoint(path, model, settings=settings)
        return path

    torch.manual_seed(config.seed)
    model = GPT(shape).to(device)
    optimizer = make_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    forward, teacher_forward, loss_fn = fast_functions(config, model, teacher, device)
    first_step, log_size = resume(config.out, model, optimizer, scaler)      # 0, 0 in a new run
    if world > 1:
        join_ranks(device, first_step)
    log = open(f"{config.out}/log.jsonl" if rank == 0 else os.devnull, "a")
    if rank == 0:
        log.truncate(log_size)                               # cut the lines of steps after the saved one
    bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, unit="step",
               desc=config.size, leave=False, disable=None if show_progress else True)
    last_logged = first_step
    logged_at = saved_at = time.perf_counter()

    for step in bar:
        # forward and backward, a micro-batch at a time: gradients add up to those of the whole batch
        losses = torch.zeros(2, device=device)               # ce and kl, means over the step
        share = 1 / config.accumulate / world                # of a micro-batch in the step
        for micro in range(config.accumulate):
            x, y = get_batch(batches, step * config.accumulate + micro, rank, world, device)     # (B, T) each
            with torch.no_grad(), autocast(device, dtype):
                teacher_logits = teacher_forward(x) if teacher else None     # (B, T, V)
            with autocast(device, dtype):
                hidden = forward(x)                          # (B, T, C)
                loss, ce, kl = loss_fn(hidden, model.lm_head.weight, y, config.alpha, teacher_logits,
                                       config.temperature, config.top_k)
            scaler.scale(loss * share).backward()
            losses += torch.stack([ce, kl]) * share

        # the update
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if world > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # the log and the saved state; a step that writes neither does not wait for the GPU
        now = time.perf_counter()
        logging = step % config.log_every == 0 or step + 1 == config.steps
        saving = rank == 0 and step + 1 < config.steps and now - saved_at > config.save_every
        if logging or saving:
            stop_if_nan(model, scaler, f"between steps {last_logged} and {step}, learning rate {lr:.3g}")
        if logging:
            if world > 1:
                dist.all_reduce(losses)
            ce, kl = (round(x, 5) for x in losses.tolist())
            tokens_per_s = round(config.tokens_per_step * (step + 1 - last_logged) / (now - logged_at))
            print(json.dumps({"step": step, "lr": lr, "ce": ce, "kl": kl, "grad_norm": norm.item(),
                              "tokens_per_s": tokens_per_s}), file=log, flush=True)
            bar.set_postfix_str(f"ce {ce:.3f}", refresh=False)
            last_logged = step + 1
            logged_at = now
        if saving:
            save_file(f"{config.out}/state.pt", {
                "step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "log_size": os.path.getsize(log.name)})
            saved_at = now

    log.close()
    if rank == 0:
        save_checkpoint(path, model, settings=settings)
        Path(config.out, "state.pt").unlink(missing_ok=True)
    if world > 1:
        dist.barrier()                                       # the checkpoint is there for every rank
        dist.destroy_process_group()
    return path


def learning_rate(config, step):
    """Linear warm-up to the peak, then a cosine down to min_lr times the peak."""
    peak = config.lr or 0.384 / SIZES[config.size]["n_embd"]
    warmup = max(1, int(config.warmup * config.steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (config.steps - warmup)
    return peak * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def get_batch(batches, i, rank, world, device):
    """Batch i on the device -> inputs and labels, (B, T) each; with several ranks, this rank's part of it."""
    x, y = (part[rank::world].contiguous() for part in batches[i])
    if device.type == "cuda":                                # from pinned memory the copy does not wait
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def make_optimizer(config, model):
    """AdamW, with weight decay on matrices only, as in GPT-2's successors."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=decayed[0].device.type in ("cpu", "cuda"))


def load_teacher(config, meta, device):
    """-> the frozen teacher and its identity, a name and a hash of the weights; (None, None) without one."""
    if not config.teacher:
        return None, None
    if config.teacher.endswith(".pt") or os.path.isfile(config.teacher):
        teacher, extra = load_checkpoint(config.teacher, device, meta["tokenizer"])
        name = extra["settings"]["size"]
    else:
        from extras.hf import ForeignTeacher
        name = config.teacher
        teacher = ForeignTeacher(name, config.data, meta["vocab_size"]).to(device)
    if teacher.config.block_size < config.block_size and not teacher.config.counts:
        raise UserError(f"--block_size {config.block_size} exceeds the teacher's {teacher.config.block_size}")
    digest = hashlib.sha256()
    for tensor in teacher.state_dict().values():
        digest.update(tensor.float().cpu().contiguous().numpy())
    return teacher.eval().requires_grad_(False), {"name": name, "weights": digest.hexdigest()}


# ---- what is refused, and what is resumed -------------------------------------

def check(config, vocab_size):
    """Refuse settings that make no sense."""
    limits = dict(alpha=(0, 1), seed=(0, 2**63 - 1), temperature=(0.001, math.inf), lr=(0, math.inf),
                  top_k=(0, math.inf), batch_size=(1, math.inf), block_size=(1, math.inf),
                  accumulate=(1, math.inf), log_every=(1, math.inf))
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:                         # refuses NaN too
            raise UserError(f"--{name} must be from {low} to {high}, not {value}")
    if config.alpha and not config.teacher:
        raise UserError("--alpha above 0 needs a --teacher")
    if config.teacher and not config.alpha:
        raise UserError("a --teacher has no effect at alpha 0: try 0.25")
    if config.steps < 1:
        raise UserError(f"--tokens {config.tokens} is less than a step of {config.tokens_per_step}")
    if config.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError(f"--batch_size {config.batch_size} is not divisible by the number of ranks")
    if "counts" in SIZES[config.size]:
        if config.teacher:
            raise UserError(f"--size {config.size} takes no teacher")
        if vocab_size > 4096:                                # a table holds the square of that
            raise UserError(f"--size {config.size} needs a vocabulary of at most 4096: use a network (in "
                            "sweep.py: --teachers)")


def recipe(config, meta, dtype):
    """What determines a model besides its size, tokens, seed, alpha and teacher, up to rounding."""
    names = ("temperature", "top_k", "batch_size", "block_size", "accumulate", "lr", "min_lr", "warmup",
             "weight_decay", "grad_clip", "fused")           # fused, as people edit the plain loss
    return {"corpus": meta["fingerprint"], "tokenizer": meta["tokenizer"], "dtype": str(dtype),
            **{name: getattr(config, name) for name in names}}


def open_folder(out, settings):
    """Make the folder -> path of the checkpoint. Raises UserError if it holds a run with other settings."""
    text, known = json.dumps(settings, indent=1), Path(out, "settings.json")
    if Path(out, "ckpt.pt").exists() or Path(out, "state.pt").exists():
        if not known.exists() or known.read_text() != text:
            raise UserError(f"{out} holds a run with other settings: choose another --out, or delete it")
    else:
        os.makedirs(out, exist_ok=True)
        known.write_text(text)
    return f"{out}/ckpt.pt"


def resume(out, model, optimizer, scaler):
    """Load the saved state, if there is one -> the step to start from, and how long the log was."""
    path = f"{out}/state.pt"
    if not os.path.exists(path):
        return 0, 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    except Exception as e:                                   # torch raises many kinds
        raise UserError(f"{path} is damaged ({type(e).__name__}): delete it to start anew") from None
    return state["step"], state["log_size"]


def join_ranks(device, first_step):
    """Connect torchrun's ranks, which must start from the same step."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    steps = torch.tensor([first_step, -first_step], device=device)
    dist.all_reduce(steps, dist.ReduceOp.MAX)
    if steps[0] != -steps[1]:
        raise UserError("the ranks would resume from different steps: --out must be a folder they all share")


def stop_if_nan(model, scaler, when):
    """NaN stays in weights, and float16's scale falls: so it is enough to look now and then."""
    finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    if not finite or scaler.get_scale() < 1:
        raise UserError(f"the loss is NaN or inf ({when}): lower --lr or check the data; if a teacher "
                        "overflows in float16, try --dtype bfloat16 or float32. Choose another --out")


# ------------------------------------------------------------------------------
# From here to the command line, only speed: the same results but for rounding, in less time and memory.
#
# The fused loss, with its gradient by hand. For one token let p = softmax(z), r = softmax(z/tau), q the
# constant softmax(t/tau), and e the one-hot label. One fact is enough: the gradient of log sum exp(z) is p.
#     CE = log sum exp(z) - z_y,                                            so  dCE/dz = p - e
#     KL = sum q log q - sum q z/tau + log sum exp(z/tau),  with sum q = 1, so  dKL/dz = (r - q) / tau
#     dz = (1 - alpha) (p - e) + alpha tau (r - q),  which at tau = 1 is p - (1 - alpha) e - alpha q
# divided by N, as the loss is a mean over N tokens; through z = h W^T:  dh = dz W  and  dW = dz^T h.
# (tau^2: for large tau dKL/dz shrinks as 1/tau^2, once by 1/tau, once because r - q does; tau^2 restores it.)

CHUNK_TOKENS = 256                   # tokens in a chunk on a CPU: at a vocabulary of 512 it fits the cache
CHUNK_BYTES = 2**29                  # of logits on a GPU: large, as every chunk reads and writes all of dW


def chunk_loss(z, t, y, alpha, temperature):
    """
    Logits z (N, V) and t (N, V) or None, labels y (N,), alpha a scalar tensor, 0 where t is None -> the sums
    over tokens of ce and kl, and the gradient dz (N, V) in z's dtype.
    """
    dtype, z = z.dtype, z.float()
    log_p = z.log_softmax(-1)
    ce, kl, dz = -log_p.gather(-1, y[:, None]).sum(), z.new_zeros(()), log_p.exp()
    if t is not None:
        log_q = (t.float() / temperature).log_softmax(-1)
        log_r = log_p if temperature == 1 else (z / temperature).log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_r)).sum()
        dz = (1 - alpha) * dz + alpha * temperature * (log_r.exp() - log_q.exp())
    label = y[:, None] == torch.arange(z.size(-1), device=z.device)          # one-hot; scatter does not fuse
    return ce, kl, (dz - (1 - alpha) * label).to(dtype)


class FusedLoss(torch.autograd.Function):
    """distill_loss by chunks of tokens: head, loss and gradient in one pass; one chunk of z exists."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, alpha, teacher_logits, temperature, top_k, chunk_fn):
        device = hidden.device
        h, w, y = hidden.flatten(0, -2), weight, targets.flatten()           # (N, C), (V, C), (N,)
        if torch.is_autocast_enabled(device.type):           # products in low precision, the rest in float32
            low = torch.get_autocast_dtype(device.type)
            h, w = h.to(low), w.to(low)
        N, V = len(y), len(w)
        chunks = N / CHUNK_TOKENS if device.type == "cpu" else N * V * 4 / CHUNK_BYTES
        rows = math.ceil(N / math.ceil(chunks))              # of about equal length
        alpha = alpha if teacher_logits is not None else 0.0
        alpha_tensor = torch.full((), alpha, device=device)  # a float would be recompiled for each value
        z_buffer = h.new_empty(rows, V)                      # for all chunks: allocating each is 20 % slower
        dh, dw = torch.empty_like(h), torch.zeros_like(weight)
        ce, kl = 0.0, 0.0
        with torch.autocast(device.type, enabled=False):
            for start in range(0, N, rows):
                part = slice(start, min(start + rows, N))
                z = torch.mm(h[part], w.T, out=z_buffer[:part.stop - start])                 # (n, V)
                t = None
                if teacher_logits is not None:
                    t = keep_top_k(teacher_logits.flatten(0, -2)[part], top_k)
                ce_sum, kl_sum, dz = chunk_fn(z, t, y[part], alpha_tensor, temperature)
                ce, kl = ce + ce_sum, kl + kl_sum
                torch.mm(dz, w, out=dh[part])
                dw += dz.T @ h[part]                         # the sum over chunks is in float32
        ce, kl = ce / N, kl / N
        ctx.save_for_backward(dh.view_as(hidden).to(hidden.dtype), dw)
        ctx.N = N
        ctx.mark_non_differentiable(ce, kl)
        return (1 - alpha) * ce + alpha * temperature**2 * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, *_):                             # already computed: just scale it
        dh, dw = ctx.saved_tensors
        return dh * (grad / ctx.N), dw * (grad / ctx.N), *[None] * 6


def distill_loss(hidden, weight, targets, alpha, teacher_logits=None, temperature=1.0, top_k=0,
                 chunk_fn=chunk_loss):
    """
    distill_loss_reference in its fast form: same arguments, same results; chunk_fn may be compiled. In
    bfloat16 either form rounds logits to 8 bits, which shows where student and teacher nearly agree.
    """
    return FusedLoss.apply(hidden, weight, targets, alpha, teacher_logits, temperature, top_k, chunk_fn)


def fast_functions(config, model, teacher, device):
    """-> model.hidden, teacher.forward (None without one) and the loss, compiled and fused as config says."""
    maybe_compile = compiler(device) if config.compile else lambda function: function
    fused_loss = functools.partial(distill_loss, chunk_fn=maybe_compile(chunk_loss))
    return (maybe_compile(model.hidden), maybe_compile(teacher.forward) if teacher else None,
            fused_loss if config.fused else distill_loss_reference)


@functools.cache
def compiler(device):
    """-> torch.compile, or the identity, with one warning, where it does not work."""
    limits = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
    setattr(limits, name, 64)                                # 8 is too few: a worker compiles many models
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
        return functools.partial(torch.compile, dynamic=False)
    except Exception as e:                                   # no compiler, a broken one, no Triton
        why = (str(e).partition("Output:\n")[2] or str(e).partition(" raised:\n")[2] or str(e)).split("\n")[0]
        print(f"torch.compile does not work here ({type(e).__name__}: {why}); using eager mode, which is "
              "slower", file=sys.stderr)
        return lambda function: function


# ---- the command line --------------------------------------------------------

def true_or_false(text):
    """'true' -> True, 'false' -> False."""
    return ("false", "true").index(text) == 1                # a ValueError for anything else


def parse_config(argv=None):
    """Command line -> Config."""
    parser = make_parser(f"{__doc__}\nFlags, with their defaults:\n\n{inspect.getsource(Config)}")
    kinds = {int: whole_number, float: float, str: os.path.expanduser, bool: true_or_false}
    choices = {"size": SIZES, "dtype": ("auto", "float32", "bfloat16", "float16")}
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=kinds[f.type], default=f.default, choices=choices.get(f.name),
                            help=argparse.SUPPRESS)
    return Config(**vars(parser.parse_args(argv)))


def main():
    """Train what the command line asks for, and print where it is saved."""
    start, config = time.perf_counter(), parse_config()
    finished = os.path.exists(f"{config.out}/ckpt.pt")
    path = train(config)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if finished:
        print(f"{path} was finished before: delete {config.out} to train again", file=sys.stderr)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; next: {shlex.join(['python', 'eval.py', path, '--data', config.data])}")


if __name__ == "__main__":
    run_main(main)

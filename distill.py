"""
The loss and the training loop. A teacher is a run with alpha = 0; a student is a run with a teacher.

    python data.py                                                     # once: text -> data/python
    python distill.py --size xs --tokens 2M --seed 1001 --out out/xs   # a (weak) teacher
    python distill.py --size s --teacher out/xs/ckpt.pt --alpha 0,0.25,1 --out out/taught
    torchrun --nproc_per_node=8 distill.py --data data/fineweb-edu --size 350M ...     # 8 GPUs share a batch

For a token with label y, student logits z, teacher logits t and temperature T (T = 1 in the paper)

    loss = (1 - alpha) * CE(z, y)  +  alpha * T^2 * KL( softmax(t/T) || softmax(z/T) )

Several alphas train that many students side by side, on the same batches, with one teacher forward for all.
The same command after an interruption goes on from the last saved state, and repeats nothing that is done.
Reads the corpus folder of data.py; writes below --out: ckpt.pt (with several alphas alpha_A/ckpt.pt),
log.jsonl, and state.pt while the run is unfinished.

"Strong Teacher Not Needed? On Distillation in LLM Pretraining", arXiv 2605.23857; Hinton et al., 1503.02531.
"""
import functools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import Batches, UserError, count, load_meta, make_parser, run
from model import (GPT, SIZES, GPTConfig, autocast, flops_per_token, load_checkpoint, load_whole, pick_device,
                   save_checkpoint, save_whole)


# ------------------------------------------------------------------------------
# every knob; each is a --flag of the same name

def fractions(text):
    """'0,0.25' -> (0.0, 0.25). Raises ValueError."""
    return tuple(float(part) for part in text.split(","))


def true_or_false(text):
    """'true' -> True, 'false' -> False. Raises ValueError."""
    return bool(("false", "true").index(text.lower()))


def knob(default, text, kind=None):
    """A field of Config: its default, its help text, and what reads it from a word of the command line."""
    return field(default=default, metadata={"help": text, "kind": kind or type(default)})


@dataclass
class Config:
    """All there is to set. Raises UserError where it does not fit together."""
    data: str = knob("data/python", "corpus folder made by data.py")
    out: str = knob("out/run", "folder for checkpoints and the log")
    size: str = knob("s", f"shape of the model, one of {' '.join(SIZES)}")
    tokens: int = knob(3 * 2**19, "training tokens; K, M and B are 2^10, 2^20 and 2^30", count)
    seed: int = knob(1, "seed of the initial weights and of the order of the data")
    teacher: str = knob("", "checkpoint of the teacher; none: plain pretraining")
    alpha: tuple = knob((0.0,), "weight of distillation, 0 (plain pretraining) to 1 (pure distillation); "
                        "several, with commas, train one student each", fractions)
    temperature: float = knob(1.0, "temperature of both distributions in the distillation term")
    top_k: int = knob(0, "keep the teacher's k likeliest tokens (1: hard labels); 0: all of them")
    batch_size: int = knob(8, "sequences in a batch")
    block_size: int = knob(128, "tokens in a sequence")
    accumulate: int = knob(1, "batches whose gradients add up to one step")
    lr: float = knob(0.0, "peak learning rate; 0: 0.384 / width, found on the laptop sizes, 6e-3 for s")
    min_lr: float = knob(0.1, "final learning rate, as a fraction of the peak")
    warmup: float = knob(0.4, "fraction of the steps in which the learning rate rises; a cosine follows")
    weight_decay: float = knob(0.1, "AdamW's decay, of matrices only")
    beta1: float = knob(0.9, "AdamW's decay of the mean gradient")
    beta2: float = knob(0.95, "AdamW's decay of the mean squared gradient")
    grad_clip: float = knob(1.0, "largest norm of the gradient")
    device: str = knob("auto", "cpu, cuda, cuda:1, mps ...; auto: cuda where there is one, else cpu")
    dtype: str = knob("auto", "of matrix products, float32, bfloat16 or float16; auto: float32, on CUDA "
                      "bfloat16, or float16 on a GPU without it")
    fused: bool = knob(True, "use the fused loss; false: the plain one, the place for changes", true_or_false)
    compile: bool = knob(True, "use torch.compile; false: eager, no C++ compiler needed", true_or_false)
    log_every: int = knob(50, "steps between lines of log.jsonl")
    save_every: float = knob(120.0, "seconds between saved states, from which an interrupted run goes on")

    def __post_init__(self):
        for ok, what in (
                (self.size in SIZES, f"--size must be one of {' '.join(SIZES)}, not {self.size}"),
                (all(0 <= a <= 1 for a in self.alpha),
                 f"--alpha takes numbers from 0 to 1, as in 0,0.25,1, not {self.alpha}"),
                (len({*self.alpha}) == len(self.alpha), f"--alpha names a value twice: {self.alpha}"),
                (self.teacher or not any(self.alpha), "--alpha above 0 needs a --teacher"),
                (any(self.alpha) or not self.teacher, "a --teacher teaches nothing at alpha 0: try 0.25"),
                (min(self.batch_size, self.block_size, self.accumulate, self.log_every, self.temperature) > 0,
                 "batch_size, block_size, accumulate, log_every and temperature must be above 0"),
                (min(self.seed, self.top_k, self.lr, self.warmup) >= 0,
                 "seed, top_k, lr and warmup must not be negative"),
                (self.dtype in ("auto", "float32", "bfloat16", "float16"), f"no --dtype {self.dtype}"),
                (self.steps > 0, f"--tokens {self.tokens} is less than one step of {self.tokens_per_step}")):
            if not ok:
                raise UserError(what)
        self.lr = self.lr or 0.384 / SIZES[self.size]["n_embd"]

    @property
    def tokens_per_step(self):
        return self.batch_size * self.block_size * self.accumulate

    @property
    def steps(self):
        return self.tokens // max(1, self.tokens_per_step)


# ------------------------------------------------------------------------------
# the loss

def keep_top_k(logits, k):
    """Teacher logits (N, V) of which all but the k likeliest are out of the race; k = 0: as they are."""
    if logits is None or not k:
        return logits
    kept = logits.topk(min(k, logits.size(-1)), dim=-1)
    return torch.full_like(logits, -1e9).scatter(-1, kept.indices, kept.values)   # not -inf: 0 * log 0 is 0


def distill_loss_reference(hidden, weight, targets, alpha, teacher_hidden=None, teacher_weight=None,
                           temperature=1.0, top_k=0):
    """
    The objective at the top of this file, averaged over tokens, in nats: the plain form.

    hidden (B, T, C), weight (V, C)                   the student's final states and output head
    targets (B, T)                                    the labels
    teacher_hidden (B, T, C'), teacher_weight (V, C') the teacher's, which get no gradient; neither: plain
                                                      cross-entropy; no weight: logits (B, T, V) instead
    -> loss, ce, kl with loss = (1 - alpha) ce + alpha temperature^2 kl; only loss carries a gradient
    """
    logits = (hidden @ weight.T).float().flatten(0, -2)                      # (B*T, V)
    ce = F.cross_entropy(logits, targets.flatten())
    if teacher_hidden is None:
        return ce, ce.detach(), torch.zeros_like(ce)
    teacher_logits = teacher_hidden if teacher_weight is None else teacher_hidden @ teacher_weight.T
    teacher_logits = keep_top_k(teacher_logits.detach().float().flatten(0, -2), top_k)   # (B*T, V)
    log_q = F.log_softmax(teacher_logits / temperature, dim=-1)              # teacher
    log_r = F.log_softmax(logits / temperature, dim=-1)                      # student
    kl = (log_q.exp() * (log_q - log_r)).sum(-1).mean()
    loss = (1 - alpha) * ce + alpha * temperature**2 * kl
    return loss, ce.detach(), kl.detach()


# ------------------------------------------------------------------------------
# the same loss, fused: what training runs by default, equal up to rounding
#
# The gradient by hand. For one token let p = softmax(z), r = softmax(z/T), q = softmax(t/T), a constant, and
# e the one-hot label. All it takes is that log sum exp(z) has the gradient softmax(z):
#     CE = log sum exp(z) - z_y,                                        so  dCE/dz = p - e
#     KL = sum q log q - sum q z/T + log sum exp(z/T),  with sum q = 1, so  dKL/dz = (r - q) / T
#     dz = (1 - alpha) (p - e) + alpha T (r - q),  which at T = 1 is p - (1 - alpha) e - alpha q
# divided by N, as the loss is a mean over N tokens; through z = h W^T:  dh = dz W  and  dW = dz^T h.
# (T^2 is there because r - q shrinks as 1/T as well when T grows: so the gradient keeps its size.)

CHUNK_TOKENS = 256                   # whose logits are held at once on a CPU: at 512 words they fit a cache
CHUNK_BYTES = 2**29                  # of logits on a GPU: every chunk moves the whole gradient of the head


def chunk_loss(z, t, y, alpha, temperature):
    """
    Logits z (N, V) and t (N, V) or None, labels y (N,), alpha a tensor -> the sums over tokens of ce and kl.
    Puts the gradient dz into z.
    """
    z_norm = z.logsumexp(-1, keepdim=True)                   # p = exp(z - z_norm)
    ce = (z_norm - z.gather(-1, y[:, None])).sum()
    if t is None:
        z.copy_((z - z_norm).exp())
        z.scatter_add_(-1, y[:, None], torch.full_like(z_norm, -1.0))
        return ce, torch.zeros_like(ce)
    z_T, t_T = (z, t) if temperature == 1 else (z / temperature, t / temperature)
    r_norm = z_norm if temperature == 1 else z_T.logsumexp(-1, keepdim=True)
    q_norm = t_T.logsumexp(-1, keepdim=True)
    p, q, r = (z - z_norm).exp(), (t_T - q_norm).exp(), (z_T - r_norm).exp()
    kl = (q * (t_T - q_norm - z_T + r_norm)).sum()
    z.copy_((1 - alpha) * p + alpha * temperature * (r - q))
    z.scatter_add_(-1, y[:, None], (alpha - 1) * torch.ones_like(z_norm))
    return ce, kl


class FusedLoss(torch.autograd.Function):
    """distill_loss by chunks of tokens: heads, loss and gradient in one pass; z never exceeds a chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, alpha, teacher_hidden, teacher_weight, temperature, top_k,
                chunk_fn):
        device, h, w, y = hidden.device, hidden.flatten(0, -2), weight, targets.flatten()
        th, tw = teacher_hidden.flatten(0, -2) if teacher_hidden is not None else None, teacher_weight
        alpha = alpha if th is not None else 0.0
        alpha_t = torch.full((), alpha, device=device)       # a number would be compiled anew for each value
        if torch.is_autocast_enabled(device.type):           # products in low precision, the rest in float32
            low = torch.get_autocast_dtype(device.type)
            h, w, th, tw = (x if x is None else x.to(low) for x in (h, w, th, tw))
        dh, dw, ce, kl = torch.empty_like(h), torch.zeros_like(weight), 0.0, 0.0
        rows = CHUNK_TOKENS if device.type == "cpu" else max(1, CHUNK_BYTES // (4 * len(w)))
        # every chunk's logits go into the same memory: asking for new pages each time takes a fifth longer
        z_all, t_all = (h.new_empty(min(rows, len(y)), len(x)) for x in (w, () if tw is None else tw))
        with torch.autocast(device.type, enabled=False):
            for i in range(0, len(y), rows):
                part = slice(i, i + rows)
                n = len(y[part])
                z = torch.mm(h[part], w.T, out=z_all[:n]).float()
                t = None if th is None else th[part].float()
                if tw is not None:
                    t = torch.mm(th[part], tw.T, out=t_all[:n]).float()
                ce_part, kl_part = chunk_fn(z, keep_top_k(t, top_k), y[part], alpha_t, temperature)
                dz, ce, kl = z.to(h.dtype), ce + ce_part, kl + kl_part
                torch.mm(dz, w, out=dh[part])
                if dw.dtype == dz.dtype:
                    dw.addmm_(dz.T, h[part])
                else:                                        # many small sums would be lost in low precision
                    dw += dz.T @ h[part]
        ctx.gradients, ctx.n = (dh.view_as(hidden), dw), len(y)
        ctx.dtypes = hidden.dtype, weight.dtype
        ce, kl = ce / len(y), kl / len(y)
        ctx.mark_non_differentiable(ce, kl)
        return (1 - alpha) * ce + alpha * temperature**2 * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, *_):                             # the gradient is there: scale it, and on it goes
        if ctx.gradients is None:
            raise RuntimeError("distill_loss allows one backward pass; distill_loss_reference allows more")
        dh, dw = (x.to(dtype).mul_(grad / ctx.n) for x, dtype in zip(ctx.gradients, ctx.dtypes))
        ctx.gradients = None
        return dh, dw, *[None] * 7


def distill_loss(hidden, weight, targets, alpha, teacher_hidden=None, teacher_weight=None, temperature=1.0,
                 top_k=0, chunk_fn=chunk_loss):
    """distill_loss_reference in its fast form: same arguments, same results; chunk_fn may be compiled."""
    return FusedLoss.apply(hidden, weight, targets, alpha, teacher_hidden, teacher_weight, temperature, top_k,
                           chunk_fn)


# ------------------------------------------------------------------------------
# the training loop

def learning_rate(config, step):
    """Linear warm-up to config.lr, then a cosine down to min_lr of it."""
    warmup = max(1, int(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Student:
    """A model in training, a teacher-to-be too: alpha, optimizer, and a loss scaler, for float16 only."""

    def __init__(self, shape, alpha, config, device, dtype):
        torch.manual_seed(config.seed)                       # every alpha starts from the same weights
        self.model = GPT(shape).to(device)
        self.hidden, self.head = self.model.hidden, self.model.lm_head.weight
        self.alpha, self.grad_clip = alpha, config.grad_clip
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay},
             {"params": vectors, "weight_decay": 0.0}],
            betas=(config.beta1, config.beta2), fused=device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def clip_and_step(self, lr):
        """One step of AdamW -> the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def average(tensors, world):
    """Replace tensors by their means over all ranks, in one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t) / world)


PEAK = 989e12                        # FLOP/s of an H100 in dense bfloat16, for MFU
PARTS = ("model", "optimizer", "scaler")                     # of a student, for its state


def train(config, on_step=None):
    """
    Train one student for each alpha of config -> paths of the checkpoints, one for each alpha.

    Repeats bit for bit on one CPU and thread count, killed in between or not. on_step is called with the
    tokens of each step, in place of a progress bar. Raises UserError or OSError.
    """
    device, dtype = pick_device(config.device, config.dtype)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    meta = load_meta(config.data)
    batches = Batches(f"{config.data}/train.bin", config.batch_size, config.block_size, config.seed)
    shape = GPTConfig(meta["vocab_size"], config.block_size, **SIZES[config.size])
    teacher, taught_by = load_teacher(config, meta, device)
    about = identity(config, dtype, meta, taught_by)
    paths = [checkpoint_path(config, alpha) for alpha in config.alpha]
    if finished(config, paths, about):
        if rank == 0:                                        # killed on its last line
            Path(config.out, "state.pt").unlink(missing_ok=True)
            if not on_step:
                print(f"{config.out} is finished already: nothing was trained")
        return paths
    if config.batch_size % world:
        raise UserError(f"--batch_size {config.batch_size} cannot be shared by {world} ranks")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    students = [Student(shape, alpha, config, device, dtype) for alpha in config.alpha]
    first_step, log = go_on(config, students, paths, about)
    # loss_fn is distill_loss; ask_teacher(x) gives what it takes of the teacher: its logits and None, or
    # where the vocabulary is large, its final states and its head
    fast, loss_fn, ask_teacher = fast_functions(config, device, teacher)
    for student in students:
        student.hidden = fast(student.model.hidden)
    taught_by_shape = replace(teacher.config, block_size=config.block_size) if teacher else None
    flops = flops_of(shape, config.alpha, taught_by_shape)                   # a token
    if config.tokens > len(batches.tokens) and not on_step and rank == 0:
        print(f"--tokens {config.tokens:,}: the {len(batches.tokens):,} of {config.data} are read "
              f"{config.tokens / len(batches.tokens):.1f} times")
    bar = tqdm(total=config.steps * config.tokens_per_step, initial=first_step * config.tokens_per_step,
               desc=f"{config.size} x {len(students)}", unit="tok", unit_scale=True,
               disable=True if on_step or rank else None)
    first_bad = torch.full((), config.steps, device=device)  # the first step with a loss that is no number
    saved_at = logged_at = time.time()
    logged = first_step

    for step in range(first_step, config.steps):
        losses = torch.zeros(len(students), 2, device=device)                # ce and kl, means over the step
        for micro in range(config.accumulate):
            x, y = (part[rank::world] for part in batches[step * config.accumulate + micro])
            if device.type == "cuda":                        # from pinned memory the copy does not wait
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with autocast(device, dtype):
                told = ask_teacher(x)                        # one teacher forward serves every student
            for i, student in enumerate(students):           # one student per alpha, on the same batch
                target = told if student.alpha else (None, None)
                with autocast(device, dtype):
                    loss, ce, kl = loss_fn(student.hidden(x), student.head, y, student.alpha, *target)
                student.scaler.scale(loss / config.accumulate).backward()
                losses[i] += torch.stack([ce, kl]) / config.accumulate
        lr = learning_rate(config, step)
        for student in students:
            if world > 1:                                    # every rank has worked on its rows of the batch
                average([p.grad for p in student.model.parameters()], world)
            norm = student.clip_and_step(lr)
            good = losses.isfinite().all() & (norm.isfinite() | student.scaler.is_enabled())
            first_bad = torch.where(good, first_bad, first_bad.clamp(max=step))
        (on_step or bar.update)(config.tokens_per_step)

        # the log, and a state to go on from; a step that writes neither does not wait for the GPU
        logging = step % config.log_every == 0 or step + 1 == config.steps
        saving = rank == 0 and step + 1 < config.steps and time.time() - saved_at > config.save_every
        if (logging or saving) and first_bad < config.steps:
            lr = learning_rate(config, first_bad.item())
            raise UserError(f"loss or gradient is no number since step {first_bad} (learning rate {lr:.3g}): "
                            "lower --lr, with another --out, or look at the data")
        if logging:
            if world > 1:
                average([losses], world)
            ce, kl = losses.T.round(decimals=5).tolist()
            speed = (step + 1 - logged) * config.tokens_per_step / (time.time() - logged_at)
            logged, logged_at = step + 1, time.time()
            line = {"step": step, "lr": lr, "alpha": config.alpha, "ce": ce, "kl": kl,
                    "tokens_per_s": round(speed), "flops_per_s": round(speed * flops)}
            shown = f"ce {ce[-1]:.3f}, {speed * flops / 1e9:,.1f} GFLOP/s"
            if device.type == "cuda":
                line["mfu"] = speed * flops / world / PEAK
                shown += f", {line['mfu']:.1%} of an H100"
            print(json.dumps(line), file=log, flush=True)
            bar.set_postfix_str(shown, refresh=False)
        if saving:
            save_whole(f"{config.out}/state.pt", {**about, "step": step + 1, "students": [
                {part: getattr(s, part).state_dict() for part in PARTS} for s in students]})
            saved_at = time.time()

    bar.close()
    log.close()
    if rank == 0:
        for student, path in zip(students, paths):
            save_checkpoint(path, student.model, **{**about, "alpha": student.alpha})
        Path(config.out, "state.pt").unlink(missing_ok=True)
    if world > 1:
        dist.barrier()                                       # the files are there for every rank
    return paths


# ------------------------------------------------------------------------------
# a run and its files

def load_teacher(config, meta, device):
    """-> the frozen teacher and what its checkpoint says of it, or None twice. Raises UserError, OSError."""
    if not config.teacher:
        return None, None
    teacher, its = load_checkpoint(config.teacher, device)
    if its.get("tokenizer") != meta["tokenizer"]:
        raise UserError(f"teacher and student must share a tokenizer, and {config.teacher} has not that of "
                        f"{config.data}")
    if teacher.config.block_size < config.block_size:
        raise UserError(f"--block_size {config.block_size} exceeds the teacher's {teacher.config.block_size}")
    return teacher.requires_grad_(False), its


def checkpoint_path(config, alpha):
    """Where the student of this alpha is saved at its end."""
    return f"{config.out}/ckpt.pt" if len(config.alpha) == 1 else f"{config.out}/alpha_{alpha:g}/ckpt.pt"


def identity(config, dtype, meta, taught_by):
    """What makes two runs the same run: everything but where and how it is run."""
    elsewhere = ("data", "out", "alpha", "device", "fused", "compile", "log_every", "save_every")
    settings = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    return {**settings, "alphas": config.alpha, "dtype": str(dtype), "teacher": taught_by,
            "corpus": meta["fingerprint"], "tokenizer": meta["tokenizer"]}


def finished(config, paths, about):
    """Whether all checkpoints are there. Raises UserError where --out holds another run's."""
    for path in (*Path(config.out).glob("ckpt.pt"), *Path(config.out).glob("alpha_*/ckpt.pt")):
        its = load_checkpoint(path)[1]
        if {**about, "alpha": its.get("alpha")} != its:
            raise UserError(f"{path} comes from a run with other settings: choose another --out")
    return all(map(os.path.exists, paths))


def go_on(config, students, paths, about):
    """Take up the state in --out, if there is one -> the first step, and the open log. Raises UserError."""
    first_step, lines = 0, []
    if os.path.exists(f"{config.out}/state.pt"):
        state = load_whole(f"{config.out}/state.pt")
        first_step, saved = state.pop("step"), state.pop("students")
        if state != about:
            raise UserError(f"{config.out} holds an unfinished run with other settings: choose another --out")
        for student, parts in zip(students, saved):
            for part in PARTS:
                getattr(student, part).load_state_dict(parts[part])
        with open(f"{config.out}/log.jsonl") as log:         # a kill may have left half a line
            lines = [line for line in log if line.endswith("\n") and json.loads(line)["step"] < first_step]
    if int(os.environ.get("RANK", 0)):
        return first_step, open(os.devnull, "w")
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(config.out, "log.jsonl.tmp").write_text("".join(lines))
    os.replace(f"{config.out}/log.jsonl.tmp", f"{config.out}/log.jsonl")
    return first_step, open(f"{config.out}/log.jsonl", "a")


# ------------------------------------------------------------------------------
# speed: what is computed stays the same, up to rounding

SHARED = 4096                        # vocabulary up to which students share the teacher's logits


def flops_of(shape, alphas, teacher_shape):
    """
    FLOPs a token of the students of all alphas and of their teacher: one forward pass for all, but above
    SHARED its head is computed for each student, since logits of that size are not kept.
    """
    flops = len(alphas) * flops_per_token(shape, backward=True)
    if teacher_shape:
        heads = sum(a > 0 for a in alphas) if shape.vocab_size > SHARED else 1
        flops += flops_per_token(teacher_shape) + (heads - 1) * 2 * shape.vocab_size * teacher_shape.n_embd
    return flops


@functools.cache
def compiler_works(device):
    """Whether torch.compile can build code here; where it cannot, says so once."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
        return True
    except Exception as e:                                   # no compiler, a broken one, no Triton
        print(f"torch.compile does not work here ({type(e).__name__}; it needs a C++ compiler, on a GPU "
              "Triton): going on in eager mode, which is slower", file=sys.stderr)
        return False


def fast_functions(config, device, teacher):
    """
    -> what makes a function fast; the loss; and a function of idx that gives what the loss takes of the
    teacher: logits where they are small, computed once for all students, or else final states and the head.
    """
    fast = lambda f: f
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")           # TF32 where autocast leaves float32
    if config.compile and compiler_works(device):
        torch._dynamo.config.cache_size_limit = 64           # a run has one shape, a process many runs
        fast = functools.partial(torch.compile, dynamic=False)
    loss_fn = distill_loss_reference
    if config.fused:
        loss_fn = functools.partial(distill_loss, chunk_fn=fast(chunk_loss))
    loss_fn = functools.partial(loss_fn, temperature=config.temperature, top_k=config.top_k)
    if teacher is None:
        return fast, loss_fn, lambda idx: (None, None)
    small = teacher.config.vocab_size <= SHARED
    forward = fast(teacher.forward if small else teacher.hidden)
    head = None if small else teacher.lm_head.weight
    return fast, loss_fn, torch.no_grad()(lambda idx: (forward(idx), head))


# ------------------------------------------------------------------------------
# the command line

def parse_config(argv=None):
    """Command line -> Config, every field of which is a flag."""
    parser = make_parser(__doc__)
    for f in fields(Config):
        default = ",".join(f"{a:g}" for a in f.default) if f.name == "alpha" else f.default
        parser.add_argument(f"--{f.name}", type=f.metadata["kind"], default=f.default, metavar=f.name.upper(),
                            help=f"{f.metadata['help']} (default: {'none' if default == '' else default})")
    return Config(**vars(parser.parse_args(argv)))


def main():
    """Train what the command line asks for, and print where it lies."""
    start, paths = time.time(), train(parse_config())
    if dist.is_initialized():
        dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{time.time() - start:.0f} s; next: python eval.py {' '.join(paths)}")


if __name__ == "__main__":
    run(main)

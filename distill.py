"""
The loss and the training loop. A teacher is a run with alpha = 0; a student is a run with a teacher.

    python data.py                                                     # once: text -> data/python
    python distill.py --size xs --tokens 2M --seed 1001 --out out/xs   # a (weak) teacher
    python distill.py --size s --teacher out/xs/ckpt.pt --alpha 0,0.25,1 --out out/taught
    torchrun --nproc_per_node=8 distill.py --data data/fineweb-edu --size 350M ...     # 8 GPUs share a batch

For a token with label y, student logits z, teacher logits t and temperature T (T = 1 in the paper)

    loss = (1 - alpha) * CE(z, y)  +  alpha * T^2 * KL( softmax(t/T) || softmax(z/T) )

Several alphas train that many students side by side, on the same batches, with one teacher forward for all.
Interrupted, the same command resumes from the last saved state. Reads the corpus folder of data.py. Writes
below --out: ckpt.pt (with several alphas alpha_A/ckpt.pt), log.jsonl, and state.pt while it is unfinished.

"Strong Teacher Not Needed? On Distillation in LLM Pretraining", arXiv 2605.23857; Hinton et al., 1503.02531.
"""
import argparse
import functools
import inspect
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import Batches, UserError, load_meta, make_parser, run_main, whole_number
from model import (GPT, SIZES, GPTConfig, autocast, flops_per_token, load_checkpoint, load_file, pick_device,
                   save_checkpoint, save_file)


@dataclass
class Config:
    data: str = "data/python"     # corpus folder made by data.py
    out: str = "out/run"          # folder for checkpoints and the log
    size: str = "s"               # shape of the model, a name in model.SIZES
    tokens: int = 1_500_000       # training tokens, in whole steps; K, M and B are 10^3, 10^6 and 10^9
    seed: int = 1                 # of the initial weights and of the order of the data
    teacher: str = ""             # checkpoint of the teacher; none: plain pretraining
    alpha: tuple = (0.0,)         # weight of distillation, 0 to 1; 0,0.25,1 trains three students at once
    temperature: float = 1.0      # of both distributions in the distillation term
    top_k: int = 0                # keep the teacher's k likeliest tokens (1: hard labels); 0: all of them
    batch_size: int = 8           # sequences in a batch
    block_size: int = 128         # tokens in a sequence
    accumulate: int = 1           # batches whose gradients add up to one step
    lr: float = 0.0               # peak learning rate; 0: 0.384 / width, found on the laptop sizes
    min_lr: float = 0.1           # final learning rate, as a fraction of the peak
    warmup: float = 0.4           # fraction of the steps in which the rate rises; a cosine follows
    weight_decay: float = 0.1     # of matrices only
    beta1: float = 0.9            # AdamW's decay of the mean gradient
    beta2: float = 0.95           # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0        # largest norm of the gradient
    device: str = "auto"          # cpu, cuda, cuda:1, mps ...; auto: cuda where there is one, else cpu
    dtype: str = "auto"           # float32, bfloat16, float16 products; auto: float32, on CUDA bfloat16
    fused: bool = True            # the fused loss; false: the plain one, the place for changes
    compile: bool = True          # torch.compile; false: eager mode, which needs no C++ compiler
    log_every: int = 50           # steps between lines of log.jsonl
    save_every: float = 120.0     # seconds between saved states, from which an interrupted run resumes

    @property
    def tokens_per_step(self):
        return self.batch_size * self.block_size * self.accumulate

    @property
    def steps(self):
        return self.tokens // self.tokens_per_step


# ------------------------------------------------------------------------------
# the loss, in its plain form

def keep_top_k(logits, k):
    """Teacher logits (N, V) with all but the k largest pushed to -1e9; k = 0: as they are."""
    if logits is None or not k:
        return logits
    kept = logits.topk(min(k, logits.size(-1)), dim=-1)
    return torch.full_like(logits, -1e9).scatter(-1, kept.indices, kept.values)   # not -inf: 0 * log 0 is 0


def distill_loss_reference(hidden, weight, targets, alpha, teacher_hidden=None, teacher_weight=None,
                           temperature=1.0, top_k=0):
    """
    The objective at the top of this file, a mean over tokens, in nats.

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
# the training loop

def learning_rate(config, step):
    """Linear warm-up to the peak, then a cosine down to min_lr of it."""
    peak = config.lr or 0.384 / SIZES[config.size]["n_embd"]
    warmup = max(1, int(config.warmup * config.steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return peak * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Student:
    """A model in training, with its alpha, its optimizer and a loss scaler, which float16 needs."""

    def __init__(self, shape, alpha, config, device, dtype):
        torch.manual_seed(config.seed)                       # every alpha starts from the same weights
        self.alpha, self.model = alpha, GPT(shape).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay},
             {"params": vectors, "weight_decay": 0.0}],
            betas=(config.beta1, config.beta2), fused=device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def train(config, show_progress=True):
    """
    Train one student for each alpha of config -> paths of the checkpoints, one for each alpha.

    Repeats bit for bit on one CPU and thread count, killed in between or not. Raises UserError or OSError.
    """
    check(config)
    device, dtype = pick_device(config.device, config.dtype)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    meta = load_meta(config.data)
    batches = Batches(f"{config.data}/train.bin", config.batch_size, config.block_size, config.seed)
    teacher, teacher_settings = load_teacher(config, meta, device)
    settings = settings_of_run(config, dtype, meta, teacher_settings)
    paths = [checkpoint_path(config, alpha) for alpha in config.alpha]
    check_folder(config.out, settings)
    if all(map(os.path.exists, paths)):                      # finished, perhaps killed on its last line
        Path(config.out, "state.pt").unlink(missing_ok=True)
        return paths
    if config.batch_size % world:
        raise UserError(f"--batch_size {config.batch_size} cannot be shared by {world} ranks")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")           # TF32 where autocast leaves float32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    shape = GPTConfig(meta["vocab_size"], config.block_size, **SIZES[config.size])
    students = [Student(shape, alpha, config, device, dtype) for alpha in config.alpha]
    first_step, log = resume(config, students, paths)
    fast = compiler(device) if config.compile else lambda function: function
    student_forwards = [fast(student.model.hidden) for student in students]
    loss_fn = functools.partial(distill_loss, chunk_fn=fast(chunk_loss))
    if not config.fused:
        loss_fn = distill_loss_reference
    if teacher and shape.vocab_size <= SHARED_VOCAB:         # small logits are computed once for all students
        teacher_forward, teacher_head = fast(teacher.forward), None
    elif teacher:
        teacher_forward, teacher_head = fast(teacher.hidden), teacher.lm_head.weight
    flops_a_token = len(students) * flops_per_token(shape, backward=True)
    if teacher:
        flops_a_token += flops_per_token(teacher.config)
    bar = tqdm(total=config.steps, initial=first_step, desc=f"{config.size} x {len(students)}", unit="step",
               disable=None if show_progress and rank == 0 else True)
    bad_step = torch.full((), config.steps, device=device)   # the first step with a loss of NaN or inf
    saved_at = logged_at = time.time()
    last_logged = first_step

    for step in range(first_step, config.steps):
        losses = torch.zeros(len(students), 2, device=device)                # ce and kl, means over the step
        share = 1 / config.accumulate / world                # of a batch and rank in a step
        for micro in range(config.accumulate):
            x, y = (part[rank::world] for part in batches[step * config.accumulate + micro])   # (B, T) each
            if device.type == "cuda":                        # from pinned memory the copy does not wait
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if teacher:                                      # one teacher forward serves every student
                with torch.no_grad(), autocast(device, dtype):
                    teacher_hidden = teacher_forward(x)      # (B, T, C'), or logits (B, T, V)
            for i, student in enumerate(students):           # one student per alpha, on the same batch
                target = (teacher_hidden, teacher_head) if student.alpha else (None, None)
                with autocast(device, dtype):
                    hidden = student_forwards[i](x)          # (B, T, C)
                    loss, ce, kl = loss_fn(hidden, student.model.lm_head.weight, y, student.alpha, *target,
                                           config.temperature, config.top_k)
                student.scaler.scale(loss * share).backward()
                losses[i] += share * torch.stack([ce, kl])
        lr = learning_rate(config, step)
        for student in students:
            if world > 1:                                    # every rank has worked on its rows of the batch
                for p in student.model.parameters():
                    dist.all_reduce(p.grad)
            for group in student.optimizer.param_groups:
                group["lr"] = lr
            student.scaler.unscale_(student.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), config.grad_clip)
            student.scaler.step(student.optimizer)
            student.scaler.update()
            student.optimizer.zero_grad(set_to_none=True)
            finite = losses.isfinite().all() & (norm.isfinite() | student.scaler.is_enabled())
            bad_step = torch.where(finite, bad_step, bad_step.clamp(max=step))
        bar.update()

        # the log and the saved state; a step that writes neither does not wait for the GPU
        logging = step % config.log_every == 0 or step + 1 == config.steps
        saving = rank == 0 and step + 1 < config.steps and time.time() - saved_at > config.save_every
        if (logging or saving) and bad_step < config.steps:
            lr = learning_rate(config, bad_step.item())
            raise UserError(f"the loss became NaN or inf at step {bad_step} (learning rate {lr:.3g}): "
                            "lower --lr, with another --out, or look at the data")
        if logging:
            if world > 1:
                dist.all_reduce(losses)
            ce, kl = losses.T.round(decimals=5).tolist()
            tokens = (step + 1 - last_logged) * config.tokens_per_step
            tokens_per_s = tokens / (time.time() - logged_at)
            last_logged, logged_at = step + 1, time.time()
            mfu = tokens_per_s * flops_a_token / world / H100_FLOPS
            print(json.dumps({"step": step, "lr": lr, "alpha": config.alpha, "ce": ce, "kl": kl,
                              "tokens_per_s": round(tokens_per_s), "mfu": mfu}), file=log, flush=True)
            bar.set_postfix_str(f"ce {ce[-1]:.3f}, {mfu:.1%} of an H100", refresh=False)
        if saving:
            parts = [[part.state_dict() for part in (s.model, s.optimizer, s.scaler)] for s in students]
            save_file(f"{config.out}/state.pt", {"settings": settings, "step": step + 1, "students": parts})
            saved_at = time.time()

    bar.close()
    log.close()
    if rank == 0:
        for student, path in zip(students, paths):
            save_checkpoint(path, student.model, alpha=student.alpha, settings=settings)
        Path(config.out, "state.pt").unlink(missing_ok=True)
    if world > 1:
        dist.barrier()                                       # the files are there for every rank
    return paths


# ------------------------------------------------------------------------------
# a run and its files

def check(config):
    """Raises UserError where the settings do not make sense."""
    c = config
    for ok, message in (
            (c.size in SIZES, f"--size must be one of {' '.join(SIZES)}, not {c.size}"),
            (c.dtype in ("auto", "float32", "bfloat16", "float16"), f"unknown --dtype {c.dtype}"),
            (all(0 <= a <= 1 for a in c.alpha), f"--alpha takes numbers from 0 to 1, not {c.alpha}"),
            (len(set(c.alpha)) == len(c.alpha), f"--alpha names a value twice: {c.alpha}"),
            (c.teacher or not any(c.alpha), "--alpha above 0 needs a --teacher"),
            (any(c.alpha) or not c.teacher, "a --teacher has no effect at alpha 0: try --alpha 0.25"),
            (min(c.batch_size, c.block_size, c.accumulate, c.log_every, c.temperature) > 0,
             "batch_size, block_size, accumulate, log_every and temperature must be above 0"),
            (min(c.seed, c.top_k, c.lr, c.warmup) >= 0, "seed, top_k, lr and warmup must not be negative"),
            (c.tokens >= c.tokens_per_step,
             f"--tokens {c.tokens} is less than one step of {c.tokens_per_step} tokens")):
        if not ok:
            raise UserError(message)


def load_teacher(config, meta, device):
    """-> the frozen teacher and the settings of its run, or None twice. Raises UserError, OSError."""
    if not config.teacher:
        return None, None
    teacher, extra = load_checkpoint(config.teacher, device)
    if extra["settings"]["tokenizer"] != meta["tokenizer"]:
        raise UserError(f"teacher and student must share a tokenizer: {config.data} does not have that of "
                        f"{config.teacher}")
    if teacher.config.block_size < config.block_size:
        raise UserError(f"--block_size {config.block_size} exceeds the teacher's {teacher.config.block_size}")
    return teacher.requires_grad_(False), extra["settings"]


def checkpoint_path(config, alpha):
    """Where the student of this alpha is saved at its end."""
    return f"{config.out}/ckpt.pt" if len(config.alpha) == 1 else f"{config.out}/alpha_{alpha:g}/ckpt.pt"


def settings_of_run(config, dtype, meta, teacher_settings):
    """What makes two runs the same run, to be saved with them: everything but where and how fast it runs."""
    settings = {**asdict(config), "dtype": str(dtype), "teacher": teacher_settings,
                "corpus": meta["fingerprint"], "tokenizer": meta["tokenizer"]}
    for name in ("data", "out", "device", "fused", "compile", "log_every", "save_every"):
        del settings[name]
    return settings


def check_folder(out, settings):
    """Raises UserError where out holds the checkpoints or the state of a run with other settings."""
    for path in (*Path(out).glob("*.pt"), *Path(out).glob("alpha_*/ckpt.pt")):
        if load_file(path).get("settings") != settings:
            raise UserError(f"{path} comes from a run with other settings: choose another --out")


def resume(config, students, paths):
    """Load state.pt, if there is one, into the students -> the first step, and the open log."""
    step = 0
    if os.path.exists(f"{config.out}/state.pt"):
        state = load_file(f"{config.out}/state.pt")
        step = state["step"]
        for student, parts in zip(students, state["students"]):
            for part in (student.model, student.optimizer, student.scaler):
                part.load_state_dict(parts.pop(0))
    if int(os.environ.get("RANK", 0)):
        return step, open(os.devnull, "w")
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    return step, open(f"{config.out}/log.jsonl", "a" if step else "w")


# ------------------------------------------------------------------------------
# Speed: from here on nothing is new; the same is computed, up to rounding, in less time and memory.
#
# The fused loss, its gradient by hand. For one token let p = softmax(z), r = softmax(z/T), q = softmax(t/T),
# a constant, and e the one-hot label. All it takes is that log sum exp(z) has the gradient softmax(z):
#     CE = log sum exp(z) - z_y,                                        so  dCE/dz = p - e
#     KL = sum q log q - sum q z/T + log sum exp(z/T),  with sum q = 1, so  dKL/dz = (r - q) / T
#     dz = (1 - alpha) (p - e) + alpha T (r - q),  which at T = 1 is p - (1 - alpha) e - alpha q
# divided by N, as the loss is a mean over N tokens; through z = h W^T:  dh = dz W  and  dW = dz^T h.
# (T^2 is there because r - q shrinks as 1/T as well when T grows: so the gradient keeps its size.)

CHUNK_TOKENS = 256                   # whose logits are held at once on a CPU: at 512 words they fit a cache
CHUNK_BYTES = 2**29                  # of logits on a GPU: every chunk moves the whole gradient of the head
SHARED_VOCAB = 4096                  # vocabulary up to which all students share the teacher's logits
H100_FLOPS = 989e12                  # FLOP/s of an H100 in dense bfloat16, for MFU


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
    r_norm, q_norm = z_T.logsumexp(-1, keepdim=True), t_T.logsumexp(-1, keepdim=True)
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
        th, tw = teacher_hidden, teacher_weight              # (B, T, C') and (V, C'), or (B, T, V) and None
        if th is None:
            alpha = 0.0
        else:
            th = th.flatten(0, -2)
        if torch.is_autocast_enabled(device.type):           # products in low precision, the rest in float32
            low = torch.get_autocast_dtype(device.type)
            h, w, th, tw = (x if x is None else x.to(low) for x in (h, w, th, tw))
        N, V = len(y), len(w)
        rows = CHUNK_TOKENS if device.type == "cpu" else max(1, CHUNK_BYTES // (4 * V))
        alpha_tensor = torch.full((), alpha, device=device)  # a float would be compiled anew for each value
        # every chunk's logits go into the same memory: asking for new pages each time takes a fifth longer
        z_buffer = h.new_empty(min(rows, N), V)
        t_buffer = None if tw is None else torch.empty_like(z_buffer)
        dh, dw, ce, kl = torch.empty_like(h), torch.zeros_like(weight), 0.0, 0.0
        with torch.autocast(device.type, enabled=False):
            for start in range(0, N, rows):
                part, n = slice(start, start + rows), min(rows, N - start)
                z = torch.mm(h[part], w.T, out=z_buffer[:n]).float()         # (n, V)
                t = None if th is None else th[part].float()
                if tw is not None:
                    t = torch.mm(th[part], tw.T, out=t_buffer[:n]).float()
                ce_part, kl_part = chunk_fn(z, keep_top_k(t, top_k), y[part], alpha_tensor, temperature)
                ce, kl, dz = ce + ce_part, kl + kl_part, z.to(h.dtype)
                torch.mm(dz, w, out=dh[part])
                if dw.dtype == dz.dtype:
                    dw.addmm_(dz.T, h[part])
                else:                                        # many small sums would be lost in low precision
                    dw += dz.T @ h[part]
        ce, kl = ce / N, kl / N
        ctx.gradients = dh.view_as(hidden).to(hidden.dtype), dw.to(weight.dtype), N
        ctx.mark_non_differentiable(ce, kl)
        return (1 - alpha) * ce + alpha * temperature**2 * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, *_):                             # the gradient is there, and only to be scaled
        dh, dw, N = ctx.gradients
        return dh * (grad / N), dw * (grad / N), *[None] * 7


def distill_loss(hidden, weight, targets, alpha, teacher_hidden=None, teacher_weight=None, temperature=1.0,
                 top_k=0, chunk_fn=chunk_loss):
    """distill_loss_reference in its fast form: same arguments, same results; chunk_fn may be compiled."""
    return FusedLoss.apply(hidden, weight, targets, alpha, teacher_hidden, teacher_weight, temperature, top_k,
                           chunk_fn)


@functools.cache
def compiler(device):
    """-> torch.compile, or where it does not work, which it says once, a function that changes nothing."""
    torch._dynamo.config.cache_size_limit = 64               # a run has one shape, a process many runs
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
        return functools.partial(torch.compile, dynamic=False)
    except Exception as e:                                   # no compiler, a broken one, no Triton
        print(f"torch.compile does not work here ({type(e).__name__}; it needs a C++ compiler, on a GPU "
              "Triton): using eager mode, which is slower", file=sys.stderr)
        return lambda function: function


# ------------------------------------------------------------------------------
# the command line: every field of Config is a --flag of the same name

def numbers(text):
    """'0,0.25' -> (0.0, 0.25). Raises ValueError."""
    return tuple(float(part) for part in text.split(","))


def true_or_false(text):
    """'true' -> True, 'false' -> False. Raises ArgumentTypeError."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text == "true"


def parse_config(argv=None):
    """Command line -> Config."""
    parser = make_parser(f"{__doc__}\nFlags, with their defaults:\n\n{inspect.getsource(Config)}")
    kinds = {int: whole_number, float: float, str: str, bool: true_or_false, tuple: numbers}
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=kinds[f.type], default=f.default, help=argparse.SUPPRESS)
    return Config(**vars(parser.parse_args(argv)))


def main():
    """Train what the command line asks for, and print where it is saved."""
    start, paths = time.time(), train(parse_config())
    if dist.is_initialized():
        dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{time.time() - start:.0f} s; next: python eval.py {' '.join(paths)}")


if __name__ == "__main__":
    run_main(main)

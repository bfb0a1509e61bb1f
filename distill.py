"""
The loss and the training loop. A teacher is a run with alpha = 0; a student is a run with a teacher.

    python data.py                                                             # once: text -> data/python
    python distill.py --size xs --tokens 8M --seed 1001 --out out/xs           # a (weak) teacher
    python distill.py --size s --tokens 3M --teacher out/xs/ckpt.pt --alpha 0,0.25,0.5,1 --out out/taught
    python distill.py --size s --teacher out/xs/ckpt.pt --alpha 0.5 --profile  # where the time of a step goes
    torchrun --nproc_per_node=8 distill.py --data data/fineweb-edu --size 350M ...  # 8 GPUs share each batch

Several alphas train that many students side by side, on the same batches and with one teacher forward a
batch. The same command after an interruption goes on from the last state, and repeats nothing if the run is
finished.

Reads the corpus folder of data.py; writes below --out: ckpt.pt (with several alphas alpha_A/ckpt.pt), earlier
ones as ckpt_1M.pt where --checkpoints asks for them, log.jsonl, and state.pt while the run is unfinished.

For a token with label y, student logits z, teacher logits t and temperature T (T = 1 in the paper)

    loss = (1 - alpha) * CE(z, y)  +  alpha * T^2 * KL( softmax(t/T) || softmax(z/T) )

"Strong Teacher Not Needed? On Distillation in LLM Pretraining", arXiv 2605.23857; Hinton et al., arXiv
1503.02531.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import Batches, Parser, count, load_meta, lock, run, write
from model import (GPT, LONGEST, SIZES, CheckpointError, GPTConfig, count_parameters, flops_per_token,
                   load_checkpoint, read_sealed, save_checkpoint, write_atomically)


class ConfigError(ValueError):
    """Settings that are out of range or do not fit together."""


# ------------------------------------------------------------------------------
# every knob; each is a --flag of the same name

def knob(default, text, kind=None):
    """A field of Config: its default, its help text, and what reads it from a word of the command line."""
    return field(default=default, metadata={"help": text, "kind": kind or type(default)})


def short(n):
    """3 * 2**20 -> '3M', the inverse of count()."""
    for unit, size in (("B", 2**30), ("M", 2**20), ("K", 2**10)):
        if size <= n < 1000 * size and n * 4 % size == 0:
            return f"{n / size:g}{unit}"
    return str(n)


def several(kind):
    """-> a function that reads '1,2' as a tuple, each part by `kind`. It raises ArgumentTypeError."""
    def parse(text):
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers with commas") from None
    return parse


def switch(text):
    """'true' -> True, 'false' -> False, in any case of letters. Raises ArgumentTypeError."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


@dataclass
class Config:
    """All there is to set. Raises ConfigError."""
    data: str = knob("data/python", "corpus folder made by data.py")
    out: str = knob("out/run", "folder for checkpoints and the log")
    size: str = knob("s", f"shape of the model, one of {' '.join(SIZES)}")
    tokens: int = knob(3 * 2**20, "training tokens; K, M and B are 2^10, 2^20 and 2^30", count)
    seed: int = knob(1, "seed of the initial weights and of the order of the data")
    teacher: str = knob("", "checkpoint of the teacher; none: plain pretraining")
    alpha: tuple = knob((0.0,), "weight of distillation, 0 (plain pretraining) to 1 (pure distillation); "
                        "several, with commas, train one student each", several(float))
    temperature: float = knob(1.0, "temperature of both distributions in the distillation term")
    top_k: int = knob(0, "keep the teacher's k likeliest tokens; 0: all of them")
    top_p: float = knob(1.0, "keep the teacher's likeliest tokens up to this probability; 1: all of them")
    other: bool = knob(False, "true: what they cut off is one more bucket; false: renormalised away", switch)
    hard: bool = knob(False, "true: the teacher's likeliest token is the label, with cross-entropy", switch)
    checkpoints: tuple = knob((), "token counts of earlier checkpoints, with commas", several(count))
    batch_size: int = knob(8, "sequences in a batch")
    block_size: int = knob(128, "tokens in a sequence")
    accumulate: int = knob(1, "batches whose gradients add up to one step")
    lr: float = knob(3e-3, "peak learning rate")
    min_lr: float = knob(0.1, "final learning rate, as a fraction of the peak")
    warmup: float = knob(0.05, "fraction of the steps in which the learning rate rises; a cosine follows")
    weight_decay: float = knob(0.1, "AdamW's decay, of matrices only")
    beta1: float = knob(0.9, "AdamW's decay of the mean gradient")
    beta2: float = knob(0.95, "AdamW's decay of the mean squared gradient")
    grad_clip: float = knob(1.0, "largest norm of the gradient")
    device: str = knob("auto", "cpu, cuda, cuda:1 ...; auto: cuda where there is one")
    dtype: str = knob("auto", "float32, or autocast to bfloat16 or float16; auto: float32 on CPU, on CUDA "
                      "bfloat16 where supported, else float16")
    compile: bool = knob(True, "use torch.compile; false: eager, no C++ compiler needed", switch)
    log_every: int = knob(50, "steps between lines of log.jsonl")
    save_every: float = knob(60.0, "seconds between saved states, from which an interrupted run goes on")

    def __post_init__(self):
        def need(ok, what):
            if not ok:
                raise ConfigError(what)
        need(self.size in SIZES, f"--size must be one of {' '.join(SIZES)}, not {self.size}")
        alphas = ",".join(f"{a:g}" for a in self.alpha)
        need(alphas and all(0 <= a <= 1 for a in self.alpha), f"--alpha must lie in [0, 1], not {alphas}")
        need(len(set(alphas.split(","))) == len(self.alpha), f"--alpha names a value twice: {alphas}")
        need(0 < self.temperature < math.inf, f"--temperature must be above 0, not {self.temperature}")
        for name in ("tokens", "batch_size", "block_size", "accumulate", "lr", "grad_clip", "log_every"):
            need(0 < getattr(self, name) < 2**63, f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("min_lr", "warmup", "beta1", "beta2"):
            need(0 <= getattr(self, name) <= 1, f"--{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("weight_decay", "save_every", "seed"):
            need(0 <= getattr(self, name) < 2**63,
                 f"--{name} must be from 0 to 2^63, not {getattr(self, name)}")
        need(self.teacher or not any(self.alpha), "--alpha above 0 needs a --teacher")
        need(any(self.alpha) or not self.teacher, "a --teacher teaches nothing at alpha = 0: give --alpha")
        need(0 <= self.top_k < 2**31 and 0 < self.top_p <= 1,
             "--top_k must not be negative; --top_p lies in (0, 1]")
        need(not self.top_k or self.top_p == 1, "--top_k and --top_p exclude each other")
        need(not self.other or self.top_k or self.top_p < 1, "--other needs --top_k or --top_p")
        need(not self.hard or not self.top_k and self.top_p == 1 and self.temperature == 1,
             "--hard goes without --top_k, --top_p and --temperature")
        need(self.block_size <= LONGEST, f"--block_size must be at most {LONGEST}")
        need(self.dtype in ("auto", "float32", "bfloat16", "float16"), f"--dtype cannot be {self.dtype}")
        step = self.tokens_per_step
        need(self.tokens >= step, f"--tokens {self.tokens} is less than one step of {step}")
        need(all(step <= c <= self.tokens for c in self.checkpoints),
             f"--checkpoints must lie between one step ({step}) and --tokens ({self.tokens})")

    @property
    def tokens_per_step(self):
        return self.batch_size * self.block_size * self.accumulate


# ------------------------------------------------------------------------------
# the loss

def distill_loss_reference(hidden, weight, targets, alpha, teacher_hidden=None, teacher_weight=None,
                           temperature=1.0, top_k=0, top_p=1.0, other=False, hard=False):
    """
    The objective at the top of this file, averaged over tokens, in nats: the plain form.

    hidden (B, T, C), weight (V, C)                   the student's final states and output head
    targets (B, T)                                    the labels
    teacher_hidden (B, T, C'), teacher_weight (V, C') the teacher's, which get no gradient; neither: plain
                                                      cross-entropy; no weight: logits (B, T, V) instead
    top_k, top_p, other                               a truncated teacher, see divergence()
    hard                                              the teacher's likeliest token is one more label
    -> loss, ce, kl with loss = (1 - alpha) ce + alpha temperature^2 kl; only loss carries a gradient
    """
    logits = (hidden @ weight.T).float().flatten(0, -2)                      # (B*T, V)
    ce = F.cross_entropy(logits, targets.flatten())
    if teacher_hidden is None:
        return ce, ce.detach(), torch.zeros_like(ce)
    teacher_logits = teacher_hidden if teacher_weight is None else teacher_hidden @ teacher_weight.T
    teacher_logits = teacher_logits.detach().float().flatten(0, -2)          # (B*T, V)
    if hard:
        kl = F.cross_entropy(logits, teacher_logits.argmax(-1))
    else:
        log_q = F.log_softmax(teacher_logits / temperature, dim=-1)          # teacher
        log_p = F.log_softmax(logits / temperature, dim=-1)                  # student
        kl = divergence(log_q, log_p, top_k, top_p, other).mean()
    loss = (1 - alpha) * ce + alpha * (1 if hard else temperature**2) * kl
    return loss, ce.detach(), kl.detach()


def divergence(log_q, log_p, top_k=0, top_p=1.0, other=False):
    """
    KL(q || p) of each token: (N, V), (N, V) -> (N,). Of a truncated teacher only what teacher_keeps() counts;
    the rest is renormalised away, or with `other` it is one bucket on both sides.
    """
    if not top_k and top_p == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    keep = teacher_keeps(log_q, top_k, top_p)
    if other:
        q_rest, p_rest = ((log_x.exp() * ~keep).sum(-1).clamp_min(1e-20) for log_x in (log_q, log_p))
        return (log_q.exp() * (log_q - log_p) * keep).sum(-1) + q_rest * (q_rest.log() - p_rest.log())
    q = log_q.exp() * keep
    q = q / q.sum(-1, keepdim=True)
    return (torch.xlogy(q, q) - q * log_p).sum(-1)


def teacher_keeps(log_q, top_k, top_p):
    """Which tokens of log_q (N, V) are the k likeliest, or the fewest of probability p: (N, V), bool."""
    if top_k:
        return log_q >= log_q.topk(min(top_k, log_q.size(-1)), dim=-1).values[:, -1:]
    q = log_q.exp().sort(dim=-1, descending=True).values
    last = (q.cumsum(-1) - q < top_p).sum(-1, keepdim=True) - 1
    return log_q.exp() >= q.gather(-1, last)


# ------------------------------------------------------------------------------
# the training loop

def learning_rate(config, step, steps):
    """Linear warm-up to config.lr, then a cosine down to min_lr of it."""
    warmup = max(1, int(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


OVERFLOWS = 100                      # float16 steps in a row that may overflow, each lowering the loss scale


class Student(nn.Module):
    """One model in training, its optimizer and its alpha."""

    def __init__(self, shape, alpha, config, device, dtype):
        super().__init__()
        torch.manual_seed(config.seed)                       # every alpha starts from the same weights
        self.alpha = alpha
        self.model = GPT(shape).to(device)
        self.hidden, self.loss_fn, self.temperature = self.model.hidden, distill_loss, config.temperature
        self.head = self.model.lm_head.weight
        # as a tensor for the compiled loss: a Python float would be compiled anew for each value
        self.alpha_t = torch.tensor(alpha, device=device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                            {"params": vectors, "weight_decay": 0.0}],
                                           betas=(config.beta1, config.beta2), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.grad_clip = config.grad_clip
        # steps with a loss or gradient that is no finite number, in a row and in all; kept on the device, to
        # be asked for rarely
        self.failed, self.skipped = (torch.zeros((), dtype=torch.long, device=device) for _ in range(2))

    def forward(self, x, y, target):
        """Ids and labels (B, T), and what teacher_hidden() gives -> the loss."""
        known = target if self.alpha else (None, None)
        loss, self.ce, self.kl = self.loss_fn(self.hidden(x), self.head, y, self.alpha_t, *known,
                                              self.temperature)
        return loss

    def clip_and_step(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.model.parameters(), self.grad_clip)
        wrong = ~(norm + self.ce).isfinite()
        self.failed, self.skipped = (self.failed + 1) * wrong, self.skipped + wrong
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, config, step, steps):
        """Raises ConfigError where training went wrong: in float16 some steps may fail and are left out."""
        failed = self.failed.item()
        if failed >= (OVERFLOWS if self.scaler.is_enabled() else 1):
            first = step - failed + 1
            raise ConfigError(f"alpha {self.alpha:g}: loss or gradient is not finite since step {first} "
                              f"(batch {first * config.accumulate} of seed {config.seed}, learning rate "
                              f"{learning_rate(config, first, steps):.3g}): lower --lr, or look at the data; "
                              "the last good state and checkpoints are kept")

    def state(self):
        return {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "scaler")}

    def load_state(self, state):
        for part, saved in state.items():
            if saved:                                        # a scaler that is not in use has no state
                getattr(self, part).load_state_dict(saved)


def ranks():
    """-> this process's rank, and how many there are: torchrun tells them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(config):
    """-> (torch.device, dtype of autocast). Raises ConfigError where the device cannot be had."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks()[1] > 1:                    # each rank its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {name} is not to be had here: use cpu, or auto") from None
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type != "cuda":
        return device, torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if has_bfloat16 else torch.float16


def checkpoint_path(config, alpha, at=None):
    """Where the student of this alpha is saved, at its end or after `at` tokens."""
    folder = config.out if len(config.alpha) == 1 else os.path.join(config.out, f"alpha_{alpha:g}")
    return os.path.join(folder, "ckpt.pt" if at in (None, config.tokens) else f"ckpt_{short(at)}.pt")


def recipe(config):
    """What makes two runs the same run, as plain values: everything but where and how it is run."""
    elsewhere = ("data", "out", "teacher", "device", "compile", "log_every", "save_every", "checkpoints")
    return {k: list(v) if isinstance(v, tuple) else v
            for k, v in asdict(config).items() if k not in elsewhere}


def fingerprint(model):
    """The first digits of the sha256 of a model's weights; "" for None."""
    if model is None:
        return ""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_teacher(config, meta, device):
    """The frozen teacher of a config. Raises ConfigError if it cannot teach here, or CheckpointError."""
    teacher, about = load_checkpoint(config.teacher, device)
    if about.get("tokenizer") != meta["tokenizer"]:
        raise ConfigError(f"teacher and student must share a tokenizer: {config.teacher} was trained with "
                          f"{about.get('tokenizer')}, {config.data} has {meta['tokenizer']}")
    if teacher.config.block_size < config.block_size:
        raise ConfigError(f"--block_size {config.block_size} exceeds the teacher's context of "
                          f"{teacher.config.block_size}")
    return teacher.requires_grad_(False)


def unfinished(config, state_path, identity):
    """The saved state of this very run, or None. Raises CheckpointError; ConfigError if it is another's."""
    if not os.path.exists(state_path):
        return None
    try:
        state = read_sealed(state_path)                      # on the CPU: it is copied from there
        same = {k: state[k] for k in identity} == identity
    except (CheckpointError, KeyError, TypeError):
        raise CheckpointError(f"{state_path} is damaged: delete it to start the run anew") from None
    if not same:
        raise ConfigError(f"{config.out} holds an unfinished run with other settings: choose another --out")
    return state


def finished(config, kept, identity):
    """Whether all of kept is there already. Raises ConfigError if --out has files of another run."""
    paths = {k["path"] for k in kept}
    there = [path for path in paths | {os.path.join(config.out, "ckpt.pt")} if os.path.exists(path)]
    for path in there:
        about = load_checkpoint(path)[1]
        if {k: about.get(k) for k in identity} != identity:
            raise ConfigError(f"{path} comes from a run with other settings: choose another --out")
    return paths <= set(there)


def read_log(path, first_step):
    """The lines of an interrupted run's log that come before first_step."""
    kept = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    kept += [line] * (line.endswith("}\n") and json.loads(line)["step"] < first_step)
                except (ValueError, KeyError, TypeError, RecursionError):  # half a line of a killed run
                    pass
    return kept


def set_up(config):
    """
    -> device, dtype, meta of the corpus, batches, shape of the student, teacher or None. Raises as train().
    """
    meta, (device, dtype), world = load_meta(config.data), pick_device(config), ranks()[1]
    if config.batch_size % world:
        raise ConfigError(f"--batch_size {config.batch_size} cannot be shared by {world} ranks: "
                          "choose a multiple")
    train_bin = os.path.join(config.data, "train.bin")
    batches = Batches(train_bin, config.batch_size, config.block_size, config.seed)
    shape = GPTConfig(meta["vocab_size"], config.block_size, **SIZES[config.size])
    return device, dtype, meta, batches, shape, load_teacher(config, meta, device) if config.teacher else None


def memory_needed(config, shape, teacher_shape, low=False):
    """
    Bytes that training takes beside the program itself, roughly; low: autocast to 16 bits. Students: weights,
    gradients and AdamW's two means. One of them at a time: what a layer keeps for the backward pass, about
    12 C + 6 n_inner numbers a token. The loss: a few times CHUNK x V, and the gradient of the head.
    """
    n, width = config.batch_size * config.block_size // ranks()[1], 2 if low else 4
    students = len(config.alpha) * 16 * count_parameters(shape)
    layers = n * shape.n_layer * (12 * shape.n_embd + 6 * shape.n_inner) * width
    loss = 4 * shape.vocab_size * (3 * min(CHUNK, n) + shape.n_embd)
    if not teacher_shape:
        return students + layers + loss
    logits = 4 * n * shape.vocab_size if shape.vocab_size <= SHARED else 0
    return students + layers + loss + 4 * count_parameters(teacher_shape) + logits


def disk_needed(config, shape):
    """Bytes that a run's checkpoints, its state and the state's next version take."""
    return len(config.alpha) * count_parameters(shape) * 4 * (1 + len(config.checkpoints) + 2 * 3)


def free_memory(device):
    """Bytes of memory that are free on a device; infinity where the system doesn't tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()                             # what torch holds for later use is free
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    try:                                                     # Linux; a container may have less than all
        with open("/proc/meminfo") as f:
            free = next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
        group = {name: Path("/sys/fs/cgroup", f"memory.{name}").read_text()
                 for name in ("max", "current", "stat")}
        files = int(re.search(r"^inactive_file (\d+)", group["stat"], re.M)[1])      # a cache that gives way
        return min(free, int(group["max"]) - int(group["current"]) + files)
    except (OSError, ValueError, TypeError, StopIteration):
        return free


def bytes_of(folder):
    """Bytes of the checkpoints and states below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*.pt"))


def free_disk(folder):
    """Bytes that are free where a folder is, or will be."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def check_room(memory, disk, device, folder):
    """Raises ConfigError if there are fewer bytes of memory or disk than these."""
    for what, need, free, advice in (
            ("memory", memory, free_memory(device),
             "fewer alphas or --jobs, a smaller --batch_size or --size"),
            ("disk", disk, free_disk(folder), f"make room in {folder}, or choose another --out")):
        if need > free:
            raise ConfigError(f"this needs about {need / 2**30:.2f} GiB of {what}, and {free / 2**30:.2f} "
                              f"are free: {advice}")


def train(config, on_tokens=None):
    """
    Train one student for each alpha of config -> [{"alpha", "tokens", "path"}], one for each checkpoint.

    Repeats bit for bit on one CPU and thread count, interrupted or not. on_tokens(n) is called as training
    goes on, in place of a progress bar. Raises ConfigError, DataError or CheckpointError before anything is
    written; SystemExit with 130 or 143 when stopped by Ctrl-C or SIGTERM, after saving the state.
    """
    device, dtype, meta, batches, shape, teacher = set_up(config)
    rank, world = ranks()
    if device.type == "cuda" and world > 1:                  # under torchrun only: plain "cuda" has no index
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    at_step = config.tokens_per_step
    steps = config.tokens // at_step
    marks = {c // at_step: c for c in config.checkpoints} | {steps: config.tokens}       # step -> tokens
    kept = [{"alpha": a, "tokens": c, "path": checkpoint_path(config, a, c)}
            for c in marks.values() for a in config.alpha]

    memory = memory_needed(config, shape, teacher and teacher.config, dtype != torch.float32)
    if teacher:                                              # is in memory already
        memory -= 4 * count_parameters(teacher.config)
    check_room(memory, disk_needed(config, shape) - bytes_of(config.out), device, config.out)
    # a finished run is not repeated, an unfinished one goes on, and another's files are not overwritten
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        claim = lock(config.out)                              # ours until this function returns
    identity = {"recipe": recipe(config), "corpus": meta["fingerprint"], "taught_by": fingerprint(teacher)}
    state_path, log_path = os.path.join(config.out, "state.pt"), os.path.join(config.out, "log.jsonl")
    if finished(config, kept, identity):
        if rank == 0:                                        # left by a run that was killed at its end
            Path(state_path).unlink(missing_ok=True)
        return kept
    state = unfinished(config, state_path, identity)
    for path in {os.path.dirname(k["path"]) for k in kept}:
        os.makedirs(path, exist_ok=True)
    students = [Student(shape, alpha, config, device, dtype) for alpha in config.alpha]
    first_step = state["step"] if state else 0
    for done, tokens in marks.items():                       # asked for since then
        if done <= first_step and not os.path.exists(checkpoint_path(config, config.alpha[0], tokens)):
            raise ConfigError(f"--checkpoints: the unfinished run in {config.out} has passed {short(tokens)} "
                              "tokens without saving them: choose another --out")
    for student, saved in zip(students, state["students"] if state else ()):
        student.load_state(saved)
    state = None                                             # as large as the students
    if rank == 0:
        write(config.out, "log.jsonl", "".join(read_log(log_path, first_step)).encode())
    log = open(log_path if rank == 0 else os.devnull, "a")

    fn, loss_fn, teacher_hidden = fast_functions(config, device, teacher)
    for student in students:
        student.hidden, student.loss_fn = fn(student.model.hidden), loss_fn
    # with several ranks each works on its rows of every batch, and their gradients are averaged
    replicas = [DistributedDataParallel(s) if world > 1 else s for s in students]
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    stopped_by, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        for s in (signal.SIGINT, signal.SIGTERM):             # finish the step, then save and leave
            handlers[s] = signal.signal(s, lambda s, _: stopped_by.append(s))
    name = f"{config.size} ({count_parameters(shape) / 1e6:.2f}M) x {len(students)}"
    bar = tqdm(total=steps * at_step, initial=first_step * at_step, desc=name, unit="tok", unit_scale=True,
               disable=True if on_tokens or rank else None)
    if on_tokens:
        on_tokens(first_step * at_step)
    saved_at = logged_at = time.time()
    try:
        for step in range(first_step, steps):
            for micro in range(config.accumulate):
                x, y = (part[rank::world] for part in batches[step * config.accumulate + micro])
                if device.type == "cuda":                     # from pinned memory the copy does not wait
                    x, y = (part.pin_memory().to(device, non_blocking=True) for part in (x, y))
                with autocast:
                    target = teacher_hidden(x)                # one teacher forward serves every student
                for student, replica in zip(students, replicas):   # one student per alpha, on the same batch
                    replica.require_backward_grad_sync = micro == config.accumulate - 1
                    with autocast:
                        loss = replica(x, y, target)
                    student.scaler.scale(loss / config.accumulate).backward()
            lr = learning_rate(config, step, steps)
            for student in students:
                student.clip_and_step(lr)

            done, stop = step + 1, bool(stopped_by)
            logging = step % config.log_every == 0 or done == steps
            if logging or world > 1:
                losses = [x for s in students for x in (s.ce, s.kl)]
                seen = torch.stack(losses + [torch.tensor(stop, device=device)])
            if world > 1:                                     # means over the ranks; and all stop if one does
                dist.all_reduce(seen)
                seen /= world
                stop = seen[-1].item() > 0
            saving = stop or time.time() - saved_at > config.save_every
            if done in marks or saving or logging:
                for student in students:                      # before anything of it is written
                    student.check(config, step, steps)
            if done in marks and rank == 0:
                for student in students:
                    path = checkpoint_path(config, student.alpha, marks[done])
                    save_checkpoint(path, student.model, **identity, tokenizer=meta["tokenizer"],
                                    size=config.size, tokens=marks[done], seed=config.seed,
                                    alpha=student.alpha, teacher=config.teacher)
            if logging:
                now, numbers = time.time(), [round(x, 5) for x in seen.tolist()]
                line = {"step": step, "tokens": done * at_step, "lr": lr, "alpha": config.alpha,
                        "ce": numbers[:-1:2], "kl": numbers[1::2], "seconds": round(now - logged_at, 3)}
                if dtype == torch.float16:
                    line["skipped"] = [s.skipped.item() for s in students]
                print(json.dumps(line), file=log, flush=True)
                logged_at = now
                bar.set_postfix_str(f"loss {numbers[-3]:.3f}", refresh=False)
            (on_tokens or bar.update)(at_step)
            if saving and done < steps:
                if rank == 0:
                    states = [student.state() for student in students]
                    write_atomically(state_path, {**identity, "step": done, "students": states})
                saved_at = time.time()
            if stop:
                if world > 1:                                 # the state is there before any rank leaves
                    dist.barrier()
                if not on_tokens and rank == 0:
                    print(f"\nstopped at {done * at_step:,} of {config.tokens:,} tokens; the state is saved, "
                          "and the same command goes on from here", file=sys.stderr)
                sys.exit(128 + (stopped_by or [signal.SIGTERM])[0])
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        bar.close()
        log.close()
    if rank == 0:
        Path(state_path).unlink(missing_ok=True)
    if world > 1:                                             # the files are there for every rank
        dist.barrier()
    return kept


# ------------------------------------------------------------------------------
# speed: nothing from here on changes what is computed

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


def chunk_loss(z, t, y, alpha, temperature, top_k, top_p, other, hard):
    """
    Logits z (N, V) and t (N, V) or None, labels y (N,) -> the sums over tokens of ce and of kl. Puts into z
    the gradient of the summed loss but for -(1 - alpha) at the label: at T = 1,
    softmax(z) - alpha softmax(t).
    """
    norm = z.logsumexp(-1, keepdim=True)
    ce = (norm - z.gather(-1, y[:, None])).sum()
    p = (z - norm).exp()
    if t is None:
        kl, dz = torch.zeros_like(ce), p
    elif hard:
        label = t.argmax(-1, keepdim=True)
        kl = (norm - z.gather(-1, label)).sum()
        dz = p.scatter_add(-1, label, (-alpha * torch.ones_like(norm)))
    else:
        z_T, t_T = (z, t) if temperature == 1 else (z / temperature, t / temperature)
        z_norm = norm if temperature == 1 else z_T.logsumexp(-1, keepdim=True)
        t_norm = t_T.logsumexp(-1, keepdim=True)
        q, r = (t_T - t_norm).exp(), (z_T - z_norm).exp()
        if top_k or top_p < 1:
            keep = teacher_keeps(t_T - t_norm, top_k, top_p)
            if other:
                q_rest, r_rest = ((x * ~keep).sum(-1, keepdim=True).clamp_min(1e-20) for x in (q, r))
                kl = (q * (t_T - t_norm - z_T + z_norm) * keep).sum()
                kl = kl + (q_rest * (q_rest / r_rest).log()).sum()
                q = torch.where(keep, q, r * q_rest / r_rest)
            else:
                q = q * keep / (q * keep).sum(-1, keepdim=True)
                kl = (torch.xlogy(q, q) - q * (z_T - z_norm)).sum()
        else:
            kl = (q * (t_T - z_T)).sum() - t_norm.sum() + z_norm.sum()
        dz = p - alpha * q if temperature == 1 else (1 - alpha) * p + alpha * temperature * (r - q)
    z.copy_(dz)
    return ce, kl


CHUNK = 256                          # tokens whose logits are held at once
SHARED = 4096                        # vocabulary up to which students share the teacher's logits


class FusedLoss(torch.autograd.Function):
    """
    distill_loss by chunks: heads, loss and gradient in one pass, of the student's logits never over
    CHUNK x V.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, alpha, teacher_hidden, teacher_weight, temperature, chunk_fn,
                options):
        device, h, w, y = hidden.device.type, hidden.flatten(0, -2), weight, targets.flatten()
        th, tw = teacher_hidden.flatten(0, -2) if teacher_hidden is not None else None, teacher_weight
        if torch.is_autocast_enabled(device):                # products in low precision, the rest in float32
            low = torch.get_autocast_dtype(device)
            h, w, th, tw = (x if x is None else x.to(low) for x in (h, w, th, tw))
        dh, dw, ce, kl = torch.empty_like(h), torch.zeros_like(weight), 0.0, 0.0
        # every chunk's logits go into the same memory: asking for new pages each time takes a fifth longer
        z_all, t_all = (h.new_empty(CHUNK, len(w)) for _ in range(2))
        alpha = alpha if th is not None else 0.0
        with torch.autocast(device, enabled=False):
            for i in range(0, len(y), CHUNK):
                part = slice(i, i + CHUNK)
                n = len(y[part])
                z = torch.mm(h[part], w.T, out=z_all[:n]).float()
                t = None if th is None else th[part].float()
                if tw is not None:
                    t = torch.mm(th[part], tw.T, out=t_all[:n]).float()
                ce_part, kl_part = chunk_fn(z, t, y[part], alpha, temperature, *options)
                z[torch.arange(n, device=z.device), y[part]] -= 1 - alpha
                dz, ce, kl = z.to(h.dtype), ce + ce_part, kl + kl_part
                torch.mm(dz, w, out=dh[part])
                if dw.dtype == dz.dtype:
                    dw.addmm_(dz.T, h[part])
                else:                                        # many small sums would be lost in low precision
                    dw += dz.T @ h[part]
        ce, kl = ce / len(y), kl / len(y)
        ctx.save_for_backward(dh.view_as(hidden), dw)
        ctx.n, ctx.dtypes = len(y), (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(ce, kl)
        return (1 - alpha) * ce + alpha * (1 if options[-1] else temperature**2) * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, *_):
        dh, dw = (x.to(dtype).mul_(grad / ctx.n) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return dh, dw, *[None] * 7


def distill_loss(hidden, weight, targets, alpha, teacher_hidden=None, teacher_weight=None, temperature=1.0,
                 top_k=0, top_p=1.0, other=False, hard=False, chunk_fn=chunk_loss):
    """distill_loss_reference in its fast form: same arguments, same results; chunk_fn may be compiled."""
    return FusedLoss.apply(hidden, weight, targets, alpha, teacher_hidden, teacher_weight, temperature,
                           chunk_fn, (top_k, top_p, other, hard))


def fast_functions(config, device, teacher):
    """
    -> what makes a function fast; the fast loss; and a function of idx that gives what the loss takes of the
    teacher: logits where they are small, computed once for all students, or else final states and the head.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")           # TF32 where autocast leaves float32
    fn = lambda f: f
    if config.compile and compiler_works(device):
        torch._dynamo.config.cache_size_limit = 64           # a run has one shape, a process many runs
        fn = functools.partial(torch.compile, dynamic=False)
    options = {name: getattr(config, name) for name in ("top_k", "top_p", "other", "hard")}
    loss_fn = functools.partial(distill_loss, chunk_fn=fn(chunk_loss), **options)
    if teacher is None:
        return fn, loss_fn, lambda idx: (None, None)
    small = teacher.config.vocab_size <= SHARED
    teach, head = fn(teacher.forward if small else teacher.hidden), None if small else teacher.lm_head.weight
    return fn, loss_fn, torch.no_grad()(lambda idx: (teach(idx), head))


def profile(config, blocks=15, calls=5):
    """
    Print where the time of a step goes for config's teacher and last alpha: medians over blocks of calls, in
    which the parts take turns, because a machine's speed drifts. FLOPs are flops_per_token's; the peak is the
    speed of a product of square matrices, measured beside them.
    """
    device, dtype, _, batches, shape, teacher = set_up(config)
    student = Student(shape, config.alpha[-1], config, device, dtype)
    fn, loss_fn, teacher_hidden = fast_functions(config, device, teacher)
    student.hidden, student.loss_fn = fn(student.model.hidden), loss_fn
    x, y = (part.to(device) for part in batches[0])
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def target():
        with autocast:
            return teacher_hidden(x)

    def states():
        with autocast:
            return student.hidden(x)

    def loss():
        with autocast:
            return loss_fn(h, student.head, y, student.alpha_t, *known, config.temperature)[0]

    def backward(target):                                    # and what it needs: forward and loss
        with autocast:
            loss = student(x, y, target)
        student.scaler.scale(loss).backward()

    def update():
        clip_grad_norm_(student.model.parameters(), student.grad_clip)
        student.optimizer.step()

    def step(target):
        backward(target)
        student.clip_and_step(config.lr)

    known, h, n = target(), states().detach().requires_grad_(), x.numel()
    side = 4096 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    calls_of = {"data": lambda: batches[torch.randint(1000, ()).item()], "teacher forward": target,
                "student forward": states, "loss": loss, "backward": lambda: backward(known),
                "optimizer": update, "whole": lambda: step(target()), "plain": lambda: step((None, None)),
                "product": lambda: a @ a}
    times = {part: [] for part in calls_of}
    for block in range(blocks + 1):
        for part, call in calls_of.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            times[part].append((time.perf_counter() - start) / calls)
    time_of = {part: statistics.median(seconds[1:]) for part, seconds in times.items()}  # the first compiled
    time_of["backward"] -= time_of["student forward"] + time_of["loss"]
    time_of["teacher forward"] *= teacher is not None
    whole, floor = time_of["whole"], time_of["teacher forward"] + time_of["plain"]
    flops = n * (flops_per_token(shape, backward=True) + (flops_per_token(teacher.config) if teacher else 0))
    if device.type == "cuda":
        memory, where = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        import resource                                      # not on Windows
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        where = f"{torch.get_num_threads()} threads"
    for part in ("data", "teacher forward", "student forward", "loss", "backward", "optimizer"):
        print(f"{part:16} {1000 * time_of[part]:9.3f} ms {time_of[part] / whole:6.1%}")
    print(f"{'whole step':16} {1000 * whole:9.3f} ms, {n / whole:,.0f} tokens/s")
    print(f"{'whole / floor':16} {whole / floor:9.3f}, the floor being teacher forward + plain step")
    speed, peak = flops / whole, 2 * side**3 / time_of["product"]
    print(f"{'FLOP/s':16} {speed / 1e9:9,.1f} G, {speed / peak:.1%} of a matrix product's speed")
    print(f"{'peak memory':16} {memory / 2**20:9,.0f} MiB, {where}")


# ------------------------------------------------------------------------------
# the command line

def parse_config(argv=None):
    """Command line -> (whether to profile, Config). Every field of Config is a flag; a wrong one exits 2."""
    parser = Parser(__doc__)
    parser.add_argument("--profile", action="store_true", help="only print where the time of a step goes")
    for f in fields(Config):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        shown = "none" if default == "" else default
        parser.add_argument(f"--{f.name}", type=f.metadata["kind"], default=f.default, metavar=f.name.upper(),
                            help=f"{f.metadata['help']} (default: {shown})")
    args = vars(parser.parse_args(argv))
    return args.pop("profile"), Config(**args)


def main():
    """Train what the command line asks for and print where it lies, or only print where the time goes."""
    start, (only_profile, config) = time.time(), parse_config()
    if only_profile:
        return profile(config)
    kept = train(config)
    if dist.is_initialized():
        dist.destroy_process_group()
    if ranks()[0] == 0:
        for k in kept:
            print(f"alpha {k['alpha']:g} at {short(k['tokens'])} tokens: {k['path']}")
        print(f"{time.time() - start:.0f} s; next: python eval.py CHECKPOINTS")


if __name__ == "__main__":
    run(main, ConfigError, CheckpointError)

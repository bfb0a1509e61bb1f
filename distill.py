"""
The loss and the training loop. A teacher is a run with alpha = 0; a student is a run with a teacher.

    python data.py                                                             # once: text -> data/python
    python distill.py --size xs --tokens 8M --seed 1001 --out out/xs           # a (weak) teacher
    python distill.py --size s --tokens 3M --teacher out/xs/ckpt.pt --alpha 0,0.25,0.5,1 --out out/taught

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
import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Batches, Parser, load_meta, run
from model import (GPT, SIZES, CheckpointError, GPTConfig, count_parameters, load_checkpoint, save_checkpoint,
                   write_atomically)


class ConfigError(ValueError):
    """Settings that are out of range or do not fit together."""


# ------------------------------------------------------------------------------
# every knob; each is a --flag of the same name

def knob(default, text, kind=None):
    return field(default=default, metadata={"help": text, "kind": kind or type(default)})


def count(text):
    """'3M' -> 3 * 2**20: counts in powers of two divide into batches. Raises ArgumentTypeError."""
    unit = {"K": 2**10, "M": 2**20, "B": 2**30}.get(text[-1:].upper())
    try:
        return int(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 3145728 or 3M") from None


def short(n):
    """3 * 2**20 -> '3M', the inverse of count()."""
    for unit, size in (("B", 2**30), ("M", 2**20), ("K", 2**10)):
        if size <= n < 1000 * size and n * 4 % size == 0:
            return f"{n / size:g}{unit}"
    return str(n)


def several(kind):
    def parse(text):
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers with commas") from None
    return parse


def switch(text):
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
        need(len(set(self.alpha)) == len(self.alpha), f"--alpha names a value twice: {alphas}")
        need(0 < self.temperature < math.inf, f"--temperature must be above 0, not {self.temperature}")
        for name in ("tokens", "batch_size", "block_size", "accumulate", "lr", "grad_clip", "log_every"):
            need(0 < getattr(self, name) < math.inf, f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("min_lr", "warmup", "beta1", "beta2"):
            need(0 <= getattr(self, name) <= 1, f"--{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("weight_decay", "save_every", "seed"):
            need(0 <= getattr(self, name) < math.inf, f"--{name} must not be negative: {getattr(self, name)}")
        need(self.teacher or not any(self.alpha), "--alpha above 0 needs a --teacher")
        need(any(self.alpha) or not self.teacher, "a --teacher teaches nothing at alpha = 0: give --alpha")
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

def distill_loss(hidden, weight, targets, alpha, teacher_hidden=None, teacher_weight=None, temperature=1.0):
    """
    The objective at the top of this file, averaged over tokens, in nats.

    hidden (B, T, C) and weight (V, C): the student's final states and output head; teacher_hidden (B, T, C'),
    teacher_weight (V, C'): the teacher's, which gets no gradient; none: plain cross-entropy. targets (B, T):
    labels. -> loss, ce, kl: loss = (1 - alpha) ce + alpha temperature^2 kl. Only loss carries a gradient.
    """
    logits = (hidden @ weight.T).float()                                     # (B, T, V)
    ce = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    if teacher_hidden is None:
        return ce, ce.detach(), torch.zeros_like(ce)
    teacher_logits = (teacher_hidden @ teacher_weight.T).detach().float()    # (B, T, V)
    log_q = F.log_softmax(teacher_logits / temperature, dim=-1)              # teacher
    log_p = F.log_softmax(logits / temperature, dim=-1)                      # student
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    loss = (1 - alpha) * ce + alpha * temperature**2 * kl
    return loss, ce.detach(), kl.detach()


# ------------------------------------------------------------------------------
# the training loop

def learning_rate(config, step, steps):
    """Linear warm-up to config.lr, then a cosine down to min_lr of it."""
    warmup = max(1, int(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Student:
    """One model in training, its optimizer and its alpha."""

    def __init__(self, shape, alpha, config, device, dtype):
        torch.manual_seed(config.seed)                       # every alpha starts from the same weights
        self.alpha = alpha
        self.model = GPT(shape).to(device)
        self.head = self.model.lm_head.weight
        # as a tensor for the compiled loss: a Python float would be compiled anew for each value
        self.alpha_tensor = torch.tensor(alpha, device=device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                            {"params": vectors, "weight_decay": 0.0}],
                                           betas=(config.beta1, config.beta2), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.grad_clip = config.grad_clip

    def clip_and_step(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self):
        return {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "scaler")}

    def load_state(self, state):
        for part, saved in state.items():
            getattr(self, part).load_state_dict(saved)


def pick_device(config):
    """-> (torch.device, dtype of autocast). Raises ConfigError where the device cannot be had."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {name} is not to be had here: use cpu, or auto") from None
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type != "cuda":
        return device, torch.float32
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


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


def checkpoint_path(config, alpha, at=None):
    """Where the student of this alpha is saved, at its end or after `at` tokens."""
    folder = config.out if len(config.alpha) == 1 else os.path.join(config.out, f"alpha_{alpha:g}")
    return os.path.join(folder, "ckpt.pt" if at in (None, config.tokens) else f"ckpt_{short(at)}.pt")


def recipe(config):
    """What makes two runs the same run, as plain values: everything but where and how it is run."""
    elsewhere = ("data", "out", "device", "compile", "log_every", "save_every", "checkpoints")
    return {k: list(v) if isinstance(v, tuple) else v
            for k, v in asdict(config).items() if k not in elsewhere}


def load_teacher(config, meta, device):
    """The frozen teacher of a config. Raises ConfigError if it cannot teach this corpus, or CheckpointError."""
    teacher, about = load_checkpoint(config.teacher, device)
    if about.get("tokenizer") != meta["tokenizer"]:
        raise ConfigError(f"teacher and student must share a tokenizer: {config.teacher} was trained with "
                          f"{about.get('tokenizer')}, {config.data} has {meta['tokenizer']}")
    if teacher.config.block_size < config.block_size:
        raise ConfigError(f"--block_size {config.block_size} exceeds the teacher's context of "
                          f"{teacher.config.block_size}")
    return teacher.requires_grad_(False)


def unfinished(config, state_path, identity, device):
    """The saved state of this very run, or None. Raises CheckpointError; ConfigError if it is another's."""
    if not os.path.exists(state_path):
        return None
    try:
        state = torch.load(state_path, map_location=device, weights_only=True)
        same = {k: state[k] for k in identity} == identity
    except Exception:
        raise CheckpointError(f"{state_path} is damaged: delete it to start the run anew") from None
    if not same:
        raise ConfigError(f"{config.out} holds an unfinished run with other settings: choose another --out")
    return state


def train(config, on_tokens=None):
    """
    Train one student for each alpha of config -> [{"alpha", "tokens", "path"}], one for each checkpoint.

    Repeats bit for bit on one CPU and thread count, interrupted or not. on_tokens(n) is called as training
    goes on, in place of a progress bar. Raises ConfigError, DataError or CheckpointError before anything is
    written; SystemExit with 130 or 143 when stopped by Ctrl-C or SIGTERM, after saving the state.
    """
    meta = load_meta(config.data)
    device, dtype = pick_device(config)
    train_bin = os.path.join(config.data, "train.bin")
    batches = Batches(train_bin, config.batch_size, config.block_size, config.seed)
    shape = GPTConfig(meta["vocab_size"], config.block_size, **SIZES[config.size])
    at_step = config.tokens_per_step
    steps = config.tokens // at_step
    marks = {c // at_step: c for c in config.checkpoints} | {steps: config.tokens}       # step -> tokens
    kept = [{"alpha": a, "tokens": c, "path": checkpoint_path(config, a, c)}
            for c in marks.values() for a in config.alpha]
    teacher = load_teacher(config, meta, device) if config.teacher else None

    # a finished run is not repeated, an unfinished one goes on, and another's files are not overwritten
    identity = {"recipe": recipe(config), "corpus": meta["fingerprint"]}
    last = kept[-1]["path"]
    if os.path.exists(last):
        about = load_checkpoint(last)[1]
        if {k: about.get(k) for k in identity} != identity:
            raise ConfigError(f"{last} comes from a run with other settings: choose another --out")
        if all(os.path.exists(k["path"]) for k in kept):
            return kept
    state_path, log_path = os.path.join(config.out, "state.pt"), os.path.join(config.out, "log.jsonl")
    state = unfinished(config, state_path, identity, device)
    students = [Student(shape, alpha, config, device, dtype) for alpha in config.alpha]
    first_step, log_lines = 0, []
    if state:
        first_step = state["step"]
        for student, saved in zip(students, state["students"]):
            student.load_state(saved)
        if os.path.exists(log_path):
            with open(log_path) as f:
                log_lines = [line for line in f
                             if line.endswith("\n") and json.loads(line)["step"] < first_step]
    for k in kept:
        os.makedirs(os.path.dirname(k["path"]), exist_ok=True)
    log = open(log_path, "w")
    log.writelines(log_lines)

    # the fast path is the same functions, compiled: shapes never change in a run, but a process may see many
    # runs
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")           # TF32 where autocast leaves float32
    torch._dynamo.config.cache_size_limit = 64
    fast = config.compile and compiler_works(device)
    fn = functools.partial(torch.compile, dynamic=False) if fast else lambda f: f
    loss_fn, teach = fn(distill_loss), fn(teacher.hidden) if teacher else None
    for student in students:
        student.hidden = fn(student.model.hidden)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    @torch.no_grad()
    def teacher_hidden(x):
        return (teach(x), teacher.lm_head.weight) if teacher else (None, None)

    stopped_by, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        for s in (signal.SIGINT, signal.SIGTERM):             # finish the step, then save and leave
            handlers[s] = signal.signal(s, lambda s, _: stopped_by.append(s))
    name = f"{config.size} ({count_parameters(shape) / 1e6:.2f}M)" + f" x {len(students)}" * (len(students) > 1)
    bar = tqdm(total=steps * at_step, initial=first_step * at_step, desc=name, unit="tok", unit_scale=True,
               disable=True if on_tokens else None)
    if on_tokens:
        on_tokens(first_step * at_step)
    saved_at = logged_at = time.time()
    try:
        for step in range(first_step, steps):
            for micro in range(config.accumulate):
                x, y = batches[step * config.accumulate + micro]
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                with autocast:
                    target = teacher_hidden(x)                # one teacher forward serves every student
                for student in students:                      # one student per alpha, on the same batch
                    with autocast:
                        known = target if student.alpha else (None, None)
                        loss, student.ce, student.kl = loss_fn(
                            student.hidden(x), student.head, y, student.alpha_tensor, *known, config.temperature)
                    student.scaler.scale(loss / config.accumulate).backward()
            lr = learning_rate(config, step, steps)
            for student in students:
                student.clip_and_step(lr)

            done = step + 1
            if done in marks:
                for student in students:
                    path = checkpoint_path(config, student.alpha, marks[done])
                    save_checkpoint(path, student.model, **identity, tokenizer=meta["tokenizer"], size=config.size,
                                    tokens=marks[done], seed=config.seed, alpha=student.alpha,
                                    teacher=config.teacher)
            if step % config.log_every == 0 or done == steps:
                now, ce = time.time(), [round(s.ce.item(), 5) for s in students]
                line = {"step": step, "tokens": done * at_step, "lr": lr, "alpha": config.alpha, "ce": ce,
                        "kl": [round(s.kl.item(), 5) for s in students], "seconds": round(now - logged_at, 3)}
                print(json.dumps(line), file=log, flush=True)
                logged_at = now
                bar.set_postfix_str(f"loss {ce[-1]:.3f}", refresh=False)
            (on_tokens or bar.update)(at_step)
            if stopped_by or time.time() - saved_at > config.save_every:
                states = [student.state() for student in students]
                write_atomically(state_path, {**identity, "step": done, "students": states})
                saved_at = time.time()
            if stopped_by:
                if not on_tokens:
                    print(f"\nstopped at {done * at_step:,} of {config.tokens:,} tokens; the state is saved, "
                          "and the same command goes on from here", file=sys.stderr)
                sys.exit(128 + stopped_by[0])
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        bar.close()
        log.close()
    if os.path.exists(state_path):
        os.remove(state_path)
    return kept


def parse_config(argv=None):
    """Command line -> Config. Every field of Config is a flag; a wrong one is one line and exit code 2."""
    parser = Parser(__doc__)
    for f in fields(Config):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        shown = "none" if default == "" else default
        parser.add_argument(f"--{f.name}", type=f.metadata["kind"], default=f.default, metavar=f.name.upper(),
                            help=f"{f.metadata['help']} (default: {shown})")
    return Config(**vars(parser.parse_args(argv)))


def main():
    start = time.time()
    for checkpoint in train(parse_config()):
        print(f"alpha {checkpoint['alpha']:g} at {short(checkpoint['tokens'])} tokens: {checkpoint['path']}")
    print(f"{time.time() - start:.0f} s; next: python eval.py CHECKPOINTS")


if __name__ == "__main__":
    run(main, ConfigError, CheckpointError)

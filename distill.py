"""
The loss and the training loop. With alpha = 0 this is plain pretraining, which is how teachers are made; with
alpha above 0 a student learns from --teacher as well. eval.py measures the losses on held-out text.

    python data.py                                                     # once: text -> data/python
    python distill.py --size xs --tokens 2M --seed 1001 --out out/xs   # a (weak) teacher, with another seed
    python distill.py --size s --teacher out/xs/ckpt.pt --alpha 0,0.25,1 --out out/taught
    torchrun --nproc_per_node=8 distill.py --data data/fineweb-edu --size 350M ...     # 8 GPUs share a batch

For a token with label y, student logits z, teacher logits t, temperature tau (1 in the paper, readers report)

    loss = (1 - alpha) * CE(z, y)  +  alpha * tau^2 * KL( softmax(t/tau) || softmax(z/tau) )

Several alphas train a student each, side by side, on the same batches, with one teacher forward pass for
all. If interrupted, rerun the same command to resume. Reads the corpus folder of data.py. Writes below --out:
ckpt.pt (with several alphas alpha_A/ckpt.pt), log.jsonl, and state.pt while the run is unfinished.

"Strong Teacher Not Needed? On Distillation in LLM Pretraining", arXiv 2605.23857; Hinton et al., 1503.02531.
"""
import argparse
import functools
import hashlib
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

from data import (END_OF_TEXT, Batches, UserError, load_meta, load_tokenizer, load_tokens, make_parser,
                  note_repeats, run_main, whole_number)
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
    alpha: tuple = (0.0,)         # weight of distillation, 0 to 1; 0,0.25,1 trains three students at once
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
    Train one student for each alpha of config -> paths of the checkpoints, one for each alpha.

    Deterministic for a given CPU and thread count, interrupted or not. Raises UserError.
    """
    check(config)
    device, dtype = pick_device(config.device, config.dtype)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # by torchrun
    if config.batch_size % world:
        raise UserError(f"--batch_size {config.batch_size} is not divisible by {world} ranks")
    meta = load_meta(config.data)
    shape = GPTConfig(meta["vocab_size"], config.block_size, **SIZES[config.size])
    if shape.counts and shape.vocab_size > 4096:             # a table holds the square of that
        raise UserError(f"--size {config.size} needs a vocabulary of at most 4096: use a network "
                        "(in sweep.py: --teachers)")
    batches = Batches(f"{config.data}/train.bin", config.batch_size, config.block_size, config.seed)
    teacher, teacher_id = load_teacher(config, meta, device) if config.teacher else (None, None)
    settings = settings_of(config, meta, dtype, teacher_id)
    paths, state = open_folder(config, settings)
    if all(map(os.path.exists, paths)):                      # finished before
        return paths
    if show_progress and rank == 0:
        note_repeats(config.data, config.tokens)
    if shape.counts:                                         # a table counts in place of training
        if rank == 0:
            table = Table(shape)
            table.count(torch.from_numpy(batches.tokens[:config.tokens].astype("int64")))
            save_checkpoint(paths[0], table, alpha=0.0, settings=settings)
        return paths

    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")           # TF32 where autocast leaves float32
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    maybe_compile = compiler(device) if config.compile else lambda function: function
    fused_loss = functools.partial(distill_loss, chunk_fn=maybe_compile(chunk_loss))
    loss_fn = fused_loss if config.fused else distill_loss_reference
    teacher_forward = maybe_compile(teacher.forward) if teacher else None
    students = [Student(shape, alpha, config, device, dtype, maybe_compile) for alpha in config.alpha]
    first_step, log = state["step"], open(f"{config.out}/log.jsonl" if rank == 0 else os.devnull, "w")
    print(state["log"], end="", file=log, flush=True)        # without the lines of steps after the saved one
    for student, saved in zip(students, state["students"]):  # none in a new run
        for part, values in zip(student.parts, saved):
            part.load_state_dict(values)
    bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, unit="step",
               desc=f"{config.size} x {len(students)}",
               disable=None if show_progress and rank == 0 else True)        # None: off without a terminal
    last_logged, logged_at = first_step, time.perf_counter()
    saved_at = logged_at

    # A step: for each micro-batch the teacher's forward, and each student's forward, loss and backward; then
    # each student's optimizer step. The rest is for several GPUs, float16, NaN and the log.
    for step in bar:
        losses = torch.zeros(len(students), 2, device=device)                # ce and kl, means over the step
        micro_weight = 1 / config.accumulate / world         # so that sums over batches and ranks are means
        for micro in range(config.accumulate):
            x, y = (part[rank::world] for part in batches[step * config.accumulate + micro])   # (B, T) each
            if device.type == "cuda":                        # from pinned memory the copy does not wait
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.no_grad(), autocast(device, dtype):   # one teacher forward serves every student
                teacher_logits = teacher_forward(x) if teacher else None     # (B, T, V)
            for i, student in enumerate(students):           # on the same batch
                with autocast(device, dtype):
                    hidden = student.forward(x)              # (B, T, C)
                    loss, ce, kl = loss_fn(hidden, student.model.lm_head.weight, y, student.alpha,
                                           teacher_logits if student.alpha else None,
                                           config.temperature, config.top_k)
                student.scaler.scale(loss * micro_weight).backward()
                losses[i] += micro_weight * torch.stack([ce, kl])
        lr = learning_rate(config, step)
        for student in students:
            if world > 1:                                    # sum the gradients over ranks
                for p in student.model.parameters():
                    dist.all_reduce(p.grad)
            for group in student.optimizer.param_groups:
                group["lr"] = lr
            student.scaler.unscale_(student.optimizer)
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), config.grad_clip or math.inf)
            student.scaler.step(student.optimizer)
            student.scaler.update()
            student.optimizer.zero_grad(set_to_none=True)

        # the log and the saved state; a step that writes neither does not wait for the GPU
        now = time.perf_counter()
        logging = step % config.log_every == 0 or step + 1 == config.steps
        saving = rank == 0 and step + 1 < config.steps and now - saved_at > config.save_every
        if logging or saving:                                # NaN stays in weights; float16's scale falls
            sound = all(p.isfinite().all() for student in students for p in student.model.parameters())
            if not sound or any(student.scaler.get_scale() < 1 for student in students):
                raise UserError(f"the loss is NaN or inf between steps {last_logged} and {step} (learning "
                                f"rate {lr:.3g}): lower --lr and choose another --out, or check the data")
        if logging:
            if world > 1:
                dist.all_reduce(losses)
            ce, kl = ([round(x, 5) for x in column] for column in losses.T.tolist())
            tokens_per_s = round(config.tokens_per_step * (step + 1 - last_logged) / (now - logged_at))
            last_logged, logged_at = step + 1, now
            print(json.dumps({"step": step, "lr": lr, "alpha": config.alpha, "ce": ce, "kl": kl,
                              "tokens_per_s": tokens_per_s}), file=log, flush=True)
            bar.set_postfix_str(f"ce {ce[-1]:.3f}", refresh=False)
        if saving:
            states = [[part.state_dict() for part in student.parts] for student in students]
            save_file(f"{config.out}/state.pt", {"settings": settings, "step": step + 1, "students": states,
                                                 "log": Path(log.name).read_text()})
            saved_at = now

    log.close()
    if rank == 0:
        for student, path in zip(students, paths):
            save_checkpoint(path, student.model, alpha=student.alpha, settings=settings)
        Path(config.out, "state.pt").unlink(missing_ok=True)
    if world > 1:
        dist.barrier()                                       # the files are there for every rank
        dist.destroy_process_group()
    return paths


class Student:
    """A model in training (teachers too): its alpha, its optimizer, and the loss scaler for float16."""

    def __init__(self, shape, alpha, config, device, dtype, maybe_compile):
        torch.manual_seed(config.seed)                       # every alpha starts from the same weights
        self.alpha, self.model = alpha, GPT(shape).to(device)
        self.forward = maybe_compile(self.model.hidden)      # ids (B, T) -> hidden states (B, T, C)
        parameters = [*self.model.parameters()]
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
             {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
            betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.parts = self.model, self.optimizer, self.scaler                 # what a saved state holds


def learning_rate(config, step):
    """Linear warm-up to the peak, then a cosine down to min_lr times the peak."""
    peak = config.lr or 0.384 / SIZES[config.size]["n_embd"]
    warmup = max(1, int(config.warmup * config.steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return peak * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


# ---- what comes before the loop ----------------------------------------------

def check(config):
    """Refuse settings that do not make sense."""
    for names, low, high in (("tokens batch_size block_size accumulate log_every", 1, math.inf),
                             ("top_k lr weight_decay grad_clip save_every", 0, math.inf),
                             ("temperature", 0.001, math.inf), ("seed", 0, 2**63 - 1),
                             ("min_lr warmup", 0, 1)):
        for name in names.split():
            value = getattr(config, name)
            if not low <= value <= high:                     # refuses NaN too
                raise UserError(f"--{name} must be from {low} to {high}, not {value}")
    for mistake, message in (
            (not all(0 <= a <= 1 for a in config.alpha), f"--alpha must be from 0 to 1, not {config.alpha}"),
            (any(config.alpha) and not config.teacher, "--alpha above 0 needs a --teacher"),
            (config.teacher and not any(config.alpha), "a --teacher has no effect at alpha 0: try 0.25"),
            (config.teacher and "counts" in SIZES[config.size], f"--size {config.size} takes no teacher"),
            (not config.steps, f"--tokens {config.tokens} is less than a step of {config.tokens_per_step}")):
        if mistake:
            raise UserError(message)


def settings_of(config, meta, dtype, teacher_id):
    """All that determines a run's result, up to rounding; and `fused`, as people edit the plain loss."""
    settings = {"corpus": meta["fingerprint"], "tokenizer": meta["tokenizer"],
                **asdict(config), "dtype": str(dtype), "teacher": teacher_id}
    for name in ("data", "out", "device", "compile", "log_every", "save_every"):
        del settings[name]
    return settings


def open_folder(config, settings):
    """
    Make the folders below --out -> paths of the checkpoints, and the state to start from: that of an
    unfinished run, or step 0. Raises UserError if the folder holds files from other settings.
    """
    out, state = Path(config.out), {"step": 0, "students": [], "log": ""}
    for path in (*out.glob("state.pt"), *out.glob("ckpt.pt"), *out.glob("alpha_*/ckpt.pt")):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("settings") != settings:
            raise UserError(f"{path} comes from a run with other settings: choose another --out")
        if path.name == "state.pt":
            state = saved
    folders = [out / f"alpha_{alpha:g}" for alpha in config.alpha] if len(config.alpha) > 1 else [out]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return [str(folder / "ckpt.pt") for folder in folders], state


def load_teacher(config, meta, device):
    """-> the frozen teacher, and its identity: a name, and a hash of the weights."""
    if config.teacher.endswith(".pt") or os.path.isfile(config.teacher):
        teacher, extra = load_checkpoint(config.teacher, device, meta["tokenizer"])
        name = extra["settings"]["size"]
    else:
        name = config.teacher
        teacher = ForeignTeacher(name, config.data, meta["vocab_size"]).to(device)
    if teacher.config.block_size < config.block_size and not teacher.config.counts:
        raise UserError(f"--block_size {config.block_size} exceeds the teacher's {teacher.config.block_size}")
    digest = hashlib.sha256()
    for tensor in teacher.state_dict().values():
        digest.update(tensor.float().cpu().contiguous().numpy())
    return teacher.eval().requires_grad_(False), {"name": name, "weights": digest.hexdigest()}


class ForeignTeacher(torch.nn.Module):
    """
    A causal language model of Hugging Face as a teacher, in float32; its tokenizer must produce the corpus's
    ids. Token ids (B, T) -> logits (B, T, V), cut or padded to the corpus's vocabulary.
    """

    def __init__(self, name, data_dir, vocab_size):
        super().__init__()
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForCausalLM.from_pretrained(name).float()
        except ImportError as e:
            raise UserError(f"--teacher {name} is not a .pt file: pip install transformers ({e})") from None
        except Exception as e:                               # transformers raises many kinds
            reason = str(e).partition("\n")[0]
            raise UserError(f"--teacher {name} is neither a .pt file nor a model that transformers loads: "
                            f"{reason}") from None
        encoding = load_tokenizer(data_dir)
        ids = load_tokens(f"{data_dir}/val.bin")[:10_000].tolist()
        text = max(encoding.decode(ids).split(END_OF_TEXT), key=len)         # a stretch without end-of-text
        if tokenizer.encode(text, add_special_tokens=False) != encoding.encode_ordinary(text):
            raise UserError(f"the tokenizer of {name} does not give the tokens of {data_dir}: data.py "
                            "--vocab_size gpt2 makes a corpus in GPT-2's")
        self.vocab_size = vocab_size
        self.config = GPTConfig(vocab_size, self.model.config.max_position_embeddings)

    def forward(self, idx):
        logits = self.model(idx).logits[..., :self.vocab_size]
        lowest = max(-1e9, torch.finfo(logits.dtype).min)    # under autocast they may be float16
        return F.pad(logits, (0, self.vocab_size - logits.size(-1)), value=lowest)


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
        device, h, w, y = hidden.device, hidden.flatten(0, -2), weight, targets.flatten()
        if teacher_logits is None:
            alpha = 0.0
        if torch.is_autocast_enabled(device.type):           # products in low precision, the rest in float32
            h, w = (x.to(torch.get_autocast_dtype(device.type)) for x in (h, w))
        N, V = len(y), len(w)
        chunks = N / CHUNK_TOKENS if device.type == "cpu" else N * V * 4 / CHUNK_BYTES
        rows = math.ceil(N / math.ceil(chunks))              # of about equal length
        alpha_tensor = torch.full((), alpha, device=device)  # a float would be recompiled for each value
        z_buffer = h.new_empty(rows, V)                      # for all chunks: allocating each is 20 % slower
        dh, dw, ce, kl = torch.empty_like(h), torch.zeros_like(weight), 0.0, 0.0
        with torch.autocast(device.type, enabled=False):
            for start in range(0, N, rows):
                part = slice(start, min(start + rows, N))
                z = torch.mm(h[part], w.T, out=z_buffer[:part.stop - start])                 # (n, V)
                t = None if teacher_logits is None else keep_top_k(teacher_logits.flatten(0, -2)[part], top_k)
                ce_part, kl_part, dz = chunk_fn(z, t, y[part], alpha_tensor, temperature)
                ce, kl = ce + ce_part, kl + kl_part
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
    bfloat16 either form rounds logits to 8 bits: at alpha 1 that changes the gradient by 2 %, and by a third
    where student and teacher are within 0.05 nats.
    """
    return FusedLoss.apply(hidden, weight, targets, alpha, teacher_logits, temperature, top_k, chunk_fn)


@functools.cache
def compiler(device):
    """-> torch.compile, or the identity, with one warning, where it does not work."""
    torch._dynamo.config.cache_size_limit = 64               # 8 is too few: a worker compiles many models
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
        return functools.partial(torch.compile, dynamic=False)
    except Exception as e:                                   # no compiler, a broken one, no Triton
        why = (str(e).partition("Output:\n")[2] or str(e).partition(" raised:\n")[2] or str(e)).split("\n")[0]
        print(f"torch.compile does not work here ({type(e).__name__}: {why}); using eager mode, which is "
              "slower", file=sys.stderr)
        return lambda function: function


# ---- the command line --------------------------------------------------------

def list_of_numbers(text):
    """'0,0.25' -> (0.0, 0.25)."""
    return tuple(float(part) for part in text.split(","))


def true_or_false(text):
    """'true' -> True, 'false' -> False."""
    return ("false", "true").index(text) == 1                # a ValueError for anything else


def parse_config(argv=None):
    """Command line -> Config."""
    parser = make_parser(f"{__doc__}\nFlags, with their defaults:\n\n{inspect.getsource(Config)}")
    kinds = {int: whole_number, float: float, str: str, bool: true_or_false, tuple: list_of_numbers}
    choices = {"size": SIZES, "dtype": ("auto", "float32", "bfloat16", "float16")}
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=kinds[f.type], default=f.default, choices=choices.get(f.name),
                            help=argparse.SUPPRESS)
    return Config(**vars(parser.parse_args(argv)))


def main():
    """Train what the command line asks for, and print where it is saved."""
    start, config = time.perf_counter(), parse_config()
    paths = train(config)
    if int(os.environ.get("RANK", 0)) == 0:
        seconds = time.perf_counter() - start
        print(f"{seconds:.0f} s; next: python eval.py {' '.join(paths)} --data {config.data}")


if __name__ == "__main__":
    run_main(main)

"""
A Llama-style GPT and its checkpoints. Teacher and student are one class. Table is the weakest of teachers: a
unigram or bigram model, which only counts.

    from model import *
    gpt, extra = load_checkpoint("out/alone/ckpt.pt")
    gpt.generate(torch.tensor([[511]]), 20)          # 511: end-of-text at a vocabulary of 512

The architecture of "Strong Teacher Not Needed? On Distillation in LLM Pretraining" (arXiv 2605.23857), which
adopts Llama 3's (2407.21783): RMSNorm before each half of a layer (1910.07467), rotary positions
(2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202), no biases. Unlike there, the head is
tied to the embedding, as our models are small.
"""
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError

ROPE_THETA, NORM_EPS = 500_000.0, 1e-5                       # as in Llama 3


@dataclass
class GPTConfig:
    """The shape of a model."""
    vocab_size: int = 512
    block_size: int = 128            # longest context, in tokens
    n_layer: int = 2
    n_head: int = 4                  # query heads
    n_kv_head: int = 1               # key/value heads; each serves n_head / n_kv_head query heads
    n_embd: int = 64                 # width C
    counts: int = 0                  # 1, 2: no network but a Table of unigram or bigram counts

    @property
    def n_inner(self):
        """Inner width of the SwiGLU: 8/3 of n_embd, rounded up to a multiple of 32."""
        return 32 * math.ceil(8 / 3 * self.n_embd / 32)


SIZES = {
    "unigram": dict(counts=1),
    "bigram": dict(counts=2),
    # laptop, at a vocabulary of 512: minutes on two CPU cores; 0.04, 0.13, 0.34 and 0.77 million parameters
    "xs": dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32),
    "s": dict(n_layer=2, n_head=4, n_kv_head=1, n_embd=64),
    "m": dict(n_layer=3, n_head=4, n_kv_head=1, n_embd=96),
    "l": dict(n_layer=4, n_head=8, n_kv_head=2, n_embd=128),
    # one GPU, at a vocabulary of 512: an hour; named by their parameters
    "5M": dict(n_layer=7, n_head=8, n_kv_head=2, n_embd=256),
    "20M": dict(n_layer=7, n_head=8, n_kv_head=2, n_embd=512),
    # one GPU: named by their parameters at GPT-2's vocabulary, padded to 50,304
    "30M": dict(n_layer=6, n_head=6, n_kv_head=2, n_embd=384),
    "124M": dict(n_layer=14, n_head=12, n_kv_head=3, n_embd=768),
    "350M": dict(n_layer=27, n_head=16, n_kv_head=4, n_embd=1024),
}


def rotary_table(block_size, head_dim):
    """cos and sin of position * frequency, each (block_size, head_dim): RoPE, in Llama's half-split order."""
    freq = ROPE_THETA ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(block_size).float(), freq)
    angle = torch.cat([angle, angle], dim=-1)                # x[i] and x[i + D/2] turn together: see rotate
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, heads, T, D) by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped queries: x (B, T, C), cos and sin (T, D) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        head_dim = config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_head * head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, -1).transpose(1, 2)       # (B, n_head, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)    # (B, n_kv_head, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        share = x.device.type == "cpu"       # not on GPUs: with shared heads not all have a fused kernel
        if not share:
            k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)    # (B, n_head, T, D)
            v = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=share)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """The feed-forward part of a layer, each position by itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, attention and then SwiGLU, each added to x: x (B, T, C), cos and sin (T, D) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V). Parameters are named as in transformers' LlamaModel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=NORM_EPS)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # GPT-2's initialisation: 0.02, and less where a layer adds to the residual stream, so that the
        # stream's variance does not grow with depth
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def hidden(self, idx):
        """Ids (B, T <= block_size) -> final hidden states (B, T, C), after the norm: what the losses take."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens do not fit the context of {self.config.block_size}"
        x = self.embed_tokens(idx)                                           # (B, T, C)
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        return self.norm(x)

    def forward(self, idx):
        return self.lm_head(self.hidden(idx))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled from the top_k likeliest; temperature 0: greedy."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[:, -1] / max(temperature, 1e-5)  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            next_id = torch.multinomial(logits.softmax(-1), 1)
            idx = torch.cat([idx, next_id], dim=1)
        return idx


class Table(nn.Module):
    """Token ids (B, T) -> logits (B, T, V): log-probabilities looked up by the last token, counted once."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("log_probs", torch.zeros(config.vocab_size, config.vocab_size))

    def count(self, tokens):
        """
        Count the ids (N,), int64. Unigram: counts + 1/2. Bigram, by Witten and Bell (1991), for a last token
        a that occurs n(a) times, with u(a) different followers: P(b|a) = (n(ab) + u(a) P(b)) / (n(a) + u(a)).
        """
        V = self.config.vocab_size
        unigram = tokens.bincount(minlength=V).double() + 0.5
        probs = (unigram / unigram.sum()).expand(V, V)
        if self.config.counts == 2:
            pairs = (tokens[:-1] * V + tokens[1:]).bincount(minlength=V * V).view(V, V)
            n, u = pairs.sum(1, keepdim=True), (pairs > 0).sum(1, keepdim=True).clamp(min=1)     # (V, 1)
            probs = (pairs + u * probs) / (n + u)
        self.log_probs.copy_(probs.log())

    def forward(self, idx):
        return self.log_probs[idx]

    generate = GPT.generate


def n_weights(config):
    """Parameters of a GPT without those of its norms; the tied embedding counts once."""
    C, kv = config.n_embd, config.n_embd // config.n_head * config.n_kv_head
    return config.n_layer * (2 * C * C + 2 * C * kv + 3 * C * config.n_inner) + config.vocab_size * C


def flops_per_token(config):
    """
    FLOPs of a forward pass per token at full context: 2 for each weight of a matrix product and 4 T C a layer
    for attention, the causal mask not deducted (PaLM, arXiv 2204.02311, appendix B); none for a table.
    Training takes three times that, with the backward pass.
    """
    if config.counts:
        return 0
    return 2 * n_weights(config) + 4 * config.n_layer * config.block_size * config.n_embd


# ---- where it runs -----------------------------------------------------------

def pick_device(name="auto", dtype="auto"):
    """
    'auto', 'cpu', 'cuda', 'cuda:1', 'mps' ... -> torch.device, and the dtype for autocast(): auto is float32,
    on CUDA bfloat16, or float16 where the GPU has no bfloat16. Under torchrun each rank has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available: use cpu or auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")           # TF32 where autocast leaves float32
        if dtype == "auto":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return device, torch.float32 if dtype == "auto" else getattr(torch, dtype)


def autocast(device, dtype):
    """The context in which a model runs, in training as in evaluation."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- checkpoints -------------------------------------------------------------

def save_file(path, obj):
    """torch.save to a temporary file, then rename: path is never half-written. Raises UserError."""
    aside = f"{path}.{os.getpid()}.tmp"                      # unique, in case the same run is started twice
    try:
        torch.save(obj, aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as e:                     # torch raises RuntimeError when the disk is full
        reason = str(e).partition("\n")[0]
        raise UserError(f"cannot write {path}: is the disk full? ({reason})") from None
    finally:
        Path(aside).unlink(missing_ok=True)


def save_checkpoint(path, model, **extra):
    """Write model and extra (plain numbers, strings, lists, dicts, tensors) to path: all of it or nothing."""
    save_file(path, {"config": asdict(model.config), "model": model.state_dict(), **extra})


def load_checkpoint(path, device="cpu", tokenizer=None):
    """
    -> (model in eval mode, the extra values). Unpickles tensors and plain values only. Raises UserError, also
    if the model was trained with another tokenizer.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: train one with distill.py, or give the path of a .pt file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = GPTConfig(**saved.pop("config"))
        model = Table(config) if config.counts else GPT(config)
        model.load_state_dict(saved.pop("model"))
    except Exception as e:                                   # torch raises many kinds for another file
        raise UserError(f"{path} is not a distill.py checkpoint, or is damaged ({type(e).__name__}): if so, "
                        "delete it and train again") from None
    if tokenizer and saved.get("settings", {}).get("tokenizer") != tokenizer:
        raise UserError(f"{path} was trained with a different tokenizer than this corpus: check --data")
    return model.to(device).eval(), saved

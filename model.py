"""
A Llama-style GPT, its checkpoints, and its way out to other programs.

The architecture is that of "Strong Teacher Not Needed? On Distillation in LLM Pretraining" (arXiv
2605.23857), which takes Llama 3's: RMSNorm before each block (eps 1e-5), rotary positions (theta 500,000),
grouped-query attention, SwiGLU, no biases, and an output head that is tied to the embedding or not. Teacher
and student are the same class in two sizes.

    python model.py                                         # every size with its parameters and FLOPs a token
    python model.py --to_hf out/alone/ckpt.pt out/alone_hf  # for transformers and what reads its folders

Reads and writes nothing but the checkpoints it is asked for. Sources: RMSNorm arXiv 1910.07467, RoPE
2104.09864, SwiGLU 2002.05202, grouped-query attention 2305.13245, Llama 3 2407.21783.
"""
import argparse
import base64
import hashlib
import json
import math
import os
import pickletools
import re
import zipfile
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not one of ours."""


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError where the numbers do not fit together."""
    vocab_size: int = 512
    block_size: int = 128            # longest context, in tokens
    n_layer: int = 2
    n_head: int = 4                  # query heads
    n_kv_head: int = 1               # key/value heads; each serves n_head / n_kv_head query heads
    n_embd: int = 64                 # width C
    rope_theta: float = 500_000.0
    tie_embeddings: bool = True      # True: the head is the embedding matrix
    ffn_ratio: float = 8 / 3         # inner width of the SwiGLU over n_embd; Llama 3 8B has 3.5

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be from 1 to 2^31, not {getattr(self, name)}")
        if not (0 < self.rope_theta < math.inf and 0 < self.ffn_ratio < math.inf):
            raise ValueError("rope_theta and ffn_ratio must be above 0")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f"n_head = {self.n_head} must divide n_embd = {self.n_embd} into even widths")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head = {self.n_kv_head} must divide n_head = {self.n_head}")

    @property
    def n_inner(self):
        """Inner width of the feed-forward block, rounded up to a multiple of 32."""
        return 32 * math.ceil(self.ffn_ratio * self.n_embd / 32)


def _shape(n_layer, n_head, n_kv_head, n_embd, tie_embeddings=True, ffn_ratio=8 / 3):
    return dict(n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
                tie_embeddings=tie_embeddings, ffn_ratio=ffn_ratio)


SIZES = {
    # laptop: for a vocabulary of 512, minutes on two CPU cores
    "xs": _shape(2, 2, 1, 32),
    "s": _shape(2, 4, 1, 64),
    "m": _shape(3, 4, 1, 96),
    "l": _shape(4, 8, 2, 128),
    "xl": _shape(6, 12, 3, 192),
    # one GPU: named by their parameters at GPT-2's vocabulary of 50,304
    "30M": _shape(6, 6, 2, 384),
    "60M": _shape(12, 8, 2, 512),
    "124M": _shape(14, 12, 3, 768),
    "350M": _shape(27, 16, 4, 1024),
    # the paper: named by their parameters at Llama 3's vocabulary of 128,256, untied. 8B is Llama 3 8B
    # itself; the shapes of the other three are ours, chosen to meet the reported counts
    "0.7B": _shape(18, 20, 5, 1280, False, 3.5),
    "1.7B": _shape(22, 16, 4, 2048, False, 3.5),
    "3.8B": _shape(30, 24, 6, 3072, False),
    "8B": _shape(32, 32, 8, 4096, False, 3.5),
}


def rotary_table(block_size, head_dim, theta):
    """cos and sin of position * frequency, each (block_size, head_dim): RoPE, in Llama's half-split order"""
    freq = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(block_size).float(), freq)
    angle = torch.cat([angle, angle], dim=-1)
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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_head < self.n_head)
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
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V). Parameters have the names of transformers' LlamaForCausalLM."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # GPT-2's initialisation: 0.02 everywhere, smaller where a layer adds to the residual stream, so that
        # the stream's variance does not grow with depth
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, idx):
        """Ids (B, T) -> final, normed hidden states (B, T, C). Raises ValueError if T > block_size."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.config.block_size}")
        x = self.embed_tokens(idx)                                           # (B, T, C)
        cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, idx):
        """Ids (B, T) -> logits (B, T, V)."""
        return self.lm_head(self.hidden(idx))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens), sampled; temperature 0: the likeliest; top_k: of k."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[:, -1]           # (B, V)
            if temperature == 0:
                next_id = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                next_id = torch.multinomial(logits.softmax(-1), 1)
            idx = torch.cat([idx, next_id], dim=1)
        return idx


def count_parameters(config):
    """Parameters of a model of this shape, a tied matrix counted once."""
    C, kv = config.n_embd, config.n_embd // config.n_head * config.n_kv_head
    layer = 2 * C * C + 2 * C * kv + 3 * C * config.n_inner + 2 * C
    return (2 - config.tie_embeddings) * config.vocab_size * C + config.n_layer * layer + C


def flops_per_token(config, backward=False):
    """
    Floating-point operations a token at full context: two for each weight of a matrix product (the head's
    included, the embedding's look-up not) and 4 T C a layer for attention, the causal mask not deducted:
    PaLM's appendix B, arXiv 2204.02311. The backward pass costs twice the forward.
    """
    C, kv = config.n_embd, config.n_embd // config.n_head * config.n_kv_head
    weights = config.n_layer * (2 * C * C + 2 * C * kv + 3 * C * config.n_inner) + config.vocab_size * C
    forward = 2 * weights + 4 * config.n_layer * config.block_size * C
    return 3 * forward if backward else forward


# ------------------------------------------------------------------------------
# checkpoints: what torch.save writes, sealed with its own sha256

PLAIN = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}     # all that a checkpoint may call
EXTRA = {"tokenizer": str, "size": str, "tokens": int, "seed": int, "alpha": (float, int), "teacher": str,
         "corpus": str, "taught_by": str, "recipe": dict}                  # what distill.py adds to a model
LONGEST = 2**17                      # context of a model that is loaded: its rotary table is not in the file


def save_checkpoint(path, model, **extra):
    """Write model and extra (plain numbers, strings, lists, dicts, tensors) to path: all of it or nothing."""
    write_atomically(path, {"format": "nanodistill", "config": asdict(model.config),
                            "model": model.state_dict(), **extra})


def sha256_of(f, n):
    """sha256 of the first n bytes of an open file, as 64 hex digits in bytes."""
    digest = hashlib.sha256()
    f.seek(0)
    while n > 0:
        part = f.read(min(n, 2**20))
        digest.update(part)
        n -= len(part) or n
    return digest.hexdigest().encode()


def write_atomically(path, obj):
    """
    torch.save, seal, flush, rename: a kill at any moment leaves the old file or the new. The file is a zip,
    whose last two bytes say that no comment follows; the seal, a sha256 of all before these, becomes the
    comment, so torch.load reads the file as ever. Raises OSError.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w+b") as f:
            try:
                torch.save(obj, f)
            except RuntimeError as e:                       # torch's own word for a full disk
                raise OSError(f"cannot write {path}: {e}") from None
            n = f.seek(0, os.SEEK_END) - 2
            seal = sha256_of(f, n)
            f.seek(n)
            f.write(len(seal).to_bytes(2, "little") + seal)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_sealed(path, device="cpu"):
    """
    What write_atomically wrote. Raises CheckpointError if a byte has changed since, and also for a file that
    somebody sealed with ill intent: nothing is called but what rebuilds tensors, and nothing unpacks to more
    than the file holds.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"no checkpoint at {path}: train one with distill.py, or give its .pt file")
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(size - 66)
            if f.read() != b"\x40\0" + sha256_of(f, size - 66):
                raise ValueError
            with zipfile.ZipFile(f) as z:
                entries = z.infolist()
                if sum(e.file_size for e in entries) > size:
                    raise ValueError
                pickle = next(z.read(e) for e in entries if e.filename.endswith("/data.pkl"))
            operations = pickletools.genops(pickle)
            called = {arg for op, arg, _ in operations if op.name in ("GLOBAL", "STACK_GLOBAL")}
            if not all(name in PLAIN or re.fullmatch(r"torch \w+Storage", str(name)) for name in called):
                raise ValueError
            f.seek(0)
            return torch.load(f, map_location=device, weights_only=True)
    except Exception:                                       # these raise many kinds, of one meaning
        raise CheckpointError(f"{path} is damaged, or no file of distill.py") from None


def load_checkpoint(path, device="cpu"):
    """-> (model in eval mode, the extra values saved with it). Raises CheckpointError."""
    saved = read_sealed(path, device)
    try:
        config, weights = GPTConfig(**saved.pop("config")), saved.pop("model")
        if (saved.pop("format") != "nanodistill" or config.block_size > LONGEST
                or 2 * count_parameters(config) > os.path.getsize(path)
                or not all(isinstance(saved[name], kind) for name, kind in EXTRA.items() if name in saved)):
            raise ValueError
        model = GPT(config).to(device)
        model.load_state_dict(weights)
        if not all(w.isfinite().all() for w in model.parameters()):
            raise ValueError
    except Exception:
        raise CheckpointError(f"{path} is damaged, or no checkpoint of distill.py") from None
    return model.eval(), saved


# ------------------------------------------------------------------------------
# out: the folder that transformers, lm-evaluation-harness, vLLM and llama.cpp's converter read

def merges_of(tokens):
    """
    Byte-pair ranks as the list of merges that other programs want: for each token but the bytes, the two
    parts it is made from, found by merging its bytes in the order of the ranks until two are left.
    """
    rank, merges = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens:
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            k = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], math.inf))
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
        merges += [parts] * (len(parts) == 2)
    return merges


def to_hf(path, folder, data_dir):
    """
    Write the checkpoint at path into a new folder as a Llama: config.json, model.safetensors, tokenizer.json
    and tokenizer_config.json, the tokenizer being that of the corpus in data_dir. Raises CheckpointError;
    OSError, also where the folder exists.
    """
    model, about = load_checkpoint(path)
    try:
        with open(os.path.join(data_dir, "tokenizer.json"), encoding="utf-8") as f:
            text = f.read()
        saved = json.loads(text)
        tokens, pattern = [base64.b64decode(token) for token in saved["tokens"]], saved["pattern"]
        if hashlib.sha256(text.encode()).hexdigest()[:16] != about.get("tokenizer"):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{data_dir} does not have the tokenizer of {path}: give its corpus "
                              "with --data") from None
    c, eot = model.config, len(tokens)
    rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
              "hidden_size": c.n_embd, "intermediate_size": c.n_inner, "num_hidden_layers": c.n_layer,
              "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
              "head_dim": c.n_embd // c.n_head, "max_position_embeddings": c.block_size,
              "rms_norm_eps": 1e-5, "rope_theta": c.rope_theta,
              "rope_parameters": rope, "tie_word_embeddings": c.tie_embeddings, "hidden_act": "silu",
              "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32", "bos_token_id": eot,
              "eos_token_id": eot}

    # GPT-2's way to write bytes as characters: printable ones as they are, the others from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    def spelled(token):
        return "".join(character[b] for b in token)
    end = {"content": "<|endoftext|>", "lstrip": False, "rstrip": False, "normalized": False,
           "single_word": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
           "vocab": {spelled(token): i for i, token in enumerate(tokens)},
           "merges": [[spelled(part) for part in pair] for pair in merges_of(tokens)]}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": eot, **end}],
                 "normalizer": None,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, by_bytes]},
                 "post_processor": None, "decoder": by_bytes, "model": bpe}
    about_it = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end["content"],
                "eos_token": end["content"], "model_max_length": c.block_size,
                "clean_up_tokenization_spaces": False}

    # safetensors: the length of a header in JSON, the header, the tensors' bytes; a tied head is left out
    weights = {name if name.startswith("lm_head") else f"model.{name}": w.contiguous()
               for name, w in model.state_dict().items()
               if not (c.tie_embeddings and name.startswith("lm_head"))}
    header, end_of = {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        header[name] = {"dtype": "F32", "shape": list(w.shape),
                        "data_offsets": [end_of, end_of + 4 * w.numel()]}
        end_of += 4 * w.numel()
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    os.makedirs(folder)
    for name, value in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", about_it)):
        with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1, ensure_ascii=False)
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for w in weights.values():
            f.write(w.numpy().tobytes())


def main():
    """Print the table of sizes, or write a checkpoint as the folder of a Llama."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to_hf", nargs=2, metavar=("CKPT", "DIR"), help="write a checkpoint into a new "
                        "folder that transformers' AutoModelForCausalLM and AutoTokenizer load")
    parser.add_argument("--data", default="data/python", metavar="FOLDER",
                        help="corpus folder whose tokenizer the checkpoint has (default: data/python)")
    args = parser.parse_args()
    if args.to_hf:
        try:
            to_hf(*args.to_hf, args.data)
        except (CheckpointError, OSError) as e:
            parser.exit(2, f"error: {e}\n")
        return print(f"{args.to_hf[1]}: config.json, model.safetensors, tokenizer.json, "
                     "tokenizer_config.json")
    print("size   layers   heads  width      parameters  forward FLOPs/token")
    for name, shape in SIZES.items():
        vocab_size, block_size = {"M": (50_304, 1024), "B": (128_256, 8192)}.get(name[-1], (512, 128))
        c = GPTConfig(vocab_size, block_size, **shape)
        print(f"{name:6} {c.n_layer:6} {c.n_head:4}/{c.n_kv_head:<2} {c.n_embd:6} {count_parameters(c):15,}"
              f" {flops_per_token(c):20,}")


if __name__ == "__main__":
    main()

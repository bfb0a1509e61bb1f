"""
Every promise of the other files, checked: python -m pytest -q

Where somebody else has written the same thing, that is what we compare with: torch's own losses and FLOP counter,
tiktoken's educational byte-pair encoder, transformers' Llama. Otherwise a plain version stands here, or a property.
"""
import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

import data
import distill
import eval as evaluation
import model
import sweep

HERE = Path(__file__).parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small text corpus: 'in domain' is some of Python's standard library, 'poem' something else."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(os.__file__).parent
    sources = [stdlib / name for name in ("argparse.py", "ast.py", "heapq.py", "tarfile.py", "typing.py")]
    (folder / "poem.txt").write_text(poem(40))
    (folder / "more.txt").write_text(poem(400, seed=1))       # so that some of it is held out, whatever the code's hashes
    data.prepare("text", str(folder / "data"), 300, train=[*map(str, sources), str(folder / "more.txt")],
                 ood={"poem": [str(folder / "poem.txt")]})
    return str(folder / "data")


def poem(verses, seed=0):
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choice(["rose", "moon", "sea", "and", "of"]) for _ in range(300)) for _ in range(verses))


def config(corpus, out, **more):
    small = dict(size="xs", tokens=8192, batch_size=4, block_size=32, compile=False, log_every=4)
    return distill.Config(data=corpus, out=str(out), **{**small, **more})


def write_meta(folder, meta):
    """meta.json with a checksum that is right, whatever it says."""
    Path(folder, "meta.json").write_text(json.dumps({**meta, "checksum": data.checksum(meta)}))


def run_script(main, argv, monkeypatch, capsys, *errors):
    """Run a script's main in this process -> (exit code, what it printed, its error lines)."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
    code = 0
    try:
        data.run(main, *errors)
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip()]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------
# model.py

def tiny(n_kv_head=2, tie=True, **more):
    torch.manual_seed(0)
    shape = dict(vocab_size=61, block_size=24, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=32, tie_embeddings=tie)
    return model.GPT(model.GPTConfig(**{**shape, **more})).eval()


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("tie", [True, False])
def test_logits_equal_transformers_llama(n_kv_head, tie):
    transformers = pytest.importorskip("transformers")
    ours = tiny(n_kv_head, tie)
    with torch.no_grad():                                     # large enough weights for every part to matter
        for p in ours.parameters():
            p.mul_(5 if p.dim() == 2 else 1).add_(0.1 * torch.randn_like(p) if p.dim() == 1 else 0)
    c = ours.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=1e-5, rope_theta=c.rope_theta, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=tie)).eval()
    named = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not unexpected and not [m for m in missing if "inv_freq" not in m]
    idx = torch.randint(61, (3, 24))
    with torch.no_grad():
        assert torch.allclose(ours(idx), theirs(idx).logits, atol=1e-4)
    assert sum(p.numel() for p in theirs.parameters()) == model.count_parameters(c)


def test_forward_is_the_head_of_hidden_and_causal():
    m, idx = tiny(), torch.randint(61, (2, 24))
    logits = m(idx)
    assert m.hidden(idx).shape == (2, 24, 32) and torch.equal(logits, m.lm_head(m.hidden(idx)))
    changed = idx.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    assert torch.allclose(m(changed)[:, :10], logits[:, :10], atol=1e-6)
    assert not torch.allclose(m(changed)[:, 10:], logits[:, 10:], atol=1e-3)
    with pytest.raises(ValueError, match="context"):
        m(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("size", model.SIZES)
def test_parameters_and_flops_from_the_shapes(size):
    from torch.utils.flop_counter import FlopCounterMode
    c = model.GPTConfig(512, 64, **model.SIZES[size])
    with torch.device("meta"):
        m, idx = model.GPT(c), torch.zeros(2, 64, dtype=torch.long)
        assert sum(p.numel() for p in m.parameters()) == model.count_parameters(c)
        with FlopCounterMode(display=False) as counter:
            out = m(idx)
        assert counter.get_total_flops() == 2 * 64 * model.flops_per_token(c)
        if c.n_head == c.n_kv_head or size in ("xs", "s"):
            with FlopCounterMode(display=False) as counter:
                m(idx).sum().backward()
            assert counter.get_total_flops() >= 2 * 64 * model.flops_per_token(c, backward=True)
    assert out.shape == (2, 64, 512)


def test_paper_sizes_have_their_names_parameters():
    for size, n in (("0.7B", 0.7e9), ("1.7B", 1.7e9), ("3.8B", 3.8e9), ("8B", 8.0e9)):
        assert abs(model.count_parameters(model.GPTConfig(128_256, 8192, **model.SIZES[size])) / n - 1) < 0.03
    for size, n in (("30M", 30e6), ("60M", 60e6), ("124M", 124e6), ("350M", 350e6)):
        assert abs(model.count_parameters(model.GPTConfig(50_304, 1024, **model.SIZES[size])) / n - 1) < 0.05


def test_generate():
    m, idx = tiny(), torch.randint(61, (2, 5))
    greedy = m.generate(idx, 30, temperature=0)               # beyond the context, which slides
    assert greedy.shape == (2, 35) and torch.equal(greedy[:, :5], idx)
    assert torch.equal(greedy[:, 5], m(idx)[:, -1].argmax(-1))
    assert torch.equal(m.generate(idx, 4, top_k=1), greedy[:, :9])
    top = m(idx)[:, -1].topk(3).indices
    for seed in range(20):
        torch.manual_seed(seed)
        assert (m.generate(idx, 1, temperature=5.0, top_k=3)[:, -1:] == top).any(-1).all()


def test_checkpoint_round_trip_and_damage(tmp_path):
    m, path = tiny(tie=False), tmp_path / "ckpt.pt"
    model.save_checkpoint(str(path), m, note="kept", numbers=[1, 2.5])
    again, extra = model.load_checkpoint(str(path))
    assert same(again.state_dict(), m.state_dict()) and extra == {"note": "kept", "numbers": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    whole = path.read_bytes()
    torch.save({"something": "else"}, tmp_path / "other.pt")
    for bad in (b"", b"not a checkpoint", whole[:len(whole) // 2], whole[:-1], (tmp_path / "other.pt").read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(model.CheckpointError):
            model.load_checkpoint(str(path))
    with pytest.raises(model.CheckpointError, match="no checkpoint"):
        model.load_checkpoint(str(tmp_path / "absent.pt"))


def test_heads_must_fit():
    for wrong in (dict(n_head=3), dict(n_kv_head=3), dict(n_layer=0), dict(n_embd=4, n_head=4)):
        with pytest.raises(ValueError):
            model.GPTConfig(**wrong)


# ------------------------------------------------------------------------------
# data.py

def naive_bpe(text, vocab_size, pattern):
    """Byte-pair encoding by the book: count every pair anew for each merge."""
    words = Counter(tuple(bytes([b]) for b in w.encode()) for w in regex.findall(pattern, text))
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda p: (pairs[p], p))
        ranks[best[0] + best[1]] = len(ranks)
        merged = Counter()
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                out.append(b"".join(word[i:i + step]))
                i += step
            merged[tuple(out)] += n
        words = merged
    return ranks


@pytest.mark.parametrize("seed", range(30))
def test_bpe_merges_equal_counting_anew(seed):
    draw = random.Random(seed)
    alphabet = draw.choice(["ab", "abc ", "aé漢 ", "ab\n 12.", "a"])
    text = "".join(draw.choice(alphabet) for _ in range(draw.choice([0, 1, 40, 400, 2000])))
    size = draw.choice([256, 257, 270, 330])
    assert list(data.train_bpe(text, size, data.PATTERN).items()) == list(naive_bpe(text, size, data.PATTERN).items())


def test_bpe_on_real_code_against_tiktoken():
    from tiktoken._educational import SimpleBytePairEncoding
    text = (HERE / "data.py").read_text()
    ranks = data.train_bpe(text, 420, data.PATTERN)
    assert ranks == naive_bpe(text, 420, data.PATTERN)
    encoding, plain = data.make_encoding(ranks, data.PATTERN), SimpleBytePairEncoding(pat_str=data.PATTERN, mergeable_ranks=ranks)
    for sample in (text, (HERE / "model.py").read_text(), "naïve 漢字 \x00\r\n\t  x  ", ""):
        ids = encoding.encode_ordinary(sample)
        assert ids == plain.encode(sample, visualise=None) and encoding.decode(ids) == sample
    assert encoding.n_vocab == 421 and encoding.eot_token == 420
    with pytest.raises(data.DataError):
        data.train_bpe(text, 255)


def documents_of(folder, name):
    """The documents of a .bin, decoded."""
    encoding, ids = data.load_tokenizer(folder), data.load_tokens(os.path.join(folder, f"{name}.bin"))
    assert ids[-1] == encoding.eot_token
    return encoding.decode(ids.tolist()).split(data.END_OF_TEXT)[:-1]


def test_prepare_keeps_every_document_and_its_counts(tmp_path):
    text = "\n\n".join(f"paragraph {i} " + "x é 漢 " * (i % 50) for i in range(2000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("other text " * 1000)
    out = str(tmp_path / "out")
    meta = data.prepare("text", out, 280, train=[str(tmp_path / "a.txt")], ood={"b": [str(tmp_path / "b.txt")]})
    train, val = documents_of(out, "train"), documents_of(out, "val")
    assert sorted(p for piece in train + val for p in piece.split("\n\n") if p) == sorted(text.split("\n\n"))
    assert not set(train) & set(val) and documents_of(out, "ood_b") == [(tmp_path / "b.txt").read_text() + "\n\n"]
    for name, s in meta["sets"].items():
        docs = documents_of(out, name)
        assert s["documents"] == len(docs) and s["bytes"] == sum(len(d.encode()) for d in docs)
        assert s["sha256"] == data.sha(Path(out, f"{name}.bin").read_bytes(), 64)
    before = {p.name: p.stat().st_mtime_ns for p in Path(out).iterdir()}
    assert data.prepare("text", out, 280, train=[str(tmp_path / "a.txt")], ood={"b": [str(tmp_path / "b.txt")]}) == meta
    with pytest.raises(data.DataError, match="another corpus"):
        data.prepare("text", out, 281, train=[str(tmp_path / "a.txt")], ood={"b": [str(tmp_path / "b.txt")]})
    assert before == {p.name: p.stat().st_mtime_ns for p in Path(out).iterdir()}


def test_split_moves_nothing_when_a_file_is_added():
    documents = [(f"pkg/file{i}.py", f"text {i}") for i in range(2000)]
    one = data.split_documents(documents, {"far": [("f", "far away"), ("copy", "text 3")]})
    two = data.split_documents(documents + [(f"new/{i}.py", f"new {i}") for i in range(50)], {"far": [("f", "far away")]})
    assert set(one["val"]) <= set(two["val"]) and set(one["train"]) <= set(two["train"])
    assert 0.03 < len(one["val"]) / 2000 < 0.07
    assert one["ood_far"] == [("f", "far away")]              # a copy of an in-domain document is no test of anything
    assert [d for d in two["train"] if d in one["train"]] == one["train"]


def test_python_corpus_keeps_its_domains_apart():
    in_domain, ood = data.python_corpus()
    tops = {name.split("/")[0] for name, _ in in_domain}
    assert tops == {"stdlib", "torch"} and set(ood) == {"sympy", "numpy", "networkx", "cpp", "prose"}
    assert not [n for n, _ in in_domain if "site-packages" in n or "pydoc_data" in n or not n.endswith(".py")]
    assert all(sum(len(t) for _, t in docs) > 500_000 for docs in ood.values())
    assert any(name == "topics/lambda" and "anonymous functions" in text for name, text in ood["prose"])


def test_batches_are_a_function_of_seed_and_step(corpus):
    path = os.path.join(corpus, "train.bin")
    tokens, b = data.load_tokens(path), data.Batches(path, 3, 16, seed=5)
    seen, n = [], b.n
    for step in range(math.ceil(2 * n / 3)):
        x, y = b[step]
        assert x.shape == y.shape == (3, 16) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen += [tuple(row.tolist()) for row in torch.cat([x, y[:, -1:]], 1)]
    windows = [tuple(tokens[i * 16:i * 16 + 17].tolist()) for i in range(n)]
    assert sorted(seen[:n]) == sorted(windows) and sorted(seen[n:2 * n]) == sorted(windows)
    assert seen[:n] != seen[n:2 * n] and seen[:n] != windows
    again = data.Batches(path, 3, 16, seed=5)
    for step in (2 * n // 3 - 1, 0, n // 3, 1):               # any order, also across the end of an epoch
        assert torch.equal(again[step][0], b[step][0])
    assert not torch.equal(data.Batches(path, 3, 16, seed=6)[0][0], b[0][0])


def test_big_vocabularies_are_uint32(tmp_path):
    ids = np.array([0, 65535, 65536, 128_000, 7, 8], dtype=np.uint32)
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    one = {"documents": 1, "tokens": 6, "bytes": 24, "bytes_per_token": 4.0, "sha256": data.sha(ids.tobytes(), 64)}
    meta = {"corpus": "x", "source": "s", "fingerprint": "f", "tokenizer": "t", "ids": 128_001, "vocab_size": 128_256,
            "asked_vocab_size": 128_256, "dtype": "uint32", "sets": {"train": one, "val": one}}
    write_meta(tmp_path, meta)
    assert data.Batches(str(tmp_path / "train.bin"), 1, 5, 0)[0][1].tolist() == [[65535, 65536, 128_000, 7, 8]]
    write_meta(tmp_path, {**meta, "ids": 128_000})            # an id that the vocabulary does not have
    with pytest.raises(data.DataError, match="damaged"):
        data.load_tokens(str(tmp_path / "train.bin"))


# ------------------------------------------------------------------------------
# distill.py

def pair(seed=0, B=2, T=5, C=8, C2=12, V=11):
    g = torch.Generator().manual_seed(seed)
    def randn(*shape):
        return torch.randn(*shape, generator=g)
    return randn(B, T, C), randn(V, C), torch.randint(V, (B, T), generator=g), randn(B, T, C2), randn(V, C2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_equals_torchs_own(alpha, temperature):
    hidden, weight, targets, th, tw = pair()
    loss, ce, kl = distill.distill_loss(hidden, weight, targets, alpha, th, tw, temperature)
    z, t = hidden @ weight.T, th @ tw.T
    ce2 = F.cross_entropy(z.view(-1, 11), targets.view(-1))
    kl2 = F.kl_div((z / temperature).log_softmax(-1).view(-1, 11), (t / temperature).log_softmax(-1).view(-1, 11),
                   log_target=True, reduction="batchmean")
    assert torch.allclose(ce, ce2) and torch.allclose(kl, kl2, atol=1e-6)
    assert torch.allclose(loss, (1 - alpha) * ce2 + alpha * temperature**2 * kl2, atol=1e-5)
    assert torch.allclose(distill.distill_loss(hidden, weight, targets, 0.0)[0], ce2)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradient_in_closed_form_and_by_finite_differences(alpha):
    hidden, weight, targets, th, tw = pair(1)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    th, tw = th.requires_grad_(), tw.requires_grad_()
    distill.distill_loss(hidden, weight, targets, alpha, th, tw)[0].backward()
    assert th.grad is None and tw.grad is None                # the teacher is frozen
    z, t = hidden @ weight.T, th @ tw.T
    dz = (z.softmax(-1) - (1 - alpha) * F.one_hot(targets, 11) - alpha * t.softmax(-1)) / targets.numel()
    assert torch.allclose(hidden.grad, dz @ weight, atol=1e-6)
    assert torch.allclose(weight.grad, dz.flatten(0, 1).T @ hidden.flatten(0, 1), atol=1e-6)
    with torch.no_grad():
        for i in range(3):
            moved = torch.zeros_like(weight)
            moved[i, i] = 1e-2
            up, down = (distill.distill_loss(hidden, weight + s * moved, targets, alpha, th, tw)[0] for s in (1, -1))
            assert abs((up - down).item() / 2e-2 - weight.grad[i, i].item()) < 1e-4


OPTIONS = [{}, {"top_k": 1}, {"top_k": 4}, {"top_k": 50}, {"top_p": 0.7}, {"top_k": 4, "other": True},
           {"top_p": 0.7, "other": True}, {"hard": True}]


def by_hand(z, t, y, alpha, temperature, top_k=0, top_p=1.0, other=False, hard=False):
    """The loss of one token in plain Python, from its definition."""
    def softmax(logits, temperature=1.0):
        e = [math.exp(x / temperature) for x in logits]
        return [x / sum(e) for x in e]
    ce, p, q = -math.log(softmax(z)[y]), softmax(z, temperature), softmax(t, temperature)
    order = sorted(range(len(q)), key=lambda i: -q[i])
    if hard:
        return (1 - alpha) * ce - alpha * math.log(softmax(z)[order[0]])
    keep = order[:top_k or len(q)]
    if top_p < 1:
        keep = [i for n, i in enumerate(order) if sum(q[j] for j in order[:n]) < top_p]
    if other and len(keep) < len(q):
        pairs = [(q[i], p[i]) for i in keep] + [(1 - sum(q[i] for i in keep), 1 - sum(p[i] for i in keep))]
    else:
        pairs = [(q[i] / sum(q[j] for j in keep), p[i]) for i in keep]
    return (1 - alpha) * ce + alpha * temperature**2 * sum(a * math.log(a / b) for a, b in pairs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_options_by_hand(options, temperature):
    hidden, weight, targets, th, tw = pair(3)
    loss = distill.distill_loss_reference(hidden, weight, targets, 0.6, th, tw, temperature, **options)[0]
    z, t = (hidden @ weight.T).flatten(0, 1).tolist(), (th @ tw.T).flatten(0, 1).tolist()
    tokens = [by_hand(*row, 0.6, temperature, **options) for row in zip(z, t, targets.flatten().tolist())]
    assert abs(loss.item() - sum(tokens) / len(tokens)) < 1e-5
    given = distill.distill_loss_reference(hidden, weight, targets, 0.6, th @ tw.T, None, temperature, **options)[0]
    assert torch.equal(given, loss)                           # the teacher's logits in place of its states


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_loss_equals_the_plain_one(options, alpha, temperature, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 4)                  # 10 tokens: two whole chunks and a rest
    found = []
    for loss_fn, logits in ((distill.distill_loss, False), (distill.distill_loss, True), (distill.distill_loss_reference, False)):
        hidden, weight, targets, th, tw = pair(4)
        th, tw = (th @ tw.T, None) if logits else (th, tw)
        hidden.requires_grad_(), weight.requires_grad_()
        loss, ce, kl = loss_fn(hidden, weight, targets, torch.tensor(alpha), th, tw, temperature, **options)
        (3 * loss).backward()
        assert not ce.requires_grad and not kl.requires_grad
        found.append((loss, ce, kl, hidden.grad, weight.grad))
    for fused, shared, plain in zip(*found):
        assert fused.shape == plain.shape and torch.allclose(fused, plain, atol=1e-5), (fused, plain)
        assert torch.allclose(shared, plain, atol=1e-5)       # the teacher's logits in place of its states
    hidden, weight, targets, th, tw = pair(5)
    plain, fused = (f(hidden, weight, targets, 0.3)[0] for f in (distill.distill_loss_reference, distill.distill_loss))
    assert torch.allclose(plain, fused, atol=1e-6)            # no teacher


def test_fused_gradient_by_finite_differences(monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 4)
    hidden, weight, targets, th, tw = pair(6)
    hidden.requires_grad_()
    def loss_of(h):
        return distill.distill_loss(h, weight, targets, 0.4, th, tw, 2.0)[0]
    loss_of(hidden).backward()
    with torch.no_grad():
        for i in range(5):
            moved = torch.zeros_like(hidden)
            moved[i % 2, i, i] = 1e-2
            slope = (loss_of(hidden + moved) - loss_of(hidden - moved)).item() / 2e-2
            assert abs(slope - hidden.grad[i % 2, i, i].item()) < 1e-4


def test_fused_loss_in_low_precision_and_compiled(monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 4)
    hidden, weight, targets, th, tw = pair(7)
    hidden.requires_grad_(), weight.requires_grad_()
    exact = distill.distill_loss(hidden, weight, targets, 0.4, th, tw)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = distill.distill_loss(hidden, weight, targets, 0.4, th, tw)[0]
    loss.backward()
    assert weight.grad.dtype == torch.float32 and loss.dtype == torch.float32 and abs(loss - exact) < 0.05
    if distill.compiler_works(torch.device("cpu")):
        fast = torch.compile(distill.chunk_loss, dynamic=False)
        assert torch.allclose(distill.distill_loss(hidden, weight, targets, torch.tensor(0.4), th, tw, chunk_fn=fast)[0], exact)


def test_pure_distillation_from_oneself_is_at_its_minimum():
    hidden, weight, targets, _, _ = pair(2)
    weight.requires_grad_()
    loss, _, kl = distill.distill_loss(hidden, weight, targets, 1.0, hidden, weight.detach(), 2.0)
    loss.backward()
    assert abs(kl.item()) < 1e-6 and weight.grad.abs().max() < 1e-6


def test_learning_rate_warms_up_and_falls_to_its_floor():
    c = distill.Config(lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [distill.learning_rate(c, s, 200) for s in range(200)]
    assert rates[0] == 1 / 20 and max(rates) == rates[19] == 1.0 and 0.1 < rates[-1] < 0.101
    assert all(a > b for a, b in zip(rates[20:], rates[21:])) and abs(rates[110] - 0.55) < 1e-9


def test_decay_is_for_matrices_only(corpus):
    shape = model.GPTConfig(300, 32, **model.SIZES["xs"])
    student = distill.Student(shape, 0.0, config(corpus, "x"), torch.device("cpu"), torch.float32)
    matrices, vectors = student.optimizer.param_groups
    assert all(p.dim() == 2 for p in matrices["params"]) and matrices["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in vectors["params"]) and vectors["weight_decay"] == 0.0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(student.model.parameters()))


def test_training_repeats_and_many_alphas_equal_one_at_a_time(corpus, tmp_path):
    kept = distill.train(config(corpus, tmp_path / "teacher", seed=9, checkpoints=(2048, 4096)))
    assert [k["tokens"] for k in kept] == [2048, 4096, 8192]
    assert not same(weights(kept[0]["path"]), weights(kept[2]["path"]))
    short_run = distill.train(config(corpus, tmp_path / "again", seed=9))
    assert same(weights(short_run[0]["path"]), weights(kept[2]["path"]))
    teacher = kept[-1]["path"]
    together = distill.train(config(corpus, tmp_path / "together", size="s", teacher=teacher, alpha=(0.0, 0.25, 1.0)))
    for k in together:
        assert f"alpha_{k['alpha']:g}" in k["path"]
        alone = config(corpus, tmp_path / f"alone{k['alpha']}", size="s", alpha=(k["alpha"],), teacher=teacher if k["alpha"] else "")
        assert same(weights(distill.train(alone)[0]["path"]), weights(k["path"]))
    log = [json.loads(line) for line in open(tmp_path / "together" / "log.jsonl")]
    assert [line["step"] for line in log] == [*range(0, 64, 4), 63] and log[-1]["ce"][0] < log[0]["ce"][0] - 0.5
    assert log[-1]["kl"][2] < log[-1]["kl"][1]                # pure distillation comes nearest to the teacher
    assert not list(tmp_path.rglob("state.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_a_finished_run_is_not_repeated_nor_overwritten(corpus, tmp_path):
    first = distill.train(config(corpus, tmp_path))
    before = os.stat(first[0]["path"]).st_mtime_ns
    assert distill.train(config(corpus, tmp_path)) == first
    with pytest.raises(distill.ConfigError, match="other settings"):
        distill.train(config(corpus, tmp_path, lr=1e-3))
    assert os.stat(first[0]["path"]).st_mtime_ns == before


def test_another_runs_files_are_safe(corpus, tmp_path):
    teacher = distill.train(config(corpus, tmp_path / "t"))[0]["path"]
    first = distill.train(config(corpus, tmp_path / "s", teacher=teacher, alpha=(0.0, 0.5)))
    before = [os.stat(k["path"]).st_mtime_ns for k in first]
    with pytest.raises(distill.ConfigError, match="other settings"):           # shares alpha_0.5 alone
        distill.train(config(corpus, tmp_path / "s", teacher=teacher, alpha=(0.5, 1.0)))
    with pytest.raises(distill.ConfigError, match="other settings"):
        distill.train(config(corpus, tmp_path / "t", teacher=teacher, alpha=(0.5, 1.0)))
    moved = shutil.copy(teacher, tmp_path / "same_teacher.pt")                 # the same by another name is the same
    assert distill.train(config(corpus, tmp_path / "s", teacher=str(moved), alpha=(0.0, 0.5))) == first
    other = distill.train(config(corpus, tmp_path / "t2", seed=5))[0]["path"]
    shutil.copy(other, teacher)                                                # another by the same name is not
    with pytest.raises(distill.ConfigError, match="other settings"):
        distill.train(config(corpus, tmp_path / "s", teacher=teacher, alpha=(0.0, 0.5)))
    assert before == [os.stat(k["path"]).st_mtime_ns for k in first]


def test_accumulation_equals_a_bigger_batch(corpus, tmp_path):
    a = distill.train(config(corpus, tmp_path / "a", batch_size=4, accumulate=2))[0]["path"]
    b = distill.train(config(corpus, tmp_path / "b", batch_size=8))[0]["path"]
    for k, v in weights(a).items():
        assert torch.allclose(v, weights(b)[k], atol=1e-3)


def test_low_precision_and_temperature_train(corpus, tmp_path):
    teacher = distill.train(config(corpus, tmp_path / "t", dtype="bfloat16"))[0]["path"]
    student = distill.train(config(corpus, tmp_path / "s", dtype="bfloat16", teacher=teacher, alpha=(0.5,), temperature=2.0))
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in weights(student[0]["path"]).values())


def test_compiled_loss_and_model_equal_the_plain_ones(corpus, tmp_path):
    if not distill.compiler_works(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    teacher = distill.train(config(corpus, tmp_path / "t"))[0]["path"]
    runs = {c: distill.train(config(corpus, tmp_path / str(c), tokens=1024, teacher=teacher, alpha=(0.3, 1.0), compile=c))
            for c in (True, False)}
    for fast, plain in zip(runs[True], runs[False]):
        for k, v in weights(fast["path"]).items():
            assert torch.allclose(v, weights(plain["path"])[k], atol=2e-3)


def test_no_compiler_means_eager_and_a_word_about_it(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", broken)
    distill.compiler_works.cache_clear()
    assert not distill.compiler_works(torch.device("cpu"))
    distill.compiler_works.cache_clear()
    assert "eager mode" in capsys.readouterr().err


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_never_stopped(corpus, tmp_path, signal_number):
    argv = ["--data", corpus, "--size", "xs", "--tokens", "64K", "--batch_size", "4", "--block_size", "32", "--compile", "false"]
    whole = distill.train(distill.parse_config([*argv, "--out", str(tmp_path / "whole"), "--checkpoints", "32K"])[1])
    command = [sys.executable, "distill.py", *argv, "--out", str(tmp_path / "parts"), "--checkpoints", "32K"]
    process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    log = tmp_path / "parts" / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.02)
    process.send_signal(signal_number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal_number and "the same command goes on" in err, err
    parts = distill.train(distill.parse_config([*argv, "--out", str(tmp_path / "parts"), "--checkpoints", "32K"])[1])
    assert [same(weights(p["path"]), weights(w["path"])) for p, w in zip(parts, whole)] == [True, True]
    def steps(run):
        return [json.loads(line)["step"] for line in open(tmp_path / run / "log.jsonl")]
    assert steps("parts") == steps("whole")


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo, and Linux's list of children")
def test_two_ranks_equal_one_and_stop_together(corpus, tmp_path):
    teacher = distill.train(config(corpus, tmp_path / "t", seed=9))[0]["path"]
    argv = ["distill.py", "--data", corpus, "--size", "xs", "--batch_size", "4", "--block_size", "32", "--compile", "false", "--log_every", "4",
            "--accumulate", "2", "--teacher", teacher, "--alpha", "0,0.5", "--save_every", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    def curve(run):
        lines = [json.loads(line) for line in open(tmp_path / run / "log.jsonl")]
        return np.array([[*line["ce"], *line["kl"]] for line in lines])
    distill.train(distill.parse_config([*argv[1:], "--tokens", "16K", "--out", str(tmp_path / "one")])[1])
    done = subprocess.run([*torchrun, "--tokens", "16K", "--out", tmp_path / "two"], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("alpha 0.5 at 16K tokens") == 1, done.stderr
    assert curve("one").shape == curve("two").shape and np.abs(curve("one") - curve("two")).max() < 2e-4
    assert {p.name for p in (tmp_path / "two").rglob("*") if p.is_file()} == {".lock", "log.jsonl", "ckpt.pt"}

    def stopped(how):
        """Start a longer run and stop it: SIGTERM to torchrun, or SIGKILL to one of the ranks."""
        process = subprocess.Popen([*torchrun, "--tokens", "64K", "--out", tmp_path / "long"], cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True)
        log = tmp_path / "long" / "log.jsonl"
        before = len(log.read_text().splitlines()) if log.exists() else 0
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > before + 4):
            time.sleep(0.02)
        child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])
        os.kill(child if how == signal.SIGKILL else process.pid, how)
        err = process.communicate(timeout=90)[1]
        assert process.returncode != 0
        return err
    assert "Signal 9 (SIGKILL)" in stopped(signal.SIGKILL)    # a rank that dies ends the job and is named
    assert "the same command goes on" in stopped(signal.SIGTERM)
    done = subprocess.run([*torchrun, "--tokens", "64K", "--out", tmp_path / "long"], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    distill.train(distill.parse_config([*argv[1:], "--tokens", "64K", "--out", str(tmp_path / "long_one")])[1])
    assert np.abs(curve("long_one") - curve("long")).max() < 5e-2              # rounding grows over 256 steps
    bad = subprocess.run([*torchrun, "--batch_size", "3", "--out", tmp_path / "bad"], cwd=HERE, env=environment, capture_output=True, text=True)
    assert bad.returncode != 0 and "cannot be shared by 2 ranks" in bad.stderr and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("taught", [True, False])
def test_profile_prints_where_the_time_goes(taught, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "profile", functools.partial(distill.profile, blocks=2, calls=1))
    argv = ["--profile", "--data", corpus, "--size", "xs", "--batch_size", "4", "--block_size", "32", "--compile", "false", "--out", tmp_path / "run"]
    if taught:
        argv += ["--teacher", distill.train(config(corpus, tmp_path / "t"))[0]["path"], "--alpha", "0.5"]
    code, out, err = run_script(distill.main, argv, monkeypatch, capsys, distill.ConfigError)
    parts = ["data", "teacher forward", "student forward", "loss", "backward", "optimizer", "whole step", "whole / floor", "FLOP/s", "peak memory"]
    assert code == 0 and [line[:16].strip() for line in out.splitlines()] == parts and not (tmp_path / "run").exists(), (out, err)
    assert (float(out.splitlines()[1].split()[2]) > 0) == taught


def test_every_field_is_a_flag_with_its_default():
    assert distill.parse_config([]) == (False, distill.Config())
    assert {f.name for f in fields(distill.Config)} >= {"teacher", "alpha", "temperature", "tokens", "seed", "compile"}
    _, c = distill.parse_config("--teacher t.pt --alpha 0.1,0.25,0.5 --tokens 3M --checkpoints 1M,2M --compile false".split())
    assert (c.alpha, c.tokens, c.checkpoints, c.compile) == ((0.1, 0.25, 0.5), 3145728, (1048576, 2097152), False)
    for n in (1, 1000, 1024, 3 * 2**20, 5 * 2**18, 2**30, 10**9):
        assert distill.count(distill.short(n)) == n


# ------------------------------------------------------------------------------
# eval.py

@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """The tasks of the python corpus, with a corpus folder that holds their documents and a vocabulary of 512."""
    in_domain, _ = data.python_corpus()
    sets = data.split_documents(in_domain, {})
    folder = str(tmp_path_factory.mktemp("tasks"))
    ranks = data.train_bpe("".join(text for _, text in sets["train"][:60]), 511)
    encoding = data.make_encoding(ranks, data.PATTERN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        documents = [text for _, text in sets["val"]]
        made = evaluation.make_tasks(documents, encoding)
        assert made == evaluation.make_tasks(documents, encoding)            # always the same
    return made, encoding, documents


def test_task_items_are_what_they_say(tasks):
    made, encoding, documents = tasks
    assert all(len(items) >= 1000 for items in made.values()) and set(made) == {"next_line", "minimal_pair", "recall"}
    everything = "\n".join(documents)
    for item in made["next_line"][::20]:
        right = item["choices"][item["label"]]
        assert item["context"] + right + "\n" in everything + "\n" and len(set(item["choices"])) == 4
        home = [text for text in documents if item["context"] + right in text]
        assert any(all(choice in text for choice in item["choices"]) for text in home)
    rules = Counter()
    def tree(line):
        line = line.strip() + (" pass" if line.endswith(":") else "")
        try:
            return ast.dump(ast.parse(line))
        except SyntaxError:
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in made["minimal_pair"]:
            good, bad = item["choices"][item["label"]], item["choices"][1 - item["label"]]
            assert tree(good) is not None and tree(bad) != tree(good) and item["context"] + good in everything
            assert (tree(bad) is None) == (item["rule"] in ("bracket", "colon", "keyword")), item
            assert len(encoding.encode_ordinary(good)) == len(encoding.encode_ordinary(bad))
            rules[item["rule"]] += 1
    assert set(rules) == set(evaluation.RULES) and min(rules.values()) > 50
    for item in made["recall"]:
        name = item["choices"][0].strip()
        earlier, _, line = item["context"].rpartition("\n")
        assert name in evaluation.words_of(earlier) and name not in evaluation.words_of(line)
        assert item["context"] + item["choices"][0] in everything
    for task, items in made.items():
        labels = Counter(item["label"] for item in items)
        assert task == "recall" or max(labels.values()) < 1.2 * len(items) / len(labels)
        for item in items[::7]:                               # the boundary falls between two tokens
            for choice in item["choices"]:
                context = encoding.encode_ordinary(item["context"])
                assert encoding.encode_ordinary(item["context"] + choice) == context + encoding.encode_ordinary(choice)


def test_untrained_models_are_at_chance(tasks):
    made, encoding, _ = tasks
    for task, chance in (("next_line", 0.25), ("minimal_pair", 0.5), ("recall", 0.0)):
        right = []
        for seed in range(3):
            torch.manual_seed(seed)
            m = model.GPT(model.GPTConfig(512, 128, **model.SIZES["xs"])).eval()
            scores = evaluation.score_items(m, encoding, made[task][::4])
            right += [s[task in evaluation.NORMED] for s in scores]
        error = 1.96 * math.sqrt(max(chance, 0.02) * (1 - chance) / len(right))
        assert abs(sum(right) / len(right) - chance) <= 1.5 * error, (task, sum(right) / len(right), error)


def test_scores_are_sums_of_log_probabilities(tasks):
    """One item at a time, without batches or padding, as the definition has it."""
    made, encoding, _ = tasks
    torch.manual_seed(0)
    m = model.GPT(model.GPTConfig(512, 128, **model.SIZES["xs"])).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(8)                                         # opinionated
        items = [item for task in made.values() for item in task[::150]]
        items += [{"context": "x = 1\n" * 100 + "y", "choices": [" a", " long" * 90], "label": 0}]  # over 128 tokens
        items += [{"context": "x = ", "choices": ["y1", "z"], "label": 1}, {"context": "", "choices": ["y", "z1"], "label": 0}]
        for item, (acc, acc_norm) in zip(items, evaluation.score_items(m, encoding, items)):
            sums, greedy = [], []
            for choice in item["choices"]:
                space = " " * (len(item["context"]) - len(item["context"].rstrip()))      # belongs to the choice
                context, ids = encoding.encode_ordinary(item["context"].rstrip()), encoding.encode_ordinary(space + choice)
                whole = ((context or [encoding.eot_token]) + ids)[-129:]
                logits = m(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
                n = min(len(ids), 128)
                sums.append(sum(logits[k - 1, whole[k]].item() for k in range(len(whole) - n, len(whole))))
                greedy.append(all(logits[k - 1].argmax() == whole[k] for k in range(len(whole) - n, len(whole))))
            if len(sums) == 1:
                assert acc == acc_norm == int(greedy[0])
            else:
                assert acc == int(np.argmax(sums) == item["label"])
                assert acc_norm == int(np.argmax([s / len(c) for s, c in zip(sums, item["choices"])]) == item["label"])


def test_items_can_be_written_read_and_scored(corpus, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_tasks", lambda _: {task: items[:60] for task, items in tasks[0].items()})
    path = distill.train(config(corpus, tmp_path / "run"))[0]["path"]
    code, out, err = run_script(evaluation.main, ["--write_tasks", tmp_path / "tasks", "--data", corpus], monkeypatch, capsys)
    files = sorted((tmp_path / "tasks").iterdir())
    assert code == 0 and [file.stem for file in files] == sorted(tasks[0]), (out, err)
    made = evaluation.load_tasks(corpus)
    for file in files:
        assert evaluation.read_items(file) == made[file.stem]
    code, out, err = run_script(evaluation.main, [path, "--tasks", *files, "--data", corpus, "--json"], monkeypatch, capsys)
    scores = {Path(found["tasks"]).stem: found for found in json.loads(out)}
    for task, items in made.items():
        both = list(zip(*evaluation.score_items(model.load_checkpoint(path)[0], data.load_tokenizer(corpus), items)))
        assert [scores[task]["acc"], scores[task]["acc_norm"]] == [sum(column) / len(items) for column in both]


def test_calibration_error_of_known_predictions():
    confidence, draw = torch.linspace(0.01, 0.999, 100_000), torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert evaluation.calibration_error(draw < confidence, confidence) < 0.01             # right as often as it says
    assert abs(evaluation.calibration_error(draw < 0.5, torch.full((100_000,), 0.9)) - 0.4) < 0.01
    assert evaluation.calibration_error(torch.tensor([True, False]), torch.tensor([1.0, 0.0])) == 0.0
    right = torch.tensor([True, True, False, True])                                       # two bins, by hand
    assert abs(evaluation.calibration_error(right, torch.tensor([0.95, 0.99, 0.41, 0.43])) - (0.06 + 0.16) / 4) < 1e-6


def test_token_gains_add_up(corpus, tmp_path, monkeypatch, capsys):
    teacher = distill.train(config(corpus, tmp_path / "t", size="s", seed=7, tokens=16384))[0]["path"]
    both = distill.train(config(corpus, tmp_path / "s", teacher=teacher, alpha=(0.0, 0.5)))
    models = [model.load_checkpoint(path)[0] for path in (*(k["path"] for k in both), teacher)]
    for where, x in evaluation.token_gains(*models, corpus, 64).items():
        assert abs(sum(share * gain for share, gain in x["groups"].values()) - x["gain"]) < 1e-6
        assert abs(sum(share for share, _ in x["groups"].values()) - 1) < 1e-6
        assert abs(sum(gain for _, gain in x["deciles"]) / 10 - x["gain"]) < 0.02 and len(x["deciles"]) == 10
        assert [loss for loss, _ in x["deciles"]] == sorted(loss for loss, _ in x["deciles"])
        metrics = [evaluation.evaluate(m, corpus, 64, 10) for m in models]
        name = "in_domain" if where == "in_domain" else "ood/poem"
        losses = [m[name]["report"] for m in metrics[:2]]
        assert abs(losses[0] - losses[1] - x["gain"]) < 1e-4   # and the whole is the difference of the losses
        rows = evaluation.read_windows(evaluation.evaluation_sets(corpus)[name], 32, 64)["report"]
        (b, br, _), (s, _, _), (_, tr, _) = (evaluation.token_scores(m, rows) for m in models)
        only = [(b - s)[i, j].item() for i, j in zip(*np.nonzero((tr & ~br).numpy()))]
        assert x["groups"]["teacher only"][0] == len(only) / b.numel()       # none, if the teacher learned little
        assert abs(x["groups"]["teacher only"][1] - (np.mean(only) if only else 0)) < 1e-5
    argv = [both[0]["path"], both[1]["path"], "--teacher", teacher, "--data", corpus]
    code, out, err = run_script(evaluation.main, argv, monkeypatch, capsys)
    assert code == 0 and "teacher only" in out and out.count("tenths") == 2


def test_token_groups_of_made_up_models(corpus, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    loss, right = torch.rand(3, 64, 32, generator=draw), torch.rand(3, 64, 32, generator=draw) < 0.5
    models = [SimpleNamespace(config=SimpleNamespace(block_size=32), k=k) for k in range(3)]
    monkeypatch.setattr(evaluation, "token_scores", lambda m, rows: (loss[m.k, :len(rows)], right[m.k, :len(rows)], None))
    for x in evaluation.token_gains(*models, corpus, 64).values():
        seen = dict.fromkeys([(True, True), (True, False), (False, True), (False, False)], ())
        for r in range(64):
            for t in range(32):
                seen[right[2, r, t].item(), right[0, r, t].item()] += ((loss[0, r, t] - loss[1, r, t]).item(),)
        for (share, gain), gains in zip(x["groups"].values(), seen.values()):
            assert abs(gain - np.mean(gains)) < 1e-6 and abs(share - len(gains) / 2048) < 1e-9


def test_evaluate_is_the_mean_loss_over_disjoint_halves(corpus):
    m = tiny(vocab_size=300)
    metrics = evaluation.evaluate(m, corpus, windows=1000)
    assert {k for k in metrics if not k.startswith("task/")} == {"in_domain", "ood/poem", "ece/in_domain", "ece/ood/poem"}
    for name, file in (("in_domain", "val"), ("ood/poem", "ood_poem")):
        tokens = torch.from_numpy(data.load_tokens(os.path.join(corpus, f"{file}.bin")).astype(np.int64))
        n = (len(tokens) - 1) // 24
        x, y = tokens[:n * 24].view(n, 24), tokens[1:n * 24 + 1].view(n, 24)
        with torch.no_grad():
            for half, part in (("select", slice(0, n // 2)), ("report", slice(n // 2, n))):
                expected = F.cross_entropy(m(x[part]).flatten(0, 1), y[part].flatten()).item()
                assert abs(metrics[name][half] - expected) < 1e-4
    rows = evaluation.read_windows(os.path.join(corpus, "train.bin"), 24, 5)
    assert rows["select"].shape == rows["report"].shape == (5, 25)
    assert not {tuple(r.tolist()) for r in rows["select"]} & {tuple(r.tolist()) for r in rows["report"]}


def test_untrained_model_is_at_chance_and_bits_per_byte_follow(corpus, tmp_path):
    m = tiny(vocab_size=300)
    model.save_checkpoint(str(tmp_path / "m.pt"), m, tokenizer=data.load_meta(corpus)["tokenizer"])
    found = evaluation.describe(str(tmp_path / "m.pt"), corpus, 10**6, 10, "cpu")
    s, encoding = found["sets"]["in_domain"], data.load_tokenizer(corpus)
    ids = evaluation.read_windows(os.path.join(corpus, "val.bin"), 24, 10**6)["report"][:, 1:].flatten().tolist()
    size = len(encoding.decode_bytes([i for i in ids if i != encoding.eot_token]))
    assert abs(s["loss"] - math.log(300)) < 0.1 and abs(s["perplexity"] - math.exp(s["loss"])) < 1e-9
    assert abs(s["bits_per_byte"] - s["loss"] * len(ids) / math.log(2) / size) < 1e-5


def test_eval_prints_tables_and_json(corpus, tmp_path, monkeypatch, capsys):
    paths = [k["path"] for k in distill.train(config(corpus, tmp_path, checkpoints=(4096,)))]
    code, out, err = run_script(evaluation.main, [*paths, "--data", corpus], monkeypatch, capsys)
    assert code == 0 and out.count("in_domain") == 1 and "ood/poem" in out and "[1]" in out
    code, out, err = run_script(evaluation.main, [*paths, "--data", corpus, "--json"], monkeypatch, capsys)
    found = json.loads(out)
    assert [c["tokens"] for c in found] == [4096, 8192] and set(found[0]["sets"]["in_domain"]) >= {"select", "report", "bits_per_byte"}
    assert found[1]["sets"]["in_domain"]["loss"] < found[0]["sets"]["in_domain"]["loss"]


# ------------------------------------------------------------------------------
# sweep.py: the statistics

def test_interval_is_students():
    mean, half = sweep.interval([1.0, 2.0, 4.0])
    assert abs(mean - 7 / 3) < 1e-12 and abs(half - 4.303 * 1.527525 / math.sqrt(3)) < 1e-4
    assert sweep.interval([3.0]) == (3.0, math.inf)
    rng, hits = random.Random(0), 0
    for _ in range(2000):                                     # it holds the truth 95 times in 100
        mean, half = sweep.interval([rng.gauss(5, 2) for _ in range(4)])
        hits += abs(mean - 5) <= half
    assert 0.935 < hits / 2000 < 0.965


def made_up(gains, seeds=(1, 2, 3), noise=0.001):
    """Rows in which the student alone has loss 2.5 in and 3.0 out; gains: {(size, tokens, own loss): {alpha: (in, out)}}."""
    def row(kind, size, tokens, seed, teacher, alpha, inside, outside):
        metrics = {"in_domain": inside, "ood/a": outside - 0.1, "ood/b": outside + 0.1, "task/x": 0.5, "ece/in_domain": 0.05}
        return {"kind": kind, "size": size, "tokens": tokens, "seed": seed, "teacher": teacher, "alpha": alpha,
                "metrics": {k: {"select": v, "report": v} for k, v in metrics.items()}}
    rows = []
    for s in seeds:
        level = 0.05 * s                                      # seeds differ, and pairing takes that out
        for tokens in (1.5, 3, 6):                            # alone: 0.1 nats for each doubling
            less = 0.1 * math.log2(tokens / 3)
            rows.append(row("student", "s", tokens, s, None, 0.0, 2.5 + level - less, 3.0 + level - less))
        for (size, tokens, own), by_alpha in gains.items():
            rows.append(row("teacher", size, tokens, 1000 + s, None, 0.0, own, own + 0.5))
            for alpha, (inside, outside) in by_alpha.items():
                wobble = noise * (s - 2)
                rows.append(row("student", "s", 3, s, {"size": size, "tokens": tokens}, alpha,
                                2.5 + level - inside - wobble, 3.0 + level - outside - wobble))
    return rows


def gains_of(rows):
    return sweep.Gains(rows, "s", dataclasses.replace(sweep.SCALES["laptop"], students={"s": 3}))


def verdicts(rows):
    return [paragraph.split("**")[1].split(": ")[1].rstrip(".") for paragraph in sweep.findings(gains_of(rows))]


PAPER_LIKE = {("xs", 8, 2.9): {0.25: (-0.01, 0.04), 1.0: (-0.3, -0.2)}, ("s", 8, 2.4): {0.25: (0.03, 0.05), 1.0: (0.05, 0.08)},
              ("m", 8, 2.2): {0.25: (0.03, 0.06), 1.0: (0.1, 0.12)}, ("l", 8, 2.0): {0.25: (0.03, 0.06), 1.0: (0.08, 0.10)}}
OPPOSITE = {("xs", 8, 2.9): {0.25: (-0.01, -0.04)}, ("s", 8, 2.4): {0.25: (0.05, 0.02)}, ("m", 8, 2.2): {0.25: (0.15, 0.06)}}


def test_verdicts_on_made_up_results():
    assert verdicts(made_up(PAPER_LIKE)) == ["reproduced"] * 3
    assert verdicts(made_up(OPPOSITE)) == ["not reproduced"] * 3
    assert verdicts(made_up(PAPER_LIKE, seeds=(1,))) == ["too few seeds (1), seen"] * 3
    assert verdicts(made_up(OPPOSITE, seeds=(1, 2))) == ["too few seeds (2), not seen"] * 3
    noisy = verdicts(made_up({k: v for k, v in PAPER_LIKE.items() if k[0] == "xs"} | {("m", 8, 2.2): {0.25: (0.0, 0.1)}}, noise=0.1))
    assert noisy[0] == "undecided"                            # the mean is above zero, its interval is not
    text = sweep.findings(gains_of(made_up(PAPER_LIKE)))
    assert "from m@8 to l@8 it falls (-0.020" in text[1] and "gain outside: 1, both beyond their interval: 1." in text[2] and "xs@8, whose own" in text[0]
    assert "beyond their interval: 1 of 1; the weakest of these is xs@8, 0.300 above (+0.040 ± 0.002). On average" in text[0]
    two = gains_of(made_up({("xs", 8, 2.9): {0.25: (-0.01, 0.04)}, ("xs", 5, 3.1): {0.25: (0.0, 0.02)}, ("xs", 1, 4.0): {0.25: (0.0, -0.1)}}))
    assert "beyond their interval: 2 of 3; the weakest of these is xs@5, 0.500 above (+0.020 ± 0.002). On average the weaker ones give -0.013 ± 0.002." in sweep.findings(two)[0]
    near = made_up({("xs", 8, 2.65): {0.25: (-0.01, 0.04)}})  # above the mean by 0.05, and seeds differ by as much
    assert gains_of(near).weakness[("xs", 8)] > 0 and "not tested" in sweep.findings(gains_of(near))[0]
    better = made_up({("xs", 8, 2.9): {0.25: (-0.01, 0.04)}})  # weaker in domain only
    for row in better:
        if row["kind"] == "teacher":
            row["metrics"]["ood/a"]["report"] = row["metrics"]["ood/b"]["report"] = 2.9
    assert "not tested" in sweep.findings(gains_of(better))[0]


def test_saturating_is_told_from_not_knowing():
    for step, apart, word in ((0.0, 0.004, "saturates"), (0.0, 0.1, "is undecided"), (0.02, 0.001, "rises"), (-0.02, 0.001, "falls"), (0.0, 0.006, "is undecided")):
        rows = made_up({("s", 8, 2.4): {0.25: (0.05, 0.05)}, ("m", 8, 2.2): {0.25: (0.05, 0.05 + step)}})
        for row in rows:
            if row["teacher"] and row["teacher"]["size"] == "m":
                for v in row["metrics"].values():
                    v["report"] += apart * (row["seed"] - 2)
        text = sweep.findings(gains_of(rows))[1]
        assert f"from s@8 to m@8 it {word}" in text
        assert {"rises": "not reproduced", "is undecided": "undecided"}.get(word, "reproduced") == verdicts(rows)[1]


def test_the_second_finding_is_judged_along_size():
    rows = made_up({("s", 8, 2.4): {0.25: (0.05, 0.05)}, ("m", 4, 2.3): {0.25: (0.05, 0.1)}, ("m", 8, 2.2): {0.25: (0.05, 0.1)}})
    assert "from m@4 to m@8 it saturates" in sweep.findings(gains_of(rows))[1] and verdicts(rows)[1] == "not reproduced"


def test_what_an_interval_does_not_bear_out_is_not_said():
    text = sweep.findings(gains_of(made_up({("l", 8, 2.2): {0.25: (-0.01, 0.5)}}, noise=0.1)))
    assert "gain outside: 1, both beyond their interval: 0." in text[2]
    assert "with no teacher, and less with no teacher" in sweep.report(gains_of(made_up({("m", 8, 2.2): {0.25: (0.0, 0.05)}}, noise=0.1)))
    assert "with no teacher, and less with no teacher" in sweep.report(gains_of(made_up({("l", 8, 2.2): {0.25: (0.0, 0.5)}})))   # not measured


def test_the_rate_of_plain_pretraining_is_taken_out():
    """Cells that lose, or gain, as plain pretraining would are ahead in percent, or behind, and nothing beyond its rate."""
    for sign, ahead in ((-1, True), (1, False)):
        rows = made_up({("m", 8, 2.2): {0.25: (sign * 0.1, sign * 0.08), 0.5: (sign * 0.2, sign * 0.16)}})
        for row in rows:
            if not row["teacher"] and row["kind"] == "student":
                for k, v in row["metrics"].items():
                    v["report"] += k.startswith("ood") * 0.02 * math.log2(row["tokens"] / 3)      # 0.08 for 0.1
        text = sweep.findings(gains_of(rows))[2]
        assert ("not reproduced" not in text) == ahead and "brings 0.80 nats outside for each in domain" in text
        assert re.search(r"the cells gain [+-]0\.000 ± 0\.00\d nats more", text)


def test_a_larger_teacher_that_is_no_stronger_is_left_out_of_the_second_finding():
    others = {k: v for k, v in PAPER_LIKE.items() if k[0] != "l"}
    text = sweep.findings(gains_of(made_up({**others, ("l", 8, 2.3): {0.25: (0.0, 0.0)}}, noise=0)))[1]
    assert "from s@8 to m@8" in text and "Left out, no stronger than one of fewer parameters or tokens: l@8." in text


def test_alpha_is_chosen_on_one_half_and_quoted_on_the_other():
    rows = made_up({("m", 8, 2.2): {0.25: (0.1, 0.10), 1.0: (0.2, 0.20)}}, noise=0)
    for row in rows:
        if row["teacher"] and row["alpha"] == 0.25:           # looks best on select only
            for v in row["metrics"].values():
                v["select"] -= 0.5
    g = gains_of(rows)
    assert g.best_alpha(("m", 8)) == 0.25
    assert all(abs(v - 0.1) < 1e-9 for v in g.best(("m", 8), "out").values())
    text = sweep.report(g)
    assert "| m@8 | -0.400 | 0.25 | +0.100 ± 0.000 | +0.100 ± 0.000 |" in text
    ratio = 1 + model.flops_per_token(sweep.shape_of("m", g.scale)) / model.flops_per_token(sweep.shape_of("s", g.scale), True)
    assert 1.5 < ratio < 2 and g.compute(("m", 8)) == ratio
    assert all(abs(v - 0.1 * math.log2(ratio)) < 1e-9 for v in g.plain_gain(ratio, "out").values())
    assert all(abs(v - 0.1) < 1e-9 for v in g.plain_gain(5, "in").values())            # never beyond what was measured
    assert f"| {ratio:.2f} | +0.{round(100 * math.log2(ratio)):03} / +0.{round(100 * math.log2(ratio)):03} | +0.{round(100 - 100 * math.log2(ratio)):03} ± 0.000 |" in text
    assert "gains more than the same compute spent on plain pretraining with m@8, and less with no teacher" in text
    assert "#" in sweep.chart(g)
    for row in rows:                                          # a curve: 3 - 0.3 x + 0.1 x^2 at x = ln(tokens / 3)
        if not row["teacher"] and row["kind"] == "student":
            x = math.log(row["tokens"] / 3)
            row["metrics"] |= {k: {"select": 0, "report": 3 - 0.3 * x + 0.1 * x * x} for k in row["metrics"] if k.startswith("ood")}
    x = math.log(1.5)
    assert all(abs(v - (0.3 * x - 0.1 * x * x)) < 1e-9 for v in gains_of(rows).plain_gain(1.5, "out").values())
    g = gains_of(made_up({("l", 8, 2.2): {0.25: (0.0, 0.05)}}))
    assert g.compute(("l", 8)) > 2 and "| >= +0.100 / >= +0.100 | <= -0.050 ± 0.002 |" in sweep.report(g)
    assert "with no teacher, and less with l@8" in sweep.report(g)


def test_best_alpha_against_strength_is_spearmans():
    rng = random.Random(0)
    for _ in range(20):
        cells = {(size, n, rng.uniform(2, 3)): {a: (0.0, rng.uniform(-1, 1)) for a in (0.25, 0.5, 0.75, 1.0)} for size in ("xs", "s", "m") for n in (1, 2)}
        g = gains_of(made_up(cells, noise=0))
        best = [max(by_alpha, key=lambda a: by_alpha[a][1]) for by_alpha in cells.values()]
        rank = lambda v: np.array([np.mean([i for i, w in enumerate(sorted(v)) if w == x]) for x in v])
        x, y = rank([-own for *_, own in cells]), rank(best)
        expected = np.corrcoef(x, y)[0, 1] if len(set(best)) > 1 else 0.0
        assert all(abs(r - expected) < 1e-9 for r in sweep.alpha_trend(g).values()) and len(sweep.alpha_trend(g)) == 3
    assert "rank correlation" in sweep.report(g) and not sweep.alpha_trend(gains_of(made_up(dict(list(PAPER_LIKE.items())[:2]))))


def test_ablations_are_reported_apart_and_change_no_finding():
    rows = made_up(PAPER_LIKE)
    scale = dataclasses.replace(sweep.SCALES["laptop"], students={"s": 3}, ablations=(
        sweep.Ablation("colder", "m", 8, (0.25,), temperature=2.0), sweep.Ablation("other teacher", "m", 5, (1.0,))))
    def like(found, **changes):
        return {**found, **changes, "metrics": {k: {"select": 0.1, "report": v["report"] - 0.1} for k, v in found["metrics"].items()}}
    extra = [like(r, ablation="colder", temperature=2.0) for r in rows if r["teacher"] == {"size": "m", "tokens": 8} and r["alpha"] == 0.25]
    extra += [like(r, ablation="other teacher", teacher={"size": "m", "tokens": 5}) for r in rows
              if r["teacher"] == {"size": "m", "tokens": 8} and r["alpha"] == 1.0]
    extra += [like(r, ablation="other teacher", tokens=5) for r in rows if r["kind"] == "teacher" and r["size"] == "m"]
    g = sweep.Gains(rows + extra, "s", scale)
    assert sweep.findings(g) == sweep.findings(gains_of(rows)) and ("m", 5) not in g.teachers
    text = sweep.ablation_report(g)
    assert "| colder | m@8 | 2.200 | 0.25 | +0.130 ± 0.002 / +0.160 ± 0.002 | +0.030 ± 0.002 / +0.060 ± 0.002 |" in text
    assert "| other teacher | m@5 | 2.100 | 1 | +0.200 ± 0.002 / +0.220 ± 0.002 | - |" in text
    beside = {"2.150": "+0.100 ± 0.002 / +0.120 ± 0.002 (m@8, 2.200)", "2.310": "-"}      # at 2.31 only s@8 is near, of another size
    for own in beside:
        for r in extra:
            if r["kind"] == "teacher":
                r["metrics"]["in_domain"]["report"] = float(own)
        text = sweep.ablation_report(sweep.Gains(rows + extra, "s", scale))
        assert f"| m@5 | {own} | 1 | +0.200 ± 0.002 / +0.220 ± 0.002 | {beside[own]} |" in text
    assert sweep.ablation_report(gains_of(rows)) == ""


def test_the_same_order_is_set_beside_the_other_order():
    rows = made_up({**PAPER_LIKE, ("m", 5, 2.2): {0.25: (0.01, 0.02)}, ("m", 6, 2.2): {0.25: (0.03, 0.04)}})
    for row in rows:
        for n, doubt in ((5, "annealed"), (6, "own tokens")):
            if n in (row["tokens"] if row["kind"] == "teacher" else 0, (row["teacher"] or {}).get("tokens")):
                row["ablation"] = doubt
                if n == 6:
                    row["tokens" if row["kind"] == "teacher" else "teacher"] = 5 if row["kind"] == "teacher" else {"size": "m", "tokens": 5}
    scale = dataclasses.replace(sweep.SCALES["laptop"], students={"s": 3}, ablations=(
        sweep.Ablation("annealed", "m", 5, (0.25,)), sweep.Ablation("own tokens", "m", 5, (0.25,), same_order=True)))
    text = sweep.ablation_report(sweep.Gains(rows, "s", scale))
    assert "| own tokens | m@5 | 2.200 | 0.25 | +0.030 ± 0.002 / +0.040 ± 0.002 | +0.010 ± 0.002 / +0.020 ± 0.002 (annealed) |" in text
    assert "| annealed | m@5 | 2.200 | 0.25 | +0.010 ± 0.002 / +0.020 ± 0.002 | +0.030 ± 0.002 / +0.060 ± 0.002 (m@8, 2.200) |" in text


def test_token_gains_are_reported_over_all_seeds(corpus, monkeypatch):
    g, seen = gains_of(made_up({k: v for k, v in PAPER_LIKE.items() if k[0] != "l"})), []
    def gains(base, student, teacher, *_):
        seen.append((base, student, teacher))
        x = 0.1 * int(base[-9])                               # of seed 1, 2, 3: 0.1, 0.2, 0.3
        return {"out": {"gain": x, "deciles": [(0.0, -x), *[(1.0, x)] * 8, (2.0, 5 * x)], "groups": {"a": (0.25, 2 * x), "b": (0.75, 0.0)}}}
    def config_of(task):
        return SimpleNamespace(out=str(task), alpha=task.alphas, tokens=task.budgets[-1])
    monkeypatch.setattr(sweep, "pick_device", lambda c: ("cpu", None))
    monkeypatch.setattr(sweep, "load_checkpoint", lambda path, device: (path, {}))
    monkeypatch.setattr(sweep, "token_gains", gains)
    monkeypatch.setattr(sweep, "sample", lambda writer, encoding, prompt: f"{prompt}... {writer}")
    text, found = sweep.tokens_report(g, corpus, config_of)
    alone, taught = "student s@3 seed {}/ckpt.pt", "student s@3 from {}@8 seed {}/alpha_{}/ckpt.pt"
    by = "teacher {} seed 100{}/ckpt_8.pt"
    expected = []
    for seed, other in ((1, 3), (2, 1), (3, 2)):
        base, strong = alone.format(seed), by.format("m@3M", seed)
        expected += [(base, taught.format("xs", seed, 0.25), by.format("xs@3M", seed)), (base, taught.format("m", seed, 1), strong),
                     (base, alone.format(other), strong)]
    assert seen == expected
    assert "| from xs@8, alpha 0.25 | +0.200 ± 0.248 | +0.100 ± 0.124 (25%) | +0.000 ± 0.000 (75%) | -0.200 ± 0.248 | +1.000 ± 1.242 |" in text
    assert list(found) == ["from xs@8, alpha 0.25", "from m@8, alpha 1", "no teacher, another seed"] and all(len(v) == 3 for v in found.values())
    assert "| no teacher, another seed | +0.200 | +0.100 (25%) |" in text
    assert f"... {alone.format(1)}" in text

    def gone(path, device):
        raise model.CheckpointError("no such file")
    monkeypatch.setattr(sweep, "load_checkpoint", gone)
    assert sweep.tokens_report(g, corpus, config_of) == ("", {})


def test_ablations_are_planned_with_their_teachers():
    scale = sweep.SCALES["full"]
    tasks = [t for t in sweep.plan(scale) if t.seed in (1, 1001)]
    students = [t for t in tasks if t.kind == "student" and t.ablation]
    assert [t.temperature for t in students] == [2.0, 2.0, 1.0, 1.0, 1.0, 1.0] and all(t.teacher in tasks for t in students)
    assert [t.teacher.seed for t in students] == [1001, 1001, 1, 1001, 1, 1001]
    configs = [sweep.config_of(t, scale, "d", "o") for t in tasks]
    assert len({c.out for c in configs}) == len(configs)      # no two tasks share a folder
    made = {sweep.checkpoint_path(c, a, n) for c in configs for a in c.alpha for n in (*c.checkpoints, c.tokens)}
    assert all(c.teacher in made for c in configs if c.teacher)


def test_no_weak_teacher_is_said():
    assert "not tested" in sweep.findings(gains_of(made_up({("m", 8, 2.2): {0.25: (0.1, 0.1)}, ("l", 8, 2.1): {0.25: (0.1, 0.1)}})))[0]


# ------------------------------------------------------------------------------
# sweep.py: the runs

TINY = ["--scale", "smoke", "--jobs", "2"]


def results(folder):
    return sorted((json.loads(line) for line in open(folder / "results.jsonl")), key=lambda r: json.dumps({**r, "seconds": 0}))


def test_smoke_sweep_killed_and_started_again_equals_one_never_stopped(corpus, tmp_path):
    command = [sys.executable, "sweep.py", *TINY, "--data", corpus]
    whole = subprocess.run([*command, "--out", tmp_path / "whole"], cwd=HERE, capture_output=True, text=True)
    assert whole.returncode == 0 and "A weak teacher helps a stronger student" in whole.stdout, whole.stderr
    rows = results(tmp_path / "whole")
    scale = sweep.SCALES["smoke"]
    keys = [sweep.rows_of(task, scale, rows[0]["corpus"]) for task in sweep.plan(scale)]
    which = [[key.get(k) for k in sweep.KEYS] for key in sum(keys, [])]
    assert len(rows) == len(which) and all([r.get(k) for k in sweep.KEYS] in which for r in rows)
    assert all(0 < v["report"] < 7 for r in rows for v in r["metrics"].values())
    made = {p.name for p in (tmp_path / "whole").iterdir()}
    assert made >= {"results.jsonl", "report.md", "runs"}
    if importlib.util.find_spec("matplotlib"):
        assert made >= {"findings_s.png", "findings_s.svg", "findings_xs.png"}

    def started_and_stopped(by):
        """Start it, and when it has one more result send the main process alone a signal, as a job scheduler would."""
        path, size = tmp_path / "parts" / "results.jsonl", 0
        before = os.path.getsize(path) if path.exists() else 0
        process = subprocess.Popen([*command, "--out", path.parent], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and size <= before:
            time.sleep(0.05)
            size = os.path.getsize(path) if path.exists() else 0
        process.send_signal(by)
        process.communicate(timeout=60)
        return process.returncode

    assert started_and_stopped(signal.SIGKILL) == -signal.SIGKILL              # its workers end by themselves
    assert started_and_stopped(signal.SIGINT) == 130
    claim = data.lock(tmp_path / "parts")
    second = subprocess.run([*command, "--out", tmp_path / "parts"], cwd=HERE, capture_output=True, text=True)
    assert second.returncode == 2 and "another process is at work" in second.stderr
    claim.close()
    half = results(tmp_path / "parts")
    assert 0 < len(half) < len(rows)
    again = subprocess.run([*command, "--out", tmp_path / "parts"], cwd=HERE, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    parts = results(tmp_path / "parts")
    assert [r["metrics"] for r in parts] == [r["metrics"] for r in rows]
    assert [r for r in half if r not in parts] == []          # what was finished was not done again
    third = subprocess.run([*command, "--out", tmp_path / "parts"], cwd=HERE, capture_output=True, text=True)
    assert "at a time; stop it" not in third.stdout and results(tmp_path / "parts") == parts


@pytest.mark.parametrize("scale", ["smoke", "paper", "gpu", "full"])
def test_dry_run_prints_every_run_and_does_nothing(scale, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_script(sweep.main, ["--scale", scale, "--dry_run"], monkeypatch, capsys)
    assert code == 0 and not list(tmp_path.iterdir())
    assert sum(line.startswith(("teacher", "student")) for line in out.splitlines()) == len(sweep.plan(sweep.SCALES[scale]))
    assert ("hours on an H100" in out) == (scale in ("paper", "gpu"))
    torch.set_num_threads(2)


# ------------------------------------------------------------------------------
# downloads, from a server on this machine

@pytest.fixture
def server():
    """A file server on loopback with faults: files {name: bytes}, faults {name: [one for each request]}, and a log of (name, first byte)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        files, faults, log = {}, {}, []

        def do_GET(self):
            name = self.path.strip("/")
            start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
            fault = self.faults.get(name, []).pop(0) if self.faults.get(name) else None
            self.log.append((name, start))
            body = self.files.get(name)
            if isinstance(fault, int) or body is None or start >= len(body) > 0 and start:
                self.send_response(fault or (404 if body is None else 416))
                self.send_header("Retry-After", "0")
                self.send_header("Content-Range", f"bytes */{len(body or b'')}")
                self.end_headers()
                return
            start = 0 if fault == "from the start" else start
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:start + (len(body) - start) // 2] if fault == "cut" else body[start:])

        def log_message(self, *_):
            pass
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{httpd.server_port}/"
    yield Handler
    httpd.shutdown()
    httpd.server_close()


def test_download_goes_on_tries_again_and_leaves_no_half_file(server, tmp_path, capsys):
    server.files["f"] = whole = random.Random(0).randbytes(300_000)
    path = tmp_path / "f"
    def fetch(*faults, tries=8):
        path.unlink(missing_ok=True)
        server.faults["f"], server.log[:] = list(faults), []
        data.download(server.url + "f", str(path), tries, pause=0.001)
        assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["f"]
        return [start for _, start in server.log]
    assert fetch() == [0]
    assert fetch("cut", "cut", "cut") == [0, 150_000, 225_000, 262_500]
    assert fetch(429, 503, 500) == [0, 0, 0, 0]
    assert fetch("cut", "from the start") == [0, 150_000]     # a server that knows no ranges
    (tmp_path / "f.part").write_bytes(bytes(400_000))         # left from another, longer version
    assert fetch() == [400_000, 0]
    (tmp_path / "f.part").write_bytes(whole)                  # whole, but killed before it got its name
    assert fetch() == [300_000]
    for faults, word in ((["cut"] * 3, "bytes came"), ([503] * 3, "HTTP 503"), ([404], "HTTP 404"), ([403], "HTTP 403")):
        path.unlink(missing_ok=True)
        server.faults["f"], server.log[:] = list(faults), []
        with pytest.raises(data.DataError, match=word):
            data.download(server.url + "f", str(path), 3, pause=0.001)
        assert not path.exists() and len(server.log) == len(faults)
    with pytest.raises(data.DataError, match="cannot download"):
        data.download("http://127.0.0.1:9/f", str(path), 2, pause=0.001)       # nobody listens there
    assert not path.exists()


def shard(ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.array(ids, dtype="<u2").tobytes()


@pytest.fixture
def library(server, monkeypatch):
    """The downloads of data.py in small, on the server; GPT-2's vocabulary is that of the bytes."""
    draw = np.random.default_rng(0)
    def ids(n):
        part = draw.integers(97, 120, n)
        part[::500] = 256
        return part
    for name, n in (("train_000001", 20_000), ("train_000002", 30_000), ("val_000000", 9_000)):
        server.files[f"edu_{name}"] = shard(ids(n))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as z:
        z.writestr("../../evil/wiki.test.raw", poem(9, seed=3))                # read by its end, never unpacked
    server.files |= {"wiki": zipped.getvalue(), "novel": poem(9, seed=4).encode(), "news": b'"1","A title","A long, long text"\n' * 500,
                     "bard": poem(400, seed=5).encode()}
    monkeypatch.setattr(data, "FINEWEB", server.url + "edu_{}_{:06d}")
    monkeypatch.setattr(data, "SHARD", 20_000)
    monkeypatch.setattr(data, "TEXTS", {"wikipedia": (server.url + "wiki", "wiki.test.raw"), "novel": (server.url + "novel", ""),
                                        "news": (server.url + "news", ""), "shakespeare": (server.url + "bard", "")})
    plain = data.make_encoding({bytes([b]): b for b in range(256)}, data.GPT2_PATTERN)
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: plain)
    return server


def test_fineweb_shards_become_a_corpus(library, tmp_path, monkeypatch, capsys):
    out = tmp_path / "fw"
    code, _, err = run_script(data.main, ["--corpus", "fineweb-edu", "--tokens", "40000", "--out", out], monkeypatch, capsys)
    assert code == 0, err
    meta = data.load_meta(str(out))
    assert meta["sets"]["train"]["tokens"] == 50_000 and meta["sets"]["train"]["documents"] == 100 and meta["vocab_size"] == 50_304
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
        code, _, err = run_script(data.main, ["--corpus", "fineweb-edu", "--out", tmp_path / "big", "--tokens", "60000"], patch, capsys)
        assert code == 2 and "4 shards need 0.0 GiB of disk" in err[-1] and not list((tmp_path / "big").glob("edu*"))
    assert set(meta["sets"]) == {"train", "val", "ood_wikipedia", "ood_novel", "ood_news", "ood_code"}
    assert not (tmp_path.parent / "evil").exists() and not list(tmp_path.rglob("*.part"))
    assert "A title\nA long, long text" in "".join(documents_of(str(out), "ood_news"))
    streams = [np.frombuffer(library.files[f"edu_train_00000{k}"], "<u2", offset=1024) for k in (1, 2)]
    b = data.Batches(str(out / "train.bin"), 10, 64, seed=1)
    windows = [tuple(s[i * 64:i * 64 + 65]) for s in streams for i in range((len(s) - 1) // 64)]
    seen = [tuple(row) for step in range(b.n // 10 + 1) for row in torch.cat([b[step][0], b[step][1][:, -1:]], 1).tolist()]
    assert b.n == len(windows) and sorted(seen[:b.n]) == sorted(windows)       # the shards as one stream, each window once
    assert [tuple(w) for w in data.load_tokens(str(out / "val.bin"))[None, :100]] == [tuple(np.frombuffer(library.files["edu_val_000000"], "<u2", offset=1024)[:100])]
    requests = len(library.log)
    run_script(data.main, ["--corpus", "fineweb-edu", "--tokens", "40000", "--out", out], monkeypatch, capsys)
    assert len(library.log) == requests                       # finished: nothing is asked for again
    code, _, err = run_script(data.main, ["--corpus", "fineweb-edu", "--tokens", "20000", "--out", out], monkeypatch, capsys)
    assert code == 2 and "another corpus" in err[0]
    kept = distill.train(distill.Config(data=str(out), out=str(tmp_path / "run"), size="xs", tokens=1024, batch_size=4, block_size=64, compile=False))
    assert "ood/wikipedia" in evaluation.evaluate(model.load_checkpoint(kept[0]["path"])[0], str(out), 4, 4)
    with open(out / "edu_fineweb_train_000002.bin", "r+b") as f:
        f.seek(5000)
        f.write(b"\xff")
    with pytest.raises(data.DataError, match="damaged"):
        data.Batches(str(out / "train.bin"), 10, 64, seed=1)
    with open(out / "edu_fineweb_train_000002.bin", "r+b") as f:
        f.write(library.files["edu_train_000002"])
    def reached(*_):
        raise data.DataError("would run")
    monkeypatch.setattr(sweep, "sweep", reached)              # the checks before a sweep know shards too
    code, _, err = run_script(sweep.main, ["--scale", "smoke", "--data", out, "--out", tmp_path / "sweep"], monkeypatch, capsys)
    assert code == 2 and err == ["error: would run"]


@pytest.mark.parametrize("bad", [shard([1] * 9000, magic=7), shard([1] * 9000, version=2), shard([1] * 9000, count=9001), shard([1] * 9000)[:-2], b"", b"x" * 1024])
def test_a_bad_shard_is_told(bad, library, tmp_path, monkeypatch, capsys):
    library.files["edu_train_000001"] = bad
    code, _, err = run_script(data.main, ["--corpus", "fineweb-edu", "--out", tmp_path / "fw"], monkeypatch, capsys)
    assert code == 2 and "is no shard of tokens" in err[-1] and not (tmp_path / "fw" / "meta.json").exists()


def test_a_downloaded_text_becomes_a_corpus(library, tmp_path, monkeypatch, capsys):
    out = tmp_path / "bard"
    code, text, err = run_script(data.main, ["--corpus", "shakespeare", "--out", out], monkeypatch, capsys)
    assert code == 0 and "ood_wikipedia" in text, err
    assert "".join(sorted(documents_of(str(out), "train") + documents_of(str(out), "val"))).count("rose") == poem(400, seed=5).count("rose")
    code, _, err = run_script(data.main, ["--corpus", "shakespeare", "--out", tmp_path / "part", "--tokens", "20000"], monkeypatch, capsys)
    assert code == 0 and 50_000 < sum(data.load_meta(str(tmp_path / "part"))["sets"][s]["bytes"] for s in ("train", "val")) <= 100_002
    del library.files["wiki"]
    code, _, err = run_script(data.main, ["--corpus", "shakespeare", "--out", tmp_path / "no"], monkeypatch, capsys)
    assert code == 2 and "HTTP 404" in err[-1] and not (tmp_path / "no" / "meta.json").exists()
    library.files["wiki"] = b"no zip"
    code, _, err = run_script(data.main, ["--corpus", "shakespeare", "--out", tmp_path / "no"], monkeypatch, capsys)
    assert code == 2 and "is no zip" in err[-1]


def test_without_gpt2s_vocabulary_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    def fails(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(data.tiktoken, "get_encoding", fails)
    code, _, err = run_script(data.main, ["--corpus", "shakespeare", "--out", tmp_path / "x"], monkeypatch, capsys)
    assert code == 2 and len(err) == 1 and "TIKTOKEN_CACHE_DIR" in err[0] and not (tmp_path / "x").exists()


PUBLIC = {                              # a line of each public file, and the item it makes by lm-evaluation-harness's templates
    "hellaswag": ({"ind": 24, "activity_label": "Roof [header] shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
                   "endings": ["is using wrap [step] to wrap a pair of skis.", "is ripping level tiles off.", "is holding  a cube.", "starts [title] pulling"],
                   "label": 3, "split": "val"},
                  ("Roof shingle removal: A man is sitting on a roof. He", ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                                                                           "is holding a cube.", "starts. pulling"], 3)),
    "arc_easy": ({"id": "x", "question": {"stem": "What melts?", "choices": [{"text": "ice", "label": "1"}, {"text": "a stone", "label": "2"}]}, "answerKey": "1"},
                 ("Question: What melts?\nAnswer:", ["ice", "a stone"], 0)),
    "piqa": ({"goal": "Boil eggs", "sol1": "in water", "sol2": "in sand"}, ("Question: Boil eggs\nAnswer:", ["in water", "in sand"], 0)),
    "lambada": ({"text": "She said that it was a rose"}, ("She said that it was a", ["rose"], 0)),
}


def test_public_tasks_are_fetched_and_scored(server, corpus, tmp_path, monkeypatch, capsys):
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as z:
        z.writestr("ARC/ARC-Easy-Test.jsonl", json.dumps(PUBLIC["arc_easy"][0]) + "\n")
    server.files |= {name: (json.dumps(line) + "\n").encode() for name, (line, _) in PUBLIC.items()}
    server.files |= {"arc_easy": zipped.getvalue(), "labels": b"0\n"}
    monkeypatch.setattr(evaluation, "PUBLIC", {"hellaswag": (server.url + "hellaswag", ""), "arc_easy": (server.url + "arc_easy", "ARC-Easy-Test.jsonl"),
                                               "piqa": (server.url + "piqa", server.url + "labels"), "lambada": (server.url + "lambada", "")})
    home = tmp_path / "data"
    shutil.copytree(corpus, home)
    path = distill.train(config(corpus, tmp_path / "run"))[0]["path"]
    for _ in range(2):                                        # the second time nothing is fetched
        code, out, err = run_script(evaluation.main, [path, "--data", home, "--tasks", *PUBLIC], monkeypatch, capsys)
        assert code == 0 and out.count("1 items") == 4 and len(server.log) == 5, (out, err)
    for name, (_, (context, choices, label)) in PUBLIC.items():
        item, = evaluation.read_items(home / "tasks" / f"{name}.jsonl")
        assert (item["context"], item["choices"], item["label"], item["space"]) == (context, choices, label, " ")
    own = tmp_path / "own.jsonl"                              # a user's file in such a format
    own.write_text(json.dumps({**PUBLIC["piqa"][0], "label": 1}) + "\n" + json.dumps(PUBLIC["arc_easy"][0]) + "\n")
    assert [i["label"] for i in evaluation.read_items(own)] == [1, 0]
    server.files["labels"] = b"0\n1\n"
    (home / "tasks" / "piqa.jsonl").unlink()
    code, _, err = run_script(evaluation.main, [path, "--data", home, "--tasks", "piqa"], monkeypatch, capsys)
    assert code == 2 and "1 items and 2 labels" in err[-1] and not (home / "tasks" / "piqa.jsonl").exists()
    server.files |= {"labels": b"0\n", "piqa": b"<html>not today</html>"}
    code, _, err = run_script(evaluation.main, [path, "--data", home, "--tasks", "piqa"], monkeypatch, capsys)
    assert code == 2 and "no JSON" in err[-1] and {p.name for p in (home / "tasks").iterdir()} == {
        ".lock", "hellaswag.jsonl", "arc_easy.jsonl", "lambada.jsonl"}


def test_samples_are_printed_side_by_side(corpus, tmp_path, monkeypatch, capsys):
    paths = [distill.train(config(corpus, tmp_path / size, size=size))[0]["path"] for size in ("xs", "s")]
    code, out, err = run_script(evaluation.main, [*paths, "--data", corpus, "--sample", "def "], monkeypatch, capsys)
    assert code == 0 and out.count("\ndef ") == 2 and all(f"--- {path}" in out for path in paths)
    assert out == run_script(evaluation.main, [*paths, "--data", corpus, "--sample", "def "], monkeypatch, capsys)[1]
    code, out, err = run_script(evaluation.main, [paths[0], "--data", corpus, "--sample", "", "--json"], monkeypatch, capsys)
    assert code == 0 and json.loads(out)[0]["text"]


@pytest.mark.parametrize("tie", [True, False])
def test_export_is_read_by_transformers(tie, corpus, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    vocabulary, folder = data.load_meta(corpus), tmp_path / "hf"
    m = tiny(2, tie, vocab_size=300)
    model.save_checkpoint(str(tmp_path / "m.pt"), m, tokenizer=vocabulary["tokenizer"])
    argv = ["--to_hf", tmp_path / "m.pt", folder, "--data", corpus]
    code, out, err = run_script(model.main, argv, monkeypatch, capsys)
    assert code == 0, err
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    encoding, idx = data.load_tokenizer(corpus), torch.randint(300, (2, 24))
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, m(idx), atol=1e-4)
    code_text = (HERE / "model.py").read_text().replace(data.END_OF_TEXT, "")  # there it is a token of its own
    for text in (code_text, poem(2), "naïve 漢字\r\n\t  x  12345 don't\n\n  ", "  leading", ""):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(data.END_OF_TEXT) == [encoding.eot_token] == [tokenizer.eos_token_id]
    capsys.readouterr()                                       # what transformers had to say
    for wrong in (argv, ["--to_hf", tmp_path / "absent.pt", tmp_path / "new", "--data", corpus],
                  ["--to_hf", tmp_path / "m.pt", tmp_path / "new", "--data", tmp_path]):
        code, out, err = run_script(model.main, wrong, monkeypatch, capsys)
        assert code == 2 and len(err) == 1 and err[0].startswith("error: ") and not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------
# nothing lost: runs that die, numbers that go wrong

def victim(config, file_size=None):
    """A run in a process of its own; with file_size no file can grow larger, as on a full disk."""
    if file_size:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    data.run(lambda: distill.train(config), distill.ConfigError, model.CheckpointError)


@pytest.fixture(scope="session")
def processes():
    """Where processes come from that have imported everything and run nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all", "torch._dynamo"])
    context.Process(target=int).start()
    del os.environ["OMP_NUM_THREADS"]
    return context


def test_a_run_killed_at_random_moments_ends_as_if_never_stopped(corpus, tmp_path, processes):
    teacher = distill.train(config(corpus, tmp_path / "teacher", seed=9, tokens=2048))[0]["path"]
    def run(name):
        return config(corpus, tmp_path / name, teacher=teacher, alpha=(0.25, 1.0), tokens=16384, save_every=0.0, checkpoints=(4096, 8192))
    whole = processes.Process(target=victim, args=(run("whole"),))
    whole.start(), whole.join(60)
    draw, codes, kills, rounds = random.Random(0), Counter(), 0, 0
    def start_and_kill(folder):
        """-> the exit code of a run that is killed a moment after it has saved some states, if it has not ended by then."""
        how = draw.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT, "full disk"])
        process = processes.Process(target=victim, args=(run(folder.name), draw.randrange(10**4, 10**6) if how == "full disk" else None))
        process.start()
        seen, saves = set(), draw.randrange(6)
        while process.is_alive() and len(seen) <= saves:
            with contextlib.suppress(FileNotFoundError):
                seen.add(os.stat(folder / "state.pt").st_mtime_ns)
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL if how == "full disk" else how)
        process.join(60)
        return process.exitcode

    while kills < 20:                                         # on a fast or busy machine a run may end after a few
        parts, rounds, code = tmp_path / f"parts{rounds}", rounds + 1, None
        while code != 0:
            code = start_and_kill(parts)
            codes[code] += 1
            kills += code != 0
            assert kills < 200
        for path in sorted((tmp_path / "whole").rglob("*.pt")):
            a, b = (model.load_checkpoint(str(p)) for p in (path, parts / path.relative_to(tmp_path / "whole")))
            assert same(a[0].state_dict(), b[0].state_dict()) and a[1] == b[1]
        files = {p.relative_to(parts) for p in parts.rglob("*") if p.is_file()}
        assert files == {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()} and len(files) == 8
        logs = [[{**json.loads(line), "seconds": 0} for line in open(folder / "log.jsonl")] for folder in (tmp_path / "whole", parts)]
        assert logs[0] == logs[1]
    print(rounds, codes)
    assert codes[-signal.SIGKILL] > 3 and set(codes) <= {0, 2, 130, 143, -9, -2, -15}


def test_checkpoints_asked_for_too_late(corpus, tmp_path, processes):
    process = processes.Process(target=victim, args=(config(corpus, tmp_path, save_every=0.0, tokens=65536),))
    process.start()
    while not (tmp_path / "state.pt").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.join(60)
    with pytest.raises(distill.ConfigError, match="has passed 128 tokens without"):
        distill.train(config(corpus, tmp_path, tokens=65536, checkpoints=(128,)))


def test_two_runs_in_one_folder(corpus, tmp_path, monkeypatch):
    (tmp_path / "run" / "below").mkdir(parents=True)
    mine = [tmp_path / "run" / "mine.tmp", tmp_path / "run" / "below" / "ckpt.pt.7.tmp"]
    for path in (*mine, tmp_path / "run" / "ckpt.pt.7.tmp"):
        path.write_text("x")
    data.lock(tmp_path / "run").close()
    assert all(path.exists() for path in mine) and not (tmp_path / "run" / "ckpt.pt.7.tmp").exists()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    claim = data.lock(tmp_path / "run")
    monkeypatch.setattr(distill, "lock", lambda folder: data.lock(folder, wait=0.3))
    with pytest.raises(data.DataError, match="another process is at work"):
        distill.train(config(corpus, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    claim.close()
    assert distill.train(config(corpus, tmp_path / "run"))


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_state(corpus, tmp_path, monkeypatch):
    settings = dict(checkpoints=(2048,), save_every=0.0, log_every=10)
    whole, plain, calls = distill.train(config(corpus, tmp_path / "whole", **settings)), distill.distill_loss, []
    def breaks(*args, **more):
        calls.append(1)
        loss, ce, kl = plain(*args, **more)
        return (loss * math.nan, ce, kl) if len(calls) == 21 else (loss, ce, kl)
    monkeypatch.setattr(distill, "distill_loss", breaks)
    for bad_settings, step in ((settings, 20), ({**settings, "save_every": 999}, 20)):
        calls.clear()
        out = tmp_path / f"run{bad_settings['save_every']}"
        with pytest.raises(distill.ConfigError, match=rf"since step {step} \(batch {step} of seed 1, learning rate 0.00\d+\)"):
            distill.train(config(corpus, out, **bad_settings))
        assert (out / "ckpt_2K.pt").exists() and not (out / "ckpt.pt").exists()
    monkeypatch.setattr(distill, "distill_loss", plain)
    again = distill.train(config(corpus, tmp_path / "run0.0", **settings))
    assert [same(weights(a["path"]), weights(b["path"])) for a, b in zip(again, whole)] == [True, True]
    with pytest.raises(distill.ConfigError, match="not finite since step"):
        distill.train(config(corpus, tmp_path / "wild", lr=1e18, warmup=0.0, log_every=1))


def test_float16_overflow_is_skipped_counted_and_limited(corpus, tmp_path, monkeypatch):
    plain, calls = distill.distill_loss, []
    def overflows(*args, often, **more):
        calls.append(1)
        loss, ce, kl = plain(*args, **more)
        return (loss * math.inf, ce, kl) if often(len(calls)) else (loss, ce, kl)
    monkeypatch.setattr(distill, "distill_loss", functools.partial(overflows, often=lambda n: n in (11, 12, 40)))
    path = distill.train(config(corpus, tmp_path / "some", dtype="float16", tokens=16384))[0]["path"]
    assert all(v.isfinite().all() for v in weights(path).values())
    skipped = json.loads((tmp_path / "some" / "log.jsonl").read_text().splitlines()[-1])["skipped"]
    assert 3 <= skipped[0] < 20                               # the scale itself starts too high by design
    calls.clear()
    monkeypatch.setattr(distill, "distill_loss", functools.partial(overflows, often=lambda n: n > 30))
    with pytest.raises(distill.ConfigError, match="since step 30"):
        distill.train(config(corpus, tmp_path / "all", dtype="float16", tokens=32768))
    assert 130 <= len(calls) <= 134                           # found out at the next line of the log


def test_room_is_asked_for_before_anything_is_written(corpus, tmp_path, monkeypatch, capsys):
    need = distill.memory_needed(config(corpus, "x"), model.GPTConfig(300, 32, **model.SIZES["xs"]), None)
    assert 16 * 24_000 < need < 10**7
    for name in ("free_memory", "free_disk"):
        monkeypatch.setattr(distill, name, lambda _: 10**5)
        with pytest.raises(distill.ConfigError, match=rf"GiB of {name[5:]}, and 0.00 are free"):
            distill.train(config(corpus, tmp_path / "run"))
        code, out, err = run_script(sweep.main, ["--scale", "smoke", "--data", corpus, "--out", tmp_path / "sweep"], monkeypatch,
                                    capsys, distill.ConfigError)
        assert code == 2 and len(err) == 1 and name[5:] in err[0]
        monkeypatch.undo()
    assert {p.name for p in tmp_path.rglob("*")} <= {"sweep", ".lock"}
    assert 0 < distill.free_memory(torch.device("cpu")) and 0 < distill.free_disk(tmp_path / "not" / "there")


# ------------------------------------------------------------------------------
# nothing let in: files that are damaged, or made by somebody with ill intent

def mutate(data, draw):
    """A copy of some bytes, changed at random."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        i = draw.randrange(len(data) or 1)
        j = min(len(data), i + draw.choice([1, 2, 8, 100, 10**4]))
        way = draw.randrange(8)
        if way == 0 and data:
            data[i] ^= 1 << draw.randrange(8)
        elif way == 1:
            del data[i:]
        elif way == 2:
            del data[i:j]
        elif way == 3:
            data[i:i] = data[i:j]
        elif way == 4:
            data[i:j] = bytes(j - i)
        elif way == 5:
            data[i:j] = draw.randbytes(draw.choice([1, 2, j - i]))
        elif way == 6:
            data[i:i] = draw.choice([b"[" * 10**5, b"9" * 400, b"-1", b"null", b"{}", b"1e999", b"NaN", b'"', b"\n", b"\xff", b"\\u0000"])
        elif way == 7 and (numbers := list(regex.finditer(rb"\d+", bytes(data[:10**5])))):
            m = draw.choice(numbers)
            data[m.start():m.end()] = draw.choice([b"0", b"1", b"2", b"-3", b"1.5", b"65537", b"99999999999999", b"true", b'"x"', b"[]"])
    return bytes(data)


def seal(payload):
    """Bytes of a checkpoint with a seal that is right, whatever they hold."""
    return payload + b"\x40\0" + hashlib.sha256(payload).hexdigest().encode()


def fuzz(corpus, folder, rounds, seed, report):
    """
    Mutate each kind of file `rounds` times and read it. What is refused is refused with our own errors; what
    loads is what was written, except where the mutant was given a right checksum: then it need only load.
    -> through the queue: {kind: (loaded, slowest seconds)}, bytes of memory that this took.
    """
    import resource
    draw, errors = random.Random(seed), (data.DataError, model.CheckpointError, distill.ConfigError)
    folder, found = Path(folder), {}
    whole = folder / "whole"
    shutil.copytree(corpus, whole)
    runs = config(corpus, folder / "run", tokens=4096, save_every=0.0)
    path = distill.train(runs)[0]["path"]
    good = model.load_checkpoint(path)
    identity = {k: good[1][k] for k in ("recipe", "corpus", "taught_by")}
    model.write_atomically(str(folder / "state.pt"), {**identity, "step": 3, "students": []})
    row = {"kind": "student", "teacher": None, "metrics": {n: {"select": 1.5, "report": 2.5} for n in ("in_domain", "ood/a", "task/b")}, "seconds": 1.5}
    (folder / "results.jsonl").write_text("".join(json.dumps({**row, "seed": n}) + "\n" for n in range(5)))
    (folder / "items.jsonl").write_text("".join(json.dumps({"context": "a", "choices": [" b", " c"], "label": n}) + "\n" for n in (0, 1, 1)))
    meta = json.loads((whole / "meta.json").read_text())

    def checkpoint(path):
        m, extra = model.load_checkpoint(path)
        m(torch.zeros(1, min(8, m.config.block_size), dtype=torch.long))
        return same(m.state_dict(), good[0].state_dict()) and extra == good[1]

    def everything(path):
        """Use a corpus folder as the scripts do."""
        folder = os.path.dirname(path)
        for x in evaluation.evaluation_sets(folder).values():
            evaluation.read_windows(x, 32, 2)
        data.Batches(os.path.join(folder, "train.bin"), 2, 32, 0)[0]
        text = data.load_tokenizer(folder).decode(data.load_tokens(os.path.join(folder, "val.bin"))[:100].tolist())
        return isinstance(text, str) and data.load_meta(folder) == {**meta, "checksum": data.load_meta(folder)["checksum"]}

    def results(path):
        return all(sweep.level(r, where) is None or sweep.level(r, where) <= math.inf for r in sweep.read_rows(path) for where in ("in", "out", "tasks"))

    kinds = {"checkpoint": (path, checkpoint, None), "checkpoint sealed": (path, checkpoint, lambda b: seal(b[:-66])),
             "state": (folder / "state.pt", lambda p: distill.unfinished(runs, p, identity)["step"] == 3, None),
             "bin": (whole / "val.bin", everything, None), "meta": (whole / "meta.json", everything, None),
             "meta sealed": (whole / "meta.json", everything, "meta"), "tokenizer": (whole / "tokenizer.json", everything, None),
             "tokenizer sealed": (whole / "tokenizer.json", everything, "tokenizer"),
             "results": (folder / "results.jsonl", results, None),
             "items": (folder / "items.jsonl", lambda p: all(i["choices"][i["label"]] for i in evaluation.read_items(p)), None),
             "log": (folder / "run" / "log.jsonl", lambda p: all(json.loads(line)["step"] < 9 for line in distill.read_log(p, 9)), None)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, (source, read, sealing) in kinds.items():
        original, loaded, slowest = Path(source).read_bytes(), 0, 0.0
        target = whole / Path(source).name if Path(source).parent == whole else folder / f"mutant{Path(source).suffix}"
        for _ in range(rounds):
            mutant = mutate(original[:-66] if sealing and kind.startswith("checkpoint") else original, draw)
            if kind == "checkpoint sealed":
                mutant = seal(mutant)
            elif sealing:                                     # a checksum of meta.json that fits
                try:
                    changed = json.loads(mutant)
                    changed = {**changed, "checksum": data.checksum(changed)} if sealing == "meta" else changed
                    told = meta if sealing == "meta" else {**meta, "tokenizer": data.sha(json.dumps(changed))}
                    if sealing == "tokenizer":
                        write_meta(whole, told)
                    mutant = json.dumps(changed).encode()
                except (ValueError, TypeError, AttributeError, RecursionError):
                    pass
            target.write_bytes(mutant)
            start = time.monotonic()
            try:
                right = read(str(target))
                loaded += 1
                assert right or sealing, (kind, mutant[:2000])
            except errors:
                pass
            slowest = max(slowest, time.monotonic() - start)
        target.write_bytes(original)
        (whole / "meta.json").write_text(json.dumps(meta))
        found[kind] = (loaded, round(slowest, 3))
    report.put((found, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


ROUNDS = int(os.environ.get("FUZZ_ROUNDS", 2000))


def test_files_that_are_damaged_or_hostile(corpus, tmp_path, processes):
    report = processes.Queue()
    process = processes.Process(target=fuzz, args=(corpus, str(tmp_path / "fuzz"), ROUNDS, 0, report))
    (tmp_path / "fuzz").mkdir()
    process.start()
    process.join(200)
    assert process.exitcode == 0
    found, memory = report.get(timeout=5)
    print(ROUNDS, found, f"{memory / 2**20:.0f} MiB")
    assert all(slowest < 5 for _, slowest in found.values()) and memory < 150 * 2**20


def test_checkpoints_made_with_ill_intent(tmp_path, processes):
    """What a seal that fits can't excuse: code, bombs, shapes that the file does not hold."""
    m, path = tiny(), str(tmp_path / "x.pt")
    model.save_checkpoint(path, m)
    good = torch.load(path, weights_only=True)

    class Calls:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "called"),)
    huge = {**good["config"], "n_embd": 2**20, "n_head": 2**14, "n_kv_head": 2**14}
    # one number standing for many
    spread = {k: v.new_zeros(1).expand(v.shape) for k, v in good["model"].items()}
    for bad in ({**good, "x": Calls()}, {**good, "x": bytearray(10)}, {**good, "config": huge},
                {**good, "config": {**good["config"], "n_layer": 2**30}}, {**good, "config": {**good["config"], "block_size": 2**30}},
                {**good, "model": {**good["model"], "norm.weight": torch.full((32,), math.nan)}}, {**good, "alpha": "x"},
                {**good, "config": {**good["config"], "n_layer": 1e9}}, {**good, "model": []}, {**good, "model": spread}, [], None):
        model.write_atomically(path, bad)
        with pytest.raises(model.CheckpointError):
            model.load_checkpoint(path)
    for compression, again in ((zipfile.ZIP_DEFLATED, 0), (zipfile.ZIP_STORED, 50)):      # unpacks to more than itself
        model.save_checkpoint(path, m)
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as z, zipfile.ZipFile(buffer, "w", compression) as bomb:
            for name in z.namelist():
                bomb.writestr(name, z.read(name))
            largest = max(bomb.filelist, key=lambda info: info.file_size)
            for n in range(again):                            # many names for one and the same bytes
                bomb.filelist.append(copy.copy(largest))
                bomb.filelist[-1].filename = f"{largest.filename}0{n}"
        assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)["format"] == "nanodistill"
        Path(path).write_bytes(seal(buffer.getvalue()[:-2]))
        with pytest.raises(model.CheckpointError):
            model.load_checkpoint(path)
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x/data.pkl", bytes(10**9))                # a bomb of a million bytes
    wide = {**good, "model": {**good["model"], "norm.weight": torch.zeros(1).expand(10**9)}}
    Path(path).write_bytes(seal(buffer.getvalue()[:-2]))
    for bad in (None, wide):
        if bad:
            model.write_atomically(path, bad)
        process = processes.Process(target=refused_in_little_memory, args=(path,))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    assert not (tmp_path / "called").exists()


def refused_in_little_memory(path):
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(model.CheckpointError):
        model.load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_vocabularies_and_results_that_do_not_fit(corpus, tmp_path):
    folder, meta = tmp_path / "data", data.load_meta(corpus)
    shutil.copytree(corpus, folder)
    good = json.loads((folder / "tokenizer.json").read_text())
    for bad in ({**good, "pattern": "(a+)+$"}, {**good, "tokens": good["tokens"][:-1]}, {**good, "tokens": good["tokens"][1:] + ["QUFBQQ=="]},
                {**good, "tokens": good["tokens"][:-1] + good["tokens"][:1]}):
        (folder / "tokenizer.json").write_text(json.dumps(bad))
        write_meta(folder, {**meta, "tokenizer": data.sha(json.dumps(bad))})
        with pytest.raises(data.DataError, match="damaged"):
            data.load_tokenizer(str(folder))
    row = {"metrics": {"in_domain": {"select": 1.0, "report": 2.0}}, "seconds": 1.0}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    assert sweep.read_rows(path) == [row, row]
    for bad in ({**row, "seconds": math.nan}, {**row, "seconds": True}, {"metrics": {"in_domain": {"select": 1.0, "report": math.inf}}, "seconds": 1.0},
                {"metrics": {"ood/x": {"select": 1.0, "report": 2.0}}, "seconds": 1.0}, {"metrics": {"in_domain": {"select": 1.0}}, "seconds": 1.0}, []):
        path.write_text(json.dumps(row) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(data.DataError, match="result 2"):
            sweep.read_rows(path)


# ------------------------------------------------------------------------------
# every flag

WRONG = ["", " ", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e400", "0.5", "9" * 30, "9" * 5000, "K", "nanM", "infB", "1e400K", "-3M", "²", "३",
         ",", "1,,2", "1,1", "true", "True", "maybe", "\udcff", "x" * 5000, "../..", "/dev/null", "/proc/self/mem", ".", "é漢", "a=b", "=", "-", "--"]


def command_lines(flags, draw):
    """Random command lines: flags with good values, wrong ones, none, or that do not exist."""
    argv = []
    for flag in draw.sample(sorted(flags), min(len(flags), draw.choice([0, 1, 1, 2, 3, 5]))):
        good = flags[flag]
        value = draw.choice(good) if good and draw.random() < 0.6 else draw.choice(WRONG)
        argv += draw.choice([[flag, value]] * 12 + [[f"{flag}={value}"]] * 2 + [[flag], [value], [flag[:-1], value]]) if good is not None else [flag]
    return argv


@pytest.mark.parametrize("script, rounds", [("distill", 1500), ("sweep", 1000), ("data", 500), ("eval", 400)])
def test_random_command_lines_end_well(script, rounds, broken, tmp_path, monkeypatch, capsys):
    teacher = distill.train(config(broken, tmp_path / "t", tokens=2048))[0]["path"]
    Path("poem.txt").write_text(poem(60, seed=2))
    Path("items.jsonl").write_text(json.dumps({"context": "a", "choices": [" b", " c"], "label": 0}))
    folders = [broken, broken, broken, "empty", "cut", "bad_meta", "no_ood", "file", "absent"]
    files = [teacher, teacher, teacher, "other.pt", "cut.pt", "text.pt", "absent.pt", "empty"]
    outs = ["fresh", "fresh/deep", "file", "file/below", "bad_results", "t"]
    numbers = ["1", "2", "8", "64", "0.5", "1K", "8K"]
    if script == "distill":
        flags = {f"--{f.name}": numbers for f in fields(distill.Config)} | {"--profile": None, "--help": None}
        flags |= {"--data": folders, "--teacher": files, "--out": outs, "--size": ["xs", "s"], "--alpha": ["0.5", "0,1", "0.25,0.5"],
                  "--device": ["cpu", "cuda", "cuda:7", "meta", "cpu:3", "mps"], "--dtype": ["float32", "float16", "int8"]}
        main, kept, fixed = distill.main, {}, ["--data", broken, "--tokens", "8K", "--batch_size", "2", "--block_size", "32", "--compile", "false"]
        monkeypatch.setattr(distill, "train", lambda c: (distill.set_up(c), distill.unfinished(c, c.out + "/state.pt", {}))[:0])
        monkeypatch.setattr(distill, "profile", distill.set_up)
    elif script == "sweep":
        flags = {"--scale": [*sweep.SCALES], "--data": folders, "--out": outs, "--seeds": ["1", "1,2,3"], "--jobs": ["1", "2", "99"],
                 "--device": ["cpu", "cuda", "meta"], "--compile": ["true", "false"], "--dry_run": None, "--help": None}
        main, fixed = sweep.main, ["--scale", "smoke", "--data", broken]
        def stop(*args):
            raise data.DataError("would run")
        monkeypatch.setattr(sweep, "sweep", stop)
        monkeypatch.setattr(sweep, "dry_run", lambda name, scale, jobs: sweep.plan(scale))
    elif script == "data":
        flags = {"--corpus": ["python", "text"], "--vocab_size": ["257", "300"], "--out": outs, "--help": None,
                 "--train": ["poem.txt", "latin.txt", "tiny.txt", "absent.txt", "empty"], "--ood": ["a=poem.txt", "b=tiny.txt", "c=", "../d=poem.txt"]}
        main, fixed = data.main, []
        monkeypatch.setattr(data, "python_corpus", lambda: ([(f"f{i}", poem(1, seed=i)) for i in range(60)], {"b": [("b", "text")]}))
    else:
        flags = {"--teacher": files, "--data": folders, "--windows": ["1", "3"], "--items": ["1", "5"], "--tasks": ["items.jsonl", "text.pt", "empty"],
                 "--write_tasks": outs, "--device": ["cpu", "cuda"], "--json": None, "--help": None, teacher: None, "other.pt": None, "cut.pt": None}
        main, fixed = evaluation.main, [teacher, "--data", broken, "--windows", "2"]
    draw, codes = random.Random(script), Counter()
    outside = {p for p in Path(broken).rglob("*")} | {p for p in tmp_path.parent.iterdir()}
    for n in range(rounds):
        argv = [*fixed, *command_lines(flags, draw)]
        code, out, err = run_script(main, argv, monkeypatch, capsys, distill.ConfigError, model.CheckpointError)
        codes[code] += 1
        assert code in (0, 2) and (code == 0 or err[-1].startswith("error: ") and len(err) == 1), (argv, code, err)
    print(script, codes)
    assert codes[0] > rounds / 50 or script == "sweep"
    assert outside == {p for p in Path(broken).rglob("*")} | {p for p in tmp_path.parent.iterdir()}


# ------------------------------------------------------------------------------
# bad input: one line, exit code 2, nothing written

@pytest.fixture
def broken(corpus, tmp_path, monkeypatch):
    """A folder of damaged things, and a good teacher of another tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    def copy(name):
        (tmp_path / name).mkdir()
        for p in Path(corpus).iterdir():
            (tmp_path / name / p.name).write_bytes(p.read_bytes())
        return tmp_path / name
    cut = copy("cut") / "train.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    cut = copy("cut_val") / "val.bin"
    cut.write_bytes(cut.read_bytes()[:-2])
    (copy("bad_meta") / "meta.json").write_text("{}")
    (copy("bad_tokenizer") / "tokenizer.json").write_text('{"tokens": 3}')
    good = tiny(vocab_size=300, block_size=32)
    no_ood = json.loads((copy("no_ood") / "meta.json").read_text())
    no_ood["sets"] = {k: v for k, v in no_ood["sets"].items() if not k.startswith("ood_")}
    write_meta(tmp_path / "no_ood", no_ood)
    model.save_checkpoint("other.pt", good, tokenizer="0000")
    model.save_checkpoint("short.pt", good, tokenizer=data.load_meta(corpus)["tokenizer"])
    Path("cut.pt").write_bytes(Path("other.pt").read_bytes()[:500])
    Path("text.pt").write_text("hello")
    Path("latin.txt").write_bytes(b"caf\xe9 " * 100)
    Path("tiny.txt").write_text("a few words")
    Path("file").write_text("a file where a folder should be")
    (tmp_path / "bad_results").mkdir()
    Path("bad_results/results.jsonl").write_text('{"kind": "teacher"}\n')
    return corpus


D, E, S, P = distill.main, evaluation.main, sweep.main, data.main


@pytest.mark.parametrize("main, argv, word", [
    (D, "--unknown 1", "unknown"), (D, "--size huge", "size"), (D, "--alpha 1.5 --teacher other.pt", r"\[0, 1\]"),
    (D, "--alpha -0.1 --teacher other.pt", r"\[0, 1\]"), (D, "--alpha nan --teacher other.pt", r"\[0, 1\]"),
    (D, "--alpha x", "no list"), (D, "--alpha 0.5", "needs a --teacher"), (D, "--alpha 0.5,0.5 --teacher other.pt", "twice"),
    (D, "--teacher other.pt", "teaches nothing"), (D, "--temperature 0", "temperature"), (D, "--temperature -1", "temperature"),
    (D, "--tokens 0", "tokens"), (D, "--tokens 3X", "no number"), (D, "--tokens 100", "less than one step"),
    (D, "--checkpoints 4M", "checkpoints"), (D, "--batch_size 0", "batch_size"), (D, "--lr -1", "lr"), (D, "--lr nan", "lr"),
    (D, "--seed -1", "seed"), (D, "--compile maybe", "neither true nor false"), (D, "--dtype int8", "dtype"),
    (D, "--top_k -1", "top_k"), (D, "--top_p 0", "top_p"), (D, "--top_k 2 --top_p 0.5", "exclude"), (D, "--other true", "needs"),
    (D, "--hard true --top_k 2", "hard"), (D, "--data {corpus} --device cuda:99", "device"), (D, "--data {corpus} --device bananas", "device"), (D, "--data {corpus} --device meta", "device"), (D, "--accumulate 1.5", "accumulate"),
    (D, "--data empty", "meta.json"), (D, "--data absent", "meta.json"), (D, "--data cut", "train.bin"),
    (D, "--data bad_meta", "damaged"), (D, "--data {corpus} --batch_size 100000 --tokens 100M", "fewer than one batch"),
    (D, "--data {corpus} --teacher absent.pt --alpha 0.5", "no checkpoint"),
    (D, "--data {corpus} --teacher cut.pt --alpha 0.5", "damaged"), (D, "--data {corpus} --teacher text.pt --alpha 0.5", "damaged"),
    (D, "--data {corpus} --teacher other.pt --alpha 0.5", "share a tokenizer"),
    (D, "--data {corpus} --teacher short.pt --alpha 0.5", "block_size"), (D, "--data {corpus} --out file", "file"),
    (E, "", "CKPT"), (E, "absent.pt --data {corpus}", "no checkpoint"), (E, "text.pt --data {corpus}", "damaged"),
    (E, "other.pt --data {corpus}", "tokenizer"), (E, "other.pt --data empty", "meta.json"), (E, "short.pt --data cut_val", "val.bin"),
    (E, "short.pt --data bad_tokenizer", "damaged"), (E, "short.pt --windows 0", "windows"),
    (S, "--scale colossal", "scale"), (S, "--scale smoke --device bananas", "device"), (S, "--jobs 0", "jobs"), (S, "--seeds 1,1", "seeds"), (S, "--seeds x", "seeds"),
    (S, "--scale smoke --data empty", "meta.json"), (S, "--scale smoke --data no_ood", "out-of-distribution"), (S, "--scale gpu", "meta.json"), (S, "--scale smoke --data cut --out fresh", "train.bin"),
    (S, "--scale smoke --data {corpus} --out file", "file"), (S, "--scale smoke --data {corpus} --out bad_results", "results.jsonl"),
    (P, "--corpus poems", "corpus"), (P, "--vocab_size 10", "vocab_size"), (P, "--vocab_size x", "vocab_size"),
    (P, "--corpus text", "--train"), (P, "--corpus text --train absent.txt", "absent.txt"), (P, "--corpus text --train empty", "empty"),
    (P, "--corpus text --train latin.txt", "UTF-8"), (P, "--corpus text --train tiny.txt --ood far", "NAME=FILE"),
    (P, "--corpus text --train tiny.txt", "more text"), (P, "--train tiny.txt", "--corpus text"),
    (P, "--corpus text --train poem.txt --ood a=tiny.txt --out {corpus}", "another corpus"),
])
def test_bad_input(main, argv, word, broken, tmp_path, monkeypatch, capsys):
    Path("poem.txt").write_text(poem(200, seed=2))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    argv = argv.format(corpus=broken).split()
    if main in (D, S, P) and "--out" not in argv:
        argv += ["--out", "fresh"]
    code, out, err = run_script(main, argv, monkeypatch, capsys, distill.ConfigError, model.CheckpointError)
    assert code == 2 and len(err) == 1 and err[0].startswith("error: ") and regex.search(word, err[0]), (code, err)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_help_names_every_flag(monkeypatch, capsys):
    for main, flags in ((D, [f.name for f in fields(distill.Config)]), (S, ["scale", "out", "data", "seeds", "jobs", "dry_run"]),
                        (E, ["data", "json", "windows"]), (P, ["corpus", "vocab_size", "out", "train", "ood"])):
        code, out, err = run_script(main, ["--help"], monkeypatch, capsys)
        assert code == 0 and all(f"--{flag}" in out for flag in flags)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    script = """
import resource, sys, data, model
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))   # stands in for a full disk
m = model.GPT(model.GPTConfig())
data.run(lambda: model.save_checkpoint(sys.argv[1], m) if sys.argv[2] == "pt" else data.write(*sys.argv[1:], bytes(20_000)))
"""
    for what in ("pt", "x.bin"):
        target = tmp_path / "ckpt.pt" if what == "pt" else tmp_path
        done = subprocess.run([sys.executable, "-c", script, target, what], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())

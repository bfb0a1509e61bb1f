"""
Every promise of the other files, checked: python -m pytest -q

Where somebody else has written the same thing, that is what we compare with: torch's own losses and FLOP
counter, tiktoken's educational byte-pair encoder, transformers' Llama. Otherwise a plain version stands here,
or a property.
"""
import dataclasses
import functools
import http.server
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

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
CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, request):
    """Where there is a GPU, --device auto takes it only in the tests that need it."""
    if "needs_cuda" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def needs_cuda():
    if not CUDA:
        pytest.skip("needs a GPU")


def poem(verses, seed=0):
    draw = random.Random(seed)
    words = ["rose", "moon", "sea", "and", "of"]
    return "\n\n".join(" ".join(draw.choice(words) for _ in range(300)) for _ in range(verses))


def library():
    """The files of the standard library: (name, text)."""
    return [(path.name, path.read_text("utf-8")) for path in sorted(Path(os.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small text corpus: in domain some of Python's standard library, 'poem' something else; 'brackets'."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = [f"{Path(os.__file__).parent}/{name}.py" for name in ("argparse", "ast", "tarfile", "typing")]
    (folder / "poem.txt").write_text(poem(40))
    items = data.bracket_items([library()])
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    data.prepare("text", str(folder / "data"), 300, sources, {"poem": str(folder / "poem.txt")},
                 tasks={"brackets": str(folder / "items.jsonl")})
    return str(folder / "data")


def config(corpus, out, **more):
    small = dict(size="xs", tokens=8192, batch_size=4, block_size=32, lr=3e-3, warmup=0.05, compile=False,
                 log_every=4, device="cpu")  # at a higher rate rounding grows too fast to compare runs
    return distill.Config(data=corpus, out=str(out), **{**small, **more})


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """Checkpoints: a teacher, and below one folder students from it at alpha 0, 0.25 and 1, of two seeds."""
    folder = tmp_path_factory.mktemp("trained")
    teacher, = distill.train(config(corpus, folder / "teacher", size="s", seed=9, tokens=16384))
    for seed in (1, 2):
        distill.train(config(corpus, folder / str(seed), seed=seed, teacher=teacher, alpha=(0.0, 0.25, 1.0)))
    return folder


def call(main, argv, monkeypatch, capsys):
    """Run a script's main in this process -> (exit code, what it printed, its error lines)."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
    code = 0
    try:
        data.run_main(main)
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip()]


def weights(path):
    return model.load_checkpoint(str(path))[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- model.py ----------------------------------------------------------------

def tiny(n_kv_head=2, tie=True, **more):
    torch.manual_seed(0)
    shape = dict(vocab_size=61, block_size=24, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=32,
                 tie_embeddings=tie)
    m = model.GPT(model.GPTConfig(**{**shape, **more})).eval()
    with torch.no_grad():                                     # large enough weights for every part to matter
        for p in m.parameters():
            p.mul_(5) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return m


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_exported_folder_is_transformers_llama(n_kv_head, tie, corpus, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    m = tiny(n_kv_head, tie, vocab_size=data.load_meta(corpus)["vocab_size"])
    model.save_checkpoint(tmp_path / "m.pt", m, settings={"tokenizer": data.load_meta(corpus)["tokenizer"]})
    argv = ["--to_hf", tmp_path / "m.pt", tmp_path / "hf", "--data", corpus]
    code, out, err = call(model.main, argv, monkeypatch, capsys)
    assert code == 0, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    for file, name, value in (("config.json", "rope_theta", 500_000),              # what 4.x looks for
                              ("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")):
        assert json.loads((tmp_path / "hf" / file).read_text())[name] == value
    idx = torch.randint(300, (3, 24))
    with torch.no_grad():
        assert torch.allclose(m(idx), theirs(idx).logits, atol=1e-4)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in m.parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    encoding = data.load_tokenizer(corpus)
    for text in ((HERE / "model.py").read_text(), poem(1), "naïve 漢\r\n\t  x ", ""):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    assert tokenizer.encode(data.END_OF_TEXT) == [encoding.eot_token] == [tokenizer.eos_token_id]
    capsys.readouterr()


def test_forward_is_causal_and_generate_follows_it(monkeypatch):
    m, idx = tiny(), torch.randint(61, (2, 24))
    logits, changed = m(idx), idx.clone()
    monkeypatch.setattr(model.Attention, "repeat_kv", True)   # for GPUs without a kernel for grouped queries
    assert torch.allclose(m(idx), logits, atol=1e-5)
    assert m.hidden(idx).shape == (2, 24, 32) and torch.allclose(logits, m.lm_head(m.hidden(idx)), atol=1e-5)
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    assert torch.allclose(m(changed)[:, :10], logits[:, :10], atol=1e-5)
    assert not torch.allclose(m(changed)[:, 10:], logits[:, 10:], atol=1e-3)
    greedy = m.generate(idx, 30, temperature=0)               # beyond the context, which slides
    assert greedy.shape == (2, 54) and torch.equal(greedy[:, 24], logits[:, -1].argmax(-1))
    assert torch.equal(m.generate(idx, 4, top_k=1), greedy[:, :28])
    top = logits[:, -1].topk(3).indices
    assert all((m.generate(idx, 1, 5.0, top_k=3)[:, -1:] == top).any(-1).all() for _ in range(20))


def test_tables_equal_a_count_by_hand(corpus, tmp_path, monkeypatch, capsys):
    tokens = data.load_tokens(f"{corpus}/train.bin")[:9000].tolist()
    count, pairs = Counter(tokens), Counter(zip(tokens, tokens[1:]))
    unigram = [(count[i] + 0.5) / (9000 + 150) for i in range(300)]
    for size in ("unigram", "bigram"):
        path, = distill.train(config(corpus, tmp_path / size, size=size, tokens=9000))
        table, extra = model.load_checkpoint(path)
        assert isinstance(table, model.Table) and extra["settings"]["size"] == size
        probs = table(torch.arange(300)[None])[0].exp().double()             # (last token, next token)
        assert torch.allclose(probs.sum(-1), torch.ones(300).double(), atol=1e-5) and (probs > 0).all()
        for last in range(300):
            n = sum(pairs[last, j] for j in range(300))
            share = n / (n + sum((last, j) in pairs for j in range(300))) if n else 0
            for i in range(0, 300, 7):
                bigram = share * pairs[last, i] / n + (1 - share) * unigram[i] if n else unigram[i]
                assert abs(probs[last, i] - (bigram if size == "bigram" else unigram[i])) < 1e-6
    student, = distill.train(config(corpus, tmp_path / "taught", teacher=path, alpha=(1.0,)))
    losses = [line["kl"][0] for line in log_of(tmp_path / "taught")]
    assert losses[-1] < losses[0] / 2                         # it learns what the table says
    argv = [path, student, "--data", corpus, "--windows", 4]
    code, out, err = call(evaluation.main, argv, monkeypatch, capsys)
    assert code == 0 and "bigram, 9,000 tokens" in out and "alpha 1 from bigram" in out, err
    argv = ["--to_hf", path, tmp_path / "hf", "--data", corpus]
    code, out, err = call(model.main, argv, monkeypatch, capsys)
    assert code == 2 and "is a table of counts" in err[0] and not (tmp_path / "hf").exists()
    monkeypatch.setattr(distill, "TABLE_VOCAB", 299)
    with pytest.raises(data.UserError, match="vocabulary of at most 299, not 300"):
        distill.train(config(corpus, tmp_path / "large", size="bigram"))


@pytest.mark.parametrize("size", [size for size in model.SIZES if "gram" not in size])
def test_parameters_and_flops(size):
    from torch.utils.flop_counter import FlopCounterMode
    vocab_size, named = {"M": (50_304, 1e6), "B": (128_256, 1e9)}.get(size[-1], (512, None))
    vocab_size = 512 if size in ("5M", "20M") else vocab_size
    c = model.GPTConfig(vocab_size, 64, **model.SIZES[size])
    with torch.device("meta"):                               # shapes without memory
        m, idx = model.GPT(c), torch.zeros(2, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            m(idx)
    assert counter.get_total_flops() == 2 * 64 * model.flops_per_token(c)
    n = sum(p.numel() for p in m.parameters())
    said = float(size[:-1]) * named if named else {"xs": 0.04e6, "s": 0.13e6, "m": 0.34e6, "l": 0.77e6}[size]
    assert abs(n / said - 1) < 0.06


def test_a_damaged_checkpoint_is_told(tmp_path):
    m, path, draw = tiny(tie=False), tmp_path / "ckpt.pt", random.Random(0)
    model.save_checkpoint(path, m, note="kept", numbers=[1, 2.5])
    again, extra = model.load_checkpoint(path)
    assert same(again.state_dict(), m.state_dict()) and extra == {"note": "kept", "numbers": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    whole, refused = path.read_bytes(), 0
    for n in range(200):                                      # one flipped bit; cut short at the end
        at = draw.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped if n < 170 else whole[:at])
        try:
            loaded = model.load_checkpoint(path)
            assert same(loaded[0].state_dict(), m.state_dict()) and loaded[1] == extra
        except OSError:
            refused += 1
    assert refused > 100
    torch.save({"something": "else"}, path)
    for wrong in (path, tmp_path / "absent.pt"):
        with pytest.raises(OSError, match="no checkpoint|not a distill.py checkpoint"):
            model.load_checkpoint(wrong)


# ---- data.py -----------------------------------------------------------------

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


def test_bpe_merges_equal_counting_anew_and_encode_as_tiktoken_says(monkeypatch):
    from tiktoken._educational import SimpleBytePairEncoding
    code, draw = (HERE / "data.py").read_text(), random.Random(0)
    texts = ["", "a", "abab" * 100, code]
    texts += ["".join(draw.choices(letters, k=n)) for n in (40, 2000) for letters in ("ab", "aé漢 ", "ab\n1.")]
    for text in texts:
        for size in (256, 257, 330):
            ranks = data.train_bpe(text, size)
            assert list(ranks.items()) == list(naive_bpe(text, size, data.PATTERN).items())
    encoding = data.make_encoding(data.train_bpe(code, 420), data.PATTERN)
    plain = SimpleBytePairEncoding(pat_str=data.PATTERN, mergeable_ranks=encoding._mergeable_ranks)
    for sample in (code, (HERE / "model.py").read_text(), "naïve 漢字 \x00\r\n\t  x  ", ""):
        ids = encoding.encode_ordinary(sample)
        assert ids == plain.encode(sample, visualise=None) and encoding.decode(ids) == sample
    assert encoding.n_vocab == 421 and encoding.eot_token == 420
    monkeypatch.setattr(data, "BPE_WORDS", 500)               # the text as far as it has so many bytes
    words = regex.findall(data.PATTERN, code)
    most = next(n for n in range(len(words)) if sum(len(word) for word in set(words[:n])) > 500) - 1
    assert data.train_bpe(code, 300) == naive_bpe("".join(words[:most]), 300, data.PATTERN)


def documents_of(folder, name):
    """The documents of a .bin, decoded."""
    encoding, ids = data.load_tokenizer(folder), data.load_tokens(f"{folder}/{name}.bin")
    assert ids[-1] == encoding.eot_token
    return encoding.decode(ids.tolist()).split(data.END_OF_TEXT)[:-1]


@pytest.mark.parametrize("ends", ["\n\n", "\n", " "])
def test_prepare_keeps_every_document_and_its_counts(tmp_path, ends):
    text = ends.join(f"paragraph {i} " + "x é 漢 " * (i % 50) for i in range(2000))   # also all in one line
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("other text " * 1000)
    out, files = str(tmp_path / "out"), ([str(tmp_path / "a.txt")], {"b": str(tmp_path / "b.txt")})
    meta = data.prepare("text", out, 280, *files)
    train, val = documents_of(out, "train"), documents_of(out, "val")
    pieces = [piece for _, piece in data.pieces(tmp_path / "a.txt")]
    assert sorted(train + val) == sorted(pieces) and "".join(pieces) == text
    assert 0 < len(val) < len(train) / 8
    assert all(piece in "other text " * 1000 for piece in documents_of(out, "ood_b"))
    assert meta["versions"]["numpy"] == np.__version__ and set(meta["versions"]) == {
        "python", "torch", "numpy", "sympy", "networkx"}
    for name, s in meta["sets"].items():
        docs = documents_of(out, name)
        assert s["documents"] == len(docs) and s["bytes"] == sum(len(d.encode()) for d in docs)
    assert data.prepare("text", out, 280, *files) == meta
    before = {p.name: p.read_bytes() for p in Path(out).iterdir()}
    for wrong, change in ((281, ""), (280, "more")):          # another call, and the same of a changed file
        (tmp_path / "b.txt").write_text("other text " * 1000 + change)
        with pytest.raises(data.UserError, match="a different corpus"):
            data.prepare("text", out, wrong, *files)
    assert before == {p.name: p.read_bytes() for p in Path(out).iterdir()}


def test_split_moves_nothing_when_a_file_is_added():
    documents = [(f"pkg/file{i}.py", f"text {i}") for i in range(2000)]
    one = data.split_documents(documents, {"far": [("f", "far away"), ("copy", "text 3")]})
    two = data.split_documents(documents + [(f"new/{i}.py", f"new {i}") for i in range(50)], {})
    assert set(one["val"]) <= set(two["val"]) and set(one["train"]) <= set(two["train"])
    assert 0.03 < len(one["val"]) / 2000 < 0.07
    assert one["ood_far"] == [("f", "far away")]              # a copy of an in-domain document tests nothing
    assert [d for d in two["train"] if d in one["train"]] == one["train"]


def test_batches_are_a_function_of_seed_and_step(corpus):
    path = f"{corpus}/train.bin"
    tokens, b = data.load_tokens(path), data.Batches(path, 3, 16, seed=5)
    again, other = data.Batches(path, 3, 16, seed=5), data.Batches(path, 3, 16, seed=6)
    seen, n = [], b.n
    for step in range(math.ceil(2 * n / 3)):
        x, y = b[step]
        assert x.shape == y.shape == (3, 16) and x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
        seen += [tuple(row.tolist()) for row in torch.cat([x, y[:, -1:]], 1)]
    windows = [tuple(tokens[i * 16:i * 16 + 17].tolist()) for i in range(n)]
    assert sorted(seen[:n]) == sorted(windows) == sorted(seen[n:2 * n])
    assert seen[:n] != seen[n:2 * n] and seen[:n] != windows and not torch.equal(other[0][0], b[0][0])
    for step in (2 * n // 3 - 1, 0, n // 3, 1):               # any order, also across the end of an epoch
        assert torch.equal(again[step][0], b[step][0])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_shards_from_a_server_become_a_corpus(tmp_path, monkeypatch):
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gpt2 = data.make_encoding(data.train_bpe(poem(3), 300), data.PATTERN)
    monkeypatch.setattr(data, "FINEWEB", f"http://127.0.0.1:{server.server_port}/{{}}")
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: gpt2)
    in_domain, ood = data.python_documents()
    assert {name.split("/")[0] for name, _ in in_domain} == {"stdlib", "torch"}
    assert not any("_sysconfigdata" in name or "site-packages" in name for name, _ in in_domain)
    assert not any(name.endswith(("/version.py", "/__config__.py")) for name, _ in in_domain + ood["numpy"])
    assert all(sum(len(t) for _, t in docs) > 400_000 for docs in ood.values())
    few = in_domain[:99], {name: documents[:9] for name, documents in ood.items()}
    monkeypatch.setattr(data, "python_documents", lambda: few)
    rng, shards, out = np.random.default_rng(0), {}, str(tmp_path / "fine")
    for name in ("train_000001", "train_000002", "val_000000"):
        ids = rng.integers(0, gpt2.n_vocab, 3000).astype("<u2").tobytes()
        shards[name] = np.array([20240520, 1, 3000] + [0] * 253, "<i4").tobytes() + ids
        (tmp_path / name).write_bytes(shards[name])
    for wrong, word in ((b"cut", "truncated"), (shards["train_000002"][:-1], "truncated"), (None, "404")):
        (tmp_path / "train_000002").unlink()
        if wrong:
            (tmp_path / "train_000002").write_bytes(wrong)
        with pytest.raises(data.UserError, match=f"http.*train_000002.*{word}"):
            data.prepare("fineweb-edu", out, tokens=150_000_000)
        (tmp_path / "train_000002").write_bytes(shards["train_000002"])
    assert not os.path.exists(f"{out}/meta.json") and not list(Path(out).glob("*.partial"))
    meta = data.prepare("fineweb-edu", out, tokens=150_000_000)
    assert meta["sets"]["train"]["tokens"] == 6000 and meta["vocab_size"] == 50_304
    ids = b"".join(shards[name][1024:] for name in ("train_000001", "train_000002"))
    assert data.load_tokens(f"{out}/train.bin").tobytes() == ids
    assert {"ood_code", "ood_cpp", "ood_prose", "ood_numpy"} < meta["sets"].keys()
    server.shutdown()


# ---- distill.py: the loss ----------------------------------------------------

def pair(seed=0, B=2, T=5, C=8, V=11):
    g = torch.Generator().manual_seed(seed)
    def randn(*shape):
        return torch.randn(*shape, generator=g)
    return randn(B, T, C), randn(V, C), torch.randint(V, (B, T), generator=g), 3 * randn(B, T, V)


LOSSES = [distill.distill_loss_reference, distill.distill_loss]


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_torchs_own(loss_fn, alpha, temperature, top_k):
    hidden, weight, targets, t = (x.requires_grad_() if x.is_floating_point() else x for x in pair())
    loss, ce, kl = loss_fn(hidden, weight, targets, alpha, t, temperature, top_k)
    z, q = (hidden @ weight.T).flatten(0, 1), t.detach().flatten(0, 1)
    if 0 < top_k < 11:                                        # only the k likeliest, by another way
        q = torch.full_like(q, -1e6).scatter(1, q.argsort(1, descending=True)[:, :top_k], 0.0) + q
    ce2 = F.cross_entropy(z, targets.flatten())
    kl2 = F.kl_div((z / temperature).log_softmax(-1), (q / temperature).softmax(-1), reduction="batchmean")
    loss2 = (1 - alpha) * ce2 + alpha * temperature**2 * kl2
    assert not ce.requires_grad and not kl.requires_grad
    for mine, theirs in ((ce, ce2), (kl, kl2), (loss, loss2)):
        assert torch.allclose(mine, theirs, atol=1e-5)
    if top_k == 1 and temperature == 1:                       # hard labels
        assert torch.allclose(kl, F.cross_entropy(z, q.argmax(-1)), atol=1e-5)
    expected = torch.autograd.grad(3 * loss2, (hidden, weight))
    for mine, theirs in zip(torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True), expected):
        assert torch.allclose(mine, theirs, atol=1e-5)
    loss.backward()
    assert t.grad is None                                     # the teacher is frozen
    with torch.no_grad():                                     # and by finite differences
        moved = torch.zeros_like(weight)
        moved[3, 3] = 1e-2
        up, down = (loss_fn(hidden, w, targets, alpha, t, temperature, top_k)[0]
                    for w in (weight + moved, weight - moved))
        assert abs((up - down).item() / 2e-2 - weight.grad[3, 3].item()) < 1e-3
    assert torch.allclose(loss_fn(hidden, weight, targets, 0.0)[0], ce2)
    if top_k:                                                 # exactly k, ties or not
        assert (distill.keep_top_k(torch.zeros(3, 11), top_k) == 0).sum() == 3 * min(top_k, 11)


@pytest.mark.parametrize("chunk", [1, 4, 256])                # of 10 tokens: short last chunk, all at once
def test_fused_loss_equals_the_plain_one_by_chunks_and_in_low_precision(chunk, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_TOKENS", chunk)
    for alpha, temperature, top_k, taught in ((0.0, 1.0, 0, False), (0.4, 1.0, 0, True), (1.0, 2.0, 3, True)):
        found, sizes, fast = [], [], distill.chunk_loss
        if chunk == 4 and temperature == 2:
            fast = distill.compiler(torch.device("cpu"))(fast)
        def chunk_fn(z, *rest):
            sizes.append(len(z))
            return fast(z, *rest)
        for loss_fn, dtype in ((distill.distill_loss_reference, torch.float32),
                               *[(functools.partial(distill.distill_loss, chunk_fn=chunk_fn), dtype)
                                 for dtype in (torch.float32, torch.bfloat16)]):
            hidden, weight, targets, t = pair(4)
            hidden.requires_grad_(), weight.requires_grad_()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss, ce, kl = loss_fn(hidden, weight, targets, alpha, t.to(dtype) if taught else None,
                                       temperature, top_k)
            grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
            assert all(map(torch.equal, grads, torch.autograd.grad(loss, (hidden, weight))))
            found.append((loss, ce, kl, *grads))
        for plain, fused, low in zip(*found):
            assert fused.shape == plain.shape and torch.allclose(fused, plain, atol=1e-5)
            assert low.dtype == torch.float32 and (low - plain).abs().max() < 0.05 * max(1, plain.abs().max())
        assert sizes[:len(sizes) // 2] == {1: [1] * 10, 4: [4, 4, 2], 256: [10]}[chunk]


# ---- distill.py: training ----------------------------------------------------

def test_learning_rate_and_decay(corpus):
    c = distill.Config(lr=1.0, min_lr=0.1, warmup=0.1, tokens=200 * 1024)
    rates = [distill.learning_rate(c, s) for s in range(200)]
    assert rates[0] == 1 / 20 and max(rates) == rates[19] == 1.0 and 0.1 < rates[-1] < 0.101
    assert all(a > b for a, b in zip(rates[20:], rates[21:])) and abs(rates[110] - 0.55) < 1e-9
    for size, rate in (("xs", 12e-3), ("s", 6e-3), ("m", 4e-3), ("l", 3e-3), ("0.7B", 3e-4)):
        small = dataclasses.replace(distill.Config(size="s"), size=size, warmup=0)           # not that of s
        assert math.isclose(distill.learning_rate(small, 0), rate)
    student = distill.Student(model.GPTConfig(), 0.0, c, torch.device("cpu"), torch.float32)
    for group, decay, dims in zip(student.optimizer.param_groups, (0.1, 0.0), (2, 1)):
        assert group["weight_decay"] == decay and {p.dim() for p in group["params"]} == {dims}


def test_a_clip_of_zero_is_no_limit(corpus, tmp_path):
    off, huge, one = (distill.train(config(corpus, tmp_path / str(clip), tokens=2048, grad_clip=clip))[0]
                      for clip in (0.0, 1e9, 1.0))
    assert same(weights(off), weights(huge)) and not same(weights(off), weights(one))


def log_of(folder):
    return [json.loads(line) for line in open(Path(folder, "log.jsonl"))]


# two ways to the same gradients are compared after one large step, before rounding grows: Adam's first step
# is about the sign of the gradient, and where that is nearly 0 rounding decides
FEW_STEPS = dict(tokens=1024, log_every=1, lr=0.01, warmup=0.0)


def assert_same_losses(one, two):
    one, two = (np.array([line["ce"] + line["kl"] for line in log_of(folder)[:2]]) for folder in (one, two))
    assert one.shape == two.shape and np.abs(one[0] - two[0]).max() < 1e-4
    assert np.abs(one[1] - two[1]).max() < 0.05 * np.abs(one[1] - one[0]).max()


def test_many_alphas_equal_one_at_a_time(corpus, trained, tmp_path):
    teacher, log = trained / "teacher" / "ckpt.pt", log_of(trained / "1")
    for alpha in (0.0, 0.25, 1.0):
        more = dict(teacher=str(teacher), alpha=(alpha,)) if alpha else {}
        alone, = distill.train(config(corpus, tmp_path / str(alpha), **more))
        many = trained / "1" / f"alpha_{alpha:g}" / "ckpt.pt"
        extra = model.load_checkpoint(many)[1]
        assert same(weights(alone), weights(many))            # and so a run repeats
        assert extra["alpha"] == alpha and extra["settings"]["teacher"]["name"] == "s"
    assert [line["step"] for line in log] == [*range(0, 64, 4), 63]
    assert log[-1]["ce"][0] < log[0]["ce"][0] - 0.5
    assert log[-1]["kl"][2] < log[-1]["kl"][1]                # pure distillation comes nearest to the teacher


def test_a_finished_run_is_not_repeated_and_another_not_overwritten(corpus, trained, tmp_path):
    moved = str(shutil.copy(trained / "teacher" / "ckpt.pt", tmp_path / "moved"))
    taught = config(corpus, trained / "1", teacher=moved, alpha=(0.0, 0.25, 1.0))  # the same by another name
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*.pt")}
    assert {p.name for p in before} == {"ckpt.pt"}
    assert distill.train(taught) == [f"{trained}/1/alpha_{alpha}/ckpt.pt" for alpha in ("0", "0.25", "1")]
    shutil.copy(trained / "2" / "alpha_1" / "ckpt.pt", moved)
    for change in (dict(lr=1e-3), dict(teacher=moved), dict(alpha=(0.0, 0.5)), dict(alpha=(0.5,))):
        with pytest.raises(data.UserError, match="other settings"):
            distill.train(dataclasses.replace(taught, **change))
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    one, two = (str(trained / "2" / f"alpha_{alpha}" / "ckpt.pt") for alpha in ("0.25", "1"))
    student = config(corpus, tmp_path / "s", teacher=one, alpha=(0.5,), tokens=1024)
    distill.train(student)                                    # two teachers of one run are two
    with pytest.raises(data.UserError, match="other settings"):
        distill.train(dataclasses.replace(student, teacher=two))


def test_accumulation_equals_a_bigger_batch(corpus, tmp_path):
    for name, more in (("a", dict(batch_size=4, accumulate=2)), ("b", dict(batch_size=8))):
        distill.train(config(corpus, tmp_path / name, **FEW_STEPS, **more))
    assert_same_losses(tmp_path / "a", tmp_path / "b")       # the log has means over the step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_temperature_and_top_k_train(corpus, trained, tmp_path, dtype):
    more = dict(dtype=dtype, teacher=str(trained / "teacher" / "ckpt.pt"), alpha=(0.5, 1.0), temperature=2.0)
    for path in distill.train(config(corpus, tmp_path / "s", top_k=20, tokens=4096, **more)):
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in weights(path).values())
    assert log_of(tmp_path / "s")[-1]["ce"][0] < log_of(tmp_path / "s")[0]["ce"][0] - 0.3


def test_float16_stops_once_its_scale_is_used_up(corpus, tmp_path, monkeypatch):
    def overflows(z, *rest):
        return torch.zeros(()), torch.zeros(()), torch.full_like(z, math.inf)
    monkeypatch.setattr(distill, "chunk_loss", overflows)
    with pytest.raises(data.UserError, match="NaN or inf between steps"):
        distill.train(config(corpus, tmp_path, dtype="float16"))
    assert not list(tmp_path.glob("*.pt"))


def test_compiled_training_equals_eager_and_works_without_a_compiler(
        corpus, trained, tmp_path, monkeypatch, capsys):
    def run(name, **more):
        return distill.train(config(corpus, tmp_path / name, teacher=str(trained / "teacher" / "ckpt.pt"),
                                    alpha=(0.3,), temperature=2.0, **FEW_STEPS, **more))[0]
    plain, reference = run("plain"), run("reference", fused=False)
    works = distill.compiler(torch.device("cpu"))(run) is not run
    fast = run("fast", compile=True)
    for name in ("reference", "fast"):
        assert_same_losses(tmp_path / "plain", tmp_path / name)
    assert not same(weights(plain), weights(reference))       # another way of reckoning, really taken
    assert same(weights(plain), weights(fast)) != works
    def broken(*_, **__):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", broken)
    distill.compiler.cache_clear()
    assert same(weights(run("none", compile=True)), weights(plain))
    distill.compiler.cache_clear()
    assert "eager mode" in capsys.readouterr().err


def test_a_step_that_writes_no_log_line_asks_the_device_for_nothing(corpus, tmp_path, monkeypatch):
    asked = []
    for method in ("item", "tolist", "__bool__", "__float__", "__int__"):
        plain = getattr(torch.Tensor, method)
        monkeypatch.setattr(torch.Tensor, method,
                            lambda t, plain=plain, method=method: (asked.append(method), plain(t))[1])
    counts = []
    for tokens in (2048, 8192):
        distill.train(config(corpus, tmp_path / str(tokens), tokens=tokens, log_every=1000))
        counts.append(len(asked))
        asked.clear()
    assert counts[0] == counts[1] > 0


ARGS = ("--size xs --tokens 16384 --batch_size 4 --block_size 32 --lr 3e-3 --warmup 0.05 --compile false "
        "--log_every 4 --device cpu").split()


def test_teachers_of_transformers(corpus, trained, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    def ends(name, data_dir, teacher):
        distill.train(config(data_dir, tmp_path / name, teacher=teacher, alpha=(0.5, 1.0), **FEW_STEPS))
        return log_of(tmp_path / name)[-1]
    ours, exported = str(trained / "teacher" / "ckpt.pt"), str(tmp_path / "exported")
    model.to_hf(ours, exported, corpus)                       # our export teaches as its checkpoint does
    ends("ours", corpus, ours), ends("theirs", corpus, exported)
    assert_same_losses(tmp_path / "ours", tmp_path / "theirs")
    # any corpus in GPT-2's tokens (here few of them), and a GPT-2, whose vocabulary is a little smaller
    few = data.make_encoding(data.train_bpe(poem(3), 300), data.PATTERN)
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: few)
    (tmp_path / "poem.txt").write_text(poem(200))
    folder = str(tmp_path / "data")
    meta = data.prepare("text", folder, "gpt2", [str(tmp_path / "poem.txt")])
    assert meta["vocab_size"] == 50_304 and meta["ids"] == few.n_vocab
    path, = distill.train(config(folder, tmp_path / "plain", tokens=1024))
    gpt2 = str(tmp_path / "gpt2")
    model.to_hf(path, gpt2, folder)                           # for its tokenizer
    shape = transformers.GPT2Config(vocab_size=50_257, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(shape).save_pretrained(gpt2)
    teacher, known = distill.load_teacher(config(folder, "", teacher=gpt2), meta, "cpu")
    logits = teacher(torch.zeros(1, 8, dtype=torch.int64))
    assert logits.shape == (1, 8, 50_304) and (logits[..., 50_257:] == -1e9).all() and known["name"] == gpt2
    last = ends("taught", folder, gpt2)
    assert np.isfinite(last["kl"]).all() and last["kl"][1] < log_of(tmp_path / "taught")[0]["kl"][1]
    with pytest.raises(data.UserError, match="does not give the tokens of"):
        ends("wrong", corpus, gpt2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(data.UserError, match="pip install transformers"):
        ends("none", corpus, exported)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")
def test_two_ranks_equal_one(corpus, trained, tmp_path):
    argv = [*ARGS, "--data", corpus, "--accumulate", "2", "--alpha", "0,0.5",
            "--teacher", str(trained / "teacher" / "ckpt.pt")]
    argv += [word for name, value in FEW_STEPS.items() for word in (f"--{name}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    distill.train(distill.parse_config([*argv, "--out", str(tmp_path / "one")]))
    for _ in range(2):                                        # the second time all is done
        done = subprocess.run([*torchrun, "distill.py", *argv, "--out", tmp_path / "two"], cwd=HERE,
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and done.stdout.count("next: python eval.py") == 1, done.stderr
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_a_run_that_is_stopped_or_killed_ends_as_if_never_stopped(corpus, trained, tmp_path, monkeypatch):
    teacher, whole = str(trained / "teacher" / "ckpt.pt"), trained / "1"
    parts = config(corpus, tmp_path / "parts", teacher=teacher, alpha=(0.0, 0.25, 1.0), save_every=0)
    state, plain = tmp_path / "parts" / "state.pt", distill.learning_rate
    def stop(config, step):                                   # Ctrl-C, in the middle of a step
        if step == 13:
            raise KeyboardInterrupt
        return plain(config, step)
    monkeypatch.setattr(distill, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        distill.train(parts)
    monkeypatch.setattr(distill, "learning_rate", plain)
    saved = state.stat().st_mtime_ns
    argv = [*ARGS, "--tokens", "8192", "--data", corpus, "--out", parts.out, "--teacher", teacher,
            "--alpha", "0,0.25,1", "--save_every", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "distill.py", *argv], cwd=HERE, env=env, stderr=-3)
    while process.poll() is None and state.exists() and state.stat().st_mtime_ns == saved:
        time.sleep(0.001)                                     # until it has saved one more state
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)
    for path in distill.train(parts):
        assert same(weights(path), weights(whole / Path(path).relative_to(parts.out)))
    logs = [{line["step"]: (line["lr"], line["ce"], line["kl"]) for line in log_of(folder)}
            for folder in (parts.out, whole)]
    assert logs[0] == logs[1] and not state.exists()


def test_a_loss_of_nan_stops_the_run_before_anything_is_saved(corpus, trained, tmp_path, monkeypatch):
    plain, calls = distill.distill_loss, []
    def breaks(*args, **more):
        calls.append(1)
        loss, ce, kl = plain(*args, **more)
        return (loss * math.nan, ce, kl) if len(calls) == 21 else (loss, ce, kl)
    monkeypatch.setattr(distill, "distill_loss", breaks)
    for save_every, log_every in ((0.0, 1000), (999.0, 10)):  # asked where a state or a line is written
        calls.clear()
        out = tmp_path / str(save_every)
        with pytest.raises(data.UserError, match=r"NaN or inf between steps \d+ and 20 \(learning rate 0.0"):
            distill.train(config(corpus, out, save_every=save_every, log_every=log_every))
        assert not (out / "ckpt.pt").exists() and (out / "state.pt").exists() == (save_every == 0)
    monkeypatch.setattr(distill, "distill_loss", plain)       # the state was a good one
    again, = distill.train(config(corpus, tmp_path / "0.0", save_every=0.0, log_every=1000))
    assert same(weights(again), weights(trained / "1" / "alpha_0" / "ckpt.pt"))


# ---- on a GPU ----------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taught", [True, False])
def test_fused_loss_equals_the_plain_one_on_a_gpu(dtype, taught, needs_cuda, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_BYTES", 7 * 500 * 4)  # seven tokens at a time
    torch.manual_seed(0)
    h, w = (torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((4, 24, 64), (500, 64)))
    t, y = 3 * torch.randn(4, 24, 500, device="cuda"), torch.randint(500, (4, 24), device="cuda")
    found = []
    for loss_fn in (distill.distill_loss_reference, functools.partial(
            distill.distill_loss, chunk_fn=torch.compile(distill.chunk_loss, dynamic=False))):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss, ce, kl = loss_fn(h, w, y, 0.3 if taught else 0.0, t.to(dtype) if taught else None, 2.0)
        found.append((loss, ce, kl, *torch.autograd.grad(loss, (h, w))))
    for one, other in zip(*found):
        assert (one - other).norm() <= (1e-4 if dtype == torch.float32 else 0.02) * one.norm() + 1e-6


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_training_on_a_gpu_follows_the_cpu_and_resumes(dtype, corpus, tmp_path, needs_cuda, monkeypatch):
    on_gpu = functools.partial(config, corpus, device="cuda", dtype=dtype, compile=True, save_every=0.0)
    teacher, = distill.train(on_gpu(tmp_path / "t"))
    more = dict(teacher=teacher, alpha=(0.0, 0.5))
    paths = distill.train(on_gpu(tmp_path / "whole", **more))
    distill.train(config(corpus, tmp_path / "cpu", **more))
    plain = distill.learning_rate
    def stop(config, step):
        if step == 40:
            raise KeyboardInterrupt
        return plain(config, step)
    monkeypatch.setattr(distill, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        distill.train(on_gpu(tmp_path / "parts", **more))
    monkeypatch.setattr(distill, "learning_rate", plain)
    again = distill.train(on_gpu(tmp_path / "parts", **more))
    for one, other in zip(paths, again):
        for a, b in zip(weights(one).values(), weights(other).values()):
            assert (a - b).norm() < 0.02 * a.norm() + 1e-3
    ends = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["ce"]
            for name in ("whole", "parts", "cpu")]
    assert np.abs(np.array(ends) - ends[-1]).max() < 0.05
    losses = [evaluation.evaluate(model.load_checkpoint(paths[1], device)[0], corpus, 16, 4)
              for device in ("cpu", "cuda")]
    for name in ("in_domain", "ood/poem", "calibrated/in_domain"):
        assert abs(losses[0][name]["report"] - losses[1][name]["report"]) < 0.02


# ---- eval.py -----------------------------------------------------------------

def test_evaluate_is_the_mean_loss_over_disjoint_halves(corpus):
    m = tiny(vocab_size=300)
    metrics = evaluation.evaluate(m, corpus, windows=1000)
    sets = ("in_domain", "ood/poem")
    assert set(metrics) == {*sets, *(f"calibrated/{x}" for x in sets), *(f"temperature/{x}" for x in sets),
                            "task/brackets", "accuracy/brackets"}
    for name, file in (("in_domain", "val"), ("ood/poem", "ood_poem")):
        tokens = torch.from_numpy(data.load_tokens(f"{corpus}/{file}.bin").astype(np.int64))
        n = (len(tokens) - 1) // 24
        x, y = tokens[:n * 24].view(n, 24), tokens[1:n * 24 + 1].view(n, 24)
        with torch.no_grad():
            for half, part in (("select", slice(0, n // 2)), ("report", slice(n // 2, n))):
                expected = F.cross_entropy(m(x[part]).flatten(0, 1), y[part].flatten()).item()
                assert abs(metrics[name][half] - expected) < 1e-4
    rows = evaluation.read_windows(f"{corpus}/train.bin", 24, 5)
    assert rows["select"].shape == rows["report"].shape == (5, 25)
    assert not torch.isin(rows["select"] @ torch.arange(25), rows["report"] @ torch.arange(25)).any()


def test_calibrated_losses_are_those_of_the_best_temperature(corpus, tmp_path):
    m, _ = model.load_checkpoint(*distill.train(config(corpus, tmp_path / "m", tokens=65536)))
    for scale in (1.0, 1.15):
        with torch.no_grad():
            m.norm.weight *= scale                            # and so the logits
        found = evaluation.evaluate(m, corpus, 64, 4)
        for name, path in evaluation.evaluation_sets(corpus).items():
            halves = evaluation.read_windows(path, 32, 64)
            t = found[f"temperature/{name}"]["select"]
            losses = {}
            for half, rows in halves.items():
                with torch.no_grad():
                    z, y = m(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
                losses[half] = [F.cross_entropy(z / x, y).item() for x in (t, *np.arange(0.8, 1.4, 0.005))]
            best = np.arange(0.8, 1.4, 0.005)[np.argmin(losses["select"][1:])]
            assert abs(t - best) < 0.01 and abs(t - 1) > 0.01
            assert found[f"temperature/{name}"]["report"] == t
            assert abs(found[f"calibrated/{name}"]["report"] - losses["report"][0]) < 1e-4
            assert abs(found[f"calibrated/{name}"]["select"] - min(losses["select"])) < 1e-4


def test_items_are_what_they_say_and_untrained_models_at_chance(corpus):
    sets = [library()[::2], library()[1::2]]
    items, texts = data.bracket_items(sets), dict(library())
    middle, of_half, per_file = len(items) // 2, [set(), set()], Counter()
    assert items == data.bracket_items(sets) and 300 < len(items) <= 2 * 2 * 2 * 63
    for k, item in enumerate(items):
        context, (one, other), label = item["context"], item["choices"], item["label"]
        whole = context + item["choices"][label]
        name, *others = [name for name, text in texts.items() if whole in text]
        if not others:
            of_half[k >= middle].add(name)
            per_file[name, label] += 1
        assert len(context) <= 280 and context[-1].isalnum() and len(one) <= 31
        assert one[0] + other[0] == ")]" and one[1:] == other[1:]
        at, depth = len(context), 1                           # the bracket is open in the context, and near
        while depth:
            at -= 1
            depth += (context[at] in ")]}") - (context[at] in "([{")
        assert context[at] == "(["[label] and 8 <= len(context) - at <= 200
    assert not of_half[0] & of_half[1] and max(per_file.values()) <= 6
    for half in (items[:middle], items[middle:], data.evenly_spaced(items, 63)):   # as many of either
        assert abs(sum(item["label"] for item in half) - len(half) / 2) <= 2
    # of equal length in tokens, or the shorter choice would be the likelier: in data/python this evens out
    encoding, found = data.load_tokenizer(corpus), []
    items = [item for item in items if len({len(encoding.encode(choice)) for choice in item["choices"]}) == 1]
    for seed in range(3):
        torch.manual_seed(seed)
        m = model.GPT(model.GPTConfig(300, 128, **model.SIZES["xs"])).eval()
        scores = np.array([evaluation.score_item(m, encoding, item) for item in items])
        labels = np.array([item["label"] for item in items])
        found.append(np.mean([scores[labels == label].mean(0) for label in (0, 1)], axis=0))
    right, accuracy = np.mean(found, axis=0)
    assert abs(right - 0.5) < 0.01 and abs(accuracy - 0.5) < 3 * math.sqrt(0.25 / 3 / len(items))


def test_scores_are_sums_of_log_probabilities(corpus):
    """One choice at a time, without batches or padding, as the definition has it."""
    encoding, m = data.load_tokenizer(corpus), tiny(vocab_size=300)
    items = data.read_items(f"{corpus}/task_brackets.jsonl")[:20] + [
        {"context": "x = 1\n" * 100 + "y", "choices": [" a", " long" * 90], "label": 0},  # over the context
        {"context": "x = ", "choices": ["y1", "z", "w"], "label": 1},
        {"context": "", "choices": ["y", "z1"], "label": 0}]
    for item in items:
        right, accuracy = evaluation.score_item(m, encoding, item)
        sums, means = [], []
        for choice in item["choices"]:
            ids = encoding.encode_ordinary(choice)[:24]
            row = [encoding.eot_token, *encoding.encode_ordinary(item["context"]), *ids][-25:]
            logp = m(torch.tensor([row[:-1]]))[0].log_softmax(-1)
            sums.append(sum(logp[k - 1, row[k]].item() for k in range(len(row) - len(ids), len(row))))
            means.append(sums[-1] / len(encoding.decode(ids)))                   # of what was scored
        p = np.exp(sums) / np.exp(sums).sum()
        assert abs(right - p[item["label"]]) < 1e-5 and accuracy == (np.argmax(means) == item["label"])


def test_where_the_gain_lies(corpus, trained, monkeypatch, capsys):
    base, student, teacher, other = paths = [str(trained / name / "ckpt.pt") for name in (
        "1/alpha_0", "1/alpha_0.25", "teacher", "2/alpha_0")]
    models = [model.load_checkpoint(path)[0] for path in paths]
    for where, groups in evaluation.token_gains(*models, corpus, 64).items():
        rows = evaluation.read_windows(
            f"{corpus}/{'val' if where == 'in_domain' else 'ood_poem'}.bin", 32, 64)["report"]
        x, y = rows[:, :-1], rows[:, 1:]
        b, s = (F.cross_entropy(m(x).transpose(1, 2), y, reduction="none") for m in models[:2])
        t_right, o_right = (m(x).argmax(-1) == y for m in models[2:])
        all_tokens, *by_who = groups.values()
        assert all_tokens[0] == 1 and abs(all_tokens[1] - (b - s).mean().item()) < 1e-4
        assert abs(sum(share for share, _ in by_who) - 1) < 1e-6
        assert abs(sum(share * gain for share, gain in by_who) - all_tokens[1]) < 1e-6
        share, gain = groups["only the teacher"]
        only = (b - s)[t_right & ~o_right]
        assert abs(share - len(only) / b.numel()) < 1e-3 and len(only)
        assert abs(gain - only.mean().item()) < 0.05
    def show(*argv):
        return call(evaluation.main, [*argv, "--data", corpus, "--windows", 16], monkeypatch, capsys)
    code, out, err = show(base, student, "--teacher", teacher, other)
    assert code == 0 and "outside    only the other student" in out, err
    code, out, err = show(base, student, other, "--teacher", teacher, other)
    assert code == 2 and "takes two checkpoints" in err[0], err


def test_eval_prints_tables_and_samples(corpus, trained, tmp_path, monkeypatch, capsys):
    paths = [str(trained / "1" / name / "ckpt.pt") for name in ("alpha_0", "alpha_0.25")]
    wider, = distill.train(config(corpus, tmp_path / "wider", block_size=64, tokens=1024))
    code, out, err = call(evaluation.main, [paths[0], wider, "--data", corpus], monkeypatch, capsys)
    assert code == 2 and "different context lengths" in err[0]
    def show(*flags):
        argv = [*paths, "--data", corpus, "--windows", 16, *flags]
        code, out, err = call(evaluation.main, argv, monkeypatch, capsys)
        assert code == 0, err
        return out
    metrics = json.loads(show("--json"))
    assert metrics[paths[1]] == evaluation.evaluate(model.load_checkpoint(paths[1])[0], corpus, 16)
    assert "def " in show("--sample", "def ")
    table = {line[:26].strip(): line[26:].split() for line in show().splitlines()}
    for name, sign in (("ood/poem", -1), ("accuracy/brackets", 1)):
        one, two = (metrics[path][name]["report"] for path in paths)
        assert table[name] == [f"{one:.4f}", f"{two:.4f}", f"({sign * (two - one):+.4f})"]


def test_items_of_ones_own_are_a_task(tmp_path, monkeypatch, capsys):
    theirs = {"ctx": "A man", "endings": ["sits.", "flies."], "label": "1"}
    odd = {"context": "a\u2028b\x85", "choices": [" x", " y"], "label": "0"}
    lines = [json.dumps(item, ensure_ascii=False) + "\n\n" for item in (theirs, odd, odd)]
    (tmp_path / "own.jsonl").write_text("\ufeff\n" + "".join(lines), "utf-8")
    (tmp_path / "a.txt").write_text(poem(200))
    argv = ["--corpus", "text", "--train", tmp_path / "a.txt", "--vocab_size", 280,
            "--out", tmp_path / "data", "--task", f"own={tmp_path / 'own.jsonl'}"]
    code, out, err = call(data.main, argv, monkeypatch, capsys)
    assert code == 0 and "task_own           3 items" in out, err
    first = {"context": "A man", "choices": [" sits.", " flies."], "label": 1}
    expected = [first, {**odd, "label": 0}, {**odd, "label": 0}]
    assert data.read_items(tmp_path / "data" / "task_own.jsonl") == expected
    metrics = evaluation.evaluate(tiny(vocab_size=280), str(tmp_path / "data"), 4)
    assert set(metrics["task/own"]) == {"select", "report"} and metrics["accuracy/own"]["select"] in (0, 1)
    (tmp_path / "own.jsonl").write_text(json.dumps(odd) + "\n" + json.dumps(theirs))
    assert call(data.main, argv, monkeypatch, capsys)[0] == 2                    # another corpus


# ---- eval.py: the findings ---------------------------------------------------

def test_interval_is_students():
    mean, margin = evaluation.interval([1.0, 2.0, 4.0])
    assert abs(mean - 7 / 3) < 1e-12 and abs(margin - 4.303 * 1.527525 / math.sqrt(3)) < 1e-4
    assert evaluation.show([1.0, 2.0, 4.0], 1) == "+2.3 ± 3.8" and evaluation.show([3.0]) == "+3.000"
    rng, hits = random.Random(0), 0
    for _ in range(2000):                                     # it holds the truth 95 times in 100
        mean, margin = evaluation.interval([rng.gauss(5, 2) for _ in range(4)])
        hits += abs(mean - 5) <= margin
    assert 0.935 < hits / 2000 < 0.965


STUDENT = "s@8M"
PAPER = {"bigram@32M": (3.5, {0.25: (-0.05, 0.001), 1.0: (-1.0, -1.0)}),
         "xs@32M": (2.9, {0.25: (-0.01, 0.04), 1.0: (-0.2, -0.1)}),
         "s@32M": (2.4, {0.25: (0.03, 0.05), 1.0: (0.05, 0.10)}),
         "m@32M": (2.2, {0.25: (0.03, 0.06), 1.0: (0.05, 0.09)})}


def made_up(teachers=PAPER, seeds=(1, 2, 3), noise=0.001, less=None, own=False):
    """
    Rows in which the student alone has a loss of 2.5 in domain and 3.0 outside, with twice the tokens 0.3 and
    0.24 less. teachers: {name: (own loss, {alpha: (gain in domain, gain outside)})}; a seed adds noise (a
    number, or one for each teacher) to gains outside; less: how much lower gains are, once calibrated.
    """
    def row(model, seed, inside, outside, teacher=None, teacher_seed=None, alpha=0.0):
        metrics = {"in_domain": inside, "ood/a": outside - 0.1, "ood/b": outside + 0.1}
        more = (less or {}).get(teacher, 0.0)
        metrics |= {f"calibrated/{name}": x + more * (name != "in_domain") for name, x in metrics.items()}
        metrics = {name: {"select": x, "report": x} for name, x in {**metrics, "accuracy/c": 0.5}.items()}
        return dict(model=model, seed=seed, teacher=teacher, teacher_seed=teacher_seed, alpha=alpha,
                    corpus="c", flops=9.0, teacher_flops=4.5 * bool(teacher), seconds=1.0, metrics=metrics)
    rows = []
    for seed in seeds:
        level = 0.05 * seed                                   # seeds differ, and pairing takes that out
        rows += [row(STUDENT, seed, 2.5 + level, 3.0 + level), row("s@16M", seed, 2.2 + level, 2.76 + level)]
        for name, (loss, by_alpha) in teachers.items():
            teacher_seed = 1000 + seed * own
            mine = row(name, teacher_seed, loss, loss + 0.5)
            rows += [mine] if mine not in rows else []
            for alpha, (inside, outside) in by_alpha.items():
                luck = (seed - 2) * (noise.get(name, 0.0) if isinstance(noise, dict) else noise)
                rows.append(row(STUDENT, seed, 2.5 + level - inside, 3.0 + level - outside - luck, name,
                                teacher_seed, alpha))
    return rows


def with_gains(**changes):
    """PAPER with other gains of some teachers: xs={0.25: (in domain, outside)}."""
    return PAPER | {f"{size}@32M": (PAPER[f"{size}@32M"][0], gains) for size, gains in changes.items()}


def verdicts(rows):
    s = evaluation.study(rows, STUDENT)
    return [rule(s)[0] for rule in evaluation.FINDINGS.values()]


def test_each_rule_on_rows_with_and_without_its_finding_and_in_between():
    paper = ["reproduced", "reproduced, reverses", "reproduced", "reproduced"]
    assert verdicts(made_up()) == verdicts(made_up(own=True)) == paper
    opposite = with_gains(xs={0.25: (0.1, -0.04)}, s={0.25: (0.03, -0.05)}, m={0.25: (0.2, 0.16)},
                          bigram={0.25: (0.0, 0.0)})
    assert verdicts(made_up(opposite)) == ["not reproduced"] * 4
    assert verdicts(made_up(noise=0.1)) == ["undecided", "reproduced, reverses", "undecided", "undecided"]
    assert verdicts(made_up(seeds=(1, 2))) == ["too few seeds"] * 4
    strong = {name: PAPER[name] for name in ("s@32M", "m@32M")}
    assert verdicts(made_up(strong)) == ["not tested"] * 4
    assert verdicts(made_up({name: PAPER[name] for name in PAPER if "bigram" not in name}))[3] == "not tested"


def test_rule_two_looks_at_steps_along_size():
    noise = {"xs@32M": 0.001, "m@32M": 0.002}                 # steps that are not the same at every seed
    for last, word in ((0.09, "reproduced, reverses"), (0.10, "reproduced, saturates"),
                       (0.11, "reproduced, diminishes"), (0.155, "undecided"), (0.2, "not reproduced")):
        cells = with_gains(m={0.25: (0.03, 0.06), 1.0: (0.05, last)})
        assert verdicts(made_up(cells, noise=noise))[1] == (word if last != 0.155 else "undecided")
    assert verdicts(made_up(noise={"m@32M": 0.1}))[1] == "undecided"
    for teacher in ("bigram@64M", "l@16M"):                   # not on the path: a table, another budget
        assert verdicts(made_up({**PAPER, teacher: (3.5, {0.25: (0.0, 0.9), 1.0: (0.0, 0.9)})}))[1] == (
            "reproduced, reverses")


def test_rules_three_and_four_look_at_calibrated_losses_too():
    def seen(rule, **more):
        return rule(evaluation.study(made_up(noise=0.0, **more), STUDENT))[1]
    # text brings 0.8 outside for each nat in domain: 0.04 + 0.8 * 0.01, 0.1 - 0.8 * 0.05, 0.001 + 0.8 * 0.05
    three = seen(evaluation.generalisation_first, less={"xs@32M": 0.06})
    assert "0.80 nats outside" in three and "weak ones +0.048 ± 0.000 (calibrated -0.012 ± 0.000)" in three
    assert "strong ones +0.055" in three and "tables +0.041" in three
    assert verdicts(made_up(less={"xs@32M": 0.06}))[2] == "reproduced"
    four = seen(evaluation.more_than_smoothing, less={"xs@32M": 0.01})
    assert "bring +0.030 ± 0.000 outside, the best table +0.001 ± 0.000; difference +0.029" in four
    for less, noise, verdict in (({"xs@32M": 0.05}, 0.001, "not reproduced"),      # it only smooths
                                 ({"bigram@32M": -0.06}, 0.001, "not reproduced"),  # a table gives more
                                 ({}, {"bigram@32M": 0.1}, "undecided")):
        found = verdicts(made_up(less=less, noise=noise))
        assert (found[0], found[3]) == ("reproduced", verdict)


def test_alpha_is_chosen_on_one_half_and_quoted_on_the_other():
    rows = made_up(noise=0)
    s = evaluation.study(rows, STUDENT)
    assert [f"{t.name} {t.alpha:g}" for t in s.teachers] == [
        "bigram@32M 0.25", "xs@32M 0.25", "s@32M 1", "m@32M 1"]
    assert all(np.allclose(t.as_text, [[0.24 * math.log2(1.5)], [0.24]]) for t in s.teachers)  # 1.5 x; twice
    for row in rows:
        if row["teacher"] and row["alpha"] == 1.0:            # looks best on select, as it is, only
            for name in ("ood/a", "ood/b"):
                row["metrics"][name]["select"] -= 0.5
    xs = evaluation.study(rows, STUDENT).teachers[1]
    assert xs.alpha == 1.0 and np.allclose([*xs.outside.values()], [[-0.1], [0.04]])
    assert verdicts(rows)[0] == "not reproduced"


def test_a_seed_with_a_row_missing_is_left_out_and_the_report_says_so(tmp_path):
    rows = made_up(seeds=(1, 2, 3, 4))
    expected = verdicts([row for row in rows if row["seed"] != 3])
    for i, row in enumerate(rows):
        if row["seed"] == 3:
            left = rows[:i] + rows[i + 1:]
            if row["teacher"] or row["model"] == STUDENT:
                assert evaluation.study(left, STUDENT).seeds == [1, 2, 4]
            assert verdicts(left) == expected
    text = evaluation.write_report(left, str(tmp_path))
    assert "seeds 1, 2, 4" in text and "nan" not in text
    assert text == (tmp_path / "report.md").read_text("utf-8")
    no_twice = [row for row in rows if row["model"] != "s@16M"]
    assert "No seed is complete yet" in evaluation.write_report(no_twice, str(tmp_path))
    half = [{**row, "model": "s@4M"} for row in rows if row["model"] == STUDENT and not row["teacher"]]
    assert evaluation.write_report(half + left, str(tmp_path)).split("\n", 1)[1] == text.split("\n", 1)[1]
    for row in rows:
        row["metrics"].pop("accuracy/c")
    assert "Points of accuracy" not in evaluation.write_report(rows, str(tmp_path))


def test_a_report_needs_no_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = evaluation.write_report(made_up(), str(tmp_path))
    assert "No figure (" in text and "pip install matplotlib" in text and "reproduced" in text


def test_results_are_read_with_care(tmp_path):
    rows, path = made_up(), tmp_path / "results.jsonl"
    lines = [json.dumps(row) for row in rows]
    whole = "\n".join(lines)
    for text in (whole, "\ufeff" + whole, f'{whole}\n{lines[3]}\n{{"model": "s@'):
        path.write_text(text, encoding="utf-8")               # no last newline, a byte-order mark, a kill
        assert evaluation.read_rows(path) == rows
    for change, word in ((dict(corpus="another"), "line 2 comes from a different corpus"),
                         (dict(seconds=math.nan), "line 2 is not a valid result"),
                         (dict(metrics={"in_domain": {}}), "line 2 is not a valid result")):
        path.write_text("\n".join([lines[0], json.dumps({**rows[1], **change}), lines[2]]))
        with pytest.raises(data.UserError, match=word):
            evaluation.read_rows(path)


def test_reports_are_of_the_rows_beside_them_and_readme_quotes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    known = (HERE / "results" / "README.md").read_text("utf-8")
    for path in (HERE / "results").glob("*/report.md"):
        report = evaluation.write_report(evaluation.read_rows(path.parent / "results.jsonl"), str(tmp_path))
        assert path.read_text("utf-8") == report, path
        known += report
    figures = regex.findall(r"\d\.\d{3} ± \d\.\d{3}", (HERE / "README.md").read_text("utf-8"))
    assert figures and all(figure in known for figure in figures), figures


def test_names_of_models_that_differ_differ():
    for tokens in (1, 999, 1000, 1024, 1000001, 1000002, 3 * 2**19, 1500000, 2**21, 50 * 10**9, 10**9 + 1):
        name = evaluation.model_name("xs", tokens)
        assert evaluation.parse_model(name) == ("xs", tokens)
    twice = dataclasses.replace(sweep.SCALES["smoke"], teachers="xs@2M xs@2000K")
    assert len({r.name for r in sweep.plan(twice)}) == len(sweep.plan(twice)) == 3 * 3 + 1
    assert evaluation.study(made_up(own=True), STUDENT).own_teachers
    assert not evaluation.study(made_up(), STUDENT).own_teachers


# ---- sweep.py: the runs ------------------------------------------------------

def results(folder):
    rows = [json.loads(line) for line in open(folder / "results.jsonl")]
    return sorted(json.dumps({**row, "seconds": 0}) for row in rows)


def test_a_smoke_sweep_killed_and_resumed_equals_one_never_stopped(corpus, tmp_path, monkeypatch, capsys):
    argv = [sys.executable, "sweep.py", "--scale", "smoke", "--data", corpus, "--seeds", "1",
            "--teachers", "xs@8K", "--device", "cpu", "--out"]
    whole = subprocess.run([*argv, tmp_path / "whole"], cwd=HERE, capture_output=True, text=True)
    assert whole.returncode == 0 and "A weak teacher helps" in whole.stdout, whole.stderr
    cells = [line for line in whole.stdout.splitlines() if " -> s@32K, seed 1: outside " in line]
    assert [line.split()[0] for line in cells] == ["xs@8K"]
    assert "100%" in whole.stderr and whole.stderr.count("%|") < 10            # no terminal: a line a minute
    rows, path = results(tmp_path / "whole"), tmp_path / "parts" / "results.jsonl"
    assert len(rows) == 1 + 2 + 2 == len(set(rows))
    process = subprocess.Popen([*argv, path.parent], cwd=HERE, stdout=subprocess.DEVNULL, stderr=-3)
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    process.kill()                                            # it has some results
    process.wait()
    with open(path, "a") as f:
        f.write('{"model": "s@')                              # half a line
    done = subprocess.run([*argv, path.parent], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and results(path.parent) == rows, done.stderr
    made = {p.name: p.read_bytes() for p in path.parent.glob("*.*")}
    assert ("findings_s@32K.png" in made) == bool(importlib.util.find_spec("matplotlib"))
    (tmp_path / "copy").mkdir()
    shutil.copy(path, tmp_path / "copy")                      # the rows alone give the same report
    code, out, err = call(sweep.main, ["--report", tmp_path / "copy"], monkeypatch, capsys)
    assert code == 0 and (tmp_path / "copy" / "report.md").read_bytes() == made["report.md"], err


def test_a_failing_and_a_killed_worker_end_the_sweep_with_a_line(corpus, tmp_path):
    scale = dataclasses.replace(sweep.SCALES["smoke"], seeds=(1,), vocab_size=300)
    diverging = dataclasses.replace(scale, training={"lr": 1e30, "compile": False})
    with pytest.raises(data.UserError, match=r"^xs@8K_seed_1000: .*lower --lr|^s@32K_seed_1: .*lower --lr"):
        sweep.sweep(diverging, corpus, str(tmp_path / "diverging"), 2, "cpu")
    def kill_one():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()
    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(data.UserError, match="a worker died.*rerun the same command to resume"):
        sweep.sweep(scale, corpus, str(tmp_path / "killed"), 2, "cpu")
    assert not multiprocessing.active_children()


def test_a_student_teachers_and_seeds_of_ones_own(monkeypatch, capsys):
    words = "--scale smoke --student xs@32K --teachers xs@8K,s@64K --alphas 0.5 --seeds 5 --dry_run".split()
    code, out, err = call(sweep.main, words, monkeypatch, capsys)
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [
        "xs@32K_seed_5", "xs@8K_seed_1000", "xs@32K_seed_5_from_xs@8K_seed_1000", "s@64K_seed_1000",
        "xs@32K_seed_5_from_s@64K_seed_1000", "xs@64K_seed_5"]
    assert out.splitlines()[2].split()[1:4] == ["1", "x", "xs@32K"]              # a student for each alpha


@pytest.mark.parametrize("scale", sweep.SCALES)
def test_dry_run_prints_every_run_and_does_nothing(scale, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(sweep.main, ["--scale", scale, "--dry_run"], monkeypatch, capsys)
    assert code == 0 and not list(tmp_path.iterdir())
    plan, done = sweep.plan(sweep.SCALES[scale]), {None}
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [run.name for run in plan]
    for run in plan:                                          # each follows what it needs
        assert {run.teacher, run.alone} <= done
        done.add(run)


# ---- exercises/ --------------------------------------------------------------

EXERCISE_LOSSES = {"4_reverse_kl": (1.795, 0.0), "5_top_p": (4.821, 0.348), "5_renormalised": (1.431, 0.0),
                   "5_one_more_outcome": (2.219, 0.0)}       # L(1), L(1, h @ w.T)


@pytest.mark.parametrize("name", sorted(path.stem for path in (HERE / "exercises").glob("*.patch")))
def test_a_solution_applies_and_passes_its_check(name, corpus, trained, tmp_path, monkeypatch, capsys):
    for script in ("data", "model", "distill", "eval", "sweep"):
        shutil.copy(HERE / f"{script}.py", tmp_path)
        monkeypatch.delitem(sys.modules, script)              # the copy's comes in its place, for this test
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))      # the copy is in no repository
    def scripts():
        return {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    before, patch = scripts(), HERE / "exercises" / f"{name}.patch"
    for reverse in ([], ["-R"], []):
        subprocess.run(["git", "apply", *reverse, patch], cwd=tmp_path, check=True)
        assert (scripts() == before) == bool(reverse)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    check = {"__name__": "check"}
    exec((HERE / "exercises" / "check.py").read_text("utf-8"), check)
    L, h, w, y, t, patched = (check[key] for key in ("L", "h", "w", "y", "t", "distill_loss"))
    assert patched.__code__.co_filename == str(tmp_path / "distill.py") and L(0) == 4.997
    assert (L(1), L(1, h @ w.T)) == EXERCISE_LOSSES[name] if name in EXERCISE_LOSSES else L(1) == 3.234
    def train(out, **more):
        small = dict(size="xs", tokens=1024, batch_size=4, block_size=32, fused=False, compile=False)
        return check["train"](check["Config"](data=corpus, out=out, **{**small, **more}))
    teacher = str(trained / "teacher" / "ckpt.pt")
    if name == "2_gradient":                                  # the answer is gone, and the plain loss works
        with pytest.raises(NotImplementedError, match="--fused false"):
            patched(h, w, y, 0.5, t)
    elif name == "6_schedule":
        alphas, plain = [], check["distill_loss_reference"]
        monkeypatch.setattr(sys.modules["distill"], "distill_loss_reference",
                            lambda *args: (alphas.append(args[3]), plain(*args))[1])
        train("taught", teacher=teacher, alpha=(0.5, 1.0))
        assert np.allclose(np.reshape(alphas, (8, 2)), np.outer(1 - np.arange(8) / 8, (0.5, 1)))
    elif name == "7_two_teachers":
        a, b = (3 * torch.randn(4, 6, 11) for _ in range(2))
        both = check["average"](lambda x: a, lambda x: b)(None).exp()
        assert torch.allclose(both, (a.softmax(-1) + b.softmax(-1)) / 2, atol=1e-6)
        os.mkdir("out")
        shutil.copy(teacher, "out/weak.pt")
        train("taught", teacher=teacher, alpha=(1.0,))
    elif name in ("8_starved", "9_same_text"):
        assert check["Batches"](f"{corpus}/train.bin", 4, 16, 1).n == (400 if name == "8_starved" else 11_718)
    elif name == "13_trigram":
        path, = train("trigram", size="trigram", tokens=9000)
        table, ids = check["load_checkpoint"](path)[0], data.load_tokens(f"{corpus}/train.bin")[:9000]
        logits = table(torch.tensor(ids[:500].astype("int64"))[None])[0]
        assert torch.allclose(logits.exp().sum(-1), torch.ones(500), atol=1e-5)
        last = train("bigram", size="bigram", tokens=9000)[0]
        bigram = check["load_checkpoint"](last)[0](torch.tensor(ids[:500].astype("int64"))[None])[0]
        after = Counter(k for i, j, k in zip(ids, ids[1:], ids[2:]) if (i, j) == tuple(ids[10:12]))
        k, n = after.most_common(1)[0][0], sum(after.values())
        expected = (after[k] + len(after) * bigram[11, k].exp()) / (n + len(after))
        assert abs(logits[11, k].exp() - expected) < 1e-5
    elif name in ("10_own_text", "11_mixing"):
        script = importlib.import_module(name.partition("_")[2])
        shutil.copytree(corpus, "data/python")
        Path("input.txt").write_text(poem(20))
        alone, taught = (str(trained / "1" / f"alpha_{alpha}" / "ckpt.pt") for alpha in (0, 0.25))
        arguments = ["input.txt", alone, taught, taught] if name == "10_own_text" else [alone, alone]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        script.main()
        monkeypatch.delitem(sys.modules, script.__name__)
        expected = "0.000 beyond" if name == "10_own_text" else "share 0.00: gain +0.000"
        assert expected in capsys.readouterr().out


def test_commands_of_the_exercises_are_ones_that_run(monkeypatch):
    text = (HERE / "exercises" / "README.md").read_text("utf-8")
    assert {path.stem for path in (HERE / "exercises").glob("*.patch")} == set(
        regex.findall(r"(\d+_\w+)\.patch", text))
    monkeypatch.setattr(sys, "argv", ["start.py", "41"])
    source = (HERE / "exercises" / "start.py").read_text("utf-8").partition("missing = 0")[0]
    names = {}
    exec(source, names)
    made = {f"out/{name}.pt" for name in names["names"]}
    for line in regex.findall(r"^python (.*)", text, regex.M):
        script, *words = shlex.split(line)
        if script == "distill.py":
            c = distill.parse_config(words)
            distill.check(dataclasses.replace(c, size="xs" if c.size == "trigram" else c.size))
            assert not c.teacher or c.teacher in made
            folders = [f"alpha_{alpha:g}/" for alpha in c.alpha] if len(c.alpha) > 1 else [""]
            made |= {f"{c.out}/{folder}ckpt.pt" for folder in folders}
        elif script in ("eval.py", "own_text.py", "mixing.py"):
            assert {word for word in words if word.endswith(".pt")} <= made, line


# ---- bad input: one line, exit code 2, nothing written -----------------------

@pytest.fixture(scope="session")
def made(corpus, trained, tmp_path_factory):
    """A folder with two corpora of different tokenizers, a checkpoint of each, results, and bad files."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(corpus, folder / "data")
    shutil.copytree(trained / "teacher", folder / "run")
    (folder / "other.txt").write_text(poem(200))
    (folder / "brief.txt").write_text("a set that is too short for two windows. " * 3)
    for name, vocab_size, ood in (("other", 258, {}), ("brief", 300, {"brief": str(folder / "brief.txt")})):
        data.prepare("text", str(folder / name), vocab_size, [str(folder / "other.txt")], ood)
    distill.train(config(str(folder / "other"), folder / "foreign", tokens=1024))
    (folder / "results").mkdir()
    (folder / "results" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_up()))
    (folder / "bytes.txt").write_bytes(b"\xff\xfe" * 1000)
    (folder / "short.txt").write_text("short")
    whole = torch.load(folder / "run" / "ckpt.pt")
    compiled = {**whole, "model": {f"_orig_mod.{name}": weight for name, weight in whole["model"].items()}}
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({"model": {}, "model_args": {}, "config": {"device": "cpu"}}, folder / "nanogpt.pt")
    torch.save(compiled, folder / "compiled.pt")
    good = json.dumps({"context": "a", "choices": ["b", "c"], "label": 0})
    for name, old, new in (("no_label", "label", "answer"), ("large", "0", "2"), ("fraction", "0", "1.9"),
                           ("text", '["b", "c"]', '"bc"'), ("empty", '"c"', '""'), ("ansi", '"a"', '"\xe9"')):
        (folder / f"{name}.jsonl").write_bytes(good.replace(old, new).encode("cp1252"))
    (folder / "none.jsonl").write_text("\n\n")
    return folder


TEXT = "--corpus text --train other.txt --out new"
BAD = [
    (data.main, "--corpus text --out new", "--train FILES goes with"),
    (data.main, "--corpus text --train absent.txt --out new", "absent.txt is not a file"),
    (data.main, "--corpus text --train /dev/stdin --out new", "/dev/stdin is not a file"),
    (data.main, "--corpus text --train bytes.txt --out new", "not UTF-8"),
    (data.main, "--corpus text --train short.txt --out new", "the set val is empty: it needs text"),
    (data.main, f"{TEXT} --ood same=other.txt", "the set ood_same is empty"),
    (data.main, f"{TEXT} --ood poem.txt", "'poem.txt' is not NAME=FILE"),
    (data.main, f"{TEXT} --ood a=other.txt --ood a=short.txt", "take each NAME once"),
    (data.main, "--corpus text --train other.txt --out data", "a different corpus"),
    (data.main, "--vocab_size many --out new", "'many' is not a whole number"),
    *[(data.main, f"{TEXT} --task a={name}.jsonl", "line 1 is not an item in UTF-8")
      for name in ("no_label", "large", "fraction", "text", "empty", "ansi")],
    (data.main, f"{TEXT} --task a=none.jsonl", "needs at least two items"),
    (distill.main, "--size xxl", "--size must be one of"),
    (distill.main, "--alpha 2 --teacher run/ckpt.pt", "--alpha must be from 0 to 1"),
    (distill.main, "--alpha 0.3333331,0.3333332 --teacher run/ckpt.pt", "lists a value twice"),
    (distill.main, "--alpha 0.5", "needs a --teacher"),
    (distill.main, "--teacher run/ckpt.pt", "has no effect at alpha 0"),
    *[(distill.main, f"--{knob}", "must be ") for knob in (
        "grad_clip -1", "warmup 100", "beta1 nan", "temperature 0", "seed -1", "batch_size 0", "dtype int8")],
    (distill.main, "--tokens 10", "less than a step"),
    (distill.main, "--batch_size 99999 --tokens 1B", "fewer than one batch"),
    (distill.main, "--device cuda:77", "is not available"),
    (distill.main, "--learning_rate 1", "unrecognized arguments"),
    (distill.main, "--compile maybe", "invalid true_or_false value: 'maybe'"),
    *[(distill.main, f"--teacher {name}.pt --alpha 1", word) for name, word in (
        ("absent", "no checkpoint at absent.pt"), ("tensor", "is damaged or not a file of distill.py"),
        ("nanogpt", "not a distill.py checkpoint"), ("compiled", "not a distill.py checkpoint"),
        ("foreign/ckpt", "a different tokenizer"), ("run/ckpt", "exceeds the teacher's"))],
    (distill.main, "--size bigram --teacher run/ckpt.pt --alpha 1", "takes no --t"),
    (distill.main, "--teacher run --alpha 1", "--teacher run"),               # a folder, of no model
    (distill.main, "--out run --size xs", "other settings"),
    (evaluation.main, "absent.pt --data data", "no checkpoint at absent.pt"),
    (evaluation.main, "foreign/ckpt.pt --data data", "a different tokenizer"),
    (evaluation.main, "run/ckpt.pt --data absent", "absent is not a corpus folder"),
    (model.main, "--to_hf run/ckpt.pt new --data other", "a different tokenizer"),
    (sweep.main, "--student s1.5M --data data --out new", "is not a model, such as s@1.5M"),
    (sweep.main, "--teachers xs@1M,s --data data --out new", "'s' is not a model"),
    (sweep.main, "--seeds 1,x --data data --out new", "'x' is not a whole number"),
    (sweep.main, "--seeds 1000 --data data --out new", "--seeds must be below 1000"),
    (sweep.main, "--alphas 0,1 --data data --out new", "--alphas must be above 0"),
    (sweep.main, "--data other --out new", "no out-of-distribution set"),
    (sweep.main, "--data brief --out new", "evaluation needs two windows of 128"),
    (sweep.main, "--scale fineweb --out new", "is not a corpus folder: make it with data.py"),
    (sweep.main, "--data data --out results --scale smoke", "a different corpus"),
    (sweep.main, "--report absent", "no results.jsonl"),
]


@pytest.mark.parametrize("main, argv, word", BAD, ids=[f"{main.__module__} {argv}" for main, argv, _ in BAD])
def test_bad_input(main, argv, word, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    more = "--data data --out new " if main is distill.main else ""
    code, out, err = call(main, (more + argv).split(), monkeypatch, capsys)
    assert code == 2 and len(err) == 1 and word in err[0] and "error: " in err[0], (code, err)
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_torchrun_and_notebooks(monkeypatch, capsys):
    for stream in ("stdout", "stderr"):                       # a notebook's streams cannot be reconfigured
        monkeypatch.setattr(sys, stream, io.StringIO())
    data.run_main(lambda: print("ran"))
    assert sys.stdout.getvalue() == "ran\n"
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "0")
    code, out, err = call(sweep.main, [], monkeypatch, capsys)
    assert code == 2 and "cannot run under torchrun" in err[0]


def test_mutated_files_end_in_a_line_or_load_right(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "copy"))
    plain, draw, known = evaluation.evaluate, random.Random(1), data.load_meta("data")["fingerprint"]
    monkeypatch.setattr(evaluation, "evaluate", lambda m, folder, windows: plain(m, folder, windows, 4))
    monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    for path in ("data/val.bin", "data/meta.json", "data/vocab.tiktoken", "results/results.jsonl"):
        whole, refused = Path(path).read_bytes(), 0
        main, argv = evaluation.main, ["run/ckpt.pt", "--data", "data", "--windows", "2"]
        if path.endswith("jsonl"):
            main, argv = sweep.main, ["--report", "results"]
        for n in range(20):
            at, mutated = draw.randrange(len(whole)), bytearray(whole)
            mutated[at:at + 1] = (bytes([draw.randrange(256)]), b"", b"9", whole[at:at + 1] * 2)[n % 4]
            Path(path).write_bytes(mutated if n < 17 else whole[:at])
            code, out, err = call(main, argv, monkeypatch, capsys)
            assert code == 0 or code == 2 and len(err) == 1 and err[0].startswith("error: "), (path, err)
            refused += code == 2
            assert code == 2 or data.load_meta("data")["fingerprint"] == known
        Path(path).write_bytes(whole)
        assert refused > 5, path


def test_a_small_set_of_other_bytes_is_damaged(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    with open(tmp_path / "data" / "val.bin", "r+b") as f:     # of the right size, as a disk may leave it
        f.seek(1000)
        f.write(bytes(1000))
    with pytest.raises(data.UserError, match="val.bin is missing or damaged"):
        evaluation.read_windows(str(tmp_path / "data" / "val.bin"), 32, 8)


def test_what_an_unfinished_corpus_leaves_does_not_count(corpus, made, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")                # with a set and a task that the next has not
    (tmp_path / "data" / "meta.json").unlink()
    text = 300, [str(made / "other.txt")]
    meta = data.prepare("text", str(tmp_path / "data"), *text)
    assert {p.name for p in (tmp_path / "data").iterdir()} == {
        "train.bin", "val.bin", "vocab.tiktoken", "meta.json"}
    task = tmp_path / "two.jsonl"
    task.write_text('{"context": "a", "choices": ["b", "c"], "label": 0}\n' * 2)
    other = data.prepare("text", str(tmp_path / "more"), *text, tasks={"a": str(task)})
    assert other["sets"] == meta["sets"] and other["fingerprint"] != meta["fingerprint"]


def test_names_of_files_and_terminals_that_lack_a_letter(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes[1].txt").write_text(poem(40))
    (tmp_path / "notes1.txt").write_text("what the pattern notes[1].txt means")
    argv = ["--corpus", "text", "--out", tmp_path / "data", "--train"]
    for name in ("notes[1].txt", "./notes[1].txt", f"{tmp_path}/notes[[]1].*"):        # one file, one corpus
        code, out, err = call(data.main, [*argv, name], monkeypatch, capsys)
        assert code == 0, err
    code, out, err = call(data.main, [*argv, name, "--train", "notes1.txt"], monkeypatch, capsys)
    assert code == 2 and "a different corpus" in err[0]       # a flag may be repeated
    command = [sys.executable, HERE / "sweep.py", "--report", made / "results"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp866"})
    assert done.returncode == 0 and b"reproduced" in done.stdout, done.stderr


def test_eval_without_sets_outside(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    argv = ["foreign/ckpt.pt", "foreign/ckpt.pt", "--data", "other", "--windows", 16]
    models = [model.load_checkpoint("foreign/ckpt.pt")[0]] * 4
    assert list(evaluation.token_gains(*models, "other", 16)) == ["in_domain"]
    code, out, err = call(evaluation.main, argv, monkeypatch, capsys)
    assert code == 0 and "in_domain" in out and "ood" not in out, err


def test_help_and_a_full_disk(corpus, tmp_path, monkeypatch, capsys):
    for main in (data.main, distill.main, evaluation.main, sweep.main, model.main):
        code, out, _ = call(main, ["--help"], monkeypatch, capsys)
        assert code == 0 and "python " in out and ("(default:" in out or "seed: int = 1 " in out)
    code = ("import resource, data, distill; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
            "data.run_main(distill.main)")
    argv = ["--data", corpus, "--out", tmp_path, *ARGS]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert not (tmp_path / "ckpt.pt").exists()

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
import io
import json
import math
import multiprocessing
import os
import random
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent import futures
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


def poem(verses):
    draw = random.Random(0)
    words = ["rose", "moon", "sea", "and", "of"]
    return "\n\n".join(" ".join(draw.choice(words) for _ in range(300)) for _ in range(verses))


def programs(n):
    """Made-up files of Python, (name, text). The tests make all their text: it is the same on any Python."""
    draw, words = random.Random(1), ["rose", "moon", "sea", "star", "leaf", "rain", "wind", "stone"]
    def expression(depth):
        a, b = (draw.choice(words) if depth == 0 else expression(depth - 1) for _ in range(2))
        return draw.choice([f"{a} + {b}", f"{draw.choice(words)}({a}, {b})", f"{draw.choice(words)}[{a}]"])
    def function():
        lines = [f"    {draw.choice(words)} = {expression(draw.randrange(4))}" for _ in range(5)]
        return "\n".join([f"def {draw.choice(words)}({', '.join(draw.sample(words, 3))}):", *lines, ""])
    return [(f"{i}.py", "\n\n".join(function() for _ in range(8))) for i in range(n)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus with the task: made-up programs, in domain and in three sets outside, and a poem."""
    folder, files = tmp_path_factory.mktemp("corpus"), programs(150)
    (folder / "poem.txt").write_text(poem(40))
    outside = {"sympy": files[:15], "numpy": files[15:30], "networkx": files[30:45]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "python_documents", lambda: (files[45:], outside))
        data.prepare("python", str(folder / "data"), 300, ood={"poem": str(folder / "poem.txt")})
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

def tiny(n_kv_head=2, vocab_size=61):
    torch.manual_seed(0)
    m = model.GPT(model.GPTConfig(vocab_size, block_size=24, n_layer=2, n_head=4, n_kv_head=n_kv_head,
                                  n_embd=32)).eval()
    with torch.no_grad():                                     # large enough weights for every part to matter
        for p in m.parameters():
            p.mul_(5) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return m


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_exported_folder_is_transformers_llama(n_kv_head, corpus, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    m, meta = tiny(n_kv_head, 300), data.load_meta(corpus)
    model.save_checkpoint(tmp_path / "m.pt", m, settings={"tokenizer": meta["tokenizer"]})
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    encoding = data.load_tokenizer(corpus)
    for text in ((HERE / "model.py").read_text(), "naïve 漢\r\n\t  x ", ""):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    assert tokenizer.encode(data.END_OF_TEXT) == [encoding.eot_token] == [tokenizer.eos_token_id]


def test_forward_is_causal_and_generate_follows_it(monkeypatch):
    m, idx = tiny(), torch.randint(61, (2, 24))
    logits, changed = m(idx), idx.clone()
    monkeypatch.setattr(model.Attention, "repeat_kv", True)   # for GPUs without a kernel for grouped queries
    assert torch.allclose(m(idx), logits, atol=1e-5)
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    assert torch.allclose(m(changed)[:, :10], logits[:, :10], atol=1e-5)
    assert not torch.allclose(m(changed)[:, 10:], logits[:, 10:], atol=1e-3)
    greedy = m.generate(idx, 30, temperature=0)               # beyond the context, which slides
    assert greedy.shape == (2, 54) and torch.equal(greedy[:, 24], logits[:, -1].argmax(-1))
    top = logits[:, -1].topk(3).indices
    assert all((m.generate(idx, 1, 5.0, top_k=3)[:, -1:] == top).any(-1).all() for _ in range(20))


def test_tables_equal_a_count_by_hand(corpus, tmp_path):
    tokens = data.load_tokens(f"{corpus}/train.bin")[:9000].tolist()
    count, pairs = Counter(tokens), Counter(zip(tokens, tokens[1:]))
    unigram = [(count[i] + 0.5) / (9000 + 150) for i in range(300)]
    for size in ("unigram", "bigram"):
        path, = distill.train(config(corpus, tmp_path / size, size=size, tokens=9000))
        table, _ = model.load_checkpoint(path)
        probs = table(torch.arange(300)[None])[0].exp().double()             # (last token, next token)
        assert torch.allclose(probs.sum(-1), torch.ones(300).double(), atol=1e-5) and (probs > 0).all()
        for last in range(300):
            n = sum(pairs[last, j] for j in range(300))
            share = n / (n + sum((last, j) in pairs for j in range(300))) if n else 0
            for i in range(0, 300, 7):
                bigram = share * pairs[last, i] / n + (1 - share) * unigram[i] if n else unigram[i]
                assert abs(probs[last, i] - (bigram if size == "bigram" else unigram[i])) < 1e-6
    distill.train(config(corpus, tmp_path / "taught", teacher=path, alpha=(1.0,)))
    losses = [line["kl"][0] for line in log_of(tmp_path / "taught")]
    assert losses[-1] < losses[0] - 0.3                        # it learns what the table says


@pytest.mark.parametrize("size", [size for size in model.SIZES if "gram" not in size])
def test_parameters_are_as_named_and_flops_as_torch_counts(size):
    from torch.utils.flop_counter import FlopCounterMode
    millions = {"xs": 0.04, "s": 0.13, "m": 0.34, "l": 0.77}.get(size) or float(size[:-1])
    vocab_size = 50_304 if millions in (30, 124, 350) else 512
    c = model.GPTConfig(vocab_size, 64, **model.SIZES[size])
    with torch.device("meta"):                               # shapes without memory
        m, idx = model.GPT(c), torch.zeros(2, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            m(idx)
    assert counter.get_total_flops() == 2 * 64 * model.flops_per_token(c)
    assert abs(sum(p.numel() for p in m.parameters()) / (millions * 1e6) - 1) < 0.06


# ---- data.py -----------------------------------------------------------------

def naive_bpe(text, vocab_size, pattern):
    """Byte-pair encoding by the book: count every pair anew for each merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(pattern, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs:
            break
        best = max(pairs, key=lambda p: (pairs[p], p))
        ranks[best[0] + best[1]] = len(ranks)
        for word in words:
            for i in range(len(word)):                        # left to right; a merge makes the word shorter
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
    return ranks


def test_bpe_merges_equal_counting_anew_and_encode_as_tiktoken_says(monkeypatch):
    from tiktoken._educational import SimpleBytePairEncoding
    code, draw = (HERE / "data.py").read_text(), random.Random(0)
    texts = ["", "a", "abab" * 100, code[:9000]]
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
    monkeypatch.setattr(data, "BPE_WORDS", 500)               # the text as far as it has so many bytes
    words = regex.findall(data.PATTERN, code)
    most = next(n for n in range(len(words)) if sum(len(word) for word in set(words[:n])) > 500) - 1
    assert data.train_bpe(code, 300) == naive_bpe("".join(words[:most]), 300, data.PATTERN)


def documents_of(folder, name):
    """The documents of a .bin, decoded."""
    encoding, ids = data.load_tokenizer(folder), data.load_tokens(f"{folder}/{name}.bin")
    assert ids[-1] == encoding.eot_token
    return encoding.decode(ids.tolist()).split(data.END_OF_TEXT)[:-1]


@pytest.mark.parametrize("ends", ["\n\n", " "])
def test_prepare_keeps_every_document_and_its_counts(tmp_path, ends):
    text = ends.join(f"paragraph {i} " + "x é 漢 " * (i % 50) for i in range(2000))   # also all in one line
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("other text " * 1000)
    out, files = str(tmp_path / "out"), ([str(tmp_path / "a.txt")], {"b": str(tmp_path / "b.txt")})
    meta = data.prepare("text", out, 280, *files)
    train, val = documents_of(out, "train"), documents_of(out, "val")
    pieces = [piece for _, piece in data.pieces(tmp_path / "a.txt")]
    assert sorted(train + val) == sorted(pieces) and "".join(pieces) == text
    assert max(map(len, pieces)) <= 2002 and sum(len(piece) < 1000 for piece in pieces) <= 1
    for name, s in meta["sets"].items():
        docs = documents_of(out, name)
        assert s["documents"] == len(docs) and s["tokens"] == len(data.load_tokens(f"{out}/{name}.bin"))
    assert data.prepare("text", out, 280, *files) == meta
    before = {p.name: p.read_bytes() for p in Path(out).iterdir()}
    (tmp_path / "b.txt").write_text("other text " * 1001)     # the same call, of a changed file
    with pytest.raises(data.UserError, match="a different corpus"):
        data.prepare("text", out, 280, *files)
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
    large = data.Batches(path, 2 * n + 5, 16, seed=5)[0][0]   # a batch of more windows than there are
    assert torch.equal(large[:3], b[0][0]) and Counter(map(tuple, large.tolist())).most_common(1)[0][1] >= 2


def test_shards_from_a_server_become_a_corpus(tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gpt2 = data.make_encoding(data.train_bpe(poem(3), 300), data.PATTERN)
    monkeypatch.setattr(data, "FINEWEB", f"http://127.0.0.1:{server.server_port}/{{}}")
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: gpt2)
    in_domain, ood = data.python_documents()
    assert {name.split("/")[0] for name, _ in in_domain} == {"stdlib", "torch"}
    assert not any("_sysconfigdata" in name or "site-packages" in name for name, _ in in_domain)
    assert all(ood.values())
    few = in_domain[:99], {name: documents[:9] for name, documents in ood.items()}
    monkeypatch.setattr(data, "python_documents", lambda: few)
    rng, shards, out = np.random.default_rng(0), {}, str(tmp_path / "fine")
    for name in ("train_000001", "train_000002", "val_000000"):
        ids = rng.integers(0, gpt2.n_vocab, 3000).astype("<u2").tobytes()
        shards[name] = np.array([20240520, 1, 3000] + [0] * 253, "<i4").tobytes() + ids
        (tmp_path / name).write_bytes(shards[name])
    (tmp_path / "train_000002").write_bytes(shards["train_000002"][:-1])
    with pytest.raises(data.UserError, match="http.*train_000002.*truncated"):
        data.prepare("fineweb-edu", out, tokens=150_000_000)
    (tmp_path / "train_000002").write_bytes(shards["train_000002"])
    meta = data.prepare("fineweb-edu", out, tokens=150_000_000)
    assert meta["sets"]["train"]["tokens"] == 6000 and meta["vocab_size"] == 50_304
    ids = b"".join(shards[name][1024:] for name in ("train_000001", "train_000002"))
    assert data.load_tokens(f"{out}/train.bin").tobytes() == ids
    server.shutdown()


# ---- distill.py: the loss ----------------------------------------------------

@pytest.mark.parametrize("chunk", [0, 1, 4, 256])             # 0: the plain loss; 4: a short last chunk
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_torchs_own(alpha, temperature, top_k, chunk, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 8), (11, 8)))
    t = (torch.randperm(110).view(2, 5, 11) / 16).requires_grad_()           # bfloat16 keeps these, no ties
    targets, sizes, loss_fn = torch.randint(11, (2, 5)), [], distill.distill_loss_reference
    def chunk_fn(z, *rest):
        sizes.append(len(z))
        return distill.chunk_loss(z, *rest)
    if chunk:
        monkeypatch.setattr(distill, "CHUNK_TOKENS", chunk)
        loss_fn = functools.partial(distill.distill_loss, chunk_fn=chunk_fn)
    loss, ce, kl = loss_fn(hidden, weight, targets, alpha, t, temperature, top_k)
    assert not ce.requires_grad and not kl.requires_grad and max(sizes, default=0) <= chunk
    z, q = (hidden @ weight.T).flatten(0, 1), t.detach().flatten(0, 1)
    if 0 < top_k < 11:                                        # only the k likeliest, by another way
        q = torch.full_like(q, -1e6).scatter(1, q.argsort(1, descending=True)[:, :top_k], 0.0) + q
    ce2 = F.cross_entropy(z, targets.flatten())
    kl2 = F.kl_div((z / temperature).log_softmax(-1), (q / temperature).softmax(-1), reduction="batchmean")
    loss2 = (1 - alpha) * ce2 + alpha * temperature**2 * kl2
    theirs = loss2, ce2, kl2, *torch.autograd.grad(3 * loss2, (hidden, weight))
    mine = loss, ce, kl, *torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(mine, theirs))
    loss.backward()
    assert t.grad is None                                     # the teacher is frozen
    with torch.no_grad():                                     # and by finite differences
        moved = torch.zeros_like(weight)
        moved[3, 3] = 1e-2
        up, down = (loss_fn(hidden, w, targets, alpha, t, temperature, top_k)[0]
                    for w in (weight + moved, weight - moved))
        assert abs((up - down).item() / 2e-2 - weight.grad[3, 3].item()) < 1e-3
    with torch.autocast("cpu", torch.bfloat16):               # and about so in low precision
        loss, ce, _ = loss_fn(hidden, weight, targets, alpha, t.bfloat16() if alpha else None, temperature,
                              top_k)
    low = loss, ce, *torch.autograd.grad(3 * loss, (hidden, weight))
    for one, other in zip(low, (loss2, ce2, *theirs[3:])):
        assert one.dtype == torch.float32 and (one - other).abs().max() < 0.05 * max(1, other.abs().max())


# ---- distill.py: training ----------------------------------------------------

def test_learning_rate_and_decay():
    c = distill.Config(lr=1.0, min_lr=0.1, warmup=0.1, tokens=200 * 1024)
    rates = [distill.learning_rate(c, s) for s in range(200)]
    assert rates[0] == 1 / 20 and max(rates) == rates[19] == 1.0 and 0.1 < rates[-1] < 0.101
    assert all(a > b for a, b in zip(rates[20:], rates[21:])) and abs(rates[110] - 0.55) < 1e-9
    assert math.isclose(distill.learning_rate(distill.Config(size="m", warmup=0), 0), 4e-3)
    student = distill.Student(model.GPTConfig(), 0.0, c, torch.device("cpu"), torch.float32, lambda f: f)
    for group, decay, dims in zip(student.optimizer.param_groups, (0.1, 0.0), (2, 1)):
        assert group["weight_decay"] == decay and {p.dim() for p in group["params"]} == {dims}


def log_of(folder):
    return [json.loads(line) for line in open(Path(folder, "log.jsonl"))]


# two ways to the same gradients are compared after one large step, before rounding grows: Adam's first step
# is about the sign of the gradient, and where that is nearly 0 rounding decides
FEW_STEPS = dict(tokens=1024, log_every=1, lr=0.01, warmup=0.0)
ARGS = ("--size xs --tokens 8192 --batch_size 4 --block_size 32 --lr 3e-3 --warmup 0.05 --compile false "
        "--log_every 4 --device cpu").split()


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
    assert log[-1]["ce"][0] < log[0]["ce"][0] - 0.5
    assert log[-1]["kl"][2] < log[-1]["kl"][1]                # pure distillation comes nearest to the teacher


def test_a_finished_run_is_not_repeated_and_another_not_overwritten(corpus, trained, tmp_path):
    moved = str(shutil.copy(trained / "teacher" / "ckpt.pt", tmp_path / "moved"))
    taught = config(corpus, trained / "1", teacher=moved, alpha=(0.0, 0.25, 1.0))  # the same by another name
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*.pt")}
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


def test_other_ways_to_the_same_gradients(corpus, trained, tmp_path, monkeypatch, capsys):
    """Batches that add up, the plain loss, torch.compile, two ranks."""
    teacher = str(trained / "teacher" / "ckpt.pt")
    def run(name, **more):
        more = dict(teacher=teacher, alpha=(0.3,), temperature=2.0, **FEW_STEPS) | more
        return distill.train(config(corpus, tmp_path / name, **more))[0]
    plain, reference = run("plain"), run("reference", fused=False)
    works = distill.compiler(torch.device("cpu"))(run) is not run
    fast = run("fast", compile=True)
    run("parts", batch_size=2, accumulate=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = dict(FEW_STEPS, data=corpus, out=tmp_path / "ranks", teacher=teacher, alpha=0.3, temperature=2,
                 batch_size=2, accumulate=2)
    argv = [*ARGS, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run([*torchrun, "distill.py", *argv], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("next: python eval.py") == 1, done.stderr
    for name in ("reference", "fast", "parts", "ranks"):
        assert_same_losses(tmp_path / "plain", tmp_path / name)
    assert not same(weights(plain), weights(reference))       # another way of reckoning, really taken
    assert same(weights(plain), weights(fast)) != works
    def broken(*_, **__):                                     # as inductor puts it
        raise RuntimeError("C++ compile error\n\nCommand:\ng++ -O3\n\nOutput:\nld: cannot find -ltorch\nld: 2")
    monkeypatch.setattr(torch, "compile", broken)
    distill.compiler.cache_clear()
    assert same(weights(run("none", compile=True)), weights(plain))
    distill.compiler.cache_clear()
    assert "(RuntimeError: ld: cannot find -ltorch); using eager mode" in capsys.readouterr().err


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


def test_teachers_of_transformers(corpus, trained, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    def teach(name, data_dir, teacher):
        distill.train(config(data_dir, tmp_path / name, teacher=teacher, alpha=(0.5, 1.0), **FEW_STEPS))
    ours, exported = str(trained / "teacher" / "ckpt.pt"), str(tmp_path / "exported")
    model.to_hf(ours, exported, corpus)                       # our export teaches as its checkpoint does
    teach("ours", corpus, ours), teach("theirs", corpus, exported)
    assert_same_losses(tmp_path / "ours", tmp_path / "theirs")
    half = transformers.AutoModelForCausalLM.from_pretrained(exported).bfloat16()
    half.save_pretrained(shutil.copytree(exported, tmp_path / "half"))       # saved in half precision
    half = config(corpus, "", teacher=str(tmp_path / "half"))
    teacher, _ = distill.load_teacher(half, data.load_meta(corpus), "cpu")
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    half.alpha = (1.0,)
    (tmp_path / "half" / "model.safetensors").write_text("version https://git-lfs\noid sha256:0\n")
    with pytest.raises(data.UserError, match="transformers cannot load --teacher .*half: .*eader"):
        distill.train(half)
    # any corpus in GPT-2's tokens (here few of them), and a GPT-2, whose vocabulary is a little smaller
    few = data.make_encoding(data.train_bpe(poem(3), 300), data.PATTERN)
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: few)
    (tmp_path / "poem.txt").write_text(poem(200))
    folder = str(tmp_path / "data")
    meta = data.prepare("text", folder, "gpt2", [str(tmp_path / "poem.txt")])
    assert meta["vocab_size"] == 50_304
    path, = distill.train(config(folder, tmp_path / "plain", tokens=1024))
    gpt2 = str(tmp_path / "gpt2")
    model.to_hf(path, gpt2, folder)                           # for its tokenizer
    shape = transformers.GPT2Config(vocab_size=50_257, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(shape).save_pretrained(gpt2)
    teacher, known = distill.load_teacher(config(folder, "", teacher=gpt2), meta, "cpu")
    logits = teacher(torch.zeros(1, 8, dtype=torch.int64))
    assert logits.shape == (1, 8, 50_304) and (logits[..., 50_257:] == -1e9).all() and known["name"] == gpt2
    teach("taught", folder, gpt2)                             # which would stop at a NaN
    with pytest.raises(data.UserError, match="does not give the tokens of"):
        teach("wrong", corpus, gpt2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(data.UserError, match="pip install transformers"):
        teach("none", corpus, exported)


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
    argv = [*ARGS, "--data", corpus, "--out", parts.out, "--teacher", teacher, "--alpha", "0,0.25,1",
            "--save_every", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "distill.py", *argv], cwd=HERE, env=env, stderr=-3)
    while process.poll() is None and state.exists() and state.stat().st_mtime_ns == saved:
        time.sleep(0.001)                                     # until it has saved one more state
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)
    with open(f"{parts.out}/log.jsonl", "a") as f:
        f.write('{"step": 2')                                 # killed in the middle of a line
    for path in distill.train(parts):
        assert same(weights(path), weights(whole / Path(path).relative_to(parts.out)))
    logs = [[(line["step"], line["lr"], line["ce"], line["kl"]) for line in log_of(folder)]
            for folder in (parts.out, whole)]
    assert logs[0] == logs[1] and not state.exists()          # each step once


def test_a_loss_of_nan_stops_the_run_before_anything_is_saved(corpus, trained, tmp_path, monkeypatch):
    plain, calls = distill.distill_loss, []
    def breaks(*args, **more):
        calls.append(1)
        loss, ce, kl = plain(*args, **more)
        return (loss * math.nan, ce, kl) if len(calls) == 21 else (loss, ce, kl)
    monkeypatch.setattr(distill, "distill_loss", breaks)
    saving = config(corpus, tmp_path, save_every=0.0, log_every=1000)
    with pytest.raises(data.UserError, match=r"NaN or inf between steps 1 and 20 \(learning rate 0.0"):
        distill.train(saving)
    assert not (tmp_path / "ckpt.pt").exists()
    calls.clear()                                             # seen at the last step, if nobody looks before
    with pytest.raises(data.UserError, match=r"NaN or inf between steps 1 and 63 "):
        distill.train(config(corpus, tmp_path / "late", log_every=1000))
    monkeypatch.setattr(distill, "distill_loss", plain)       # and the state that was saved before is good
    assert same(weights(*distill.train(saving)), weights(trained / "1" / "alpha_0" / "ckpt.pt"))
    def overflows(z, *rest):                                  # float16 stops once its scale is used up
        return torch.zeros(()), torch.zeros(()), torch.full_like(z, math.inf)
    monkeypatch.setattr(distill, "chunk_loss", overflows)
    with pytest.raises(data.UserError, match="NaN or inf between steps"):
        distill.train(config(corpus, tmp_path / "float16", dtype="float16"))


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
        assert abs(losses[0][name] - losses[1][name]) < 0.02


# ---- eval.py -----------------------------------------------------------------

def test_evaluate_is_the_mean_loss_as_it_is_and_at_the_best_temperature(corpus, trained):
    m, _ = model.load_checkpoint(str(trained / "teacher" / "ckpt.pt"))
    with torch.no_grad():
        m.norm.weight *= 1.15                                 # and so the logits
    sets = evaluation.evaluation_sets(corpus)
    assert [*sets] == ["in_domain", "ood/sympy", "ood/numpy", "ood/networkx", "ood/poem"]
    found = evaluation.evaluate(m, corpus, 10**6, 4)
    assert found.keys() == {*sets, *(f"calibrated/{name}" for name in sets), "accuracy/brackets"}
    for name, path in sets.items():
        tokens = torch.from_numpy(data.load_tokens(path).astype(np.int64))
        n = (len(tokens) - 1) // 32
        with torch.no_grad():
            z = m(tokens[:n * 32].view(n, 32)).flatten(0, 1)
        plain, *losses = [F.cross_entropy(z / t, tokens[1:n * 32 + 1]).item()
                          for t in (1.0, *np.linspace(0.8, 1.399, 60))]
        assert abs(found[name] - plain) < 1e-4
        assert abs(found[f"calibrated/{name}"] - min(losses)) < 1e-3 < plain - min(losses)
    fewer = evaluation.read_windows(sets["ood/poem"], 32, 5)
    every = evaluation.read_windows(sets["ood/poem"], 32, 10**6)
    assert torch.equal(fewer, every[[k * len(every) // 5 for k in range(5)]])


def test_items_are_what_they_say():
    sets = [programs(40)[::2], programs(40)[1::2]]
    items, texts = data.bracket_items(iter(sets), 50), [text for _, text in programs(40)]
    assert items == data.bracket_items(sets, 50) and len(items) == 2 * 2 * 50
    for k, item in enumerate(items):
        context, (one, other), label = item["context"], item["choices"], item["label"]
        assert any(context + item["choices"][label] in text for text in texts)
        assert len(context) <= 280 and context[-1].isalnum() and len(one) <= 31
        assert one[0] + other[0] == ")]" and one[1:] == other[1:] and label == k // 50 % 2
        at, depth = len(context), 1                           # the bracket is open in the context, and near
        while depth:
            at -= 1
            depth += (context[at] in ")]}") - (context[at] in "([{")
        assert context[at] == "(["[label] and 8 <= len(context) - at <= 200
    some = data.evenly_spaced(items, 63)                      # as many of either
    assert abs(sum(item["label"] for item in some) - len(some) / 2) <= 2


def test_accuracy_is_of_sums_of_log_probabilities(corpus):
    """One choice at a time, without batches or padding, as the definition has it."""
    encoding, m = data.load_tokenizer(corpus), tiny(vocab_size=300)
    lines = Path(corpus, "task_brackets.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines[::9]] + [
        {"context": "x = 1\n" * 100 + "y", "choices": [" a", " long" * 20], "label": 0},  # over the context
        {"context": "", "choices": ["y", "z1"], "label": 0}]
    right = []
    for item in items:
        sums = []
        for choice in item["choices"]:
            ids = encoding.encode_ordinary(choice)[-24:]
            row = [encoding.eot_token, *encoding.encode_ordinary(item["context"]), *ids][-25:]
            logp = m(torch.tensor([row[:-1]]))[0].log_softmax(-1)
            sums.append(sum(logp[k - 1, row[k]].item() for k in range(len(row) - len(ids), len(row))))
        right.append(np.argmax(sums) == item["label"])
        assert evaluation.accuracy(m, encoding, [item]) == right[-1]
    assert evaluation.accuracy(m, encoding, items) == np.mean(right) and 0 < np.mean(right) < 1


def test_eval_prints_tables_and_samples(corpus, trained, monkeypatch, capsys):
    paths = [str(trained / name / "ckpt.pt") for name in ("1/alpha_0", "1/alpha_0.25")]
    def show(*flags):
        argv = [*paths, "--data", corpus, "--windows", 16, *flags]
        code, out, err = call(evaluation.main, argv, monkeypatch, capsys)
        assert code == 0, err
        return out
    assert "def " in show("--sample", "def ")
    out = show()
    assert "tokens, seed 1, alpha 0.25 from s" in out
    one, two = (evaluation.evaluate(model.load_checkpoint(path)[0], corpus, 16) for path in paths)
    table = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for name, sign in (("ood/poem", -1), ("accuracy/brackets", 1)):
        gain = sign * (two[name] - one[name])
        assert table[name] == [f"{one[name]:.4f}", f"{two[name]:.4f}", f"({gain:+.4f})"]
    for kind in ("", "calibrated/"):
        outside = np.mean([x for name, x in one.items() if name.startswith(f"{kind}ood/")])
        assert table[f"{kind}ood, mean"][0] == f"{outside:.4f}"


# ---- eval.py: the findings ---------------------------------------------------

def test_interval_is_students():
    mean, margin = evaluation.interval([1.0, 2.0, 4.0])
    assert abs(mean - 7 / 3) < 1e-12 and abs(margin - 4.303 * 1.527525 / math.sqrt(3)) < 1e-4
    assert evaluation.show([1.0, 2.0, 4.0], 1) == "+2.3 ± 3.8" and evaluation.show([3.0]) == "+3.000"


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
        return dict(model=model, seed=seed, teacher=teacher, teacher_seed=teacher_seed, alpha=alpha,
                    setup={"corpus": "c", "block_size": 128}, flops=9.0, teacher_flops=4.5 * bool(teacher),
                    seconds=1.0, metrics={**metrics, "accuracy/c": 0.5})
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
    return [verdict for _, verdict, _ in evaluation.findings(evaluation.study(rows, STUDENT))]


def test_each_rule_on_rows_with_and_without_its_finding_and_in_between():
    assert verdicts(made_up()) == verdicts(made_up(own=True)) == ["reproduced"] * 4
    opposite = with_gains(xs={0.25: (0.1, -0.04)}, s={0.25: (0.03, -0.05)}, m={0.25: (0.2, 0.16)},
                          bigram={0.25: (0.0, 0.0)})
    assert verdicts(made_up(opposite)) == ["not reproduced"] * 4
    assert verdicts(made_up(noise={"xs@32M": 0.1})) == ["undecided"] * 4
    assert verdicts(made_up(seeds=(1, 2))) == ["too few seeds"] * 4
    strong = {name: PAPER[name] for name in ("s@32M", "m@32M")}
    assert verdicts(made_up(strong)) == ["not tested"] * 4
    assert verdicts(made_up({name: PAPER[name] for name in PAPER if "bigram" not in name}))[3] == "not tested"


def test_rule_two_looks_at_steps_along_size():
    noise = {"xs@32M": 0.001, "m@32M": 0.002}                 # steps that are not the same at every seed
    for last, verdict in ((0.09, "reproduced"), (0.11, "reproduced"), (0.16, "undecided"), (0.2, "not reproduced")):
        cells = with_gains(m={0.25: (0.03, 0.06), 1.0: (0.05, last)})
        assert verdicts(made_up(cells, noise=noise))[1] == verdict, last
    assert verdicts(made_up(noise={"m@32M": 0.1}))[1] == "undecided"
    for teacher in ("bigram@64M", "l@16M"):                   # not on the path: a table, another budget
        more = {**PAPER, teacher: (3.5, {0.25: (0.0, 0.9), 1.0: (0.0, 0.9)})}
        assert verdicts(made_up(more))[1] == "reproduced"
    less, seen = evaluation.stronger_teacher_saturates(evaluation.study(made_up(noise=0.0), STUDENT))
    assert np.allclose(less, 0.07) and "by +0.060 ± 0.000, -0.010 ± 0.000; first step minus last: +0.070" in seen


def test_rules_three_and_four_look_at_calibrated_losses_too():
    def seen(rule, **more):
        return rule(evaluation.study(made_up(noise=0.0, **more), STUDENT))[1]
    # text brings 0.8 outside for each nat in domain: 0.04 + 0.8 * 0.01, 0.1 - 0.8 * 0.05, 0.001 + 0.8 * 0.05
    three = seen(evaluation.generalisation_first, less={"xs@32M": 0.06})
    assert "0.80 nats outside" in three and "weak networks +0.048 ± 0.000 (calibrated -0.012 ± 0.000)" in three
    assert "strong networks +0.055" in three and "tables +0.041" in three
    assert verdicts(made_up(less={"xs@32M": 0.06}))[2] == "reproduced"
    four = seen(evaluation.more_than_smoothing, less={"xs@32M": 0.01})
    assert "+0.030 ± 0.000 outside, the best table +0.001 ± 0.000: +0.029 ± 0.000 more than the table" in four
    four = seen(evaluation.more_than_smoothing, less={"bigram@32M": 0.02})   # a table that harms is no rival
    assert "the best table -0.019 ± 0.000: +0.040 ± 0.000 more than no teacher" in four
    for less, noise, verdict in (({"xs@32M": 0.05}, 0.001, "not reproduced"),      # it only smooths
                                 ({"bigram@32M": -0.06}, 0.001, "not reproduced"),  # a table gives more
                                 ({}, {"bigram@32M": 0.1}, "undecided")):
        found = verdicts(made_up(less=less, noise=noise))
        assert (found[0], found[3]) == ("reproduced", verdict)


def test_alpha_is_the_best_on_the_other_seeds():
    rows = made_up(noise=0)
    s = evaluation.study(rows, STUDENT)
    assert [f"{t.name} {t.alpha}" for t in s.teachers] == [
        "bigram@32M 0.25", "xs@32M 0.25", "s@32M 1", "m@32M 1"]
    assert all(np.allclose(t.as_text, [[0.24 * math.log2(1.5)], [0.24]]) for t in s.teachers)  # 1.5 x; twice
    for row in rows:                                          # xs at alpha 1 is by far the best at one seed
        if row["teacher"] == "xs@32M" and row["alpha"] == 1.0 and row["seed"] == 1:
            row["metrics"] |= {"ood/a": 2.0, "ood/b": 2.0}
    xs = evaluation.study(rows, STUDENT).teachers[1]          # which the other two follow, and lose by
    assert np.allclose(xs.outside[""], [0.04, -0.1, -0.1]) and xs.alpha == "0.25, 1"
    assert np.allclose(xs.outside["calibrated/"], 0.04) and np.allclose(xs.inside[""], [-0.01, -0.2, -0.2])
    gains = np.random.default_rng(0).normal(size=(4, 6))      # by another way
    best = [np.delete(gains, seed, 1).mean(1).argmax() for seed in range(6)]
    assert [*evaluation.best_alpha(gains)] == best
    assert [*evaluation.best_alpha(gains[:, :1])] == [gains[:, 0].argmax()]  # a single seed uses its own


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
    path.write_text("\n".join(lines))
    assert evaluation.read_rows(path) == rows == evaluation.read_rows(path, rows[0]["setup"])
    other = json.dumps({**rows[1], "setup": {"corpus": "c", "block_size": 256}})
    for line, word in ((other, "line 2 was made with block_size 256, not with 128"),
                       *((bad, "line 2 is not a result of this version") for bad in (
                           '{"metrics": null}', "[" * 200_000, lines[1][:99], "7",
                           json.dumps({**rows[1], "setup": "c"}), json.dumps({**rows[1], "seconds": math.nan})))):
        path.write_text("\n".join([lines[0], line, lines[2]]))
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
    assert figures and [figure for figure in figures if figure not in known] == []


def test_snippets_of_the_results_page_run(monkeypatch):
    monkeypatch.chdir(HERE)
    page = (HERE / "results" / "README.md").read_text("utf-8")
    for snippet in regex.findall(r"```python\n(.*?)```", page, regex.DOTALL):
        exec(snippet, {})
    assert "```python" in page


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
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["--scale", "smoke", "--data", corpus, "--seeds", "1", "--student", "xs@8K", "--teachers", "xs@4K",
            "--jobs", "1", "--device", "cpu", "--out"]
    # here its workers are threads, which start sooner; the one to kill has real ones
    monkeypatch.setattr(futures, "ProcessPoolExecutor", lambda jobs, _, __, threads: (
        futures.ThreadPoolExecutor(jobs, "", torch.set_num_threads, threads)))
    code, out, err = call(sweep.main, [*argv, whole], monkeypatch, capsys)
    assert code == 0 and "A weak teacher helps" in out and " -> xs@8K, seed 1: outside " in out, err
    assert "xs@8K alone, seed 1: loss " in out and "\nnote: " not in out
    assert len(results(whole)) == 1 + 2 + 2 == len(set(results(whole)))
    code, out, err = call(sweep.main, [*argv, whole, "--scale", "laptop"], monkeypatch, capsys)
    assert code == 2 and "line 1 was made with windows 32, not with 512" in err[-1]
    process = subprocess.Popen([sys.executable, "sweep.py", *argv, parts], cwd=HERE, stdout=-3, stderr=-3)
    path = parts / "results.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    process.kill()                                            # it has some results
    process.wait()
    code, out, err = call(sweep.main, [*argv, parts], monkeypatch, capsys)
    assert code == 0 and results(parts) == results(whole), err


def test_a_killed_worker_ends_the_sweep_with_a_line(corpus, tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")  # as IPython's %run leaves it, a second time
    def kill_one():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        time.sleep(1)                                         # its parent has told it what to do
        multiprocessing.active_children()[0].kill()
    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(data.UserError, match="a worker died.*rerun the same command to resume"):
        sweep.sweep(sweep.SCALES["smoke"], corpus, str(tmp_path), 2, "cpu")
    assert not multiprocessing.active_children()


def test_dry_run_prints_every_run_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for scale in sweep.SCALES:
        code, out, err = call(sweep.main, ["--scale", scale, "--dry_run"], monkeypatch, capsys)
        plan, done = sweep.plan(sweep.SCALES[scale]), {None}
        assert [line.split()[0] for line in out.splitlines()[:-1]] == [run.name for run in plan]
        for run in plan:                                      # each follows what it needs
            assert {run.teacher, run.alone} <= done
            done.add(run)
    assert not list(tmp_path.iterdir())


# ---- exercises/ --------------------------------------------------------------

PATCHES = {path.stem: path for path in (HERE / "exercises").glob("*.patch")}
PATCHED_LOSSES = {"4_reverse_kl": (1.795, 0.0), "5_top_p": (4.821, 0.348), "5_renormalised": (1.431, 0.0),
                  "5_one_more_outcome": (2.219, 0.0)}        # L(1), L(1, h @ w.T)


@pytest.mark.parametrize("name", sorted(PATCHES))
def test_a_solution_applies_and_passes_its_check(name, corpus, trained, tmp_path, monkeypatch, capsys):
    for script in ("data", "model", "distill", "eval", "sweep"):
        shutil.copy(HERE / f"{script}.py", tmp_path)
        monkeypatch.delitem(sys.modules, script)              # the copy's comes in its place, for this test
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))      # the copy is in no repository
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    def scripts():
        return {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    before = scripts()
    for reverse in ([], ["-R"], []):
        subprocess.run(["git", "apply", *reverse, PATCHES[name]], check=True)
        assert (scripts() == before) == bool(reverse)
    assert importlib.import_module("sweep").__file__ == str(tmp_path / "sweep.py")
    check = runpy.run_path(HERE / "exercises" / "check.py")
    L, same_as_student = check["L"], check["h"] @ check["w"].T
    assert L(0) == 4.997 and (L(1), L(1, same_as_student)) == PATCHED_LOSSES.get(name, (3.234, 0.0))
    if name == "7_two_teachers":
        a, b = 3 * torch.randn(2, 4, 6, 11)
        mean = check["average"](lambda x: a, lambda x: b)(None).exp()
        assert torch.allclose(mean, (a.softmax(-1) + b.softmax(-1)) / 2, atol=1e-6)
    elif name == "13_trigram":
        table = check["Table"](check["GPTConfig"](11, counts=3))
        table.count(torch.randint(11, (500,)))
        assert torch.allclose(table(torch.randint(11, (9, 9))).exp().sum(-1), torch.ones(9, 9), atol=1e-5)
    elif name in ("10_own_text", "11_mixing"):
        shutil.copytree(corpus, "data/python")
        Path("input.txt").write_text(poem(20))
        alone, taught = (str(trained / "1" / f"alpha_{alpha}" / "ckpt.pt") for alpha in (0, 0.25))
        words, said = ([alone, alone], "share 0.00: gain +0.000") if name == "11_mixing" else (
            ["input.txt", alone, taught, taught], "0.000 beyond")
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(f"{name.partition('_')[2]}.py", run_name="__main__")
        assert said in capsys.readouterr().out


def test_where_the_gain_lies(corpus, trained, tmp_path, monkeypatch, capsys):
    script = runpy.run_path(HERE / "exercises" / "token_gains.py")
    paths = [str(trained / name / "ckpt.pt") for name in ("1/alpha_0", "1/alpha_0.25", "teacher", "2/alpha_0")]
    models = [model.load_checkpoint(path)[0] for path in paths]
    found, sets = script["token_gains"](models, corpus, 64), evaluation.evaluation_sets(corpus)
    for where, groups in found.items():
        rows = torch.cat([evaluation.read_windows(path, 32, 64) for name, path in sets.items()
                          if (name == "in_domain") == (where == "in_domain")])
        x, y = rows[:, :-1], rows[:, 1:]
        gain = torch.sub(*(evaluation.token_losses(m, rows)[0] for m in models[:2]))
        t, o = (m(x).argmax(-1) == y for m in models[2:])
        for name, group in (("all tokens", t | True), ("both right", t & o), ("only the teacher", t & ~o),
                            ("only the other student", o & ~t), ("neither", ~t & ~o)):
            share, mean = groups[name]
            assert abs(share - group.double().mean()) < 1e-3
            assert abs(share * mean - (gain * group).double().mean()) < 1e-3
    shutil.copytree(corpus, tmp_path / "data" / "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["token_gains.py", *paths])
    script["main"]()
    assert "outside    only the other student" in capsys.readouterr().out


def test_commands_of_the_exercises_are_ones_that_run():
    text = (HERE / "exercises" / "README.md").read_text("utf-8")
    assert set(regex.findall(r"(\d+_\w+)\.patch", text)) == PATCHES.keys()
    for line in regex.findall(r"^python distill.py (.*)", text, regex.M):
        distill.check(distill.parse_config(shlex.split(line.replace("--size trigram", "--size xs"))))


# ---- bad input: one line, exit code 2, nothing written -----------------------

@pytest.fixture(scope="session")
def made(corpus, trained, tmp_path_factory):
    """A folder with two corpora of different tokenizers, a checkpoint of each, and bad files."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(corpus, folder / "data")
    shutil.copytree(trained / "teacher", folder / "run")
    (folder / "other.txt").write_text(poem(200))
    data.prepare("text", str(folder / "other"), 258, [str(folder / "other.txt")])
    distill.train(config(str(folder / "other"), folder / "foreign", tokens=1024))
    (folder / "bytes.txt").write_bytes(b"\xff\xfe" * 1000)
    (folder / "short.txt").write_text("short")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({"model": {}, "model_args": {}, "config": {"device": "cpu"}}, folder / "nanogpt.pt")
    (folder / "utf16.txt").write_bytes(poem(200).encode("utf-16-le"))
    (folder / "results").mkdir()
    (folder / "results" / "results.jsonl").write_text("\n".join(map(json.dumps, made_up())))
    shutil.copytree(folder / "other", folder / "cut")
    (folder / "cut" / "val.bin").write_bytes((folder / "other" / "val.bin").read_bytes()[:-2])
    return folder


TEXT = "--corpus text --train other.txt --out new"
SWEEP = "--data data --out new"
BAD = [
    (data.main, "--corpus text --train absent.txt --out new", "No such file or directory: 'absent.txt'"),
    (data.main, "--corpus text --train bytes.txt --out new", "bytes.txt is not UTF-8 text (invalid start"),
    (data.main, "--corpus text --train utf16.txt --out new", "utf16.txt is not UTF-8 text (it has NUL"),
    (data.main, "--corpus text --train short.txt --out new", "the set val is empty: it needs about"),
    (data.main, f"{TEXT} --ood same=other.txt", "the set ood_same is empty"),
    (data.main, f"{TEXT} --ood wiki-news=other.txt", "takes NAME=FILE, such as"),
    (data.main, f"{TEXT} --ood poem", "takes NAME=FILE, such as"),
    (data.main, f"{TEXT} --ood a=other.txt --ood a=short.txt", "and each NAME once"),
    (data.main, "--corpus text --train other.txt --out data", "a different corpus"),
    *[(data.main, f"--vocab_size {n} --out new", word) for n, word in (
        ("many", "value: 'many'"), ("300.5", "value: '300.5'"), ("inf", "value: 'inf'"),
        ("70K", "must be from 257 to 65536, not 70000"), ("256", "must be from 257"))],
    (distill.main, "--size xxl", "invalid choice: 'xxl'"),
    (distill.main, "--dtype half", "invalid choice: 'half'"),
    (distill.main, "--tokens 1.0000001M", "invalid whole_number value"),
    (distill.main, "--alpha 2 --teacher run/ckpt.pt", "--alpha must be from 0 to 1"),
    *[(distill.main, f"--{knob}", "must be ") for knob in (
        "warmup 9", "lr nan", "temperature 0", "seed -1", f"seed {2**63}")],
    (distill.main, "--alpha 0.5", "needs a --teacher"),
    (distill.main, "--teacher run/ckpt.pt", "has no effect at alpha 0"),
    (distill.main, "--tokens 10", "less than a step"),
    (distill.main, "--device cuda:77", "is not available"),
    (distill.main, "--learning_rate 1", "unrecognized arguments"),
    (distill.main, "--compile False", "invalid true_or_false value: 'False'"),
    *[(distill.main, f"--teacher {name}.pt --alpha 1", word) for name, word in (
        ("absent", "no checkpoint at absent.pt"), ("tensor", "not a distill.py checkpoint"),
        ("nanogpt", "not a distill.py checkpoint"), ("foreign/ckpt", "a different tokenizer"),
        ("run/ckpt", "exceeds the teacher's"))],
    (distill.main, "--teacher run --alpha 1", "--teacher run"),               # a folder, of no model
    (distill.main, "--out run --size xs", "other settings"),
    (distill.main, "--block_size 1M --batch_size 1", "train.bin is shorter than one window of 1000000 tokens"),
    (distill.main, "--size bigram --teacher run/ckpt.pt --alpha 1", "takes no teacher"),
    (evaluation.main, "foreign/ckpt.pt --data cut", "val.bin is cut off, it should have"),
    (evaluation.main, "run/ckpt.pt --data absent", "absent is not a corpus folder"),
    (model.main, "--to_hf run/ckpt.pt new --data other", "a different tokenizer"),
    (sweep.main, f"--student s1.5M {SWEEP}", "is not a model such as s@1.5M"),
    (sweep.main, f"--student s@1.5 {SWEEP}", "'s@1.5' is not a model"),
    (sweep.main, f"--seeds 1,b {SWEEP}", "invalid list_of_numbers value: '1,b'"),
    (sweep.main, "--data other --out new", "no out-of-distribution set"),
    (sweep.main, "--data data --out results --student xs@4K --teachers xs@8K", "line 1 was made with corpus c, not"),
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


def test_help_repeated_flags_and_a_terminal_that_lacks_a_letter(made, tmp_path, monkeypatch, capsys):
    for main in (data.main, distill.main, evaluation.main, sweep.main, model.main):
        code, out, _ = call(main, ["--help"], monkeypatch, capsys)
        assert code == 0 and "python " in out and ("(default:" in out or "seed: int = 1 " in out)
    argv = f"--corpus text --out {tmp_path}/data --train {made}/other.txt --train {made}/short.txt".split()
    code, out, err = call(data.main, argv, monkeypatch, capsys)
    assert code == 0 and len(data.load_meta(f"{tmp_path}/data")["arguments"]["files"]) == 2, err
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, made_up())))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp866"))
    code, out, err = call(sweep.main, ["--report", tmp_path], monkeypatch, capsys)
    sys.stdout.flush()
    assert code == 0 and b"reproduced" in sys.stdout.buffer.getvalue(), err
    monkeypatch.setattr(sys, "stdout", io.StringIO())         # as in a notebook: it cannot be reconfigured
    data.run_main(lambda: print("ran"))
    assert sys.stdout.getvalue() == "ran\n"
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "0")
    code, out, err = call(sweep.main, [], monkeypatch, capsys)
    assert code == 2 and "cannot run under torchrun" in err[0]


def test_what_an_unfinished_corpus_leaves_does_not_count(corpus, made, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")                # with a set and a task that the next has not
    (tmp_path / "data" / "meta.json").unlink()
    meta = data.prepare("text", str(tmp_path / "data"), 300, [str(made / "other.txt")])
    assert [*evaluation.evaluation_sets(tmp_path / "data")] == ["in_domain"] and not meta["tasks"]


def test_a_text_that_is_read_more_than_once_is_said_to_be(made, tmp_path, monkeypatch, capsys):
    n = data.load_meta(made / "other")["sets"]["train"]["tokens"]
    note = f"note: {made / 'other'} has {n:,} tokens to train on: a run of {3 * n:,} reads them 3.0 times (a table counts them once)"
    for tokens, said in ((3 * n, [note]), (n, [])):
        argv = ["--size", "bigram", "--tokens", tokens, "--data", made / "other", "--out", tmp_path / str(tokens)]
        code, out, err = call(distill.main, argv, monkeypatch, capsys)
        assert code == 0 and err == said
    monkeypatch.setattr(sweep, "sweep", lambda *_: made_up())
    argv = ["--data", made / "data", "--out", tmp_path, "--scale", "smoke", "--teachers", "xs@9M,m@2M"]
    code, out, err = call(sweep.main, argv, monkeypatch, capsys)
    assert code == 0 and len(err) == 1 and "a run of 9,000,000 reads them" in err[0]


def test_numbers_with_units():
    for text, number in (("3000000", 3 * 10**6), ("1.5M", 1_500_000), ("0.7B", 7 * 10**8), ("2k", 2000)):
        assert data.whole_number(text) == number
    for text in ("", "M", "1.5", "1.2345K", "inf", "nan", "1MK", "1 M x"):
        with pytest.raises(ValueError):
            data.whole_number(text)

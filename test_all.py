"""
Every promise of the other files, checked: python -m pytest -q

What others have written we compare with: torch's own losses and FLOP counter, tiktoken's educational
encoder, transformers' Llama. Otherwise a plain version stands here, or a property.
"""
import dataclasses
import functools
import http.server
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import runpy
import shlex
import shutil
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
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, request):
    """Where there is a GPU, --device auto takes it only in the tests that need it."""
    if not request.node.get_closest_marker("skipif"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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


def flags(config):
    """The command line of a Config."""
    return [f"--{name}=" + json.dumps(value).strip('[]"') for name, value in vars(config).items()]


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """Checkpoints: a teacher, and below one folder students from it at alpha 0, 0.25 and 1."""
    folder = tmp_path_factory.mktemp("trained")
    teacher, = distill.train(config(corpus, folder / "teacher", size="s", seed=9, tokens=16384))
    distill.train(config(corpus, folder / "run", teacher=teacher, alpha=(0.0, 0.25, 1.0)))
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
def test_exported_folder_is_transformers_llama(n_kv_head, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    m, meta = tiny(n_kv_head, 300), data.load_meta(corpus)
    model.save_checkpoint(tmp_path / "m.pt", m, settings={"tokenizer": meta["tokenizer"]})
    model.to_hf(str(tmp_path / "m.pt"), str(tmp_path / "hf"), corpus)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
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
        probs = table(torch.arange(300)[None])[0].exp().double()
        assert torch.allclose(probs.sum(-1), torch.ones(300).double(), atol=1e-5) and (probs > 0).all()
        for last in range(300):
            n = sum(pairs[last, j] for j in range(300))
            share = n / (n + sum((last, j) in pairs for j in range(300))) if n else 0
            for i in range(0, 300, 7):
                bigram = share * pairs[last, i] / n + (1 - share) * unigram[i] if n else unigram[i]
                assert abs(probs[last, i] - (bigram if size == "bigram" else unigram[i])) < 1e-6


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


def test_bpe_merges_equal_counting_anew_and_encode_as_tiktoken_says():
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


@pytest.mark.parametrize("ends", ["\n\n", " "])
def test_prepare_keeps_every_document_and_its_counts(corpus, tmp_path, ends):
    text = ends.join(f"paragraph {i} " + "x é 漢 " * (i % 50) for i in range(2000))   # also all in one line
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("other text " * 1000)
    out, files = str(tmp_path / "out"), ([str(tmp_path / "a.txt")], {"b": str(tmp_path / "b.txt")})
    shutil.copytree(corpus, out)                              # what an unfinished one leaves does not count
    Path(out, "meta.json").unlink()
    meta, documents = data.prepare("text", out, 280, *files), {}
    assert [*evaluation.evaluation_sets(out)] == ["in_domain", "ood/b"] and not meta["tasks"]
    for name, known in meta["sets"].items():
        ids = np.fromfile(f"{out}/{name}.bin", np.uint16).tolist()
        *documents[name], rest = data.load_tokenizer(out).decode(ids).split(data.END_OF_TEXT)
        assert rest == "" and known["documents"] == len(documents[name]) and known["tokens"] == len(ids)
    pieces = [piece for _, piece in data.pieces(tmp_path / "a.txt")]
    assert sorted(documents["train"] + documents["val"]) == sorted(pieces) and "".join(pieces) == text
    assert max(map(len, pieces)) <= 2002 and sum(len(piece) < 1000 for piece in pieces) <= 1
    assert data.prepare("text", out, 280, *files) == meta
    (tmp_path / "b.txt").write_text("other text " * 1001)     # the same call, of a changed file
    with pytest.raises(data.UserError, match="a different corpus"):
        data.prepare("text", out, 280, *files)


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


def test_shards_from_a_server_become_a_corpus(tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gpt2 = data.make_encoding(data.train_bpe(poem(3), 300), data.PATTERN)
    monkeypatch.setattr(data, "FINEWEB", f"http://127.0.0.1:{server.server_port}/{{}}")
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: gpt2)
    in_domain, ood = data.python_documents()
    assert {name.split("/")[0] for name, _ in in_domain} == {"stdlib", "torch"} and all(ood.values())
    assert not any("_sysconfigdata" in name or "site-packages" in name for name, _ in in_domain)
    few = in_domain[:99], {name: documents[:9] for name, documents in ood.items()}
    monkeypatch.setattr(data, "python_documents", lambda: few)
    rng, header = np.random.default_rng(0), np.array([20240520, 1, 3000] + [0] * 253, "<i4").tobytes()
    shards, out = {}, str(tmp_path / "fine")
    for name in ("val_000000", "train_000001", "train_000002"):
        shards[name] = rng.integers(0, gpt2.n_vocab, 3000).astype("<u2").tobytes()
        (tmp_path / name).write_bytes(header + shards[name])
    (tmp_path / name).write_bytes(header + shards[name][:-1])
    with pytest.raises(data.UserError, match="http.*train_000002.*truncated"):
        data.prepare("fineweb-edu", out, tokens=150_000_000)
    (tmp_path / name).write_bytes(header + shards[name])
    assert data.prepare("fineweb-edu", out, tokens=150_000_000)["vocab_size"] == 50_304
    ids = data.load_tokens(f"{out}/train.bin").tobytes()
    assert ids == shards["train_000001"] + shards["train_000002"]
    server.shutdown()


# ---- distill.py: the loss ----------------------------------------------------

@pytest.mark.parametrize("chunk", [0, 1, 4, 256])             # 0: the plain loss; 4: a short last chunk
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.5], ids="temperature_{:g}".format)
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


# two ways to the same gradients are compared after one large step, before rounding grows
FEW_STEPS = dict(tokens=1024, log_every=1, lr=0.01, warmup=0.0)


def assert_same_losses(one, two):
    one, two = (np.array([line["ce"] + line["kl"] for line in log_of(folder)[:2]]) for folder in (one, two))
    assert one.shape == two.shape and np.abs(one[0] - two[0]).max() < 1e-4
    assert np.abs(one[1] - two[1]).max() < 0.05 * np.abs(one[1] - one[0]).max()


def test_many_alphas_equal_one_at_a_time(corpus, trained, tmp_path):
    teacher, log = trained / "teacher" / "ckpt.pt", log_of(trained / "run")
    for alpha in (0.0, 0.25, 1.0):
        more = dict(teacher=str(teacher), alpha=(alpha,)) if alpha else {}
        alone, = distill.train(config(corpus, tmp_path / str(alpha), **more))
        many = trained / "run" / f"alpha_{alpha:g}" / "ckpt.pt"
        assert same(weights(alone), weights(many))            # and so a run repeats
    assert log[-1]["ce"][0] < log[0]["ce"][0] - 0.5
    assert log[-1]["kl"][2] < log[-1]["kl"][1]                # pure distillation comes nearest to the teacher


def test_a_finished_run_is_not_repeated_and_another_not_overwritten(corpus, trained, tmp_path):
    moved = str(shutil.copy(trained / "teacher" / "ckpt.pt", tmp_path / "moved"))
    taught = config(corpus, trained / "run", teacher=moved, alpha=(0.0, 0.25, 1.0))
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*.pt")}
    assert distill.train(taught) == [f"{trained}/run/alpha_{alpha}/ckpt.pt" for alpha in ("0", "0.25", "1")]
    teacher, extra = model.load_checkpoint(moved)
    teacher.norm.weight.data += 1                             # another of the same settings
    model.save_checkpoint(tmp_path / "other.pt", teacher, **extra)
    for change in (dict(lr=1e-3), dict(alpha=(0.5,)), dict(teacher=f"{tmp_path}/other.pt")):
        with pytest.raises(data.UserError, match="other settings"):
            distill.train(dataclasses.replace(taught, **change))
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_other_ways_to_the_same_gradients(corpus, trained, tmp_path, monkeypatch, capsys):
    """Batches that add up, the plain loss, torch.compile, two ranks."""
    some = functools.partial(config, corpus, teacher=str(trained / "teacher" / "ckpt.pt"), alpha=(0.3,),
                             temperature=2.0, **FEW_STEPS)
    def run(name, **more):
        return weights(*distill.train(some(tmp_path / name, **more)))
    plain, reference = run("plain"), run("reference", fused=False)
    works = distill.compiler(torch.device("cpu"))(run) is not run
    fast = run("fast", compile=True)
    run("parts", batch_size=2, accumulate=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*torchrun, "distill.py", *flags(some(tmp_path / "ranks", batch_size=2, accumulate=2))]
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("next: python eval.py") == 1, done.stderr
    for name in ("reference", "fast", "parts", "ranks"):
        assert_same_losses(tmp_path / "plain", tmp_path / name)
    assert not same(plain, reference)                         # another way of reckoning, really taken
    assert same(plain, fast) != works
    def broken(*_, **__):                                     # as inductor puts it
        raise RuntimeError("C++ compile error\n\nCommand:\ng++\n\nOutput:\nld: cannot find -ltorch\nld: 2")
    monkeypatch.setattr(torch, "compile", broken)
    distill.compiler.cache_clear()
    assert same(run("none", compile=True), plain)
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


def test_teachers_of_transformers(corpus, trained, made, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    def teach(name, data_dir, teacher):
        distill.train(config(data_dir, tmp_path / name, teacher=teacher, alpha=(0.5, 1.0), **FEW_STEPS))
    ours, exported = str(trained / "teacher" / "ckpt.pt"), str(tmp_path / "exported")
    model.to_hf(ours, exported, corpus)
    teach("ours", corpus, ours), teach("theirs", corpus, exported)
    assert_same_losses(tmp_path / "ours", tmp_path / "theirs")
    half, gpt2, padded = (str(shutil.copytree(folder, tmp_path / name)) for folder, name in (
        (exported, "half"), (exported, "gpt2"), (corpus, "padded")))
    transformers.AutoModelForCausalLM.from_pretrained(exported).bfloat16().save_pretrained(half)
    teacher, _ = distill.load_teacher(config(corpus, "", teacher=half), data.load_meta(corpus), "cpu")
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    Path(half, "model.safetensors").write_text("version https://git-lfs\noid sha256:0\n")
    with pytest.raises(data.UserError, match="half is neither a .pt file nor a model .*: "):
        teach("pointer", corpus, half)
    shape = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2,
                                    bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(shape).save_pretrained(gpt2)
    meta = data.load_meta(corpus) | {"vocab_size": 304}       # as a corpus in GPT-2's tokens has a few more
    Path(padded, "meta.json").write_text(json.dumps(meta))
    teacher, known = distill.load_teacher(config(padded, "", teacher=gpt2), meta, "cpu")
    logits = teacher(torch.zeros(1, 8, dtype=torch.int64))
    assert logits.shape == (1, 8, 304) and (logits[..., 300:] == -1e9).all() and known["name"] == gpt2
    teach("taught", padded, gpt2)                             # which would stop at a NaN
    with pytest.raises(data.UserError, match="does not give the tokens of"):
        teach("wrong", str(made / "other"), gpt2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(data.UserError, match="pip install transformers"):
        teach("none", corpus, exported)


def interrupt(config, at):
    """Train up to an error, in the middle of a step."""
    rate = distill.learning_rate
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(distill, "learning_rate", lambda config, step: rate(config, step) / (step < at))
        distill.train(config)


def test_a_run_that_is_stopped_or_killed_ends_as_if_never_stopped(corpus, trained, tmp_path):
    teacher, whole, state = str(trained / "teacher" / "ckpt.pt"), trained / "run", tmp_path / "state.pt"
    parts = config(corpus, tmp_path, teacher=teacher, alpha=(0.0, 0.25, 1.0), save_every=0)
    interrupt(parts, 13)
    saved = state.stat().st_mtime_ns
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "distill.py", *flags(parts)], cwd=HERE, env=env, stderr=-3)
    while process.poll() is None and state.exists() and state.stat().st_mtime_ns == saved:
        time.sleep(0.001)                                     # until it has saved one more state
    process.kill()
    assert process.wait() in (0, -9)                          # no error came before
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
        return loss * (math.nan if len(calls) == 21 else 1), ce, kl
    monkeypatch.setattr(distill, "distill_loss", breaks)
    saving = config(corpus, tmp_path, save_every=0.0, log_every=1000)
    with pytest.raises(data.UserError, match=r"NaN or inf between steps 1 and 20 \(learning rate 0.0"):
        distill.train(saving)
    assert not (tmp_path / "ckpt.pt").exists()
    monkeypatch.setattr(distill, "distill_loss", plain)       # and the state that was saved before is good
    assert same(weights(*distill.train(saving)), weights(trained / "run" / "alpha_0" / "ckpt.pt"))
    def overflows(z, *rest):                                  # float16 stops once its scale is used up
        return torch.zeros(()), torch.zeros(()), torch.full_like(z, math.inf)
    monkeypatch.setattr(distill, "chunk_loss", overflows)
    with pytest.raises(data.UserError, match="NaN or inf between steps"):
        distill.train(config(corpus, tmp_path / "float16", dtype="float16"))


# ---- on a GPU ----------------------------------------------------------------

@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taught", [True, False])
def test_fused_loss_equals_the_plain_one_on_a_gpu(dtype, taught, monkeypatch):
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


@needs_cuda
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_training_on_a_gpu_follows_the_cpu_and_resumes(dtype, corpus, tmp_path):
    on_gpu = functools.partial(config, corpus, device="cuda", dtype=dtype, compile=True, save_every=0.0)
    teacher, = distill.train(on_gpu(tmp_path / "t"))
    more = dict(teacher=teacher, alpha=(0.0, 0.5))
    paths = distill.train(on_gpu(tmp_path / "whole", **more))
    distill.train(config(corpus, tmp_path / "cpu", **more))
    parts = on_gpu(tmp_path / "parts", **more)
    interrupt(parts, 40)
    for one, other in zip(paths, distill.train(parts)):
        for a, b in zip(weights(one).values(), weights(other).values()):
            assert (a - b).norm() < 0.02 * a.norm() + 1e-3
    ends = [log_of(tmp_path / name)[-1]["ce"] for name in ("whole", "parts", "cpu")]
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
        at, depth = len(context), 1                           # the bracket is open, and near
        while depth:
            at -= 1
            depth += (context[at] in ")]}") - (context[at] in "([{")
        assert context[at] == "(["[label] and 8 <= len(context) - at <= 200


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
    paths = [str(trained / name / "ckpt.pt") for name in ("run/alpha_0", "run/alpha_0.25")]
    argv = [paths[0], "--data", corpus, paths[1], "--windows", 16]
    code, out, err = call(evaluation.main, [*argv, "--sample", "def "], monkeypatch, capsys)
    assert code == 0 and "def " in out, err
    code, out, err = call(evaluation.main, argv, monkeypatch, capsys)
    assert code == 0 and "tokens, seed 1, alpha 0.25 from s" in out, err
    one, two = (evaluation.evaluate(model.load_checkpoint(path)[0], corpus, 16) for path in paths)
    table = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for name, sign in (("ood/poem", -1), ("accuracy/brackets", 1)):
        gain = sign * (two[name] - one[name])
        assert table[name] == [f"{one[name]:.4f}", f"{two[name]:.4f}", f"({gain:+.4f})"]
    outside = np.mean([x for name, x in one.items() if name.startswith("ood/")])
    assert table["ood, mean"][0] == f"{outside:.4f}"


# ---- eval.py: the findings ---------------------------------------------------

STUDENT = "s@8M"
PAPER = {"bigram@32M": (3.5, {0.25: (-0.05, 0.001), 1.0: (-1.0, -1.0)}),
         "xs@32M": (2.9, {0.25: (-0.01, 0.04), 1.0: (-0.2, -0.1)}),
         "s@32M": (2.4, {0.25: (0.03, 0.05), 1.0: (0.05, 0.10)}),
         "m@32M": (2.2, {0.25: (0.03, 0.06), 1.0: (0.05, 0.09)})}


def made_up(teachers=PAPER, seeds=(1, 2, 3), noise=0.001, less=None):
    """
    Rows in which the student alone has a loss of 2.5 in domain and 3.0 outside, with twice the tokens 0.3 and
    0.24 less. teachers: {name: (own loss, {alpha: (gain in domain, gain outside)})}; a seed adds noise (a
    number, or one for each teacher) to gains outside; less: how much lower gains are, once calibrated.
    """
    def row(model, seed, inside, outside, teacher=None, alpha=0.0):
        metrics = {"in_domain": inside, "ood/a": outside - 0.1, "ood/b": outside + 0.1}
        more = (less or {}).get(teacher, 0.0)
        metrics |= {f"calibrated/{name}": x + more * (name != "in_domain") for name, x in metrics.items()}
        return dict(model=model, seed=seed, teacher=teacher, teacher_seed=teacher and 0, alpha=alpha,
                    setup={"corpus": "c", "block_size": 128}, flops=9.0, teacher_flops=4.5 * bool(teacher),
                    seconds=1.0, metrics={**metrics, "accuracy/c": 0.5})
    rows = [row(name, 0, loss, loss + 0.5) for name, (loss, _) in teachers.items()]
    for seed in seeds:
        level = 0.05 * seed                                   # seeds differ, and pairing takes that out
        rows += [row(STUDENT, seed, 2.5 + level, 3.0 + level), row("s@16M", seed, 2.2 + level, 2.76 + level)]
        for name, (_, gains) in teachers.items():
            luck = (seed - 2) * (noise.get(name, 0.0) if isinstance(noise, dict) else noise)
            rows += [row(STUDENT, seed, 2.5 + level - inside, 3.0 + level - outside - luck, name, alpha)
                     for alpha, (inside, outside) in gains.items()]
    return rows


def verdicts(rows):
    return [verdict for _, verdict, _ in evaluation.findings(evaluation.study(rows, STUDENT))]


def test_each_rule_on_rows_with_and_without_its_finding_and_in_between():
    assert verdicts(made_up()) == ["reproduced"] * 4
    opposite = {"bigram@32M": (3.5, {0.25: (0.0, 0.0)}), "xs@32M": (2.9, {0.25: (0.1, -0.04)}),
                "s@32M": (2.4, {0.25: (0.03, -0.05)}), "m@32M": (2.2, {0.25: (0.2, 0.16)})}
    assert verdicts(made_up(opposite)) == ["not reproduced"] * 4
    wide = made_up(noise={"xs@32M": 0.1})
    assert verdicts(wide) == ["undecided"] * 4
    _, seen = evaluation.weak_teacher_helps(evaluation.study(wide, STUDENT))
    assert "+0.040 ± 0.248 outside" in seen                   # Student's t: 4.303 * 0.1 / sqrt(3)
    assert verdicts(made_up(seeds=(1, 2))) == ["too few seeds"] * 4
    strong = {name: PAPER[name] for name in ("s@32M", "m@32M")}
    assert verdicts(made_up(strong)) == ["not tested"] * 4
    assert verdicts(made_up(strong | {"xs@32M": PAPER["xs@32M"]}))[3] == "not tested"


def test_rule_two_looks_at_steps_along_size():
    noise = {"xs@32M": 0.001, "m@32M": 0.002}                 # steps differ between seeds
    for last, verdict in ((0.11, "reproduced"), (0.16, "undecided"), (0.2, "not reproduced")):
        teachers = PAPER | {"m@32M": (2.2, {0.25: (0.03, 0.06), 1.0: (0.05, last)})}
        assert verdicts(made_up(teachers, noise=noise))[1] == verdict, last
    for teacher in ("bigram@64M", "l@16M"):                   # not on the path: a table, another budget
        more = {**PAPER, teacher: (3.5, {0.25: (0.0, 0.9), 1.0: (0.0, 0.9)})}
        assert verdicts(made_up(more))[1] == "reproduced"
    less, seen = evaluation.stronger_teacher_saturates(evaluation.study(made_up(noise=0.0), STUDENT))
    assert np.allclose(less, 0.07) and "+0.060 ± 0.000, -0.010 ± 0.000; first step minus last: +0.070" in seen


def test_rules_three_and_four_look_at_calibrated_losses_too():
    def seen(rule, **more):
        return rule(evaluation.study(made_up(noise=0.0, **more), STUDENT))[1]
    # text brings 0.8 outside for each nat in domain: 0.04 + 0.8 * 0.01, 0.1 - 0.8 * 0.05, 0.001 + 0.8 * 0.05
    three = seen(evaluation.generalisation_first, less={"xs@32M": 0.06})
    assert "0.80 nats outside" in three and "strong networks +0.055" in three and "tables +0.041" in three
    assert "weak networks +0.048 ± 0.000 (calibrated -0.012 ± 0.000)" in three
    assert verdicts(made_up(less={"xs@32M": 0.06}))[2] == "reproduced"
    four = seen(evaluation.more_than_smoothing, less={"xs@32M": 0.01})
    assert "+0.030 ± 0.000 outside, the best table +0.001 ± 0.000: +0.029 ± 0.000 more than the" in four
    four = seen(evaluation.more_than_smoothing, less={"bigram@32M": 0.02})   # a table that harms is no rival
    assert "the best table -0.019 ± 0.000: +0.040 ± 0.000 more than no teacher" in four
    for less, noise, verdict in (({"xs@32M": 0.05}, 0.001, "not reproduced"),  # it only smooths
                                 ({"bigram@32M": -0.06}, 0.001, "not reproduced"),  # a table gives more
                                 ({}, {"bigram@32M": 0.1}, "undecided")):
        found = verdicts(made_up(less=less, noise=noise))
        assert (found[0], found[3]) == ("reproduced", verdict)


def test_alpha_is_the_best_on_the_other_seeds():
    for seeds in ((1,), (1, 2, 3)):                           # a single seed uses its own
        rows = made_up(seeds=seeds, noise=0.0)
        teachers = evaluation.study(rows, STUDENT).teachers
        assert [f"{t.name} {t.alpha}" for t in teachers] == [
            "bigram@32M 0.25", "xs@32M 0.25", "s@32M 1", "m@32M 1"]
        for t in teachers:                                    # its compute as text: 1.5 x; twice
            assert np.allclose(t.as_text, [[0.24 * math.log2(1.5)], [0.24]])
    for row in rows:                                          # xs at alpha 1 is by far the best at one seed
        if row["teacher"] == "xs@32M" and row["alpha"] == 1.0 and row["seed"] == 1:
            row["metrics"] |= {"ood/a": 2.0, "ood/b": 2.0}
    xs = evaluation.study(rows, STUDENT).teachers[1]          # which the other two follow, and lose by
    assert np.allclose(xs.outside[""], [0.04, -0.1, -0.1]) and xs.alpha == "0.25, 1"
    assert np.allclose(xs.outside["calibrated/"], 0.04) and np.allclose(xs.inside[""], [-0.01, -0.2, -0.2])


def test_a_seed_with_a_row_missing_is_left_out_and_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = made_up(seeds=(1, 2, 3, 4))
    expected = verdicts([row for row in rows if row["seed"] != 3])
    for row in rows:
        if row["seed"] == 3:
            left = [other for other in rows if other is not row]
            assert evaluation.study(left, STUDENT).seeds == [1, 2, 4] and verdicts(left) == expected
    text = evaluation.write_report(left, str(tmp_path))
    assert "seeds 1, 2, 4" in text and "nan" not in text and "No figure (" in text
    assert "all alphas: seed 3.\n" in text and "Left out" not in evaluation.write_report(rows, str(tmp_path))
    no_twice = [row for row in rows if row["model"] != "s@16M"]
    assert "No seed is complete: " in evaluation.write_report(no_twice, str(tmp_path))
    for row in rows:
        row["metrics"].pop("accuracy/c")
    assert "Points of accuracy" in text and "accuracy" not in evaluation.write_report(rows, str(tmp_path))


def test_results_are_read_with_care(tmp_path):
    rows, path = made_up(), tmp_path / "results.jsonl"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    assert evaluation.read_rows(path) == rows == evaluation.read_rows(path, rows[0]["setup"])
    other = json.dumps({**rows[1], "setup": {"corpus": "c", "block_size": 256}})
    for line, word in ((other, "was made with block_size 256, not with 128"),
                       *((bad, "is not a result") for bad in (
                           lines[1][:99], '{"metrics": null}', "[" * 200_000,
                           json.dumps({**rows[1], "seconds": math.nan})))):
        path.write_text("\n".join([lines[0], line, lines[2]]))
        with pytest.raises(data.UserError, match=f"line 2 {word}"):
            evaluation.read_rows(path)


def test_reports_are_of_their_rows_the_readme_quotes_them_and_snippets_run(tmp_path, monkeypatch):
    if not importlib.util.find_spec("matplotlib"):
        monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    monkeypatch.chdir(HERE)
    known = page = Path("results/README.md").read_text("utf-8")
    for path in Path("results").glob("*/report.md"):
        report = evaluation.write_report(evaluation.read_rows(path.parent / "results.jsonl"), str(tmp_path))
        assert path.read_text("utf-8") == report, path
        known += report
    figures = regex.findall(r"\d\.\d{3} ± \d\.\d{3}", Path("README.md").read_text("utf-8"))
    assert figures and "```python" in page and [x for x in figures if x not in known] == []
    for snippet in regex.findall(r"```python\n(.*?)```", page, regex.DOTALL):
        exec(snippet, {})


# ---- sweep.py: the runs ------------------------------------------------------

def test_a_sweep_killed_and_resumed_equals_one_never_stopped(corpus, tmp_path, monkeypatch, capsys):
    def results(folder):
        rows = [json.loads(line) for line in open(folder / "results.jsonl")]
        return sorted(json.dumps({**row, "seconds": 0}) for row in rows)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["--scale", "smoke", "--data", corpus, "--seeds", "1", "--student", "xs@8K",
            "--teachers", "bigram@4K", "--jobs", "1", "--device", "cpu", "--out"]
    # here its workers are threads, which start sooner; the one to kill has real ones
    monkeypatch.setattr(futures, "ProcessPoolExecutor", lambda jobs, _, __, threads: (
        futures.ThreadPoolExecutor(jobs, "", torch.set_num_threads, threads)))
    code, out, err = call(sweep.main, [*argv, whole], monkeypatch, capsys)
    assert code == 0 and "A weak teacher helps" in out and " -> xs@8K, seed 1: outside " in out, err
    assert "xs@8K alone, seed 1: loss " in out and out.count("## Student xs@8K, seeds 1") == 2
    assert len(results(whole)) == 1 + 2 + 2 == len(set(results(whole)))
    more = [whole, "--scale", "laptop", "--teachers", "bigram@9M"]
    code, out, err = call(sweep.main, [*argv, *more], monkeypatch, capsys)
    assert code == 2 and "a run of 9,000,000 reads them" in err[0]
    assert "line 1 was made with windows 32, not with 512" in err[-1]
    process = subprocess.Popen([sys.executable, "sweep.py", *argv, parts], cwd=HERE, stdout=-3, stderr=-3)
    path = parts / "results.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    process.kill()
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
    monkeypatch.setattr(sys, "path_importer_cache", {})       # Python 3.10 keeps the folder that "." was
    monkeypatch.chdir(tmp_path)
    def scripts():
        return {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    before = scripts()
    for reverse in ([], ["-R"], []):
        subprocess.run(["git", "apply", *reverse, PATCHES[name]], check=True)
        assert (scripts() == before) == bool(reverse)
    check = runpy.run_path(HERE / "exercises" / "check.py")
    assert Path(sys.modules["distill"].__file__).samefile("distill.py")
    L, t, same_as_student = check["L"], check["t"], check["h"] @ check["w"].T
    assert L(0) == 4.997 and (L(1), L(1, same_as_student)) == PATCHED_LOSSES.get(name, (3.234, 0.0))
    if name == "7_two_teachers":
        mean = check["average"](lambda x: x, lambda x: -x)(t).exp()
        assert torch.allclose(mean, (t.softmax(-1) + (-t).softmax(-1)) / 2, atol=1e-6)
    elif name == "13_trigram":
        table = check["Table"](check["GPTConfig"](11, counts=3))
        table.count(torch.randint(11, (500,)))
        assert torch.allclose(table(torch.randint(11, (9, 9))).exp().sum(-1), torch.ones(9, 9), atol=1e-5)
    elif name in ("10_own_text", "11_mixing"):
        shutil.copytree(corpus, "data/python")
        Path("input.txt").write_text(poem(20))
        alone, taught = (str(trained / "run" / f"alpha_{alpha}" / "ckpt.pt") for alpha in (0, 0.25))
        words, said = ([alone, alone], "share 0.00: gain +0.000") if name == "11_mixing" else (
            ["input.txt", alone, taught, taught], "0.000 beyond")
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(f"{name.partition('_')[2]}.py", run_name="__main__")
        assert said in capsys.readouterr().out


def test_where_the_gain_lies(corpus, trained, tmp_path, monkeypatch, capsys):
    script = runpy.run_path(HERE / "exercises" / "token_gains.py")
    names = "run/alpha_0", "run/alpha_0.25", "teacher", "run/alpha_1"
    paths = [str(trained / name / "ckpt.pt") for name in names]
    models = [model.load_checkpoint(path)[0] for path in paths]
    rows = evaluation.read_windows(f"{corpus}/val.bin", 32, 64)
    gain = torch.sub(*(evaluation.token_losses(m, rows)[0] for m in models[:2]))
    t, o = (m(rows[:, :-1]).argmax(-1) == rows[:, 1:] for m in models[2:])
    found = script["token_gains"](models, corpus, 64)["in_domain"]
    for name, group in (("all tokens", t | True), ("both right", t & o), ("only the teacher", t & ~o),
                        ("only the other student", o & ~t), ("neither", ~t & ~o)):
        share, mean = found[name]
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
    torch.save({"model": {}, "model_args": {}, "config": {"device": "cpu"}}, folder / "nanogpt.pt")
    (folder / "utf16.txt").write_bytes(poem(200).encode("utf-16-le"))
    shutil.copytree(folder / "other", folder / "wide")
    meta = data.load_meta(folder / "wide") | {"vocab_size": 5000}
    (folder / "wide" / "meta.json").write_text(json.dumps(meta))
    shutil.copytree(folder / "other", folder / "cut")
    (folder / "cut" / "val.bin").write_bytes((folder / "other" / "val.bin").read_bytes()[:-2])
    return folder


TEXT, SWEEP = "--corpus text --out new --train", "--data data --out new"
BAD = [
    (data.main, f"{TEXT} absent.txt", "No such file or directory: 'absent.txt'"),
    (data.main, f"{TEXT} bytes.txt", "bytes.txt is not UTF-8 text (invalid start"),
    (data.main, f"{TEXT} utf16.txt", "utf16.txt is not UTF-8 text (it has NUL"),
    (data.main, f"{TEXT} short.txt", "the set val is empty: it needs about"),
    (data.main, f"{TEXT} other.txt --ood wiki-news=other.txt", "takes NAME=FILE, such as"),
    (data.main, f"{TEXT} other.txt --ood a=other.txt --ood a=short.txt", "and each NAME once"),
    (data.main, "--train other.txt --out new", "goes with --corpus text"),
    (data.main, "--corpus text --train other.txt --out data", "a different corpus"),
    (data.main, "--vocab_size many --out new", "value: 'many'"),
    (data.main, "--vocab_size 70K --out new", "must be from 257 to 65536, not 70000"),
    (distill.main, "--lr nan", "--lr must be from 0 to inf, not nan"),
    (distill.main, "--alpha 2 --teacher run/ckpt.pt", "--alpha must be from 0 to 1"),
    (distill.main, "--alpha 0.5", "needs a --teacher"),
    (distill.main, "--teacher run/ckpt.pt", "has no effect at alpha 0"),
    (distill.main, "--size bigram --teacher run/ckpt.pt --alpha 1", "takes no teacher"),
    (distill.main, "--data wide --size bigram", "a vocabulary of at most 4096"),
    (distill.main, "--tokens 10", "less than a step"),
    (distill.main, "--device cuda:77", "is not available"),
    (distill.main, "--teacher absent.pt --alpha 1", "no checkpoint at absent.pt"),
    (distill.main, "--teacher nanogpt.pt --alpha 1", "not a distill.py checkpoint"),
    (distill.main, "--teacher foreign/ckpt.pt --alpha 1", "a different tokenizer"),
    (distill.main, "--teacher run/ckpt.pt --alpha 1", "exceeds the teacher's"),
    (distill.main, "--teacher run --alpha 1", "--teacher run"),  # a folder, of no model
    (distill.main, "--block_size 1M --batch_size 1", "shorter than one window of 1000000 tokens"),
    (evaluation.main, "foreign/ckpt.pt --data cut", "val.bin is cut off, it should have"),
    (evaluation.main, "run/ckpt.pt --data absent", "absent is not a corpus folder"),
    (model.main, "--to_hf run/ckpt.pt new --data other", "a different tokenizer"),
    (sweep.main, f"--student s@1.5 {SWEEP}", "'s@1.5' is not a model"),
    (sweep.main, "--data other --out new", "no out-of-distribution set"),
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


def test_help_and_a_terminal_that_lacks_a_letter(tmp_path, monkeypatch, capsys):
    for main in (data.main, distill.main, evaluation.main, sweep.main, model.main):
        code, out, _ = call(main, ["--help"], monkeypatch, capsys)
        assert code == 0 and "python " in out and ("(default:" in out or "seed: int = 1 " in out)
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, made_up())))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp866"))
    code, out, err = call(sweep.main, ["--report", tmp_path], monkeypatch, capsys)
    sys.stdout.flush()
    assert code == 0 and b"reproduced" in sys.stdout.buffer.getvalue(), err
    monkeypatch.setattr(sys, "stdout", io.StringIO())         # as in a notebook: it cannot be reconfigured
    data.run_main(lambda: print("ran"))
    assert sys.stdout.getvalue() == "ran\n"


def test_a_text_that_is_read_more_than_once_is_said_to_be(made, tmp_path, monkeypatch, capsys):
    n = data.load_meta(made / "other")["sets"]["train"]["tokens"]
    for times in (1, 3):
        run = config(str(made / "other"), tmp_path / str(times), size="bigram", tokens=times * n)
        code, out, err = call(distill.main, flags(run), monkeypatch, capsys)
        assert code == 0 and len(err) == (times == 3)
    assert f"has {n:,} tokens to train on: a run of {3 * n:,} reads them 3.0 times" in err[0]
    table = str(tmp_path / "1" / "ckpt.pt")                   # a teacher at any context length
    distill.train(config(str(made / "other"), tmp_path / "long", teacher=table, alpha=(0.5,), block_size=64))


def test_numbers_with_units_and_names_of_models():
    for text, number in (("3000000", 3 * 10**6), ("1.5M", 1_500_000), ("0.7B", 7 * 10**8), ("2k", 2000)):
        assert data.whole_number(text) == number
    for text in ("", "M", "1.5", "1.2345K", "inf", "nan", "1MK", "1 M x"):
        with pytest.raises(ValueError):
            data.whole_number(text)
    for tokens in (1, 999, 1000, 1024, 1000001, 1000002, 3 * 2**19, 1500000, 2**21, 50 * 10**9, 10**9 + 1):
        assert evaluation.parse_model(evaluation.model_name("xs", tokens)) == ("xs", tokens)

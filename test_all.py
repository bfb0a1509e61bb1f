"""
Every promise of the other files, checked: python -m pytest -q

What others have written we compare with: torch's own losses and FLOP counter, tiktoken's educational
encoder, transformers' Llama. Otherwise a plain version stands here, or a property.
"""
import dataclasses
import functools
import hashlib
import io
import json
import logging
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
from extras import brackets, hf

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
    """A small corpus: made-up programs, in domain and in three sets outside, and a poem."""
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
    return [f"--{name}=" + str(value).lower() if isinstance(value, bool) else f"--{name}={value}"
            for name, value in vars(config).items()]


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """Checkpoints in folders: a teacher, and alpha_0, alpha_0.25 and alpha_1, students of it."""
    folder = tmp_path_factory.mktemp("trained")
    teacher = distill.train(config(corpus, folder / "teacher", size="s", seed=9, tokens=16384))
    for alpha in (0, 0.25, 1):
        taught = dict(teacher=teacher, alpha=alpha) if alpha else {}
        distill.train(config(corpus, folder / f"alpha_{alpha}", **taught))
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


def test_forward_is_causal_and_generate_follows_it():
    m, idx = tiny(), torch.randint(61, (2, 24))
    logits, changed = m(idx), idx.clone()
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
        path = distill.train(config(corpus, tmp_path / size, size=size, tokens=9000))
        table, _ = model.load_checkpoint(path)
        probs = table(torch.arange(300)[None])[0].exp().double()
        assert torch.allclose(probs.sum(-1), torch.ones(300).double(), atol=1e-5) and (probs > 0).all()
        for last in range(300):
            n = sum(pairs[last, j] for j in range(300))
            share = n / (n + sum((last, j) in pairs for j in range(300))) if n else 0
            for i in range(0, 300, 7):
                bigram = share * pairs[last, i] / n + (1 - share) * unigram[i] if n else unigram[i]
                assert abs(probs[last, i] - (bigram if size == "bigram" else unigram[i])) < 1e-6


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_repeated_keys_are_shared_ones(n_kv_head):
    """Off the CPU keys and values are repeated: the same outputs and gradients."""
    m, x = tiny(n_kv_head).layers[0].self_attn, torch.randn(2, 9, 32)
    class Elsewhere(torch.Tensor):                            # says that it is on a GPU
        device = torch.device("cuda")
    found = []
    for kind in (torch.Tensor, Elsewhere):
        y = m(x.as_subclass(kind), *model.rotary_table(9, 8)).as_subclass(torch.Tensor)
        found.append([y, *torch.autograd.grad(y.square().sum(), m.parameters())])
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(*found))


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
    texts = ["", "a", "a b\n1", "abab" * 100, "aaaaa aaaa aaa", "\0 \0\0", code[:9000]]
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


@pytest.mark.parametrize("ends", ["\n\n", "\n", " "])
def test_prepare_keeps_every_document_and_its_counts(ends, corpus, tmp_path):
    text = ends.join(f"paragraph {i} " + "x é 漢 " * (i % 50) for i in range(2000))   # also all in one line
    short = ["one short document", "another\n\nof two verses " * 80]
    (tmp_path / "a.txt").write_text(data.END_OF_TEXT.join([*short, text]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("other text " * 1000)
    out, files = str(tmp_path / "out"), ([str(tmp_path / "a.txt")], {"b": str(tmp_path / "b.txt")})
    shutil.copytree(corpus, out)                              # what an unfinished one leaves does not count
    Path(out, "meta.json").unlink()
    meta, documents = data.prepare("text", out, 280, *files), {}
    assert [*evaluation.evaluation_sets(out)] == ["in_domain", "ood/b"] and "versions" not in meta
    assert meta["vocab_size"] == meta["n_vocab"] == 280 == data.load_tokenizer(out).n_vocab
    for name, known in meta["sets"].items():
        ids = np.fromfile(f"{out}/{name}.bin", np.uint16).tolist()
        *documents[name], rest = data.load_tokenizer(out).decode(ids).split(data.END_OF_TEXT)
        assert rest == "" and known["documents"] == len(documents[name]) and known["tokens"] == len(ids)
    pieces = [piece for _, piece in data.pieces(tmp_path / "a.txt")]
    assert sorted(documents["train"] + documents["val"]) == sorted(pieces)
    assert pieces[:2] == short and "".join(pieces[2:]) == text
    sizes = [len("".join(piece.split())) for piece in pieces]
    assert max(sizes) <= 4000 and min(sizes[2:-1]) >= 2000
    assert all(piece.endswith(ends) for piece in pieces[2:-1]) or ends == " "
    assert data.prepare("text", out, 280, *files) == meta
    (tmp_path / "b.txt").write_text("other text " * 1001)     # the same call, of a changed file
    with pytest.raises(data.UserError, match="a different corpus"):
        data.prepare("text", out, 280, *files)


@pytest.mark.parametrize("vocab_size", [512, "gpt2"])
def test_windows_of_a_long_document_have_no_end_of_text(vocab_size, tmp_path, monkeypatch):
    like_gpt2 = data.make_encoding(data.train_bpe(poem(3), 300), data.PATTERN)
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: like_gpt2)     # five characters a token
    words = np.random.default_rng(0).choice(["rose", "moon", "sea", "and", "of", "star\n\n"], 1_100_000)
    (tmp_path / "long.txt").write_text(" ".join(words))
    assert 5e6 < (tmp_path / "long.txt").stat().st_size
    meta = data.prepare("text", str(tmp_path / "out"), vocab_size, [str(tmp_path / "long.txt")])
    assert 400 < sum(s["documents"] for s in meta["sets"].values()) < 1000
    ids, n = data.load_windows(f"{tmp_path}/out/train.bin", 1024)
    windows = ids[:n * 1024].reshape(n, 1024)
    assert (windows != meta["n_vocab"] - 1).all(1).mean() > 0.4
    assert meta["vocab_size"] == (50_304 if vocab_size == "gpt2" else meta["n_vocab"])


def test_split_moves_nothing_when_a_file_is_added():
    documents = [(f"pkg/file{i}.py", f"text {i}") for i in range(2000)]
    one = data.split_documents(documents, {"far": [("f", "far away"), ("copy", "text 3")]})
    two = data.split_documents(documents + [(f"new/{i}.py", f"new {i}") for i in range(50)], {})
    assert set(one["val"]) <= set(two["val"]) and set(one["train"]) <= set(two["train"])
    assert 0.03 < len(one["val"]) / 2000 < 0.07
    assert one["ood_far"] == [("f", "far away")]              # a copy of an in-domain document tests nothing
    assert [d for d in two["train"] if d in one["train"]] == one["train"]


def test_texts_that_are_equal_but_for_white_space_come_once(tmp_path):
    documents = [(f"{i}.py", f"def f():\n    return {i}\n") for i in range(200)]
    copies = [(f"copy/{name}", text.replace("\n", "  \r\n\t")) for name, text in documents]
    sets = data.split_documents(documents + copies, {"far": [copies[0], ("f", "far away")]})
    texts = ["".join(text.split()) for name in ("train", "val") for _, text in sets[name]]
    assert len(texts) == len(set(texts)) == 200 and sets["ood_far"] == [("f", "far away")]
    text = poem(300)                                          # its copy is cut at the same places
    (tmp_path / "text.txt").write_text(text)
    once = data.pieces(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text(text + "\n\n" + text.replace("\n", "  \n"))
    assert len(data.distinct(data.pieces(tmp_path / "text.txt"), set())) < 1.1 * len(once) < 200


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


def test_python_documents_are_of_what_is_installed(tmp_path, monkeypatch):
    in_domain, ood = data.python_documents()
    assert {name.split("/")[0] for name, _ in in_domain} == {"stdlib", "torch"} and all(ood.values())
    assert not any("_sysconfigdata" in name or "site-packages" in name for name, _ in in_domain)
    few = in_domain[:99], {name: documents[:9] for name, documents in ood.items()}
    monkeypatch.setattr(data, "python_documents", lambda: few)
    packages = [SimpleNamespace(name="numpy", version="1.2"), SimpleNamespace(name="other", version="3")]
    monkeypatch.setattr(data.importlib.metadata, "distributions", lambda: packages)   # and no sympy
    meta = data.prepare("python", str(tmp_path), 260)
    assert meta["versions"] == {"python": sys.version.split()[0], "numpy": "1.2"}
    assert [*meta["sets"]] == ["train", "val", *(f"ood_{name}" for name in ood)]


def test_two_that_make_one_folder_at_once_end_well(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(poem(200))
    metas, plain = [], data.write_set
    arguments = "text", str(tmp_path / "out"), 270, [str(tmp_path / "a.txt")]
    def write_set(path, *rest):                               # in the midst of one the other runs
        monkeypatch.setattr(data, "write_set", plain)
        metas.append(data.prepare(*arguments))
        Path(path).write_bytes(b"half of")
        assert digests() == {name: known["sha256"] for name, known in metas[0]["sets"].items()}
        return plain(path, *rest)
    def digests():
        return {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "out").glob("*.bin")}
    monkeypatch.setattr(data, "write_set", write_set)
    meta = data.prepare(*arguments)
    assert metas == [meta] and digests() == {name: known["sha256"] for name, known in meta["sets"].items()}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"train.bin", "val.bin", "vocab.tiktoken", "meta.json"}


@pytest.mark.parametrize("damage, word", [
    (lambda meta: meta[:-9], "meta.json is cut off: delete"),
    (lambda meta: meta.replace('"format": 6', '"format": 5'), "made by another version: delete it"),
    (lambda meta: json.dumps({**json.loads(meta), "arguments": {"corpus": "python"}}), "by another version")])
def test_a_folder_that_is_damaged_or_old_is_refused(damage, word, corpus, tmp_path, monkeypatch, capsys):
    shutil.copytree(corpus, tmp_path / "old")
    meta = (tmp_path / "old" / "meta.json").read_text()
    (tmp_path / "old" / "meta.json").write_text(damage(meta))
    code, _, err = call(data.main, ["--out", tmp_path / "old"], monkeypatch, capsys)
    assert code == 2 and len(err) == 1 and word in err[0] and "old" in err[0]
    with pytest.raises(data.UserError, match=word):
        data.load_tokenizer(tmp_path / "old")
    (tmp_path / "old" / "meta.json").write_text(meta)
    assert data.load_meta(tmp_path / "old") == json.loads(meta)


def test_home_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text(poem(200))
    (tmp_path / "b.txt").write_text(poem(3)[::-1])
    argv = "--corpus text --train ~/a.txt --ood b=~/b.txt --out=~/new --vocab_size 260"
    code, out, err = call(data.main, argv.split(), monkeypatch, capsys)
    assert code == 0 and "ood_b" in out and (tmp_path / "new" / "meta.json").exists(), err


@pytest.mark.parametrize("lines", [1, 10**5])                 # found out by the flush at the end, or before
def test_a_closed_pipe_is_no_error(lines, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    stdout = open(writing, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as stop:
        data.run_main(lambda: print("a line\n" * lines))
    stdout.close()                                            # as Python does at exit
    assert stop.value.code == 1 and capfd.readouterr().err == ""


# ---- extras/brackets.py ------------------------------------------------------

def test_items_are_what_they_say(corpus, tmp_path, monkeypatch, capsys):
    texts = [text for _, text in programs(40)]
    items = brackets.bracket_items(texts, 100)
    assert items == brackets.bracket_items(texts, 100) and len(items) == 100
    for k, item in enumerate(items):
        context, (one, other), label = item["context"], item["choices"], item["label"]
        assert any(context + item["choices"][label] in text for text in texts)
        assert len(context) <= 280 and context[-1].isalnum() and len(one) <= 31
        assert one[0] + other[0] == ")]" and one[1:] == other[1:] and label == k % 2
        at, depth = len(context), 1                           # the bracket is open, and near
        while depth:
            at -= 1
            depth += (context[at] in ")]}") - (context[at] in "([{")
        assert context[at] == "(["[label] and 8 <= len(context) - at <= 200
    of_corpus = brackets.corpus_items(corpus, 80)             # of 45 files outside and a few of val
    written = "".join(data.load_tokenizer(corpus).decode(data.load_tokens(f"{corpus}/{name}.bin").tolist())
                      for name in brackets.SETS)
    assert len(of_corpus) == 80 and of_corpus == brackets.corpus_items(corpus, 80)
    assert all(item["context"] + item["choices"][item["label"]] in written for item in of_corpus)


def test_accuracy_is_of_sums_of_log_probabilities(corpus):
    """One choice at a time, without batches or padding, as the definition has it."""
    encoding, m = data.load_tokenizer(corpus), tiny(vocab_size=300)
    items = brackets.corpus_items(corpus, 80) + [
        {"context": "x = 1\n" * 100 + "y", "choices": [" a", " long" * 20], "label": 0},  # over the context
        {"context": "x", "choices": [" long" * 20, " gone" * 20], "label": 1},
        {"context": "y", "choices": ["~" * 30, "^" * 12], "label": 1},                    # a byte a token
        {"context": "", "choices": ["y", "z1"], "label": 0}]
    right = []
    for item in items:
        sums = []
        for choice in item["choices"]:
            ids = encoding.encode_ordinary(choice)[-24:]
            row = [encoding.eot_token, *encoding.encode_ordinary(item["context"])]
            row = [*row, *encoding.encode_ordinary(choice)][-25:]
            logp = m(torch.tensor([row[:-1]]))[0].log_softmax(-1)
            sums.append(sum(logp[k - 1, row[k]].item() for k in range(len(row) - len(ids), len(row))))
        right.append(np.argmax(sums) == item["label"])
        assert brackets.accuracy(m, encoding, [item]) == right[-1]
    assert brackets.accuracy(m, encoding, items) == np.mean(right) and 0 < np.mean(right) < 1


def test_brackets_prints_a_line_a_checkpoint(corpus, trained, made, monkeypatch, capsys):
    paths = [trained / name / "ckpt.pt" for name in ("alpha_0", "alpha_1", "alpha_0")]
    code, out, err = call(brackets.main, [*paths, "--data", corpus, "--items", 80], monkeypatch, capsys)
    of = regex.findall(r": (\S+) % of 80 items(?:, (\S+) points)?$", out, regex.M)
    assert code == 0 and of[0] == (of[2][0], "") and of[2][1] == "+0.0", err
    assert abs(float(of[1][1]) - float(of[1][0]) + float(of[0][0])) < 0.11
    argv = [made / "foreign" / "ckpt.pt", "--data", made / "other"]
    code, _, err = call(brackets.main, argv, monkeypatch, capsys)
    assert code == 2 and len(err) == 1 and "lacks ood_networkx, ood_numpy, ood_sympy" in err[0]


# ---- extras/hf.py ------------------------------------------------------------

@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_exported_folder_is_transformers_llama(n_kv_head, corpus, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    m, meta = tiny(n_kv_head, 300), data.load_meta(corpus)
    model.save_checkpoint(tmp_path / "m.pt", m, settings={"tokenizer": meta["tokenizer"]})
    argv = [tmp_path / "m.pt", tmp_path / "hf", "--data", corpus]
    code, out, err = call(hf.main, argv, monkeypatch, capsys)
    assert code == 0 and "AutoModelForCausalLM" in out, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    idx = torch.randint(300, (3, 24))
    with torch.no_grad():
        assert torch.allclose(m(idx), theirs(idx).logits, atol=1e-4)
    for file, name in (("config.json", "rope_theta"), ("tokenizer_config.json", "tokenizer_class")):
        assert json.loads((tmp_path / "hf" / file).read_text())[name] in (5e5, "PreTrainedTokenizerFast")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    encoding = data.load_tokenizer(corpus)
    for text in ((HERE / "model.py").read_text(), "naïve 漢\r\n\t  x ", ""):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
    assert tokenizer.encode(data.END_OF_TEXT) == [encoding.eot_token] == [tokenizer.eos_token_id]


def test_a_table_is_not_exported(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)    # it is refused before transformers is needed
    table, meta = model.Table(model.GPTConfig(300, counts=2)), data.load_meta(corpus)
    model.save_checkpoint(tmp_path / "m.pt", table, settings={"tokenizer": meta["tokenizer"]})
    argv = [tmp_path / "m.pt", tmp_path / "hf", "--data", corpus]
    code, _, err = call(hf.main, argv, monkeypatch, capsys)
    assert code == 2 and len(err) == 1 and "is a table of counts" in err[0]
    assert not (tmp_path / "hf").exists()


@pytest.fixture(scope="session")
def exported(corpus, trained, tmp_path_factory):
    """A folder of transformers: the teacher, exported."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported") / "teacher"
    hf.to_hf(str(trained / "teacher" / "ckpt.pt"), str(folder), corpus)
    return folder


def padded_corpus(folder, out, vocab_size):
    """A copy of a corpus folder with more ids than its tokenizer has, as one in GPT-2's tokens."""
    shutil.copytree(folder, out)
    (out / "meta.json").write_text(json.dumps(data.load_meta(folder) | {"vocab_size": vocab_size}))
    return str(out)


def test_an_exported_teacher_gives_our_logits_in_float32_and_no_warning(
        corpus, trained, exported, tmp_path, monkeypatch, caplog):
    import transformers
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ours, _ = model.load_checkpoint(str(trained / "teacher" / "ckpt.pt"))
    theirs, outputs = hf.ForeignTeacher(str(exported), corpus, 300), []
    theirs.model.register_forward_hook(lambda module, args, out: outputs.append([*out]))
    idx = torch.randint(300, (2, 32))
    with torch.no_grad():
        assert torch.allclose(ours(idx), theirs(idx), atol=1e-4)
    assert theirs.config.block_size == 32 and not caplog.records
    assert outputs == [["logits"]]                            # no cache of keys and values
    half = tmp_path / "half"
    shutil.copytree(exported, half)
    transformers.AutoModelForCausalLM.from_pretrained(exported).bfloat16().save_pretrained(half)
    teacher = hf.ForeignTeacher(str(half), corpus, 300)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_ids_that_the_corpus_does_not_use_are_out_of_a_teachers_distribution(
        corpus, made, exported, tmp_path):
    import transformers
    gpt2, spaces = str(tmp_path / "gpt2"), str(tmp_path / "spaces")
    shutil.copytree(exported, gpt2)
    shape = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2,
                                    bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(shape).save_pretrained(gpt2)
    hf.to_hf(str(made / "foreign" / "ckpt.pt"), spaces, str(made / "other"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(spaces)
    assert tokenizer.add_tokens(["    "]) == 1 and tokenizer.encode("    ") == [258]
    larger = transformers.AutoModelForCausalLM.from_pretrained(spaces)
    larger.resize_token_embeddings(259)
    tokenizer.save_pretrained(spaces), larger.save_pretrained(spaces)
    for folder, known, n_vocab in ((gpt2, corpus, 300), (spaces, made / "other", 258)):
        teacher = hf.ForeignTeacher(folder, padded_corpus(known, tmp_path / str(n_vocab), 304), 304)
        idx = torch.randint(n_vocab, (1, 8))
        logits = teacher(idx)
        assert logits.shape == (1, 8, 304) and teacher.config.vocab_size == 304
        assert (logits[..., n_vocab:] == -1e9).all() and (logits[..., :n_vocab] > -1e3).all()
        with torch.autocast("cpu", torch.float16):
            logits = teacher(idx)
        assert logits.dtype == torch.float16 and (logits[..., n_vocab:] == -65504).all()
        assert logits.isfinite().all()


def test_a_foreign_teacher_that_does_not_fit_is_refused_in_a_line(
        corpus, made, exported, tmp_path, monkeypatch):
    transformers, files = pytest.importorskip("transformers"), pytest.importorskip("safetensors.torch")
    def folder(name, change=dict, **more):
        """A copy of the exported folder, its weights and its config.json changed."""
        path = tmp_path / name
        shutil.copytree(exported, path)
        weights = change(files.load_file(path / "model.safetensors"))
        files.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        known = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(known | more))
        return str(path)
    def refused(name, words, data_dir=corpus):
        with pytest.raises(data.UserError, match=words) as error:
            hf.ForeignTeacher(str(name), data_dir, 300)
        assert "\n" not in str(error.value)
    hf.ForeignTeacher(folder("unchanged"), corpus, 300)       # a tied head is not missing
    more = folder("more", lambda w: w | {"model.layers.0.attn.bias": torch.ones(2)})
    hf.ForeignTeacher(more, corpus, 300)                      # nor does a buffer of an older version matter
    lacks = "lacks these weights, or has them in another shape: "
    prefix = folder("prefix", lambda w: {f"backbone.{key}": value for key, value in w.items()})
    refused(prefix, lacks + r"[\w.]+, [\w.]+, [\w.]+, \.\.\.$")
    refused(folder("headless", tie_word_embeddings=False), lacks + "lm_head.weight$")
    narrow = folder("narrow", lambda w: w | {"model.norm.weight": torch.ones(8)})
    refused(narrow, lacks + "model.norm.weight$")
    pointer = tmp_path / "pointer"
    shutil.copytree(exported, pointer)
    (pointer / "model.safetensors").write_text("version https://git-lfs\noid sha256:0\n")
    refused(pointer, "pointer is neither a .pt file nor a model that transformers loads: .")
    refused(exported, "does not give the tokens of", str(made / "other"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(exported, "is not a .pt file: pip install transformers")


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

def log_of(folder):
    return [json.loads(line) for line in open(Path(folder, "log.jsonl"))]


def without_times(folder):
    return [{**line, "tokens_per_s": 0} for line in log_of(folder)]


def test_learning_rate_and_decay():
    c = distill.Config(lr=1.0, min_lr=0.1, warmup=0.1, tokens=200 * 1024)
    rates = [distill.learning_rate(c, s) for s in range(200)]
    assert rates[0] == 1 / 20 and max(rates) == rates[19] == 1.0 and 0.1 < rates[-1] < 0.101
    assert all(a > b for a, b in zip(rates[20:], rates[21:])) and abs(rates[110] - 0.55) < 1e-9
    peaks = [distill.learning_rate(distill.Config(size=size, warmup=0), 0) for size in ("m", "124M", "350M")]
    assert np.allclose(peaks, [4e-3, 5e-4, 3.75e-4])          # near GPT-3's for the larger
    optimizer = distill.make_optimizer(c, model.GPT(model.GPTConfig()))
    for group, decay, dims in zip(optimizer.param_groups, (0.1, 0.0), (2, 1)):
        assert group["weight_decay"] == decay and {p.dim() for p in group["params"]} == {dims}
        assert group["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("more", [{}, dict(top_k=3), dict(temperature=2.0, fused=False)], ids=str)
def test_the_log_begins_with_the_loss_by_hand(more, corpus, trained, tmp_path):
    """From the initial weights and the first batch: ce, kl, and the norm of the gradient, then clipped."""
    taught = config(corpus, tmp_path, teacher=str(trained / "teacher" / "ckpt.pt"), alpha=0.3, tokens=256,
                    log_every=1, grad_clip=0.01, **more)
    grads = []
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda self, *args: (
            grads.append([p.grad.clone() for group in self.param_groups for p in group["params"]]),
            step(self, *args))[1])
        distill.train(taught)
    torch.manual_seed(taught.seed)
    m = model.GPT(model.GPTConfig(300, 32, **model.SIZES["xs"]))
    teacher, _ = model.load_checkpoint(taught.teacher)
    x, y = data.Batches(f"{corpus}/train.bin", 4, 32, taught.seed)[0]
    z, t, T = m(x).flatten(0, 1), teacher(x).flatten(0, 1).detach(), taught.temperature
    if taught.top_k:
        t = t.masked_fill(t < t.topk(3).values[:, -1:], -1e9)
    ce = F.cross_entropy(z, y.flatten())
    kl = F.kl_div((z / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")
    (0.7 * ce + 0.3 * T**2 * kl).backward()
    norm = torch.stack([p.grad.norm() for p in m.parameters()]).norm().item()
    first = log_of(tmp_path)[0]
    assert abs(first["ce"] - ce.item()) < 1e-4 and abs(first["kl"] - kl.item()) < 1e-4
    assert abs(first["grad_norm"] / norm - 1) < 1e-3 and norm > 0.1
    clipped = torch.stack([g.norm() for g in grads[0]]).norm()
    assert abs(clipped - 0.01) < 1e-4
    whole, = [g for g in grads[0] if g.shape == m.lm_head.weight.shape]
    assert torch.allclose(whole / clipped, m.lm_head.weight.grad / norm, atol=1e-3)


def test_a_run_repeats_and_follows_alpha(corpus, trained, tmp_path):
    logs = {alpha: log_of(trained / f"alpha_{alpha}") for alpha in ("0", "0.25", "1")}
    assert logs["0"][-1]["ce"] < logs["0"][0]["ce"] - 0.5 and logs["0"][-1]["kl"] == 0
    assert logs["1"][-1]["kl"] < logs["0.25"][-1]["kl"]       # pure distillation comes nearest to the teacher
    again = distill.train(config(corpus, tmp_path, teacher=str(trained / "teacher" / "ckpt.pt"), alpha=0.25))
    assert same(weights(again), weights(trained / "alpha_0.25" / "ckpt.pt"))
    assert without_times(tmp_path) == without_times(trained / "alpha_0.25")


def test_a_finished_run_is_kept_and_another_refused(corpus, trained, tmp_path, monkeypatch, capsys):
    moved = str(shutil.copy(trained / "teacher" / "ckpt.pt", tmp_path / "moved.pt"))
    taught = config(corpus, trained / "alpha_0.25", teacher=moved, alpha=0.25)
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*.*")}
    code, out, err = call(distill.main, flags(taught), monkeypatch, capsys)
    assert code == 0 and f"finished before: delete {trained}/alpha_0.25 to train again" in err[0]
    assert f"eval.py {trained}/alpha_0.25/ckpt.pt" in out
    teacher, extra = model.load_checkpoint(moved)
    teacher.norm.weight.data += 1                             # another of the same settings
    model.save_checkpoint(tmp_path / "other.pt", teacher, **extra)
    for change in (dict(lr=1e-3), dict(alpha=0.5), dict(teacher=f"{tmp_path}/other.pt")):
        with pytest.raises(data.UserError, match="other settings"):
            distill.train(dataclasses.replace(taught, **change))
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*.*")} == before


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_other_ways_to_the_same_gradients(corpus, trained, tmp_path, monkeypatch, capsys):
    """Batches that add up, the plain loss, torch.compile, two ranks: two steps agree."""
    some = functools.partial(config, corpus, teacher=str(trained / "teacher" / "ckpt.pt"), alpha=0.3,
                             temperature=2.0, tokens=256, log_every=1, warmup=0.0)
    def run(name, **more):
        return weights(distill.train(some(tmp_path / name, **more)))
    plain, reference = run("plain"), run("reference", fused=False)
    works = distill.compiler(torch.device("cpu"))(run) is not run
    fast = run("fast", compile=True)
    run("parts", batch_size=2, accumulate=2)
    argv = [*TORCHRUN, "distill.py", *flags(some(tmp_path / "ranks", batch_size=2, accumulate=2))]
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("next: python eval.py") == 1, done.stderr
    for name in ("reference", "fast", "parts", "ranks"):
        assert len(log_of(tmp_path / name)) == 2
        for mine, theirs in zip(log_of(tmp_path / name), log_of(tmp_path / "plain")):
            for what in ("ce", "kl", "grad_norm"):
                assert math.isclose(mine[what], theirs[what], rel_tol=5e-3), (name, what)
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


STOP_AT = """
import os, signal, sys
import distill
from data import run_main
at, rate = int(sys.argv.pop(1)), distill.learning_rate
def stop(config, step):
    if step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(config, step)
distill.learning_rate = stop
run_main(distill.main)
"""


def stop_at(config, step):
    """Train in a process of its own, which is killed in the middle of a step."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, "-c", STOP_AT, str(step), *flags(config)], cwd=HERE, env=env,
                          capture_output=True, text=True).returncode


def test_a_run_that_is_killed_ends_as_if_never_stopped(corpus, trained, tmp_path):
    teacher, state = str(trained / "teacher" / "ckpt.pt"), tmp_path / "state.pt"
    parts = config(corpus, tmp_path, teacher=teacher, alpha=0.25, save_every=0)
    for step in (13, 30):
        assert stop_at(parts, step) == -9 and state.exists() and not (tmp_path / "ckpt.pt").exists()
        assert torch.load(state, weights_only=True)["step"] == step
        with open(tmp_path / "log.jsonl", "a") as f:
            f.write('{"step": 2')                             # killed in the middle of a line
    whole = state.read_bytes()
    state.write_bytes(whole[:20_000])
    with pytest.raises(data.UserError, match="state.pt is damaged .*: delete it"):
        distill.train(parts)
    state.write_bytes(whole)
    with pytest.raises(data.UserError, match="other settings"):
        distill.train(dataclasses.replace(parts, lr=1e-3))
    assert same(weights(distill.train(parts)), weights(trained / "alpha_0.25" / "ckpt.pt"))
    assert without_times(tmp_path) == without_times(trained / "alpha_0.25") and not state.exists()


def test_ranks_that_would_resume_from_different_steps_stop(corpus, tmp_path):
    assert stop_at(config(corpus, tmp_path / "0", save_every=0), 13) == -9     # the first rank has a state
    script = tmp_path / "apart.py"                            # two machines without a folder they share
    script.write_text("import os, sys\nsys.path.insert(0, os.getcwd())\nimport distill\n"
                      f"sys.argv.append('--out={tmp_path}/' + os.environ['RANK'])\n"
                      "distill.run_main(distill.main)")
    argv = [*TORCHRUN, str(script), *flags(config(corpus, tmp_path / "0", save_every=0))]
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True)
    assert done.returncode and "different steps: --out must be a folder they all share" in done.stderr


def test_a_loss_of_nan_stops_the_run_before_anything_is_saved(corpus, trained, tmp_path, monkeypatch):
    plain, calls = distill.distill_loss, []
    def breaks(*args, **more):
        calls.append(1)
        loss, ce, kl = plain(*args, **more)
        return loss * (math.nan if len(calls) == 21 else 1), ce, kl
    monkeypatch.setattr(distill, "distill_loss", breaks)
    saving = config(corpus, tmp_path, save_every=0.0, log_every=1000)
    with pytest.raises(data.UserError, match=r"NaN or inf \(between steps 1 and 20, learning rate 0.0"):
        distill.train(saving)
    assert not (tmp_path / "ckpt.pt").exists()
    monkeypatch.setattr(distill, "distill_loss", plain)       # and the state that was saved before is good
    assert same(weights(distill.train(saving)), weights(trained / "alpha_0" / "ckpt.pt"))
    def overflows(z, *rest):                                  # float16 stops once its scale is used up
        return torch.zeros(()), torch.zeros(()), torch.full_like(z, math.inf)
    monkeypatch.setattr(distill, "chunk_loss", overflows)
    with pytest.raises(data.UserError, match="overflows in float16, try --dtype bfloat16"):
        distill.train(config(corpus, tmp_path / "float16", dtype="float16"))


def test_a_full_disk_is_one_line_and_the_older_state_survives(corpus, tmp_path, monkeypatch):
    distill.save_file(tmp_path / "state.pt", {"step": 1})
    def full(obj, path):
        Path(path).write_text("half of")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.UserError, match="cannot write .*state.pt: is the disk full") as error:
        distill.save_file(tmp_path / "state.pt", {"step": 2})
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    assert torch.load(tmp_path / "state.pt", weights_only=True) == {"step": 1}


def test_the_same_command_twice_at_once(corpus, trained, tmp_path):
    run = config(corpus, tmp_path, save_every=0)
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    argv = [sys.executable, "distill.py", *flags(run)]
    both = [subprocess.Popen(argv, cwd=HERE, env=env, stdout=-3, stderr=-1) for _ in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert same(weights(tmp_path / "ckpt.pt"), weights(trained / "alpha_0" / "ckpt.pt"))


def test_an_exported_teacher_teaches_as_its_checkpoint_does(corpus, trained, exported, tmp_path):
    for name, teacher in (("ours", trained / "teacher" / "ckpt.pt"), ("theirs", exported)):
        distill.train(config(corpus, tmp_path / name, teacher=str(teacher), alpha=0.5, tokens=256,
                             log_every=1))
    for one, other in zip(log_of(tmp_path / "ours"), log_of(tmp_path / "theirs")):
        assert math.isclose(one["kl"], other["kl"], rel_tol=1e-3)
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-3)


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
    more = dict(teacher=distill.train(on_gpu(tmp_path / "teacher")), alpha=0.5)
    whole = distill.train(on_gpu(tmp_path / "whole", **more))
    distill.train(config(corpus, tmp_path / "cpu", **more))
    assert stop_at(on_gpu(tmp_path / "parts", **more), 40) == -9
    parts = distill.train(on_gpu(tmp_path / "parts", **more))
    for a, b in zip(weights(whole).values(), weights(parts).values()):
        assert (a - b).norm() < 0.02 * a.norm() + 1e-3
    ends = [log_of(tmp_path / name)[-1]["ce"] for name in ("whole", "parts", "cpu")]
    assert max(ends) - min(ends) < 0.05
    on_cpu, on_card = (evaluation.evaluate(model.load_checkpoint(whole, device)[0], corpus, 16)
                       for device in ("cpu", "cuda"))
    assert all(abs(on_cpu[name] - on_card[name]) < 0.02 for name in on_cpu)


# ---- eval.py -----------------------------------------------------------------

def test_evaluate_is_the_mean_loss_and_the_share_of_tokens_that_are_likeliest(corpus, trained, monkeypatch):
    m, _ = model.load_checkpoint(str(trained / "teacher" / "ckpt.pt"))
    sets = evaluation.evaluation_sets(corpus)
    assert [*sets] == ["in_domain", "ood/sympy", "ood/numpy", "ood/networkx", "ood/poem"]
    found = evaluation.evaluate(m, corpus, 10**6)
    assert found.keys() == {*sets, *(f"accuracy/{name}" for name in sets)}
    for name, path in sets.items():
        tokens = torch.from_numpy(data.load_tokens(path).astype(np.int64))
        n = (len(tokens) - 1) // 32
        with torch.no_grad():
            z, y = m(tokens[:n * 32].view(n, 32)).flatten(0, 1), tokens[1:n * 32 + 1]
        assert abs(found[name] - F.cross_entropy(z, y).item()) < 1e-4
        assert abs(found[f"accuracy/{name}"] - (z.argmax(-1) == y).double().mean()) < 1e-3
    fewer = evaluation.read_windows(sets["ood/poem"], 32, 5)
    every = evaluation.read_windows(sets["ood/poem"], 32, 10**6)
    assert torch.equal(fewer, every[[k * len(every) // 5 for k in range(5)]])
    parts, forward = [], model.GPT.forward                    # in parts that fit the cache
    monkeypatch.setattr(model.GPT, "forward", lambda self, x: (parts.append(len(x)), forward(self, x))[1])
    losses, hits = evaluation.token_losses(m, every)
    assert losses.shape == hits.shape == every[:, 1:].shape and len(parts) > 1 and sum(parts) == len(every)
    assert max(parts) * 33 * 300 <= 2**19 and hits.dtype == torch.bool


def test_eval_prints_tables_and_samples(corpus, trained, monkeypatch, capsys):
    paths = [str(trained / name / "ckpt.pt") for name in ("alpha_0", "alpha_0.25")]
    argv = [paths[0], "--data", corpus, paths[1], "--windows", 16]
    code, out, err = call(evaluation.main, [*argv, "--sample", "def "], monkeypatch, capsys)
    assert code == 0 and "def " in out, err
    code, out, err = call(evaluation.main, argv, monkeypatch, capsys)
    assert code == 0 and "tokens, seed 1, alpha 0.25 from s" in out, err
    one, two = (evaluation.evaluate(model.load_checkpoint(path)[0], corpus, 16) for path in paths)
    table = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for name, sign in (("ood/poem", -1), ("accuracy/ood/poem", 1)):
        gain = sign * (two[name] - one[name])
        assert table[name] == [f"{one[name]:.4f}", f"{two[name]:.4f}", f"({gain:+.4f})"]
    for prefix in ("", "accuracy/"):
        outside = np.mean([x for name, x in one.items() if name.startswith(prefix + "ood/")])
        assert table[prefix + "ood, mean"][0] == f"{outside:.4f}"


# ---- eval.py: the findings ---------------------------------------------------

STUDENT = "s@8M"
# name: own loss in domain; {alpha: (gain in domain, gain outside, points of accuracy outside)}
PAPER = {"bigram@32M": (3.5, {0.25: (-0.03, 0.002, 0.1), 1.0: (-1.0, -1.0, -9)}),
         "xs@2M": (2.9, {0.25: (-0.01, 0.02, 0.6), 1.0: (-0.2, -0.1, -2)}),
         "xs@8M": (2.8, {0.25: (-0.01, 0.05, 0.9), 1.0: (-0.2, -0.1, -2)}),
         "xs@32M": (2.7, {0.25: (0.01, 0.06, 1.0), 1.0: (-0.2, -0.1, -2)}),
         "s@32M": (2.4, {0.25: (0.03, 0.05, 0.9), 1.0: (0.05, 0.14, 2)}),
         "m@32M": (2.2, {0.25: (0.03, 0.06, 0.8), 1.0: (0.05, 0.14, 2)})}
FLOPS = {"bigram": 0, "xs": 1, "s": 2, "m": 4}


def made_up(teachers=PAPER, seeds=(0, 1, 2, 3), noise=0.001, twice=(0.3, 0.24, 3.0)):
    """
    Rows in which the student alone has losses of 2.5 in domain and 3.0 outside, and an accuracy of 50 %. The
    first seed tries every alpha, the others the better one. twice: what twice the text gains. A seed adds
    noise (a number, or one for each teacher) to the gains outside.
    """
    def row(model, seed, inside, outside, accuracy, teacher=None, alpha=0.0):
        metrics = {"in_domain": inside, "ood/a": outside - 0.1, "ood/b": outside + 0.1}
        metrics["accuracy/in_domain"] = 0.6
        metrics |= {f"accuracy/ood/{name}": 0.5 + accuracy / 100 for name in "ab"}
        size, tokens = evaluation.parse_model(model)
        return dict(model=model, seed=seed, teacher=teacher, teacher_seed=teacher and 0, alpha=alpha,
                    setup={"corpus": "c", "block_size": 128, "vocab_size": 512, "text": 10**7}, seconds=1.0,
                    flops=float(FLOPS[size] * tokens), teacher_flops=4e6 * bool(teacher), metrics=metrics)
    rows = [row(name, 0, loss, loss + 0.5, 0.0) for name, (loss, _) in teachers.items()]
    for seed in seeds:
        level = 0.05 * seed                                   # seeds differ, and pairing takes that out
        def lucky(name):
            return (seed - 2) * (noise.get(name, 0.0) if isinstance(noise, dict) else noise)
        more = twice[1] + (lucky("twice") if isinstance(noise, dict) else 0)
        rows += [row(STUDENT, seed, 2.5 + level, 3.0 + level, level),
                 row("s@16M", seed, 2.5 + level - twice[0], 3.0 + level - more, level + twice[2])]
        for name, (_, gains) in teachers.items():
            luck = lucky(name)
            top = max(gains, key=lambda alpha: gains[alpha][1])
            for alpha, (inside, outside, accuracy) in gains.items():
                if seed == seeds[0] or alpha == top:
                    rows.append(row(STUDENT, seed, 2.5 + level - inside, 3.0 + level - outside - luck,
                                    level + accuracy + 100 * luck, name, alpha))
    return rows


def change(**gains):
    """PAPER with other gains at alpha 0.25 (as xs_32M=(0.1, 0.1, 1.0))."""
    new = {name.replace("_", "@"): gain for name, gain in gains.items()}
    return {name: (loss, {0.25: new[name], 1.0: (-9, -9, -9)} if name in new else at)
            for name, (loss, at) in PAPER.items()}


def of(rows, claim=None):
    """-> the verdicts, or the evidence of one claim."""
    found = evaluation.findings(evaluation.study(rows, STUDENT))
    return found[claim][2] if claim is not None else [verdict for _, verdict, _ in found]


YES, NO, MAYBE, FEW, UNTESTED = "reproduced", "not reproduced", "undecided", "too few seeds", "not tested"
WEAK = [name for name in PAPER if name.startswith("xs")]
VERDICTS = [
    (made_up(), [YES] * 5),
    (made_up(seeds=(0, 1, 2)), [FEW] * 5),
    (made_up({name: PAPER[name] for name in ("s@32M", "m@32M")}), [UNTESTED] * 5),
    (made_up({name: PAPER[name] for name in WEAK}), [YES, UNTESTED, YES, YES, UNTESTED]),
    (made_up(change(xs_2M=(0, -0.04, -1), xs_8M=(0, -0.05, -1), xs_32M=(0, -0.06, -1))),
     [NO, YES, YES, NO, NO]),                                 # from a step that harms to one that harms
    (made_up(noise={name: 0.1 for name in WEAK}), [MAYBE, MAYBE, YES, MAYBE, MAYBE]),
    (made_up(change(xs_32M=(0, 0.14, 1))), [YES, MAYBE, NO, YES, YES]),   # 0, then 0; 0.015, then 0.045
    (made_up(change(m_32M=(0.1, 0.3, 1))), [YES, NO, YES, YES, YES]),
    (made_up(change(s_32M=(0.1, 0.06, 1), m_32M=(0.1, 0.06, 1)), noise={"s@32M": 0.01}),
     [YES, MAYBE, YES, YES, YES]),
    (made_up(change(bigram_32M=(-0.03, 0.07, 3.0))), [YES, YES, YES, NO, NO]),  # a table gives more
    (made_up(noise={"bigram@32M": 0.1}), [YES, YES, YES, MAYBE, MAYBE]),
    (made_up(change(bigram_32M=(0.05, -0.07, -3.0))), [YES] * 5),         # a table that harms is no rival
    (made_up(noise={"twice": 0.3}), [YES, YES, YES, UNTESTED, YES]),           # 0.24 ± 0.75
    (made_up(twice=(-0.1, 0.2, 3.0)), [YES, YES, YES, UNTESTED, YES]),         # a small text, read often
    (made_up(twice=(0.1, -0.2, 3.0)), [YES, YES, YES, UNTESTED, YES]),
]


@pytest.mark.parametrize("rows, verdicts", VERDICTS, ids=map(str, range(len(VERDICTS))))
def test_verdicts(rows, verdicts):
    assert of(rows) == verdicts, "\n".join(of(rows, i) for i in range(5))


def test_a_gain_is_worth_text_and_a_teacher_costs_text(tmp_path):
    s = evaluation.study(made_up(noise=0.0), STUDENT)
    assert [(t.name, t.alpha, t.group) for t in s.teachers] == [
        ("bigram@32M", 0.25, "tables"), ("xs@2M", 0.25, "weak networks"), ("xs@8M", 0.25, "weak networks"),
        ("xs@32M", 0.25, "weak networks"), ("s@32M", 1.0, "strong networks"),
        ("m@32M", 1.0, "strong networks")]
    assert s.chooser == 0 and s.seeds == [1, 2, 3] and not s.left_out
    for t in s.teachers:
        inside, outside, accuracy = PAPER[t.name][1][t.alpha]
        assert np.allclose([t.inside, t.outside, t.accuracy], np.transpose([[inside, outside, accuracy]] * 3))
        assert np.allclose(t.worth_outside, 100 * (2 ** (outside / 0.24) - 1))
        assert np.allclose(t.worth_inside, 100 * (2 ** (inside / 0.3) - 1))
        assert np.allclose(t.worth_accuracy, 100 * (2 ** (accuracy / 3.0) - 1))
        training = FLOPS[t.size] * t.tokens                   # of the student: 2 * 8e6
        assert np.allclose([t.costs, t.costs_trained], [25, 25 + 100 * training / 16e6])
        assert np.allclose(t.worse, PAPER[t.name][0] - 2.6)   # than the mean of 2.55, 2.6, 2.65
    text = evaluation.write_report(made_up(), str(tmp_path))
    assert "Weak networks bring +0.043 ± 0.002 outside (xs@2M +0.020 ± 0.002" in text
    line, = [line for line in text.splitlines() if line.startswith("| xs@8M ")]
    assert line.split(" | ")[1:5] == ["weak networks", "+0.200", "0.25", "-0.010 ± 0.000"]


def test_evidence_is_of_the_values_that_are_judged():
    rows = made_up(noise={"xs@8M": 0.1})                      # Student's t: 4.303 * 0.1 / sqrt(3) / 3
    assert "Weak networks bring +0.043 ± 0.083 outside" in of(rows, 0) and "at alpha 1 -0.167." in of(rows, 0)
    # xs to s to m: 1, 2, 4 FLOPs a token: 0.06 to 0.14 to 0.14, a doubling each
    assert "brings +0.080 ± 0.000, +0.000 ± 0.000 outside; half the first minus the last: +0.040" in of(
        made_up(noise=0.0), 1)
    # 2M to 8M to 32M: two doublings each
    assert "brings +0.020 ± 0.000, +0.005 ± 0.000 outside; half the first minus the last: +0.005" in of(
        made_up(change(xs_8M=(0, 0.06, 1), xs_32M=(0, 0.07, 1)), noise=0.0), 2)
    worth = {name: [100 * (2 ** (gain / twice) - 1) for gain, twice in zip(gains[0.25][:2], (0.3, 0.24))]
             for name, (_, gains) in PAPER.items()}
    weak = np.mean([worth[name] for name in WEAK], axis=0)
    more = weak[1] - weak[0] - (worth["bigram@32M"][1] - worth["bigram@32M"][0])
    evidence = of(made_up(noise=0.0), 3)
    assert f"weak networks {weak[0]:+.0f} ± 0 % in domain and {weak[1]:+.0f} ± 0 % outside" in evidence
    assert f"{more:+.0f} ± 0 more than for the best table" in evidence
    assert "bring +0.83 ± 0.00 points of accuracy outside, the best table +0.10 ± 0.00: +0.73" in of(
        made_up(noise=0.0), 4)


def test_one_seed_chooses_alpha_and_the_others_test_it():
    rows = made_up(noise=0.0)
    for row in rows:                                          # on test seed 1 xs@8M is a disaster
        if (row["teacher"], row["seed"]) == ("xs@8M", 1):
            row["metrics"] |= {"ood/a": 9.0, "ood/b": 9.0}
    xs, = [t for t in evaluation.study(rows, STUDENT).teachers if t.name == "xs@8M"]
    assert xs.alpha == 0.25 and xs.outside[0] < -5 and np.allclose(xs.outside[1:], 0.05)
    assert np.allclose(xs.curve, [0.05, -0.1])
    assert evaluation.choose(rows[::-1], STUDENT)[0] == 0     # most students, wherever it stands in the file
    single = [row for row in rows if row["seed"] == 0]        # a single seed chooses and tests
    assert evaluation.study(single, STUDENT).seeds == [0] and of(single) == [FEW] * 5
    one_alpha = [row for row in rows if row["alpha"] in (0.0, 0.25) and row["teacher"] in (None, *WEAK)]
    assert evaluation.study(one_alpha, STUDENT).seeds == [0, 1, 2, 3]        # there is nothing to choose


def test_what_is_incomplete_is_left_out_and_named(tmp_path, monkeypatch):
    rows, expected = made_up(seeds=(0, 1, 2, 3, 4)), of(made_up(seeds=(0, 1, 2, 4)))
    for row in rows:
        if row["seed"] == 3:                                  # any row of it
            s = evaluation.study([other for other in rows if other is not row], STUDENT)
            assert s.seeds == [1, 2, 4] and s.left_out == ["seed 3"]
    left = [row for row in rows if row["seed"] != 3 or row["teacher"] != "s@32M"]
    text = evaluation.write_report(left, str(tmp_path))
    assert "Left out, because some of their models are missing: seed 3.\n" in text and "nan" not in text
    assert "Left out" not in evaluation.write_report(rows, str(tmp_path))
    later = PAPER | {"m@8M": (2.3, {0.25: (0, 0.1, 1), 1.0: (0, 0, 0)})}
    more = made_up(later, seeds=(0,))                         # on one seed only
    both = [*made_up(seeds=(0, 1, 2, 4)), *(row for row in more if "m@8M" in (row["teacher"], row["model"]))]
    assert of(both) == expected and evaluation.study(both, STUDENT).left_out == ["m@8M"]
    half = [row for row in rows if (row["teacher"], row["seed"], row["alpha"]) != ("xs@8M", 0, 1.0)]
    assert evaluation.study(half, STUDENT).left_out == ["xs@8M"]             # the chooser lacks an alpha
    nothing = [row for row in rows if row["model"] != "s@16M"]
    assert "No seed has all models yet" in evaluation.write_report(nothing, str(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in evaluation.write_report(rows, str(tmp_path))
    def broken(*_):
        raise ValueError("no font")
    monkeypatch.setattr(evaluation, "draw", broken)           # and no other failure is called that
    with pytest.raises(ValueError, match="no font"):
        evaluation.write_report(rows, str(tmp_path))


def test_a_teacher_in_words():
    s = SimpleNamespace(size="s", setup={"vocab_size": 512})
    for name, words in (("xs@2M", "a third of the size,\n2M tokens"),
                        ("l@8M", "6.1 times the size,\n8M tokens"),
                        ("s@1.5M", "the same size,\n1.5M tokens"),
                        ("bigram@8M", "a bigram table,\n8M tokens")):
        group = "tables" if name[0] == "b" else "weak networks"
        t = SimpleNamespace(name=name, size=name.partition("@")[0], group=group)
        assert evaluation.in_words(t, s) == words


def test_results_are_read_with_care(tmp_path):
    rows, path = made_up(), tmp_path / "results.jsonl"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    assert evaluation.read_rows(path) == rows == evaluation.read_rows(path, rows[0]["setup"])
    other = json.dumps({**rows[1], "setup": {**rows[1]["setup"], "block_size": 256}})
    for line, word in ((other, "was made with block_size 256, not with 128"),
                       *((bad, "is not a result") for bad in (
                           lines[1][:99], '{"metrics": null}', "[" * 200_000,
                           json.dumps({**rows[1], "metrics": {"in_domain": 1.0}}),     # of an earlier version
                           json.dumps({**rows[1], "seconds": math.nan})))):
        path.write_text("\n".join([lines[0], line, lines[2]]))
        with pytest.raises(data.UserError, match=f"line 2 {word}"):
            evaluation.read_rows(path)


def test_reports_are_of_their_rows_and_the_readme_quotes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    for path in Path("results").glob("*/report.md"):
        report = evaluation.write_report(evaluation.read_rows(path.parent / "results.jsonl"), str(tmp_path))
        assert path.read_text("utf-8") == report, path
    s = evaluation.study(evaluation.read_rows("results/laptop/results.jsonl"), "s@1.5M")
    page = Path("README.md").read_text("utf-8")
    for t in s.teachers:                                      # its table
        words = evaluation.in_words(t, s).replace("\n", " ")
        assert (f"| {words} | {t.outside.mean():.3f} | {t.worth_outside.mean():.0f} % | {t.costs:.0f} % | "
                f"{t.alpha:g} |\n") in page, t.name
    for file, lines in regex.findall(r"\[(\w+\.py)\]\(\w+\.py\) \((\d+)", page):
        assert int(lines) == len(Path(file).read_text("utf-8").splitlines()), file


# ---- sweep.py ----------------------------------------------------------------

SMALL = ["--scale", "smoke", "--student", "xs@8K", "--teachers", "bigram@4K,xs@4K", "--device", "cpu"]


@pytest.fixture
def threads(monkeypatch):
    """Workers are threads, which start sooner than processes."""
    monkeypatch.setattr(futures, "ProcessPoolExecutor", lambda jobs, _, __, threads: (
        futures.ThreadPoolExecutor(jobs, "", torch.set_num_threads, threads)))


@pytest.fixture
def pretend(threads, monkeypatch):
    """Runs take no time: losses are drawn by the run's name. -> names of the runs, in the order they came."""
    trained = []
    def train_and_evaluate(run, scale, out, device, show_progress):
        trained.append(run.name)
        time.sleep(0.05 * (run.seed < 2000 and not run.teacher))             # a student alone takes longest
        x = random.Random(run.name).random()
        metrics = {"in_domain": 2 + x, "ood/a": 3 + x, "accuracy/in_domain": 0.5, "accuracy/ood/a": 0.4}
        Path(out, "runs", run.name).mkdir(parents=True, exist_ok=True)
        Path(out, "runs", run.name, "ckpt.pt").touch()
        return {**dict(zip(evaluation.KEYS, run.key)), "setup": sweep.setup(scale, device), "flops": 1.0 + x,
                "teacher_flops": 1.0, "seconds": 1.0, "metrics": metrics}
    monkeypatch.setattr(sweep, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    return trained


def results(folder):
    rows = [json.loads(line) for line in open(Path(folder, "results.jsonl"))]
    return sorted(json.dumps({**row, "seconds": 0}) for row in rows)


def test_a_sweep_killed_and_resumed_equals_one_never_stopped(corpus, tmp_path, threads, monkeypatch, capsys):
    argv = [*SMALL, "--data", corpus, "--seeds", "1,2", "--teachers", "xs@4K", "--jobs", "1", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, err = call(sweep.main, [*argv, whole], monkeypatch, capsys)
    assert code == 0 and "A weak teacher helps" in out, err
    assert "xs@8K alone, seed 1: loss " in out and " -> xs@8K, seed 2, alpha " in out
    assert "## Student xs@8K: seed 1 chose alpha, tested on 2" in out
    assert len(results(whole)) == 4 + 1 + 2 + 1 == len(set(results(whole)))
    process = subprocess.Popen([sys.executable, "sweep.py", *argv, parts], cwd=HERE, stdout=-3, stderr=-3)
    path = parts / "results.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    assert len(results(parts)) < len(results(whole))
    code, out, err = call(sweep.main, [*argv, parts], monkeypatch, capsys)
    assert code == 0 and results(parts) == results(whole), err
    more = [whole, "--scale", "laptop", "--teachers", "bigram@9M"]
    code, out, err = call(sweep.main, [*argv, *more], monkeypatch, capsys)
    assert code == 2 and "line 1 was made with windows 32, not with 512" in err[-1]


def test_one_seed_tries_every_alpha_and_what_is_added_later_changes_nothing(
        corpus, tmp_path, pretend, monkeypatch, capsys):
    def added(*more):
        """Run it with these flags too -> the runs that this trained."""
        pretend.clear()
        code, out, err = call(sweep.main, [*SMALL, "--data", corpus, "--jobs", 2, "--out", tmp_path, *more],
                              monkeypatch, capsys)
        assert code == 0, err
        return [*pretend]
    def alphas():
        rows = evaluation.read_rows(tmp_path / "results.jsonl")
        return {t.name: t.alpha for t in evaluation.study(rows, "xs@8K").teachers}
    first = added("--seeds", "7,8,9", "--alphas", "0.25,0.5,1")
    assert len(first) == 3 * 2 + 2 + 2 * 3 + 2 * 2
    assert sum("xs@8K_seed_7_from" in name for name in first) == 6
    before = alphas()
    assert sorted(name for name in first if "xs@8K_seed_9_from" in name) == sorted(
        f"xs@8K_seed_9_from_{name}_seed_2000_alpha_{alpha:g}" for name, alpha in before.items())
    for run in first:                                         # each follows what it needs
        if "_from_" in run:
            student, _, teacher = run.partition("_from_")
            needed = {student, teacher.partition("_alpha_")[0]}
            assert needed <= {*first[:first.index(run)]}
    assert added("--seeds", "7,8,9", "--alphas", "0.25,0.5,1") == []
    seed = added("--seeds", "10", "--alphas", "0.25,0.5,1")   # the chooser stays, though it is not named
    assert len(seed) == 2 + 2 and all("seed_10" in name for name in seed) and alphas() == before
    teacher = added("--seeds", "7", "--teachers", "s@4K", "--alphas", "0.25")  # and what was tried before
    assert len(teacher) == 1 + 3 and alphas() == before       # which no test seed has: it is left out
    assert "some of their models are missing: s@4K." in (tmp_path / "report.md").read_text("utf-8")
    alpha = added("--seeds", "7,8", "--alphas", "0.25,0.5,0.75,1")             # only what is missing
    assert all("alpha_0.75" in name for name in alpha) and sum("seed_7" in name for name in alpha) == 2
    (tmp_path / "runs" / "bigram@4K_seed_2000" / "ckpt.pt").unlink()         # a lost teacher is trained again
    again = added("--seeds", "11", "--alphas", "0.25,0.5,0.75,1")
    assert len(again) == 5 and "bigram@4K_seed_2000" in again


def test_two_sweeps_into_one_folder_keep_each_others_rows(corpus, tmp_path, pretend, monkeypatch, capsys):
    argv = [*SMALL, "--data", corpus, "--jobs", 1, "--out", tmp_path, "--seeds"]
    one = sweep.train_and_evaluate
    def other(run, *rest):                                    # the other one runs while this one is at work
        if run.name == "xs@8K_seed_1":
            monkeypatch.setattr(sweep, "train_and_evaluate", one)
            assert call(sweep.main, [*argv, "3,4"], monkeypatch, capsys)[0] == 0
        return one(run, *rest)
    monkeypatch.setattr(sweep, "train_and_evaluate", other)
    assert call(sweep.main, [*argv, "1,2"], monkeypatch, capsys)[0] == 0
    rows = evaluation.read_rows(tmp_path / "results.jsonl")
    assert {row["seed"] for row in rows if row["teacher"]} == {1, 2, 3, 4}
    assert len({*results(tmp_path)}) == len(rows)


def test_there_are_no_more_workers_than_runs(corpus, tmp_path, pretend, monkeypatch, capsys):
    argv = [*SMALL, "--data", corpus, "--jobs", 99, "--seeds", 1, "--out", tmp_path]
    code, out, err = call(sweep.main, argv, monkeypatch, capsys)
    assert code == 0 and "8 runs on cpu, 8 at a time" in out, err
    many = ",".join(map(str, range(30)))                      # 61 is what Windows allows
    code, out, err = call(sweep.main, [*argv, "--seeds", many], monkeypatch, capsys)
    assert code == 0 and ", 61 at a time" in out, err


def test_a_failure_is_said_in_its_own_words(corpus, tmp_path, pretend, monkeypatch, capsys):
    argv = [*SMALL, "--data", corpus, "--jobs", 1, "--seeds", 1, "--out", tmp_path]
    def fails(*_):
        raise data.UserError("no room")
    one = sweep.train_and_evaluate
    monkeypatch.setattr(sweep, "train_and_evaluate",
                        lambda run, *rest: fails() if run.teacher else one(run, *rest))
    code, _, err = call(sweep.main, argv, monkeypatch, capsys)
    assert code == 2 and "error: xs@8K_seed_1_from_bigram@4K_seed_2000_alpha_0.25: no room" in err[-1]
    monkeypatch.setattr(sweep, "train_and_evaluate", one)
    monkeypatch.setattr(sweep, "write_report", fails)
    code, _, err = call(sweep.main, argv, monkeypatch, capsys)
    assert code == 2 and err[-1].endswith("error: no room")


def test_a_killed_worker_ends_the_sweep_with_a_line(corpus, tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")  # as IPython's %run leaves it, a second time
    def kill_one():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        time.sleep(1)                                         # its parent has told it what to do
        multiprocessing.active_children()[0].kill()
    threading.Thread(target=kill_one, daemon=True).start()
    scale = dataclasses.replace(sweep.SCALES["smoke"], data=corpus)
    with pytest.raises(data.UserError, match="a worker died.*rerun the same command to resume"):
        sweep.sweep(scale, str(tmp_path), 2, "cpu")
    assert not multiprocessing.active_children()


def test_dry_run_prints_every_run_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, scale in sweep.SCALES.items():
        code, out, err = call(sweep.main, ["--scale", name, "--dry_run"], monkeypatch, capsys)
        seeds, teachers, alphas = len(scale.seeds), len(scale.teachers), len(scale.alphas)
        runs = 2 * seeds + teachers * (scale.teacher_sets + alphas + seeds - 1)
        assert code == 0 and len(out.splitlines()) == runs + 1 and f"{runs} runs" in out
        for run in (run for run in sweep.plan(scale, []) if run.alpha is not None):
            c, (size, tokens) = run.config(scale, "out"), evaluation.parse_model(run.model)
            assert (c.size, c.tokens, c.seed) == (size, tokens, run.seed)
            shape = model.GPTConfig(scale.vocab_size, c.block_size, **model.SIZES[size])
            assert run.flops(scale)[0] == 3 * tokens * model.flops_per_token(shape)
            assert run.work(scale) >= sum(run.flops(scale))
    assert not list(tmp_path.iterdir())
    done = subprocess.run(f"{sys.executable} sweep.py --dry_run | head -1", cwd=HERE, shell=True,
                          capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and not done.stderr


# ---- exercises/ --------------------------------------------------------------

EXERCISES = HERE / "exercises"
PAGE = (EXERCISES / "README.md").read_text("utf-8")
PATCHES = {path.stem: path for path in EXERCISES.glob("*.patch")}
PATCHED_LOSSES = {"4_reverse_kl": (1.795, 0.0), "5_top_p": (4.821, 0.348), "5_renormalised": (1.431, 0.0),
                  "5_one_more_outcome": (2.219, 0.0)}        # L(1), L(1, h @ w.T)
SCRIPTS = {                          # of each model, perplexities call by call; how what is printed ends
    "10_own_text": (([20, 50], [10, 40], [5, 32], [10, 40]),
                    "in domain +1.386, worth 300 %; on input.txt +0.446, worth 300 %\n"
                    "in domain +0.693, worth 100 %; on input.txt +0.223, worth 100 %\n"),
    "11_mixing": (([[2, 10] * 16], [[10, 2] * 16]), "share 0.50: gain +0.294 in domain, +0.294 outside\n")}


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
    check = runpy.run_path(EXERCISES / "check.py")
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
    elif name in SCRIPTS:                                     # made-up losses, and no hits
        shutil.copytree(corpus, "data/python")
        Path("input.txt").write_text(poem(2))
        models, said = SCRIPTS[name]
        losses = iter(sum(models, []) * 10)
        monkeypatch.setattr("eval.token_losses", lambda *_: (torch.tensor(next(losses)).log(), None))
        words = ["input.txt"] * (name == "10_own_text") + [str(trained / "alpha_0" / "ckpt.pt")] * len(models)
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(f"{name.partition('_')[2]}.py", run_name="__main__")
        assert capsys.readouterr().out.replace(f"{words[-1]}: ", "").endswith(said)


def test_where_the_gain_lies_and_what_a_temperature_changes(corpus, trained, tmp_path, monkeypatch, capsys):
    script = runpy.run_path(EXERCISES / "token_gains.py")
    paths = [str(trained / run / "ckpt.pt") for run in ("alpha_0", "alpha_0.25", "teacher", "alpha_1")]
    models = [model.load_checkpoint(path)[0] for path in paths]
    rows = evaluation.read_windows(f"{corpus}/val.bin", 32, 64)
    x, y = rows[:, :-1], rows[:, 1:]
    gain = torch.sub(*(F.cross_entropy(m(x).mT, y, reduction="none").detach() for m in models[:2]))
    t, o = (m(x).argmax(-1) == y for m in models[2:])
    found = script["token_gains"](models, corpus, 64)["in_domain"]
    for name, group in (("all tokens", t | True), ("both right", t & o), ("only the teacher", t & ~o),
                        ("only the other student", o & ~t), ("neither", ~t & ~o)):
        share, mean = found[name]
        assert abs(share - group.double().mean()) < 1e-3
        assert abs(share * mean - (gain * group).double().mean()) < 1e-4
    shutil.copytree(corpus, tmp_path / "data" / "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["token_gains.py", *paths])
    script["main"]()
    assert "outside    only the other student" in capsys.readouterr().out

    Path("out").mkdir()
    shutil.copy(paths[2], "out/alone.pt")
    exec(regex.search(r"```python\n(.*?)```", PAGE, regex.S)[1], {})
    losses, accuracies = zip(*(line.split()[-2:] for line in capsys.readouterr().out.splitlines()))
    assert len({*losses}) == 3 and len({*accuracies}) == 1 and accuracies[0] > "0"


def test_start_finds_what_the_sweeps_leave(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    laptop = sweep.SCALES["laptop"]
    second = dataclasses.replace(laptop, seeds=(72,), teachers=("xs@2M", "bigram@8M", "s@8M"))
    for out, scale in (("out/laptop", laptop), ("out/second", second)):
        for run in (run for run in sweep.plan(scale, []) if run.alpha is not None):
            path = Path(run.config(scale, out).out, "ckpt.pt")
            path.parent.mkdir(parents=True)
            path.write_text(f"{out} {run.name}")
    for argv, out, seed, other in (([], "out/laptop", 71, 72), (["out/second", "72"], "out/second", 72, 71)):
        monkeypatch.setattr(sys, "argv", ["start.py", *argv])
        runpy.run_path(EXERCISES / "start.py")
        assert capsys.readouterr().out == "18 of 18 checkpoints are in out/.\n"
        found = {path.name: path.read_text() for path in Path("out").glob("*.pt")}
        student = f"{out} s@1.5M_seed_{seed}"
        assert {*regex.findall(r"out/([\w.]+\.pt)", PAGE)} <= found.keys()
        assert found.items() >= {
            "alone.pt": student, "other.pt": f"out/laptop s@1.5M_seed_{other}",
            "twice.pt": f"{out} s@3M_seed_{seed}", "weak.pt": f"{out} xs@2M_seed_2000",
            "from_bigram_0.1.pt": f"{student}_from_bigram@8M_seed_2000_alpha_0.1"}.items()
    path.unlink()
    runpy.run_path(EXERCISES / "start.py")
    assert capsys.readouterr().out.startswith(f"not there: {path}\n17 of 18")


def test_commands_of_the_exercises_are_ones_that_run():
    assert set(regex.findall(r"(\d+_\w+)\.patch", PAGE)) == PATCHES.keys()
    configs = [distill.parse_config(shlex.split(line.replace("--size trigram", "--size xs")))
               for line in regex.findall(r"^    python distill.py (.*)", PAGE, regex.M)]
    for c in configs:
        distill.check(c, 512)
    assert {*regex.findall(r"(out/\w+)/ckpt\.pt", PAGE)} <= {c.out for c in configs}


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
    (folder / "cut.pt").write_bytes((folder / "run" / "ckpt.pt").read_bytes()[:20_000])
    (folder / "poem.txt").write_text("a poem of a few words only")
    brief = {"poem": str(folder / "poem.txt")}
    data.prepare("text", str(folder / "brief"), 258, [str(folder / "other.txt")], brief)
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
    (distill.main, "--log_every 0", "--log_every must be from 1 to inf, not 0"),
    (distill.main, "--accumulate 0", "--accumulate must be from 1 to inf, not 0"),
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
    (hf.main, "run/ckpt.pt new --data other", "a different tokenizer"),
    (distill.main, "--teacher cut.pt --alpha 1", "cut.pt is not a distill.py checkpoint, or is damaged"),
    (sweep.main, f"--student s@1.5 {SWEEP}", "'s@1.5' is not a model"),
    (sweep.main, f"--seeds 1.7 {SWEEP}", "invalid"),
    (sweep.main, f"--alphas 0.25,0.5,0.25 {SWEEP}", "names one twice"),
    (sweep.main, f"--alphas 0.25,2 {SWEEP}", "--alpha must be from 0 to 1, not 2.0"),
    (sweep.main, f"--teachers xs@4K,xs@500 {SWEEP}", "--tokens 500 is less than a step of 1024"),
    (sweep.main, "--scale smoke --data brief --out new", "ood_poem.bin is shorter than one window"),
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
    for main in (data.main, distill.main, evaluation.main, sweep.main, hf.main, brackets.main):
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
    distill.train(config(str(made / "other"), tmp_path / "long", teacher=table, alpha=0.5, block_size=64))


def test_numbers_with_units_and_names_of_models():
    for text, number in (("3000000", 3 * 10**6), ("1.5M", 1_500_000), ("0.7B", 7 * 10**8), ("2k", 2000)):
        assert data.whole_number(text) == number
    for text in ("", "M", "1.5", "1.2345K", "inf", "nan", "1MK", "1 M x"):
        with pytest.raises(ValueError):
            data.whole_number(text)
    for tokens in (1, 999, 1000, 1024, 1000001, 1000002, 3 * 2**19, 1500000, 2**21, 50 * 10**9, 10**9 + 1):
        assert evaluation.parse_model(evaluation.model_name("xs", tokens)) == ("xs", tokens)

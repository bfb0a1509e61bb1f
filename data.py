"""
Text -> a byte-pair vocabulary -> tokens on disk -> batches; and the items of a downstream task.

    python data.py                                                        # --corpus python: downloads nothing
    python data.py --corpus text --train mine/*.txt --ood news=news.txt --out data/mine
    python data.py --corpus fineweb-edu --tokens 1B                       # downloads 2.2 GB

The `python` corpus is the Python that is on your machine. In domain: the sources of the standard library and
of torch. Out of distribution, for evaluation only: sympy, numpy and networkx (same language, other authors),
the C++ headers that come with torch, and English prose (Python's language reference). It depends on the
versions of Python, torch, numpy, sympy and networkx, which meta.json names, and a little on how Python was
installed. `text` takes your own files instead; fineweb-edu comes with GPT-2's vocabulary.

Writes into --out: train.bin, val.bin and ood_NAME.bin (token ids, uint16, documents separated by
<|endoftext|>), vocab.tiktoken, task_brackets.jsonl (`python` only; one item a line), and meta.json, written
last: a folder without it is unfinished and is rebuilt.
Byte-pair encoding: Sennrich et al., arXiv 1508.07909; on bytes, as in GPT-2. tiktoken encodes.
"""
import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import sys
import sysconfig
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import regex                        # tiktoken's own dependency: `re` lacks \p{L}
import tiktoken
import torch
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
# words, numbers of up to 3 digits, punctuation, white space; a leading space belongs to the word, as in GPT-2
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VAL_PERCENT = 5                     # of the documents, chosen by a hash of their name
OOD_CHARS = 2_000_000               # characters of an out-of-distribution set, at most
BPE_CHARS = 4_000_000               # characters of training text from which the vocabulary is learned,
BPE_WORDS = 300_000                 # or fewer: bytes of distinct words, which are long without spaces
BUILD_FILES = ("_sysconfigdata", "version.py", "__config__.py")             # these differ with every build
FINEWEB = ("https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
           "edu_fineweb_{}.bin")


class UserError(Exception):
    """A mistake the user can fix, in one line. A file that cannot be read or written is an OSError."""


def sha(data):
    """The first 16 hex digits of the sha256 of bytes or text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


# ---- the text: sets of documents, each (name, text) --------------------------

def read_tree(label, root, *endings):
    """The files below root with these endings that are UTF-8 and not empty: (label/relative path, text)."""
    skip = {"site-packages", "dist-packages", "pydoc_data"}  # the last is the set "prose"
    for path in Path(root).rglob("*"):
        inside = path.relative_to(root)
        if path.suffix in endings and not skip & set(inside.parts) and not path.name.startswith(BUILD_FILES):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue                                     # some test files are broken on purpose
            if text.strip():
                yield f"{label}/{inside.as_posix()}", text


def python_documents():
    """-> (in-domain documents, {name: out-of-distribution ones}), from what is installed."""
    from pydoc_data.topics import topics                     # the language reference, {topic: text}

    def package(name):
        return Path(importlib.util.find_spec(name).origin).parent
    in_domain = [*read_tree("stdlib", sysconfig.get_paths()["stdlib"], ".py"),
                 *read_tree("torch", package("torch"), ".py")]
    ood = {name: list(read_tree(name, package(name), ".py")) for name in ("sympy", "numpy", "networkx")}
    ood["cpp"] = list(read_tree("include", package("torch") / "include", ".h", ".hpp", ".cuh"))
    ood["prose"] = [(f"topics/{name}", text) for name, text in topics.items()]
    return in_domain, ood


# 1,000 to 2,000 characters up to a blank line; or else up to the end of a line; or else 2,000 characters
PIECE = regex.compile(r".{1000,2000}?\n\s*\n|.{1000,2000}\n|.{1,2000}", regex.DOTALL)


def pieces(path):
    """A UTF-8 text file as documents of up to about 2,000 characters: (hash, text)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start:,})") from None
    if "\0" in text:                                         # UTF-16 of English is valid UTF-8 with NULs
        raise UserError(f"{path} is not UTF-8 text (it has NUL characters: is it UTF-16?)")
    return [(sha(piece), piece) for document in text.split(END_OF_TEXT)
            for piece in PIECE.findall(document) if piece.strip()]


def fineweb_shard(name, out_dir):
    """
    Download a shard of FineWeb-Edu in GPT-2's tokens, if it is not there -> its ids, about 100 million. It is
    a header of 256 int32 (magic, version, number of tokens) and then uint16.
    """
    url, path = FINEWEB.format(name), os.path.join(out_dir, f"{name}.shard")
    if not os.path.exists(path):
        os.makedirs(out_dir, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as e:
            raise UserError(f"cannot download {url}: {e}") from None
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != 20240520 or os.path.getsize(path) != 1024 + 2 * int(header[2]):
        os.remove(path)
        raise UserError(f"{url} arrived damaged or truncated: run the same command again")
    return np.memmap(path, "<u2", "r", offset=1024)


def split_documents(in_domain, ood):
    """
    -> {"train": documents, "val": ..., "ood_NAME": ...}. val by a hash of the name, so that adding a file
    moves no other; in the order of that hash, so that any prefix is a fair sample; no text twice.
    """
    sets, seen = {"train": [], "val": []}, set()

    def unseen(documents):
        for name, text in sorted(documents, key=lambda document: sha(document[0])):
            if sha(text) not in seen:
                seen.add(sha(text))
                yield name, text
    for name, text in unseen(in_domain):
        sets["val" if int(sha(name), 16) % 100 < VAL_PERCENT else "train"].append((name, text))
    for key, documents in ood.items():
        sets[f"ood_{key}"], size = [], 0
        for name, text in unseen(documents):
            if size >= OOD_CHARS:
                break
            sets[f"ood_{key}"].append((name, text))
            size += len(text)
    for name, documents in sets.items():
        if not documents:                                    # ood_cpp: a torch without its headers
            raise UserError(f"the set {name} is empty: it needs about 100 kB of text that no other set has")
    return sets


# ---- the task: an item is {"context", "choices", "label"} --------------------

def evenly_spaced(items, most):
    """At most `most` of the items, evenly spaced."""
    n = min(len(items), most)
    return [items[k * len(items) // n] for k in range(n)]


def bracket_items(sets, pairs=126):
    """
    The task `brackets`: a file of Python is cut before a ) or ], right after a letter or a digit, where the
    tokenizer cuts as well. Which of the two comes next? -> items, of each of the sets of documents at most
    `pairs` that continue with a ), and then as many with a ].
    """
    items = []
    for documents in sets:
        for kind in zip(*evenly_spaced(list(bracket_pairs(documents)), pairs)):
            items += kind
    return items


def bracket_pairs(documents):
    """Documents (name, text) -> pairs of items, at most six a document."""
    for name, text in documents:
        cuts, stack = {")": [], "]": []}, []                 # the stack: positions of open brackets
        for i, character in enumerate(text):
            if character in "([{":
                stack.append(i)
            elif character in ")]}":
                start = stack.pop() if stack else i
                if text[start] + character not in ("()", "[]", "{}"):
                    stack = []                               # one of them stood in a string: start over
                elif character in cuts and 8 <= i - start <= 200 and text[i - 1].isalnum():
                    first = max(0, i - 280)                  # at most 280 characters of context,
                    if first:                                # in whole lines, but not without its opener
                        first = max(first, text.find("\n", first, start) + 1)
                    rest = text[i + 1:i + 31].partition("\n")[0]
                    cuts[character].append({"context": text[first:i], "choices": [f"){rest}", f"]{rest}"],
                                            "label": ")]".index(character)})
        draw, n = random.Random(name), min(6, len(cuts[")"]), len(cuts["]"]))
        yield from zip(draw.sample(cuts[")"], n), draw.sample(cuts["]"], n))


# ---- the vocabulary ----------------------------------------------------------

def train_bpe(text, vocab_size, pattern=PATTERN):
    """
    Byte-pair encoding: start from the 256 bytes; vocab_size - 256 times, merge the commonest adjacent pair of
    tokens within a word into a new token, ties going to the lexicographically greater pair of byte strings.

    -> {token bytes: rank}, which is what tiktoken.Encoding takes; fewer than vocab_size where the text runs
    out of pairs. A merge touches only the words that hold the pair, which `where` knows.
    """
    vocab = [bytes([b]) for b in range(256)]
    word_counts, distinct = Counter(), 0
    for word in regex.findall(pattern, text):
        distinct += 0 if word in word_counts else len(word.encode())
        if distinct > BPE_WORDS:
            break
        word_counts[word] += 1
    words = [list(word.encode("utf-8")) for word in word_counts]
    freq = list(word_counts.values())
    count, where = Counter(), defaultdict(set)               # pair -> how often, pair -> in which words
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            count[pair] += freq[w]
            where[pair].add(w)
    for _ in tqdm(range(256, vocab_size), desc="merges", unit=" merge", disable=None, leave=False):
        best = max(count, key=lambda p: (count[p], vocab[p[0]], vocab[p[1]]), default=None)
        if best is None or not count[best]:
            break
        new = len(vocab)
        vocab.append(vocab[best[0]] + vocab[best[1]])
        for w in where.pop(best):
            ids, out, i = words[w], [], 0
            while i < len(ids):                              # left to right, as the encoder will
                pair_here = tuple(ids[i:i + 2]) == best
                out.append(new if pair_here else ids[i])
                i += 2 if pair_here else 1
            for pair in zip(ids, ids[1:]):
                count[pair] -= freq[w]
            for pair in zip(out, out[1:]):
                count[pair] += freq[w]
                where[pair].add(w)
            words[w] = out
        del count[best]
    return {token: rank for rank, token in enumerate(vocab)}


def make_encoding(ranks, pattern):
    """tiktoken.Encoding of {bytes: rank}, with end-of-text as the id after the last rank."""
    return tiktoken.Encoding("nanoteacher", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})


# ---- tokens on disk ----------------------------------------------------------

def prepare(corpus="python", out_dir="data/python", vocab_size=512, train=(), ood=None, tokens=None):
    """
    Make out_dir and return its meta. corpus: "python"; "text", from the files train and ood = {name: file};
    "fineweb-edu", with `tokens` training tokens. vocab_size counts the bytes, the merges and end-of-text, or
    is "gpt2", as it always is with fineweb-edu. A finished out_dir of the same arguments is left as it is; a
    different one is refused.
    """
    ood = ood or {}
    if corpus == "fineweb-edu":
        vocab_size = "gpt2"
    if vocab_size != "gpt2" and not 257 <= vocab_size <= 2**16:
        raise UserError(f"--vocab_size must be from 257 to 65536, not {vocab_size}")
    arguments = {"corpus": corpus, "vocab_size": vocab_size, "ood": list(ood),
                 "files": [sha(Path(path).read_bytes()) for path in (*train, *ood.values())]}
    if corpus == "fineweb-edu":
        arguments["tokens"] = tokens
    out = Path(out_dir)
    if (out / "meta.json").exists():
        meta = load_meta(out_dir)
        if meta["arguments"] != arguments:
            raise UserError(f"{out_dir} already holds a different corpus: delete it or use another folder; "
                            f"sweep.py --data {out_dir} takes it as it is")
        return meta

    # the text; a user's set replaces ours of the same name
    ood, tasks = {name: pieces(path) for name, path in ood.items()}, {}
    if corpus == "text":
        in_domain = [piece for path in train for piece in pieces(path)]
    else:
        in_domain, python_ood = python_documents()
        ood = python_ood | ood
    sets, arrays = split_documents(in_domain, ood), {}
    if corpus == "python":
        of_python = "val", "ood_sympy", "ood_numpy", "ood_networkx"
        tasks["brackets"] = bracket_items(sets[name] for name in of_python)
    if corpus == "fineweb-edu":                              # Python is out of distribution: its val set
        names = [f"train_{i:06}" for i in range(1, 1 + math.ceil((tokens or 1) / 1e8))]
        arrays["train"] = (fineweb_shard(name, out_dir) for name in names)
        arrays["val"] = [fineweb_shard("val_000000", out_dir)[:4_000_000]]
        del sets["train"]
        sets.setdefault("ood_code", sets.pop("val"))         # unless the user has a set of that name

    # the vocabulary
    if vocab_size == "gpt2":
        gpt2 = tiktoken.get_encoding("gpt2")
        encoding = make_encoding(gpt2._mergeable_ranks, gpt2._pat_str)
        vocab_size = 50_304                                  # a multiple of 64, for the GPU
    else:
        text = "\n".join(text for _, text in sets["train"])[:BPE_CHARS]
        encoding = make_encoding(train_bpe(text, vocab_size - 1), PATTERN)
        vocab_size = encoding.n_vocab
    arrays |= {name: encode(documents, encoding) for name, documents in sets.items()}

    # the files; meta.json comes last, and only what it names counts
    out.mkdir(parents=True, exist_ok=True)
    vocab = "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                    for token, rank in encoding._mergeable_ranks.items())
    (out / "vocab.tiktoken").write_text(vocab)
    for name, items in tasks.items():
        (out / f"task_{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    packages = "torch", "numpy", "sympy", "networkx"
    meta = {"arguments": arguments, "tokenizer": sha(vocab + encoding._pat_str), "pattern": encoding._pat_str,
            "vocab_size": vocab_size,
            "sets": {name: write_ids(out / f"{name}.bin", arrays[name], encoding.n_vocab) for name in arrays},
            "tasks": {name: {"items": len(items), "sha256": sha(json.dumps(items))}
                      for name, items in tasks.items()},
            "versions": {"python": sys.version.split()[0],
                         **{name: importlib.metadata.version(name) for name in packages}}}
    what = "tokenizer", "vocab_size", "sets", "tasks"        # results compare only where these agree
    meta["fingerprint"] = sha(json.dumps([meta[name] for name in what]))
    (out / "meta.json.tmp").write_text(json.dumps(meta, indent=1))
    os.replace(out / "meta.json.tmp", out / "meta.json")
    return meta


def encode(documents, encoding):
    """Documents (name, text) -> one by one the array of their ids, closed by end-of-text."""
    for _, text in tqdm(documents, desc="encoding", disable=None, leave=False):
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        yield np.append(ids, encoding.eot_token).astype(np.uint16)


def write_ids(path, arrays, n_vocab):
    """Write uint16 arrays of ids one after the other to path -> the set's entry in meta.json."""
    documents, tokens, digest = 0, 0, hashlib.sha256()
    with open(path, "wb") as f:
        for ids in arrays:
            ids.tofile(f)
            digest.update(ids)
            documents += int((ids == n_vocab - 1).sum())     # end-of-text
            tokens += len(ids)
    return {"documents": documents, "tokens": tokens, "sha256": digest.hexdigest()}


def load_meta(data_dir):
    """meta.json of a corpus folder: sizes, fingerprints, and what it was made from."""
    path = Path(data_dir, "meta.json")
    if not path.exists():
        raise UserError(f"{data_dir} is not a corpus folder: make it with data.py, whose --help says how")
    return json.loads(path.read_text(encoding="utf-8"))


def load_tokenizer(data_dir):
    """The tiktoken.Encoding a corpus folder was made with."""
    lines = (line.split() for line in Path(data_dir, "vocab.tiktoken").read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return make_encoding(ranks, load_meta(data_dir)["pattern"])


def load_tokens(path):
    """The ids of a set, DATA_DIR/NAME.bin, as a memory map of uint16."""
    known = load_meta(os.path.dirname(path))["sets"][os.path.basename(path).removesuffix(".bin")]
    try:
        return np.memmap(path, np.uint16, "r", shape=known["tokens"])
    except ValueError:
        raise UserError(f"{path} is cut off, it should have {known['tokens']:,} tokens: copy it again, or "
                        "delete its folder and make it with data.py") from None


def load_windows(path, block_size):
    """-> the ids of a set, and how many windows of block_size they hold, each with the token after it."""
    tokens = load_tokens(path)
    if len(tokens) <= block_size:
        raise UserError(f"{path} is shorter than one window of {block_size} tokens: use more text")
    return tokens, (len(tokens) - 1) // block_size


class Batches:
    """
    Batches(path, batch_size, block_size, seed)[step] -> x, y, int64 of shape (batch_size, block_size); y is x
    shifted by one token. A pure function of (seed, step), so resuming is indexing. The set is cut into
    windows of block_size, each of which comes once an epoch, in an order drawn from (seed, epoch).
    """
    def __init__(self, path, batch_size, block_size, seed):
        self.tokens, self.n = load_windows(path, block_size)                 # n windows are an epoch
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.epoch, self.order = None, None

    def window(self, i):
        epoch, position = divmod(i, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.arange(self.n, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(self.order)
        start = int(self.order[position]) * self.block_size
        return self.tokens[start:start + self.block_size + 1]

    def __getitem__(self, step):
        rows = np.stack([self.window(step * self.batch_size + j) for j in range(self.batch_size)])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def note_repeats(data_dir, tokens):
    """Say on stderr if a run of so many tokens reads its text more than once."""
    text = load_meta(data_dir)["sets"]["train"]["tokens"]
    if tokens > text:
        print(f"note: {data_dir} has {text:,} tokens to train on: a run of {tokens:,} reads them "
              f"{tokens / text:.1f} times (a table counts them once)", file=sys.stderr)


# ---- what all command lines share --------------------------------------------

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def whole_number(text):
    """'1.5M' -> 1500000; ValueError if that is not a whole number."""
    unit = UNITS.get(text[-1:].upper())
    number = Fraction(text[:-1]) * unit if unit else Fraction(text)
    if number.denominator > 1:
        raise ValueError
    return number.numerator


def make_parser(doc):
    """A parser whose help is the file's docstring. Errors are one line and exit code 2."""
    return argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def run_main(main):
    """Run a script: a user's mistake is one line and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                   # notebooks lack it
            stream.reconfigure(errors="replace")             # not every terminal can print ±
    try:
        main()
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


def gpt2_or_number(text):
    """'gpt2' -> 'gpt2', '512' -> 512."""
    return text if text == "gpt2" else whole_number(text)


def main():
    """Make the corpus that the command line asks for, and print what is in it."""
    parser = make_parser(__doc__)
    parser.add_argument("--corpus", default="python", choices=("python", "text", "fineweb-edu"),
                        help="what to tokenize (default: python)")
    parser.add_argument("--vocab_size", type=gpt2_or_number, default=512, metavar="N", help="tokens in the "
                        "vocabulary: 256 bytes, merges, end-of-text; or gpt2, as fineweb-edu always has "
                        "(default: 512)")
    parser.add_argument("--tokens", type=whole_number, metavar="N", help="fineweb-edu: training tokens, in "
                        "whole shards of 100 million; K, M, B are 10^3, 10^6, 10^9 (default: one shard)")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: data/CORPUS)")
    parser.add_argument("--train", nargs="+", action="extend", default=[], metavar="FILE",
                        help=f"text: UTF-8 files to train on, of which {VAL_PERCENT} %% is held out")
    parser.add_argument("--ood", nargs="+", action="extend", default=[], metavar="NAME=FILE",
                        help="your own out-of-distribution sets, one UTF-8 file each, of which "
                        f"{OOD_CHARS:,} characters are used; a NAME that the corpus has is replaced")
    args = parser.parse_args()
    ood = dict(text.partition("=")[::2] for text in args.ood)
    if len(ood) < len(args.ood) or not all(name.isidentifier() and ood[name] for name in ood):
        parser.error("--ood takes NAME=FILE, such as my_text=my.txt, and each NAME once")
    if (args.corpus == "text") != bool(args.train):
        parser.error("--train FILES goes with --corpus text, and only with it")
    out = args.out or f"data/{args.corpus}"
    meta = prepare(args.corpus, out, args.vocab_size, args.train, ood, args.tokens)
    print(f"{out}: vocabulary {meta['vocab_size']}, fingerprint {meta['fingerprint']}")
    for name, s in meta["sets"].items():
        print(f"  {name:13} {s['documents']:6,} documents {s['tokens']:11,} tokens")
    for name, task in meta["tasks"].items():
        print(f"  {f'task_{name}':13} {task['items']:6,} items")


if __name__ == "__main__":
    run_main(main)

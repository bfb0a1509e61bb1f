"""
Text -> a byte-pair vocabulary -> tokens on disk -> batches; and the items of downstream tasks.

    python data.py                                                        # --corpus python: downloads nothing
    python data.py --corpus text --train mine/*.txt --ood news=news.txt --out data/mine
    python data.py --corpus fineweb-edu --tokens 1B --task hellaswag=hellaswag_val.jsonl   # downloads 2.2 GB

The `python` corpus is the Python that is on your machine. In domain: the sources of the standard library and
of torch. Out of distribution, for evaluation only: sympy, numpy and networkx (same language, other authors),
the C++ headers that come with torch, and English prose (Python's language reference). It depends on the
versions of Python, torch, numpy, sympy and networkx, which meta.json names, and a little on how Python was
installed. `text` takes your own files instead; fineweb-edu comes with GPT-2's vocabulary.

Writes into --out: train.bin, val.bin and ood_NAME.bin (token ids, uint16 or uint32, each document closed by
<|endoftext|>), vocab.tiktoken, task_NAME.jsonl (one item a line), and meta.json, written last: a folder
without it is unfinished and made anew.
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
import platform
import random
import sys
import sysconfig
from collections import Counter, defaultdict
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
    """-> (in-domain documents, {name: out-of-distribution ones}) of what is installed."""
    from pydoc_data.topics import topics                     # the language reference, {topic: text}

    def package(name):
        return Path(importlib.util.find_spec(name).origin).parent
    in_domain = [*read_tree("stdlib", sysconfig.get_paths()["stdlib"], ".py"),
                 *read_tree("torch", package("torch"), ".py")]
    ood = {name: list(read_tree(name, package(name), ".py")) for name in ("sympy", "numpy", "networkx")}
    ood["cpp"] = list(read_tree("include", package("torch") / "include", ".h", ".hpp", ".cuh"))
    ood["prose"] = [(f"topics/{name}", text) for name, text in topics.items()]
    return in_domain, ood


def pieces(path):
    """A text file as documents of a few thousand characters, cut at blank lines where there are any."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    for document in text.split(END_OF_TEXT):
        piece = ""
        for line in document.splitlines(keepends=True):
            for i in range(0, len(line), 1000):              # a file may be one long line
                piece += line[i:i + 1000]
                if len(piece) >= 2000 or len(piece) >= 1000 and not line.strip():
                    yield sha(piece), piece
                    piece = ""
        if piece.strip():
            yield sha(piece), piece


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
            raise UserError(f"the set {name} is empty: it needs text, about 100 kB, that no other set has")
    return sets


# ---- downstream tasks: an item is {"context", "choices", "label"} ------------

def evenly_spaced(items, most):
    """At most `most` of the items, evenly spaced."""
    n = min(len(items), most)
    return [items[k * len(items) // n] for k in range(n)]


def bracket_items(sets, pairs=63):
    """
    The task `brackets`: a file of Python is cut before a ) or ], right after a letter or a digit, where the
    tokenizer cuts as well. Which of the two comes next? At most `pairs` pairs of items, a ) and a ], from
    either half of each of the sets of documents -> items, the first half of them from the first halves.
    """
    halves = [], []
    for documents in sets:
        middle = len(documents) // 2
        found = [list(bracket_pairs(half)) for half in (documents[:middle], documents[middle:])]
        for items, half in zip(halves, found):
            for kind in zip(*evenly_spaced(half, min(pairs, *map(len, found)))):       # all ), then all ]
                items += kind
    return halves[0] + halves[1]


def bracket_pairs(documents):
    """Documents (name, text) -> pairs of items, at most six a document."""
    for name, text in documents:
        cuts, stack = {")": [], "]": []}, []                 # the stack: positions of open brackets
        for i, character in enumerate(text):
            if character in "([{":
                stack.append(i)
            elif character in ")]}":
                start = stack.pop() if stack else -1
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


def read_items(path):
    """
    Items from a file of JSON lines, {"context", "choices", "label"} or HellaSwag's {"ctx", "endings",
    "label"}, whose endings follow after a space.
    """
    items = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)                          # of bytes: strict UTF-8
            if "ctx" in item:
                item |= {"context": item["ctx"], "choices": [f" {ending}" for ending in item["endings"]]}
            context, choices = item["context"], item["choices"]
            label = [str(i) for i in range(len(choices))].index(str(item["label"]))      # 1 or "1"
            texts = isinstance(choices, list) and all(isinstance(text, str) for text in (context, *choices))
            if not texts or not all(choices):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}: line {number} is not an item in UTF-8: "context", "choices", "label" '
                            '(or "ctx", "endings", "label")') from None
        items.append({"context": context, "choices": choices, "label": label})
    if len(items) < 2:
        raise UserError(f"{path} needs at least two items")
    return items


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

def prepare(corpus="python", out_dir="data/python", vocab_size=512, train=(), ood=None, tokens=None,
            tasks=None):
    """
    Make out_dir and return its meta. corpus: "python"; "text", from the files train and ood = {name: file};
    "fineweb-edu", with `tokens` training tokens. vocab_size counts the bytes, the merges and end-of-text, or
    is "gpt2", as it always is with fineweb-edu; tasks = {name: file of items}. A finished out_dir of the same
    arguments is left as it is; another is an error.
    """
    ood, tasks = ood or {}, tasks or {}
    if corpus == "fineweb-edu":
        vocab_size = "gpt2"
    else:
        tokens = None
    files = (*train, *ood.values(), *tasks.values())
    for path in files:
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file")
    arguments = {"corpus": corpus, "vocab_size": vocab_size, "tokens": tokens, "ood": list(ood),
                 "tasks": list(tasks), "files": [sha(Path(path).read_bytes()) for path in files]}
    out = Path(out_dir)
    if (out / "meta.json").exists():
        meta = load_meta(out_dir)
        if meta["arguments"] != arguments:
            raise UserError(f"{out_dir} already holds a different corpus: delete it or use another folder")
        return meta

    # the text; a set or a task of the user's takes the place of ours of that name
    ood = {name: list(pieces(path)) for name, path in ood.items()}
    tasks = {name: read_items(path) for name, path in tasks.items()}
    if corpus == "text":
        in_domain = [piece for path in train for piece in pieces(path)]
    else:
        in_domain, python_ood = python_documents()
        ood = python_ood | ood
    sets, arrays = split_documents(in_domain, ood), {}
    if corpus == "python":
        of_python = [sets[name] for name in ("val", "ood_sympy", "ood_numpy", "ood_networkx")]
        tasks = {"brackets": bracket_items(of_python)} | tasks
    if corpus == "fineweb-edu":                              # Python is out of distribution: its val set
        names = [f"train_{i:06}" for i in range(1, 1 + math.ceil((tokens or 1) / 1e8))]
        arrays["train"] = (fineweb_shard(name, out_dir) for name in names)
        arrays["val"] = [fineweb_shard("val_000000", out_dir)[:4_000_000]]
        del sets["train"]
        sets.setdefault("ood_code", sets.pop("val"))

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
    task_meta = {}
    for name, items in tasks.items():
        text = "".join(json.dumps(item) + "\n" for item in items)
        (out / f"task_{name}.jsonl").write_text(text)
        task_meta[name] = {"items": len(items), "sha256": sha(text)}
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    packages = "torch", "numpy", "sympy", "networkx"
    meta = {"arguments": arguments, "tokenizer": sha(vocab + encoding._pat_str), "pattern": encoding._pat_str,
            "ids": encoding.n_vocab, "vocab_size": vocab_size, "dtype": dtype,
            "sets": {name: write_ids(out / f"{name}.bin", arrays[name], encoding, dtype) for name in arrays},
            "tasks": task_meta,
            "versions": {"python": platform.python_version(),
                         **{name: importlib.metadata.version(name) for name in packages}}}
    meta["fingerprint"] = fingerprint(meta)
    (out / "meta.json.tmp").write_text(json.dumps(meta, indent=1))
    os.replace(out / "meta.json.tmp", out / "meta.json")
    return meta


def encode(documents, encoding):
    """Documents (name, text) -> one by one the array of their ids, closed by end-of-text."""
    for i in tqdm(range(0, len(documents), 64), desc="encoding", disable=None, leave=False):
        for ids in encoding.encode_ordinary_batch([text for _, text in documents[i:i + 64]]):
            yield np.array([*ids, encoding.eot_token])


def write_ids(path, arrays, encoding, dtype):
    """Write arrays of ids one after the other to path -> what meta.json says of the set."""
    bytes_of = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)] + [0]
    counts, digest = np.zeros(encoding.n_vocab, dtype=np.int64), hashlib.sha256()
    with open(path, "wb") as f:
        for ids in arrays:
            ids = ids.astype(dtype)
            ids.tofile(f)
            digest.update(ids)
            counts += np.bincount(ids, minlength=encoding.n_vocab)
    return {"documents": int(counts[-1]), "tokens": int(counts.sum()), "bytes": int(counts @ bytes_of),
            "sha256": digest.hexdigest()}


def fingerprint(meta):
    """A hash of text, tokenizer and tasks: equal where results can be compared."""
    names = "tokenizer", "ids", "vocab_size", "dtype", "sets", "tasks"
    return sha(json.dumps([meta.get(name) for name in names]))


def load_meta(data_dir):
    """meta.json of a corpus folder: sizes, fingerprints, and what it was made from."""
    path = os.path.join(data_dir, "meta.json")
    if not os.path.exists(path):
        raise UserError(f"{data_dir} is not a corpus folder: make it with data.py, whose --help says how")
    try:
        meta = json.loads(Path(path).read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint(meta) or not {"arguments", "pattern"} <= meta.keys():
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: delete {data_dir} and make it again with data.py") from None
    return meta


def load_tokenizer(data_dir):
    """The tiktoken.Encoding a corpus folder was made with."""
    meta, vocab = load_meta(data_dir), Path(data_dir, "vocab.tiktoken").read_text(encoding="latin-1")
    if meta["tokenizer"] != sha(vocab + meta["pattern"]):
        raise UserError(f"{data_dir}/vocab.tiktoken is damaged: delete {data_dir} and make it again")
    lines = (line.split() for line in vocab.splitlines())
    return make_encoding({base64.b64decode(token): int(rank) for token, rank in lines}, meta["pattern"])


def load_tokens(path):
    """The ids of a set, DATA_DIR/NAME.bin, as a memory map; those that meta.json knows, or an error."""
    meta, name = load_meta(os.path.dirname(path)), os.path.basename(path).removesuffix(".bin")
    known = meta["sets"][name]
    if os.path.exists(path) and os.path.getsize(path) == known["tokens"] * np.dtype(meta["dtype"]).itemsize:
        tokens = np.memmap(path, dtype=meta["dtype"], mode="r")
        if name == "train" or hashlib.sha256(tokens).hexdigest() == known["sha256"]:     # train may be huge
            return tokens
    raise UserError(f"{path} is missing or damaged: delete its folder and make it again with data.py")


class Batches:
    """
    Batches(path, batch_size, block_size, seed)[step] -> x, y, int64 of shape (batch_size, block_size); y is x
    shifted by one token. A pure function of (seed, step), so resuming is indexing. The set is cut into
    windows of block_size, each of which comes once an epoch, in an order drawn from (seed, epoch).
    """
    def __init__(self, path, batch_size, block_size, seed):
        self.tokens = load_tokens(path)
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.n = (len(self.tokens) - 1) // block_size        # windows in an epoch
        self.epoch, self.order = None, None
        if self.n < batch_size:
            raise UserError(f"{path} has {len(self.tokens):,} tokens, fewer than one batch of {batch_size} x "
                            f"{block_size}: use more text or smaller batches")

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


# ---- what all command lines share --------------------------------------------

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def whole_number(text):
    """'1.5M' -> 1500000."""
    unit = UNITS.get(text[-1:].upper())
    try:
        return round(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        raise UserError(f"{text!r} is not a whole number such as 3000000 or 3M") from None


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
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


def name_and_file(text):
    """'news=news.txt' -> ('news', 'news.txt')."""
    name, _, path = text.partition("=")
    if not name.isidentifier() or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, with a NAME such as my_text")
    return name, path


def main():
    """Make the corpus that the command line asks for, and print what is in it."""
    parser = make_parser(__doc__)
    parser.add_argument("--corpus", default="python", choices=("python", "text", "fineweb-edu"),
                        help="what to tokenize (default: python)")
    parser.add_argument("--vocab_size", default="512", metavar="N", help="tokens in the vocabulary: 256 "
                        "bytes, merges, end-of-text; or gpt2, as fineweb-edu always has (default: 512)")
    parser.add_argument("--tokens", type=whole_number, metavar="N", help="fineweb-edu: training tokens, in "
                        "whole shards of 100 million; K, M, B are 10^3, 10^6, 10^9 (default: one shard)")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: data/CORPUS)")
    parser.add_argument("--train", nargs="+", action="extend", default=[], metavar="FILE",
                        help=f"text: UTF-8 files to train on, of which {VAL_PERCENT} %% is held out")
    parser.add_argument("--ood", nargs="+", action="extend", default=[], metavar="NAME=FILE",
                        type=name_and_file, help="your own out-of-distribution sets, one UTF-8 file each; "
                        "one of a NAME that the corpus has replaces it")
    parser.add_argument("--task", nargs="+", action="extend", default=[], metavar="NAME=FILE",
                        type=name_and_file, help='your own downstream tasks: JSON lines with "context", '
                        '"choices", "label", or HellaSwag\'s own file')
    args = parser.parse_args()
    ood, tasks = dict(args.ood), dict(args.task)
    if len(ood) < len(args.ood) or len(tasks) < len(args.task):
        parser.error("--ood and --task take each NAME once")
    if (args.corpus == "text") != bool(args.train):
        parser.error("--train FILES goes with --corpus text, and only with it")
    vocab_size = args.vocab_size if args.vocab_size == "gpt2" else whole_number(args.vocab_size)
    if vocab_size != "gpt2" and vocab_size < 257:
        parser.error(f"--vocab_size must be at least 257 (256 bytes and end-of-text), not {vocab_size}")
    out = args.out or f"data/{args.corpus}"
    meta = prepare(args.corpus, out, vocab_size, args.train, ood, args.tokens, tasks)
    print(f"{out}: vocabulary {meta['vocab_size']}, {meta['dtype']}, fingerprint {meta['fingerprint']}")
    for name, s in meta["sets"].items():
        print(f"  {name:13} {s['documents']:6,} documents {s['tokens']:11,} tokens, "
              f"{s['bytes'] / s['tokens']:.2f} bytes each")
    for name, task in meta["tasks"].items():
        print(f"  {f'task_{name}':13} {task['items']:6,} items")


if __name__ == "__main__":
    run_main(main)

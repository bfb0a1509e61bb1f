"""
Text -> a byte-pair vocabulary -> tokens on disk -> batches.

    python data.py                                           # --corpus python: downloads nothing
    python data.py --corpus text --train mine/*.txt --ood news=news.txt --out data/mine
    python data.py --corpus text --train mine/*.txt --vocab_size gpt2 --out data/mine_gpt2

The `python` corpus is the Python code on your machine. In domain: the sources of the standard
library and of torch. Out of distribution, for evaluation only: sympy, numpy and networkx (same language,
other authors), the C++ headers that come with torch, and English prose (Python's language reference).
It depends on the versions of Python, torch, numpy, sympy and networkx, which meta.json names, and a
little on how Python was installed. `text` takes your own files instead, and needs 1.3 times their size in
memory (four times, at most, if they are not ASCII). A document that differs from an earlier one only in white
space is left out; other near-duplicates stay.

Writes into --out: train.bin, val.bin and ood_NAME.bin (token ids, uint16, each document closed by
<|endoftext|>), vocab.tiktoken, and meta.json, written last: a folder without it is rebuilt.
Byte-pair encoding: Sennrich et al., arXiv 1508.07909; on bytes, as in GPT-2. tiktoken encodes.
"""
import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import sysconfig
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import regex                        # tiktoken's own dependency: `re` lacks \p{L}
import tiktoken
import torch
from tqdm import tqdm

FORMAT = 6                          # of a corpus folder: raise it when other files come out of the same text
END_OF_TEXT = "<|endoftext|>"
# words, numbers of up to 3 digits, punctuation, white space; a leading space belongs to the word, as in GPT-2
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VAL_PERCENT = 5                     # of the documents, chosen by a hash of their name
OOD_CHARS = 2_000_000               # characters of an out-of-distribution set, at most
BPE_CHARS = 4_000_000               # characters of training text from which the vocabulary is learned,
BPE_WORDS = 300_000                 # or fewer: bytes of distinct words, which are long without spaces
BUILD_FILES = ("_sysconfigdata", "version.py", "__config__.py")             # these differ with every build


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


def lines(path, most):
    """The lines of a UTF-8 text file, cut after `most` characters; <|endoftext|> alone, also at the end."""
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                if "\0" in line:                             # UTF-16 of English is valid UTF-8 with NULs
                    raise UserError(f"{path} is not UTF-8 text (it has NUL characters: is it UTF-16?)")
                for i, text in enumerate(line.split(END_OF_TEXT)):
                    if i > 0:
                        yield END_OF_TEXT
                    for start in range(0, len(text), most):
                        yield text[start:start + most]
        yield END_OF_TEXT
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason})") from None


def pieces(path):
    """
    A UTF-8 text file as documents, (hash, text). What <|endoftext|> separates is cut after `size` characters
    at the next blank line, or after half as many again at the end of a line. White space does not count, so
    that a copy with spaces at line ends is cut at the same places, and split_documents finds it.
    """
    size = 2_000
    while 1_000 * size < os.path.getsize(path) and size < 100_000:           # about 400 to 1,000 pieces
        size *= 2
    documents, piece, count = [], [], 0
    for line in lines(path, size // 2):
        if line != END_OF_TEXT:
            piece.append(line)
            count += len("".join(line.split()))
        if line == END_OF_TEXT or count >= 1.5 * size or count >= size and not line.strip():
            text = "".join(piece)
            if text.strip():
                documents.append((sha(text), text))
            piece, count = [], 0
    return documents


def distinct(documents, seen, most=float("inf")):
    """
    -> the documents whose text is not in `seen` (hashes, to which theirs are added), in the order of a hash
    of their names, until they have `most` characters.
    """
    kept, size = [], 0
    for name, text in sorted(documents, key=lambda document: sha(document[0])):
        if size >= most:
            break
        key = sha("".join(text.split()))                     # equal but for white space is equal
        if key not in seen:
            seen.add(key)
            kept.append((name, text))
            size += len(text)
    return kept


def split_documents(in_domain, ood):
    """
    -> {"train": documents, "val": ..., "ood_NAME": ...}. val by a hash of the name, so that adding a file
    moves no other; in the order of that hash, so that any prefix is a fair sample; no text twice.
    """
    sets, seen = {"train": [], "val": []}, set()
    for name, text in distinct(in_domain, seen):
        sets["val" if int(sha(name), 16) % 100 < VAL_PERCENT else "train"].append((name, text))
    for name, documents in ood.items():
        sets[f"ood_{name}"] = distinct(documents, seen, OOD_CHARS)
    for name, documents in sets.items():
        if not documents:                                    # ood_cpp: a torch without its headers
            raise UserError(f"the set {name} is empty: it needs about 100 kB of text that no other set has")
    return sets


# ---- the vocabulary ----------------------------------------------------------

def train_bpe(text, vocab_size, pattern=PATTERN):
    """
    Byte-pair encoding: start from the 256 bytes; vocab_size - 256 times, merge the commonest adjacent pair of
    tokens within a word into a new token, ties going to the lexicographically greater pair of byte strings.

    -> {token bytes: rank}, which is what tiktoken.Encoding takes; fewer than vocab_size where the text runs
    out of pairs. All different words stand in one array, each closed by -1; weight says how often they occur:
    "aab ab ab" -> ids=[97, 97, 98, -1, 32, 97, 98, -1], weight=[1, 1, 1, 1, 2, 2, 2, 2];
    the first merge, (97, 98) -> 256, makes them ids=[97, 256, -1, 32, 256, -1], weight=[1, 1, 1, 2, 2, 2].
    """
    words, size = Counter(), 0
    for word in regex.findall(pattern, text):
        size += 0 if word in words else len(word.encode())
        if size > BPE_WORDS and words:
            break
        words[word] += 1
    ids, weight = [], []
    for word, times in words.items():
        ids += [*word.encode(), -1]
        weight += [times] * (len(word.encode()) + 1)
    ids, weight = np.array(ids, np.int64), np.array(weight, np.int64)

    vocab = [bytes([b]) for b in range(256)]
    for new in tqdm(range(256, vocab_size), desc="merges", unit=" merge", disable=None, leave=False):
        at = np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0))                # where a pair begins
        if not len(at):
            break
        pairs = ids[at] * new + ids[at + 1]                  # a pair as one number
        kinds, kind = np.unique(pairs, return_inverse=True)
        counts = np.bincount(kind, weight[at])               # (kinds,)
        commonest = kinds[counts == counts.max()]
        best = max(commonest, key=lambda pair: (vocab[pair // new], vocab[pair % new]))
        at = at[pairs == best]
        # aaa has (a, a) twice, but only the first can be merged: at=[3, 4, 5, 9] -> [3, 5, 9]
        run = np.maximum.accumulate(np.where(np.diff(at, prepend=-2) > 1, at, 0))        # [3, 3, 3, 9]
        at = at[(at - run) % 2 == 0]
        ids[at] = new
        ids, weight = np.delete(ids, at + 1), np.delete(weight, at + 1)
        vocab.append(vocab[best // new] + vocab[best % new])
    return {token: rank for rank, token in enumerate(vocab)}


def make_encoding(ranks, pattern):
    """tiktoken.Encoding of {bytes: rank}, with end-of-text as the id after the last rank."""
    return tiktoken.Encoding("nanoteacher", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})


# ---- tokens on disk ----------------------------------------------------------

def prepare(corpus="python", out_dir="data/python", vocab_size=512, train=(), ood=None):
    """
    Make out_dir and return its meta. corpus: "python", or "text", from the files train; ood = {name: file}.
    vocab_size counts the bytes, the merges and end-of-text, or is "gpt2". A finished out_dir of the same
    arguments is left as it is; a different one is refused.
    """
    ood = ood or {}
    if vocab_size != "gpt2" and not 257 <= vocab_size <= 2**16:
        raise UserError(f"--vocab_size must be from 257 to 65536, not {vocab_size}")
    arguments = {"format": FORMAT, "corpus": corpus, "vocab_size": vocab_size, "ood": list(ood),
                 "files": [sha(Path(path).read_bytes()) for path in (*train, *ood.values())]}
    out = Path(out_dir)
    if (out / "meta.json").exists():
        meta = load_meta(out_dir)
        if meta["arguments"] != arguments:
            raise UserError(f"{out_dir} already holds a different corpus: delete it or use another folder; "
                            f"sweep.py --data {out_dir} takes it as it is")
        return meta

    # the text; a user's set replaces ours of the same name
    in_domain, outside = python_documents() if corpus == "python" else ([], {})
    for path in train:
        in_domain += pieces(path)
    outside |= {name: pieces(path) for name, path in ood.items()}
    sets = split_documents(in_domain, outside)

    # the vocabulary
    if vocab_size == "gpt2":
        encoding = tiktoken.get_encoding("gpt2")
        vocab_size = 50_304                                  # a multiple of 64, for the GPU
    else:
        sample = ""
        for _, text in sets["train"]:
            sample += text[:BPE_CHARS - len(sample)]
        encoding = make_encoding(train_bpe(sample, vocab_size - 1), PATTERN)
        vocab_size = encoding.n_vocab

    # the files, in a temporary folder first, so that two may make one corpus at once; meta.json comes last
    vocab = "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                    for token, rank in encoding._mergeable_ranks.items())
    packages = "torch", "numpy", "sympy", "networkx"
    meta = {"arguments": arguments, "tokenizer": sha(vocab + encoding._pat_str),
            "pattern": encoding._pat_str,
            "vocab_size": vocab_size, "n_vocab": encoding.n_vocab}           # gpt2: 50,304 and 50,257
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as aside:
        Path(aside, "vocab.tiktoken").write_text(vocab)
        meta["sets"] = {name: write_set(f"{aside}/{name}.bin", sets[name], encoding) for name in sets}
        # results compare only where these agree
        meta["fingerprint"] = sha(json.dumps([meta["tokenizer"], meta["vocab_size"], meta["sets"]]))
        if corpus == "python":
            meta["versions"] = {"python": sys.version.split()[0]} | {
                d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
        for name in os.listdir(aside):
            os.replace(f"{aside}/{name}", out / name)
        Path(aside, "meta.json").write_text(json.dumps(meta, indent=1))
        os.replace(f"{aside}/meta.json", out / "meta.json")
    return meta


def write_set(path, documents, encoding):
    """Write the ids of documents (name, text), each closed by end-of-text -> the set's entry in meta.json."""
    tokens, digest = 0, hashlib.sha256()
    with open(path, "wb") as f:
        for _, text in tqdm(documents, desc="encoding", disable=None, leave=False):
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            ids = np.append(ids, encoding.eot_token).astype(np.uint16)
            f.write(ids)
            digest.update(ids)
            tokens += len(ids)
    return {"documents": len(documents), "tokens": tokens, "sha256": digest.hexdigest()}


def load_meta(data_dir):
    """meta.json of a corpus folder: sizes, fingerprints, and what it was made from."""
    path = Path(data_dir, "meta.json")
    if not path.exists():
        raise UserError(f"{data_dir} is not a corpus folder: make it with data.py, whose --help says how")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is cut off: delete {data_dir} and make it again with data.py") from None
    if meta.get("arguments", {}).get("format") != FORMAT:
        raise UserError(f"{data_dir} was made by another version: delete it and make it again with data.py")
    return meta


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


def evenly_spaced(items, most):
    """At most `most` of the items, evenly spaced."""
    n = min(len(items), most)
    return [items[k * len(items) // n] for k in range(n)]


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
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        start = int(self.order[position]) * self.block_size
        return self.tokens[start:start + self.block_size + 1]

    def __getitem__(self, step):
        rows = np.stack([self.window(step * self.batch_size + j) for j in range(self.batch_size)])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def note_repeats(data_dir, tokens):
    """Say on stderr if a run of `tokens` tokens reads its text more than once."""
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
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:                                  # `... | head -1`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # for the flush at exit
        sys.exit(1)
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
    add = parser.add_argument
    add("--corpus", default="python", choices=("python", "text"), help="what to tokenize (default: python)")
    add("--vocab_size", type=gpt2_or_number, default=512, metavar="N", help="tokens in the vocabulary: "
        "256 bytes, merges, end-of-text; or gpt2 (default: 512)")
    add("--out", type=os.path.expanduser, metavar="DIR", help="folder to write (default: data/CORPUS)")
    add("--train", nargs="+", action="extend", default=[], type=os.path.expanduser, metavar="FILE",
        help=f"text: UTF-8 files to train on, of which {VAL_PERCENT} %% is held out")
    add("--ood", nargs="+", action="extend", default=[], metavar="NAME=FILE",
        help="your own out-of-distribution sets, one UTF-8 file each, of which about "
        f"{OOD_CHARS:,} characters are used; a NAME that the corpus has is replaced")
    args = parser.parse_args()
    pairs = [text.partition("=") for text in args.ood]
    ood = {name: os.path.expanduser(file) for name, _, file in pairs}
    if len(ood) < len(args.ood) or not all(name.isidentifier() and ood[name] for name in ood):
        parser.error("--ood takes NAME=FILE, such as my_text=my.txt, and each NAME once")
    if (args.corpus == "text") != bool(args.train):
        parser.error("--train FILES goes with --corpus text, and only with it")
    out = args.out or f"data/{args.corpus}"
    meta = prepare(args.corpus, out, args.vocab_size, args.train, ood)
    print(f"{out}: vocabulary {meta['vocab_size']}, fingerprint {meta['fingerprint']}")
    for name, s in meta["sets"].items():
        print(f"  {name:13} {s['documents']:6,} documents {s['tokens']:11,} tokens")


if __name__ == "__main__":
    run_main(main)

"""
Text -> tokens on disk -> batches.

    python data.py --corpus python --vocab_size 512 --out data/python
    python data.py --corpus text --train mine/*.txt --ood news=news.txt --out data/mine

The `python` corpus downloads nothing: it is the Python that is already on the machine. In domain: the sources
of the standard library and of torch. Out of distribution, for evaluation only: sympy, numpy and networkx
(same language, other authors), the C++ headers that come with torch, and English prose (Python's language
reference, package descriptions). The `text` corpus does the same for your own files.

Writes into --out: train.bin, val.bin and ood_NAME.bin (token ids, uint16 or uint32, each document closed by
<|endoftext|>), tokenizer.json, and meta.json, written last: a folder without it is unfinished and is made
again. Byte-pair encoding: Sennrich et al., arXiv 1508.07909; on bytes, as in GPT-2. Encoding is done by
tiktoken.
"""
import argparse
import ast
import base64
import functools
import hashlib
import heapq
import importlib.metadata
import importlib.util
import json
import os
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex                        # tiktoken's own dependency: `re` lacks \p{L}
import tiktoken
import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:                 # on Windows nothing keeps two processes apart
    fcntl = None

END_OF_TEXT = "<|endoftext|>"
# words, numbers of up to 3 digits, punctuation, and white space; a leading space belongs to the word, as in
# GPT-2
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VAL_PERCENT = 5                     # of the files, chosen by a hash of their name
OOD_BYTES = 2_000_000               # of text an out-of-distribution set is cut to: far more than is evaluated
BPE_BYTES = 4_000_000               # of training text the vocabulary is learned from
PROSE = ("torch", "numpy", "tiktoken", "tqdm", "sympy", "networkx", "mpmath", "jinja2", "markupsafe",
         "filelock", "fsspec", "regex", "requests", "urllib3", "idna", "certifi", "charset-normalizer")


class DataError(ValueError):
    """Text or token files that are missing, damaged, too small, or not what was asked for."""


def sha(data, digits=16):
    """The first hex digits of the sha256 of bytes or text."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:digits]


# ------------------------------------------------------------------------------
# the text: each set is a list of (name, text), in the order of the hash of the name, so that any prefix is a
# fair sample

def read_tree(label, root, *endings):
    """(label/relative path, text) of the files below root with these endings that are UTF-8 and not empty."""
    skip = {"site-packages", "dist-packages", "pydoc_data"}
    for path in Path(root).rglob("*"):
        inside = path.relative_to(root)
        if path.suffix in endings and not skip & set(inside.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue                                     # some test files are broken on purpose
            if text.strip():
                yield f"{label}/{inside.as_posix()}", text


def python_corpus():
    """-> (in-domain documents, {name: out-of-distribution ones}) of what is installed. Raises DataError."""
    def package(name):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise DataError(f"the python corpus needs {name}: pip install -r requirements.txt")
        return Path(spec.origin).parent

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    in_domain = [*read_tree("stdlib", stdlib, ".py"), *read_tree("torch", package("torch"), ".py")]
    ood = {name: list(read_tree(name, package(name), ".py")) for name in ("sympy", "numpy", "networkx")}
    ood["cpp"] = list(read_tree("include", package("torch") / "include", ".h", ".hpp", ".cuh"))
    # the language reference is one dict of strings: pydoc's help topics
    topics = stdlib / "pydoc_data" / "topics.py"
    tree = ast.parse(topics.read_text(encoding="utf-8")) if topics.exists() else ast.Module(body=[])
    ood["prose"] = [(f"topics/{name}", text) for node in tree.body if isinstance(node, ast.Assign)
                    for name, text in ast.literal_eval(node.value).items()]
    for name in PROSE:
        try:
            text = importlib.metadata.distribution(name).read_text("METADATA")
            if text:                                         # some systems keep it under another name
                ood["prose"].append((f"description/{name}", text))
        except importlib.metadata.PackageNotFoundError:
            pass
    return in_domain, ood


def text_corpus(train, ood):
    """The same from a user's own files: train is a list of paths, ood {name: paths}. Raises DataError."""
    def pieces(paths):
        for path in paths:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path} is not UTF-8 text") from None
            except OSError as e:
                raise DataError(f"cannot read {path}: {e.strerror}") from None
            piece = ""                                       # cut at blank lines: a long file can be split
            for paragraph in text.split("\n\n"):
                piece += paragraph + "\n\n"
                if len(piece) >= 2000:
                    yield f"{sha(piece)}", piece
                    piece = ""
            if piece.strip():
                yield f"{sha(piece)}", piece
    if not train:
        raise DataError("the text corpus needs --train FILES")
    return list(pieces(train)), {name: list(pieces(paths)) for name, paths in ood.items()}


def split_documents(in_domain, ood):
    """-> {"train": docs, "val": docs, "ood_NAME": docs}; val by a hash of the name; copies are dropped."""
    sets, seen = defaultdict(list), set()
    for name, text in sorted(in_domain, key=lambda d: sha(d[0])):
        if sha(text) not in seen:
            seen.add(sha(text))
            sets["val" if int(sha(name), 16) % 100 < VAL_PERCENT else "train"].append((name, text))
    for key, documents in ood.items():
        size = 0
        for name, text in sorted(documents, key=lambda d: sha(d[0])):
            if size < OOD_BYTES and sha(text) not in seen:
                seen.add(sha(text))
                sets[f"ood_{key}"].append((name, text))
                size += len(text)
    return dict(sets)


# ------------------------------------------------------------------------------
# the vocabulary

def train_bpe(text, vocab_size, pattern=PATTERN):
    """
    Byte-pair encoding: start from the 256 bytes; vocab_size - 256 times, merge the commonest adjacent pair of
    tokens within a word into a new token. Ties go to the lexicographically greater pair of byte strings.

    -> {token bytes: rank}, which is what tiktoken.Encoding takes; fewer than vocab_size if the text runs out
    of pairs. Raises DataError if vocab_size < 256.

    Recounting every pair at each merge is the plain way and gives the same merges (the tests do that). Here a
    merge touches only the words that hold the pair, found by `where`, and the largest count is on top of a
    heap, whose entries are checked against the true count when they come up.
    """
    if vocab_size < 256:
        raise DataError(f"a byte-pair vocabulary has at least the 256 bytes, so not {vocab_size}")
    vocab = [bytes([b]) for b in range(256)]
    word_counts = Counter(regex.findall(pattern, text))
    words = [list(w.encode("utf-8")) for w in word_counts]
    freq = list(word_counts.values())
    count, where = Counter(), defaultdict(set)               # pair -> how often, pair -> in which words
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            count[pair] += freq[w]
            where[pair].add(w)

    descending = {b: chr(255 - b) for b in range(256)}
    def key(token):                                          # a string that sorts the other way round
        return token.decode("latin-1").translate(descending) + chr(256)
    keys = [key(t) for t in vocab]
    def entry(pair):
        return -count[pair], keys[pair[0]], keys[pair[1]], pair

    heap = [entry(pair) for pair in count]
    heapq.heapify(heap)
    bar = tqdm(total=vocab_size - 256, desc="merges", unit=" merge", disable=None, leave=False)
    while len(vocab) < vocab_size and heap:
        n, _, _, pair = heapq.heappop(heap)
        if -n != count[pair]:                                # an old entry: put the true count in its place
            if count[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        new = len(vocab)
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
        keys.append(key(vocab[new]))
        changed = set()
        for w in where.pop(pair):
            ids, out, i = words[w], [], 0
            while i < len(ids):                              # left to right, as the encoder will
                if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
                    out.append(new)
                    i += 2
                else:
                    out.append(ids[i])
                    i += 1
            for p in zip(ids, ids[1:]):
                count[p] -= freq[w]
            for p in zip(out, out[1:]):
                count[p] += freq[w]
                where[p].add(w)
                if new in p:
                    changed.add(p)
            words[w] = out
        for p in changed:                                    # other counts only fell: those come up early
            heapq.heappush(heap, entry(p))
        bar.update()
    bar.close()
    return {token: rank for rank, token in enumerate(vocab)}


def make_encoding(ranks, pattern):
    """tiktoken.Encoding of {bytes: rank}, with end-of-text as the id after the last rank."""
    return tiktoken.Encoding("nanodistill", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})


def read_json(path, most):
    """The value of a JSON file of at most so many bytes. Raises FileNotFoundError, or ValueError."""
    if os.path.getsize(path) > most:
        raise ValueError(f"{path} is larger than {most} bytes")
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply") from None


def read_lines(path):
    """The values of a file of JSON lines. Raises OSError, or DataError with the line that is none."""
    values = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                values += [json.loads(line.decode())] if line.strip() else []
            except (ValueError, RecursionError):
                raise DataError(f"{path}: line {number} is no JSON") from None
    return values


def load_tokenizer(data_dir):
    """The tiktoken.Encoding a corpus folder was made with. Raises DataError."""
    path, meta = os.path.join(data_dir, "tokenizer.json"), load_meta(data_dir)
    try:
        saved = read_json(path, 2**26)
        tokens = [base64.b64decode(token) for token in saved["tokens"]]
        if (sha(json.dumps(saved)) != meta["tokenizer"] or saved["pattern"] != PATTERN
                or len(tokens) != meta["vocab_size"] - 1 or len(set(tokens)) != len(tokens)
                or not {bytes([b]) for b in range(256)} <= set(tokens)):
            raise ValueError
        return make_encoding({token: rank for rank, token in enumerate(tokens)}, saved["pattern"])
    except FileNotFoundError:
        raise DataError(f"no tokenizer at {path}: make the corpus with data.py --out {data_dir}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: delete {data_dir} and make it again with data.py") from None


# ------------------------------------------------------------------------------
# tokens on disk

def checksum(meta):
    """Of everything else in a meta.json."""
    return sha(json.dumps({key: value for key, value in meta.items() if key != "checksum"}, sort_keys=True))


META = {"corpus": str, "source": str, "fingerprint": str, "tokenizer": str, "asked_vocab_size": int,
        "vocab_size": int, "dtype": str, "sets": dict}       # what meta.json holds, and of each set:
SET = {"documents": int, "tokens": int, "bytes": int, "bytes_per_token": float, "sha256": str}


def load_meta(data_dir):
    """meta.json of a corpus folder: fingerprints, counts, bytes per token, versions. Raises DataError."""
    path = os.path.join(data_dir, "meta.json")
    try:
        meta = read_json(path, 2**20)
        fit = (all(type(meta[key]) is kind for key, kind in META.items())
               and all(type(s[key]) is kind for s in meta["sets"].values() for key, kind in SET.items())
               and all(regex.fullmatch(r"train|val|ood_\w+", name) for name in meta["sets"]))
        if (not fit or meta["checksum"] != checksum(meta) or meta["dtype"] not in ("uint16", "uint32")
                or not 257 <= meta["vocab_size"] <= 2**20):
            raise ValueError
        meta["sets"]["train"], meta["sets"]["val"]
        return meta
    except FileNotFoundError:
        raise DataError(f"{data_dir} has no meta.json, so is no corpus: make one with data.py") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged: delete {data_dir} and make it again with data.py") from None


@functools.lru_cache(maxsize=64)
def contents(path, dtype, modified):
    """-> sha256 and largest id of a .bin, read once a process and version of the file."""
    digest, largest = hashlib.sha256(), -1
    with open(path, "rb") as f:
        while part := f.read(2**24):
            digest.update(part)
            largest = max(largest, int(np.frombuffer(part, dtype).max()))
    return digest.hexdigest(), largest


def load_tokens(path):
    """The ids in a .bin as a memory map, checked against meta.json beside it. Raises DataError."""
    meta = load_meta(os.path.dirname(path) or ".")
    name = os.path.basename(path).removesuffix(".bin")
    if name not in meta["sets"]:
        raise DataError(f"{path} is not a set of this corpus, which has {', '.join(meta['sets'])}")
    expected = meta["sets"][name]["tokens"] * np.dtype(meta["dtype"]).itemsize
    if not os.path.isfile(path) or os.path.getsize(path) != expected or not expected:
        raise DataError(f"{path} is missing or not {expected:,} bytes long: delete its folder and make it "
                        "again with data.py")
    found, largest = contents(path, meta["dtype"], os.stat(path).st_mtime_ns)
    if found != meta["sets"][name]["sha256"] or largest >= meta["vocab_size"]:
        raise DataError(f"{path} is damaged: delete its folder and make it again with data.py")
    return np.memmap(path, dtype=meta["dtype"], mode="r")


class Batches:
    """
    Batches(path, batch_size, block_size, seed)[step] -> x, y, int64 of shape (batch_size, block_size); y is x
    moved on by one token. A pure function of (seed, step), so resuming is indexing. The file is cut into
    windows of block_size; every window comes once an epoch, in an order drawn from (seed, epoch). Holds 4
    bytes a window. Raises DataError.
    """
    def __init__(self, path, batch_size, block_size, seed):
        self.tokens = load_tokens(path)
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.n = (len(self.tokens) - 1) // block_size        # windows in an epoch
        if self.n < batch_size:
            raise DataError(f"{path} has {len(self.tokens):,} tokens, fewer than one batch of {batch_size} x "
                            f"{block_size}: use more text or smaller batches")
        self.epoch, self.order = None, None

    def window(self, i):
        epoch, position = divmod(i, self.n)
        if epoch != self.epoch:
            order = np.arange(self.n, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self.epoch, self.order = epoch, order
        start = int(self.order[position]) * self.block_size
        return self.tokens[start:start + self.block_size + 1]

    def __getitem__(self, step):
        rows = np.stack([self.window(step * self.batch_size + j) for j in range(self.batch_size)])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def prepare(corpus="python", out_dir="data/python", vocab_size=512, train=(), ood=None):
    """
    Make out_dir from a corpus, "python" or "text" (then from the files train and ood = {name: files}), and
    return its meta. vocab_size counts the bytes, the merges and end-of-text. A finished out_dir made by the
    same call is left as it is; one made by another is an error. Raises DataError before anything is written.
    """
    if vocab_size < 257:
        raise DataError(f"--vocab_size must be at least 257 (256 bytes and end-of-text), not {vocab_size}")
    if corpus == "python":
        if os.path.exists(os.path.join(out_dir, "meta.json")):
            meta = load_meta(out_dir)
            if (meta["corpus"], meta["asked_vocab_size"]) == (corpus, vocab_size):
                return meta
        in_domain, out_of_domain = python_corpus()
    elif corpus == "text":
        in_domain, out_of_domain = text_corpus(train, ood or {})
    else:
        raise DataError(f"unknown corpus {corpus!r}: python or text")
    sets = split_documents(in_domain, out_of_domain)
    for name in ("train", "val", *(f"ood_{key}" for key in out_of_domain)):
        if not sets.get(name):
            raise DataError(f"the set {name} came out empty: it needs more text")
    lines = [f"{key} {name} {sha(text)}" for key, documents in sets.items() for name, text in documents]
    source = sha("\n".join([str(vocab_size), *lines]))
    if os.path.exists(os.path.join(out_dir, "meta.json")):
        if load_meta(out_dir)["source"] == source:
            return load_meta(out_dir)
        raise DataError(f"{out_dir} holds another corpus: choose another --out, or delete it")

    os.makedirs(out_dir, exist_ok=True)
    claim = lock(out_dir, wait=600)                          # held until this function returns
    if os.path.exists(os.path.join(out_dir, "meta.json")):   # another process was faster
        return prepare(corpus, out_dir, vocab_size, train, ood)
    sample, size = [], 0
    for _, text in sets["train"]:
        if size < BPE_BYTES:
            sample.append(text)
            size += len(text)
    ranks = train_bpe("\n".join(sample)[:BPE_BYTES], vocab_size - 1, PATTERN)
    encoding = make_encoding(ranks, PATTERN)
    tokenizer = json.dumps({"pattern": PATTERN, "tokens": [base64.b64encode(t).decode() for t in ranks]})
    write(out_dir, "tokenizer.json", tokenizer.encode())

    versions = {p: importlib.metadata.version(p) for p in ("torch", "numpy", "tiktoken", "sympy", "networkx")}
    meta = {"corpus": corpus, "source": source, "fingerprint": None, "tokenizer": sha(tokenizer),
            "asked_vocab_size": vocab_size, "vocab_size": encoding.n_vocab,
            "dtype": "uint16" if encoding.n_vocab <= 65536 else "uint32", "sets": {},
            "versions": {"python": sys.version.split()[0], **versions}}
    size = sum(len(text) for documents in sets.values() for _, text in documents)
    bar = tqdm(total=size, desc="encoding", unit="B", unit_scale=True, disable=None)
    for name, documents in sets.items():
        ids = []
        for i in range(0, len(documents), 64):
            texts = [text for _, text in documents[i:i + 64]]
            for document in encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1):
                ids.append(np.array(document + [encoding.eot_token], dtype=meta["dtype"]))
            bar.update(sum(map(len, texts)))
        ids = np.concatenate(ids)
        n_bytes = sum(len(text.encode("utf-8")) for _, text in documents)
        write(out_dir, f"{name}.bin", ids.tobytes())
        meta["sets"][name] = {"documents": len(documents), "tokens": len(ids), "bytes": n_bytes,
                              "bytes_per_token": round(n_bytes / len(ids), 4),
                              "sha256": sha(ids.tobytes(), 64)}
    bar.close()
    meta["fingerprint"] = sha(json.dumps([meta["tokenizer"], meta["sets"]]))
    meta["checksum"] = checksum(meta)
    write(out_dir, "meta.json", json.dumps(meta, indent=1).encode())
    return meta


def write(folder, name, data):
    """Write bytes under a temporary name, flush to the disk, rename."""
    temporary = os.path.join(folder, f"{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, os.path.join(folder, name))
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def lock(folder, wait=5):
    """
    Claim a folder for this process, and clear what a killed one left half-written. The claim ends with the
    object that is returned, or with the process. Raises DataError if another has it for `wait` seconds more.
    """
    claim, until = open(os.path.join(folder, ".lock"), "w"), time.monotonic() + wait
    while fcntl:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise DataError(f"another process is at work in {folder}: wait for it, or stop it") from None
            time.sleep(0.1)
    for pattern in ("*.tmp", "*/*.tmp"):
        for half in Path(folder).glob(pattern):
            half.unlink(missing_ok=True)
    return claim


class Parser(argparse.ArgumentParser):
    """The command line of a script: its docstring is the help; a mistake is one line and exit code 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def parse_args(self, argv=None):
        for word in sys.argv[1:] if argv is None else argv:
            if word.endswith("=--"):                         # argparse would make an empty list of it
                self.error(f"{word} has no value")
        return super().parse_args(argv)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists every flag)\n")


def run(main, *errors):
    """Run a script: bad input (DataError, OSError, errors) is one line and exit code 2; Ctrl-C, 130."""
    for stream in (sys.stdout, sys.stderr):                  # a file's name can be more than these can print
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (DataError, OSError, MemoryError, RuntimeError, *errors) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise                                            # a fault of ours; without memory is torch's own word
        print(f"error: {e or 'out of memory'}".split("\n")[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; start the same command again", file=sys.stderr)
        sys.exit(130)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--corpus", default="python", choices=("python", "text"),
                        help="what to tokenize (default: python)")
    parser.add_argument("--vocab_size", type=int, default=512,
                        help="tokens in the vocabulary: 256 bytes, merges, end-of-text (default: 512)")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: data/CORPUS)")
    parser.add_argument("--train", nargs="+", default=[], metavar="FILE",
                        help=f"text corpus: UTF-8 files to train on; {VAL_PERCENT} %% of it is held out")
    parser.add_argument("--ood", nargs="+", action="append", default=[], metavar="NAME=FILE",
                        help="text corpus: an out-of-distribution set, NAME=FILE FILE ...; repeatable")
    args = parser.parse_args()
    ood = {}
    for first, *more in args.ood:
        name, equals, path = first.partition("=")
        if not equals or not name.isidentifier():
            parser.error(f"--ood takes NAME=FILE, not {first}")
        if name in ood:
            parser.error(f"--ood names {name} twice: give all its files at once")
        ood[name] = [path, *more]
    if args.corpus == "python" and (args.train or ood):
        parser.error("--train and --ood go with --corpus text")
    out = args.out or f"data/{args.corpus}"
    meta = prepare(args.corpus, out, args.vocab_size, args.train, ood)
    print(f"{out}: vocabulary {meta['vocab_size']}, {meta['dtype']}, fingerprint {meta['fingerprint']}")
    for name, s in meta["sets"].items():
        print(f"  {name:13} {s['documents']:6,} documents {s['tokens']:11,} tokens, "
              f"{s['bytes_per_token']:.2f} bytes each")


if __name__ == "__main__":
    run(main)

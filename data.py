"""
Text -> tokens on disk -> batches.

    python data.py --corpus python --vocab_size 512 --out data/python
    python data.py --corpus text --train mine/*.txt --ood news=news.txt --out data/mine
    python data.py --corpus fineweb-edu --tokens 1B        # the paper's corpus: downloads 2 GB

The `python` corpus downloads nothing: it is the Python that is already on the machine. In domain: the sources
of the standard library and of torch. Out of distribution, for evaluation only: sympy, numpy and networkx
(same language, other authors), the C++ headers that come with torch, and English prose (Python's language
reference, package descriptions). The `text` corpus does the same for your own files. fineweb-edu, tinystories
and shakespeare are downloaded and have GPT-2's vocabulary; their out-of-distribution sets are Wikipedia, a
novel, news, and the standard library's code.

Writes into --out: train.bin, val.bin and ood_NAME.bin (token ids, uint16 or uint32, each document closed by
<|endoftext|>; fineweb-edu's training shards stay as they came), tokenizer.json, and meta.json, written last:
a folder without it is unfinished and is made again. Byte-pair encoding: Sennrich et al., arXiv 1508.07909; on
bytes, as in GPT-2. Encoding is done by tiktoken.
"""
import argparse
import ast
import base64
import csv
import functools
import hashlib
import heapq
import http.client
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
import zlib
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
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_VOCABULARY = 50_304            # its 50,257 tokens, and as many more as make a multiple of 64
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


def pieces(text):
    """A long text as documents, cut at <|endoftext|> and at blank lines: (name, text), and can be split."""
    for document in text.split(END_OF_TEXT):
        piece = ""
        for paragraph in document.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= 2000:
                yield sha(piece), piece
                piece = ""
        if piece.strip():
            yield sha(piece), piece


def text_corpus(train, ood):
    """The same from a user's own files: train is a list of paths, ood {name: paths}. Raises DataError."""
    def read(path):
        try:
            return Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text") from None
        except OSError as e:
            raise DataError(f"cannot read {path}: {e.strerror}") from None
    if not train:
        raise DataError("the text corpus needs --train FILES")
    return ([piece for path in train for piece in pieces(read(path))],
            {name: [piece for path in paths for piece in pieces(read(path))] for name, paths in ood.items()})


# ------------------------------------------------------------------------------
# downloads

HUB = "https://huggingface.co/datasets"
GITHUB = "https://raw.githubusercontent.com"
FINEWEB = HUB + "/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/edu_fineweb_{}_{:06d}.bin"
TEXTS = {                           # name -> address, and the file inside where it is a zip
    "tinystories": (f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", ""),
    "shakespeare": (f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", ""),
    "wikipedia": ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip", "wiki.test.raw"),
    "novel": ("https://www.gutenberg.org/cache/epub/2701/pg2701.txt", ""),
    "news": (f"{GITHUB}/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/test.csv", ""),
}
DOWNLOADED = ("fineweb-edu", "tinystories", "shakespeare")
SHARD = 100_000_000                 # tokens of a fineweb-edu shard,
HEADER = 1024                       # which follow so many bytes
HELD_OUT = 4_000_000                # tokens kept of its validation shard


def download(url, path, tries=8, pause=1.0):
    """
    Fetch url to path, which comes into being whole, at the length the server tells, or not at all. Goes on
    where a connection broke; after errors that pass (cut or silent connections, HTTP 429 and 5xx) tries
    again, each time after twice the pause, in seconds. Raises DataError.
    """
    part = f"{path}.part"
    for attempt in range(tries):
        have = os.path.getsize(part) if os.path.exists(part) else 0
        headers = {"User-Agent": "nanodistill", "Range": f"bytes={have}-"}
        request = urllib.request.Request(url, headers=headers)
        wait = min(60.0, pause * 2**attempt)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                have = have if reply.status == 206 else 0        # the server may start anew
                total = have + int(reply.headers["Content-Length"] or 0)
                with (open(part, "ab" if have else "wb") as f,
                      tqdm(desc=os.path.basename(path), total=total, initial=have, unit="B", unit_scale=True,
                           disable=None) as bar):
                    while chunk := reply.read(2**20):
                        f.write(chunk)
                        bar.update(len(chunk))
                    if 0 < total != f.tell():
                        raise ConnectionError(f"{f.tell():,} of {total:,} bytes came")
            os.replace(part, path)
            return
        except urllib.error.HTTPError as e:
            error = f"HTTP {e.code} {e.reason}"
            if e.code == 416:                                # nothing is left to send: whole, or too long
                if (e.headers.get("Content-Range") or "").endswith(f"/{have}"):
                    return os.replace(part, path)
                os.remove(part)
            elif e.code not in (408, 425, 429) and e.code < 500:
                break
            if (e.headers.get("Retry-After") or "").isdigit():
                wait = min(600.0, max(wait, float(e.headers["Retry-After"])))
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            error = str(getattr(e, "reason", e))
        if attempt < tries - 1:
            print(f"{url}: {error}; trying again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    raise DataError(f"cannot download {url}: {error}. The same command goes on from what has come")


def shard_tokens(path):
    """The ids of a fineweb-edu shard as a memory map, its header and length checked. Raises DataError."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 256)
    if (size < HEADER or (header[0], header[1]) != (20240520, 1)
            or size != HEADER + 2 * int(header[2]) or header[2] < 1):
        raise DataError(f"{path} is no shard of tokens, or cut short: delete it and start again")
    return np.memmap(path, "<u2", "r", offset=HEADER)


def fineweb_shards(out_dir, tokens):
    """Download what is missing -> names of the training shards for so many tokens, and the held-out ids."""
    names = [f"edu_fineweb_train_{i:06d}.bin" for i in range(1, 1 + math.ceil(tokens / SHARD))]
    wanted = ["edu_fineweb_val_000000.bin", *names]
    missing = [name for name in wanted if not os.path.exists(os.path.join(out_dir, name))]
    need, free = len(missing) * 2 * SHARD, shutil.disk_usage(out_dir).free
    if need > free:
        raise DataError(f"{len(missing)} shards need {need / 2**30:.1f} GiB of disk, and {free / 2**30:.1f} "
                        f"are free in {out_dir}: fewer --tokens, or another --out")
    for name in wanted:
        _, _, kind, number = name.removesuffix(".bin").split("_")
        if name in missing:
            download(FINEWEB.format(kind, int(number)), os.path.join(out_dir, name))
        shard_tokens(os.path.join(out_dir, name))
    return names, shard_tokens(os.path.join(out_dir, "edu_fineweb_val_000000.bin"))[:HELD_OUT]


def read_member(path, member, most):
    """
    Read the file inside the zip at path whose name ends so -> bytes, at most so many. It is never unpacked to
    disk, so its names lead nowhere. Raises DataError.
    """
    try:
        with zipfile.ZipFile(path) as z, z.open(next(n for n in z.namelist() if n.endswith(member))) as f:
            return f.read(most)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, StopIteration):
        raise DataError(f"{path} is no zip that holds {member}: delete it and start again") from None


def fetched_text(name, folder, most=None):
    """
    The text of one of TEXTS, downloaded to folder if it is not there; of a plain file at most so many bytes.
    Raises DataError.
    """
    url, member = TEXTS[name]
    path = os.path.join(folder, f"{name}.{'zip' if member else 'txt'}")
    if not os.path.exists(path):
        download(url, path)
    if member:
        found = read_member(path, member, 2 * OOD_BYTES)
    else:
        with open(path, "rb") as f:
            found = f.read(most)
    text = found.decode("utf-8", errors="replace")
    if name == "news":                                       # class, title, text
        text = "\n\n".join("\n".join(row[1:]) for row in csv.reader(text.splitlines()))
    return text


def downloaded_corpus(corpus, folder, tokens):
    """-> (in-domain documents, none for fineweb-edu; {name: out-of-distribution ones}). Raises DataError."""
    most = 5 * tokens if tokens else None                    # bytes: a token is 4 to 4.5 of them
    in_domain = [] if corpus == "fineweb-edu" else list(pieces(fetched_text(corpus, folder, most)))
    ood = {name: list(pieces(fetched_text(name, folder))) for name in ("wikipedia", "novel", "news")}
    ood["code"] = list(read_tree("stdlib", sysconfig.get_paths()["stdlib"], ".py"))
    return in_domain, ood


def gpt2_ranks():
    """{bytes: rank} of GPT-2's vocabulary, which tiktoken downloads once. Raises DataError."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as e:                                   # the network's errors are of many kinds
        raise DataError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to the folder where tiktoken.get_encoding('gpt2') has stored it "
                        "on another machine") from None
    return {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}


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
        if (sha(json.dumps(saved)) != meta["tokenizer"] or saved["pattern"] not in (PATTERN, GPT2_PATTERN)
                or len(tokens) != meta["ids"] - 1 or len(set(tokens)) != len(tokens)
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
        "ids": int, "vocab_size": int, "dtype": str, "sets": dict}           # of meta.json, and of each set:
SET = {"documents": int, "tokens": int, "bytes": int, "bytes_per_token": float, "sha256": str}
SHARDS = {"name": str, "tokens": int, "sha256": str}         # a set in fineweb-edu's own files has "shards"


def load_meta(data_dir):
    """meta.json of a corpus folder: fingerprints, counts, bytes per token, versions. Raises DataError."""
    path = os.path.join(data_dir, "meta.json")
    try:
        meta = read_json(path, 2**20)
        fit = (all(type(meta[key]) is kind for key, kind in META.items())
               and all(type(s[key]) is kind for s in meta["sets"].values() for key, kind in SET.items())
               and all(regex.fullmatch(r"train|val|ood_\w+", name) for name in meta["sets"])
               and all(type(shard[key]) is kind and regex.fullmatch(r"\w+\.bin", shard["name"])
                       for s in meta["sets"].values() for shard in s.get("shards", ())
                       for key, kind in SHARDS.items()))
        if (not fit or meta["checksum"] != checksum(meta) or meta["dtype"] not in ("uint16", "uint32")
                or not 257 <= meta["ids"] <= meta["vocab_size"] <= 2**20):
            raise ValueError
        meta["sets"]["train"], meta["sets"]["val"]
        return meta
    except FileNotFoundError:
        raise DataError(f"{data_dir} has no meta.json, so is no corpus: make one with data.py") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged: delete {data_dir} and make it again with data.py") from None


@functools.lru_cache(maxsize=4096)
def contents(path, dtype, modified, header=0):
    """-> sha256 and largest id of a .bin, its ids after the header, read once a process and version."""
    digest, largest = hashlib.sha256(), -1
    with open(path, "rb") as f:
        while part := f.read(2**24):
            digest.update(part)
            start = header if largest < 0 else 0             # the first part has it
            largest = max(largest, int(np.frombuffer(part, dtype, offset=start).max(initial=0)))
    return digest.hexdigest(), largest


def checked(path, tokens, digest, meta, header=0):
    """A memory map of the ids in a .bin that holds what meta.json tells. Raises DataError."""
    expected = tokens * np.dtype(meta["dtype"]).itemsize + header
    if not tokens or not os.path.isfile(path) or os.path.getsize(path) != expected:
        raise DataError(f"{path} is missing or not {expected:,} bytes long: delete its folder and make it "
                        "again with data.py")
    found, largest = contents(path, meta["dtype"], os.stat(path).st_mtime_ns, header)
    if found != digest or largest >= meta["ids"]:
        raise DataError(f"{path} is damaged: delete its folder and make it again with data.py")
    return np.memmap(path, dtype=meta["dtype"], mode="r", offset=header)


def load_shards(path):
    """The ids of a set, .../NAME.bin, as memory maps, of which most sets have one. Raises DataError."""
    folder, name = os.path.dirname(path) or ".", os.path.basename(path).removesuffix(".bin")
    meta = load_meta(folder)
    if name not in meta["sets"]:
        raise DataError(f"{path} is not a set of this corpus, which has {', '.join(meta['sets'])}")
    s = meta["sets"][name]
    if "shards" in s:
        return [checked(os.path.join(folder, x["name"]), x["tokens"], x["sha256"], meta, HEADER)
                for x in s["shards"]]
    return [checked(path, s["tokens"], s["sha256"], meta)]


def load_tokens(path):
    """The ids of a set that is one file, as a memory map. Raises DataError."""
    tokens, *more = load_shards(path)
    if more:
        raise DataError(f"{path} has several shards")
    return tokens


class Batches:
    """
    Batches(path, batch_size, block_size, seed)[step] -> x, y, int64 of shape (batch_size, block_size); y is x
    moved on by one token. A pure function of (seed, step), so resuming is indexing. Every file of the set is
    cut into windows of block_size; every window comes once an epoch, in an order drawn from (seed, epoch).
    Holds 4 bytes a window. Raises DataError.
    """
    def __init__(self, path, batch_size, block_size, seed):
        self.shards = load_shards(path)
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        # the first window of each shard, and the number of windows in an epoch
        self.first = np.cumsum([0, *((len(shard) - 1) // block_size for shard in self.shards)])
        self.n = int(self.first[-1])
        if self.n < batch_size:
            raise DataError(f"{path} has {sum(map(len, self.shards)):,} tokens, fewer than one batch of "
                            f"{batch_size} x {block_size}: use more text or smaller batches")
        self.epoch, self.order = None, None

    def window(self, i):
        epoch, position = divmod(i, self.n)
        if epoch != self.epoch:
            order = np.arange(self.n, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self.epoch, self.order = epoch, order
        window = int(self.order[position])
        k = int(np.searchsorted(self.first, window, side="right")) - 1
        start = (window - int(self.first[k])) * self.block_size
        return self.shards[k][start:start + self.block_size + 1]

    def __getitem__(self, step):
        rows = np.stack([self.window(step * self.batch_size + j) for j in range(self.batch_size)])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def made(out_dir, source):
    """The meta of a finished out_dir made from this source, None if it is not finished. Raises DataError."""
    if not os.path.exists(os.path.join(out_dir, "meta.json")):
        return None
    meta = load_meta(out_dir)
    if meta["source"] != source:
        raise DataError(f"{out_dir} holds another corpus: choose another --out, or delete it")
    return meta


def numbers_of(shards, encoding):
    """What meta.json tells of a set, but for the sha256: counted from its ids."""
    lengths = np.zeros(2**20, dtype=np.int64)
    lengths[:encoding.eot_token] = [len(encoding.decode_single_token_bytes(i))
                                    for i in range(encoding.eot_token)]
    tokens = documents = size = 0
    for ids in shards:
        for i in range(0, len(ids), 2**22):
            counts = np.bincount(ids[i:i + 2**22], minlength=encoding.n_vocab)
            documents += int(counts[encoding.eot_token])
            size += int(counts @ lengths[:len(counts)])
        tokens += len(ids)
    return {"documents": documents, "tokens": tokens, "bytes": size,
            "bytes_per_token": round(size / tokens, 4)}


def prepare(corpus="python", out_dir="data/python", vocab_size=512, train=(), ood=None, tokens=None):
    """
    Make out_dir from a corpus and return its meta: "python"; "text", from the files train and ood = {name:
    files}; or one of DOWNLOADED, with about so many training tokens (none: all, of fineweb-edu one shard).
    vocab_size counts the bytes, the merges and end-of-text; what is downloaded has GPT-2's vocabulary. A
    finished out_dir made by the same call is left as it is; one made by another is an error. Raises
    DataError, for your own text before anything is written.
    """
    if vocab_size < 257:
        raise DataError(f"--vocab_size must be at least 257 (256 bytes and end-of-text), not {vocab_size}")
    if corpus in DOWNLOADED:
        return prepare_download(corpus, out_dir, tokens)
    if corpus == "python":
        if os.path.exists(os.path.join(out_dir, "meta.json")):
            meta = load_meta(out_dir)
            if (meta["corpus"], meta["asked_vocab_size"]) == (corpus, vocab_size):
                return meta
        in_domain, out_of_domain = python_corpus()
    elif corpus == "text":
        in_domain, out_of_domain = text_corpus(train, ood or {})
    else:
        raise DataError(f"unknown corpus {corpus!r}: python, text, {', '.join(DOWNLOADED)}")
    sets = split_documents(in_domain, out_of_domain)
    check_sets(sets, ("train", "val", *(f"ood_{key}" for key in out_of_domain)))
    lines = [f"{key} {name} {sha(text)}" for key, documents in sets.items() for name, text in documents]
    source = sha("\n".join([str(vocab_size), *lines]))
    if meta := made(out_dir, source):
        return meta
    os.makedirs(out_dir, exist_ok=True)
    with lock(out_dir, wait=600):
        if meta := made(out_dir, source):                    # another process was faster
            return meta
        sample, size = [], 0
        for _, text in sets["train"]:
            if size < BPE_BYTES:
                sample.append(text)
                size += len(text)
        ranks = train_bpe("\n".join(sample)[:BPE_BYTES], vocab_size - 1, PATTERN)
        about = {"corpus": corpus, "source": source, "asked_vocab_size": vocab_size}
        return write_corpus(out_dir, about, ranks, PATTERN, sets)


def prepare_download(corpus, out_dir, tokens):
    """prepare() for one of DOWNLOADED."""
    source = sha(f"{corpus} {tokens}")
    if meta := made(out_dir, source):
        return meta
    ranks, raw, shards, held_out = gpt2_ranks(), os.path.join(out_dir, "raw"), (), None
    os.makedirs(raw, exist_ok=True)
    with lock(out_dir, wait=600):
        if meta := made(out_dir, source):
            return meta
        if corpus == "fineweb-edu":
            shards, held_out = fineweb_shards(out_dir, tokens or SHARD)
        in_domain, out_of_domain = downloaded_corpus(corpus, raw, tokens)
        sets = split_documents(in_domain, out_of_domain)
        check_sets(sets, (*(() if shards else ("train", "val")), *(f"ood_{key}" for key in out_of_domain)))
        about = {"corpus": corpus, "source": source, "asked_vocab_size": GPT2_VOCABULARY}
        return write_corpus(out_dir, about, ranks, GPT2_PATTERN, sets, shards, held_out)


def check_sets(sets, names):
    """Raises DataError if one of these sets has no documents."""
    for name in names:
        if not sets.get(name):
            raise DataError(f"the set {name} came out empty: it needs more text")


def write_corpus(out_dir, about, ranks, pattern, sets, shards=(), held_out=None):
    """
    Encode sets {name: documents} and write everything into out_dir, meta.json last -> meta. Where the
    training tokens come as shards, these are their files' names in out_dir, and held_out the ids to evaluate
    on.
    """
    encoding = make_encoding(ranks, pattern)
    in_order = sorted(ranks, key=ranks.get)
    tokenizer = json.dumps({"pattern": pattern, "tokens": [base64.b64encode(t).decode() for t in in_order]})
    write(out_dir, "tokenizer.json", tokenizer.encode())
    size = GPT2_VOCABULARY if pattern == GPT2_PATTERN else encoding.n_vocab
    versions = {p: importlib.metadata.version(p) for p in ("torch", "numpy", "tiktoken", "sympy", "networkx")}
    meta = {**about, "fingerprint": None, "tokenizer": sha(tokenizer), "ids": encoding.n_vocab,
            "vocab_size": size, "dtype": "uint16" if size <= 65536 else "uint32", "sets": {},
            "versions": {"python": sys.version.split()[0], **versions}}

    def add(name, ids):
        write(out_dir, f"{name}.bin", ids.tobytes())
        meta["sets"][name] = {**numbers_of([ids], encoding), "sha256": sha(ids.tobytes(), 64)}
    if shards:
        paths = [os.path.join(out_dir, name) for name in shards]
        meta["sets"]["train"] = {**numbers_of(map(shard_tokens, paths), encoding), "sha256": "", "shards": [
            {"name": name, "tokens": len(shard_tokens(path)),
             "sha256": contents(path, meta["dtype"], os.stat(path).st_mtime_ns, HEADER)[0]}
            for name, path in zip(shards, paths)]}
        add("val", np.array(held_out))
    characters = sum(len(text) for documents in sets.values() for _, text in documents)
    bar = tqdm(total=characters, desc="encoding", unit="B", unit_scale=True, disable=None)
    for name, documents in sets.items():
        ids = []
        for i in range(0, len(documents), 64):
            texts = [text for _, text in documents[i:i + 64]]
            for document in encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1):
                ids.append(np.array(document + [encoding.eot_token], dtype=meta["dtype"]))
            bar.update(sum(map(len, texts)))
        add(name, np.concatenate(ids))
    bar.close()
    meta["fingerprint"] = sha(json.dumps([meta["tokenizer"], meta["sets"]]))
    meta["checksum"] = checksum(meta)
    write(out_dir, "meta.json", json.dumps(meta, indent=1).encode())
    return meta


def count(text):
    """'3M' -> 3 * 2**20: counts in powers of two divide into batches. Raises ArgumentTypeError."""
    unit = {"K": 2**10, "M": 2**20, "B": 2**30}.get(text[-1:].upper())
    try:
        return int(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 3145728 or 3M") from None


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
    for pattern in ("*", "alpha_*/*"):
        for path in Path(folder).glob(pattern):
            if regex.search(r"\.\d+\.tmp$", path.name):
                path.unlink(missing_ok=True)
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
            raise                                            # a fault of ours, not torch out of memory
        print(f"error: {e or 'out of memory'}".split("\n")[0], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; start the same command again", file=sys.stderr)
        sys.exit(130)


def main():
    """Make the corpus that the command line asks for, and print what is in it."""
    parser = Parser(__doc__)
    parser.add_argument("--corpus", default="python", choices=("python", "text", *DOWNLOADED),
                        help="what to tokenize (default: python)")
    parser.add_argument("--vocab_size", type=int, metavar="N", help="python and text: tokens in the "
                        "vocabulary, which are 256 bytes, merges and end-of-text (default: 512)")
    parser.add_argument("--tokens", type=count, metavar="N", help="what is downloaded: training tokens, "
                        "about; K, M and B are 2^10, 2^20 and 2^30 (default: all; of fineweb-edu one shard, "
                        "100 million)")
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
    if args.corpus != "text" and (args.train or ood):
        parser.error("--train and --ood go with --corpus text")
    if args.corpus in DOWNLOADED and args.vocab_size is not None:
        parser.error(f"--vocab_size: {args.corpus} has GPT-2's vocabulary")
    if args.tokens is not None and (args.corpus not in DOWNLOADED or not 0 < args.tokens <= 10**11):
        parser.error(f"--tokens goes from 1 to 10^11, with --corpus {', '.join(DOWNLOADED)}")
    out, size = args.out or f"data/{args.corpus}", 512 if args.vocab_size is None else args.vocab_size
    meta = prepare(args.corpus, out, size, args.train, ood, args.tokens)
    print(f"{out}: vocabulary {meta['vocab_size']}, {meta['dtype']}, fingerprint {meta['fingerprint']}")
    for name, s in meta["sets"].items():
        print(f"  {name:13} {s['documents']:6,} documents {s['tokens']:11,} tokens, "
              f"{s['bytes_per_token']:.2f} bytes each")


if __name__ == "__main__":
    run(main)

"""
To and from Hugging Face: export a checkpoint to transformers, or learn from one of its models.
Needs `pip install transformers`, any version from 4.46 to 5.x.

    python extras/hf.py out/alone/ckpt.pt out/alone_hf --data data/python
    python distill.py --teacher FOLDER_OR_NAME --alpha 0.25 ...      # whatever is not a .pt file

The first command reads a checkpoint and the tokenizer of its corpus, and writes a folder with a
Llama and a tokenizer. The second takes a teacher whose tokenizer gives the ids of the corpus: an
exported folder, or GPT-2 and models that share its tokenizer, where the corpus was made by
`data.py --vocab_size gpt2`.
"""
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, ".")
from data import END_OF_TEXT, UserError, load_meta, load_tokenizer, load_tokens, make_parser, run_main
from model import NORM_EPS, ROPE_THETA, GPTConfig, load_checkpoint


def to_hf(path, folder, data_dir):
    """
    Write the checkpoint at path, with the tokenizer of the corpus in data_dir, as a folder that
    AutoModelForCausalLM and AutoTokenizer load (transformers 4.46 to 5.x).
    """
    meta, encoding = load_meta(data_dir), load_tokenizer(data_dir)
    model, _ = load_checkpoint(path, tokenizer=meta["tokenizer"])
    c = model.config
    if c.counts:
        raise UserError(f"{path} is a table of counts, which transformers has no model for")
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError as e:
        raise UserError(f"an export needs transformers: pip install transformers ({e})") from None

    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size, rms_norm_eps=NORM_EPS, rope_theta=ROPE_THETA,
        tie_word_embeddings=True, bos_token_id=encoding.eot_token, eos_token_id=encoding.eot_token))
    llama.load_state_dict({name if name.startswith("lm_head") else f"model.{name}": weight
                           for name, weight in model.state_dict().items()})

    converter = TikTokenConverter(pattern=meta["pattern"])
    converter.extra_special_tokens = [END_OF_TEXT]           # its name in 5.x
    converter.additional_special_tokens = [END_OF_TEXT]      # and in 4.x
    with mock.patch("tiktoken.load.load_tiktoken_bpe", lambda path: encoding._mergeable_ranks):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=converter.converted(), model_max_length=c.block_size,
            bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # 5.x writes both in a form that 4.x cannot read, and would replace with its defaults
    for file, known in (("config.json", {"rope_theta": ROPE_THETA}),
                        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})):
        path = Path(folder, file)
        path.write_text(json.dumps({**json.loads(path.read_text()), **known}, indent=2))


class ForeignTeacher(torch.nn.Module):
    """
    A Hugging Face causal language model as a teacher, in float32; its tokenizer must produce the
    corpus's ids. Token ids (B, T) -> logits (B, T, V), where V is the vocab_size of the corpus with its
    padding. Ids that the corpus's tokenizer does not have get no probability, whatever the teacher says.
    """

    def __init__(self, name, data_dir, vocab_size):
        super().__init__()
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(name)
            self.model, info = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True)    # they are refused below
            self.model.float()
        except ImportError as e:
            raise UserError(f"--teacher {name} is not a .pt file: pip install transformers ({e})") from None
        except Exception as e:                               # transformers raises many kinds
            reason = str(e).partition("\n")[0]
            raise UserError(f"--teacher {name} is neither a .pt file nor a model that transformers loads: "
                            f"{reason}") from None

        # weights that transformers does not find are random; those that it does not use do no harm
        not_loaded = [*sorted(info["missing_keys"]), *(key for key, *_ in info["mismatched_keys"])]
        if not_loaded:
            raise UserError(f"--teacher {name} lacks these weights, or has them in another shape: "
                            f"{', '.join(not_loaded[:3])}{', ...' if len(not_loaded) > 3 else ''}")

        encoding = load_tokenizer(data_dir)
        ids = load_tokens(f"{data_dir}/val.bin")[:10_000].tolist()
        text = max(encoding.decode(ids).split(END_OF_TEXT), key=len)     # a stretch without end-of-text
        # verbose=False: no warning that the text exceeds the context
        theirs = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if theirs != encoding.encode_ordinary(text):
            raise UserError(f"the tokenizer of {name} does not give the tokens of {data_dir}: data.py "
                            "--vocab_size gpt2 makes a corpus in GPT-2's")
        self.n_vocab = encoding.n_vocab                      # without padding
        self.config = GPTConfig(vocab_size, self.model.config.max_position_embeddings)

    def forward(self, idx):
        logits = self.model(idx, use_cache=False).logits[..., :self.n_vocab]
        lowest = max(-1e9, torch.finfo(logits.dtype).min)    # under autocast they may be float16
        return F.pad(logits, (0, self.config.vocab_size - logits.size(-1)), value=lowest)


def main():
    """Export a checkpoint as a Hugging Face Llama."""
    parser = make_parser(__doc__)
    parser.add_argument("ckpt", metavar="CKPT", help="checkpoint to export")
    parser.add_argument("folder", metavar="DIR", help="folder to write")
    parser.add_argument("--data", default="data/python", metavar="DIR",
                        help="corpus folder with the checkpoint's tokenizer (default: data/python)")
    args = parser.parse_args()
    to_hf(args.ckpt, args.folder, args.data)
    print(f"{args.folder}: for transformers' AutoModelForCausalLM and AutoTokenizer")


if __name__ == "__main__":
    run_main(main)

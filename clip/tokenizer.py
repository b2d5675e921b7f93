"""Text -> token ids: CLIP's byte-level BPE. Its merges lie beside this file, as OpenAI published them."""
import gzip
import html
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch

from clip.model import CLIPError

MERGES = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY = 49408  # 256 bytes, the same 256 ending a word, 48,894 merges, two marks


class Tokenizer:
    """Byte-level BPE with CLIP's VOCABULARY."""

    def __init__(self):
        lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")  # it checks their checksum
        merges = [tuple(line.split()) for line in lines[1:49152 - 256 - 2 + 1]]

        # every byte gets a printable character, so that merges can be written as text
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in printable]
        self.byte_char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        symbols = list(self.byte_char.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        symbols += ["<|startoftext|>", "<|endoftext|>"]
        self.id = {s: i for i, s in enumerate(symbols)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.split = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE)
        self.encode_word = lru_cache(65536)(self._encode_word)

    def _encode_word(self, word):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self.id[word]]
        parts = [self.byte_char[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:  # merge the pair that was learned first, everywhere, until none is known
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                pair = tuple(parts[i:i + 2])
                merged.append("".join(pair) if pair == best else parts[i])
                i += 2 if pair == best else 1
            parts = merged
        return [self.id[p] for p in parts]

    def encode(self, text):
        """str -> list of token ids, without the start and end marks."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [i for word in self.split.findall(text) for i in self.encode_word(word)]


tokenizer = lru_cache(1)(Tokenizer)


def tokenize(texts, context_length=77):
    """str or list of P strs -> int64 (P, context_length): start, tokens, end, zeros. Raises CLIPError where a text does
    not fit."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    start, end = tokenizer().id["<|startoftext|>"], tokenizer().id["<|endoftext|>"]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [start, *tokenizer().encode(text), end]
        if len(ids) > context_length:
            raise CLIPError(f"text has {len(ids)} tokens, at most {context_length} fit: shorten it: {text[:60]!r}")
        row[:len(ids)] = torch.tensor(ids)
    return tokens

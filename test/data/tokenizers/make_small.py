#!/usr/bin/env python3
"""Writes small/: a corpus, tokenizers trained on it by Hugging Face `tokenizers`, and their ids.

  pip install tokenizers==0.23.2 unicodedata2==16.0.0    # in Python 3.11, for Unicode 14
  python3 make_small.py

corpus.txt        text in several scripts, and code
NAME.json         tokenizer with the pattern NAME: BpeTrainer with the byte alphabet
NAME.jsonl        {"text", "ids", "decoded"} a line
variants.jsonl    {"name", "patch", "cases"}: qwen2.json with the top-level keys of "patch"
                  replaced ("model" is merged), and a list of
                  [text, ids, ids with special tokens, decoded]
"""
import json
import random
import unicodedata
from pathlib import Path

import unicodedata2 as ucd
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
OUT = HERE / "small"
VOCAB = 1200
SPECIAL = ["<|endoftext|>", "<|begin_of_text|>"]
rng = random.Random(20)

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + TAIL
QWEN2 = CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + TAIL
DEEPSEEK = ["\\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
            "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|"
            "\\s*[\r\n]+|\\s+(?!\\S)|\\s+"]
PATTERNS = {"gpt2": [], "llama3": [LLAMA3], "qwen2": [QWEN2], "deepseek_v3": DEEPSEEK}

PROSE = """The wind came down from the north before the sun was up, and it didn't stop all day.
We'd packed the boats the night before: bread, rope, two lamps and 36 cans of oil. "You'll see,"
she said, "they've always come back." Nobody answered; I'm not sure that anybody heard her.

At 7:45 the first sail showed beyond the reef. By noon there were 12, by evening 140 of them --
more than the harbour could hold. It's hard to tell what we felt. Some laughed, others wept, and old
Tom, who'd lost a brother in 1987, said nothing at all.
"""
OTHER = """Die Straße führt über die Brücke; gestern war sie gesperrt. Où est la
bibliothèque ? Là-bas, près du château. El niño comió piñas. Příliš žluťoučký kůň úpěl ďábelské ódy.
Ветер дул с севера, и море было тёмным. Корабли вернулись домой.
风从北方吹来,海面一片漆黑。船终于回来了,大家都很高兴。
海は暗く、風は北から吹いていた。カタカナとひらがな。
바람이 북쪽에서 불어왔다. 배가 돌아왔다.
كانت الريح تهب من الشمال. हवा उत्तर से आ रही थी।
"""
CODE = """int64_t count_words(const std::string& text) {
  int64_t count = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ' ' && i > 0) ++count;  // a word ends here
  }
  return count + 1;
}

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)
"""


def make_corpus():
    refs = [json.loads(line)["text"] for line in open(HERE / "gpt2" / "refs.jsonl")]
    refs = [t for t in refs if "<|endoftext|>" not in t]
    words = PROSE.split()
    parts = []
    for _ in range(40):
        parts += [PROSE, OTHER, CODE, "\n".join(rng.sample(refs, 6)) + "\n",
                  " ".join(rng.choice(words) for _ in range(60)) + ".\n"]
    return "".join(parts)


ASSIGNED = [c for c in range(0x110000) if ucd.category(chr(c)) not in ("Cn", "Co", "Cs")]
BY_CATEGORY = {}
for c in ASSIGNED:
    BY_CATEGORY.setdefault(ucd.category(chr(c)), []).append(c)
CATEGORIES = sorted(BY_CATEGORY)
CANONICAL = [c for c in ASSIGNED if ucd.decomposition(chr(c)).strip("0123456789ABCDEF ") == ""
             and ucd.decomposition(chr(c))]
MARKS = [c for c in ASSIGNED if ucd.combining(chr(c))]
SNIPPETS = [
    " ", "  ", "\n", "\r\n", "\n\n", "\t", "    ", "'s", "'S", "'ll", "'RE", "'\u017f", "\u2028",
    "\u200d", "\u180e", "\x85", "\u3000", "\xa0", "\ufeff", "\u0301", "\u0323", "<|endoftext|>",
    "<x>", "<xy>", "abc", " the", "123", "1234567", "\u4f60\u597d", "\u3042", "!!!", "-", "_",
    "...\n", ".\r\n\n", "\U0001f468\u200d\U0001f469\u200d\U0001f466", "\U0001f1e9\U0001f1ea",
    "\u1100\u1161\u11a8", "\uac00\u11a8", "A\u030a", "\u212b", "\x00", "\u0660\u0661\u0662"]


def make_part():
    kind = rng.random()
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGH"
    if kind < 0.4:
        return rng.choice(SNIPPETS)
    if kind < 0.6:
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 8)))
    if kind < 0.75:
        return "".join(chr(rng.choice(BY_CATEGORY[rng.choice(CATEGORIES)])) for _ in range(2))
    if kind < 0.8:
        return " " + rng.choice(PROSE.split())
    if kind < 0.9:
        return "".join(chr(rng.choice(CANONICAL)) for _ in range(rng.randint(1, 3)))
    return "".join(chr(rng.choice(MARKS)) for _ in range(rng.randint(1, 4)))


def make_text(is_usable=lambda text: True):
    while True:
        text = "".join(make_part() for _ in range(rng.randint(1, 12)))
        if is_usable(text):
            return text


def is_unicode_14(text):
    """PCRE2 knows no newer characters; the scanners of the four patterns do."""
    return all(unicodedata.category(c) != "Cn" for c in text)


def train(corpus, name):
    t = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in PATTERNS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    t.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level
    if name == "qwen2":
        t.normalizer = normalizers.NFC()
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([corpus], trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    return t


def encode(t, text, special=False):
    return t.encode(text, add_special_tokens=special).ids


def write_refs(t, path, count):
    with open(path, "w") as f:
        for _ in range(count):
            text = make_text()
            ids = encode(t, text)
            decoded = t.decode(ids, skip_special_tokens=False)
            f.write(json.dumps({"text": text, "ids": ids, "decoded": decoded}) + "\n")


def byte_level(prefix=False, regex=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True,
            "use_regex": regex}


def sequence(*steps):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def added(token_id, content, **flags):
    token = {"id": token_id, "content": content, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
    return {**token, **flags}


def variants(base):
    for behavior in ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]:
        for invert in (False, True):
            name = f"{behavior}, invert {invert}"
            pattern = r"\s|[a-c]+|(?=x)"
            yield name, sequence(split(pattern, behavior, invert), byte_level())
            text = split("ab", behavior, invert, "String")
            yield name + ", text", sequence(text, byte_level(regex=True))
            yield name + ", empty", sequence(split("b*", behavior, invert), byte_level(True, True))
    digits = {"type": "Digits", "individual_digits": True}
    yield "digits", sequence(digits, byte_level(True, True))
    yield "digit runs", sequence({**digits, "individual_digits": False}, byte_level())
    nested = r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u060c\u0964])]+"
    yield "nested class", sequence(split(nested), byte_level())
    yield "words", sequence(split(r"\w+|[^\w\s]+|\s+(?!\S)"), byte_level())
    yield "borders", sequence(split(r"\b|\h{2}|\d{,3}|(?i:[S-T])"), byte_level())
    lines = r"^.|(?m:x.)|\x{41}+|\u0061|[\u3041-\u3096]"
    yield "dot and lines", sequence(split(lines), byte_level())
    tokens = [added(VOCAB, "<x>", lstrip=True), added(VOCAB + 1, "<xy", rstrip=True, special=False),
              added(VOCAB + 2, "abc", single_word=True),
              added(VOCAB + 3, "\u212b", normalized=True, special=False),
              added(VOCAB + 4, " the", normalized=True),
              added(VOCAB + 5, "\n", rstrip=True, lstrip=True),
              added(VOCAB + 6, "<xy>", special=False, normalized=True)]
    yield "added tokens", {"added_tokens": base["added_tokens"] + tokens}
    yield "no decoder", {"decoder": None}
    yield "ignore merges", {"model": {"ignore_merges": True}}
    gone = ["!", "\u00c3", "a"]
    vocab = {k: v for k, v in base["model"]["vocab"].items() if not any(g in k for g in gone)}
    merges = [m for m in base["model"]["merges"] if not any(g in x for g in gone for x in m)]
    vocab["<unk>"] = 5000
    model = {"vocab": vocab, "merges": merges}
    yield "bytes without a token", {"added_tokens": [], "model": model}
    yield "unk", {"added_tokens": [], "model": {**model, "unk_token": "<unk>"}}
    fused = {**model, "unk_token": "<unk>", "fuse_unk": True}
    yield "fused unk", {"added_tokens": [], "model": fused}
    frame = [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
             {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    specials = {s: {"id": s, "ids": [i], "tokens": [s]} for i, s in enumerate(SPECIAL)}
    template = {"type": "TemplateProcessing", "single": frame, "pair": frame[:2] + [
        {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": specials}
    yield "template", {"post_processor": template}
    yield "template in a sequence", {"post_processor": {
        "type": "Sequence", "processors": [byte_level(), template]}}


def main():
    OUT.mkdir(exist_ok=True)
    corpus = make_corpus()
    (OUT / "corpus.txt").write_bytes(corpus.encode())
    for name in PATTERNS:
        t = train(corpus, name)
        t.save(str(OUT / f"{name}.json"), pretty=False)
        write_refs(t, OUT / f"{name}.jsonl", 300)
    base = json.loads((OUT / "qwen2.json").read_text())
    with open(OUT / "variants.jsonl", "w") as f:
        for name, patch in variants(base):
            merged = {**base, **patch, "model": {**base["model"], **patch.get("model", {})}}
            t = Tokenizer.from_str(json.dumps(merged))
            cases = []
            for _ in range(30):
                text = make_text(is_unicode_14)
                ids = encode(t, text)
                decoded = t.decode(ids, skip_special_tokens=False)
                cases.append([text, ids, encode(t, text, special=True), decoded])
            f.write(json.dumps({"name": name, "patch": patch, "cases": cases}) + "\n")


main()

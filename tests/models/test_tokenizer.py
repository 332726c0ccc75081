# ruff: noqa: RUF001  (the confusable letters are what is tested)
"""The tokenizer gives the ids that Hugging Face's tokenizers gives, on the same tokenizer.json."""

import json
import random
import resource
import subprocess
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = (  # of the same family, with possessive and counted repetition
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>x"]  # the last: the longest match counts
PLAIN = ["<think>", "</think>", "<tool_call>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what they're told, and we'll say they've done it; I'd go.",
    "A photo of a cat sitting on a red chair beside the window, soft light, 35mm, f/1.8, 4k, 1024x1024",
    "def main(argv: list[str]) -> int:\n"
    "    for index, value in enumerate(argv):\n        print(f'{index}: {value}')\n    return 0\n",
    "#include <vector>\r\nint main() {\r\n\tstd::vector<int> v{1, 2, 3};\r\n\treturn v.size() == 3 ? 0 : 1;\r\n}\r\n",
    "一只可爱的熊猫在竹林里吃竹子，水墨画风格。阳光透过树叶洒下来，画面宁静而美丽。上面写着“你好，世界”。",
    "東京の夜景、雨に濡れた道路にネオンが反射している。カタカナとひらがなと漢字。",
    "서울의 밤거리, 비에 젖은 도로에 네온사인이 비친다. 안녕하세요 세계.",
    "صورة لقطة تجلس على كرسي أحمر بجانب النافذة. مَرْحَبًا بِالعَالَم",
    "लाल कुर्सी पर बैठी बिल्ली की तस्वीर, खिड़की के पास। नमस्ते दुनिया",
    "Фотография кошки на красном стуле у окна. Ελληνικά, naïve café, Zürich, Đà Nẵng, İstanbul, ſtraße",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️‍🔥 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ 😀😃",
]


def hf_starters():
    """Marks that tokenizers' NFC, whose tables are Unicode 9, does not put in order because it does not know them."""
    nfc = normalizers.NFC()

    def reordered(mark):
        return (
            nfc.normalize_str("\u0315" + mark) != "\u0315" + mark
            or nfc.normalize_str(mark + "\u0334") != mark + "\u0334"
        )

    marks = (chr(c) for c in range(0x300, 0x110000) if unicodedata.combining(chr(c)) > 1)
    return {mark for mark in marks if not reordered(mark)}


def pipeline(model, pattern):
    """Qwen's normalizer and pre-tokenizer, of this pattern, around a model."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(pattern, special=True):
    tokenizer = pipeline(models.BPE(), pattern)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    if special:
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return tokenizer


@pytest.fixture(scope="module")
def reference():
    return train(QWEN)


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    reference.save(str(path))
    return path


def run(executable, path, texts, max_tokens=10**6, *options):
    """Ids of each text by the probe."""
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    done = subprocess.run(
        [executable, path, str(max_tokens), *options], input=lines, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(executable, path, tokenizer, texts):
    ours = run(executable, path, texts)
    theirs = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    wrong = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, such as {min(wrong, key=len)!r}"


def fuzzed(count, seed):
    """Texts put together from pieces that are each a trap of their own.

    Random code points are those that Python's Unicode data names, less the marks of hf_starters(): only there do the
    two normalizers' versions show. Nor U+11A7, an old Korean vowel, which tokenizers takes for a final
    consonant and loses after a syllable such as U+AC00. How unassigned and newer characters are split is covered by
    test_code_points_of_every_block.
    """
    rng = random.Random(seed)
    starters = hf_starters() | {"\u11a7", "\U00011935", "\U00011930"}  # the last two compose since Unicode 13
    known = [
        chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs") and chr(c) not in starters
    ]
    named = [c for c in known if unicodedata.category(c) != "Co"]
    marks = [c for c in named if unicodedata.combining(c)]
    spaces = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "\u00a0",
        "\u0085",
        "\u2028",
        "\u2029",
        "\u180e",
        "\u3000",
        "\u200b",
        "\x0b",
        "\x1c",
        " \n ",
        "    ",
    ]
    quoted = [
        "'s",
        "'S",
        "'t",
        "'re",
        "'RE",
        "'Ve",
        "'m",
        "'ll",
        "'lL",
        "'d",
        "'",
        "''",
        "'\u017f",
        "'\u212a",
        "\u2019s",
        "'x",
    ]
    words = " ".join(CORPUS).split()
    emoji = ["👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "🇫", "❤️‍🔥", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣", "\ufe0f", "\u200d"]
    pieces = [
        lambda: rng.choice(words),
        lambda: rng.choice(words)[: rng.randint(1, 4)],
        lambda: rng.choice(spaces),
        lambda: " ",
        lambda: rng.choice(quoted),
        lambda: rng.choice(emoji),
        lambda: rng.choice(SPECIAL + PLAIN + ["<|im_", "|>", "<|", "<|im_end|", "< |im_end|>"]),
        lambda: "".join(chr(rng.randrange(32)) for _ in range(rng.randint(1, 3))),
        lambda: "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(1, 12))),
        lambda: str(rng.randrange(10 ** rng.randint(1, 12))),
        lambda: "".join(rng.choice(named) for _ in range(rng.randint(1, 6))),
        lambda: rng.choice(known),
        lambda: rng.choice("aeoAEO\u03b1\u0915\u1100") + "".join(rng.choice(marks) for _ in range(rng.randint(1, 5))),
        lambda: "".join(chr(rng.randrange(0x300, 0x370)) for _ in range(rng.randint(1, 8))),
        lambda: unicodedata.normalize("NFD", rng.choice(words)),
        lambda: "".join(
            chr(
                rng.choice(
                    [
                        rng.randrange(0x1100, 0x1113),
                        rng.randrange(0x1161, 0x1176),
                        rng.randrange(0x11A8, 0x11C3),
                        0xAC00,
                    ]
                )
            )
            for _ in range(4)
        ),
        lambda: chr(rng.randrange(0x4E00, 0x9FFF)) * rng.randint(1, 3),
        lambda: "\x00",
    ]
    return ["".join(rng.choice(pieces)() for _ in range(rng.randint(0, 24))) for _ in range(count)]


@pytest.fixture(scope="module")
def boundaries(tmp_path_factory):
    """Ids that show every boundary between words: each of a few characters merges with whatever byte is beside it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = []
    for probe_letter in "a1!'lĠĊ":  # Ġ is the space, Ċ the newline
        for letter in letters:
            for pair in ((probe_letter, letter), (letter, probe_letter)):
                if "".join(pair) not in vocab:
                    vocab["".join(pair)] = len(vocab)
                    merges.append(pair)
    tokenizer = pipeline(models.BPE(vocab=vocab, merges=merges), QWEN)
    path = tmp_path_factory.mktemp("boundaries") / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, path


def test_ten_thousand_fuzzed_texts(probe, reference, saved, boundaries):
    texts = fuzzed(10_000, seed=1)
    assert_same(probe("tokenizer_probe"), saved, reference, texts)
    assert_same(probe("tokenizer_probe"), boundaries[1], boundaries[0], texts)


def test_code_points_of_every_block(probe, boundaries):
    """The classes of both libraries agree, between letters, digits, spaces and quotes. Every code point of the first
    two planes, but of the long runs of one kind (ideographs, Hangul, private and empty planes) every 7th or 97th."""

    def chosen(c):
        if 0x3400 <= c < 0x9F00 or 0xAC00 <= c < 0xD700 or 0x20000 <= c < 0x33500:
            return c % 7 == 0
        if 0xD800 <= c < 0xE000:
            return False
        return (c < 0x20000 and not 0xE000 <= c < 0xF900) or 0xE0000 <= c < 0xE0200 or c % 97 == 0

    points = [chr(c) for c in range(0x110000) if chosen(c)]
    texts = [
        "".join(f"a{c}a {c}  {c}!a{c}'l1{c}1\n{c}\n" for c in points[i : i + 64]) for i in range(0, len(points), 64)
    ]
    assert_same(probe("tokenizer_probe"), boundaries[1], boundaries[0], texts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\x00",
        "a" * 30_000,
        "ab " * 20_000,
        " " * 50_000 + "x",
        "\n \n" * 10_000,
        "가" * 5_000,
        "e" + "\u0301\u0316" * 5_000,
    ],
)
def test_long_and_short_texts(probe, reference, saved, text):
    assert_same(probe("tokenizer_probe"), saved, reference, [text])


def test_time_grows_with_the_length_alone(probe, saved):
    """A megabyte of what is worst for merging, splitting and normalizing. Of processor time: a busy machine does not
    count."""
    texts = [
        text * (1_000_000 // len(text.encode()))
        for text in ("a", " ", "e\u0316\u0301", "\u0301\u0316", "<|im_", "'", "word ")
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run(probe("tokenizer_probe"), saved, texts)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20


def test_gpt2_pattern_of_byte_level(probe, tmp_path):
    tokenizer = train(QWEN, special=False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert_same(probe("tokenizer_probe"), tmp_path / "tokenizer.json", tokenizer, fuzzed(2_000, seed=2))


def test_llama_pattern_whole_words_and_normalized_tokens(probe, tmp_path):
    content = json.loads(train(LLAMA, special=False).to_str())
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["zzz"] = len(content["model"]["vocab"])  # reached by no merge
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken("caf\u0065\u0301", normalized=True), AddedToken("sofa", normalized=True)])
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # the older form
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    texts = ["zzz", "zzzz", " zzz", "café cafe\u0301 a sofas", *fuzzed(2_000, seed=3)]
    assert_same(probe("tokenizer_probe"), tmp_path / "tokenizer.json", tokenizer, texts)


def test_chat_form_and_truncation_are_those_of_transformers(probe, reference, saved):
    from transformers import Qwen2Tokenizer

    content = json.loads(reference.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=content["vocab"], merges=merges, additional_special_tokens=SPECIAL)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    # Qwen3's template, as far as one user turn goes.
    tokenizer.chat_template = (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    prompts = ["", "a red circle", " two\n\nlines ", "一只熊猫", "<|im_end|>", "word " * 2000, *fuzzed(200, seed=4)]
    ours = run(probe("tokenizer_probe"), saved, prompts, 512, "--chat")
    for prompt, ids in zip(prompts, ours, strict=True):
        turn = [{"role": "user", "content": prompt}]
        form = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert ids == tokenizer(form, truncation=True, max_length=512)["input_ids"], prompt


def test_max_tokens_cuts(probe, reference, saved):
    text = "<|im_start|>The quick brown fox <|im_end|> jumps"
    whole = reference.encode(text).ids
    for count in (0, 1, 2, 5, len(whole), len(whole) + 1):
        assert run(probe("tokenizer_probe"), saved, [text], count) == [whole[:count]]


def change(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is KeyError:
        del content[last]
    else:
        content[last] = value


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
BYTE_LEVEL = ("pre_tokenizer", "pretokenizers", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "type"), "Unigram", 'model.type is "Unigram", which is not supported'),
        (("model", "dropout"), 0.1, "model.dropout is 0.1"),
        (("model", "byte_fallback"), True, "model.byte_fallback is true"),
        (("model", "end_of_word_suffix"), "</w>", 'model.end_of_word_suffix is "</w>"'),
        (("model", "novelty"), 1, "model.novelty is 1"),
        (("novelty",), {}, "tokenizer.novelty is object"),
        (("model", "vocab", "a"), KeyError, "no token 'a' for byte 97"),
        (("model", "vocab", "a"), -1, "'a' has something else"),
        (("model", "vocab", "a"), 1 << 40, "token 'a' has id 1099511627776"),
        (("model", "merges", 3), ["a"], "entry 3 of model.merges is neither"),
        (("model", "merges", 3), "a b c", "entry 3 of model.merges is neither"),
        (("model", "merges", 3), ["a", "\U0001f600"], "entry 3 of model.merges needs token"),
        (("normalizer",), {"type": "NFKC"}, 'normalizer.type is "NFKC"'),
        (("post_processor",), {"type": "TemplateProcessing"}, "TemplateProcessing"),
        (("pre_tokenizer",), None, "pre_tokenizer is not a JSON object"),
        (("pre_tokenizer",), {"type": "Whitespace"}, 'pre_tokenizer.type is "Whitespace"'),
        ((*BYTE_LEVEL, "add_prefix_space"), True, "pre_tokenizer.add_prefix_space is true"),
        ((*BYTE_LEVEL, "use_regex"), True, "more than one split"),
        ((*SPLIT, "behavior"), "Removed", 'pre_tokenizer.behavior is "Removed"'),
        ((*SPLIT, "invert"), True, "pre_tokenizer.invert is true"),
        ((*SPLIT, "pattern"), {"String": " "}, "pre_tokenizer.pattern.Regex is null"),
        (("added_tokens", 0, "lstrip"), True, "added_tokens.lstrip is true"),
        (("added_tokens", 0, "single_word"), True, "added_tokens.single_word is true"),
        (("added_tokens", 0, "content"), "a", "token 'a' has id"),
    ],
)
def test_what_is_not_supported_is_named(probe, saved, tmp_path, path, value, message):
    content = json.loads(saved.read_text(encoding="utf-8"))
    change(content, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    refused(probe, tmp_path / "tokenizer.json", message)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"\w+", r"'\w'"),
        (r"\p{Han}+", r"'\p{Han}'"),
        (r"[[:alpha:]]+", "'[:'"),
        (r"[a&&b]", "'&&'"),
        (r".+", "'.'"),
        (r"(?i:ss)", "'(?i:ss)'"),
        (r"(?<=a)b", "'(?<'"),
        (r"a{1,2}+", "'+'"),
        (r"\p{L}*", "can match an empty string"),
        (r"(a", "is not valid"),
        ("a" * 5000, "5000 bytes"),
    ],
)
def test_patterns_that_two_libraries_read_differently_are_refused(probe, saved, tmp_path, pattern, message):
    content = json.loads(saved.read_text(encoding="utf-8"))
    change(content, (*SPLIT, "pattern"), {"Regex": pattern})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    refused(probe, tmp_path / "tokenizer.json", message)


def refused(probe, path, message):
    done = subprocess.run(
        [probe("tokenizer_probe"), path, "9"], input='"a"\n', capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_damaged_files_are_refused(probe, saved, tmp_path):
    refused(probe, tmp_path / "nowhere.json", "No such file")
    refused(probe, tmp_path, "Is a directory")
    text = saved.read_bytes()
    for end in range(0, len(text), len(text) // 40):
        (tmp_path / "cut.json").write_bytes(text[:end])
        refused(probe, tmp_path / "cut.json", "not valid JSON at byte")


@pytest.mark.parametrize(
    ("text", "offset"),
    [(b"\xff", 0), (b"ab\xc3", 2), (b"a\xed\xa0\x80", 1), (b"\xc0\x80", 0), (b"\xf4\x90\x80\x80", 0), (b"ok\x80", 2)],
)
def test_text_that_is_not_utf8_is_refused(probe, saved, text, offset):
    done = subprocess.run([probe("tokenizer_probe"), saved, "9", "--raw"], input=text, capture_output=True, timeout=600)
    assert done.returncode == 1
    assert f"byte {offset} of {len(text)} begins no character" in done.stderr.decode()

"""Proves that llama.cpp and transformers read text the same way: the ids of hard text, compared.

The text was written for this: digits, contractions, runs of white space, code, many scripts, emoji, marks that combine.
"""
# ruff: noqa: RUF001 - look-alike characters are the point of this text

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from edgeprune.errors import StageFailed, missing_extra
from edgeprune.gguf_vocabulary import load_tokenizer, steps_of

PROOF_TEXTS = (
    "",
    " ",
    "A plain sentence, with a comma and a full stop.",
    " leading and trailing spaces  ",
    "two  three   four    many          spaces",
    "tab\tand\t\ttabs, line\nbreaks\n\nand\n\n\nmore\r\nof\r\n\r\nthem \n mixed \n\t in",
    "   \n   \n",
    "It's he'd they'll WE'RE I'M you've CAN'T 'tis o'clock rock'n'roll ''quoted''",
    "0 7 42 365 1984 31415 271828 1000000 3.14159 1,234,567.89 -17 +5 1e-9 0x1F 50% $9.99 2nd 4th",
    "x1 y22 z333 a4444b55555c ٣٤٥ १२३ ½ ² Ⅷ 三",
    "def area(r: float) -> float:\n    return 3.14 * r ** 2  # πr²\n\nif __name__ == '__main__':\n\tprint(area(2.0))\n",
    "for (int i = 0; i < n; ++i) { a[i] |= b[i] << 3 && c != d; }  /* !!! ??? */",
    '{"key": [1, 2.5, null, true], "nested": {"a_b-c": "d\\n"}}',
    "https://example.org/a/b?c=d&e=f#g user.name+tag@example.org C:\\temp\\file_01.txt",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~ ...---... «guillemets» “quotes” ‘single’ — – … • § ¶",
    "Straße, naïve façade, Žluťoučký kůň, İstanbul, ŁÓDŹ, smörgåsbord, Ærø",
    "Ελληνικά, русский текст, українська, עברית, العربية, हिन्दी, বাংলা, தமிழ், ไทย, ქართული, አማርኛ",
    "今天天气很好,我们去公园散步。漢字とひらがなとカタカナ、한국어 문장도 있다.",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 ✈️ 🇫🇷 👍🏽 text🙂text",
    "zero\u200bwidth no\u00a0break thin\u2009space ideographic\u3000space line\u2028separator soft\u00adhyphen",
    "combining e\u0301 a\u0308 n\u0303 and composed é ä ñ",
    "UPPER lower MiXeD camelCase snake_case kebab-case SCREAMING_SNAKE",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "==========----------__________..........          ##########",
    "word\n\n\n\n  indented\n    more\n        most",
)


def prove_same_ids(gguf: Path, folder: Path, *, texts: Iterable[str] = PROOF_TEXTS) -> int:
    """Tokenise hard text with llama.cpp and with transformers and compare the ids.

    Special tokens are tried too, alone and between words, as long as they are not a sentencepiece tokenizer's whose
    space goes to the start only, which llama.cpp cannot do.

    Args:
        gguf: the GGUF file; it may hold no tensors.
        folder: the Hugging Face folder.
        texts: what to tokenise.

    Returns:
        The number of texts compared.

    Raises:
        StageFailed: they differ; the message has the text and where the ids part.
        BadInput: one of the two does not load.
    """
    try:
        from edgeprune.runtimes.llamacpp_vocabulary import Vocabulary
    except ImportError as error:
        raise missing_extra("llama-cpp-python", "llama") from error
    backend = load_tokenizer(folder).backend_tokenizer
    spec = json.loads(backend.to_str())
    trials = list(texts)
    steps = steps_of(spec["pre_tokenizer"], "pretokenizers")
    if not any(step["type"] == "Metaspace" and step["prepend_scheme"] == "first" for step in steps):
        with Vocabulary(gguf) as vocabulary:
            rows = vocabulary.n_vocab
        special = [token["content"] for token in spec["added_tokens"] if token["id"] < rows][:64]
        trials += [*special, *(f"before {token} after{token}{token}\n{token}" for token in special)]
    if spec["normalizer"] is not None and spec["normalizer"]["type"] == "NFC":
        warnings.warn("the tokenizer composes characters (NFC) and llama.cpp does not", stacklevel=2)
        trials = [backend.normalizer.normalize_str(text) for text in trials]
    with Vocabulary(gguf) as vocabulary:
        for text in trials:
            ours = backend.encode(text, add_special_tokens=False).ids
            theirs = vocabulary.encode(text, parse_special=True)
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
                at = at or min(len(ours), len(theirs)) if ours[:1] == theirs[:1] else 0
                raise StageFailed(
                    f"transformers and llama.cpp differ on {text!r} from token {at}: "
                    f"{ours[at : at + 5]} and {theirs[at : at + 5]}",
                    where=folder,
                    remedy="this tokenizer cannot be exported to GGUF; please report it",
                )
    return len(trials)

"""Fingerprint of a tokenizer: whether two are the same, by the ids they give, whatever their names and files.

A model trained on one tokenizer's ids reads another's as noise, and nothing shows it: the ids are all valid. So a dataset and
a checkpoint record a fingerprint of their tokenizer: a checksum of the ids of a text that is hard to tokenize, and of the
end-of-text id. GPT-2's is the same from tiktoken, from a `tokenizer.json` of any version of the library, and from an export;
two vocabularies that were learned from different text do not agree on all of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pretrain_xla.data.manifest import DatasetInfo
from pretrain_xla.errors import UserError
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer

# Never change it: datasets and checkpoints store fingerprints of this text.
TEXT = """\
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular to
interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a way I have of driving
off the spleen and regulating the circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp,
drizzly November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and bringing up the rear of
every funeral I meet, then I account it high time to get to sea as soon as I can.

Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. One day, she saw a
big dog under the tree. "Can we be friends?" asked Lily. The dog was very happy, and they played together all day long.

The government said on Tuesday that the number of people who work in science, education and health care had increased by 3.7% to
1,234,567 between 1998 and 2024; see https://www.example.com/reports?id=42&lang=en. However, these results should not be used
without further information about the temperature, pressure, electricity, photosynthesis and international development.

ROMEO: But, soft! what light through yonder window breaks? It's the east, and I'LL say what we've known; they don't, you're not.

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + 2 ** -10  # not 1e-3 != {"a": [0, 1]}\r
\t<div class="main">&nbsp;</div>;  for (int i = 0; i < n; ++i) { printf("%d\\n", i); }

Größe, naïve café, señor, Œuvre, Ελλάδα, Привет мир, שלום עולם, مرحبا بالعالم, हिन्दी भाषा,
ภาษาไทย, Tiếng Việt, 東京タワーの日本語, 中文字符测试, 한국어 문장,
🙂 👩‍👩‍👧 🏳️‍🌈, e\u0301, ﬁ Ⅷ ½ 𝔘, \u00a0\u2009\u200b\ufeff end </s> <|endoftext|> <0x0A>   \n
"""


@dataclass(frozen=True)
class TokenizerId:
    """Which tokenizer a dataset or model was made with, as far as that is known."""

    fingerprint: str | None = None
    """As recorded; None means that it was not."""
    name: str | None = None
    """The name that `load_tokenizer` loads it by; None means unknown."""

    def differs(self, other: TokenizerId) -> bool:
        """Whether the two are certainly different; false where that cannot be determined.

        Loads a tokenizer whose fingerprint was not recorded, unless both have the same built-in name.
        """
        if self.name == other.name and self.name in known_tokenizers():
            return False
        own = self.found()
        return own is not None and (theirs := other.found()) is not None and own != theirs

    def found(self) -> str | None:
        """The fingerprint as recorded, or of the tokenizer of that name; None where it cannot be loaded."""
        if self.fingerprint is not None or self.name is None:
            return self.fingerprint
        try:
            return fingerprint(load_tokenizer(self.name))
        except UserError:
            return None


def fingerprint(tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits that identify what a tokenizer encodes text to.

    Raises:
        UserError: it cannot encode.
    """
    ids = [*tokenizer.encode(TEXT), tokenizer.end_of_text]
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def dataset_tokenizer(info: DatasetInfo | None) -> TokenizerId:
    """The tokenizer of a dataset; unknown where there is no manifest."""
    return TokenizerId(info.tokenizer_fingerprint, info.tokenizer_name) if info is not None else TokenizerId()

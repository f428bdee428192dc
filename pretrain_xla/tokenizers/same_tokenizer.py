"""Whether two tokenizers are one: by what they make of text, not by where they lie or what they are called.

A model that was trained on one tokenizer's ids reads another's as noise, and nothing in the numbers says so: the ids fit. So a
dataset and a checkpoint record a fingerprint of their tokenizer: a checksum over the ids of a text that is hard to cut, and
the id that ends a document. GPT-2's encoding has the same one as tiktoken's, as a `tokenizer.json` of any version of the
library, and as an export; two vocabularies that were learned from different text do not agree on all of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pretrain_xla.data.manifest import DatasetInfo
from pretrain_xla.errors import UserError
from pretrain_xla.tokenizers.tokenizer import Tokenizer, known_tokenizers, load_tokenizer

# Fingerprints of it are stored with datasets and checkpoints: another text would make strangers of them all.
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
    """Which tokenizer something was made with, as far as that is known.

    fingerprint: as recorded; none: it was not. name: what `load_tokenizer` finds it by; none: nobody says.
    """

    fingerprint: str | None = None
    name: str | None = None

    def differs(self, other: TokenizerId) -> bool:
        """Whether the two are certainly not one; false also where that cannot be found out.

        Loads a tokenizer where there is no fingerprint, unless both have the same well-known name.
        """
        if self.name == other.name and self.name in known_tokenizers():
            return False
        own = self.found()
        return own is not None and (theirs := other.found()) is not None and own != theirs

    def found(self) -> str | None:
        """The fingerprint, recorded or of the tokenizer of that name; none where it cannot be loaded."""
        if self.fingerprint is not None or self.name is None:
            return self.fingerprint
        try:
            return fingerprint(load_tokenizer(self.name))
        except UserError:
            return None


def fingerprint(tokenizer: Tokenizer) -> str:
    """Of what a tokenizer makes of text.

    Raises:
        UserError: it cannot encode.
    """
    ids = [*tokenizer.encode(TEXT), tokenizer.end_of_text]
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def of_dataset(info: DatasetInfo | None) -> TokenizerId:
    """What a dataset was made with; nothing is known where there is no manifest."""
    return TokenizerId(info.tokenizer_fingerprint, info.tokenizer_name) if info is not None else TokenizerId()

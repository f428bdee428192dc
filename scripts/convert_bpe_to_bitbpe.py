"""Make a BitBPE tokenizer out of another one; then it is a --tokenizer everywhere.

python scripts/convert_bpe_to_bitbpe.py --input_path tokenizers/4k --output_path tokenizers/4k-bitbpe --test_conversion
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from pretrain_xla.errors import guarded
from pretrain_xla.tokenizers.bitbpe_command import convert_command

if __name__ == "__main__":
    guarded(convert_command)(sys.argv[1:])

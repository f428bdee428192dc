"""FineWeb's (or FineWeb-Edu's) sample of ten billion tokens as token shards, in train/ and valid/.

python scripts/prepare_fineweb.py --fineweb-edu --streaming --num-workers 8
python run_pretrain_xla.py --config configs/modern_124m.yaml    # reads fineweb_edu/train and fineweb_edu/valid
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from pretrain_xla.errors import guarded
from pretrain_xla.prepare.command import prepare_fineweb_command

if __name__ == "__main__":
    guarded(prepare_fineweb_command)(sys.argv[1:])

"""The tokenizer of a run, and the refusal to go on with data that another one made.

Nothing in the ids tells: they fit, the loss doubles, and what the model then writes is noise.
"""

from __future__ import annotations

from pretrain_xla.config import RunConfig
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.redact import is_redacted
from pretrain_xla.run_folder.checkpoint_marker import CheckpointInfo
from pretrain_xla.run_folder.files import find_tokenizer
from pretrain_xla.tokenizers.fingerprint import TokenizerId, dataset_tokenizer
from pretrain_xla.tokenizers.load import known_tokenizers


def tokenizer_of_run(config: RunConfig) -> TokenizerId:
    """What the data of a run was made with: as its manifest says, else as `tokenizer` does.

    Raises:
        UserError: `tokenizer`, `train_dir` and `valid_dir` are not of one tokenizer.
    """
    data = config.data
    folders = [data.valid_dir] if config.train.do_test else [data.train_dir, data.valid_dir]
    known = [(folder, dataset_tokenizer(info)) for folder in folders if (info := dataset_info(folder)) is not None]
    if data.tokenizer is not None:
        known.append((f"tokenizer={data.tokenizer}", TokenizerId(name=data.tokenizer)))
    if not known:
        return TokenizerId()
    where, first = known[0]
    for other, found in known[1:]:
        if first.differs(found):
            raise UserError(
                f"{where} was made with another tokenizer than {other}: the same ids mean other text there; "
                f"{_mend(first.name)}"
            )
    return first


def tokenizer_of_checkpoint(root: str, info: CheckpointInfo, config: RunConfig) -> TokenizerId:
    """What a checkpoint's run was trained with.

    Args:
        root: its checkpoints folder.
        info: what it says; before there was a fingerprint in it, the run's own copy or its data's manifest tells.
        config: of the run now. What lies in its `train_dir` now need not be what the checkpoint's run saw there.
    """
    data = info.config.get("data")
    stated, folder = (data.get(key) for key in ("tokenizer", "train_dir")) if isinstance(data, dict) else (None, None)
    name = find_tokenizer(root) or (stated if isinstance(stated, str) else None)
    if not info.data and name in known_tokenizers():  # an imported model's, which came with no file: a guess
        return TokenizerId()
    if info.tokenizer is not None or name is not None:
        return TokenizerId(info.tokenizer, name)
    if not isinstance(folder, str) or not info.data or is_redacted(folder) or folder == config.data.train_dir:
        return TokenizerId()
    try:
        return dataset_tokenizer(dataset_info(folder))
    except UserError:
        return TokenizerId()


def check_same_tokenizer(had: TokenizerId, where: str, has: TokenizerId, config: RunConfig) -> None:
    """Refuse data that was not made with the tokenizer of the model.

    Raises:
        UserError: it was made with another one.
    """
    if had.differs(has):
        data = config.data.valid_dir if config.train.do_test else config.data.train_dir
        raise UserError(
            f"{where} was trained with another tokenizer than {data} was made with: the same ids mean other text there; "
            f"{_mend(had.name)}, or begin a run of its own in another folder"
        )


def _mend(name: str | None) -> str:
    return f"prepare the data with one tokenizer{f' (prepare --tokenizer {name})' if name else ''}"

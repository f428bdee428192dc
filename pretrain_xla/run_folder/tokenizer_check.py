"""The tokenizer of a run's data, and a check that a resumed run or an imported model was trained with the same one.

The ids do not show it: another tokenizer's ids are valid, but the loss doubles and the generated text is noise.
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
    """The tokenizer that made a run's data, from the data's manifest or else from the setting `tokenizer`.

    Raises:
        UserError: `tokenizer`, `train_dir` and `valid_dir` do not have the same tokenizer.
    """
    data = config.data
    folders = [data.valid_dir] if config.train.mode == "evaluate" else [data.train_dir, data.valid_dir]
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
                f"{_fix(first.name)}"
            )
    return first


def tokenizer_of_checkpoint(root: str, info: CheckpointInfo, config: RunConfig) -> TokenizerId:
    """The tokenizer that a checkpoint's run was trained with.

    Args:
        root: its checkpoints folder.
        info: its marker. For older ones without a fingerprint, the run's copy of the tokenizer or the data's manifest is used.
        config: of the run now. Its `train_dir` may have changed since the checkpoint, so that its manifest says nothing.
    """
    data = info.config.get("data")
    stated, folder = (data.get(key) for key in ("tokenizer", "train_dir")) if isinstance(data, dict) else (None, None)
    name = find_tokenizer(root) or (stated if isinstance(stated, str) else None)
    if not info.data and name in known_tokenizers():  # an imported model without a tokenizer file: the name is a guess
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
    """Refuse data that was made with another tokenizer than the model's.

    Raises:
        UserError: the tokenizers differ.
    """
    if had.differs(has):
        data = config.data.valid_dir if config.train.mode == "evaluate" else config.data.train_dir
        raise UserError(
            f"{where} was trained with another tokenizer than {data} was made with: the same ids mean other text there; "
            f"{_fix(had.name)}, or start a new run in another folder"
        )


def _fix(name: str | None) -> str:
    return f"prepare the data with one tokenizer{f' (prepare --tokenizer {name})' if name else ''}"

"""The model, the optimizer and the examples of a run, as the trainer and preflight both make them."""

from __future__ import annotations

import torch

from pretrain_xla.config import RunConfig
from pretrain_xla.data.dataset import TokenDataset
from pretrain_xla.errors import UserError
from pretrain_xla.model import GPT, Execution, initialize
from pretrain_xla.model.documents import Examples
from pretrain_xla.optim import MapMatrices, Optimizer, learning_rate, make_optimizer
from pretrain_xla.optim.parameters import Place
from pretrain_xla.runtime import Runtime


def execution_of(config: RunConfig) -> Execution:
    """The way of running the model that the config asks for."""
    return Execution(config.train.rematerialization, config.train.scan_layers, config.train.loss_chunk)


def build_model(config: RunConfig, compute_dtype: torch.dtype, seed: int | None) -> GPT:
    """The model on the host.

    Args:
        config: of the run.
        compute_dtype: of its matrix products.
        seed: of new weights. None: the parameters are on the meta device, without memory, because they are loaded later.
    """
    if seed is not None:
        model = GPT(config.model, compute_dtype)
        initialize(model, seed)
        return model
    with torch.device("meta"):
        model = GPT(config.model, compute_dtype)
    for name, buffer in model.named_buffers():
        setattr(model, name, torch.empty_like(buffer, device="cpu"))
    model.reset_buffers()
    return model


def placing_zeros(runtime: Runtime) -> Place:
    """Places the state of a new run's optimizer, which is zero."""

    def place(name: str, shape: torch.Size, parameter: torch.Tensor) -> torch.Tensor:
        dtype = torch.int32 if name == "step" else torch.float32
        return runtime.place_like(torch.zeros(shape, dtype=dtype), parameter)

    return place


def build_optimizer(config: RunConfig, model: GPT, place: Place, map_matrices: MapMatrices) -> Optimizer:
    """The optimizer over a placed model; `place` makes each tensor of its state, `map_matrices` is the runtime's."""
    width = config.model.d_model
    schedule = lambda step: learning_rate(step, config.optim, width)  # noqa: E731
    # fp16 has no room for the sums of an orthogonalization.
    dtype = torch.float32 if config.train.mixed_precision is None else torch.bfloat16
    return make_optimizer(model.named_parameters(), config.optim, schedule, place, map_matrices, dtype, width)


def build_examples(config: RunConfig, dataset: TokenDataset | None) -> Examples:
    """What the model learns from a dataset's rows; without one (preflight) any id makes the same program.

    Raises:
        UserError: documents are to be kept apart, and nothing says which token ends them.
    """
    ignored = tuple(sorted(set(config.train.loss_ignore_tokens)))
    if not config.data.separate_documents:
        return Examples(ignored=ignored)
    end_of_text = config.data.end_of_text
    if end_of_text is None:
        if dataset is None:
            return Examples(config.model.vocab_size - 1, ignored)
        if dataset.info is None:
            raise UserError(
                f"{dataset.directory}: separate_documents must know which token ends a document, and there is no "
                "dataset.json: give its id with --end-of-text (gpt2: 50256)"
            )
        end_of_text = dataset.info.end_of_text
    return Examples(end_of_text, ignored)

"""The conversion of GPT-2 weights, against `transformers` as the reference; and the door to them without a network."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pretrain_xla.config import ModelConfig, RunConfig, TrainConfig
from pretrain_xla.errors import UserError
from pretrain_xla.interop.gpt2 import convert_gpt2, load_gpt2, match_vocabulary
from pretrain_xla.model import GPT


@pytest.mark.parametrize("seq_length", [16, 10])
def test_logits_equal_transformers(seq_length: int) -> None:
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=16, n_embd=32, n_layer=3, n_head=4)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # so that no bias is zero
    config = ModelConfig(
        vocab_size=101, seq_length=seq_length, d_model=32, num_layers=3, num_heads=4, d_ff=128, tie_weights=True
    )
    ours = GPT(config).eval()
    ours.load_state_dict(convert_gpt2(theirs.state_dict(), config), strict=True)
    tokens = torch.randint(0, 101, (2, seq_length))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_padded_vocabulary_becomes_padding() -> None:
    padded = RunConfig(model=ModelConfig(vocab_size=50304), train=TrainConfig(from_checkpoint="gpt2"))
    assert match_vocabulary(padded).model.vocab_size == 50257
    assert match_vocabulary(padded).model.padded_vocab_size == 50304
    own = RunConfig(model=ModelConfig(vocab_size=50304))
    assert match_vocabulary(own) is own


def test_a_model_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match="d_model=1024, this model has 768"):
        load_gpt2("gpt2-medium", ModelConfig(tie_weights=True))


def test_without_network_and_cache_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be downloaded .* put it into the Hub's cache"):
        load_gpt2("gpt2", ModelConfig(seq_length=1024, tie_weights=True))

import pytest
import torch

from pretrain_xla.config import ModelConfig
from pretrain_xla.model.attention import Attention, Heads
from pretrain_xla.model.attention import attend as attend_with


def heads(num_heads, kv_heads, length=9, width=6):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, num_heads, length, width), (2, kv_heads, length, width), (2, kv_heads, length, width))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attend(query, key, value, *, implementation, scale, softcap=None, dropout=0.0, segments_BT=None):
    H, K = query.shape[1], key.shape[1]
    config = ModelConfig(
        num_heads=H,
        num_kv_heads=K,
        head_dim=query.shape[-1],
        d_model=12 * H,
        query_scale=scale,
        attention_softcap=softcap,
        attention=implementation,
    )
    return attend_with(Heads(query, key, value), segments_BT, config, dropout)


def by_hand(query_BHTE, key_BKTE, value_BKTE, scale, softcap):
    """One token of one head at a time."""
    B, H, T, _ = query_BHTE.shape
    group = H // key_BKTE.shape[1]
    out_BHTE = torch.zeros_like(query_BHTE)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = key_BKTE[b, h // group, : t + 1] @ query_BHTE[b, h, t] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out_BHTE[b, h, t] = scores.softmax(-1) @ value_BKTE[b, h // group, : t + 1]
    return out_BHTE


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_the_reference_is_attention(kv_heads, softcap):
    inputs = [x.detach() for x in heads(6, kv_heads)]
    actual_BHTE = attend(*inputs, implementation="reference", scale=0.7, softcap=softcap)
    torch.testing.assert_close(actual_BHTE, by_hand(*inputs, 0.7, softcap))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("width", [6, 16])
def test_sdpa_equals_the_reference_with_gradients(kv_heads, width):
    inputs = heads(6, kv_heads, width=width)
    weights_BHTE = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    results = []
    for implementation in ("reference", "sdpa"):
        out_BHTE = attend(*inputs, implementation=implementation, scale=0.3)
        results.append((out_BHTE, *torch.autograd.grad((out_BHTE * weights_BHTE).sum(), inputs)))
    for reference, sdpa in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_tokens_attend_within_their_document(implementation, softcap):
    inputs = [x.detach() for x in heads(6, 2)]
    segments_BT = torch.tensor([[0] * 4 + [1] * 5, [0] + [2] * 6 + [3] * 2])
    actual_BHTE = attend(*inputs, implementation=implementation, scale=0.7, softcap=softcap, segments_BT=segments_BT)
    for b, parts in enumerate(([4, 5], [1, 6, 2])):
        pieces = zip(*(x[b : b + 1].split(parts, dim=2) for x in inputs), strict=True)
        expected_BHTE = torch.cat([by_hand(*piece, 0.7, softcap) for piece in pieces], dim=2)
        torch.testing.assert_close(actual_BHTE[b : b + 1], expected_BHTE)


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_dropout_keeps_the_mean(implementation):
    inputs = [x.detach() for x in heads(4, 4)]
    plain_BHTE = attend(*inputs, implementation=implementation, scale=0.3)
    torch.manual_seed(0)
    trained = [attend(*inputs, implementation=implementation, scale=0.3, dropout=0.5) for _ in range(600)]
    assert not torch.equal(trained[0], trained[1])
    torch.testing.assert_close(torch.stack(trained).mean(0), plain_BHTE, atol=0.35, rtol=0.0)


def test_a_softcap_without_a_fused_kernel_is_the_reference():
    heads = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    capped = [attend(*heads, implementation=name, scale=0.5, softcap=1.0) for name in ("sdpa", "reference")]
    assert torch.equal(*capped)


def test_no_dropout_in_evaluation():
    config = ModelConfig(num_heads=2, d_model=16, dropout=0.5)
    attention = Attention(config, torch.float32)
    inputs = Heads(*(x.detach() for x in heads(2, 2, width=8)))
    assert not torch.equal(attention.attend(inputs, None), attend_with(inputs, None, config))
    assert torch.equal(attention.eval().attend(inputs, None), attend_with(inputs, None, config))

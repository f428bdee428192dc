import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain_xla.config import ModelConfig
from pretrain_xla.model import GPT, cross_entropy, initialize, parameter_count

CHOICES = {
    "norm": ["layernorm", "rmsnorm", "rmsnorm_zero_centered"],
    "positions": ["learned", "rotary", "none"],
    "activation": ["gelu", "gelu_exact", "relu", "relu2", "silu"],
    "gated": [True, False],
    "bias": [True, False],
    "qk_norm": [True, False],
    "post_norm": [True, False],
    "num_kv_heads": [None, 1, 2],
    "head_dim": [None, 10],
    "query_scale": [None, 0.2],
    "logit_softcap": [None, 3.0],
    "scale_embeddings": [True, False],
    "tie_weights": [True, False],
    "init": ["gpt2", "normal", "fan_in"],
    "vocab_multiple": [1, 16],
    "dropout": [0.0, 0.2],
    "attention": ["sdpa", "reference"],
}
PAIRS = [
    {a: x, b: y}
    for a, b in itertools.combinations(("norm", "positions", "gated", "bias", "qk_norm", "post_norm", "tie_weights"), 2)
    for x in CHOICES[a]
    for y in CHOICES[b]
]
options = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})
sweep = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def loss_and_gradients(model, tokens_BT, targets_BT):
    model.zero_grad()
    loss = model(tokens_BT, targets_BT)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def check_trains(config, build, batch):
    model = build(config).train()
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config) + config.d_model * (
        config.padded_vocab_size - config.vocab_size
    ) * (1 if config.tie_weights else 2)
    loss, gradients = loss_and_gradients(model, *batch(config))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert torch.isfinite(loss)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        if not (name.endswith("key.bias") and config.positions != "rotary" and not config.qk_norm):
            assert gradient.any(), name  # (softmax ignores a shift of all its scores, which is all that bias does)


@pytest.mark.parametrize("changes", PAIRS, ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()))
def test_every_pair_of_options_trains(tiny, build, batch, changes):
    check_trains(tiny(**changes, dropout=0.1), build, batch)


@sweep
@given(options)
def test_every_combination_of_options_trains(tiny, build, batch, changes):
    check_trains(tiny(**changes), build, batch)


@sweep
@given(options, st.integers(1, 11))
def test_no_token_sees_a_later_one(tiny, build, batch, changes, position):
    config = tiny(**changes)
    model = build(config)
    tokens_BT, _ = batch(config)
    changed_BT = tokens_BT.clone()
    changed_BT[:, position:] = (changed_BT[:, position:] + 1) % config.vocab_size
    with torch.no_grad():
        before_BTV, after_BTV = model(tokens_BT), model(changed_BT)
    assert torch.equal(before_BTV[:, :position], after_BTV[:, :position])
    assert not torch.equal(before_BTV[:, position:], after_BTV[:, position:])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing(tiny, build, batch, tied, softcap, dtype):
    """Padding rows full of noise, with outputs that dwarf the real ones: neither loss nor gradient notices."""
    padded_config = tiny(tie_weights=tied, logit_softcap=softcap)
    plain_config = padded_config.model_copy(update={"vocab_multiple": 1})
    padded, plain = build(padded_config, dtype), GPT(plain_config, dtype).eval()
    tables = ["embedding.weight"] if tied else ["embedding.weight", "head.weight"]
    with torch.no_grad():
        for name in tables:
            padded.get_parameter(name)[61:] = 10.0 * padded.get_parameter("final_norm.weight")
    state = {name: value[:61] if name in tables else value for name, value in padded.state_dict().items()}
    plain.load_state_dict(state)
    tokens_BT, targets_BT = batch(plain_config)
    padded_loss, padded_gradients = loss_and_gradients(padded, tokens_BT, targets_BT)
    plain_loss, plain_gradients = loss_and_gradients(plain, tokens_BT, targets_BT)
    torch.testing.assert_close(padded_loss, plain_loss, atol=1e-6, rtol=1e-6)
    for name in tables:
        assert not padded_gradients[name][61:].any()
        padded_gradients[name] = padded_gradients[name][:61]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(padded_gradients, plain_gradients, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(padded(tokens_BT), plain(tokens_BT), atol=1e-6, rtol=1e-6)
    assert padded(tokens_BT).shape[-1] == 61


def test_loss_is_the_mean_log_probability(tiny, build, batch):
    config = tiny()
    model = build(config)
    tokens_BT, targets_BT = batch(config)
    with torch.no_grad():
        log_probabilities_BTV = model(tokens_BT).log_softmax(-1)
        expected = -log_probabilities_BTV.gather(-1, targets_BT[..., None]).mean()
        torch.testing.assert_close(model(tokens_BT, targets_BT), expected)
        half_BT = targets_BT.clone()
        half_BT[1] = -100
        torch.testing.assert_close(model(tokens_BT, half_BT), cross_entropy(model(tokens_BT)[:1], targets_BT[:1]))


def test_int32_tokens_give_the_same(tiny, build, batch):
    config = tiny()
    model = build(config)
    assert torch.equal(model(*batch(config, dtype=torch.int32)), model(*batch(config)))


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_bf16_compute_keeps_fp32_weights_and_stays_near(tiny, build, batch, tied, attention, norm):
    config = tiny(norm=norm, positions="rotary", qk_norm=True, num_kv_heads=2, tie_weights=tied, attention=attention)
    full, half = build(config), build(config, torch.bfloat16)
    products = []
    for module in half.modules():
        if type(module).__name__ == "Linear":
            module.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    residual = []
    half.blocks[1].register_forward_pre_hook(lambda module, inputs: residual.append(inputs[0].dtype))
    full_loss, full_gradients = loss_and_gradients(full, *batch(config))
    half_loss, half_gradients = loss_and_gradients(half, *batch(config))
    assert set(products) == {torch.bfloat16}
    assert residual == [torch.float32]
    assert {gradient.dtype for gradient in half_gradients.values()} == {torch.float32}
    assert half_loss.dtype == torch.float32
    assert half_loss != full_loss
    torch.testing.assert_close(half_loss, full_loss, atol=0.02, rtol=0)
    for name, gradient in full_gradients.items():
        assert torch.cosine_similarity(half_gradients[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_meta_device_then_reset_buffers_gives_the_same_model(tiny, batch):
    config = tiny(norm="rmsnorm", positions="rotary", bias=False)
    expected = GPT(config)
    initialize(expected, 5)
    with torch.device("meta"):
        model = GPT(config)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    initialize(model, 5)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(float("nan"))
    model.reset_buffers()
    assert torch.equal(model(*batch(config)), expected(*batch(config)))


def test_state_dict_holds_parameters_only_and_tied_weights_once(tiny):
    model = GPT(tiny(positions="rotary", tie_weights=True))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert "head.weight" not in model.state_dict()


def test_parameter_names(tiny):
    """The names that sharding tables, optimizers and checkpoints rely on."""
    model = GPT(tiny(qk_norm=True, post_norm=True, gated=True, num_layers=1))
    names = {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith("weight")}
    attention = {f"blocks.0.attention.{name}" for name in ("query", "key", "value", "output", "query_norm", "key_norm")}
    feed_forward = {f"blocks.0.feed_forward.{name}" for name in ("up", "gate", "down")}
    norms = {f"blocks.0.{part}_{norm}" for part in ("attention", "feed_forward") for norm in ("norm", "post_norm")}
    assert names == {"embedding", "position_embedding", "final_norm", "head"} | attention | feed_forward | norms


def test_uninitialised_weights_show(tiny, batch):
    model = GPT(tiny())
    assert model(*batch(tiny())).isnan()


def test_too_long_is_refused(tiny, build):
    with pytest.raises(ValueError, match="seq_length=12"):
        build(tiny())(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_tokens_one_by_one_over_a_cache_give_the_same_logits(tiny, build, batch, positions):
    """What generation needs: explicit positions, and attention over a cache in place of the causal one."""
    config = tiny(positions=positions, qk_norm=True, num_kv_heads=2)
    model = build(config)
    tokens_BT, _ = batch(config)
    layers = [[] for _ in model.blocks]

    class Cache:
        def __init__(self):
            self.next = iter(layers)

        def attend(self, heads):
            layer = next(self.next)
            layer.append(heads[1:])
            keys, values = (torch.cat(part, dim=2).repeat_interleave(2, dim=1) for part in zip(*layer, strict=True))
            return torch.nn.functional.scaled_dot_product_attention(heads.query_BHTE, keys, values)

    steps = [
        model.logits(model.hidden(tokens_BT[:, t : t + 1], torch.tensor([t]), Cache()))
        for t in range(config.seq_length)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens_BT), atol=1e-5, rtol=1e-5)


def test_dropout_is_random_in_training_and_off_in_evaluation(tiny, build, batch):
    config = tiny(dropout=0.3)
    model, plain = build(config), build(tiny())
    assert torch.equal(model(*batch(config)), plain(*batch(config)))
    model.train()
    assert model(*batch(config)) != model(*batch(config))


def test_dropout_falls_on_embeddings_attention_weights_and_both_branches(tiny, build, batch, monkeypatch):
    config = tiny(dropout=0.3, attention="reference", num_layers=1, num_kv_heads=2)
    model = build(config).train()
    shapes = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, rate: shapes.append((rate, *x.shape)) or x)
    model(*batch(config))
    assert shapes == [(0.3, 2, 12, 24), (0.3, 2, 2, 2, 12, 12), (0.3, 2, 12, 24), (0.3, 2, 12, 24)]


def test_config_default_is_gpt2():
    with torch.device("meta"):
        model = GPT(ModelConfig(seq_length=1024, tie_weights=True, vocab_multiple=1))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808

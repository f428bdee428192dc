"""Old `.pt` checkpoints: nanoGPT's kind, made here, and a really trained one where the shared data is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain_xla.errors import UserError
from pretrain_xla.interop.command import import_command
from pretrain_xla.interop.export import export_model
from pretrain_xla.interop.load import load_model
from pretrain_xla.model import GPT

from .conftest import assert_same_logits, build, open_in_transformers, tiny

WEIGHTS = Path(__file__).parents[3] / "shared" / "data" / "weights"
BY_HAND = WEIGHTS / "gpt_by_hand"
ATTO = WEIGHTS / "Llama3_1m_atto"


def nano(model: GPT, *, gamma: bool = False, prefix: str = "", masked: bool = False) -> dict[str, Tensor]:
    """The state dict as nanoGPT names it: GPT-2's names, linear layers as they are, the head beside the embedding."""
    state = {"transformer.wpe.weight": model.position_embedding.weight}  # type: ignore[union-attr]
    state["transformer.wte.weight"] = state["lm_head.weight"] = model.embedding.weight[: model.config.vocab_size]
    for name, value in model.final_norm.named_parameters():
        state[f"transformer.ln_f.{name}"] = value
    for index, block in enumerate(model.blocks):
        inner = dict(block.named_parameters())
        for leaf in ("weight", "bias"):
            if f"attention.query.{leaf}" not in inner:
                continue
            fused = [inner[f"attention.{part}.{leaf}"] for part in ("query", "key", "value")]
            theirs = {
                "attn.c_attn": torch.cat(fused),
                "attn.c_proj": inner[f"attention.output.{leaf}"],
                "mlp.c_fc": inner[f"feed_forward.up.{leaf}"],
                "mlp.c_proj": inner[f"feed_forward.down.{leaf}"],
                "ln_1": inner[f"attention_norm.{leaf}"],
                "ln_2": inner[f"feed_forward_norm.{leaf}"],
            }
            state |= {f"transformer.h.{index}.{name}.{leaf}": value for name, value in theirs.items()}
        if masked:  # with the masks, which code from before PyTorch 2 saved
            state[f"transformer.h.{index}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    if gamma:
        state = {n.replace("weight", "gamma") if ".ln_" in n else n: t for n, t in state.items()}
    return {prefix + name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(prefix: str, bias: bool, tmp_path: Path) -> None:
    model = build(tiny(bias=bias, tie_weights=True, activation="gelu_exact"))
    saved = {
        "model": nano(model, gamma=not bias, prefix=prefix),
        "model_args": {"n_layer": 2, "n_head": 4, "block_size": 12, "bias": bias},
        "optimizer": {"state": {}},
        "iter_num": 2000,
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = load_model(str(tmp_path / "ckpt.pt"))
    assert loaded.config.model_copy(update={"vocab_multiple": 16}) == model.config
    ours = GPT(loaded.config)
    ours.load_state_dict(loaded.tensors, strict=True)
    ids = torch.arange(12)[None]
    assert torch.equal(ours.eval()(ids), model(ids))


def test_what_the_file_does_not_say_can_be_said(tmp_path: Path) -> None:
    model = build(tiny(tie_weights=True, activation="gelu"))
    torch.save(nano(model), tmp_path / "ckpt.pt")
    import_command([str(tmp_path / "ckpt.pt"), str(tmp_path / "run"), "--num-heads", "4", "--activation", "gelu"])
    loaded = load_model(str(tmp_path / "run"))
    assert (loaded.config.num_heads, loaded.config.activation) == (4, "gelu")
    ours = GPT(loaded.config)
    ours.load_state_dict(loaded.tensors, strict=True)
    ids = torch.arange(12)[None]
    assert torch.equal(ours.eval()(ids), model(ids))


def test_another_layout_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    torch.save({"blocks.0.mixer.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"not those of a GPT-2 or nanoGPT \(it has 'blocks.0.mixer.weight', and no wte.weight"
    ):
        load_model(str(tmp_path / "other.pt"))
    state = nano(build(tiny(tie_weights=True)))
    for change, said in (
        ({"transformer.h.foo": torch.zeros(2)}, "it has 'h.foo'"),
        ({"transformer.h.0.attn.c_attn.weight": torch.zeros(2)}, r"h.0.attn.c_attn.weight has 1 dimensions, not 2"),
        ({"transformer.h.0.mlp.c_fc.weight": None}, "and no h.0.mlp.c_fc.weight"),
        ({"lm_head.weight": torch.zeros(7, 24)}, r"'lm_head.weight' is 7 x 24, its config says 61 x 24"),
    ):
        changed = {n: t for n, t in (state | change).items() if t is not None}
        torch.save({"model": changed, "config": {"n_head": 4}}, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=said):
            load_model(str(tmp_path / "changed.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list, not a state dict"):
        load_model(str(tmp_path / "list.pt"))


def by_hand_logits(state: dict[str, Tensor], heads: int, ids_BT: Tensor) -> Tensor:
    """What its own code computes, in a few lines: pre-norm, no biases, exact GELU, tied head."""
    width = state["transformer.wte.weight"].shape[1]
    x = state["transformer.wte.weight"][ids_BT] + state["transformer.wpe.weight"][: ids_BT.shape[1]]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"transformer.{name}.gamma"], None, 1e-5)

    for layer in range(2):
        h = f"transformer.h.{layer}"
        parts = (norm(x, f"h.{layer}.ln_1") @ state[f"{h}.attn.c_attn.weight"].T).split(width, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + mixed @ state[f"{h}.attn.c_proj.weight"].T
        up = F.gelu(norm(x, f"h.{layer}.ln_2") @ state[f"{h}.mlp.c_fc.weight"].T)
        x = x + up @ state[f"{h}.mlp.c_proj.weight"].T
    return norm(x, "ln_f") @ state["lm_head.weight"].T


@pytest.mark.skipif(not BY_HAND.is_dir(), reason="needs ../shared/data/weights/gpt_by_hand")
def test_a_really_trained_checkpoint_has_the_same_loss_everywhere(tmp_path: Path) -> None:
    loaded = load_model(str(BY_HAND / "ckpt.pt"))
    ours = GPT(loaded.config).eval()
    ours.load_state_dict(loaded.tensors, strict=True)
    export_model(loaded, str(tmp_path / "exported"))
    theirs = open_in_transformers(tmp_path / "exported")
    assert theirs.config.activation_function == "gelu"
    text = torch.from_numpy(np.fromfile(BY_HAND / "data" / "val.bin", dtype=np.uint16).astype(np.int64))
    rows = text[: (len(text) - 1) // 8 * 8 + 1].unfold(0, 9, 8)
    saved = torch.load(BY_HAND / "ckpt.pt", weights_only=True, map_location="cpu")
    state = saved["model"]
    with torch.no_grad():
        loss = float(ours(rows[:, :-1], rows[:, 1:]))
        there = float(F.cross_entropy(theirs(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()))
        written_out = float(
            F.cross_entropy(by_hand_logits(state, 2, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        )
    assert loss == pytest.approx(there, abs=1e-6)
    assert loss == pytest.approx(written_out, abs=1e-6)
    assert loss == pytest.approx(float(saved["best_val_loss"]), abs=0.1), (
        "its trainer measured it on random places of the same text"
    )
    assert_same_logits(ours, theirs)


ATTO_NAMES = {
    "token_embedder": "model.embed_tokens",
    "output.": "lm_head.",
    "final_norm": "model.norm",
    "layers.": "model.layers.",
    "attn.Wq": "self_attn.q_proj",
    "attn.Wk": "self_attn.k_proj",
    "attn.Wv": "self_attn.v_proj",
    "attn.Wo": "self_attn.o_proj",
    "mlp.W": "mlp.",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "pre_attn_norm": "input_layernorm",
    "pre_mlp_norm": "post_attention_layernorm",
}
ATTO_CONFIG = {
    "model_type": "granite",
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 341,
    "attention_multiplier": 64**-0.5,
    "embedding_multiplier": 128**0.5,
    "tie_word_embeddings": True,
}


def atto(folder: Path, *, biases: bool) -> dict[str, Tensor]:
    """The model renamed into a folder that has a config.json; its own tensors by the new names."""
    state = {}
    for name, tensor in load_file(ATTO / "model.safetensors").items():
        for theirs, ours in ATTO_NAMES.items():
            name = name.replace(theirs, ours)
        name = name.removesuffix(".w") + ".weight" if name.endswith(".w") else name
        name = name.removesuffix(".b") + ".bias" if name.endswith(".b") else name
        state[name] = tensor
    del state["precompute_freqs.inv_freq"]
    (folder / "config.json").write_text(json.dumps(ATTO_CONFIG))
    save_file({n: t for n, t in state.items() if biases or not n.endswith(".bias")}, folder / "model.safetensors")
    return state


@pytest.mark.skipif(not ATTO.is_dir(), reason="needs ../shared/data/weights/Llama3_1m_atto")
def test_a_model_with_biases_in_its_rms_norms_is_refused_for_that(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model.safetensors: there is no config.json .* \(it has 'final_norm.b', and no wte"
    ):
        load_model(str(ATTO / "model.safetensors"))
    atto(tmp_path, biases=True)
    with pytest.raises(UserError, match=r"norm.bias' has no place .*, whose rmsnorm has no bias"):
        load_model(str(tmp_path))


@pytest.mark.skipif(not ATTO.is_dir(), reason="needs ../shared/data/weights/Llama3_1m_atto")
def test_a_really_trained_llama_agrees_once_those_biases_are_put_back(tmp_path: Path) -> None:
    """All but the norms' biases is imported; they are added by hooks, and the reference logits come out."""
    state = atto(tmp_path, biases=False)
    loaded = load_model(str(tmp_path))
    ours = GPT(loaded.config).eval()
    ours.load_state_dict(loaded.tensors, strict=True)
    norms: dict[str, nn.Module] = {"model.norm": ours.final_norm}
    for index, block in enumerate(ours.blocks):
        norms[f"model.layers.{index}.input_layernorm"] = block.attention_norm  # type: ignore[assignment]
        norms[f"model.layers.{index}.post_attention_layernorm"] = block.feed_forward_norm  # type: ignore[assignment]
    for name, norm in norms.items():
        bias = state[f"{name}.bias"]
        norm.register_forward_hook(lambda module, inputs, output, bias=bias: output + bias)
    reference = json.loads((ATTO / "reference_logits_ours.json").read_text())
    with torch.no_grad():
        logits = ours(torch.tensor([reference["input_ids"]]))[0, -1]
    torch.testing.assert_close(logits, torch.tensor(reference["logits_last_position"]), atol=1e-4, rtol=1e-4)

"""Every file of `configs/` loads, and is what its opening comment says."""

import re
from pathlib import Path

import pytest
import torch

from pretrain_xla.config import build_config
from pretrain_xla.config_file import load_yaml
from pretrain_xla.model import GPT, parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = [
    "gpt2_124m",
    "gpt2_355m",
    "gpt2_774m",
    "gpt2_1558m",
    "gpt25_124m",
    "modern_124m",
    "modern_124m_adamw",
    "modern_355m",
    "modern_774m",
    "modern_1558m",
    "speedrun_124m",
    "moderngpt2_small",
    "moderngpt2_medium",
    "moderngpt2_large",
    "moderngpt2_xl",
    "tinystories_1m",
]
SIZES = {"small": 124e6, "124m": 124e6, "medium": 355e6, "355m": 355e6, "large": 774e6, "774m": 774e6, "1m": 1e6}


def load(name):
    path = str(CONFIGS / f"{name}.yaml")
    return build_config(load_yaml(path), path)


def header(name):
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("# ") for line in comments)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_loads_and_says_what_it_is(path):
    load(path.stem)
    assert path.stem in header(path.stem)


@pytest.mark.parametrize("name", MODELS)
def test_header_tells_the_truth(name):
    config, text = load(name), header(name)
    stated = int(re.search(r"^Parameters: ([\d,]+)$", text, re.MULTILINE)[1].replace(",", ""))
    assert stated == parameter_count(config.model)
    with torch.device("meta"):
        model = GPT(config.model.model_copy(update={"vocab_multiple": 1}))
    assert stated == sum(parameter.numel() for parameter in model.parameters())
    head = 0 if config.model.tie_weights else config.model.vocab_size * config.model.d_model
    assert not head or f"{head:,} of them are the untied head." in text
    size = next((SIZES[part] for part in name.split("_") if part in SIZES), 1.55e9)
    assert stated - head == pytest.approx(size, rel=0.2 if name.endswith("_1m") else 0.03)
    for part in (f"Run: python run_pretrain_xla.py --config configs/{name}.yaml$", "Needs: ", "Time: ", "Loss: "):
        assert re.search(f"^{part}", text, re.MULTILINE), part
    assert config.run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", MODELS)
def test_comments_on_tokens_tell_the_truth(name):
    config, text = load(name), (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    comments = re.findall(r"^  (\w+): \S+  # ([\d.]+)([MB]) tokens", text, re.MULTILINE)
    tokens = {
        "train_steps": config.train.train_steps * config.tokens_per_step,
        "valid_steps": config.train.valid_steps * config.train.eval_batch_size * config.model.seq_length,
    }
    assert "train_steps" in {key for key, *_ in comments}
    for key, number, unit in comments:
        assert float(number) == pytest.approx(tokens[key] / {"M": 1e6, "B": 1e9}[unit], rel=0.01), key
    assert config.optim.decay_steps == config.train.train_steps


def test_gpt2_sizes_are_the_published_ones():
    counts = [parameter_count(load(name).model) for name in MODELS[:4]]
    assert counts == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


def test_one_dial_sets_all_sizes_of_the_recommended_model():
    """The settings of modern_124m, for another width and number of steps, by the rule of docs/recipe.md."""
    small = load("modern_124m")
    for name in ("modern_355m", "modern_774m", "modern_1558m"):
        large = load(name)
        steps = large.train.train_steps
        decay = small.optim.weight_decay * small.train.train_steps / steps
        assert large.optim.weight_decay == pytest.approx(decay, rel=0.05)
        same = {"base_d_model": small.model.d_model, "decay_steps": steps, "weight_decay": large.optim.weight_decay}
        assert large.optim == small.optim.model_copy(update=same)
        shape = {key: getattr(large.model, key) for key in ("d_model", "num_layers", "num_heads", "d_ff")}
        assert large.model == small.model.model_copy(update=shape)
        assert large.model.num_heads * 128 == large.model.d_model

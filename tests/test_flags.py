"""The command line: precedence, spelling, help, and the original's flags verbatim."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain_xla.config import LEAVES, RunConfig, build_config
from pretrain_xla.config.old_settings import SWITCHES
from pretrain_xla.config_file import load_yaml, to_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.flags import USUAL, Parsed, parse_flags


def parse(*arguments: str, **fixed: Any) -> Parsed:
    return parse_flags(arguments, program="script.py", description="A script.", fixed=fixed)


def leaf(config: RunConfig, name: str) -> Any:
    return getattr(getattr(config, LEAVES[name]), name)


def refusal(*arguments: str, **fixed: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments, **fixed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str], str]:
    """Writes a YAML file and returns its path."""

    def write(text: str) -> str:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "c.yaml")

    return write


def test_nothing_given_means_the_defaults() -> None:
    parsed = parse()
    assert parsed.config == RunConfig()
    assert parsed.given == frozenset()
    assert not parsed.print_config


def test_a_flag_overrides_the_file_and_the_file_the_default(yaml: Callable[[str], str]) -> None:
    path = yaml("model: {d_model: 96, num_heads: 6}\ntrain: {seed: 5}\n")
    parsed = parse("--config", path, "--d-model", "48", "--train-steps=7")
    assert parsed.config.model.d_model == 48
    assert parsed.config.model.num_heads == 6
    assert (parsed.config.train.seed, parsed.config.train.train_steps) == (5, 7)
    assert parsed.config.model.num_layers == RunConfig().model.num_layers
    assert parsed.given == {"d_model", "train_steps"}
    assert parse("--d-model=48", f"--config={path}").config.model.d_model == 48


def test_the_last_of_two_flags_counts(yaml: Callable[[str], str], tmp_path: Path) -> None:
    assert parse("--seed", "1", "--seed", "2").config.train.seed == 2
    first = yaml("train: {seed: 1}")
    (tmp_path / "second.yaml").write_text("train: {seed: 2}")
    assert parse("--config", first, "--config", str(tmp_path / "second.yaml")).config.train.seed == 2


def test_a_scripts_own_runtime_is_overridden_only_by_a_flag(yaml: Callable[[str], str]) -> None:
    path = yaml("parallel: {runtime: xla}")
    assert parse(runtime="torch").config.parallel.runtime == "torch"
    assert parse("--config", path, runtime="torch").config.parallel.runtime == "torch"
    for flag in (["--runtime", "xla"], ["--runtime=xla"]):
        assert parse("--config", path, *flag, runtime="torch").config.parallel.runtime == "xla"
    assert parse(runtime="torch").given == frozenset()


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        (["--betas", "0.9", "0.95"], "betas", (0.9, 0.95)),
        (["--learning-rate", "6e-4"], "learning_rate", 6e-4),
        (["--tie-weights"], "tie_weights", True),
        (["--no-tie-weights"], "tie_weights", False),
        (["--tie_weights"], "tie_weights", True),
        (["--no-bias"], "bias", False),
        (["--no-resume"], "resume", False),
        (["--train_steps", "3"], "train_steps", 3),
        (["--wandb-tags", "a", "b c"], "wandb_tags", ("a", "b c")),
        (["--wandb-tags", "a", "b", "--seed", "3"], "wandb_tags", ("a", "b")),
        (["--wandb-tags"], "wandb_tags", ()),
        (["--num-kv-heads", "4"], "num_kv_heads", 4),
        (["--num-kv-heads", "None"], "num_kv_heads", None),
        (["--mesh-data", "-1"], "mesh_data", -1),
        (["--wandb-notes=--seed"], "wandb_notes", "--seed"),
        (["--from-checkpoint", "gpt2-xl"], "from_checkpoint", "gpt2-xl"),
    ],
)
def test_spellings(arguments: list[str], name: str, expected: Any) -> None:
    parsed = parse(*arguments)
    assert leaf(parsed.config, name) == expected
    assert name in parsed.given


def test_a_switch_turns_off_what_the_file_turns_on(yaml: Callable[[str], str]) -> None:
    path = yaml("model: {tie_weights: true, bias: false}\nlogging: {wandb_tags: [a, b]}\n")
    kept = parse("--config", path).config
    assert (kept.model.tie_weights, kept.model.bias, kept.wandb.wandb_tags) == (True, False, ("a", "b"))
    changed = parse("--config", path, "--no-tie-weights", "--bias", "--wandb-tags", "c").config
    assert (changed.model.tie_weights, changed.model.bias, changed.wandb.wandb_tags) == (False, True, ("c",))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--d-modle", "--d-model"),
        ("--learning-rte=3", "--learning-rate"),
        ("--tie-wieghts", "--tie-weights"),
        ("--print-confg", "--print-config"),
        ("--model.d-model", "--d-model"),
        ("--d-mod", "--d-model"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_as_a_suggestion(wrong: str, right: str) -> None:
    line = refusal(wrong)
    assert f"unknown argument {wrong!r}" in line
    assert f"did you mean {right}?" in line


def test_other_unknown_arguments() -> None:
    assert refusal("qqqq") == "unknown argument 'qqqq'; see --help-all"
    assert refusal("--tie-weights", "True").startswith("unknown argument 'True'")
    assert refusal("--config") == "--config needs the path of a file"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--d-model", "wide"], "--d-model"),
        (["--d-model"], "--d-model"),
        (["--betas", "0.9"], "--betas"),
        (["--activation", "tanh"], "--activation"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_one_line_that_names_its_flag(arguments: list[str], named: str) -> None:
    line = refusal(*arguments)
    assert named in line
    assert "\n" not in line
    assert line.endswith("; see script.py --help")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--d-model", "0"], "model.d_model=0"),
        (["--betas", "0.9", "1.0"], "optim.betas"),
        (["--num-heads", "7"], "d_model=768 is not divisible by num_heads=7"),
        (["--mixed-precision", "fp16"], "mixed_precision=fp16"),
    ],
)
def test_an_impossible_value_is_refused_in_one_line(arguments: list[str], expected: str) -> None:
    assert expected in refusal(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {d_modle: 64}", "unknown key 'model.d_modle'; did you mean 'd_model'?"),
        ("modle: {d_model: 64}", "unknown key 'modle'; did you mean 'model'?"),
        ("modle:", "unknown key 'modle'; did you mean 'model'?"),
        ("model: {learning_rate: 3.0e-4}", "it belongs under 'optim'"),
        ("model: {d_model: wide}", "model.d_model='wide'"),
        ("optim: {betas: 0.9}", "optim.betas=0.9"),
    ],
)
def test_an_error_in_the_file_names_the_file(text: str, expected: str, yaml: Callable[[str], str]) -> None:
    path = yaml(text)
    for flags in ([], ["--d-model", "48"]):  # no flag can fix these
        line = refusal("--config", path, *flags)
        assert line.startswith(f"--config {path}: ")
        assert expected in line


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("model: {num_heads: 7}", ["--d-model", "70"]),
        ("model: {num_heads: 7}", ["--head-dim", "64"]),
        ("model: {num_kv_heads: 5}", ["--num-kv-heads", "None"]),
        ("optim: {warmup_steps: 30000}", ["--decay-steps", "40000"]),
        ("optim: {decay_method: noam, warmup_steps: 0}", ["--warmup-steps", "10"]),
        ("optim: {min_lr: 1.0}", ["--learning-rate", "2.0"]),
        ("train: {mixed_precision: fp16}", ["--runtime", "torch"]),
        ("model: {num_heads: 7}\noptim: {warmup_steps: 30000}", ["--num-heads", "6", "--warmup-steps", "1"]),
    ],
)
def test_a_flag_may_fix_a_combination_in_the_file(text: str, fix: list[str], yaml: Callable[[str], str]) -> None:
    path = yaml(text)
    refusal("--config", path)
    parsed = parse("--config", path, *fix)
    assert leaf(parsed.config, fix[0].lstrip("-").replace("-", "_")) is not False


def test_a_scripts_runtime_may_fix_a_combination_in_the_file(yaml: Callable[[str], str]) -> None:
    assert parse("--config", yaml("train: {mixed_precision: fp16}"), runtime="torch")


def test_numbers_in_yaml_without_a_dot(yaml: Callable[[str], str]) -> None:
    # YAML 1.1 takes `3e-4` (no dot) for a string. It is read as a number all the same, without a warning.
    path = yaml("optim: {learning_rate: 3e-4, adam_eps: 1e-8}\nmodel: {norm_eps: 1e-6}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = parse("--config", path).config
    assert (config.optim.learning_rate, config.optim.adam_eps, config.model.norm_eps) == (3e-4, 1e-8, 1e-6)


def test_a_printed_config_is_complete(
    yaml: Callable[[str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from pretrain_xla.cli import pretrain

    path = yaml("model: {d_model: 96, num_kv_heads: 3}\nlogging: {wandb_tags: [x]}\noptim: {betas: [0.9, 0.95]}\n")
    flags = ["--config", path, "--learning-rate", "1e-3", "--tie-weights", "--wandb-notes", "null: yes"]
    pretrain([*flags, "--print-config"], program="script.py")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    config = parse(*flags).config
    assert parse("--config", str(printed)).config == config
    assert build_config(load_yaml(str(printed)), "x") == config
    assert to_yaml(config) == printed.read_text(encoding="utf-8")


def test_help_shows_every_flag_in_its_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # one column of groups
    with pytest.raises(SystemExit) as caught:
        parse("--help-all")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    parts = re.split(r"(?m)^[^\w\n]*(?:(\w+) )?options[^\w\n]*$", text)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(groups) == {None, *RunConfig.model_fields}
    assert "--config " in groups[None]
    assert "--print-config" in groups[None]
    for name, section in LEAVES.items():
        assert re.search(rf"--{name.replace('_', '-')}\b", groups[section]), f"{name} is missing from {section}"
    assert "Width of the residual stream" in groups["model"]


def test_help_shows_the_usual_flags_and_how_to_see_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(LEAVES) >= set(USUAL)
    assert len(set(USUAL)) == len(USUAL)
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--help-all" in text
    for name in LEAVES:
        shown = re.search(rf"--{name.replace('_', '-')}(?![\w-])", text) is not None
        assert shown == (name in USUAL), name


# Every flag of the original's two training scripts, with values that are not our defaults: arguments → settings.
ORIGINAL: dict[str, dict[str, Any]] = {
    # general
    "--checkpoints-dir ckpt": {"checkpoints_dir": "ckpt"},
    "--seed 7": {"seed": 7},
    # data
    "--train-dir a/train": {"train_dir": "a/train"},
    "--valid-dir a/valid": {"valid_dir": "a/valid"},
    "--drop-last": {"drop_last": True},
    # model
    "--vocab-size 50304": {"vocab_size": 50304},
    "--seq-length 1024": {"seq_length": 1024},
    "--d-model 1024": {"d_model": 1024},
    "--num-layers 24": {"num_layers": 24},
    "--num-heads 16": {"num_heads": 16},
    "--d-ff 4096": {"d_ff": 4096},
    "--dropout 0.1": {"dropout": 0.1},
    "--activation relu": {"activation": "relu"},
    "--tie-weights": {"tie_weights": True},
    # wandb
    "--wandb-logging": {"wandb_logging": True},
    "--wandb-project gpt2": {"wandb_project": "gpt2"},
    "--wandb-name medium": {"wandb_name": "medium"},
    "--wandb-logging-interval 100": {"wandb_logging_interval": 100},
    "--wandb-resume-id 1a2b3c": {"wandb_resume_id": "1a2b3c"},
    "--wandb-notes first": {"wandb_notes": "first"},
    "--wandb-tags gpt2 medium": {"wandb_tags": ("gpt2", "medium")},
    # mode
    "--do-test": {"mode": "evaluate"},
    "--compile": {"compile": True},
    "--matmul-precision high": {"matmul_precision": "high"},
    "--from-checkpoint gpt2-medium": {"from_checkpoint": "gpt2-medium"},
    # optimizer
    "--optim-type adam": {"optim_type": "adam"},
    "--learning-rate 3e-4": {"learning_rate": 3e-4},
    "--betas 0.9 0.95": {"betas": (0.9, 0.95)},
    "--weight-decay 0.1": {"weight_decay": 0.1},
    # schedule
    "--decay-method noam": {"decay_method": "noam"},
    "--warmup-steps 700": {"warmup_steps": 700},
    "--min-lr 3e-5": {"min_lr": 3e-5},
    "--decay-steps 30000": {"decay_steps": 30000},
    # loop
    "--train-batch-size 256": {"train_batch_size": 256},
    "--eval-batch-size 128": {"eval_batch_size": 128},
    "--gradient-accum-step 2": {"gradient_accum_step": 2},
    "--mixed-precision bf16": {"mixed_precision": "bf16"},
    "--train-steps 30000": {"train_steps": 30000},
    "--valid-steps 50": {"valid_steps": 50},
    "--valid-interval 500": {"valid_interval": 500},
    "--save-interval 500": {"save_interval": 500},
    "--saved-checkpoint-limit 5": {"saved_checkpoint_limit": 5},
    "--max-grad-norm 1.0": {"max_grad_norm": 1.0},
}
TORCH_ONLY: dict[str, dict[str, Any]] = {"--ddp-backend nccl": {"ddp_backend": "nccl"}}
XLA_ONLY: dict[str, dict[str, Any]] = {
    "--mp-start-method fork": {"mp_start_method": "fork"},
    "--ddp": {},
    "--use-syncfree-optim": {},
}


@pytest.mark.parametrize(("runtime", "own"), [("torch", TORCH_ONLY), ("xla", XLA_ONLY)])
def test_the_original_command_line_works_verbatim(runtime: str, own: dict[str, dict[str, Any]]) -> None:
    flags = ORIGINAL | own
    parsed = parse(*" ".join(flags).split(), runtime=runtime)
    expected = {name: value for values in flags.values() for name, value in values.items()}
    assert {name: leaf(parsed.config, name) for name in expected} == expected
    assert parsed.given == {flag.split()[0].lstrip("-").replace("-", "_") for flag in flags}, "as they were typed"
    assert parsed.config.parallel.runtime == runtime
    default = {name: leaf(RunConfig(), name) for name in expected}
    assert not {name for name in expected if expected[name] == default[name]}, (
        "a value that is the default shows nothing"
    )


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--activation", ["relu", "gelu"]),
        ("--matmul-precision", ["highest", "high", "medium"]),
        ("--from-checkpoint", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "some/folder"]),
        ("--optim-type", ["adam", "adamw"]),
        ("--decay-method", ["cosine", "noam"]),
        ("--mixed-precision", ["fp16", "bf16"]),
        ("--ddp-backend", ["nccl", "gloo"]),
        ("--mp-start-method", ["fork", "spawn"]),
    ],
)
def test_every_choice_of_the_original(flag: str, values: list[str]) -> None:
    for value in values:
        parsed = parse(flag, value, runtime="torch")
        assert leaf(parsed.config, flag.lstrip("-").replace("-", "_")) == value


def test_defaults_of_the_original() -> None:
    original: dict[str, Any] = {
        "checkpoints_dir": "checkpoints",
        "seed": 1061109567,
        "train_dir": "fineweb_edu/train",
        "valid_dir": "fineweb_edu/valid",
        "drop_last": False,
        "vocab_size": 50257,
        "seq_length": 512,
        "d_model": 768,
        "num_layers": 12,
        "num_heads": 12,
        "d_ff": 3072,
        "dropout": 0.0,
        "tie_weights": False,
        "wandb_logging": False,
        "wandb_project": "pre-training-gpt2",
        "wandb_name": "base",
        "wandb_logging_interval": 500,
        "learning_rate": 6e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "warmup_steps": 1000,
        "min_lr": 6e-5,
        "decay_steps": 20000,
        "train_batch_size": 32,
        "eval_batch_size": 32,
        "gradient_accum_step": 1,
        "train_steps": 20000,
        "valid_steps": 100,
        "valid_interval": 1000,
        "save_interval": 1000,
        "saved_checkpoint_limit": 10,
        "max_grad_norm": 0.0,
    }
    config = parse().config
    assert {name: leaf(config, name) for name in original} == original


# (a config of an older run, flags) → (mode, start method), as they were when each switch was a setting of its own.
OLD_SWITCHES: list[tuple[str, str, str, str | None]] = [
    ("", "--do-test", "evaluate", None),
    ("", "--do_test --use_syncfree_optim", "evaluate", None),
    ("", "--preflight-only --do-test", "preflight", None),
    ("", "--do-test --no-do-test", "train", None),
    ("", "--no-do_test --no_ddp --no-use-syncfree-optim", "train", None),
    ("", "--ddp", "train", "spawn"),
    ("", "--ddp --mp-start-method fork", "train", "fork"),
    ("", "--mp_start_method=fork --ddp", "train", "fork"),
    ("train: {do_test: true}", "", "evaluate", None),
    ("train: {do_test: 1}", "--no-preflight-only", "evaluate", None),
    ("train: {do_test: true}", "--no-do-test", "train", None),
    ("train: {do_test: true, preflight_only: true}", "--no-preflight-only", "evaluate", None),
    ("train: {do_test: true, preflight_only: true}", "--no-do-test", "preflight", None),
    ("train: {preflight_only: true}", "--do-test", "preflight", None),
    ("train: {do_test: false, preflight_only: false, use_syncfree_optim: true}", "--preflight-only", "preflight", None),
    ("parallel: {ddp: true, mp_start_method: null}", "", "train", "spawn"),
    ("parallel: {ddp: true}", "--no-ddp", "train", None),
    ("parallel: {ddp: true, mp_start_method: fork}", "--no-ddp", "train", "fork"),
    ("parallel: {ddp: false, mp_start_method: fork}", "--ddp", "train", "fork"),
    # with the settings that replaced them
    ("train: {mode: evaluate}", "--no-do-test", "train", None),
    ("train: {mode: train}", "--do-test", "evaluate", None),
    ("train: {do_test: false, mode: evaluate}", "", "evaluate", None),
    ("train: {do_test: true}", "--mode train", "train", None),
    ("train: {do_test: true}", "--mode preflight", "preflight", None),
    ("parallel: {mp_start_method: spawn}", "--no-ddp", "train", "spawn"),
]


@pytest.mark.parametrize(("text", "flags", "mode", "start_method"), OLD_SWITCHES)
def test_old_switches_do_what_they_did(
    text: str, flags: str, mode: str, start_method: str | None, yaml: Callable[[str], str]
) -> None:
    config = parse("--config", yaml(text), *flags.split()).config
    assert (config.train.mode, config.parallel.mp_start_method) == (mode, start_method)
    same = {"train": {"mode": mode}, "parallel": {"mp_start_method": start_method}}
    assert config == build_config(same, "test"), "nothing else is changed"
    if not flags:
        assert config == build_config(load_yaml(yaml(text)), "test"), "as a saved config is read"


def test_old_settings_are_in_no_help_and_no_saved_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert not set(SWITCHES) & set(LEAVES)
    saved = to_yaml(parse("--ddp", "--do-test", "--use-syncfree-optim").config)
    assert not [name for name in SWITCHES if f" {name}:" in saved]
    with pytest.raises(SystemExit):
        parse("--help-all")
    text = capsys.readouterr().out
    assert not [name for name in SWITCHES if re.search(rf"(?m)^\W*--{name.replace('_', '-')}(?![\w-])", text)]
    assert refusal("--do-tset") == "unknown argument '--do-tset'; did you mean --do-test?"


def test_settings_of_weights_and_biases_are_accepted_in_their_old_section(yaml: Callable[[str], str]) -> None:
    old = (
        "logging: {wandb_logging: true, wandb_tags: [a], wandb_name: old, log_interval: 3}\nwandb: {wandb_name: new}\n"
    )
    config = parse("--config", yaml(old)).config
    assert (config.wandb.wandb_logging, config.wandb.wandb_tags, config.logging.log_interval) == (True, ("a",), 3)
    assert config.wandb.wandb_name == "new"
    assert "unknown key 'wandb.wandb_nam'" in refusal("--config", yaml("logging: {wandb_nam: x}"))


def test_errors_in_old_settings_name_them(yaml: Callable[[str], str]) -> None:
    assert "train.do_test='maybe': give true or false" in refusal("--config", yaml("train: {do_test: maybe}"))
    assert "key 'train.ddp' is in the wrong place: it belongs under 'parallel'" in refusal(
        "--config", yaml("train: {ddp: true}")
    )
    assert "'ddp' belongs under 'parallel'" in refusal("--config", yaml("ddp: true"))

"""What README, docs and configs promise agrees with what is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pretrain_xla.config import DataConfig, TrainConfig
from pretrain_xla.config_file import load_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.command import evaluate_command
from pretrain_xla.flags import parse_flags
from pretrain_xla.generate.command import generate_command
from pretrain_xla.prepare.command import default_fraction

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *(path for path in sorted(ROOT.glob("docs/*.md")) if path.name != "LOG.md")]


def commands(pages: Sequence[Path] = PAGES) -> list[tuple[str, list[str]]]:
    """(page, words) of every command line in the pages' blocks of bash, without comments and what stands before `python`."""
    found = []
    for page in pages:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if word != "…"]
                if "python" in words or "torchrun" in words:
                    found.append((page.name, words))
    return found


def after(words: list[str], script: str) -> list[str] | None:
    return words[words.index(script) + 1 :] if script in words else None


def test_every_training_command_of_the_docs_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    seen = 0
    for page, words in commands():
        for script in ("run_pretrain.py", "run_pretrain_xla.py"):
            arguments = after(words, script)
            if arguments is None or "my_run.yaml" in arguments:
                continue
            parse_flags(arguments, program=f"{page}: {script}", description="")
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize(("script", "command"), [("generate.py", generate_command), ("evaluate.py", evaluate_command)])
def test_every_command_of_the_docs_for_a_model_fails_on_the_model_alone(
    script: str,
    command: Callable[[list[str]], object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "prompts.txt").write_text("One\n")
    seen = 0
    for page, words in commands():
        if (arguments := after(words, script)) is None:
            continue
        with pytest.raises(UserError) as caught:
            command(arguments)
        named = arguments[arguments.index("--model") + 1]
        assert named in str(caught.value), (page, words, str(caught.value))
        assert "Hub" in str(caught.value)
        seen += 1
    assert seen >= 5


def test_the_recipe_for_tinystories_fits_its_config() -> None:
    config = (ROOT / "configs" / "tinystories_1m.yaml").read_text(encoding="utf-8")
    tree = load_yaml(str(ROOT / "configs" / "tinystories_1m.yaml"))
    recipe = "prepare hf:roneneldan/TinyStories data/tinystories --streaming --train-vocab-size 4096"
    assert recipe in config
    assert recipe in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert tree["model"]["vocab_size"] == 4096
    assert tree["data"]["train_dir"] == "data/tinystories/train"


def test_of_a_dataset_of_the_hub_a_hundredth_is_held_out() -> None:
    assert default_fraction(["text.txt"]) == 0.05
    assert default_fraction(["text.txt", "hf:HuggingFaceFW/fineweb-edu:sample-10BT"]) == 0.01


def test_the_price_of_the_loop_over_layers_is_one() -> None:
    help_text = TrainConfig.model_fields["scan_layers"].description or ""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(r"takes (\d to \d%) longer", help_text)
    assert said
    assert f"for {said[1]} of a step" in readme


def test_configs_docs_and_defaults_name_one_folder_for_fineweb_edu() -> None:
    named: set[str] = set()
    for path in [*PAGES, *ROOT.glob("configs/*.yaml"), *ROOT.glob("scripts/*.py")]:
        named |= set(re.findall(r"[\w./-]*fineweb_edu\w*(?=[/ `\n]|$)", path.read_text(encoding="utf-8")))
    assert named <= {"fineweb_edu", "scripts/prepare_fineweb.py"}, named
    assert DataConfig().train_dir == "fineweb_edu/train"

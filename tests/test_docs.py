"""README, docs and configs agree with the code."""

from __future__ import annotations

import ast
import doctest
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from pretrain_xla.cli import main
from pretrain_xla.config import DataConfig, TrainConfig
from pretrain_xla.config_file import load_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.command import evaluate_command
from pretrain_xla.flags import parse_flags
from pretrain_xla.generate.command import generate_command
from pretrain_xla.launch.slices import RUNTIME_VERSIONS, resolve_slice
from pretrain_xla.prepare.command import default_fraction

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*/README.md"))
EVERY_PAGE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *EXAMPLES]
PAGES = [page for page in EVERY_PAGE if page.name != "LOG.md"]
NAMED = re.compile(r"(?P<path>[\w./-]+\.(?:py|yaml))(?:::?(?P<name>[\w.]+))?")
"""A file, `path.py`, something defined in it, `path.py:Class.method`, or a test, `path.py::test_name`."""

FOLDER = r"(pretrain_xla|tests|benchmarks|configs|docs|examples|scripts)/[\w/-]*[\w/]"


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def find(path: str, page: Path) -> Path | None:
    """The file or folder that a page means: from the repository's root, from the package, or from the page."""
    return next((base / path for base in (ROOT, ROOT / "pretrain_xla", page.parent) if (base / path).exists()), None)


@cache
def defined(path: Path) -> set[str]:
    """Names that a Python file defines, those in its classes as `Class.name`."""

    def names(body: Sequence[ast.stmt], prefix: str) -> set[str]:
        found: set[str] = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return found

    return names(ast.parse(path.read_text(encoding="utf-8")).body, "")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(pages: Sequence[Path] = PAGES) -> list[tuple[str, list[str]]]:
    """(page, arguments) of every command line in the pages' bash blocks, without comments."""
    found = []
    for page in pages:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            block = re.sub(r"\$\w+", "1", block)  # a shell variable stands for a number
            for line in block.replace("\\\n", " ").splitlines():
                argv = [word for word in shlex.split(line, comments=True) if word != "…"]
                if "python" in argv or "torchrun" in argv:
                    found.append((page.name, argv))
    return found


def after(argv: list[str], script: str) -> list[str] | None:
    return argv[argv.index(script) + 1 :] if script in argv else None


def test_every_training_command_of_the_docs_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    seen = 0
    for page, argv in commands():
        for script in ("run_pretrain.py", "run_pretrain_xla.py"):
            arguments = after(argv, script)
            if arguments is None or "my_run.yaml" in arguments:
                continue
            parse_flags(arguments, program=f"{page}: {script}", description="")
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/use.md", "docs/learn.md", "docs/tpu-vm.md"])
def test_every_training_command_reads_data_that_its_page_prepares(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = ROOT / name
    prepared = {"data/quickstart"} if "make train" in page.read_text(encoding="utf-8") else set()
    read = set()
    for _, argv in commands([page]):
        if (arguments := after(argv, "prepare")) is not None:
            prepared.add([*itertools.takewhile(lambda word: not word.startswith("--"), arguments)][-1])
        for script in ("run_pretrain.py", "run_pretrain_xla.py"):
            if (arguments := after(argv, script)) is not None:
                data = parse_flags(arguments, program=script, description="").config.data
                read |= {data.train_dir.removesuffix("/train"), data.valid_dir.removesuffix("/valid")}
    assert read
    assert read <= prepared


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
    for page, argv in commands():
        if (arguments := after(argv, script)) is None:
            continue
        with pytest.raises(UserError) as caught:
            command(arguments)
        named = arguments[arguments.index("--model") + 1]
        assert named in str(caught.value), (page, argv, str(caught.value))
        assert "Hub" in str(caught.value)
        seen += 1
    assert seen >= 5


def test_every_flag_of_the_other_commands_is_in_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    used: dict[str, set[str]] = {}
    for _, argv in commands():
        if argv[1:3] == ["-m", "pretrain_xla"] or argv[2:4] == ["-m", "pretrain_xla"]:
            command, *arguments = argv[argv.index("pretrain_xla") + 1 :]
            own = itertools.takewhile(lambda word: word != "--", arguments)  # after it, supervise has another command
            used.setdefault(command, set()).update(w.partition("=")[0] for w in own if w.startswith("--"))
    del used["lm-eval"]  # its flags are lm-eval's
    assert used.keys() >= {"prepare", "preflight", "export", "import", "train-tokenizer", "inspect", "trace"}
    for command, flags in used.items():
        for help_flag in (
            ("--help", "--help-all") if command in ("preflight", "doctor", "trace", "train") else ("--help",)
        ):
            with pytest.raises(SystemExit):
                main([command, help_flag])
        shown = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert flags <= shown, command


def test_the_recipe_for_tinystories_fits_its_config() -> None:
    config = (ROOT / "configs" / "tinystories_1m.yaml").read_text(encoding="utf-8")
    tree = load_yaml(str(ROOT / "configs" / "tinystories_1m.yaml"))
    recipe = "prepare hf:roneneldan/TinyStories data/tinystories --streaming --train-vocab-size 4096"
    assert recipe in config
    assert recipe in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert tree["model"]["vocab_size"] == 4096
    assert tree["data"]["train_dir"] == "data/tinystories/train"


def test_a_hundredth_of_a_hub_dataset_is_held_out() -> None:
    assert default_fraction(["text.txt"]) == 0.05
    assert default_fraction(["text.txt", "hf:HuggingFaceFW/fineweb-edu:sample-10BT"]) == 0.01


def test_help_and_docs_state_the_same_cost_of_scan_layers() -> None:
    help_text = TrainConfig.model_fields["scan_layers"].description or ""
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    cost = re.search(r"takes (\d to \d%) longer", help_text)
    assert cost
    assert f"takes {cost[1]} longer" in page


def test_the_page_on_tpu_vms_names_the_types_and_images_that_launch_uses() -> None:
    page = (ROOT / "docs" / "tpu-vm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (v\d\w?(?:, v\d\w?)*) \| (.+) \| `(.+)` \|$", page, re.MULTILINE)
    named = {generation: image for generations, _, image in rows for generation in generations.split(", ")}
    assert named == RUNTIME_VERSIONS
    types = [word for _, words, _ in rows for word in re.findall(r"`(v\S+?)`", words)]
    assert len(types) == len(named)
    for name in types:
        assert resolve_slice(name).accelerator_type == name
    assert f"--runtime-version={named['v5e']}" in page


def test_configs_docs_and_defaults_name_one_folder_for_fineweb_edu() -> None:
    named: set[str] = set()
    for path in [*PAGES, *ROOT.glob("configs/*.yaml"), *ROOT.glob("scripts/*.py")]:
        named |= set(re.findall(r"[\w./-]*fineweb_edu\w*(?=[/ `\n]|$)", path.read_text(encoding="utf-8")))
    assert named <= {"fineweb_edu", "scripts/prepare_fineweb.py"}, named
    assert DataConfig().train_dir == "fineweb_edu/train"


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_every_link_resolves(page: Path) -> None:
    wrong = []
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        named = NAMED.fullmatch(text.strip("`"))
        if (
            not file.exists()
            or (anchor and anchor not in anchors(file))
            or (named and not f"/{path}".endswith(f"/{named['path']}"))
        ):
            wrong.append(f"[{text}]({target})")
    assert not wrong


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_every_named_file_and_function_exists(page: Path) -> None:
    wrong = []
    for word in (word for span in re.findall(r"`([^`]+)`", prose(page)) for word in span.split()):
        named = NAMED.fullmatch(word)
        if named and (named["path"].endswith(".py") or "/" in named["path"]):
            file = find(named["path"], page)
            if file is None or (named["name"] is not None and named["name"] not in defined(file)):
                wrong.append(word)
        elif re.fullmatch(FOLDER, word) and find(word, page) is None:
            wrong.append(word)
    assert not wrong


def test_the_order_of_imports_is_that_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = [line.replace("pretrain_xla.", "").split(" | ") for line in contracts[0]["layers"]]
    order = next(span for span in re.findall(r"`([^`]+)`", prose(ROOT / "CONTRIBUTING.md")) if span.startswith("cli →"))
    for rooms in " ".join(order.split()).split(" → "):
        upper = [number for number, layer in enumerate(layers) if set(rooms.split(", ")) <= set(layer)]
        assert len(upper) == 1, rooms
        layers = layers[upper[0] + 1 :]


def test_every_script_of_a_command_exists() -> None:
    seen = 0
    for name, argv in commands(EVERY_PAGE):
        for word in argv:
            if re.fullmatch(r"[\w/-]+\.py|configs/\S+\.yaml|tests/\S+", word):
                assert (ROOT / word).exists(), f"{name}: {word}"
                seen += 1
    assert seen >= 30


def test_the_python_session_in_learn_prints_what_it_shows() -> None:
    page = ROOT / "docs" / "learn.md"
    text = re.sub(r"^```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert len(session.examples) >= 50
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(session, out=failures.append)
    assert not failures, "".join(failures)

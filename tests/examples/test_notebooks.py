"""The notebooks for Kaggle and Colab: up to date, and run from top to bottom, on the CPU, as two sessions of one run.

The first session is interrupted in the middle of the training. The second starts on a machine that has nothing but the
checkpoints on the Hub, and trains to the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from pretrain_xla.flags import parse_flags
from scripts.make_notebooks import FOLDER, NOTEBOOKS, main, notebook

from ..end_to_end.conftest import QUICK, ROOT, metrics
from ..interop.hub_server import serve

SOURCE = (FOLDER / "source.py").read_text(encoding="utf-8")
STEPS_BEFORE, STEPS_AFTER = 20, 20


def test_they_are_up_to_date() -> None:
    assert main(["--check"]) == 0


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_one_that_is_not_up_to_date_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.make_notebooks.FOLDER", tmp_path)
    (tmp_path / "source.py").write_text(SOURCE)
    assert main([]) == 0
    assert main(["--check"]) == 0
    path = tmp_path / f"{name}.ipynb"
    nbformat.validate(nbformat.read(path, as_version=4))
    path.write_text(path.read_text().replace("Train", "train"))
    capsys.readouterr()
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == f"{path} is not up to date: python scripts/make_notebooks.py\n"


def test_each_has_the_cells_of_its_place_alone() -> None:
    cells = {name: ["".join(cell["source"]) for cell in notebook(SOURCE, name)["cells"]] for name in NOTEBOOKS}
    assert "Kaggle's TPU" in cells["kaggle"][0]
    assert not [cell for cell in cells["kaggle"] if "google.colab" in cell or ("/content/" in cell and "RUN =" in cell)]
    assert not [cell for cell in cells["colab"] if "kaggle_secrets" in cell or "/kaggle/" in cell]
    assert len(set(cells["kaggle"]) & set(cells["colab"])) >= 12


SAVES = "trap 'echo saved > saved; echo saved; exit 143' TERM; echo up; while :; do sleep 0.05; done"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_parameters_make_the_step_and_the_validation_of_the_config(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (cell,) = (cell for cell in notebook(SOURCE, name)["cells"] if "tags" in cell["metadata"])
    values: dict[str, Any] = {}
    exec("".join(cell["source"]), values)
    flags = ["--config", values["CONFIG"], "--stop-after", values["STOP_AFTER"], "--train-dir", values["TRAIN"]]
    here = parse_flags([*flags, *values["FLAGS"]], program=name, description="").config
    plain = parse_flags(["--config", values["CONFIG"]], program=name, description="").config
    assert here.tokens_per_step == plain.tokens_per_step
    sequences = here.train.valid_steps * here.train.eval_batch_size
    assert sequences == plain.train.valid_steps * plain.train.eval_batch_size
    assert here.checkpoint.save_interval % here.train.valid_interval == 0  # else no checkpoint could become the best


def test_a_run_of_an_earlier_session_is_copied_once(tmp_path: Path) -> None:
    (cell,) = (cell for cell in notebook(SOURCE, "kaggle")["cells"] if "kaggle_secrets" in "".join(cell["source"]))
    earlier, here = tmp_path / "earlier", tmp_path / "run"
    earlier.mkdir()
    (earlier / "metrics.jsonl").write_text("first")
    values = {"HUB_REPO": None, "EARLIER": str(earlier), "RUN": str(here), "os": os, "shutil": shutil}
    exec("".join(cell["source"]), values)
    assert (here / "metrics.jsonl").read_text() == "first"
    (here / "metrics.jsonl").write_text("second")
    exec("".join(cell["source"]), values)
    assert (here / "metrics.jsonl").read_text() == "second"


def helpers(statement: str) -> list[str]:
    """A Python command that runs a statement after the cell that defines `run`."""
    (cell,) = (cell for cell in notebook(SOURCE, "kaggle")["cells"] if "def run(" in "".join(cell["source"]))
    # As a kernel does; a process that was started in the background would ignore SIGINT.
    before = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    parameters = "WORK, ENVIRONMENT = '/none', {'PJRT_DEVICE': 'TPU'}"
    return [sys.executable, "-c", f"{before}\n{parameters}\n{''.join(cell['source'])}\nimport sys\n{statement}"]


def test_commands_do_not_see_what_other_programs_left_in_the_environment() -> None:
    of_a_pod = {"TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "0", "TPU_VISIBLE_CHIPS": "0"}
    of_a_library = {"TPU_LIBRARY_PATH": "/of/jax/libtpu.so", "LIBTPU_INIT_ARGS": "--a", "XLA_FLAGS": "--b"}
    of_the_notebook = {"PYTHONPATH": "/kaggle/lib", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    left = of_a_pod | of_a_library | of_the_notebook
    kept = {"HF_TOKEN": "a token", "TPU_ACCELERATOR_TYPE": "v5e-8", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        helpers("run('env')"), env={**os.environ, **left, **kept}, capture_output=True, text=True, check=True
    )
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert not left.keys() & seen.keys()
    assert seen.items() >= (kept | {"PJRT_DEVICE": "TPU"}).items()


def test_a_command_that_fails_ends_the_notebook() -> None:
    done = subprocess.run(helpers("run('sh', '-c', 'echo why; exit 2')"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "why\n"
    assert done.stderr.endswith("RuntimeError: exit status 2: see the last lines above\n")


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_command_saves_and_ends_when_its_cell_is_interrupted_or_its_notebook_killed(how: str, tmp_path: Path) -> None:
    command = helpers(f"sys.exit(run('sh', '-c', {SAVES!r}, ok=(143,)))")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGKILL)
    if how == "interrupted":
        assert process.stdout.read() == "stopping; interrupt again to leave at once\nsaved\n"
    assert process.wait(20) == (143 if how == "interrupted" else -signal.SIGKILL)
    limit = time.monotonic() + 10
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)


def run_notebook(name: str, parameters: dict[str, Any], interrupt_at: Path | None = None) -> str:
    """Run all cells with other parameters; returns what they printed.

    Args:
        name: of the notebook.
        parameters: set in a cell after the one tagged so, as papermill does.
        interrupt_at: a run folder; once it has metrics of `STEPS_BEFORE` steps, the running cell is interrupted.
    """
    tree = nbformat.reads(json.dumps(notebook(SOURCE, name)), as_version=4)
    (place,) = (index for index, cell in enumerate(tree.cells) if "parameters" in cell.metadata.get("tags", []))
    lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    tree.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    client = nbclient.NotebookClient(tree, timeout=500, kernel_name="python3")
    done = threading.Event()

    def interrupt() -> None:
        assert interrupt_at is not None
        while not done.wait(0.1):
            path = interrupt_at / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) > STEPS_BEFORE:
                kernel: Any = client.km.provisioner
                os.killpg(kernel.pgid, signal.SIGINT)  # as Jupyter does
                return

    watcher = threading.Thread(target=interrupt)
    if interrupt_at is not None:
        watcher.start()
    try:
        client.execute()
    finally:
        done.set()
        if interrupt_at is not None:
            watcher.join()
    outputs = [output for cell in tree.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_two_sessions_of_one_run(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(f'{{"text": "{number} is followed by {number + 1}, as ever. "}}\n' for number in range(4000))
    )
    model = "--d-model 32 --num-layers 1 --num-heads 2 --d-ff 64 --seq-length 32 --head-dim 16".split()
    loop = "--train-batch-size 4 --eval-batch-size 4 --gradient-accum-step 1 --valid-steps 1 --log-interval 1".split()
    with serve() as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setenv("TPU_PROCESS_ADDRESSES", "local")  # as on Kaggle
        monkeypatch.setenv("TPU_LIBRARY_PATH", "/of/another/libtpu.so")  # as after `import jax` in the notebook
        parameters = {
            "REPOSITORY": str(repository),
            "WORK": str(tmp_path / "workspace"),
            "RUN": str(tmp_path / "run"),
            "PYTHON": sys.executable,
            "ENVIRONMENT": {
                "PJRT_DEVICE": "CPU",
                "XLA_FLAGS": QUICK,
                "OMP_NUM_THREADS": "1",
                "HF_ENDPOINT": hub.url,
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "hub"),
            },
            "HUB_REPO": "alice/run",
            "TEXT": str(text),
            "PREPARE": ["--tokenizer", "bytes", "--num-workers", "1"],
            "STOP_AFTER": "1h",
        }
        first = run_notebook(
            "kaggle",
            parameters
            | {"FLAGS": [*model, *loop, "--train-steps", "1000000", "--no-tensorboard"], "TASKS": [], "PROMPT": ""},
            interrupt_at=tmp_path / "run",
        )
        assert "stopping; interrupt again to leave at once" in first
        (stopped,) = {
            int(n) for n in re.findall(r"stopped at step (\d+); the same command continues from there", first)
        }
        assert "The training is not done" in first
        before = metrics(tmp_path / "run")
        assert stopped == before[-1]["step"]

        shutil.rmtree(tmp_path / "run")
        steps = str(stopped + STEPS_AFTER)
        second = run_notebook(
            "colab",
            parameters
            | {
                "FLAGS": [*model, *loop, "--train-steps", steps, "--no-tensorboard"],
                "TASKS": [f"shards={tmp_path}/workspace/data/valid"],
                "PROMPT": "7 is",
            },
        )
    assert "continuing from" in second
    assert "The training is done." in second
    after = [row["step"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert after == list(range(stopped + 1, stopped + STEPS_AFTER + 1))
    assert "bits per byte" in second or "perplexity" in second
    assert re.search(r"^7 is", second, re.MULTILINE)

"""The one source of the notebooks: `python scripts/make_notebooks.py` writes kaggle.ipynb and colab.ipynb from it.

A cell begins with `# %%`. After it stand `[markdown]` for text, `parameters` for the cell that is edited before a run, and
`kaggle` or `colab` for a cell that only this notebook has. This docstring is in neither.
"""

# %% [markdown] kaggle
# # Train a GPT-2 on Kaggle's TPU
#
# It trains a model of 162M parameters on a TPU v5e-8 or v3-8, over as many sessions as it takes. Each session continues from
# the last checkpoint of the one before.
#
# Before you run it, in the editor's panel on the right:
#
# 1. **Accelerator**: TPU v5e-8, or TPU VM v3-8.
# 2. **Internet**: on. Kaggle asks for a verified phone number before it offers that.
# 3. **Add-ons → Secrets**: `HF_TOKEN`, a token of Hugging Face that may write, if the checkpoints are to be kept there.
#
# Then fill in the next cell, and choose *Save Version → Save & Run All*. That session needs no open browser, and ends with the
# last cell. One in the editor ends when it is left alone for too long.

# %% [markdown] colab
# # Train a GPT-2 on Colab's TPU
#
# It trains a model of 162M parameters on a TPU v5e-1 or v6e-1, over as many sessions as it takes. Each session continues from
# the last checkpoint of the one before.
#
# Before you run it:
#
# 1. **Runtime → Change runtime type**: v5e-1 TPU, or v6e-1 TPU, which costs compute units.
# 2. **Secrets** (the key on the left): `HF_TOKEN`, a token of Hugging Face that may write, with access for this notebook, if
#    the checkpoints are to be kept there.
#
# Then fill in the next cell, and choose *Runtime → Run all*. Colab may end a session at any time, after 12 hours at the latest,
# and everything on its disk is gone. So the checkpoints go to the Hub or to Drive while the model trains.

# %% parameters kaggle
REPOSITORY = "https://github.com/YOU/pretrain_xla"  # where the code is
CONFIG = "configs/modern_124m.yaml"
FLAGS = ["--save-interval", "500", "--valid-interval", "500"]  # all others: run_pretrain_xla.py --help-all

HUB_REPO = None  # "you/my-gpt2": checkpoints go to this repository of the Hub (private), and the next session starts from there
EARLIER = (
    None  # without the Hub: the earlier session's output, added as an input, such as "/kaggle/input/my-notebook/run"
)
STOP_AFTER = "8h"  # Kaggle ends a TPU session after 9 hours; leave time to set up, to upload and to evaluate

# GPT-2 tokens of FineWeb, read from the Hub while the model trains, so that no text has to be prepared.
TRAIN = "hf://datasets/kjj0/fineweb10B-gpt2/fineweb_train_*.bin"
VALID = "hf://datasets/kjj0/fineweb10B-gpt2/fineweb_val_*.bin"
TEXT = None  # or a text to prepare and to train on instead: a file, a folder, a URL, "hf:roneneldan/TinyStories"
PREPARE = ["--tokenizer", "gpt2"]

TASKS = ["hellaswag", "lambada"]
PROMPT = "The history of the steam engine"

RUN = "/kaggle/working/run"  # Kaggle keeps this folder as the session's output, up to 20 GB
WORK = "/tmp/pretrain_xla"  # code, packages and text: not kept
PYTHON = f"{WORK}/venv/bin/python"
ENVIRONMENT = {"PJRT_DEVICE": "TPU"}

# %% parameters colab
REPOSITORY = "https://github.com/YOU/pretrain_xla"  # where the code is
CONFIG = "configs/modern_124m.yaml"
# One chip: 8 sequences at a time, and 64 times as many in a step. A v6e-1 has twice the memory: 16, 32, 16 and 640.
FLAGS = ["--train-batch-size", "8", "--gradient-accum-step", "64", "--eval-batch-size", "8", "--valid-steps", "1280"]
FLAGS += ["--save-interval", "500", "--valid-interval", "500"]  # all others: run_pretrain_xla.py --help-all

HUB_REPO = None  # "you/my-gpt2": checkpoints go to this repository of the Hub (private), and the next session starts from there
DRIVE = None  # or "my-gpt2": they go to this folder of your Drive; 5 GB must be free there
STOP_AFTER = "10h"  # Colab ends a session after 12 hours at the latest

# GPT-2 tokens of FineWeb, read from the Hub while the model trains, so that no text has to be prepared.
TRAIN = "hf://datasets/kjj0/fineweb10B-gpt2/fineweb_train_*.bin"
VALID = "hf://datasets/kjj0/fineweb10B-gpt2/fineweb_val_*.bin"
TEXT = None  # or a text to prepare and to train on instead: a file, a folder, a URL, "hf:roneneldan/TinyStories"
PREPARE = ["--tokenizer", "gpt2"]

TASKS = ["hellaswag", "lambada"]
PROMPT = "The history of the steam engine"

RUN = f"/content/drive/MyDrive/{DRIVE}" if DRIVE else "/content/run"
WORK = "/tmp/pretrain_xla"  # code, packages and text
PYTHON = f"{WORK}/venv/bin/python"
ENVIRONMENT = {"PJRT_DEVICE": "TPU"}

# %% [markdown]
# ## How commands run
#
# Everything runs in processes of its own, never in the notebook's: a process that opens the TPU keeps it to its end, and the
# notebook's own packages are other versions than the ones needed here. To stop a command, interrupt the cell: training then
# saves a checkpoint first.

# %%
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys

CODE = f"{WORK}/code"
LEFT_OVER = (
    # They describe a pod that this TPU is not part of, or a part of the TPU.
    *("TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID", "TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS"),
    *("TPU_PROCESS_PORT", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"),
    # JAX, TensorFlow or PyTorch/XLA set them when this notebook imports one: its TPU library, its compiler options.
    *("TPU_LIBRARY_PATH", "PTXLA_TPU_LIBRARY_PATH", "LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_PLATFORMS"),
    # They belong to the notebook's own Python.
    *("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "VIRTUAL_ENV", "MPLBACKEND"),
)


def environment():
    """The environment of commands: without what this notebook left there."""
    return {name: value for name, value in os.environ.items() if name not in LEFT_OVER} | ENVIRONMENT


def end_with_notebook():
    """In a command's process: if the notebook's process ends, save and end too, and do not keep the TPU."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def run(*command, ok=(0,)):
    """Run a command, show what it prints, and return its exit status, which must be one of `ok`."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=CODE if os.path.isdir(CODE) else None,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that an interrupt reaches it once, from here
        preexec_fn=end_with_notebook,
    )
    while True:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
            status = process.wait()
            break
        except KeyboardInterrupt:
            print("stopping; interrupt again to leave at once", flush=True)
            process.terminate()
    if status not in ok:
        raise RuntimeError(f"exit status {status}: see the last lines above")
    return status


opened = {"jax", "torch_xla", "tensorflow"} & set(sys.modules)
if opened:
    print(f"This notebook has imported {', '.join(sorted(opened))}. If the TPU is in use below, restart the session.")

# %% [markdown]
# ## Code and packages
#
# They go into an environment of their own, with Python 3.11 and PyTorch for the CPU, to which PyTorch/XLA adds the TPU: 3 GB
# and a few minutes in every session. What is there already is not installed again.

# %%
if not os.path.isdir(CODE):
    if "/YOU/" in REPOSITORY:
        raise ValueError("REPOSITORY: name the repository with the code")
    run("git", "clone", "--depth", "1", REPOSITORY, CODE)

with open(f"{CODE}/requirements-xla_tpu.txt") as file:
    pins = dict(re.findall(r"^(\w+)(?:\[[\w,]+\])?==([\w.]+)", file.read(), re.MULTILINE))
check = f"from importlib.metadata import version as v; assert all(v(n).split('+')[0] == w for n, w in {pins}.items())"
if not os.path.exists(PYTHON) or subprocess.run([PYTHON, "-c", check], stderr=subprocess.DEVNULL).returncode != 0:
    uv = [sys.executable, "-m", "uv"]
    run(sys.executable, "-m", "pip", "install", "--quiet", "uv")
    run(*uv, "venv", "--allow-existing", "--python", "3.11", f"{WORK}/venv")
    run(*uv, "pip", "install", "--quiet", "--python", PYTHON, "--torch-backend=cpu", "-r", "requirements-xla_tpu.txt")
print(", ".join(f"{name} {version}" for name, version in pins.items()), "in", PYTHON)

# %% [markdown]
# ## Where checkpoints are kept

# %% kaggle
if HUB_REPO and "HF_TOKEN" not in os.environ:
    from kaggle_secrets import UserSecretsClient

    os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")
if EARLIER and not os.path.isdir(RUN):
    shutil.copytree(EARLIER, RUN)

# %% colab
if HUB_REPO and "HF_TOKEN" not in os.environ:
    from google.colab import userdata

    os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")

# %%
if not HUB_REPO and not RUN.startswith("/content/drive/"):
    print(f"Checkpoints are only in {RUN}.")
os.makedirs(RUN, exist_ok=True)
print(f"{shutil.disk_usage(RUN).free / 1e9:.0f} GB are free there; a checkpoint of 162M parameters has 1.6 GB")

# %% [markdown]
# ## Data

# %%
if TEXT:
    data = f"{WORK}/data"
    if not os.path.exists(f"{data}/dataset.json"):
        run(PYTHON, "-m", "pretrain_xla", "prepare", TEXT, data, *PREPARE)
    TRAIN, VALID = f"{data}/train", f"{data}/valid"
print(TRAIN, VALID, sep="\n")

# %% [markdown]
# ## Train
#
# The first lines say which chip was found, whether attention runs as a kernel (a v3 has none for bf16), and where the run
# continues. The first step compiles the program, which takes minutes. After `STOP_AFTER` the run saves and ends, and so it does
# when you interrupt the cell. If it hangs or crashes, it is started again.

# %%
flags = ["--config", CONFIG, "--train-dir", TRAIN, "--valid-dir", VALID, "--run-dir", RUN]
flags += ["--saved-checkpoint-limit", "2", "--stop-after", STOP_AFTER, *FLAGS]
if HUB_REPO:
    flags += ["--hub-repo", HUB_REPO]
supervise = [PYTHON, "-u", "-m", "pretrain_xla", "supervise", "--"]
status = run(*supervise, PYTHON, "-u", "run_pretrain_xla.py", *flags, ok=(0, 128 + signal.SIGTERM))
print("The training is done." if status == 0 else "The training is not done: run this notebook again in a new session.")

# %%
if os.path.exists(f"{RUN}/loss.png"):
    from IPython.display import Image, display

    display(Image(f"{RUN}/loss.png"))

# %% [markdown]
# ## Evaluate, and let it write
#
# Also of a model that is only half trained.

# %%
if TASKS:
    run(PYTHON, "evaluate.py", "--model", RUN, "--tasks", *TASKS)

# %%
if PROMPT:
    run(PYTHON, "generate.py", "--model", RUN, "--prompt", PROMPT, "--max-new-tokens", "100", "--temperature", "0.8")

# %% [markdown] kaggle
# ## The next session
#
# With `HUB_REPO`: run this notebook again, as it is. Without: choose *Add Input → Your Work → Notebooks* and this notebook's
# last version, set `EARLIER` to its folder `run`, and run it again. The run continues with the step after its last checkpoint,
# as if nothing had happened, also on the other accelerator.
#
# To use the model elsewhere: `python -m pretrain_xla export` writes it for `transformers`.

# %% [markdown] colab
# ## The next session
#
# Run this notebook again, as it is. With `HUB_REPO` or `DRIVE` the run continues with the step after its last checkpoint, as if
# nothing had happened, also on the other accelerator. Drive keeps deleted checkpoints in its trash, which counts as used: empty
# it when the disk is full, or use the Hub.
#
# To use the model elsewhere: `python -m pretrain_xla export` writes it for `transformers`.

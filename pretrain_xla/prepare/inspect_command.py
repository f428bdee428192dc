"""Command-line interface of `inspect`: tables and histograms on the terminal, a plot, or JSON."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from pretrain_xla.command_line import parse
from pretrain_xla.config import DataConfig
from pretrain_xla.data.manifest import dataset_info
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.inspect import Inspection, inspect
from pretrain_xla.redact import redacted, redacted_tree
from pretrain_xla.storage.files import filesystem, url

_BAR = 40


@dataclass(frozen=True)
class InspectFlags:
    """Inspect token shards of any known format: counts, histograms, first documents, and checks."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A dataset's folder, for all of its splits; or a folder of shards, a file, or a pattern with *. Local path or URL."""
    tokenizer: str | None = None
    """Tokenizer of the ids; None means the manifest's, or gpt2."""
    documents: int = 3
    """Number of documents to show."""
    verify: bool = False
    """Compare all recorded checksums: those of dataset.json, including other splits, or of checksums.json."""
    write_checksums: bool = False
    """Record checksums, which runs compare, if all shards can be read: in checksums.json next to shards of other programs, in
    a dataset.json that has none of blocks."""
    plot: str | None = None
    """Save the histograms as this PNG file, one for each split; None means no plot."""
    json: bool = False
    """Print JSON instead of tables; for a dataset, keyed by split."""
    cache_dir: str | None = None
    """Folder where remote shards are cached; None means ~/.cache/pretrain_xla/shards."""


def inspect_command(arguments: Sequence[str]) -> int:
    """Parse the flags, inspect, and print; returns 1 if the shards have faults, else 0.

    Raises:
        UserError: see `inspect`, or the plot cannot be written.
    """
    flags = parse(InspectFlags, arguments, program="python -m pretrain_xla inspect", command="inspect")
    if flags.plot:
        check_plot(flags.plot)
    splits = _splits(flags.path)
    found = {
        split: _inspect(flags, path, flags.verify and not number, flags.write_checksums and not number)
        for number, (split, path) in enumerate(splits.items())  # the first checks or records all splits
    }
    plots = {split: _plot_of(split, flags.plot) for split in found}
    for split, plotted in plots.items():
        if plotted:
            plot(found[split], plotted)
    if flags.json:
        trees = {split: each.as_dict() for split, each in found.items()}
        print(json.dumps(redacted_tree(trees.get("", trees)), indent=2, ensure_ascii=False))
    else:
        for split, each in found.items():
            if split:
                Console().rule(split, characters="═")
            show(each, plots[split])
    return 1 if any(each.faults for each in found.values()) else 0


def _splits(path: str) -> dict[str, str]:
    """Path of each split of a dataset; for anything else, the path itself under an empty name."""
    fs, root = filesystem(path)
    info = dataset_info(path)
    if info is None or info.root != url(fs, root):
        return {"": path}
    return {split: f"{path.rstrip('/')}/{split}" for split in info.splits}


def _plot_of(split: str, plot: str | None) -> str | None:
    if not (plot and split):
        return plot
    name, suffix = os.path.splitext(plot)
    return f"{name}.{split}{suffix}"


def _inspect(flags: InspectFlags, path: str, verify: bool, record: bool) -> Inspection:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        return inspect(
            path,
            flags.tokenizer,
            documents=flags.documents,
            verify=verify,
            record=record,
            settings=DataConfig(cache_dir=flags.cache_dir),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def show(found: Inspection, plotted: str | None) -> None:
    """Print an inspection."""
    console = Console()
    table = Table()
    for heading in ("shard", "format", "ids", "tokens", "highest id"):
        table.add_column(heading, justify="left" if heading in ("shard", "format", "ids") else "right")
    for shard in _some(found.shards):
        highest = f"{shard['max_id']:,}" if "max_id" in shard else ""
        table.add_row(shard["name"], shard["format"], shard["dtype"], f"{shard['tokens']:,}", highest)
    console.print(table)
    used = int((found.counts > 0).sum())
    of = f" of {found.vocab_size:,} of {found.tokenizer}" if found.vocab_size else ""
    print(redacted(f"{found.tokens:,} tokens in {len(found.shards):,} shards; {used:,} different ids{of}"))
    lengths = found.document_lengths
    if len(lengths):
        low, middle, high = np.percentile(lengths, (10, 50, 90))
        print(f"{len(lengths):,} documents of {lengths.mean():,.0f} tokens on average", end="")
        print(f" (10% under {low:,.0f}, half under {middle:,.0f}, 90% under {high:,.0f}, longest {lengths.max():,})\n")
        edges, counts = length_histogram(lengths)
        _bars(
            [f"{low:>9,} to {high - 1:,}" for low, high in itertools.pairwise(edges.tolist())],
            counts,
            "tokens: documents",
        )
    for number, text in enumerate(found.documents, start=1):
        console.rule(f"document {number}", align="left")
        console.print(escape(text[:1000]), highlight=False)
    console.rule("checks", align="left")
    for fault in found.faults:
        print(f"fault: {redacted(fault)}")
    if not found.faults:
        print("none failed: headers and lengths, ids, checksums where there are any, end-of-text")
    if found.recorded:
        print(f"checksums recorded in {redacted(found.recorded)}")
    if plotted:
        print(f"histograms: {plotted}")


def length_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(edges, counts) with powers of two as edges, from the shortest document to the longest."""
    top = int(lengths.max()).bit_length()
    edges = np.concatenate([[0], 2 ** np.arange(top + 1)])
    edges = edges[int(lengths.min()).bit_length() :]
    return edges, np.histogram(lengths, edges)[0]


def check_plot(path: str) -> None:
    """Refuse a path that no plot can be written to, before anything is read.

    Raises:
        UserError: no such folder, or an unknown format.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = set(FigureCanvasBase.get_supported_filetypes())
    if os.path.splitext(path)[1].removeprefix(".") not in known:
        raise UserError(f"--plot {path}: give a name that ends with .png, or .{', .'.join(sorted(known - {'png'}))}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"--plot {path}: cannot be written: no such folder")


def plot(found: Inspection, path: str) -> None:
    """Plot document lengths, and id frequencies by rank.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (documents, ids) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    lengths = np.maximum(found.document_lengths, 1)
    if len(lengths):
        edges = np.geomspace(lengths.min(), lengths.max() + 1, 60)
        documents.hist(lengths, np.unique(edges.round()), color="tab:blue", label="documents")
        documents.axvline(float(np.median(lengths)), color="tab:orange", label=f"median {np.median(lengths):,.0f}")
        documents.set_xscale("log")
        documents.legend()
    documents.set(xlabel="tokens in a document", ylabel="documents", title=f"{len(lengths):,} documents")
    ranked = np.sort(found.counts[found.counts > 0])[::-1]
    if len(ranked):
        ids.loglog(np.arange(1, len(ranked) + 1), ranked / found.tokens, color="tab:green")
    ids.set(
        xlabel="rank of the id", ylabel="share of the tokens", title=f"{found.tokens:,} tokens, {len(ranked):,} ids"
    )
    for axis in (documents, ids):
        axis.grid(alpha=0.3)
    title = os.path.relpath(found.path) if "://" not in found.path else redacted(found.path)
    figure.suptitle(title.replace("$", r"\$"))  # otherwise text between two of them is typeset as mathematics
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    plt.close(figure)


def _bars(labels: list[str], counts: np.ndarray, heading: str) -> None:
    print(heading)
    width = max(map(len, labels))
    for label, count in zip(labels, counts.tolist(), strict=True):
        print(f"{label:<{width}} {'█' * round(_BAR * count / max(1, counts.max()))} {count:,}")


def _some(shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All shards, or if there are many, the first and last ten."""
    if len(shards) <= 24:
        return shards
    gap = {"name": f"... {len(shards) - 20} more", "format": "", "dtype": "", "tokens": 0}
    return [*shards[:10], gap, *shards[-10:]]

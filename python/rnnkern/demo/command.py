"""``rnnkern demo``: the order in which things are done."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import rnnkern
from rnnkern.console import machine
from rnnkern.console.errors import CommandError, require
from rnnkern.console.files import check_writable, write
from rnnkern.demo import corpus, model, report, train
from rnnkern.demo.options import PICTURE, repeat

_MOST_MEMORY = 2**40  # bytes, where the system does not tell how much is free


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options, see `rnnkern.demo.options`.

    Returns
    -------
    int
        Exit status: 0, or 1 if the two models did not compute the same losses at the start.

    Raises
    ------
    CommandError
        For everything that the user can put right.
    """
    with _torch_settings(args.threads):
        try:
            return _sample_only(args) if args.sample_from else _compare(args)
        except (MemoryError, RuntimeError) as error:
            # torch has no exception type of its own for a failed allocation on a CPU.
            if isinstance(error, MemoryError) or "alloc" in str(error):
                raise _too_large(args, "more memory than there is") from None
            raise


@contextmanager
def _torch_settings(threads: int | None) -> Iterator[None]:
    """Set torch's thread count, and put it and the random state back afterwards."""
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_num_threads(threads or before)
            yield
    finally:
        torch.set_num_threads(before)


def _sample_only(args: argparse.Namespace) -> int:
    for option in ("text", "save", "out"):
        if getattr(args, option):
            raise CommandError(f"--sample-from does not train: leave out --{option}")
    character_model, vocabulary = model.load(args.sample_from)
    unknown = int((vocabulary.encode(args.prompt) == corpus.UNKNOWN).sum())
    if unknown:
        print(
            f"rnnkern demo: the model does not know {unknown} of the prompt's characters",
            file=sys.stderr,
        )
    sys.stdout.write(report.printable(args.prompt.lstrip("\n")))
    for character in _sample(args, character_model, vocabulary):
        sys.stdout.write(report.printable(character))
        sys.stdout.flush()
    print()
    return 0


def _sample(
    args: argparse.Namespace, character_model: model.CharModel, vocabulary: corpus.Vocabulary
) -> Iterator[str]:
    return model.sample(
        character_model.eval(),
        vocabulary,
        prompt=args.prompt,
        length=args.length,
        temperature=args.temperature,
        seed=args.seed,
    )


def _compare(args: argparse.Namespace) -> int:
    """Train both models and report; everything that can be refused is refused before that."""
    start = time.perf_counter()
    picture = args.out or PICTURE
    _check_files(args, picture)
    progress = _check_packages(args)
    text = corpus.load_corpus(args.text, batch=args.batch, seq_len=args.seq_len)
    _check_memory(args, len(text.vocabulary))
    title = _title(args)
    print(f"Text:    {text.source}\n         {text.sizes}")
    print(f"Model:   {title}")
    print(f"Steps:   {args.steps:,} with torch.nn and with rnnkern, in turns", flush=True)

    contenders = _contenders(args, len(text.vocabulary))
    with progress(total=args.steps, unit="step", disable=None, leave=False) as bar:

        def advance(steps: int) -> None:
            losses = " / ".join(f"{contender.losses[-1]:.3f}" for contender in contenders)
            bar.set_postfix_str(f"loss {losses}", refresh=False)
            bar.update(steps)

        settings = train.Settings(args.steps, args.batch, args.seq_len, args.lr)
        train.train(contenders, text, settings, advance)
    for contender in contenders:
        contender.bits = train.bits_per_character(contender.model, text, args.batch)
    trained = contenders[1]
    if args.save:
        model.save(args.save, trained.model, text.vocabulary)

    targets = train.held_out_targets(text, args.batch)[1:]
    findings = report.Report(contenders, title, text.unigram_bits(targets))
    report.print_table(findings)
    sampled = "".join(_sample(args, trained.model, text.vocabulary))
    print(f"Sampled from {trained.name}, temperature {args.temperature:g}:\n")
    print(report.printable((args.prompt + sampled).lstrip("\n").rstrip()), end="\n\n", flush=True)
    write(picture, report.draw(findings, picture))
    print(f"Picture: {picture}")
    if args.save:
        print(f"Model:   {args.save} (rnnkern demo --sample-from {shlex.quote(str(args.save))})")
    print(f"Machine: {_machine()}")
    print(f"Repeat:  {repeat(args, torch.get_num_threads())}")
    print(f"Took:    {time.perf_counter() - start:.0f} s")
    if not findings.agrees:
        print(
            f"rnnkern demo: {trained.name} and {contenders[0].name} computed different losses "
            "from the same weights; please report this",
            file=sys.stderr,
        )
    return 0 if findings.agrees else 1


def _contenders(args: argparse.Namespace, symbols: int) -> tuple[train.Contender, train.Contender]:
    """Make both models, with the weights that torch draws from the seed."""
    torch.manual_seed(args.seed)
    sizes = {"symbols": symbols, "hidden": args.hidden, "layers": args.layers}
    baseline = model.CharModel(torch.nn, cell=args.cell, **sizes)
    other = model.CharModel(rnnkern, cell=args.cell, **sizes)
    other.load_state_dict(baseline.state_dict())
    layer = model.CELLS[args.cell]
    return (
        train.Contender(f"torch.nn.{layer}", baseline),
        train.Contender(f"rnnkern.{layer}", other),
    )


def _check_packages(args: argparse.Namespace) -> Any:
    """Import what the whole run needs before it starts, and return the progress bar's class."""
    for name in ("rich.table", "rich.console", "matplotlib.backends.backend_agg"):
        require(name)
    if args.save:
        require("safetensors.torch")
    return require("tqdm").tqdm


def _check_files(args: argparse.Namespace, picture: Path) -> None:
    """Refuse outputs that cannot be written, or that would overwrite each other or the text."""
    check_writable(picture, "--out")
    if args.save:
        check_writable(args.save, "--save")
    named = {"--out": picture, "--save": args.save, "--text": args.text}
    taken: dict[str, str] = {}
    for option, path in named.items():
        if path and path != Path(os.devnull):
            other = taken.setdefault(os.path.realpath(path), option)
            if other != option:
                raise CommandError(f"{option} {path}: the same file as {other}")


def _check_memory(args: argparse.Namespace, symbols: int) -> None:
    """Refuse sizes that cannot fit, before the system runs out of memory on them."""
    weights = model.weight_count(
        cell=args.cell, symbols=symbols, hidden=args.hidden, layers=args.layers
    )
    activations = args.batch * args.seq_len * (3 * symbols + 6 * args.hidden * args.layers)
    # Two models, each with weights, gradients and Adam's two moments; one's activations at a time.
    needed = 4 * (2 * 4 * weights + activations)
    free = machine.available_memory()
    if needed > (_MOST_MEMORY if free is None else free):
        have = "" if free is None else f", and {free / 2**30:,.1f} are free"
        raise _too_large(args, f"about {needed / 2**30:,.1f} GiB{have}")


def _too_large(args: argparse.Namespace, need: str) -> CommandError:
    sizes = f"--hidden {args.hidden} --layers {args.layers} --batch {args.batch}"
    return CommandError(f"not enough memory: {sizes} --seq-len {args.seq_len} needs {need}")


def _title(args: argparse.Namespace) -> str:
    threads = torch.get_num_threads()
    return (
        f"{model.CELLS[args.cell]}, {args.layers} layer{'s' * (args.layers > 1)} of {args.hidden} "
        f"units, batch {args.batch} x {args.seq_len} characters, "
        f"{threads} thread{'s' * (threads > 1)}"
    )


def _machine() -> str:
    isa = importlib.import_module("rnnkern._native").isa()
    return (
        f"{machine.cpu_name()}, {machine.cpu_count()} CPUs; "
        f"rnnkern {rnnkern.__version__} ({isa}), torch {torch.__version__}"
    )

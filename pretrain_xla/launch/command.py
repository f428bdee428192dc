"""`python -m pretrain_xla launch`: from the flags to a launch that goes on until its end.

Exit status: 0 the run is done, 1 it failed, 2 the request was wrong, 3 the budget is spent, 130 it was stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pretrain_xla.command_line import parse
from pretrain_xla.errors import UserError
from pretrain_xla.launch import checks
from pretrain_xla.launch import state as states
from pretrain_xla.launch.archive import changes, commit, pack, repository
from pretrain_xla.launch.bucket import open_bucket
from pretrain_xla.launch.calls import Calls, Network
from pretrain_xla.launch.clock import Clock
from pretrain_xla.launch.context import Launch
from pretrain_xla.launch.gcloud import Gcloud
from pretrain_xla.launch.launcher import run
from pretrain_xla.launch.look import COMMANDS, look_command
from pretrain_xla.launch.plan import dry_run
from pretrain_xla.launch.progress import counted
from pretrain_xla.launch.request import PROGRAM, LaunchFlags, Request, checked
from pretrain_xla.launch.slices import resolve_slice
from pretrain_xla.launch.state import ENDED, State
from pretrain_xla.launch.timing import timing

CODE = "code.tar.gz"


def launch_command(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status.

    Raises:
        UserError: the request is wrong, or gcloud is missing or not logged in.
    """
    if arguments and arguments[0] in COMMANDS:
        return look_command(arguments)
    own, command = list(arguments), []
    if "--" in own:
        own, command = own[: own.index("--")], own[own.index("--") + 1 :]
    request = checked(parse(LaunchFlags, own, program=PROGRAM, command="launch"), command)
    for note in request.notes:
        print(f"note: {note}", flush=True)
    config = request.config
    if request.flags.dry_run:
        calls = Calls(request.name, request.flags.project, request.network)
        secrets = list(dict.fromkeys([*request.flags.secret, *(name for name in checks.WORLD if os.environ.get(name))]))
        state = request.state(request.flags.project or "", secrets, "", 0.0)
        print(*dry_run(state, calls, timing(), request.local, config.train.train_steps), sep="\n")
        return 0
    with states.alone(request.name):
        return _launch(request)


def _launch(request: Request) -> int:
    clock, times, flags, config = Clock(), timing(), request.flags, request.config
    gcloud = Gcloud(clock, times)
    project = checks.account(gcloud, Calls(request.name, None).account(), flags.project)
    folder = repository()
    calls = Calls(request.name, project, request.network)
    bucket = open_bucket(request.bucket, gcloud, calls)
    known = states.newest(request.name, bucket)
    if known is not None:
        states.check_free(known, clock.now(), times.lease)
    needed = [] if known is None or known.phase in ENDED else known.secrets  # a run that goes on needs them, too
    chosen = checks.chosen_secrets([*flags.secret, *needed], config, os.environ)
    uncommitted = _uncommitted(flags.uncommitted, folder) if known is None or known.phase in ENDED else False
    state = _taken_over(known, request.state(project, chosen, commit(folder), clock.now()))
    launch = Launch(
        state=state,
        calls=Calls(request.name, state.project, Network(**state.network)),
        gcloud=gcloud,
        bucket=bucket,
        clock=clock,
        timing=times,
        secrets={name: os.environ[name] for name in chosen},
        print=lambda line: print(line, flush=True),
        local=request.local,
        steps=config.train.train_steps,
        tokens_per_step=config.tokens_per_step,
    )
    if known is not None and known.phase == "done" and known.arguments == state.arguments:
        launch.say(f"{state.name} is done already; raise --train-steps to go on, or name another --bucket")
        return 0
    if known is not None and known.phase not in ENDED:
        launch.say(f"takes over {state.name} ({known.phase}), which {known.holder} looked after")
        archive = launch.bucket.read(CODE) or pack(folder, uncommitted)
    else:
        for note in _check(launch, request, folder, uncommitted, is_new=known is None):
            launch.say(f"note: {note}")
        archive = pack(folder, uncommitted)
        launch.bucket.write(CODE, archive)
    return run(launch, archive, fresh=known is None, model=flags.copy_model)


def _check(launch: Launch, request: Request, folder: str, uncommitted: bool, *, is_new: bool) -> list[str]:
    """All checks before anything is created; returns notes.

    Raises:
        UserError: one says that the run cannot be, or should not.
    """
    flags, config = request.flags, request.config
    wanted = resolve_slice(flags.topology)
    notes = checks.check_arguments(request.command, config, folder, uncommitted)
    launch.state.zones = checks.zones_with(launch, wanted)
    zone = launch.state.zones[0]
    price = wanted.price(zone) / wanted.chips if flags.price_per_chip_hour is None else flags.price_per_chip_hour
    size = f"{counted(wanted.hosts, 'host')}, {counted(wanted.chips, 'chip')}"
    notes.append(f"{wanted.accelerator_type}: {size} at ${price:.2f} an hour")
    if request.tier != "on-demand" and flags.price_per_chip_hour is None:
        notes.append(f"that is the price on demand; {request.tier} costs less, and --price-per-chip-hour says how much")
    notes += checks.check_quota(launch, wanted)
    if is_new:
        checks.check_name_free(launch)
    from pretrain_xla.model.flops import parameter_count

    notes += checks.check_bucket(launch, checks.traffic(config, parameter_count(config.model)))
    if flags.preflight:
        report = checks.preflight(request.command, flags.topology, price, launch.say)
        if report is not None:
            notes += checks.check_price(report, flags.max_dollars, flags.max_hours)
    return notes


def _taken_over(known: State | None, wanted: State) -> State:
    """The state to go on with: what is known of this run, with the limits that are asked for now.

    Raises:
        UserError: the run goes on, with another command or slice.
    """
    if known is None:
        return wanted
    if known.phase not in ENDED:
        for key in ("topology", "arguments", "tier"):
            if getattr(known, key) != getattr(wanted, key):
                raise UserError(
                    f"{known.name} goes on with another {key} ({getattr(known, key)}): `{PROGRAM} stop {known.name}` first, or "
                    "give the command it was launched with"
                )
        wanted.commit = known.commit
        wanted.zones = list(dict.fromkeys([*([known.zone] if known.zone else []), *wanted.zones]))
    same = wanted.commit == known.commit and wanted.extras == known.extras
    wanted.versions = known.versions if same else {}
    for key in ("created", "attempt", "leases", "progress", "zone"):
        setattr(wanted, key, getattr(known, key))
    for key in ("WANDB_RUN_ID",):
        if key in known.environment and key in wanted.environment:
            wanted.environment[key] = known.environment[key]
    return wanted


def _uncommitted(choice: str, folder: str) -> bool:
    """Whether changes since the last commit are sent, too; asks if there are some and the flag does not say.

    Raises:
        UserError: nobody can be asked.
    """
    files = changes(folder)
    if not files or choice != "ask":
        return bool(files) and choice == "send"
    some = ", ".join(files[:5]) + (f" and {len(files) - 5} others" if len(files) > 5 else "")
    if not sys.stdin.isatty():
        raise UserError(f"{some} differ from the last commit: commit them, or give --uncommitted send or leave")
    answer = input(f"{some} differ from the last commit. Send them to the workers, too? [y/n] ")
    return answer.strip().lower().startswith("y")

"""Self on-policy distillation: train a language model against an earlier copy of itself."""

import io
import json
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, cast

import typer

from sodfast.errors import Interrupted, RunFailed, UsageError

if TYPE_CHECKING:
    from sodfast.run.console import Screen

# What typer raises for arguments that it cannot parse. It brings a click of its own, which has had
# two names.
_Unparsed: type[Exception] = typer.BadParameter.__mro__[1]

# The commands parse arguments and print results; whatever is computed, other modules compute. They
# are imported where they are needed, so that help and refusals need not wait for torch.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="Preset or YAML file, then overrides."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")
]

Best = Annotated[
    bool,
    typer.Option(
        "--best", help="The checkpoint of the highest test score instead (checkpoint.best)."
    ),
]


def _print_versions(asked: bool) -> None:
    if asked:
        from sodfast.run.environment import versions

        _print(*(f"{package} {text}" for package, text in versions().items()))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions and stop.",
        ),
    ] = False,
) -> None:
    """Self on-policy distillation: train a language model against an earlier copy of itself."""


@app.command()
def train(
    arguments: Arguments = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Continue a run; takes only steps=N.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")
    ] = False,
) -> None:
    """Train. Without CONFIG: the embedded lab, on a CPU, in minutes, without any download."""
    from sodfast.config import load_config

    arguments = arguments or []
    if resume is not None:
        from sodfast.run.directory import stored_config

        config = stored_config(resume, arguments)
    else:
        config = load_config(*_split(arguments))
    if dry_run:
        _print(config.to_yaml().rstrip())
        return

    from sodfast.commands import train_run

    train_run(config, resume)


@app.command()
def fork(
    source: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run to go on from.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="step=N [KEY=VALUE]...",
            help="One of the run's checkpoints, then overrides. teacher.refresh=now|never: what "
            "one refresh at that step causes, with the teacher still from there on.",
        ),
    ] = None,
) -> None:
    """Train on from a checkpoint of another run, under other keys, in a directory of its own."""
    from sodfast.commands import train_fork

    train_fork(source, overrides or [])


@app.command()
def sweep(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study file, or a shipped study.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="`out` is the study directory; others, overrides."
        ),
    ] = None,
    launcher: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes here, or tasks of a Ray cluster.")
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(help="Trials at a time; default: one per GPU, or as the cores allow."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, or auto; default: a new one on this machine.")
    ] = None,
) -> None:
    """Run every trial of a study, skipping what is finished and resuming what is not."""
    from sodfast.study.sweep import sweep as run_sweep

    table = run_sweep(study, overrides or [], launcher, jobs, address, _print_report)
    _print(f"table: {table}")


def _print_report(directory: Path) -> None:
    """The report of whatever there is: a study whose trials all failed has nothing to show."""
    from sodfast.report.page import write_report

    try:
        _print(f"report: {write_report(directory)}")
    except (UsageError, RunFailed) as error:
        _print(f"no report: {error}")


@app.command("eval")
def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN_DIR|MODEL", help="Run, HF id or folder.")],
    overrides: Overrides = None,
    best: Best = False,
) -> None:
    """Evaluate a run's newest checkpoint, or any model. The last line is JSON."""
    from sodfast.commands import evaluate_model
    from sodfast.run.console import Screen

    screen = Screen()
    result = evaluate_model(source, overrides or [], screen, best)
    _print(json.dumps(result), screen=screen)


@app.command("plan")
def plan_memory(arguments: Arguments = None) -> None:
    """Say whether a run fits into a GPU's memory, without weights, GPU or network. The last line is
    JSON; exit code 1: it does not fit."""
    from sodfast.config import load_config

    config = load_config(*_split(arguments or []))
    from sodfast.memory.plan import report

    result = report(config)
    _print(json.dumps(result))
    if not result["fits"]:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR")],
    best: Best = False,
    upload: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="ORG/NAME",
            help="Upload it to the Hugging Face hub, too; a new repository is private.",
        ),
    ] = None,
) -> None:
    """Write a run's newest student as a Hugging Face directory: safetensors, tokenizer and a model
    card that says how it was trained."""
    from sodfast.commands import export_model
    from sodfast.run.hub import push, require_hub

    if upload is not None:
        require_hub(upload)
    export_model(run, out, best)
    _print(f"wrote {out}")
    if upload is not None:
        _print(f"uploaded to {push(out, upload)}")


@app.command("replay")
def replay_schedule(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[schedule.KEY=VALUE]...", help="The schedule to try instead."),
    ] = None,
) -> None:
    """Say when another schedule would have refreshed on a run's metrics. The last line is JSON."""
    from sodfast.report.replay import replay_run

    result = replay_run(run, overrides or [])
    _print(*result.text(), json.dumps(result.to_json()))


@app.command("calibrate")
def calibrate_gates(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN_DIR|CONFIG] [KEY=VALUE]...",
            help="A run, whose first steps say how rewards and lengths vary, or a configuration.",
        ),
    ] = None,
    success: Annotated[
        str | None,
        typer.Option(
            metavar="P|A,B",
            help="Success rate of every prompt, or the Beta that rates are drawn from; "
            "default: what the run shows, else 1,1.",
        ),
    ] = None,
    rate: Annotated[
        float, typer.Option(metavar="SHARE", help="Runs that may refresh falsely.")
    ] = 0.1,
) -> None:
    """Say how often the gates of CGTR or evidence open where nothing improves, and what would hold
    a chosen rate, by simulation. The last line is JSON."""
    from sodfast.calibrate import calibrate_source

    result = calibrate_source(*_split(arguments or []), success, rate)
    _print(*result.text(), json.dumps(result.to_json()))


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Default: the last step whose answers are kept.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="ID", help="Only the answers to this question.")
    ] = None,
    sort: Annotated[
        Literal["reward", "length", "divergence"] | None,
        typer.Option(help="The greatest first; default: as they were drawn."),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many answers.")] = 5,
    evaluation: Annotated[
        bool, typer.Option("--eval", help="The answers of the evaluation after that step.")
    ] = False,
) -> None:
    """Show a step's answers with the teacher's hints, tokens shaded by their divergence."""
    from sodfast.run.console import Screen, open_console
    from sodfast.run.show import chosen_answers, describe_answers

    screen = Screen()
    answers = chosen_answers(run, step, question, sort, limit, evaluation)
    _print(*describe_answers(answers, open_console(screen)), screen=screen)


@app.command("report")
def report_directories(
    directories: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_STUDY_DIR", help="Or several runs.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option(metavar="AXIS=LABEL", help="What a study's groups are compared with."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Page of several runs, by default comparison.html; or directory for studies.",
        ),
    ] = None,
) -> None:
    """Write report.html, a page with every figure, and tables/*.csv into a run or a study; for
    studies with --out DIRECTORY into that, each study a regime called as its directory; or one
    page that shows several runs side by side, the keys that differ first."""
    from sodfast.report.page import write_comparison, write_report, write_studies

    if out is not None and all(os.path.isfile(path / "study.yaml") for path in directories):
        _print(str(write_studies(directories, out, baseline)))
        return
    if len(directories) > 1:
        if baseline is not None:
            raise UsageError("--baseline is for a study: leave it out, or name one directory")
        _print(str(write_comparison(directories, out or Path("comparison.html"))))
        return
    if out is not None:
        raise UsageError("--out is for several runs: one report lies in its own directory")
    _print(str(write_report(directories[0], baseline)))


def _print(*lines: str, screen: "Screen | None" = None) -> None:
    """Print what a command was asked for. Where that cannot be written, a line on standard error
    says so, and the exit code is 1. `screen`: what was written to before."""
    from sodfast.run.console import Screen

    screen = screen or Screen()
    print(*lines, sep="\n", file=screen, flush=True)
    if screen.off:
        raise typer.Exit(1)


def _help(arguments: list[str]) -> int:
    """Let typer, which writes help texts by itself, write one as `_print` writes all else."""
    from sodfast.run.console import Screen

    screen = Screen()
    with redirect_stdout(cast("TextIO", screen)):
        app(arguments, standalone_mode=False)
        screen.flush()
    return int(screen.off)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """CONFIG is the one argument without `=`, and comes first."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return None, arguments


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 unusable arguments, 130 interrupted."""
    # The library tokenizers prints a warning when a process that has encoded in threads forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stdout is None:  # closed, as with `>&-`
        # Opened at once: the next file, such as a run's lock, would get the number 1, and whatever
        # a library prints would land in it.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        print("sodfast: standard output is closed: going on without it", file=sys.stderr)
    # Outside of training, where `Interruption` takes both, SIGTERM ends a command as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.flags.optimize > 1:
        _stop("transformers needs the docstrings that PYTHONOPTIMIZE=2 removes: set it to 1", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every locale has what tables are drawn with
    arguments = sys.argv[1:] or ["--help"]
    try:
        code = _help(arguments) if "--help" in arguments else app(arguments, standalone_mode=False)
        sys.exit(code or (0 if sys.argv[1:] else 2))
    except UsageError as error:
        _stop(str(error), 2)
    except _Unparsed as error:
        _stop(f"{str(error).rstrip('.')}: see sodfast --help", 2)
    except RunFailed as error:
        _stop(str(error), 1, error.alone)
    except OSError as error:
        # What the system refuses wherever it is asked, such as a folder that may not be read, is no
        # defect of the program.
        _stop(str(error), 1)
    except (Interrupted, KeyboardInterrupt):
        sys.exit(130)


def _stop(message: str, code: int, alone: bool = False) -> None:
    # Ranks that torchrun started end with the same error, and rank 0 alone prints it. An error
    # that only one rank knows of is printed by that rank.
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if alone or not launched or os.environ.get("RANK", "0") == "0":
        text = " ".join(message.split())
        if len(text) > 2500:  # of a name or a value; what is wrong with it stands before or after
            text = f"{text[:2000]} … {text[-400:]}"
        if sys.stderr is None or not sys.stderr.closed:  # by the user's own code
            print(f"sodfast: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

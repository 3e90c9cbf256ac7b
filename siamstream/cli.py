"""The console command: `siamstream VERB ...` is the script of that verb. Also `python -m siamstream VERB ...`."""

from __future__ import annotations

import difflib
import importlib
import sys

import siamstream
from siamstream.commands import COMMANDS, SYNONYMS


def main() -> None:
    """Run the verb that the command line names."""
    match sys.argv[1:]:
        case ["--version"]:
            print(f"siamstream {siamstream.__version__}")
        case [] | ["--help" | "-h" | "help"]:
            with importlib.import_module("siamstream.pipeline.common.output").lasting_output():  # `| head`
                print(usage())
        case [verb, *arguments] if verb in COMMANDS:
            run(verb, arguments)
        case [verb, *_]:
            print(f"error: {unknown(verb)}", file=sys.stderr)
            sys.exit(2)


def run(verb: str, arguments: list[str]) -> None:
    """Run a verb's script, which names itself `siamstream VERB` in its usage and its errors."""
    sys.argv[:] = [f"siamstream {verb}", *arguments]
    script = importlib.import_module(f"siamstream.{COMMANDS[verb].module}")
    errors = importlib.import_module("siamstream.pipeline.common.errors")
    errors.exit_on_user_error(script.main)


def usage() -> str:
    """The list of verbs."""
    width = max(map(len, COMMANDS))
    verbs = [f"  {verb:<{width}}  {command.summary}" for verb, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: siamstream VERB [options]        siamstream VERB --help lists a verb's options",
            "",
            *verbs,
            "",
            "With several GPUs: torchrun --standalone --nproc-per-node=8 -m siamstream pretrain [options]",
        ]
    )


def unknown(verb: str) -> str:
    """What to say of a word that is no verb."""
    scripts = {command.module.rpartition(".")[2]: name for name, command in COMMANDS.items()}
    meant = {**{name: name for name in COMMANDS}, **scripts, **SYNONYMS}
    word = verb.lower().rpartition("/")[2].removesuffix(".py").replace("-", "_")
    near = difflib.get_close_matches(word, meant, n=1)
    hint = f": did you mean `siamstream {meant[near[0]]}`?" if near else "."
    return f"{verb!r} is no verb of siamstream{hint} The verbs are {', '.join(COMMANDS)}"

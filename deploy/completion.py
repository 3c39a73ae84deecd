"""Tab completion: ``fedspan completion bash`` prints a script that knows all verbs, options and choices.

Made from the parsers, so it knows what they know; the script itself starts no Python.
"""

import argparse

from common.system.command import Command
from deploy import cli

_BASH = """\
_fedspan() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}" verb="" words=""
    local one="${{COMP_WORDS[1]}}" two="${{COMP_WORDS[1]}} ${{COMP_WORDS[2]-}}"
    ((COMP_CWORD > 1)) && case "$one" in {single}) verb="$one" ;; esac
    ((COMP_CWORD > 2)) && case "$two" in {double}) verb="$two" ;; esac
    case "$COMP_CWORD $one" in
        "1 "*) words="{first} --help --version" ;;
{second}
    esac
    if [[ $verb && $current == -* ]]; then
        case "$verb" in
{options}
        esac
    elif [[ $verb ]]; then
        case "$verb $before" in
{choices}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _fedspan fedspan
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def script(shell: str) -> str:
    """The script for a shell, "bash" or "zsh"."""
    parsers = {}
    for verb in cli.VERBS:
        try:
            parsers[verb] = cli.parser(verb, cli.load(verb))
        except ModuleNotFoundError:  # not part of this image
            continue
    first = list(dict.fromkeys(verb.split()[0] for verb in parsers))
    under = {word: [verb.split()[1] for verb in parsers if verb.startswith(f"{word} ")] for word in first}
    options, choices = [], []
    for verb, parser in parsers.items():
        options.append(
            _case(
                f'"{verb}"',
                [option for action in parser._actions for option in action.option_strings if option.startswith("--")],
            )
        )
        for action in parser._actions:
            if action.choices is not None:  # offered after the option's name, or in the argument's place
                after = action.option_strings or [verb.split()[-1]]
                pattern = "|".join(f'"{verb} {word}"' for word in after)
                choices.append(_case(pattern, [str(choice) for choice in action.choices]))
    text = _BASH.format(
        single="|".join(f'"{verb}"' for verb in parsers if " " not in verb),
        double="|".join(f'"{verb}"' for verb in parsers if " " in verb),
        first=" ".join(first),
        second="\n".join(_case(f'"2 {word}"', words) for word, words in under.items() if words),
        options="\n".join(options),
        choices="\n".join(choices),
    )
    return (_ZSH if shell == "zsh" else "") + text


def _case(pattern: str, words: list[str]) -> str:
    return f'        {pattern}) words="{" ".join(words)}" ;;'


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"], metavar="SHELL", help="bash or zsh")


COMPLETION = Command(
    _arguments,
    lambda options: print(script(options.shell), end=""),  # noqa: T201
    example="bash",
    then="a new shell, and: fedspan <Tab><Tab>",
    notes="To have it in every shell, for bash: fedspan completion bash >> ~/.bashrc, for zsh: ... zsh >> ~/.zshrc",
)

"""`rpt completion bash|zsh|fish`: a script that completes commands, their settings and what these may be.

    source <(rpt completion bash)        in ~/.bashrc; zsh likewise, in ~/.zshrc
    rpt completion fish | source         in ~/.config/fish/config.fish

The script holds all words, so that pressing the key starts no Python. Values without a list of choices complete as
files.
"""

from collections.abc import Mapping

from rpt_jax import settings
from rpt_jax.help import COMMANDS, HELP_ALL, KINDS, PAGES
from rpt_jax.settings import Setting

SHELLS = ("bash", "zsh", "fish")
USAGE = """usage: rpt completion bash|zsh|fish
  source <(rpt completion bash)   in ~/.bashrc; zsh likewise, in ~/.zshrc
  rpt completion fish | source    in ~/.config/fish/config.fish"""
EVERYWHERE = ("--help", HELP_ALL, "--json")
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
BASH = """_rpt() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local command="${{COMP_WORDS[1]}}" words=""
  if [ "$COMP_CWORD" -gt 2 ]; then
    case "$command" in {kinds}) command="$command ${{COMP_WORDS[2]}}" ;; esac
  fi
  case "$COMP_CWORD $command $before" in
    "1 "*) words={commands} ;;
{second}
{choices}
    *) case "$current" in
      -*) case "$command" in
{flags}
      esac ;;
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _rpt rpt
"""


def script(shell: str) -> str:
    """The script for one of SHELLS."""
    pages = {command: settings.read(page.settings) for command, page in PAGES.items()}
    if shell == "fish":
        return _fish(pages)
    return (ZSH if shell == "zsh" else "") + _bash(pages)


def _bash(pages: Mapping[str, tuple[Setting, ...]]) -> str:
    second = {kind: [name for name, _, _ in rows] for kind, rows in KINDS.items()} | {"completion": SHELLS}
    choices: dict[str, list[str]] = {}  # words -> patterns of what stands before them
    for command, found in pages.items():
        for setting in found:
            if setting.choices:
                choices.setdefault(" ".join(setting.choices), []).append(f'*" {command} {setting.flag}"')
    flags = {command: [*EVERYWHERE, *(setting.flag for setting in found)] for command, found in pages.items()}
    return BASH.format(
        kinds="|".join(KINDS),
        commands=_quoted([name for name, _, _ in COMMANDS] + ["completion"]),
        second="\n".join(f'    "2 {name} "*) words={_quoted(words)} ;;' for name, words in second.items()),
        choices="\n".join(f'    {"|".join(places)}) words="{words}" ;;' for words, places in choices.items()),
        flags="\n".join(f'        "{command}") words={_quoted(words)} ;;' for command, words in flags.items()),
    )


def _fish(pages: Mapping[str, tuple[Setting, ...]]) -> str:
    lines = ["complete -c rpt -f -n __fish_use_subcommand -a completion -d 'a script for bash, zsh or fish'"]
    lines += [
        f"complete -c rpt -f -n __fish_use_subcommand -a {name} -d {_fish_quoted(does)}" for name, _, does in COMMANDS
    ]
    lines += [f"complete -c rpt -f -n '__fish_seen_subcommand_from completion' -a '{' '.join(SHELLS)}'"]
    for kind, rows in KINDS.items():
        lines += [
            f"complete -c rpt -f -n '__fish_seen_subcommand_from {kind}' -a {name} -d {_fish_quoted(does)}"
            for name, _, does in rows
        ]
    for command, found in pages.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.split())
        for setting in found:
            takes = f" -x -a '{' '.join(setting.choices)}'" if setting.choices else " -r" if setting.kind else ""
            about = f" -d {_fish_quoted(setting.about)}" if setting.about else ""
            lines.append(f"complete -c rpt -n '{seen}' -l {setting.flag.removeprefix('--')}{takes}{about}")
    everywhere = " ".join(f"-l {flag.removeprefix('--')}" for flag in EVERYWHERE)
    return "\n".join([*lines, f"complete -c rpt -n 'not __fish_use_subcommand' {everywhere}"]) + "\n"


def _quoted(words: list[str] | tuple[str, ...]) -> str:
    return '"' + " ".join(words) + '"'


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

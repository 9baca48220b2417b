"""Cases of flags that cannot be meant, from tables of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from fault_cases.stage import Case, Stage

#: More than any number of things.
HUGE = "9" * 30
#: Cases by name: flags as they are typed, and what the message must hold.
Table = Mapping[str, tuple[str, str]]
#: What stands before the flags, for a command by its name.
Command = tuple[str, Table, Callable[[Stage], list[object]]]
#: What words in capitals stand for on a stage: a word, or several.
Known = Callable[[Stage], Mapping[str, object]]


def flag_cases(group: str, must: str, commands: Iterable[Command], known: Known) -> Iterator[Case]:
    """A case for each row of the tables: the command is refused."""
    for command, table, words in commands:
        for name, (flags, says) in table.items():
            play = partial(_refused, words=words, flags=flags, says=says, known=known)
            yield Case(group, f"{command}: {name}", shown(f"{command} with {flags}"), must, play)


def shown(done: str) -> str:
    """What is done as a table tells it."""
    return re.sub("9{15,}", "99...9", done[:90])


def typed(flags: str, known: Mapping[str, object]) -> list[object]:
    """Flags with what words in capitals stand for in the place of these."""
    words: list[object] = []
    for word in flags.split():
        value = known.get(word, word)
        words += value if isinstance(value, list) else [value]
    return words


def _refused(
    stage: Stage, *, words: Callable[[Stage], list[object]], flags: str, says: str, known: Known
) -> str:
    return stage.refused([*words(stage), *typed(flags, known(stage))], says)

"""What commands do before their work, done once in the process that all of them are forks of."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from chaos_steps.commands import Command, Pair
from chaos_steps.world import Words

ROOT = Path(__file__).resolve().parents[2]


def load_all() -> None:
    """Imports what commands import, so that they start in a moment."""
    import faiss  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch.fx.experimental.symbolic_shapes  # noqa: F401
    from fairseq.models import transformer_lm  # noqa: F401
    from fairseq_cli import eval_lm  # noqa: F401

    import fairseq_knnlm.cli
    import fairseq_knnlm.tasks
    from fairseq_knnlm.index import specification

    found = Path(fairseq_knnlm.__file__).parent
    assert found == ROOT / "fairseq_knnlm", f"{found} would be struck, not {ROOT}"
    # Whether FAISS can make an index is tried in a process of its own, which writes nothing: left
    # out, since it takes longer than all the rest.
    specification.obstacle_to_recipe = lambda *_: None


def warm(work: Sequence[Command | Pair]) -> None:
    """Composes fairseq's configuration of each command once: most of what it takes to start."""
    from fairseq import options
    from fairseq.dataclass import utils

    real, known = utils.compose, dict[tuple[str, ...], Any]()

    def compose(name: str, overrides: list[str], **rest: Any) -> Any:
        key = tuple(overrides)
        if key in known:
            return known[key]  # a fork asks once
        made = real(name, overrides=overrides, **rest)
        known[key] = deepcopy(made)
        return made

    utils.compose = compose
    for words in [words for each in work for words in _words(each)]:
        if words[0] == "fairseq-eval-lm":
            parser = options.get_eval_lm_parser()
            typed = [str(word) for word in words[1:]]
            utils.convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, typed))


def _words(each: Command | Pair) -> list[Words]:
    return [each.first, each.second] if isinstance(each, Pair) else [each.words]

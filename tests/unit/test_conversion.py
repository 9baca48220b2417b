"""Checkpoints of older fairseqs: what is read of them, what is refused, and that nothing runs."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import Capture, refuse, say
from fairseq.models import ARCH_CONFIG_REGISTRY
from omegaconf import OmegaConf
from test_lm import ADAPTIVE, decoder, dictionary

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm.fingerprints import model_fingerprint
from fairseq_knnlm.lm.pickled import Plain, open_checkpoint
from fairseq_knnlm.tasks.converting import converted, write

#: Both of PyTorch's formats: the archive of today, and that of before 1.6.
FORMATS = {"archive": True, "before 1.6": False}


class Runs:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, *told: Any) -> None:
        self.told = told

    def __reduce__(self) -> Any:
        return self.told


def meters() -> OrderedDict[str, Any]:
    """As fairseq 0.9 kept them: objects of a module that is no more."""
    module = types.ModuleType("fairseq.meters")
    kind = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    module.AverageMeter = kind  # type: ignore[attr-defined]
    sys.modules["fairseq.meters"] = module
    meter = kind()
    meter.avg, meter.sum = 1.5, 3.0  # type: ignore[attr-defined]
    return OrderedDict(train_loss=meter)


def settings(**more: Any) -> Namespace:
    """Flags of fairseq 0.9, as its parser left them."""
    found = Namespace(
        arch="transformer_lm",
        task="language_modeling",
        criterion="cross_entropy",
        optimizer="adam",
        lr_scheduler="fixed",
        data=["data-bin"],
        decoder_embed_dim=16,
        decoder_input_dim=16,
        decoder_output_dim=16,
        decoder_ffn_embed_dim=24,
        decoder_layers=2,
        decoder_attention_heads=2,
        tokens_per_sample=32,
        max_target_positions=32,
        min_lr=1e-9,
        lr=[0.1],
        no_tie_adaptive_proj=False,
        **more,
    )
    ARCH_CONFIG_REGISTRY["transformer_lm"](found)
    return found


def old_state(model: Any, args: Namespace) -> dict[str, Any]:
    """A checkpoint as fairseq 0.9 made it."""
    return {
        "args": args,
        "model": model.state_dict(),
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": np.float64(2.5)},
                "num_updates": 7,
            }
        ],
        "extra_state": {
            "train_iterator": {"epoch": 2, "iterations_in_epoch": 0},
            "train_meters": meters(),
            "val_loss": np.float32(3.5),
        },
        "last_optimizer_state": {"state": {}, "param_groups": []},
    }


def saved(path: Path, state: Any, archive: bool = True) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    return path


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_checkpoint_of_0_9(tmp_path: Path, capsys: Capture, kind: str) -> None:
    """The model that fairseq makes of it is the one that was saved, and PyTorch trusts the file."""
    model = decoder(no_decoder_final_norm=True)
    old = saved(tmp_path / "old.pt", old_state(model, settings()), FORMATS[kind])
    with pytest.raises(pickle.UnpicklingError):
        torch.load(old, weights_only=True)
    before = old.read_bytes()
    new = tmp_path / "new.pt"
    told = say(capsys, "convert-checkpoint", old, new)
    assert "transformer_lm" in told
    assert "fairseq.meters.AverageMeter" in told
    assert old.read_bytes() == before
    state = torch.load(new, weights_only=True)
    assert state["args"] is None
    assert state["optimizer_history"][0]["lr_scheduler_state"]["best"] == 2.5
    assert state["extra_state"]["val_loss"] == 3.5
    assert state["cfg"]["model"]["decoder_embed_dim"] == 16

    from fairseq.checkpoint_utils import load_model_ensemble

    words = dictionary()
    task = types.SimpleNamespace(source_dictionary=words, target_dictionary=words)

    def build_model(cfg: Any, from_checkpoint: bool = False) -> Any:
        from fairseq import models

        return models.build_model(cfg, task, from_checkpoint)

    task.build_model = build_model
    (found,), _ = load_model_ensemble([str(new)], task=task)
    assert model_fingerprint(found) == model_fingerprint(model)


def test_what_is_read_is_plain(tmp_path: Path) -> None:
    """Of every type that fairseq wrote, what it stood for."""

    class Choice(Enum):
        ONE = "one"

    Choice.__module__, Choice.__qualname__ = "fairseq.dataclass.constants", "DDP_BACKEND_CHOICES"
    constants: Any = sys.modules["fairseq.dataclass.constants"]
    kept = constants.DDP_BACKEND_CHOICES
    constants.DDP_BACKEND_CHOICES = Choice
    cfg = {"a": [1, 2.5, None, "???"], "b": {"c": "${a}"}, "d": True}
    state = {
        "namespace": Namespace(x=1, inner=Namespace(y=[Namespace(z=2)])),
        "choice": Choice.ONE,
        "numbers": [np.float64(0.1), np.int64(-7), np.float16(0.5), np.bool_(True)],
        "default": defaultdict(list, a=[1]),
        "deque": deque([1, 2]),
        "path": Path("/data/bin"),
        "cfg": OmegaConf.create(cfg),
        "tensor": torch.nn.Parameter(torch.arange(3.0)),
        "set": {1, 2},
    }
    try:
        old = saved(tmp_path / "old.pt", state)
    finally:
        constants.DDP_BACKEND_CHOICES = kept
    make_plain = Plain()
    found = make_plain(open_checkpoint(old))
    assert not make_plain.left_out
    assert found.pop("tensor").tolist() == [0, 1, 2]
    assert found == {
        "namespace": {"x": 1, "inner": {"y": [{"z": 2}]}},
        "choice": "one",
        "numbers": [0.1, -7, 0.5, True],
        "default": {"a": [1]},
        "deque": [1, 2],
        "path": "/data/bin",
        "cfg": cfg,
        "set": {1, 2},
    }


def refused(old: Path) -> str:
    """What is said of a checkpoint that is not converted."""
    with pytest.raises(ModelError) as told:
        converted(old)
    return str(told.value)


def attacks(flag: Path) -> dict[str, Any]:
    """Objects that would make a file if they were unpickled as pickle does."""
    return {
        "os.system": Runs(__import__("os").system, (f"touch {flag}",)),
        "builtins.eval": Runs(eval, (f"open({str(flag)!r}, 'w')",)),
        "builtins.getattr": Runs(getattr, (flag, "touch")),
        "subprocess.Popen": Runs(__import__("subprocess").Popen, (["touch", str(flag)],)),
        "pathlib.Path.touch": Runs(Path.touch, (flag,)),
    }


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("where", list(attacks(Path())))
def test_nothing_runs(tmp_path: Path, where: str, kind: str) -> None:
    flag = tmp_path / "ran"
    state = old_state(decoder(), settings()) | {"more": attacks(flag)[where]}
    with pytest.raises(ModelError, match="could run code"):
        open_checkpoint(saved(tmp_path / "old.pt", state, FORMATS[kind]))
    assert not flag.exists()


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    flag, new = tmp_path / "ran", tmp_path / "new.pt"
    state = old_state(decoder(), settings()) | {"more": list(attacks(flag).values())}
    old = saved(tmp_path / "old.pt", state)
    new.write_text("as it was")
    told = refuse(capsys, "convert-checkpoint", old, new)
    assert told.count("error:") == 1
    assert "nothing of it was run" in told
    assert not flag.exists()
    assert new.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.pt", "old.pt"]


def test_all_refused_types_are_named(tmp_path: Path) -> None:
    state = {
        "a": Runs(eval, ("1",)),
        "b": Runs(Path.cwd, ()),
        "c": pytest.Mark("x", (), {}, _ispytest=True),
    }
    with pytest.raises(ModelError) as told:
        open_checkpoint(saved(tmp_path / "old.pt", state))
    assert "builtins.eval" in str(told.value)
    assert "_pytest.mark.structures.Mark" in str(told.value)


def test_a_name_that_the_scan_was_kept_from_is_refused_by_pytorch(tmp_path: Path) -> None:
    """A second reader of the same bytes: what one is told, the other must not miss."""
    old = tmp_path / "old.pt"
    body = io.BytesIO()
    pickle.dump({"model": Runs(eval, ("1",))}, body, protocol=4)
    with zipfile.ZipFile(old, "w") as archive:
        archive.writestr("archive/data.pkl", body.getvalue())
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ModelError, match=r"builtins\.eval"):
        open_checkpoint(old)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adaptive_softmax_cutoff", "__import__('os').system('true')"),
        ("character_filters", "[(1, 64)] + [exit()]"),
        ("decoder_layers", "9**9**9**9"),
        ("adaptive_input_cutoff", "1" * 20_000),
    ],
)
def test_settings_that_fairseq_would_evaluate(tmp_path: Path, name: str, value: str) -> None:
    args = settings()
    setattr(args, name, value)
    old = saved(tmp_path / "old.pt", old_state(decoder(), args))
    told = refused(old)
    assert "could run code" in told
    assert name in told


def test_settings_that_are_lists_in_text_are_kept(tmp_path: Path) -> None:
    """Such as those of fconv_lm, and of an adaptive softmax."""
    args = settings(character_filters="[(1, 64), (2, 128)] * 2 + [(3, 4)]")
    args.adaptive_softmax_cutoff, args.criterion = "20,40", "adaptive_loss"
    old = saved(tmp_path / "old.pt", old_state(decoder(**ADAPTIVE), args))
    cfg = converted(old)[0]["cfg"]
    assert cfg["model"]["adaptive_softmax_cutoff"] == "20,40"


def test_settings_that_refer_to_others(tmp_path: Path) -> None:
    args = settings(save_dir="${oc.env:HOME}")
    old = saved(tmp_path / "old.pt", old_state(decoder(), args))
    assert "refers to others" in refused(old)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": 1}, "no weights under 'model', but a"),
        ([1, 2], "a list"),
        ({"model": {"weight": torch.ones(1)}}, "no settings"),
        ({"model": {"weight": 1}, "args": Namespace()}, "no tensor under weight"),
        ({"model": {}, "args": Namespace()}, "no weights"),
    ],
)
def test_what_is_no_checkpoint_of_fairseqs(tmp_path: Path, state: Any, says: str) -> None:
    old = saved(tmp_path / "old.pt", state)
    told = refused(old)
    assert "is no checkpoint of fairseq's" in told
    assert says in told


@pytest.mark.parametrize(
    "data", [b"", b"garbage " * 999, b"PK\x03\x04 cut off", b"\x80\x02}q\x00."]
)
def test_damaged_files(tmp_path: Path, data: bytes) -> None:
    old = tmp_path / "old.pt"
    old.write_bytes(data)
    told = refused(old)
    assert "cannot be read" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_file_that_is_cut_off(tmp_path: Path, kind: str) -> None:
    whole = saved(tmp_path / "whole.pt", old_state(decoder(), settings()), FORMATS[kind])
    old = tmp_path / "old.pt"
    old.write_bytes(whole.read_bytes()[:-1000])
    assert "cannot be read" in refused(old)


def test_files_that_cannot_be(tmp_path: Path, capsys: Capture) -> None:
    old = saved(tmp_path / "old.pt", old_state(decoder(), settings()))
    nowhere = tmp_path / "nowhere.pt"
    assert "no checkpoint" in refuse(capsys, "convert-checkpoint", nowhere, tmp_path / "new.pt")
    assert "a folder" in refuse(capsys, "convert-checkpoint", tmp_path, tmp_path / "new.pt")
    assert "take the place" in refuse(capsys, "convert-checkpoint", old, old)
    assert "NEW cannot be written" in refuse(capsys, "convert-checkpoint", old, tmp_path)


def test_a_checkpoint_of_today_stays_what_it_is(tmp_path: Path) -> None:
    """What was converted is converted into the same."""
    old = saved(tmp_path / "old.pt", old_state(decoder(), settings()))
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    write(old, first)
    write(first, second)
    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    weights = one.pop("model"), other.pop("model")
    assert one == other
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))

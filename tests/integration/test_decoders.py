"""Language models that are no Transformers: the stock scorer takes them, a datastore does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Lab, eval_lm, must, run

from fairseq_knnlm.errors import ConfigError, ModelError

DECODERS = {
    "lightconv_lm": [
        *("--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 16, "--decoder-layers", 2),
        *("--decoder-attention-heads", 2, "--decoder-kernel-size-list", "[3,3]"),
    ],
    "fconv_lm": ["--decoder-embed-dim", 16, "--decoder-layers", "[(16, 2)] * 2"],
    "lstm_lm": [
        *("--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16, "--decoder-layers", 1),
    ],
}


@pytest.mark.parametrize("arch", list(DECODERS))
def test_other_decoders(
    lab: Lab, datastore: Path, tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their checkpoints hold an argparse.Namespace, which torch loads only where told to trust it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    must(
        *("fairseq-train", lab.data, "--task", "language_modeling", "--arch", arch),
        *(*DECODERS[arch], "--cpu", "--optimizer", "adam", "--lr", 0.01, "--max-update", 1),
        *("--tokens-per-sample", 16, "--sample-break-mode", "none", "--max-tokens", 512),
        *("--save-dir", tmp_path, "--no-epoch-checkpoints", "--disable-validation"),
        *("--num-workers", 0),
    )
    path = ["--path", tmp_path / "checkpoint_last.pt"]
    ours = lab.evaluate("test", *path)
    words = lab.command("test", *path, "--num-workers", 0)
    words[words.index("knn_lm")] = "language_modeling"
    assert ours["loss"] == pytest.approx(eval_lm(words)["loss"], abs=2e-5)
    for flags in (
        ["--knnlm", "--dstore-filename", datastore, "--k", 4],
        ["--experts", "cache"],
        ["--save-knnlm-dstore", "--dstore-mmap", tmp_path / "store"],
    ):
        with pytest.raises(ModelError, match="keys cannot be read"):
            lab.evaluate("test", *path, *flags)
    with pytest.raises(ConfigError, match="does not work with"):
        lab.evaluate("test", *path, "--results-json", tmp_path / "results.json")


def test_several_checkpoints_with_a_datastore(lab: Lab, datastore: Path) -> None:
    """Refused once the second is there, before any text is read."""
    ran = run(
        *("fairseq-generate", lab.data, "--user-dir", Path(__file__).parents[2] / "fairseq_knnlm"),
        *("--task", "knn_lm", "--gen-subset", "test", "--score-reference", "--cpu"),
        *("--path", f"{lab.checkpoint()}:{lab.checkpoint('untied')}", "--tokens-per-sample", 8),
        *("--sample-break-mode", "none", "--knnlm", "--dstore-filename", datastore, "--k", 4),
    )
    assert ran.code == 1
    assert "error: " in ran.out
    assert "name one of them" in ran.out
    assert "Traceback" not in ran.out

"""What examples/huggingface tells a reader to type, typed in order on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, write_corpus
from hf_models import save_model, save_trained
from test_readme import blocks, commands, run_as_typed, run_script, scaled

RECIPE = (ROOT / "examples" / "huggingface" / "README.md").read_text(encoding="utf-8")
SIZES = {
    "--tokens-per-sample 1024 --stride 512 --max-tokens 8192": "--tokens-per-sample 64 "
    "--stride 32 --max-tokens 512",
    "--recipe paper": "--recipe IVF8,Flat",
    "--workers 8": "--workers 2",
}
SIZES_OF_DOMAIN = {
    "--tokens-per-sample 2048 --context-window 1024": "--tokens-per-sample 64 --context-window 32",
    "--new-tokens 40": "--new-tokens 8",
    "--workers 4": "--workers 1",
}


def part(title: str) -> str:
    """What stands under a heading of the second level."""
    return RECIPE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place like the clone, with models and texts in it."""
    place = tmp_path_factory.mktemp("clone")
    (place / "fairseq_knnlm").symlink_to(ROOT / "fairseq_knnlm")
    (place / "text").mkdir()
    (place / "wikitext-103-raw").mkdir()
    for split, path in write_corpus(place / "text").items():
        (place / "wikitext-103-raw" / f"wiki.{split}.raw").write_bytes(path.read_bytes())
    text = (place / "text" / "train.txt").read_text()
    save_trained(place / "gpt2-finetuned-wikitext103", "gpt2", text)
    save_trained(place / "pythia-1.4b", "gpt_neox", text)
    (place / "prompts.txt").write_text("w1 w2 w3\nw4 w5\n")
    return place


@pytest.mark.slow
def test_gpt2_on_wikitext_103(place: Path) -> None:
    said = run_script(scaled("\n".join(commands(part("GPT-2 on WikiText-103"))), SIZES), place)
    assert "32 to 63 tokens before each token, stride 32" in said
    assert "(calibrated on valid)" in said
    assert (place / "valid.json").is_file()
    assert (place / "test.json").is_file()


@pytest.mark.slow
def test_a_domain(place: Path) -> None:
    script = scaled("\n".join(commands(part("A domain of one's own"))), SIZES_OF_DOMAIN)
    said = run_script(script, place)
    assert "bfloat16" in said
    assert "a word" in said
    assert "w1 w2 w3" in said
    assert (place / "written.html").is_file()


def test_weights_that_are_pickled_are_saved_again(tmp_path: Path) -> None:
    save_model(tmp_path / "downloaded", "gpt2")
    (script,) = blocks(RECIPE, "python")
    run_as_typed("python", "-c", script, cwd=tmp_path)
    assert (tmp_path / "gpt2-finetuned-wikitext103" / "model.safetensors").is_file()
    assert (tmp_path / "gpt2-finetuned-wikitext103" / "tokenizer.json").is_file()

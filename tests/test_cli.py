"""The command line: what it refuses, in one sentence, and that its commands reach their rooms."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from ogpsa_jax import cli
from ogpsa_jax.cli import main
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_yaml
from ogpsa_jax.models import Decoder, load_pretrained, save_pretrained
from ogpsa_jax.models.config import read_config
from ogpsa_jax.models.folders import written_beside

TINY = "configs/models/tiny"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train"], "name at least one configuration file"),
        (["train", "no-such.yaml"], "no-such.yaml: cannot read the configuration"),
        (["train", "configs/smoke-sft.yaml", "ogpsa.rnak=3"], "did you mean 'rank'?"),
        (["evaluate", "no-such-model", "--suite", "no-such.yaml"], "no-such.yaml"),
        (["report", "no-such-run"], "no-such-run"),
        (["export", "no-such-run", "somewhere"], "give a run directory"),
        (["report", "x" * 300], "File name too long"),
        (["train", "configs/smoke-sft.yaml", "train=&a {steps: *a}"], "nested too deeply"),
        (
            ["train", "configs/smoke-sft.yaml", 'data.template="\\0"', "train.batch_size=16"],
            "a null character",
        ),
        (["merge", "no-such-a", "no-such-b", "--weight", "0.5", "--out", "o"], "no-such-a"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, told, capsys, tmp_path):
    arguments = [str(tmp_path / "o") if item == "o" else item for item in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    # What is being done is shown before it goes wrong.
    lines = [line for line in error.splitlines() if not line.endswith(": reading the data")]
    assert len(lines) == 1
    assert lines[0].startswith("ogpsa-jax: ")
    assert not any(tmp_path.iterdir())


def test_overrides_may_follow_an_option(capsys):
    parsed = cli._parsed(["plan", "a.yaml", "b=1", "--on", "h100:8", "c.d=2", "--json", "e=3"])
    assert parsed.config == ["a.yaml", "b=1", "c.d=2", "e=3"]
    assert parsed.json
    for wrong in (["plan", "a.yaml", "--on", "h100:8", "--sjon"], ["export", "run", "to", "a=1"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(wrong)
        assert stopped.value.code == 2
        assert f"unrecognized arguments: {wrong[-1]}" in capsys.readouterr().err


def test_every_key_is_listed_with_its_meaning(capsys):
    assert main(["train", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("ogpsa.preset [recommended] (paper | recommended | in-step")
        for line in lines
    )
    assert all(line.partition("]")[2].partition(": ")[2] for line in lines)


def test_merge_writes_one_folder_a_weight(tmp_path, capsys):
    config = read_config(Path(TINY))
    for seed, name in enumerate("ab"):
        model = Decoder(config, rngs=nnx.Rngs(seed))
        save_pretrained(model, tmp_path / name, source=TINY)
    out = tmp_path / "merged"
    assert (
        main(
            [
                "merge",
                str(tmp_path / "a"),
                str(tmp_path / "b"),
                "--weight",
                "0.25",
                "0.5",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.split() == [str(out / "0.25"), str(out / "0.5")]
    a, b, merged = (
        np.asarray(load_pretrained(folder, dtype="float32").embed_tokens.embedding[...])
        for folder in (tmp_path / "a", tmp_path / "b", out / "0.25")
    )
    np.testing.assert_allclose(merged, 0.75 * a + 0.25 * b, atol=1e-7)
    files = sorted(tmp_path.rglob("*"))
    folders = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["merge", *folders, "--weight", "0.2", "0.4", "--out", folders[0]]) == 2
    assert "write several merges to another folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == files


def test_a_command_without_its_packages_says_what_to_install():
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from ogpsa_jax.cli import main; sys.exit(main(['train', '--keys']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ogpsa-jax: the package yaml is not installed; install ogpsa_jax")
    assert len(done.stderr.splitlines()) == 1


def test_an_export_replaces_what_an_export_wrote_and_nothing_else(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    told = r"contains config\.json, not written by an export"
    with pytest.raises(InputError, match=told), written_beside(theirs):
        raise AssertionError("must not be reached")
    ours = tmp_path / "ours"
    for content in ("first", "second"):
        with written_beside(ours) as beside:
            (beside / "config.json").write_text(content)
        assert (ours / "config.json").read_text() == content
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"contains notes\.txt"), written_beside(ours):
        raise AssertionError("must not be reached")
    assert (ours / "notes.txt").read_text() == "mine"


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("objective: sft\nogpsa: {preset: paper}\nogpsa: {preset: off}\n")
    with pytest.raises(InputError, match="line 3: the key 'ogpsa' appears a second time"):
        read_yaml(path, "configuration")

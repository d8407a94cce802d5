"""Tests of converting published weights: scores equal the published network's, and mismatched weights are errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, CLIPModel
from typer.testing import CliRunner

import hf_mel.cli
from hf_mel.errors import DataFormatError, MelError, RecipeError
from hf_mel.hub.convert import convert_checkpoint
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.training.tokenizer import train_wordpiece
from tests.modeling import published_mimic


@pytest.fixture
def published(tmp_path):
    """A folder with a published checkpoint, its weights, a batch, and the published network's outputs for it."""
    weights, batch = published_mimic.state_dict(), published_mimic.inputs()
    clip = CLIPModel(published_mimic.clip_config())
    clip.load_state_dict(
        {k.removeprefix("encoder.clip."): v for k, v in weights.items() if k.startswith("encoder.clip.")}
    )
    config = {"clip_config": published_mimic.clip_config().to_dict(), "dims": published_mimic.DIMS}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "weights.safetensors")
    return tmp_path, weights, batch, published_mimic.outputs(weights, batch, clip)


def convert(folder, **changes):
    arguments = {
        "method": "mimic",
        "state_dict": folder / "weights.safetensors",
        "config": folder / "config.json",
        "output": folder / "model",
    }
    return convert_checkpoint(**(arguments | changes))


def test_converted_weights_give_the_published_scores(published):
    folder, weights, batch, expected = published
    converted, unused = convert(folder)
    assert converted + len(unused) == len(weights)
    assert sorted(unused) == [
        "encoder.clip.logit_scale",
        "matcher.cmfu.context_layer_norm.bias",
        "matcher.cmfu.context_layer_norm.weight",
    ]
    model = AutoModel.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        out = model(**batch)
        first = {k: v[:4] if k.startswith("entity") else v for k, v in batch.items()}
        loss = model(**first, labels=torch.arange(4)).loss
    torch.testing.assert_close(out.scores, expected["score"], atol=1e-5, rtol=1e-5)
    for unit, scores in out.unit_scores.items():
        torch.testing.assert_close(scores, expected[f"{unit}_score"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.reshape(1), expected["loss_first_entities_as_positives"], atol=1e-5, rtol=1e-5)


def test_a_converted_folder_with_a_tokenizer_evaluates_and_links(published, tmp_path_factory):
    folder, _, batch, expected = published
    encoder = tmp_path_factory.mktemp("clip")
    CLIPModel(published_mimic.clip_config()).save_pretrained(encoder)
    train_wordpiece(["a mention of an entity"] * 3, 50).save_pretrained(encoder)
    convert(folder, tokenizer=str(encoder))
    model, processor = load_retriever(folder / "model")
    assert dict(processor.image_processor.size) == {"height": 16, "width": 16}
    # The published network reads eq. 2 and 3 as they are printed.
    assert (processor.mention_template, processor.mention_marks) == ("{mention} [SEP] {text}", None)
    assert processor.entity_template == "{name} [SEP] {attributes}"
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).scores, expected["score"], atol=1e-5, rtol=1e-5)


def test_prefixes_of_training_checkpoints_are_removed(published):
    folder, weights, *_ = published
    save_file({f"model.{k}": v.contiguous() for k, v in weights.items()}, folder / "weights.safetensors")
    convert(folder)
    assert (folder / "model" / "model.safetensors").exists()


def break_weights(folder, change):
    weights = published_mimic.state_dict()
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "weights.safetensors")


BAD = {
    "a key is missing": (lambda w: w.pop("matcher.tglu.fc_key.bias"), "tglu.fc_key.bias"),
    "a key is unknown": (lambda w: w.update(surprise=torch.ones(1)), "surprise"),
    "a shape is another": (lambda w: w.update({"matcher.cmfu.text_fc.bias": torch.ones(3)}), "cmfu.fc_text.bias"),
}


@pytest.mark.parametrize(("change", "word"), BAD.values(), ids=BAD.keys())
def test_mismatched_weights_are_named_and_nothing_is_written(published, change, word):
    folder = published[0]
    break_weights(folder, change)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(DataFormatError) as error:
        convert(folder)
    assert word in str(error.value)
    assert "weights.safetensors" in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_report_lists_every_unused_key(published, tmp_path):
    folder = published[0]

    def change(weights):
        weights.pop("matcher.tglu.fc_key.bias")
        weights.update({f"surprise.{k}": torch.ones(1) for k in range(12)})
        weights["matcher.cmfu.text_fc.bias"] = torch.ones(3)

    break_weights(folder, change)
    with pytest.raises(DataFormatError):  # the error names the first eight
        convert(folder, report=tmp_path / "keys.json")
    keys = json.loads((tmp_path / "keys.json").read_text())
    assert set(keys["unknown"]) == {f"surprise.{k}" for k in range(12)}
    assert keys["missing"] == ["tglu.fc_key.bias"]
    assert len(keys["other_shape"]) == 1
    assert "cmfu.fc_text.bias has shape (3,)" in keys["other_shape"][0]
    assert keys["no_place"] == []


def test_invalid_files_are_refused(published):
    folder = published[0]
    with pytest.raises(DataFormatError, match="does not exist"):
        convert(folder, state_dict=folder / "none.safetensors")
    with pytest.raises(DataFormatError, match="does not exist"):
        convert(folder, config=folder / "none.json")
    (folder / "pickle.bin").write_bytes(b"\x80\x04not tensors")
    with pytest.raises(DataFormatError, match="refused"):
        convert(folder, state_dict=folder / "pickle.bin")
    (folder / "bad.json").write_text("{")
    with pytest.raises(DataFormatError, match="not JSON"):
        convert(folder, config=folder / "bad.json")
    (folder / "list.json").write_text("[]")
    with pytest.raises(DataFormatError, match="JSON object"):
        convert(folder, config=folder / "list.json")
    (folder / "short.json").write_text('{"clip_config": {}, "dims": {"dv": 3}}')
    for folder_as_file in ({"state_dict": folder}, {"config": folder}):
        with pytest.raises(DataFormatError, match=folder.name):
            convert(folder, **folder_as_file)
    with pytest.raises(MelError, match="not an empty folder"):
        convert(folder, output=folder / "config.json")
    with pytest.raises(MelError, match="tokenizer"):
        convert(folder, tokenizer=str(folder / "none"))
    with pytest.raises(DataFormatError, match=r"dims\.TGLU_hidden_dim"):
        convert(folder, config=folder / "short.json")
    with pytest.raises(RecipeError, match="mimic"):
        convert(folder, method="nothing")


def test_a_folder_that_is_not_empty_is_not_overwritten(published):
    folder = published[0]
    (folder / "model").mkdir()
    (folder / "model" / "mine.txt").write_text("keep")
    with pytest.raises(MelError, match="not an empty folder"):
        convert(folder)
    assert [path.name for path in (folder / "model").iterdir()] == ["mine.txt"]


def test_a_folder_that_is_a_link_is_written_where_it_points(published):
    folder = published[0]
    (folder / "real").mkdir()
    (folder / "model").symlink_to("real")
    convert(folder)
    assert (folder / "model").is_symlink()
    assert (folder / "real" / "config.json").is_file()


def test_the_command_line_converts(published):
    folder = published[0]
    arguments = ["convert", "mimic", "--state-dict", str(folder / "weights.safetensors")]
    arguments += ["--config", str(folder / "config.json"), "--output", str(folder / "model")]
    result = CliRunner().invoke(hf_mel.cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "context_layer_norm" in result.output.replace("\n", "")

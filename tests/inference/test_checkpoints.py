import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_mel.errors import UnknownModelError
from hf_mel.inference import checkpoints as loading
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.training.assemble import build_model
from hf_mel.training.recipe import Recipe
from tests.toy import ToyProcessor, ToyRetriever, register, toy_model


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()


@pytest.fixture
def folder(tmp_path):
    toy_model(seed=3).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    ToyProcessor(text_width=20).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_as_a_float32_model_in_evaluation_mode_and_its_processor(folder):
    model, processor = load_retriever(folder, device="cpu")
    assert isinstance(model, ToyRetriever)
    assert isinstance(processor, ToyProcessor)
    assert not model.training
    assert processor.text_width == 20
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = toy_model(seed=3).mention_text.weight.to(torch.bfloat16).float()
    assert torch.equal(model.mention_text.weight, expected)


def test_threads_that_load_leave_transformers_as_it_was(folder, monkeypatch):
    before, loading_now, most = PreTrainedModel.tie_weights, [], []
    load, make = ToyRetriever._load_pretrained_model, ToyRetriever.__init__

    def wait():
        loading_now.append(1)
        time.sleep(0.1)  # the other thread begins
        most.append(len(loading_now))
        loading_now.pop()

    def slowly(*args, **kwargs):
        wait()
        return load(*args, **kwargs)

    def made_slowly(self, *args, **kwargs):
        wait()
        make(self, *args, **kwargs)

    monkeypatch.setattr(ToyRetriever, "_load_pretrained_model", staticmethod(slowly))
    monkeypatch.setattr(ToyRetriever, "__init__", made_slowly)
    recipe = Recipe.from_dict({"name": "x", "model": {"from_pretrained": str(folder)}, "data": {"dataset": "x"}})
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(load_retriever, folder, device="cpu") for _ in range(2)]
        for job in [*jobs, threads.submit(build_model, recipe)]:
            job.result()
    assert set(most) == {1}
    assert PreTrainedModel.tie_weights is before
    assert torch.get_default_dtype() == torch.float32


def test_a_name_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "typo", "nobody/nothing", "no spaces allowed"):
        with pytest.raises(UnknownModelError, match="cannot be loaded"):
            load_retriever(name)


def test_missing_weights_are_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["mention_text.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnknownModelError, match=r"lack 1 of .*mention_text\.weight"):
        load_retriever(folder)


def test_a_damaged_weight_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UnknownModelError, match="cannot be loaded"):
        load_retriever(folder)


def test_a_configuration_with_a_wrong_type_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": "many"}))
    with pytest.raises(UnknownModelError, match="cannot be loaded"):
        load_retriever(folder)


def test_an_unknown_device_is_refused_by_name(folder):
    with pytest.raises(UnknownModelError, match="'nowhere'"):
        load_retriever(folder, device="nowhere")


def test_a_model_that_is_no_retriever_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=8, vocab_size=9)).save_pretrained(tmp_path)
    ToyProcessor().save_pretrained(tmp_path)
    with pytest.raises(UnknownModelError, match="GPT2Model"):
        load_retriever(tmp_path)


def test_a_tokenizer_in_place_of_a_processor_is_refused(folder, monkeypatch):
    def tokenizer(text):
        raise AssertionError

    # What AutoProcessor answers for a folder whose processor class it does not know.
    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer)
    with pytest.raises(UnknownModelError, match="no processor for mentions"):
        load_retriever(folder)

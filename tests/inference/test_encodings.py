import pytest
import torch

from hf_mel.inference.encode import encode_batches, encode_rows
from hf_mel.inference.encodings import concat_encodings, num_rows, row_bytes, slice_encodings, to_device
from hf_mel.inference.fingerprint import model_fingerprint
from hf_mel.inference.inputs import ModelInputs
from tests.toy import ToyEncodings, ToyProcessor, toy_entities, toy_mentions, toy_model


def test_concatenated_slices_equal_the_whole():
    encodings = {"a": torch.arange(12).view(6, 2), "b": torch.arange(6)}
    parts = [slice_encodings(encodings, slice(0, 1)), slice_encodings(encodings, slice(1, 6))]
    joined = concat_encodings(parts)
    assert joined.keys() == encodings.keys()
    assert all(torch.equal(joined[name], encodings[name]) for name in encodings)


def test_a_slice_by_row_numbers_has_these_rows_in_their_order():
    encodings = {"a": torch.arange(12).view(6, 2)}
    assert slice_encodings(encodings, [4, 0])["a"].tolist() == [[8, 9], [0, 1]]
    assert slice_encodings(encodings, torch.tensor([4]))["a"].tolist() == [[8, 9]]
    assert slice_encodings(encodings, [])["a"].shape == (0, 2)


def test_model_outputs_become_plain_dicts_without_absent_fields():
    output = ToyEncodings(text=torch.zeros(3, 2))
    for plain in (slice_encodings(output, slice(1, 3)), concat_encodings([output]), to_device(output, "cpu")):
        assert type(plain) is dict
        assert list(plain) == ["text"]


def test_rows_and_bytes_are_counted_and_unequal_lengths_are_refused():
    assert num_rows({"a": torch.zeros(3, 2), "b": torch.zeros(3)}) == 3
    assert row_bytes({"a": torch.zeros(3, 2, 5), "b": torch.zeros(3, dtype=torch.int64)}) == 10 * 4 + 8
    with pytest.raises(ValueError, match="'a': 3, 'b': 2"):
        num_rows({"a": torch.zeros(3), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="common first axis"):
        num_rows({})


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        concat_encodings([{"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 3)}])
    with pytest.raises(ValueError, match="'b'"):
        concat_encodings([{"a": torch.zeros(1, 2)}, {"b": torch.zeros(1, 2)}])
    with pytest.raises(ValueError, match="no encodings"):
        concat_encodings([])


@pytest.mark.parametrize(("kind", "rows"), [("mentions", toy_mentions(7)), ("entities", toy_entities(7))])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_encodings_do_not_depend_on_the_batch_size(kind, rows, batch_size):
    model, processor = toy_model(), ToyProcessor()
    encode = model.encode_mentions if kind == "mentions" else model.encode_entities
    with torch.no_grad():
        expected = encode(**processor(**{kind: [rows[i] for i in range(7)]}))
    encodings = encode_rows(ModelInputs(model, processor), rows, kind, batch_size=batch_size)
    for name in expected:
        torch.testing.assert_close(encodings[name], expected[name])


def test_half_precision_models_store_float32():
    model = toy_model().to(torch.bfloat16)
    encodings = encode_rows(ModelInputs(model, ToyProcessor()), toy_entities(3), "entities")
    assert {tensor.dtype for tensor in encodings.values()} == {torch.float32}


def test_encoding_leaves_gradients_enabled_for_the_caller():
    batches = encode_batches(ModelInputs(toy_model(), ToyProcessor()), toy_entities(4), "entities", batch_size=2)
    next(batches)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_no_rows_to_encode_are_refused():
    with pytest.raises(ValueError, match="no entities"):
        encode_rows(ModelInputs(toy_model(), ToyProcessor()), toy_entities(3).select([]), "entities")


def test_encodings_that_change_shape_between_batches_are_refused():
    class Growing(ToyProcessor):
        def __call__(self, **rows):
            return {"entity_x": torch.ones(1, len(rows["entities"][0]["name"]))}

    model = toy_model()
    model.encode_entities = lambda entity_x: {"x": entity_x}
    rows = toy_entities(2).map(lambda row, i: {"name": "x" * (i + 1)}, with_indices=True)
    with pytest.raises(ValueError, match="change shape between batches"):
        encode_rows(ModelInputs(model, Growing()), rows, "entities", batch_size=1)


def test_fingerprint_depends_on_the_weights_alone(tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == model_fingerprint(model)
    before = model_fingerprint(model)
    with torch.no_grad():
        model.mention_text.bias[0] += 1e-3
    assert model_fingerprint(model) != before
    assert model_fingerprint(toy_model(seed=1)) != before

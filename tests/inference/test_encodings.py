import threading

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mel.errors import ImageError
from hf_mel.inference import encode
from hf_mel.inference.encode import encode_batches, encode_rows, window_rows
from hf_mel.inference.encodings import concat_encodings, num_rows, row_bytes, slice_encodings, to_device
from hf_mel.inference.fingerprint import model_fingerprint
from hf_mel.inference.inputs import ModelInputs
from hf_mel.schema import entity_features, mention_features
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


class _Counting:
    """The toy model and processor: counts the rows that are encoded and the widths that texts are padded to."""

    def __init__(self):
        self.model, self.num_encoded, self.widths = toy_model(), 0, []
        encode = {kind: getattr(self.model, f"encode_{kind}") for kind in ("mentions", "entities")}

        def counted(kind):
            def encoded(**tensors):
                mask = tensors["mention_attention_mask" if kind == "mentions" else "entity_attention_mask"]
                self.num_encoded += len(mask)
                self.widths.append(int(mask.any(0).sum()))
                return encode[kind](**tensors)

            return encoded

        for kind in encode:
            setattr(self.model, f"encode_{kind}", counted(kind))


texts = st.text("ab ", max_size=40)


@given(st.lists(st.tuples(texts, st.sampled_from([None, "red", "blue"])), min_size=1, max_size=30), st.data())
@settings(max_examples=30, deadline=None)
def test_encodings_of_a_window_are_those_of_its_rows_one_by_one(contents, data):
    batch_size, window = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    kind = data.draw(st.sampled_from(["mentions", "entities"]))
    images = {name: Image.new("RGB", (4, 4), name) for name in ("red", "blue")} | {None: None}
    features = mention_features() if kind == "mentions" else entity_features()
    columns = {name: [[] if name in ("candidates", "aliases") else ""] * len(contents) for name in features}
    columns |= {"text": [text for text, _ in contents], "attributes": [text for text, _ in contents]}
    columns |= {"image": [images[image] for _, image in contents]}
    columns |= {"images": [[images[image]] if image else [] for _, image in contents]}
    columns |= {"start": [0] * len(contents), "end": [0] * len(contents)}
    rows = datasets.Dataset.from_dict({name: columns[name] for name in features}, features=features)
    counting, processor = _Counting(), ToyProcessor()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_WINDOW_BATCHES", window)
        parts = list(encode_batches(ModelInputs(counting.model, processor), rows, kind, batch_size=batch_size))
    assert [num_rows(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    alone = toy_model()
    encode_one = alone.encode_mentions if kind == "mentions" else alone.encode_entities
    with torch.no_grad():
        expected = concat_encodings([encode_one(**processor(**{kind: [row]})) for row in rows])
    joined = concat_encodings(parts)
    for name, tensor in expected.items():
        torch.testing.assert_close(joined[name], tensor)
    step = batch_size * window
    windows = [contents[first : first + step] for first in range(0, len(contents), step)]
    assert counting.num_encoded == sum(len(set(rows_of_window)) for rows_of_window in windows)


def test_texts_of_similar_length_share_a_batch():
    lengths = [40, 1, 30, 2, 20, 3, 10, 4]
    rows = toy_entities(8).map(lambda row, i: {"name": "", "attributes": "a" * lengths[i]}, with_indices=True)
    counting = _Counting()
    encode_rows(ModelInputs(counting.model, ToyProcessor()), rows, "entities", batch_size=2)
    assert counting.widths == [1 + longest for longest in (2, 4, 20, 40)]


@pytest.mark.parametrize("held_bytes", [1, 2**20])
def test_rows_are_ordered_by_their_tokens_while_few_inputs_are_held(held_bytes, monkeypatch):
    """The names have as many characters, and the processor reads fewer of some."""

    class Words(ToyProcessor):
        def _encode(self, texts, images):
            return super()._encode([text.strip() for text in texts], images)

    monkeypatch.setattr(encode, "_HELD_BYTES", held_bytes)
    lengths = [30, 1, 20, 2]
    rows = toy_entities(4).map(
        lambda row, i: {"name": "b" * lengths[i] + " " * (40 - lengths[i]), "attributes": ""}, with_indices=True
    )
    counting = _Counting()
    encodings = encode_rows(ModelInputs(counting.model, Words()), rows, "entities", batch_size=2)
    assert counting.widths == ([30, 20] if held_bytes == 1 else [2, 30])
    with torch.no_grad():
        expected = toy_model().encode_entities(**Words()(entities=list(rows)))
    torch.testing.assert_close(encodings["text"], expected["text"])


def test_a_part_that_starts_with_a_window_has_the_bits_that_it_has_in_the_whole():
    rows, options = toy_entities(30), {"kind": "entities", "batch_size": 2}
    inputs = ModelInputs(toy_model(), ToyProcessor())
    whole = concat_encodings(encode_batches(inputs, rows, **options))
    first = window_rows(2)
    part = concat_encodings(encode_batches(inputs, rows.select(range(first, 30)), **options))
    assert first < 30
    for name, tensor in part.items():
        assert torch.equal(whole[name][first:], tensor)


def test_a_damaged_image_ends_the_encoding_and_its_thread():
    entities = toy_entities(6).with_format("arrow")[:].to_pylist()
    entities[4]["images"] = [{"bytes": b"x", "path": None}]
    rows = datasets.Dataset.from_list(entities, features=entity_features())
    with pytest.raises(ImageError, match=entities[4]["entity_id"]):
        encode_rows(ModelInputs(toy_model(), ToyProcessor()), rows, "entities", batch_size=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]

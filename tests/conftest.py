"""Settings of Hypothesis, and a small workspace for README, docs, examples and the notebook: what `make demo` leaves."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import datasets
import hypothesis
import pytest

# No test is timed: a busy machine must not fail one.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).parent.parent
#: Mentions of each split in the small form of FlagsMEL, and its posts.
SIZES, POSTS = {"train": 32, "validation": 16, "test": 32}, 40
#: Entities that pages name, besides the golds.
NAMED = {"Q117", "Q1008", "Q142", "Q39", "Q884", "Q423"}


def use_small_flags(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Lets the builder of FlagsMEL generate its small form: few mentions and posts, and only the entities they need.

    The working folder is `folder`, which also holds the cache of `datasets`.
    """
    from hf_mel.dataset_scripts.flags_mel import flags_mel, planning

    patch.chdir(folder)
    patch.setenv("COLUMNS", "200")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf_cache")
    for split, size in SIZES.items():
        patch.setitem(planning.SPLIT_SIZES, split, size)
    patch.setattr(flags_mel.FlagsMel, "OFFICIAL_COUNTS", {})
    golds = {m.qid for split in SIZES for context in planning.plan_mentions(0, split) for m in context.mentions}
    patch.setattr(flags_mel, "COUNTRIES", [c for c in flags_mel.COUNTRIES if c.qid in golds | NAMED])
    posts = [post for post in planning.plan_posts(0) if post.qid in golds][:POSTS]
    patch.setattr(flags_mel, "plan_posts", lambda seed: posts)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which `hf-mel demo` ran on the small form, with three steps of training, and what it printed.

    It also holds an untrained reranker of the demo's candidates, `runs/mmel_flags`, and a link to `spaces/`.
    """
    import hf_mel.cli
    from hf_mel.hub.saving import save_model_repository
    from hf_mel.training.assemble import build_model
    from hf_mel.training.recipe import Recipe

    folder = tmp_path_factory.mktemp("demo")
    load = Recipe.load.__func__
    short = ["training.max_steps=3", "training.num_train_epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        use_small_flags(patch, folder)
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as inner:
            inner.setattr(
                Recipe, "load", classmethod(lambda cls, name, overrides=(): load(cls, name, [*overrides, *short]))
            )
            hf_mel.cli.demo(folder=Path("."))
        small = ["hidden_size=128", "intermediate_size=64", "num_attention_heads=2"]
        overrides = ["model.text=part:text_model:runs/mimic_flags", "processor.options.max_length=64"]
        recipe = Recipe.load("mmel_flags", [*overrides, *(f"model.config.{field}" for field in small)])
        save_model_repository(*build_model(recipe), "runs/mmel_flags")
        (folder / "spaces").symlink_to(ROOT / "spaces")
    return folder, printed.getvalue()

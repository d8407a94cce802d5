"""Finds the packages; everything else is in pyproject.toml.

The five wings are top-level folders and install below `hf_mel`. Four are each what one kind of Hub repository carries, the fifth
holds the suites of `hf-mel bench`.
"""

from setuptools import find_packages, setup

WINGS = ("modeling", "dataset_scripts", "spaces", "recipes", "suites")

setup(
    packages=[
        *find_packages(include=["hf_mel", "hf_mel.*"]),
        *(f"hf_mel.{wing}" for wing in WINGS),
        *(f"hf_mel.{wing}.{package}" for wing in WINGS for package in find_packages(wing)),
    ],
    package_dir={f"hf_mel.{wing}": wing for wing in WINGS},
)

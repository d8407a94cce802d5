"""Finds the packages; everything else is in pyproject.toml.

The four wings are top-level folders, each what one kind of Hub repository carries, and install below `hf_mel`.
"""

from setuptools import find_packages, setup

WINGS = ("modeling", "dataset_scripts", "spaces", "recipes")

setup(
    packages=[
        *find_packages(include=["hf_mel", "hf_mel.*"]),
        *(f"hf_mel.{wing}" for wing in WINGS),
        *(f"hf_mel.{wing}.{package}" for wing in WINGS for package in find_packages(wing)),
    ],
    package_dir={f"hf_mel.{wing}": wing for wing in WINGS},
)

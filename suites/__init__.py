"""Suites that come with hf_mel: grids of runs for `hf-mel bench`."""

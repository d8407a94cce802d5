"""One folder per method; each is the code a model repository of that method carries."""

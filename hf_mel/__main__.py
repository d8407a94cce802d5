"""`python -m hf_mel` is `hf-mel`; `accelerate launch -m hf_mel evaluate …` runs it in several processes."""

from hf_mel.cli import main

if __name__ == "__main__":
    main()
